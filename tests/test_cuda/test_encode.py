# SPDX-License-Identifier: Apache-2.0
"""The quantizer's inner loops on a GPU give the CPU's bytes: codes, q, errors, also where rounding decides."""

import pytest
import torch

from pvq_vllm import _C, cuda_ops, quantizer_ops
from pvq_vllm.codec.serving import SERVING, codebook_id

pytestmark = pytest.mark.cuda

NAMES = [*SERVING, "int8"]
ROWS, COLUMNS = 70, 136  # neither fills a block of threads

# pvq4, scale 1: a codeword is one rounding nearer than the lower bound that the CPU's search skips it by.
SKIPPED_BY_A_ROUNDING = (
    "0x1.2ffffep+3 0x1.fbfffep+5 0x1.cbfffep+5 -0x1.6c0002p+5 -0x1.effffep+3 -0x1.cbfffcp+5 -0x1.bffffcp+1 0x1.ccp+5",
    "-0x1.cbfffep+5 0x1.98p+4 -0x1.17fffcp+4 0x1.cbfffep+5 -0x1.cbfffep+5 -0x1.cc0002p+5 0x1.800004p+0 0x1.8cp+5",
    "0x1.b8p+4 -0x1.9bfffep+5 -0x1.fcp+5 -0x1.15fffep+6 -0x1.cbfffep+5 0x1.2ffffep+3 0x1.300004p+3 -0x1.3p+3",
)


