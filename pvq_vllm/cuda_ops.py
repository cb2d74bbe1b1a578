# SPDX-License-Identifier: Apache-2.0
"""The GPU half of the other ``*ops.py``: checks of tensors, scratch memory, the stream; then addresses to ``_C.cuda``.

A call allocates with torch alone, waits for nothing and runs under CUDA-graph capture. What a plan needs on a device besides
the weight is in cuda_constants.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import torch

from pvq_vllm import _C
from pvq_vllm.arguments import (
    PlanArguments,
    activation_dtype,
    check_call,
    codebook_name,
    require,
    view_codes,
)
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.cuda_constants import make_plan, on_device, on_gpu, table_address

MIN_CAPABILITY = 80


# ---- can it run here? -----------------------------------------------------------------------------------------------------


def check_device(index: int | None, plan: str | None = None) -> None:
    """Raise PVQError unless GPU `index` (None: the current one) runs PVQ, and a layer of `plan` if there is one."""
    if _C.with_cuda:
        if index is None:
            index = torch.cuda.current_device() if torch.cuda.is_available() else 0
        report = _describe(index)
        problem = explain(report, index)
        if plan is not None and not problem:
            problem = explain_plan(report, index, plan)
    else:
        problem = "this build of pvq_vllm has no CUDA kernels: install it again where nvcc of the CUDA toolkit is found"
    if problem:
        raise PVQError(problem + ".")


@cache
def _describe(index: int) -> _C.cuda.DeviceReport:
    exists = torch.cuda.is_available() and index < torch.cuda.device_count()
    with torch.cuda.device(index) if exists else nullcontext():
        return _C.cuda.describe_device(index)


def _name(report: _C.cuda.DeviceReport, index: int) -> str:
    return f"GPU {index} ({report.name or 'unknown'}, compute capability {report.capability / 10:.1f})"


def explain(report: _C.cuda.DeviceReport, index: int) -> str | None:
    """Return in a sentence what keeps a GPU from running PVQ, None if nothing does."""
    gpu = _name(report, index)
    if report.fault == "driver" and not report.driver_version:
        return "no NVIDIA driver is running here: install one, or serve on the CPU"
    if report.fault == "driver":
        return (
            f"the NVIDIA driver supports CUDA {_version(report.driver_version)}, but pvq_vllm was built with CUDA "
            f"{_version(report.runtime_version)}: update the driver, or install pvq_vllm again with an older toolkit"
        )
    if report.name and report.capability < MIN_CAPABILITY:
        return f"{gpu} is too old: PVQ needs compute capability 8.0 (Ampere) or newer"
    if report.fault == "image":
        return (
            f"{gpu} has no kernels in this build of pvq_vllm, which is for {_C.cuda.architectures}: install it again with "
            f"CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES={report.capability}{'a' if report.capability == 90 else ''}"
        )
    if report.fault:
        return f"GPU {index} cannot be used: {report.fault}"
    return None


def explain_plan(report: _C.cuda.DeviceReport, index: int, plan: str) -> str | None:
    """The same for one layer, whose tokens have to fit into shared memory to be rotated or projected.

    Raises:
        PVQError: no GPU runs it.
    """
    room, needed = report.max_shared_bytes, make_plan(plan).shared_bytes(report.code)
    if needed <= room:
        return None
    layer = PlanArguments.parse(plan)
    in_small_blocks = layer._replace(rotation_blocks=layer.in_features // 8, factors=[8])
    if make_plan(str(in_small_blocks)).shared_bytes(report.code) <= room:
        remedy = "--rotation residual:128 (or block:128)"
    else:
        remedy = "--tensor-parallel 2 or more, and serve it on as many GPUs"
    return (
        f"{_name(report, index)} has {room // 1024} KB of shared memory for a block, but a token of {layer.in_features} input "
        f"columns takes {-(-needed // 1024)} KB: quantize the model with {remedy}"
    )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _on_gpu_of(tensor: torch.Tensor):
    return on_gpu(tensor.get_device())


def _device_and_stream(tensor: torch.Tensor) -> tuple[int, int]:
    device = tensor.device.index
    return device, torch.cuda.current_stream(device).cuda_stream


# ---- the product ----------------------------------------------------------------------------------------------------------


def pack_linear(
    codes: list[torch.Tensor], scales: torch.Tensor, plan: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ops.pack_linear for codes on a GPU; `scales` are checked.

    Returns:
        weight, row_scale and an empty row_sum, on the device of the codes.
    """
    device = codes[0].device
    check_device(device.index, plan)
    layer, parts = make_plan(plan), PlanArguments.parse(plan).segments
    weight = torch.zeros(layer.weight_bytes, dtype=torch.uint8, device=device)
    row_scale = torch.zeros(layer.packed_rows, dtype=torch.float32, device=device)
    # By part of the plan: the first row with an invalid code, counted from the start of its segment.
    no_row = torch.iinfo(torch.int64).max
    invalid = torch.full((len(parts),), no_row, dtype=torch.int64, device=device)
    first_rows, part, output = [], 0, 0
    for codebook, rows, offset, packed_row in layer.segments:
        row_scale[packed_row : packed_row + rows] = scales[output : output + rows]
        output += rows
        first_row = 0
        while first_row < rows:
            part_rows = parts[part][1]
            segment = view_codes(part, codes[part], codebook, part_rows, layer.in_features, device)
            with _on_gpu_of(weight):
                _C.cuda.pack_rows(
                    codebook,
                    segment.data_ptr(),
                    part_rows,
                    layer.in_features,
                    first_row,
                    weight.data_ptr() + offset,
                    table_address(codebook, device.index),
                    invalid.data_ptr() + 8 * part,
                    *_device_and_stream(weight),
                )
            first_rows.append(first_row)
            first_row += part_rows
            part += 1
    on_device(plan, device.index)
    for index, row in enumerate(invalid.tolist()):
        if row != no_row:
            raise PVQError(
                f"codes[{index}], row {row - first_rows[index]}: a {codebook_name(parts[index][0])} code is "
                "out of range: copy the checkpoint again."
            )
    return weight, row_scale, torch.empty(0, dtype=torch.int32, device=device)


