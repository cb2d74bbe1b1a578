# SPDX-License-Identifier: Apache-2.0
"""report.html: one file without scripts and without anything to fetch, from report.html.j2."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from server.bench.compare import Comparison, ratio_text, verdict
from server.bench.intervals import CONFIDENCE, METRICS
from server.bench.metrics import LATENCIES, STATISTICS, LoadPoint, errors, worst_warnings
from server.bench.plots import SERIES, plots
from server.bench.results import FEW_SAMPLES, Rounds, cell, others, place
from server.bench.workload import load_label


def render(
    content: dict[str, Any],
    points: Sequence[LoadPoint],
    rounds: Rounds,
    comparisons: Sequence[Comparison] = (),
) -> str:
    """Return the page for the content of load.json, the points in it, all requests, and the ratios of the
    targets if there are several.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    labels = [target["label"] for target in content["targets"]]
    ordered = sorted(
        points, key=lambda point: (point.load is None, point.load or 0, labels.index(point.label))
    )
    warnings = [
        f"{place(point, content['axis'])}: {text}{others(count)}"
        for point, text, count in worst_warnings(points)
    ]
    return environment.get_template("report.html.j2").render(
        content=content,
        settings=_settings(content["settings"]),
        targets=[(target, _facts(target["info"])) for target in content["targets"]],
        points=ordered,
        plots=plots(points, rounds, content["axis"]),
        warnings=warnings,
        errors=errors(points),
        comparisons=comparisons,
        metrics=METRICS,
        latencies=LATENCIES,
        statistics=STATISTICS,
        axis=content["axis"].replace("_", " "),
        series=SERIES,
        labels=labels,
        confidence=f"{CONFIDENCE:.0%}",
        few_samples=FEW_SAMPLES,
        cell=cell,
        load_label=load_label,
        ratio_text=ratio_text,
        verdict=verdict,
    )


def _settings(settings: dict[str, Any]) -> dict[str, str]:
    """Return the settings as words and values for people; those not used are left out."""
    objective = settings["objective"] or {}
    limits = [
        f"{name} at most {objective[key]:g} ms"
        for name, key in (("TTFT", "ttft_ms"), ("time per token", "tpot_ms"))
        if objective.get(key) is not None
    ]
    if settings["duration_s"] is not None:
        amount = f"as many as arrive in {settings['duration_s']:g} s, at least {settings['requests']}"
    else:
        amount = str(settings["requests"])
        amount += ", at least twice the concurrency" if settings["axis"] == "concurrency" else ""
    found = {
        "loads": ", ".join(load_label(load) for load in settings["loads"]),
        "requests a load and round": amount,
        "rounds": str(settings["rounds"]),
        "tokens in": settings["input_tokens"] or f"from {settings['dataset']}",
        "tokens out": settings["output_tokens"] or f"from {settings['dataset']}",
        "answers end": "after the tokens asked for"
        if settings["ignore_eos"]
        else "where the model ends them",
        "endpoint": settings["endpoint"],
        "seed": str(settings["seed"]),
        "objective": f"{' and '.join(limits)}, for {objective['attainment']:.0%} of the requests"
        if limits
        else "",
    }
    return {name: value for name, value in found.items() if value}


def _facts(info: dict[str, Any]) -> str:
    """Return what is known of a target's model, in one line."""
    if not info:
        return "says nothing about its model"
    quantization = info.get("quantization") or "not quantized"
    size = info.get("weight_bytes")
    versions = info.get("versions") or {}
    parts = [quantization, info.get("dtype")]
    parts.append(f"{size / 1e6:,.1f} MB of weights" if isinstance(size, int) else None)
    parts.append(f"vLLM {versions['vllm']}" if "vllm" in versions else None)
    return ", ".join(str(part) for part in parts if part)
