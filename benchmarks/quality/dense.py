# SPDX-License-Identifier: Apache-2.0
"""Dense Hugging Face folders: what every method is turned into before it is evaluated."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from offline_quant.model_source import ModelSource, read_tensor
from offline_quant.weight_quantizer import dequantize_weight
from pvq_vllm.codec.format import check_checkpoint
from pvq_vllm.codec.rotation import Rotation

COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")  # fmt: skip


def linear_names(source: ModelSource) -> list[str]:
    """Return the names of all linear modules in the decoder layers, which are what every method quantizes."""
    return [name for layer in range(len(source.layers)) for name in source.linear_names(layer)]


def write_dense(source: ModelSource, out: Path, replaced: dict[str, torch.Tensor]) -> None:
    """Write the model with some tensors replaced (by name with '.weight'), all in the dtype that it has.

    Raises:
        ValueError: a replacement has no counterpart, another shape, or a value that is not finite.
    """
    tensors = {name: source.read(name) for name in source.tensors}
    for name, tensor in replaced.items():
        if name not in tensors or tensor.shape != tensors[name].shape:
            raise ValueError(f"'{name}' {list(tensor.shape)} is no tensor of {source.folder}")
        if not tensor.isfinite().all():
            raise ValueError(f"'{name}' has values that are not finite")
        tensors[name] = tensor.to(tensors[name].dtype).contiguous()
    _write(source.folder, out, dict(source.config), tensors)


def checkpoint_to_dense(checkpoint: Path, out: Path) -> None:
    """Write the dense model that a PVQ checkpoint stands for, without quantization of activations."""
    config, infos = check_checkpoint(checkpoint)
    tensors: dict[str, torch.Tensor] = {}
    packed: dict[str, dict[str, torch.Tensor]] = {name: {} for name in config.modules}
    for name, info in infos.items():
        module, _, kind = name.rpartition(".")
        tensor = read_tensor(info, name)
        if module in packed and kind.startswith("weight_"):
            packed[module][kind] = tensor
        else:
            tensors[name] = tensor
    dtype = next(tensor.dtype for tensor in tensors.values())
    for name, stored in packed.items():
        spec = config.modules[name]
        in_features = _in_features(checkpoint, name, stored)
        rotation = None
        if spec.rotation_blocks:
            factors = config.rotation_factors[in_features // spec.rotation_blocks]
            rotation = Rotation(config.rotation_seed, in_features, spec.rotation_blocks, factors)
        tensors[f"{name}.weight"] = dequantize_weight(stored, spec.codebook, in_features, rotation, dtype)
    model_config = json.loads((checkpoint / "config.json").read_text())
    del model_config["quantization_config"]
    _write(checkpoint, out, model_config, tensors)


def _in_features(checkpoint: Path, name: str, stored: dict[str, torch.Tensor]) -> int:
    report = json.loads((checkpoint / "report.json").read_text())["modules"]
    out_features, in_features = report[name]["out_features"], report[name]["in_features"]
    if len(stored["weight_scale"]) != out_features:
        raise ValueError(f"{checkpoint}: report.json does not belong to the tensors of '{name}'")
    return in_features


def _write(source: Path, out: Path, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
