# SPDX-License-Identifier: Apache-2.0
"""The three numbers against their definitions, and their confidence intervals."""

import json
import math

import pytest
import torch

from offline_quant.evaluate import compare_logits, evaluate, evaluation_text, load_model, mean_and_interval
from offline_quant.plan import Settings, codebook_from_text
from offline_quant.quantize_checkpoint import quantize_checkpoint
from pvq_vllm.codec.errors import PVQError


def test_comparison_of_logits_follows_the_definitions():
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 300, 50, generator=generator).unbind()
    ids = torch.randint(50, (300,), generator=generator)
    p, r = logits.softmax(-1), reference.softmax(-1)
    result = compare_logits(logits, reference, ids)
    assert result["kl_divergence"] == pytest.approx((r * (r / p).log()).sum(-1).mean().item(), rel=1e-5)
    assert result["top1_agreement"] == pytest.approx((p.argmax(-1) == r.argmax(-1)).float().mean().item())
    losses = (
        torch.nn.functional.cross_entropy(logits[:-1], ids[1:]),
        torch.nn.functional.cross_entropy(reference[:-1], ids[1:]),
    )
    assert result["loss"] == pytest.approx(losses[0].item(), rel=1e-5)
    assert result["loss_reference"] == pytest.approx(losses[1].item(), rel=1e-5)
    same = compare_logits(logits, logits, ids)
    assert same["kl_divergence"] == 0 and same["top1_agreement"] == 1


def test_logits_that_are_not_numbers_are_an_error():
    logits = torch.zeros(4, 8)
    broken = logits.clone()
    broken[2, 5] = torch.nan
    ids = torch.arange(4)
    with pytest.raises(PVQError, match=r"^the model answers"):
        compare_logits(broken, logits, ids)
    with pytest.raises(PVQError, match=r"^its reference answers"):
        compare_logits(logits, broken, ids)
    broken[2, 5] = -torch.inf  # a token that is ruled out is fine
    assert compare_logits(logits, broken, ids)["loss"] == pytest.approx(math.log(8))


def test_interval_is_students_t():
    mean, (low, high) = mean_and_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182 * math.sqrt(5 / 3) / 2
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))
    assert mean_and_interval([1.0]) == (1.0, None)
    low, high = mean_and_interval([0.0, 1.0] * 50)[1]
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(25 / 99) / 10)


def test_a_quantized_model_is_near_its_base_and_nearer_with_more_bits(tiny_llama, tmp_path):
    results = {}
    for bits in ("2", "4", "8"):
        quantize_checkpoint(
            tiny_llama, tmp_path / bits, Settings(codebook=codebook_from_text(bits, "--bits"))
        )
        results[bits] = evaluate(tmp_path / bits, tiny_llama, evaluation_text(), 3, 64, torch.float32)
    divergence = {bits: result["kl_divergence"] for bits, result in results.items()}
    assert divergence["2"] > 4 * divergence["4"] > 16 * divergence["8"] > 0
    assert results["8"]["top1_agreement"] > 0.95
    low, high = results["4"]["kl_divergence_ci95"]
    assert low < divergence["4"] < high
    same = evaluate(tiny_llama, tiny_llama, evaluation_text(), 3, 64, torch.float32)
    assert same["kl_divergence"] == 0 and same["perplexity"] == same["perplexity_reference"]


def test_unusable_input_is_named_before_anything_is_loaded(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("offline_quant.evaluate._load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(PVQError, match="fewer than 1000 x 1000"):
        evaluate(tiny_llama, tiny_llama, evaluation_text(), 1000, 1000)
    with pytest.raises(PVQError, match="nowhere"):
        evaluate(tmp_path / "nowhere", tiny_llama, evaluation_text(), 1, 8)
    with pytest.raises(PVQError, match=r"nothing\.txt"):
        evaluate(tiny_llama, tiny_llama, tmp_path / "nothing.txt", 1, 8)
    with pytest.raises(PVQError, match=r"--length is 9000, but .* has 8192 positions: lower it"):
        evaluate(tiny_llama, tiny_llama, evaluation_text(), 1, 9000)
    monkeypatch.setattr("offline_quant.evaluate.tokenize", lambda *_: torch.full((64,), 10**6))
    with pytest.raises(
        PVQError,
        match="the tokenizer gives token 1000000, but the model's embedding has only 512 rows: copy the tokenizer",
    ):
        evaluate(tiny_llama, tiny_llama, evaluation_text(), 1, 8)


@torch.inference_mode()
def test_a_checkpoint_is_loaded_with_another_activation_mode(tiny_llama, tmp_path):
    quantize_checkpoint(tiny_llama, tmp_path / "a8", Settings())
    ids = torch.arange(40)[None]
    a8, a16, again = (load_model(tmp_path / "a8", torch.float32, "cpu", mode) for mode in ("a8", "a16", None))
    assert torch.equal(a8(ids).logits, again(ids).logits)
    config = json.loads((tmp_path / "a8" / "config.json").read_text())
    config["quantization_config"]["activation"] = "a16"
    (tmp_path / "a8" / "config.json").write_text(json.dumps(config))
    stored = load_model(tmp_path / "a8", torch.float32)
    assert torch.equal(a16(ids).logits, stored(ids).logits)
    assert not torch.equal(a16(ids).logits, a8(ids).logits)
    with pytest.raises(PVQError, match="activation is 'a9', but must be one of a8"):
        load_model(tmp_path / "a8", torch.float32, activation="a9")
    with pytest.raises(PVQError, match="is not quantized with PVQ, so its activations have no mode a16"):
        load_model(tiny_llama, torch.float32, activation="a16")
