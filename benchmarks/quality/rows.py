# SPDX-License-Identifier: Apache-2.0
"""The rows of the comparison: what each is called and how its dense model is made."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from .bits import group_width, largest_pulses, mean_bits
from .dense import checkpoint_to_dense, linear_names, write_dense
from .paper import paper_weights
from .peers.environments import run_job
from .project import quantized, with_activation
from .protocol import Protocol
from .report import MIXED, NOT_WEIGHT_ONLY, OURS, TUNED, VARIANT
from .rounding import rounded_weights

# Those of `--target-bpw` by itself, and canonical ones between and above them, which a server unpacks to 8 bits.
MIXED_RATES = ("2", "3", "4", "8", "16,27,4", "16,58,4", "16,123,4")


@dataclass(frozen=True)
class Made:
    """``folder`` is what gets evaluated; ``bits_per_weight`` is over the linear layers of the decoder."""

    folder: Path
    bits_per_weight: float
    details: dict


@dataclass(frozen=True)
class Row:
    """``family`` names the method in the picture. ``make`` gets the protocol, the folder of the peers'
    environments and an empty folder to work in.
    """

    key: str
    family: str
    label: str
    make: Callable[[Protocol, Path, Path], Made]


def _base(protocol: Protocol, _peers: Path, _work: Path) -> Made:
    return Made(protocol.model, 16.0, {})


def _written(protocol: Protocol, work: Path, weights: Iterable[tuple[str, torch.Tensor, float]]) -> Made:
    """The model with these weights, (name, weight, bits a weight) each."""
    replaced, sizes = {}, []
    for name, weight, stored in weights:
        replaced[f"{name}.weight"] = weight
        sizes.append((weight.numel(), stored))
    write_dense(protocol.source, work / "dense", replaced)
    return Made(work / "dense", mean_bits(sizes), {})


def _rounding(bits: int, group: int, rotate: bool) -> Callable[[Protocol, Path, Path], Made]:
    def make(protocol: Protocol, _peers: Path, work: Path) -> Made:
        names = linear_names(protocol.source)
        return _written(protocol, work, rounded_weights(protocol.source, names, bits, group, rotate))

    return make


def _peer(
    environment: str, script: str, group: int | None = None, **options
) -> Callable[[Protocol, Path, Path], Made]:
    """A quantizer of ``peers/``; ``group`` is the group size asked for, see ``bits.group_width``."""

    def make(protocol: Protocol, peers: Path, work: Path) -> Made:
        names = linear_names(protocol.source)
        widths = {protocol.source.weight_shape(name)[1] for name in names}
        if group is not None:
            options["groups"] = {str(width): group_width(width, group) for width in widths}
        job = {
            "model": str(protocol.model.resolve()),
            "calibration": str(protocol.calibration_file.resolve()),
            "threads": torch.get_num_threads(),
            "device": protocol.device,
            "options": options,
        }
        out, answer = run_job(peers, environment, script, job, work)
        if answer["modules"] != len(names):
            raise RuntimeError(f"{script} quantized {answer['modules']} modules, not {len(names)}")
        write_dense(protocol.source, work / "dense", load_file(out))
        return Made(work / "dense", answer["bits_per_weight"], {**answer["details"], **options})

    return make


def _project(*arguments: str, calibrate: bool = True) -> Callable[[Protocol, Path, Path], Made]:
    """`pvq quantize` with ``arguments``; weight-only."""

    def make(protocol: Protocol, _peers: Path, work: Path) -> Made:
        checkpoint, report = quantized(protocol, arguments, calibrate)
        checkpoint_to_dense(checkpoint, work / "dense")
        return Made(work / "dense", report["bits_per_weight"], {"arguments": " ".join(arguments)})

    return make


def _activations(activation: str, *arguments: str) -> Callable[[Protocol, Path, Path], Made]:
    """The checkpoint itself, run by the project's own kernels with quantized activations."""

    def make(protocol: Protocol, _peers: Path, work: Path) -> Made:
        checkpoint, report = quantized(protocol, arguments)
        with_activation(checkpoint, work / "pvq", activation)
        return Made(work / "pvq", report["bits_per_weight"], {"arguments": " ".join(arguments)})

    return make


def _canonical(group: int, bits: int, amplitude_bits: int) -> Callable[[Protocol, Path, Path], Made]:
    """The paper's codebook with the largest K whose index has at most ``bits`` a weight; groups that divide
    every width.
    """

    def make(protocol: Protocol, peers: Path, work: Path) -> Made:
        arguments: list[str] = []
        widths = sorted({protocol.source.weight_shape(name)[1] for name in linear_names(protocol.source)})
        for width in widths:
            size = group_width(width, group)
            pulses = largest_pulses(size, bits)
            if width == widths[0]:
                arguments += [
                    "--codebook",
                    "canonical",
                    "--group-size",
                    str(size),
                    "--num-pulses",
                    str(pulses),
                ]
                arguments += ["--amplitude-bits", str(amplitude_bits), "--amplitude", "beta"]
            else:
                kinds = {
                    name.rpartition(".")[2]
                    for name in linear_names(protocol.source)
                    if protocol.source.weight_shape(name)[1] == width
                }
                for kind in sorted(kinds):
                    arguments += ["--override", f"{kind}={size},{pulses},{amplitude_bits}"]
        return _project(*arguments)(protocol, peers, work)

    return make


def _paper(group: int, bits: int, amplitude_bits: int) -> Callable[[Protocol, Path, Path], Made]:
    """The paper's own quantizer, with the codebook that ``_canonical`` has."""

    def make(protocol: Protocol, _peers: Path, work: Path) -> Made:
        weights = paper_weights(
            protocol.source, protocol.calibration, protocol.device, group, bits, amplitude_bits
        )
        return _written(protocol, work, weights)

    return make


