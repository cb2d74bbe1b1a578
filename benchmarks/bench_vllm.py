# SPDX-License-Identifier: Apache-2.0
"""Tokens per second inside vLLM: a PVQ checkpoint beside its bf16 base, in one run, one process after the other.

    python benchmarks/bench_vllm.py build/demo/base build/demo/pvq [--rounds 2] [--json FILE]

Each engine runs in a process of its own, `--rounds` times in turn (base, pvq, base, pvq, …), so that drift of the
machine hits both.
Decode: greedy tokens per second of all sequences together after a short prompt. Prefill: prompt tokens per second of long
prompts with one token out. The best round counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

from rich.console import Console
from rich.table import Table

WORKER = """
import json, os, sys, time
from pvq_vllm.vllm_compat import patch_distribution_version
patch_distribution_version()
from vllm import LLM, SamplingParams

def main():
    model, cases, prefill_tokens, new_tokens, eager = json.loads(sys.argv[1])
    llm = LLM(model, max_model_len=2048, max_num_seqs=64, enable_prefix_caching=False, enforce_eager=eager,
              max_num_batched_tokens=2048, disable_log_stats=True)
    vocabulary = llm.get_tokenizer().vocab_size
    def prompts(count, length, salt):
        token = lambda i, j: (salt + 7919 * i + 104729 * j) % (vocabulary - 10) + 5
        return [{"prompt_token_ids": [token(i, j) for j in range(length)]} for i in range(count)]
    def run(count, length, new, salt):
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        start = time.perf_counter()
        llm.generate(prompts(count, length, salt), sampling, use_tqdm=False)
        return time.perf_counter() - start
    result = {}
    for batch in cases:
        run(batch, 8, 8, 1)
        short = run(batch, 16, 1, 2)
        longer = min(run(batch, 16, new_tokens, salt) for salt in (3, 4, 5))
        result[f"decode {batch}"] = batch * (new_tokens - 1) / (longer - short)
    run(1, prefill_tokens, 1, 1)
    result["prefill"] = max(2 * prefill_tokens / run(2, prefill_tokens, 1, salt) for salt in (3, 4, 5))
    print("RESULT " + json.dumps(result), flush=True)

if __name__ == "__main__":
    main()
"""


def measure(model: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Run one engine in a fresh process and return its rates."""
    request = json.dumps(
        [
            model,
            [int(b) for b in arguments.batches.split(",") if b],
            arguments.prefill,
            arguments.new_tokens,
            arguments.eager,
        ]
    )
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        **os.environ,
    }
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "build", "bench_vllm_worker.py")
    os.makedirs(os.path.dirname(script), exist_ok=True)
    with open(script, "w") as file:  # a file, because spawned engine processes import the main module again
        file.write(WORKER)
    run = subprocess.run(
        [sys.executable, script, request], env=environment, capture_output=True, text=True, check=False
    )
    line = next((line for line in run.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        sys.exit(f"the engine with {model} failed:\n{run.stderr[-3000:]}")
    return json.loads(line.removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="folders; the first is what the others are compared with")
    parser.add_argument(
        "--batches", default="1,8", help="batch sizes of the decode cases; empty for prefill alone"
    )
    parser.add_argument("--prefill", type=int, default=1024, help="prompt tokens of the prefill case")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--json", help="write the results to this file")
    arguments = parser.parse_args()
    best: dict[str, dict[str, float]] = {model: {} for model in arguments.models}
    for _ in range(arguments.rounds):
        for model in arguments.models:
            for case, rate in measure(model, arguments).items():
                best[model][case] = max(rate, best[model].get(case, 0.0))
                print(f"{os.path.basename(os.path.normpath(model))}: {case} {rate:.0f}", file=sys.stderr)
    table = Table(
        title=f"tokens per second in vLLM, {'eager' if arguments.eager else 'compiled'}, best of {arguments.rounds}"
    )
    table.add_column("case")
    for model in arguments.models:
        table.add_column(os.path.basename(os.path.normpath(model)), justify="right")
    for model in arguments.models[1:]:
        table.add_column(f"{os.path.basename(os.path.normpath(model))} / base", justify="right")
    base = best[arguments.models[0]]
    for case in base:
        rates = [best[model][case] for model in arguments.models]
        table.add_row(case, *[f"{r:.0f}" for r in rates], *[f"{r / base[case]:.2f}" for r in rates[1:]])
    Console(width=110).print(table)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(best, file, indent=1)


if __name__ == "__main__":
    main()
