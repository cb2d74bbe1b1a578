# SPDX-License-Identifier: Apache-2.0
"""`pvq quantize`: from a Hugging Face folder to a PVQ checkpoint, one decoder layer in memory at a time.

What is quantized how follows from the settings (``plan``), or from measured sensitivities when an average rate
is asked for (``rate_allocation``); ``part_worker`` does the work, ``checkpoint_writer`` keeps it.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from pvq_vllm import ops
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import FORMAT_VERSION, CheckpointConfig, Codebook

from .calibration import forward_dtype
from .calibration_data import SELF, calibration_tokens, tokens_digest
from .checkpoint_writer import CheckpointWriter, check_apart, check_destination
from .gradients import OutputGradients, output_gradients
from .model_card import model_card
from .model_source import ModelSource
from .part_worker import PartWorker, plan_parts
from .plan import Settings, plan_checkpoint
from .rate_plan import choose_rates, module_bits, rate_candidates, with_codebooks
from .report import layer_reports, make_report, timings
from .report_page import report_page
from .residual_rotation import rotated_source
from .self_calibration import check_sampling_memory, sample_tokens
from .sensitivity import measure_losses
from .tuning import check_tuning_memory, tuned_tensors

# Files of the source folder that belong to the checkpoint as they are.
COPIED_NAMES = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md",
)  # fmt: skip

# Called with the name of a module that is done and how many weights it has.
Progress = Callable[[str, int], None]


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
    if out.name in ("", ".."):
        out = out.resolve()
    check_apart(Path(model), out)
    if not resume:
        check_destination(out, overwrite)
    source, rotation = rotated_source(
        ModelSource.open(model), settings.rotation, settings.seed, settings.device
    )
    settings = replace(settings, rotation=rotation)
    if source.head_name is None:  # nothing to take gradients of
        if settings.target_bpw is not None:
            raise PVQError(f"{source.folder}: the model has no head, so no rates can be chosen: give --bits")
        if settings.tune_epochs:
            raise PVQError(
                f"{source.folder}: the model has no head to tune its output: leave out --tune-epochs"
            )
        settings = replace(settings, token_weights="uniform")
    if settings.calibration == SELF and not resume:
        check_sampling_memory(source, settings.device)
    if settings.tune_epochs and not resume:
        check_tuning_memory(
            source, settings.device, settings.calibration_sequences, settings.calibration_length
        )
    config = plan_checkpoint(source, settings)
    weights = {name: math.prod(source.weight_shape(name)) for name in config.modules}
    candidates = {}
    if settings.target_bpw is not None:
        candidates = rate_candidates(source, config, settings)
        config = with_codebooks(config, _smallest(source, candidates))  # until the sensitivities are known
    parts = plan_parts(source, config)
    data = _CalibrationData(source, settings, progress)
    run = CheckpointWriter(
        out,
        _fingerprint(source, settings, data),
        [part.outputs for part in parts],
        settings.max_shard_bytes,
        resume,
        overwrite,
    )
    with run as writer:
        start(sum(weights.values()))
        if writer.is_finished:
            writer.clean_up()
            progress(out.name, sum(weights.values()))
            return json.loads((out / "report.json").read_text(encoding="utf-8"))
        predicted = None
        if candidates:
            tell = partial(progress, weights=0)
            given = data.tokens(writer), data.gradients(writer).outputs, data.token_weights(writer)
            losses = measure_losses(source, config, settings, candidates, *given, writer, tell)
            chosen = choose_rates(source, candidates, losses, settings.target_bpw)
            config = with_codebooks(config, chosen)
            parts = plan_parts(source, config)
            writer.plan_again([part.outputs for part in parts])
            predicted = math.fsum(losses[name][str(chosen[name])] for name in losses)
        given = partial(data.tokens, writer), partial(data.token_weights, writer)
        worker = PartWorker(source, config, settings, writer, parts, *given)
        for index in worker.order():
            if not writer.has_part(index):
                worker.make(index, lambda name: progress(name, weights[name]))
            else:
                for name in parts[index].modules:
                    progress(name, weights[name])
        if settings.tune_epochs and not writer.is_merging:
            tell = partial(progress, weights=0)
            _tune(source, config, settings, worker, data.tokens(writer), tell)
        reports = writer.reports()
        report = make_report(source, settings, config, reports, writer.shards, predicted)
        times = timings(reports, writer.seconds())
        copied = [source.folder / name for name in COPIED_NAMES if (source.folder / name).is_file()]
        writer.finish(
            {
                "README.md": model_card(source.folder, report).encode(),
                "report.json": _json(report),
                "timings.json": _json(times),
                "report.html": report_page(report, times, layer_reports(parts, reports)).encode(),
                "config.json": _json(_model_config(source, config)),
            },
            copied,
        )
    return report


def _tune(
    source: ModelSource,
    config: CheckpointConfig,
    settings: Settings,
    worker: PartWorker,
    tokens: torch.Tensor,
    progress: Callable[[str], None],
) -> None:
    """Tune scales and norms and put them into the parts; what was tuned is kept, so that it is done once.

    The error of the weights is reported anew. That of the outputs is not known any more, since Hessians are not kept.
    """
    worker.release()
    given = tokens, settings.tune_epochs, settings.seed, settings.device, progress
    tuned = worker.writer.kept_tensors(
        "tuned", lambda: tuned_tensors(source, config, worker.restored_weight, *given)
    )
    reports = worker.writer.reports()
    for index, part in enumerate(worker.parts):
        changed = {name: tensor for name, tensor in tuned.items() if name in part.outputs}
        if changed:
            tensors = {**worker.writer.read_part(index), **changed}
            for name, entry in reports[index]["modules"].items():
                if f"{name}.weight_scale" in changed:
                    snr = round(worker.weight_snr(name, tensors), 3)
                    entry.update(weight_snr_db=snr, output_snr_db=None)
            worker.writer.write_part(index, tensors, reports[index])


class _CalibrationData:
    """The calibration tokens of a run and the gradients on them. Gradients are measured, and tokens that the model
    writes itself are drawn, when they are needed first; the writer keeps both for the case that the run is interrupted,
    and gradients, which are large, are in memory only as long as the caller holds them.
    """

    def __init__(self, source: ModelSource, settings: Settings, progress: Progress) -> None:
        self._source, self._settings, self._progress = source, settings, progress
        self._size = settings.calibration_sequences, settings.calibration_length
        self._tokens: torch.Tensor | None = None
        if settings.calibration not in (None, SELF):
            vocabulary = source.skeleton.get_input_embeddings().weight.shape[0]
            self._tokens = calibration_tokens(source.folder, settings.calibration, *self._size, vocabulary)

    def digest(self) -> str | None:
        """Return what tells these tokens from others, as far as the settings do not."""
        if self._tokens is None:
            return self._settings.calibration
        return tokens_digest(self._tokens)

    def tokens(self, writer: CheckpointWriter) -> torch.Tensor:
        """Return int64 [sequences, length]."""
        if self._tokens is None:
            self._tokens = writer.kept_tensors("tokens", self._sample)["tokens"]
        return self._tokens

    def gradients(self, writer: CheckpointWriter) -> OutputGradients:
        """Return the gradients on these tokens."""
        tokens = self.tokens(writer)
        stored = writer.kept_tensors("gradients", lambda: self._measure(tokens).to_tensors())
        return OutputGradients.from_tensors(stored)

    def token_weights(self, writer: CheckpointWriter) -> dict[str, torch.Tensor]:
        """Return the weights of the tokens as the settings want them."""
        if self._settings.token_weights == "uniform":
            return {}
        return self.gradients(writer).token_weights()

    def _measure(self, tokens: torch.Tensor) -> OutputGradients:
        tell = partial(self._progress, weights=0)
        return output_gradients(self._source, tokens, self._settings.seed, self._settings.device, tell)

    def _sample(self) -> dict[str, torch.Tensor]:
        seed, device = self._settings.seed, self._settings.device
        tell = partial(self._progress, weights=0)
        return {"tokens": sample_tokens(self._source, *self._size, seed, device, tell)}


def _smallest(source: ModelSource, candidates: dict[str, list[Codebook]]) -> dict[str, Codebook]:
    return {
        name: min(books, key=lambda book: module_bits(book, source.weight_shape(name)))
        for name, books in candidates.items()
    }


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _fingerprint(source: ModelSource, settings: Settings, data: _CalibrationData) -> dict:
    """Everything that decides the bytes, so that a run is only continued as it was begun."""
    import transformers

    fields = {key: str(value) for key, value in vars(settings).items()}
    if settings.calibration is not None:
        fields["calibration"] = data.digest()
        fields["threads"] = str(torch.get_num_threads())  # the order of additions in the forward pass
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "program": program_digest(),
    }
    if settings.calibration is not None:
        versions["forward_dtype"] = str(forward_dtype(settings.device))
    if settings.device == "cuda":
        versions["gpu"] = torch.cuda.get_device_name()
    return {"format_version": FORMAT_VERSION, "model": source.fingerprint(), **fields, **versions}


def program_digest() -> str:
    """Return a hash of what decides the bytes of a checkpoint besides settings and model: this package, ``pvq_vllm``
    and the compiled module.
    """
    folders = Path(__file__).parent, Path(ops.__file__).parent
    sources = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    digest = hashlib.sha256()
    for path in (*sources, ops.compiled_module()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _model_config(source: ModelSource, config: CheckpointConfig) -> dict:
    """Return config.json of the checkpoint."""
    model_config = dict(source.config)
    if source.head_name in config.modules or source.embedding_name in config.modules:
        model_config["tie_word_embeddings"] = False
    model_config["quantization_config"] = config.to_dict()
    return model_config
