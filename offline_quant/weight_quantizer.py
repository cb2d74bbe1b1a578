# SPDX-License-Identifier: Apache-2.0
"""Quantize one weight matrix: rotate its rows, scale them, choose codes, in the metric of a Hessian when one
is given.

Without a Hessian every group of eight weights gets its nearest codeword (gain and shape chosen together) and
each row the scale that then fits best. With one, the codes come from ``error_feedback``.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from pvq_vllm import quantizer_ops
from pvq_vllm.canonical_ops import decode_canonical, encode_canonical
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import Codebook
from pvq_vllm.codec.serving import SERVING

from . import canonical_quantizer
from .error_feedback import DESCENT_PASSES, descend, feedback, fit_scale
from .hessian import RotatedHessian
from .rotation import rotate_rows, unrotate_rows

# Rows are independent, so a tall matrix is done in pieces: 64 MB float32. A GPU wants more rows at once, and has more memory.
CHUNK_WEIGHTS = 1 << 24
CHUNK_WEIGHTS_GPU = 1 << 27


@dataclass
class QuantizedWeight:
    """The tensors to store, by local name (format.md section 3), and how far they are from the weight.

    ``weight_snr_db`` is 10 log10(|W|^2 / |dW|^2); ``output_snr_db`` is 10 log10(tr(W H W^T) / tr(dW H dW^T)),
    None without H. ``dequantized``, if asked for: [out_features, in_features] in the coordinates and dtype of
    the original weight.
    """

    tensors: dict[str, torch.Tensor]
    weight_snr_db: float
    output_snr_db: float | None = None
    dequantized: torch.Tensor | None = None


@dataclass
class _Energy:
    """Sums of squares of the weight and of its error, plain and in the metric of H."""

    sums: list[float] = field(default_factory=lambda: [0.0] * 4)

    def add(self, weight: torch.Tensor, error: torch.Tensor, hessian: torch.Tensor | None) -> None:
        self.sums[0] += weight.square().sum(dtype=torch.float64).item()
        self.sums[1] += error.square().sum(dtype=torch.float64).item()
        if hessian is not None:
            self.sums[2] += ((weight @ hessian) * weight).sum(dtype=torch.float64).item()
            self.sums[3] += ((error @ hessian) * error).sum(dtype=torch.float64).item()

    @staticmethod
    def decibel(signal: float, noise: float) -> float:
        return 10 * math.log10(max(signal, 1e-300) / max(noise, 1e-300)) if signal > 0 and noise > 0 else 0.0


def quantize_weight(
    weight: torch.Tensor,
    codebook: Codebook,
    rotation=None,
    hessian: RotatedHessian | None = None,
    dequantize: bool = False,
    amplitude: str = "lloyd_max",
) -> QuantizedWeight:
    """Quantize ``weight``; it is not modified.

    Args:
        weight: [out_features, in_features], any float dtype, finite.
        codebook: in_features must be a multiple of its group.
        rotation: ``codec.rotation.Rotation`` over in_features, or None for no rotation.
        hessian: of the input and for this ``rotation``; None rounds to nearest.
        dequantize: also return what the codes stand for.
        amplitude: where the levels of ``canonical`` come from, "lloyd_max" or "beta".
    Raises:
        PVQError: in_features does not fit the codebook.
    """
    out_features, in_features = weight.shape
    codebook.packed_shape(out_features, in_features)
    metric = None if hessian is None else hessian.hessian
    if codebook.name == "canonical":
        return _quantize_canonical(weight, codebook, rotation, hessian, dequantize, amplitude)
    packed, scales, restored, energy = [], [], [], _Energy()
    for rows in weight.split(max(1, _chunk_weights(weight.device) // in_features)):
        rotated = rotate_rows(rows.float(), rotation)
        codes, scale, q = _quantize_chunk(rotated, codebook, hessian)
        approximation = (q.float() + codebook.h / 2) * scale[:, None]
        energy.add(rotated, rotated - approximation, metric)
        packed.append(codes)
        scales.append(scale.to(torch.float16))
        if dequantize:
            restored.append(unrotate_rows(approximation, rotation).to(weight.dtype))
    return QuantizedWeight(
        {"weight_packed": torch.cat(packed), "weight_scale": torch.cat(scales)},
        energy.decibel(*energy.sums[:2]),
        None if hessian is None else energy.decibel(*energy.sums[2:]),
        torch.cat(restored) if dequantize else None,
    )


def _chunk_weights(device: torch.device) -> int:
    return CHUNK_WEIGHTS_GPU if device.type == "cuda" else CHUNK_WEIGHTS


def _quantize_chunk(
    weight: torch.Tensor, codebook: Codebook, hessian: RotatedHessian | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (codes uint8 [m, n / 8, B], row scale float32 [m] on the float16 grid, q int8 [m, n]) of rotated
    rows.
    """
    scale = _initial_scale(weight, codebook.name)
    is_zero = ~(
        scale > 0
    )  # a row of zeros, or one below float16: stored with the scale 0, whatever its codes
    working_scale = torch.where(is_zero, 1.0, scale)

    def fitted(q: torch.Tensor) -> torch.Tensor:
        metric = None if hessian is None else hessian.hessian
        return fit_scale(weight, q.float() + codebook.h / 2, metric, working_scale)

    if hessian is None:
        codes, q = quantizer_ops.quantize_rows(weight, codebook.name, working_scale)
    else:
        codes, q = feedback(weight, hessian, codebook.name, working_scale)
        for _ in range(DESCENT_PASSES):
            working_scale = fitted(q)
            descend(weight, codes, q, hessian, codebook.name, codebook.h, working_scale)
    return codes, torch.where(is_zero, 0.0, fitted(q)), q


