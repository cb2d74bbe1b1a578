# SPDX-License-Identifier: Apache-2.0
"""The checks. Each returns what it measured, with ``ok`` for whether that is as it must be."""

import asyncio
import collections
import contextlib
import json
import random
import statistics
import time
from typing import Any

import aiohttp
import malformed
import yarl
from target import Target

IDLE_LIMIT_S = 5.0
MEMORY_GROWTH = 0.05
KEPT_CONNECTIONS = 16
"""Descriptors that may be open after many requests and were not before."""

SLOWDOWN = 1.25
"""Accepted requests under ten times the load may take so much longer than at capacity, in the median and in the 95th
percentile: refusing costs the server time of its own."""

_SCHEMA = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}
_CHAT = [{"role": "user", "content": "hello"}]


async def _send(target: Target, request: malformed.Malformed) -> tuple[str, int | str]:
    """Send one request; return its kind and the status, or the name of what went wrong below HTTP."""
    url = yarl.URL(target.url + request.path, encoded=True)
    try:
        async with target.session.request(
            request.method, url, data=request.body, headers=request.headers
        ) as answer:
            await answer.read()
            return request.kind, answer.status
    except aiohttp.ClientError as error:
        return request.kind, type(error).__name__


async def check_malformed(target: Target, count: int, seed: int) -> dict[str, Any]:
    """Send malformed requests, four at a time: no 5xx, no broken connection, and good requests still answered."""
    queue = collections.deque(malformed.requests(count, seed, target.model, big_body_bytes=9 * 2**20))
    seen: collections.Counter[tuple[str, int | str]] = collections.Counter()
    good = []

    async def work() -> None:
        while queue:
            request = queue.popleft()
            kind, status = await _send(target, request)
            seen[kind, status] += 1
            if not isinstance(status, int) or status >= 500:
                print(
                    f"{status}: {kind} {request.method} {request.path} {request.headers} {request.body[:300]!r}"
                )
            if len(queue) % 100 == 0:
                good.append(await target.good())

    good.append(await target.good())  # what the first one leaves behind is no leak
    before, files_before = target.memory_bytes(), target.open_files()
    await asyncio.gather(*[work() for _ in range(4)])
    good.append(await target.good())
    idle_s = await target.seconds_until_idle(IDLE_LIMIT_S)
    bad = {
        f"{kind} {status}": n
        for (kind, status), n in seen.items()
        if not isinstance(status, int) or status >= 500
    }
    statuses = collections.Counter(str(status) for kind, status in seen.elements())
    after, files_after = target.memory_bytes(), target.open_files()
    growth = None if before is None else after / before - 1
    leaks = growth is not None and (growth > MEMORY_GROWTH or files_after > files_before + KEPT_CONNECTIONS)
    return {
        "ok": not bad and all(good) and idle_s is not None and not leaks,
        "text": f"{count} malformed requests: {dict(sorted(statuses.items()))}, {sum(bad.values())} bad answers, "
        f"{sum(good)} of {len(good)} good requests answered in between; "
        + (
            "memory not measured"
            if growth is None
            else f"memory {growth:+.1%}, open files {files_before} to {files_after}"
        ),
        "statuses": dict(statuses),
        "bad": bad,
        "memory_bytes": [before, after],
        "open_files": [files_before, files_after],
    }


async def check_disconnect(target: Target, clients: int) -> dict[str, Any]:
    """Let clients start a long stream, read its beginning and leave: nothing may run 5 seconds later."""
    body = {"model": target.model, "prompt": "go", "max_tokens": 350, "ignore_eos": True, "stream": True}
    statuses: collections.Counter[int] = collections.Counter()
    arrived = asyncio.Event()

    async def client() -> None:
        async with target.session.post(f"{target.url}/v1/completions", json=body) as answer:
            statuses[answer.status] += 1
            await answer.content.readany()
            if sum(statuses.values()) == clients:
                arrived.set()
            await arrived.wait()
            answer.close()  # the connection, in the middle of the stream

    tasks = [asyncio.create_task(client()) for _ in range(clients)]
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(arrived.wait(), 120)
    most = await target.running()
    arrived.set()
    await asyncio.gather(*tasks)
    idle_s = await target.seconds_until_idle(60)
    good = await target.good()
    return {
        "ok": idle_s is not None and idle_s <= IDLE_LIMIT_S and good and statuses[200] == clients,
        "text": f"{clients} clients left in mid-stream ({dict(statuses)}; {most[0]:g} sequences ran when they did): "
        + (f"none {idle_s:.2f} s later" if idle_s is not None else "some still ran after 60 s"),
        "seconds_until_idle": idle_s,
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))],
    }


def _latency(of: dict[str, dict[str, float]]) -> str:
    whole, first = of["seconds"], of["first_s"]
    return (
        f"median {whole['p50']:.2f} s, p95 {whole['p95']:.2f} s (first token {first['p50'] * 1e3:.0f} ms, "
        f"p95 {first['p95'] * 1e3:.0f} ms)"
    )


