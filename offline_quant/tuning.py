# SPDX-License-Identifier: Apache-2.0
"""Tune the scales of all rows and the gains of all norms together, after the codes are chosen (`--tune-epochs`).

Codes are chosen layer by layer. What their errors do to the output of the whole model can be answered, in part, by the few
parameters that stay continuous: a factor for every row of every quantized linear of the decoder layers and for every gain
of a norm, started at 1. They minimize the KL divergence KL(base || quantized) on the calibration data, by Adam. The codes
do not change, nor the size or the speed of the checkpoint. (Tuning what is left after quantization: QuIP#, Tseng et al.
2024; step sizes alone, EfficientQAT, Chen et al. 2024.)

The quantized model is in memory as a whole. The base passes the data once, a layer at a time, and from then on only its last
hidden states and its head are needed.
"""

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import nn

from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import CheckpointConfig

from .attention import FastAttention
from .calibration import LayerwiseForward, forward_dtype
from .device import deterministic
from .memory import check_memory
from .model_source import ModelSource
from .norms import CACHED, fast_norms, norm_offset, row_parts

LEARNING_RATE = 2e-3
STEP_TOKENS = 4096
LOGIT_ROWS = 512  # positions whose probabilities are in memory in float32; a CPU's caches want fewer
# Kept for the backward pass, in values: of each output of a linear layer, and of each column of the residual stream, in every
# layer, where norms keep float32 copies. Logits, their gradient, those of the base, and what comes and goes.
KEPT_OUTPUTS, KEPT_STREAM, KEPT_LOGITS = 2, 10, 5

Tell = Callable[[str], None]  # what is going on


def tuned_tensors(
    source: ModelSource,
    config: CheckpointConfig,
    restore: Callable[[str], tuple[torch.Tensor, torch.Tensor]],
    tokens: torch.Tensor,
    epochs: int,
    seed: int,
    device: str,
    progress: Tell = lambda description: None,
) -> dict[str, torch.Tensor]:
    """Return new values of row scales ("NAME.weight_scale", float16) and norms (in their dtype), by tensor.

    Args:
        config: names the quantized modules; those of the decoder layers are tuned.
        restore: gives a module's dequantized weight and its row scale, float16 [out_features].
        tokens: int64 [sequences, length], the calibration data; ``epochs`` times through, in an order by ``seed``.
    Raises:
        PVQError: the model does not fit into the free memory, or a gradient is not finite.
    """
    check_tuning_memory(source, device, *tokens.shape)
    base = Base(source, tokens, device, progress)
    dtype = forward_dtype(device)
    model = _whole_model(source, dtype, device)
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
    with ExitStack() as stack:
        stack.enter_context(base.head_loaded())
        stack.enter_context(deterministic(device))
        if device == "cpu":
            stack.enter_context(fast_norms(model))
            stack.enter_context(FastAttention())
        _minimize(base, model, list(factors.values()), tokens, epochs, seed, progress)
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


def check_tuning_memory(source: ModelSource, device: str, sequences: int, length: int) -> None:
    """Raise PVQError unless the model, the embedding and head of the base, its last hidden states for ``sequences`` of
    ``length`` tokens, and the backward pass of one of them fit into the free memory of ``device``.
    """
    vocabulary, width = source.weight_shape(source.embedding_name)
    itemsize = forward_dtype(device).itemsize
    beside = 2 * vocabulary * width * itemsize
    if source.is_tied:
        beside += vocabulary * width * itemsize  # the head is a tensor of its own here
    if device == "cpu":
        beside += sequences * length * width * itemsize
    outputs = sum(
        source.weight_shape(name)[0]
        for layer in range(len(source.layers))
        for name in source.linear_names(layer)
    )
    stream = KEPT_STREAM * (4 if device == "cuda" else itemsize) * width * len(source.layers)
    token_bytes = (KEPT_OUTPUTS * outputs + KEPT_LOGITS * vocabulary) * itemsize + stream
    check_memory(
        source,
        device,
        1,
        token_bytes * length + beside,
        "--tune-epochs",
        "leave it out, or calibrate on shorter sequences",
    )


