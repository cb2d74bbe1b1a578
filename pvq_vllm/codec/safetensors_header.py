# SPDX-License-Identifier: Apache-2.0
"""Read the header of a safetensors shard and believe none of it.

A shard is: the length of the header (uint64, little-endian), the header (JSON: name -> dtype, shape,
data_offsets), the tensors' bytes. Everything the header claims is checked against the size of the file before
anybody allocates a byte for a tensor: known dtypes, bytes = shape x size of the dtype, tensors that cover the
rest of the file without hole or overlap.
"""

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

from .errors import PVQError

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 16
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


class TensorInfo(NamedTuple):
    """Where a tensor lies: the shard's path, shape, dtype (safetensors' name, e.g. "U8"), first byte in the
    file, number of bytes.
    """

    shard: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


def read_safetensors_header(path: str | os.PathLike) -> dict[str, TensorInfo]:
    """Return every tensor of the shard ``path``, by name, after checking all that the header says.

    Raises:
        PVQError: the file is missing, truncated or not what its header claims; the sentence names the file.
    """
    path = Path(path)
    try:
        file_bytes = path.stat().st_size
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > file_bytes - 8:
                raise PVQError(
                    f"{path} is truncated ({file_bytes:,} bytes, its header alone claims "
                    f"{header_bytes:,}): copy it again"
                )
            if header_bytes > MAX_HEADER_BYTES:
                raise PVQError(
                    f"{path} has a header of {header_bytes:,} bytes, more than the "
                    f"{MAX_HEADER_BYTES:,} allowed: "
                    "do not use this file"
                )
            raw_header = file.read(header_bytes)
    except FileNotFoundError as error:
        raise PVQError(f"{path} is missing: copy it again from where the checkpoint came from") from error
    except OSError as error:
        raise PVQError(
            f"{path} cannot be read ({error.strerror}): check the path and its permissions"
        ) from error
    try:
        header = json.loads(raw_header.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise PVQError(f"{path} has an unreadable header ({error}): copy the file again") from error
    if not isinstance(header, dict):
        raise PVQError(f"{path} has a header that is not a JSON object: copy the file again")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise PVQError(f"{path}: __metadata__ must map names to strings: write the file again")

    data_start = 8 + header_bytes
    tensors = {name: _tensor_info(path, name, entry, data_start) for name, entry in header.items()}
    position, previous = data_start, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != position:
            kind = "overlaps" if tensor.offset < position else "leaves a hole after"
            raise PVQError(f"{path}: tensor '{name}' {kind} {previous}: the file is damaged, copy it again")
        position, previous = tensor.offset + tensor.nbytes, f"tensor '{name}'"
    if position > file_bytes:
        raise PVQError(f"{path} is truncated ({file_bytes:,} bytes of {position:,}): copy it again")
    if position < file_bytes:
        raise PVQError(f"{path} has {file_bytes - position:,} bytes that belong to no tensor: copy it again")
    return tensors


def _without_duplicates(pairs: list) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _is_count(value) -> bool:
    return type(value) is int and value >= 0  # bool is an int in Python, but not here


def _tensor_info(path: Path, name: str, entry, data_start: int) -> TensorInfo:
    """Check one entry of the header on its own."""
    where = f"{path}: tensor '{name}'"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise PVQError(f"{where} must have exactly dtype, shape and data_offsets: write the file again")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise PVQError(f"{where} has the unknown dtype {dtype!r}: use one of {', '.join(DTYPE_BYTES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, shape)):
        raise PVQError(f"{where} has the impossible shape {shape!r}: write the file again")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise PVQError(f"{where} has impossible data_offsets {offsets!r}: write the file again")
    begin, end = offsets
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != expected:
        raise PVQError(
            f"{where} takes {end - begin:,} bytes, but {dtype} {shape} needs {expected:,}: copy the "
            "file again"
        )
    return TensorInfo(path, tuple(shape), dtype, data_start + begin, expected)
