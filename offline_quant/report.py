# SPDX-License-Identifier: Apache-2.0
"""report.json of a run: what was made of every module. Times are apart, in timings.json, since a run that was
interrupted writes the same report as one that was not.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from pvq_vllm.codec.format import CheckpointConfig

from .command_line import command_line
from .model_source import ModelSource
from .part_worker import Part
from .plan import Settings
from .whole_files import tensor_bytes

# What the writer keeps beside the parts, by the beginning of its name, and the phase in which it is made.
PHASES = {"tokens": "sampling", "gradients": "gradients", "losses": "sensitivities", "tuned": "tuning"}


def make_report(
    source: ModelSource,
    settings: Settings,
    config: CheckpointConfig,
    reports: list[dict],
    shards: list[dict],
    predicted_kl: float | None = None,
) -> dict:
    """Return the content of report.json.

    Args:
        predicted_kl: what the allocation of rates expects, None without one.
        reports: of all parts, see ``PartWorker.make``.
        shards: tensors of the checkpoint, name -> (dtype, shape).
    """
    entries = {name: entry for report in reports for name, entry in report["modules"].items()}
    modules = {
        name: {key: value for key, value in entries[name].items() if key != "seconds"}
        for name in config.modules
    }
    outside = {source.head_name, source.embedding_name}
    sizes = {name: entry["out_features"] * entry["in_features"] for name, entry in modules.items()}
    bits = {name: entry["bits_per_weight"] * sizes[name] for name, entry in modules.items()}
    inner = [name for name in modules if name not in outside]
    left, left_bits = source.left_as_is(modules)
    books = Counter(
        modules[name]["codebook"] for name in sorted(inner, key=lambda name: bits[name] / sizes[name])
    )
    # They decide the order of additions in the forward pass.
    threads = None if settings.calibration is None else torch.get_num_threads()
    stored = sum(tensor_bytes(*tensor) for shard in shards for tensor in shard.values())
    return {
        "base_model": model_name(source.folder),
        "command": command_line(model_name(source.folder), settings, threads),
        "codebook": ", ".join(f"{book} ({count})" for book, count in books.items())
        if len(books) > 1
        else str(config.codebook),
        "target_bpw": settings.target_bpw,
        "predicted_kl_divergence": predicted_kl,
        "rotation": settings.rotation,
        "activation": settings.activation,
        "calibration_tokens": settings.calibration_sequences * settings.calibration_length
        if settings.calibration is not None
        else 0,
        "bits_per_weight": (sum(bits[name] for name in inner) + left_bits)
        / max(1, sum(sizes[name] for name in inner) + left),
        "bits_per_weight_with_head": (sum(bits.values()) + left_bits) / (sum(sizes.values()) + left),
        "unquantized_share": left / max(1, sum(sizes[name] for name in inner) + left),
        "size_bytes_base": source.num_bytes,
        "size_bytes_quantized": stored,
        "modules": modules,
    }


def model_name(folder: Path) -> str:
    """Return the name of the folder, or of the model if it is a snapshot in a Hugging Face cache."""
    folder = folder.absolute()
    cached = folder.parent.parent.name
    if folder.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/", 1)
    return folder.resolve().name


def timings(reports: list[dict], kept: Mapping[str, float]) -> dict:
    """Return the content of timings.json: ``seconds`` of everything, of every phase, and of every module (its
    quantization alone, without the forward pass and the Hessians).

    Args:
        reports: of all parts; kept: of what the writer keeps beside them, see ``CheckpointWriter.seconds``.
    """
    modules = {
        name: round(entry["seconds"], 3) for report in reports for name, entry in report["modules"].items()
    }
    phases: dict[str, float] = {}
    for name, seconds in kept.items():
        phase = PHASES[name.partition("-")[0]]
        phases[phase] = phases.get(phase, 0.0) + seconds
    phases["parts"] = sum(report["seconds"] for report in reports)
    return {
        "seconds": round(sum(phases.values()), 3),
        "phases": {
            phase: round(phases[phase], 3) for phase in (*PHASES.values(), "parts") if phase in phases
        },
        "modules": modules,
    }


def layer_reports(parts: list[Part], reports: list[dict]) -> list[dict]:
    """Return for every decoder layer in order what the page shows of it, see ``report_page``."""
    pairs = [(part, report) for part, report in zip(parts, reports, strict=True) if part.layer is not None]
    return [
        {
            "modules": part.modules,
            "group_power": report["group_power"],
            "seconds": report["seconds"],
        }
        for part, report in sorted(pairs, key=lambda pair: pair[0].layer)
    ]
