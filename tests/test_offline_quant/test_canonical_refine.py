# SPDX-License-Identifier: Apache-2.0
"""Canonical codes in the metric of their group, against all codes there are."""

import itertools

import pytest
import torch

from offline_quant import canonical_quantizer
from offline_quant.canonical_quantizer import quantize_with_feedback
from offline_quant.hessian import inverse_factor
from pvq_vllm.canonical_ops import encode_groups, refine_groups
from pvq_vllm.codec.format import Codebook

LEVELS = torch.tensor([20.0, 35.0, 50.0, 70.0])


def factor_of(width: int, seed: int, tokens: int = 60) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return inverse_factor(inputs.T @ inputs / tokens)


def cost(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    error = x.double() - q.double() * scale.double()[:, None]
    return torch.linalg.solve_triangular(factor.double(), error, upper=True, left=False).square().sum(dim=1)


def case(rows: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 25 * torch.randn(rows, width, generator=generator)
    scale = 0.5 + torch.rand(rows, generator=generator)
    return x * scale[:, None], scale, factor_of(width, seed)


@pytest.mark.parametrize("seed", range(3))
def test_codes_are_nearly_the_best_of_all(seed):
    width, num_pulses, rows = 3, 4, 200
    x, scale, factor = case(rows, width, seed)
    given = encode_groups(x, LEVELS, scale, num_pulses)
    found = refine_groups(x, factor, given, LEVELS, scale, num_pulses)
    points = torch.tensor([
        point for point in itertools.product(range(-num_pulses, num_pulses + 1), repeat=width)
        if sum(map(abs, point)) == num_pulses
    ])  # fmt: skip
    all_q = torch.cat(
        [torch.round(points * (level / points.double().norm(dim=1))[:, None]) for level in LEVELS.double()]
    )
    all_q = all_q[all_q.abs().amax(dim=1) <= 127]
    optimum = torch.stack([cost(x, q.expand(rows, -1), scale, factor) for q in all_q]).amin(dim=0)
    before, after = cost(x, given[2], scale, factor), cost(x, found[2], scale, factor)
    assert (after >= optimum * (1 - 1e-9)).all() and (after <= before * (1 + 1e-9)).all()
    assert (after <= optimum * (1 + 1e-9)).double().mean() > 0.8  # it is the best one, mostly
    assert after.mean() < 1.1 * optimum.mean()
    assert before.mean() > 1.15 * optimum.mean()


@pytest.mark.parametrize(("width", "num_pulses"), [(1, 5), (2, 1), (16, 58), (48, 9), (144, 433)])
def test_codes_are_codes(width, num_pulses):
    x, scale, factor = case(40, width, width)
    x[3], x[4, 1:] = 0, 0
    given = encode_groups(x, LEVELS, scale, num_pulses)
    kept = [tensor.clone() for tensor in given]
    pulses, codes, q = refine_groups(x, factor, given, LEVELS, scale, num_pulses)
    assert all(torch.equal(*pair) for pair in zip(given, kept, strict=True))
    assert (pulses.int().abs().sum(dim=1) == num_pulses).all() and (codes.int() < len(LEVELS)).all()
    step = LEVELS.double()[codes.int()] / pulses.double().norm(dim=1)
    assert torch.equal(q.double(), torch.round(pulses.double() * step[:, None]))
    assert (q.int().abs() <= 127).all()
    assert (cost(x, q, scale, factor) <= cost(x, given[2], scale, factor) * (1 + 1e-9)).all()


@pytest.mark.parametrize(("group", "num_pulses", "gain"), [(8, 29, 1.01), (16, 27, 1.02), (96, 160, 1.15)])
def test_a_matrix_has_less_error_at_its_output(monkeypatch, group, num_pulses, gain):
    generator = torch.Generator().manual_seed(1)
    mixing = torch.eye(96) + 0.1 * torch.randn(96, 96, generator=generator)
    inputs = torch.randn(1000, 96, generator=generator) @ mixing
    hessian = inputs.T @ inputs / 1000
    factor = inverse_factor(hessian)
    weight = torch.randn(64, 96, generator=generator)

    def loss():
        codes, scale = quantize_with_feedback(
            weight, factor, Codebook("canonical", group, num_pulses, 4), "beta"
        )
        error = weight - codes.q.float() * scale[:, None]
        return ((error @ hessian) * error).sum().item()

    refined = loss()
    monkeypatch.setattr(canonical_quantizer, "refine_groups", lambda x, factor, found, *rest: found)
    assert gain * refined < loss()
