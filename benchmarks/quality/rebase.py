# SPDX-License-Identifier: Apache-2.0
"""Write a model with its norms folded and its residual stream rotated by a random orthogonal matrix.

    python benchmarks/quality/rebase.py MODEL OUT [--seed 0] [--dtype bfloat16]

The function stays the same, so every quantizer in the comparison starts from the same dense weights, whatever
the weights of MODEL were made from.
"""

import argparse
import sys
from pathlib import Path

import torch

from offline_quant.rebase import rebase_model
from pvq_vllm.codec.errors import PVQError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write a model again in a random basis of its residual stream."
    )
    parser.add_argument("model", type=Path, help="local Hugging Face folder")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args(argv)
    dtype = getattr(torch, arguments.dtype)
    arguments.out.absolute().parent.mkdir(parents=True, exist_ok=True)  # build/quality of a fresh checkout
    try:
        rebase_model(arguments.model, arguments.out, arguments.seed, dtype, arguments.overwrite)
    except PVQError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
