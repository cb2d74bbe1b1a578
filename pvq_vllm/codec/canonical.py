# SPDX-License-Identifier: Apache-2.0
"""The canonical codebook S(D, K) with 2^b amplitudes: from weights to packed rows and back (docs/format.md
§4.3).

    row:     for each group, its index in I = ceil(log2 N(D, K)) bits, then its amplitude code in b bits;
        least bit first
    weight:  q_i = rint(p_i (level / sqrt(sum p_j^2)))     in [-127, 127],     w_i = q_i row_scale

The decoder and the packing here are the slow, exact reference; ``pvq_vllm.canonical_ops`` gives the same
bytes by C++.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pvq_vllm.codec.amplitude import (
    MAX_AMPLITUDE_BITS,
    beta_levels,
    check_amplitude_bits,
    lloyd_max_levels,
    nearest_level,
)
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.pyramid import (
    MAX_GROUP_SIZE,
    MAX_PULSES,
    check_pyramid,
    codebook_size,
    index_bits,
    index_from_pulses,
    pulses_from_index,
    search_pulses,
)

__all__ = [
    "AMPLITUDES",
    "MAX_AMPLITUDE_BITS",
    "MAX_GROUP_SIZE",
    "MAX_PULSES",
    "FittedLevels",
    "Kernels",
    "beta_levels",
    "check_levels",
    "check_shape",
    "codebook_size",
    "decode_weight",
    "encode_groups",
    "encode_weight",
    "fit_levels",
    "index_bits",
    "index_from_pulses",
    "lloyd_max_levels",
    "pack_row",
    "pulses_from_index",
    "row_bytes",
    "search_pulses",
    "unpack_row",
]

AMPLITUDES = ("lloyd_max", "beta")
TARGET_RMS = 30.0  # of a row in int8 units: rounding to integers stays 40 dB below, and 127 is 4.2 sigma
_Q_LIMIT = 127.5  # what is less rounds to 127 or less; 127.5 itself rounds to even, 128
# Tried where the weights of a row go beyond 127.
_SCALE_FACTORS = (1.06, 1.12, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
_CHUNK_WEIGHTS = 1 << 22  # float64 copies are made of so many weights at a time


def check_shape(in_features: int, group_size: int, num_pulses: int, amplitude_bits: int) -> None:
    """Raise PVQError unless D, K and b are in range and D divides in_features."""
    check_pyramid(group_size, num_pulses)
    check_amplitude_bits(amplitude_bits)
    if in_features < 1 or in_features % group_size:
        raise PVQError(
            f"group_size {group_size} does not divide in_features {in_features}; choose one that does."
        )


def check_levels(levels: np.ndarray, amplitude_bits: int) -> None:
    """Raise PVQError unless there are 2^b levels, finite, not negative, ascending."""
    if levels.shape != (1 << amplitude_bits,):
        raise PVQError(f"weight_levels has shape {tuple(levels.shape)}; expected {(1 << amplitude_bits,)}.")
    if not np.isfinite(levels).all() or levels[0] < 0 or (np.diff(levels) < 0).any():
        raise PVQError("weight_levels must be finite, not negative and ascending: copy the checkpoint again.")


def row_bytes(in_features: int, group_size: int, num_pulses: int, amplitude_bits: int) -> int:
    """Bytes of a packed row: ceil(n / D (I + b) / 8)."""
    check_shape(in_features, group_size, num_pulses, amplitude_bits)
    return (in_features // group_size * (index_bits(group_size, num_pulses) + amplitude_bits) + 7) // 8


def pack_row(
    indices: Sequence[int], amplitudes: Sequence[int], index_width: int, amplitude_bits: int
) -> bytes:
    """The bit stream of a row: for each group its index in I bits, then its amplitude code in b bits.

    Args:
        indices: below 2^I.
        amplitudes: as many, below 2^b.
    """
    stream, position = 0, 0
    for index, amplitude in zip(indices, amplitudes, strict=True):
        stream |= (index | int(amplitude) << index_width) << position
        position += index_width + amplitude_bits
    return stream.to_bytes((position + 7) // 8, "little")


def unpack_row(
    data: bytes, groups: int, index_width: int, amplitude_bits: int
) -> tuple[list[int], list[int]]:
    """``pack_row`` inverted.

    Returns:
        (indices, amplitudes), ``groups`` integers each.
    Raises:
        PVQError: the row has another length, or an unused bit is set.
    """
    width = index_width + amplitude_bits
    if len(data) != (groups * width + 7) // 8:
        raise PVQError(f"A packed row has {len(data)} bytes; expected {(groups * width + 7) // 8}.")
    stream = int.from_bytes(data, "little")
    if stream >> (groups * width):
        raise PVQError("A packed row has unused bits that are not zero: copy the checkpoint again.")
    codes = [stream >> (g * width) & ((1 << width) - 1) for g in range(groups)]
    return [code & ((1 << index_width) - 1) for code in codes], [code >> index_width for code in codes]


def decode_weight(
    weight_packed: np.ndarray,
    weight_levels: np.ndarray,
    group_size: int,
    num_pulses: int,
    amplitude_bits: int,
    in_features: int,
) -> np.ndarray:
    """Decode a module, one Python integer after the other.

    Args:
        weight_packed: uint8 [m, row_bytes].
        weight_levels: float32 [2^b].
    Returns:
        q, int8 [m, in_features].
    Raises:
        PVQError: a shape does not fit, levels that are not ascending, an index of N or more, a weight outside
            [-127, 127], an unused bit that is set; the message names the row.
    """
    length = row_bytes(in_features, group_size, num_pulses, amplitude_bits)
    if weight_packed.ndim != 2 or weight_packed.shape[1] != length or weight_packed.dtype != np.uint8:
        raise PVQError(
            f"weight_packed is {weight_packed.dtype} {list(weight_packed.shape)}; "
            f"expected uint8 [out_features, {length}]."
        )
    check_levels(weight_levels, amplitude_bits)
    groups, width = in_features // group_size, index_bits(group_size, num_pulses)
    q = np.empty((len(weight_packed), groups, group_size), dtype=np.int8)
    for row, data in enumerate(weight_packed):
        try:
            indices, amplitudes = unpack_row(data.tobytes(), groups, width, amplitude_bits)
            pulses = np.array([pulses_from_index(i, group_size, num_pulses) for i in indices], dtype=np.int64)
        except PVQError as error:
            raise PVQError(f"weight_packed, row {row}: {error}") from None
        norm = np.sqrt((pulses * pulses).sum(axis=1).astype(np.float64))
        factor = weight_levels.astype(np.float64)[amplitudes] / norm
        exact = pulses * factor[:, None]
        if not (np.abs(exact) < _Q_LIMIT).all():
            raise PVQError(
                f"weight_packed, row {row}: a weight is outside [-127, 127]: copy the checkpoint again."
            )
        q[row] = np.rint(exact)
    return q.reshape(len(weight_packed), in_features)


class Kernels(NamedTuple):
    """The two slow steps of the encoder; ``canonical_ops`` has the same two in C++."""

    search: Callable[[np.ndarray, int], np.ndarray]  # (x float32 [count, D], K) -> int16 [count, D]
    pack: Callable[
        [np.ndarray, np.ndarray, int], np.ndarray
    ]  # (pulses int16 [m, G, D], codes uint16 [m, G], b) -> uint8


def _pack_reference(pulses: np.ndarray, amplitudes: np.ndarray, amplitude_bits: int) -> np.ndarray:
    width = index_bits(pulses.shape[2], int(np.abs(pulses[0, 0].astype(np.int64)).sum()))
    rows = [
        pack_row([index_from_pulses(p) for p in row], codes, width, amplitude_bits)
        for row, codes in zip(pulses, amplitudes, strict=True)
    ]
    return np.frombuffer(bytearray().join(rows), dtype=np.uint8).reshape(len(rows), -1)


REFERENCE_KERNELS = Kernels(search_pulses, _pack_reference)


class _Groups(NamedTuple):
    """What the choice of the amplitudes needs to know of each group; float64 [m, G]."""

    best: np.ndarray  # <w, p> / ||p||, the best amplitude for the chosen direction
    norm: np.ndarray  # ||p||
    peak: np.ndarray  # max |p_i|


def _measure(weight: np.ndarray, pulses: np.ndarray) -> _Groups:
    """weight float32 and pulses int16 [..., G, D]."""
    shape = pulses.shape[:-1]
    best, norm, peak = (np.empty(shape) for _ in range(3))
    step = max(1, _CHUNK_WEIGHTS // max(1, pulses[0].size))
    for begin in range(0, len(pulses), step):
        part = slice(begin, begin + step)
        p = pulses[part].astype(np.float64)
        norm[part] = np.sqrt((p * p).sum(axis=-1))
        best[part] = (weight[part] * p).sum(axis=-1) / norm[part]
        peak[part] = np.abs(p).max(axis=-1)
    return _Groups(best, norm, peak)


def _flattest(group_size: int, num_pulses: int) -> np.ndarray:
    return num_pulses // group_size + (np.arange(group_size) < num_pulses % group_size)


def _highest_code(levels: np.ndarray, groups: _Groups) -> np.ndarray:
    """The greatest level that keeps every weight of the group in [-127, 127]; -1 where none does."""
    highest = np.searchsorted(levels, _Q_LIMIT * groups.norm / groups.peak) - 1
    while True:  # the decoder's own operations decide
        too_high = (highest >= 0) & ~(groups.peak * (levels[np.maximum(highest, 0)] / groups.norm) < _Q_LIMIT)
        if not too_high.any():
            return highest
        highest[too_high] -= 1


def _flatten(x: np.ndarray, num_pulses: int, level: float, search: Callable) -> np.ndarray:
    """A point for one group [D] that the lowest level can carry: the largest weights are cut for it."""
    for halvings in range(1, 30):
        cut = np.abs(x).max() * 0.5**halvings
        p = search(np.clip(x, -cut, cut).astype(np.float32)[None], num_pulses)[0]
        if np.abs(p).max() * (level / np.sqrt(float((p.astype(np.int64) ** 2).sum()))) < _Q_LIMIT:
            return p
    return np.where(x < 0, -1, 1) * _flattest(x.size, num_pulses)


def _half(scale: np.ndarray) -> np.ndarray:
    """Rounded to float16, which must be finite; float64."""
    with np.errstate(over="ignore"):
        rounded = scale.astype(np.float16)
    if not np.isfinite(rounded).all():
        row = int(np.nonzero(~np.isfinite(rounded))[0][0])
        raise PVQError(f"The weights of row {row} are too large for a float16 row scale; repair the model.")
    return rounded.astype(np.float64)


def _choose(
    levels: np.ndarray, best: np.ndarray, highest: np.ndarray, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Amplitude codes [m, G] for these row scales [m], and the part of each row's error they cause."""
    codes = np.minimum(nearest_level(levels, best / np.where(scale > 0, scale, np.inf)[:, None]), highest)
    return codes, ((best - levels[codes] * scale[:, None]) ** 2).sum(axis=1)


