# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of this project for the comparison, made by `pvq quantize`."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from offline_quant.quantize_checkpoint import program_digest

from .protocol import Protocol

ROOT = Path(__file__).resolve().parents[2]


def commit() -> str:
    """Return the commit of the working tree, with a + when the sources of the quantizer differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    status = [*git, "status", "--porcelain", "--", "offline_quant", "pvq_vllm", "csrc"]
    return head + "+" * bool(subprocess.run(status, capture_output=True, text=True).stdout.strip())


def quantized(protocol: Protocol, arguments: tuple[str, ...], calibrate: bool = True) -> tuple[Path, dict]:
    """Return the checkpoint that `pvq quantize` makes with ``arguments`` and its report.

    One of the same program and arguments is used again, so that rows which differ only in the activations share
    their weights, and one that was interrupted is continued.

    Raises:
        RuntimeError: the command failed; with its last line.
    """
    command = [sys.executable, "-m", "pvq_vllm.cli", "quantize", str(protocol.model)]
    options = [
        "--rotation",
        "online",
        "--lm-head",
        "16",
        "--threads",
        str(torch.get_num_threads()),
        "--device",
        protocol.device,
        "--no-evaluate",
    ]
    if calibrate:
        options += ["--calibration", str(protocol.calibration_text)]
        options += ["--calibration-sequences", str(protocol.calibration_sequences)]
        options += ["--calibration-length", str(protocol.length)]
    options += arguments  # last: an option that is given twice has its last value
    digest = hashlib.sha256(json.dumps([program_digest(), *options]).encode()).hexdigest()[:12]
    out = protocol.folder / "checkpoints" / digest
    if not out.exists():
        out.parent.mkdir(exist_ok=True)
        begun = out.with_name(f"{out.name}.partial").exists()
        command = [*command, str(out), *options, *(["--resume"] if begun else [])]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip().splitlines()[-1]}")
    return out, json.loads((out / "report.json").read_text())


def with_activation(checkpoint: Path, out: Path, activation: str) -> None:
    """Write a checkpoint with the same weights (as links) and another activation mode."""
    out.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.suffix == ".safetensors":
            os.symlink(path.resolve(), out / path.name)
        elif path.is_file():
            shutil.copyfile(path, out / path.name)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["activation"] = activation
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
