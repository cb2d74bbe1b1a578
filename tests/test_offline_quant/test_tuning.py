# SPDX-License-Identifier: Apache-2.0
"""Tuning of scales and norms: gradients, what is stored, that it lowers the divergence, and that it resumes."""

import bisect
import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from offline_quant import calibration, memory, norms, tuning
from offline_quant.calibration_data import calibration_tokens
from offline_quant.evaluate import compare_logits, load_model
from offline_quant.inspect import inspect_checkpoint
from offline_quant.model_source import ModelSource
from offline_quant.norms import norm_offset
from offline_quant.plan import Settings, codebook_from_text
from offline_quant.quantize_checkpoint import quantize_checkpoint
from offline_quant.weight_quantizer import dequantize_weight
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import Codebook

DATA = {"calibration": "builtin", "calibration_sequences": 6, "calibration_length": 48}


def settings(**others) -> Settings:
    return Settings(**{**DATA, "lm_head_bits": 16, "activation": "a16", **others})


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    for module in (calibration, tuning, memory):
        monkeypatch.setattr(module, "forward_dtype", lambda device="cpu": torch.float32)


def divergence(folder, base, ids: torch.Tensor) -> float:
    with torch.inference_mode():
        found, expected = (load_model(one, torch.float32)(ids).logits for one in (folder, base))
    samples = [compare_logits(*pair) for pair in zip(found, expected, ids, strict=True)]
    return sum(sample["kl_divergence"] for sample in samples) / len(samples)


@pytest.mark.parametrize(
    ("name", "rotation"),
    [("llama", "online"), ("llama", "residual"), ("qwen2", "online"), ("qwen3-tied", "online")],
)
def test_tuning_lowers_the_divergence_and_changes_only_scales_and_norms(
    tiny_model_folder, tmp_path, monkeypatch, name, rotation
):
    monkeypatch.setattr(tuning, "STEP_TOKENS", 96)
    folder = tiny_model_folder(name)
    ids = calibration_tokens(folder, "builtin", 6, 48)
    options = {"codebook": codebook_from_text("2", "--bits"), "rotation": rotation}
    quantize_checkpoint(folder, tmp_path / "plain", settings(**options))
    quantize_checkpoint(folder, tmp_path / "tuned", settings(**options, tune_epochs=6))
    assert divergence(tmp_path / "tuned", folder, ids) < 0.9 * divergence(tmp_path / "plain", folder, ids)
    plain, tuned = (load_file(tmp_path / kind / "model.safetensors") for kind in ("plain", "tuned"))
    assert plain.keys() == tuned.keys()
    for key, tensor in plain.items():
        assert tuned[key].dtype == tensor.dtype
        if key.endswith("weight_scale"):
            assert (tuned[key] > 0).all() and not torch.equal(tuned[key], tensor)
        elif "norm" not in key:
            assert torch.equal(tuned[key], tensor), key
    assert any("norm" in key and not torch.equal(tuned[key], plain[key]) for key in plain)


def test_the_report_tells_the_error_of_the_tuned_scales(tiny_llama, tmp_path):
    """Of weights as they are stored in the end. Nothing is told of the outputs, whose Hessians are gone."""
    wanted = settings(overrides=(("down_proj", "3"),), rotation="none", tune_epochs=2, lm_head_bits=8)
    report = quantize_checkpoint(tiny_llama, tmp_path / "out", wanted)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    stored, base = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(tiny_llama / "model.safetensors"),
    )
    for name, entry in report["modules"].items():
        if name != "lm_head":
            weight = base[f"{name}.weight"].double()
            tensors = {kind: stored[f"{name}.{kind}"] for kind in ("weight_packed", "weight_scale")}
            codebook = Codebook(entry["codebook"])
            restored = dequantize_weight(tensors, codebook, weight.shape[1], None, torch.float64)
            snr = 10 * torch.log10(weight.square().sum() / (restored - weight).square().sum()).item()
            assert entry["weight_snr_db"] == pytest.approx(snr, abs=0.002)
            assert entry["output_snr_db"] is None
    assert report["modules"]["lm_head"]["output_snr_db"] > 30  # is not tuned
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        "<!-- weight SNR, dB -->" in page and "<!-- output SNR, dB -->" not in page
    )  # the label of the picture
    assert all(
        module["output_snr_db"] is None
        for module in inspect_checkpoint(tmp_path / "out")["modules"]
        if module["name"] != "lm_head"
    )