class FittedLevels(NamedTuple):
    """The amplitude levels of a matrix, and what the encoder knows of its groups once they are fitted."""

    levels: np.ndarray  # float32 [2^b], as stored, in int8 units
    scale: np.ndarray  # float64 [m], on the float16 grid; 0 for a row of zeros
    pulses: np.ndarray  # int16 [m, G, D], the nearest direction of every group
    groups: _Groups


def fit_levels(
    weight: np.ndarray,
    group_size: int,
    num_pulses: int,
    amplitude_bits: int,
    amplitude: str = "lloyd_max",
    kernels: Kernels = REFERENCE_KERNELS,
) -> FittedLevels:
    """Find the levels of a matrix: the first half of ``encode_weight``, whose arguments and errors it has."""
    if weight.ndim != 2 or weight.dtype != np.float32 or weight.shape[0] < 1:
        raise PVQError(
            f"weight is {weight.dtype} {list(weight.shape)}; expected float32 [out_features, in_features]."
        )
    rows, in_features = weight.shape
    check_shape(in_features, group_size, num_pulses, amplitude_bits)
    if amplitude not in AMPLITUDES:
        raise PVQError(f"amplitude is {amplitude!r}; choose 'lloyd_max' or 'beta'.")
    num_groups = in_features // group_size
    x = weight.reshape(rows, num_groups, group_size)
    pulses = kernels.search(x.reshape(-1, group_size), num_pulses).reshape(x.shape)
    groups = _measure(x, pulses)

    # The flattest point can carry every level up to `bound`, so no group is left without a code.
    flat = _flattest(group_size, num_pulses)
    bound = 127.0 * np.sqrt(float((flat**2).sum())) / flat.max()
    expected = beta_levels(group_size, num_groups, amplitude_bits)
    unit = min(TARGET_RMS * np.sqrt(in_features), bound / expected[-1])
    scale = _half(np.sqrt((groups.best**2).sum(axis=1)) / unit)
    levels = expected * unit
    if amplitude == "lloyd_max" and scale.any():
        used = scale > 0
        levels = lloyd_max_levels(groups.best[used] / scale[used, None], amplitude_bits)
    return FittedLevels(np.minimum(levels, bound).astype(np.float32), scale, pulses, groups)


