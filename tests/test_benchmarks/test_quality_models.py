# SPDX-License-Identifier: Apache-2.0
"""What the comparison does with models, on one of two layers."""

import pytest
import torch

from benchmarks.quality import rebase
from benchmarks.quality.dense import checkpoint_to_dense, linear_names, write_dense
from benchmarks.quality.project import with_activation
from benchmarks.quality.protocol import Protocol
from offline_quant.evaluate import evaluate, evaluation_text
from offline_quant.model_source import ModelSource
from offline_quant.plan import Settings, codebook_from_text
from offline_quant.quantize_checkpoint import quantize_checkpoint


@pytest.fixture
def protocol(tiny_llama, tmp_path):
    text = evaluation_text()
    return Protocol(tiny_llama, text, text, tmp_path / "out", 2, 2, 64, dtype=torch.float32)


@pytest.fixture
def checkpoint(tiny_llama, tmp_path):
    settings = Settings(codebook=codebook_from_text("3", "--bits"), lm_head_bits=16, activation="a16")
    quantize_checkpoint(tiny_llama, tmp_path / "pvq", settings)
    return tmp_path / "pvq"


def test_dense_model_of_a_checkpoint_is_the_checkpoint_without_quantized_activations(
    protocol, checkpoint, tiny_llama, tmp_path
):
    checkpoint_to_dense(checkpoint, tmp_path / "dense")
    dense = protocol.evaluate(tmp_path / "dense")
    packed = evaluate(checkpoint, tiny_llama, protocol.evaluation_text, 2, 64, torch.float32)
    assert dense["kl_divergence"] > 1e-3
    assert dense["kl_divergence"] == pytest.approx(packed["kl_divergence"], rel=0.02)
    assert dense["perplexity"] == pytest.approx(packed["perplexity"], rel=0.002)
    assert dense["perplexity_reference"] == pytest.approx(packed["perplexity_reference"])


def test_unchanged_model_has_no_divergence(protocol, tmp_path):
    write_dense(protocol.source, tmp_path / "same", {})
    result = protocol.evaluate(tmp_path / "same")
    assert result["kl_divergence"] == 0
    assert result["perplexity"] == result["perplexity_reference"]


def test_a_replacement_that_does_not_fit_is_refused(protocol, tmp_path):
    name = f"{linear_names(protocol.source)[0]}.weight"
    shape = protocol.source.tensors[name].shape
    with pytest.raises(ValueError, match="is no tensor"):
        write_dense(protocol.source, tmp_path / "a", {name: torch.zeros(1, 1)})
    with pytest.raises(ValueError, match="not finite"):
        write_dense(protocol.source, tmp_path / "b", {name: torch.full(shape, torch.nan)})


def test_another_activation_mode_keeps_the_weights(checkpoint, tmp_path):
    with_activation(checkpoint, tmp_path / "a8", "a8")
    assert '"activation": "a8"' in (tmp_path / "a8" / "config.json").read_text()
    for path in checkpoint.glob("*.safetensors"):
        assert (tmp_path / "a8" / path.name).read_bytes() == path.read_bytes()


def test_linear_names_are_those_of_the_decoder(tiny_llama):
    names = linear_names(ModelSource.open(tiny_llama))
    assert len(names) == 14
    assert all(".layers." in name for name in names)


def test_a_model_is_rebased_into_a_folder_of_a_fresh_checkout(tiny_llama, tmp_path):
    assert rebase.main([str(tiny_llama), str(tmp_path / "build" / "quality" / "base")]) == 0
    assert ModelSource.open(tmp_path / "build" / "quality" / "base").tensors
