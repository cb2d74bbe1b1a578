# SPDX-License-Identifier: Apache-2.0
"""The canonical codebook by the compiled module: same bytes and integers as ``codec.canonical``, some
thousand times faster.

As in ops.py and quantizer_ops.py, a wrong address given to ``_C`` would crash the process, so everything is
checked here.
"""

from __future__ import annotations

import numpy as np
import torch

from pvq_vllm import _C, cuda_ops
from pvq_vllm.codec import canonical
from pvq_vllm.codec.errors import PVQError

_FAULTS = {
    1: "group {group} has an index that is not below N({d}, {k})",
    2: "group {group} has a weight outside [-127, 127]",
    3: "an unused bit of the last byte is set",
}


def search_pulses(x: np.ndarray, num_pulses: int) -> np.ndarray:
    """``codec.canonical.search_pulses``: x float32 [groups, D], finite -> int16 [groups, D]."""
    groups, group_size = x.shape
    canonical.codebook_size(group_size, num_pulses)  # checks D and K
    if not np.isfinite(x).all():
        raise PVQError("The weight has values that are not finite; repair the model first.")
    x = np.ascontiguousarray(x, dtype=np.float32)
    pulses = np.empty((groups, group_size), dtype=np.int16)
    _C.canonical_search(x.ctypes.data, groups, group_size, num_pulses, pulses.ctypes.data)
    return pulses


def pack_pulses(pulses: np.ndarray, amplitudes: np.ndarray, amplitude_bits: int) -> np.ndarray:
    """Rows of packed codes: pulses int16 [m, G, D], amplitudes uint16 [m, G] -> uint8 [m, row_bytes]."""
    rows, groups, group_size = pulses.shape
    num_pulses = int(np.abs(pulses[0, 0].astype(np.int64)).sum())
    pulses = np.ascontiguousarray(pulses)
    amplitudes = np.ascontiguousarray(amplitudes)
    length = canonical.row_bytes(groups * group_size, group_size, num_pulses, amplitude_bits)
    packed = np.empty((rows, length), dtype=np.uint8)
    _C.canonical_encode_rows(
        pulses.ctypes.data,
        amplitudes.ctypes.data,
        rows,
        groups,
        group_size,
        num_pulses,
        amplitude_bits,
        packed.ctypes.data,
    )
    return packed


