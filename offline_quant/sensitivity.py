# SPDX-License-Identifier: Apache-2.0
"""How much quantizing each module at each rate costs, in KL divergence from the base model.

To second order a change dW of one linear layer costs, in nats per token,

    KL = 1/2 tr(G dW H dW^T),    H = E[x x^T] of its inputs,    G = E[g g^T] of its outputs' gradients,

where g is the gradient of -log p(y) for a y drawn from the model itself: the Fisher information, with its two
factors taken as independent (K-FAC, Martens and Grosse 2015; SqueezeLLM and GuidedQuant weigh by the same
gradients). Errors of different rows are taken as independent too, so only the diagonal of G is kept. What is
measured is then, for every module, the diagonal of G, and for every rate the error dW H dW^T of some rows,
quantized as the whole module will be. The errors of modules add up, as long as they are small.

Both passes stream the layers of the base model. The backward pass keeps the inputs of all layers for
``GRADIENT_TOKENS`` tokens at most.
"""

from collections.abc import Callable, Mapping

import torch

from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import CheckpointConfig, Codebook

from .calibration import LayerwiseForward
from .checkpoint_writer import CheckpointWriter
from .hessian import HessianSum
from .model_source import ModelSource
from .part_worker import HessianCache, module_rotation
from .plan import Settings
from .weight_quantizer import quantize_weight

GRADIENT_TOKENS = 8192
LOGIT_TOKENS = 512  # of a head's backward pass: bounds the memory of a large vocabulary
SAMPLE_ROWS = 64  # rows of a module that are quantized at every rate

# name of a module -> text of a codebook -> KL divergence in nats per token
Losses = dict[str, dict[str, float]]


