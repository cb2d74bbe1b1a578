# SPDX-License-Identifier: Apache-2.0
"""The seeded Hadamard rotation of weights and activations (docs/format.md §5).

A width has a full Hadamard matrix here if it is a product of dense orders (Paley) and a power of two:

    576 = 12 · 12 · 4        1536 = 12 · 128        3584 = 28 · 128        14336 = 28 · 512        18944 = 148 · 128
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from pvq_vllm.codec.errors import PVQError

MAX_DENSE_ORDER = 512  # beyond it a dense factor costs more than the product it prepares
SMALLEST_POWER = 32  # of blocks that are to be a power of two wide


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def is_dense_order(order: int) -> bool:
    """True if a Paley construction gives a Hadamard matrix of this order, which is not a power of two."""
    if order % 4 or order & (order - 1) == 0:
        return False
    return _is_prime(order - 1) or (_is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1)


@cache
def _odd_factors(odd: int, twos: int) -> tuple[int, ...] | None:
    """Cheapest dense orders 4·p with product of the p equal to `odd`, using at most `twos` factors of two; None if impossible."""
    if odd == 1:
        return ()
    best = None
    for part in range(3, odd + 1, 2):
        if odd % part or twos < 2 or 4 * part > MAX_DENSE_ORDER or not is_dense_order(4 * part):
            continue
        rest = _odd_factors(odd // part, twos - 2)
        if rest is not None and (best is None or 4 * part + sum(rest) < sum(best)):
            best = tuple(sorted((4 * part, *rest)))
    return best


def hadamard_factors(width: int) -> list[int]:
    """Orders of the Kronecker factors of a Hadamard matrix of `width`: dense ones, then the power of two.

    Raises:
        PVQError: no such matrix is known here.
    """
    twos = (width & -width).bit_length() - 1 if width > 0 else 0
    dense = _odd_factors(width >> twos, twos) if width > 0 else None
    if dense is None:
        raise PVQError(
            f"no Hadamard matrix of order {width} is known here; split the width into more blocks."
        )
    power = 1 << (twos - 2 * len(dense))
    return [*dense, *([power] if power > 1 or not dense else [])]


def rotation_layout(in_features: int, splits: int = 1, max_width: int | None = None) -> tuple[int, list[int]]:
    """Fewest equal blocks, a multiple of `splits`, whose width (at most `max_width`) has a Hadamard matrix of order 8 or more.

    With `max_width`, the width is a power of two where one of SMALLEST_POWER or more divides: small blocks are for speed, and
    dense factors take most of the time.

    Returns:
        (rotation_blocks, factors of one block).
    Raises:
        PVQError: nothing divides; names the width.
    """
    if max_width is not None and in_features % splits == 0:
        part = in_features // splits
        power = min(part & -part, 1 << (max_width.bit_length() - 1))
        if power >= min(SMALLEST_POWER, max_width):
            return in_features // power, [power]
    for blocks in range(splits, in_features // 8 + 1, splits):
        if in_features % blocks == 0 and (max_width is None or in_features // blocks <= max_width):
            try:
                return blocks, hadamard_factors(in_features // blocks)
            except PVQError:
                continue
    raise PVQError(
        f"in_features {in_features} cannot be split into {splits} equal part(s) that a Hadamard rotation of "
        "order 8 or more divides"
    )


@cache
def hadamard_matrix(order: int) -> np.ndarray:
    """Hadamard matrix of one factor, int8 [order, order] of +-1: Sylvester or Paley, as docs/format.md §5 defines them."""
    if order & (order - 1) == 0:
        index = np.arange(order)
        parity = np.vectorize(lambda x: bin(x).count("1") & 1)(index[:, None] & index[None, :])
        return (1 - 2 * parity).astype(np.int8)
    if not is_dense_order(order):
        raise PVQError(f"no Hadamard matrix of order {order} is known here.")
    first = _is_prime(order - 1)
    p = order - 1 if first else order // 2 - 1
    chi = -np.ones(p, dtype=np.int64)
    chi[np.arange(1, p) ** 2 % p] = 1
    chi[0] = 0
    core = np.ones((p + 1, p + 1), dtype=np.int64)
    residue = np.arange(p)
    core[1:, 1:] = chi[(residue[:, None] - residue[None, :]) % p]
    np.fill_diagonal(core, 0)
    if first:
        core[1:, 0] = -1
        return (np.eye(order, dtype=np.int64) + core).astype(np.int8)
    sum_block, diagonal_block = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
    return (np.kron(core, sum_block) + np.kron(np.eye(p + 1, dtype=np.int64), diagonal_block)).astype(np.int8)


def signs(seed: int, count: int, first: int = 0) -> np.ndarray:
    """Signs s_i of columns first … first + count - 1, float32 +-1, from the bits of SplitMix64 (docs/format.md §5)."""
    mask = (1 << 64) - 1
    words = []
    for j in range(first // 64, (first + count + 63) // 64):
        z = (seed + (j + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        words.append(z ^ (z >> 31))
    bits = np.unpackbits(np.array(words, dtype="<u8").view(np.uint8), bitorder="little")
    start = first % 64
    return (1 - 2 * bits[start : start + count].astype(np.float32)).astype(np.float32)


class Rotation:
    """x -> R x on the last axis, R block-diagonal and orthogonal.

    Args:
        in_features: width of the axis on this rank.
        seed, blocks, factors: as in the checkpoint; ``blocks == 0`` is the identity.
        first_column: where this rank's columns start in the whole layer (for the signs).
    """

    def __init__(
        self, seed: int, in_features: int, blocks: int, factors: list[int], first_column: int = 0
    ) -> None:
        width = in_features // blocks if blocks else 0
        if blocks and (in_features % blocks or int(np.prod(factors)) != width):
            raise PVQError(
                f"rotation factors {factors} in {blocks} block(s) do not make up in_features {in_features}."
            )
        self.seed, self.in_features, self.blocks, self.factors = seed, in_features, blocks, list(factors)
        self.first_column = first_column
        self.block_width = width or 1
        self.signs = (
            torch.from_numpy(signs(seed, in_features, first_column)) if blocks else torch.ones(in_features)
        )

    def hadamard(self, x: torch.Tensor) -> torch.Tensor:
        """Unnormalised H x per block, additions in the order docs/format.md §5 fixes (dtype of x: float32 or float64)."""
        if not self.blocks:
            return x
        shape = x.shape
        y = x.reshape(-1, self.block_width)
        run = self.block_width
        for order in self.factors:
            run //= order
            if order & (order - 1):
                parts = y.reshape(y.shape[0], -1, order, run)
                h = torch.from_numpy(hadamard_matrix(order)).to(y.dtype)
                out = parts[:, :, 0, None, :] * h[:, 0, None]
                for c in range(1, order):
                    out = out + parts[:, :, c, None, :] * h[:, c, None]
                y = out.reshape(y.shape[0], -1)
            else:
                h = 1
                while h < order:
                    pairs = y.reshape(y.shape[0], -1, 2, h)
                    a, b = pairs[:, :, 0], pairs[:, :, 1]
                    y = torch.stack((a + b, a - b), dim=2).reshape(y.shape[0], -1)
                    h *= 2
        return y.reshape(shape)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """R x for x [..., in_features], float32 or float64; of weight rows this is W R^T."""
        if not self.blocks:
            return x
        return self.hadamard(x * self.signs.to(x.dtype)) / self.block_width**0.5

    def unrotate(self, x: torch.Tensor) -> torch.Tensor:
        """R^T x, the inverse of rotate."""
        if not self.blocks:
            return x
        return self._transposed(x) * self.signs.to(x.dtype) / self.block_width**0.5

    def _transposed(self, x: torch.Tensor) -> torch.Tensor:
        shape = x.shape
        y = x.reshape(-1, self.block_width)
        run = self.block_width
        for order in self.factors:
            run //= order
            h = torch.from_numpy(hadamard_matrix(order)).to(y.dtype)
            y = torch.einsum("bork,rc->bock", y.reshape(y.shape[0], -1, order, run), h).reshape(
                y.shape[0], -1
            )
        return y.reshape(shape)

    def matrix(self) -> torch.Tensor:
        """R, float64 [in_features, in_features]; for tests and small layers."""
        return self.rotate(torch.eye(self.in_features, dtype=torch.float64)).T
