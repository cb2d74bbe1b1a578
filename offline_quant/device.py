# SPDX-License-Identifier: Apache-2.0
"""Where a run computes: on the CPU, or on one NVIDIA GPU."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

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


@contextmanager
def deterministic(device: str) -> Iterator[None]:
    """Backward passes on a GPU that add in the same order every time, wherever torch has such kernels."""
    if device != "cuda":
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        # Of torch's attention kernels the memory-efficient one adds in any order when it may only warn.
        kernels = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
        with kernels, warnings.catch_warnings(action="ignore", category=UserWarning):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def short_products(wanted: bool) -> Iterator[None]:
    """If ``wanted``, and where a CPU has instructions for it, let products of float32 matrices round their factors to
    bfloat16; sums stay float32.
    """
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if wanted else before
    try:
        yield
    finally:
        settings.fp32_precision = before
