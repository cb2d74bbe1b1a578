# SPDX-License-Identifier: Apache-2.0
"""The operator as torch sees it: schema, fake, compilation, and what it says about wrong arguments.

Equality with the reference is tested in test_csrc.
"""

import re
import subprocess
from typing import NamedTuple

import pytest
import torch

from pvq_vllm import _C, ops, quantizer_ops
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.rotation import rotation_layout

ROWS, COLUMNS = 48, 64


class Layer(NamedTuple):
    packed: ops.PackedLinear
    plan: str

    def arguments(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> tuple:
        return (x, *self.packed, bias, ROWS, self.plan)


@pytest.fixture(scope="module")
def layer() -> Layer:
    """A layer of two segments, pvq4 and int8, of 24 rows each."""
    blocks, factors = rotation_layout(COLUMNS)
    segments = [("pvq4", 24), ("int8", 24)]
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    codes, scales = [], []
    for part, (name, _) in zip(weight.split(24), segments, strict=True):
        scales.append(quantizer_ops.search_row_scale(part, name))
        codes.append(quantizer_ops.quantize_rows(part, name, scales[-1])[0])
    plan = ops.make_plan(segments, COLUMNS, seed=1, rotation_blocks=blocks, factors=factors)
    return Layer(ops.pack_linear(codes, torch.cat(scales).half(), plan), plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, COLUMNS), (5, COLUMNS), (2, 3, COLUMNS)])
def test_schema_and_fake_agree_with_the_operator(layer, dtype, shape):
    x, bias = torch.randn(shape).to(dtype), torch.randn(ROWS).to(dtype)
    for arguments in (layer.arguments(x), layer.arguments(x, bias)):
        torch.library.opcheck(torch.ops.pvq.linear.default, arguments)
    y = torch.ops.pvq.linear(*layer.arguments(x, bias))
    assert y.shape == (*shape[:-1], ROWS) and y.dtype == dtype


def test_compiled_whole_and_for_any_number_of_tokens(layer):
    compiled = torch.compile(
        lambda x: torch.ops.pvq.linear(*layer.arguments(x)) * 2,
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for tokens in (2, 3, 40):
        x = torch.randn(tokens, COLUMNS)
        assert torch.equal(compiled(x), torch.ops.pvq.linear(*layer.arguments(x)) * 2)


def test_result_does_not_depend_on_the_memory_layout_of_the_input(layer):
    x = torch.randn(COLUMNS, 6).T
    assert not x.is_contiguous()
    expected = torch.ops.pvq.linear(*layer.arguments(x.contiguous()))
    assert torch.equal(torch.ops.pvq.linear(*layer.arguments(x)), expected)


def test_no_tokens_give_no_rows(layer):
    assert torch.ops.pvq.linear(*layer.arguments(torch.empty(0, COLUMNS))).shape == (0, ROWS)


X = torch.zeros(2, COLUMNS)


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(x=X.double()), "x has dtype torch.float64"),
        (dict(x=X[:, :-8]), "x has 56 columns"),
        (dict(bias=torch.zeros(ROWS).bfloat16()), "bias must be"),
        (dict(bias=torch.zeros(ROWS - 1)), "bias must be"),
        (dict(weight=torch.zeros(16, dtype=torch.uint8)), "weight, row_scale or row_sum"),
        (dict(row_scale=torch.zeros(8)), "weight, row_scale or row_sum"),
        (dict(row_sum=torch.zeros(8, dtype=torch.int32)), "weight, row_scale or row_sum"),
        (dict(out_features=ROWS + 1), "out_features is 49"),
    ],
)
def test_wrong_argument_is_refused_and_named(layer, change, named):
    names = ("x", "weight", "row_scale", "row_sum", "bias", "out_features", "plan")
    arguments = dict(zip(names, layer.arguments(X), strict=True)) | change
    with pytest.raises(PVQError, match=named):
        torch.ops.pvq.linear(*arguments.values())


def test_scales_cast_to_another_dtype_are_refused(layer):
    """What ``model.to(bfloat16)`` would do to them, were it allowed."""
    x, weight, scale, *rest = layer.arguments(X)
    with pytest.raises(PVQError, match="float32"):
        torch.ops.pvq.linear(x, weight, scale.bfloat16(), *rest)


def test_compiled_module_knows_nothing_of_torch():
    output = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    linked = re.sub(r"\(0x[0-9a-f]+\)", "", output)  # an address may have "c10" in it
    assert "libc.so" in linked and "torch" not in linked and "c10" not in linked
