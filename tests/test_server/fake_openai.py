# SPDX-License-Identifier: Apache-2.0
"""A small server with OpenAI's streaming API and delays that the test chooses: enough to check a load test
without a model.

    python tests/test_server/fake_openai.py PORT [--ttft 0.02] [--tpot 0.005] [--model fake]

What the text of a prompt begins with makes it fail: "429", "500", "cut" (the connection ends after two
tokens), "error" (an error event), "silent" (no usage), "slow" (never a token), "empty" (no text).
"""

import argparse
import asyncio
import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

VOCABULARY = 1000


def make_app(
    ttft_s: float = 0.0,
    tpot_s: float = 0.0,
    model: str = "fake",
    tokens_per_chunk: int = 1,
    slots: int = 1_000_000,
    key: str | None = None,
    tokenizer: bool = True,
) -> FastAPI:
    """Return the application. ``slots`` requests run at once, further ones wait; ``app.state.bodies`` holds
    what was asked for and ``app.state.most`` how many ran at once.
    """
    app = FastAPI()
    app.state.bodies, app.state.running, app.state.most = [], 0, 0
    free = asyncio.Semaphore(slots)

    def refused(request: Request) -> bool:
        return key is not None and request.headers.get("authorization") != f"Bearer {key}"

    @app.get("/v1/models")
    async def models(request: Request) -> Any:
        if refused(request):
            return JSONResponse({"error": {"message": "no"}}, 401)
        return {"object": "list", "data": [{"id": model, "object": "model"}]}

    if tokenizer:

        @app.post("/tokenize")
        async def tokenize(request: Request) -> Any:
            words = (await request.json())["prompt"].split()
            return {"tokens": [hash_word(word) for word in words for _ in range(2)], "count": 2 * len(words)}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        body = await request.json()
        return await answer(request, body, body["prompt"], chat=False)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        body = await request.json()
        return await answer(request, body, body["messages"][-1]["content"], chat=True)

    async def answer(request: Request, body: dict[str, Any], prompt: Any, chat: bool) -> Any:
        app.state.bodies.append(body)
        text = prompt if isinstance(prompt, str) else ""
        if refused(request):
            return JSONResponse({"error": {"message": "wrong key"}}, 401)
        for status in ("429", "500"):
            if text.startswith(status):
                return JSONResponse({"error": {"message": f"refused with {status}"}}, int(status))
        return StreamingResponse(counted(body, prompt, text, chat), media_type="text/event-stream")

    async def counted(body: dict[str, Any], prompt: Any, text: str, chat: bool) -> Any:
        async with free:
            app.state.running += 1
            app.state.most = max(app.state.most, app.state.running)
            try:
                async for part in stream(body, prompt, text, chat):
                    yield part
            finally:
                app.state.running -= 1

    async def stream(body: dict[str, Any], prompt: Any, text: str, chat: bool) -> Any:
        count = body["max_tokens"]
        if chat:
            yield event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        await asyncio.sleep(math.inf if text.startswith("slow") else ttft_s)
        for first in range(0, count, tokens_per_chunk):
            if first:
                await asyncio.sleep(tpot_s * tokens_per_chunk)
            if first >= 2 and text.startswith("cut"):
                raise ConnectionResetError
            if first >= 2 and text.startswith("error"):
                yield 'data: {"error": {"message": "the engine died"}}\n\n'
                return
            words = "" if text.startswith("empty") else " \u2028word" * min(tokens_per_chunk, count - first)
            reason = "length" if first + tokens_per_chunk >= count else None
            piece = {"delta": {"content": words}} if chat else {"text": words}
            yield event([{"index": 0, **piece, "finish_reason": reason}])
        if not text.startswith("silent"):
            length = len(prompt) if isinstance(prompt, list) else len(prompt.split())
            usage = {"prompt_tokens": length, "completion_tokens": count, "total_tokens": length + count}
            yield event([], usage)
        yield "data: [DONE]\n\n"

    return app


def hash_word(word: str) -> int:
    """Return a token id for ``word``, the same in every process."""
    return sum(ord(letter) * (place + 1) for place, letter in enumerate(word)) % VOCABULARY


def event(choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
    """Return one server-sent event, with line separators of Unicode left as they are."""
    return f"data: {json.dumps({'choices': choices, 'usage': usage}, ensure_ascii=False)}\n\n"


@contextlib.contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Serve ``app`` in a thread on a free port of 127.0.0.1; yield its URL."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the fake server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--ttft", type=float, default=0.02)
    parser.add_argument("--tpot", type=float, default=0.005)
    parser.add_argument("--slots", type=int, default=1_000_000)
    parser.add_argument("--model", default="fake")
    flags = parser.parse_args()
    app = make_app(flags.ttft, flags.tpot, flags.model, slots=flags.slots)
    uvicorn.run(app, host="127.0.0.1", port=flags.port, log_level="critical")
