# SPDX-License-Identifier: Apache-2.0
"""Hadamard matrices, signs and the rotation against docs/format.md §5."""

import numpy as np
import pytest
import torch

from pvq_vllm import _C
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.rotation import (
    Rotation,
    hadamard_factors,
    hadamard_matrix,
    is_dense_order,
    rotation_layout,
    signs,
)

DENSE_ORDERS = [order for order in range(4, 257, 4) if is_dense_order(order)]


@pytest.mark.parametrize("order", [1, 2, 8, 64, *DENSE_ORDERS])
def test_rows_are_orthogonal(order):
    h = hadamard_matrix(order).astype(np.int64)
    assert set(np.unique(h)) <= {-1, 1}
    assert np.array_equal(h @ h.T, order * np.eye(order, dtype=np.int64))


@pytest.mark.parametrize("order", DENSE_ORDERS)
def test_compiled_matrices_are_the_same(order):
    assert _C.is_hadamard_order(order)
    assert np.array_equal(np.array(_C.dense_hadamard(order)).reshape(order, order), hadamard_matrix(order))


def test_orders_of_usual_factors_exist():
    assert {12, 20, 28, 36, 44, 60, 68, 76, 84, 108, 140, 148} <= set(DENSE_ORDERS)
    assert not is_dense_order(92) and not is_dense_order(64)


@pytest.mark.parametrize(
    ("width", "factors"),
    [
        (576, [12, 12, 4]),
        (1536, [12, 128]),
        (14336, [28, 512]),
        (4096, [4096]),
        (18944, [148, 128]),
        (25600, [20, 20, 64]),
    ],
)
def test_factors_of_usual_widths(width, factors):
    assert hadamard_factors(width) == factors


@pytest.mark.parametrize("width", [8, 24, 40, 48, 96, 112, 160, 576, 896, 144])
def test_matrix_is_the_kronecker_product_and_orthogonal(width):
    factors = hadamard_factors(width)
    h = np.ones((1, 1))
    for order in factors:
        h = np.kron(h, hadamard_matrix(order))
    expected = h * signs(5, width) / np.sqrt(width)
    r = Rotation(5, width, 1, factors).matrix().numpy()
    assert np.allclose(r, expected, atol=1e-12)
    assert np.allclose(r @ r.T, np.eye(width), atol=1e-12)


def test_rotation_changes_the_input_and_unrotate_restores_it():
    rotation = Rotation(1, 1152, 2, hadamard_factors(576))
    x = torch.randn(3, 1152, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = rotation.rotate(x)
    assert (y - x).norm() > 0.5 * x.norm()
    assert torch.allclose(rotation.unrotate(y), x, atol=1e-12)


def test_blocks_do_not_mix():
    rotation = Rotation(1, 128, 2, [64])
    x = torch.zeros(1, 128)
    x[0, 3] = 1
    assert rotation.rotate(x)[0, 64:].abs().max() == 0


def test_signs_are_splitmix64_and_slices_agree():
    # first output of SplitMix64 with state 0 is 0xE220A8397B1DCDAF (Vigna's reference implementation)
    word = 0xE220A8397B1DCDAF
    assert signs(0, 64).tolist() == [-1.0 if word >> i & 1 else 1.0 for i in range(64)]
    whole = signs(9, 1000)
    assert np.array_equal(whole[200:900], signs(9, 700, first=200))
    assert np.array_equal(np.array(_C.rotation_signs(9, 200, 700), dtype=np.float32), whole[200:900])


def test_layout_falls_back_to_blocks_and_names_what_it_cannot_split():
    assert rotation_layout(11008) == (43, [256])
    assert rotation_layout(1536, splits=2) == (2, [12, 64])
    assert rotation_layout(14336, max_width=128) == (112, [128])
    assert rotation_layout(960, max_width=128) == (15, [64])  # not 8 of 120 = 60 * 2
    assert rotation_layout(1536, splits=8, max_width=256) == (24, [64])
    assert rotation_layout(144, max_width=128) == (2, [36, 2])  # 16 would be too narrow
    with pytest.raises(PVQError, match="in_features 12 "):
        rotation_layout(12, splits=2)
    with pytest.raises(PVQError, match="order 92"):
        hadamard_factors(92)
