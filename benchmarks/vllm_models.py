# SPDX-License-Identifier: Apache-2.0
"""The models of bench_vllm_cuda.py: an 8B Llama without weights, as vLLM's dummy loader wants it, and the engine's arguments.

PVQ models are called CODEBOOK[-SUFFIX]. The suffix says what is rotated at run time, as --rotation of `pvq quantize` does:

    pvq4              every input, over its whole width
    pvq4-block128     every input, in blocks of 128 columns
    pvq4-residual     the MLP's inner activation alone, over its whole width; the rest is folded into the weights
    pvq4-residual128  the MLP's inner activation alone, in blocks of 128 columns
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import NamedTuple

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 4096, 14336, 32, 8, 32000
OTHERS = ("fp16", "int4", "fp8")
BLOCKS = (64, 128, 256, 512, 1024)  # powers of two that divide both widths
FULL_WIDTH = {HIDDEN: [HIDDEN], INTERMEDIATE: [28, INTERMEDIATE // 28]}  # Hadamard factors, docs/format.md §5
KNOWN_MODELS = (
    f"{', '.join(OTHERS)}, pvq4, pvq3, pvq2; the last three also with -residual, -blockN or -residualN, N one of "
    f"{', '.join(map(str, BLOCKS))}"
)


class PVQModel(NamedTuple):
    """What a name such as pvq4-residual128 stands for."""

    codebook: str
    folded: bool  # the rotation of the residual stream is in the weights
    block: int | None  # columns of a block of what is rotated at run time; None: the whole width

    @classmethod
    def from_name(cls, name: str) -> PVQModel | None:
        """None if no PVQ model is called so."""
        sizes = "|".join(map(str, BLOCKS))
        match = re.fullmatch(rf"(pvq[234])(?:(-residual)({sizes})?|-block({sizes}))?", name)
        if not match:
            return None
        codebook, residual, inner, every = match.groups()
        block = inner or every
        return cls(codebook, residual is not None, int(block) if block else None)

    def rotation_blocks(self, in_features: int) -> int:
        if self.folded and in_features == HIDDEN:
            return 0
        return in_features // self.block if self.block else 1

    def factors(self) -> dict[int, list[int]]:
        """Hadamard factors by width of a block."""
        return {self.block: [self.block]} if self.block else FULL_WIDTH


def is_known(name: str) -> bool:
    return name in OTHERS or PVQModel.from_name(name) is not None


def pvq_config(model: PVQModel, layers: int, activation: str, head: str) -> dict:
    linear = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    linear += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    names = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in linear]
    widths = {name: INTERMEDIATE if name.endswith("down_proj") else HIDDEN for name in names}
    modules: dict[str, dict] = {
        name: {"rotation_blocks": model.rotation_blocks(width)} for name, width in widths.items()
    }
    if head != "none":
        modules["lm_head"] = {"rotation_blocks": model.rotation_blocks(HIDDEN), "codebook": {"name": head}}
    return {
        "quant_method": "pvq",
        "format_version": 1,
        "activation": activation,
        "codebook": {"name": model.codebook},
        "rotation": {
            "seed": 0,
            "factors": {str(width): orders for width, orders in model.factors().items()},
        },
        "modules": modules,
    }


def quantization_config(model: str, layers: int, activation: str, head: str) -> dict | None:
    """`quantization_config` of config.json; None for fp16."""
    if model == "fp16":
        return None
    if pvq := PVQModel.from_name(model):
        return pvq_config(pvq, layers, activation, head)
    weights = {"symmetric": True, "dynamic": False, "observer": "minmax"}
    if model == "int4":
        weights |= {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
        inputs = None
    else:
        weights |= {"num_bits": 8, "type": "float", "strategy": "channel"}
        inputs = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if model == "int4" else "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"output_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def write_config(folder: Path, model: str, options: argparse.Namespace) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": options.layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": options.dtype,
    }
    if quantization := quantization_config(model, options.layers, options.activation, options.pvq_head):
        config["quantization_config"] = quantization
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def engine_arguments(folder: Path, options: argparse.Namespace) -> dict:
    """Arguments of LLM, the same for all models; --llm has the last word."""
    largest = max([1, *options.batches])
    sizes = sorted({size for size in (1, 2, 4, 8, 16, 32, 64, *options.batches) if size <= largest})
    arguments = {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": options.dtype,
        "gpu_memory_utilization": 0.6,
        "max_model_len": 4096,
        "max_num_seqs": max(64, largest),
        "max_num_batched_tokens": 8192,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "enforce_eager": options.eager,
        "seed": 0,
    }
    if not options.eager:
        arguments["compilation_config"] = {"cudagraph_capture_sizes": sizes}
    return arguments | json.loads(options.llm)
