# SPDX-License-Identifier: Apache-2.0
"""The rotation of ``codec.rotation.Rotation`` for whole matrices: a product with a small Hadamard matrix for
each factor.

Same matrix, another order of the additions, which format.md leaves free for weights; about six times as fast
here. A power of two is taken as a Kronecker product of orders of at most 64, H_2^(a+b) = H_2^a (x) H_2^b.
"""

import torch

from pvq_vllm.codec.rotation import Rotation, hadamard_matrix

LARGEST_POWER = 64


def rotate_rows(x: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
    """Return x R^T for the rows of ``x``, float32 [m, in_features]; ``x`` itself when there is no
    rotation.
    """
    if rotation is None or not rotation.blocks:
        return x
    return _apply(x * rotation.signs.to(x.device), rotation, transpose=False) / rotation.block_width**0.5


def unrotate_rows(x: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
    """Return x R, the inverse of ``rotate_rows``."""
    if rotation is None or not rotation.blocks:
        return x
    return _apply(x, rotation, transpose=True) * (rotation.signs.to(x.device) / rotation.block_width**0.5)


def _apply(x: torch.Tensor, rotation: Rotation, transpose: bool) -> torch.Tensor:
    """Multiply every block of every row by H, or by its transpose."""
    y = x.reshape(-1, rotation.block_width)
    run = rotation.block_width
    for order in _small_factors(rotation.factors):
        run //= order
        h = torch.from_numpy(hadamard_matrix(order)).to(x)
        y = torch.matmul(h.T if transpose else h, y.reshape(-1, order, run))
    return y.reshape(x.shape)


def _small_factors(factors: list[int]) -> list[int]:
    small = []
    for order in factors:
        while order & (order - 1) == 0 and order > LARGEST_POWER:
            small.append(LARGEST_POWER)
            order //= LARGEST_POWER
        small.append(order)
    return small
