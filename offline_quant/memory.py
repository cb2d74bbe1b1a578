# SPDX-License-Identifier: Apache-2.0
"""Whether the steps that need a whole model at once find the memory for it. All others stream the model."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from pvq_vllm.codec.errors import PVQError

from .calibration import forward_dtype
from .model_source import ModelSource

SPARE = 1.25  # times the weights: activations, and logits of a large vocabulary
CGROUP = Path("/sys/fs/cgroup")
CGROUP_FILES = (  # limit, usage, and in which file, behind which prefix, cached pages stand
    ("memory.max", "memory.current", "memory.stat", ""),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_",
    ),
)


def check_memory(
    source: ModelSource, device: str, models: int, extra: int, option: str, instead: str
) -> None:
    """Raise PVQError unless so many copies of the model and ``extra`` bytes fit into the memory that is free.

    Args:
        option: what needs them, and ``instead`` the way out, for the sentence.
    """
    weights = sum(math.prod(info.shape) for info in source.tensors.values())
    needed = int(SPARE * models * weights * forward_dtype(device).itemsize) + extra
    free = free_memory(device)
    if needed > free:
        raise PVQError(
            f"{option} needs {'the whole model' if models == 1 else f'{models} whole models'} in memory, "
            f"{needed / 1e9:.1f} GB with what it computes, and {free / 1e9:.1f} GB are free: {instead}"
        )


def free_memory(device: str) -> int:
    """Return the free bytes of the GPU, or of the machine or the container that this process is in."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    import psutil

    return max(0, min([psutil.virtual_memory().available, *_left_by_control_groups()]))


def _left_by_control_groups() -> Iterator[int]:
    """Yield what the memory limits of the control group leave, of version 2 and 1, as far as there are any. A
    container sees its own at the root; psutil knows only of the machine.
    """
    for limit, usage, stat, prefix in CGROUP_FILES:
        try:
            most, used = ((CGROUP / name).read_text().strip() for name in (limit, usage))
            counts = dict(line.split() for line in (CGROUP / stat).read_text().splitlines())
        except OSError:
            continue
        if most != "max":
            # Cached pages of files (the model's shards above all) count as used, but the kernel gives them up.
            cached = sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            yield int(most) - int(used) + cached
