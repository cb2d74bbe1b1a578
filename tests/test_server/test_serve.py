# SPDX-License-Identifier: Apache-2.0
"""Real servers with a tiny random model: what an operator sees of them."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SOAK = Path(__file__).resolve().parents[2] / "benchmarks" / "soak"
STREAM = {
    "model": "tiny",
    "prompt": "go",
    "max_tokens": 480,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
}


def test_while_the_model_loads_the_server_is_alive_and_not_ready(served):
    seen = served.while_loading
    assert seen["/health"] == (200, "")
    assert seen["/ready"][0] == seen["/v1/models"][0] == 503
    assert json.loads(seen["/ready"][1]) == {"ready": False, "reason": "the model is loading"}
    assert json.loads(seen["/v1/models"][1])["error"]["code"] == "model_loading"


def test_health_readiness_and_info(served, tiny_llama):
    assert served.get("/health") == (200, "")
    assert served.get("/ready")[0] == 200
    status, body = served.get("/pvq/ready", served.key)
    assert status == 200 and json.loads(body)["ready"] is True
    info = json.loads(served.get("/pvq/info", served.key)[1])
    assert info["model"] == str(tiny_llama) and info["served_names"] == ["tiny"]
    assert info["max_model_len_tokens"] == 512 and info["quantization"] is None and info["versions"]["vllm"]


@pytest.mark.parametrize("path", ["/pvq/info", "/v1/models", "/version", "/openapi.json", "/load"])
def test_vllms_routes_ask_for_the_key_like_ours(served, path):
    assert served.get(path)[0] == served.get(path, "wrong")[0] == 401
    assert served.get(path, served.key)[0] == 200


def test_metrics_are_vllms_and_the_servers(served, client):
    before = served.metric("vllm:prompt_tokens_total")
    usage = client.completions.create(model="tiny", prompt="one two three", max_tokens=2).usage
    deadline = time.monotonic() + 10
    while (
        served.metric("vllm:prompt_tokens_total") < before + usage.prompt_tokens
        and time.monotonic() < deadline
    ):
        time.sleep(0.2)
    assert served.metric("vllm:prompt_tokens_total") == before + usage.prompt_tokens
    text = served.get("/metrics")[1]
    assert 'pvq_server_requests_total{method="POST",route="/v1/completions",status="200"}' in text
    assert served.metric("pvq_server_ready") == served.metric("pvq_server_api_keys") == 1
    assert served.metric("pvq_server_sequences") == 0 and served.metric("pvq_server_sequences_max") == 16


def test_log_lines_are_json_with_the_request_id(served, client):
    reply = client.completions.with_raw_response.create(
        model="tiny", prompt="x", max_tokens=1, extra_headers={"X-Request-Id": "find-me"}
    )
    assert reply.headers["x-request-id"] == "find-me"
    deadline = time.monotonic() + 20  # the line is written after the answer
    while "find-me" not in served.log_path.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    lines = [json.loads(line) for line in served.log_path.read_text().splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line.get("request_id") == "find-me"]
    assert (line["logger"], line["status"], line["key"]) == ("pvq.access", 200, "key") and line[
        "duration_ms"
    ] > 0
    assert {"pvq.engine", "pvq.access"} < {line["logger"] for line in lines}
    assert any(line["logger"].startswith("vllm.") for line in lines), "vLLM's lines are not JSON"
    assert served.key not in served.log_path.read_text()


def test_malformed_requests_get_no_5xx_and_leave_nothing(served):
    command = [sys.executable, str(SOAK), "malformed", "--url", served.url, "--requests", "250"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=dict(os.environ, PVQ_API_KEY=served.key), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "250 malformed requests" in done.stdout


def test_clients_that_leave_in_mid_stream_free_their_slots(served):
    command = [sys.executable, str(SOAK), "disconnect", "--url", served.url, "--clients", "16"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=dict(os.environ, PVQ_API_KEY=served.key), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def engine_process(server):
    children = psutil.Process(server.process.pid).children(recursive=True)
    return next(
        child for child in children if any("EngineCore" in part for part in [child.name(), *child.cmdline()])
    )


async def kill_engine_under_load(server):
    """Return the ends of eight requests and the seconds until /ready was no longer 200.

    They ask for as many tokens as would take half a minute, so that none is at its end when all eight are seen to run.
    """
    engine, long = engine_process(server), STREAM | {"max_tokens": 8000}
    headers = {"Authorization": f"Bearer {server.key}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=60) as client:
        requests = [
            asyncio.create_task(client.post("/v1/completions", json={**long, "stream": index % 2 == 0}))
            for index in range(8)
        ]
        while server_running(await client.get("/metrics")) < 8:
            assert not any(request.done() for request in requests), "a request ended before all eight ran"
            await asyncio.sleep(0.05)
        engine.kill()
        killed = time.monotonic()
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get("/ready", timeout=10)).status_code != 200:
                    break
            await asyncio.sleep(0.02)
        seconds = time.monotonic() - killed
        return [await request for request in requests], seconds


def server_running(answer):
    lines = [line for line in answer.text.splitlines() if line.startswith("pvq_server_sequences ")]
    return float(lines[0].split()[-1]) if lines else 0


def check_clean_errors(answers):
    for answer in answers[0::2]:  # streams: an error as the last event
        *_, error, end = [line for line in answer.text.splitlines() if line]
        assert answer.status_code == 200 and end == "data: [DONE]"
        assert json.loads(error.removeprefix("data: "))["error"]["message"]
    for answer in answers[1::2]:
        assert answer.status_code in (500, 503) and answer.json()["error"]["message"]


def test_a_dead_engine_ends_the_process_with_1(start_server):
    with start_server("--max-model-len", "8192") as server:
        server.wait_until_ready()
        answers, seconds = asyncio.run(kill_engine_under_load(server))
        assert seconds < 2
        check_clean_errors(answers)
        assert server.process.wait(30) == 1, server.log()
        assert "the engine died" in server.log()


def test_ctrl_c_in_a_terminal_lets_the_running_requests_end(start_server):
    """A terminal sends it to the engine's processes too."""
    with start_server("--on-engine-death", "restart") as server:
        server.wait_until_ready()
        headers = {"Authorization": f"Bearer {server.key}"}
        with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
            with client.stream(
                "POST", "/v1/completions", json={**STREAM, "n": 8, "temperature": 1}
            ) as stream:
                assert stream.status_code == 200
                lines = stream.iter_lines()
                next(lines)
                os.killpg(server.process.pid, signal.SIGINT)
                while (ready := client.get("/ready")).status_code == 200:
                    time.sleep(0.01)
                assert "shutting down" in ready.text
                events = [line.removeprefix("data: ") for line in lines if line]
            assert events[-1] == "[DONE]" and "error" not in events[-2]
            ends = [json.loads(event)["choices"][0]["finish_reason"] for event in events[:-1]]
            assert ends.count("length") == 8
        assert server.process.wait(60) == 0, server.log()


