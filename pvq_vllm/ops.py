# SPDX-License-Identifier: Apache-2.0
"""The kernels as torch operators. All knowledge of tensors is here: the compiled module ``_C`` takes addresses.

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
    code_bytes,
    codebook_name,
    require,
    view_codes,
)
from pvq_vllm.codec.activation import parse_activation
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.serving import GROUP_SIZE, SERVING, codebook_id

LANES = 16  # rows of a packed block (csrc/cpu/kernels.h)


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


# ---- codes ----------------------------------------------------------------------------------------------------------------


def decode_codes(codes: torch.Tensor, codebook: str) -> torch.Tensor:
    """q of every weight, int8 [rows, in_features], from codes uint8 [rows, in_features / 8, B].

    Raises:
        PVQError: a code out of range; names the row.
    """
    require("codes", codes, torch.uint8, (None, None, code_bytes(codebook)))
    rows, groups, _ = codes.shape
    q = torch.empty((rows, groups * GROUP_SIZE), dtype=torch.int8, device="cpu")
    bad = _C.decode_codes(codebook_id(codebook), codes.data_ptr(), rows, groups * GROUP_SIZE, q.data_ptr())
    if bad >= 0:
        raise PVQError(f"row {bad} has a {codebook} code that is out of range: copy the checkpoint again.")
    return q


def _check_weight(weight: torch.Tensor, row_scale: torch.Tensor) -> tuple[int, int]:
    require("weight", weight, torch.float32, (None, None), _device(weight))
    rows, columns = weight.shape
    require("row_scale", row_scale, torch.float32, (rows,), weight.device)
    if columns % GROUP_SIZE:
        raise PVQError(f"weight has {columns} columns; they must be a multiple of {GROUP_SIZE}.")
    return rows, columns


def _device(tensor: torch.Tensor) -> torch.device | str:
    """Where the arguments of an encoder must be: with `tensor` on a GPU, or else on the CPU."""
    return tensor.device if tensor.is_cuda else "cpu"


def _new_codes(weight: torch.Tensor, codebook: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised codes and q for the encoder to fill."""
    rows, columns = weight.shape
    shape = (rows, columns // GROUP_SIZE, code_bytes(codebook))
    codes = torch.empty(shape, dtype=torch.uint8, device=weight.device)
    return codes, torch.empty((rows, columns), dtype=torch.int8, device=weight.device)


def quantize_rows(
    weight: torch.Tensor, codebook: str, row_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest codeword of every group of eight, over all shapes and gains (csrc/cpu/encode.h).

    Args:
        weight: float32 [rows, columns], rotated, finite; on the CPU or a GPU, as all tensors then are.
        codebook: pvq2, pvq3, pvq4 or int8.
        row_scale: float32 [rows].
    Returns:
        codes uint8 [rows, columns / 8, B] and q int8 [rows, columns].
    """
    rows, columns = _check_weight(weight, row_scale)
    codes, q = _new_codes(weight, codebook)
    if weight.is_cuda:
        cuda_ops.encode_rows(weight, row_scale, codebook_id(codebook), codes, q)
        return codes, q
    _C.encode_rows(
        weight.data_ptr(),
        row_scale.data_ptr(),
        rows,
        columns,
        codebook_id(codebook),
        codes.data_ptr(),
        q.data_ptr(),
    )
    return codes, q


def feedback_block(
    weight: torch.Tensor, factor: torch.Tensor, metrics: torch.Tensor, codebook: str, row_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Code a block of columns, group by group, each group in its own metric (csrc/metric_search.h) and with its error fed
    back into the columns after it.

    Args:
        weight: float32 [rows, block], rotated and already corrected for the columns before the block; not modified.
        factor: float32 [block, block], U_BB of the upper Cholesky factor of the inverse Hessian.
        metrics: float32 [block / 8, 2, 8, 8]: U_QQ of every group Q, and U_QQ^-1 U_QQ^-T.
        codebook, row_scale: as in quantize_rows.
    Returns:
        codes, q and error float32 [rows, block]; the caller subtracts ``error @ U[block, rest]`` from the rest.
    """
    rows, columns = _check_weight(weight, row_scale)
    require("factor", factor, torch.float32, (columns, columns), weight.device)
    _check_metrics(metrics, weight)
    codes, q = _new_codes(weight, codebook)
    error = torch.empty_like(weight)
    if weight.is_cuda:
        identity = codebook_id(codebook)
        cuda_ops.encode_rows_with_feedback(weight, row_scale, identity, codes, q, factor, metrics, error)
        return codes, q, error
    _C.encode_rows_with_feedback(
        weight.data_ptr(),
        row_scale.data_ptr(),
        rows,
        columns,
        codebook_id(codebook),
        codes.data_ptr(),
        q.data_ptr(),
        factor.data_ptr(),
        metrics.data_ptr(),
        error.data_ptr(),
    )
    return codes, q, error


def descend_block(
    weight: torch.Tensor,
    codes: torch.Tensor,
    q: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    metrics: torch.Tensor,
    codebook: str,
    row_scale: torch.Tensor,
) -> None:
    """Choose the codes of a block of columns again, each group given the errors of all others (coordinate descent on
    tr(dW H dW^T)).

    Args:
        weight: float32 [rows, block], rotated.
        codes, q: of the block, as from feedback_block; changed in place.
        gradient: float32 [rows, block], (W - What) H of the block's columns, over whole rows; may be overwritten.
        hessian: float32 [block, block], H_BB.
        metrics: float32 [block / 8, 2, 8, 8]: of every group Q the upper u with H_QQ = u^-1 u^-T, and H_QQ.
        codebook, row_scale: as in quantize_rows.
    """
    rows, columns = _check_weight(weight, row_scale)
    device = weight.device
    require("codes", codes, torch.uint8, (rows, columns // GROUP_SIZE, code_bytes(codebook)), device)
    require("q", q, torch.int8, (rows, columns), device)
    require("gradient", gradient, torch.float32, (rows, columns), device)
    require("hessian", hessian, torch.float32, (columns, columns), device)
    _check_metrics(metrics, weight)
    identity = codebook_id(codebook)
    if weight.is_cuda:
        cuda_ops.descend_rows(weight, row_scale, identity, codes, q, gradient, hessian, metrics)
        return
    _C.descend_rows(
        weight.data_ptr(),
        row_scale.data_ptr(),
        rows,
        columns,
        identity,
        codes.data_ptr(),
        q.data_ptr(),
        gradient.data_ptr(),
        hessian.data_ptr(),
        metrics.data_ptr(),
    )


def _check_metrics(metrics: torch.Tensor, weight: torch.Tensor) -> None:
    shape = (weight.shape[1] // GROUP_SIZE, 2, GROUP_SIZE, GROUP_SIZE)
    require("metrics", metrics, torch.float32, shape, weight.device)


SCALE_TRIALS = (0.90, 0.94, 0.97, 1.03, 1.06, 1.10)


def search_row_scale(weight: torch.Tensor, codebook: str, sample_groups: int = 64) -> torch.Tensor:
    """Row scales on the float16 grid: from the row's root mean square, then the best of a few factors around it.

    Args:
        weight: float32 [rows, columns], rotated.
        sample_groups: groups of a row that the trials are scored on, evenly spaced.
    Returns:
        float32 [rows], each a float16 value; 0 for a row of zeros.
    """
    rows, columns = _check_weight(weight, weight.new_empty(len(weight)))
    if codebook == "int8":
        return _to_half_grid(weight.abs().amax(dim=1) / 127)
    base = weight.square().mean(dim=1).sqrt() / SERVING[codebook].target_rms
    stride = max(1, columns // GROUP_SIZE // sample_groups)

    def error_of(scale: torch.Tensor) -> torch.Tensor:
        error = weight.new_empty(rows)
        if weight.is_cuda:
            cuda_ops.encoding_error(weight, scale, codebook_id(codebook), stride, error)
        else:
            addresses = weight.data_ptr(), scale.data_ptr(), rows, columns, stride, error.data_ptr()
            _C.encoding_error(codebook_id(codebook), *addresses)
        return error

    best = _to_half_grid(base)
    best_error = error_of(best)
    for trial in SCALE_TRIALS:
        scale = _to_half_grid(base * trial)
        error = error_of(scale)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def _to_half_grid(scale: torch.Tensor) -> torch.Tensor:
    smallest, largest = 2.0**-24, 65504.0
    return torch.where(scale > 0, scale.clamp(smallest, largest), scale).to(torch.float16).float()


# ---- attention of the calibration passes ----------------------------------------------------------------------------------


def causal_softmax(scores: torch.Tensor, queries: int) -> torch.Tensor:
    """Softmax of attention scores, of which each query sees the keys up to its own position.

    Args:
        scores: float32 [n, k queries, keys]: of the last ``queries`` of ``keys`` positions, in order, for k heads; overwritten.
    Returns:
        bfloat16, of the same shape; 0 behind a query's position.
    """
    count, rows, keys = require("scores", scores, torch.float32, (None, None, None)).shape
    if queries < 1 or rows % queries or queries > keys:
        raise PVQError(f"scores has {rows} rows and {keys} keys, which do not fit {queries} queries.")
    probabilities = torch.empty_like(scores, dtype=torch.bfloat16)
    _C.causal_softmax(scores.data_ptr(), count * rows, queries, keys, probabilities.data_ptr())
    return probabilities
