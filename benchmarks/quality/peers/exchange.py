# SPDX-License-Identifier: Apache-2.0
"""What the programs in this folder share: they run in environments of their own, with a job as a JSON file.

The job names the model folder, the file of calibration tokens, the file to write and the method's options. The
answer is a safetensors file with every tensor that the method changed, dequantized, under the names of the
model, and beside it a JSON file with the bits that it stores for the linear layers.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def read_job() -> dict:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    return job


def calibration_tokens(job: dict) -> torch.Tensor:
    """int64 [sequences, length]"""
    return load_file(job["calibration"])["tokens"]


def load_model(job: dict, dtype: torch.dtype = torch.float32):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, local_files_only=True)
    return model.to(job["device"]).eval()


def decoder_linears(model) -> dict[str, torch.nn.Linear]:
    """Every linear module in the decoder layers, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }


def write_answer(
    job: dict, tensors: dict[str, torch.Tensor], stored_bits: dict[str, float], **details
) -> None:
    """``stored_bits`` is the number of bits that is stored for each module, by the module's name."""
    weights = {name: tensors[f"{name}.weight"].numel() for name in stored_bits}
    answer = {
        "bits_per_weight": sum(stored_bits.values()) / sum(weights.values()),
        "modules": len(stored_bits),
        "details": details,
    }
    save_file(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, job["out"]
    )
    Path(job["out"]).with_suffix(".json").write_text(json.dumps(answer))
