# SPDX-License-Identifier: Apache-2.0
"""Codes on a GPU: what packing refuses, what the quantizer and the canonical codebook give."""

import numpy as np
import pytest
import torch

from pvq_vllm import cuda_ops, ops, quantizer_ops
from pvq_vllm.canonical_ops import decode_canonical, encode_canonical
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.serving import MAX_MAGNITUDE, SERVING, decode_groups, group_magnitudes

pytestmark = pytest.mark.cuda

NAMES = ("pvq2", "pvq3", "pvq4", "int8")


def pack(codes: list[torch.Tensor], plan: str) -> ops.PackedLinear:
    rows = sum(len(part) for part in codes)
    return ops.pack_linear([part.cuda() for part in codes], torch.ones(rows).half().cuda(), plan)


@pytest.mark.parametrize("name", ["pvq3", "pvq4"])
def test_a_shape_out_of_range_is_refused_and_its_row_named(kit, name):
    plan = ops.make_plan([(name, 17), (name, 32)], 72)  # one segment of 49 rows in the kernel's memory
    codes = [kit.code_pool(name)[: rows * 9].clone().view(rows, 9, -1) for rows in (17, 32)]
    pack(codes, plan)
    codes[1][21, 8, 0], codes[1][21, 8, 1] = 8187 & 255, 8187 >> 8
    codes[1][30] = codes[1][21]
    with pytest.raises(PVQError, match=rf"codes\[1\], row 21: a {name} code"):
        pack(codes, plan)


def test_minus_128_is_refused():
    plan = ops.make_plan([("pvq2", 8), ("int8", 17)], 72)
    codes = [torch.zeros(8, 9, 2, dtype=torch.uint8), torch.zeros(17, 72, dtype=torch.int8)]
    pack(codes, plan)
    codes[1][16, 71] = -128
    with pytest.raises(PVQError, match=r"codes\[1\], row 16: a int8 code"):
        pack(codes, plan)


def test_every_invalid_code_that_the_cpu_refuses_is_refused(kit):
    """A magnitude above 127 depends on shape, gain and refinement together."""
    generator = torch.Generator().manual_seed(1)
    plan = ops.make_plan([("pvq4", 1)], 8)
    one = torch.ones(1).half()
    refused = 0
    for codes in torch.randint(0, 256, (300, 1, 1, 4), generator=generator, dtype=torch.uint8):
        problems = []
        for device in ("cpu", "cuda"):
            try:
                ops.pack_linear([codes.to(device)], one.to(device), plan)
                problems.append("")
            except PVQError as error:
                problems.append(str(error))
        assert problems[0] == problems[1], codes.flatten().tolist()
        refused += problems[0] != ""
    assert refused < 300


def test_wrong_shapes_and_places_are_named(kit):
    plan = ops.make_plan([("pvq4", 32)], 64)
    codes = kit.code_pool("pvq4")[:256].view(32, 8, 4)
    with pytest.raises(PVQError, match=r"codes\[0\] must be"):
        pack([codes[:, :7]], plan)
    with pytest.raises(PVQError, match=r"row_scale has a value"):
        ops.pack_linear([codes.cuda()], torch.full((32,), float("nan")).cuda(), plan)
    with pytest.raises(PVQError, match="codes has 2 segments"):
        pack([codes, codes], plan)


def every_code(name: str) -> torch.Tensor:
    """Every shape with every gain that leaves its magnitudes in range, with random signs and refinement, uint8 [n, B]."""
    book, generator = SERVING[name], np.random.default_rng(0)
    shape, gain = (a.ravel() for a in np.indices((book.num_shapes, len(book.gains[0]))))
    code = shape | gain << book.shape_bits
    codes = generator.integers(0, 256, (len(code), book.bytes_per_group), dtype=np.uint8)
    codes[:, 0] = code & 255
    if book.shape_bits > 8:
        codes[:, 1] = code >> 8
    return torch.from_numpy(codes[(group_magnitudes(codes, name) <= MAX_MAGNITUDE).all(1)])


@pytest.mark.parametrize("name", ["pvq2", "pvq3", "pvq4"])
def test_every_shape_with_every_gain_decodes_to_what_format_md_says(name):
    codes = every_code(name)
    assert len(codes) > SERVING[name].num_shapes
    codes = torch.cat([codes, codes[: -len(codes) % 72]]).view(-1, 72, codes.shape[1])
    codes = torch.cat([codes, codes[: (8 - len(codes)) % 16], codes])  # in the other half of a tile, too
    plan = ops.make_plan([(name, len(codes))], 72 * 8)
    packed = pack([codes], plan)
    expected = torch.from_numpy(decode_groups(codes.numpy(), name)).flatten(1)
    assert torch.equal(cuda_ops.unpack_linear(packed.weight, plan).cpu(), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows, columns", [(1, 8), (33, 72), (200, 576)])
def test_quantized_rows_equal_those_of_the_cpu(name, rows, columns):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.02
    weight[0] = 0 if rows > 1 else weight[0]
    scale = quantizer_ops.search_row_scale(weight, name)
    if name != "int8":
        errors = quantizer_ops.search_row_scale(weight.cuda(), name)
        assert (errors.cpu() == scale).float().mean() > 0.95  # a tie of two trials may fall either way
    codes, q = quantizer_ops.quantize_rows(weight, name, scale)
    codes_on_gpu, q_on_gpu = quantizer_ops.quantize_rows(weight.cuda(), name, scale.cuda())
    assert torch.equal(q_on_gpu.cpu(), q) and torch.equal(codes_on_gpu.cpu(), codes)


def kit_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize(
    "group_size, num_pulses, bits",
    [
        (16, 24, 4),
        (32, 12, 0),
        (8, 40, 2),
        (64, 64, 6),
        (128, 96, 4),
        (512, 1500, 0),
        (1000, 700, 3),
        (1024, 4096, 4),
    ],
)
@pytest.mark.parametrize("rows, groups", [(1, 1), (37, 6)])
def test_canonical_rows_equal_those_of_the_cpu(group_size, num_pulses, bits, rows, groups):
    columns = group_size * groups
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))
    sizes = (group_size, num_pulses, bits)
    packed, levels, _ = encode_canonical(weight, *sizes)
    expected = decode_canonical(packed, levels, *sizes, columns)
    got = decode_canonical(packed.cuda(), levels, *sizes, columns)
    assert got.is_cuda and torch.equal(got.cpu(), expected)


def test_canonical_faults_are_those_of_the_cpu():
    sizes, columns = (16, 24, 4), 48
    packed, levels, _ = encode_canonical(torch.randn(9, columns), *sizes)
    large = packed.clone()
    large[5, :6] = 255  # an index beyond the last
    padding = packed.clone()
    padding[7, -1] |= 128  # the last bit of a row, if it is unused
    for broken in (large, padding):
        messages = []
        for device in ("cpu", "cuda"):
            try:
                decode_canonical(broken.to(device), levels, *sizes, columns)
                messages.append("")
            except PVQError as error:
                messages.append(str(error))
        assert messages[0] == messages[1]
