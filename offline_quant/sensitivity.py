# SPDX-License-Identifier: Apache-2.0
"""How much quantizing each module at each rate costs, in KL divergence from the base model.

To second order a change dW of one linear layer costs, in nats per token,

    KL = 1/2 tr(G dW H dW^T),    H = E[x x^T] of its inputs,    G = E[g g^T] of its outputs' gradients

where g is the gradient of -log p(y) for a y drawn from the model itself (``gradients``): the Fisher information,
with its two factors taken as independent (K-FAC, Martens and Grosse 2015; SqueezeLLM and GuidedQuant weigh by the same
gradients). Errors of different rows are taken as independent too, so only the diagonal of G is kept. What is
measured is then, for every rate, the error dW H dW^T of some rows of a module, quantized as the whole module will be.
H counts tokens as it does there. The errors of modules add up, as long as they are small. The pass streams the layers of
the base model.
"""

from collections.abc import Callable, Mapping

import torch

from pvq_vllm.codec.format import CheckpointConfig, Codebook

from .calibration import LayerwiseForward
from .checkpoint_writer import CheckpointWriter
from .hessian import HessianSum
from .model_source import ModelSource
from .part_worker import HessianCache, module_rotation
from .plan import Settings
from .weight_quantizer import quantize_weight

SAMPLE_ROWS = 64  # rows of a module that are quantized at every rate

# name of a module -> text of a codebook -> KL divergence in nats per token
Losses = dict[str, dict[str, float]]


def measure_losses(
    source: ModelSource,
    config: CheckpointConfig,
    settings: Settings,
    candidates: Mapping[str, list[Codebook]],
    tokens: torch.Tensor,
    importance: Mapping[str, torch.Tensor],
    token_weights: Mapping[str, torch.Tensor],
    writer: CheckpointWriter,
    progress: Callable[[str], None],
) -> Losses:
    """Predict the loss of every candidate; what is measured is kept by ``writer``, so that it is measured once.

    Args:
        config: gives the rotations of the modules.
        candidates: the codebooks that each module may get.
        tokens: int64 [sequences, length], the calibration data.
        importance: the diagonal of G of every module, float32 [out_features].
        token_weights: as ``LayerwiseForward.collect`` takes them.
    Returns:
        The losses; a module that no token reached (an expert) is missing.
    """
    device = settings.device
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
                sums = forward.collect(layer, names, token_weights)
                forward.advance(layer)
            behind = layer + 1
            hessians = HessianCache()
            found: Losses = {}
            by_input: dict[int, list[str]] = {}
            for name in sums:
                by_input.setdefault(id(sums[name]), []).append(name)
            for name in (name for group in by_input.values() for name in group):
                weight = source.read(source.weight_name(name)).to(device)
                arguments = weight, module_rotation(source, config, name), sums[name], hessians
                found[name] = {
                    str(codebook): row_losses(
                        *arguments, importance[name].to(device), codebook, settings.amplitude
                    )
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
