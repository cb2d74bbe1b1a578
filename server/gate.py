# SPDX-License-Identifier: Apache-2.0
"""Lets requests in while the server is ready, and answers for it while it loads, drains or has failed."""

import json

from server import metrics
from server.asgi import App, Receive, Scope, Send, send_bytes, send_error
from server.state import Phase, ServerState

_CODES = {Phase.LOADING: "model_loading", Phase.DRAINING: "server_draining", Phase.FAILED: "engine_failed"}
_PROBES = ("/health", "/ready", "/metrics")
_LOADING_PAGE = (
    b"<!doctype html><html lang=en><meta charset=utf-8><title>Loading</title><p>The model is loading."
)


class Gate:
    """Middleware. Outside READY only the probes are answered: /health (200 while the process can go on), /ready
    (503 with the reason) and /metrics; everything else gets 503 with Retry-After, also on connections that are
    already open, which are then closed.
    """

    def __init__(self, app: App | None, state: ServerState) -> None:
        """``app`` may be None for a server that only ever loads."""
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection scope."""
        phase = self.state.phase
        if scope["type"] == "lifespan" or (phase is Phase.READY and scope["path"] in _PROBES):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket" and phase is not Phase.READY:
            await send({"type": "websocket.close", "code": 1013, "reason": phase.value})
        elif phase is Phase.READY:
            self.state.running += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self.state.running -= 1
        else:
            await self._answer(scope, phase, send)

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.app is not None, "a server without an app never becomes ready"
        await self.app(scope, receive, send)

    async def _answer(self, scope: Scope, phase: Phase, send: Send) -> None:
        path = scope["path"]
        close = [(b"connection", b"close")]
        if path == "/health":
            await send_bytes(send, 503 if phase is Phase.FAILED else 200, b"", close)
        elif path == "/ready":
            body = json.dumps({"ready": False, "reason": phase.value}).encode()
            await send_bytes(send, 503, body, [*close, (b"retry-after", b"1")])
        elif path == "/metrics":
            kind = metrics.CONTENT_TYPE_LATEST.encode()
            await send_bytes(send, 200, metrics.generate_latest(), close, content_type=kind)
        elif path == "/" and phase is Phase.LOADING:
            fields = [*close, (b"retry-after", b"2"), (b"refresh", b"2")]
            await send_bytes(send, 503, _LOADING_PAGE, fields, content_type=b"text/html; charset=utf-8")
        else:
            metrics.REJECTED.labels(_CODES[phase]).inc()
            await send_error(send, 503, f"{phase.value}: try again later", _CODES[phase], headers=close)
