# SPDX-License-Identifier: Apache-2.0
"""Signal-to-noise ratio of the codebooks on i.i.d. Gaussian weights, in dB, amplitude included in the bits.

    python benchmarks/snr.py [--rows 512] [--columns 4096]
    python benchmarks/snr.py --amplitudes      canonical codebook: Beta quantiles against Lloyd's levels

The rate-distortion bound is 6.02 dB a bit; Lloyd-Max is the best scalar quantizer (closed-form constants below).
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

from pvq_vllm import canonical_ops, quantizer_ops
from pvq_vllm.codec.serving import SERVING

TARGETS = {"pvq2": 10.1, "pvq3": 15.2, "pvq4": 20.7}
LLOYD_MAX = {2: 9.30, 3: 14.62, 4: 20.22}  # Max 1960, Gaussian source
# QSNR in dB of S(D, K) on Gaussian weights, from a computation that shares no code with this project: a direction with its
# best amplitude (the better of nearest on the pyramid and greedy on the cosine), and with an amplitude of 4 and of 6 bits at
# Beta quantiles (greedy alone, amplitudes not rounded to integers). One draw: good to 0.05 dB.
REFERENCE = {
    (16, 12): (10.84, 10.80, 10.82),
    (16, 27): (17.14, 17.01, 17.12),
    (16, 33): (18.83, 18.58, 18.76),
    (16, 58): (23.70, 23.02, 23.50),
    (128, 84): (10.17, 10.17, 10.18),
    (128, 187): (16.26, 16.25, 16.26),
    (128, 225): (17.80, 17.77, 17.79),
    (128, 386): (22.36, 22.29, 22.35),
}
TOLERANCE_DB = 0.1
CANONICAL = [(16, 12, 2), (16, 27, 4), (16, 58, 6), (128, 84, 4), (128, 187, 4), (128, 386, 4)]
AMPLITUDES = [(16, 58, 4), (16, 58, 6), (128, 386, 4), (128, 386, 6)]


def decibels(weight: torch.Tensor, decoded: torch.Tensor) -> float:
    return float(
        10 * torch.log10(weight.double().square().sum() / (weight.double() - decoded.double()).square().sum())
    )


def int_round_to_nearest(weight: torch.Tensor, bits: int, group: int = 128) -> torch.Tensor:
    """Symmetric absmax integers in groups, the usual baseline."""
    groups = weight.reshape(weight.shape[0], -1, group)
    scale = groups.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((groups / scale).round() * scale).reshape(weight.shape)


def canonical_snr(weight: torch.Tensor, group_size: int, num_pulses: int) -> tuple[float, float, float]:
    """Return what ``REFERENCE`` lists, measured on ``weight``, float32 [m, n]."""
    groups = weight.reshape(-1, group_size)
    pulses = torch.from_numpy(canonical_ops.search_pulses(groups.numpy(), num_pulses)).float()
    amplitude = (pulses * groups).sum(dim=1) / pulses.square().sum(dim=1)
    values = [decibels(groups, pulses * amplitude[:, None])]
    for bits in (4, 6):
        code = group_size, num_pulses, bits
        packed, levels, scale = canonical_ops.encode_canonical(weight, *code, amplitude="beta")
        q = canonical_ops.decode_canonical(packed, levels, *code, weight.shape[1])
        values.append(decibels(weight, q * scale.float()[:, None]))
    return tuple(values)


def reference_table(weight: torch.Tensor) -> Table:
    """Compare the canonical codebook with ``REFERENCE``."""
    table = Table(title="canonical codebook in dB: here / reference (Beta-quantile amplitudes)")
    for column in ("D", "K", "unquantized amplitude", "4 bits", "6 bits", f"within {TOLERANCE_DB} dB"):
        table.add_column(column, justify="right")
    for (group_size, num_pulses), expected in REFERENCE.items():
        values = canonical_snr(weight, group_size, num_pulses)
        within = all(abs(value - e) <= TOLERANCE_DB for value, e in zip(values, expected, strict=True))
        cells = [f"{value:.2f} / {e:.2f}" for value, e in zip(values, expected, strict=True)]
        table.add_row(str(group_size), str(num_pulses), *cells, "yes" if within else "NO")
    return table


def canonical_decibels(
    weight: torch.Tensor, sizes: tuple[int, int, int], amplitude: str
) -> tuple[float, float]:
    """Return (bits a weight, SNR in dB) of the canonical codebook with D, K, b = ``sizes``."""
    packed, levels, scale = canonical_ops.encode_canonical(weight, *sizes, amplitude)
    q = canonical_ops.decode_canonical(packed, levels, *sizes, weight.shape[1])
    bits = (8 * packed.shape[1] + 16) / weight.shape[1]
    return bits, decibels(weight, q * scale.float()[:, None])


def amplitude_table(weight: torch.Tensor) -> Table:
    """Compare the two ways to place the levels of the amplitude."""
    table = Table(
        title=f"Canonical codebook, Gaussian weights, {weight.shape[0]} x {weight.shape[1]}, seed 0"
    )
    for column in ("D", "K", "b", "bits a weight", "Beta quantiles, dB", "Lloyd-Max, dB", "difference"):
        table.add_column(column, justify="right")
    for sizes in AMPLITUDES:
        bits, beta = canonical_decibels(weight, sizes, "beta")
        _, lloyd = canonical_decibels(weight, sizes, "lloyd_max")
        numbers = (f"{bits:.3f}", f"{beta:.2f}", f"{lloyd:.2f}", f"{lloyd - beta:.2f}")
        table.add_row(*map(str, sizes), *numbers)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--amplitudes", action="store_true", help="only compare amplitude levels")
    arguments = parser.parse_args()
    weight = torch.randn(arguments.rows, arguments.columns, generator=torch.Generator().manual_seed(0))
    if arguments.amplitudes:
        Console(width=110).print(amplitude_table(weight[:64]))
        return
    table = Table(title=f"Gaussian weights, {arguments.rows} x {arguments.columns}, seed 0")
    for column in ("quantizer", "bits a weight", "dB", "bound", "below bound", "target"):
        table.add_column(column, justify="left" if column == "quantizer" else "right")

    def row(name: str, bits: float, value: float, target: float | None = None) -> None:
        bound = 20 * torch.log10(torch.tensor(2.0)).item() * bits
        mark = "" if target is None else f"{target:.1f} {'reached' if value >= target else 'MISSED'}"
        table.add_row(name, f"{bits:.3f}", f"{value:.2f}", f"{bound:.2f}", f"{bound - value:.2f}", mark)

    for name, book in SERVING.items():
        scale = quantizer_ops.search_row_scale(weight, name)
        _, q = quantizer_ops.quantize_rows(weight, name, scale)
        value = decibels(weight, (q + 0.5) * scale[:, None])
        row(name, book.bytes_per_group + 16 / arguments.columns, value, TARGETS[name])
    for group_size, num_pulses, amplitude_bits in CANONICAL:
        sizes = group_size, num_pulses, amplitude_bits
        bits, value = canonical_decibels(weight[:64], sizes, "lloyd_max")
        row(f"canonical D={group_size} K={num_pulses} b={amplitude_bits}", bits, value)
    for bits in (2, 3, 4):
        table.add_row(f"Lloyd-Max, {bits} bits (theory)", f"{bits:.3f}", f"{LLOYD_MAX[bits]:.2f}", "", "", "")
    for bits in (3, 4):
        row(
            f"int{bits} absmax, groups of 128",
            bits + 16 / 128,
            decibels(weight, int_round_to_nearest(weight, bits)),
        )
    Console(width=110).print(table)
    Console(width=110).print(reference_table(weight[:64]))


if __name__ == "__main__":
    main()
