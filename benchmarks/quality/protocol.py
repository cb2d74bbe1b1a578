# SPDX-License-Identifier: Apache-2.0
"""What is the same for every row: the model, the calibration tokens, the evaluation and its reference."""

import hashlib
import json
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file

from offline_quant.calibration_data import calibration_tokens, tokenize
from offline_quant.evaluate import compare_logits, load_model, mean_and_interval
from offline_quant.model_source import ModelSource


@dataclass(frozen=True)
class Protocol:
    """``folder`` keeps everything that belongs to one model and one choice of texts. ``device`` and ``dtype``
    are those of the forward pass.
    """

    model: Path
    calibration_text: Path
    evaluation_text: Path
    out: Path
    calibration_sequences: int = 24
    evaluation_sequences: int = 10
    length: int = 1024
    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16

    @cached_property
    def source(self) -> ModelSource:
        return ModelSource.open(self.model)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the model, the texts and their numbers of tokens; a row with another one is not reused."""
        parts = {**self.setting, "model": self.source.fingerprint()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def setting(self) -> dict:
        """What the rows of one table share: hashes of the model's configuration (weights differ by rounding between
        machines that re-base it) and of both texts, numbers of sequences and tokens.
        """
        config = {key: value for key, value in self.source.config.items() if key != "transformers_version"}
        return {
            "model": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
            "texts": [
                hashlib.sha256(path.read_bytes()).hexdigest()
                for path in (self.calibration_text, self.evaluation_text)
            ],
            "tokens": [self.calibration_sequences, self.evaluation_sequences, self.length],
        }

    @cached_property
    def folder(self) -> Path:
        folder = self.out / f"{self.model.resolve().name}-{self.fingerprint}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @cached_property
    def calibration(self) -> torch.Tensor:
        """int64 [sequences, length], the windows that `pvq quantize` takes from the same text."""
        return calibration_tokens(self.model, self.calibration_text, self.calibration_sequences, self.length)

    @cached_property
    def calibration_file(self) -> Path:
        """The calibration tokens as a file, tensor "tokens", for programs of other environments."""
        path = self.folder / "calibration.safetensors"
        if not path.exists():
            save_file({"tokens": self.calibration}, path)
        return path

    @cached_property
    def evaluation(self) -> torch.Tensor:
        ids = tokenize(self.model, self.evaluation_text)
        if len(ids) < self.evaluation_sequences * self.length:
            raise ValueError(f"{self.evaluation_text} has only {len(ids)} tokens")
        return ids[: self.evaluation_sequences * self.length].view(-1, self.length)

    def evaluate(self, folder: Path) -> dict:
        """Evaluate a dense folder or a PVQ checkpoint as `pvq eval` does, with the reference's logits kept.

        Returns:
            perplexity, kl_divergence and top1_agreement with intervals, and the dtype of the forward pass.
        """
        reference = torch.load(self._reference(), mmap=True)
        samples = [
            compare_logits(logits, expected.to(self.device), sequence.to(self.device))
            for logits, expected, sequence in zip(
                self._logits(folder), reference, self.evaluation, strict=True
            )
        ]
        mean, interval = mean_and_interval([sample["loss"] for sample in samples])
        reference_loss, _ = mean_and_interval([sample["loss_reference"] for sample in samples])
        result = {
            "perplexity": math.exp(mean),
            "perplexity_ci95": interval and [math.exp(bound) for bound in interval],
            "perplexity_reference": math.exp(reference_loss),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        for key in ("kl_divergence", "top1_agreement"):
            result[key], result[f"{key}_ci95"] = mean_and_interval([sample[key] for sample in samples])
        return result

    def _reference(self) -> Path:
        # Another number of threads adds in another order, which in bfloat16 is a KL divergence of 0.002.
        kind = f"{self.device}{torch.get_num_threads()}_{str(self.dtype).removeprefix('torch.')}"
        path = self.folder / f"reference_logits_{kind}.pt"
        if not path.exists():
            partial = path.with_suffix(f".{os.getpid()}")
            torch.save(torch.stack([logits.cpu() for logits in self._logits(self.model)]), partial)
            partial.rename(path)
        return path

    def _logits(self, folder: Path):
        model = load_model(folder, self.dtype, self.device)
        with torch.inference_mode():
            for sequence in self.evaluation:
                yield model(input_ids=sequence[None].to(self.device), use_cache=False).logits[0]
