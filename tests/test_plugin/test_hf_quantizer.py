# SPDX-License-Identifier: Apache-2.0
"""PVQ folders in plain transformers, against the reference of docs/format.md computed in plain torch."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import pvq_vllm.hf_quantizer  # noqa: F401  registers "pvq" with transformers
from pvq_vllm.codec import canonical, reference
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import CheckpointConfig, Codebook
from pvq_vllm.codec.rotation import Rotation
from pvq_vllm.codec.serving import decode_groups

IDS = torch.arange(2, 50).view(2, 24) * 7 % 512


def decode_reference(
    codebook: Codebook, tensors: dict[str, torch.Tensor], name: str, in_features: int
) -> torch.Tensor:
    """Return q, int8 [rows, in_features], by the pure Python of the codec."""
    packed = tensors[f"{name}.weight_packed"].numpy()
    if codebook.name == "canonical":
        levels = tensors[f"{name}.weight_levels"].numpy()
        sizes = (codebook.group_size, codebook.num_pulses, codebook.amplitude_bits)
        return torch.from_numpy(canonical.decode_weight(packed, levels, *sizes, in_features))
    return torch.from_numpy(decode_groups(packed, codebook.name)).flatten(1)


class ReferenceLinear(nn.Module):
    def __init__(self, q, codebook, scale, rotation, mode, bias):
        super().__init__()
        self.arguments = (q, codebook.h, scale, rotation, mode, bias)

    def forward(self, x):
        return reference.linear(x, *self.arguments)


class ReferenceEmbedding(nn.Module):
    def __init__(self, q, scale, dtype):
        super().__init__()
        self.weight = (q.float() * scale.float()[:, None]).to(dtype)

    def forward(self, ids):
        return self.weight[ids]


def reference_model(folder: Path, base: Path, dtype: torch.dtype) -> nn.Module:
    """Load the unquantized ``base`` and replace what ``folder`` has quantized by reference modules."""
    entry = json.loads((folder / "config.json").read_text())
    config = CheckpointConfig.from_dict(entry["quantization_config"])
    tensors = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    for name, spec in config.modules.items():
        old = model.get_submodule(name)
        columns = old.weight.shape[1]
        q, scale = decode_reference(spec.codebook, tensors, name, columns), tensors[f"{name}.weight_scale"]
        if isinstance(old, nn.Embedding):
            new = ReferenceEmbedding(q, scale, dtype)
        else:
            blocks = spec.rotation_blocks
            orders = config.rotation_factors[columns // blocks] if blocks else []
            rotation = Rotation(config.rotation_seed, columns, blocks, orders)
            new = ReferenceLinear(q, spec.codebook, scale, rotation, config.activation, old.bias)
        model.set_submodule(name, new)
    return model


@pytest.mark.parametrize("name, activation", [("qwen2", "a8"), ("qwen3-tied", "a16"), ("qwen2", "pvq:16,58")])
def test_logits_equal_the_reference_bit_for_bit(
    tiny_model_folder, checkpoint_writer, all_codebooks, tmp_path, name, activation
):
    """All five codebooks in one model; both sides run the same attention in float32, so nothing may
    differ."""
    base = tiny_model_folder(name)
    folder = checkpoint_writer(base, tmp_path / "pvq", all_codebooks, activation=activation)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = reference_model(folder, base, torch.float32)(IDS).logits
        assert torch.equal(model(IDS).logits, expected)
        unquantized = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(IDS).logits
    assert not torch.equal(expected, unquantized)


@pytest.fixture
def folder(tiny_llama, checkpoint_writer, tmp_path) -> Path:
    return checkpoint_writer(tiny_llama, tmp_path / "pvq", {r".*_proj": "pvq4", "lm_head": "int8"})


def test_packed_weights_are_all_that_is_kept(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.down_proj
    held = sum(tensor.nbytes for tensor in layer.state_dict().values())
    assert 4 * 192 * 128 / 8 <= held < 1.2 * (4 * 192 * 128 / 8 + 8 * 128)
    assert not list(layer.parameters())


def test_cast_of_the_model_leaves_scales_alone(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 192).bfloat16()
    before = layer(x)
    model.to(torch.bfloat16)
    assert layer.pvq_row_scale.dtype == torch.float32
    assert torch.equal(layer(x), before)


def test_activation_mode_can_be_changed_when_loading(folder):
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["activation"] = "a16"
    x = torch.randn(2, 192)
    results = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, config=c)
        .model.layers[0]
        .mlp.down_proj(x)
        for c in (config, AutoConfig.from_pretrained(folder))
    ]
    assert not torch.equal(*results)
    assert torch.allclose(*results, rtol=0, atol=0.05 * float(results[0].abs().max()))


def test_a_group_of_activations_that_does_not_fit_names_the_module(folder):
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["activation"] = "pvq:128,386"
    with pytest.raises(PVQError, match=r"down_proj has 192 input columns .* pvq:128,386"):
        AutoModelForCausalLM.from_pretrained(folder, config=config)


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda t: t.pop(f"{DOWN}.weight_scale"), rf"lacks the tensor '{DOWN}\.weight_scale'"),
        (
            lambda t: t.update({f"{DOWN}.weight_scale": torch.ones(64).half()}),
            rf"'{DOWN}\.weight_scale' is F16 \[64\]",
        ),
        (lambda t: t[f"{DOWN}.weight_scale"].fill_(torch.nan), rf"{DOWN}\.weight_scale has a value"),
        (lambda t: t[f"{DOWN}.weight_packed"].fill_(255), rf"{DOWN}: .*row 0: a pvq4 code is out of range"),
    ],
)
def test_damaged_checkpoint_is_refused_and_the_tensor_named(folder, change, sentence):
    edit_tensors(folder, change)
    with pytest.raises(PVQError, match=sentence):
        AutoModelForCausalLM.from_pretrained(folder)


def test_module_that_the_model_does_not_have_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    modules["model.layers.9.mlp.down_proj"] = modules.pop(DOWN)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PVQError, match=r"lists 'model\.layers\.9\.mlp\.down_proj'"):
        AutoModelForCausalLM.from_pretrained(folder)


@torch.inference_mode()
def test_a_bias_follows_the_activations_under_autocast(
    tiny_model_folder, checkpoint_writer, linear_codebooks, tmp_path
):
    """nn.Linear casts its bias too."""
    folder = checkpoint_writer(tiny_model_folder("qwen2"), tmp_path / "out", linear_codebooks)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, layer.in_features).bfloat16()  # of a product in front, which autocast made bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    layer.bias.data = layer.bias.data.bfloat16()
    assert torch.equal(y, layer(x))
