# SPDX-License-Identifier: Apache-2.0
"""Drives ``vllm bench serve`` over several loads, in one process of its own, and collects the results.

Two habits keep the numbers honest: as many warm-up requests as there will be at once, so that the first
measured ones do not pay for warm-up; and another seed for every load, so that no prompt is in the prefix
cache of the server from the load before.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from server.bench.results import LoadPoint, load_label, point_from_result, point_without_result
from server.errors import ServerError

LAUNCHER = "pvq_vllm.vllm_launcher"
"""vLLM's command line, several commands separated by ``--next``; run by name, never imported here."""

CONCURRENCY, REQUEST_RATE = "concurrency", "request_rate"
_POLL_S = 0.2
_CONNECT_TIMEOUT_S = 10.0


@dataclasses.dataclass(frozen=True)
class Target:
    """A server under test: base URL, name of the model in requests, folder or name of its tokenizer, and the
    API key if any.
    """

    url: str
    model: str
    tokenizer: str
    api_key: str | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True)
class Workload:
    """Random prompts of ``input_tokens`` and answers of ``output_tokens`` under each of ``loads``.

    ``axis`` is ``CONCURRENCY`` (so many requests always running) or ``REQUEST_RATE`` (so many arriving a
    second, as a Poisson process; None for all at once). ``requests`` are sent per load.
    """

    axis: str
    loads: tuple[float | None, ...]
    requests: int
    input_tokens: int
    output_tokens: int
    seed: int = 0

    def requests_at(self, load: float | None) -> int:
        """Return how many requests the load gets: ``requests``, or twice the concurrency if that is more."""
        return max(self.requests, 2 * int(load)) if self.axis == CONCURRENCY and load else self.requests


def parse_loads(text: str, flag: str) -> tuple[float | None, ...]:
    """Return the loads of a list such as "1,2,4" or, for rates, "0.5,2,inf"; inf becomes None.

    Raises:
        ServerError: an entry is no positive number, or no whole one where ``flag`` is --concurrency.
    """
    loads: list[float | None] = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        whole_needed = flag == "--concurrency"
        if not value > 0 or (whole_needed and not value.is_integer()):
            kind = "whole numbers above 0" if whole_needed else "numbers above 0, or inf"
            raise ServerError(f"{flag} {text} cannot be used: give {kind}, separated by commas")
        loads.append(None if math.isinf(value) else value)
    return tuple(dict.fromkeys(loads))


def find_target(
    url: str, api_key: str | None, model: str | None = None, tokenizer: str | None = None
) -> Target:
    """Ask the server at ``url`` what it serves; ``model`` and ``tokenizer`` overrule its answer.

    Raises:
        ServerError: nothing answers there, the key is refused, or the model is not served.
    """
    url = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx.get(f"{url}/v1/models", headers=headers, timeout=_CONNECT_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(
            f"--url {url}: no server answers there ({error}): start one with pvq serve MODEL"
        ) from None
    if response.status_code == 401:
        raise ServerError(f"--url {url}: the server refuses the API key: set PVQ_API_KEY to its key")
    try:
        served = {entry["id"]: entry for entry in response.raise_for_status().json()["data"]}
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise ServerError(
            f"--url {url}: /v1/models does not answer like an OpenAI server ({error}): check the address"
        ) from None
    name = model or next(iter(served), None)
    if name not in served:
        raise ServerError(f"--model {name} is not served at {url}: give one of {', '.join(served) or 'none'}")
    return Target(url, name, tokenizer or served[name].get("root") or name, api_key)


def bench_command(target: Target, workload: Workload, index: int, folder: Path, filename: str) -> list[str]:
    """Return the arguments of ``vllm bench serve`` for the load number ``index``; its result goes to ``folder
    / filename``.
    """
    load = workload.loads[index]
    options: dict[str, Any] = {
        "backend": "openai",
        "base-url": target.url,
        "endpoint": "/v1/completions",
        "model": target.model,
        "served-model-name": target.model,
        "tokenizer": target.tokenizer,
        "dataset-name": "random",
        "random-input-len": workload.input_tokens,
        "random-output-len": workload.output_tokens,
        "num-prompts": workload.requests_at(load),
        "num-warmups": int(load) if workload.axis == CONCURRENCY and load else 2,
        "request-rate": load_label(load) if workload.axis == REQUEST_RATE else "inf",
        "seed": workload.seed + index,
        "temperature": 0,
        "result-dir": folder,
        "result-filename": filename,
        "percentile-metrics": "ttft,tpot,itl,e2el",
        "metric-percentiles": "50,90,99",
    }
    if workload.axis == CONCURRENCY and load:
        options["max-concurrency"] = int(load)
    flags = ("--ignore-eos", "--disable-tqdm", "--save-result", "--save-detailed")
    return [
        "bench",
        "serve",
        *(word for name, value in options.items() for word in (f"--{name}", str(value))),
        *flags,
    ]


def run(
    target: Target, workload: Workload, out: Path, on_start: Callable[[int], None] = lambda index: None
) -> list[LoadPoint]:
    """Put every load of ``workload`` on ``target`` in turn and return one point per load.

    ``out / raw`` gets vLLM's own result of every load, ``out / client.log`` what its client printed.
    ``on_start`` is called with the index of each load when it starts and with ``len(loads)`` at the end. A
    load whose client fails counts all its requests as failed.
    """
    raw = out / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    names = [f"{workload.axis}-{load_label(load)}.json" for load in workload.loads]
    for name in names:
        (raw / name).unlink(missing_ok=True)
    command = [sys.executable, "-m", LAUNCHER]
    for index, name in enumerate(names):
        command += [*(["--next"] if index else []), *bench_command(target, workload, index, raw, name)]
    environment = dict(os.environ, OPENAI_API_KEY=target.api_key or "none", TOKENIZERS_PARALLELISM="false")
    if Path(target.tokenizer).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    log_path = out / "client.log"
    with open(log_path, "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            _watch(process, [raw / name for name in names], on_start)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    return [
        _collect(raw / name, load, workload.requests_at(load), log_path)
        for name, load in zip(names, workload.loads, strict=True)
    ]


def _watch(process: subprocess.Popen, results: Sequence[Path], on_start: Callable[[int], None]) -> None:
    """Wait for ``process`` and report each load when the result of the one before has appeared."""
    shown = 0
    on_start(shown)
    while process.poll() is None:
        time.sleep(_POLL_S)
        done = max((number for number, path in enumerate(results, start=1) if path.exists()), default=0)
        if shown < done < len(results):
            shown = done
            on_start(shown)
    on_start(len(results))


def _collect(path: Path, load: float | None, num_requests: int, log_path: Path) -> LoadPoint:
    try:
        return point_from_result(load, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError):
        return point_without_result(load, num_requests, f"the client gave no result, see {log_path}")
