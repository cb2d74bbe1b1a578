# SPDX-License-Identifier: Apache-2.0
"""`pvq inspect`: verify every byte of a checkpoint that can be verified, and say what is in it."""

import os
from pathlib import Path

from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import FORMAT_VERSION, CheckpointConfig, check_checkpoint, read_json
from pvq_vllm.codec.safetensors_header import TensorInfo

from .model_source import build_skeleton, decoder_layers_name, left_as_is, module_shapes, read_tensor
from .weight_quantizer import CHUNK_WEIGHTS, decode_levels


def inspect_checkpoint(folder: str | os.PathLike) -> dict:
    """Verify the PVQ checkpoint ``folder`` and describe it.

    Checks config.json, all shapes (against the model that config.json describes, when transformers knows it),
    the sizes of the shards, and the range of every code and scale.

    Returns:
        ``activation``, ``format_version``, ``bits_per_weight`` (all matrices of the decoder layers),
        ``bits_per_weight_with_head``, ``size_bytes``, ``verified``
        (True) and ``modules``: a list of dicts with name, codebook, out_features, in_features,
        rotation_blocks, bits_per_weight, and weight_snr_db and output_snr_db as the quantizer recorded them
        in report.json (None if it is missing).
    Raises:
        PVQError: the first thing that is wrong, with the file or tensor.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PVQError(f"{folder} is not a folder: give the path of a PVQ checkpoint")
    check_checkpoint(folder)  # on its own terms first: a damaged config.json would only confuse transformers
    skeleton = build_skeleton(folder)
    shapes, layers = module_shapes(skeleton), f"{decoder_layers_name(folder, skeleton)}."
    config, tensors = check_checkpoint(folder, shapes)
    report = folder / "report.json"
    recorded = read_json(report, "checkpoint").get("modules", {}) if report.exists() else {}
    modules = []
    for name, spec in config.modules.items():
        out_features, in_features = shapes[name] if name in shapes else _shape(name, config, tensors)
        verify_codes(name, config, tensors, in_features)
        errors = recorded.get(name, {}) if isinstance(recorded, dict) else {}
        modules.append(
            {
                "name": name,
                "codebook": str(spec.codebook),
                "out_features": out_features,
                "in_features": in_features,
                "rotation_blocks": spec.rotation_blocks,
                "bits_per_weight": spec.codebook.bits_per_weight(in_features),
                "weight_snr_db": errors.get("weight_snr_db"),
                "output_snr_db": errors.get("output_snr_db"),
            }
        )
    left = left_as_is(tensors, layers.removesuffix("."), config.modules)
    return {
        "folder": str(folder),
        "format_version": FORMAT_VERSION,
        "activation": config.activation,
        "bits_per_weight": mean_bits(
            [module for module in modules if module["name"].startswith(layers)], left
        ),
        "bits_per_weight_with_head": mean_bits(modules, left),
        "size_bytes": sum(info.nbytes for info in tensors.values()),
        "verified": True,
        "modules": modules,
    }


def mean_bits(modules: list[dict], left: tuple[int, int] = (0, 0)) -> float:
    """Return the mean bits a weight over ``modules``, weighted by their sizes, and over ``left``, as ``left_as_is`` returns
    it.
    """
    sizes = [module["out_features"] * module["in_features"] for module in modules]
    bits = [module["bits_per_weight"] * size for module, size in zip(modules, sizes, strict=True)]
    return (sum(bits) + left[1]) / max(1, sum(sizes) + left[0])


def verify_codes(
    name: str, config: CheckpointConfig, tensors: dict[str, TensorInfo], in_features: int
) -> None:
    """Decode every code of one module, a few rows at a time.

    Raises:
        PVQError: a code, level or scale out of range; names the shard and the module.
    """
    codebook = config.modules[name].codebook
    kinds = ["weight_packed", "weight_scale"] + ["weight_levels"] * (codebook.name == "canonical")
    stored = {kind: read_tensor(tensors[f"{name}.{kind}"], name) for kind in kinds}
    step = max(1, CHUNK_WEIGHTS // in_features)
    try:
        for start in range(0, len(stored["weight_scale"]), step):
            rows = slice(start, start + step)
            part = {
                kind: tensor if kind == "weight_levels" else tensor[rows] for kind, tensor in stored.items()
            }
            decode_levels(part, codebook, in_features)
    except PVQError as error:
        raise PVQError(f"{tensors[f'{name}.weight_packed'].shard}: {name}: {error}") from error


def _shape(name: str, config: CheckpointConfig, tensors: dict[str, TensorInfo]) -> tuple[int, int]:
    packed = tensors[f"{name}.weight_packed"].shape
    if len(packed) != 3:
        raise PVQError(f"{name} is not a module of the model that config.json describes: check config.json")
    return packed[0], packed[1] * 8
