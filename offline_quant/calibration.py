# SPDX-License-Identifier: Apache-2.0
"""Run a calibration text through the model with one decoder layer in memory at a time, and collect Hessians
on the way.

The hidden states of all sequences are kept; a layer is read from the shards, its inputs are collected, it is
quantized, and the hidden states go on through the quantized layer, so that each layer is fitted to what the
layers before it really produce.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import nn

from pvq_vllm.codec.errors import PVQError

from .attention import FastAttention
from .hessian import HessianSum
from .model_source import ModelSource
from .norms import fast_norms

BATCH_TOKENS = (
    4096  # per forward pass: large enough for full speed, small against the weights of a large layer
)


def forward_dtype(device: str = "cpu") -> torch.dtype:
    """Return bfloat16 where the processor or GPU multiplies it natively (several times as fast), float32
    elsewhere.
    """
    native = device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


class _AllSeen(Exception):
    """Ends a forward pass of which the rest is not needed."""


class LayerwiseForward:
    """The calibration batch on its way through the model: ``hidden`` is what the next layer gets, [batch,
    length, hidden] each. On a GPU the hidden states stay there, and the weights of one layer.
    """

    def __init__(
        self,
        source: ModelSource,
        token_ids: torch.Tensor,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
    ) -> None:
        self.source, self.device = source, device
        self.dtype = dtype or forward_dtype(device)
        self.hidden: list[torch.Tensor] = []
        # Per batch size, what the model passes to each layer besides the hidden states: masks, rotary
        # embeddings ...
        self._arguments: dict[int, list[tuple[tuple, dict]]] = {}
        self._as_result: Callable | None = None  # gives hidden states the form in which layers return them
        batches = token_ids.split(max(1, BATCH_TOKENS // token_ids.shape[1]))
        with self._outside_loaded(), torch.no_grad():
            for batch in batches:
                recorded: list[tuple[tuple, dict]] = []
                first = self._run_around_layers(recorded, None, input_ids=batch.to(device))
                self._arguments.setdefault(len(batch), recorded)
                self.hidden.append(first)

    @contextmanager
    def loaded(self, layer: int) -> Iterator[nn.Module]:
        """Give decoder layer ``layer`` its weights from the shards, and take them away at the end."""
        module = self.source.layers[layer]
        self._materialize(module, f"{self.source.layers_name}.{layer}.")
        try:
            with fast_norms(module) if self.device == "cpu" else nullcontext():
                yield module
        finally:
            _dematerialize(module)

    def collect(
        self, layer: int, names: list[str], token_weights: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, HessianSum]:
        """Run the loaded layer on every batch and return the Hessian sums of its linears ``names``, by full
        name.

        Linears that read the same tensor (q, k, v; gate, up) share one ``HessianSum`` object. A linear that
        no token reached (an expert) is left out.

        Args:
            token_weights: float32 [tokens], by the name of a linear that reads a tensor; without, all tokens
                count alike.
        """
        token_weights = token_weights or {}
        begin = 0  # first token of the batch
        module = self.source.layers[layer]
        prefix = f"{self.source.layers_name}.{layer}."
        leader: dict[str, str] = {}
        sums: dict[str, HessianSum] = {}
        inputs: dict[
            int, tuple[torch.Tensor, str]
        ] = {}  # of one pass; the tensors are kept so that no id is used again
        called: list[str] = []  # in the order of the calls
        last: str | None = None  # after it nothing of a pass is of interest

        def hook(name: str) -> Callable:
            def collect_input(_module: nn.Module, args: tuple) -> None:
                x = args[0]
                called.append(name)
                if name not in leader:
                    leader[name] = inputs.get(id(x), (x, name))[1]
                    inputs.setdefault(id(x), (x, name))
                if leader[name] == name:
                    if name not in sums:
                        sums[name] = HessianSum(x.shape[-1], x.device)
                    weights = token_weights.get(name)
                    if weights is not None:
                        weights = weights[begin : begin + x.numel() // x.shape[-1]]
                    sums[name].add(x, weights)
                if name == last:
                    raise _AllSeen

            return collect_input

        hooks = [
            module.get_submodule(name.removeprefix(prefix)).register_forward_pre_hook(hook(name))
            for name in names
        ]
        try:
            for index, hidden in enumerate(self.hidden):
                with suppress(_AllSeen):
                    self.run_layer(layer, hidden)
                if index == 0 and sorted(called) == sorted(names):  # not so in mixtures of experts
                    last = called[-1]
                inputs.clear()
                begin += hidden.shape[0] * hidden.shape[1]
        finally:
            for handle in hooks:
                handle.remove()
        return {name: sums[leader[name]] for name in names if name in leader}

    def advance(self, layer: int) -> None:
        """Send the hidden states through the loaded layer, in place."""
        for index, hidden in enumerate(self.hidden):
            self.hidden[index] = self.run_layer(layer, hidden)

    def collect_head(self) -> HessianSum:
        """Return the Hessian sum of the head's input, once the hidden states have passed all layers."""
        total = HessianSum(self.hidden[0].shape[-1], self.device)
        with self._outside_loaded(), torch.no_grad():
            for hidden in self.hidden:
                total.add(self._run_around_layers([], hidden, inputs_embeds=torch.zeros_like(hidden)))
        return total

    def run_layer(self, layer: int, hidden: torch.Tensor, gradient: bool = False) -> torch.Tensor:
        """Return what the loaded layer makes of one batch; with ``gradient`` for a backward pass."""
        args, kwargs = self._arguments[len(hidden)][layer]
        with torch.set_grad_enabled(gradient), FastAttention() if self.device == "cpu" else nullcontext():
            output = self.source.layers[layer](hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def head_loaded(self) -> Iterator[None]:
        """Load what lies behind the layers, the head too, for ``logits``."""
        head, name = self.source.skeleton.get_output_embeddings(), self.source.head_name
        before = dict(head.named_parameters())
        with self._outside_loaded():
            for leaf in before:
                stored = self.source.weight_name(name) if leaf == "weight" else f"{name}.{leaf}"
                _set_parameter(head, leaf, self.source.read(stored).to(self.device, self.dtype))
            try:
                yield
            finally:
                for leaf, parameter in before.items():
                    setattr(head, leaf, parameter)

    def logits(self, final: torch.Tensor) -> torch.Tensor:
        """Return the logits [k, n, vocabulary] for outputs of the last layer, [k, n, hidden], with their
        graph for a backward pass; needs ``head_loaded``.
        """
        with torch.enable_grad():
            inputs = torch.zeros_like(final)
            return self._run_around_layers([], final, self.source.skeleton, inputs_embeds=inputs)

    def _run_around_layers(
        self, recorded: list, final: torch.Tensor | None, model: nn.Module | None = None, **inputs
    ) -> torch.Tensor:
        """Run ``model`` (without one: the part below the head) with layers that compute nothing.

        Appends to ``recorded`` what each layer is called with. Returns what the first layer gets or, given
        ``final`` (the output of the last layer), what the model makes of it: the head's input, or the logits.
        """
        layers = list(self.source.layers)
        first: list[torch.Tensor] = []

        def stand_in(*args, **kwargs) -> torch.Tensor | tuple:
            args = list(args)
            hidden = args.pop(0) if args else kwargs.pop("hidden_states")
            if self._as_result is None:
                self._as_result = self._form_of_results(hidden, *args, **kwargs)
            first.append(hidden)
            recorded.append((tuple(args), kwargs))
            return self._as_result(final if final is not None and len(first) == len(layers) else hidden)

        for layer in layers:
            layer.forward = stand_in  # on the instance: what the model reads off its layers stays there
        try:
            output = (model or self.source.skeleton.base_model)(**inputs, use_cache=False)
        finally:
            for layer in layers:
                del layer.forward
        return first[0] if final is None else output[0]

    def _form_of_results(self, *args, **kwargs) -> Callable[[torch.Tensor], torch.Tensor | tuple]:
        """Run the first layer and return what gives hidden states the form of its result.

        Decoders take ``layer(...)``, or the first of a tuple: ``layer(...)[0]`` of a bare tensor is a sequence.
        """
        with self.loaded(0) as layer:
            output = type(layer).forward(layer, *args, **kwargs)  # the instance's own is a stand-in
        if not isinstance(output, tuple):
            return lambda hidden: hidden
        beside = (None,) * (len(output) - 1)  # attention weights and the like, which nobody asked for
        return lambda hidden: (hidden, *beside)

    @contextmanager
    def _outside_loaded(self) -> Iterator[None]:
        """Load what lies around the layers (embedding, last norm), without the head."""
        base = self.source.skeleton.base_model
        base_name = next(name for name, module in self.source.skeleton.named_modules() if module is base)
        self._materialize(base, f"{base_name}." if base_name else "", skip=f"{self.source.layers_name}.")
        try:
            yield
        finally:
            _dematerialize(base)

    def _materialize(self, module: nn.Module, prefix: str, skip: str | None = None) -> None:
        for name, parameter in list(module.named_parameters()):
            if skip and (prefix + name).startswith(skip):
                continue
            tensor = self.source.read(prefix + name)
            if tensor.shape != parameter.shape:
                raise PVQError(
                    f"{self.source.tensors[prefix + name].shard}: '{prefix + name}' is "
                    f"{list(tensor.shape)}, but by "
                    f"config.json it must be {list(parameter.shape)}: copy the folder again"
                )
            _set_parameter(module, name, tensor.to(self.device, self.dtype))
        for name, buffer in list(module.named_buffers()):
            if skip and (prefix + name).startswith(skip):
                continue
            if prefix + name in self.source.tensors:
                buffer.copy_(self.source.read(prefix + name))
            if buffer.device.type != self.device:
                _set_buffer(module, name, buffer.to(self.device))


def _set_parameter(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def _set_buffer(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._buffers[leaf] = tensor


def _dematerialize(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters()):
        if not parameter.is_meta:
            _set_parameter(module, name, parameter.to("meta"))
