# SPDX-License-Identifier: Apache-2.0
"""Small random checkpoints generate in vLLM what they generate in transformers: eager, compiled, on two
ranks.

The two programs add in different orders, so logits differ in the last bits and, where that tips the rounding
of an activation, by a little more; of two tokens of nearly equal logits either may come first. Compared is
therefore
not the text but, for every token that vLLM chose, how far its logit in transformers is from the largest
there: 0 for most tokens. The control is the unquantized model, for which some of the same tokens must be
clearly wrong.

Every engine start costs 20 seconds and more, hence few of them, each in a process of its own.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import pvq_vllm.hf_quantizer  # noqa: F401  registers "pvq" with transformers
from offline_quant.plan import Settings
from offline_quant.quantize_checkpoint import quantize_checkpoint
from pvq_vllm.codec.format import Codebook

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROMPTS = [[(7 * i + 11 * j) % 510 + 2 for i in range(20)] for j in range(3)]
MAX_TOKENS = 12
PERPLEXITY = (
    0.0005  # relative; random models have nearly the same, and 0.0014 is what quantization alone changes
)
MARGIN = 0.05  # of the standard deviation of the logits; a wrong weight puts tokens off by 1 and more


@pytest.fixture(scope="module")
def folders(
    tiny_model_folder, checkpoint_writer, linear_codebooks, all_codebooks, tmp_path_factory
) -> dict[str, Path]:
    """Return PVQ folders by name of the base model; all can run on two ranks."""
    root = tmp_path_factory.mktemp("generate")
    mixtures = {"llama": all_codebooks, "qwen2": all_codebooks, "qwen3-tied": linear_codebooks}
    return {
        name: checkpoint_writer(tiny_model_folder(name), root / name, mixture, splits=2)
        for name, mixture in mixtures.items()
    }


def generate(tmp_path: Path, runs: list[dict], **environment: str) -> list[dict]:
    """Run generate_in_vllm.py and return its answers; fail with the end of its log."""
    request, answer = tmp_path / "request.json", tmp_path / "answer.json"
    runs = [{key: str(value) if key == "model" else value for key, value in run.items()} for run in runs]
    request.write_text(json.dumps({"prompts": PROMPTS, "max_tokens": MAX_TOKENS, "runs": runs}))
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # Shared by the engines of one test run, without compiled graphs of earlier states of this project.
        "VLLM_CACHE_ROOT": str(tmp_path.parent / "vllm_cache"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    script = Path(__file__).with_name("generate_in_vllm.py")
    result = subprocess.run(
        [sys.executable, str(script), str(request), str(answer)],
        env=os.environ | settings | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert answer.exists(), f"vLLM failed:\n{result.stdout[-6000:]}"
    return json.loads(answer.read_text())


@torch.inference_mode()
def worst_choice(model, token_ids: list[list[int]]) -> float:
    """Return by how much, in standard deviations of the logits, a chosen token misses the best one, at
    worst."""
    sequences = torch.tensor([prompt + chosen for prompt, chosen in zip(PROMPTS, token_ids, strict=True)])
    logits = model(sequences).logits[:, -MAX_TOKENS - 1 : -1].float()
    chosen = logits.gather(2, torch.tensor(token_ids)[:, :, None])[:, :, 0]
    return float(((logits.amax(2) - chosen) / logits.std(2)).max())


@torch.inference_mode()
def prompt_loss(model) -> float:
    """Return the mean of -log p of the prompts' tokens, but the first of each."""
    prompts = torch.tensor(PROMPTS)
    logits = model(prompts).logits[:, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), prompts[:, 1:].flatten()))


def check(folder: Path, base: Path, answer: dict, activation: str = "a8") -> None:
    token_ids = answer["token_ids"]
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["activation"] = activation
    assert all(len(chosen) == MAX_TOKENS for chosen in token_ids)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, config=config)
    print("WORST", worst_choice(model, token_ids))
    assert math.exp(abs(answer["prompt_loss"] - prompt_loss(model))) <= 1 + PERPLEXITY
    assert worst_choice(model, token_ids) <= MARGIN
    control = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    print("CONTROL", worst_choice(control, token_ids))
    assert math.exp(abs(answer["prompt_loss"] - prompt_loss(control))) > 1 + 2 * PERPLEXITY
    assert worst_choice(control, token_ids) > 10 * MARGIN


def test_three_architectures_and_dummy_weights_eager(folders, tiny_model_folder, tmp_path):
    """Fused layers of three codebooks, bias, tied and quantized heads, int8 embedding; without a flag. And a
    checkpoint with its rotation folded into the weights, all but that of down_proj's input.
    """
    folded = tmp_path / "residual"
    settings = Settings(codebook=Codebook("pvq3"), rotation="residual")
    quantize_checkpoint(tiny_model_folder("qwen2"), folded, settings)
    runs = [{"model": folder, "enforce_eager": True} for folder in (*folders.values(), folded)]
    dummy = {"model": folders["qwen3-tied"], "enforce_eager": True, "load_format": "dummy"}
    *answers, from_folded, from_dummy = generate(tmp_path, [*runs, dummy], VLLM_ENABLE_V1_MULTIPROCESSING="0")
    for (name, folder), answer in zip(folders.items(), answers, strict=True):
        check(folder, tiny_model_folder(name), answer)
        sizes = answer["parameter_bytes"]
        assert not [parameter for parameter in sizes if parameter.endswith(("weight_packed", "_proj.weight"))]
        # gate: 4 bits, up: 3 bits, of 192 x 128 weights each; nothing else may be kept
        assert sizes["model.layers.0.mlp.gate_up_proj.pvq_weight"] == 192 * 128 * 7 // 8
    check(folded, tiny_model_folder("qwen2"), from_folded)
    assert all(len(chosen) == MAX_TOKENS for chosen in from_dummy["token_ids"])


def test_compiled(folders, tiny_model_folder, tmp_path):
    (answer,) = generate(tmp_path, [{"model": folders["llama"]}])
    check(folders["llama"], tiny_model_folder("llama"), answer)


def test_two_ranks_in_the_other_activation_mode(folders, tiny_model_folder, tmp_path):
    """Each rank quantizes its part of an activation with its own scale; with a16 the difference is small."""
    run = {"model": folders["qwen2"], "enforce_eager": True, "tensor_parallel_size": 2}
    (answer,) = generate(tmp_path, [run], VLLM_CPU_OMP_THREADS_BIND="0|1", PVQ_ACTIVATION="a16")
    check(folders["qwen2"], tiny_model_folder("qwen2"), answer, activation="a16")
