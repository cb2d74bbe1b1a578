# SPDX-License-Identifier: Apache-2.0
"""A small random checkpoint on a GPU: in transformers what the CPU computes, in vLLM what transformers generates."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.cuda

PROMPTS = [[(7 * i + 11 * j) % 510 + 2 for i in range(20)] for j in range(3)]
MAX_TOKENS = 12
MARGIN = 0.4  # of the standard deviation of the logits, in bfloat16; the unquantized model is off by far more

SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}

GENERATE = """
import json, sys
import pvq_vllm
pvq_vllm.register()
from vllm import LLM, SamplingParams
request = json.loads(sys.stdin.read())
answers = []
for arguments in request["runs"]:
    llm = LLM(dtype="bfloat16", max_model_len=128, max_num_seqs=4, gpu_memory_utilization=0.2, **arguments)
    sampling = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    answers.append([list(o.outputs[0].token_ids) for o in llm.generate(prompts, sampling, use_tqdm=False)])
    del llm
open(sys.argv[1], "w").write(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def folder(tiny_model_folder, checkpoint_writer, all_codebooks, tmp_path_factory) -> Path:
    return checkpoint_writer(
        tiny_model_folder("llama"), tmp_path_factory.mktemp("cuda") / "llama", all_codebooks
    )


def load(folder: Path, device: str, dtype: torch.dtype):
    from transformers import AutoModelForCausalLM

    import pvq_vllm.hf_quantizer  # noqa: F401  registers "pvq" with transformers

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device)


@torch.inference_mode()
def test_transformers_on_both_devices(folder):
    ids = torch.tensor(PROMPTS)
    on_cpu = load(folder, "cpu", torch.float32)(ids).logits
    on_gpu = load(folder, "cuda", torch.float32)(ids.cuda()).logits.cpu()
    assert float((on_gpu - on_cpu).norm() / on_cpu.norm()) < 0.02  # attention adds in another order


def test_a_model_packed_on_the_cpu_is_not_moved_silently(folder):
    from pvq_vllm.codec.errors import PVQError

    model = load(folder, "cpu", torch.float32).to("cuda")
    with pytest.raises(PVQError, match="packed for the CPU"):
        model(torch.tensor(PROMPTS).cuda())


@torch.inference_mode()
def worst_choice(model, token_ids: list[list[int]]) -> float:
    """Return by how much, in standard deviations of the logits, a chosen token misses the best, at worst."""
    sequences = torch.tensor(
        [prompt + chosen for prompt, chosen in zip(PROMPTS, token_ids, strict=True)]
    ).cuda()
    logits = model(sequences).logits[:, -MAX_TOKENS - 1 : -1].float()
    chosen = logits.gather(2, torch.tensor(token_ids).cuda()[:, :, None])[:, :, 0]
    return float(((logits.amax(2) - chosen) / logits.std(2)).max())


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_eager_with_graphs_and_with_dummy_weights(folder, tiny_model_folder, tmp_path):
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    model = {"model": str(folder)}
    runs = [model | {"enforce_eager": True}, model, model | {"enforce_eager": True, "load_format": "dummy"}]
    request = {"prompts": PROMPTS, "max_tokens": MAX_TOKENS, "runs": runs}
    settings = {
        "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the plugin is registered in this process
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    answer = tmp_path / "answer.json"
    result = subprocess.run(
        [sys.executable, "-c", GENERATE, str(answer)],
        input=json.dumps(request),
        env=os.environ | SETTINGS | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert answer.exists(), f"vLLM failed:\n{result.stdout[-6000:]}"
    eager, with_graphs, dummy = json.loads(answer.read_text())
    quantized = load(folder, "cuda", torch.bfloat16)
    control = load(tiny_model_folder("llama"), "cuda", torch.bfloat16)
    for token_ids in (eager, with_graphs):
        assert worst_choice(quantized, token_ids) <= MARGIN < worst_choice(control, token_ids)
    assert all(len(chosen) == MAX_TOKENS for chosen in dummy)


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_on_two_gpus(tiny_model_folder, checkpoint_writer, all_codebooks, tmp_path):
    """Tensor parallel: every layer split between two GPUs, those with split inputs in whole blocks of the rotation."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    if not any(entry.name == "pvq" for entry in entry_points(group="vllm.general_plugins")):
        pytest.skip("the project is not installed, and vLLM's workers would not find the plugin")
    folder = checkpoint_writer(tiny_model_folder("llama"), tmp_path / "split", all_codebooks, 2)
    common = {
        "model": str(folder),
        "dtype": "bfloat16",
        "gpu_memory_utilization": 0.2,
        "tensor_parallel_size": 2,
    }
    request = {
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
        "runs": [common | {"enforce_eager": True}, common],
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    answer, program = tmp_path / "answer.json", Path(__file__).with_name("generate_in_vllm.py")
    result = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "request.json"), str(answer)],
        env=os.environ | SETTINGS | {"VLLM_CACHE_ROOT": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert answer.exists(), f"vLLM failed:\n{result.stdout[-6000:]}"
    quantized = load(folder, "cuda", torch.bfloat16)
    control = load(tiny_model_folder("llama"), "cuda", torch.bfloat16)
    for run in json.loads(answer.read_text()):
        assert worst_choice(quantized, run["token_ids"]) <= MARGIN < worst_choice(control, run["token_ids"])
