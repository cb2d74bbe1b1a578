# SPDX-License-Identifier: Apache-2.0
"""Codes of a rotated weight that make tr(dW H dW^T) small: error feedback first, then coordinate descent.

Error feedback (GPTQ with groups, LLVQ's algorithm 1) codes groups Q of eight columns from left to right:

    W_hat[:, Q] = quantize(W[:, Q]);   E = (W[:, Q] - W_hat[:, Q]) U_QQ^-1;   W[:, R] -= E U_QR

with H^-1 = U^T U. What a choice for Q costs, when the columns after it are free to answer, is |E|^2, so the
codeword is chosen in the metric U_QQ^-1 U_QQ^-T (csrc/metric_search.h) and not in the Euclidean one.

Feedback never comes back to a group. A pass of coordinate descent does: each group is chosen again given the
errors of all other groups, in the metric H_QQ, which can only lower tr(dW H dW^T). Passes alternate with a fit
of the row scales, s = (q H w) / (q H q).
"""

import torch

from pvq_vllm import quantizer_ops

from .hessian import RotatedHessian

BLOCK = 128  # columns; inside, the compiled module goes on group by group, and the rest is a matrix product
DESCENT_PASSES = 2  # docs/quantizer.md has what each gains


def feedback(
    weight: torch.Tensor, hessian: RotatedHessian, codebook_name: str, row_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rotated rows from left to right with error feedback.

    Args:
        weight: [m, n] float32, rotated; not modified.
        row_scale: [m] float32, positive.
    Returns:
        (codes uint8 [m, n / 8, B], q int8 [m, n]).
    """
    factor = hessian.factor
    work = weight.clone()
    codes, q = [], []
    for start, stop in _blocks(weight.shape[1]):
        block_codes, block_q, error = quantizer_ops.feedback_block(
            work[:, start:stop].contiguous(),
            factor[start:stop, start:stop].contiguous(),
            hessian.feedback_metrics[start // 8 : stop // 8],
            codebook_name,
            row_scale,
        )
        codes.append(block_codes)
        q.append(block_q)
        if stop < weight.shape[1]:
            work[:, stop:] -= error @ factor[start:stop, stop:]
    return torch.cat(codes, dim=1), torch.cat(q, dim=1)


def descend(
    weight: torch.Tensor,
    codes: torch.Tensor,
    q: torch.Tensor,
    hessian: RotatedHessian,
    codebook_name: str,
    h: int,
    row_scale: torch.Tensor,
) -> None:
    """Make one pass of coordinate descent over the groups, from left to right, in place.

    Args:
        weight: [m, n] float32, rotated; not modified.
        codes, q: uint8 [m, n / 8, B] and int8 [m, n], as from ``feedback``; changed.
        h: of the codebook, (q + h/2) * row_scale being the weight.
    """
    error = weight - (q.float() + h / 2) * row_scale[:, None]
    for start, stop in _blocks(weight.shape[1]):
        columns, groups = slice(start, stop), slice(start // 8, stop // 8)
        square = hessian.hessian[columns, columns].clone()
        square.diagonal().add_(hessian.damping)
        block_codes, block_q = codes[:, groups].contiguous(), q[:, columns].contiguous()
        quantizer_ops.descend_block(
            weight[:, columns].contiguous(),
            block_codes,
            block_q,
            torch.addmm(error[:, columns], error, hessian.hessian[:, columns], beta=hessian.damping),
            square,
            hessian.descent_metrics[groups],
            codebook_name,
            row_scale,
        )
        codes[:, groups], q[:, columns] = block_codes, block_q
        error[:, columns] = weight[:, columns] - (block_q.float() + h / 2) * row_scale[:, None]


def _blocks(width: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, width)) for start in range(0, width, BLOCK)]


def fit_scale(
    weight: torch.Tensor, levels: torch.Tensor, hessian: torch.Tensor | None, fallback: torch.Tensor
) -> torch.Tensor:
    """Return argmin over s of |w - s * levels|, in the metric of H if there is one, per row, on the float16
    grid.
    """
    weighted = levels if hessian is None else levels @ hessian
    norm = (weighted * levels).sum(dim=1)
    fitted = ((weighted * weight).sum(dim=1) / norm).to(torch.float16).float()
    return torch.where((norm > 0) & fitted.isfinite() & (fitted > 0), fitted, fallback)
