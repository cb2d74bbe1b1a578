# SPDX-License-Identifier: Apache-2.0
"""report.html of a run: one file with facts, pictures and a table of all modules, to be opened offline.

Pictures: error, bits and time of every decoder layer; how the power of weight rows is shared between groups,
before and after rotation, against the Beta distribution of Gaussian weights (``amplitude_histogram``).
"""

import html
import io
import re

import numpy as np

from .amplitude_histogram import BIN_WIDTH, BINS

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; }}
thead th {{ position: sticky; top: 0; background: #fff; }}
svg {{ max-width: 100%; height: auto; }} figure {{ margin: 1.5rem 0; }}
pre {{ overflow-x: auto; background: #f4f4f4; padding: .7rem; }}
</style></head><body>
<h1>{title}</h1>
<table>{facts}</table>
<pre>{command}</pre>
{figures}
<h2>Modules</h2>
<table><thead><tr><th>module</th><th>codebook</th><th>shape</th><th>bits a weight</th><th>weight SNR, dB</th>
<th>output SNR, dB</th><th>seconds</th></tr></thead><tbody>
{rows}
</tbody></table></body></html>
"""


def report_page(report: dict, timings: dict, layers: list[dict]) -> str:
    """Return the page.

    Args:
        report: content of report.json; timings: of timings.json.
        layers: of every decoder layer, in order: ``modules`` (names), ``group_power`` (histograms of
            ``amplitude_histogram.measure``, or an empty list) and ``seconds``.
    """
    phases = ", ".join(f"{phase} {seconds:,.1f}" for phase, seconds in timings["phases"].items())
    facts = [
        ("Base model", report["base_model"]),
        ("Codebook", report["codebook"]),
        ("Bits a weight, layers", f"{report['bits_per_weight']:.3f}"),
        (
            "Bits a weight, head and embedding included where quantized",
            f"{report['bits_per_weight_with_head']:.3f}",
        ),
        ("Size of the tensors", f"{report['size_bytes_quantized'] / 1e6:,.1f} MB"),
        (
            "Calibration",
            f"{report['calibration_tokens']:,} tokens" if report["calibration_tokens"] else "none",
        ),
        ("Time", f"{timings['seconds']:,.1f} s ({phases})"),
    ]
    if report["predicted_kl_divergence"] is not None:
        facts.append(("Predicted KL divergence", f"{report['predicted_kl_divergence']:.4f} nats a token"))
    figures = [
        _figure(_draw_layers(report, layers), "Signal-to-noise ratio, bits and time of every decoder layer."),
    ]
    if any(layer["group_power"] for layer in layers):
        figures.append(
            _figure(
                _draw_group_power(layers),
                "Power of a group of weights over the mean of its row, one row of the picture for every decoder "
                "layer (the first on top). Grey: as expected of Gaussian weights, G Beta(D/2, D (G-1)/2).",
            )
        )
    return PAGE.format(
        title=html.escape(f"{report['base_model']}, quantized with PVQ"),
        facts="".join(f"<tr><td>{name}</td><td>{html.escape(value)}</td></tr>" for name, value in facts),
        command=html.escape(report["command"]),
        figures="\n".join(figures),
        rows="\n".join(
            _row(name, entry, timings["modules"][name]) for name, entry in report["modules"].items()
        ),
    )


def _row(name: str, entry: dict, seconds: float) -> str:
    decibels = [
        "" if entry[key] is None else f"{entry[key]:.2f}" for key in ("weight_snr_db", "output_snr_db")
    ]
    cells = [
        html.escape(name),
        entry["codebook"],
        f"{entry['out_features']} × {entry['in_features']}",
        f"{entry['bits_per_weight']:.3f}",
        *decibels,
        f"{seconds:.2f}",
    ]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _svg(figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = stream.getvalue()
    return re.sub(r"^.*?(?=<svg)", "", text, flags=re.DOTALL)


def _new_figure(rows: int, columns: int, size: tuple[float, float], **arguments):
    # Without pyplot: no global state, no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **arguments)


def _draw_layers(report: dict, layers: list[dict]) -> str:
    figure, axes = _new_figure(3, 1, (9, 8), sharex=True)
    known = [report["modules"][name]["output_snr_db"] for layer in layers for name in layer["modules"]]
    key = "weight_snr_db" if all(value is None for value in known) else "output_snr_db"
    kinds: dict[str, list[tuple[int, dict]]] = {}
    for index, layer in enumerate(layers):
        for name in layer["modules"]:
            kinds.setdefault(name.rpartition(".")[2], []).append((index, report["modules"][name]))
    for kind, entries in kinds.items():
        for axis, field in ((axes[0, 0], key), (axes[1, 0], "bits_per_weight")):
            points = [(index, entry[field]) for index, entry in entries if entry[field] is not None]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=kind) if points else None
    axes[0, 0].set_ylabel("output SNR, dB" if key == "output_snr_db" else "weight SNR, dB")
    axes[1, 0].set_ylabel("bits a weight")
    axes[2, 0].bar(range(len(layers)), [layer["seconds"] for layer in layers], color="#888")
    axes[2, 0].set_ylabel("seconds")
    axes[2, 0].set_xlabel("decoder layer")
    axes[0, 0].legend(ncols=7, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))
    low, high = axes[1, 0].get_ylim()
    axes[1, 0].set_ylim(np.floor(low), np.ceil(high))  # or the row scales alone would fill the picture
    for axis in axes[:, 0]:
        axis.grid(alpha=0.3)
    return _svg(figure)


def _draw_group_power(layers: list[dict]) -> str:
    """One line a layer, each shifted down by one; heights are densities, cut at the top of the range."""
    figure, axes = _new_figure(1, 2, (9, 1.5 + 0.3 * len(layers)), sharey=True)
    x = (np.arange(BINS) + 0.5) * BIN_WIDTH
    for axis, key, colour in ((axes[0, 0], "before", "#c33"), (axes[0, 1], "after", "#06c")):
        for index, layer in enumerate(layers):
            if not layer["group_power"]:
                continue
            counts, expected = (np.array(layer["group_power"][which]) for which in (key, "expect"))
            axis.plot(x, expected / expected.sum() / BIN_WIDTH - index, color="#999", linewidth=2.5)
            axis.plot(x, counts / counts.sum() / BIN_WIDTH - index, color=colour, linewidth=0.9)
        axis.set_title(f"{key} rotation")
        axis.set_xlabel("power of a group / mean of its row")
        axis.set_yticks([-index for index in range(0, len(layers), 5)], range(0, len(layers), 5))
    axes[0, 0].set_ylabel("decoder layer")
    return _svg(figure)
