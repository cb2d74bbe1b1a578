# SPDX-License-Identifier: Apache-2.0
"""Rounding to nearest in groups, on the weights as they are or on rotated ones."""

import torch

from offline_quant.rotation import rotate_rows, unrotate_rows
from pvq_vllm.codec.rotation import Rotation, rotation_layout

from .bits import group_width, grouped_integer_bits


def round_to_nearest(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Symmetric integers -2^(b-1) ... 2^(b-1) - 1 with a float16 scale for each group, the grid of GPTQ and of
    compressed-tensors: the scale puts the largest magnitude half a step outside the positive end.

    Args:
        weight: [m, n] float32; ``group`` divides n.
    """
    groups = weight.reshape(weight.shape[0], -1, group)
    scale = (groups.abs().amax(dim=-1, keepdim=True) / ((2**bits - 1) / 2)).half().float().clamp(min=1e-8)
    levels = (groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (levels * scale).reshape(weight.shape)


def full_rotation(width: int) -> Rotation:
    """Return the rotation of `--rotation online`, over the whole width where a Hadamard matrix has it."""
    blocks, factors = rotation_layout(width)
    return Rotation(0, width, blocks, list(factors))


def rounded_weights(source, names: list[str], bits: int, group: int, rotate: bool):
    """Yield (name, weight [m, n] float32, bits a weight) of every module."""
    for name in names:
        weight = source.read(f"{name}.weight").float()
        width = weight.shape[1]
        rotation = full_rotation(width) if rotate else None
        size = group_width(width, group)
        rounded = round_to_nearest(rotate_rows(weight, rotation), bits, size)
        yield name, unrotate_rows(rounded, rotation), grouped_integer_bits(bits, size)
