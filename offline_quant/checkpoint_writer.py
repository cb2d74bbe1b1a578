# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint aside, part by part, so that a killed run can go on, and move it into place at the end.

    OUT.partial/
        work/state.json           what the run was started with; another run may not continue it
        work/00007.json           what is reported about part 7, written before
        work/00007.safetensors    the tensors of part 7 (a decoder layer, or one of the tensors outside)
        work/NAME.json ...        what was found out beside the parts: sampled tokens, sensitivities
        work/NAME.seconds         how long that took
        model-00001-of-00002.safetensors ...     shards put together from the parts once all of them are there

Every file is written under another name and renamed when complete, so whatever exists is whole. The layout of
the shards follows from the shapes alone; nothing depends on where a run was interrupted, so the bytes are the
same as those of a run that was not.
"""

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import INDEX_FILE
from pvq_vllm.codec.safetensors_header import TensorInfo, read_safetensors_header

from .model_source import TORCH_DTYPES, read_tensor
from .whole_files import (
    bytes_of,
    clear_removed,
    copied_bytes,
    move_into_place,
    remove_folder,
    remove_replaced,
    tensor_bytes,
    write_file,
    write_safetensors,
)

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
SPARE_BYTES = 64 << 20  # config, tokenizer, report, and the file system's own needs


class CheckpointWriter:
    """The folder of one run. Use as a context manager: it holds a lock on OUT.partial while it works.

    Args:
        out: the folder to write; its parent must exist.
        fingerprint: what decides the bytes; compared with the one of the interrupted run.
        parts: for each part, its tensors: name -> (dtype as safetensors names it, shape), in the order in
            which they are stored.
        resume: go on with OUT.partial.
        overwrite: replace OUT, and start over if there is an OUT.partial.
    """

    def __init__(
        self,
        out: str | os.PathLike,
        fingerprint: dict,
        parts: list[dict[str, tuple[str, tuple[int, ...]]]],
        max_shard_bytes: int,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.out = Path(out)
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.work = self.partial / "work"
        self.finished = self.out.with_name(
            self.out.name + ".finished"
        )  # state.json, at the end of ``clean_up``
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.max_shard_bytes = max_shard_bytes
        self._plan(parts)
        self.resume, self.overwrite = resume, overwrite
        self._lock = None

    def __enter__(self) -> "CheckpointWriter":
        """Check everything that can be known beforehand, then create or open OUT.partial; nothing if ``is_finished``.

        Raises:
            PVQError: OUT exists, another run is at work, the interrupted run was started otherwise, or the
                disk is too small.
        """
        if self.is_finished:
            return self
        check_destination(self.out, self.overwrite)
        clear_removed(self.partial)
        self.finished.unlink(missing_ok=True)
        state = self.work / "state.json"
        if self.partial.exists():
            if not self.resume and not self.overwrite:
                raise PVQError(
                    f"{self.partial} holds an unfinished run: add --resume to continue it, or "
                    "--overwrite to start over"
                )
            with _writing(self.partial), _lock(self.partial):
                if not self.resume or not state.exists():  # without it nothing tells which run made the parts
                    remove_folder(self.partial)
        if self.resume and state.exists():
            before = json.loads(state.read_text(encoding="utf-8"))
            different = sorted(
                key for key in {*before, *self.fingerprint} if before.get(key) != self.fingerprint.get(key)
            )
            if different:
                raise PVQError(
                    f"{self.partial} was made with another {', '.join(different)}: repeat the "
                    "options of the interrupted run, "
                    "or start over with --overwrite"
                )
        self._check_disk()
        with _writing(self.partial):
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.partial)
            self._lock.__enter__()
            write_file(state, json.dumps(self.fingerprint, indent=1).encode())
        return self

    def _plan(self, parts: list[dict[str, tuple[str, tuple[int, ...]]]]) -> None:
        self.parts, self.shards = parts, plan_shards(parts, self.max_shard_bytes)

    def plan_again(self, parts: list[dict[str, tuple[str, tuple[int, ...]]]]) -> None:
        """Replace the parts, before any is written, now that it is known what they will be.

        Raises:
            PVQError: the disk is too small.
        """
        self._plan(parts)
        self._check_disk()

    def __exit__(self, *exception) -> None:
        if self._lock is not None:
            self._lock.__exit__(None, None, None)

    @property
    def is_finished(self) -> bool:
        """True if the run to continue was killed after OUT got its name and before the end of the last cleaning up."""
        states = self.out / "work" / "state.json", self.finished
        return self.resume and self.out.is_dir() and any(map(self._is_own_state, states))

    def _is_own_state(self, state: Path) -> bool:
        return state.exists() and json.loads(state.read_text(encoding="utf-8")) == self.fingerprint

    def clean_up(self) -> None:
        """Remove OUT/work. Until the very last step there is a state.json, so that ``is_finished`` finds OUT wherever
        this is interrupted.
        """
        remove_replaced(self.out)
        work = self.out / "work"
        if work.exists():
            for file in work.iterdir():
                if file.name != "state.json":
                    file.unlink()
            if (work / "state.json").exists():
                os.replace(work / "state.json", self.finished)
            work.rmdir()
        self.finished.unlink(missing_ok=True)

    def _check_disk(self) -> None:
        """Both the parts and the largest shard put together from them must fit."""
        shard_bytes = [sum(tensor_bytes(*tensor) for tensor in shard.values()) for shard in self.shards]
        made = [self._part_path(part) for part in range(len(self.parts))]
        made += [self.partial / name for name in self.shard_names]
        there = sum(path.stat().st_size for path in made if path.exists())
        needed = sum(shard_bytes) + max(shard_bytes) + SPARE_BYTES - there
        parent = self.out.absolute().parent
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise PVQError(
                f"{parent} has {free / 1e9:.2f} GB free, but {needed / 1e9:.2f} GB are needed: free "
                "some space or write elsewhere"
            )

    def _part_path(self, part: int) -> Path:
        return self.work / f"{part:05d}.safetensors"

    @property
    def is_merging(self) -> bool:
        """True once all parts were complete and shards are being put together: no part has to be made
        again.
        """
        return any((self.partial / name).exists() for name in self.shard_names)

    @property
    def shard_names(self) -> list[str]:
        count = len(self.shards)
        if count == 1:
            return ["model.safetensors"]
        return [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]

    def has_part(self, part: int) -> bool:
        """True if this part was written, by this run or the one it continues."""
        return self.is_merging or self._part_path(part).exists()

    def kept_tensors(self, name: str, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return what ``make`` returned, in this run or in the one it continues."""
        path = self.work / f"{name}.safetensors"
        if not path.exists():
            tensors = self._timed(name, make)
            header = {key: (DTYPE_NAMES[value.dtype], tuple(value.shape)) for key, value in tensors.items()}
            with _writing(self.partial):
                write_safetensors(path, header, (bytes_of(value) for value in tensors.values()))
        return {key: read_tensor(info, key) for key, info in read_safetensors_header(path).items()}

    def kept_json(self, name: str, make: Callable[[], dict]) -> dict:
        """Return what ``make`` returned, in this run or in the one it continues."""
        path = self.work / f"{name}.json"
        if not path.exists():
            content = json.dumps(self._timed(name, make)).encode()
            with _writing(self.partial):
                write_file(path, content)
        return json.loads(path.read_text())

    def _timed(self, name: str, make: Callable[[], dict]) -> dict:
        """Return what ``make`` returns, and note how long it took, before the rest is stored."""
        started = time.perf_counter()
        result = make()
        with _writing(self.partial):
            write_file(self.work / f"{name}.seconds", str(time.perf_counter() - started).encode())
        return result

    def seconds(self) -> dict[str, float]:
        """Return how long it took to make what is kept, by name."""
        return {file.stem: float(file.read_text()) for file in sorted(self.work.glob("*.seconds"))}

    def write_part(self, part: int, tensors: Mapping[str, torch.Tensor], report: dict) -> None:
        """Store one part and what is to be reported about it.

        Raises:
            PVQError: the disk is full.
        """
        promised = self.parts[part]
        found = {name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
        if found != promised:
            raise AssertionError(f"part {part}: {found} instead of {promised}")
        with _writing(self.partial):
            write_file(self.work / f"{part:05d}.json", json.dumps(report).encode())
            contents = (bytes_of(tensors[name]) for name in promised)
            write_safetensors(self._part_path(part), promised, contents)

    def read_part(self, part: int) -> dict[str, torch.Tensor]:
        """Return the tensors of a part that was written."""
        header = read_safetensors_header(self._part_path(part))
        return {name: read_tensor(info, name) for name, info in header.items()}

    def reports(self) -> list[dict]:
        """Return what ``write_part`` was told about each part, in order."""
        return [json.loads((self.work / f"{part:05d}.json").read_text()) for part in range(len(self.parts))]

    def finish(self, files: Mapping[str, bytes], copied: Iterable[Path]) -> None:
        """Put the shards together, add ``files`` (name -> content) and the ``copied`` ones, and move the
        folder to OUT.

        Raises:
            PVQError: the disk is full; OUT is as it was before.
        """
        with _writing(self.partial):
            part_of = {name: part for part, tensors in enumerate(self.parts) for name in tensors}
            for shard_name, shard in zip(self.shard_names, self.shards, strict=True):
                if not (self.partial / shard_name).exists():
                    where: dict[str, TensorInfo] = {}
                    for part in sorted({part_of[name] for name in shard}):
                        where.update(read_safetensors_header(self._part_path(part)))
                    write_safetensors(
                        self.partial / shard_name, shard, (copied_bytes(where[name]) for name in shard)
                    )
                for part, tensors in enumerate(
                    self.parts
                ):  # what the shards hold by now need not be kept twice
                    if set(tensors) <= self._finished_tensors():
                        self._part_path(part).unlink(missing_ok=True)
            if len(self.shards) > 1:
                files = {**files, INDEX_FILE: self._index()}
            for source in copied:
                shutil.copyfile(source, self.partial / source.name)
            for name, content in files.items():
                write_file(self.partial / name, content)
            (self.partial / ".lock").unlink(missing_ok=True)
            move_into_place(self.partial, self.out)
            self.clean_up()

    def _finished_tensors(self) -> set[str]:
        pairs = zip(self.shard_names, self.shards, strict=True)
        return {tensor for name, shard in pairs if (self.partial / name).exists() for tensor in shard}

    def _index(self) -> bytes:
        weight_map = {
            tensor: name
            for name, shard in zip(self.shard_names, self.shards, strict=True)
            for tensor in shard
        }
        total = sum(tensor_bytes(*tensor) for shard in self.shards for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        return (json.dumps(index, indent=2) + "\n").encode()


def plan_shards(parts: list[dict], max_shard_bytes: int) -> list[dict]:
    """Fill shards with the tensors of all parts in order, none larger than the bound unless one tensor alone
    is.
    """
    shards: list[dict] = [{}]
    filled = 0
    for tensors in parts:
        for name, tensor in tensors.items():
            size = tensor_bytes(*tensor)
            if shards[-1] and filled + size > max_shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = tensor
            filled += size
    return shards


def check_apart(model: Path, out: Path) -> None:
    """Refuse a destination whose replacement would remove the model.

    Raises:
        PVQError: OUT or OUT.partial is the model's folder, or holds it.
    """
    source = model.resolve()
    for target in (out, out.with_name(f"{out.name}.partial")):
        if target.resolve() in (source, *source.parents):
            raise PVQError(f"{target} is, or holds, the model to quantize: name another OUT")


def check_destination(out: Path, overwrite: bool) -> None:
    """Refuse a destination that may not be written.

    Raises:
        PVQError: OUT exists without ``overwrite``, OUT is something else than a model folder, or its parent
            is missing.
    """
    if not out.absolute().parent.is_dir():
        raise PVQError(f"{out}: the folder {out.absolute().parent} does not exist: create it first")
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() and not overwrite:
        raise PVQError(f"{out} exists: name another folder, or add --overwrite to replace it")
    if out.exists() and not (out / "config.json").is_file():
        raise PVQError(f"{out} exists and is not a model folder, so it is not replaced: name another folder")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn what the disk may answer into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PVQError(
                f"the disk of {folder} is full: free some space and continue with --resume"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PVQError(
                f"{folder} cannot be written ({error.strerror}): choose a folder of yours"
            ) from error
        raise


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on the folder; the system drops it when the process ends in whatever way."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PVQError(
                f"{folder} is in use by another run: wait for it, or choose another OUT"
            ) from error
        yield
