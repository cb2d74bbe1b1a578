# SPDX-License-Identifier: Apache-2.0
"""Sequences sampled from the model: its own distribution, the same for the same seed, bounded, resumable."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from offline_quant import checkpoint_writer, memory, self_calibration
from offline_quant.model_source import ModelSource
from offline_quant.plan import Settings
from offline_quant.quantize_checkpoint import quantize_checkpoint
from offline_quant.self_calibration import cache_bytes_per_token, sample_tokens
from pvq_vllm.codec.errors import PVQError

SETTINGS = Settings(calibration="self", calibration_sequences=2, calibration_length=24)


def test_the_same_seed_gives_the_same_tokens_and_batches_are_bounded(tiny_llama, monkeypatch):
    source = ModelSource.open(tiny_llama)
    first = sample_tokens(source, 3, 20, seed=4)
    assert first.shape == (3, 20) and first.dtype == torch.int64
    assert (first[:, 0] == 0).all()  # the model's beginning of a text
    assert torch.equal(first, sample_tokens(source, 3, 20, seed=4))
    assert not torch.equal(first, sample_tokens(source, 3, 20, seed=5))
    sizes = []
    monkeypatch.setattr(
        self_calibration,
        "CACHE_BYTES",
        50 * cache_bytes_per_token(source.skeleton.config, self_calibration.forward_dtype()),
    )
    forward = self_calibration._continue
    monkeypatch.setattr(
        self_calibration,
        "_continue",
        lambda model, tokens, *rest: sizes.append(len(tokens)) or forward(model, tokens, *rest),
    )
    assert sample_tokens(source, 5, 20, seed=4).shape == (5, 20)
    assert sizes == [2, 2, 1]


def test_tokens_follow_the_models_distribution(tiny_llama):
    """The second token over many sequences against the softmax behind the first."""
    drawn = sample_tokens(ModelSource.open(tiny_llama), 4000, 2, seed=0)[:, 1]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([[0]])).logits[0, -1].softmax(-1)
    found = torch.bincount(drawn, minlength=len(expected)) / 4000
    chi_square = (4000 * (found - expected).square() / expected).sum() / (len(expected) - 1)
    assert 0.7 < chi_square < 1.3


def test_a_run_is_resumed_with_the_tokens_it_began_with(tiny_llama, tmp_path, monkeypatch):
    report = quantize_checkpoint(tiny_llama, tmp_path / "whole", SETTINGS)
    assert report["calibration_tokens"] == 48

    class Killed(Exception):
        pass

    replace = checkpoint_writer.os.replace

    def killed_at_the_first_layer(source, destination):
        if destination.name == "00003.safetensors":
            raise Killed
        replace(source, destination)

    monkeypatch.setattr(checkpoint_writer.os, "replace", killed_at_the_first_layer)
    with pytest.raises(Killed):
        quantize_checkpoint(tiny_llama, tmp_path / "out", SETTINGS)
    monkeypatch.undo()
    assert (tmp_path / "out.partial" / "work" / "tokens.safetensors").exists()
    with monkeypatch.context() as patch:
        patch.delattr("offline_quant.quantize_checkpoint.sample_tokens")  # not drawn again
        quantize_checkpoint(tiny_llama, tmp_path / "out", SETTINGS, resume=True)
    for name in ("model.safetensors", "report.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1_000_000_000)
    with pytest.raises(
        PVQError, match=r"--calibration self needs the whole model in memory, 4\.3 GB .* 1\.0 GB"
    ):
        quantize_checkpoint(tiny_llama, tmp_path / "out", SETTINGS)
    assert list(tmp_path.iterdir()) == []
