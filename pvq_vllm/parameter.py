# SPDX-License-Identifier: Apache-2.0
"""Which part of which checkpoint tensor goes where in one layer's memory on one rank. Knows nothing of vLLM.

A layer of vLLM may be several modules of the checkpoint ("shards": q, k and v; gate and up), and the shards
may have different codebooks, so their codes cannot be one rectangular tensor. All codes of a layer lie in ONE
flat uint8 buffer, shard after shard, each starting at a multiple of 64 bytes:

    weight_packed   uint8    [packed_bytes]     shard i viewed as [num_rows, in_features / 8, bytes_per_group]
    weight_scale    float16  [out_features]     NaN until loaded
    weight_levels   float32  [num_levels]       only for canonical shards, NaN until loaded

A canonical shard is decoded to int8 as soon as its codes and its levels are there, and is from then on
treated as codebook int8 is. Under tensor parallelism rows (column parallel) or columns (row parallel) are
narrowed while loading.
"""

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import Codebook

_ALIGNMENT = 64  # bytes; a cache line


@dataclass(frozen=True)
class Shard:
    """One module of the checkpoint, or the part of it on this rank."""

    name: str  # Hugging Face name, for messages
    codebook: Codebook
    num_rows: int  # rows in this layer on this rank, vocabulary padding included
    source_rows: int  # rows of the checkpoint's tensor
    source_start: int  # the first of them that belongs here
    num_loaded_rows: int  # rows that come from the checkpoint; the others get scale 0

    @property
    def memory_codebook(self) -> str:
        """Name of the codebook in the flat buffer: canonical shards are held as int8."""
        return "int8" if self.codebook.name == "canonical" else self.codebook.name

    @property
    def num_levels(self) -> int:
        return 1 << self.codebook.amplitude_bits if self.codebook.name == "canonical" else 0


def _transient_buffer(num_bytes: int) -> torch.Tensor:
    """Return an uninitialized uint8 [num_bytes] on torch's default device.

    On the CPU it is a mapping of its own, which goes back to the operating system when it is freed. From
    malloc, the
    holes between the packed weights of successive layers would stay with the process: twice the memory,
    measured.
    """
    if num_bytes == 0 or torch.get_default_device().type != "cpu":
        return torch.empty(
            num_bytes, dtype=torch.uint8
        )  # a GPU: torch keeps what is freed for the next layer
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)


def canonical_to_int8(
    name: str, codebook: Codebook, weight_packed: torch.Tensor, weight_levels: torch.Tensor, in_features: int
) -> torch.Tensor:
    """Decode rows of codebook ``canonical`` to int8 [rows, in_features] (docs/format.md 4.3).

    Args:
        name: of the module, for messages.
        codebook: group_size, num_pulses and amplitude_bits.
        weight_packed: uint8 [rows, row_bytes]; it is decoded where it is, on the CPU or a GPU.
        weight_levels: float32 [2^amplitude_bits], any device.
        in_features: columns of the whole module, a multiple of 8 and of the group size.
    Raises:
        PVQError: an index out of range, or levels that are not finite and ascending.
    """
    from pvq_vllm.canonical_ops import decode_canonical

    try:
        return decode_canonical(
            weight_packed.contiguous(),
            weight_levels.cpu().contiguous(),
            codebook.group_size,
            codebook.num_pulses,
            codebook.amplitude_bits,
            in_features,
        )
    except PVQError as error:
        raise PVQError(f"{name}: {error}") from error


