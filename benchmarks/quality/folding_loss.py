# SPDX-License-Identifier: Apache-2.0
"""What folding the norms' gains into the weights costs, as `pvq quantize --rotation residual` has to.

    python benchmarks/quality/folding_loss.py MODEL

Codes of a fixed rate leave an error in proportion to the energy of a row, spread evenly over its rotated columns, and error
feedback scales that with det(H)^(1/n). For a weight W behind a norm with gain g, rotated online or with g folded in, the loss
is then in proportion to

    online:   sum_j E_j  det(D H D)^(1/n)        E_j = sum_i W_ij^2, H = E[x x^T] in front of the gain, D = diag(g)
    folded:   sum_j E_j g_j^2  det(H)^(1/n)

so folding costs sum_j E_j g_j^2 / (sum_j E_j  geometric mean of g_j^2), printed here in dB for each norm; 6.02 dB are one bit.
"""

import argparse
from pathlib import Path

import torch

from offline_quant.model_source import ModelSource
from offline_quant.residual_rotation import READERS


def folding_loss_db(energy: torch.Tensor, gain: torch.Tensor) -> float:
    """The loss for columns of the energies ``energy`` behind ``gain``, both float [n]; gains are not zero."""
    squared = gain.double().square()
    ratio = (energy * squared).sum() / (energy.sum() * squared.log().mean().exp())
    return 10 * ratio.log10().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="local Hugging Face folder of a Llama-like model")
    source = ModelSource.open(parser.parse_args().model)
    losses: dict[str, list[float]] = {norm: [] for norm in READERS}
    for layer in range(len(source.layers)):
        prefix = f"{source.layers_name}.{layer}."
        for norm, readers in READERS.items():
            names = [
                f"{prefix}{name}.weight" for name in readers if f"{prefix}{name}.weight" in source.tensors
            ]
            energy = sum(source.read(name).double().square().sum(0) for name in names)
            losses[norm].append(folding_loss_db(energy, source.read(f"{prefix}{norm}.weight")))
    for norm, values in losses.items():
        ordered = sorted(values)
        print(
            f"{norm}: mean {sum(values) / len(values):.2f} dB, median {ordered[len(ordered) // 2]:.2f}, "
            f"lowest {ordered[0]:.2f}, highest {ordered[-1]:.2f}"
        )


if __name__ == "__main__":
    main()
