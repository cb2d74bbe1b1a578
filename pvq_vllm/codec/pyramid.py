# SPDX-License-Identifier: Apache-2.0
"""The points of the pyramid S(D, K): how many, which number each has, which one is nearest. Exact Python
integers.

    S(D, K) = {p in Z^D : sum |p_i| = K},  N(D, K) = |S(D, K)|,  D = group_size, K = num_pulses

    N(d, k) = N(d-1, k) + N(d-1, k-1) + N(d, k-1),  N(d, 0) = 1,  N(0, k) = 0 for k > 0

      N(d, k)   k = 1    2    3     4      5
        d = 1       2    2    2     2      2
        d = 2       4    8   12    16     20
        d = 3       6   18   38    66    102
        d = 4       8   32   88   192    360

The index of a point is Fischer's (T. R. Fischer, "A Pyramid Vector Quantizer", IEEE Trans. Information
Theory 32(4), 1986; docs/format.md §4.3): the coordinates in order, each with the values 0, +1, -1, +2, -2,
... This file is the oracle for csrc/canonical.cpp, which reaches the same numbers by other sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from pvq_vllm.codec.errors import PVQError

MAX_GROUP_SIZE = 1024
MAX_PULSES = 4096
_KEPT_TABLE_ENTRIES = 1 << 18  # a table of N(l, k) up to this size is kept: at most some 40 MB
_REFINEMENTS = 16  # three or four change anything on Gaussian groups


def check_pyramid(group_size: int, num_pulses: int) -> None:
    """Raise PVQError unless 1 <= group_size <= 1024 and 1 <= num_pulses <= 4096."""
    if not 1 <= group_size <= MAX_GROUP_SIZE:
        raise PVQError(f"group_size is {group_size}; choose 1 to {MAX_GROUP_SIZE}.")
    if not 1 <= num_pulses <= MAX_PULSES:
        raise PVQError(f"num_pulses is {num_pulses}; choose 1 to {MAX_PULSES}.")


@lru_cache(maxsize=256)
def codebook_size(group_size: int, num_pulses: int) -> int:
    """N(D, K), exactly: the sum over i, the number of coordinates that are not zero, of 2^i C(D, i) C(K-1,
    i-1).

    Raises:
        PVQError: D is not in 1..1024 or K not in 1..4096.
    """
    check_pyramid(group_size, num_pulses)
    total, term = 0, 1  # term: 2^i C(D, i) C(K-1, i-1)
    for i in range(1, min(group_size, num_pulses) + 1):
        grown = term * 2 * (group_size - i + 1) * (num_pulses - i + 1)
        term = 2 * group_size if i == 1 else grown // (i * (i - 1))
        total += term
    return total


def index_bits(group_size: int, num_pulses: int) -> int:
    """ceil(log2 N(D, K)), the bits of an index."""
    return (codebook_size(group_size, num_pulses) - 1).bit_length()


def _ascending_rows(group_size: int, num_pulses: int) -> Iterator[list[int]]:
    """Yield the rows N(l, 0 .. K) for l = 0 .. D."""
    row = [1] + [0] * num_pulses
    yield row
    for _ in range(group_size):
        above, row = row, [1]
        for k in range(1, num_pulses + 1):
            row.append(above[k] + above[k - 1] + row[k - 1])
        yield row


@lru_cache(maxsize=4)
def _table(group_size: int, num_pulses: int) -> list[list[int]]:
    return list(_ascending_rows(group_size, num_pulses))


@lru_cache(maxsize=2)
def _top_row(group_size: int, num_pulses: int) -> list[int]:
    """N(D, 0 .. K)."""
    row: list[int] = []
    for row in _ascending_rows(group_size, num_pulses):  # noqa: B007
        pass
    return row


def _descending_rows(group_size: int, num_pulses: int) -> Iterator[list[int]]:
    """Yield the rows N(l, 0 .. K) for l = D-1 .. 0; a table too large to keep is walked backwards."""
    if group_size * num_pulses <= _KEPT_TABLE_ENTRIES:
        yield from reversed(_table(group_size, num_pulses)[:-1])
        return
    row = _top_row(group_size, num_pulses)
    for _ in range(group_size):
        below, row = row, [1]
        for k in range(1, num_pulses + 1):
            row.append(below[k] - below[k - 1] - row[k - 1])
        yield row


def index_from_pulses(pulses: Sequence[int]) -> int:
    """The index of a point of S(D, K), D = len(pulses), K = the sum of the magnitudes.

    Args:
        pulses: integers, their magnitudes summing to at least 1.
    Returns:
        An integer in [0, N(D, K)), ``pulses_from_index`` inverted.
    Raises:
        PVQError: no pulse at all, or D or K out of range.
    """
    pulses = [int(x) for x in pulses]
    left = sum(abs(x) for x in pulses)
    check_pyramid(len(pulses), left)
    index = 0
    for x, counts in zip(pulses, _descending_rows(len(pulses), left), strict=True):
        magnitude = abs(x)
        if magnitude:
            index += counts[left] + 2 * sum(counts[left - j] for j in range(1, magnitude))
            if x < 0:
                index += counts[left - magnitude]
        left -= magnitude
    return index


def pulses_from_index(index: int, group_size: int, num_pulses: int) -> list[int]:
    """The point of S(D, K) that has this index.

    Raises:
        PVQError: the index is not in [0, N(D, K)), or D or K is out of range.
    """
    if not 0 <= index < codebook_size(group_size, num_pulses):
        raise PVQError(f"Index {index} is not below N({group_size}, {num_pulses}); the data is damaged.")
    pulses, left = [], num_pulses
    for counts in _descending_rows(group_size, num_pulses):
        magnitude = 0
        if index >= counts[left]:
            index -= counts[left]
            magnitude = 1
            while index >= 2 * counts[left - magnitude]:
                index -= 2 * counts[left - magnitude]
                magnitude += 1
        negative = magnitude > 0 and index >= counts[left - magnitude]
        if negative:
            index -= counts[left - magnitude]
        pulses.append(-magnitude if negative else magnitude)
        left -= magnitude
    return pulses


def _sums(x: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """<x, p> and <p, p> of every row, added in the order of the coordinates."""
    return np.cumsum(x * p, axis=1)[:, -1], np.cumsum(p * p, axis=1)[:, -1]


def _fix_total(p: np.ndarray, target: np.ndarray, num_pulses: int) -> None:
    """Move single pulses, where it costs least, until every row of p [groups, D] has num_pulses; in place."""
    excess = p.sum(axis=1).astype(np.int64) - num_pulses
    while excess.any():
        for sign in (1, -1):
            (rows,) = np.nonzero(np.sign(excess) == sign)
            cost = sign * (p[rows] - target[rows])
            if sign > 0:
                cost[p[rows] == 0] = -np.inf
            p[rows, cost.argmax(axis=1)] -= sign
            excess[rows] -= sign


def _project(x: np.ndarray, scale: np.ndarray, num_pulses: int) -> np.ndarray:
    """argmin ||p - scale x|| over integers p >= 0 with sum K (Fischer 1986, section IV); x >= 0."""
    target = x * scale[:, None]
    p = np.rint(target)
    _fix_total(p, target, num_pulses)
    return p


def _greedy(x: np.ndarray, scale: np.ndarray, num_pulses: int) -> np.ndarray:
    """Round scale x down; each missing pulse goes where the cosine gains most (Opus, celt/vq.c)."""
    target = x * scale[:, None]
    p = np.floor(target)
    (over,) = np.nonzero(p.sum(axis=1) > num_pulses)  # target may have been rounded up to an integer
    if over.size:
        fixed = p[over]
        _fix_total(fixed, target[over], num_pulses)
        p[over] = fixed
    xy, yy = _sums(x, p)
    missing = num_pulses - p.sum(axis=1)
    while missing.any():
        (rows,) = np.nonzero(missing)
        score = (xy[rows, None] + x[rows]) ** 2 / (yy[rows, None] + (2 * p[rows] + 1))
        best = score.argmax(axis=1)
        xy[rows] += x[rows, best]
        yy[rows] += 2 * p[rows, best] + 1
        p[rows, best] += 1
        missing[rows] -= 1
    return p


def _take_better(x: np.ndarray, p: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Put the rows of `other` with a greater cosine into p; returns which ones they are."""
    xy, yy = _sums(x, p)
    other_xy, other_yy = _sums(x, other)
    better = other_xy * other_xy * yy > xy * xy * other_yy
    p[better] = other[better]
    return better