def _make_fit(
    x: np.ndarray, pulses: np.ndarray, groups: _Groups, levels: np.ndarray, num_pulses: int, search: Callable
) -> np.ndarray:
    """Flatten the groups that no level can carry, in place; return the highest code of every group [m, G]."""
    highest = _highest_code(levels, groups)
    for row, group in zip(*np.nonzero(highest < 0), strict=True):
        pulses[row, group] = _flatten(x[row, group], num_pulses, levels[0], search)
    (changed,) = np.nonzero((highest < 0).any(axis=1))
    if changed.size:
        for all_rows, some in zip(groups, _measure(x[changed], pulses[changed]), strict=True):
            all_rows[changed] = some
        highest[changed] = _highest_code(levels, _Groups(*(field[changed] for field in groups)))
    return highest


def encode_groups(
    x: np.ndarray, levels: np.ndarray, scale: np.ndarray, num_pulses: int, search: Callable = search_pulses
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encode one group of every row for levels that are fixed.

    Args:
        x: float32 [m, D], finite.
        levels: float32 [2^b], as ``fit_levels`` gives them for this D and K; scale: float64 [m].
    Returns:
        (pulses int16 [m, D], codes uint16 [m], q int8 [m, D]).
    """
    levels = levels.astype(np.float64)
    pulses = search(np.ascontiguousarray(x), num_pulses)[:, None]
    groups = _measure(x[:, None], pulses)
    highest = _make_fit(x[:, None], pulses, groups, levels, num_pulses, search)
    codes, _ = _choose(levels, groups.best, highest, scale)
    q = np.rint(pulses[:, 0] * (levels[codes] / groups.norm))
    return pulses[:, 0], codes[:, 0].astype(np.uint16), q.astype(np.int8)


def encode_weight(
    weight: np.ndarray,
    group_size: int,
    num_pulses: int,
    amplitude_bits: int,
    amplitude: str = "lloyd_max",
    kernels: Kernels = REFERENCE_KERNELS,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encode a weight matrix, each group by its nearest direction and then the best level that fits.

    Args:
        weight: float32 [m, n], finite, already rotated.
        group_size, num_pulses, amplitude_bits: D (divides n), K, b.
        amplitude: where the levels come from: "lloyd_max", fitted to this matrix, or "beta", from theory.
        kernels: the search and the packing.
    Returns:
        (weight_packed uint8 [m, row_bytes], weight_levels float32 [2^b], weight_scale float16 [m]). A row
        of a Gaussian matrix has an rms of about 30 in int8 units; a group that would leave [-127, 127] gets
        a lower level, or its row a greater scale if that is better. A row of zeros has the scale 0.
    Raises:
        PVQError: a shape or parameter out of range, weights that are not finite or too large for float16.
    """
    stored_levels, scale, pulses, groups = fit_levels(
        weight, group_size, num_pulses, amplitude_bits, amplitude, kernels
    )
    rows = len(weight)
    levels = stored_levels.astype(np.float64)
    highest = _make_fit(weight.reshape(pulses.shape), pulses, groups, levels, num_pulses, kernels.search)

    codes, error = _choose(levels, groups.best, highest, scale)
    power = (levels[codes] ** 2).sum(axis=1)
    fitted = (groups.best * levels[codes]).sum(axis=1) / np.where(power > 0, power, np.inf)
    (clipped,) = np.nonzero((codes == highest).any(axis=1) & (highest < len(levels) - 1).any(axis=1))
    trials = [(np.arange(rows), fitted)] + [(clipped, scale[clipped] * factor) for factor in _SCALE_FACTORS]
    for subset, trial in trials:
        trial = _half(trial)
        trial_codes, trial_error = _choose(levels, groups.best[subset], highest[subset], trial)
        better = trial_error < error[subset]
        target = subset[better]
        codes[target], error[target], scale[target] = trial_codes[better], trial_error[better], trial[better]
    packed = kernels.pack(pulses, codes.astype(np.uint16), amplitude_bits)
    return packed, stored_levels, scale.astype(np.float16)
