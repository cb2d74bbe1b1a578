# SPDX-License-Identifier: Apache-2.0
"""The parts of a checkpoint, and the worker that makes them one after the other.

In order: the tensors before the layers and after them (one part each), then one part per decoder layer. With
calibration the layers are done front to back, and the head last.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from pvq_vllm.codec.format import CheckpointConfig, expected_tensors
from pvq_vllm.codec.rotation import Rotation

from . import amplitude_histogram
from .calibration import LayerwiseForward
from .checkpoint_writer import CheckpointWriter
from .hessian import HessianSum, RotatedHessian
from .model_source import ModelSource
from .plan import Settings
from .weight_quantizer import dequantize_weight, quantize_weight, stored_weight_snr


@dataclass
class Part:
    """One piece of the work: ``layer`` is the decoder layer's number or None; ``outputs`` are the tensors it
    stores.
    """

    layer: int | None
    modules: list[str]
    copied: list[str]
    outputs: dict[str, tuple[str, tuple[int, ...]]]


def plan_parts(source: ModelSource, config: CheckpointConfig) -> list[Part]:
    """Divide the model's tensors into parts and say what each will store."""
    layer_tensors: dict[int, list[str]] = {layer: [] for layer in range(len(source.layers))}
    outside: list[str] = []
    for name in sorted(source.tensors):
        rest = (
            name.removeprefix(f"{source.layers_name}.").split(".")
            if name.startswith(f"{source.layers_name}.")
            else []
        )
        if rest and rest[0].isdigit() and int(rest[0]) in layer_tensors:
            layer_tensors[int(rest[0])].append(name)
        else:
            outside.append(name)
    if source.is_tied and (source.head_name in config.modules or source.embedding_name in config.modules):
        outside.append(f"{source.head_name}.weight")
    parts = [_part(source, config, None, [name]) for name in outside]
    parts += [_part(source, config, layer, names) for layer, names in layer_tensors.items()]
    return parts


def _part(source: ModelSource, config: CheckpointConfig, layer: int | None, names: list[str]) -> Part:
    part = Part(layer, [], [], {})
    for name in names:
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in config.modules:
            part.modules.append(module)
            shape = source.weight_shape(module)
            part.outputs.update(expected_tensors(module, config.modules[module].codebook, *shape))
        else:
            part.copied.append(name)
            info = source.tensors.get(name) or source.tensors[source.weight_name(module)]
            part.outputs[name] = (info.dtype, info.shape)
    return part


