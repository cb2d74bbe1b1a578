# SPDX-License-Identifier: Apache-2.0
"""`pvq eval`: how far a model is from its reference on a text, in perplexity, KL divergence and top-1
agreement.

Every sequence of the text is one sample. The means are taken over sequences of equal length, and their 95%
confidence intervals come from Student's t over the sequences, because the tokens of one sequence are not
independent:

    kl_divergence  = mean over positions of sum_v p_ref(v) log(p_ref(v) / p(v))         (natural logarithm)
    top1_agreement = share of positions where both models put the same token first
    perplexity     = exp(mean negative log-likelihood of the next token)
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import check_checkpoint, read_json

from .calibration import forward_dtype
from .calibration_data import check_vocabulary, tokenize
from .memory import check_memory
from .model_source import ModelSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SEQUENCES, LENGTH = 10, 1024  # that are measured on
COMPARED = 128  # positions at a time: a vocabulary of 150,000 in float32 for all of them would be 600 MB

# 97.5% quantiles of Student's t for 1 ... 30 degrees of freedom.
STUDENT_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def evaluation_text() -> Path:
    """Return the path of the evaluation text that ships with the project."""
    return Path(__file__).parent / "data" / "evaluation.txt"


def mean_and_interval(samples: list[float]) -> tuple[float, list[float] | None]:
    """Return the mean and its 95% confidence interval [low, high]; None for a single sample."""
    count = len(samples)
    mean = sum(samples) / count
    if count == 1:
        return mean, None
    deviation = math.sqrt(sum((sample - mean) ** 2 for sample in samples) / (count - 1))
    quantile = STUDENT_T[count - 2] if count - 2 < len(STUDENT_T) else 1.96
    half = quantile * deviation / math.sqrt(count)
    return mean, [mean - half, mean + half]


def compare_logits(
    logits: torch.Tensor, reference: torch.Tensor, token_ids: torch.Tensor
) -> dict[str, float]:
    """Compare the logits of two models for one sequence.

    Args:
        logits, reference: [length, vocabulary], any float dtype.
        token_ids: int64 [length].
    Returns:
        Means over the sequence: ``kl_divergence``, ``top1_agreement``, ``loss``, ``loss_reference``.
    Raises:
        PVQError: a logit is NaN.
    """
    for name, values in (("the model", logits), ("its reference", reference)):
        if values.isnan().any():
            raise PVQError(
                f"{name} answers with logits that are not numbers: try --dtype float32; if they stay, its weights are damaged "
                "(copy the folder again) or this is a fault of the kernels (report it with the output of pvq inspect)"
            )
    sums = dict.fromkeys(("kl_divergence", "top1_agreement", "loss", "loss_reference"), 0.0)
    length = len(token_ids)
    for start in range(0, length, COMPARED):
        rows = slice(start, min(start + COMPARED, length))
        log_p, log_r = logits[rows].float().log_softmax(-1), reference[rows].float().log_softmax(-1)
        sums["kl_divergence"] += (log_r.exp() * (log_r - log_p)).sum(dtype=torch.float64).item()
        sums["top1_agreement"] += (log_p.argmax(-1) == log_r.argmax(-1)).sum().item()
        following = token_ids[start + 1 : rows.stop + 1, None]
        sums["loss"] -= log_p[: len(following)].gather(1, following).sum(dtype=torch.float64).item()
        sums["loss_reference"] -= log_r[: len(following)].gather(1, following).sum(dtype=torch.float64).item()
    predicted = {"loss": length - 1, "loss_reference": length - 1}
    return {key: value / predicted.get(key, length) for key, value in sums.items()}


def check_evaluation_memory(source: ModelSource, device: str, instead: str) -> None:
    """Raise PVQError unless two such models and the logits of a sequence of both fit into the free memory of ``device``.

    Args:
        instead: the way out, for the sentence.
    """
    if device == "cuda":
        torch.cuda.empty_cache()  # what a run before has given back counts as used until then
    vocabulary = source.weight_shape(source.embedding_name)[0]
    logits = vocabulary * (2 * forward_dtype(device).itemsize * LENGTH + 6 * 4 * COMPARED)
    check_memory(source, device, 2, logits, "measuring", instead)


def longest_sequence(source: ModelSource) -> int:
    """Return how many tokens of a sequence to measure on: as many as the model has positions for, at most ``LENGTH``."""
    return min(LENGTH, _positions(source.skeleton.config))


def _positions(config: "PretrainedConfig") -> float:
    """Return how many positions a model of this configuration has; infinity if it does not say."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 1 else math.inf


