# SPDX-License-Identifier: Apache-2.0
"""Causal attention on a CPU, forward and backward, a block of queries at a time:

    P = softmax(scale Q K^T)    O = P V
    dP = dO V^T    dS = P (dP - sum(P dP))    dQ = scale dS K    dK = scale dS^T Q    dV = P^T dO

with the keys up to the block's last query only, and P computed again on the way back. As products of matrices these run at
the full speed of a processor that multiplies bfloat16, about twice that of torch's kernel, which goes by small tiles.
Scores and their softmax are float32, as there.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from pvq_vllm import quantizer_ops

from .device import short_products

QUERIES = 128  # of a block
SCORES = 5 << 18  # at a time, float32: of as many heads as leave them in the cache


class FastAttention(TorchFunctionMode):
    """While this is entered, torch's attention is ``CausalAttention`` wherever that computes the same."""

    def __torch_function__(self, function: Callable, types, args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return function(*args, **kwargs)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Compute what torch's function of these arguments does."""
    is_plain = (
        is_causal
        and attn_mask is None
        and dropout_p == 0
        and query.dim() == key.dim() == value.dim() == 4
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and query.shape[2] == key.shape[2] == value.shape[2] > 0
        and query.shape[0] == key.shape[0] == value.shape[0]
        and (key.shape[1] == query.shape[1] or (enable_gqa and query.shape[1] % key.shape[1] == 0))
        and key.shape[1] == value.shape[1]
    )
    if not is_plain:
        given = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **given)
    return CausalAttention.apply(query, key, value, query.shape[3] ** -0.5 if scale is None else scale)


class CausalAttention(torch.autograd.Function):
    """Attention of each position to itself and those before it.

    Args:
        query: bfloat16 [batch, heads, length, width]; key: [batch, key heads, length, width]; value: [batch, key heads,
            length, any]. Consecutive heads share a key head.
    """

    @staticmethod
    def forward(
        ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        q, k, v = _by_key_head(query, key, value)
        result = q.new_empty(*q.shape[:3], v.shape[2])
        for heads, rows, keys in _blocks(q):
            p = _probabilities(q[heads, :, rows], k[heads, keys], scale)
            result[heads, :, rows] = torch.bmm(p, v[heads, keys]).unflatten(1, (q.shape[1], -1))
        return result.view(*query.shape[:3], -1)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        query, key, value = ctx.saved_tensors
        q, k, v = _by_key_head(query, key, value)
        given = gradient.reshape(*q.shape[:3], -1)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (k, v))
        for heads, rows, keys in _blocks(q):
            asked, wanted = (tensor[heads, :, rows].flatten(1, 2) for tensor in (q, given))
            p = _probabilities(q[heads, :, rows], k[heads, keys], ctx.scale)
            dv[heads, keys] += torch.bmm(p.mT, wanted)
            dp = torch.bmm(wanted, v[heads, keys].mT)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dk[heads, keys] += torch.bmm(ds.mT, asked)
            dq[heads, :, rows] = torch.bmm(ds, k[heads, keys]).unflatten(1, (q.shape[1], -1)) * ctx.scale
        dk *= ctx.scale
        return dq.view_as(query), dk.to(k.dtype).view_as(key), dv.to(v.dtype).view_as(value), None


def _by_key_head(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the queries as [batch x key heads, heads that share them, length, width], keys and values as [batch x key
    heads, length, ...].
    """
    group = query.shape[1] // key.shape[1]
    return query.reshape(-1, group, *query.shape[2:]), key.flatten(0, 1), value.flatten(0, 1)


def _blocks(q: torch.Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Yield which key heads, which queries of theirs and which keys are computed together."""
    count, group, length, _ = q.shape
    heads = max(1, SCORES // (group * QUERIES * length))
    for head in range(0, count, heads):
        for start in range(0, length, QUERIES):
            stop = min(start + QUERIES, length)
            yield slice(head, head + heads), slice(start, stop), slice(stop)


def _probabilities(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Return softmax(scale q k^T), bfloat16 [n, group x rows, keys], for the last queries of these keys.

    Args:
        q: [n, group, rows, width]; k: [n, keys, width].
    """
    rows, keys = q.shape[2], k.shape[1]
    scores = torch.empty(len(q), q.shape[1] * rows, keys)
    with short_products(True):  # of bfloat16, hence exact: what comes out is float32
        torch.baddbmm(scores, q.flatten(1, 2).float(), k.float().mT, beta=0, alpha=scale, out=scores)
    return quantizer_ops.causal_softmax(scores, rows)
