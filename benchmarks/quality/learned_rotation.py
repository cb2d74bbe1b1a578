# SPDX-License-Identifier: Apache-2.0
"""What a learned rotation of the residual stream would gain.

    python -m benchmarks.quality.learned_rotation MODEL OUT [--bits 3] [--iterations 20]
    pvq quantize OUT QUANTIZED --bits 3 --rotation residual:128 --calibration TEXT
    pvq eval QUANTIZED --reference MODEL --text OTHER_TEXT

Starts from the Hadamard rotation of `--rotation residual:128` and alternates between the nearest codes of all weights that read
or write the stream and the rotation that brings the weights nearest to them, an orthogonal Procrustes problem with a closed
solution (ITQ, Gong and Lazebnik, CVPR 2011). Weights count by their relative error. OUT is an ordinary checkpoint in such a
basis that `--rotation residual:128` leads to the learned one; with --iterations 0, to that of the Hadamard rotation. Every
iteration prints the relative squared error of rounding.
"""

import argparse
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from offline_quant.checkpoint_writer import check_destination
from offline_quant.model_source import ModelSource
from offline_quant.rebase import rebase_model
from offline_quant.residual_rotation import READERS, WRITERS, FoldedSource, RowRotation, hadamard_rotation
from offline_quant.rotation import rotate_rows
from pvq_vllm import quantizer_ops
from pvq_vllm.codec.format import Codebook
from pvq_vllm.codec.rotation import Rotation, rotation_layout

INNER_BLOCK = 128  # columns of the blocks in which the MLP's inner activation is rotated


def rounded(weight: torch.Tensor, codebook: str, scale_by_rms: float) -> torch.Tensor:
    """The nearest values of ``weight``, float32 [rows, columns], with row scales in proportion to the rows' RMS."""
    scale = (weight.square().mean(1).sqrt() * scale_by_rms).half().float()
    codes = quantizer_ops.quantize_rows(weight, codebook, scale)[0]
    return (quantizer_ops.decode_codes(codes, codebook).float() + Codebook(codebook).h / 2) * scale[:, None]


def best_scale(codebook: str) -> float:
    """The best row scale of Gaussian rows of unit RMS."""
    rows = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    return quantizer_ops.search_row_scale(rows, codebook).float().mean().item()


def procrustes(cross: torch.Tensor) -> torch.Tensor:
    """The orthogonal R that maximizes tr(R ``cross``)."""
    left, _, right = torch.linalg.svd(cross)
    return (left @ right).T


class Stream:
    """The weights of a model that read or write the residual stream, from disk, one at a time."""

    def __init__(self, source: ModelSource, seed: int):
        self.width = source.skeleton.config.get_text_config().hidden_size

        def all_but_the_stream(width: int, seed: int) -> RowRotation:
            return (lambda x: x) if width == self.width else hadamard_rotation(width, seed)

        self.source = FoldedSource.of(source, all_but_the_stream, seed, rotate_heads=True)
        self.seed = seed

    def weights(self) -> Iterator[tuple[bool, torch.Tensor]]:
        """(whether its columns are the stream's, else its rows; weight, float32)."""
        for layer in range(len(self.source.layers)):
            prefix = f"{self.source.layers_name}.{layer}."
            for module in (*itertools.chain(*READERS.values()), *WRITERS):
                name = f"{prefix}{module}.weight"
                if name not in self.source.tensors:
                    continue
                weight = self.source.read(name)
                if module == "mlp.down_proj":
                    layout = rotation_layout(weight.shape[1], math.ceil(weight.shape[1] / INNER_BLOCK))
                    weight = rotate_rows(weight, Rotation(self.seed, weight.shape[1], *layout))
                yield module not in WRITERS, weight

    def improve(
        self, rotation: torch.Tensor, codebook: str, scale_by_rms: float
    ) -> tuple[torch.Tensor, float]:
        """The best rotation for the codes that are nearest in ``rotation``, and the mean relative squared error there."""
        cross = torch.zeros(self.width, self.width, dtype=torch.float64)
        errors = []
        for reads, weight in self.weights():
            turned = weight @ rotation.T if reads else rotation @ weight
            nearest = rounded(turned.contiguous(), codebook, scale_by_rms)
            energy = weight.square().sum().item()
            errors.append((nearest - turned).square().sum().item() / energy)
            cross += (weight.T @ nearest if reads else weight @ nearest.T).double() / energy
        return procrustes(cross).float(), sum(errors) / len(errors)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="local Hugging Face folder of a Llama-like model")
    parser.add_argument("out", type=Path, help="folder to be made")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), default=3, help="default: %(default)s")
    parser.add_argument("--iterations", type=int, default=20, help="default: %(default)s")
    parser.add_argument(
        "--seed", type=int, default=0, help="that `pvq quantize` will have (default: %(default)s)"
    )
    options = parser.parse_args()
    check_destination(options.out, overwrite=False)
    source = ModelSource.open(options.model)
    stream = Stream(source, options.seed)
    codebook = f"pvq{options.bits}"
    scale_by_rms = best_scale(codebook)
    start = hadamard_rotation(stream.width, options.seed)(torch.eye(stream.width)).T.contiguous()
    rotation = start
    for iteration in range(options.iterations):
        began = time.monotonic()
        rotation, error = stream.improve(rotation, codebook, scale_by_rms)
        print(
            f"{iteration}: {error:.6f}, {-10 * math.log10(error):.3f} dB, {time.monotonic() - began:.0f} s",
            flush=True,
        )
    if options.iterations:
        error = stream.improve(rotation, codebook, scale_by_rms)[1]
        print(f"{options.iterations}: {error:.6f}, {-10 * math.log10(error):.3f} dB")
    basis = (rotation.T.double() @ start.double()).contiguous()  # transposed: `start` after it is `rotation`
    rebase_model(
        options.model, options.out, make_rotation=lambda width, seed: lambda x: (x.double() @ basis).float()
    )


if __name__ == "__main__":
    main()
