# SPDX-License-Identifier: Apache-2.0
"""The Hessian of a layer's squared output error, H = X^T diag(w) X / N with a weight w for each token, and the factor
of its inverse that error feedback needs.

With the weight error dW the output error is tr(dW H dW^T). Quantizing the columns from left to right, the
best correction of the columns still to come is read off U, the upper Cholesky factor of H^-1 = U^T U (GPTQ,
Frantar et al. 2023; docs/quantizer.md).
"""

from dataclasses import dataclass

import torch

from pvq_vllm.codec.errors import PVQError

from .device import short_products
from .rotation import rotate_rows

DAMPING = 0.01  # of the mean of the diagonal: GPTQ's value
MAX_TRIES = 6  # each with ten times the damping: 0.01 ... 1000
BLOCK = 256  # columns: of a symmetric product only blocks on and right of the diagonal are computed


class HessianSum:
    """Accumulates X^T diag(w) X over batches in float32, on the device of the activations. In ``total`` blocks left of the
    diagonal stay zero on a CPU; ``mean`` fills them.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.num_tokens = 0

    def add(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add the activations ``x``, [..., in_features], any float dtype.

        Args:
            weights: float32 [tokens], not negative, of mean 1 over all batches; None: 1 for each.
        """
        x = x.reshape(-1, x.shape[-1])
        is_short = x.dtype in (torch.bfloat16, torch.float16)
        if weights is not None:
            wide = x.to(torch.float32, copy=True)
            wide *= weights.to(x.device).sqrt()[:, None]  # in place: new memory costs more than the product
            x = wide.to(x.dtype if x.is_cuda else torch.float32)
        if x.is_cuda and x.dtype != torch.float32:
            # On tensor cores, ten times as fast; products of two 16-bit floats are exact in float32.
            self.total += torch.mm(x.T, x, out_dtype=torch.float32)
        else:
            x = x.float()
            with short_products(is_short and not x.is_cuda):
                for start in range(0, x.shape[1], BLOCK):
                    columns = slice(start, start + BLOCK)
                    self.total[columns, start:].addmm_(x[:, columns].T, x[:, start:])
        self.num_tokens += x.shape[0]

    def mean(self) -> torch.Tensor:
        """Return H = X^T diag(w) X / N, float32 [in_features, in_features]."""
        mean = self.total / max(1, self.num_tokens)
        for stop in range(BLOCK, len(mean), BLOCK):
            columns = slice(stop - BLOCK, stop)
            mean[stop:, columns] = mean[columns, stop:].T
        return mean


@dataclass(frozen=True)
class RotatedHessian:
    """What error feedback needs of one input, shared by all linears that read it.

    ``hessian``: H' = R H R^T, float32 [n, n]. ``damping``: what is added to its diagonal. ``factor``: U,
    float32 [n, n] upper, U^T U = (H' + damping I)^-1. The metrics of every group Q of eight columns, float32
    [n / 8, 2, 8, 8], each as an upper u and M = u^-1 u^-T: ``feedback_metrics`` with u = U_QQ,
    ``descent_metrics`` with M = H'_QQ + damping I.
    """

    hessian: torch.Tensor
    damping: float
    factor: torch.Tensor
    feedback_metrics: torch.Tensor
    descent_metrics: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor, rotation) -> "RotatedHessian":
        """Prepare H, float32 [in_features, in_features], for weights that ``rotation`` rotates (None: not
        rotated).
        """
        rotated = rotate_hessian(hessian, rotation)
        factor, damping = _damped_factor(rotated, DAMPING)
        u = _diagonal_blocks(factor)
        inverse = _inverse_upper(u)
        m = _diagonal_blocks(rotated)
        m.diagonal(dim1=1, dim2=2).add_(damping)
        return cls(
            rotated,
            damping,
            factor,
            torch.stack([u, inverse @ inverse.mT], dim=1).float(),
            torch.stack([_inverse_upper(_reversed_cholesky(m)), m], dim=1).float(),
        )


def _diagonal_blocks(matrix: torch.Tensor) -> torch.Tensor:
    """Return the blocks of eight columns on the diagonal, float64 [n / 8, 8, 8]."""
    blocks = matrix.reshape(matrix.shape[0] // 8, 8, -1, 8).diagonal(dim1=0, dim2=2)
    return blocks.permute(2, 0, 1).to(torch.float64, copy=True)


def _reversed_cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """Return the upper V with V V^T = matrix, [..., n, n]."""
    return torch.linalg.cholesky(matrix.flip(-2, -1)).flip(-2, -1)


def _inverse_upper(upper: torch.Tensor) -> torch.Tensor:
    identity = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device).expand_as(upper)
    return torch.linalg.solve_triangular(upper, identity, upper=True)


def factor_of_block(block: torch.Tensor) -> torch.Tensor:
    """Return the upper U, float32 [D, D], with M = U^-1 U^-T for M, positive definite."""
    return _inverse_upper(_reversed_cholesky(block.double())).float()


def rotate_hessian(hessian: torch.Tensor, rotation) -> torch.Tensor:
    """Return R H R^T, the Hessian of the rotated activations R x; ``hessian`` itself when ``rotation`` is
    None.
    """
    return rotate_rows(rotate_rows(hessian, rotation).T.contiguous(), rotation)


def inverse_factor(hessian: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Return U, float32 upper triangular, with U^T U = (H + damping * mean(diag H) * I)^-1.

    Dead columns (activation always zero) get the mean diagonal, so they are rounded without feedback. When H
    is too singular for the factorization, the damping grows by tens. Works in float64 up to 8192 columns and
    in float32 beyond, for memory.

    Method: reverse rows and columns, factor H = L L^T, reverse L: an upper V with H = V V^T, and U = V^-1.

    Raises:
        PVQError: H is not finite.
    """
    return _damped_factor(hessian, damping)[0]


def _damped_factor(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """Return (U, what was added to the diagonal) of ``inverse_factor``."""
    if not hessian.isfinite().all():
        raise PVQError(
            "the activations of the calibration text overflow: use another text or another activation dtype"
        )
    width = hessian.shape[0]
    work = hessian.to(torch.float64 if width <= 8192 else torch.float32, copy=True)
    diagonal = work.diagonal()
    mean = diagonal.mean()
    if mean <= 0:
        return torch.eye(width, device=hessian.device), 1.0
    diagonal[diagonal == 0] = mean
    mean = diagonal.mean().item()
    reversed_work = work.flip(0, 1)
    added = 0.0
    for attempt in range(MAX_TRIES):
        wanted = damping * 10**attempt * mean
        reversed_work.diagonal().add_(wanted - added)
        added = wanted
        factor, info = torch.linalg.cholesky_ex(reversed_work)
        if info.item() == 0:
            break
    else:
        raise PVQError("the Hessian of the calibration text cannot be factored: use a longer text")
    del reversed_work, work
    upper = factor.flip(0, 1)  # H = upper @ upper.T
    return _inverse_upper(upper).float(), added
