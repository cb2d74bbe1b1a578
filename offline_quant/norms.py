# SPDX-License-Identifier: Apache-2.0
"""What a norm of a model computes, found by running it: class names tell too little. And a faster way to compute it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

CACHED = 1 << 18  # float32 values that a core's cache holds


def norm_offset(norm: nn.Module) -> float | None:
    """Return c if ``norm`` computes x / rms(x) * (weight + c), None if it computes something else.

    c is 0 for most models and 1 for Gemma's. The parameters of ``norm`` may be on the meta device.
    """
    norm = copy.deepcopy(norm)
    if not _has_only_a_gain(norm):
        return None
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(norm.weight.shape, generator=generator)
    norm.weight = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(4, len(weight), generator=generator)
    plain = x / x.square().mean(-1, keepdim=True).sqrt()
    with torch.inference_mode():
        result = norm(x)
    matches = [c for c in (0.0, 1.0) if torch.allclose(result, plain * (weight + c), 1e-3, 1e-3)]
    return matches[0] if matches else None


@contextmanager
def fast_norms(module: nn.Module) -> Iterator[None]:
    """Let the norms in ``module`` that compute x / sqrt(mean(x^2) + eps) * (weight + c) do so in one pass over a CPU's
    memory, instead of one for each operation of theirs. All others stay as they are.
    """
    replaced = []
    for norm in module.modules():
        offset = norm_offset(norm) if _has_only_a_gain(norm) else None
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if offset is not None and isinstance(eps, float) and _adds_eps(norm, offset, eps):
            norm.forward = partial(_forward, norm, offset, eps)  # on the instance, as long as this lasts
            replaced.append(norm)
    try:
        yield
    finally:
        for norm in replaced:
            del norm.forward


def _has_only_a_gain(module: nn.Module) -> bool:
    return [name for name, _ in module.named_parameters()] == ["weight"] and module.weight.dim() == 1


def _adds_eps(norm: nn.Module, offset: float, eps: float) -> bool:
    """True if ``norm`` agrees with ``RMSNorm`` where eps counts."""
    norm = copy.deepcopy(norm)
    width = len(norm.weight)
    norm.weight = nn.Parameter(torch.ones(width), requires_grad=False)
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0)) * eps**0.5
    with torch.no_grad():
        return torch.allclose(norm(x), RMSNorm.apply(x, norm.weight + offset, eps), 1e-3, 1e-3)


def _forward(norm: nn.Module, offset: float, eps: float, *args, **kwargs) -> torch.Tensor:
    if len(args) != 1 or kwargs:  # a gate, or whatever else it has been told
        return type(norm).forward(norm, *args, **kwargs)
    return RMSNorm.apply(args[0], norm.weight.float() + offset, eps)


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * gain, over the last dimension; ``gain`` is float32 and gets no gradient. Computed in
    float32, a few rows at a time, and rounded once.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        result, factors = torch.empty_like(rows), torch.empty(len(rows), 1)
        for part, factor, out in row_parts(rows, factors, result):
            wide = part.to(torch.float32, copy=True)
            norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
            factor.copy_((norm.square_() / wide.shape[1] + eps).rsqrt_())
            wide *= factor
            wide *= gain
            out.copy_(wide)
        ctx.save_for_backward(x, gain, factors)
        return result.view_as(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, gain, factors = ctx.saved_tensors
        rows, gradients = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, gradient))
        result = torch.empty_like(rows)
        for part, given, factor, out in row_parts(rows, gradients, factors, result):
            unit = part.to(torch.float32, copy=True)
            unit *= factor
            wide = given * gain
            unit *= (wide * unit).mean(dim=1, keepdim=True)
            wide -= unit
            wide *= factor
            out.copy_(wide)
        return result.view_as(x), None, None


def row_parts(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Cut tensors of as many rows each, [..., width], into those that the caches of a CPU's cores hold; the first one tells
    how. A GPU takes all at once. Parts of what is contiguous are views.
    """
    flat = [tensor.flatten(0, -2) for tensor in tensors]
    first = flat[0]
    rows = len(first) if first.is_cuda else max(1, CACHED * torch.get_num_threads() // first.shape[1])
    return zip(*(tensor.split(rows) for tensor in flat), strict=True)
