# SPDX-License-Identifier: Apache-2.0
"""PVQ for vLLM: pyramid vector quantization of language models, served by an unmodified vLLM.

vLLM finds :func:`register` through the entry point group ``vllm.general_plugins``. Importing this package
imports neither vLLM nor torch; ``pvq_vllm.hf_quantizer`` is what plain transformers needs.
"""

_registered = False


def register() -> None:
    """Make vLLM know the quantization method "pvq" (called by vLLM, once or more, in each of its processes).

    Idempotent and light: it initializes no device and loads no kernel. On the CPU platform it also asks the
    operating system for the AMX tile registers, see :func:`pvq_vllm.vllm_compat.allow_amx`.
    """
    global _registered
    if _registered:
        return
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.platforms import current_platform

    from pvq_vllm.config import PVQConfig
    from pvq_vllm.vllm_compat import allow_amx

    register_quantization_config("pvq")(PVQConfig)
    if current_platform.is_cpu():
        allow_amx()
    _registered = True
