# SPDX-License-Identifier: Apache-2.0
"""Layers that exist on the CPU and on the GPU, and the comparison of what both compute.

What the CPU computes is tested against docs/format.md in tests/test_csrc.
"""

from functools import cache
from typing import NamedTuple

import pytest
import torch

from pvq_vllm import ops, quantizer_ops
from pvq_vllm.codec.rotation import rotation_layout

SEED = 5


@cache
def code_pool(codebook: str) -> torch.Tensor:
    """Codes of 4096 random groups, one a row."""
    weight = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0))
    scale = quantizer_ops.search_row_scale(weight, codebook)
    return quantizer_ops.quantize_rows(weight, codebook, scale)[0].flatten(0, 1)


class Layer(NamedTuple):
    """The same layer twice."""

    plan: str
    rows: int
    columns: int
    q: torch.Tensor
    on_cpu: ops.PackedLinear
    on_gpu: ops.PackedLinear

    def both(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs for `x` on the CPU: of the GPU, copied to the CPU, and of the CPU."""
        bias_on_gpu = None if bias is None else bias.cuda()
        got = ops.linear(x.cuda(), self.on_gpu, bias_on_gpu, self.rows, self.plan).cpu()
        return got, ops.linear(x, self.on_cpu, bias, self.rows, self.plan)


def build_layer(
    segments: list[tuple[str, int]],
    columns: int,
    mode: str = "a8",
    blocks: int = 1,
    pack_for_gpu: bool = True,
) -> Layer:
    """Random codes and scales; `blocks` 0: no rotation, else the fewest blocks that are a multiple of it."""
    generator = torch.Generator().manual_seed(columns)
    codes = []
    for name, rows in segments:
        pool = code_pool(name)
        chosen = torch.randint(len(pool), (rows * columns // 8,), generator=generator)
        codes.append(pool[chosen].view(rows, columns // 8, -1))
    rows = sum(count for _, count in segments)
    scale = (torch.rand(rows, generator=generator) * 0.01).half()
    blocks, factors = rotation_layout(columns, blocks) if blocks else (0, [])
    plan = ops.make_plan(
        segments, columns, seed=SEED, rotation_blocks=blocks, factors=factors, activation=mode
    )
    on_cpu = ops.pack_linear(codes, scale, plan)
    on_gpu = ops.pack_linear([part.cuda() for part in codes], scale.cuda(), plan)
    q = torch.cat(
        [
            part.view(torch.int8).flatten(1) if name == "int8" else quantizer_ops.decode_codes(part, name)
            for part, (name, _) in zip(codes, segments, strict=True)
        ]
    )
    return Layer(plan, rows, columns, q, on_cpu, on_gpu)


def random_tokens(tokens: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)) * 3).to(dtype)


def describe_difference(got: torch.Tensor, expected: torch.Tensor) -> str:
    """Return "" if both are equal, NaN equal to NaN; else how many values differ, and the first."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{got.dtype} {list(got.shape)} instead of {expected.dtype} {list(expected.shape)}"
    differs = (got != expected) & ~(got.isnan() & expected.isnan())
    if not differs.any():
        return ""
    where = differs.nonzero()
    first = tuple(where[0].tolist())
    return (
        f"{len(where)} of {got.numel()} differ, in {len(where[:, 0].unique())} tokens and {len(where[:, -1].unique())} rows; "
        f"first {list(first)}: {got[first].item()} instead of {expected[first].item()}"
    )


class Kit:
    Layer = Layer
    build_layer = staticmethod(build_layer)
    code_pool = staticmethod(code_pool)
    random_tokens = staticmethod(random_tokens)
    describe_difference = staticmethod(describe_difference)


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()
