# SPDX-License-Identifier: Apache-2.0
"""From the JSON files of vLLM's benchmark client to one report.

load.json is ``{"url", "model", "axis", "input_tokens", "output_tokens", "completed", "failed", "points":
[...]}``; a point has the fields of ``LoadPoint``. Times are in milliseconds and cover completed requests
only; a failed request counts in ``failed`` and nowhere else.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.table import Table

LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "time between tokens",
    "e2el": "whole request",
}
STATISTICS = ("mean", "p50", "p90", "p99")


@dataclasses.dataclass(frozen=True)
class LoadPoint:
    """What one load did to the server. ``load`` is the concurrency or the requests a second; None is "all at
    once".
    """

    load: float | None
    completed: int
    failed: int
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    ttft_ms: dict[str, float | None]
    tpot_ms: dict[str, float | None]
    itl_ms: dict[str, float | None]
    e2el_ms: dict[str, float | None]
    errors: dict[str, int]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def point_from_result(load: float | None, result: dict[str, Any]) -> LoadPoint:
    """Return the point for one result file of ``vllm bench serve``; a statistic it lacks, or that is not
    finite, becomes None.
    """
    completed = int(result["completed"])
    messages = Counter(
        text.strip().splitlines()[-1][:200] for text in result.get("errors") or [] if text and text.strip()
    )
    times = {
        f"{name}_ms": {
            kind: _number(result.get(f"median_{name}_ms" if kind == "p50" else f"{kind}_{name}_ms"))
            if completed
            else None
            for kind in STATISTICS
        }
        for name in LATENCIES
    }
    return LoadPoint(
        load=load,
        completed=completed,
        failed=int(result.get("failed", len(messages))),
        duration_s=_number(result.get("duration")) or 0.0,
        requests_per_s=_number(result.get("request_throughput")) or 0.0,
        output_tokens_per_s=_number(result.get("output_throughput")) or 0.0,
        errors=dict(messages.most_common(5)),
        **times,
    )


def point_without_result(load: float | None, num_requests: int, reason: str) -> LoadPoint:
    """Return the point for a load whose client ended without a result: every request counts as failed."""
    nothing: dict[str, float | None] = dict.fromkeys(STATISTICS)
    return LoadPoint(
        load, 0, num_requests, 0.0, 0.0, 0.0, nothing, nothing, nothing, nothing, {reason: num_requests}
    )


def report(points: Sequence[LoadPoint], **facts: Any) -> dict[str, Any]:
    """Return the content of load.json: ``facts``, the sums over all points, and the points."""
    return {
        **facts,
        "completed": sum(point.completed for point in points),
        "failed": sum(point.failed for point in points),
        "points": [dataclasses.asdict(point) for point in points],
    }


def load_label(load: float | None) -> str:
    """Return ``load`` as text: "4", "0.5", or "inf" for all at once."""
    return "inf" if load is None else f"{load:g}"


def table(points: Sequence[LoadPoint], axis: str) -> Table:
    """Return ``points`` as a table for the terminal; ``axis`` says what the load is."""
    names = (axis.replace("_", "\n"), "done", "failed", "TTFT ms\np50 / p99", "token ms\np50 / p99")
    result = Table(title="Load test")
    for name in (*names, "tokens\nper s", "requests\nper s"):
        result.add_column(name, justify="right", no_wrap=True)
    for point in points:
        pairs = (
            " / ".join("-" if times[kind] is None else f"{times[kind]:.0f}" for kind in ("p50", "p99"))
            for times in (point.ttft_ms, point.tpot_ms)
        )
        failed = f"[red]{point.failed}[/red]" if point.failed else "0"
        speeds = (f"{point.output_tokens_per_s:.1f}", f"{point.requests_per_s:.2f}")
        result.add_row(load_label(point.load), str(point.completed), failed, *pairs, *speeds)
    return result
