# SPDX-License-Identifier: Apache-2.0
"""The layers that bench_linear_cuda.py times: ours, and those of cuBLAS and vLLM, with random weights made on the GPU."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

try:
    from pvq_vllm import ops, quantizer_ops
except ModuleNotFoundError:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from pvq_vllm import ops, quantizer_ops
from pvq_vllm.codec.format import Codebook
from pvq_vllm.codec.rotation import Rotation, rotation_layout

INT4_GROUP = 128
COLD_BYTES = 256e6  # of copies together, several times the 50 MB of L2 of an H100
CHECK_ROWS, CHECK_TOKENS = 16, 16  # compared with float64


class Contender(NamedTuple):
    """One kernel and its copies of a weight: each call takes x and returns x W^T."""

    weight_bytes: int
    calls: list[Callable[[torch.Tensor], torch.Tensor]]


def contender(
    weight_bytes: int, make_call: Callable[[], Callable[[torch.Tensor], torch.Tensor]]
) -> Contender:
    """As many copies as are needed to exceed the cache; at least two, so that no call finds its own weight there."""
    copies = max(2, math.ceil(COLD_BYTES / weight_bytes))
    return Contender(weight_bytes, [make_call() for _ in range(copies)])


# ---- ours -----------------------------------------------------------------------------------------------------------------


def code_table(codebook: str) -> torch.Tensor:
    """Codes of Gaussian groups, uint8 [groups, B], on the GPU; a layer's codes are drawn from it."""
    gaussian = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    if codebook == "int8":
        return (gaussian * 32).round().clamp(-127, 127).to(torch.int8).view(torch.uint8).view(-1, 8).cuda()
    codes, _ = quantizer_ops.quantize_rows(gaussian, codebook, torch.full((64,), 2.0**-5))
    return codes.view(-1, codes.shape[-1]).cuda()


class Layer(NamedTuple):
    """A packed layer, and a few of its rows as the checkpoint has them, for the check."""

    codebook: str
    activation: str
    rotation: Rotation | None
    packed: ops.PackedLinear
    plan: str
    rows: torch.Tensor
    row_codes: torch.Tensor
    row_scale: torch.Tensor


def is_rotation(rotation: str) -> bool:
    return re.fullmatch(r"online|residual|(block|residual):[0-9]+", rotation) is not None


def rotation_of(rotation: str, out_features: int, in_features: int) -> tuple[int, list[int]]:
    """Blocks and factors: "online" rotates every input, "residual" only what cannot be folded into weights, the inner
    activation of an MLP, whose layer has more columns than rows. "block:N" and "residual:N" do so in blocks of at most N columns.

    Raises:
        PVQError: no such blocks divide the input.
    """
    kind, _, width = rotation.partition(":")
    if kind == "residual" and in_features <= out_features:
        return 0, []
    return rotation_layout(in_features, 1, int(width) if width else None)


