# SPDX-License-Identifier: Apache-2.0
"""`pvq` activations on the CPU equal codec.reference bit for bit, on every instruction set this machine has."""

import pytest
import torch

from pvq_vllm import ops, quantizer_ops
from pvq_vllm.codec import reference
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.rotation import Rotation, rotation_layout

CASES = """
import sys, torch
from pvq_vllm import ops
from pvq_vllm.codec import reference
from pvq_vllm.codec.rotation import Rotation, rotation_layout
print("isa", ops.cpu_isa())
torch.manual_seed(0)
wrong = checked = 0
for width in (8, 72, 144, 576, 1536, 2048):
    for group in (8, 16, 32, 64, 128, 256):
        if width % group:
            continue
        for pulses in (1, 5, group // 2, 3 * group + 1, 4096):
            mode = f"pvq:{group},{pulses}"
            blocks, factors = rotation_layout(width) if pulses % 2 else (0, [])
            rotation = Rotation(7, width, blocks, factors)
            plan = ops.make_plan(
                [("int8", 16)], width, seed=7, rotation_blocks=blocks, factors=factors, activation=mode
            )
            x = torch.randn(12, width)
            x[1] *= torch.rand(width) ** 8  # few large values
            x[2] = 0
            x[3] = 0
            x[3, width // 2] = 5
            x[4, 1] = float("inf")
            x[5, 2] = float("nan")
            x[6] *= 1e37
            x[7] *= 1e-20
            x[8] *= 1e-38
            x[9] = torch.randint(-2, 3, (width,))  # ties
            x = x.to((torch.float32, torch.bfloat16, torch.float16)[pulses % 3])
            planes, scale = ops.quantize_activations(x, plan)
            expected_planes, expected_scale = reference.quantize_activation(x, rotation, mode)
            checked += 1
            if not torch.equal(planes, expected_planes) or not torch.equal(
                scale.nan_to_num(nan=-1), expected_scale.nan_to_num(nan=-1)
            ):
                wrong += 1
                rows = (planes != expected_planes).any(-1).nonzero()
                print("differs:", width, mode, rows.tolist(), scale, expected_scale)
print("checked", checked, "wrong", wrong)
sys.exit(wrong > 0 or checked == 0)
"""


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "amx"])
def test_every_instruction_set_equals_the_reference(run_on_isa, isa):
    run_on_isa(isa, CASES)


@pytest.mark.parametrize("tokens", [1, 3, 9, 40])
@pytest.mark.parametrize("name", ["pvq2", "pvq3", "pvq4", "int8"])
def test_product_equals_the_reference(name, tokens):
    blocks, factors = rotation_layout(1152)
    rotation = Rotation(3, 1152, blocks, factors)
    generator = torch.Generator().manual_seed(tokens)
    weight = rotation.rotate(torch.randn(50, 1152, generator=generator))
    scale = quantizer_ops.search_row_scale(weight, name)
    codes, q = quantizer_ops.quantize_rows(weight, name, scale)
    for mode in ("pvq:8,36", "pvq:128,300"):
        plan = ops.make_plan(
            [(name, 50)], 1152, seed=3, rotation_blocks=blocks, factors=factors, activation=mode
        )
        x = torch.randn(tokens, 1152, generator=generator).bfloat16()
        x[0, 0] = 1e30 if tokens == 3 else x[0, 0]
        y = ops.linear(x, ops.pack_linear([codes], scale.half(), plan), None, 50, plan)
        assert torch.equal(y, reference.linear(x, q, int(name != "int8"), scale, rotation, mode))


def test_zero_tiny_huge_and_broken_tokens():
    plan = ops.make_plan([("pvq4", 32)], 64, activation="pvq:16,58")
    codes = torch.zeros(32, 8, 4, dtype=torch.uint8)
    packed = ops.pack_linear([codes], torch.ones(32).half(), plan)
    for value in (0.0, 1e-30, 1e36, 3e38, float("inf"), float("nan")):
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
        x[0] = x[0].sign() * value
        y = ops.linear(x, packed, None, 32, plan)
        broken = not value < 1e37
        assert bool(y[0].isnan().all()) == bool(y[0].isnan().any()) == broken
        assert bool((y[0] == 0).all()) == (value < 1e-20)
        assert torch.isfinite(y[1:]).all() and not (y[1:] == 0).all(dim=1).any()


def test_a_group_that_does_not_fit_is_refused():
    with pytest.raises(PVQError, match=r"in_features is 72; .*groups of 16"):
        ops.make_plan([("pvq4", 32)], 72, activation="pvq:16,58")
    with pytest.raises(PVQError, match="activation is 'pvq:24,5'"):
        ops.make_plan([("pvq4", 32)], 72, activation="pvq:24,5")
