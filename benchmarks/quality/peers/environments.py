# SPDX-License-Identifier: Apache-2.0
"""Environments of the other quantizers, and how a job is run in one.

    python -m benchmarks.quality.peers.environments build/quality/peers [NAME ...]

makes them with pip, which must find torch's CPU build (README.md, "Installing").
"""

import json
import os
import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"
PACKAGES = {
    "llmcompressor": ("llmcompressor==0.14.0.1",),
    "autoround": ("auto-round==0.16.1", "bitsandbytes==0.50.2"),
    "ggml": ("xllamacpp==2026.10.11549", "gguf==0.19.0", "transformers==5.23.0"),
}


class MissingEnvironment(Exception):
    """The environment of a peer was not made."""


def make(folder: Path, names: list[str]) -> None:
    """Make one virtual environment for each name; torch first, so that no other build of it comes."""
    for name in names or PACKAGES:
        environment = folder / name
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        pip = [environment / "bin" / "python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, TORCH, "numpy"], check=True)
        subprocess.run([*pip, TORCH, *PACKAGES[name]], check=True)


def run_job(folder: Path, name: str, script: str, job: dict, work: Path) -> tuple[Path, dict]:
    """Run ``script`` of this folder with the environment ``name``.

    Returns:
        The safetensors file it wrote, and its answer (exchange.py).
    Raises:
        MissingEnvironment, or subprocess.CalledProcessError with the log's path in its message.
    """
    python = folder / name / "bin" / "python"
    if not python.exists():
        raise MissingEnvironment(
            f"{python} is missing: python -m benchmarks.quality.peers.environments {folder} {name}"
        )
    work.mkdir(parents=True, exist_ok=True)
    out = work / "answer.safetensors"
    job_file = work / "job.json"
    job_file.write_text(json.dumps({**job, "out": str(out)}))
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(job["threads"])}
    environment = {**os.environ, **fixed}
    with open(work / "log.txt", "wb") as log:
        process = subprocess.run(
            [python, Path(__file__).parent / script, job_file],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    if process.returncode:
        tail = (work / "log.txt").read_text(errors="replace").splitlines()[-3:]
        raise RuntimeError(f"{script} failed, see {work / 'log.txt'}: " + " / ".join(tail))
    return out, json.loads(out.with_suffix(".json").read_text())


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    make(Path(sys.argv[1]), sys.argv[2:])
