# SPDX-License-Identifier: Apache-2.0
"""The canonical codebook: error feedback against a plain loop, and where the amplitudes come from."""

import numpy as np
import pytest
import torch

from offline_quant.canonical_quantizer import descend, quantize_with_feedback
from offline_quant.hessian import RotatedHessian
from offline_quant.weight_quantizer import dequantize_rotated, quantize_weight
from pvq_vllm.canonical_ops import encode_groups, fit_levels, refine_groups
from pvq_vllm.codec import canonical
from pvq_vllm.codec.format import Codebook
from pvq_vllm.codec.rotation import Rotation

GENERATOR = torch.Generator().manual_seed(3)


def correlated_hessian(width: int, tokens: int = 4000) -> torch.Tensor:
    mixing = torch.randn(width, width, generator=GENERATOR) / width**0.5
    x = torch.randn(tokens, width, generator=GENERATOR) @ (mixing + 0.3 * torch.eye(width))
    return x.T @ x / tokens


@pytest.mark.parametrize("amplitude", ["lloyd_max", "beta"])
@pytest.mark.parametrize("group", [4, 16, 96, 192])
def test_feedback_equals_the_plain_loop_over_groups(group, amplitude):
    """In float64 and one group after the other, with the inverse of the Hessian made anew for the columns that
    are left: the correction that minimises the error is -E H_QR... = inverse blocks (GPTQ, equation 3).
    """
    width, rows = 192, 12
    codebook = Codebook("canonical", group, 2 * group, 3)
    weight = torch.randn(rows, width, generator=GENERATOR)
    weight[5] = 0
    hessian = RotatedHessian.of(correlated_hessian(width), None)
    codes, scale = quantize_with_feedback(weight, hessian.factor, codebook, amplitude)
    q = codes.q
    levels, expected_scale = fit_levels(weight, group, 2 * group, 3, amplitude)
    assert torch.equal(levels, codes.levels) and torch.equal(scale, expected_scale)
    assert scale[5] == 0

    damped = torch.linalg.inv(hessian.factor.double().T @ hessian.factor.double())
    work = weight.double()
    working = torch.where(scale > 0, scale, 1.0)
    for first in range(0, width, group):
        last = first + group
        target = q_input(work[:, first:last])
        found = encode_groups(target, levels, working, 2 * group)
        block = hessian.factor[first:last, first:last]
        found = refine_groups(target, block, found, levels, working, 2 * group)
        agree = (found[2] == q[:, first:last]).all(dim=1)
        assert agree.float().mean() > 0.9  # float32 against float64: a tie may fall otherwise
        chosen = q[:, first:last].double() * working[:, None].double()
        inverse = torch.linalg.inv(damped[first:, first:])
        error = (work[:, first:last] - chosen) @ torch.linalg.inv(inverse[:group, :group])
        work[:, last:] -= error @ inverse[:group, group:]
    decoded = dequantize_rotated(
        {"weight_packed": codes.packed(codebook), "weight_levels": levels, "weight_scale": scale.half()},
        codebook,
        width,
    )  # the packed codes are those of q
    assert torch.equal(decoded, q.float() * scale[:, None])


def q_input(x: torch.Tensor) -> torch.Tensor:
    return x.float().contiguous()


@pytest.mark.parametrize(("group", "pulses", "bits"), [(8, 16, 4), (16, 27, 4), (128, 187, 4)])
def test_feedback_lowers_the_output_error(group, pulses, bits):
    width = 256
    weight = torch.randn(64, width, generator=GENERATOR)
    rotation = Rotation(0, width, 1, [width])
    raw = correlated_hessian(width)
    hessian = RotatedHessian.of(raw, rotation)
    codebook = Codebook("canonical", group, pulses, bits)

    def output_error(result) -> float:
        error = weight - result.dequantized
        return ((error @ raw) * error).sum().item()

    plain = quantize_weight(weight, codebook, rotation, dequantize=True)
    fed_back = quantize_weight(weight, codebook, rotation, hessian, dequantize=True)
    assert output_error(fed_back) < 0.8 * output_error(plain)
    expected = 10 * np.log10(((weight @ raw) * weight).sum().item() / output_error(fed_back))
    assert fed_back.output_snr_db == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("group", "pulses"), [(8, 16), (16, 27), (64, 96)])
