# SPDX-License-Identifier: Apache-2.0
"""The canonical codebook in the metric of a Hessian: groups of D columns, for fixed levels.

The amplitude levels belong to the whole matrix, so they are found first: Beta quantiles need only the norms
of the rows, Lloyd's the amplitudes of all groups before any feedback. Then groups are coded from left to right, as in
``error_feedback``,

    W_hat[:, Q] = encode(W[:, Q]);   E = (W[:, Q] - W_hat[:, Q]) U_QQ^-1;   W[:, R] -= E U_QR

with H^-1 = U^T U in rotated coordinates, and encode the nearest direction of the pyramid with the level that
is best for it (paper, section 3; LLVQ's algorithm 1), or a point that is nearer in the metric of the group, U_QQ^-1 U_QQ^-T.
Passes of coordinate descent look once more for a nearer point of each group, given the errors of all others, in the metric H_QQ.
"""

from dataclasses import dataclass

import torch

from pvq_vllm.canonical_ops import encode_groups, fit_levels, pack_pulses, refine_groups
from pvq_vllm.codec.format import Codebook

from .hessian import factor_of_block

LAZY_COLUMNS = 128  # errors reach the columns behind a block of about so many in one matrix product


@dataclass
class CanonicalCodes:
    """``levels`` as stored; ``pulses`` int16 [m, n / D, D], ``amplitudes`` uint16 [m, n / D], ``q`` int8 [m, n]."""

    levels: torch.Tensor
    pulses: torch.Tensor
    amplitudes: torch.Tensor
    q: torch.Tensor

    def packed(self, codebook: Codebook) -> torch.Tensor:
        """Return ``weight_packed``."""
        return torch.from_numpy(
            pack_pulses(self.pulses.numpy(), self.amplitudes.numpy(), codebook.amplitude_bits)
        )

    def group(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a group of every row, as ``encode_groups`` does."""
        size = self.pulses.shape[2]
        return (
            self.pulses[:, index].contiguous(),
            self.amplitudes[:, index].contiguous(),
            self.q[:, index * size : (index + 1) * size].contiguous(),
        )

    def set_group(self, index: int, found: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        """Put one in its place."""
        size = self.pulses.shape[2]
        self.pulses[:, index], self.amplitudes[:, index] = found[0], found[1]
        self.q[:, index * size : (index + 1) * size] = found[2]


def quantize_with_feedback(
    weight: torch.Tensor, factor: torch.Tensor, codebook: Codebook, amplitude: str
) -> tuple[CanonicalCodes, torch.Tensor]:
    """Code a rotated weight from left to right.

    Args:
        weight: [m, n] float32 on the CPU; not modified.
        factor: U, [n, n] float32 on the CPU, upper, U^T U = H^-1.
        codebook: canonical; D divides n.
        amplitude: "lloyd_max" or "beta".
    Returns:
        (codes, row scale float32 [m] that they were chosen for: 0 where a row is zero).
    """
    rows, width = weight.shape
    group = codebook.group_size
    sizes = group, codebook.num_pulses, codebook.amplitude_bits
    levels, scale = fit_levels(weight, *sizes, amplitude)
    working_scale = torch.where(scale > 0, scale, 1.0)
    work = weight.clone()
    codes = CanonicalCodes(
        levels,
        torch.empty(rows, width // group, group, dtype=torch.int16),
        torch.empty(rows, width // group, dtype=torch.uint16),
        torch.empty(rows, width, dtype=torch.int8),
    )
    step = max(1, LAZY_COLUMNS // group) * group
    for start in range(0, width, step):
        stop = min(start + step, width)
        error = torch.empty(rows, stop - start)
        for first in range(start, stop, group):
            last = first + group
            target, upper = work[:, first:last], factor[first:last, first:last]
            found = encode_groups(target, levels, working_scale, codebook.num_pulses)
            found = refine_groups(target, upper, found, levels, working_scale, codebook.num_pulses)
            codes.set_group(first // group, found)
            difference = target - found[2].float() * working_scale[:, None]
            scaled = torch.linalg.solve_triangular(upper, difference, upper=True, left=False)
            error[:, first - start : last - start] = scaled
            if last < stop:
                work[:, last:stop] -= scaled @ factor[first:last, last:stop]
        if stop < width:
            work[:, stop:] -= error @ factor[start:stop, stop:]
    return codes, scale


def descend(
    weight: torch.Tensor,
    codes: CanonicalCodes,
    hessian: torch.Tensor,
    codebook: Codebook,
    row_scale: torch.Tensor,
) -> None:
    """Make one pass of coordinate descent over the groups, from left to right, in place.

    Args:
        weight: [m, n] float32 on the CPU, rotated; not modified.
        hessian: H with its damping, float32 [n, n] on the CPU.
        row_scale: float32 [m], positive.
    """
    group = codebook.group_size
    error = weight - codes.q.float() * row_scale[:, None]
    for index in range(weight.shape[1] // group):
        columns = slice(index * group, (index + 1) * group)
        block = hessian[columns, columns]
        # What the errors of the other groups add to the weights of this one.
        pull = error @ hessian[:, columns] - error[:, columns] @ block
        target = weight[:, columns] + torch.linalg.solve(block.double(), pull.double(), left=False).float()
        found = refine_groups(
            target, factor_of_block(block), codes.group(index), codes.levels, row_scale, codebook.num_pulses
        )
        codes.set_group(index, found)
        error[:, columns] = weight[:, columns] - found[2].float() * row_scale[:, None]
