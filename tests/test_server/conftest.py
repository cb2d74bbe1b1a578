# SPDX-License-Identifier: Apache-2.0
"""A fake engine and an app with this project's routes, enough to test them without vLLM; and real servers with a
tiny random model, as processes of their own.
"""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.admission import Limits
from server.app import add_routes, add_state
from server.http import guard
from server.keys import KeyStore
from server.settings import Settings
from server.state import Phase, ServerState
from tests.test_server.small_server import Running

LIMITS = Limits(sequences=8, body_bytes=100_000)


class FakeEngine:
    """Stands for vLLM's engine client. ``delay_s`` is how long its process takes to answer."""

    def __init__(self, model: Path) -> None:
        self.sleeping = self.paused = self.errored = False
        self.delay_s = 0.0
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(
                model=str(model),
                dtype="torch.bfloat16",
                max_model_len=512,
                quantization="pvq",
                architectures=["LlamaForCausalLM"],
            )
        )

    async def check_health(self) -> None:
        if self.errored:
            raise RuntimeError("dead")

    async def is_sleeping(self) -> bool:
        await asyncio.sleep(self.delay_s)
        return self.sleeping

    async def is_paused(self) -> bool:
        return self.paused


class FakeModels:
    """Stands for vLLM's list of models."""

    base_model_paths = (SimpleNamespace(name="demo"),)

    async def show_available_models(self) -> SimpleNamespace:
        card = {"id": "demo", "object": "model", "owned_by": "vllm", "max_model_len": 512}
        return SimpleNamespace(model_dump=lambda: {"object": "list", "data": [dict(card)]})


@pytest.fixture
def model_folder(tmp_path) -> Path:
    """Return a folder with a config.json that names a quantization with a long table, and one weight file of
    1000 bytes.
    """
    modules = {f"model.layers.{index}.mlp.down_proj": {"rotation_blocks": 1} for index in range(40)}
    quantization = {"quant_method": "pvq", "codebook": {"name": "pvq4"}, "modules": modules}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": quantization,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    return tmp_path


@pytest.fixture
def fake_engine(model_folder) -> FakeEngine:
    return FakeEngine(model_folder)


@pytest.fixture
def start():
    """Return a function: settings -> a running server."""
    with contextlib.ExitStack() as stack:

        def run(**settings):
            server = Running(**settings)
            stack.callback(server.stop)
            return server

        yield run


@pytest.fixture
def server_state() -> ServerState:
    """Return the state of a server that is ready."""
    state = ServerState()
    state.enter(Phase.READY)
    return state


@pytest.fixture
def app_client(fake_engine, server_state):
    """Return a function: list of keys -> client of a guarded app that had a /health and a /v1/models of its own
    before the routes were added, and has a /tokenize.
    """

    def make(keys: list[str], limits: Limits = LIMITS, **settings: object) -> TestClient:
        app = FastAPI()
        app.get("/health")(lambda: "the old one")
        app.get("/v1/models")(lambda: "the old one")
        app.post("/tokenize")(lambda body: {"count": 1})
        add_routes(app)
        app.state.engine_client = fake_engine
        app.state.openai_serving_models = FakeModels()
        chosen = Settings(health_timeout_s=0.2, **settings)
        add_state(app, chosen, server_state)
        return TestClient(guard(app, server_state, chosen, KeyStore(keys), limits))

    return make


@pytest.fixture
def run_pvq():
    """Return a function: arguments -> finished process of the console script ``pvq``, output captured as
    text.
    """

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pvq_vllm.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    return run


@pytest.fixture
def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


START_TIMEOUT_S = 240


class Served:
    """A running ``pvq serve``: process, URL, API key and log file."""

    key = "key-for-tests"

    def __init__(self, process: subprocess.Popen, url: str, log_path: Path) -> None:
        self.process, self.url, self.log_path = process, url, log_path

    def get(self, path: str, key: str | None = None) -> tuple[int, str]:
        """Return status and body of a GET request."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.url + path, headers=headers), timeout=30
            ) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        """Return the sum of the metric ``name`` over all labels."""
        lines = [
            line for line in self.get("/metrics")[1].splitlines() if line.split("{")[0].split()[:1] == [name]
        ]
        return sum(float(line.split()[-1]) for line in lines)

    def log(self) -> str:
        """Return the end of the log."""
        return self.log_path.read_text(errors="replace")[-3000:]

    def wait_until_ready(self) -> None:
        """Return once /ready says 200."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            with contextlib.suppress(urllib.error.URLError, OSError):
                if self.get("/ready")[0] == 200:
                    return
            time.sleep(0.3)


@pytest.fixture(scope="session")
def start_server(tiny_llama, tmp_path_factory):
    """Return a function: flags -> context of a ``Served`` that may still be loading."""

    @contextlib.contextmanager
    def start(*flags: str, key_variable: str = "PVQ_API_KEY"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log_path = tmp_path_factory.mktemp("serve") / "serve.log"
        command = [sys.executable, "-m", "pvq_vllm.cli", "serve", str(tiny_llama), "--port", str(port)]
        command += ["--served-model-name", "tiny", "--max-model-len", "512", "--enforce-eager", *flags]
        environment = dict(os.environ, PVQ_CPU_KV_CACHE_GIB="1", HF_HUB_OFFLINE="1") | {
            key_variable: Served.key
        }
        with open(log_path, "w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        try:
            yield Served(process, f"http://127.0.0.1:{port}", log_path)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    return start


@pytest.fixture(scope="session")
def served(start_server):
    """Return the one server that most tests share; they leave it running."""
    flags = ["--enable-auto-tool-choice", "--tool-call-parser", "xlam", "--max-num-seqs", "16"]
    flags += ["--log-format", "json", "--max-output-tokens", "400"]
    # A random model would fill JSON with blanks for as long as it may.
    flags += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    with start_server(*flags) as server:
        # While it loads it lives, is not ready, and says so to whoever asks.
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(urllib.error.URLError, OSError):
                server.while_loading = {
                    path: server.get(path) for path in ("/health", "/ready", "/v1/models")
                }
                break
            assert time.monotonic() < deadline and server.process.poll() is None, server.log()
            time.sleep(0.1)
        server.wait_until_ready()
        yield server


@pytest.fixture(scope="session")
def client(served):
    """Return the official client of that server."""
    from openai import OpenAI

    with OpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0, timeout=120) as openai:
        yield openai
