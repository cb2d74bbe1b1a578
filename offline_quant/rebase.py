# SPDX-License-Identifier: Apache-2.0
"""Write a model again in another basis of its residual stream: the same function from other weights.

Made for comparisons of quantizers. Weights that were quantized once, or that happen to suit one method's
grid, say little about the methods; after a random rotation all start from the same dense weights.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from pvq_vllm.codec.format import INDEX_FILE

from .checkpoint_writer import DTYPE_NAMES, check_destination, plan_shards
from .model_source import ModelSource
from .quantize_checkpoint import COPIED_NAMES
from .residual_rotation import FoldedSource, RowRotation, random_rotation
from .whole_files import move_into_place, write_file, write_safetensors

MAX_SHARD_BYTES = 4_000_000_000


def rebase_model(
    model: str | os.PathLike,
    out: str | os.PathLike,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
    make_rotation: Callable[[int, int], RowRotation] = random_rotation,
) -> None:
    """Fold the norms of the model folder ``model``, rotate its residual stream by an orthogonal matrix, a random
    one unless ``make_rotation`` (width, seed) gives another, and write it to the folder ``out``, an ordinary
    model with a head of its own.

    The logits are those of ``model`` up to the rounding of the weights to ``dtype``. One tensor is in memory
    at a time.

    Raises:
        PVQError: the folders cannot be used, or the model is one whose stream cannot be rotated.
    """
    out = Path(out)
    check_destination(out, overwrite)
    source = FoldedSource.of(ModelSource.open(model), make_rotation, seed, rotate_heads=False)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write_model(source, partial, dtype)
    except BaseException:
        shutil.rmtree(partial)
        raise
    move_into_place(partial, out)


def _write_model(source: ModelSource, folder: Path, dtype: torch.dtype) -> None:
    tensors = {name: (DTYPE_NAMES[dtype], source.tensors[name].shape) for name in sorted(source.tensors)}
    shards = plan_shards([tensors], MAX_SHARD_BYTES)
    names = [f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        contents = ([_bytes_of(source.read(tensor).to(dtype))] for tensor in shard)
        write_safetensors(folder / name, shard, contents)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    write_file(folder / INDEX_FILE, _json({"metadata": {}, "weight_map": weight_map}))
    config = {key: value for key, value in source.config.items() if key != "torch_dtype"}
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_file(folder / "config.json", _json(config))
    for name in COPIED_NAMES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
