# SPDX-License-Identifier: Apache-2.0
"""How much the model's output depends on the output of every linear layer, token by token.

g is the gradient of -log p(y) at a layer's output, for a y drawn from the model itself, so that E[g g^T] is the Fisher
information. Two means of its squares are kept: over the tokens for each output, which tells what an error of a row costs
(``sensitivity``), and over the outputs for each token, which tells where errors cost most (``token_weights``).

Both passes stream the layers of the base model. The backward pass needs the inputs of all layers, so that the
tokens go through in slices whose inputs take ``STORED_BYTES`` at most. A model that is small beside that stays in
memory. None of this changes the result.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from pvq_vllm.codec.errors import PVQError

from . import calibration, memory
from .calibration import LayerwiseForward
from .device import deterministic
from .model_source import ModelSource

STORED_BYTES = 16 << 30  # or a quarter of the free memory
LOGIT_TOKENS = 256  # of a head's backward pass: bounds the memory of a large vocabulary
# Values at a time that a CPU takes as float32: its cache holds them, and malloc keeps the memory of so few.
CACHED = 1 << 20
DRAW_BLOCK = 256  # columns whose probabilities are summed before one of them is drawn


@dataclass
class OutputGradients:
    """``outputs``: E[g_i^2] for every output i of every linear layer that a token reached, by the layer's name,
    float32 [out_features]. ``tokens``: by the name of a linear layer, the mean of g^2 over its outputs, summed over the
    layers that read the same tensor (q, k and v) and share the sum, float32 [tokens]; only where they see every token
    (not experts).
    """

    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Return both as one dictionary, to be stored; the key of a shared tensor has all its names."""
        result = {f"outputs/{name}": tensor for name, tensor in sorted(self.outputs.items())}
        for names in _sharing(self.tokens):
            result[f"tokens/{','.join(names)}"] = self.tokens[names[0]]
        return result

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "OutputGradients":
        """Return what ``to_tensors`` was called for."""
        result = cls()
        for key, tensor in tensors.items():
            kind, _, names = key.partition("/")
            getattr(result, kind).update(dict.fromkeys(names.split(","), tensor))
        return result

    def token_weights(self) -> dict[str, torch.Tensor]:
        """Return the weight of every token in the Hessian of a layer's input, of mean 1, float32 [tokens]. Layers that
        share a sum share the weights.

        It is the root of the mean square of g. The squares themselves would make the Hessian that of the KL divergence
        (GuidedQuant, Kim et al. 2025), but g comes from one drawn y and a few tokens would outweigh all others;
        measured, the root is better (docs/quantizer.md).

        Raises:
            PVQError: a gradient is not finite.
        """
        weights = {}
        for names in _sharing(self.tokens):
            root = self.tokens[names[0]].sqrt()
            mean = root.mean()
            if not mean.isfinite():
                raise PVQError(
                    f"the gradients of the calibration data overflow at {names[0]}: use another text, or "
                    "--token-weights uniform"
                )
            if mean > 0:
                weights.update(dict.fromkeys(names, root / mean))
        return weights


