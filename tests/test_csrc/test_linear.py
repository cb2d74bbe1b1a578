# SPDX-License-Identifier: Apache-2.0
"""The CPU product equals codec.reference.linear bit for bit, on every instruction set this machine has.

The set is chosen once a process, by PVQ_CPU_ISA; so the cases run in one subprocess each and report every mismatch.
"""

import pytest
import torch

from pvq_vllm import ops, quantizer_ops
from pvq_vllm.codec import reference
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.rotation import Rotation, rotation_layout

CASES = """
import itertools, sys, torch
from pvq_vllm import ops, quantizer_ops
from pvq_vllm.codec import reference
from pvq_vllm.codec.rotation import Rotation, rotation_layout
print("isa", ops.cpu_isa())
torch.manual_seed(0)
wrong = checked = 0
names = ("pvq2", "pvq3", "pvq4", "int8")
for (name, mode), (width, blocks), rows in itertools.product(
    itertools.product(names, ("a8", "a16")), ((8, 1), (72, 0), (144, 1), (576, 1), (512, 2)), (1, 50, 96)
):
    if blocks:
        blocks, factors = rotation_layout(width, blocks)
    else:
        factors = []
    rotation = Rotation(7, width, blocks, factors)
    weight = rotation.rotate(torch.randn(rows, width))
    scale = quantizer_ops.search_row_scale(weight, name)
    codes, q = quantizer_ops.quantize_rows(weight, name, scale)
    plan = ops.make_plan([(name, rows)], width, seed=7, rotation_blocks=blocks, factors=factors, activation=mode)
    packed = ops.pack_linear([codes], scale.half(), plan)
    for tokens, dtype in ((1, torch.bfloat16), (2, torch.float32), (5, torch.float16), (8, torch.bfloat16),
                          (9, torch.bfloat16), (17, torch.float32), (33, torch.bfloat16)):
        x = (torch.randn(tokens, width) * 3).to(dtype)
        bias = torch.randn(rows).to(dtype) if tokens % 2 else None
        y = ops.linear(x, packed, bias, rows, plan)
        expected = reference.linear(x, q, int(name != "int8"), scale, rotation, mode, bias)
        checked += 1
        if not torch.equal(y, expected):
            wrong += 1
            print("differs:", name, mode, width, blocks, rows, tokens, dtype)
print("checked", checked, "wrong", wrong)
sys.exit(wrong > 0 or checked == 0)
"""


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "amx"])
def test_every_instruction_set_equals_the_reference(run_on_isa, isa):
    run_on_isa(isa, CASES)


def _layer(segments, width, mode="a8", seed=3):
    """Random layer of several codebooks: (plan, packed, q, h, scale, rotation)."""
    blocks, factors = rotation_layout(width)
    rotation = Rotation(seed, width, blocks, factors)
    generator = torch.Generator().manual_seed(seed)
    codes, qs, scales, offsets = [], [], [], []
    for name, rows in segments:
        weight = rotation.rotate(torch.randn(rows, width, generator=generator))
        scale = quantizer_ops.search_row_scale(weight, name)
        code, q = quantizer_ops.quantize_rows(weight, name, scale)
        codes.append(code)
        qs.append(q)
        scales.append(scale)
        offsets.append(torch.full((rows,), int(name != "int8")))
    plan = ops.make_plan(segments, width, seed=seed, rotation_blocks=blocks, factors=factors, activation=mode)
    scale = torch.cat(scales)
    return (
        plan,
        ops.pack_linear(codes, scale.half(), plan),
        torch.cat(qs),
        torch.cat(offsets),
        scale,
        rotation,
    )


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_mixed_codebooks_in_one_layer(tokens):
    plan, packed, q, h, scale, rotation = _layer([("pvq4", 37), ("pvq2", 5), ("int8", 16), ("pvq3", 64)], 96)
    x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.randn(122, generator=torch.Generator().manual_seed(2)).bfloat16()
    y = ops.linear(x, packed, bias, 122, plan)
    assert torch.equal(y, reference.linear(x, q, h, scale, rotation, "a8", bias))


def test_a_token_does_not_depend_on_its_batch():
    plan, packed, *_ = _layer([("pvq4", 80)], 576)
    x = torch.randn(64, 576, generator=torch.Generator().manual_seed(1)).bfloat16()
    together = ops.linear(x, packed, None, 80, plan)
    alone = torch.cat([ops.linear(row[None], packed, None, 80, plan) for row in x])
    assert torch.equal(together, alone)


