# SPDX-License-Identifier: Apache-2.0
"""Planning a checkpoint: what cannot be planned is named with the way out."""

import json
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from offline_quant.model_source import ModelSource
from offline_quant.plan import Settings, plan_checkpoint
from pvq_vllm.codec.errors import PVQError


@pytest.fixture
def narrow_model(tiny_llama, tmp_path):
    """A model whose down_proj reads 44 columns, which no group of eight divides."""
    folder = shutil.copytree(tiny_llama, tmp_path / "narrow")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 44}))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "down_proj" in name:
            tensors[name] = tensor[:, :44].contiguous()
        elif "gate_proj" in name or "up_proj" in name:
            tensors[name] = tensor[:44].contiguous()
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_width_that_no_block_divides_is_named_with_the_remedy(narrow_model):
    source = ModelSource.open(narrow_model)
    with pytest.raises(PVQError) as error:
        plan_checkpoint(source, Settings())
    says = str(error.value)
    assert says.startswith("model.layers.0.mlp.down_proj: in_features = 44 is not a multiple of 8")
    assert "--tensor-parallel" not in says
    (override,) = re.findall(r"--override '(.*)=16'$", says)
    assert re.fullmatch(override, "model.layers.0.mlp.down_proj")
    overrides = ((override.replace("0", r"\d"), "16"),)  # the same way out for every layer
    modules = plan_checkpoint(source, Settings(overrides=overrides)).modules
    assert not any("down_proj" in name for name in modules) and "model.layers.0.mlp.up_proj" in modules


def test_too_many_ranks_for_a_width_say_so(tiny_llama):
    with pytest.raises(
        PVQError, match=r"o_proj: in_features 128 .* 3 ranks: lower --tensor-parallel, or leave it"
    ):
        plan_checkpoint(ModelSource.open(tiny_llama), Settings(tensor_parallel=3))