def module_rotation(source: ModelSource, config: CheckpointConfig, name: str) -> Rotation | None:
    """Return the rotation of the input of module ``name``, None if it has none."""
    spec = config.modules[name]
    in_features = source.weight_shape(name)[1]
    if not spec.rotation_blocks:
        return None
    factors = config.rotation_factors[in_features // spec.rotation_blocks]
    return Rotation(config.rotation_seed, in_features, spec.rotation_blocks, factors)


class HessianCache:
    """Prepares a Hessian once for linears in a row that share their input (and then their rotation)."""

    def __init__(self) -> None:
        self._last: tuple[HessianSum, tuple, RotatedHessian] | None = None

    def rotated(self, total: HessianSum, rotation: Rotation | None) -> RotatedHessian:
        key = () if rotation is None else (rotation.blocks, *rotation.factors)
        if self._last is None or self._last[0] is not total or self._last[1] != key:
            self._last = None  # two at a time would double the memory
            self._last = (total, key, RotatedHessian.of(total.mean(), rotation))
        return self._last[2]

    def clear(self) -> None:
        self._last = None


class PartWorker:
    """Makes parts; keeps the calibration batch on its way through the layers.

    Args:
        tokens: gives the calibration tokens, int64 [sequences, length], when they are needed first, and
            ``token_weights`` what ``LayerwiseForward.collect`` takes; the weights of a layer that is done are
            removed from it.
    """

    def __init__(
        self,
        source: ModelSource,
        config: CheckpointConfig,
        settings: Settings,
        writer: CheckpointWriter,
        parts: list[Part],
        tokens: Callable[[], torch.Tensor],
        token_weights: Callable[[], dict[str, torch.Tensor]] = dict,
    ) -> None:
        self.source, self.config, self.settings = source, config, settings
        self.writer, self.parts = writer, parts
        self.tokens, self.token_weights = tokens, token_weights
        self._forward: LayerwiseForward | None = None
        self._tokens: torch.Tensor | None = None
        self._weights: dict[str, torch.Tensor] = {}
        self._hessians = HessianCache()
        self._read: tuple[int, dict[str, torch.Tensor]] | None = None  # the part that was read last
        self._passed = 0  # layers that the calibration batch has passed

    def order(self) -> Iterator[int]:
        """Yield the numbers of the parts; what needs the hidden states behind the last layer comes last."""
        outside = [index for index, part in enumerate(self.parts) if part.layer is None]
        yield from (index for index in outside if not self._is_head(self.parts[index]))
        yield from (index for index, part in enumerate(self.parts) if part.layer is not None)
        yield from (index for index in outside if self._is_head(self.parts[index]))

    def _is_head(self, part: Part) -> bool:
        return self.source.head_name in part.modules

    def make(self, index: int, progress: Callable[[str], None]) -> None:
        """Quantize and store one part, and what is to be reported about it: ``modules`` (name -> entry),
        ``group_power`` (the sum over the modules of ``amplitude_histogram.measure``) and ``seconds``.
        """
        part = self.parts[index]
        if self.settings.calibration is not None and (part.layer is not None or self._is_head(part)):
            self._take_tokens()
        started = time.perf_counter()
        tensors: dict[str, torch.Tensor] = {}
        for name in part.copied:
            tensors[name] = self.source.read_stored(name).cpu()
        report: dict = {"modules": {}, "group_power": []}
        if self.settings.calibration is not None and part.layer is not None:
            self._make_layer(part, tensors, report, progress)
        else:
            for name in part.modules:
                total = None
                if self.settings.calibration is not None and name == self.source.head_name:
                    self._pass_layers(len(self.source.layers))
                    total = self._forward.collect_head()
                self._quantize(name, total, tensors, report)
                progress(name)
        if report["group_power"]:
            report["group_power"] = amplitude_histogram.add(report["group_power"])
        report["seconds"] = time.perf_counter() - started
        self.writer.write_part(index, tensors, report)

    def release(self) -> None:
        """Let go of the calibration batch and of the Hessians; no part can be made afterwards."""
        self._forward = None
        self._hessians.clear()
        if self.settings.device == "cuda":
            torch.cuda.empty_cache()

    def restored_weight(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the stored codes of a module of a decoder layer stand for, [out_features, in_features] in its
        dtype, and its row scales, float16 [out_features].
        """
        index = next(i for i, part in enumerate(self.parts) if name in part.modules)
        if self._read is None or self._read[0] != index:
            self._read = (index, self.writer.read_part(index))
        stored = self._read[1]
        return self._restore(name, stored), stored[f"{name}.weight_scale"]

    def weight_snr(self, name: str, stored: dict[str, torch.Tensor]) -> float:
        """Return the signal-to-noise ratio, in dB, of a module's weight as the tensors of its part store it."""
        weight = self.source.read(self.source.weight_name(name)).to(self.settings.device)
        rotation = module_rotation(self.source, self.config, name)
        return stored_weight_snr(weight, _local(name, stored), self.config.modules[name].codebook, rotation)

    def _make_layer(self, part: Part, tensors: dict, report: dict, progress: Callable[[str], None]) -> None:
        """Quantize a decoder layer with the Hessians of its inputs, and send the batch through the result."""
        self._pass_layers(part.layer)
        with self._forward.loaded(part.layer) as module:
            sums = self._forward.collect(part.layer, part.modules, self._weights)
            by_input: dict[int, list[str]] = {}
            for name in part.modules:
                by_input.setdefault(id(sums.get(name)), []).append(name)
            for name in (name for names in by_input.values() for name in names):
                linear = module.get_submodule(name.removeprefix(f"{self.source.layers_name}.{part.layer}."))
                restored = self._quantize(name, sums.get(name), tensors, report, restore=True)
                linear.weight.data = restored.to(self.source.weight_dtype(name)).to(self._forward.dtype)
                progress(name)
            del sums
            self._hessians.clear()
            self._forward.advance(part.layer)
        self._has_passed(part.layer)

    def _quantize(
        self, name: str, total: HessianSum | None, tensors: dict, report: dict, restore: bool = False
    ) -> torch.Tensor | None:
        """Quantize one module into ``tensors`` and ``report``; return the weight it stands for, if asked."""
        started = time.perf_counter()
        spec = self.config.modules[name]
        weight = self.source.read(self.source.weight_name(name)).to(self.settings.device)
        rotation = module_rotation(self.source, self.config, name)
        hessian = None if total is None else self._hessians.rotated(total, rotation)
        result = quantize_weight(weight, spec.codebook, rotation, hessian, restore, self.settings.amplitude)
        for kind, tensor in result.tensors.items():
            tensors[f"{name}.{kind}"] = tensor.cpu()
        report["modules"][name] = {
            "codebook": str(spec.codebook),
            "out_features": weight.shape[0],
            "in_features": weight.shape[1],
            "bits_per_weight": spec.codebook.bits_per_weight(weight.shape[1]),
            "weight_snr_db": round(result.weight_snr_db, 3),
            "output_snr_db": None if result.output_snr_db is None else round(result.output_snr_db, 3),
            "seconds": time.perf_counter() - started,
        }
        group_size = spec.codebook.group_size or 8
        original = self.source.read_original(self.source.weight_name(name))
        measured = amplitude_histogram.measure(original, weight, rotation, group_size)
        report["group_power"].append(measured)
        return result.dequantized

    def _take_tokens(self) -> None:
        """Get the calibration tokens and their weights. Where that takes long, the writer counts it by itself."""
        if self._tokens is None:
            self._tokens, self._weights = self.tokens(), self.token_weights()

    def _pass_layers(self, stop: int) -> None:
        """Bring the calibration batch to layer ``stop``, through layers that an interrupted run has already
        quantized.
        """
        if self._forward is None:
            self._take_tokens()
            self._forward = LayerwiseForward(self.source, self._tokens, device=self.settings.device)
        for layer in range(self._passed, stop):
            index, part = next((i, part) for i, part in enumerate(self.parts) if part.layer == layer)
            stored = self.writer.read_part(index)
            with self._forward.loaded(layer) as module:
                for name in part.modules:
                    linear = module.get_submodule(name.removeprefix(f"{self.source.layers_name}.{layer}."))
                    linear.weight.data = self._restore(name, stored).to(self._forward.dtype)
                self._forward.advance(layer)
            self._has_passed(layer)

    def _has_passed(self, layer: int) -> None:
        """Note that the batch is behind ``layer``, whose token weights nobody needs any more."""
        self._passed = layer + 1
        prefix = f"{self.source.layers_name}.{layer}."
        for name in [name for name in self._weights if name.startswith(prefix)]:
            del self._weights[name]

    def _restore(self, name: str, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the weight that the stored tensors of module ``name`` stand for."""
        tensors = _local(name, stored)
        codebook, in_features = self.config.modules[name].codebook, self.source.weight_shape(name)[1]
        rotation = module_rotation(self.source, self.config, name)
        dtype = self.source.weight_dtype(name)
        return dequantize_weight(tensors, codebook, in_features, rotation, dtype, self.settings.device)


def _local(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of module ``name``, by their local names."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
