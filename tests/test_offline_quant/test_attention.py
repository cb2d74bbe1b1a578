# SPDX-License-Identifier: Apache-2.0
"""Attention in blocks of queries against torch's, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from offline_quant import attention
from offline_quant.attention import FastAttention


def inputs(heads: int, key_heads: int, length: int, width: int, value_width: int) -> list[torch.Tensor]:
    """Return query, key and value as a model has them, and a gradient of the result; bfloat16."""
    generator = torch.Generator().manual_seed(heads * length)
    shapes = (heads, width), (key_heads, width), (key_heads, value_width), (heads, value_width)
    return [
        (2 * torch.randn(2, length, *shape, generator=generator)).bfloat16().transpose(1, 2)
        for shape in shapes
    ]


def attend(tensors: list[torch.Tensor], dtype: torch.dtype, scale: float | None) -> list[torch.Tensor]:
    """Return the result and the gradients for query, key and value."""
    *leaves, given = (tensor.detach().to(dtype) for tensor in tensors)
    for leaf in leaves:
        leaf.requires_grad_()
    result = F.scaled_dot_product_attention(*leaves, is_causal=True, scale=scale, enable_gqa=True)
    return [result.detach(), *torch.autograd.grad(result, leaves, given)]


@pytest.mark.parametrize(
    ("heads", "key_heads", "length", "width", "value_width", "scale"),
    [
        (4, 4, 1, 64, 64, None),
        (4, 4, 100, 64, 64, None),
        (6, 2, 128, 40, 40, 0.3),
        (9, 3, 300, 64, 32, None),
        (4, 1, 1100, 32, 32, None),
    ],
)
def test_blocks_are_as_exact_as_torch(heads, key_heads, length, width, value_width, scale, monkeypatch):
    monkeypatch.setattr(attention, "SCORES", 1 << 18)  # so that heads are cut too
    tensors = inputs(heads, key_heads, length, width, value_width)
    exact = attend(tensors, torch.float64, scale)
    theirs = attend(tensors, torch.bfloat16, scale)
    with FastAttention():
        ours = attend(tensors, torch.bfloat16, scale)
        again = attend(tensors, torch.bfloat16, scale)
    for name, a, b, c, d in zip(("result", "query", "key", "value"), exact, theirs, ours, again, strict=True):
        assert c.dtype == torch.bfloat16
        assert torch.equal(c, d)
        error = (b.double() - a).norm()
        if length == 1:  # whoever sees one key has no gradient of query and key but rounding
            error += 2**-9 * tensors[3].double().norm()
        if width != value_width:  # torch computes this in float32
            error += 2**-8 * a.norm()
        assert (c.double() - a).norm() <= 2 * error, name


@pytest.mark.parametrize("case", ["mask", "not causal", "float32", "more keys"])
def test_other_attention_stays_as_it_is(case, monkeypatch):
    def refuse(*_args) -> None:
        raise AssertionError(case)

    monkeypatch.setattr(attention.CausalAttention, "forward", refuse)
    query, key, value, _ = inputs(4, 4, 24, 16, 16)
    given = {"is_causal": case != "not causal"}
    if case == "mask":
        given = {"attn_mask": torch.rand(24, 24) < 0.9}
    elif case == "float32":
        query, key, value = query.float(), key.float(), value.float()
    elif case == "more keys":
        query = query[:, :, :20]
    expected = F.scaled_dot_product_attention(query, key, value, **given)
    with FastAttention():
        assert torch.equal(F.scaled_dot_product_attention(query, key, value, **given), expected)
