# SPDX-License-Identifier: Apache-2.0
"""``quantization_config`` of a PVQ checkpoint as vLLM wants to see it, and which layer gets which method.

Works with vLLM 0.24 to 0.33, whose interfaces differ in the arguments they pass, see the ``**`` below. The
environment variable PVQ_ACTIVATION (a8, a16 or pvq:D,K) overrides the checkpoint's activation mode. It is
read once, where vLLM reads the model's configuration, and reaches the workers and the compile cache with it.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from pvq_vllm.codec.activation import parse_activation
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import QUANT_METHOD, CheckpointConfig, check_checkpoint

# What almost every dense model of vLLM fuses; a model's own packed_modules_mapping goes first.
_USUAL_FUSED_MODULES = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
_MIXTURE_OF_EXPERTS = {"RoutedExperts", "FusedMoE"}  # class names; their module differs between versions
_EMBEDDING_NAMES = ("embed_tokens", "word_embeddings", "wte", "embed_in", "tok_embeddings")


class PVQConfig(QuantizationConfig):
    """vLLM's view of ``codec.format.CheckpointConfig``, which see for the content and its checks."""

    def __init__(self, checkpoint: CheckpointConfig):
        super().__init__()  # sets packed_modules_mapping
        self.checkpoint = checkpoint
        self.folder: Path | None = None  # known once vLLM has named it

    def __repr__(self) -> str:
        return f"PVQConfig({len(self.checkpoint.modules)} modules, {self.checkpoint.activation})"

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PVQConfig":
        """Parse strictly.

        Raises:
            PVQError: another version, an unknown key or an unknown value; the sentence names it.
        """
        return cls(CheckpointConfig.from_dict(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None, **_
    ) -> str | None:
        """Claim PVQ checkpoints and nothing else; apply PVQ_ACTIVATION.

        The variable is written into the model's configuration, where vLLM's compile cache sees it; read any
        later, a graph compiled for the other mode would be taken from the cache.
        """
        if not isinstance(hf_quant_cfg, dict) or hf_quant_cfg.get("quant_method") != QUANT_METHOD:
            return None
        if activation := activation_from_environment():
            for config in (hf_config, getattr(hf_config, "text_config", None)):
                if isinstance(settings := getattr(config, "quantization_config", None), dict):
                    settings["activation"] = activation
            hf_quant_cfg["activation"] = activation
        return QUANT_METHOD

    def maybe_update_config(self, model_name: str, hf_config: Any = None, **_) -> None:
        """Check the whole folder, if it is one, before anything is allocated (``check_checkpoint``).

        Raises:
            PVQError: a missing, truncated or wrong shard, or tied embeddings that cannot be tied.
        """
        folder = Path(model_name)
        if folder.is_dir() and any(folder.glob("*.safetensors")):  # a folder without any is for dummy weights
            check_checkpoint(folder)
            self.folder = folder
        text_config = getattr(hf_config, "text_config", None) or hf_config
        if getattr(text_config, "tie_word_embeddings", False):
            for name in self.checkpoint.modules:
                if name.rpartition(".")[2] in ("lm_head", *_EMBEDDING_NAMES):
                    raise PVQError(
                        f"{name} is quantized, so {folder / 'config.json'} must say "
                        "tie_word_embeddings: false; quantize the model again"
                    )

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        """Rename the modules as the model renames its weights; multimodal models put a prefix before them."""
        if hasattr(hf_to_vllm_mapper, "get_rename_mapper"):
            hf_to_vllm_mapper = hf_to_vllm_mapper.get_rename_mapper()
        suffix = ".weight_packed"  # mappers may match "lm_head." with its dot
        modules = hf_to_vllm_mapper.apply_dict(
            {name + suffix: spec for name, spec in self.checkpoint.modules.items()}
        )
        modules = {name.removesuffix(suffix): spec for name, spec in modules.items()}
        self.checkpoint = replace(self.checkpoint, modules=modules)

    def fused_modules(self, prefix: str) -> list[str]:
        """Return the checkpoint's names of the modules that vLLM's layer ``prefix`` is made of."""
        if prefix in self.checkpoint.modules:
            return [prefix]
        parent, dot, name = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(name) or _USUAL_FUSED_MODULES.get(name) or [name]
        return [parent + dot + part for part in parts]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method of ``layer``; None leaves an embedding, an attention or the experts as they are.

        Raises:
            PVQError: a fused layer of which only a part is quantized.
            NotImplementedError: quantized experts.
        """
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        from pvq_vllm.embedding import PVQEmbeddingMethod
        from pvq_vllm.linear import PVQLinearMethod

        modules = self.checkpoint.modules
        if isinstance(layer, ParallelLMHead):
            return PVQLinearMethod(self.checkpoint, [prefix], self.folder) if prefix in modules else None
        if isinstance(layer, VocabParallelEmbedding):
            name = prefix or self._only_embedding()  # Llama, for one, gives its embedding no prefix
            return PVQEmbeddingMethod(self.checkpoint, name) if name in modules else None
        if isinstance(layer, LinearBase):
            names = self.fused_modules(prefix)
            listed = [name for name in names if name in modules]
            if not listed:
                return UnquantizedLinearMethod()
            if listed != names:
                missing = next(name for name in names if name not in modules)
                raise PVQError(
                    f"{listed[0]} is quantized but {missing} is not, and vLLM fuses them: "
                    "quantize both, at any rates"
                )
            return PVQLinearMethod(self.checkpoint, names, self.folder)
        if _MIXTURE_OF_EXPERTS & {base.__name__ for base in type(layer).__mro__}:
            parent = prefix.removesuffix(".routed_experts")
            if any(name.startswith(parent + ".") for name in modules):
                raise NotImplementedError(
                    f"{prefix}: quantized experts of a mixture-of-experts model are not supported yet; "
                    "leave them unquantized"
                )
        return None

    def _only_embedding(self) -> str | None:
        names = [name for name in self.checkpoint.modules if name.rpartition(".")[2] in _EMBEDDING_NAMES]
        return names[0] if len(names) == 1 else None


def activation_from_environment() -> str | None:
    """Return PVQ_ACTIVATION, None if it is not set; PVQError if it is no mode of docs/format.md section 6."""
    activation = os.environ.get("PVQ_ACTIVATION")
    if activation:
        parse_activation(activation, "PVQ_ACTIVATION")
    return activation or None
