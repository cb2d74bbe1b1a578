# SPDX-License-Identifier: Apache-2.0
"""The results folder, written and read.

- ``load.json``: settings, targets, one point for each label and load (fields of ``metrics.LoadPoint``),
  results of the search, sums. Strict JSON: what does not exist is null.
- ``load.csv``: the points, one a row; ``requests.csv``: the requests, one a row.
- ``requests.jsonl``: the requests with the time of every piece of the answer (fields of ``client.Record``);
  every number in the other files follows from it.
- ``report.html``: page.py.
"""

import csv
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from server.bench.client import Record
from server.bench.metrics import LoadPoint, e2el_ms, is_uncertain, tpot_ms, ttft_ms
from server.bench.plan import Plan, Runs
from server.bench.search import HighestRate
from server.bench.target import Target
from server.bench.workload import RandomPrompts, load_label
from server.errors import ServerError

FORMAT = 2
"""Version of load.json; 1 had one target, one round and no requests.jsonl."""

_DIGITS = 6  # microseconds

FEW_SAMPLES = "* too few samples for a bound on this percentile"


def report(
    plan: Plan, targets: Sequence[Target], points: Sequence[LoadPoint], found: Sequence[HighestRate] = ()
) -> dict[str, Any]:
    """Return the content of load.json."""
    failures: Counter[str] = Counter()
    for point in points:
        failures.update(point.failures)
    return {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": settings(plan),
        "targets": [target.facts() for target in targets],
        "client": _client_facts(),
        # As in format 1, for those who read no more than this:
        "url": targets[0].url,
        "model": targets[0].model,
        "axis": plan.axis,
        "completed": sum(point.completed for point in points),
        "failed": sum(point.failed for point in points),
        "failures": dict(failures),
        "points": [dataclasses.asdict(point) for point in points],
        "highest_rates": [dataclasses.asdict(result) for result in found],
    }


def settings(plan: Plan) -> dict[str, Any]:
    """Return what a run was asked for, as in load.json."""
    source = plan.source
    random = isinstance(source, RandomPrompts)
    answers = source.output_tokens  # type: ignore[attr-defined]
    return {
        "axis": plan.axis,
        "loads": list(plan.loads),
        "requests": plan.requests,
        "duration_s": plan.duration_s,
        "rounds": plan.rounds,
        "warmup": plan.warmup,
        "input_tokens": source.input_tokens.text if random else None,
        "output_tokens": answers.text if answers else None,
        "dataset": None if random else source.name,  # type: ignore[attr-defined]
        "endpoint": "chat" if plan.options.chat else "completions",
        "ignore_eos": plan.options.ignore_eos,
        "timeout_s": plan.options.timeout_s,
        "seed": plan.seed,
        "objective": dataclasses.asdict(plan.objective) if plan.objective else None,
    }


