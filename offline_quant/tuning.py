# SPDX-License-Identifier: Apache-2.0
"""Tune the scales of all rows and the gains of all norms together, after the codes are chosen (`--tune-epochs`).

Codes are chosen layer by layer. What their errors do to the output of the whole model can be answered, in part, by the few
parameters that stay continuous: a factor for every row of every quantized linear of the decoder layers and for every gain
of a norm, started at 1. They minimize the KL divergence KL(base || quantized) on the calibration data, by Adam. The codes
do not change, nor the size or the speed of the checkpoint. (Tuning what is left after quantization: QuIP#, Tseng et al.
2024; step sizes alone, EfficientQAT, Chen et al. 2024.)

This is the one step that holds two whole models, the base and the quantized one.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import nn

from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import CheckpointConfig

from .calibration import forward_dtype
from .device import deterministic
from .memory import check_memory
from .model_source import ModelSource
from .norms import norm_offset

LEARNING_RATE = 2e-3
STEP_TOKENS = 4096
LOGIT_ROWS = 512  # positions whose probabilities are in memory in float32
OUTPUT_BYTES = 8  # kept of each output of a linear layer for the backward pass, and
STREAM_BYTES = 40  # of each column of the residual stream, in every layer
LOGIT_BYTES = 12


def tuned_tensors(
    source: ModelSource,
    config: CheckpointConfig,
    restore: Callable[[str], tuple[torch.Tensor, torch.Tensor]],
    tokens: torch.Tensor,
    epochs: int,
    seed: int,
    device: str,
    progress: Callable[[str], None] = lambda description: None,
) -> dict[str, torch.Tensor]:
    """Return new values of row scales ("NAME.weight_scale", float16) and norms (in their dtype), by tensor.

    Args:
        config: names the quantized modules; those of the decoder layers are tuned.
        restore: gives a module's dequantized weight and its row scale, float16 [out_features].
        tokens: int64 [sequences, length], the calibration data; ``epochs`` times through, in an order by ``seed``.
    Raises:
        PVQError: two models do not fit into the free memory, or a gradient is not finite.
    """
    check_tuning_memory(source, device, tokens.shape[1])
    dtype = forward_dtype(device)
    base, model = (_whole_model(source, dtype, device) for _ in range(2))
    factors: dict[str, nn.Parameter] = {}
    scales: dict[str, torch.Tensor] = {}
    offsets: dict[str, float] = {}
    for name, module in model.named_modules():
        if name in config.modules and isinstance(module, nn.Linear) and name != source.head_name:
            weight, scales[name] = restore(name)
            module.weight.data = weight.to(device, dtype)
            factors[name] = _multiply_rows(module)
        elif "norm" in type(module).__name__.lower() and f"{name}.weight" in source.tensors:
            offset = norm_offset(source.skeleton.get_submodule(name))
            if offset is not None:
                offsets[name] = offset
                factors[name] = _multiply_rows(module)
    _minimize(base, model, list(factors.values()), tokens, epochs, seed, device, progress)
    if not all(factor.isfinite().all() for factor in factors.values()):
        raise PVQError("the gradients of the calibration data overflow while tuning: leave out --tune-epochs")
    result = {}
    for name, factor in factors.items():
        multiplier = factor.detach().cpu().exp()
        if name in scales:
            result[f"{name}.weight_scale"] = (scales[name].float() * multiplier).to(torch.float16)
        else:
            gain = source.read_stored(f"{name}.weight").cpu()
            offset = offsets[name]
            result[f"{name}.weight"] = ((gain.float() + offset) * multiplier - offset).to(gain.dtype)
    return result


def check_tuning_memory(source: ModelSource, device: str, length: int) -> None:
    """Raise PVQError unless two models and the backward pass of a sequence of ``length`` tokens fit into the free
    memory of ``device``.
    """
    vocabulary, width = source.weight_shape(source.embedding_name)
    outputs = sum(
        source.weight_shape(name)[0]
        for layer in range(len(source.layers))
        for name in source.linear_names(layer)
    )
    token_bytes = (
        OUTPUT_BYTES * outputs + STREAM_BYTES * width * len(source.layers) + LOGIT_BYTES * vocabulary
    )
    check_memory(
        source,
        device,
        2,
        token_bytes * length,
        "--tune-epochs",
        "leave it out, or calibrate on shorter sequences",
    )


def _whole_model(source: ModelSource, dtype: torch.dtype, device: str) -> nn.Module:
    """Return the model with all weights, not to be trained."""
    model = copy.deepcopy(source.skeleton)
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        module, _, leaf = name.rpartition(".")
        stored = source.weight_name(module) if module == source.head_name and leaf == "weight" else name
        tensor = source.read(stored).to(device, dtype)
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
    for name, buffer in model.named_buffers():
        if name in source.tensors:
            buffer.copy_(source.read(name))
    return model.to(device).eval()


def _multiply_rows(module: nn.Module) -> nn.Parameter:
    """Make ``module`` multiply its outputs, without a bias, by exp of the float32 parameter that is returned."""
    size = module.weight.shape[0]
    logarithm = nn.Parameter(torch.zeros(size, dtype=torch.float32, device=module.weight.device))

    def hook(module: nn.Module, _inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        bias = getattr(module, "bias", None)
        if bias is None:
            return (output.float() * logarithm.exp()).to(output.dtype)
        return ((output.float() - bias) * logarithm.exp() + bias).to(output.dtype)

    module.register_forward_hook(hook)
    return logarithm


def _minimize(
    base: nn.Module,
    model: nn.Module,
    parameters: list[nn.Parameter],
    tokens: torch.Tensor,
    epochs: int,
    seed: int,
    device: str,
    progress: Callable[[str], None],
) -> None:
    """Train ``parameters`` of ``model`` by Adam, the rate warmed up and then falling to zero by a cosine."""
    count, length = tokens.shape
    batch = max(1, STEP_TOKENS // length)
    steps = epochs * math.ceil(count / batch)
    warm_up = max(1, steps // 10)
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )
    with deterministic(device):
        for epoch in range(epochs):
            order = torch.randperm(count, generator=torch.Generator().manual_seed((seed + epoch) % 2**63))
            total = 0.0
            for chosen in order.split(batch):
                for sequence in tokens[chosen].to(device).split(1):
                    total += _backward(base, model, sequence, len(chosen) * length)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            progress(f"tuning, pass {epoch + 1} of {epochs}: KL {total / tokens.numel():.4f}")


def _backward(base: nn.Module, model: nn.Module, ids: torch.Tensor, divisor: int) -> float:
    """Add the gradient of the sum of KL(base || model) over all positions, over ``divisor``; return the sum.

    The gradient at the logits is softmax(model) - softmax(base), so that no graph of the probabilities is kept.
    """
    with torch.no_grad():
        expected = base(input_ids=ids, use_cache=False).logits[0]
    logits = model(input_ids=ids, use_cache=False).logits[0]
    gradient, total = torch.empty_like(logits), 0.0
    for start in range(0, len(logits), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        log_p, log_r = (x[rows].detach().float().log_softmax(-1) for x in (logits, expected))
        r = log_r.exp()
        total += (r * (log_r - log_p)).sum(dtype=torch.float64).item()
        gradient[rows] = (log_p.exp() - r) / divisor
    logits.backward(gradient)
    return total
