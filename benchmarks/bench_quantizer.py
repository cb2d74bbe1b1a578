# SPDX-License-Identifier: Apache-2.0
"""Time the quantizer on the linear layers of one decoder layer of an 8B-shaped model, on a GPU or the CPU.

    python benchmarks/bench_quantizer.py [--device cuda] [--bits 4] [--scale 1]

Random weights, and the Hessian of random correlated inputs. Prints seconds for each step, the output SNR with and
without error feedback, the peak of GPU memory, and what 32 such layers come to. --scale 8 divides all widths by 8.
"""

import argparse
import time

import torch

from offline_quant.hessian import HessianSum, RotatedHessian
from offline_quant.weight_quantizer import quantize_weight
from pvq_vllm.codec.format import Codebook
from pvq_vllm.codec.rotation import Rotation, rotation_layout

# (names of linears that share an input, in_features, out_features of each)
INPUTS = (
    ("q k v", 4096, (4096, 1024, 1024)),
    ("o", 4096, (4096,)),
    ("gate up", 4096, (14336, 14336)),
    ("down", 14336, (4096,)),
)
NUM_LAYERS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bits", choices="234", default="4")
    parser.add_argument("--scale", type=int, default=1)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)

    def timed(function, *parameters):
        _wait(device)
        start = time.perf_counter()
        result = function(*parameters)
        _wait(device)
        return result, time.perf_counter() - start

    generator = torch.Generator(device).manual_seed(0)
    total, weights = 0.0, 0
    print(
        f"{'linears':>8} {'in':>6} {'out':>6} {'Hessian':>9} {'codes':>9} {'Mweights/s':>11} {'dB':>6} {'rounded':>8}"
    )
    for names, width, heights in INPUTS:
        width //= arguments.scale
        blocks, factors = rotation_layout(width, 1)
        rotation = Rotation(0, width, blocks, factors)
        statistics = HessianSum(width, device)
        for _ in range(8):
            latent = torch.randn(4096, width, device=device, generator=generator)
            decay = torch.logspace(0, -2, width, device=device)
            mixing = torch.randn(width, 64, device=device, generator=torch.Generator(device).manual_seed(1))
            statistics.add(latent * decay + 0.1 * (latent[:, :64] @ mixing.T))
        hessian, prepared_in = timed(RotatedHessian.of, statistics.mean(), rotation)
        total += prepared_in
        for name, height in zip(names.split(), heights, strict=True):
            weight = torch.randn(height // arguments.scale, width, device=device, generator=generator)
            weight = (weight * 0.02).to(torch.bfloat16)
            codebook = Codebook(f"pvq{arguments.bits}")
            result, took = timed(quantize_weight, weight, codebook, rotation, hessian, True)
            lost = (weight - result.dequantized).float()
            plain = quantize_weight(weight, codebook, rotation, None, True)
            rounding = (weight - plain.dequantized).float()
            ratio = _energy(lost, statistics) / _energy(rounding, statistics)
            print(
                f"{name:>8} {width:6} {len(weight):6} {prepared_in:8.2f}s {took:8.2f}s {weight.numel() / took / 1e6:11.1f}"
                f" {result.output_snr_db:6.2f} {result.output_snr_db + 10 * torch.log10(ratio).item():8.2f}"
            )
            total, weights, prepared_in = total + took, weights + weight.numel(), 0.0
    print(
        f"one layer: {total:.1f} s for {weights / 1e6:.0f} million weights; {NUM_LAYERS} layers: {NUM_LAYERS * total:.0f} s"
    )
    if device.type == "cuda":
        print(
            f"{torch.cuda.get_device_name(device)}, peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
        )


def _energy(error: torch.Tensor, statistics: HessianSum) -> torch.Tensor:
    return ((error @ statistics.mean()) * error).sum(dtype=torch.float64)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
