# SPDX-License-Identifier: Apache-2.0
"""A model with its residual stream rotated computes the same, and what cannot be rotated is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from offline_quant import residual_rotation
from offline_quant.model_source import ModelSource
from offline_quant.rebase import rebase_model
from offline_quant.residual_rotation import CannotFold, FoldedSource, hadamard_rotation, random_rotation
from pvq_vllm.codec.errors import PVQError

IDS = torch.arange(2, 50).view(2, 24) * 7 % 512
PREFIX = "model.layers.1."


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(IDS).logits


def with_random_norms(folder: Path, out: Path) -> Path:
    """Copy the model in float32; gains of one would test nothing."""
    shutil.copytree(folder, out)
    generator = torch.Generator().manual_seed(1)
    tensors = {name: tensor.float() for name, tensor in load_file(out / "model.safetensors").items()}
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def save_other_model(config, folder: Path) -> Path:
    """Write a small random model of another architecture."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def small(**changes) -> dict:
    sizes = dict(
        hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    )
    return {**sizes, "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0, **changes}


def assert_same_logits(folder: Path, folded: Path) -> None:
    expected, found = logits_of(folder), logits_of(folded)
    assert expected.std() > 0.05
    # Both in float32, whose rounding leaves about 1e-6 of the logits' deviation.
    assert (found - expected).abs().max() < 2e-5 * expected.std()


@pytest.fixture
def base(tiny_model_folder, tmp_path):
    return lambda name: with_random_norms(tiny_model_folder(name), tmp_path / name)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3-tied"])
def test_logits_in_a_random_basis_are_the_same(base, tmp_path, name):
    folder = base(name)
    rebase_model(folder, tmp_path / "out", seed=3, dtype=torch.float32)
    assert_same_logits(folder, tmp_path / "out")
    before, after = (
        load_file(file) for file in (folder / "model.safetensors", next(tmp_path.glob("out/*.safe*")))
    )
    assert set(after) == {*before, "lm_head.weight"}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        assert torch.equal(after[f"{PREFIX}{norm}.weight"], torch.ones(128))
    for changed in (f"{PREFIX}self_attn.o_proj.weight", "model.embed_tokens.weight"):
        assert (before[changed] - after[changed]).abs().mean() > 0.5 * before[changed].abs().mean()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def write_folded(folder: Path, out: Path, make_rotation=hadamard_rotation, rotate_heads=True) -> Path:
    """Write all tensors of the folded view as a model of its own, in float32."""
    source = FoldedSource.of(ModelSource.open(folder), make_rotation, 5, rotate_heads)
    shutil.copytree(folder, out)
    (out / "config.json").write_text(json.dumps(source.config))
    tensors = {name: source.read(name).contiguous() for name in source.tensors}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "qwen3-tied"])
@pytest.mark.parametrize("make_rotation", [hadamard_rotation, random_rotation])
def test_logits_with_rotated_heads_are_the_same(base, tmp_path, name, make_rotation):
    folder = base(name)
    folded = write_folded(folder, tmp_path / "out", make_rotation)
    assert_same_logits(folder, folded)
    before, after = (load_file(one / "model.safetensors") for one in (folder, folded))
    source = FoldedSource.of(ModelSource.open(folder), make_rotation, 5, rotate_heads=False)
    value = f"{PREFIX}self_attn.v_proj.weight"
    assert (source.read(value) - after[value]).abs().mean() > 0.5 * before[value].abs().mean()


def test_other_architectures_compute_the_same(tmp_path):
    """Mistral; Gemma, whose gains are 1 + weight; Granite with its multipliers; Phi-3, which stores q, k, v
    and gate, up fused.
    """
    from transformers import Gemma3TextConfig, GemmaConfig, GraniteConfig, MistralConfig, Phi3Config

    configs = {
        "mistral": MistralConfig(**small()),
        "gemma": GemmaConfig(**small()),
        "granite": GraniteConfig(**small(), residual_multiplier=0.3, attention_multiplier=0.2),
        "phi3": Phi3Config(
            **{key: value for key, value in small(hidden_size=128).items() if key != "head_dim"}
        ),
    }
    for name, config in configs.items():
        folder = with_random_norms(save_other_model(config, tmp_path / name), tmp_path / f"{name}-norms")
        assert_same_logits(folder, write_folded(folder, tmp_path / f"{name}-folded"))
    config = Gemma3TextConfig(**small())
    with pytest.raises(CannotFold, match=r"'model\.layers\.0\.\w+.*gemma3_text.*use --rotation online"):
        write_folded(save_other_model(config, tmp_path / "gemma3"), tmp_path / "no")


def test_what_cannot_be_rotated_is_refused_with_the_way_out(tmp_path):
    from transformers import CohereConfig, MixtralConfig, OPTConfig, Starcoder2Config

    models = {
        "mixtral": (MixtralConfig(**small(), num_local_experts=4), r"'model\.layers\.0\.\S*(expert|gate)"),
        "starcoder2": (Starcoder2Config(**small()), "part that"),
        "cohere": (CohereConfig(**small()), "not plain RMS norms|part that"),
        "opt": (OPTConfig(hidden_size=96, num_hidden_layers=2, ffn_dim=160, vocab_size=512), "part that"),
    }
    for name, (config, reason) in models.items():
        folder = save_other_model(config, tmp_path / name)
        with pytest.raises(CannotFold, match=f"({reason}).*--rotation online"):
            write_folded(folder, tmp_path / f"{name}-folded")
        assert not (tmp_path / f"{name}-folded").exists()


def test_norms_that_subtract_the_mean_are_noticed(base, monkeypatch):
    source = ModelSource.open(base("llama"))
    norm = source.skeleton.get_submodule("model.layers.1.input_layernorm")
    plain = type(norm).forward
    monkeypatch.setattr(type(norm), "forward", lambda self, x: plain(self, x - x.mean(-1, keepdim=True)))
    with pytest.raises(CannotFold, match=r"not plain RMS norms: use --rotation online"):
        FoldedSource.of(source, hadamard_rotation, 0, rotate_heads=True)


def test_a_layer_that_computes_otherwise_than_its_names_say_is_noticed(base, monkeypatch):
    swapped = dict(zip(residual_rotation.READERS, reversed(residual_rotation.READERS.values()), strict=True))
    monkeypatch.setattr(residual_rotation, "READERS", swapped)
    with pytest.raises(CannotFold, match=r"first layer of this llama model computes something else"):
        FoldedSource.of(ModelSource.open(base("llama")), hadamard_rotation, 0, rotate_heads=True)


def test_a_random_rotation_is_orthogonal_and_seeded():
    identity = torch.eye(24)
    q = random_rotation(24, 1)(identity)
    torch.testing.assert_close(q @ q.T, identity, rtol=0, atol=1e-6)
    assert torch.equal(q, random_rotation(24, 1)(identity))
    assert (q - random_rotation(24, 2)(identity)).abs().max() > 0.1
    assert q.abs().max() < 0.95  # dense


def test_rebasing_leaves_nothing_half_written(base, tmp_path):
    folder = base("llama")
    with pytest.raises(PVQError, match=r"does not exist: create it first"):
        rebase_model(folder, tmp_path / "no" / "where")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{PREFIX}mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(PVQError, match=r"layers\.1\.mlp\.down_proj\.weight.*NaN"):
        rebase_model(folder, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"llama"}
