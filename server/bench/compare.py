# SPDX-License-Identifier: Apache-2.0
"""Two measurements side by side: ratios with confidence intervals, of two results folders or of two targets
of one run.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from server.bench.client import Record
from server.bench.intervals import CONFIDENCE, METRICS, Metric, Ratio, ratio, values
from server.bench.results import Rounds
from server.bench.search import PRECISION
from server.bench.workload import load_label
from server.errors import ServerError

WORKLOAD = (
    "objective",
    "axis",
    "input_tokens",
    "output_tokens",
    "dataset",
    "endpoint",
    "ignore_eos",
    "requests",
    "duration_s",
)
"""Settings that must agree for a ratio to say something about the servers."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Ratios b / a at one load, one for each of METRICS; None where a side has no value."""

    a: str
    b: str
    load: float | None
    ratios: dict[str, Ratio | None]


def compare_rounds(
    a: Sequence[Sequence[Record]], b: Sequence[Sequence[Record]], paired: bool
) -> dict[str, Ratio | None]:
    """Return the ratio b / a of every one of METRICS."""
    return {
        metric.title: ratio(values(a, metric), values(b, metric), metric.statistic, metric.enough, paired)
        for metric in METRICS
    }


def compare_targets(rounds: Rounds) -> list[Comparison]:
    """Return the ratios of every later target of a run to its first one, at each load that both have."""
    labels = list(dict.fromkeys(label for label, _ in rounds))
    loads = list(dict.fromkeys(load for _, load in rounds))
    return [
        Comparison(
            labels[0], label, load, compare_rounds(rounds[labels[0], load], rounds[label, load], paired=True)
        )
        for label in labels[1:]
        for load in loads
        if (labels[0], load) in rounds and (label, load) in rounds
    ]


def _pairs(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str]]:
    """Return which target of ``a`` belongs to which of ``b``: by label where they share one, else in order."""
    labels_a, labels_b = ([target["label"] for target in content["targets"]] for content in (a, b))
    shared = [(label, label) for label in labels_a if label in labels_b]
    return shared or list(zip(labels_a, labels_b, strict=False))


def compare_folders(
    a: tuple[dict[str, Any], Rounds], b: tuple[dict[str, Any], Rounds]
) -> tuple[list[Comparison], list[str]]:
    """Return the ratios of two results folders, and what speaks against comparing them.

    Raises:
        ServerError: they have no load in common, and are not both of a search.
    """
    (content_a, rounds_a), (content_b, rounds_b) = a, b
    different = [
        f"{name}: {content_a['settings'].get(name)} and {content_b['settings'].get(name)}"
        for name in WORKLOAD
        if content_a["settings"].get(name) != content_b["settings"].get(name)
    ]
    found = [
        Comparison(one, other, load, compare_rounds(records, rounds_b[other, load], paired=False))
        for one, other in _pairs(content_a, content_b)
        for (label, load), records in rounds_a.items()
        if label == one and (other, load) in rounds_b
    ]
    searches = content_a["highest_rates"] and content_b["highest_rates"]
    if content_a["axis"] != content_b["axis"] or not (found or searches):
        raise ServerError("the two results have no load in common: measure both with the same loads")
    return found, [f"the workloads differ in {text}" for text in different]


def compare_rates(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return a sentence on the highest rates of each pair of targets that both searches have."""
    rates_a, rates_b = ({one["label"]: one["rate"] for one in content["highest_rates"]} for content in (a, b))
    sentences = []
    for one, other in _pairs(a, b):
        rate_a, rate_b = rates_a.get(one), rates_b.get(other)
        if rate_a and rate_b:
            name = one if one == other else f"{other} / {one}"
            sentences.append(
                f"{name}: highest rate {rate_a:.3g} and {rate_b:.3g} requests/s, B / A {rate_b / rate_a:.2f} "
                f"(each to within {PRECISION - 1:.0%})"
            )
    return sentences


def verdict(metric: Metric, found: Ratio | None) -> str:
    """Return "better", "worse" or "unclear" for b against a; unclear where the interval holds 1."""
    if found is None or not found.is_clear:
        return "unclear"
    return "better" if (found.value > 1) == (metric.better == "higher") else "worse"


def ratio_text(found: Ratio | None) -> str:
    """Return "1.23 (1.10 to 1.38)" for a table."""
    if found is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.value:.2f} (too few)"
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


def table(comparisons: Sequence[Comparison], axis: str, title: str) -> Table:
    """Return the ratios as a table for the terminal, green where b is better and red where it is worse."""
    result = Table(
        title=title,
        caption=f"with {CONFIDENCE:.0%} confidence intervals; coloured where they leave out 1",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    result.add_column("")
    result.add_column(axis.replace("_", "\n"), justify="right", no_wrap=True)
    for metric in METRICS:
        result.add_column(f"{metric.title}\n{metric.better} is better", justify="right", min_width=10)
    colors = {"better": "green", "worse": "red"}
    for one in comparisons:
        cells = []
        for metric in METRICS:
            found = one.ratios[metric.title]
            text, color = ratio_text(found), colors.get(verdict(metric, found))
            cells.append(f"[{color}]{text}[/{color}]" if color else text)
        name = one.b if one.a == one.b else f"{one.b} / {one.a}"
        result.add_row(escape(name), load_label(one.load), *cells)
    return result


def as_json(comparisons: Sequence[Comparison], warnings: Sequence[str]) -> dict[str, Any]:
    """Return the ratios for machines."""
    return {
        "confidence": CONFIDENCE,
        "warnings": list(warnings),
        "comparisons": [dataclasses.asdict(one) for one in comparisons],
    }
