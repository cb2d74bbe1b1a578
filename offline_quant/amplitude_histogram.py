# SPDX-License-Identifier: Apache-2.0
"""How the power of a weight row is shared between its groups, before and after rotation, against theory.

For a Gaussian row of G groups of D weights the share |w_g|^2 / |w|^2 of a group has the distribution
Beta(D/2, D (G-1)/2) (docs/format.md's canonical amplitudes rest on it). Histograms are of G times the share,
whose mean is 1, so that rows of all widths fit one picture. They are drawn in report.html.
"""

import math

import numpy as np
import torch

from .rotation import rotate_rows

ROWS = 256  # of a matrix, evenly spaced
BIN_WIDTH, BINS = 0.1, 40  # 0 ... 4; what lies beyond is in the last bin


def group_power(weight: torch.Tensor, group_size: int) -> np.ndarray:
    """Count the groups of ``weight`` by G |w_g|^2 / |w|^2: int64 [BINS]. Rows of zeros are left out.

    Args:
        weight: [m, n], any float dtype, n a multiple of ``group_size``.
    """
    power = weight.float().reshape(len(weight), -1, group_size).square().sum(dim=2)
    mean = power.mean(dim=1, keepdim=True)
    share = (power / mean)[mean[:, 0] > 0]
    return (
        torch.bincount((share / BIN_WIDTH).long().clamp_(max=BINS - 1).flatten(), minlength=BINS)
        .cpu()
        .numpy()
    )


def expected_group_power(group_size: int, num_groups: int) -> np.ndarray:
    """Return the probability of every bin for Gaussian weights, float64 [BINS]: G Beta(D/2, D (G-1)/2)."""
    if num_groups == 1:
        return np.eye(BINS)[int(1 / BIN_WIDTH)]
    a, b = group_size / 2, group_size * (num_groups - 1) / 2
    log_norm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    fine = 100  # points of a bin for the midpoint rule
    x = (np.arange(BINS * fine) + 0.5) * BIN_WIDTH / fine / num_groups
    with np.errstate(divide="ignore"):
        log_density = log_norm + (a - 1) * np.log(x) + (b - 1) * np.log1p(-np.minimum(x, 1))
    mass = np.where(x < 1, np.exp(log_density), 0.0) * BIN_WIDTH / fine / num_groups
    probability = mass.reshape(BINS, fine).sum(axis=1)
    probability[-1] += max(0.0, 1 - probability.sum())
    return probability


def measure(original: torch.Tensor, weight: torch.Tensor, rotation, group_size: int) -> dict[str, list]:
    """Return the histograms of some rows of a module as lists of BINS numbers: ``before`` and ``after``
    rotation (counts), and what to ``expect`` (counts of Gaussian weights).

    Args:
        original: [m, n], as the model has it.
        weight: [m, n], what ``rotation`` rotates: ``original``, or that with rotations folded into it.
    """
    step = max(1, len(weight) // ROWS)
    before = group_power(original[::step], group_size)
    after = group_power(rotate_rows(weight[::step].float(), rotation), group_size)
    expected = expected_group_power(group_size, weight.shape[1] // group_size) * after.sum()
    return {"before": before.tolist(), "after": after.tolist(), "expect": expected.round(2).tolist()}


def add(histograms: list[dict[str, list]]) -> dict[str, list]:
    """Return the sum of several results of ``measure``."""
    return {
        key: np.sum([histogram[key] for histogram in histograms], axis=0).round(2).tolist()
        for key in ("before", "after", "expect")
    }