class LayerWeights:
    """The three buffers of one layer, and the loaders that fill them from checkpoint tensors.

    Args:
        shards: in the order of their rows in the layer.
        shard_ids: vLLM's names of the shards: ("q", "k", "v"), (0, 1, ...) or (None,).
        in_features: columns on this rank, a multiple of 8.
        source_in_features: columns of the checkpoint's tensors.
        source_column: the first of them on this rank.
    Raises:
        PVQError: a shard's columns cannot be split like this.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        shard_ids: Sequence[str | int | None],
        in_features: int,
        source_in_features: int,
        source_column: int = 0,
    ):
        self.shards, self.shard_ids = tuple(shards), tuple(shard_ids)
        self.in_features, self.source_in_features = in_features, source_in_features
        self.source_column = source_column
        if in_features % 8:
            raise PVQError(
                f"{self.shards[0].name}: {source_in_features} input columns leave {in_features} a rank, "
                "which is not a multiple of 8: use fewer ranks"
            )
        self.row_starts, self.byte_starts, self.level_starts = [], [], []
        self.out_features = self.packed_bytes = self.num_levels = 0
        for shard in self.shards:
            self.row_starts.append(self.out_features)
            self.byte_starts.append(self.packed_bytes)
            self.level_starts.append(self.num_levels)
            self.out_features += shard.num_rows
            num_bytes = shard.num_rows * (in_features // 8) * Codebook(shard.memory_codebook).bytes_per_group
            self.packed_bytes += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
            self.num_levels += shard.num_levels
        self._loaded: set[tuple[int, str]] = set()
        self._undecoded: dict[int, dict[str, torch.Tensor]] = {}

    def make_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Allocate the buffers, by checkpoint name, each with a ``weight_loader``."""
        tensors = {
            "weight_packed": _transient_buffer(self.packed_bytes),
            "weight_scale": torch.full((self.out_features,), torch.nan, dtype=torch.float16),
        }
        if self.num_levels:
            tensors["weight_levels"] = torch.full((self.num_levels,), torch.nan, dtype=torch.float32)
        parameters = {}
        for kind, tensor in tensors.items():
            parameters[kind] = torch.nn.Parameter(tensor, requires_grad=False)
            parameters[kind].weight_loader = self._loader(kind)
        return parameters

    def _loader(self, kind: str) -> Callable:
        """``load`` as vLLM expects it, which looks at its ``__name__`` and replaces ``param`` when it loads a model again."""

        def weight_loader(
            param: torch.Tensor,
            loaded_weight: torch.Tensor,
            loaded_shard_id: str | int | tuple[int, ...] | None = None,
        ) -> None:
            self.load(kind, param, loaded_weight, loaded_shard_id)

        return weight_loader

    def codes(self, weight_packed: torch.Tensor, index: int) -> torch.Tensor:
        """Return shard ``index`` as a view of the flat buffer.

        uint8 [num_rows, in_features / 8, bytes_per_group]; int8 [num_rows, in_features] for int8 and
        canonical.
        """
        shard = self.shards[index]
        shape = (shard.num_rows, self.in_features // 8, Codebook(shard.memory_codebook).bytes_per_group)
        start = self.byte_starts[index]
        view = weight_packed.detach()[start : start + shape[0] * shape[1] * shape[2]].view(shape)
        if shard.memory_codebook == "int8":
            view = view.view(torch.int8).view(shard.num_rows, self.in_features)
        return view

    def load(
        self,
        kind: str,
        parameter: torch.Tensor,
        loaded: torch.Tensor,
        shard_id: str | int | tuple[int, ...] | None = None,
    ) -> None:
        """Copy this rank's part of a checkpoint tensor (vLLM's ``weight_loader``).

        Args:
            kind: "weight_packed", "weight_scale" or "weight_levels".
            parameter: the buffer of that name, on any device.
            loaded: the whole tensor of one shard; with ``shard_id`` None on a fused layer, or a tuple, the
                tensor of several shards that the checkpoint itself stores fused.
        Raises:
            PVQError: unknown shard, wrong dtype or shape; the sentence names the module and the tensor.
        """
        if isinstance(shard_id, tuple) or (shard_id is None and len(self.shards) > 1):
            wanted = self.shard_ids if shard_id is None else shard_id
            self._load_fused(kind, parameter, loaded, [self._index(one) for one in wanted])
        else:
            self._load_one(kind, parameter, loaded, self._index(shard_id))

    def _index(self, shard_id: str | int | None) -> int:
        if shard_id not in self.shard_ids:
            raise PVQError(
                f"{self.shards[0].name}: vLLM asks for shard {shard_id!r}, known are {self.shard_ids}"
            )
        return self.shard_ids.index(shard_id)

    def _load_fused(
        self, kind: str, parameter: torch.Tensor, loaded: torch.Tensor, indices: list[int]
    ) -> None:
        rows = [self.shards[index].source_rows for index in indices]
        if kind != "weight_levels" and loaded.shape[0] != sum(rows):
            raise PVQError(
                f"{self.shards[0].name}.{kind} has {loaded.shape[0]} rows, but its parts have {rows}: "
                "quantize the model again"
            )
        parts = [loaded] * len(rows) if kind == "weight_levels" else loaded.split(rows)
        for index, part in zip(indices, parts, strict=True):
            self._load_one(kind, parameter, part, index)

    def _load_one(self, kind: str, parameter: torch.Tensor, loaded: torch.Tensor, index: int) -> None:
        shard = self.shards[index]
        packed_shape = shard.codebook.packed_shape(shard.source_rows, self.source_in_features)
        dtype, shape = {
            "weight_packed": (torch.uint8, packed_shape),
            "weight_scale": (torch.float16, (shard.source_rows,)),
            "weight_levels": (torch.float32, (shard.num_levels,)),
        }[kind]
        # copy_ would cast and broadcast without a word.
        if loaded.dtype != dtype or tuple(loaded.shape) != shape:
            raise PVQError(
                f"{shard.name}.{kind} is {loaded.dtype} {list(loaded.shape)}, but must be {dtype} "
                f"{list(shape)}: quantize the model again"
            )
        if kind == "weight_levels":
            start = self.level_starts[index]
            parameter.detach()[start : start + shard.num_levels].copy_(loaded)
            self._undecoded.setdefault(index, {})[kind] = loaded
        else:
            rows = loaded.narrow(0, shard.source_start, shard.num_loaded_rows)
            if kind == "weight_scale":
                start = self.row_starts[index]
                target = parameter.detach()[start : start + shard.num_rows]
                target[: len(rows)].copy_(rows)
                target[len(rows) :].zero_()
            elif shard.codebook.name == "canonical":
                self._undecoded.setdefault(index, {}).update(weight_packed=rows, target=parameter)
            else:
                target = self.codes(parameter, index)
                if shard.memory_codebook == "int8":
                    rows = rows.view(torch.int8).flatten(1)[:, self.source_column :][:, : self.in_features]
                else:
                    rows = rows[:, self.source_column // 8 :][:, : self.in_features // 8]
                target[: len(rows)].copy_(rows)
                target[len(rows) :].zero_()  # code 0 is valid in every codebook
        self._loaded.add((index, kind))
        if len(self._undecoded.get(index, ())) == 3:
            self._decode_canonical(index, **self._undecoded.pop(index))

    def _decode_canonical(
        self, index: int, weight_packed: torch.Tensor, weight_levels: torch.Tensor, target: torch.Tensor
    ) -> None:
        shard = self.shards[index]
        if target.is_meta:  # when vLLM loads a model again, it first counts what is copied
            q = torch.empty((len(weight_packed), self.source_in_features), dtype=torch.int8, device="meta")
        else:
            weight_packed = weight_packed.to(target.device)
            q = canonical_to_int8(
                shard.name, shard.codebook, weight_packed, weight_levels, self.source_in_features
            )
        view = self.codes(target, index)
        view[: len(q)].copy_(q[:, self.source_column : self.source_column + self.in_features])
        view[len(q) :].zero_()

    def check_complete(self, weight_scale: torch.Tensor) -> bool:
        """Check that every tensor of every shard was loaded and that the scales can be used.

        Returns:
            False if nothing was loaded and yet the scales are finite: ``load_format="dummy"`` filled them.
        Raises:
            PVQError: a missing tensor, or a scale that is negative or not finite; names the module.
        """
        if not self._loaded and bool(torch.isfinite(weight_scale).all()):
            return False
        for index, shard in enumerate(self.shards):
            kinds = ("weight_packed", "weight_scale") + (("weight_levels",) if shard.num_levels else ())
            missing = [kind for kind in kinds if (index, kind) not in self._loaded]
            if missing:
                raise PVQError(f"{shard.name}.{missing[0]} is missing from the checkpoint: copy it again")
            start = self.row_starts[index]
            scale = weight_scale[start : start + shard.num_rows]
            if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
                raise PVQError(
                    f"{shard.name}.weight_scale has a value that is negative or not finite: "
                    "quantize the model again"
                )
        self._loaded.clear()
        return True
