# SPDX-License-Identifier: Apache-2.0
"""The kernels as torch operators. All knowledge of tensors is here: the compiled module ``_C`` takes addresses.

``torch.ops.pvq.linear`` is the one operator that a model runs; it has a fake implementation, so torch.compile sees one opaque
node, and chooses its kernel by the number of tokens below Python.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from pvq_vllm import _C
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.serving import GROUP_SIZE, INT8_ID, SERVING, codebook_id

LANES = 16  # rows of a packed block (csrc/cpu/kernels.h)
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ACTIVATIONS = {"a8": 1, "a16": 2}  # planes of int8


def cpu_isa() -> str:
    """Instruction set in use: portable, avx2, avx512 or amx; PVQ_CPU_ISA caps it."""
    return _C.cpu_isa()


def _require(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]
) -> torch.Tensor:
    """Check one argument; None in `shape` is any size. Returns the tensor."""
    wanted = f"{dtype} [{', '.join('any' if s is None else str(s) for s in shape)}]"
    fits = tensor.dim() == len(shape) and all(
        w in (None, s) for w, s in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        raise PVQError(f"{name} must be {wanted}; got {tensor.dtype} {list(tensor.shape)}.")
    if tensor.device.type != "cpu":
        raise PVQError(f"{name} is on {tensor.device}; this build of pvq_vllm has kernels for the CPU only.")
    if not tensor.is_contiguous():
        raise PVQError(f"{name} must be contiguous.")
    return tensor


def _activation_dtype(x: torch.Tensor) -> int:
    """The compiled module's number of the dtype of activations."""
    if x.dtype not in _DTYPES:
        raise PVQError(f"x has dtype {x.dtype}; use float32, float16 or bfloat16.")
    return _DTYPES[x.dtype]