def _check_folder(folder: Path) -> None:
    """Raise PVQError unless ``folder`` holds a model that can be loaded."""
    if not folder.is_dir():
        raise PVQError(f"{folder} is not a folder: give the path of a local Hugging Face model")
    quantization = read_json(folder / "config.json", "model folder").get("quantization_config") or {}
    if quantization.get("quant_method") == "pvq":
        import pvq_vllm.hf_quantizer  # noqa: F401  registers the quantization method

        check_checkpoint(folder)
    else:
        ModelSource.open(folder)


def _load(folder: Path, dtype: torch.dtype, device: str, **arguments) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Onto the device at once: the weights of a PVQ checkpoint are packed for the device that they are loaded on.
    if device != "cpu":
        arguments["device_map"] = {"": device}
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, **arguments
    ).eval()


def load_model(
    folder: str | os.PathLike, dtype: torch.dtype, device: str = "cpu", activation: str | None = None
) -> torch.nn.Module:
    """Load a Hugging Face folder, quantized with PVQ or not, for inference on ``device``.

    ``activation``: a mode in place of the checkpoint's, a8, a16 or pvq:D,K.

    Raises:
        PVQError: the folder is missing, damaged, or of a model type that transformers does not know; a mode is
            unknown, or given for a model that is not quantized with PVQ.
    """
    from transformers import AutoConfig

    folder = Path(folder)
    _check_folder(folder)
    if activation is None:
        return _load(folder, dtype, device)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    settings = getattr(config, "quantization_config", None) or {}
    if settings.get("quant_method") != "pvq":
        raise PVQError(f"{folder} is not quantized with PVQ, so its activations have no mode {activation}")
    settings["activation"] = activation
    return _load(folder, dtype, device, config=config)


def evaluate(
    model: str | os.PathLike,
    reference: str | os.PathLike,
    text_file: str | os.PathLike,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda done: None,
    device: str = "cpu",
) -> dict:
    """Compare ``model`` with ``reference`` on the first ``sequences`` x ``length`` tokens of a text.

    Returns:
        ``perplexity``, ``perplexity_reference``, ``kl_divergence``, ``top1_agreement``, each also with
        ``_ci95`` ([low, high], None for one sequence), ``sequences``, ``length``, ``dtype``, ``device``.
    Raises:
        PVQError: a folder or the text cannot be used; the sentence names it.
    """
    from transformers import AutoConfig

    if sequences < 1 or length < 2:
        raise PVQError(f"--sequences {sequences} and --length {length} must be at least 1 and 2")
    folders = [Path(model), Path(reference)]
    ids = tokenize(folders[1], text_file)
    if len(ids) < sequences * length:
        raise PVQError(
            f"{text_file} has {len(ids):,} tokens, fewer than {sequences} x {length}: use a longer "
            "text, or lower "
            "--sequences or --length"
        )
    ids = ids[: sequences * length]
    # All that can be wrong before either model is loaded: that takes minutes where they are large.
    for folder in folders:
        _check_folder(folder)
    config = AutoConfig.from_pretrained(folders[1], local_files_only=True)
    check_vocabulary(ids, folders[1], config.get_text_config().vocab_size)
    if length > _positions(config):
        raise PVQError(f"--length is {length}, but {reference} has {_positions(config)} positions: lower it")
    dtype = dtype or forward_dtype(device)
    models = [_load(folder, dtype, device) for folder in folders]
    samples = []
    with torch.inference_mode():
        for index, sequence in enumerate(ids.to(device).split(length)):
            logits, expected = (one(input_ids=sequence[None], use_cache=False).logits[0] for one in models)
            if logits.shape != expected.shape:
                raise PVQError(
                    f"{model} and {reference} have different vocabularies: give the base of the "
                    "quantized model"
                )
            samples.append(compare_logits(logits, expected, sequence))
            progress(index + 1)
    result: dict = {}
    for key, source in (("perplexity", "loss"), ("perplexity_reference", "loss_reference")):
        mean, interval = mean_and_interval([sample[source] for sample in samples])
        result[key] = math.exp(mean)
        result[f"{key}_ci95"] = None if interval is None else [math.exp(bound) for bound in interval]
    for key in ("kl_divergence", "top1_agreement"):
        result[key], result[f"{key}_ci95"] = mean_and_interval([sample[key] for sample in samples])
    used = {"dtype": str(dtype).removeprefix("torch."), "device": device}
    return {**result, "sequences": sequences, "length": length, **used}
