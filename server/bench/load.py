# SPDX-License-Identifier: Apache-2.0
"""Puts one load on one server: in a closed loop (so many requests always running) or an open one (requests
arrive when they are due, whatever the server does), and watches whether the client itself keeps up.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Sequence

import openai

from server.bench.client import Record, RequestOptions, send
from server.bench.workload import CONCURRENCY, Prompt

_LAG_INTERVAL_S = 0.02


@dataclasses.dataclass(frozen=True)
class ClientHealth:
    """How busy the client was: share of one core, how late its event loop woke up (ms, 99th percentile), and
    how late requests of an open loop left (ms, 99th percentile).
    """

    cpu_share: float
    loop_lag_ms: float
    send_lag_ms: float


@dataclasses.dataclass(frozen=True)
class LoadRun:
    """The records of one load on one target in one round, in the order of sending, and the client's health."""

    records: list[Record]
    health: ClientHealth


async def closed_loop(
    client: openai.AsyncOpenAI,
    model: str,
    prompts: Sequence[Prompt],
    concurrency: int,
    options: RequestOptions,
    started: float,
    on_done: Callable[[Record], None],
) -> list[Record]:
    """Send ``prompts`` in order, ``concurrency`` at a time; a new one leaves when one has ended."""
    waiting = iter(enumerate(prompts))
    records: list[Record] = []

    async def worker() -> None:
        for index, prompt in waiting:
            record = await send(client, model, prompt, options, index, started)
            records.append(record)
            on_done(record)

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return sorted(records, key=lambda record: record.index)


async def open_loop(
    client: openai.AsyncOpenAI,
    model: str,
    prompts: Sequence[Prompt],
    arrivals_s: Sequence[float],
    options: RequestOptions,
    started: float,
    on_done: Callable[[Record], None],
) -> list[Record]:
    """Send each of ``prompts`` at its time in ``arrivals_s``, no matter how many are still running."""

    async def one(index: int, prompt: Prompt, due_s: float) -> Record:
        record = await send(client, model, prompt, options, index, started, due_s)
        on_done(record)
        return record

    async with asyncio.TaskGroup() as group:
        tasks = []
        for index, (prompt, due_s) in enumerate(zip(prompts, arrivals_s, strict=True)):
            await asyncio.sleep(max(0.0, started + due_s - time.perf_counter()))
            tasks.append(group.create_task(one(index, prompt, due_s)))
    return [task.result() for task in tasks]


@contextlib.asynccontextmanager
async def _watched() -> AsyncIterator[list[float]]:
    """Yield a list that fills with how late the event loop woke up, in seconds."""
    lags: list[float] = []

    async def watch() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(_LAG_INTERVAL_S)
            lags.append(time.perf_counter() - before - _LAG_INTERVAL_S)

    task = asyncio.create_task(watch())
    try:
        yield lags
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def run_load(
    client: openai.AsyncOpenAI,
    model: str,
    axis: str,
    load: float | None,
    prompts: Sequence[Prompt],
    warmup: Sequence[Prompt],
    arrivals_s: Sequence[float],
    options: RequestOptions,
    on_done: Callable[[Record], None] = lambda record: None,
) -> LoadRun:
    """Warm up, wait until that is over, then put the load on the server.

    Args:
        load: how many at once where ``axis`` is CONCURRENCY; of a rate it is in ``arrivals_s`` already.
        warmup: sent before anything is measured, with the same concurrency (all at once for a rate).
    """
    at_once = int(load) if axis == CONCURRENCY and load else max(1, len(warmup))
    await closed_loop(
        client, model, warmup, at_once, options, time.perf_counter(), on_done=lambda record: None
    )
    async with _watched() as lags:
        cpu, started = time.process_time(), time.perf_counter()
        if axis == CONCURRENCY:
            records = await closed_loop(client, model, prompts, at_once, options, started, on_done)
        else:
            records = await open_loop(client, model, prompts, arrivals_s, options, started, on_done)
        share = (time.process_time() - cpu) / max(time.perf_counter() - started, 1e-9)
    late = [record.sent_s - record.scheduled_s for record in records]
    return LoadRun(records, ClientHealth(share, _high(lags) * 1e3, _high(late) * 1e3))


def _high(values: Sequence[float]) -> float:
    """Return the 99th percentile of ``values`` (the nearest rank), 0 for none."""
    return sorted(values)[int(0.99 * (len(values) - 1))] if values else 0.0
