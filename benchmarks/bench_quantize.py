# SPDX-License-Identifier: Apache-2.0
"""Time and memory of `pvq quantize` on a model of random weights in the shape of an 8B model.

    python benchmarks/bench_quantize.py [--layers 32] [--sequences 128] [--length 2048] [--bits 4]

Weights and text are made first, by seed, in --folder (16 GB for 32 layers; removed at the end), and do not count.
What a layer costs does not depend on the weights' values, except for how soon the search stops improving. Needs
no network. Prints the seconds of every phase and the peak of GPU and host memory; --json writes them to a file.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from offline_quant.device import choose_device
from offline_quant.plan import DEFAULT_ROTATION, Settings, codebook_from_text
from offline_quant.quantize_checkpoint import quantize_checkpoint

SHAPE = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=32000,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
)


def make_model(folder: Path, layers: int, device: str) -> None:
    """Write a Llama of random bfloat16 weights, one shard a layer, with a tokenizer of bytes."""
    folder.mkdir(parents=True)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, bos_token_id=0, eos_token_id=1)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    values = SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    outside = {
        "model.embed_tokens.weight": (SHAPE["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (SHAPE["vocab_size"], hidden),
    }
    inside = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (values, hidden),
        "self_attn.v_proj": (values, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shards = [outside]
    for layer in range(layers):
        shards.append({f"model.layers.{layer}.{name}.weight": shape for name, shape in inside.items()})
    generator, weight_map = torch.Generator(device).manual_seed(0), {}
    for index, shapes in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: random_weight(shape, generator, device) for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_tokenizer(folder)


def random_weight(shape: tuple[int, ...], generator: torch.Generator, device: str) -> torch.Tensor:
    """Gains of norms are ones; the columns of matrices have unequal power, as in real models."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    weight = torch.randn(shape, generator=generator, device=device) / shape[1] ** 0.5
    weight *= torch.logspace(-0.5, 0.5, shape[1], device=device)
    return weight.bfloat16().cpu()


def save_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|begin|>", "<|end|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")
    wrapped.save_pretrained(folder)


def make_text(file: Path, characters: int) -> None:
    """Write random letters: a token each."""
    letters = torch.randint(97, 123, (characters,), generator=torch.Generator().manual_seed(0))
    file.write_bytes(bytes(letters.tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("build/bench_quantize"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--bits", default="4", help="2, 3, 4, 8 or D,K,b")
    parser.add_argument("--target-bpw", type=float)
    parser.add_argument("--rotation", default=DEFAULT_ROTATION)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--keep", action="store_true", help="keep the folder, and use it again if it is there"
    )
    arguments = parser.parse_args()

    device = choose_device(arguments.device)
    base, out, text = (arguments.folder / name for name in (f"base-{arguments.layers}", "out", "text.txt"))
    console = Console()
    if not base.exists():
        with console.status("writing the model"):
            make_model(base, arguments.layers, device)
    make_text(text, arguments.sequences * arguments.length + 1)
    settings = Settings(
        codebook=codebook_from_text(arguments.bits, "--bits"),
        calibration=str(text),
        calibration_sequences=arguments.sequences,
        calibration_length=arguments.length,
        target_bpw=arguments.target_bpw,
        rotation=arguments.rotation,
        device=device,
    )
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    with console.status("quantizing") as status:
        report = quantize_checkpoint(
            base, out, settings, overwrite=True, progress=lambda name, weights: status.update(name)
        )
    seconds = time.perf_counter() - started
    timings = json.loads((out / "timings.json").read_text())
    modules = sum(timings["modules"].values())
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "layers": arguments.layers,
        "weights": sum(e["out_features"] * e["in_features"] for e in report["modules"].values()),
        "bits_per_weight": report["bits_per_weight"],
        "seconds": seconds,
        "seconds_modules": modules,
        **{f"seconds_{phase}": spent for phase, spent in timings["phases"].items() if phase != "parts"},
        "seconds_parts_without_modules": timings["phases"]["parts"] - modules,
        "seconds_other": seconds - timings["seconds"],
        "gpu_peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0,
        "gpu_peak_reserved_gb": torch.cuda.max_memory_reserved() / 1e9 if device == "cuda" else 0.0,
        "host_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
    table = Table(
        "", "", title=f"{arguments.sequences} x {arguments.length} tokens, {arguments.layers} layers"
    )
    for key, value in result.items():
        table.add_row(
            key,
            f"{value:,.2f}"
            if isinstance(value, float)
            else f"{value:,}"
            if isinstance(value, int)
            else value,
        )
    console.print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if not arguments.keep:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
