# SPDX-License-Identifier: Apache-2.0
"""The canonical codebook with error feedback: groups of D columns from left to right, for fixed levels.

The amplitude levels belong to the whole matrix, so they are found first: Beta quantiles need only the norms
of the rows, Lloyd's the amplitudes of all groups before any feedback. Then, as in ``weight_quantizer``,

    W_hat[:, Q] = encode(W[:, Q]);   E = (W[:, Q] - W_hat[:, Q]) U_QQ^-1;   W[:, R] -= E U_QR

with H^-1 = U^T U in rotated coordinates, and encode the nearest direction of the pyramid with the level that
is best for it (paper, section 3; LLVQ's algorithm 1), or a point that is nearer in the metric of the group, U_QQ^-1 U_QQ^-T.
"""

import torch

from pvq_vllm.canonical_ops import encode_groups, fit_levels, pack_pulses, refine_groups
from pvq_vllm.codec.format import Codebook

LAZY_COLUMNS = 128  # errors reach the columns behind a block of about so many in one matrix product


def quantize_with_feedback(
    weight: torch.Tensor, factor: torch.Tensor, codebook: Codebook, amplitude: str
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Code a rotated weight.

    Args:
        weight: [m, n] float32 on the CPU; not modified.
        factor: U, [n, n] float32 on the CPU, upper, U^T U = H^-1.
        codebook: canonical; D divides n.
        amplitude: "lloyd_max" or "beta".
    Returns:
        (weight_packed and weight_levels as stored, q int8 [m, n], row scale float32 [m] that q was chosen
        for: 0 where a row is zero).
    """
    rows, width = weight.shape
    group = codebook.group_size
    sizes = group, codebook.num_pulses, codebook.amplitude_bits
    levels, scale = fit_levels(weight, *sizes, amplitude)
    working_scale = torch.where(scale > 0, scale, 1.0)
    work = weight.clone()
    pulses = torch.empty(rows, width // group, group, dtype=torch.int16)
    amplitudes = torch.empty(rows, width // group, dtype=torch.uint16)
    q = torch.empty(rows, width, dtype=torch.int8)
    step = max(1, LAZY_COLUMNS // group) * group
    for start in range(0, width, step):
        stop = min(start + step, width)
        error = torch.empty(rows, stop - start)
        for first in range(start, stop, group):
            last = first + group
            target, upper = work[:, first:last], factor[first:last, first:last]
            found = encode_groups(target, levels, working_scale, codebook.num_pulses)
            found = refine_groups(target, upper, found, levels, working_scale, codebook.num_pulses)
            pulses[:, first // group], amplitudes[:, first // group], q[:, first:last] = found
            difference = target - found[2].float() * working_scale[:, None]
            scaled = torch.linalg.solve_triangular(upper, difference, upper=True, left=False)
            error[:, first - start : last - start] = scaled
            if last < stop:
                work[:, last:stop] -= scaled @ factor[first:last, last:stop]
        if stop < width:
            work[:, stop:] -= error @ factor[start:stop, stop:]
    packed = torch.from_numpy(pack_pulses(pulses.numpy(), amplitudes.numpy(), codebook.amplitude_bits))
    return {"weight_packed": packed, "weight_levels": levels}, q, scale