def encode_canonical(
    weight: torch.Tensor,
    group_size: int,
    num_pulses: int,
    amplitude_bits: int,
    amplitude: str = "lloyd_max",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``codec.canonical.encode_weight`` on torch tensors; gives the same bytes.

    Args:
        weight: float32 [m, n] on the CPU, finite, already rotated.
        group_size, num_pulses, amplitude_bits: D (divides n), K, b.
        amplitude: "lloyd_max" or "beta".
    Returns:
        (weight_packed uint8 [m, row_bytes], weight_levels float32 [2^b], weight_scale float16 [m]).
    Raises:
        PVQError: a shape, dtype or parameter out of range, weights that are not finite or too large.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise PVQError(f"weight is {weight.dtype} on {weight.device}; expected float32 on the CPU.")
    kernels = canonical.Kernels(search_pulses, pack_pulses)
    encoded = canonical.encode_weight(
        weight.detach().contiguous().numpy(), group_size, num_pulses, amplitude_bits, amplitude, kernels
    )
    packed, levels, scale = (torch.from_numpy(array) for array in encoded)
    return packed, levels, scale


def fit_levels(
    weight: torch.Tensor,
    group_size: int,
    num_pulses: int,
    amplitude_bits: int,
    amplitude: str = "lloyd_max",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``codec.canonical.fit_levels`` on a torch tensor, for an encoder that goes group by group.

    Args:
        weight: float32 [m, n] on the CPU, as for ``encode_canonical``.
    Returns:
        (weight_levels float32 [2^b], row scale float32 [m] on the float16 grid, 0 for a row of zeros).
    """
    sizes = group_size, num_pulses, amplitude_bits
    fitted = canonical.fit_levels(
        weight.contiguous().numpy(), *sizes, amplitude, canonical.Kernels(search_pulses, pack_pulses)
    )
    return torch.from_numpy(fitted.levels), torch.from_numpy(fitted.scale).float()


def encode_groups(
    x: torch.Tensor, levels: torch.Tensor, scale: torch.Tensor, num_pulses: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``codec.canonical.encode_groups`` on torch tensors on the CPU: one group of every row.

    Args:
        x: float32 [m, D], finite; levels: float32 [2^b]; scale: float32 [m].
    Returns:
        (pulses int16 [m, D], amplitude codes uint16 [m], q int8 [m, D]).
    """
    arrays = canonical.encode_groups(
        x.contiguous().numpy(), levels.numpy(), scale.double().numpy(), num_pulses, search_pulses
    )
    pulses, codes, q = (torch.from_numpy(array) for array in arrays)
    return pulses, codes, q


def refine_groups(
    x: torch.Tensor,
    factor: torch.Tensor,
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    levels: torch.Tensor,
    scale: torch.Tensor,
    num_pulses: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes for one group of every row that cost no more than those of ``encode_groups``, an error e costing
    |e U^-1|^2 (csrc/canonical_refine.cpp).

    Args:
        x, levels, scale, num_pulses: as for ``encode_groups``; levels ascending, scale positive.
        factor: U, float32 [D, D] on the CPU, upper.
        found: what ``encode_groups`` returned; not modified.
    """
    rows, group_size = x.shape
    pulses, codes, q = (tensor.clone() for tensor in found)
    upper = factor.double().contiguous()
    inverse = torch.linalg.solve_triangular(upper, torch.eye(group_size, dtype=torch.float64), upper=True)
    metric = inverse @ inverse.T
    x, inverse, levels, scale = x.contiguous(), inverse.contiguous(), levels.contiguous(), scale.contiguous()
    _C.canonical_refine(
        x.data_ptr(),
        rows,
        group_size,
        num_pulses,
        upper.data_ptr(),
        inverse.data_ptr(),
        metric.data_ptr(),
        levels.data_ptr(),
        len(levels),
        scale.data_ptr(),
        pulses.data_ptr(),
        codes.data_ptr(),
        q.data_ptr(),
    )
    return pulses, codes, q


def decode_canonical(
    weight_packed: torch.Tensor,
    weight_levels: torch.Tensor,
    group_size: int,
    num_pulses: int,
    amplitude_bits: int,
    in_features: int,
) -> torch.Tensor:
    """``codec.canonical.decode_weight`` on torch tensors; gives the same integers.

    Args:
        weight_packed: uint8 [m, row_bytes] on the CPU or a GPU.
        weight_levels: float32 [2^b] on the CPU.
    Returns:
        q, int8 [m, in_features], where weight_packed is.
    Raises:
        PVQError: a shape or dtype that does not fit, levels that are not ascending, an index of N or more,
            a weight outside [-127, 127], an unused bit that is set; the message names the row.
    """
    length = canonical.row_bytes(in_features, group_size, num_pulses, amplitude_bits)
    if (
        weight_packed.ndim != 2
        or weight_packed.shape[1] != length
        or weight_packed.dtype != torch.uint8
        or weight_packed.device.type not in ("cpu", "cuda")
    ):
        raise PVQError(
            f"weight_packed is {weight_packed.dtype} {list(weight_packed.shape)} on {weight_packed.device}; "
            f"expected uint8 [out_features, {length}] on the CPU or a GPU."
        )
    if weight_levels.dtype != torch.float32 or weight_levels.device.type != "cpu":
        raise PVQError(
            f"weight_levels is {weight_levels.dtype} on {weight_levels.device}; expected float32 on the CPU."
        )
    canonical.check_levels(weight_levels.numpy(), amplitude_bits)
    weight_packed, weight_levels = weight_packed.contiguous(), weight_levels.contiguous()
    sizes = (group_size, num_pulses, amplitude_bits)
    if weight_packed.is_cuda:
        q, (fault, row, group) = cuda_ops.decode_canonical(weight_packed, weight_levels, *sizes, in_features)
    else:
        rows = weight_packed.shape[0]
        q = torch.empty((rows, in_features), dtype=torch.int8, device="cpu")
        fault, row, group = _C.canonical_decode_rows(
            weight_packed.data_ptr(),
            weight_levels.data_ptr(),
            rows,
            in_features // group_size,
            *sizes,
            q.data_ptr(),
        )
    if fault:
        reason = _FAULTS[fault].format(group=group, d=group_size, k=num_pulses)
        raise PVQError(f"weight_packed, row {row}: {reason}: copy the checkpoint again.")
    return q
