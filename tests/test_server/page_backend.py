# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the server behind the page: canned /metrics that move, readiness, facts and a streamed
answer, each of which a test can change.

    python tests/test_server/page_backend.py [PORT]    to look at the page without a model
"""

import asyncio
import contextlib
import json
import math
import random
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from server.routes.page import page_router

RECORDED = (Path(__file__).parent / "data" / "metrics.txt").read_text(encoding="utf-8")
ANSWER = ["The", " capital", " of", " France", " is", " Paris", "."]
INFO = {
    "model": "build/demo/pvq",
    "served_names": ["smollm2"],
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "max_model_len_tokens": 2048,
    "quantization": "pvq",
    "quantization_config": {
        "quant_method": "pvq",
        "activation": "a8",
        "codebook": {"name": "pvq4"},
        "rotation": {"seed": 0, "factors": {"576": [12, 12, 4]}},
        "modules": 211,
    },
    "weight_bytes": 138554064,
    "versions": {"pvq-vllm": "0.1.0", "vllm": "0.32.0+cpu"},
    "uptime_s": 4000.0,
}


class Backend:
    """What the stand-in answers; tests set the attributes."""

    def __init__(self) -> None:
        self.key: str | None = None
        self.ready: tuple[int, dict[str, Any]] = (200, {"ready": True, "reason": ""})
        self.metrics = RECORDED
        self.info: dict[str, Any] = INFO
        self.names = ["smollm2"]
        self.pace_s = 0.02  # between two tokens
        self.hold_at: int | None = None  # tokens, then it waits until this is None again
        self.refusal: tuple[int, dict[str, Any], dict[str, str]] | None = None
        self.break_after: int | None = None  # tokens, then the connection ends
        self.error_after: int | None = None  # tokens, then an error event
        self.requests: list[dict[str, Any]] = []
        self.disconnects = 0
        self.url = ""

    def set_metric(self, name: str, value: float) -> None:
        """Let every sample of the metric ``name`` have ``value``."""
        self.metrics, count = re.subn(
            rf"^({re.escape(name)}(?:\{{.*\}})?) \S+$", rf"\1 {value}", self.metrics, flags=re.MULTILINE
        )
        assert count, name

    def observe(self, name: str, bound: float, count: int) -> None:
        """Let the histogram ``name`` have ``count`` more observations in the bucket that ends at ``bound``."""

        def add(match: re.Match) -> str:
            more = count if float(match[2]) >= bound else 0
            return f"{match[1]}{float(match[3]) + more}"

        pattern = rf'^({re.escape(name)}_bucket\{{.*le="([^"]+)".*\}} )(\S+)$'
        self.metrics, found = re.subn(pattern, add, self.metrics, flags=re.MULTILINE)
        assert found, name


def make_app(backend: Backend) -> FastAPI:
    """Return the app that answers as ``backend`` says."""
    app = FastAPI()
    app.include_router(page_router)

    @app.middleware("http")
    async def guard(request: Request, call_next):
        guarded = request.url.path.startswith(("/v1", "/pvq"))
        if guarded and backend.key and request.headers.get("Authorization") != f"Bearer {backend.key}":
            return JSONResponse({"error": {"message": "Unauthorized"}}, 401)
        return await call_next(request)

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(backend.metrics)

    @app.get("/ready")
    async def ready():
        return JSONResponse(backend.ready[1], backend.ready[0])

    @app.get("/pvq/info")
    async def info():
        return backend.info

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [{"id": name} for name in backend.names]}

    async def stream(chat: bool):
        try:
            for index, text in enumerate(ANSWER):
                while index == backend.hold_at:
                    await asyncio.sleep(0.01)
                if index == backend.break_after:
                    raise ConnectionError("broken by the test")
                if index == backend.error_after:
                    yield f"data: {json.dumps({'error': {'message': 'EngineCore died', 'code': 500}})}\n\n"
                    return
                choice = {"delta": {"content": text}} if chat else {"text": text}
                yield f"data: {json.dumps({'choices': [{**choice, 'finish_reason': None}]})}\n\n"
                await asyncio.sleep(backend.pace_s)
            yield f"data: {json.dumps({'choices': [{'delta': {}, 'finish_reason': 'stop'}]})}\n\n"
            usage = {"prompt_tokens": 37, "completion_tokens": len(ANSWER)}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"
        except asyncio.CancelledError:
            backend.disconnects += 1
            raise

    @app.post("/v1/chat/completions")
    @app.post("/v1/completions")
    async def complete(request: Request):
        backend.requests.append(await request.json())
        if backend.refusal:
            status, body, headers = backend.refusal
            return JSONResponse(body, status, headers=headers)
        return StreamingResponse(stream("chat" in request.url.path), media_type="text/event-stream")

    return app


@contextlib.contextmanager
def running(port: int = 0) -> Iterator[Backend]:
    """Serve a new Backend on 127.0.0.1 in a thread; its ``url`` says where."""
    backend = Backend()
    server = uvicorn.Server(uvicorn.Config(make_app(backend), port=port, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the stand-in did not start"
        time.sleep(0.01)
    backend.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield backend
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


def move(backend: Backend, seconds: float, step_s: float = 0.25) -> None:
    """Let the metrics of ``backend`` look like a load that swells and ebbs, for so many seconds."""
    began = last = time.monotonic()
    tokens, finished = 30.0, 3.0
    while last - began < seconds:
        time.sleep(step_s)
        now = time.monotonic()
        swell = 0.55 + 0.35 * math.sin((now - began) / 9) + 0.1 * math.sin(1.7 * (now - began))
        tokens += 640 * swell * (now - last)
        finished += 10 * swell * (now - last)
        last = now
        backend.set_metric("vllm:generation_tokens_total", round(tokens))
        backend.set_metric("vllm:prompt_tokens_total", round(9 * finished + 3 * tokens))
        backend.set_metric("vllm:num_requests_running", round(16 * swell))
        backend.set_metric("vllm:num_requests_waiting", round(4 * max(0, swell - 0.6)))
        backend.set_metric("vllm:kv_cache_usage_perc", 0.6 * swell)
        backend.metrics = re.sub(
            r'(request_success_total\{.*"stop".*\}) \S+', rf"\1 {finished:.0f}", backend.metrics
        )
        backend.observe("vllm:time_to_first_token_seconds", random.choice((0.06, 0.08, 0.1, 0.25)), 2)
        backend.observe("vllm:inter_token_latency_seconds", random.choice((0.025, 0.025, 0.05, 0.075)), 60)
        backend.observe("vllm:request_queue_time_seconds", random.choice((0.3, 0.3, 0.5, 0.8)), 2)


if __name__ == "__main__":
    with running(int(sys.argv[1]) if len(sys.argv) > 1 else 8080) as shown:
        print(f"{shown.url} (Ctrl-C ends it)", flush=True)
        move(shown, 24 * 3600)
