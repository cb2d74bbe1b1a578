# SPDX-License-Identifier: Apache-2.0
"""PVQ as in the paper: its parts against brute force and closed forms, and a whole model."""

import itertools

import numpy as np
import pytest
import torch

from benchmarks.quality import paper
from benchmarks.quality.bits import largest_pulses, pyramid_bits
from benchmarks.quality.paper import feedback, quantize_group, quantize_matrix, round_direction
from benchmarks.quality.protocol import Protocol
from benchmarks.quality.rows import ROWS
from offline_quant.evaluate import evaluation_text
from offline_quant.hessian import DAMPING, inverse_factor
from pvq_vllm.codec.amplitude import beta_levels, nearest_level
from pvq_vllm.codec.pyramid import codebook_size


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_hessian(width: int) -> torch.Tensor:
    x = normal(4000, width) @ (normal(width, width, seed=1) / width**0.5 + 0.3 * torch.eye(width))
    return x.T @ x / len(x)


def damped(hessian: torch.Tensor) -> torch.Tensor:
    exact = hessian.double()
    return exact + DAMPING * exact.diagonal().mean() * torch.eye(len(exact))


def pyramid(size: int, num_pulses: int) -> torch.Tensor:
    values = range(-num_pulses, num_pulses + 1)
    points = [p for p in itertools.product(values, repeat=size) if sum(map(abs, p)) == num_pulses]
    assert len(points) == codebook_size(size, num_pulses)
    return torch.tensor(points, dtype=torch.float64)


@pytest.mark.parametrize("size, num_pulses", [(1, 3), (2, 1), (3, 7), (4, 5), (5, 2)])
def test_direction_is_the_nearest_point_of_the_pyramid(size, num_pulses):
    integers = torch.cartesian_prod(*[torch.arange(-2.0, 3.0)] * size).reshape(-1, size)
    x = torch.cat(
        [normal(300, size), integers[integers.abs().sum(dim=1) > 0]]
    )  # many ties among the integers
    found = round_direction(x, num_pulses).double()
    target = num_pulses * x.double() / x.double().abs().sum(dim=1, keepdim=True)
    nearest = torch.cdist(target, pyramid(size, num_pulses)).amin(dim=1)
    torch.testing.assert_close((found - target).norm(dim=1), nearest, rtol=0, atol=1e-6)
    assert (found.abs().sum(dim=1) == num_pulses).all()


@pytest.mark.parametrize("size, num_pulses", [(16, 27), (16, 58), (144, 434), (128, 1)])
def test_direction_has_all_pulses_and_the_signs_of_the_weights(size, num_pulses):
    x = torch.cat([normal(500, size), normal(500, size) ** 5, 1e-30 * normal(20, size)])
    x[::3, ::2] = 0
    found = round_direction(x, num_pulses)
    assert (found == found.round()).all()
    assert (found.abs().sum(dim=1) == num_pulses).all()
    assert (found * x >= 0).all()


@pytest.mark.parametrize("num_pulses", [3, 6, 9])
def test_direction_of_zeros_is_flat(num_pulses):
    found = round_direction(torch.zeros(2, 4), num_pulses)
    assert (found.sum(dim=1) == num_pulses).all()
    assert found.max() - found.min() <= 1


def test_levels_are_quantiles_of_the_share_of_the_power():
    share = np.linspace(0, 1, 2_000_001)
    density = share**7 * (1 - share) ** 279  # Beta(16 / 2, 16 * 35 / 2): 36 groups of 16
    probability = np.cumsum(density) / density.sum()
    expected = np.interp((np.arange(16) + 0.5) / 16, probability, share)
    np.testing.assert_allclose(beta_levels(16, 36, 4) ** 2, expected, rtol=1e-4)


def test_amplitude_is_the_nearest_level_of_the_float16_norm():
    weight = 3 * normal(20, 576)
    weight[0] = 0
    quantized = quantize_matrix(weight, torch.eye(576), 16, 27, 4).reshape(20, 36, 16)
    levels = beta_levels(16, 36, 4)
    norm = weight.norm(dim=1).half().double()
    pulses = round_direction(weight.reshape(-1, 16), 27).double().reshape(20, 36, 16)
    direction = pulses / pulses.norm(dim=-1, keepdim=True)
    best = (direction * weight.reshape(20, 36, 16)).sum(dim=-1) / norm.clamp(min=1e-9)[:, None]
    chosen = torch.from_numpy(levels[nearest_level(levels, best.numpy())]) * norm[:, None]
    torch.testing.assert_close(quantized.double(), direction * chosen[..., None], rtol=1e-5, atol=0)
    assert (quantized[0] == 0).all()


