# SPDX-License-Identifier: Apache-2.0
"""Inspection verifies what a checkpoint says down to the codes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_quant.inspect import inspect_checkpoint
from offline_quant.plan import Settings
from offline_quant.quantize_checkpoint import quantize_checkpoint
from pvq_vllm.codec.errors import PVQError

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def checkpoint(tiny_qwen2, tmp_path_factory):
    out = tmp_path_factory.mktemp("inspect") / "out"
    overrides = (("k_proj", "3"), ("v_proj", "2"), ("o_proj", "16,20,3"))
    quantize_checkpoint(tiny_qwen2, out, Settings(overrides=overrides, embedding_bits=8))
    return out


def test_every_module_is_described(checkpoint):
    result = inspect_checkpoint(checkpoint)
    modules = {module["name"]: module for module in result["modules"]}
    assert result["verified"] and result["activation"] == "a8" and len(modules) == 2 * 7 + 2
    assert modules[Q_PROJ]["codebook"] == "pvq4"
    assert modules[Q_PROJ]["bits_per_weight"] == 4 + 16 / 128
    assert 19 < modules[Q_PROJ]["weight_snr_db"] < 23 and modules[Q_PROJ]["output_snr_db"] is None
    assert modules["model.embed_tokens"]["rotation_blocks"] == 0
    layers = [module for name, module in modules.items() if name.startswith("model.layers.")]
    sizes = [module["out_features"] * module["in_features"] for module in layers]
    bits = sum(module["bits_per_weight"] * size for module, size in zip(layers, sizes, strict=True))
    assert result["bits_per_weight"] == pytest.approx(bits / sum(sizes))
    assert result["bits_per_weight"] == pytest.approx(
        json.loads((checkpoint / "report.json").read_text())["bits_per_weight"]
    )
    assert result["bits_per_weight_with_head"] > result["bits_per_weight"]


def shape_out_of_range(tensors):
    tensors[f"{Q_PROJ}.weight_packed"][5, 2, :2] = 255  # shape 8191 of 8187


def negative_scale(tensors):
    tensors[f"{Q_PROJ}.weight_scale"][3] = -1


def nan_scale(tensors):
    tensors[f"{Q_PROJ}.weight_scale"][3] = torch.nan


def int8_out_of_range(tensors):
    tensors["lm_head.weight_packed"][7, 0, 0] = 128  # -128


def index_out_of_range(tensors):
    tensors["model.layers.1.self_attn.o_proj.weight_packed"][4] = 255


def levels_descending(tensors):
    name = "model.layers.1.self_attn.o_proj.weight_levels"
    tensors[name] = tensors[name].flip(0)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (shape_out_of_range, r"model\.safetensors: .*q_proj: .*row 5 .*out of range"),
        (negative_scale, r"q_proj: row 3 has the scale -1"),
        (nan_scale, r"q_proj: row 3 has the scale nan"),
        (int8_out_of_range, r"lm_head: row 7 .*out of range"),
        (index_out_of_range, r"o_proj: .*row 4"),
        (levels_descending, r"o_proj: .*ascending"),
    ],
)
def test_damaged_contents_are_found(checkpoint, tmp_path, damage, says):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(PVQError, match=says):
        inspect_checkpoint(folder)


def test_shapes_are_compared_with_the_model_of_the_config(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 96
    config["quantization_config"]["rotation"]["factors"]["96"] = [12, 8]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PVQError, match=r"mlp\.\w+\.weight_packed' is U8 .* must be U8"):
        inspect_checkpoint(folder)
