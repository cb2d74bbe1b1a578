# SPDX-License-Identifier: Apache-2.0
"""`--rotation`: what each choice writes, that a folded checkpoint computes what its weights say, and that runs
are repeatable.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import pvq_vllm.hf_quantizer  # noqa: F401  registers "pvq" with transformers
from offline_quant.calibration import LayerwiseForward
from offline_quant.model_source import ModelSource
from offline_quant.plan import DEFAULT_ROTATION, Settings, codebook_from_text
from offline_quant.quantize_checkpoint import quantize_checkpoint as quantize
from offline_quant.residual_rotation import CannotFold, FoldedSource, hadamard_rotation, rotated_source
from offline_quant.weight_quantizer import dequantize_weight
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import CheckpointConfig, check_checkpoint
from pvq_vllm.codec.rotation import Rotation

IDS = torch.arange(2, 50).view(2, 24) * 7 % 512
ONLINE_OR_NOT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "lm_head")


def blocks_of(folder: Path) -> dict[str, int]:
    config, _ = check_checkpoint(folder)
    return {name.rpartition(".")[2]: spec.rotation_blocks for name, spec in config.modules.items()}


def contents(folder: Path) -> dict[str, bytes]:
    """What a reader of the checkpoint sees; reports may hold times."""
    names = ["config.json", *sorted(path.name for path in folder.glob("*.safetensors"))]
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize(
    ("rotation", "others", "down", "factors"),
    [
        ("online", 1, 1, {128: [128], 192: [12, 16]}),
        ("none", 0, 0, {}),
        ("residual", 0, 1, {192: [12, 16]}),
        ("residual:64", 0, 3, {64: [64]}),
        ("residual:100", 0, 3, {64: [64]}),
        ("residual:512", 0, 3, {64: [64]}),
        ("auto", 0, 3, {64: [64]}),
        ("block:64", 2, 3, {64: [64]}),
        ("block:100", 2, 3, {64: [64]}),
        (DEFAULT_ROTATION, 1, 3, {128: [128], 64: [64]}),
    ],
)
def test_what_is_rotated_at_run_time(tiny_llama, tmp_path, rotation, others, down, factors):
    report = quantize(tiny_llama, tmp_path / "out", Settings(rotation=rotation))
    assert report["rotation"] == {"auto": "residual:128"}.get(rotation, rotation)
    assert f"--rotation {report['rotation']} " in report["command"]
    blocks = blocks_of(tmp_path / "out")
    assert {blocks[name] for name in ONLINE_OR_NOT} == {others} and blocks["down_proj"] == down
    assert check_checkpoint(tmp_path / "out")[0].rotation_factors == factors


def test_ranks_of_tensor_parallelism_share_nothing_but_the_inner_rotation(tiny_llama, tmp_path):
    quantize(tiny_llama, tmp_path / "out", Settings(rotation="residual", tensor_parallel=2))
    blocks = blocks_of(tmp_path / "out")
    assert blocks["o_proj"] == 0 and blocks["down_proj"] == 2
    quantize(tiny_llama, tmp_path / "inner", Settings(rotation="residual:64", tensor_parallel=2))
    blocks = blocks_of(tmp_path / "inner")
    assert blocks["o_proj"] == 0 and blocks["down_proj"] == 6  # of 32: three of 64 do not split in two
    quantize(tiny_llama, tmp_path / "blocks", Settings(rotation="block:128", tensor_parallel=4))
    blocks = blocks_of(tmp_path / "blocks")
    assert blocks["q_proj"] == 1 and blocks["o_proj"] == blocks["down_proj"] == 4


def test_all_that_a_fused_model_rotates_online_is_in_blocks(tmp_path):
    """Values inside a qkv_proj cannot be rotated head by head, so o_proj's input is rotated at run time too."""
    from transformers import Phi3Config

    sizes = dict(hidden_size=128, intermediate_size=192, num_hidden_layers=2, vocab_size=512, pad_token_id=0)
    config = Phi3Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    quantize(tmp_path / "base", tmp_path / "out", Settings(rotation="residual:64"))
    found = {"qkv_proj": 0, "o_proj": 2, "gate_up_proj": 0, "down_proj": 3, "lm_head": 0}
    assert blocks_of(tmp_path / "out") == found


@pytest.mark.parametrize("kind", ["block", "residual"])
@pytest.mark.parametrize("width", ["", "x", "4", "-8", "1000000"])
def test_blocks_of_no_width_are_refused(kind, width):
    with pytest.raises(PVQError, match=f"^--rotation (is )?{kind}:{width}[:,] "):
        Settings(rotation=f"{kind}:{width}")


@pytest.mark.parametrize("rotation", ["sideways", "online:64", "auto:64"])
def test_other_rotations_are_refused(rotation):
    with pytest.raises(PVQError, match=f"--rotation (is )?{rotation}"):
        Settings(rotation=rotation)