def unpack_linear(weight: torch.Tensor, plan: str) -> torch.Tensor:
    """q of a packed weight, int8 [out_features, in_features], for tests."""
    layer, parts = make_plan(plan), []
    for codebook, rows, offset, _ in layer.segments:
        parts.append(torch.empty((rows, layer.in_features), dtype=torch.int8, device=weight.device))
        with _on_gpu_of(weight):
            _C.cuda.unpack_rows(
                codebook,
                weight.data_ptr() + offset,
                0,
                rows,
                layer.in_features,
                table_address(codebook, weight.device.index),
                parts[-1].data_ptr(),
                *_device_and_stream(weight),
            )
    return torch.cat(parts)


def _check_packed(
    weight: torch.Tensor, row_scale: torch.Tensor, layer: _C.cuda.CudaPlan, device: torch.device
) -> None:
    if weight.numel() != layer.weight_bytes or row_scale.numel() != layer.packed_rows:
        raise PVQError("weight or row_scale does not belong to this plan; pack them with pack_linear.")
    if weight.dtype != torch.uint8 or row_scale.dtype != torch.float32:
        raise PVQError(
            f"weight and row_scale must be uint8 and float32; got {weight.dtype} and {row_scale.dtype}."
        )
    if weight.device != device or row_scale.device != device:
        raise PVQError(f"x is on {device}, the weight on {weight.device}; they must be on the same GPU.")
    for name, tensor in (("weight", weight), ("row_scale", row_scale)):
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:  # the kernels read 16 bytes at once
            raise PVQError(
                f"{name} must be contiguous and begin at a multiple of 16 bytes; pass what pack_linear returned."
            )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    row_scale: torch.Tensor,
    row_sum: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    plan: str,
) -> torch.Tensor:
    """``torch.ops.pvq.linear`` for tensors on a GPU."""
    if not _C.with_cuda:
        check_device(x.device.index)
    device, stream = _device_and_stream(x)
    layer, constants, counters = on_device(plan, device)
    dtype = check_call(x, out_features, layer)
    if row_sum.numel() and weight.dtype == torch.uint8:
        raise PVQError(
            "the weight was packed for the CPU and then moved to a GPU; load the model on the GPU"
            ' (transformers: device_map="cuda").'
        )
    _check_packed(weight, row_scale, layer, x.device)
    if bias is not None:
        require("bias", bias, x.dtype, (out_features,), x.device)
    x = x.contiguous()
    if x.data_ptr() % 16:  # a view into the middle of something: the kernels read 16 bytes at once
        x = x.clone()
    y = x.new_empty((*x.shape[:-1], out_features))
    num_tokens = x.numel() // layer.in_features
    if num_tokens == 0:
        return y
    with _on_gpu_of(x):
        workspace = torch.empty(layer.workspace_bytes(num_tokens, device), dtype=torch.uint8, device=x.device)
        _C.cuda.linear(
            layer,
            constants,
            counters.address(stream, _C.cuda.capture_of(device, stream)),
            x.data_ptr(),
            dtype,
            num_tokens,
            weight.data_ptr(),
            row_scale.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            workspace.data_ptr(),
            device,
            stream,
        )
    return y


