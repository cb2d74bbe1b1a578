# SPDX-License-Identifier: Apache-2.0
"""Small PVQ checkpoints with any mixture of codebooks, written straight from docs/format.md without the
quantizer.

The weights are rounded without calibration: what is tested is that all readers agree on what is in the
folder, not that a random model is coded well.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pvq_vllm import quantizer_ops
from pvq_vllm.codec.format import CheckpointConfig, Codebook, ModuleSpec
from pvq_vllm.codec.rotation import Rotation, rotation_layout

CANONICAL = Codebook("canonical", group_size=16, num_pulses=24, amplitude_bits=4)

# Every codebook in one model: mixed rates within the fused layers, and for the heads those that may be coded.
LINEAR_CODEBOOKS = {
    r".*\.(q|gate)_proj": "pvq4",
    r".*\.(k|up)_proj": "pvq3",
    r".*\.v_proj": "int8",
    r".*\.o_proj": "pvq2",
    r".*\.1\..*\.down_proj": CANONICAL,
    r".*\.down_proj": "pvq4",
}
HEAD_CODEBOOKS = {r"lm_head": "int8", r".*embed_tokens": "int8"}


@pytest.fixture(scope="session")
def linear_codebooks() -> dict:
    return LINEAR_CODEBOOKS


@pytest.fixture(scope="session")
def all_codebooks() -> dict:
    return LINEAR_CODEBOOKS | HEAD_CODEBOOKS


def encode(weight: torch.Tensor, codebook: Codebook) -> dict[str, torch.Tensor]:
    """Code a rotated weight, float32 [rows, columns]; return the tensors of docs/format.md section 3."""
    if codebook.name == "canonical":
        from pvq_vllm.canonical_ops import encode_canonical

        sizes = (codebook.group_size, codebook.num_pulses, codebook.amplitude_bits)
        packed, levels, scale = encode_canonical(weight, *sizes)
        return {"weight_packed": packed, "weight_levels": levels, "weight_scale": scale}
    scale = quantizer_ops.search_row_scale(weight, codebook.name)
    return {
        "weight_packed": quantizer_ops.quantize_rows(weight, codebook.name, scale)[0],
        "weight_scale": scale.half(),
    }


def write_checkpoint(
    source: Path, out: Path, codebooks: dict[str, Codebook | str], splits: int = 1, activation: str = "a8"
) -> Path:
    """Write a PVQ checkpoint of the model folder ``source`` to ``out`` and return ``out``.

    Args:
        codebooks: regular expression that matches a module's whole name -> its codebook; the first match
            counts, and a module that none matches stays as it is.
        splits: number of ranks that the inputs of o_proj and down_proj can be split between.
    """
    shutil.copytree(source, out)
    model_config = json.loads((out / "config.json").read_text())
    tensors = load_file(out / "model.safetensors")
    if model_config.get("tie_word_embeddings") and any(re.fullmatch(x, "lm_head") for x in codebooks):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        model_config["tie_word_embeddings"] = False
    modules, factors = {}, {}
    for name in [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]:
        codebook = next((c for pattern, c in codebooks.items() if re.fullmatch(pattern, name)), None)
        if codebook is None:
            continue
        codebook = Codebook(codebook) if isinstance(codebook, str) else codebook
        weight = tensors.pop(f"{name}.weight").float()
        blocks, orders = 0, []
        if not name.endswith("embed_tokens"):
            split = name.endswith(("o_proj", "down_proj"))
            blocks, orders = rotation_layout(weight.shape[1], splits if split else 1)
            factors[weight.shape[1] // blocks] = orders
        weight = Rotation(7, weight.shape[1], blocks, orders).rotate(weight).contiguous()
        tensors |= {f"{name}.{kind}": tensor for kind, tensor in encode(weight, codebook).items()}
        modules[name] = ModuleSpec(codebook, blocks)
    config = CheckpointConfig(activation, Codebook("pvq4"), 7, factors, modules)
    model_config["quantization_config"] = config.to_dict()
    (out / "config.json").write_text(json.dumps(model_config, indent=2))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="session")
def checkpoint_writer() -> Callable[..., Path]:
    return write_checkpoint
