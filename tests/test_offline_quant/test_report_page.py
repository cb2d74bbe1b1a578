# SPDX-License-Identifier: Apache-2.0
"""What a run tells of itself: page, timings, model card and the command to type again."""

import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from offline_quant import amplitude_histogram, checkpoint_writer, cli, part_worker, sensitivity
from offline_quant import quantize_checkpoint as module
from offline_quant.amplitude_histogram import BIN_WIDTH, BINS, expected_group_power, group_power
from offline_quant.command_line import command_line
from offline_quant.model_card import NOT_MEASURED
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
    assert report["command"].endswith(f" --threads {torch.get_num_threads()}")  # they decide the bytes
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


def test_every_phase_has_a_time_of_its_own(tiny_llama, tmp_path, monkeypatch):
    """By a clock that stands still but for the phases: a layer's time is not that of what its first call causes."""
    clock = SimpleNamespace(now=0, perf_counter=lambda: clock.now)
    for place in (checkpoint_writer, part_worker):
        monkeypatch.setattr(place, "time", clock)

    def takes(seconds: int, place, name: str) -> None:
        function = getattr(place, name)

        def slow(*arguments, **options):
            clock.now += seconds
            return function(*arguments, **options)

        monkeypatch.setattr(place, name, slow)

    takes(10_000, module, "sample_tokens")
    takes(2_000, module, "output_gradients")
    takes(10, sensitivity, "row_losses")
    takes(50, module, "tuned_tensors")
    takes(1, part_worker, "quantize_weight")
    settings = replace(CALIBRATED, calibration="self", target_bpw=3.0, rates=("2", "4"), tune_epochs=1)
    quantize_checkpoint(tiny_llama, tmp_path / "a", settings)
    timings = json.loads((tmp_path / "a" / "timings.json").read_text())
    phases = {"sampling": 10_000, "gradients": 2_000, "sensitivities": 280, "tuning": 50, "parts": 15}
    assert timings["phases"] == phases and timings["seconds"] == sum(phases.values())
    page = Page((tmp_path / "a" / "report.html").read_text())
    assert [
        "Time",
        "12,345.0 s (sampling 10,000.0, gradients 2,000.0, sensitivities 280.0, tuning 50.0, parts 15.0)",
    ] in page.rows
    settings = replace(CALIBRATED, token_weights="uniform")
    quantize_checkpoint(tiny_llama, tmp_path / "b", settings)
    assert json.loads((tmp_path / "b" / "timings.json").read_text())["phases"] == {"parts": 15}
    quantize_checkpoint(tiny_llama, tmp_path / "c", CALIBRATED)  # measured when the first layer asks for them
    phases = {"gradients": 2_000, "parts": 15}
    assert json.loads((tmp_path / "c" / "timings.json").read_text())["phases"] == phases


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

    found = []

    def record(model, out, settings, *rest):
        found.append(settings)
        return {
            "bits_per_weight": 0,
            "size_bytes_quantized": 0,
            "size_bytes_base": 0,
            "unquantized_share": 0,
            "modules": {},
            "calibration_tokens": 0,
        }

    monkeypatch.setattr(module, "quantize_checkpoint", record)
    app = typer.Typer()
    app.command()(cli.quantize)
    before = torch.get_num_threads()
    words = shlex.split(command_line("base", settings, 3))
    assert words[:4] == ["pvq", "quantize", "base", "OUT"]
    result = CliRunner().invoke(app, words[2:])
    assert result.exit_code == 0, result.output
    assert found == [settings] and torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_the_card_tells_the_command_and_takes_an_evaluation(tiny_llama, tmp_path):
    report = quantize_checkpoint(tiny_llama, tmp_path / "out", Settings())
    card = tmp_path / "out" / "README.md"
    assert (
        f"```console\n{report['command']}\n```" in card.read_text() and "--threads" not in report["command"]
    )
    arguments = {"reference": tiny_llama, "sequences": 2, "length": 32, "update_card": True}
    plain = card.read_text()
    for _ in range(2):  # the second replaces the first
        cli.eval_(tmp_path / "out", **arguments)
        rows = re.findall(
            r"^\| (Perplexity|KL divergence|Top-1).* \| .*2 x 32 tokens of evaluation", card.read_text(), re.M
        )
        assert rows == ["Perplexity", "KL divergence", "Top-1"]
    kept = [line for line in card.read_text().split("\n") if "2 x 32 tokens" not in line]
    assert kept == plain.replace(f"{NOT_MEASURED}\n", "").split("\n") != plain.split("\n")
    with pytest.raises(PVQError, match=r"--update-card: there is no .*README\.md"):
        cli.eval_(tiny_llama, **arguments)
    card.write_text("rewritten")
    with pytest.raises(PVQError, match=r"no row '\| Calibration \|'"):  # before the evaluation
        cli.eval_(tmp_path / "out", reference=tmp_path / "nowhere", update_card=True)
