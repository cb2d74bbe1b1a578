# SPDX-License-Identifier: Apache-2.0
"""One picture of a load test: time to first token, time per output token and throughput against load."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # after the choice of backend, which needs no display

from server.bench.results import LoadPoint, load_label


def draw(points: Sequence[LoadPoint], axis: str, title: str, path: Path) -> None:
    """Draw ``points`` into the PNG file ``path``. Loads are spaced evenly; a load without a completed request
    leaves a gap.
    """
    places = range(len(points))
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for panel, times, name in (
        (panels[0], [point.ttft_ms for point in points], "time to first token, ms"),
        (panels[1], [point.tpot_ms for point in points], "time per output token, ms"),
    ):
        for kind, style in (("p50", "o-"), ("p90", "s--"), ("p99", "^:")):
            panel.plot(
                places,
                [float("nan") if time[kind] is None else time[kind] for time in times],
                style,
                label=kind,
            )
        panel.set_title(name)
        panel.legend()
    panels[2].plot(
        places, [point.output_tokens_per_s or float("nan") for point in points], "o-", color="tab:green"
    )
    panels[2].set_title("throughput, output tokens/s")
    labels = [
        load_label(point.load) + (f"\n{point.failed} failed" if point.failed else "") for point in points
    ]
    for panel in panels:
        panel.set_xticks(list(places), labels)
        panel.set_xlabel(axis.replace("_", " "))
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