def test_ctrl_c_while_the_model_loads_ends_the_server(start_server):
    with start_server() as server:
        while "Initializing a V1 LLM engine" not in server.log_path.read_text():
            assert server.process.poll() is None, server.log()
            time.sleep(0.1)
        os.killpg(server.process.pid, signal.SIGINT)
        assert server.process.wait(30) == 130, server.log()
        assert "stopped while the model was loading" in server.log_path.read_text()


def test_a_dead_engine_is_restarted_and_sigterm_lets_the_running_request_end(start_server):
    flags = ("--max-model-len", "8192", "--on-engine-death", "restart", "--drain-timeout-s", "60")
    with start_server(*flags, key_variable="VLLM_API_KEY") as server:  # vLLM's own variable holds as well
        server.wait_until_ready()
        answers, seconds = asyncio.run(kill_engine_under_load(server))
        assert seconds < 2
        check_clean_errors(answers)
        server.wait_until_ready()
        assert server.metric("pvq_server_restarts") == 1
        assert httpx.get(f"{server.url}/v1/models").status_code == 401  # the key has come along

        headers = {"Authorization": f"Bearer {server.key}"}
        with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
            with client.stream("POST", "/v1/completions", json=STREAM) as stream:
                lines = stream.iter_lines()
                next(lines)
                server.process.send_signal(signal.SIGTERM)
                while client.get("/ready").status_code == 200:
                    time.sleep(0.01)
                refused = client.post("/v1/completions", json=STREAM)
                assert refused.status_code == 503 and refused.headers["retry-after"]
                events = [line.removeprefix("data: ") for line in lines if line]
            assert (
                events[-1] == "[DONE]" and json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
            )
        assert server.process.wait(60) == 0, server.log()
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", int(server.url.rpartition(":")[2])))
