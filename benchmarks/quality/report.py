# SPDX-License-Identifier: Apache-2.0
"""The table and the picture of a comparison."""

import json
from pathlib import Path

from offline_quant.whole_files import write_file
from pvq_vllm.codec.errors import PVQError

BEGIN, END = "<!-- table: written by benchmarks/quality -->", "<!-- end of table -->"
OURS = "PVQ (this project)"
TUNED = "PVQ (this project), tuned"
MIXED = "PVQ (this project), canonical rates too"
NOT_WEIGHT_ONLY = "PVQ, activations too"  # in the table, but neither in the picture nor on the front
VARIANT = "PVQ, other options"  # likewise
PERPLEXITY_SHOWN = 100  # what is worse would press the rest together


def pareto_front(records: list[dict], lower: str = "kl_divergence") -> list[dict]:
    """Return the records that no other one beats in bits and in ``lower`` at once, by bits."""
    front: list[dict] = []
    for record in sorted(records, key=lambda r: (_bits(r), r[lower])):
        if not front or record[lower] < front[-1][lower]:
            front.append(record)
    return front


def _bits(record: dict) -> float:
    """Bits a weight as the table has them: what differs by less is no difference."""
    return round(record["bits_per_weight"], 3)


def table(records: list[dict]) -> str:
    """Return the table in Markdown, by bits a weight, with the Pareto front in bold."""
    weight_only = [record for record in records if record["family"] not in (NOT_WEIGHT_ONLY, VARIANT)]
    front = {record["key"] for record in pareto_front(weight_only)}
    lines = [
        "| method | bits a weight | KL divergence (95%) | perplexity | top-1 agreement | device, commit |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for record in sorted(records, key=lambda r: (_bits(r), r["kl_divergence"])):
        mark = "**" if record["key"] in front and record["bits_per_weight"] < 16 else ""
        interval = record["kl_divergence_ci95"]  # None for a single sequence
        agreement = "" if record["top1_agreement"] is None else f"{record['top1_agreement']:.3f}"
        spread = "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"
        lines.append(
            f"| {mark}{record['label']}{mark} | {record['bits_per_weight']:.3f} | "
            f"{record['kl_divergence']:.4f}{spread} | {record['perplexity']:.2f} | "
            f"{agreement} | {record['device']} {record['commit'][:7]}{'+' * record['commit'].endswith('+')} |"
        )
    return "\n".join(lines)


def draw(records: list[dict], path: Path) -> None:
    """Write the picture: KL divergence and perplexity against bits a weight; lines join this project's points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 6.2), constrained_layout=True)
    base = next((record for record in records if record["family"] == "base"), None)
    families = sorted(
        {record["family"] for record in records} - {"base", OURS, TUNED, MIXED, NOT_WEIGHT_ONLY, VARIANT}
    )
    markers = "osv^D<>pX*hP"
    for axis, key, name in (
        (axes[0], "kl_divergence", "KL divergence to the unquantized model"),
        (axes[1], "perplexity", "perplexity"),
    ):
        for index, family in enumerate(families):
            points = sorted((r["bits_per_weight"], r[key]) for r in records if r["family"] == family)
            axis.plot(*zip(*points, strict=True), markers[index % len(markers)], label=family, markersize=6)
        for family, style in ((OURS, "k-o"), (TUNED, "k--o"), (MIXED, "k:s")):
            ours = sorted((r["bits_per_weight"], r[key]) for r in records if r["family"] == family)
            if ours:
                axis.plot(*zip(*ours, strict=True), style, label=family, linewidth=1.5, markersize=5)
        if base is not None and key == "perplexity":
            axis.axhline(base["perplexity"], color="grey", linestyle=":", label="unquantized")
        axis.set(xlabel="bits a weight in the linear layers, scales included", ylabel=name, yscale="log")
        if key == "perplexity" and max(record[key] for record in records) > PERPLEXITY_SHOWN:
            axis.set(
                ylim=(0.95 * min(record[key] for record in records), PERPLEXITY_SHOWN),
                ylabel=f"{name} (above {PERPLEXITY_SHOWN}: not shown)",
            )
            # Labels at 20, 30, … too: the axis is not much longer than a power of ten.
            axis.yaxis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(2, 1)))
        axis.grid(True, which="both", alpha=0.25)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


class KeptRows:
    """The file with all rows of a table, which may come from several machines.

    Args:
        setting: ``Protocol.setting`` of the rows.
    Raises:
        PVQError: the file has rows of another setting.
    """

    def __init__(self, path: Path, setting: dict) -> None:
        self._path = path
        self._content = json.loads(path.read_text()) if path.exists() else {**setting, "rows": []}
        different = [key for key in setting if self._content[key] != setting[key]]
        if different:
            raise PVQError(
                f"{path} has rows of other {' and '.join(different)}: give theirs (--model, --calibration, --evaluation, "
                "--calibration-sequences, --evaluation-sequences, --length), or move the file away to begin a new table"
            )

    def rows(self) -> list[dict]:
        return self._content["rows"]

    def add(self, new: list[dict], others: list[dict]) -> None:
        """Put in rows: ``new`` ones in the place of older ones with their keys, ``others`` only where there is none."""
        rows = {record["key"]: record for record in (*others, *self.rows(), *new)}
        self._content["rows"] = [rows[key] for key in sorted(rows)]
        write_file(self._path, f"{json.dumps(self._content, indent=1)}\n".encode())


def write_report(records: list[dict], folder: Path) -> None:
    """Write quality.png and quality.md into ``folder``; of an existing page only the table is replaced."""
    draw(records, folder / "quality.png")
    page = folder / "quality.md"
    content = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    before, rest = content.split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n\n{table(records)}\n\n{END}{after}")
