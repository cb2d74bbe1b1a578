# SPDX-License-Identifier: Apache-2.0
"""Amplitudes of the canonical codebook: 2^b levels for the norms of the groups of a row.

If the n = D G weights of a row are Gaussian, the squared norm of a group is a share of the squared norm of
the row with the distribution Beta(D/2, D (G-1)/2). Its quantiles at the centres of 2^b cells of equal
probability are levels that need no search; Lloyd's are better by up to 0.45 dB (D = 16,
K = 58, b = 4) and are the default of the encoder.
"""

from __future__ import annotations

import numpy as np

from pvq_vllm.codec.errors import PVQError

MAX_AMPLITUDE_BITS = 16
_GRID = 1 << 16
_NEGLIGIBLE = 60.0  # a density below e^-60 of the largest one


def check_amplitude_bits(bits: int) -> None:
    """Raise PVQError unless 0 <= bits <= 16."""
    if not 0 <= bits <= MAX_AMPLITUDE_BITS:
        raise PVQError(f"amplitude_bits is {bits}; choose 0 to {MAX_AMPLITUDE_BITS}.")


def amplitude_distribution(alpha: float, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """The distribution function of sqrt(X), X ~ Beta(alpha, beta), on a fine grid.

    With sqrt(X) = sin(phi) the density is sin(phi)^(2 alpha - 1) cos(phi)^(2 beta - 1), bounded for alpha,
    beta >= 1/2, so the trapezoidal rule is enough and no special function is needed.

    Returns:
        (amplitude, probability): float64 [65537] each, ascending; probability runs from 0 to 1.
    """
    low, high = 0.0, np.pi / 2
    for _ in range(2):  # once to find where the mass is, once finely there
        phi = np.linspace(low, high, _GRID + 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            log_density = np.nan_to_num((2 * alpha - 1) * np.log(np.sin(phi)), nan=0.0)
            log_density += np.nan_to_num((2 * beta - 1) * np.log(np.cos(phi)), nan=0.0)
        log_density -= log_density.max()
        (kept,) = np.nonzero(log_density > -_NEGLIGIBLE)
        low, high = phi[max(kept[0] - 1, 0)], phi[min(kept[-1] + 1, _GRID)]
    density = np.exp(log_density)
    probability = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return np.sin(phi), probability / probability[-1]


def beta_levels(group_size: int, num_groups: int, bits: int) -> np.ndarray:
    """Square roots of the Beta(D/2, D (G-1)/2) quantiles at (i + 1/2) / 2^bits.

    Args:
        group_size: D.
        num_groups: G, the groups of a row.
        bits: b, 0 to 16.
    Returns:
        float64 [2^b], ascending, in units of the norm of the row. All 1 when G = 1.
    """
    check_amplitude_bits(bits)
    if num_groups == 1:
        return np.ones(1 << bits)
    amplitude, probability = amplitude_distribution(group_size / 2, group_size * (num_groups - 1) / 2)
    return np.interp((np.arange(1 << bits) + 0.5) / (1 << bits), probability, amplitude)


def lloyd_max_levels(samples: np.ndarray, bits: int, iterations: int = 100) -> np.ndarray:
    """Levels with a locally least squared error for these samples (Lloyd 1957, Max 1960).

    Args:
        samples: any shape, finite, at least one.
        bits: b, 0 to 16.
        iterations: at most so many; it ends when no sample changes its level.
    Returns:
        float64 [2^b], ascending. A level that no sample chooses stays where it was.
    """
    check_amplitude_bits(bits)
    ordered = np.sort(np.asarray(samples, dtype=np.float64), axis=None)
    total = np.concatenate([[0.0], np.cumsum(ordered)])
    centres = (np.arange(1 << bits) + 0.5) / (1 << bits)
    levels = np.interp(centres * ordered.size - 0.5, np.arange(ordered.size), ordered)
    edges = None
    for _ in range(iterations):
        inner = np.searchsorted(ordered, (levels[1:] + levels[:-1]) / 2)
        new_edges = np.concatenate([[0], inner, [ordered.size]])
        if edges is not None and (new_edges == edges).all():
            break
        edges = new_edges
        count = np.diff(edges)
        mean = np.diff(total[edges]) / np.maximum(count, 1)
        levels = np.maximum.accumulate(np.where(count > 0, mean, levels))
    return levels


def nearest_level(levels: np.ndarray, amplitude: np.ndarray) -> np.ndarray:
    """The number of the level nearest to each amplitude, the lower one of two; int64, same shape."""
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, amplitude)
