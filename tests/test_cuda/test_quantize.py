# SPDX-License-Identifier: Apache-2.0
"""`pvq quantize` on a GPU: it repeats itself, resumes to the same bytes, and is as good as on the CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from offline_quant import checkpoint_writer
from offline_quant.calibration import LayerwiseForward
from offline_quant.calibration_data import calibration_tokens
from offline_quant.inspect import inspect_checkpoint
from offline_quant.model_source import ModelSource
from offline_quant.plan import Settings
from offline_quant.quantize_checkpoint import quantize_checkpoint

pytestmark = pytest.mark.cuda
SETTINGS = Settings(
    calibration="builtin", calibration_sequences=4, calibration_length=128, rotation="auto", device="cuda"
)
COMPARED = ("model.safetensors", "config.json", "report.json")


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in COMPARED]


@pytest.mark.parametrize("rotation", ["online", "auto"])
def test_a_gpu_is_as_good_as_the_cpu(tiny_llama, tmp_path, rotation):
    settings = replace(SETTINGS, rotation=rotation)
    there = quantize_checkpoint(tiny_llama, tmp_path / "gpu", settings)
    here = quantize_checkpoint(tiny_llama, tmp_path / "cpu", replace(settings, device="cpu"))
    assert inspect_checkpoint(tmp_path / "gpu")["verified"]
    for name, entry in there["modules"].items():
        assert entry["output_snr_db"] == pytest.approx(here["modules"][name]["output_snr_db"], abs=0.5), name


@pytest.mark.parametrize(
    "changes",
    [{}, {"target_bpw": 3.4}, {"calibration": "self"}, {"tune_epochs": 2}],
    ids=["calibrated", "average rate", "self", "tuned"],
)
def test_an_interrupted_run_resumes_to_the_same_bytes(tiny_llama, tmp_path, monkeypatch, changes):
    class Killed(Exception):
        pass

    settings = replace(SETTINGS, **changes)
    quantize_checkpoint(tiny_llama, tmp_path / "whole", settings)
    os_replace = checkpoint_writer.os.replace

    def killed_at_the_second_layer(source, destination):
        if Path(destination).name == "00004.safetensors":
            raise Killed
        os_replace(source, destination)

    monkeypatch.setattr(checkpoint_writer.os, "replace", killed_at_the_second_layer)
    with pytest.raises(Killed):
        quantize_checkpoint(tiny_llama, tmp_path / "out", settings)
    monkeypatch.undo()
    quantize_checkpoint(tiny_llama, tmp_path / "out", settings, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_hessians_are_those_of_the_cpu(tiny_llama):
    tokens = calibration_tokens(tiny_llama, "builtin", 4, 128)
    means = []
    for device in ("cpu", "cuda"):
        source = ModelSource.open(tiny_llama)
        forward = LayerwiseForward(source, tokens, torch.bfloat16, device)
        with forward.loaded(0):
            sums = forward.collect(0, source.linear_names(0))
        means.append({name: total.mean().cpu() for name, total in sums.items()})
    for name, mean in means[0].items():
        torch.testing.assert_close(means[1][name], mean, rtol=0.05, atol=0.02 * mean.abs().max().item())
