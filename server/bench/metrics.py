# SPDX-License-Identifier: Apache-2.0
"""From the records of requests to the numbers of one point: one load on one target, all rounds together.

Times are in milliseconds and cover completed requests only; a failed request counts in ``failed``, by kind in
``failures``, and nowhere else.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy

from server.bench.client import Record
from server.bench.load import ClientHealth, LoadRun

LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "time between tokens",
    "e2el": "whole request",
}
PERCENTILES = {"p50": 50, "p90": 90, "p99": 99}
STATISTICS = ("mean", *PERCENTILES)

BUSY_CPU_SHARE, LATE_MS = 0.8, 10.0
"""Beyond these the client is part of what it measures: share of a core, and ms of delay."""


def ttft_ms(record: Record) -> float:
    """Return the time from sending to the first content."""
    return (record.chunk_s[0] - record.sent_s) * 1e3


def tpot_ms(record: Record) -> float | None:
    """Return the time from the first to the last piece, for each token after the first; None for one token."""
    if record.completion_tokens < 2:
        return None
    return (record.chunk_s[-1] - record.chunk_s[0]) * 1e3 / (record.completion_tokens - 1)


def itl_ms(record: Record) -> list[float]:
    """Return the times between pieces of the answer; a piece has more than one token if the server sends it
    so."""
    return [(after - before) * 1e3 for before, after in zip(record.chunk_s, record.chunk_s[1:], strict=False)]


def e2el_ms(record: Record) -> float:
    """Return the time from sending to the end of the stream."""
    return (record.end_s - record.sent_s) * 1e3


def latencies(records: Iterable[Record]) -> dict[str, list[float]]:
    """Return the values of all LATENCIES over the completed of ``records``, in their order."""
    done = [record for record in records if not record.failure]
    return {
        "ttft": [ttft_ms(record) for record in done],
        "tpot": [value for record in done if (value := tpot_ms(record)) is not None],
        "itl": [gap for record in done for gap in itl_ms(record)],
        "e2el": [e2el_ms(record) for record in done],
    }


def samples_needed(percentile: float) -> int:
    """Return how many samples it takes until the largest is above the percentile with 95% probability.

    With fewer there is no upper bound on the percentile without assumptions: 5 for p50, 29 for p90, 299 for
    p99 (Wilks, 1941).
    """
    return math.ceil(math.log(0.05) / math.log(percentile / 100))


def statistics(values: Sequence[float]) -> dict[str, float | int | None]:
    """Return the mean, PERCENTILES (interpolated) and number of ``values``; None where there are none."""
    if not len(values):
        return {**dict.fromkeys(STATISTICS), "samples": 0}
    return {
        "mean": float(numpy.mean(values)),
        **{name: float(numpy.percentile(values, share)) for name, share in PERCENTILES.items()},
        "samples": len(values),
    }


def is_uncertain(times: dict[str, Any], statistic: str) -> bool:
    """Return whether a percentile in what ``statistics`` returned has too few samples."""
    return statistic in PERCENTILES and times["samples"] < samples_needed(PERCENTILES[statistic])


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a good request keeps to: limits in ms on its time to first token and per output token; None: any.

    ``attainment`` is the share of requests that must be good for a load to count as carried.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    attainment: float = 0.9

    def __bool__(self) -> bool:
        """Whether there is any limit."""
        return self.ttft_ms is not None or self.tpot_ms is not None

    def is_met(self, record: Record) -> bool:
        """Return whether a request is good: completed, and within every limit."""
        if record.failure or (self.ttft_ms is not None and ttft_ms(record) > self.ttft_ms):
            return False
        per_token = tpot_ms(record)
        return self.tpot_ms is None or per_token is None or per_token <= self.tpot_ms


@dataclasses.dataclass(frozen=True)
class LoadPoint:
    """What one load did to one target. ``load`` is the concurrency or the requests a second; None is "all at
    once". ``good`` (requests within the objective), ``goodput_per_s`` and ``attainment`` are None without one.
    """

    label: str
    load: float | None
    rounds: int
    completed: int
    failed: int
    failures: dict[str, int]
    errors: dict[str, int]
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    input_tokens: dict[str, float | int | None]
    output_tokens: dict[str, float | int | None]
    tokens_per_chunk: float | None
    ttft_ms: dict[str, float | int | None]
    tpot_ms: dict[str, float | int | None]
    itl_ms: dict[str, float | int | None]
    e2el_ms: dict[str, float | int | None]
    good: int | None
    goodput_per_s: float | None
    attainment: float | None
    client: dict[str, float]
    warnings: dict[str, str]


def duration_s(records: Sequence[Record]) -> float:
    """Return the time from the first request sent to the last one ended."""
    if not records:
        return 0.0
    return max(record.end_s for record in records) - min(record.sent_s for record in records)


def point(label: str, load: float | None, runs: Sequence[LoadRun], objective: Objective) -> LoadPoint:
    """Return the point for the ``runs`` (rounds) of one load on one target."""
    records = [record for run in runs for record in run.records]
    done = [record for record in records if not record.failure]
    failed = [record for record in records if record.failure]
    times = {f"{name}_ms": statistics(values) for name, values in latencies(records).items()}
    seconds = sum(duration_s(run.records) for run in runs)
    good = sum(objective.is_met(record) for record in records) if objective else None
    prompts, answers = (
        [getattr(record, name) for record in done] for name in ("prompt_tokens", "completion_tokens")
    )
    health = ClientHealth(
        *(max(getattr(run.health, field.name) for run in runs) for field in dataclasses.fields(ClientHealth))
    )
    chunks = sum(len(record.chunk_s) for record in done)

    def per_second(amount: float) -> float:
        return amount / seconds if seconds else 0.0

    return LoadPoint(
        label=label,
        load=load,
        rounds=len(runs),
        completed=len(done),
        failed=len(failed),
        failures=dict(Counter(record.failure for record in failed).most_common()),
        errors=dict(Counter(f"{record.failure}: {record.message}" for record in failed).most_common(5)),
        duration_s=seconds,
        requests_per_s=per_second(len(done)),
        output_tokens_per_s=per_second(sum(answers)),
        total_tokens_per_s=per_second(sum(answers) + sum(prompts)),
        input_tokens=_extent(prompts),
        output_tokens=_extent(answers),
        tokens_per_chunk=sum(answers) / chunks if chunks else None,
        **times,
        good=good,
        goodput_per_s=None if good is None else per_second(good),
        attainment=None if good is None else good / len(records) if records else 0.0,
        client=dataclasses.asdict(health),
        warnings=_warnings(health, load),
    )


def _extent(values: Sequence[int]) -> dict[str, float | int | None]:
    if not values:
        return {"mean": None, "min": None, "max": None}
    return {"mean": float(numpy.mean(values)), "min": min(values), "max": max(values)}


def _warnings(health: ClientHealth, load: float | None) -> dict[str, str]:
    """Return what makes the times of a point partly the client's own, by kind."""
    found = {}
    if health.cpu_share > BUSY_CPU_SHARE:
        found["busy client"] = (
            f"the client used {health.cpu_share:.0%} of a core and may be the bottleneck: lower the load or "
            "spread it over several clients"
        )
    if health.loop_lag_ms > LATE_MS:
        found["late client"] = (
            f"the client woke up to {health.loop_lag_ms:.0f} ms late (p99), which is in its times: give it "
            "cores of its own or another machine"
        )
    if health.send_lag_ms > LATE_MS and load is not None:
        found["late requests"] = (
            f"requests left up to {health.send_lag_ms:.0f} ms late (p99): the load was burstier than asked for"
        )
    return found


def worst_warnings(points: Sequence[LoadPoint]) -> list[tuple[LoadPoint, str, int]]:
    """Return for each kind of warning the point with the highest value, its text, and how many points have it."""
    measures = {"busy client": "cpu_share", "late client": "loop_lag_ms", "late requests": "send_lag_ms"}
    found = []
    for kind, measure in measures.items():
        having = [point for point in points if kind in point.warnings]
        if having:
            worst = max(having, key=lambda point: point.client[measure])
            found.append((worst, worst.warnings[kind], len(having)))
    return found


def errors(points: Sequence[LoadPoint]) -> list[tuple[str, str, int]]:
    """Return label, kind with message, and number of the failures at all loads together, most first."""
    counts: Counter[tuple[str, str]] = Counter()
    for one in points:
        counts.update({(one.label, text): count for text, count in one.errors.items()})
    return [(label, text, count) for (label, text), count in counts.most_common()]