def test_descent_lowers_the_loss_of_every_row(group, pulses):
    width = 192
    codebook = Codebook("canonical", group, pulses, 4)
    weight = torch.randn(24, width, generator=GENERATOR)
    hessian = RotatedHessian.of(correlated_hessian(width), None)
    damped = hessian.hessian + hessian.damping * torch.eye(width)
    codes, scale = quantize_with_feedback(weight, hessian.factor, codebook, "lloyd_max")

    def loss() -> torch.Tensor:
        error = weight.double() - codes.q.double() * scale.double()[:, None]
        return (error @ damped.double() * error).sum(dim=1)

    losses = [loss()]
    for _ in range(3):
        descend(weight, codes, damped, codebook, scale)
        losses.append(loss())
        assert (losses[-1] <= losses[-2] * (1 + 1e-4)).all()
    assert losses[1].sum() < 0.99 * losses[0].sum()
    stored = {
        "weight_packed": codes.packed(codebook),
        "weight_levels": codes.levels,
        "weight_scale": scale.half(),
    }
    assert torch.equal(dequantize_rotated(stored, codebook, width), codes.q.float() * scale[:, None])


def test_descent_of_one_group_looks_where_the_others_leave_it():
    """Written out: the target of a group is its weights and what the errors of all others ask of it."""
    width, codebook = 32, Codebook("canonical", 16, 27, 4)
    weight = torch.randn(20, width, generator=GENERATOR)
    damped = correlated_hessian(width)
    codes, scale = quantize_with_feedback(weight, RotatedHessian.of(damped, None).factor, codebook, "beta")
    start, second = codes.group(0), weight[:, 16:] - codes.q[:, 16:].float() * scale[:, None]
    target = weight[:, :16] + second @ damped[16:, :16] @ torch.linalg.inv(damped[:16, :16])
    inverse = torch.linalg.inv(damped[:16, :16].double())
    upper = torch.linalg.cholesky(inverse, upper=True).float()  # upper^T upper = inverse
    expected = refine_groups(target, upper, start, codes.levels, scale, 27)
    descend(weight, codes, damped, codebook, scale)
    assert (codes.group(0)[2] == expected[2]).all(
        dim=1
    ).float().mean() > 0.9  # float32: a tie may fall otherwise
    assert not torch.equal(expected[2], start[2])


def test_encode_groups_chooses_what_encode_weight_chooses():
    """For a single group a row, no feedback and the same levels and scales, both must agree."""
    weight = torch.randn(50, 16, generator=GENERATOR)
    levels, scale = fit_levels(weight, 16, 27, 4)
    pulses, codes, q = encode_groups(weight, levels, scale, 27)
    reference = canonical.encode_groups(weight.numpy(), levels.numpy(), scale.double().numpy(), 27)
    for ours, theirs in zip((pulses, codes, q), reference, strict=True):
        assert np.array_equal(ours.numpy(), theirs)
    assert (pulses.abs().sum(dim=1) == 27).all()
    best = (weight * pulses).sum(dim=1) / pulses.float().norm(dim=1) / scale
    distance = (levels[codes.int()] - best).abs()
    assert (distance <= (levels[None] - best[:, None]).abs().min(dim=1).values + 1e-4).all()
    exact = pulses.double() * (levels.double()[codes.int()] / pulses.double().norm(dim=1))[:, None]
    assert torch.equal(q.double(), exact.round())


def test_lloyd_max_is_at_least_as_good_as_beta():
    weight = torch.randn(64, 1024, generator=GENERATOR)
    codebook = Codebook("canonical", 16, 58, 4)
    beta = quantize_weight(weight, codebook, amplitude="beta").weight_snr_db
    lloyd = quantize_weight(weight, codebook, amplitude="lloyd_max").weight_snr_db
    assert 0.2 < lloyd - beta < 1
