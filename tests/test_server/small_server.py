# SPDX-License-Identifier: Apache-2.0
"""A real HTTP server in a thread with a small app in vLLM's place, and what its tests read from sockets."""

import asyncio
import contextlib
import json
import socket
import threading
import time

from server.admission import Limits
from server.asgi import send_bytes
from server.http import Drain, guard, make_server
from server.keys import KeyStore
from server.listen import bind
from server.settings import Settings
from server.state import Phase, ServerState

CHUNK = b"x" * 65536
LIMITS = Limits(sequences=8, body_bytes=200_000)


class App:
    """GET /flood sends without end, GET /wait sends a line and ends after ``go``, all else echoes the body."""

    def __init__(self):
        self.go = threading.Event()
        self.ended = threading.Event()
        self.headers = []

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        self.headers.append(dict(scope["headers"]))
        try:
            if scope["path"] == "/flood":
                await self._flood(receive, send)
            elif scope["path"] == "/wait":
                await self._wait(send)
            else:
                body = b""
                while scope["method"] == "POST":
                    message = await receive()
                    body += message.get("body", b"")
                    if not message.get("more_body"):
                        break
                await send_bytes(send, 200, body)
        finally:
            self.ended.set()

    async def _flood(self, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        left = asyncio.create_task(receive())
        while not left.done():
            await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
            await asyncio.sleep(0)

    async def _wait(self, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first\n", "more_body": True})
        while not self.go.is_set():
            await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": b"last\n"})


class Running:
    """A server in a thread: its app, port, state, and the loop it runs in."""

    def __init__(self, **settings):
        self.app, self.state = App(), ServerState()
        settings = Settings(**{"drain_timeout_s": 5, **settings})
        self.listener = bind("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        guarded = guard(self.app, self.state, settings, KeyStore([]), LIMITS)
        self.server = make_server(guarded, settings, lifespan="off")
        self.drain = Drain(self.server, self.state, settings.drain_timeout_s)
        self.state.enter(Phase.READY)
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    async def _serve(self):
        self.loop = asyncio.get_running_loop()
        await self.server.serve(sockets=[self.listener])

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def stop(self):
        self.app.go.set()
        self.server.should_exit = True
        self.thread.join(15)
        assert not self.thread.is_alive()


def read_all(connection):
    """Return what comes until the server closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            data += part
    return data


def status_and_code(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]
