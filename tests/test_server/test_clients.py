# SPDX-License-Identifier: Apache-2.0
"""Clients that others wrote, against a real server: `make test-clients` installs them in an environment of their own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = os.environ.get("PVQ_CLIENTS", "")
TEXTS = ["the river runs to the sea", "a house of stone", "the first king of the land", "rain in the north"]

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def needs(program):
    found = Path(FOLDER, "bin", program).is_file() if FOLDER else False
    return pytest.mark.skipif(not found, reason=f"{program} is not installed: run make test-clients")


def run(served, *command, **environment):
    """Run a client and return its output; it must end with 0."""
    variables = {
        "OPENAI_API_KEY": served.key,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **environment,
    }
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def client(program):
    return Path(FOLDER, "bin", program)


@pytest.fixture
def tasks(tmp_path):
    """Return a folder with two small tasks for lm-eval: a choice between two endings, and free text."""
    rows = [{"text": text, "other": text[::-1], "label": 0} for text in TEXTS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
"""
    (tmp_path / "choice.yaml").write_text(
        "task: tiny_choice\noutput_type: multiple_choice" + common + "doc_to_text: 'Well:'\n"
        "doc_to_choice: '{{[text, other]}}'\ndoc_to_target: label\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / "free.yaml").write_text(
        "task: tiny_free\noutput_type: generate_until"
        + common
        + "doc_to_text: '{{text}}'\ndoc_to_target: '{{other}}'\n"
        "generation_kwargs: {max_gen_toks: 8, temperature: 0, until: ['zzz']}\nmetric_list: [{metric: exact_match}]\n"
    )
    return tmp_path


def lm_eval(served, tokenizer, tasks, kind, route, task, *more):
    arguments = (
        f"model=tiny,base_url={served.url}/v1/{route},num_concurrent=2,tokenizer={tokenizer},max_length=512"
    )
    command = [client("lm_eval"), "run", "--model", kind, "--model_args", arguments, "--tasks", task]
    command += ["--include_path", tasks, "--output_path", tasks / "out", "--log_samples", *more]
    run(served, *command, HF_HOME=str(tasks / "hf"))
    samples = [path for path in (tasks / "out").rglob("samples_*.jsonl")]
    return [json.loads(line) for path in samples for line in path.read_text().splitlines()]


@needs("lm_eval")
def test_lm_eval_reads_logprobs_from_completions(served, tiny_llama, tasks):
    samples = lm_eval(served, tiny_llama, tasks, "local-completions", "completions", "tiny_choice")
    assert len(samples) == len(TEXTS)
    for sample in samples:
        assert all(float(response[0]) < 0 for response in sample["filtered_resps"])


@needs("lm_eval")
@pytest.mark.parametrize(
    ("kind", "route", "more"),
    [
        ("local-completions", "completions", ()),
        ("local-chat-completions", "chat/completions", ("--apply_chat_template",)),
    ],
)
def test_lm_eval_generates(served, tiny_llama, tasks, kind, route, more):
    samples = lm_eval(served, tiny_llama, tasks, kind, route, "tiny_free", *more)
    assert len(samples) == len(TEXTS) and all(sample["resps"][0][0] for sample in samples)


@needs("guidellm")
def test_guidellm_measures(served, tiny_llama, tmp_path):
    backend = f"kind=openai_http,target={served.url},model=tiny,api_key={served.key}"
    command = [client("guidellm"), "run", "--disable-progress", "--backend", backend]
    command += ["--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=4"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={tiny_llama}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8"]
    command += ["--output", f"kind=json,path={tmp_path}/benchmarks.json"]
    run(served, *command)
    (report,) = json.loads((tmp_path / "benchmarks.json").read_text())["benchmarks"]
    totals = report["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (4, 0)


@pytest.fixture
def brief(start_server):
    """A server that ends its answers soon: of thousands of random requests many are answered, to the limit."""
    with start_server("--max-output-tokens", "8", "--max-num-seqs", "4") as server:
        server.wait_until_ready()
        yield server


@needs("schemathesis")
@pytest.mark.timeout(3600)
def test_schemathesis_finds_no_5xx(brief):
    """Every operation of the served document, but two that would take the engine apart. One worker: its threads trip over
    each other in Python 3.11.
    """
    command = [client("schemathesis"), "run", f"{brief.url}/openapi.json", "--checks", "not_a_server_error"]
    command += ["--header", f"Authorization: Bearer {brief.key}", "--max-examples", "40", "--seed", "1"]
    command += ["--phases", "examples,coverage,fuzzing", "--request-timeout", "300", "--continue-on-failure"]
    command += [
        "--suppress-health-check",
        "all",
        "--exclude-path-regex",
        "scale_elastic_ep|is_scaling_elastic_ep",
    ]
    text = run(brief, *command)
    selected, all_ = map(int, re.search(r"Selected: (\d+)/(\d+)", text).groups())
    tested = int(re.search(r"Tested: (\d+)", text)[1])
    assert tested == selected == all_ - 2 > 20, text
    assert int(re.search(r"(\d+) generated", text)[1]) > 5000, text


def test_vllm_bench_serve_measures(served, tiny_llama, tmp_path):
    command = [sys.executable, "-m", "pvq_vllm.vllm_launcher", "bench", "serve", "--base-url", served.url]
    command += [
        "--model",
        "tiny",
        "--tokenizer",
        tiny_llama,
        "--dataset-name",
        "random",
        "--num-prompts",
        "8",
    ]
    command += [
        "--random-input-len",
        "16",
        "--random-output-len",
        "8",
        "--ignore-eos",
        "--max-concurrency",
        "4",
    ]
    command += ["--save-result", "--result-dir", tmp_path, "--result-filename", "result.json"]
    run(served, *command)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == 8 and result["total_output_tokens"] == 64 and result["mean_ttft_ms"] > 0