def dequantized_model(folder: Path, base: Path) -> torch.nn.Module:
    """Return the base with the weights that the checkpoint stands for, as ordinary float32 matrices."""
    config = CheckpointConfig.from_dict(
        json.loads((folder / "config.json").read_text())["quantization_config"]
    )
    tensors = load_file(folder / "model.safetensors")
    model_config = AutoConfig.from_pretrained(base, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32).eval()
    state = {name: tensor for name, tensor in tensors.items() if name in model.state_dict()}
    for name, spec in config.modules.items():
        packed = {
            key.removeprefix(f"{name}."): value
            for key, value in tensors.items()
            if key.startswith(f"{name}.")
        }
        width, rotation = model.get_submodule(name).weight.shape[1], None
        if spec.rotation_blocks:
            orders = config.rotation_factors[width // spec.rotation_blocks]
            rotation = Rotation(config.rotation_seed, width, spec.rotation_blocks, orders)
        state[f"{name}.weight"] = dequantize_weight(packed, spec.codebook, width, rotation, torch.float32)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("rotation", ["residual", "residual:64"])
@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "qwen3"])
def test_a_folded_checkpoint_computes_what_its_weights_say(tiny_model_folder, tmp_path, name, rotation):
    """Three models in float32: the one that is served (16-bit activations), the same weights as plain
    matrices, and the base, which 8-bit weights come close to and a wrong fold does not.
    """
    base, folder = tiny_model_folder(name), tmp_path / "pvq"
    settings = Settings(codebook=codebook_from_text("8", ""), rotation=rotation, activation="a16")
    quantize(base, folder, settings)
    with torch.inference_mode():
        served = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits
        plain = dequantized_model(folder, base)(IDS).logits
        original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(IDS).logits
    deviation = original.std()
    assert (served - plain).abs().max() < 2e-3 * deviation  # a16 rounds to 2^-16 of a token's largest value
    assert (
        served - original
    ).square().mean().sqrt() < 0.05 * deviation  # int8 weights: 0.02; a wrong fold: 1
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


CALIBRATED = {"calibration": "builtin", "calibration_sequences": 2, "calibration_length": 48}


class Killed(Exception):
    pass


@pytest.mark.parametrize("settings", [{}, CALIBRATED], ids=["plain", "calibrated"])
def test_an_interrupted_folded_run_resumes_to_the_same_bytes(tiny_model_folder, tmp_path, settings):
    model = tiny_model_folder("qwen3-tied")
    settings = Settings(rotation="residual", embedding_bits=8, max_shard_bytes=90_000, **settings)

    def killed(name, weights):
        if "layers.1.mlp.gate" in name:
            raise Killed

    quantize(model, tmp_path / "whole", settings)
    with pytest.raises(Killed):
        quantize(model, tmp_path / "out", settings, progress=killed)
    for other in ("online", "residual:64"):
        with pytest.raises(PVQError, match="another rotation: repeat the options"):
            quantize(model, tmp_path / "out", Settings(**{**vars(settings), "rotation": other}), resume=True)
    quantize(model, tmp_path / "out", settings, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_hessians_are_those_of_the_folded_coordinates(tiny_llama, tmp_path):
    """x' = R diag(1/g) x behind a norm with gain g, hence H' = R diag(1/g) H diag(1/g) R^T."""
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    gain = tensors["model.layers.1.input_layernorm.weight"]
    gain.copy_(torch.rand(128, generator=torch.Generator().manual_seed(0)) + 0.5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = ModelSource.open(folder)
    folded = FoldedSource.of(source, hadamard_rotation, 3, rotate_heads=True)
    name = "model.layers.1.self_attn.q_proj"
    hessians = []
    for one in (source, folded):
        forward = LayerwiseForward(one, IDS, torch.float32)
        with forward.loaded(0):
            forward.advance(0)
        with forward.loaded(1):
            hessians.append(forward.collect(1, [name])[name].mean())
    rotate = hadamard_rotation(128, 3)
    expected = rotate(rotate(hessians[0] / gain / gain[:, None]).T.contiguous())
    torch.testing.assert_close(hessians[1], expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert (hessians[0] - expected).norm() > 0.5 * expected.norm()


def test_calibration_lowers_the_error_of_the_outputs(tiny_llama, tmp_path):
    report = quantize(tiny_llama, tmp_path / "out", Settings(rotation="residual", **CALIBRATED))
    for name, entry in report["modules"].items():
        assert name == "lm_head" or entry["output_snr_db"] > entry["weight_snr_db"], name


def test_auto_is_online_where_the_stream_cannot_be_rotated(tmp_path):
    from transformers import Starcoder2Config

    sizes = dict(hidden_size=128, intermediate_size=192, num_hidden_layers=2, vocab_size=512)
    config = Starcoder2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    source = ModelSource.open(tmp_path / "base")
    assert rotated_source(source, "auto", 0) == (source, "block:128")
    with pytest.raises(CannotFold, match="use --rotation online"):
        quantize(tmp_path / "base", tmp_path / "out", Settings(rotation="residual"))
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
    quantize(tmp_path / "base", tmp_path / "auto", Settings(rotation="auto"))
    quantize(tmp_path / "base", tmp_path / "default", Settings())
    assert contents(tmp_path / "auto") == contents(tmp_path / "default")
