# SPDX-License-Identifier: Apache-2.0
"""The serving codebooks pvq2, pvq3, pvq4 and their plain decoder, the oracle of every kernel (docs/format.md §4.1).

The constants are read from ``csrc/codebook.h`` through the compiled module, so there is one definition; the shapes are
enumerated here a second time, by another method, for the tests to compare.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from math import comb

import numpy as np

from pvq_vllm import _C
from pvq_vllm.codec.errors import PVQError

GROUP_SIZE = 8
MAX_MAGNITUDE = 127


@dataclass(frozen=True)
class ServingCodebook:
    """Groups of eight weights: magnitudes from a union of pyramids, one gain a group (csrc/codebook.h).

    Attributes:
        id: number of the codebook in the compiled module.
        bytes_per_group: B, which is also the bits per weight.
        pyramids: K of each pyramid, in the order of the shape index.
        shape_bits: low bits of the code that hold the shape; the gain index is above them.
        refinement_bits: r, plain bits a magnitude.
        gains: (base, step) by pyramid and gain index.
        target_rms: root mean square, in int8 units, of a Gaussian row that the gains fit best.
    """

    id: int
    name: str
    bytes_per_group: int
    pyramids: tuple[int, ...]
    shape_bits: int
    refinement_bits: int
    gains: tuple[tuple[tuple[int, int], ...], ...]
    target_rms: float

    @property
    def num_shapes(self) -> int:
        return sum(comb(k + GROUP_SIZE - 1, GROUP_SIZE - 1) for k in self.pyramids)


SERVING: dict[str, ServingCodebook] = {c["name"]: ServingCodebook(**c) for c in _C.serving_codebooks()}
INT8_ID = 3  # CodebookId::kInt8


def codebook_id(name: str) -> int:
    """Number of a codebook that kernels run: a serving codebook or ``int8``.

    Raises:
        PVQError: another name.
    """
    if name == "int8":
        return INT8_ID
    if name not in SERVING:
        raise PVQError(f"codebook {name!r} is unknown; use one of {', '.join([*SERVING, 'int8'])}.")
    return SERVING[name].id


@cache
def shapes(name: str) -> np.ndarray:
    """All shapes of a codebook, [num_shapes, 8] int64, by index: stars and bars, ascending lexicographically."""
    rows: list[tuple[int, ...]] = []
    for pulses in SERVING[name].pyramids:
        slots = pulses + GROUP_SIZE - 1
        pyramid = []
        for bars in itertools.combinations(range(slots), GROUP_SIZE - 1):
            edges = (-1, *bars, slots)
            pyramid.append(tuple(b - a - 1 for a, b in itertools.pairwise(edges)))
        rows += sorted(pyramid)
    return np.array(rows, dtype=np.int64)


def group_magnitudes(codes: np.ndarray, name: str) -> np.ndarray:
    """The b of docs/format.md §4.1 of groups of eight weights, also of those that it calls invalid.

    Args:
        codes: uint8 [..., B].
        name: a serving codebook.
    Returns:
        int64 [..., 8].
    Raises:
        PVQError: a shape out of range.
    """
    book = SERVING[name]
    wide = book.shape_bits > 8
    code = codes[..., 0].astype(np.int64) | (codes[..., 1].astype(np.int64) << 8 if wide else 0)
    shape, gain_index = code & ((1 << book.shape_bits) - 1), code >> book.shape_bits
    if (shape >= book.num_shapes).any():
        raise PVQError(
            f"a {name} code has shape {int(shape.max())} of {book.num_shapes}; the tensor is damaged."
        )
    j = shapes(name)[shape] << book.refinement_bits
    if book.refinement_bits:
        j += codes[..., 3].astype(np.int64)[..., None] >> np.arange(GROUP_SIZE) & 1
    starts = np.cumsum([comb(k + GROUP_SIZE - 1, GROUP_SIZE - 1) for k in book.pyramids])
    gain = np.array(book.gains)[np.searchsorted(starts, shape, side="right"), gain_index]
    return gain[..., :1] + gain[..., 1:] * j


def decode_groups(codes: np.ndarray, name: str) -> np.ndarray:
    """Decode groups of eight weights in plain numpy.

    Args:
        codes: uint8 [..., B].
        name: a serving codebook or ``int8``.
    Returns:
        int8 [..., 8], the q of docs/format.md §4.
    Raises:
        PVQError: a shape or a magnitude out of range.
    """
    codes = np.asarray(codes, dtype=np.uint8)
    if name == "int8":
        q = codes.view(np.int8)
        if (q == -128).any():
            raise PVQError("an int8 code is -128, which is out of range; the tensor is damaged.")
        return q.copy()
    b = group_magnitudes(codes, name)
    if (b > MAX_MAGNITUDE).any():
        raise PVQError(
            f"a {name} code decodes to {int(b.max())}, above {MAX_MAGNITUDE}; the tensor is damaged."
        )
    signs = codes[..., 2 if SERVING[name].shape_bits > 8 else 1].astype(np.int64)
    return np.where(signs[..., None] >> np.arange(GROUP_SIZE) & 1, ~b, b).astype(np.int8)