def _rows() -> list[Row]:
    rows = [Row("base", "base", "unquantized", _base)]
    for bits in (4, 3):
        for group in (128, 64):
            for rotate in (False, True):
                key = f"rtn-int{bits}-g{group}{'-rotated' if rotate else ''}"
                label = f"round to nearest, int{bits} g{group}{', Hadamard' if rotate else ''}"
                rows.append(Row(key, "round to nearest", label, _rounding(bits, group, rotate)))
    rows.append(Row("nf4", "NF4", "NF4, double quantization", _peer("autoround", "bitsandbytes_job.py")))
    for bits in (4, 3):
        for group in (128, 64):
            gptq = _peer(
                "llmcompressor", "llmcompressor_job.py", group,
                method="gptq", bits=bits, symmetric=True, observer="mse",
            )  # fmt: skip
            rows.append(Row(f"gptq-int{bits}-g{group}", "GPTQ", f"GPTQ int{bits} g{group}", gptq))
    for bits in (4, 3):
        for group in (128, 64):
            awq = _peer(
                "llmcompressor", "llmcompressor_job.py", group,
                method="awq", bits=bits, symmetric=False, observer="minmax", n_grid=20,
            )  # fmt: skip
            rows.append(Row(f"awq-int{bits}-g{group}", "AWQ", f"AWQ int{bits} g{group}, zero points", awq))
    for bits in (4, 3):
        for group in (128, 64):
            autoround = _peer(
                "autoround", "autoround_job.py", group, bits=bits, iterations=100, sequence_length=512
            )
            rows.append(
                Row(f"autoround-int{bits}-g{group}", "AutoRound", f"AutoRound int{bits} g{group}", autoround)
            )
    for recipe in ("Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_M", "IQ3_XXS"):
        for across in (False, True):
            make = _peer("ggml", "ggml_job.py", recipe=recipe, across_rows=across)
            suffix = ", blocks across rows" if across else ""
            key = f"ggml-{recipe.lower()}{'-across' if across else ''}"
            rows.append(Row(key, "llama.cpp", f"llama.cpp {recipe}{suffix}", make))
    for key, family, maker in (
        ("canonical", "canonical PVQ", _canonical),
        ("paper", "PVQ as in the paper", _paper),
    ):
        for group, amplitude_bits in ((16, 4), (128, 4)):
            for bits in (4, 3):
                label = f"{family}, D = {group}, {bits} bits and {amplitude_bits} for the amplitude"
                make = maker(group, bits, amplitude_bits)
                rows.append(Row(f"{key}-d{group}-{bits}", family, label, make))
    for bits in (4, 3):
        make = _project("--bits", str(bits), calibrate=False)
        rows.append(Row(f"pvq-{bits}-rounded", "PVQ, rounded", f"PVQ {bits} bits, no calibration", make))
    for bits in ("2", "2.5", "3", "3.25", "3.5", "4", "5"):
        arguments = ("--bits", bits) if bits in "234" else ("--target-bpw", bits)
        rows.append(Row(f"pvq-{bits}", OURS, f"PVQ {bits} bits", _project(*arguments)))
        tuned = _project(*arguments, "--tune-epochs", "10")
        rows.append(Row(f"pvq-{bits}-tuned", TUNED, f"PVQ {bits} bits, tuned", tuned))
    for bits in ("3.02", "4.02"):
        label = f"PVQ {bits} bits, a rate for each module"
        rows.append(Row(f"pvq-{bits}", OURS, label, _project("--target-bpw", bits)))
    for bits in ("3.25", "3.5", "4.5", "5"):
        make = _project("--target-bpw", bits, *(f"--rate={rate}" for rate in MIXED_RATES))
        label = f"PVQ {bits} bits, canonical codebooks among the rates"
        rows.append(Row(f"pvq-{bits}-mixed", MIXED, label, make))
    for bits in ("4", "3"):
        for rotation in (
            "residual", "residual:128", "residual:512", "none", "block:64", "block:128", "block:256", "block:512"
        ):  # fmt: skip
            make = _project("--bits", bits, "--rotation", rotation)
            key, label = f"pvq-{bits}-{rotation.replace(':', '')}", f"PVQ {bits} bits, --rotation {rotation}"
            rows.append(Row(key, VARIANT, label, make))
        uniform = _project("--bits", bits, "--token-weights", "uniform")
        label = f"PVQ {bits} bits, --token-weights uniform"
        rows.append(Row(f"pvq-{bits}-uniform", VARIANT, label, uniform))
        label = f"PVQ {bits} bits, --calibration self"
        rows.append(
            Row(f"pvq-{bits}-self", VARIANT, label, _project("--bits", bits, "--calibration", "self"))
        )
    for bits in ("4", "3"):
        for activation in ("a16", "a8", "pvq:16,58", "pvq:16,27"):
            key = f"pvq-{bits}-{activation.replace(':', '').replace(',', '-')}"
            label = f"PVQ {bits} bits, {activation} activations"
            rows.append(Row(key, NOT_WEIGHT_ONLY, label, _activations(activation, "--bits", bits)))
        make = _activations("a8", "--bits", bits, "--rotation", "residual:128")
        label = f"PVQ {bits} bits, --rotation residual:128, a8 activations"
        rows.append(Row(f"pvq-{bits}-residual128-a8", NOT_WEIGHT_ONLY, label, make))
    return rows


ROWS = {row.key: row for row in _rows()}
