# SPDX-License-Identifier: Apache-2.0
"""Pyramid Vector Quantization as in its paper (van der Ouderaa et al., arXiv 2410.16926), apart from this project's quantizer.

A row w of n weights, its inputs rotated by a Hadamard matrix, is n / D groups. Each is a direction on the pyramid S(D, K) and
one of 2^b amplitudes, fixed fractions of the norm of the row:

    direction   y = K x / |x|_1;   p = round(y), corrected where it is furthest off until sum |p_i| = K (Fischer 1986)
    amplitude   the level nearest to <x, p> / |p|_2, of levels |w|_2 sqrt(quantile of Beta(D/2, D (n/D - 1)/2) at (i + 1/2) / 2^b)
    feedback    E = (W[:, Q] - W_hat[:, Q]) U_QQ^-1;   W[:, R] -= E U_QR       for groups Q from left to right, R what is behind

with H^-1 = U^T U, H = X^T X / N and 1% of its mean diagonal. A weight takes ceil(log2 |S(D, K)|) / D + b / D + 16 / n bits.
The paper has neither a search for a better direction, nor row scales or levels that are fitted, nor a second pass.
"""

from collections.abc import Callable, Iterator

import torch

from offline_quant.calibration import LayerwiseForward
from offline_quant.hessian import inverse_factor, rotate_hessian
from offline_quant.model_source import ModelSource
from offline_quant.rotation import rotate_rows, unrotate_rows
from pvq_vllm.codec.amplitude import beta_levels

from .bits import group_width, largest_pulses, pyramid_bits
from .rounding import full_rotation


def round_direction(x: torch.Tensor, num_pulses: int) -> torch.Tensor:
    """The point of the pyramid nearest to K x / |x|_1, for every row.

    Corrections go one at a time to the coordinate with the largest residue in the needed direction. None is corrected
    twice, because its residue then points the other way, so they are made all at once.

    Args:
        x: [m, D] float32, finite. A row of zeros gets its pulses spread evenly.
        num_pulses: K.
    Returns:
        p, float32 [m, D]: integers with the signs of ``x``, their magnitudes summing to K.
    """
    size = x.shape[1]
    total = x.abs().sum(dim=1, keepdim=True)
    target = num_pulses * torch.where(total > 0, x.abs() / total, 1 / size)
    pulses = target.round()
    missing = num_pulses - pulses.sum(dim=1, keepdim=True)
    residue = (target - pulses) * missing.sign()
    order = residue.argsort(dim=1, descending=True, stable=True)
    is_corrected = torch.arange(size, device=x.device) < missing.abs()
    pulses.scatter_add_(1, order, is_corrected * missing.sign())
    return torch.where(x < 0, -pulses, pulses)


def quantize_group(
    x: torch.Tensor, num_pulses: int, levels: torch.Tensor, row_norm: torch.Tensor
) -> torch.Tensor:
    """Direction and amplitude of a group of every row.

    Args:
        x: [m, D] float32.
        levels: float32 [2^b], ascending, in units of the norm of the row.
        row_norm: float32 [m, 1].
    Returns:
        What the codes stand for, float32 [m, D].
    """
    pulses = round_direction(x, num_pulses)
    direction = pulses / pulses.norm(dim=1, keepdim=True)
    best = (x * direction).sum(dim=1, keepdim=True) / torch.where(row_norm > 0, row_norm, 1.0)
    code = torch.bucketize(best, (levels[1:] + levels[:-1]) / 2)
    return direction * (levels[code] * row_norm)


def feedback(
    weight: torch.Tensor,
    factor: torch.Tensor,
    group: int,
    quantize: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Quantize groups of columns from left to right; those still to come make up for the error.

    Args:
        weight: [m, n] float32; not modified.
        factor: U, [n, n] float32, upper, U^T U = H^-1.
        group: D, divides n.
        quantize: gives the quantized values of a group of columns, [m, D].
    """
    work = weight.clone()
    quantized = torch.empty_like(weight)
    for first in range(0, weight.shape[1], group):
        last = first + group
        quantized[:, first:last] = quantize(work[:, first:last])
        error = work[:, first:last] - quantized[:, first:last]
        scaled = torch.linalg.solve_triangular(factor[first:last, first:last], error, upper=True, left=False)
        work[:, last:].addmm_(scaled, factor[first:last, last:], alpha=-1)
    return quantized


def quantize_matrix(
    weight: torch.Tensor, factor: torch.Tensor, group: int, num_pulses: int, amplitude_bits: int
) -> torch.Tensor:
    """Quantize rotated rows, float32 [m, n], with the row norms in float16 and ``factor`` as in ``feedback``."""
    row_norm = weight.norm(dim=1, keepdim=True).half().float()
    levels = torch.from_numpy(beta_levels(group, weight.shape[1] // group, amplitude_bits)).to(weight)
    return feedback(weight, factor, group, lambda x: quantize_group(x, num_pulses, levels, row_norm))


def paper_weights(
    source: ModelSource, tokens: torch.Tensor, device: str, group: int, bits: float, amplitude_bits: int
) -> Iterator[tuple[str, torch.Tensor, float]]:
    """Yield (name, weight [m, n] as stored, bits a weight) of every module of the decoder layers, each fitted to what the
    quantized layers before it produce.

    Args:
        tokens: int64 [sequences, length], for the Hessians.
        group: D asked for, see ``bits.group_width``.
        bits: a weight for the direction; K is the largest that they allow.
    """
    forward = LayerwiseForward(source, tokens, device=device)
    for layer in range(len(source.layers)):
        with forward.loaded(layer) as module:
            names = source.linear_names(layer)
            sums = forward.collect(layer, names)
            factors: dict[int, torch.Tensor] = {}  # q, k and v share one, as do gate and up
            for name in names:
                total = sums[name]
                weight = source.read(f"{name}.weight").to(device, torch.float32)
                width = weight.shape[1]
                size = group_width(width, group)
                num_pulses = largest_pulses(size, bits)
                rotation = full_rotation(width)
                if id(total) not in factors:
                    factors[id(total)] = inverse_factor(rotate_hessian(total.mean(), rotation))
                quantized = quantize_matrix(
                    rotate_rows(weight, rotation), factors[id(total)], size, num_pulses, amplitude_bits
                )
                restored = unrotate_rows(quantized, rotation).to(source.weight_dtype(name))
                linear = module.get_submodule(name.removeprefix(f"{source.layers_name}.{layer}."))
                linear.weight.data = restored.to(forward.dtype)
                yield name, restored.cpu(), pyramid_bits(width, size, num_pulses, amplitude_bits)
            forward.advance(layer)
