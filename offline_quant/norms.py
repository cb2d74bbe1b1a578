# SPDX-License-Identifier: Apache-2.0
"""What a norm of a model computes, found by running it: class names tell too little."""

import copy

import torch
from torch import nn


def norm_offset(norm: nn.Module) -> float | None:
    """Return c if ``norm`` computes x / rms(x) * (weight + c), None if it computes something else.

    c is 0 for most models and 1 for Gemma's. The parameters of ``norm`` may be on the meta device.
    """
    norm = copy.deepcopy(norm)
    if [name for name, _ in norm.named_parameters()] != ["weight"] or norm.weight.dim() != 1:
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
