# SPDX-License-Identifier: Apache-2.0
"""The real model of the demo: quantized to four bits with calibration, close to its base, and right in vLLM.

Takes about six minutes on two cores: the download of the demo model, quantization as `make demo` does it, a short evaluation and
one engine start.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from offline_quant.demo_model import make_demo_model
from offline_quant.evaluate import evaluate
from offline_quant.plan import Settings
from offline_quant.quantize_checkpoint import quantize_checkpoint
from pvq_vllm.codec.errors import PVQError

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(2400)]

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "offline_quant" / "data"
QUESTION = "What is the capital of France?"
ASK = """
import json, sys
from pvq_vllm.vllm_compat import patch_distribution_version
patch_distribution_version()

def main():
    from vllm import LLM, SamplingParams
    llm = LLM(sys.argv[1], max_model_len=512, max_num_seqs=2, enforce_eager=True)
    sampling = SamplingParams(temperature=0, max_tokens=24)
    answer = llm.chat([{"role": "user", "content": sys.argv[2]}], sampling, use_tqdm=False)[0].outputs[0].text
    open(sys.argv[3], "w").write(json.dumps(answer))

if __name__ == "__main__":  # vLLM's spawned workers import this file again
    main()
"""


@pytest.fixture(scope="module")
def base() -> Path:
    """The bf16 folder, shared with make demo."""
    folder = REPOSITORY / "build" / "demo" / "base"
    try:
        make_demo_model(folder, REPOSITORY / "build" / "demo" / "cache")
    except PVQError as error:
        pytest.skip(f"the demo model is not to be had here: {error}")
    return folder


@pytest.fixture(scope="module")
def quantized(base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "pvq4"
    report = quantize_checkpoint(base, out, Settings(calibration="builtin"))
    assert report["bits_per_weight"] <= 4.05
    return out


def test_four_bits_stay_close_to_the_base(base, quantized):
    """0.08 nats over the 10 x 1024 tokens that make demo evaluates; 0.13 is what the format has to stay under."""
    result = evaluate(quantized, base, DATA / "evaluation.txt", sequences=3, length=512)
    assert result["kl_divergence"] <= 0.13
    assert result["top1_agreement"] >= 0.8


def test_the_answer_in_vllm_names_paris(quantized, tmp_path):
    script, answer = tmp_path / "ask.py", tmp_path / "answer.json"
    script.write_text(ASK)
    run = subprocess.run(
        [sys.executable, str(script), str(quantized), QUESTION, str(answer)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    assert answer.exists(), f"vLLM failed:\n{run.stdout[-4000:]}"
    assert "Paris" in json.loads(answer.read_text())
