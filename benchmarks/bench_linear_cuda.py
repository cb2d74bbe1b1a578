# SPDX-License-Identifier: Apache-2.0
"""Linear layers on a GPU: packed PVQ weights beside cuBLAS fp16 and vLLM's Marlin and Machete int4, fp8 and int8, in one run.

    python benchmarks/bench_linear_cuda.py [--codebooks pvq4,pvq3] [--activations a8,a16] [--check] [--markdown FILE]

Every contender is timed in the same way: a CUDA graph of calls that cycle through so many copies of the weight that none is
left in the L2 cache, some replays after the GPU has rested for --rest seconds, twice; the median. A rest, because a GPU at its
limit of power lowers its clock, and late, after some tenths of a second: contenders that run in turn without a break (--rest 0)
are each measured at a clock that the ones before have earned. --settle: to be measured under a load of its own. All get the
same fp16 activations; PVQ rotates and quantizes them (--rotations), fp8 and int8 (CUTLASS, a scale for each token and each row)
quantize them, within the measured time. Ratios are the contender's time over ours. TB/s counts the packed weight; "of copy" is
its share of a measured device-to-device copy, read and write counted. Weights are random: Gaussian for the codes and for 8 bits,
arbitrary bits for int4, whose speed does not depend on them.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import itertools
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from linear_contenders import MAKERS, Contender, Layer, is_rotation, make_layer, make_ours, relative_error
from linear_report import OTHERS, report

SHAPES = "4096x4096,6144x4096,28672x4096,4096x14336,8192x8192,57344x8192"
TOKENS = "1,2,4,8,16,32,64,256,2048"
REPLAY_SECONDS = 1e-3  # of one replay at least, so that the start of the graph does not count
ROUNDS = 2  # with breaks; without, as many as replays
# int8 activations leave about 1% of noise; with 16 bits the rounding of the fp16 result remains.
CHECK_LIMIT = {"a8": 2e-2, "a16": 2e-3}


# ---- timing ---------------------------------------------------------------------------------------------------------------


def elapsed_seconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def copy_bandwidth(num_bytes: int = 1 << 30) -> float:
    """Bytes read and written a second by a copy within the GPU's memory, the median of several."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device="cuda").random_(0, 256)
    target = torch.empty_like(source)
    times = [elapsed_seconds(lambda: target.copy_(source)) for _ in range(25)]
    return 2 * num_bytes / statistics.median(times[5:])


def capture(calls: list[Callable], x: torch.Tensor, num_calls: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(num_calls):
            calls[index % len(calls)](x)
    return graph


class Prepared(NamedTuple):
    """A graph long enough to be timed, warm; its calls are a multiple of the number of copies."""

    graph: torch.cuda.CUDAGraph
    num_calls: int
    seconds: float  # of a replay, about


def prepare(calls: list[Callable], x: torch.Tensor) -> Prepared:
    for call in calls[:2]:
        call(x)
    torch.cuda.synchronize()
    num_calls = len(calls)
    graph = capture(calls, x, num_calls)
    graph.replay()
    seconds = elapsed_seconds(graph.replay)
    rounds = math.ceil(REPLAY_SECONDS / seconds)
    if rounds > 1:
        num_calls *= rounds
        graph = capture(calls, x, num_calls)
        graph.replay()
    torch.cuda.synchronize()
    return Prepared(graph, num_calls, seconds * rounds)


def measure(
    contenders: dict[str, Contender],
    x: torch.Tensor,
    *,
    replays: int,
    rest: float,
    settle: float,
    notes: set[str],
) -> dict[str, float]:
    """Median seconds of a call of each contender that can run; the others leave a note."""
    prepared: dict[str, Prepared] = {}
    for name, contestant in contenders.items():
        try:
            prepared[name] = prepare(contestant.calls, x)
        except Exception as error:
            notes.add(f"{name}, {len(x)} tokens x {x.shape[1]}: {brief(error)}")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in prepared}
    rounds = ROUNDS if rest > 0 or settle > 0 else replays
    for _ in range(rounds):
        for name, (graph, _, seconds) in prepared.items():
            if rest > 0:
                torch.cuda.synchronize()
                time.sleep(rest)
            # Queued without waiting, so that no launch is on the clock: after a break one replay goes before.
            for _ in range(max(math.ceil(settle / seconds), int(rest > 0))):
                graph.replay()
            for _ in range(math.ceil(replays / rounds)):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(start.elapsed_time(end) for start, end in events[name]) / 1e3 / num_calls
        for name, (_, num_calls, _) in prepared.items()
    }


def brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def versions() -> dict[str, str]:
    def distribution(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "absent"

    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": torch.__version__,
        "vllm": distribution("vllm"),
    }


