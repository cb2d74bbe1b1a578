# SPDX-License-Identifier: Apache-2.0
"""Small cases of every kernel that an H100 runs, compared with the CPU, for compute-sanitizer (make sanitize).

    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/test_cuda/sanitizer_cases.py

Small, because a tool slows a kernel down by a factor of ten to a thousand, and yet with rings that go round, splits and clusters;
not every kernel with every codebook and type. Left out: quantize_twice_kernel, which is there for tokens of
more than 131072 columns, and what is used before compute capability 9.0 alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import torch
from conftest import build_layer, describe_difference, random_tokens
from test_encode import metric_arguments

from pvq_vllm import _C, cuda_ops, ops, quantizer_ops
from pvq_vllm.canonical_ops import decode_canonical, encode_canonical
from pvq_vllm.codec.serving import codebook_id

# (kernel, codebook, rows, columns, tokens, activation, blocks of the rotation or 0, dtype)
PRODUCTS = [
    ("few", "pvq4", 300, 4096, 8, "a8", 32, torch.float16),
    ("few", "pvq3", 64, 5120, 16, "a8", 40, torch.bfloat16),
    ("few", "pvq2", 64, 8192, 3, "a16", 64, torch.float32),
    ("few", "pvq4", 40, 14336, 2, "a8", 112, torch.float16),
    ("few", "int8", 300, 1024, 20, "a8", 8, torch.float16),
    ("few", "pvq4", 4480, 1024, 2, "a8", 8, torch.float16),  # warps go on from tile to tile
    ("few", "pvq4", 17000, 1024, 12, "a8", 8, torch.float16),
    ("few", "pvq3", 17000, 1024, 20, "a8", 8, torch.float16),
    ("few", "pvq2", 8448, 28672, 1, "a8", 224, torch.float16),  # chunks in turn
    ("auto", "pvq2", 8448, 28672, 1, "a8", 0, torch.float16),  # the same, quantized by the product
    ("auto", "pvq4", 2200, 384, 1, "a8", 0, torch.float16),
    ("auto", "pvq2", 300, 5120, 1, "a16", 0, torch.bfloat16),
    ("few", "pvq4", 100, 8192, 4, "a8", 1, torch.float16),  # rotated over the whole width: by clusters
    ("few", "pvq4", 40, 14336, 2, "a16", 1, torch.float32),  # 28 * 512
    ("few", "pvq4", 40, 10240, 2, "a8", 1, torch.float16),  # 20 * 512
    ("few", "pvq4", 40, 12288, 2, "a8", 1, torch.float16),  # 12 * 1024
    ("few", "pvq3", 40, 2816, 4, "a8", 1, torch.float16),  # by a block: 44 * 64
    ("few", "pvq4", 100, 4096, 4, "a8", 1, torch.float16),
    ("few", "pvq4", 100, 4096, 9, "a8", 1, torch.float16),
    ("tiles", "pvq4", 300, 1536, 40, "a8", 12, torch.float16),
    ("tiles", "pvq2", 600, 2048, 64, "a8", 16, torch.float16),
    ("tiles", "pvq3", 300, 2048, 30, "a8", 16, torch.float16),
    ("tiles", "pvq3", 200, 5120, 12, "a8", 40, torch.float16),
    ("tiles", "pvq4", 200, 14336, 12, "a8", 112, torch.float16),  # slots are used again
    ("tiles", "int8", 200, 2048, 30, "a16", 16, torch.float16),
    ("tiles", "pvq4", 34000, 256, 12, "a8", 2, torch.float16),  # 28 warps
    ("tiles", "pvq4", 34000, 256, 20, "a8", 2, torch.float16),
    ("mma", "pvq4", 200, 1024, 20, "a8", 8, torch.float16),
    ("mma", "pvq2", 200, 1024, 40, "a8", 8, torch.float16),
    ("mma", "pvq3", 200, 2048, 150, "a8", 16, torch.float16),
    ("mma", "pvq4", 4000, 1024, 300, "a8", 8, torch.float16),
    ("mma", "int8", 4000, 512, 1200, "a8", 4, torch.float16),
    ("wgmma", "pvq4", 300, 2304, 70, "a8", 18, torch.float16),
    ("wgmma", "pvq4", 300, 5120, 200, "a8", 40, torch.float16),  # clusters of three
    ("wgmma", "pvq2", 200, 256, 150, "a16", 2, torch.float16),
    ("wgmma", "int8", 200, 2304, 256, "a8", 18, torch.float16),
    ("wgmma", "pvq3", 300, 2048, 256, "a8", 16, torch.float16),
    ("wgmma", "pvq4", 4300, 2048, 256, "a8", 16, torch.float16),  # pairs with 256 columns
    ("wgmma", "pvq4", 2048, 14336, 400, "a8", 112, torch.float16),  # three with 256 columns
    ("wgmma", "pvq4", 17196, 1536, 256, "a8", 12, torch.float16),  # two launches
    ("prefill", "pvq4", 300, 2304, 300, "a8", 18, torch.float16),
    ("prefill", "pvq3", 300, 2304, 140, "a16", 18, torch.float16),
    ("prefill", "pvq2", 300, 1024, 140, "a8", 8, torch.float16),
    ("prefill", "int8", 200, 2304, 150, "a8", 18, torch.float16),
    ("auto", "pvq4", 64, 1024, 5, "pvq:16,58", 1, torch.float16),
    ("auto", "pvq4", 64, 2816, 5, "pvq:128,300", 1, torch.float32),  # 44 * 64
]

# (columns, blocks of the rotation, tokens): 8, 16 or 32 columns a thread, alone, by clusters, in steps
QUANTIZED = [
    (72, 0, 3),
    (4096, 32, 5),
    (14336, 112, 5),
    (40960, 320, 5),
    (9728, 76, 40),
    (14336, 112, 400),
    (40960, 320, 400),
    (14336, 0, 400),
    (8192, 0, 4),
    (8192, 0, 5),
    (40960, 0, 3),
    (2048, 0, 1100),
    (2048, 16, 1100),
]


def products() -> Iterator[tuple[str, str]]:
    for kernel, codebook, rows, columns, tokens, activation, blocks, dtype in PRODUCTS:
        os.environ["PVQ_CUDA_KERNEL"] = kernel
        layer = build_layer([(codebook, rows)], columns, activation, blocks)
        name = (
            f"{kernel} {codebook} {rows} x {columns}, {tokens} tokens, {activation}, {blocks} blocks, {dtype}"
        )
        yield name, describe_difference(*layer.both(random_tokens(tokens, columns, dtype)))
    os.environ["PVQ_CUDA_KERNEL"] = "auto"


def quantization_alone() -> Iterator[tuple[str, str]]:
    for columns, blocks, tokens in QUANTIZED:
        layer = build_layer([("int8", 8)], columns, "a16", blocks)
        x = random_tokens(tokens, columns, torch.float16)
        got, expected = (ops.quantize_activations(part, layer.plan) for part in (x.cuda(), x))
        for ours, theirs in zip(got, expected, strict=True):
            yield f"{tokens} tokens of {columns}, {blocks} blocks", describe_difference(ours.cpu(), theirs)


def packing() -> Iterator[tuple[str, str]]:
    layer = build_layer([("pvq4", 33), ("pvq2", 70), ("int8", 5), ("pvq3", 64)], 72, "a8", 1)
    unpacked = cuda_ops.unpack_linear(layer.on_gpu.weight, layer.plan)
    yield "packed and unpacked", describe_difference(unpacked.cpu(), layer.q)
    for sizes, groups in (((16, 24, 4), 6), ((512, 900, 0), 2)):
        packed, levels, _ = encode_canonical(torch.randn(5, sizes[0] * groups), *sizes)
        got, expected = (
            decode_canonical(part, levels, *sizes, sizes[0] * groups) for part in (packed.cuda(), packed)
        )
        yield f"canonical {sizes}", describe_difference(got.cpu(), expected)


def quantizer() -> Iterator[tuple[str, str]]:
    weight = torch.randn(70, 136, generator=torch.Generator().manual_seed(0))
    factor, hessian, metrics = metric_arguments(136)
    for name in ("pvq2", "pvq3", "pvq4", "int8"):
        scale = quantizer_ops.search_row_scale(weight, name)
        results = []
        for device in ("cuda", "cpu"):
            w, u, h, m, s = (part.to(device) for part in (weight, factor, hessian, metrics, scale))
            found = quantizer_ops.quantize_rows(w, name, s)
            with_feedback = quantizer_ops.feedback_block(w, u, m, name, s)
            moved = [part.clone() for part in found]
            quantizer_ops.descend_block(w, *moved, 0.1 * w, h, m, name, s)
            results.append([part.cpu() for part in (*found, *with_feedback, *moved)])
        for got, expected in zip(*results, strict=True):
            yield f"quantizer {name}", describe_difference(got, expected)
        if name != "int8":
            errors = torch.empty(70), torch.empty(70).cuda()
            addresses = weight.data_ptr(), scale.data_ptr(), 70, 136, 3, errors[0].data_ptr()
            _C.encoding_error(codebook_id(name), *addresses)
            cuda_ops.encoding_error(weight.cuda(), scale.cuda(), codebook_id(name), 3, errors[1])
            yield f"error {name}", describe_difference(errors[1].cpu(), errors[0])


def main() -> int:
    if not (_C.with_cuda and torch.cuda.is_available()):
        sys.exit("no GPU, or a build or a torch without CUDA: name another Python (make sanitize PYTHON=...)")
    cases = wrong = 0
    for part in (products, quantization_alone, packing, quantizer):
        for name, difference in part():
            cases, wrong = cases + 1, wrong + bool(difference)
            if difference:
                print(f"{name}: {difference}", flush=True)
    print(f"{cases} results, {wrong} differ from the CPU's")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
