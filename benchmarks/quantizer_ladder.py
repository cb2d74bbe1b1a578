# SPDX-License-Identifier: Apache-2.0
"""What each step of the quantizer gains, layer by layer: output SNR, 10 log10(tr(W H W^T) / tr(dW H dW^T)).

    python benchmarks/quantizer_ladder.py MODEL [--text FILE] [--layers 0,10,29] [--bits 4] [--sequences 24]

H is that of the model itself (no layer before it quantized), in the rotated coordinates of --rotation online.
"""

import argparse
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from offline_quant import canonical_quantizer
from offline_quant.calibration import LayerwiseForward
from offline_quant.calibration_data import calibration_text, tokenize, windows
from offline_quant.error_feedback import descend, feedback, fit_scale
from offline_quant.hessian import RotatedHessian
from offline_quant.model_source import ModelSource
from offline_quant.plan import codebook_from_text
from offline_quant.rotation import rotate_rows
from pvq_vllm import quantizer_ops
from pvq_vllm.codec.format import Codebook
from pvq_vllm.codec.rotation import Rotation, rotation_layout
from pvq_vllm.codec.serving import SERVING

PASSES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, default=calibration_text())
    parser.add_argument("--layers", type=lambda text: [int(part) for part in text.split(",")], default=[0])
    parser.add_argument("--bits", choices="234", default="4")
    parser.add_argument(
        "--canonical",
        metavar="D,K,b",
        help="this codebook instead of --bits; D = 144 where 128 divides no row",
    )
    parser.add_argument("--sequences", type=int, default=24)
    arguments = parser.parse_args()
    source = ModelSource.open(arguments.model)
    tokens = windows(tokenize(arguments.model, arguments.text), arguments.sequences, 1024)
    forward = LayerwiseForward(source, tokens)
    found: dict[str, list[float]] = {}
    for layer in range(max(arguments.layers) + 1):
        names = source.linear_names(layer)
        with forward.loaded(layer):
            sums = forward.collect(layer, names) if layer in arguments.layers else {}
            forward.advance(layer)
        for name, total in sums.items():
            weight = source.read(f"{name}.weight").float()
            if arguments.canonical:
                codebook = codebook_from_text(arguments.canonical, "--canonical")
                steps = dict(canonical_ladder(weight, total.mean(), codebook))
            else:
                steps = dict(ladder(weight, total.mean(), f"pvq{arguments.bits}"))
            print(f"{name:45}" + "".join(f"{value:8.3f}" for value in steps.values()), flush=True)
            for step, value in steps.items():
                found.setdefault(step, []).append(value)
    for step, values in found.items():
        print(f"{step:45}{sum(values) / len(values):8.3f} dB, mean of {len(values)} linears")


def rotated(weight: torch.Tensor, hessian: torch.Tensor) -> tuple[torch.Tensor, RotatedHessian]:
    """Return both over the whole width."""
    width = weight.shape[1]
    rotation = Rotation(0, width, *rotation_layout(width, 1))
    return rotate_rows(weight, rotation), RotatedHessian.of(hessian, rotation)


def output_snr(weight: torch.Tensor, approximation: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return it in dB."""

    def energy(error: torch.Tensor) -> float:
        return ((error @ hessian) * error).sum(dtype=torch.float64).item()

    return 10 * math.log10(energy(weight) / energy(weight - approximation))


def ladder(weight: torch.Tensor, hessian: torch.Tensor, name: str) -> Iterator[tuple[str, float]]:
    """Yield (step, output SNR in dB) in the order of the steps."""
    width = weight.shape[1]
    w, prepared = rotated(weight, hessian)
    start = (w.square().mean(dim=1).sqrt() / SERVING[name].target_rms).half().float()

    def snr(q: torch.Tensor, scale: torch.Tensor) -> float:
        return output_snr(w, (q + 0.5) * scale[:, None], prepared.hessian)

    def fitted(q: torch.Tensor) -> torch.Tensor:
        return fit_scale(w, q + 0.5, prepared.hessian, start)

    _, q = quantizer_ops.quantize_rows(w, name, start)
    yield "rounding", snr(q, start)
    identity = torch.eye(8).expand(width // 8, 2, 8, 8).contiguous()
    fields = prepared.hessian, prepared.damping, prepared.factor, identity, prepared.descent_metrics
    _, q = feedback(w, RotatedHessian(*fields), name, start)
    yield "error feedback, Euclidean", snr(q, start)
    yield "  and scales fitted (Euclidean)", snr(q, fitted(q))
    codes, q = feedback(w, prepared, name, start)
    yield "error feedback in the group's metric", snr(q, start)
    scale = fitted(q)
    yield "  and scales fitted (metric)", snr(q, scale)
    for number in range(1, PASSES + 1):
        descend(w, codes, q, prepared, name, 1, scale)
        scale = fitted(q)
        yield f"descent, pass {number}, and scales fitted", snr(q, scale)


def canonical_ladder(
    weight: torch.Tensor, hessian: torch.Tensor, codebook: Codebook
) -> Iterator[tuple[str, float]]:
    """Yield (step, output SNR in dB) in the order of the steps."""
    width = weight.shape[1]
    if width % codebook.group_size:  # 576 columns have no groups of 128
        codebook = dataclasses.replace(codebook, group_size=144, num_pulses=codebook.num_pulses * 144 // 128)
    w, prepared = rotated(weight, hessian)
    damped = prepared.hessian + prepared.damping * torch.eye(width)

    def snr() -> float:
        return output_snr(w, codes.q.float() * scale[:, None], prepared.hessian)

    codes, scale = canonical_quantizer.quantize_with_feedback(w, prepared.factor, codebook, "lloyd_max")
    yield "error feedback in the group's metric", snr()
    scale = fit_scale(w, codes.q.float(), prepared.hessian, scale)
    yield "  and scales fitted", snr()
    for number in range(1, PASSES + 1):
        canonical_quantizer.descend(w, codes, damped, codebook, scale)
        scale = fit_scale(w, codes.q.float(), prepared.hessian, scale)
        yield f"descent, pass {number}, and scales fitted", snr()


if __name__ == "__main__":
    main()
