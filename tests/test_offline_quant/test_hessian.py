# SPDX-License-Identifier: Apache-2.0
"""The sums that error feedback works with are second derivatives of the error that is to be small."""

import pytest
import torch

from offline_quant import hessian
from offline_quant.hessian import HessianSum

TOKENS, WIDTH = 40, 8


@pytest.mark.parametrize("weighted", [False, True], ids=["all tokens alike", "token weights"])
@pytest.mark.parametrize("block", [256, 4], ids=["one block", "two blocks"])
def test_hessian_against_autograd(monkeypatch, weighted, block):
    """2 H is the Hessian of the mean squared output error with respect to a row of the weight."""
    monkeypatch.setattr(hessian, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    row = torch.randn(WIDTH, generator=generator)
    weights = torch.rand(TOKENS, generator=generator) + 0.1 if weighted else torch.ones(TOKENS)
    weights /= weights.mean()

    def mean_squared_error(changed: torch.Tensor) -> torch.Tensor:
        return (weights * (x @ changed - x @ row).square()).mean()

    total = HessianSum(WIDTH)
    for tokens in torch.arange(TOKENS).split(16):
        total.add(x[tokens], weights[tokens] if weighted else None)
    expected = torch.autograd.functional.hessian(mean_squared_error, torch.zeros(WIDTH))
    torch.testing.assert_close(2 * total.mean(), expected, rtol=1e-4, atol=1e-4)


def test_weighted_sums_of_short_activations_are_close_and_leave_the_settings_alone():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, 300, generator=generator).bfloat16()
    weights = torch.rand(500, generator=generator) + 0.1
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    total = HessianSum(300)
    total.add(x, weights)
    assert settings.fp32_precision == before
    exact = x.double().T @ (weights.double()[:, None] * x.double()) / 500
    # Factors may be rounded to bfloat16: 2^-9 each, at random, so less in a sum of 500.
    assert (total.mean() - exact).norm() < 2**-8 * exact.norm()
    assert torch.equal(total.mean(), total.mean().T)
