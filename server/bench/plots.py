# SPDX-License-Identifier: Apache-2.0
"""Plots of a load test as SVG for the report. Colors are CSS variables of the page, so that they follow its
light or dark theme; text stays text.
"""

import dataclasses
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy
from matplotlib import pyplot  # after the choice of backend, which needs no display
from matplotlib.lines import Line2D

from server.bench.metrics import LoadPoint, latencies
from server.bench.results import Rounds
from server.bench.workload import load_label

SERIES = 6
"""Targets with a color of their own; further ones start again."""

# Stand-ins that matplotlib takes for colors; they become variables of the page.
_INK, _GRID = "#010101", "#020202"
_COLORS = [f"#0301{index:02x}" for index in range(SERIES)]
_VARIABLES = {
    _INK: "var(--ink)",
    _GRID: "var(--grid)",
    **{color: f"var(--series-{index})" for index, color in enumerate(_COLORS)},
}
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}
_LINES = {"p50": "o-", "p90": "s--", "p99": "^:"}
_SIZE_INCHES = (4.6, 3.0)


@dataclasses.dataclass(frozen=True)
class Plot:
    """A finished plot: title, one sentence on how to read it, SVG."""

    title: str
    caption: str
    svg: str


def _svg(name: str, title: str, draw: Callable[[Any], None]) -> str:
    """Return what ``draw`` draws into an axes, as an SVG element that takes the width of its place."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure, axes = pyplot.subplots(figsize=_SIZE_INCHES, layout="constrained")
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'<svg([^>]*?) height="[^"]*"', rf'<svg\1 role="img" aria-label="{title}"', svg, count=1)
    # Ids must differ between the plots of a page.
    svg = re.sub(r'(id="|"#|url\(#)', rf"\g<1>{name}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg


def _order(load: float | None) -> tuple[bool, float]:
    return load is None, load or 0.0


def plots(points: Sequence[LoadPoint], rounds: Rounds, axis: str) -> list[Plot]:
    """Return the plots of a report. Loads are spaced evenly; one without a completed request leaves a gap."""
    labels = list(dict.fromkeys(point.label for point in points))
    loads = sorted({point.load for point in points}, key=_order)
    colors = {label: _COLORS[index % SERIES] for index, label in enumerate(labels)}
    by_place = {(point.label, point.load): point for point in points}
    axis_name = {"concurrency": "requests at once", "request_rate": "requests arriving a second"}[axis]

    def line(axes: Any, label: str, style: str, value: Callable[[LoadPoint], float | None]) -> None:
        found = [value(by_place[label, load]) if (label, load) in by_place else None for load in loads]
        places = [place for place, number in enumerate(found) if number is not None]
        axes.plot(places, [found[place] for place in places], style, color=colors[label], clip_on=False)

    def against_load(axes: Any, unit: str) -> None:
        ticks = [load_label(load) for load in loads]
        axes.set_xticks(range(len(loads)), ticks, rotation=45 if len(loads) > 8 else 0)
        axes.set_xlim(-0.3, max(len(loads) - 0.7, 0.7))
        axes.set_xlabel(axis_name)
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0)

    def times(field: str) -> Callable[[Any], None]:
        def draw(axes: Any) -> None:
            kinds = ("p50", "p90", "p99") if len(labels) == 1 else ("p50", "p99")
            for label in labels:
                for kind in kinds:
                    line(axes, label, _LINES[kind], lambda one, kind=kind: getattr(one, field)[kind])
            against_load(axes, "ms")
            # The page says which color is whose; above the axes, where no line can be.
            handles = [
                Line2D([], [], color=_INK, marker=_LINES[kind][0], ls=_LINES[kind][1:]) for kind in kinds
            ]
            axes.legend(handles, kinds, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0)

        return draw

    def throughput(axes: Any) -> None:
        for label in labels:
            line(axes, label, "o-", lambda one: one.output_tokens_per_s if one.completed else None)
        against_load(axes, "output tokens/s")

    def attainment(axes: Any) -> None:
        for label in labels:
            line(axes, label, "o-", lambda one: None if one.attainment is None else one.attainment * 100)
        against_load(axes, "% of requests")
        axes.set_ylim(0, 105)

    def trade(axes: Any) -> None:
        for label in labels:
            mine = [by_place[label, load] for load in loads if (label, load) in by_place]
            mine = [point for point in mine if point.tpot_ms["p50"] is not None]
            x, y = [point.output_tokens_per_s for point in mine], [point.tpot_ms["p50"] for point in mine]
            axes.plot(x, y, "o-", color=colors[label], clip_on=False)
            for point, place in zip(mine, zip(x, y, strict=True), strict=True):
                text = load_label(point.load)
                axes.annotate(text, place, xytext=(4, 5), textcoords="offset points", fontsize=8)
        axes.set(xlabel="output tokens/s", ylabel="ms per token, p50", ylim=(0, None), xlim=(0, None))

    last = max((load for _, load in rounds), key=_order, default=None)

    def distribution(axes: Any) -> None:
        for label in labels:
            records = [record for part in rounds.get((label, last), ()) for record in part]
            found = numpy.sort(latencies(records)["ttft"])
            shares = numpy.arange(1, len(found) + 1) / max(len(found), 1) * 100
            axes.step(found, shares, where="post", color=colors[label])
        axes.set(xlabel="ms", ylabel="% of requests at most", ylim=(0, 102), xlim=(0, None))

    at_last = f"at {axis.replace('_', ' ')} {load_label(last)}, the highest"
    wanted = [
        ("throughput", "Throughput", "Tokens the server made a second; higher is better.", throughput),
        ("ttft", "Time to first token", "From sending a request to its first content.", times("ttft_ms")),
        (
            "tpot",
            "Time per output token",
            "From the first to the last piece of an answer, for each token after the first.",
            times("tpot_ms"),
        ),
        (
            "trade",
            "Latency against throughput",
            "One mark for each load: further right and further down is better.",
            trade,
        ),
        (
            "ttft-distribution",
            "Distribution of the time to first token",
            f"All completed requests {at_last} load.",
            distribution,
        ),
        ("request", "Whole request", "From sending a request to the end of its stream.", times("e2el_ms")),
    ]
    if any(point.attainment is not None for point in points):
        goodput = "Requests that completed within the objective, of all that were sent."
        wanted.insert(3, ("attainment", "Requests within the objective", goodput, attainment))
    return [Plot(title, caption, _svg(name, title, draw)) for name, title, caption, draw in wanted]
