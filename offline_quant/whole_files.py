# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are there whole or not at all: written under another name and then renamed, or renamed and
then removed.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.safetensors_header import DTYPE_BYTES, TensorInfo

COPY_BYTES = 1 << 24


def move_into_place(partial: Path, out: Path) -> None:
    """Rename ``partial`` to ``out``; what was there goes only after the new folder has its name."""
    if out.exists():
        remove_replaced(out)
        os.replace(out, _old_name(out))
    os.replace(partial, out)
    remove_replaced(out)


def remove_replaced(out: Path) -> None:
    """Remove what a process left that was killed at the end of ``move_into_place``."""
    shutil.rmtree(_old_name(out), ignore_errors=True)


def _old_name(out: Path) -> Path:
    return out.with_name(out.name + ".old")


def remove_folder(folder: Path) -> None:
    """Remove ``folder``, under another name, so that a process killed meanwhile leaves nothing of its name."""
    clear_removed(folder)
    os.replace(folder, _removed_name(folder))
    clear_removed(folder)


def clear_removed(folder: Path) -> None:
    """Remove what a process left that was killed in ``remove_folder``."""
    shutil.rmtree(_removed_name(folder), ignore_errors=True)


def _removed_name(folder: Path) -> Path:
    return folder.with_name(folder.name + ".removed")


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with _complete_file(path) as file:
        file.write(content)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    contents: Iterable[Iterable[memoryview | bytes]],
) -> None:
    """Write a shard without holding it in memory: ``contents`` yields the chunks of each tensor in the order
    of ``tensors``.
    """
    header: dict = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        size = tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with _complete_file(path) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for chunks in contents:
            for chunk in chunks:
                file.write(chunk)


@contextmanager
def _complete_file(path: Path) -> Iterator[BinaryIO]:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor; ``dtype`` as safetensors names it."""
    return DTYPE_BYTES[dtype] * math.prod(shape)


def bytes_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor on the CPU, as one chunk."""
    yield memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def copied_bytes(info: TensorInfo) -> Iterator[bytes]:
    """Yield the bytes of a stored tensor in chunks."""
    with open(info.shard, "rb") as file:
        file.seek(info.offset)
        left = info.nbytes
        while left:
            chunk = file.read(min(left, COPY_BYTES))
            if not chunk:
                raise PVQError(f"{info.shard} got shorter while it was copied: start again without --resume")
            left -= len(chunk)
            yield chunk