def test_threads_do_not_change_a_bit():
    plan, packed, *_ = _layer([("pvq3", 400)], 1536)
    x = torch.randn(7, 1536, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.linear(x, packed, None, 400, plan))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_columns_of_a_rank_use_their_part_of_the_signs():
    rotation = Rotation(3, 64, 1, [64], first_column=64)
    weight = rotation.rotate(torch.randn(16, 64))
    scale = quantizer_ops.search_row_scale(weight, "pvq4")
    codes, q = quantizer_ops.quantize_rows(weight, "pvq4", scale)
    plan = ops.make_plan([("pvq4", 16)], 64, seed=3, first_column=64, rotation_blocks=1, factors=[64])
    packed = ops.pack_linear([codes], scale.half(), plan)
    x = torch.randn(2, 64)
    assert torch.equal(
        ops.linear(x, packed, None, 16, plan), reference.linear(x, q, 1, scale, rotation, "a8")
    )


@pytest.mark.parametrize("mode", ["a8", "a16"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_zero_tiny_huge_and_broken_tokens(mode, tokens):
    plan, packed, q, _, scale, rotation = _layer([("pvq4", 32)], 64, mode)
    for value in (0.0, 1e-30, 3e38, float("inf"), float("nan")):
        x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1))
        x[0] = x[0].sign() * value if value != 3e38 else x[0] * 1e36
        y = ops.linear(x, packed, None, 32, plan)
        expected = reference.linear(x, q, 1, scale, rotation, mode)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.nan_to_num(), expected.nan_to_num())
        assert bool(y[0].isnan().all()) == (value != value or value == float("inf"))
        assert not y[1:].isnan().any()


@pytest.mark.parametrize("mode", ["a8", "a16"])
def test_activation_planes_equal_the_reference(mode):
    rotation = Rotation(7, 1152, 2, [12, 12, 4])
    plan = ops.make_plan(
        [("int8", 16)], 1152, seed=7, rotation_blocks=2, factors=[12, 12, 4], activation=mode
    )
    x = torch.randn(11, 1152).bfloat16()
    planes, scale = ops.quantize_activations(x, plan)
    expected_planes, expected_scale = reference.quantize_activation(x, rotation, mode)
    assert torch.equal(planes, expected_planes) and torch.equal(scale, expected_scale)


def test_error_of_the_product_is_that_of_its_parts():
    """a16 adds nothing visible to the weights' error, a8 little; a wrong rotation would give an error near 1.4."""
    torch.manual_seed(0)
    weight, x = torch.randn(256, 1024), torch.randn(8, 1024)
    exact = x @ weight.T
    errors = {}
    for mode in ("a8", "a16"):
        rotation = Rotation(0, 1024, 1, [1024])
        scale = quantizer_ops.search_row_scale(rotation.rotate(weight), "pvq4")
        codes, _ = quantizer_ops.quantize_rows(rotation.rotate(weight), "pvq4", scale)
        plan = ops.make_plan([("pvq4", 256)], 1024, rotation_blocks=1, factors=[1024], activation=mode)
        y = ops.linear(x, ops.pack_linear([codes], scale.half(), plan), None, 256, plan)
        errors[mode] = float((y - exact).norm() / exact.norm())
    assert errors["a16"] < 10 ** (-21.3 / 20)  # 21.5 dB is what the codebook gives on Gaussian weights
    assert errors["a16"] <= errors["a8"] < 1.02 * errors["a16"]


def test_wrong_arguments_are_named():
    plan, packed, *_ = _layer([("pvq4", 32)], 64)
    x = torch.randn(2, 64)
    with pytest.raises(PVQError, match="x has 48 columns"):
        ops.linear(x[:, :48], packed, None, 32, plan)
    with pytest.raises(PVQError, match="bias must be"):
        ops.linear(x, packed, torch.zeros(31), 32, plan)
    with pytest.raises(PVQError, match="float64"):
        ops.linear(x.double(), packed, None, 32, plan)
    with pytest.raises(PVQError, match="does not belong to this plan"):
        ops.linear(x, packed._replace(weight=packed.weight[:-1]), None, 32, plan)
    with pytest.raises(PVQError, match="in_features is 60"):
        ops.make_plan([("pvq4", 32)], 60)
    with pytest.raises(PVQError, match="block width 64"):
        ops.make_plan([("pvq4", 32)], 64, rotation_blocks=1, factors=[32])
    with pytest.raises(PVQError, match="row_scale has a value"):
        ops.pack_linear([torch.zeros(32, 8, 4, dtype=torch.uint8)], torch.full((32,), float("nan")), plan)


def test_a_code_out_of_range_is_refused_at_load():
    plan = ops.make_plan([("pvq4", 32)], 64)
    codes = torch.zeros(32, 8, 4, dtype=torch.uint8)
    codes[21, 5, 0], codes[21, 5, 1] = 8187 & 255, 8187 >> 8
    with pytest.raises(PVQError, match="row 21"):
        ops.pack_linear([codes], torch.ones(32).half(), plan)
    with pytest.raises(PVQError, match="row 21"):
        quantizer_ops.decode_codes(codes, "pvq4")