def _code_bytes(name: str) -> int:
    return GROUP_SIZE if name == "int8" else SERVING[name].bytes_per_group


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
        activation: a8 or a16.
    Raises:
        PVQError: an argument out of range.
    """
    if activation not in _ACTIVATIONS:
        raise PVQError(f"activation is {activation!r}; use a8 or a16.")
    parts = ",".join(f"{codebook_id(name)}:{rows}" for name, rows in segments)
    orders = "x".join(str(f) for f in factors or [])
    plan = (
        f"{in_features};{parts};{_ACTIVATIONS[activation]};{seed};{first_column};{rotation_blocks};{orders}"
    )
    _plan(plan)
    return plan


@cache
def _plan(text: str) -> _C.LinearPlan:
    in_features, parts, planes, seed, first_column, blocks, orders = text.split(";")
    segments = [(int(c), int(r)) for c, r in (p.split(":") for p in parts.split(","))]
    factors = [int(f) for f in orders.split("x")] if orders else []
    try:
        return _C.LinearPlan(
            int(in_features), segments, int(planes), int(seed), int(first_column), int(blocks), factors
        )
    except ValueError as error:
        raise PVQError(str(error)) from None


class PackedLinear(NamedTuple):
    """Tensors of a layer in the order the kernels read.

    Attributes:
        weight: uint8 [bytes].
        row_scale: float32 [packed rows], each segment padded to a multiple of 16 with zeros.
        row_sum: int32 [packed rows], sum of q.
    """

    weight: torch.Tensor
    row_scale: torch.Tensor
    row_sum: torch.Tensor


def pack_linear(codes: list[torch.Tensor], row_scale: torch.Tensor, plan: str) -> PackedLinear:
    """Repack the codes of a checkpoint once, at load.

    Args:
        codes: one tensor per segment of the plan, uint8 [rows, in_features / 8, B] (int8 codebook: B = 8; an int8 tensor
            [rows, in_features] is taken as well).
        row_scale: float16 or float32 [out_features].
        plan: from make_plan.
    Raises:
        PVQError: a wrong shape or dtype, a code or scale out of range; names segment and row.
    """
    layer = _plan(plan)
    if len(codes) != len(layer.segments):
        raise PVQError(f"codes has {len(codes)} segments; the plan has {len(layer.segments)}.")
    if row_scale.shape != (layer.out_features,):
        raise PVQError(f"row_scale must have shape [{layer.out_features}]; got {list(row_scale.shape)}.")
    scales = row_scale.float()
    if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
        raise PVQError("row_scale has a value that is negative or not finite: copy the checkpoint again.")
    weight = torch.empty(layer.weight_bytes, dtype=torch.uint8)
    padded_scale = torch.zeros(layer.packed_rows, dtype=torch.float32)
    row_sum = torch.zeros(layer.packed_rows, dtype=torch.int32)
    output = 0
    for index, ((codebook, rows, offset, packed), segment) in enumerate(
        zip(layer.segments, codes, strict=True)
    ):
        name = _codebook_name(codebook)
        if segment.dtype == torch.int8 and name == "int8" and segment.dim() == 2:
            segment = segment.contiguous().view(torch.uint8).view(rows, -1, GROUP_SIZE)
        groups = layer.in_features // GROUP_SIZE
        _require(f"codes[{index}]", segment, torch.uint8, (rows, groups, _code_bytes(name)))
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
                f"codes[{index}], row {bad}: a {name} code is out of range: copy the checkpoint again."
            )
        padded_scale[packed : packed + rows] = scales[output : output + rows]
        output += rows
    return PackedLinear(weight, padded_scale, row_sum)


def _codebook_name(identity: int) -> str:
    return "int8" if identity == INT8_ID else next(c.name for c in SERVING.values() if c.id == identity)


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
    dtype = _activation_dtype(x)
    if x.shape[-1] != layer.in_features:
        raise PVQError(f"x has {x.shape[-1]} columns; the layer has in_features {layer.in_features}.")
    if out_features != layer.out_features:
        raise PVQError(f"out_features is {out_features}; the plan has {layer.out_features}.")
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
        _require("bias", bias, x.dtype, (out_features,))
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
    dtype = _activation_dtype(x)
    _require("x", x, x.dtype, (None, layer.in_features))
    planes = torch.empty((layer.num_planes, x.shape[0], layer.in_features), dtype=torch.int8)
    scale = torch.empty(x.shape[0], dtype=torch.float32)
    _C.quantize_activations(layer, x.data_ptr(), dtype, x.shape[0], planes.data_ptr(), scale.data_ptr())
    return planes, scale


# ---- codes ----------------------------------------------------------------------------------------------------------------


def decode_codes(codes: torch.Tensor, codebook: str) -> torch.Tensor:
    """q of every weight, int8 [rows, in_features], from codes uint8 [rows, in_features / 8, B].

    Raises:
        PVQError: a code out of range; names the row.
    """
    _require("codes", codes, torch.uint8, (None, None, _code_bytes(codebook)))
    rows, groups, _ = codes.shape
    q = torch.empty((rows, groups * GROUP_SIZE), dtype=torch.int8)
    bad = _C.decode_codes(codebook_id(codebook), codes.data_ptr(), rows, groups * GROUP_SIZE, q.data_ptr())
    if bad >= 0:
        raise PVQError(f"row {bad} has a {codebook} code that is out of range: copy the checkpoint again.")
    return q


def _check_weight(weight: torch.Tensor, row_scale: torch.Tensor) -> tuple[int, int]:
    _require("weight", weight, torch.float32, (None, None))
    rows, columns = weight.shape
    _require("row_scale", row_scale, torch.float32, (rows,))
    if columns % GROUP_SIZE:
        raise PVQError(f"weight has {columns} columns; they must be a multiple of {GROUP_SIZE}.")
    return rows, columns


def _new_codes(rows: int, columns: int, codebook: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised codes and q for the encoder to fill."""
    codes = torch.empty((rows, columns // GROUP_SIZE, _code_bytes(codebook)), dtype=torch.uint8)
    return codes, torch.empty((rows, columns), dtype=torch.int8)


def quantize_rows(
    weight: torch.Tensor, codebook: str, row_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest codeword of every group of eight, over all shapes and gains (csrc/cpu/encode.h).

    Args:
        weight: float32 [rows, columns], rotated, finite.
        codebook: pvq2, pvq3, pvq4 or int8.
        row_scale: float32 [rows].
    Returns:
        codes uint8 [rows, columns / 8, B] and q int8 [rows, columns].
    """
    rows, columns = _check_weight(weight, row_scale)
    codes, q = _new_codes(rows, columns, codebook)
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
    weight: torch.Tensor, factor: torch.Tensor, codebook: str, row_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Code a block of columns, group by group, each group's error fed back into the columns after it.

    Args:
        weight: float32 [rows, block], rotated and already corrected for the columns before the block; not modified.
        factor: float32 [block, block], U_BB of the upper Cholesky factor of the inverse Hessian.
        codebook, row_scale: as in quantize_rows.
    Returns:
        codes, q and error float32 [rows, block]; the caller subtracts ``error @ U[block, rest]`` from the rest.
    """
    rows, columns = _check_weight(weight, row_scale)
    _require("factor", factor, torch.float32, (columns, columns))
    codes, q = _new_codes(rows, columns, codebook)
    error = torch.empty_like(weight)
    _C.encode_rows_with_feedback(
        weight.data_ptr(),
        row_scale.data_ptr(),
        rows,
        columns,
        codebook_id(codebook),
        codes.data_ptr(),
        q.data_ptr(),
        factor.data_ptr(),
        error.data_ptr(),
    )
    return codes, q, error


SCALE_TRIALS = (0.90, 0.94, 0.97, 1.03, 1.06, 1.10)


def search_row_scale(weight: torch.Tensor, codebook: str, sample_groups: int = 64) -> torch.Tensor:
    """Row scales on the float16 grid: from the row's root mean square, then the best of a few factors around it.

    Args:
        weight: float32 [rows, columns], rotated.
        sample_groups: groups of a row that the trials are scored on, evenly spaced.
    Returns:
        float32 [rows], each a float16 value; 0 for a row of zeros.
    """
    rows, columns = _check_weight(weight, torch.empty(weight.shape[0]))
    if codebook == "int8":
        return _to_half_grid(weight.abs().amax(dim=1) / 127)
    base = weight.square().mean(dim=1).sqrt() / SERVING[codebook].target_rms
    groups = columns // GROUP_SIZE
    stride = max(1, groups // sample_groups)
    best = _to_half_grid(base)
    best_error = torch.empty(rows)
    identity = codebook_id(codebook)
    _C.encoding_error(
        identity, weight.data_ptr(), best.data_ptr(), rows, columns, stride, best_error.data_ptr()
    )
    for trial in SCALE_TRIALS:
        scale = _to_half_grid(base * trial)
        error = torch.empty(rows)
        _C.encoding_error(
            identity, weight.data_ptr(), scale.data_ptr(), rows, columns, stride, error.data_ptr()
        )
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def _to_half_grid(scale: torch.Tensor) -> torch.Tensor:
    smallest, largest = 2.0**-24, 65504.0
    return torch.where(scale > 0, scale.clamp(smallest, largest), scale).to(torch.float16).float()