def measure_losses(
    source: ModelSource,
    config: CheckpointConfig,
    settings: Settings,
    candidates: Mapping[str, list[Codebook]],
    tokens: torch.Tensor,
    writer: CheckpointWriter,
    progress: Callable[[str], None],
) -> Losses:
    """Predict the loss of every candidate; what is measured is kept by ``writer``, so that it is measured once.

    Args:
        config: gives the rotations of the modules.
        candidates: the codebooks that each module may get.
        tokens: int64 [sequences, length], the calibration data.
    Returns:
        The losses; a module that no token reached (an expert) is missing.
    """
    device = settings.device
    sequences = max(1, GRADIENT_TOKENS // tokens.shape[1])
    gradients = writer.kept_tensors(
        "gradients", lambda: output_gradients(source, tokens[:sequences], settings.seed, device, progress)
    )
    losses: Losses = {}
    forward: LayerwiseForward | None = None
    behind = 0  # layers that the batch has still to pass
    for layer in range(len(source.layers)):
        names = [name for name in source.linear_names(layer) if name in candidates]

        def measure(layer: int = layer, names: list[str] = names) -> Losses:
            nonlocal forward, behind
            forward = forward or LayerwiseForward(source, tokens, device=device)
            for passed in range(behind, layer):
                with forward.loaded(passed):
                    forward.advance(passed)
            with forward.loaded(layer):
                sums = forward.collect(layer, names)
                forward.advance(layer)
            behind = layer + 1
            hessians = HessianCache()
            found: Losses = {}
            by_input: dict[int, list[str]] = {}
            for name in sums:
                by_input.setdefault(id(sums[name]), []).append(name)
            for name in (name for group in by_input.values() for name in group):
                importance = gradients[name].to(device)
                weight = source.read(source.weight_name(name)).to(device)
                arguments = weight, module_rotation(source, config, name), sums[name], hessians
                found[name] = {
                    str(codebook): row_losses(*arguments, importance, codebook, settings.amplitude)
                    for codebook in candidates[name]
                }
            return found

        losses.update(writer.kept_json(f"losses-{layer:05d}", measure))
        progress(f"sensitivity of layer {layer + 1} of {len(source.layers)}")
    return losses


def row_losses(
    weight: torch.Tensor,
    rotation,
    total: HessianSum,
    hessians: HessianCache,
    importance: torch.Tensor,
    codebook: Codebook,
    amplitude: str = "lloyd_max",
) -> float:
    """Return 1/2 sum_i G_ii (dW H dW^T)_ii of a module, the errors taken from ``SAMPLE_ROWS`` rows.

    The error of a row is proportional to its power, for rows of equal shape; the factor is that of the sample.

    Args:
        weight: [m, n]; importance: G_ii, float32 [m].
    """
    rows = weight[:: max(1, len(weight) // SAMPLE_ROWS)]
    result = quantize_weight(rows, codebook, rotation, hessians.rotated(total, rotation), True, amplitude)
    error = rows.float() - result.dequantized.float()
    output_error = ((error @ total.mean()) * error).sum(dtype=torch.float64)
    factor = output_error / rows.float().square().sum(dtype=torch.float64).clamp_min(1e-300)
    power = weight.float().square().sum(dim=1, dtype=torch.float64)
    return (0.5 * factor * (importance.double() @ power)).item()


def output_gradients(
    source: ModelSource,
    tokens: torch.Tensor,
    seed: int,
    device: str,
    progress: Callable[[str], None] = lambda description: None,
) -> dict[str, torch.Tensor]:
    """Return E[g_i^2] for every output i of every linear layer that a token reached, float32 [out_features].

    g is the gradient of the sum over all positions of -log p(y), y drawn from the model's own distribution;
    the mean is over positions.

    Args:
        tokens: int64 [sequences, length].
    Raises:
        PVQError: the model has no head.
    """
    if source.head_name is None:
        raise PVQError(f"{source.folder}: the model has no head, so no rates can be chosen: give --bits")
    depth = len(source.layers)
    forward = LayerwiseForward(source, tokens, device=device)
    inputs: list[list[torch.Tensor]] = []
    for layer in range(depth):
        inputs.append([hidden.cpu() for hidden in forward.hidden])
        with forward.loaded(layer):
            forward.advance(layer)
        progress(f"gradients: forward through layer {layer + 1} of {depth}")
    gradients = _head_gradients(forward, torch.Generator(device).manual_seed(seed % 2**63))
    sums: dict[str, torch.Tensor] = {}
    for layer in reversed(range(depth)):
        with forward.loaded(layer) as module:
            prefix = f"{source.layers_name}.{layer}."
            hooks = [
                module.get_submodule(name.removeprefix(prefix)).register_forward_hook(_square_sum(name, sums))
                for name in source.linear_names(layer)
            ]
            for index, stored in enumerate(inputs.pop()):
                hidden = stored.to(device).requires_grad_()
                forward.run_layer(layer, hidden, gradient=True).backward(gradients[index])
                gradients[index] = hidden.grad
            for hook in hooks:
                hook.remove()
        progress(f"gradients: backward through layer {layer + 1} of {depth}")
    return {name: (total / tokens.numel()).cpu() for name, total in sorted(sums.items())}


def _square_sum(name: str, sums: dict[str, torch.Tensor]) -> Callable:
    """Return a forward hook that adds g^2, summed over positions, to ``sums`` in the backward pass."""

    def add(gradient: torch.Tensor) -> None:
        squares = gradient.float().square().flatten(0, -2).sum(dim=0)
        sums[name] = sums[name] + squares if name in sums else squares

    def hook(_module, _inputs, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(add)

    return hook


def _head_gradients(forward: LayerwiseForward, generator: torch.Generator) -> list[torch.Tensor]:
    """Return the gradient for the output of the last layer, for every batch; dlogits = p - onehot(y)."""
    result = []
    with forward.head_loaded():
        for batch in forward.hidden:
            flat = batch.reshape(1, -1, batch.shape[-1])
            parts = []
            for part in flat.split(LOGIT_TOKENS, dim=1):
                final = part.detach().clone().requires_grad_()
                logits = forward.logits(final)
                gradient = logits.detach()[0].float().softmax(dim=-1)
                drawn = torch.multinomial(gradient, 1, generator=generator)
                gradient.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=gradient.dtype))
                logits.backward(gradient[None].to(logits.dtype))
                parts.append(final.grad)
            result.append(torch.cat(parts, dim=1).reshape(batch.shape))
    return result
