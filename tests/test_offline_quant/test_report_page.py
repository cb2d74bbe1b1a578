# SPDX-License-Identifier: Apache-2.0
"""What a run tells of itself: page, timings, model card and the command to type again."""

import json
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from offline_quant import amplitude_histogram, cli
from offline_quant.amplitude_histogram import BIN_WIDTH, BINS, expected_group_power, group_power
from offline_quant.command_line import command_line
from offline_quant.plan import Settings, codebook_from_text
from offline_quant.quantize_checkpoint import quantize_checkpoint
from pvq_vllm.codec.amplitude import amplitude_distribution
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.rotation import Rotation

CALIBRATED = Settings(
    calibration="builtin", calibration_sequences=2, calibration_length=48, rotation="online"
)


class Page(HTMLParser):
    """Collects the cells of all rows, and every address that the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        if self.rows and data.strip():
            self.rows[-1].append(data.strip())


def test_the_page_shows_every_module_and_loads_nothing(tiny_llama, tmp_path):
    report = quantize_checkpoint(tiny_llama, tmp_path / "out", CALIBRATED)
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert all(address.startswith("#") for address in page.addresses)
    assert page.tags.count("svg") == 2
    shown = {row[0]: row for row in page.rows if row}
    timings = json.loads((tmp_path / "out" / "timings.json").read_text())
    assert set(timings["modules"]) == set(report["modules"])
    assert 0 < sum(timings["modules"].values()) < timings["seconds"]
    for name, entry in report["modules"].items():
        assert shown[name][1:5] == [
            entry["codebook"],
            f"{entry['out_features']} × {entry['in_features']}",
            f"{entry['bits_per_weight']:.3f}",
            f"{entry['weight_snr_db']:.2f}",
        ]


def test_the_histogram_of_gaussian_rows_is_the_beta_density():
    weight = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    counts, expected = group_power(weight, 8), expected_group_power(8, 8)
    assert counts.sum() == 4000 * 8 and expected.sum() == pytest.approx(1, abs=1e-6)
    assert np.abs(counts / counts.sum() - expected).max() < 0.003
    amplitude, probability = amplitude_distribution(4, 28)  # another way to the same distribution
    edges = np.arange(BINS) * BIN_WIDTH
    cumulative = np.interp(np.sqrt(np.minimum(edges / 8, 1)), amplitude, probability)
    assert np.abs(np.diff(cumulative) - expected[:-1]).max() < 1e-4


def test_rotation_makes_the_histogram_of_uneven_rows_that_of_gaussian_ones():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=generator) * torch.logspace(-1, 1, 512)
    histogram = amplitude_histogram.measure(weight, weight, Rotation(0, 512, 1, [512]), 8)
    counts = {key: np.array(values) / sum(values) for key, values in histogram.items()}
    distance = {key: np.abs(counts[key] - counts["expect"]).sum() for key in ("before", "after")}
    assert distance["before"] > 0.8 and distance["after"] < 0.1
    total = amplitude_histogram.add([histogram, histogram])
    assert total["after"] == [2 * count for count in histogram["after"]]


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        CALIBRATED,
        Settings(codebook=codebook_from_text("3", ""), overrides=(("a b|c", "2"), ("d", "16,27,4")), seed=7),
        Settings(codebook=codebook_from_text("16,27,4", ""), amplitude="beta", lm_head_bits=16),
        Settings(
            target_bpw=3.4, rates=("2", "16,27,3"), calibration="self", embedding_bits=8, activation="a16"
        ),
    ],
)
def test_the_command_leads_to_the_same_settings(tmp_path, monkeypatch, settings):
    import typer
    from typer.testing import CliRunner

    from offline_quant import quantize_checkpoint as module

    found = []

    def record(model, out, settings, *rest):
        found.append(settings)
        return {"bits_per_weight": 0, "size_bytes_quantized": 0, "size_bytes_base": 0}

    monkeypatch.setattr(module, "quantize_checkpoint", record)
    app = typer.Typer()
    app.command()(cli.quantize)
    words = shlex.split(command_line("base", settings))
    assert words[:4] == ["pvq", "quantize", "base", "OUT"]
    result = CliRunner().invoke(app, words[2:])
    assert result.exit_code == 0, result.output
    assert found == [settings]


def test_the_card_tells_the_command_and_takes_an_evaluation(tiny_llama, tmp_path):
    report = quantize_checkpoint(tiny_llama, tmp_path / "out", Settings())
    card = tmp_path / "out" / "README.md"
    assert f"```console\n{report['command']}\n```" in card.read_text()
    arguments = {"reference": tiny_llama, "sequences": 2, "length": 32, "update_card": True}
    plain = card.read_text()
    for _ in range(2):  # the second replaces the first
        cli.eval_(tmp_path / "out", **arguments)
        rows = re.findall(
            r"^\| (Perplexity|KL divergence|Top-1).* \| .*2 x 32 tokens of evaluation", card.read_text(), re.M
        )
        assert rows == ["Perplexity", "KL divergence", "Top-1"]
    kept = [line for line in card.read_text().split("\n") if "2 x 32 tokens" not in line]
    assert kept == plain.split("\n")
    with pytest.raises(PVQError, match=r"--update-card: there is no .*README\.md"):
        cli.eval_(tiny_llama, **arguments)
