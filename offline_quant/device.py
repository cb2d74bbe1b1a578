# SPDX-License-Identifier: Apache-2.0
"""Where a run computes: on the CPU, or on one NVIDIA GPU."""

import torch

from pvq_vllm import ops
from pvq_vllm.codec.errors import PVQError


def choose_device(device: str) -> str:
    """Return 'cpu' or 'cuda' for the option --device.

    Args:
        device: cpu, cuda, or auto: cuda if torch and this build can use a GPU.
    Raises:
        PVQError: another word, or cuda where there is no GPU that can be used; the sentence says why.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise PVQError(f"--device is '{device}', but must be auto, cpu or cuda")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise PVQError("--device cuda: torch finds no GPU: use --device cpu, or a build of torch with CUDA")
    try:
        ops.check_device(torch.device("cuda"))
    except PVQError:
        if device == "cuda":
            raise
        return "cpu"
    return "cuda"
