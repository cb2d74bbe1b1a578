# SPDX-License-Identifier: Apache-2.0
"""`pvq quantize`: from a Hugging Face folder to a PVQ checkpoint, one decoder layer in memory at a time.

The parts of the work, in order: the tensors before the layers and after them (one part each), then one part
per decoder layer. With a calibration text the layers are done front to back, and the head last.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pvq_vllm.codec.format import FORMAT_VERSION, CheckpointConfig, expected_tensors
from pvq_vllm.codec.rotation import Rotation

from .calibration import LayerwiseForward
from .calibration_data import calibration_tokens, tokens_digest
from .checkpoint_writer import CheckpointWriter, check_destination, tensor_bytes
from .hessian import HessianSum, RotatedHessian
from .model_card import model_card
from .model_source import ModelSource
from .plan import Settings, plan_checkpoint
from .residual_rotation import rotated_source
from .weight_quantizer import dequantize_weight, quantize_weight

# Files of the source folder that belong to the checkpoint as they are.
COPIED_NAMES = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md",
)  # fmt: skip

# Called with the name of a module that is done and how many weights it has.
Progress = Callable[[str, int], None]


@dataclass
class Part:
    """One piece of the work: ``layer`` is the decoder layer's number or None; ``outputs`` are the tensors it
    stores.
    """

    layer: int | None
    modules: list[str]
    copied: list[str]
    outputs: dict[str, tuple[str, tuple[int, ...]]]


def quantize_checkpoint(
    model: str | os.PathLike,
    out: str | os.PathLike,
    settings: Settings,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda name, weights: None,
    start: Callable[[int], None] = lambda weights: None,
) -> dict:
    """Quantize the model folder ``model`` into the folder ``out`` and return the report (also in
    OUT/report.json).

    Args:
        progress: told about every finished module; ``start`` gets the number of all weights beforehand.
    Raises:
        PVQError: see docs/quantizer.md; nothing at ``out`` was changed.
    """
    out = Path(out)
    if not resume:
        check_destination(out, overwrite)
    source = rotated_source(ModelSource.open(model), settings.rotation, settings.seed)
    config = plan_checkpoint(source, settings)
    parts = plan_parts(source, config)
    weights = {name: _num_weights(source, name) for name in config.modules}
    run = CheckpointWriter(
        out,
        _fingerprint(source, settings),
        [part.outputs for part in parts],
        settings.max_shard_bytes,
        resume,
        overwrite,
    )
    with run as writer:
        start(sum(weights.values()))
        worker = _Worker(source, config, settings, writer, parts)
        for index in worker.order():
            if not writer.has_part(index):
                worker.make(index, lambda name: progress(name, weights[name]))
            else:
                for name in parts[index].modules:
                    progress(name, weights[name])
        report = _report(source, settings, config, writer.reports(), writer.shards)
        copied = [source.folder / name for name in COPIED_NAMES if (source.folder / name).is_file()]
        writer.finish(
            {
                "README.md": model_card(source.folder, report).encode(),
                "report.json": (json.dumps(report, indent=2) + "\n").encode(),
                "config.json": (json.dumps(_model_config(source, config), indent=2) + "\n").encode(),
            },
            copied,
        )
    return report


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


class _Worker:
    """Makes parts; keeps the calibration batch on its way through the layers."""

    def __init__(
        self,
        source: ModelSource,
        config: CheckpointConfig,
        settings: Settings,
        writer: CheckpointWriter,
        parts: list[Part],
    ) -> None:
        self.source, self.config, self.settings, self.writer, self.parts = (
            source,
            config,
            settings,
            writer,
            parts,
        )
        self._forward: LayerwiseForward | None = None
        self._prepared: tuple[HessianSum, tuple, RotatedHessian] | None = None
        self._passed = 0  # layers that the calibration batch has passed

    def order(self) -> Iterator[int]:
        """Yield the numbers of the parts; what needs the hidden states behind the last layer comes last."""
        outside = [index for index, part in enumerate(self.parts) if part.layer is None]
        yield from (index for index in outside if self.source.head_name not in self.parts[index].modules)
        yield from (index for index, part in enumerate(self.parts) if part.layer is not None)
        yield from (index for index in outside if self.source.head_name in self.parts[index].modules)

    def make(self, index: int, progress: Callable[[str], None]) -> None:
        """Quantize and store one part."""
        part = self.parts[index]
        tensors: dict[str, torch.Tensor] = {}
        for name in part.copied:
            tensors[name] = self.source.read_stored(name)
        report: dict = {}
        if self.settings.calibration is not None and part.layer is not None:
            self._pass_layers(part.layer)
            with self._forward.loaded(part.layer) as module:
                sums = self._forward.collect(part.layer, part.modules)
                by_input: dict[int, list[str]] = {}
                for name in part.modules:
                    by_input.setdefault(id(sums.get(name)), []).append(name)
                for name in (name for names in by_input.values() for name in names):
                    linear = module.get_submodule(
                        name.removeprefix(f"{self.source.layers_name}.{part.layer}.")
                    )
                    restored = self._quantize(name, sums.get(name), tensors, report, restore=True)
                    linear.weight.data = restored.to(self._forward.dtype)
                    progress(name)
                del sums
                self._prepared = None
                self._forward.advance(part.layer)
            self._passed = part.layer + 1
        else:
            for name in part.modules:
                total = None
                if self.settings.calibration is not None and name == self.source.head_name:
                    self._pass_layers(len(self.source.layers))
                    total = self._forward.collect_head()
                self._quantize(name, total, tensors, report)
                progress(name)
        self.writer.write_part(index, tensors, report)

    def _quantize(
        self, name: str, total: HessianSum | None, tensors: dict, report: dict, restore: bool = False
    ) -> torch.Tensor | None:
        """Quantize one module into ``tensors`` and ``report``; return the weight it stands for, if asked."""
        spec = self.config.modules[name]
        weight = self.source.read(self.source.weight_name(name))
        rotation = self._rotation(name)
        hessian = None if total is None else self._rotated_hessian(total, rotation)
        result = quantize_weight(weight, spec.codebook, rotation, hessian, restore)
        for kind, tensor in result.tensors.items():
            tensors[f"{name}.{kind}"] = tensor
        report[name] = {
            "codebook": str(spec.codebook),
            "out_features": weight.shape[0],
            "in_features": weight.shape[1],
            "bits_per_weight": spec.codebook.bits_per_weight(weight.shape[1]),
            "weight_snr_db": round(result.weight_snr_db, 3),
            "output_snr_db": None if result.output_snr_db is None else round(result.output_snr_db, 3),
        }
        return result.dequantized

    def _rotated_hessian(self, total: HessianSum, rotation: Rotation) -> RotatedHessian:
        """Prepare a Hessian once for linears in a row that share their input (and then their rotation)."""
        key = () if rotation is None else (rotation.blocks, *rotation.factors)
        if self._prepared is None or self._prepared[0] is not total or self._prepared[1] != key:
            self._prepared = (total, key, RotatedHessian.of(total.mean(), rotation))
        return self._prepared[2]

    def _rotation(self, name: str) -> Rotation | None:
        spec = self.config.modules[name]
        in_features = self.source.weight_shape(name)[1]
        if not spec.rotation_blocks:
            return None
        factors = self.config.rotation_factors[in_features // spec.rotation_blocks]
        return Rotation(self.config.rotation_seed, in_features, spec.rotation_blocks, factors)

    def _pass_layers(self, stop: int) -> None:
        """Bring the calibration batch to layer ``stop``, through layers that an interrupted run has already
        quantized.
        """
        if self._forward is None:
            tokens = calibration_tokens(
                self.source.folder,
                self.settings.calibration,
                self.settings.calibration_sequences,
                self.settings.calibration_length,
            )
            self._forward = LayerwiseForward(self.source, tokens)
        for layer in range(self._passed, stop):
            index, part = next((i, part) for i, part in enumerate(self.parts) if part.layer == layer)
            stored = self.writer.read_part(index)
            with self._forward.loaded(layer) as module:
                for name in part.modules:
                    local = name.removeprefix(f"{self.source.layers_name}.{layer}.")
                    tensors = {
                        key.removeprefix(f"{name}."): tensor
                        for key, tensor in stored.items()
                        if key.startswith(f"{name}.")
                    }
                    codebook, in_features = (
                        self.config.modules[name].codebook,
                        self.source.weight_shape(name)[1],
                    )
                    dtype = self.source.weight_dtype(name)
                    restored = dequantize_weight(tensors, codebook, in_features, self._rotation(name), dtype)
                    module.get_submodule(local).weight.data = restored.to(self._forward.dtype)
                self._forward.advance(layer)
        self._passed = max(self._passed, stop)


def _num_weights(source: ModelSource, module: str) -> int:
    out_features, in_features = source.weight_shape(module)
    return out_features * in_features


def _fingerprint(source: ModelSource, settings: Settings) -> dict:
    """Everything that decides the bytes, so that a run is only continued as it was begun."""
    import transformers

    fields = {key: str(value) for key, value in vars(settings).items()}
    if settings.calibration is not None:
        tokens = calibration_tokens(
            source.folder,
            settings.calibration,
            settings.calibration_sequences,
            settings.calibration_length,
        )
        fields["calibration"] = tokens_digest(tokens)
        fields["threads"] = str(torch.get_num_threads())  # the order of additions in the forward pass
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"format_version": FORMAT_VERSION, "model": source.fingerprint(), **fields, **versions}


def _model_config(source: ModelSource, config: CheckpointConfig) -> dict:
    """Return config.json of the checkpoint."""
    model_config = dict(source.config)
    if source.head_name in config.modules or source.embedding_name in config.modules:
        model_config["tie_word_embeddings"] = False
    model_config["quantization_config"] = config.to_dict()
    return model_config


def _report(
    source: ModelSource, settings: Settings, config: CheckpointConfig, reports: list[dict], shards: list[dict]
) -> dict:
    """Gather what the parts reported; no times in it, so that it is the same after an interruption."""
    modules = {name: entry for report in reports for name, entry in report.items()}
    modules = {name: modules[name] for name in config.modules}
    outside = {source.head_name, source.embedding_name}
    sizes = {name: entry["out_features"] * entry["in_features"] for name, entry in modules.items()}
    bits = {name: entry["bits_per_weight"] * sizes[name] for name, entry in modules.items()}
    inner = [name for name in modules if name not in outside]
    stored = sum(tensor_bytes(*tensor) for shard in shards for tensor in shard.values())
    return {
        "base_model": source.folder.resolve().name,
        "codebook": str(settings.codebook),
        "activation": settings.activation,
        "calibration_tokens": settings.calibration_sequences * settings.calibration_length
        if settings.calibration is not None
        else 0,
        "bits_per_weight": sum(bits[name] for name in inner) / max(1, sum(sizes[name] for name in inner)),
        "bits_per_weight_with_head": sum(bits.values()) / sum(sizes.values()),
        "size_bytes_base": source.num_bytes,
        "size_bytes_quantized": stored,
        "modules": modules,
    }
