# SPDX-License-Identifier: Apache-2.0
"""Predicted losses: against the closed form, and against the KL divergence that one changed weight really causes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from offline_quant import calibration
from offline_quant.calibration_data import calibration_tokens
from offline_quant.gradients import output_gradients
from offline_quant.hessian import HessianSum
from offline_quant.model_source import ModelSource
from offline_quant.part_worker import HessianCache
from offline_quant.sensitivity import row_losses
from offline_quant.weight_quantizer import quantize_weight
from pvq_vllm.codec.format import Codebook
from pvq_vllm.codec.rotation import Rotation


@pytest.fixture(autouse=True)
def small_batches_in_float32(monkeypatch):
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 128)
    monkeypatch.setattr(calibration, "forward_dtype", lambda device="cpu": torch.float32)


def test_loss_is_half_the_trace_when_all_outputs_count_alike():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 96, generator=generator), torch.randn(500, 96, generator=generator)
    total = HessianSum(96)
    total.add(x)
    rotation, codebook, hessians = Rotation(0, 96, 1, [12, 8]), Codebook("pvq3"), HessianCache()
    found = row_losses(weight, rotation, total, hessians, torch.full((64,), 0.25), codebook)
    quantized = quantize_weight(weight, codebook, rotation, hessians.rotated(total, rotation), True)
    output_error = ((weight - quantized.dequantized) @ x.T).square().sum() / 500
    assert found == pytest.approx(0.5 * 0.25 * output_error.item(), rel=1e-4)


def test_the_loss_predicts_the_divergence_of_a_small_change(tiny_llama):
    """Gaussian noise on one weight at a time: 1/2 tr(G dW H dW^T) against the KL divergence of the model."""
    source = ModelSource.open(tiny_llama)
    ids = calibration_tokens(tiny_llama, "builtin", 8, 64)
    gradients = output_gradients(source, ids, 0, "cpu").outputs
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).requires_grad_(False)
    inputs: dict[str, torch.Tensor] = {}
    linears = {name: module for name, module in model.named_modules() if name in gradients}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, key=name: inputs.update({key: args[0]}))
        for name, module in linears.items()
    ]
    with torch.no_grad():
        before = model(ids).logits.log_softmax(-1)
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(1)
    for name, module in linears.items():
        x = inputs[name].flatten(0, 1)
        measured, predicted = 0.0, 0.0
        for _ in range(4):
            noise = 0.02 * module.weight.std() * torch.randn(module.weight.shape, generator=generator)
            predicted += 0.5 * (gradients[name] @ (noise @ x.T).square().mean(dim=1)).item()
            with torch.no_grad():
                module.weight += noise
                after = model(ids).logits.log_softmax(-1)
                module.weight -= noise
            measured += (before.exp() * (before - after)).sum(dim=-1).mean().item()
        # Values are averaged over positions, alike ones in a random model: their errors add up coherently.
        low, high = (0.6, 1.5) if "v_proj" not in name else (0.2, 1.5)
        assert low < predicted / measured < high, name
