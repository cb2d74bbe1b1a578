# SPDX-License-Identifier: Apache-2.0
"""What each `pvq quantize --rotation` costs at run time, on the CPU: the linear layers of one decoder layer.

    python benchmarks/bench_rotation.py [--model smollm2] [--tokens 1,8,64,512] [--threads N] [--json FILE]

Fused as vLLM fuses them (qkv, o, gate and up, down), random pvq4 weights, a8. Layers are called in turn on copies that together
exceed the caches; the choices alternate call by call. Reported is the shortest pass of each, which a busy machine disturbs least.
"""

import argparse
import json
import time

import torch
from rich.console import Console
from rich.table import Table

from pvq_vllm import ops, quantizer_ops
from pvq_vllm.codec.rotation import rotation_layout

# [out_features, in_features] of the fused layers; the last one is down.
MODELS = {
    "smollm2": ((960, 576), (576, 576), (3072, 576), (576, 1536)),  # SmolLM2-135M
    "llama-1b": ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)),  # Llama-3.2-1B
}
BLOCKS = (64, 128, 256, 512, 1024)
ROTATIONS = ("none", "residual", *(f"block:{columns}" for columns in BLOCKS), "online")
COPIES_BYTES = 128 << 20
CODEBOOK = "pvq4"


def layout(rotation: str, is_down: bool, in_features: int) -> tuple[int, list[int]]:
    """Blocks and factors of the rotation at run time, as offline_quant.plan chooses them."""
    if rotation == "none" or (rotation == "residual" and not is_down):
        return 0, []
    return rotation_layout(in_features, 1, int(rotation[6:]) if rotation.startswith("block:") else None)


def make_layers(shapes: tuple[tuple[int, int], ...]) -> dict[str, list[tuple]]:
    """For each rotation the layers as arguments of the operator; the packed weights are shared."""
    layers: dict[str, list[tuple]] = {rotation: [] for rotation in ROTATIONS}
    for index, (out_features, in_features) in enumerate(shapes):
        weight = torch.randn(64, in_features)  # the kernels do not look at values
        codes, _ = quantizer_ops.quantize_rows(
            weight, CODEBOOK, quantizer_ops.search_row_scale(weight, CODEBOOK)
        )
        codes = codes.repeat(-(-out_features // 64), 1, 1)[:out_features].contiguous()
        scale = torch.full((out_features,), 1e-3).half()
        for rotation in ROTATIONS:
            blocks, factors = layout(rotation, index == len(shapes) - 1, in_features)
            plan = ops.make_plan(
                [(CODEBOOK, out_features)], in_features, rotation_blocks=blocks, factors=factors or None
            )
            packed = ops.pack_linear([codes], scale, plan)
            layers[rotation].append((*packed, None, out_features, plan))
    return layers


def run(layers: list[tuple], inputs: list[torch.Tensor]) -> float:
    """Seconds of one pass through the layers."""
    start = time.perf_counter()
    for (weight, scale, sums, bias, rows, plan), x in zip(layers, inputs, strict=True):
        torch.ops.pvq.linear(x, weight, scale, sums, bias, rows, plan)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--tokens", default="1,8,64,512")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="per number of tokens")
    parser.add_argument("--json", help="write the results to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = MODELS[options.model]
    bytes_per_pass = sum(rows * columns for rows, columns in shapes) // 2
    copies = [
        make_layers(shapes) for _ in range(max(1, min(40, COPIES_BYTES // len(ROTATIONS) // bytes_per_pass)))
    ]
    results = []
    for tokens in map(int, options.tokens.split(",")):
        inputs = [torch.randn(tokens, columns, dtype=torch.bfloat16) for _, columns in shapes]
        times: dict[str, list[float]] = {rotation: [] for rotation in ROTATIONS}
        begin, index = time.perf_counter(), 0
        while time.perf_counter() - begin < options.seconds or index < 5:
            for rotation in ROTATIONS:
                times[rotation].append(run(copies[index % len(copies)][rotation], inputs))
            index += 1
        best = {rotation: min(values) * 1e6 for rotation, values in times.items()}
        results.append({"tokens": tokens, "microseconds": best})
    table = Table(
        "rotation",
        *(f"{result['tokens']} tokens" for result in results),
        title=f"{options.model}, {options.threads} threads: µs a decoder layer, and over none",
    )
    for rotation in ROTATIONS:
        times_of = [(result["microseconds"][rotation], result["microseconds"]["none"]) for result in results]
        table.add_row(rotation, *(f"{value:.0f} ({value / none:.2f})" for value, none in times_of))
    Console().print(table)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {"model": options.model, "threads": options.threads, "results": results}, file, indent=1
            )


if __name__ == "__main__":
    main()
