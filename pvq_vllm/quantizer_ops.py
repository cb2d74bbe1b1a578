# SPDX-License-Identifier: Apache-2.0
"""The kernels of the quantizer: codes of weights and back, row scales, the softmax of the calibration passes.

As in ops.py tensors are checked here, and the compiled module takes addresses. Of a server only ``--load-format dummy`` calls
these, for the codes of random weights.
"""

from __future__ import annotations

import torch

from pvq_vllm import _C, cuda_ops
from pvq_vllm.arguments import code_bytes, require
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.serving import GROUP_SIZE, SERVING, codebook_id

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


def _addresses(
    weight: torch.Tensor, row_scale: torch.Tensor, codebook: str, codes: torch.Tensor, q: torch.Tensor
) -> tuple[int, ...]:
    """What every encoder of the compiled module takes first."""
    given = weight.data_ptr(), row_scale.data_ptr(), *weight.shape, codebook_id(codebook)
    return *given, codes.data_ptr(), q.data_ptr()


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
    _check_weight(weight, row_scale)
    codes, q = _new_codes(weight, codebook)
    if weight.is_cuda:
        cuda_ops.encode_rows(weight, row_scale, codebook_id(codebook), codes, q)
        return codes, q
    _C.encode_rows(*_addresses(weight, row_scale, codebook, codes, q))
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
    columns = _check_weight(weight, row_scale)[1]
    require("factor", factor, torch.float32, (columns, columns), weight.device)
    _check_metrics(metrics, weight)
    codes, q = _new_codes(weight, codebook)
    error = torch.empty_like(weight)
    if weight.is_cuda:
        identity = codebook_id(codebook)
        cuda_ops.encode_rows_with_feedback(weight, row_scale, identity, codes, q, factor, metrics, error)
        return codes, q, error
    given = _addresses(weight, row_scale, codebook, codes, q)
    _C.encode_rows_with_feedback(*given, factor.data_ptr(), metrics.data_ptr(), error.data_ptr())
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
    if weight.is_cuda:
        identity = codebook_id(codebook)
        cuda_ops.descend_rows(weight, row_scale, identity, codes, q, gradient, hessian, metrics)
        return
    given = _addresses(weight, row_scale, codebook, codes, q)
    _C.descend_rows(*given, gradient.data_ptr(), hessian.data_ptr(), metrics.data_ptr())


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
