# SPDX-License-Identifier: Apache-2.0
"""How much each activation mode (docs/format.md section 6) costs a checkpoint, next to its weights alone.

    python benchmarks/activations.py CHECKPOINT --base BASE [--modes a16,a8,pvq:16,58,...] [--markdown FILE]

The first row has the checkpoint's weights, decoded to float32, and exact activations. dB is the signal-to-noise
ratio of Gaussian activations, µs the time to quantize one of 256 tokens of 4096 (the best of twenty trials, all threads);
bits are those of a pyramid's index, log2 N(D, K) / D a value, without the scale of the group (a8 and a16: of an integer).
"""

from __future__ import annotations

import argparse
import math
import re
import time
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from offline_quant.calibration import forward_dtype
from offline_quant.calibration_data import tokenize
from offline_quant.evaluate import compare_logits, evaluation_text, load_model, mean_and_interval
from pvq_vllm import ops, quantizer_ops
from pvq_vllm.codec.activation import parse_activation
from pvq_vllm.codec.format import check_checkpoint
from pvq_vllm.codec.pyramid import codebook_size
from pvq_vllm.codec.rotation import Rotation

MODES = (
    "a16,a8,pvq:8,36,pvq:8,80,pvq:16,27,pvq:16,58,pvq:16,123,pvq:16,160,pvq:16,258,pvq:16,542,"
    "pvq:32,50,pvq:32,105,pvq:32,216,pvq:32,444,pvq:64,199,pvq:64,405,pvq:64,821"
)
EXACT = "exact activations"


class ExactLinear(nn.Module):
    """The weight of a quantized module, decoded; activations stay as they are."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float() @ self.weight.T
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


def exact_model(checkpoint: Path, base: Path, dtype: torch.dtype) -> nn.Module:
    """The base model with the weights of ``checkpoint``, whose codebooks must be pvq2, pvq3, pvq4 or int8."""
    config, tensors = check_checkpoint(checkpoint)
    model = load_model(base, dtype)
    for name, spec in config.modules.items():
        with safe_open(tensors[f"{name}.weight_packed"].shard, "pt") as shard:
            codes, scale = shard.get_tensor(f"{name}.weight_packed"), shard.get_tensor(f"{name}.weight_scale")
        rows = codes.view(torch.int8).flatten(1).float() if spec.codebook.name == "int8" else None
        if rows is None:
            rows = quantizer_ops.decode_codes(codes, spec.codebook.name).float() + spec.codebook.h / 2
        blocks, width = spec.rotation_blocks, rows.shape[1]
        factors = config.rotation_factors[width // blocks] if blocks else []
        weight = Rotation(config.rotation_seed, width, blocks, factors).unrotate(
            rows * scale.float()[:, None]
        )
        old = model.get_submodule(name)
        if not isinstance(old, nn.Linear):
            raise SystemExit(f"{name} is not a linear layer; quantize without --embeddings 8")
        model.set_submodule(name, ExactLinear(weight, old.bias))
    return model


def bits_of(mode: str) -> float:
    activation = parse_activation(mode)
    if not activation.group_size:
        return 8.0 * activation.num_planes
    return math.log2(codebook_size(activation.group_size, activation.num_pulses)) / activation.group_size


def microseconds(mode: str, tokens: int = 256, width: int = 4096) -> float:
    x = torch.randn(tokens, width).bfloat16()
    plan = ops.make_plan([("int8", 1)], width, rotation_blocks=1, factors=[width], activation=mode)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        ops.quantize_activations(x, plan)
        times.append(time.perf_counter() - start)
    return 1e6 * min(times) / tokens


def decibels(mode: str, tokens: int = 256, width: int = 4096) -> float:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    planes, scale = ops.quantize_activations(x, ops.make_plan([("int8", 1)], width, activation=mode))
    integers = planes.double()
    values = integers[0] if len(integers) == 1 else 256 * integers[0] + integers[1]
    error = x.double() - values * scale.double()[:, None]
    return float(10 * torch.log10(x.double().square().sum() / error.square().sum()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--base", type=Path, required=True, help="the model it was made from")
    parser.add_argument("--modes", default=MODES, help="default: %(default)s")
    parser.add_argument("--text", type=Path, default=evaluation_text(), help="default: the one that ships")
    parser.add_argument("--sequences", type=int, default=10)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--markdown", type=Path, help="write the table to this file as well")
    arguments = parser.parse_args()
    modes = re.findall(r"pvq:[^,]*,[^,]*|[^,]+", arguments.modes)
    dtype = forward_dtype()
    ids = tokenize(arguments.base, arguments.text)
    wanted = arguments.sequences * arguments.length
    if len(ids) < wanted:
        raise SystemExit(f"{arguments.text} has {len(ids)} tokens, fewer than {wanted}")
    reference = load_model(arguments.base, dtype)
    models = {EXACT: exact_model(arguments.checkpoint, arguments.base, dtype)}
    models |= {mode: load_model(arguments.checkpoint, dtype, activation=mode) for mode in modes}
    samples: dict[str, list[dict]] = {name: [] for name in models}
    with torch.inference_mode():
        for sequence in ids[:wanted].split(arguments.length):
            expected = reference(input_ids=sequence[None], use_cache=False).logits[0]
            for name, model in models.items():
                logits = model(input_ids=sequence[None], use_cache=False).logits[0]
                samples[name].append(compare_logits(logits, expected, sequence))
    lines = [
        "| activations | bits | dB | µs | KL divergence | more than exact | perplexity |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    exact = [sample["kl_divergence"] for sample in samples[EXACT]]
    for name, rows in samples.items():
        divergence = [sample["kl_divergence"] for sample in rows]
        mean, _ = mean_and_interval(divergence)
        more, more_interval = mean_and_interval([a - b for a, b in zip(divergence, exact, strict=True)])
        perplexity = math.exp(mean_and_interval([sample["loss"] for sample in rows])[0])
        kind = ["", "", ""]
        if name != EXACT:
            kind = [f"{bits_of(name):.2f}", f"{decibels(name):.1f}", f"{microseconds(name):.1f}"]
        added = "" if name == EXACT else f"{more:+.4f}"
        if added and more_interval:
            added += f" ± {more_interval[1] - more:.4f}"
        cells = [f"`{name}`" if kind[0] else name, *kind, f"{mean:.4f}", added, f"{perplexity:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    base = math.exp(mean_and_interval([sample["loss_reference"] for sample in samples[EXACT]])[0])
    lines.append(f"| base model, nothing quantized | | | | | | {base:.3f} |")
    print("\n".join(lines))
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
