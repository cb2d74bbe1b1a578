# SPDX-License-Identifier: Apache-2.0
"""The kernels that serve a model, as torch operators. Tensors are known here and in quantizer_ops.py and canonical_ops.py: the
compiled module ``_C`` takes addresses.

``torch.ops.pvq.linear`` is the one operator that a model runs; it has a fake implementation, so torch.compile sees one opaque
node, and chooses its kernel by the number of tokens below Python.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from pvq_vllm import _C, cuda_ops
from pvq_vllm.arguments import (
    PlanArguments,
    activation_dtype,
    check_call,
    check_scales,
    codebook_name,
    require,
    view_codes,
)
from pvq_vllm.codec.activation import parse_activation
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.serving import codebook_id


def cpu_isa() -> str:
    """Instruction set in use: portable, avx2, avx512 or amx; PVQ_CPU_ISA caps it."""
    return _C.cpu_isa()


def compiled_module() -> Path:
    """File of the compiled module."""
    return Path(_C.__file__)


def check_device(device: torch.device, plan: str | None = None) -> None:
    """Raise PVQError unless PVQ, and a layer of `plan` if there is one, runs on `device`; the sentence says what to do."""
    if device.type == "cuda":
        cuda_ops.check_device(device.index, plan)
    elif device.type not in ("cpu", "meta"):
        raise PVQError(f"{device} is neither a CPU nor an NVIDIA GPU; PVQ has kernels for these two.")


# ---- the product ----------------------------------------------------------------------------------------------------------


def make_plan(
    segments: list[tuple[str, int]],
    in_features: int,
    *,
    seed: int = 0,
    first_column: int = 0,
    rotation_blocks: int = 0,
    factors: list[int] | None = None,
    activation: str = "a8",
) -> str:
    """Describe a linear layer in one string, the `plan` argument of the operator.

    A string and not a handle, so that a compiled graph which torch caches on disk means the same in another process.

    Args:
        segments: (codebook, rows) of consecutive output rows; codebook is pvq2, pvq3, pvq4 or int8.
        in_features: columns on this rank; first_column: where they start in the whole layer.
        rotation_blocks: blocks on this rank, 0 for no rotation; factors: of one block.
        activation: a8, a16 or pvq:D,K, whose D must divide in_features.
    Raises:
        PVQError: an argument out of range.
    """
    planes, group_size, num_pulses = parse_activation(activation)
    parts = [(codebook_id(name), rows) for name, rows in segments]
    arguments = (in_features, parts, planes, seed, first_column, rotation_blocks, factors or [])
    plan = str(PlanArguments(*arguments, group_size, num_pulses))
    _plan(plan)
    return plan


@cache
def _plan(text: str) -> _C.LinearPlan:
    try:
        return _C.LinearPlan(*PlanArguments.parse(text))
    except ValueError as error:
        raise PVQError(str(error)) from None


class PackedLinear(NamedTuple):
    """Tensors of a layer in the order that the kernels of their device read.

    Attributes:
        weight: uint8 [bytes].
        row_scale: float32 [packed rows], each segment padded with zeros to a multiple of 16 (on a GPU: 64).
        row_sum: int32 [packed rows], sum of q; empty on a GPU.
    """

    weight: torch.Tensor
    row_scale: torch.Tensor
    row_sum: torch.Tensor


def pack_linear(codes: list[torch.Tensor], row_scale: torch.Tensor, plan: str) -> PackedLinear:
    """Repack the codes of a checkpoint once, at load, on the device where they are.

    Args:
        codes: one tensor per segment of the plan, uint8 [rows, in_features / 8, B] (int8 codebook: B = 8; an int8 tensor
            [rows, in_features] is taken as well).
        row_scale: float16 or float32 [out_features].
        plan: from make_plan.
    Raises:
        PVQError: a wrong shape or dtype, a code or scale out of range; names segment and row. A GPU that
            cannot run the layer.
    """
    layer = _plan(plan)
    if len(codes) != len(layer.segments):
        raise PVQError(f"codes has {len(codes)} segments; the plan has {len(layer.segments)}.")
    scales = check_scales(row_scale, layer.out_features)
    if codes[0].is_cuda:
        return PackedLinear(*cuda_ops.pack_linear(codes, scales, plan))
    weight = torch.empty(layer.weight_bytes, dtype=torch.uint8, device="cpu")
    padded_scale = torch.zeros(layer.packed_rows, dtype=torch.float32, device="cpu")
    row_sum = torch.zeros(layer.packed_rows, dtype=torch.int32, device="cpu")
    output = 0
    for index, ((codebook, rows, offset, packed), segment) in enumerate(
        zip(layer.segments, codes, strict=True)
    ):
        segment = view_codes(index, segment, codebook, rows, layer.in_features, "cpu")
        bad = _C.pack_segment(
            codebook,
            segment.data_ptr(),
            rows,
            layer.in_features,
            weight.data_ptr() + offset,
            row_sum.data_ptr() + 4 * packed,
        )
        if bad >= 0:
            raise PVQError(
                f"codes[{index}], row {bad}: a {codebook_name(codebook)} code is out of range: "
                "copy the checkpoint again."
            )
        padded_scale[packed : packed + rows] = scales[output : output + rows]
        output += rows
    return PackedLinear(weight, padded_scale, row_sum)


LIB = torch.library.Library("pvq", "FRAGMENT")  # module global: the operators live as long as it does
LIB.define(
    "linear(Tensor x, Tensor weight, Tensor row_scale, Tensor row_sum, Tensor? bias, int out_features, str plan) -> Tensor"
)


def _linear_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    row_scale: torch.Tensor,
    row_sum: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    plan: str,
) -> torch.Tensor:
    layer = _plan(plan)
    dtype = check_call(x, out_features, layer)
    if (
        weight.numel() != layer.weight_bytes
        or row_scale.numel() != layer.packed_rows
        or row_sum.numel() != layer.packed_rows
    ):
        raise PVQError(
            "weight, row_scale or row_sum does not belong to this plan; pack them with pack_linear."
        )
    if weight.dtype != torch.uint8 or row_scale.dtype != torch.float32 or row_sum.dtype != torch.int32:
        raise PVQError(
            "weight, row_scale and row_sum must be uint8, float32 and int32;"
            f" got {weight.dtype}, {row_scale.dtype}, {row_sum.dtype}."
        )
    x = x.contiguous()
    bias_address = 0
    if bias is not None:
        require("bias", bias, x.dtype, (out_features,))
        bias_address = bias.data_ptr()
    y = x.new_empty((*x.shape[:-1], out_features))
    _C.linear(
        layer,
        x.data_ptr(),
        dtype,
        x.numel() // layer.in_features,
        weight.data_ptr(),
        row_scale.data_ptr(),
        row_sum.data_ptr(),
        bias_address,
        y.data_ptr(),
    )
    return y


def _linear_fake(x, weight, row_scale, row_sum, bias, out_features, plan):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features))


LIB.impl("linear", _linear_cpu, "CPU")
LIB.impl("linear", cuda_ops.linear, "CUDA")
torch.library.register_fake("pvq::linear", _linear_fake, lib=LIB)


def linear(
    x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None, out_features: int, plan: str
) -> torch.Tensor:
    """Multiply activations by a packed PVQ weight; equals ``codec.reference.linear`` bit for bit.

    Args:
        x: [..., in_features], float32, float16 or bfloat16.
        packed, plan: from pack_linear and make_plan.
        bias: [out_features] in the dtype of x, or None.
    Returns:
        A new tensor [..., out_features], dtype of x.
    """
    return torch.ops.pvq.linear(x, packed.weight, packed.row_scale, packed.row_sum, bias, out_features, plan)


def quantize_activations(x: torch.Tensor, plan: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The first half of `linear` alone: planes int8 [1 or 2, num_tokens, in_features], token_scale float32 [num_tokens]."""
    layer = _plan(plan)
    dtype = activation_dtype(x)
    require("x", x, x.dtype, (None, layer.in_features), x.device)
    if x.is_cuda:
        return cuda_ops.quantize_activations(x, plan)
    require("x", x, x.dtype, (None, layer.in_features))
    planes = torch.empty((layer.num_planes, x.shape[0], layer.in_features), dtype=torch.int8, device="cpu")
    scale = torch.empty(x.shape[0], dtype=torch.float32, device="cpu")
    _C.quantize_activations(layer, x.data_ptr(), dtype, x.shape[0], planes.data_ptr(), scale.data_ptr())
    return planes, scale