async def check_overload(target: Target, seconds: float, max_tokens: int = 100) -> dict[str, Any]:
    """Measure latency with as many requests as run at once, then with ten times as many arriving a second.

    The server says itself how many sequences it admits: with the default of --max-waiting as many as it runs.
    """
    (most,) = await target.metrics("pvq_server_sequences_max")
    can_run = int(most)
    accepted: list[dict[str, Any]] = []
    refused: list[float] = []
    other: collections.Counter[int] = collections.Counter()

    async def one() -> None:
        answer = await target.complete(max_tokens, stream=True)
        if answer["status"] == 200:
            accepted.append(answer)
        elif answer["status"] == 429:
            refused.append(answer["seconds"])
        else:
            other[answer["status"]] += 1

    end = time.perf_counter() + seconds

    async def again_and_again() -> None:
        while time.perf_counter() < end:
            await one()

    await asyncio.gather(*[one() for _ in range(can_run)])  # warm-up
    accepted.clear()
    started = time.perf_counter()
    await asyncio.gather(*[again_and_again() for _ in range(can_run)])
    rate = len(accepted) / (time.perf_counter() - started)
    calm = {name: _quantiles([answer[name] for answer in accepted]) for name in ("seconds", "first_s")}
    accepted.clear()
    draw, tasks, end = random.Random(1), [], time.perf_counter() + seconds
    started = time.perf_counter()
    while time.perf_counter() < end:
        tasks.append(asyncio.create_task(one()))
        await asyncio.sleep(draw.expovariate(10 * rate))
    sending_s = time.perf_counter() - started
    await asyncio.gather(*tasks)
    busy = {name: _quantiles([answer[name] for answer in accepted]) for name in ("seconds", "first_s")}
    slowdown = max(busy["seconds"][q] / calm["seconds"][q] for q in ("p50", "p95"))
    return {
        "ok": slowdown <= SLOWDOWN and not other and len(refused) > len(accepted),
        "text": f"at capacity {rate:.1f} requests/s ({can_run} at a time), {_latency(calm)}; with "
        f"{len(tasks) / sending_s:.0f} arriving a second {len(accepted)} accepted, {_latency(busy)}, "
        f"{len(refused)} refused with 429 in {statistics.median(refused or [0]) * 1e3:.1f} ms, {sum(other.values())} failed",
        "capacity_per_s": rate,
        "calm": calm,
        "busy": busy,
        "accepted": len(accepted),
        "refused": len(refused),
        "other": dict(other),
        "accepted_per_s": len(accepted) / sending_s,
    }


async def check_mixed(target: Target, seconds: float, per_s: float, seed: int) -> dict[str, Any]:
    """Send a mixture for a long time: nothing may fail, and memory must be flat within 5%.

    Memory is compared between the first and the last tenth after a warm-up of a tenth.
    """
    draw = random.Random(seed)
    bad: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    broken = malformed.requests(10**9, seed, target.model, big_body_bytes=9 * 2**20)
    samples: list[tuple[float, int]] = []
    choices: dict[str, dict[str, Any]] = {
        "completion": {"max_tokens": 16},
        "stream": {"max_tokens": 32, "stream": True},
        "chat": {"max_tokens": 16, "messages": _CHAT},
        "chat stream": {"max_tokens": 16, "messages": _CHAT, "stream": True},
        "n": {"max_tokens": 8, "n": 3, "temperature": 1.0},
        "logprobs": {"max_tokens": 8, "logprobs": 3},
        "schema": {
            "max_tokens": 100,
            "messages": _CHAT,
            "ignore_eos": False,
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": _SCHEMA}},
        },
        "long prompt": {"max_tokens": 8, "prompt": "hello " * 60},
    }

    async def one() -> None:
        kind = draw.choice([*choices, "malformed", "leave"])
        kinds[kind] += 1
        if kind == "malformed":
            _, status = await _send(target, next(broken))
            if not isinstance(status, int) or status >= 500:
                bad[f"{kind} {status}"] += 1
        elif kind == "leave":
            body = {
                "model": target.model,
                "prompt": "go",
                "max_tokens": 200,
                "ignore_eos": True,
                "stream": True,
            }
            async with target.session.post(f"{target.url}/v1/completions", json=body) as answer:
                await answer.content.readany()
                answer.close()
        else:
            answer = await target.complete(**{"temperature": 0, "salt": str(draw.random()), **choices[kind]})
            text = answer["text"]
            whole = text.rstrip().endswith(b"[DONE]") if "stream" in choices[kind] else b'"usage"' in text
            if answer["status"] != 200 or not whole or b'"error"' in text:
                bad[f"{kind} {answer['status']}"] += 1

    async def safe() -> None:
        try:
            await one()
        except (aiohttp.ClientError, TimeoutError) as error:
            bad[type(error).__name__] += 1

    start, tasks, next_sample_s, next_shown_s = time.perf_counter(), set(), 0.0, 60.0
    while (now := time.perf_counter() - start) < seconds:
        task = asyncio.create_task(safe())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        if now >= next_sample_s and (memory := target.memory_bytes()) is not None:
            samples.append((now, memory))
            next_sample_s += seconds / 200
        if now >= next_shown_s:
            print(
                f"{now:.0f} s: {sum(kinds.values())} requests, {sum(bad.values())} failed, {samples[-1:]}",
                flush=True,
            )
            next_shown_s += 60
        await asyncio.sleep(draw.expovariate(per_s))
    await asyncio.gather(*tasks)
    early = [memory for now, memory in samples if 0.1 * seconds <= now < 0.2 * seconds]
    late = [memory for now, memory in samples if now >= 0.9 * seconds]
    growth = statistics.median(late) / statistics.median(early) - 1 if early and late else None
    idle_s = await target.seconds_until_idle(30)
    flat = growth is not None and abs(growth) <= MEMORY_GROWTH
    memory = (
        f"{statistics.median(early) / 2**20:.0f} MiB, then {growth:+.1%}"
        if early and late
        else "not measured"
    )
    return {
        "ok": not bad and (flat or target.process is None) and idle_s is not None,
        "text": f"{seconds / 60:.0f} minutes of mixed load: {sum(kinds.values())} requests, {sum(bad.values())} failed "
        f"{json.dumps(bad) if bad else ''}; memory {memory}",
        "kinds": dict(kinds),
        "bad": dict(bad),
        "growth": growth,
        "samples": samples,
    }