def search_pulses(x: np.ndarray, num_pulses: int) -> np.ndarray:
    """For each row, a point of S(D, K) in almost the same direction: <x, p> / ||p|| large.

    Fischer's rounding and the greedy search on the cosine, the better of both, then refined: with s = <p,
    p> / <x, p>, the point nearest to s x has a cosine that is not lower, which is repeated until the cosine
    stays. Not always the best point; the tests bound the distance to brute force.

    Args:
        x: [groups, D], float32, finite; the arithmetic is float64.
        num_pulses: K.
    Returns:
        int16 [groups, D], the magnitudes of each row summing to K. A row of zeros gets the flattest point.
        Ties: the lowest coordinate. The same on every machine and in C++.
    Raises:
        PVQError: D or K out of range, x not finite.
    """
    groups, group_size = x.shape
    check_pyramid(group_size, num_pulses)
    if not np.isfinite(x).all():
        raise PVQError("x has values that are not finite; the search needs finite ones.")
    magnitude = np.abs(x.astype(np.float64))
    pulses = np.empty((groups, group_size), dtype=np.int16)
    pulses[:] = num_pulses // group_size + (np.arange(group_size) < num_pulses % group_size)
    (rows,) = np.nonzero(magnitude.any(axis=1))
    if rows.size == 0:
        return pulses
    magnitude = magnitude[rows]
    scale = num_pulses / np.cumsum(magnitude, axis=1)[:, -1]
    p = _project(magnitude, scale, num_pulses)
    _take_better(magnitude, p, _greedy(magnitude, scale, num_pulses))
    active = np.arange(rows.size)
    for _ in range(_REFINEMENTS):
        xy, yy = _sums(magnitude[active], p[active])
        current = p[active]
        better = _take_better(magnitude[active], current, _project(magnitude[active], yy / xy, num_pulses))
        p[active] = current
        active = active[better]
        if active.size == 0:
            break
    pulses[rows] = np.where(x[rows] < 0, -p, p)
    return pulses
