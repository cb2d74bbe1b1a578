# SPDX-License-Identifier: Apache-2.0
"""What does `pvq serve` cost beside `vllm serve`? Both serve the same checkpoint at the same time and are loaded in turn.

    python benchmarks/bench_server.py build/demo/pvq [--rounds 30] [--eager] [--json FILE]

A round sends the same requests first to one and then to the other, and the other way round in the next one, so that
drift of the machine hits both. Throughput: output tokens per second with `--concurrency` requests at once. TTFT: from
sending a request to the first byte of its stream, one request at a time. Shown are medians over rounds, and the median
of the rounds' own ratios with its 95% confidence interval (bootstrap over rounds).
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.table import Table

SERVERS = {"vllm serve": "pvq_vllm.vllm_launcher", "pvq serve": "pvq_vllm.cli"}
START_TIMEOUT_S = 600


@contextlib.contextmanager
def served(name: str, model: str, flags: list[str], folder: Path) -> Iterator[str]:
    """Start one server for the duration of the context; yield its URL once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        SERVERS[name],
        "serve",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--served-model-name", "m", "--max-model-len", "512", "--max-num-seqs", "16", *flags]
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    log_file = folder / f"{name.replace(' ', '-')}.log"
    with open(log_file, "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        if not answers(url, process):
            sys.exit(f"{name} did not start; its output ends with:\n{log_file.read_text()[-4000:]}")
        yield url
    finally:
        process.terminate()
        process.wait(120)


def answers(url: str, process: subprocess.Popen) -> bool:
    """Wait until the server at ``url`` lists its model; return False if it ended first or took too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"{url}/v1/models", timeout=10)
            return True
        time.sleep(0.5)
    return False


async def ask(session: aiohttp.ClientSession, url: str, prompt: list[int], tokens: int) -> float:
    """Stream one completion; return milliseconds to its first byte."""
    body = {
        "model": "m",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    start = time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        await answer.content.readany()
        first_ms = (time.perf_counter() - start) * 1e3
        await answer.read()
    return first_ms


async def measure(
    session: aiohttp.ClientSession, url: str, seed: int, concurrency: int, tokens: int
) -> dict[str, float]:
    """Return throughput (tokens/s) and median TTFT (ms) of one round."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(5, 400) for _ in range(32)] for _ in range(2 * concurrency + 6)]
    ttft_ms = [await ask(session, url, prompt, 2) for prompt in prompts[:6]]
    start = time.perf_counter()
    load = prompts[6:]
    for half in (load[:concurrency], load[concurrency:]):
        await asyncio.gather(*[ask(session, url, prompt, tokens) for prompt in half])
    rate = len(load) * tokens / (time.perf_counter() - start)
    return {"tokens/s": rate, "TTFT ms": statistics.median(ttft_ms)}


async def compare(
    urls: dict[str, str], rounds: int, concurrency: int, tokens: int
) -> dict[str, list[dict[str, float]]]:
    """Return the measurements of all rounds by server."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in urls}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        for url in urls.values():
            await measure(session, url, 10**6, concurrency, tokens)
        for number in range(rounds):
            for name in list(urls) if number % 2 else list(urls)[::-1]:
                results[name].append(await measure(session, urls[name], number, concurrency, tokens))
    return results


def interval(values: list[float]) -> tuple[float, float, float]:
    """Return the median of ``values`` and the 95% confidence interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return statistics.median(values), medians[50], medians[1949]


def main() -> None:
    """Run the comparison and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="of each answer; fewer make shorter rounds")
    parser.add_argument("--eager", action="store_true", help="without torch.compile, which takes minutes")
    parser.add_argument("--json", type=Path, help="write all rounds to this file")
    options = parser.parse_args()
    flags = ["--enforce-eager"] if options.eager else []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        urls = {}
        for name in SERVERS:  # one after the other: two engines that start at once fight for the cores
            urls[name] = stack.enter_context(served(name, options.model, flags, Path(folder)))
        results = asyncio.run(compare(urls, options.rounds, options.concurrency, options.tokens))
    table = Table(
        title=f"{options.model}: {options.rounds} rounds in turn, {options.concurrency} requests at once"
    )
    for title in ("", *SERVERS, "difference (95%)"):
        table.add_column(title, justify="right" if title else "left")
    base, own = (results[name] for name in SERVERS)
    for case in ("tokens/s", "TTFT ms"):
        cells = [f"{statistics.median(one[case] for one in side):.2f}" for side in (base, own)]
        if case == "tokens/s":
            parts = interval([100 * (b[case] / a[case] - 1) for a, b in zip(base, own, strict=True)])
            table.add_row(case, *cells, "{:+.1f}% ({:+.1f} to {:+.1f})".format(*parts))
        else:
            parts = interval([b[case] - a[case] for a, b in zip(base, own, strict=True)])
            table.add_row(case, *cells, "{:+.2f} ms ({:+.2f} to {:+.2f})".format(*parts))
    Console(width=110).print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