# ---- the run --------------------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", default=SHAPES, help="out x in, separated by commas (default: %(default)s)"
    )
    parser.add_argument("--tokens", default=TOKENS, help="default: %(default)s")
    parser.add_argument(
        "--codebooks", default="pvq4,pvq3", help="pvq4, pvq3, pvq2, int8 (default: %(default)s)"
    )
    parser.add_argument("--activations", default="a8,a16", help="a8, a16 or both (default: %(default)s)")
    parser.add_argument(
        "--rotations",
        default="block:128,residual:128",
        help="online: of every input; residual: only of the MLPs' inner activations; block:N and residual:N: the same in "
        "blocks of at most N columns (default: %(default)s)",
    )
    parser.add_argument("--without", default="", help="contenders to leave out: " + ", ".join(OTHERS))
    parser.add_argument("--replays", type=int, default=14, help="of each graph (default: %(default)s)")
    for name, seconds, what in (
        ("--rest", 0.05, "that the GPU rests before each contender"),
        ("--settle", 0.0, "that each contender runs alone before it is timed"),
    ):
        parser.add_argument(
            name, type=float, default=seconds, metavar="SECONDS", help=f"{what} (default: %(default)s)"
        )
    parser.add_argument(
        "--check", action="store_true", help="compare some rows with float64 first; status 1 if wrong"
    )
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--markdown", help="write the tables to this file")
    options = parser.parse_args(arguments)
    try:
        options.shapes = [tuple(int(n) for n in shape.split("x")) for shape in options.shapes.split(",")]
        options.tokens = [int(n) for n in options.tokens.split(",")]
    except ValueError:
        parser.error("--shapes looks like 4096x4096,6144x4096 and --tokens like 1,2,4")
    if options.replays < 1 or not 0 <= options.rest < math.inf or not 0 <= options.settle < math.inf:
        parser.error("--replays is at least 1, and --rest and --settle are seconds, 0 or more")
    if any(len(shape) != 2 for shape in options.shapes):
        parser.error("--shapes: each is out_features x in_features, such as 4096x14336")
    options.codebooks, options.activations = options.codebooks.split(","), options.activations.split(",")
    options.rotations = options.rotations.split(",")
    if unknown := [rotation for rotation in options.rotations if not is_rotation(rotation)]:
        parser.error(
            f"--rotations: unknown {', '.join(unknown)}; known are online, residual, block:N, residual:N"
        )
    options.without = set(filter(None, options.without.split(",")))
    if unknown := sorted(options.without - set(OTHERS)):
        parser.error(f"--without: unknown {', '.join(unknown)}; known are {', '.join(OTHERS)}")
    return options


def make_contenders(
    options: argparse.Namespace, shape: tuple[int, int], notes: set[str]
) -> tuple[dict[str, Contender], dict[str, Layer]]:
    """The contenders of a shape, ours first, and our layers by name."""
    contenders, layers = {}, {}
    for rotation, codebook, activation in itertools.product(
        options.rotations, options.codebooks, options.activations
    ):
        name = f"{codebook} {activation}" + ("" if rotation == "online" else f" {rotation}")
        layers[name] = make_layer(codebook, activation, rotation, *shape)
        contenders[name] = make_ours(layers[name], shape[0])
    for other in OTHERS:
        if other not in options.without:
            try:
                contenders[other] = MAKERS[other](*shape)
            except Exception as error:
                notes.add(f"{other}: {brief(error)}")
    return contenders, layers


def check(layers: dict[str, Layer], shape: tuple[int, int], tokens: list[int]) -> bool:
    """Print the relative errors of every token count and return whether all are within the limit."""
    good = True
    for name, layer in layers.items():
        errors = []
        for count in tokens:
            x = torch.randn(count, shape[1], device="cuda").half()
            packed = layer.packed
            y = torch.ops.pvq.linear(
                x, packed.weight, packed.row_scale, packed.row_sum, None, shape[0], layer.plan
            )
            errors.append(relative_error(layer, x, y))
        right = all(error <= CHECK_LIMIT[layer.activation] for error in errors)  # false for a NaN
        good &= right
        listed = " ".join(f"{count}:{error:.1e}" for count, error in zip(tokens, errors, strict=True))
        print(f"check {shape[0]}x{shape[1]} {name}: {'right' if right else 'WRONG'}, {listed}", flush=True)
    return good


@torch.inference_mode()
def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("torch finds no GPU; bench_linear.py measures on the CPU")
    torch.manual_seed(0)
    begin = time.perf_counter()
    environment, bandwidth = versions(), copy_bandwidth()
    title = (
        f"{environment['gpu']}, driver {environment['driver']}, torch {environment['torch']}, vLLM "
        f"{environment['vllm']}; device-to-device copy {bandwidth / 1e12:.2f} TB/s (read and write); "
        f"{options.rest:g} s of rest and {options.settle:g} s of load before each contender"
    )
    print(title, flush=True)
    cases, names, notes, good = [], [], set(), True
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for shape in options.shapes:
            contenders, layers = make_contenders(options, shape, notes)
            names = list(layers)
            gc.collect()
            gc.freeze()  # or each capture may search all of vLLM's objects for garbage
            if options.check:
                good &= check(layers, shape, options.tokens)
            for tokens in options.tokens:
                x = torch.randn(tokens, shape[1], device="cuda").half()
                cases.append(
                    {
                        "shape": f"{shape[0]}x{shape[1]}",
                        "out_features": shape[0],
                        "in_features": shape[1],
                        "tokens": tokens,
                        "seconds": measure(
                            contenders,
                            x,
                            replays=options.replays,
                            rest=options.rest,
                            settle=options.settle,
                            notes=notes,
                        ),
                        "weight_bytes": {name: entry.weight_bytes for name, entry in contenders.items()},
                    }
                )
                torch.cuda.empty_cache()  # the graphs' own pools
            contenders.clear()
            layers.clear()
            torch.cuda.empty_cache()
            print(
                f"{shape[0]}x{shape[1]} done after {time.perf_counter() - begin:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    except KeyboardInterrupt:
        notes.add("the run was interrupted: shapes or token counts are missing")
    text = report(cases, names, bandwidth) + "".join(f"\nnot measured: {note}" for note in sorted(notes))
    print(f"\n{text}\n\n{time.perf_counter() - begin:.0f} s in all")
    if options.markdown:
        Path(options.markdown).write_text(f"{title}\n\n{text}\n")
    if options.json:
        results = {
            **environment,
            "copy_bytes_per_s": bandwidth,
            "rest_s": options.rest,
            "settle_s": options.settle,
            "cases": cases,
            "not_measured": sorted(notes),
        }
        Path(options.json).write_text(json.dumps(results, indent=1))
    if not good:
        sys.exit("a result is wrong: see the lines that begin with check")


if __name__ == "__main__":
    main()
