# SPDX-License-Identifier: Apache-2.0
"""Tokens per second inside vLLM on a GPU, dummy weights in the shape of an 8B Llama: fp16, int4, fp8 and PVQ in one run.

    python benchmarks/bench_vllm_cuda.py [--models pvq4-block128,int4] [--profile] [--json FILE] [--markdown FILE]

Each model runs in a process of its own, with torch.compile and CUDA graphs. int4 is compressed-tensors W4A16 in groups of 128
(Machete on Hopper), fp8 is compressed-tensors W8A8 with per-token activations; both get random weights, because vLLM's dummy
loader leaves them as zeros or whatever was in memory. lm_head and embedding are fp16 in all models (--pvq-head int8 for ours).
PVQ models rotate at run time what their suffix says: pvq4-block128 every input in blocks of 128 columns, as `pvq quantize` does
by default, pvq4 over its whole width, pvq4-residual the MLP's inner activation alone, pvq4-residual128 that in blocks.
Decode: greedy tokens per second of all sequences together, the prefill subtracted. Prefill: prompt tokens per second of
--prefill COUNTxLENGTH prompts with one token out. The best of --rounds counts. --profile adds what the time per step consists of.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vllm_models import KNOWN_MODELS, engine_arguments, is_known, write_config
from vllm_report import report, summary

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).resolve().with_name("vllm_worker.py")
MODELS = "pvq4-block128,int4,fp16,fp8,pvq3-block128"

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, in which the worker registers "pvq"
    "TOKENIZERS_PARALLELISM": "false",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", default=MODELS, help=f"separated by commas, of {KNOWN_MODELS} (default: %(default)s)"
    )
    parser.add_argument("--batches", default="1,16,64", help="of the decode cases; may be empty")
    parser.add_argument(
        "--prefill", default="8x2048", help="prompts x tokens, or empty (default: %(default)s)"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=128, help="of the decode cases (default: %(default)s)"
    )
    parser.add_argument("--layers", type=int, default=32, help="fewer for a quick run")
    parser.add_argument("--activation", default="a8", choices=("a8", "a16"), help="of the PVQ models")
    parser.add_argument(
        "--pvq-head", default="none", choices=("none", "int8", "pvq4"), help="codebook of lm_head"
    )
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument(
        "--profile",
        nargs="?",
        const="1",
        default="",
        metavar="BATCHES",
        help="GPU time by kernel of a decode step at these batch sizes, of --batches (without a value: 1)",
    )
    parser.add_argument(
        "--llm", default="{}", metavar="JSON", help="further arguments of vllm.LLM, for all models"
    )
    parser.add_argument(
        "--timeout", type=float, default=200, help="seconds for a model (default: %(default)s)"
    )
    parser.add_argument("--logs", help="folder for the engines' logs (default: a temporary one)")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--markdown", help="write the tables to this file")
    options = parser.parse_args(arguments)
    try:
        options.batches = [int(n) for n in options.batches.split(",") if n]
        options.profile = [int(n) for n in options.profile.split(",") if n]
        options.prefill = [int(n) for n in options.prefill.split("x") if n]
        json.loads(options.llm)
    except ValueError as error:
        parser.error(f"--batches, --prefill, --profile or --llm: {error}")
    if len(options.prefill) not in (0, 2):
        parser.error("--prefill is prompts x tokens, such as 8x2048")
    if not set(options.profile) <= set(options.batches):
        parser.error("--profile takes batch sizes that are in --batches")
    options.models = options.models.split(",")
    if unknown := [name for name in options.models if not is_known(name)]:
        parser.error(f"--models: unknown {', '.join(unknown)}; known are {KNOWN_MODELS}")
    return options


def measure(model: str, options: argparse.Namespace, folder: Path) -> dict | None:
    """Run one model in a fresh process. What it measured before it failed counts, too; None if nothing."""
    write_config(folder / model, model, options)
    request_file, result_file, log_file = (folder / f"{model}.{end}" for end in ("request", "result", "log"))
    result_file.unlink(missing_ok=True)
    request = {
        "name": model,
        "engine": engine_arguments(folder / model, options),
        "result": str(result_file),
        **{key: getattr(options, key) for key in ("batches", "prefill", "new_tokens", "rounds", "profile")},
    }
    request_file.write_text(json.dumps(request))
    environment = ENVIRONMENT | os.environ
    if list((ROOT / "pvq_vllm").glob("_C*.so")):  # built in the checkout, perhaps not installed
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(WORKER), str(request_file)]
    begin = time.perf_counter()
    with log_file.open("w") as log:
        try:
            status = subprocess.run(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=options.timeout
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"none after {options.timeout:.0f} s"
    result = json.loads(result_file.read_text()) if result_file.exists() else None
    if not (result and result["complete"]):  # an engine that fails while it shuts down has done its work
        lines = log_file.read_text(errors="replace").splitlines()
        print(f"{model} failed (exit status {status}); the last lines of its log:", file=sys.stderr)
        print("\n".join(f"  {line[:400]}" for line in lines[-40:]), file=sys.stderr, flush=True)
    for line in log_file.read_text(errors="replace").splitlines():
        if "Kernel for" in line or "attention backend" in line.lower():
            print(f"{model}: {line.strip()[-150:]}", file=sys.stderr)
    print(summary(model, result, time.perf_counter() - begin), flush=True)  # the run may be cut off later
    return result


def title(results: dict[str, dict], options: argparse.Namespace) -> str:
    first = next(iter(results.values()))
    prefill = "x".join(str(n) for n in options.prefill)
    return (
        f"{first.get('gpu', 'CPU')}, torch {first['torch']}, vLLM {first['vllm']}; {options.layers} layers, {options.dtype}, "
        f"{'eager' if options.eager else 'torch.compile and CUDA graphs'}; PVQ: {options.activation}, lm_head "
        f"{'fp16' if options.pvq_head == 'none' else options.pvq_head}; prefill {prefill or 'not measured'} tokens; best of "
        f"{options.rounds}"
    )


def main() -> None:
    options = parse()
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.logs or temporary).resolve()
        for model in options.models:
            if result := measure(model, options, folder):
                results[model] = result
    if not results:
        sys.exit("no model could be measured")
    text = f"{title(results, options)}\n\n{report(results)}"
    print(text)
    if options.markdown:
        Path(options.markdown).write_text(text)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))
    if len(results) < len(options.models) or not all(result["complete"] for result in results.values()):
        sys.exit("not everything could be measured, see above")


if __name__ == "__main__":
    main()
