# SPDX-License-Identifier: Apache-2.0
"""A fake engine and an app with this project's routes: enough to test them without vLLM."""

import asyncio
import json
import socket
import subprocess
import sys
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
