# SPDX-License-Identifier: Apache-2.0
"""The product as docs/format.md §6 and §7 define it, in plain torch: the oracle that kernels must equal bit for bit."""

from __future__ import annotations

import numpy as np
import torch

from pvq_vllm.codec.activation import parse_activation
from pvq_vllm.codec.rotation import Rotation

LEVELS = {1: 127, 2: 32512}  # by number of planes


def tree_sum(v: np.ndarray) -> np.ndarray:
    """Sum over the last axis, a power of two long, in the order of docs/format.md §6."""
    while (half := v.shape[-1] // 2) > 0:
        v = v[..., :half] + v[..., half:]
    return v[..., 0]


def project_groups(y: np.ndarray, num_pulses: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Project every group onto S(D, K), as docs/format.md §6 orders the operations.

    Args:
        y: float32 [..., D], any values.
    Returns:
        pulses int32 [..., D]; scale s float32 [...]; sum of magnitudes float32 [...], by which a caller tells
        a broken group (not below 2^126).
    """
    assert y.dtype == np.float32
    magnitude = np.abs(y)
    with np.errstate(all="ignore"):
        total = tree_sum(magnitude)
        usable = (total >= np.float32(2.0**-60)) & (total < np.float32(2.0**126))
        factor = np.where(usable, np.float32(num_pulses) / total, np.float32(0))
        target = np.where(usable[..., None], magnitude * factor[..., None], np.float32(0))
    pulses = np.rint(target)
    excess = np.where(usable, pulses.sum(axis=-1).astype(np.int64) - num_pulses, 0)
    residue = np.rint((target - pulses) * np.float32(2.0**20)).astype(np.int64)
    down = (excess > 0)[..., None]
    order = np.where(down, np.where(pulses > 0, residue, np.iinfo(np.int64).max), -residue)
    rank = order.argsort(axis=-1, kind="stable").argsort(axis=-1, kind="stable")  # equals: lowest index first
    pulses += np.where(rank < np.abs(excess)[..., None], np.where(down, -1, 1), 0).astype(np.float32)
    norm = (pulses * pulses).sum(axis=-1)  # exact
    divisor = norm * factor
    scale = tree_sum(pulses * target) / np.where(usable, divisor, np.float32(1))
    return np.where(y < 0, -pulses, pulses).astype(np.int32), scale, total


def quantize_activation(x: torch.Tensor, rotation: Rotation, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate and quantize activations.

    Args:
        x: [num_tokens, in_features], any float dtype.
        mode: ``a8``, ``a16`` or ``pvq:D,K``.
    Returns:
        planes int8 [1 or 2, num_tokens, in_features] and token_scale float32 [num_tokens].
    """
    activation = parse_activation(mode)
    y = rotation.hadamard(x.float() * rotation.signs)
    finite = torch.isfinite(y).all(dim=-1)
    factor = torch.ones_like(y)  # a_i = rint(y_i * (factor_i * (levels / A)))
    if activation.group_size:
        groups = y.reshape(len(y), -1, activation.group_size).numpy()
        pulses, scale, total = project_groups(groups, activation.num_pulses)
        finite = torch.from_numpy((total < np.float32(2.0**126)).all(axis=-1))
        largest = torch.from_numpy((scale * np.abs(pulses).max(axis=-1).astype(np.float32)).max(axis=-1))
        y = torch.from_numpy(pulses).float().reshape(y.shape)
        factor = torch.from_numpy(np.repeat(scale, activation.group_size, axis=-1)).reshape(y.shape)
    else:
        largest = y.abs().amax(dim=-1)
    usable = finite & (largest >= 2.0**-60)
    safe = torch.where(usable, largest, torch.ones_like(largest))
    levels = LEVELS[activation.num_planes]
    inverse = torch.tensor(float(levels), dtype=torch.float32) / safe
    steps = torch.round(
        torch.where(usable[:, None], y, torch.zeros_like(y)) * (factor * inverse[:, None])
    ).to(torch.int32)
    constant = np.float32(1.0 / (levels * np.sqrt(float(rotation.block_width))))
    scale = torch.where(usable, largest * torch.tensor(constant), torch.zeros_like(largest))
    scale = torch.where(finite, scale, torch.full_like(scale, float("nan")))
    if activation.num_planes == 1:
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
    if len(planes) == 2:
        value = value * 256.0 + sums[1].to(torch.float32)
    y = (value * (row_scale.float() * 0.5)) * token_scale[:, None]
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], q.shape[0])
