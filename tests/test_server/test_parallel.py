# SPDX-License-Identifier: Apache-2.0
"""`pvq serve` on two ranks of one machine, tensor, pipeline and data parallel, says what it says on one.

Not part of `make test`: a server takes half a minute to start and there are five. `make test-parallel` runs it.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        os.environ.get("PVQ_TEST_PARALLEL") != "1", reason="takes minutes: make test-parallel runs it"
    ),
]

START_TIMEOUT_S = 900  # a pipeline has to be compiled
PROMPTS = [[(7 * i + 11 * j) % 510 + 2 for i in range(20)] for j in range(8)]
MAX_TOKENS = 24
TIE = 0.01  # nats: closer than this either token may come first; ranks add in another order
# float32 and a16: in a8 each rank quantizes its part of an activation with a scale of its own
FLAGS = ("--served-model-name", "m", "--max-model-len", "256", "--dtype", "float32")
EAGER = "--enforce-eager"


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel") / "checkpoint"
    command = [sys.executable, "-m", "pvq_vllm.cli", "quantize", str(tiny_llama), str(folder)]
    subprocess.run(
        [*command, "--bits", "4", "--tensor-parallel", "2", "--no-evaluate"], check=True, timeout=300
    )
    return folder


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def _process(command, log, **environment):
    """Run ``command`` for the duration of the context; SIGTERM at the end, SIGKILL to its group if that is not
    enough."""
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PVQ_ACTIVATION": "a16",
    }
    with open(log, "w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | settings | environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _served(checkpoint, tmp_path, *flags, binding):
    """Serve ``checkpoint`` with ``flags``; yield its URL."""
    port, log = _port(), tmp_path / "serve.log"
    command = [sys.executable, "-m", "pvq_vllm.cli", "serve", str(checkpoint), "--port", str(port)]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": binding} if binding else {}
    with _process([*command, *FLAGS, *flags], log, **environment) as process:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_TIMEOUT_S
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-5000:]
            with contextlib.suppress(urllib.error.URLError, OSError):
                if urllib.request.urlopen(f"{url}/ready", timeout=15).status == 200:
                    break
            time.sleep(0.5)
        yield url


def _ask(url):
    """Return for each prompt the greedy token ids and by how much each beat the second."""
    answers = []
    for prompt in PROMPTS:
        body = {
            "model": "m",
            "prompt": prompt,
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "logprobs": 2,
            "return_tokens_as_token_ids": True,
        }
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            (choice,) = json.load(answer)["choices"]
        margins = []
        for top in choice["logprobs"]["top_logprobs"]:
            best, second = sorted(top.values(), reverse=True)[:2]
            margins.append(best - second)
        answers.append((choice["token_ids"], margins))
    return answers


@pytest.fixture(scope="module")
def alone(checkpoint, tmp_path_factory):
    """Return the answers of one rank."""
    with _served(checkpoint, tmp_path_factory.mktemp("alone"), EAGER, binding="0") as url:
        return _ask(url)


def _check(answers, alone):
    for (ids, _), (expected, margins) in zip(answers, alone, strict=True):
        assert len(ids) == len(expected) == MAX_TOKENS
        for one, other, margin in zip(ids, expected, margins, strict=True):
            if one != other:
                assert margin < TIE
                break  # from here on the texts differ


def test_tensor_parallel(checkpoint, alone, tmp_path):
    with _served(checkpoint, tmp_path, "--tensor-parallel-size", "2", EAGER, binding="0|1") as url:
        _check(_ask(url), alone)


def test_pipeline_parallel(checkpoint, alone, tmp_path):
    """Compiled: vLLM 0.32 cannot run a pipeline eagerly on a CPU, whatever the weights."""
    with _served(checkpoint, tmp_path, "--pipeline-parallel-size", "2", binding="0|1") as url:
        _check(_ask(url), alone)


def test_data_parallel(checkpoint, alone, tmp_path):
    with _served(checkpoint, tmp_path, "--data-parallel-size", "2", EAGER, binding=None) as url:
        _check(_ask(url), alone)
        assert _engines(url) == {"0", "1"}


def _engines(url):
    """Return the engines that have generated tokens."""
    metrics = urllib.request.urlopen(f"{url}/metrics", timeout=15).read().decode()
    counts = re.findall(r'^vllm:generation_tokens_total\{engine="(\d+)".*\} (\S+)$', metrics, re.MULTILINE)
    return {engine for engine, count in counts if float(count) > 0}


def test_data_parallel_over_two_nodes(checkpoint, alone, tmp_path):
    """Two "nodes" on this machine, each with one engine, as on two machines with addresses of their own."""
    shared = ["--data-parallel-size", "2", "--data-parallel-size-local", "1", EAGER]
    shared += ["--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(_port())]
    worker = [sys.executable, "-m", "pvq_vllm.vllm_launcher", "serve", str(checkpoint), *FLAGS, *shared]
    worker += ["--headless", "--data-parallel-start-rank", "1"]
    with (
        _process(worker, tmp_path / "worker.log", VLLM_CPU_OMP_THREADS_BIND="1"),
        _served(checkpoint, tmp_path, *shared, binding="0") as url,
    ):
        _check(_ask(url), alone)
        assert _engines(url) == {"0", "1"}


def test_tensor_parallel_over_two_nodes(checkpoint, alone, tmp_path):
    shared = ["--tensor-parallel-size", "2", "--nnodes", "2", EAGER]
    shared += ["--master-addr", "127.0.0.1", "--master-port", str(_port())]
    worker = [sys.executable, "-m", "pvq_vllm.vllm_launcher", "serve", str(checkpoint), *FLAGS, *shared]
    with (
        _process(
            [*worker, "--node-rank", "1", "--headless"],
            tmp_path / "worker.log",
            VLLM_CPU_OMP_THREADS_BIND="1",
        ),
        _served(checkpoint, tmp_path, *shared, "--node-rank", "0", binding="0") as url,
    ):
        _check(_ask(url), alone)