def _midpoints(name: str, generator: torch.Generator) -> torch.Tensor:
    """Half-way between neighbouring magnitudes of one gain a group, or up to two roundings off."""
    gains = torch.tensor(SERVING[name].gains).view(-1, 2).float() if name != "int8" else torch.ones(1, 2)
    base, step = (
        gains[torch.randint(len(gains), (ROWS, COLUMNS // 8, 1), generator=generator)]
        .repeat(1, 1, 8, 1)
        .unbind(-1)
    )
    steps = torch.randint(12, base.shape, generator=generator) - 0.5
    values = (base + 0.5 + step * steps).view(ROWS, COLUMNS)
    roundings = torch.randint(-2, 3, values.shape, generator=generator, dtype=torch.int32)
    values = torch.where(values != 0, values.view(torch.int32) + roundings, 0).view(torch.float32)
    return values * (torch.randint(2, values.shape, generator=generator) * 2 - 1)


def cases(name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weights [ROWS, COLUMNS] and row scales that are hard to agree on."""
    generator = torch.Generator().manual_seed(len(name))
    gauss = torch.randn(ROWS, COLUMNS, generator=generator)
    ones = torch.ones(ROWS)
    rms = 40.0 if name == "int8" else SERVING[name].target_rms
    scales = torch.rand(ROWS, generator=generator) * 2.0 ** torch.arange(-35, 35)
    outliers = gauss.clone()
    outliers[:, ::8] *= 10.0 ** torch.arange(3, 38).repeat(2)[:, None]
    mixed = scales.clone()
    mixed[::2] = 0
    found = {
        "gaussian": (gauss * rms, ones),
        "scaled": (gauss * rms * scales[:, None], scales),
        "ties": ((gauss * rms * 2).round() / 2, ones),
        "equal in a group": (gauss[:, ::8].repeat_interleave(8, dim=1) * rms, ones),
        "midpoints": (_midpoints(name, generator), ones),
        "sparse": (gauss * rms * (torch.rand(ROWS, COLUMNS, generator=generator) < 0.3), ones),
        "zeros": (torch.zeros(ROWS, COLUMNS), ones),
        "negative zeros": (-torch.zeros(ROWS, COLUMNS), ones),
        "scale 0": (gauss, mixed),
        "outliers": (outliers, ones),
        "squares overflow": (2.2e18 * (0.8 + 0.4 * torch.rand(ROWS, COLUMNS, generator=generator)), ones),
        "denormal": (gauss * 1e-40, ones * 1e-41),
    }
    if name == "pvq4":
        groups = [[float.fromhex(v) for v in group.split()] for group in SKIPPED_BY_A_ROUNDING]
        found["skipped"] = (torch.tensor(groups), torch.ones(3))
    return found


CASES = [(name, case) for name in NAMES for case in cases(name)]


def differences(got: torch.Tensor, expected: torch.Tensor) -> int:
    """Values that are not the same bits; every NaN is the same."""
    got = got.cpu()
    assert got.shape == expected.shape and got.dtype == expected.dtype
    if got.dtype == torch.float32:
        both_nan = got.isnan() & expected.isnan()
        return int(((got.view(torch.int32) != expected.view(torch.int32)) & ~both_nan).sum())
    return int((got != expected).sum())


@pytest.mark.parametrize(("name", "case"), CASES)
def test_nearest_codewords_are_the_cpus(name, case):
    weight, scale = cases(name)[case]
    expected = quantizer_ops.quantize_rows(weight, name, scale)
    got = quantizer_ops.quantize_rows(weight.cuda(), name, scale.cuda())
    assert [differences(a, b) for a, b in zip(got, expected, strict=True)] == [0, 0]


def metric_arguments(columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U, H, metrics of U's groups) of a random positive definite H."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.triu(torch.randn(columns, columns, generator=generator) * 0.2, 1)
    factor += torch.diag(torch.rand(columns, generator=generator) + 0.5)
    blocks = torch.stack([factor[i : i + 8, i : i + 8] for i in range(0, columns, 8)])
    inverse = torch.linalg.inv(blocks.double())
    metrics = torch.stack([blocks, (inverse @ inverse.mT).float()], dim=1).contiguous()
    return factor, factor @ factor.T, metrics


@pytest.mark.parametrize(("name", "case"), CASES)
def test_feedback_is_the_cpus(name, case):
    weight, scale = cases(name)[case]
    factor, _, metrics = metric_arguments(weight.shape[1])
    expected = quantizer_ops.feedback_block(weight, factor, metrics, name, scale)
    on_gpu = weight.cuda()
    got = quantizer_ops.feedback_block(on_gpu, factor.cuda(), metrics.cuda(), name, scale.cuda())
    assert [differences(a, b) for a, b in zip(got, expected, strict=True)] == [0, 0, 0]
    assert differences(on_gpu, weight) == 0  # not modified


@pytest.mark.parametrize(("name", "case"), CASES)
def test_descent_is_the_cpus(name, case):
    weight, scale = cases(name)[case]
    _, hessian, metrics = metric_arguments(weight.shape[1])
    codes, q = quantizer_ops.quantize_rows(weight, name, scale)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    gradient = 20 * noise * scale[:, None]  # large enough to move codes of every codebook
    on_gpu = [tensor.cuda() for tensor in (codes, q)]
    others = (hessian, metrics)
    quantizer_ops.descend_block(
        weight.cuda(), *on_gpu, gradient.cuda(), *(t.cuda() for t in others), name, scale.cuda()
    )
    before = q.clone()
    quantizer_ops.descend_block(weight, codes, q, gradient, *others, name, scale)
    assert [differences(a, b) for a, b in zip(on_gpu, (codes, q), strict=True)] == [0, 0]
    if case == "gaussian":
        assert not torch.equal(q, before)


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, case in CASES if name != "int8"])
@pytest.mark.parametrize("stride", [1, 3])
def test_encoding_error_is_the_cpus(name, case, stride):
    weight, scale = cases(name)[case]
    rows, columns = weight.shape
    expected = torch.full((rows,), float("nan"))
    addresses = weight.data_ptr(), scale.data_ptr(), rows, columns, stride, expected.data_ptr()
    _C.encoding_error(codebook_id(name), *addresses)
    got = torch.full((rows,), float("nan")).cuda()
    cuda_ops.encoding_error(weight.cuda(), scale.cuda(), codebook_id(name), stride, got)
    assert differences(got, expected) == 0


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_and_no_columns(name):
    for rows, columns in ((0, 64), (3, 0)):
        weight, scale = torch.zeros(rows, columns).cuda(), torch.ones(rows).cuda()
        codes, q = quantizer_ops.quantize_rows(weight, name, scale)
        assert codes.shape[:2] == (rows, columns // 8) and q.shape == (rows, columns)


@pytest.mark.parametrize("name", NAMES)
def test_a_million_groups(name):
    weight = torch.randn(2048, 4096, generator=torch.Generator().manual_seed(7))
    scale = (
        weight.abs().amax(dim=1) / 127
        if name == "int8"
        else torch.full((2048,), 1 / SERVING[name].target_rms)
    )
    expected = quantizer_ops.quantize_rows(weight, name, scale)
    got = quantizer_ops.quantize_rows(weight.cuda(), name, scale.cuda())
    assert [differences(a, b) for a, b in zip(got, expected, strict=True)] == [0, 0]


@pytest.mark.parametrize("name", NAMES)
def test_feedback_and_descent_on_a_hundred_thousand_groups(name):
    rows, columns = 6400, 128
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(8))
    rms = 40.0 if name == "int8" else SERVING[name].target_rms
    scale = torch.full((rows,), 1 / rms)
    factor, hessian, metrics = metric_arguments(columns)
    expected = quantizer_ops.feedback_block(weight, factor, metrics, name, scale)
    arguments = [tensor.cuda() for tensor in (weight, factor, metrics)]
    got = quantizer_ops.feedback_block(*arguments, name, scale.cuda())
    assert [differences(a, b) for a, b in zip(got, expected, strict=True)] == [0, 0, 0]
    half = 0.0 if name == "int8" else 0.5
    gradient = (weight - (expected[1] + half) * scale[:, None]) @ hessian
    rest = [tensor.cuda() for tensor in (gradient, hessian, metrics)]
    quantizer_ops.descend_block(arguments[0], *got[:2], *rest, name, scale.cuda())
    quantizer_ops.descend_block(weight, *expected[:2], gradient, hessian, metrics, name, scale)
    assert [differences(a, b) for a, b in zip(got[:2], expected[:2], strict=True)] == [0, 0]