def _sharing(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Return the names of each tensor, in order."""
    names: dict[int, list[str]] = {}
    for name, tensor in sorted(tensors.items()):
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def output_gradients(
    source: ModelSource,
    tokens: torch.Tensor,
    seed: int,
    device: str,
    progress: Callable[[str], None] = lambda description: None,
) -> OutputGradients:
    """Return the squares of g over all positions of ``tokens``.

    Args:
        tokens: int64 [sequences, length].
        seed: of the labels y.
    Raises:
        PVQError: the model has no head.
    """
    if source.head_name is None:
        raise PVQError(
            f"{source.folder}: the model has no head, so nothing tells what its outputs are "
            "worth: give --bits, and --token-weights uniform"
        )
    length = tokens.shape[1]
    batch = max(1, calibration.BATCH_TOKENS // length)
    hidden_size = source.skeleton.get_output_embeddings().weight.shape[1]
    sequence_bytes = len(source.layers) * length * hidden_size * calibration.forward_dtype(device).itemsize
    room = min(STORED_BYTES, memory.free_memory("cpu") // 4)
    slices = tokens.split(max(1, room // sequence_bytes // batch) * batch)
    generator = torch.Generator(device).manual_seed(seed % 2**63)
    collected = _Squares(tokens.numel())
    for index, part in enumerate(slices):
        where = f" ({index + 1} of {len(slices)})" if len(slices) > 1 else ""
        forward = LayerwiseForward(source, part, device=device)
        backward = _backward_in_memory if _fits_in_memory(forward, room) else _backward
        with deterministic(device):
            backward(
                forward,
                generator,
                collected,
                lambda text, where=where: progress(f"gradients{where}: {text}"),
            )
    return collected.result()


class _Squares:
    """Squares of gradients, added up. ``begin`` is the first token of the slice or batch that is under way."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens, self.begin = num_tokens, 0
        self._outputs: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, torch.Tensor] = {}  # by the first layer that reads a tensor, and
        self._leaders: dict[str, str] = {}  # the first one for all

    def add(self, name: str, leader: str, begin: int, batch_tokens: int, gradient: torch.Tensor) -> None:
        gradient = gradient.detach().flatten(0, -2)
        rows = len(gradient) if gradient.is_cuda else max(1, CACHED // gradient.shape[1])
        total, means = 0, []
        for part in gradient.split(rows):
            squares = part.to(torch.float32, copy=True)
            squares *= squares
            total = total + squares.sum(dim=0)
            means.append(squares.mean(dim=1))
        self._outputs[name] = self._outputs[name] + total if name in self._outputs else total
        if len(gradient) == batch_tokens:
            self._leaders[name] = leader
            if leader not in self._tokens:
                self._tokens[leader] = torch.zeros(self.num_tokens, device=gradient.device)
            self._tokens[leader][begin : begin + batch_tokens] += torch.cat(means)

    def result(self) -> OutputGradients:
        outputs = {name: (total / self.num_tokens).cpu() for name, total in sorted(self._outputs.items())}
        tokens = {name: total.cpu() for name, total in self._tokens.items()}
        return OutputGradients(outputs, {name: tokens[one] for name, one in sorted(self._leaders.items())})


def _backward(
    forward: LayerwiseForward,
    generator: torch.Generator,
    collected: _Squares,
    progress: Callable[[str], None],
) -> None:
    """Send the batches of ``forward`` through all layers and back."""
    depth = len(forward.source.layers)
    inputs: list[list[torch.Tensor]] = []
    for layer in range(depth):
        inputs.append([hidden.cpu() for hidden in forward.hidden])
        with forward.loaded(layer):
            forward.advance(layer)
        progress(f"forward through layer {layer + 1} of {depth}")
    with forward.head_loaded():
        gradients = [_head_gradient(forward, hidden, generator) for hidden in forward.hidden]
    for layer in reversed(range(depth)):
        with forward.loaded(layer):
            begin = collected.begin
            for index, stored in enumerate(inputs.pop()):
                hidden = stored.to(forward.device).requires_grad_()
                _observed_layer(forward, layer, hidden, collected, begin).backward(gradients[index])
                gradients[index] = hidden.grad
                begin += hidden.shape[0] * hidden.shape[1]
        progress(f"backward through layer {layer + 1} of {depth}")
    collected.begin = begin


def _backward_in_memory(
    forward: LayerwiseForward,
    generator: torch.Generator,
    collected: _Squares,
    progress: Callable[[str], None],
) -> None:
    """Do the same with all layers in memory, batch by batch, so that no layer runs forward twice."""
    depth, count = len(forward.source.layers), len(forward.hidden)
    with ExitStack() as loaded:
        for layer in range(depth):
            loaded.enter_context(forward.loaded(layer))
        loaded.enter_context(forward.head_loaded())
        for index in range(count):
            hidden = forward.hidden[index]
            passed: list[tuple[torch.Tensor, torch.Tensor]] = []
            for layer in range(depth):
                hidden = hidden.detach().requires_grad_()
                output = _observed_layer(forward, layer, hidden, collected, collected.begin)
                passed.append((hidden, output))
                hidden = output
            gradient = _head_gradient(forward, hidden, generator)
            del output
            while passed:
                hidden, output = passed.pop()
                output.backward(gradient)
                gradient = hidden.grad
            collected.begin += hidden.shape[0] * hidden.shape[1]
            progress(f"batch {index + 1} of {count}")


def _observed_layer(
    forward: LayerwiseForward,
    layer: int,
    hidden: torch.Tensor,
    collected: _Squares,
    begin: int,
) -> torch.Tensor:
    """Return what the loaded layer makes of one batch, of which ``begin`` is the first token. The backward pass from there
    adds to ``collected``.
    """
    source = forward.source
    prefix = f"{source.layers_name}.{layer}."
    batch_tokens = hidden.shape[0] * hidden.shape[1]
    leaders: dict[int, tuple[torch.Tensor, str]] = {}
    hooks = [
        source.layers[layer]
        .get_submodule(name.removeprefix(prefix))
        .register_forward_hook(_square(name, leaders, collected, begin, batch_tokens))
        for name in source.linear_names(layer)
    ]
    try:
        return forward.run_layer(layer, hidden, gradient=True)
    finally:
        for hook in hooks:
            hook.remove()


def _fits_in_memory(forward: LayerwiseForward, room: int) -> bool:
    """True if all weights, and what the backward pass of a batch needs, take ``room`` bytes of the host at most. All
    layers are taken to need what the first one does.
    """
    if forward.device != "cpu":
        return False
    weights = sum(math.prod(info.shape) for info in forward.source.tensors.values()) * forward.dtype.itemsize
    if weights > room:
        return False
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hidden = forward.hidden[0].detach().requires_grad_()
    with forward.loaded(0), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        _output = forward.run_layer(0, hidden, gradient=True)  # its graph keeps what was counted
    return weights + len(forward.source.layers) * sum(kept.values()) <= room


def _square(
    name: str,
    leaders: dict[int, tuple[torch.Tensor, str]],
    collected: _Squares,
    begin: int,
    batch_tokens: int,
) -> Callable:
    """Return a forward hook that adds g^2 to ``collected`` in the backward pass. ``leaders``: the first module to
    read a tensor, by the tensor's id; the tensors are kept so that no id is used again.
    """

    def hook(_module, args: tuple, output: torch.Tensor) -> None:
        leader = leaders.setdefault(id(args[0]), (args[0], name))[1]
        if output.requires_grad:
            output.register_hook(lambda gradient: collected.add(name, leader, begin, batch_tokens, gradient))

    return hook


def _head_gradient(
    forward: LayerwiseForward, batch: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Return the gradient for ``batch``, an output of the last layer; dlogits = p - onehot(y)."""
    parts = []
    for part in _head_inputs(batch.detach()):
        final = part.clone().requires_grad_()
        logits = forward.logits(final)
        logits.backward(_logit_gradient(logits.detach(), generator))
        parts.append(final.grad.flatten(0, 1))
    return torch.cat(parts).reshape(batch.shape)


def _head_inputs(batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cut [sequences, length, hidden] into pieces of at most ``LOGIT_TOKENS`` tokens, in order, none with more positions
    than a sequence: a model with learned positions has no others.
    """
    length = batch.shape[1]
    if length < LOGIT_TOKENS:
        return batch.split(LOGIT_TOKENS // length)
    return batch.reshape(1, -1, batch.shape[-1]).split(LOGIT_TOKENS, dim=1)


def _logit_gradient(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return p - onehot(y) for a y drawn by p at every position, in the shape and dtype of ``logits``."""
    result = torch.empty_like(logits).flatten(0, 1)
    rows = len(result) if logits.is_cuda else max(1, CACHED // logits.shape[-1])
    for part, given in zip(result.split(rows), logits.flatten(0, 1).split(rows), strict=True):
        gradient = given.float().softmax(dim=-1)
        gradient.scatter_add_(1, drawn := _draw(gradient, generator), gradient.new_full(drawn.shape, -1))
        part.copy_(gradient)
    return result.view_as(logits)


def _draw(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return int64 [n, 1], one column drawn for each row of float32 [n, columns].

    One of the blocks of ``DRAW_BLOCK`` columns is drawn, then a column of it: of the others only sums are taken.
    (torch.multinomial takes a random number for each column.)
    """
    rows, columns = probabilities.shape
    whole = columns - columns % DRAW_BLOCK
    blocks = probabilities[:, :whole].unflatten(1, (-1, DRAW_BLOCK)).sum(dim=-1)
    rest = probabilities[:, whole:].sum(dim=-1, keepdim=True)
    cumulated = torch.cat([torch.zeros_like(rest), blocks, rest], dim=1).cumsum(dim=1)
    uniform = torch.rand(rows, 1, generator=generator, device=rest.device) * cumulated[:, -1:]
    block = _first_above(cumulated[:, 1:], uniform)
    column = block * DRAW_BLOCK + torch.arange(DRAW_BLOCK, device=block.device)
    inside = probabilities.gather(1, column.clamp_max(columns - 1)).masked_fill_(column >= columns, 0)
    return block * DRAW_BLOCK + _first_above(inside.cumsum(dim=1), uniform - cumulated.gather(1, block))


def _first_above(cumulated: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return int64 [n, 1], in each row of [n, k] the first column with more than the value of [n, 1], which is taken to be
    below the row's last (it can reach that by rounding).
    """
    below = torch.minimum(values, cumulated[:, -1:].nextafter(values.new_zeros(())))
    return torch.searchsorted(cumulated.contiguous(), below, right=True)
