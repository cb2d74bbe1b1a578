# SPDX-License-Identifier: Apache-2.0
"""`pvq` activations on a GPU equal those of the CPU bit for bit, alone and in a product."""

import itertools

import pytest
import torch

from pvq_vllm import cuda_ops, ops
from pvq_vllm.codec.activation import GROUP_SIZES
from pvq_vllm.codec.errors import PVQError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PULSES = (1, 5, 58, 300, 4096)
WIDTHS = (  # (columns, blocks): no rotation, a power of two, and every dense order of one or the other kernel
    *((8, 0), (72, 1), (576, 1), (1536, 2), (2048, 1), (8192, 0), (14336, 1)),
    *((272, 1), (304, 1), (1920, 1), (2304, 1), (2816, 1)),
)


def special_tokens(tokens: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Gaussian tokens, and among them zeros, single values, ties, few large values and broken ones."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(columns))
    x[1] *= torch.rand(columns, generator=torch.Generator().manual_seed(1)) ** 8
    x[2] = 0
    x[3] = 0
    x[3, columns // 2] = 5
    x[4, 1] = float("inf")
    x[5, 2] = float("nan")
    x[6] *= 1e37
    x[7] *= 1e-20
    x[8] *= 1e-38
    x[9] = torch.randint(-2, 3, (columns,), generator=torch.Generator().manual_seed(2))
    return x.to(dtype)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "columns, blocks, group",
    [(*width, group) for width in WIDTHS for group in GROUP_SIZES if width[0] % group == 0],
)
def test_projected_tokens(kit, columns, blocks, group):
    wrong = []
    for pulses, dtype in itertools.product(PULSES, DTYPES):
        layer = kit.build_layer([("int8", 8)], columns, f"pvq:{group},{pulses}", blocks)
        for x in (special_tokens(12, columns, dtype), kit.random_tokens(1, columns, dtype)):
            planes, scale = ops.quantize_activations(x, layer.plan)
            got_planes, got_scale = ops.quantize_activations(x.cuda(), layer.plan)
            for what, got, expected in (("planes", got_planes, planes), ("scale", got_scale, scale)):
                if difference := kit.describe_difference(got.cpu(), expected):
                    wrong.append(f"{what}, {pulses} pulses, {len(x)} tokens, {dtype}: {difference}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["pvq2", "pvq3", "pvq4", "int8"])
@pytest.mark.parametrize("columns, rows, blocks", [(64, 17, 0), (576, 100, 1), (4096, 960, 1)])
def test_products(kit, columns, rows, blocks, name):
    """Every number of tokens, hence every kernel of the product; without rotation too, where a8 has a kernel of its own."""
    layer = kit.build_layer([(name, rows)], columns, "pvq:16,58", blocks)
    wrong = []
    for tokens in (1, 2, 5, 8, 9, 17, 33, 65, 300, 600):
        x = kit.random_tokens(tokens, columns, torch.bfloat16)
        if difference := kit.describe_difference(*layer.both(x, torch.randn(rows).bfloat16())):
            wrong.append(f"{tokens} tokens: {difference}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.cuda
def test_broken_tokens_stay_alone(kit):
    layer = kit.build_layer([("pvq4", 32)], 64, "pvq:32,105")
    for value in (0.0, 1e-30, 1e36, 3e38, float("inf"), float("nan")):
        x = kit.random_tokens(6, 64, torch.float32)
        x[0] = x[0].sign() * value
        got, expected = layer.both(x)
        assert kit.describe_difference(got, expected) == ""
        assert not got[1:].isnan().any()


@pytest.mark.cuda
def test_cuda_graph_replays_with_new_inputs(kit):
    layer = kit.build_layer([("pvq4", 576)], 576, "pvq:64,199")
    static = torch.zeros(7, 576, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = ops.linear(static, layer.on_gpu, None, 576, layer.plan)
    for seed in range(3):
        x = torch.randn(7, 576, generator=torch.Generator().manual_seed(seed)).bfloat16()
        static.copy_(x)
        graph.replay()
        assert torch.equal(output.cpu(), ops.linear(x, layer.on_cpu, None, 576, layer.plan))


@pytest.mark.cuda_build
def test_the_plan_of_the_gpu_refuses_what_the_one_of_the_cpu_refuses():
    plan = ops.make_plan([("pvq4", 8)], 64, activation="pvq:32,105")
    assert cuda_ops.make_plan(plan).num_planes == 1
    with pytest.raises(PVQError, match=r"in_features is 64; .*groups of 128"):
        cuda_ops.make_plan(plan.replace(";32,105", ";128,105"))
    with pytest.raises(PVQError, match=r"S\(24, 105\)"):
        cuda_ops.make_plan(plan.replace(";32,105", ";24,105"))
