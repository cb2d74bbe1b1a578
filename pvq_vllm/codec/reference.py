# SPDX-License-Identifier: Apache-2.0
"""The product as docs/format.md §6 and §7 define it, in plain torch: the oracle that kernels must equal bit for bit."""

from __future__ import annotations

import numpy as np
import torch

from pvq_vllm.codec.rotation import Rotation

LEVELS = {"a8": 127, "a16": 32512}


def quantize_activation(x: torch.Tensor, rotation: Rotation, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate and quantize activations.

    Args:
        x: [num_tokens, in_features], any float dtype.
        mode: ``a8`` or ``a16``.
    Returns:
        planes int8 [1 or 2, num_tokens, in_features] and token_scale float32 [num_tokens].
    """
    y = rotation.hadamard(x.float() * rotation.signs)
    largest = y.abs().amax(dim=-1)
    finite = torch.isfinite(y).all(dim=-1)
    usable = finite & (largest >= 2.0**-60)
    safe = torch.where(usable, largest, torch.ones_like(largest))
    inverse = torch.tensor(float(LEVELS[mode]), dtype=torch.float32) / safe
    steps = torch.round(torch.where(usable[:, None], y, torch.zeros_like(y)) * inverse[:, None]).to(
        torch.int32
    )
    constant = np.float32(1.0 / (LEVELS[mode] * np.sqrt(float(rotation.block_width))))
    scale = torch.where(usable, largest * torch.tensor(constant), torch.zeros_like(largest))
    scale = torch.where(finite, scale, torch.full_like(scale, float("nan")))
    if mode == "a8":
        return steps[None].to(torch.int8), scale
    high = (steps + 128) >> 8
    return torch.stack((high, steps - 256 * high)).to(torch.int8), scale


def linear(
    x: torch.Tensor,
    q: torch.Tensor,
    h: torch.Tensor | int,
    row_scale: torch.Tensor,
    rotation: Rotation,
    mode: str,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x W^T with w = (q + h/2) row_scale in rotated coordinates.

    Args:
        x: [..., in_features], float32, float16 or bfloat16.
        q: int8 [out_features, in_features].
        h: 0 or 1, or int [out_features] when codebooks are mixed.
        row_scale: float16 or float32 [out_features].
        bias: [out_features] or None.
    Returns:
        [..., out_features], dtype of x.
    """
    tokens = x.reshape(-1, x.shape[-1])
    planes, token_scale = quantize_activation(tokens, rotation, mode)
    odd = 2 * q.to(torch.int64) + torch.as_tensor(h, dtype=torch.int64).reshape(-1, 1)
    sums = planes.to(torch.int64) @ odd.T  # exact
    value = sums[0].to(torch.float32)
    if mode == "a16":
        value = value * 256.0 + sums[1].to(torch.float32)
    y = (value * (row_scale.float() * 0.5)) * token_scale[:, None]
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], q.shape[0])
