# SPDX-License-Identifier: Apache-2.0
"""Linear layers on a GPU: packed PVQ weights beside cuBLAS fp16, vLLM's Marlin and Machete int4, fp8 and int8, in one run.

    python benchmarks/bench_linear_cuda.py [--codebooks pvq4,pvq3] [--activations a8,a16] [--check] [--markdown FILE]

Every contender is timed in the same way: a CUDA graph of calls that cycle through so many copies of the weight that none is
left in the L2 cache, the graphs of all contenders replayed in turn, the median of the replays. All get the same fp16
activations; PVQ rotates over the whole width and quantizes them, fp8 quantizes them per token, within the measured time.
int_mm is torch._int_mm alone, without quantization and scales, and so no layer: it is left out of "best". Ratios are the
contender's time over ours. TB/s counts the packed weight; "of copy" is its share of a measured device-to-device copy, read and
write counted. Weights are random: Gaussian for the codes, arbitrary bits for int4, whose speed does not depend on them.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
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

try:
    from pvq_vllm import ops
except ModuleNotFoundError:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from pvq_vllm import ops
from pvq_vllm.codec.format import Codebook
from pvq_vllm.codec.rotation import Rotation, rotation_layout

SHAPES = "4096x4096,6144x4096,28672x4096,4096x14336,8192x8192,57344x8192"
TOKENS = "1,2,4,8,16,32,64,256,2048"
OTHERS = ("fp16", "marlin", "machete", "fp8", "int_mm")
INT4_GROUP = 128
COLD_BYTES = 256e6  # of copies together, several times the 50 MB of L2 of an H100
REPLAY_SECONDS = 1e-3  # of one replay at least, so that the start of the graph does not count
CHECK_ROWS, CHECK_TOKENS = 16, 16
# int8 activations leave about 1% of noise; with 16 bits the rounding of the fp16 result remains.
CHECK_LIMIT = {"a8": 2e-2, "a16": 2e-3}


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
    codes, _ = ops.quantize_rows(gaussian, codebook, torch.full((64,), 2.0**-5))
    return codes.view(-1, codes.shape[-1]).cuda()


class Layer(NamedTuple):
    """A packed layer, and a few of its rows as the checkpoint has them, for the check."""

    packed: ops.PackedLinear
    plan: str
    rows: torch.Tensor
    row_codes: torch.Tensor
    row_scale: torch.Tensor


def make_layer(codebook: str, activation: str, out_features: int, in_features: int) -> Layer:
    blocks, factors = rotation_layout(in_features)
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
    return Layer(packed, plan, rows, codes[rows].cpu(), scale[rows].cpu())


def make_ours(layer: Layer, out_features: int) -> Contender:
    def make_call():
        weight, row_scale = layer.packed.weight.clone(), layer.packed.row_scale.clone()
        row_sum, plan = layer.packed.row_sum, layer.plan
        return lambda x: torch.ops.pvq.linear(x, weight, row_scale, row_sum, None, out_features, plan)

    return contender(layer.packed.weight.numel(), make_call)


def relative_error(layer: Layer, codebook: str, x: torch.Tensor, y: torch.Tensor) -> float:
    """Of some rows and tokens, against float64 arithmetic on the CPU that rotates but does not quantize x."""
    chosen = torch.unique(torch.linspace(0, len(x) - 1, min(len(x), CHECK_TOKENS)).round().long())
    chosen_x, chosen_y = (
        x[chosen.to(x.device)].cpu().double(),
        y[chosen.to(y.device)][:, layer.rows].cpu().double(),
    )
    in_features = x.shape[1]
    blocks, factors = rotation_layout(in_features)
    q = ops.decode_codes(layer.row_codes, codebook).double()
    weight = (q + Codebook(codebook).h / 2) * layer.row_scale.double()[:, None]
    reference = Rotation(0, in_features, blocks, factors).rotate(chosen_x) @ weight.T
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


def make_int_mm(out_features: int, in_features: int) -> Contender:
    quantized: dict[int, torch.Tensor] = {}

    def make_call():
        weight = torch.randint(
            -127, 128, (out_features, in_features), dtype=torch.int8, device="cuda"
        ).t()  # column-major, as cuBLAS wants it

        def call(x):
            if len(x) not in quantized:  # made in the first call, which is not captured
                quantized[len(x)] = torch.randint(-127, 128, x.shape, dtype=torch.int8, device="cuda")
            return torch._int_mm(quantized[len(x)], weight)

        return call

    return contender(out_features * in_features, make_call)


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


def make_fp8(out_features: int, in_features: int) -> Contender:
    from vllm import _custom_ops as vllm_ops

    def make_call():
        weight = torch.empty((out_features, in_features), dtype=torch.float8_e4m3fn, device="cuda")
        for part in weight.split(max(1, (1 << 26) // in_features)):
            gaussian = torch.randn(part.shape, dtype=torch.float16, device="cuda").mul_(100)
            part.copy_(gaussian.clamp_(-448, 448))
        weight = weight.t()
        weight_scale = torch.empty((out_features, 1), device="cuda").uniform_(0.5e-3, 1.5e-3)

        def call(x):
            quantized, scale = vllm_ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
            return vllm_ops.cutlass_scaled_mm(
                quantized, weight, scale_a=scale, scale_b=weight_scale, out_dtype=x.dtype
            )

        return call

    return contender(out_features * in_features, make_call)


MAKERS = {
    "fp16": make_fp16,
    "marlin": make_marlin,
    "machete": make_machete,
    "fp8": make_fp8,
    "int_mm": make_int_mm,
}


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


def prepare(calls: list[Callable], x: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph long enough to be timed, warm, and how many calls are in it: a multiple of the number of copies."""
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
    return graph, num_calls


