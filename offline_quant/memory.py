# SPDX-License-Identifier: Apache-2.0
"""Whether the steps that need a whole model at once find the memory for it. All others stream the model."""

import math

import torch

from pvq_vllm.codec.errors import PVQError

from .calibration import forward_dtype
from .model_source import ModelSource

SPARE = 1.25  # times the weights: activations, and logits of a large vocabulary


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
    """Return the free bytes of the GPU, or of the machine."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available