def make_layer(codebook: str, activation: str, rotation: str, out_features: int, in_features: int) -> Layer:
    blocks, factors = rotation_of(rotation, out_features, in_features)
    plan = ops.make_plan(
        [(codebook, out_features)],
        in_features,
        rotation_blocks=blocks,
        factors=factors,
        activation=activation,
    )
    table = code_table(codebook)
    codes = torch.empty(
        (out_features * in_features // 8, table.shape[1]), dtype=torch.uint8, device=table.device
    )
    for part in codes.split(1 << 24):
        part.copy_(table[torch.randint(len(table), (len(part),), device=table.device)])
    codes = codes.view(out_features, in_features // 8, -1)
    scale = torch.empty(out_features, device=table.device).uniform_(0.5e-3, 1.5e-3).half()
    rows = torch.randint(out_features, (CHECK_ROWS,), device=table.device)
    rows[0], rows[1] = 0, out_features - 1
    packed = ops.pack_linear([codes], scale, plan)
    online = Rotation(0, in_features, blocks, factors) if blocks else None
    return Layer(codebook, activation, online, packed, plan, rows, codes[rows].cpu(), scale[rows].cpu())


def make_ours(layer: Layer, out_features: int) -> Contender:
    def make_call():
        weight, row_scale = layer.packed.weight.clone(), layer.packed.row_scale.clone()
        row_sum, plan = layer.packed.row_sum, layer.plan
        return lambda x: torch.ops.pvq.linear(x, weight, row_scale, row_sum, None, out_features, plan)

    return contender(layer.packed.weight.numel(), make_call)


def relative_error(layer: Layer, x: torch.Tensor, y: torch.Tensor) -> float:
    """Of some rows and tokens, against float64 arithmetic on the CPU that rotates but does not quantize x."""
    chosen = torch.unique(torch.linspace(0, len(x) - 1, min(len(x), CHECK_TOKENS)).round().long())
    chosen_x, chosen_y = (
        x[chosen.to(x.device)].cpu().double(),
        y[chosen.to(y.device)][:, layer.rows].cpu().double(),
    )
    q = quantizer_ops.decode_codes(layer.row_codes, layer.codebook).double()
    weight = (q + Codebook(layer.codebook).h / 2) * layer.row_scale.double()[:, None]
    reference = (layer.rotation.rotate(chosen_x) if layer.rotation else chosen_x) @ weight.T
    return float((chosen_y - reference).norm() / reference.norm())


# ---- the others -----------------------------------------------------------------------------------------------------------


def random_words(*shape: int) -> torch.Tensor:
    words = torch.empty((*shape[:-1], 4 * shape[-1]), dtype=torch.uint8, device="cuda").random_(0, 256)
    return words.view(torch.int32)


def make_fp16(out_features: int, in_features: int) -> Contender:
    def make_call():
        weight = torch.randn(out_features, in_features, dtype=torch.float16, device="cuda").mul_(0.02)
        return lambda x: torch.nn.functional.linear(x, weight)

    return contender(2 * out_features * in_features, make_call)


def int4_scales(out_features: int, in_features: int) -> torch.Tensor:
    shape = (in_features // INT4_GROUP, out_features)
    return torch.empty(shape, device="cuda").uniform_(0.5e-3, 1.5e-3).half()


def make_marlin(out_features: int, in_features: int) -> Contender:
    from vllm import _custom_ops as vllm_ops
    from vllm.scalar_type import scalar_types

    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    workspace = torch.zeros(num_sms, dtype=torch.int32, device="cuda")
    empty = torch.empty(0, dtype=torch.int32, device="cuda")

    def make_call():
        weight = random_words(in_features // 16, out_features * 16 // 8)  # 16 x 64 tiles of 4-bit numbers
        scales = int4_scales(out_features, in_features)
        return lambda x: vllm_ops.marlin_gemm(
            x,
            None,  # c
            weight,
            None,  # bias
            scales,
            None,  # activation scales
            None,  # global scale
            empty,  # zero points
            empty,  # g_idx
            empty,  # permutation
            workspace,
            scalar_types.uint4b8,
            size_m=len(x),
            size_n=out_features,
            size_k=in_features,
            is_k_full=True,
            use_atomic_add=False,
            use_fp32_reduce=True,
            is_zp_float=False,
        )

    return contender(out_features * in_features // 2, make_call)


def make_machete(out_features: int, in_features: int) -> Contender:
    from vllm import _custom_ops as vllm_ops
    from vllm.scalar_type import scalar_types

    def make_call():
        column_major = random_words(out_features, in_features // 8).t()
        weight = vllm_ops.machete_prepack_B(
            column_major,
            a_type=torch.float16,
            b_type=scalar_types.uint4b8,
            group_scales_type=torch.float16,
        )
        scales = int4_scales(out_features, in_features)
        return lambda x: vllm_ops.machete_mm(
            a=x,
            b_q=weight,
            b_type=scalar_types.uint4b8,
            b_group_scales=scales,
            b_group_size=INT4_GROUP,
        )

    return contender(out_features * in_features // 2, make_call)


def make_8_bits(out_features: int, in_features: int, dtype: torch.dtype) -> Contender:
    """vLLM's cutlass_scaled_mm, a scale for each row of the weight and for each token."""
    from vllm import _custom_ops as vllm_ops

    def quantize(x):
        if dtype == torch.int8:
            return vllm_ops.scaled_int8_quant(x)[:2]
        return vllm_ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True)

    largest, spread = (127, 32) if dtype == torch.int8 else (448, 100)

    def make_call():
        weight = torch.empty((out_features, in_features), dtype=dtype, device="cuda")
        for part in weight.split(max(1, (1 << 26) // in_features)):
            gaussian = torch.randn(part.shape, dtype=torch.float16, device="cuda").mul_(spread)
            part.copy_(gaussian.clamp_(-largest, largest))
        weight = weight.t()
        weight_scale = torch.empty((out_features, 1), device="cuda").uniform_(0.5e-3, 1.5e-3)

        def call(x):
            quantized, scale = quantize(x)
            return vllm_ops.cutlass_scaled_mm(
                quantized, weight, scale_a=scale, scale_b=weight_scale, out_dtype=x.dtype
            )

        return call

    return contender(out_features * in_features, make_call)


def make_fp8(out_features: int, in_features: int) -> Contender:
    return make_8_bits(out_features, in_features, torch.float8_e4m3fn)


def make_int8(out_features: int, in_features: int) -> Contender:
    return make_8_bits(out_features, in_features, torch.int8)


MAKERS = {
    "fp16": make_fp16,
    "marlin": make_marlin,
    "machete": make_machete,
    "fp8": make_fp8,
    "int8": make_int8,
}