class Base:
    """The logits of the unquantized model, from its last hidden states, which are kept in the host's memory."""

    def __init__(self, source: ModelSource, tokens: torch.Tensor, device: str, progress: Tell) -> None:
        self._forward = LayerwiseForward(source, tokens, device=device)
        for layer in range(len(source.layers)):
            with self._forward.loaded(layer):
                self._forward.advance(layer)
            progress(f"tuning: the base, layer {layer + 1} of {len(source.layers)}")
        self._hidden = [one.cpu() for hidden in self._forward.hidden for one in hidden.split(1)]
        self._forward.hidden.clear()
        self.head_loaded = self._forward.head_loaded

    def logits(self, sequence: int) -> torch.Tensor:
        """Return [length, vocabulary]; needs ``head_loaded``."""
        return self._forward.logits(self._hidden[sequence].to(self._forward.device))[0]


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
        return ScaledRows.apply(output, logarithm, getattr(module, "bias", None))

    module.register_forward_hook(hook)
    return logarithm


class ScaledRows(torch.autograd.Function):
    """(x - bias) * exp(logarithm) + bias for the last dimension of x, in float32 and rounded once. x and ``logarithm``, float32,
    get gradients. On a CPU a few rows at a time, which the caches of its cores hold.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, logarithm: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        factor = logarithm.exp()
        result = x.new_empty(x.shape)  # contiguous, so that its rows are views
        for part, out in row_parts(x, result):
            wide = part.to(torch.float32, copy=True)
            if bias is not None:
                wide -= bias
            wide *= factor
            if bias is not None:
                wide += bias
            out.copy_(wide)
        ctx.save_for_backward(result, factor, bias)
        return result

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        result, factor, bias = ctx.saved_tensors
        total = torch.zeros_like(factor)
        back = gradient.new_empty(gradient.shape)
        for part, given, out in row_parts(result, gradient, back):
            wide = given.to(torch.float32, copy=True)
            out.copy_(wide * factor)
            wide *= part if bias is None else part.float() - bias
            total += wide.sum(dim=0)
        return back, total, None


def _minimize(
    base: Base,
    model: nn.Module,
    parameters: list[nn.Parameter],
    tokens: torch.Tensor,
    epochs: int,
    seed: int,
    progress: Tell,
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
    for epoch in range(epochs):
        order = torch.randperm(count, generator=torch.Generator().manual_seed((seed + epoch) % 2**63))
        total = 0.0
        for chosen in order.split(batch):
            for index in chosen.tolist():
                ids = tokens[index][None].to(parameters[0].device)
                total += _backward(model, ids, base.logits(index), len(chosen) * length)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        progress(f"tuning, pass {epoch + 1} of {epochs}: KL {total / tokens.numel():.4f}")


def _backward(model: nn.Module, ids: torch.Tensor, expected: torch.Tensor, divisor: int) -> float:
    """Add the gradient of the sum of KL(base || model) over all positions, over ``divisor``; return the sum.

    The gradient at the logits is softmax(model) - softmax(base), so that no graph of the probabilities is kept.

    Args:
        ids: int64 [1, length]; expected: the base's logits, [length, vocabulary].
    """
    logits = model(input_ids=ids, use_cache=False).logits[0]
    gradient, total = torch.empty_like(logits), 0.0
    count = LOGIT_ROWS if logits.is_cuda else max(1, 2 * CACHED * torch.get_num_threads() // logits.shape[1])
    for start in range(0, len(logits), count):
        rows = slice(start, start + count)
        log_p, log_r = (x[rows].detach().float().log_softmax(-1) for x in (logits, expected))
        r = log_r.exp()
        log_r -= log_p
        total += log_r.flatten().dot(r.flatten()).item()
        gradient[rows] = log_p.exp_().sub_(r).div_(divisor)
    logits.backward(gradient)
    return total
