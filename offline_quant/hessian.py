# SPDX-License-Identifier: Apache-2.0
"""The Hessian of a layer's squared output error, H = X^T X / N, and the factor of its inverse that error
feedback needs.

With the weight error dW the output error is tr(dW H dW^T). Quantizing the columns from left to right, the
best correction of the columns still to come is read off U, the upper Cholesky factor of H^-1 = U^T U (GPTQ,
Frantar et al. 2023; docs/quantizer.md).
"""

from dataclasses import dataclass

import torch

from pvq_vllm.codec.errors import PVQError

from .rotation import rotate_rows

DAMPING = 0.01  # of the mean of the diagonal: GPTQ's value
MAX_TRIES = 6  # each with ten times the damping: 0.01 ... 1000


class HessianSum:
    """Accumulates X^T X over batches in float32, on the device of the activations."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.num_tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Add the activations ``x``, [..., in_features], any float dtype."""
        x = x.reshape(-1, x.shape[-1])
        if x.is_cuda and x.dtype != torch.float32:
            # On tensor cores, ten times as fast; products of two 16-bit floats are exact in float32.
            self.total += torch.mm(x.T, x, out_dtype=torch.float32)
        else:
            x = x.float()
            self.total.addmm_(x.T, x)
        self.num_tokens += x.shape[0]

    def mean(self) -> torch.Tensor:
        """Return H = X^T X / N, float32 [in_features, in_features]."""
        return self.total / max(1, self.num_tokens)


@dataclass(frozen=True)
class RotatedHessian:
    """What error feedback needs of one input, shared by all linears that read it: R H R^T and the factor U of
    its inverse.
    """

    hessian: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor, rotation) -> "RotatedHessian":
        """Prepare H, float32 [in_features, in_features], for weights that ``rotation`` rotates (None: not
        rotated).
        """
        rotated = rotate_hessian(hessian, rotation)
        return cls(rotated, inverse_factor(rotated))


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
    if not hessian.isfinite().all():
        raise PVQError(
            "the activations of the calibration text overflow: use another text or another activation dtype"
        )
    width = hessian.shape[0]
    work = hessian.to(torch.float64 if width <= 8192 else torch.float32, copy=True)
    diagonal = work.diagonal()
    mean = diagonal.mean()
    if mean <= 0:
        return torch.eye(width, device=hessian.device)
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
    identity = torch.eye(width, dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True).float()