def quantize_activations(x: torch.Tensor, plan: str) -> tuple[torch.Tensor, torch.Tensor]:
    """ops.quantize_activations for a checked `x` on a GPU."""
    check_device(x.device.index, plan)
    device, stream = _device_and_stream(x)
    layer, constants, _ = on_device(plan, device)
    num_tokens, planes = len(x), layer.num_planes
    at = layer.workspace_offsets(num_tokens)
    workspace = torch.empty(at["bytes"], dtype=torch.uint8, device=x.device)
    with _on_gpu_of(x):
        _C.cuda.quantize_activations(
            layer,
            constants,
            x.data_ptr(),
            activation_dtype(x),
            num_tokens,
            workspace.data_ptr(),
            device,
            stream,
        )
    # The order of csrc/cuda/layout.h: activation_offset.
    k = torch.arange(layer.in_features, device=x.device)
    column = torch.arange(num_tokens * planes, device=x.device)[:, None]
    unit = (2 * (k % 128 // 32) + k % 8 // 4) ^ (column & 7)
    offset = (k // 128 * at["padded_columns"] + column) * 128 + 16 * unit + 4 * (k % 32 // 8) + k % 4
    data = workspace[at["activations"] :][offset].view(torch.int8).view(num_tokens, planes, -1)
    scale = workspace[at["token_scale"] :][: 4 * num_tokens].view(torch.float32).clone()
    return data.transpose(0, 1).contiguous(), scale


# ---- codes ----------------------------------------------------------------------------------------------------------------


def encode_rows(
    weight: torch.Tensor, row_scale: torch.Tensor, codebook: int, codes: torch.Tensor, q: torch.Tensor
) -> None:
    """Fill `codes` and `q`; all arguments are checked and on one GPU."""
    check_device(weight.device.index)
    with _on_gpu_of(weight):
        _C.cuda.encode_rows(
            codebook,
            weight.data_ptr(),
            row_scale.data_ptr(),
            *weight.shape,
            codes.data_ptr(),
            q.data_ptr(),
            *_device_and_stream(weight),
        )


def encode_rows_with_feedback(
    weight: torch.Tensor,
    row_scale: torch.Tensor,
    codebook: int,
    codes: torch.Tensor,
    q: torch.Tensor,
    factor: torch.Tensor,
    metrics: torch.Tensor,
    error: torch.Tensor,
) -> None:
    """Fill `codes`, `q` and `error`; all arguments are checked and on one GPU."""
    check_device(weight.device.index)
    with _on_gpu_of(weight):
        _C.cuda.encode_rows_with_feedback(
            codebook,
            weight.data_ptr(),
            row_scale.data_ptr(),
            *weight.shape,
            codes.data_ptr(),
            q.data_ptr(),
            factor.data_ptr(),
            metrics.data_ptr(),
            error.data_ptr(),
            *_device_and_stream(weight),
        )


def descend_rows(
    weight: torch.Tensor,
    row_scale: torch.Tensor,
    codebook: int,
    codes: torch.Tensor,
    q: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    metrics: torch.Tensor,
) -> None:
    """Change `codes` and `q`, and overwrite `gradient`; all arguments are checked and on one GPU."""
    check_device(weight.device.index)
    with _on_gpu_of(weight):
        _C.cuda.descend_rows(
            codebook,
            weight.data_ptr(),
            row_scale.data_ptr(),
            *weight.shape,
            codes.data_ptr(),
            q.data_ptr(),
            gradient.data_ptr(),
            hessian.data_ptr(),
            metrics.data_ptr(),
            *_device_and_stream(weight),
        )


def encoding_error(
    weight: torch.Tensor, row_scale: torch.Tensor, codebook: int, stride: int, error: torch.Tensor
) -> None:
    """Fill `error`, float32 [rows]; all arguments are checked and on one GPU."""
    check_device(weight.device.index)
    with _on_gpu_of(weight):
        _C.cuda.encoding_error(
            codebook,
            weight.data_ptr(),
            row_scale.data_ptr(),
            *weight.shape,
            stride,
            error.data_ptr(),
            *_device_and_stream(weight),
        )


_CANONICAL_BYTES = 1 << 28  # of scratch memory: so many rows are decoded at once


def decode_canonical(
    weight_packed: torch.Tensor,
    weight_levels: torch.Tensor,
    group_size: int,
    num_pulses: int,
    amplitude_bits: int,
    in_features: int,
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """canonical_ops.decode_canonical for checked arguments on a GPU.

    Returns:
        q, and (fault, row, group) as the CPU's decoder reports it.
    """
    device, rows = weight_packed.device, len(weight_packed)
    check_device(device.index)
    sizes = (group_size, num_pulses, amplitude_bits, in_features // group_size)
    q = torch.empty((rows, in_features), dtype=torch.int8, device=device)
    fault = torch.full((1,), torch.iinfo(torch.int64).max, dtype=torch.int64, device=device)
    levels = weight_levels.to(device)
    with _on_gpu_of(weight_packed):
        least = _C.cuda.canonical_workspace_bytes(*sizes, 1)
        wanted = _C.cuda.canonical_workspace_bytes(*sizes, rows)
        num_bytes = max(least, min(wanted, _CANONICAL_BYTES))
        workspace = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        _C.cuda.canonical_decode_rows(
            *sizes,
            weight_packed.data_ptr(),
            levels.data_ptr(),
            rows,
            q.data_ptr(),
            fault.data_ptr(),
            workspace.data_ptr(),
            num_bytes,
            *_device_and_stream(weight_packed),
        )
        return q, _C.cuda.canonical_fault(int(fault))
