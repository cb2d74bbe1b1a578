# SPDX-License-Identifier: Apache-2.0
"""Names of the activation modes, and the projection onto a pyramid against brute force."""

import itertools

import numpy as np
import pytest
import torch

from pvq_vllm.codec import reference
from pvq_vllm.codec.activation import Activation, check_width, parse_activation
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.rotation import Rotation


def test_every_mode_has_one_name():
    assert parse_activation("a8") == Activation(1)
    assert parse_activation("a16") == Activation(2)
    assert parse_activation("pvq:16,58") == Activation(1, 16, 58)
    assert parse_activation("pvq:256,4096") == Activation(1, 256, 4096)


@pytest.mark.parametrize(
    "name",
    [
        *("", "a4", "A8", "pvq", "pvq:16", "pvq:16,", "pvq:16,5,3", "pvq:16, 5", "pvq:016,5", "pvq:16,05", "pvq:16,5\n"),
        *("pvq:4,5", "pvq:12,5", "pvq:512,5", "pvq:16,0", "pvq:16,4097", "pvq:16,-5", "pvq:１６,5", None, 8, {"name": "pvq"}),
    ],
)  # fmt: skip
def test_other_names_are_refused_and_the_place_is_named(name):
    with pytest.raises(PVQError, match=r"^config\.activation is "):
        parse_activation(name, "config.activation")


def test_a_group_must_divide_the_columns_of_a_rank():
    check_width("pvq:64,199", 192, "down_proj")
    check_width("a8", 7, "down_proj")
    with pytest.raises(PVQError, match=r"down_proj has 192 input columns.*pvq:128,386.*groups of 128"):
        check_width("pvq:128,386", 192, "down_proj")


def compositions(parts: int, total: int) -> np.ndarray:
    """All magnitudes of the pyramid, [count, parts]."""
    rows = []
    for bars in itertools.combinations(range(total + parts - 1), parts - 1):
        edges = (-1, *bars, total + parts - 1)
        rows.append([b - a - 1 for a, b in itertools.pairwise(edges)])
    return np.array(rows, dtype=np.float64)


@pytest.mark.parametrize(
    "group_size, num_pulses", [(2, 1), (2, 7), (4, 1), (4, 3), (4, 12), (8, 1), (8, 4), (8, 6)]
)
def test_no_point_of_the_pyramid_is_nearer(group_size, num_pulses):
    generator = np.random.default_rng(group_size * 100 + num_pulses)
    y = generator.standard_normal((200, group_size)).astype(np.float32)
    y[:50] *= generator.random((50, group_size)).astype(np.float32) ** 6  # few large values
    y[50:100] = generator.integers(-2, 3, (50, group_size))  # ties
    y = y[np.abs(y).any(axis=1)]
    pulses, scale, _ = reference.project_groups(y, num_pulses)
    assert (np.abs(pulses).sum(axis=1) == num_pulses).all()
    assert ((pulses * y) >= 0).all()
    exact = y.astype(np.float64)
    target = np.abs(exact) * (num_pulses / np.abs(exact).sum(axis=1, keepdims=True))
    points = compositions(group_size, num_pulses)
    best = ((target[:, None] - points) ** 2).sum(axis=-1).min(axis=1)
    found = ((target - np.abs(pulses)) ** 2).sum(axis=1)
    assert (found <= best + 1e-5).all()
    amplitude = (pulses * exact).sum(axis=1) / (pulses.astype(np.float64) ** 2).sum(axis=1)
    assert np.allclose(scale, amplitude, rtol=1e-6)


def test_ties_go_to_the_lowest_index():
    flat = np.ones((1, 8), dtype=np.float32)
    assert reference.project_groups(flat, 3)[0].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]
    assert reference.project_groups(flat, 13)[0].tolist() == [
        [1, 1, 1, 2, 2, 2, 2, 2]
    ]  # 13 / 8 rounds up to 2


def test_groups_without_direction_and_broken_groups():
    y = np.zeros((4, 8), dtype=np.float32)
    y[1, 3] = 1e-30
    y[2, 3] = np.inf
    y[3, 3] = np.nan
    pulses, scale, total = reference.project_groups(y, 5)
    assert not pulses.any() and not scale.any()
    assert (total[:2] < 2.0**-60).all() and not (total[2:] < 2.0**126).any()


@pytest.mark.parametrize(
    "group_size, num_pulses, decibels",  # of Fischer's rounding, see csrc/canonical_search.cpp
    [(8, 6, 10.28), (16, 12, 10.56), (16, 27, 17.19), (128, 84, 9.83), (128, 187, 16.19), (128, 386, 22.29)],
)
def test_quality_on_gaussian_groups(group_size, num_pulses, decibels):
    y = np.random.default_rng(0).standard_normal((2**18 // group_size, group_size)).astype(np.float32)
    pulses, scale, _ = reference.project_groups(y, num_pulses)
    error = y.astype(np.float64) - pulses * scale.astype(np.float64)[:, None]
    assert abs(10 * np.log10((y.astype(np.float64) ** 2).sum() / (error**2).sum()) - decibels) < 0.1


def test_int8_on_top_of_the_pyramid_costs_little():
    x = torch.randn(64, 1536, generator=torch.Generator().manual_seed(0))
    rotation = Rotation(0, 1536, 0, [])

    def decibels(approximation: torch.Tensor) -> float:
        return float(10 * torch.log10(x.square().sum() / (x - approximation).square().sum()))

    pulses, scale, _ = reference.project_groups(x.reshape(64, -1, 16).numpy(), 58)
    on_pyramid = torch.from_numpy(pulses * scale[..., None]).float().reshape(x.shape)
    planes, token_scale = reference.quantize_activation(x, rotation, "pvq:16,58")
    as_int8 = planes[0].float() * token_scale[:, None]
    assert decibels(on_pyramid) - 0.15 < decibels(as_int8) < decibels(on_pyramid) < 24
    planes, token_scale = reference.quantize_activation(x, rotation, "a8")
    assert decibels(planes[0].float() * token_scale[:, None]) > 40