def measure(
    contenders: dict[str, Contender], x: torch.Tensor, replays: int, notes: set[str]
) -> dict[str, float]:
    """Median seconds of a call of each contender that can run; the others leave a note."""
    graphs = {}
    for name, contestant in contenders.items():
        if name == "int_mm" and len(x) <= 16:
            continue  # torch's own limit
        try:
            graphs[name] = prepare(contestant.calls, x)
        except Exception as error:
            notes.add(f"{name}, {len(x)} tokens x {x.shape[1]}: {brief(error)}")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
    for _ in range(replays):  # queued without waiting, so that no launch is on the clock
        for name, (graph, _) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(start.elapsed_time(end) for start, end in events[name]) / 1e3 / num_calls
        for name, (_, num_calls) in graphs.items()
    }


def brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


# ---- the report -----------------------------------------------------------------------------------------------------------


def markdown_table(headers: list[str], rows: list[list[str]]) -> str:
    """A table that reads well in a terminal, too."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    lines = [headers, ["-" * (width - 1) + ":" for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def ratios(seconds: dict[str, float], name: str) -> dict[str, float]:
    """Time of each contender over that of `name`; "int4" is the better of Marlin and Machete, "best" of all layers."""
    ours = seconds[name]
    found = {other: seconds[other] / ours for other in OTHERS if other in seconds}
    for group, members in {
        "int4": ("marlin", "machete"),
        "best": ("fp16", "marlin", "machete", "fp8"),
    }.items():
        if known := [found[member] for member in members if member in found]:
            found[group] = min(known)
    return found


def report(cases: list[dict], names: list[str], bandwidth: float) -> str:
    columns = (*OTHERS, "int4", "best")
    parts = ["Microseconds of a call:", ""]
    kernels = [*names, *(other for other in OTHERS if any(other in case["seconds"] for case in cases))]
    rows = [
        [case["shape"], str(case["tokens"])] + [number(_us(case, kernel), 1) for kernel in kernels]
        for case in cases
    ]
    parts += [markdown_table(["out x in", "tokens", *kernels], rows), ""]
    for name in names:
        known = [case for case in cases if name in case["seconds"]]
        rows = []
        for case in known:
            seconds, compared = case["seconds"][name], ratios(case["seconds"], name)
            rate = case["weight_bytes"][name] / seconds
            rows.append(
                [
                    case["shape"],
                    str(case["tokens"]),
                    number(seconds * 1e6, 1),
                    number(rate / 1e12, 2),
                    f"{100 * rate / bandwidth:.0f}%",
                    number(_operations(case) / seconds / 1e12, 0 if case["tokens"] >= 64 else 1),
                    *[number(compared.get(column), 2) for column in columns],
                ]
            )
        headers = ["out x in", "tokens", "us", "TB/s", "of copy", "TOPS", *columns]
        parts += [f"{name}: time of the others over ours (int4: the better one; best: of all layers):", ""]
        parts += [markdown_table(headers, rows), "", f"{name}: geometric mean over the shapes (worst):", ""]
        rows = []
        for tokens in sorted({case["tokens"] for case in known}):
            compared = [ratios(case["seconds"], name) for case in known if case["tokens"] == tokens]
            rows.append([str(tokens), *[_mean_and_worst(compared, column) for column in columns]])
        parts += [markdown_table(["tokens", *columns], rows), ""]
    parts += _between_ours(cases, names)
    return "\n".join(parts)


def _us(case: dict, kernel: str) -> float | None:
    return case["seconds"][kernel] * 1e6 if kernel in case["seconds"] else None


def _operations(case: dict) -> int:
    return 2 * case["tokens"] * case["out_features"] * case["in_features"]


def _mean_and_worst(compared: list[dict[str, float]], column: str) -> str:
    values = [entry[column] for entry in compared if column in entry]
    return f"{statistics.geometric_mean(values):.2f} ({min(values):.2f})" if values else ""


def _between_ours(cases: list[dict], names: list[str]) -> list[str]:
    """What fewer bits gain and 16-bit activations cost: every variant of ours over the first one."""
    if len(names) < 2:
        return []
    rows = []
    for case in cases:
        if names[0] in case["seconds"]:
            first = case["seconds"][names[0]]
            values = [
                number(first / case["seconds"][n] if n in case["seconds"] else None, 2) for n in names[1:]
            ]
            rows.append([case["shape"], str(case["tokens"]), *values])
    return [
        f"Time of {names[0]} over that of:",
        "",
        markdown_table(["out x in", "tokens", *names[1:]], rows),
        "",
    ]


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
    parser.add_argument("--activations", default="a8", help="a8, a16 or both (default: %(default)s)")
    parser.add_argument("--without", default="", help="contenders to leave out: " + ", ".join(OTHERS))
    parser.add_argument("--replays", type=int, default=21, help="of each graph (default: %(default)s)")
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
    if any(len(shape) != 2 for shape in options.shapes):
        parser.error("--shapes: each is out_features x in_features, such as 4096x14336")
    options.codebooks, options.activations = options.codebooks.split(","), options.activations.split(",")
    options.without = set(filter(None, options.without.split(",")))
    return options


def make_contenders(
    options: argparse.Namespace, shape: tuple[int, int], notes: set[str]
) -> tuple[dict[str, Contender], dict[str, tuple[str, str, Layer]]]:
    """The contenders of a shape, ours first, and our layers with codebook and activation."""
    contenders, layers = {}, {}
    for codebook in options.codebooks:
        for activation in options.activations:
            layer = make_layer(codebook, activation, *shape)
            layers[f"{codebook} {activation}"] = (codebook, activation, layer)
            contenders[f"{codebook} {activation}"] = make_ours(layer, shape[0])
    for other in OTHERS:
        if other not in options.without:
            try:
                contenders[other] = MAKERS[other](*shape)
            except Exception as error:
                notes.add(f"{other}: {brief(error)}")
    return contenders, layers


def check(layers: dict[str, tuple[str, str, Layer]], shape: tuple[int, int], tokens: list[int]) -> bool:
    """Print the relative errors of every token count and return whether all are within the limit."""
    good = True
    for name, (codebook, activation, layer) in layers.items():
        errors = []
        for count in tokens:
            x = torch.randn(count, shape[1], device="cuda").half()
            packed = layer.packed
            y = torch.ops.pvq.linear(
                x, packed.weight, packed.row_scale, packed.row_sum, None, shape[0], layer.plan
            )
            errors.append(relative_error(layer, codebook, x, y))
        right = all(error <= CHECK_LIMIT[activation] for error in errors)  # false for a NaN
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
        f"{environment['vllm']}; device-to-device copy {bandwidth / 1e12:.2f} TB/s (read and write)"
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
                        "seconds": measure(contenders, x, options.replays, notes),
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
            "cases": cases,
            "not_measured": sorted(notes),
        }
        Path(options.json).write_text(json.dumps(results, indent=1))
    if not good:
        sys.exit("a result is wrong: see the lines that begin with check")


if __name__ == "__main__":
    main()
