# SPDX-License-Identifier: Apache-2.0
"""Linear layers on the CPU: packed PVQ weights beside torch's bf16 linear, in one run.

    python benchmarks/bench_linear.py [--codebooks pvq4,pvq3,pvq2,int8] [--tokens 1,4,32,512] [--threads N] [--json FILE]

The shapes are those of Llama-3.2-1B: fused qkv, o, fused gate and up, down. Both sides rotate between copies of the layer that
together exceed the caches as far as --cold-bytes allows, alternate call by call, and report the median. Ratios are the result:
the machine's own speed cancels. Weight bytes per second use the packed size for PVQ; the last column is the share of a
measured read of the same memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from pvq_vllm import ops, quantizer_ops
from pvq_vllm.codec.rotation import rotation_layout

SHAPES = {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)}


def make_layer(name: str, out_features: int, in_features: int, activation: str):
    """A packed layer of random weights and its plan."""
    blocks, factors = rotation_layout(in_features)
    weight = torch.randn(
        min(out_features, 64), in_features
    )  # coding 64 rows is enough: the kernels do not look at values
    codes, _ = quantizer_ops.quantize_rows(weight, name, quantizer_ops.search_row_scale(weight, name))
    codes = codes.repeat(out_features // codes.shape[0], 1, 1)
    plan = ops.make_plan(
        [(name, out_features)], in_features, rotation_blocks=blocks, factors=factors, activation=activation
    )
    return ops.pack_linear([codes], torch.full((out_features,), 1e-3).half(), plan), plan


def read_bandwidth(num_bytes: int) -> float:
    """Bytes per second of a sum over a buffer of `num_bytes`, the best of several passes."""
    buffer = torch.ones(num_bytes // 8, dtype=torch.int64)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - start)
    return num_bytes / best


def median_times(first, second, seconds: float) -> tuple[float, float]:
    """Median seconds of two alternating calls; each takes the number of the copy it shall use."""
    times: tuple[list[float], list[float]] = ([], [])
    for call in (first, second):
        call(0)
    begin, index = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds or index < 5:
        for record, call in zip(times, (first, second), strict=True):
            start = time.perf_counter()
            call(index)
            record.append(time.perf_counter() - start)
        index += 1
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codebooks", default="pvq4,pvq3,pvq2,int8")
    parser.add_argument("--tokens", default="1,4,32,512")
    parser.add_argument("--activation", default="a8", help="a8, a16 or pvq:D,K (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="per case")
    parser.add_argument(
        "--cold-bytes", type=float, default=5e8, help="total size of the bf16 copies that are rotated"
    )
    parser.add_argument("--json", help="write the results to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    bandwidth = read_bandwidth(1 << 29)
    table = Table(
        title=f"{arguments.threads} threads, {ops.cpu_isa()}, {arguments.activation}, read {bandwidth / 1e9:.1f} GB/s"
    )
    for column in (
        "layer",
        "out x in",
        "codebook",
        "tokens",
        "bf16 us",
        "pvq us",
        "ratio",
        "bf16 GB/s",
        "pvq GB/s",
        "of read",
    ):
        table.add_column(column, justify="left" if column in ("layer", "codebook") else "right")
    results = []
    for layer, (out_features, in_features) in SHAPES.items():
        copies = max(2, int(arguments.cold_bytes / (2 * out_features * in_features)))
        dense = [torch.randn(out_features, in_features).bfloat16() for _ in range(copies)]
        for name in arguments.codebooks.split(","):
            packed, plan = make_layer(name, out_features, in_features, arguments.activation)
            pool = [
                ops.PackedLinear(packed.weight.clone(), packed.row_scale, packed.row_sum)
                for _ in range(copies)
            ]
            for tokens in (int(t) for t in arguments.tokens.split(",")):
                x = torch.randn(tokens, in_features).bfloat16()
                base, ours = median_times(
                    lambda i, x=x, dense=dense: torch.nn.functional.linear(x, dense[i % len(dense)]),
                    lambda i, x=x, pool=pool, plan=plan, n=out_features: ops.linear(
                        x, pool[i % len(pool)], None, n, plan
                    ),
                    arguments.seconds,
                )
                packed_bytes, dense_bytes = packed.weight.numel(), 2 * out_features * in_features
                results.append(
                    {
                        "layer": layer, "out_features": out_features, "in_features": in_features, "codebook": name,
                        "tokens": tokens, "bf16_us": base * 1e6, "pvq_us": ours * 1e6, "ratio": base / ours,
                        "bf16_bytes_per_s": dense_bytes / base, "pvq_bytes_per_s": packed_bytes / ours,
                    }
                )  # fmt: skip
                table.add_row(
                    layer, f"{out_features} x {in_features}", name, str(tokens), f"{base * 1e6:.0f}", f"{ours * 1e6:.0f}",
                    f"{base / ours:.2f}", f"{dense_bytes / base / 1e9:.1f}", f"{packed_bytes / ours / 1e9:.1f}",
                    f"{100 * packed_bytes / ours / bandwidth:.0f}%",
                )  # fmt: skip
    Console(width=120).print(table)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(
                {
                    "threads": arguments.threads,
                    "isa": ops.cpu_isa(),
                    "read_bytes_per_s": bandwidth,
                    "cases": results,
                },
                file,
            )


if __name__ == "__main__":
    main()
