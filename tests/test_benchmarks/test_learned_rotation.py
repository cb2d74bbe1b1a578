# SPDX-License-Identifier: Apache-2.0
"""The learned rotation of the residual stream: each step of it is the best one, and the model stays the same function."""

import sys

import pytest
import torch

from benchmarks.quality import learned_rotation
from offline_quant.model_source import ModelSource
from offline_quant.residual_rotation import FoldedSource, hadamard_rotation


def orthogonal(width: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]


def test_procrustes_finds_a_rotation_again_and_none_is_better():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    wanted = orthogonal(12, generator)
    torch.testing.assert_close(learned_rotation.procrustes(weight.T @ (weight @ wanted.T)), wanted)

    target = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    found = learned_rotation.procrustes(weight.T @ target)
    torch.testing.assert_close(found @ found.T, torch.eye(12, dtype=torch.float64))
    error = (weight @ found.T - target).square().sum()
    others = [orthogonal(12, generator) for _ in range(200)]
    assert all((weight @ other.T - target).square().sum() > error for other in others)


def test_every_iteration_lowers_the_error(tiny_llama):
    stream = learned_rotation.Stream(ModelSource.open(tiny_llama), seed=0)
    rotation = torch.eye(stream.width)
    scale = learned_rotation.best_scale("pvq3")
    errors = []
    for _ in range(4):
        rotation, error = stream.improve(rotation, "pvq3", scale)
        errors.append(error)
    # A row's scale follows its energy, which a rotation of what writes the stream changes: not a strict descent by theory.
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.99 * errors[0]


@pytest.mark.parametrize("iterations", [0, 2])
def test_the_model_written_is_the_same_function_in_the_rotated_basis(
    tiny_llama, tmp_path, monkeypatch, iterations
):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "learned"
    command = ["learned_rotation", str(tiny_llama), str(out), "--iterations", str(iterations)]
    monkeypatch.setattr(sys, "argv", command)
    learned_rotation.main()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        expected, got = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
            for folder in (tiny_llama, out)
        )
    # Weights are rounded to bfloat16 in the new basis: 2^-9 each, hundreds of them in a sum.
    assert (got - expected).norm() < 0.02 * expected.norm()

    # Seen through the rotation of `--rotation residual`, no iteration at all is the Hadamard rotation of the model itself.
    name = "model.layers.0.self_attn.q_proj.weight"
    through, direct = (
        FoldedSource.of(ModelSource.open(folder), hadamard_rotation, 0, rotate_heads=True).read(name)
        for folder in (out, tiny_llama)
    )
    distance = (through - direct).norm() / direct.norm()
    assert distance < 0.01 if iterations == 0 else distance > 0.01
