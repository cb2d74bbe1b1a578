# SPDX-License-Identifier: Apache-2.0
"""Whole matrices quantized on a GPU: as good as on the CPU, valid, and made of the same kernels."""

import pytest
import torch

from offline_quant.error_feedback import descend, feedback
from offline_quant.hessian import RotatedHessian, inverse_factor
from offline_quant.weight_quantizer import dequantize_weight, quantize_weight
from pvq_vllm.codec.format import Codebook
from pvq_vllm.codec.rotation import Rotation, rotation_layout

pytestmark = pytest.mark.cuda
NAMES = ["pvq2", "pvq3", "pvq4", "int8"]


def problem(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor, Rotation]:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(width, width, generator=generator)
    inputs = torch.randn(4 * width, width, generator=generator) * torch.logspace(0, -2, width) @ basis
    blocks, factors = rotation_layout(width, 1)
    weight = torch.randn(rows, width, generator=generator)
    return weight, inputs.T @ inputs / len(inputs), Rotation(3, width, blocks, factors)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_is_quantized_as_well_as_on_the_cpu(name):
    weight, hessian, rotation = problem(150, 576)
    codebook = Codebook(name)
    on_cpu = quantize_weight(
        weight, codebook, rotation, RotatedHessian.of(hessian, rotation), dequantize=True
    )
    prepared = RotatedHessian.of(hessian.cuda(), rotation)
    on_gpu = quantize_weight(weight.cuda(), codebook, rotation, prepared, dequantize=True)
    assert on_gpu.output_snr_db == pytest.approx(on_cpu.output_snr_db, abs=0.05)
    assert on_gpu.dequantized.is_cuda
    stored = {kind: tensor.cpu() for kind, tensor in on_gpu.tensors.items()}
    restored = dequantize_weight(stored, codebook, 576, rotation, weight.dtype)
    torch.testing.assert_close(on_gpu.dequantized.cpu(), restored, rtol=1e-4, atol=1e-4)
    assert (
        stored["weight_packed"] == on_cpu.tensors["weight_packed"]
    ).float().mean() > 0.2  # not another order


@pytest.mark.parametrize("name", NAMES)
def test_the_first_block_of_feedback_is_the_cpus(name):
    """Later blocks get a matrix product between, whose sums a GPU orders otherwise."""
    weight, hessian, _ = problem(90, 128)
    prepared = RotatedHessian.of(hessian, None)
    scale = torch.full((90,), 0.03)
    fields = (
        prepared.hessian, prepared.factor, prepared.feedback_metrics, prepared.descent_metrics,
    )  # fmt: skip
    h, factor, first, second = (tensor.cuda() for tensor in fields)
    on_gpu = RotatedHessian(h, prepared.damping, factor, first, second)
    expected = feedback(weight, prepared, name, scale)
    got = feedback(weight.cuda(), on_gpu, name, scale.cuda())
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected, strict=True))
    level = 0 if name == "int8" else 1

    def loss(q: torch.Tensor) -> float:
        error = weight - (q + level / 2) * 0.03
        return (error @ prepared.hessian * error).sum().item()

    before = loss(expected[1])
    descend(weight, *expected, prepared, name, level, scale)
    descend(weight.cuda(), *got, on_gpu, name, level, scale.cuda())
    assert loss(got[1].cpu()) == pytest.approx(loss(expected[1]), rel=1e-3)
    assert loss(expected[1]) < before


def test_inverse_factor_stays_on_its_device():
    for hessian in (torch.eye(24), torch.zeros(24, 24)):
        factor = inverse_factor(hessian.cuda())
        assert factor.is_cuda
        torch.testing.assert_close(factor.cpu(), inverse_factor(hessian))
