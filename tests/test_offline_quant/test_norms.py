# SPDX-License-Identifier: Apache-2.0
"""Norms that are computed in one pass, against those of the models."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from offline_quant import norms
from offline_quant.norms import fast_norms


class WithoutEps(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x / x.square().mean(-1, keepdim=True).sqrt())


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(norms, "CACHED", 300)


def trained(norm: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    gain = torch.rand(norm.weight.shape, generator=generator) - 0.5
    norm.weight = nn.Parameter(gain.to(norm.weight.dtype), requires_grad=False)
    return norm


@pytest.mark.parametrize("make", [LlamaRMSNorm, GemmaRMSNorm])
@pytest.mark.parametrize("scale", [1e-3, 1, 100])  # at the first, eps is as large as the mean square
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_are_those_of_the_model(make, scale, dtype):
    norm = trained(make(48, eps=1e-6)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    x, weights = (torch.randn(2, 5, 3, 48, generator=generator) for _ in range(2))
    x = (x * scale).to(dtype).transpose(1, 2).requires_grad_()  # not contiguous
    weights = weights.transpose(1, 2).to(dtype)
    results = []
    exact = x.detach().double().requires_grad_()
    gain = norm.weight.double() + (1 if make is GemmaRMSNorm else 0)
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
    expected.backward(weights.double())
    for value in (norm(x), None):
        if value is None:
            with fast_norms(norm):
                assert "forward" in vars(norm)
                value = norm(x)
        x.grad = None
        value.backward(weights)
        assert value.shape == x.shape and value.dtype == x.grad.dtype == dtype
        errors = (value.double() - expected).norm() / expected.norm()
        slopes = (x.grad.double() - exact.grad).norm() / exact.grad.norm()
        results.append((errors.item(), slopes.item()))
    assert "forward" not in vars(norm)
    # Never less exact than the model, but for the last digits of float32.
    for fast, own in zip(results[1], results[0], strict=True):
        assert fast < own + 1e-6


@pytest.mark.parametrize("norm", [nn.LayerNorm(48, bias=False), nn.Linear(48, 48), WithoutEps(48, eps=0.1)])
def test_what_computes_something_else_stays(norm):
    with fast_norms(trained(norm)):
        assert "forward" not in vars(norm)


def test_a_gate_is_not_left_out():
    class Gated(LlamaRMSNorm):
        def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x if gate is None else x * gate)

    norm, x = trained(Gated(48)), torch.randn(4, 48, generator=torch.Generator().manual_seed(1))
    expected = norm(x, gate=x)
    with fast_norms(norm):
        assert torch.equal(norm(x, gate=x), expected) and torch.equal(norm(x, x), expected)