def _client_facts() -> dict[str, Any]:
    return {
        "pvq-vllm": importlib.metadata.version("pvq-vllm"),
        "openai": importlib.metadata.version("openai"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def write(folder: Path, content: dict[str, Any], runs: Runs) -> list[Path]:
    """Write the JSON and CSV files into ``folder`` and return their paths."""
    paths = [folder / name for name in ("load.json", "load.csv", "requests.csv", "requests.jsonl")]
    text = json.dumps(content, indent=2, allow_nan=False)
    paths[0].write_text(text + "\n", encoding="utf-8")
    _write_csv(paths[1], [_flat(point) for point in content["points"]])
    requests = [
        (label, load, number, record)
        for (label, load), rounds in runs.items()
        for number, run in enumerate(rounds)
        for record in run.records
    ]
    _write_csv(paths[2], [_request_row(*request) for request in requests])
    with open(paths[3], "w", encoding="utf-8") as file:
        for label, load, number, record in requests:
            fields = {"label": label, "load": load, "round": number, **dataclasses.asdict(record)}
            for name, value in fields.items():
                if name.endswith("_s"):
                    fields[name] = (
                        [round(time, _DIGITS) for time in value]
                        if isinstance(value, list)
                        else round(value, _DIGITS)
                    )
            file.write(json.dumps(fields, allow_nan=False) + "\n")
    return paths


def _flat(point: dict[str, Any]) -> dict[str, Any]:
    """Return a point as one row: nested numbers as NAME_KEY, counts of failures and texts joined."""
    row: dict[str, Any] = {}
    for name, value in point.items():
        if name in ("failures", "errors", "warnings"):
            row[name] = "; ".join(f"{key} {count}" for key, count in value.items())
        elif isinstance(value, dict):
            row |= {f"{name}_{key}": number for key, number in value.items()}
        else:
            row[name] = value
    row["load"] = _exact(point["load"])
    return row


def _exact(load: float | None) -> float | str:
    return "inf" if load is None else load


def _request_row(label: str, load: float | None, number: int, record: Record) -> dict[str, Any]:
    done = not record.failure
    fields = {name: value for name, value in dataclasses.asdict(record).items() if name != "chunk_s"}
    times = {
        "ttft_ms": ttft_ms(record) if done else None,
        "tpot_ms": tpot_ms(record) if done else None,
        "e2el_ms": e2el_ms(record) if done else None,
        "chunks": len(record.chunk_s),
    }
    row = {"label": label, "load": _exact(load), "round": number, **fields, **times}
    return {name: round(value, _DIGITS) if isinstance(value, float) else value for name, value in row.items()}


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


Rounds = dict[tuple[str, float | None], list[list[Record]]]
"""Label and load -> the records of each round."""


def read(folder: Path) -> tuple[dict[str, Any], Rounds]:
    """Return load.json of a results folder, and its requests.

    Raises:
        ServerError: the folder is no results folder of this version.
    """
    try:
        content = json.loads((folder / "load.json").read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise ServerError(
                f"{folder}/load.json has format {content.get('format', 1)} and not {FORMAT}: measure again"
            )
        rounds: Rounds = {}
        with open(folder / "requests.jsonl", encoding="utf-8") as file:
            for line in file:
                fields = json.loads(line)
                key = (fields.pop("label"), fields.pop("load"))
                parts = rounds.setdefault(key, [])
                number = fields.pop("round")
                parts.extend([] for _ in range(number + 1 - len(parts)))
                parts[number].append(Record(**fields))
    except OSError as error:
        raise ServerError(
            f"{folder} is no results folder of pvq bench ({error.strerror}: {error.filename}): give one"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServerError(f"{folder} holds damaged results ({error}): measure again") from None
    return content, rounds


def cell(times: dict[str, Any], statistic: str) -> str:
    """Return a time for a table: "12.3", with * where there are too few samples for a percentile, "-" for
    none."""
    value = times[statistic]
    if value is None:
        return "-"
    mark = "*" if is_uncertain(times, statistic) else ""
    return f"{value:.0f}{mark}" if value >= 100 else f"{value:.1f}{mark}"


def place(point: LoadPoint, axis: str) -> str:
    """Return where a point was measured, for a message."""
    return f"{point.label}, {axis.replace('_', ' ')} {load_label(point.load)}"


def others(count: int) -> str:
    """Return the end of a message about one of ``count`` points."""
    return (
        "" if count == 1 else f" (and at {count - 1} other loads)" if count > 2 else " (and at another load)"
    )


def table(points: Sequence[LoadPoint], axis: str) -> Table:
    """Return ``points`` as a table for the terminal, 80 columns wide with short labels; ``axis`` says what the
    load is.
    """
    with_labels = len({point.label for point in points}) > 1
    with_goodput = any(point.attainment is not None for point in points)
    result = Table(title="Load test", box=box.SIMPLE, padding=(0, 1, 0, 0))
    if with_labels:
        result.add_column("", overflow="fold")
    load_name = {"concurrency": "at\nonce", "request_rate": "rate\nper s"}[axis]
    names = (load_name, "done", "failed", "TTFT ms\np50 / p99", "token ms\np50 / p99")
    for name in (*names, "tokens\nper s", "requests\nper s", *(["good"] if with_goodput else [])):
        result.add_column(name, justify="right", no_wrap=True)
    for point in sorted(points, key=lambda point: (point.load is None, point.load or 0)):
        pairs = (f"{cell(times, 'p50')} / {cell(times, 'p99')}" for times in (point.ttft_ms, point.tpot_ms))
        failed = f"[red]{point.failed}[/red]" if point.failed else "0"
        speeds = (f"{point.output_tokens_per_s:.1f}", f"{point.requests_per_s:.2f}")
        good = [f"{point.attainment:.0%}" if point.attainment is not None else "-"] if with_goodput else []
        label = [escape(point.label)] if with_labels else []
        result.add_row(*label, load_label(point.load), str(point.completed), failed, *pairs, *speeds, *good)
    kinds = ("p50", "p99")
    shown = [(times, kind) for point in points for times in (point.ttft_ms, point.tpot_ms) for kind in kinds]
    if any(times[kind] is not None and is_uncertain(times, kind) for times, kind in shown):
        result.caption = FEW_SAMPLES
    return result
