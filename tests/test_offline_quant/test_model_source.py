# SPDX-License-Identifier: Apache-2.0
"""Opening a model folder: what is found, and each way in which it can be unusable."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_quant.model_source import ModelSource, module_shapes
from pvq_vllm.codec.errors import PVQError


@pytest.fixture
def copy_of(tiny_model_folder, tmp_path):
    def copy(name="llama"):
        return shutil.copytree(tiny_model_folder(name), tmp_path / name)

    return copy


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "llama-tied"])
def test_the_model_is_found_without_naming_its_architecture(tiny_model_folder, name):
    source = ModelSource.open(tiny_model_folder(name))
    projections = {
        "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp": ("gate_proj", "up_proj", "down_proj"),
    }
    expected = [f"model.layers.1.{part}.{leaf}" for part, leaves in projections.items() for leaf in leaves]
    assert sorted(source.linear_names(1)) == sorted(expected)
    assert (source.head_name, source.embedding_name) == ("lm_head", "model.embed_tokens")
    assert source.is_tied == name.endswith("tied")
    assert source.weight_name("lm_head") == (
        "model.embed_tokens.weight" if source.is_tied else "lm_head.weight"
    )
    assert all(parameter.is_meta for parameter in source.skeleton.parameters())
    assert module_shapes(source.skeleton)["model.layers.0.mlp.down_proj"] == (128, 192)


def test_tensors_are_read_as_the_library_reads_them(tiny_llama):
    source = ModelSource.open(tiny_llama)
    expected = load_file(tiny_llama / "model.safetensors")
    assert set(source.tensors) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(source.read(name), tensor) and source.read(name).dtype == tensor.dtype


def test_nan_weights_are_refused_by_name(copy_of):
    folder = copy_of()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(PVQError, match=r"model\.safetensors.*model\.layers\.1\.mlp\.up_proj\.weight.*NaN"):
        ModelSource.open(folder).read("model.layers.1.mlp.up_proj.weight")


def test_a_wrong_shape_is_refused_by_name(copy_of):
    folder = copy_of()
    edit_config(folder, intermediate_size=256)
    says = r"mlp\.\w+_proj\.weight' is \[192, 128\], but by config\.json it must be \[256, 128\]"
    with pytest.raises(PVQError, match=says):
        ModelSource.open(folder)


@pytest.mark.parametrize("other", [None, "model.layers.1.self_attn.rotary_emb.inv_freq", "embed_out.weight"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_refused_by_name(copy_of, name, other):
    """Also where there is a tensor that the model has no place for."""
    folder = copy_of()
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    if other:
        tensors[other] = torch.zeros(8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        PVQError, match=f"no tensor '{re.escape(name)}'.*{re.escape(other or 'copy it again')}"
    ):
        ModelSource.open(folder)


def test_experts_and_routers_may_be_stored_under_other_names(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, vocab_size=128)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    source = ModelSource.open(tmp_path)
    assert [name.rpartition(".")[2] for name in source.linear_names(1)] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    ]
    modules = [name for layer in range(2) for name in source.linear_names(layer)]
    weights = 2 * (4 * 3 * 64 * 96 + 4 * 64)
    assert source.left_as_is(modules) == (weights, 16 * weights)
    assert source.left_as_is([]) == (weights + 2 * 4 * 64 * 64, 16 * (weights + 2 * 4 * 64 * 64))


def test_unusable_folders_are_refused_with_their_reason(copy_of, tmp_path):
    with pytest.raises(PVQError, match="nowhere is not a folder"):
        ModelSource.open(tmp_path / "nowhere")
    folder = copy_of()
    with pytest.raises(PVQError, match="already quantized"):
        edit_config(folder, quantization_config={"quant_method": "pvq"})
        ModelSource.open(folder)
    edit_config(folder, quantization_config=None)
    ModelSource.open(folder)
    folder = copy_of("qwen2")
    edit_config(folder, model_type="nothing-like-it")
    with pytest.raises(PVQError, match=r"config\.json.*'nothing-like-it'.*upgrade transformers"):
        ModelSource.open(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(PVQError, match=r"config\.json cannot be read as JSON"):
        ModelSource.open(folder)
    (folder / "config.json").unlink()
    with pytest.raises(PVQError, match=r"config\.json is missing"):
        ModelSource.open(folder)


def test_missing_truncated_and_pickled_weights_are_refused(copy_of):
    folder = copy_of()
    shard = folder / "model.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(PVQError, match=r"model\.safetensors is truncated"):
        ModelSource.open(folder)
    shard.unlink()
    with pytest.raises(PVQError, match=r"model\.safetensors is missing"):
        ModelSource.open(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(PVQError, match="convert it to safetensors"):
        ModelSource.open(folder)


def test_the_fingerprint_sees_a_change_of_weights(copy_of):
    folder = copy_of()
    before = ModelSource.open(folder).fingerprint()
    assert ModelSource.open(folder).fingerprint() == before
    original = load_file(folder / "model.safetensors")
    for name, tensor in original.items():
        save_file({**original, name: -tensor}, folder / "model.safetensors")
        assert ModelSource.open(folder).fingerprint() != before, name
