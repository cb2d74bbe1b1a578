# SPDX-License-Identifier: Apache-2.0
"""A real server with a tiny random model, as a process of its own, asked by the official client."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

KEY = "a key for tests"
START_TIMEOUT_S = 240

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


class Served:
    """A running ``pvq serve``: process, URL and log file."""

    def __init__(self, process, url, log_path):
        self.process, self.url, self.log_path = process, url, log_path

    def get(self, path, key=None):
        """Return status and body of a GET request."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.url + path, headers=headers), timeout=30
            ) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def log(self):
        return self.log_path.read_text(errors="replace")[-3000:]


@pytest.fixture(scope="module")
def served(tiny_llama, tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log_path = tmp_path_factory.mktemp("serve") / "serve.log"
    command = [sys.executable, "-m", "pvq_vllm.cli", "serve", str(tiny_llama), "--port", str(port)]
    command += [
        "--served-model-name",
        "tiny",
        "--max-model-len",
        "256",
        "--enforce-eager",
        "--drain-timeout-s",
        "20",
    ]
    environment = dict(os.environ, PVQ_API_KEY=KEY, PVQ_CPU_KV_CACHE_GIB="1", HF_HUB_OFFLINE="1")
    with open(log_path, "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    server = Served(process, f"http://127.0.0.1:{port}", log_path)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert process.poll() is None, server.log()
            assert time.monotonic() < deadline, server.log()
            try:
                if server.get("/health")[0] == 200:
                    break
            except urllib.error.URLError:
                time.sleep(0.5)
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def client(served):
    from openai import OpenAI

    return OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=120)


def test_models_lists_the_served_name(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_chat_answers_with_as_many_tokens_as_asked(client):
    reply = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=6,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 6


def test_streaming_gives_the_same_text_as_not_streaming(client):
    request = dict(
        model="tiny",
        prompt="the quick brown fox",
        max_tokens=8,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    whole = client.completions.create(**request)
    parts = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole.choices[0].text
    assert sum(bool(part.choices) for part in parts) > 1
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens == 8


def test_a_wrong_key_is_refused(served):
    from openai import AuthenticationError, OpenAI

    with pytest.raises(AuthenticationError):
        OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert served.get("/pvq/info")[0] == served.get("/pvq/info", "wrong")[0] == 401


def test_an_unknown_model_is_refused(client):
    from openai import NotFoundError

    with pytest.raises(NotFoundError):
        client.completions.create(model="nosuch", prompt="x")


def test_health_readiness_and_info(served, tiny_llama):
    assert served.get("/health") == (200, "")
    status, body = served.get("/pvq/ready", KEY)
    assert status == 200 and json.loads(body)["ready"] is True
    info = json.loads(served.get("/pvq/info", KEY)[1])
    assert (
        info["model"] == str(tiny_llama)
        and info["served_names"] == ["tiny"]
        and info["max_model_len_tokens"] == 256
    )
    assert info["quantization"] is None and info["versions"]["vllm"]


def test_metrics_count_the_requests(served, client):
    def prompt_tokens():
        lines = served.get("/metrics")[1].splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prompt_tokens_total"))

    before = prompt_tokens()
    usage = client.completions.create(model="tiny", prompt="one two three", max_tokens=2).usage
    deadline = time.monotonic() + 10
    while prompt_tokens() < before + usage.prompt_tokens and time.monotonic() < deadline:
        time.sleep(0.2)
    assert prompt_tokens() == before + usage.prompt_tokens


def test_load_test_of_the_running_server(served, tmp_path):
    command = [
        sys.executable,
        "-m",
        "pvq_vllm.cli",
        "bench",
        "--url",
        served.url,
        "--concurrency",
        "1,2",
        "--out",
        str(tmp_path),
    ]
    command += ["--requests", "4", "--input-tokens", "16", "--output-tokens", "8"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=dict(os.environ, PVQ_API_KEY=KEY), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "load.json").read_text())
    assert (report["completed"], report["failed"], report["model"]) == (8, 0, "tiny")
    assert [point["load"] for point in report["points"]] == [1, 2]
    assert all(point["ttft_ms"]["p50"] > 0 and point["output_tokens_per_s"] > 0 for point in report["points"])
    assert (tmp_path / "load.png").stat().st_size > 1000


def test_sigterm_lets_the_running_request_end_and_exits_with_0(served, client):
    stream = client.completions.create(
        model="tiny", prompt="go", max_tokens=100, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    served.process.send_signal(signal.SIGTERM)
    pieces = list(stream)
    assert pieces[-1].choices[0].finish_reason == "length", "the answer was cut off"
    assert served.process.wait(60) == 0, served.log()
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", int(served.url.rpartition(":")[2])))