def test_feedback_without_correlation_is_rounding():
    weight = normal(12, 64)
    levels = torch.from_numpy(beta_levels(16, 4, 4)).float()
    norm = weight.norm(dim=1, keepdim=True).half().float()
    plain = torch.cat([quantize_group(x, 27, levels, norm) for x in weight.split(16, dim=1)], dim=1)
    factor = inverse_factor(3 * torch.eye(64))
    torch.testing.assert_close(quantize_matrix(weight, factor, 16, 27, 4), plain, rtol=0, atol=0)


def closed_form(weight, hessian, group, quantize) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """After each group, the columns still to come become those of least error given all errors made so far,
    W_R + E H_done,R H_RR^-1, solved anew in float64. Returns what is quantized and each group before that.
    """
    weight, quantized, targets = weight.double(), torch.empty(0), []
    for first in range(0, weight.shape[1], group):
        target = weight[:, first:]
        if first:
            made = weight[:, :first] - quantized
            pull = hessian[:first, first:].T @ made.T
            target = target + torch.linalg.solve(hessian[first:, first:], pull).T
        targets.append(target[:, :group])
        found = quantize(target[:, :group].float()).double()
        quantized = torch.cat([quantized, found], dim=1) if first else found
    return quantized, targets


@pytest.mark.parametrize("group", [4, 16, 24])
def test_feedback_makes_up_for_all_errors_so_far(group):
    weight, hessian = normal(10, 48, seed=2), correlated_hessian(48)

    def coarse(x: torch.Tensor) -> torch.Tensor:
        return 0.7 * x + 0.1 * x.sin()  # continuous, so that float32 has no edge to fall off

    seen = []
    feedback(weight, inverse_factor(hessian), group, lambda x: seen.append(x.clone()) or coarse(x))
    _, expected = closed_form(weight, damped(hessian), group, coarse)
    assert len(seen) == 48 // group
    torch.testing.assert_close(torch.cat(seen, 1).double(), torch.cat(expected, 1), rtol=1e-4, atol=1e-5)
    assert (torch.cat(seen, 1) - weight)[:, group:].abs().mean() > 0.03


def test_codes_are_those_of_the_closed_form_and_lower_the_error():
    weight, hessian = normal(10, 64, seed=3), correlated_hessian(64)
    levels = torch.from_numpy(beta_levels(16, 4, 4)).float()
    norm = weight.norm(dim=1, keepdim=True).half().float()
    found = quantize_matrix(weight, inverse_factor(hessian), 16, 27, 4)
    exact = damped(hessian)
    expected, _ = closed_form(weight, exact, 16, lambda x: quantize_group(x, 27, levels, norm))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    plain = quantize_matrix(weight, torch.eye(64), 16, 27, 4)

    def error(quantized: torch.Tensor) -> float:
        made = (weight - quantized).double()
        return ((made @ exact) * made).sum().item()

    assert error(found) < 0.8 * error(plain)


@pytest.fixture
def protocol(tiny_llama, tmp_path):
    text = evaluation_text()
    return Protocol(tiny_llama, text, text, tmp_path / "out", 32, 4, 64, dtype=torch.float32)


def test_rows_of_a_model_have_their_bits_and_gain_by_feedback(protocol, tmp_path, monkeypatch):
    def divergence(key: str, folder: str) -> float:
        made = ROWS[key].make(protocol, tmp_path, tmp_path / folder)
        # Four fifths of the weights are in rows of 128, the others in rows of 192.
        assert made.bits_per_weight == pytest.approx(
            float(key[-1]) + 4 / 16 + 0.8 * 16 / 128 + 0.2 * 16 / 192
        )
        return protocol.evaluate(made.folder)["kl_divergence"]

    with_feedback = divergence("paper-d16-3", "3")
    assert divergence("paper-d16-4", "4") < 0.5 * with_feedback  # 6 dB of power are a factor of four
    monkeypatch.setattr(paper, "inverse_factor", lambda hessian: torch.eye(len(hessian)))
    assert with_feedback < 0.85 * divergence("paper-d16-3", "plain")  # 0.66 when this was written


def test_bits_count_index_amplitude_and_row_norm():
    assert pyramid_bits(576, 16, largest_pulses(16, 4), 4) == 4 + 4 / 16 + 16 / 576
    assert pyramid_bits(576, 144, 1, 4) == (9 + 4) / 144 + 16 / 576  # 288 points
