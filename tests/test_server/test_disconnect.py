# SPDX-License-Identifier: Apache-2.0
import asyncio

import pytest
from starlette.responses import StreamingResponse

from server.disconnect import run_while_connected

SCOPE = {"type": "http", "method": "POST", "path": "/", "headers": [], "asgi": {"spec_version": "2.3"}}


class Client:
    """One end of a request: leaves when told to."""

    def __init__(self):
        self.left, self.messages, self.begun = asyncio.Event(), [], asyncio.Event()

    async def receive(self):
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.messages.append(message)
        if message["type"] == "http.response.body":
            self.begun.set()


def test_the_app_gets_the_body_and_its_answer_arrives():
    async def app(scope, receive, send):
        message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message["body"]})

    async def scenario():
        client = Client()
        await run_while_connected(app, dict(SCOPE), b"hello", client.receive, client.send)
        assert client.messages[-1]["body"] == b"hello"

    asyncio.run(scenario())


def test_a_stream_is_cancelled_once_and_may_take_its_time_to_end():
    cancellations = []

    async def events():
        try:
            while True:
                yield b"x"
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            cancellations.append("stream")
            await asyncio.sleep(0.05)  # as vLLM tells its engine; a second cancellation would end this
            cancellations.append("engine told")
            raise

    async def scenario():
        client = Client()
        stream = StreamingResponse(events())
        task = asyncio.create_task(run_while_connected(stream, dict(SCOPE), b"", client.receive, client.send))
        await client.begun.wait()
        client.left.set()
        await asyncio.wait_for(task, 5)

    asyncio.run(scenario())
    assert cancellations == ["stream", "engine told"]


def test_before_the_answer_the_app_is_told_and_not_cancelled():
    seen = []

    async def app(scope, receive, send):
        await receive()
        try:
            seen.append((await receive())["type"])
            await asyncio.sleep(0.1)
            seen.append("ended by itself")
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async def scenario():
        client = Client()
        task = asyncio.create_task(run_while_connected(app, dict(SCOPE), b"", client.receive, client.send))
        await asyncio.sleep(0.01)
        client.left.set()
        await asyncio.wait_for(task, 5)

    asyncio.run(scenario())
    assert seen == ["http.disconnect", "ended by itself"]


def test_an_error_of_the_app_is_not_hidden():
    async def app(scope, receive, send):
        raise RuntimeError("broken")

    async def scenario():
        client = Client()
        await run_while_connected(app, dict(SCOPE), b"", client.receive, client.send)

    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(scenario())


def test_the_end_of_the_server_ends_the_app():
    ended = []

    async def app(scope, receive, send):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def scenario():
        client = Client()
        task = asyncio.create_task(run_while_connected(app, dict(SCOPE), b"", client.receive, client.send))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert ended == [True]