def _initial_scale(weight: torch.Tensor, codebook_name: str) -> torch.Tensor:
    """Return float32 [m] on the float16 grid: the row's root mean square (int8: its largest magnitude) at the
    codebook's best place.

    A rotated row is so nearly Gaussian that a search around this gains 0.1 dB at seven times the work
    (measured).
    """
    if codebook_name == "int8":
        scale = weight.abs().amax(dim=1) / 127
    else:
        scale = weight.square().mean(dim=1).sqrt() / SERVING[codebook_name].target_rms
    return scale.to(torch.float16).float()


def _quantize_canonical(
    weight: torch.Tensor,
    codebook: Codebook,
    rotation,
    hessian: RotatedHessian | None,
    dequantize: bool,
    amplitude: str,
) -> QuantizedWeight:
    """All rows at once, since they share the amplitude levels; the search runs on the CPU."""
    rotated = rotate_rows(weight.float(), rotation).cpu()
    metric = None if hessian is None else hessian.hessian.cpu()
    if hessian is None:
        sizes = codebook.group_size, codebook.num_pulses, codebook.amplitude_bits
        packed, levels, scale = encode_canonical(rotated, *sizes, amplitude)
        tensors = {"weight_packed": packed, "weight_levels": levels, "weight_scale": scale}
    else:
        codes, scale = canonical_quantizer.quantize_with_feedback(
            rotated, hessian.factor.cpu(), codebook, amplitude
        )
        damped = metric + hessian.damping * torch.eye(len(metric))
        fitted = torch.where(scale > 0, scale, 1.0)
        for _ in range(DESCENT_PASSES):
            fitted = fit_scale(rotated, codes.q.float(), metric, fitted)
            canonical_quantizer.descend(rotated, codes, damped, codebook, fitted)
        fitted = fit_scale(rotated, codes.q.float(), metric, fitted)
        tensors = {
            "weight_packed": codes.packed(codebook),
            "weight_levels": codes.levels,
            "weight_scale": torch.where(scale > 0, fitted, 0.0).to(torch.float16),
        }
    approximation = dequantize_rotated(tensors, codebook, weight.shape[1])
    energy = _Energy()
    energy.add(rotated, rotated - approximation, metric)
    restored = None
    if dequantize:
        restored = unrotate_rows(approximation.to(weight.device), rotation).to(weight.dtype)
    return QuantizedWeight(
        tensors,
        energy.decibel(*energy.sums[:2]),
        None if hessian is None else energy.decibel(*energy.sums[2:]),
        restored,
    )


def stored_weight_snr(
    weight: torch.Tensor, tensors: Mapping[str, torch.Tensor], codebook: Codebook, rotation
) -> float:
    """Return 10 log10(|W|^2 / |dW|^2) of ``weight`` and the stored tensors, as ``quantize_weight`` gave it for its own."""
    energy = _Energy()
    for rows, restored in _dequantized_chunks(tensors, codebook, weight.shape[1], weight.device):
        rotated = rotate_rows(weight[rows].float(), rotation)
        energy.add(rotated, rotated - restored, None)
    return energy.decibel(*energy.sums[:2])


def decode_levels(tensors: Mapping[str, torch.Tensor], codebook: Codebook, in_features: int) -> torch.Tensor:
    """Return q, int8 [m, n], from the stored tensors (by local name).

    Raises:
        PVQError: a code out of range, or a scale that is not finite or negative; names the row.
    """
    scale = tensors["weight_scale"]
    bad = torch.nonzero(~(scale.isfinite() & (scale >= 0)))
    if len(bad):
        raise PVQError(f"row {bad[0].item()} has the scale {scale[bad[0]].item()}: copy the checkpoint again")
    if codebook.name == "canonical":
        return decode_canonical(
            tensors["weight_packed"],
            tensors["weight_levels"],
            codebook.group_size,
            codebook.num_pulses,
            codebook.amplitude_bits,
            in_features,
        )
    return quantizer_ops.decode_codes(tensors["weight_packed"], codebook.name)


def dequantize_rotated(
    tensors: Mapping[str, torch.Tensor],
    codebook: Codebook,
    in_features: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return (q + h/2) * row_scale, float32 [m, n] on ``device``, still in rotated coordinates; ``tensors`` are
    on the CPU.
    """
    q = decode_levels(tensors, codebook, in_features).to(device)
    return (q.float() + codebook.h / 2) * tensors["weight_scale"].to(device).float()[:, None]


def dequantize_weight(
    tensors: Mapping[str, torch.Tensor],
    codebook: Codebook,
    in_features: int,
    rotation,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return the weight [m, n] that the stored tensors (on the CPU) stand for, bit for bit what
    ``quantize_weight(dequantize=True)`` returned on the same ``device``.
    """
    chunks = _dequantized_chunks(tensors, codebook, in_features, device)
    return torch.cat([unrotate_rows(rotated, rotation).to(dtype) for _, rotated in chunks])


def _dequantized_chunks(
    tensors: Mapping[str, torch.Tensor], codebook: Codebook, in_features: int, device: torch.device | str
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield ``dequantize_rotated`` of some rows after the other, with which rows they are."""
    others = {name: tensor for name, tensor in tensors.items() if name == "weight_levels"}
    # As many rows at a time as when they were quantized: a GPU's sums may depend on it.
    step = max(1, _chunk_weights(torch.device(device)) // in_features)
    for start in range(0, len(tensors["weight_scale"]), step):
        rows = slice(start, start + step)
        part = {name: tensors[name][rows] for name in ("weight_packed", "weight_scale")}
        yield rows, dequantize_rotated({**others, **part}, codebook, in_features, device)