def test_gradient_is_that_of_the_divergence(tiny_llama, monkeypatch):
    monkeypatch.setattr(
        tuning, "CACHED", 7 * 512 // 2 // torch.get_num_threads()
    )  # about seven positions at a time
    base = load_model(tiny_llama, torch.float32)
    model = tuning._whole_model(ModelSource.open(tiny_llama), torch.float32, "cpu")
    linear = model.model.layers[0].mlp.up_proj
    linear.weight.data = linear.weight.data.round(decimals=1)
    factor = tuning._multiply_rows(linear)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        given = base(input_ids=ids).logits[0]
    total = tuning._backward(model, ids, given, 10)
    log_r, log_p = (one(input_ids=ids).logits[0].log_softmax(-1) for one in (base, model))
    expected = (log_r.exp() * (log_r - log_p)).sum()
    assert total == pytest.approx(expected.item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(expected / 10, factor)
    torch.testing.assert_close(factor.grad, gradient, rtol=1e-3, atol=1e-8)


def test_buffers_of_the_shards_are_read(tiny_llama, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    tensors = load_file(folder / "model.safetensors")
    source = ModelSource.open(folder)
    source.layers[0].register_buffer("scalar", torch.ones(1))
    save_file({**tensors, "model.layers.0.scalar": torch.full((1,), 0.5)}, folder / "model.safetensors")
    source = dataclasses.replace(source, tensors=ModelSource.open(folder).tensors)
    assert tuning._whole_model(source, torch.float32, "cpu").model.layers[0].scalar.item() == 0.5


@pytest.mark.parametrize("name", ["llama", "qwen3-tied"])
def test_the_whole_model_is_the_model(tiny_model_folder, name):
    folder = tiny_model_folder(name)
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        found = tuning._whole_model(ModelSource.open(folder), torch.float32, "cpu")(ids).logits
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(found, expected)


def test_norms_are_told_apart():
    with torch.device("meta"):
        norms = [LlamaRMSNorm(16), GemmaRMSNorm(16), nn.LayerNorm(16), nn.LayerNorm(16, bias=False)]
    assert [norm_offset(norm) for norm in norms] == [0.0, 1.0, None, None]


def test_a_killed_run_resumes_to_the_same_bytes(tiny_llama, tmp_path, killer):
    """Killed in place of each rename of a file in turn."""
    wanted = settings(tune_epochs=2, max_shard_bytes=60_000)
    quantize_checkpoint(tiny_llama, tmp_path / "whole", wanted)
    out, tuned_before = tmp_path / "out", False
    for kills in range(60):
        killer.allowed = kills + 1
        try:
            quantize_checkpoint(tiny_llama, out, wanted, resume=kills > 0)
            break
        except killer.Killed:
            tuned_before |= (tmp_path / "out.partial" / "work" / "tuned.safetensors").exists()
    assert tuned_before
    for path in (tmp_path / "whole").iterdir():
        if path.name not in ("timings.json", "report.html"):
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_cannot_be_tuned_is_refused(tiny_llama, tmp_path, monkeypatch):
    with pytest.raises(PVQError, match="--tune-epochs is -1"):
        settings(tune_epochs=-1)
    with pytest.raises(PVQError, match="--tune-epochs needs data"):
        Settings(tune_epochs=1)
    monkeypatch.setattr(memory, "free_memory", lambda device: 100)
    with pytest.raises(PVQError, match="--tune-epochs needs the whole model in memory"):
        quantize_checkpoint(tiny_llama, tmp_path / "out", settings(tune_epochs=1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("has_bias", [False, True])
def test_scaled_rows_have_the_gradients_of_autograd(monkeypatch, has_bias):
    monkeypatch.setattr(norms, "CACHED", 3 * 8 // torch.get_num_threads())  # three rows at a time, or so
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 5, generator=generator).mT.requires_grad_()  # not contiguous
    logarithm = torch.randn(8, generator=generator, requires_grad=True)
    bias = torch.randn(8, generator=generator) if has_bias else None
    given = torch.randn(2, 5, 8, generator=generator)
    shift = bias if has_bias else 0
    expected = (x - shift) * logarithm.exp() + shift
    found = tuning.ScaledRows.apply(x, logarithm, bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # in float32
    wanted = torch.autograd.grad(expected, (x, logarithm), given)
    torch.testing.assert_close(
        torch.autograd.grad(found, (x, logarithm), given), wanted, rtol=1e-5, atol=1e-5
    )


def test_scaled_rows_are_rounded_once():
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    logarithm, bias = torch.linspace(-0.3, 0.3, 96), torch.linspace(-2, 2, 96).bfloat16()
    expected = ((x.float() - bias.float()) * logarithm.exp() + bias.float()).bfloat16()
    assert torch.equal(tuning.ScaledRows.apply(x, logarithm, bias), expected)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor does not multiply bfloat16"
)
def test_tuning_in_bfloat16_repeats_itself(tiny_llama, tmp_path, monkeypatch):
    for module in (calibration, tuning, memory):
        monkeypatch.setattr(module, "forward_dtype", lambda device="cpu": torch.bfloat16)
    wanted = settings(codebook=codebook_from_text("2", "--bits"), tune_epochs=3)
    for name in ("one", "other"):
        quantize_checkpoint(tiny_llama, tmp_path / name, wanted)
    quantize_checkpoint(tiny_llama, tmp_path / "plain", dataclasses.replace(wanted, tune_epochs=0))
    ids = calibration_tokens(tiny_llama, "builtin", 6, 48)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other
    assert divergence(tmp_path / "one", tiny_llama, ids) < divergence(tmp_path / "plain", tiny_llama, ids)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3-tied"])
def test_the_logits_of_the_base_are_the_models(tiny_model_folder, monkeypatch, name):
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 24)  # two sequences
    folder = tiny_model_folder(name)
    ids = torch.arange(60).view(5, 12)
    base = tuning.Base(ModelSource.open(folder), ids, "cpu", lambda text: None)
    with torch.inference_mode():
        expected = load_model(folder, torch.float32)(ids).logits
    with base.head_loaded():
        found = torch.stack([base.logits(index) for index in range(5)])
    torch.testing.assert_close(found, expected)


def test_memory_for_tuning_grows_with_what_is_kept(tiny_llama, monkeypatch):
    source = ModelSource.open(tiny_llama)
    vocabulary, width = source.weight_shape("lm_head")

    def fits(free: int, *size: int) -> bool:
        monkeypatch.setattr(memory, "free_memory", lambda device: free)
        try:
            tuning.check_tuning_memory(source, "cpu", *size)
        except PVQError:
            return False
        return True

    def needed(*size: int) -> int:
        return bisect.bisect_left(range(1 << 30), True, key=lambda free: fits(free, *size))

    least = needed(4, 64)
    assert needed(40, 64) - least >= 36 * 64 * width * 4  # hidden states of the base
    layers = 2 * len(source.layers) * width * 4
    assert needed(4, 128) - least >= 64 * (
        3 * vocabulary * 4 + layers
    )  # logits, gradient, the base's; some of each layer
