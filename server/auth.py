# SPDX-License-Identifier: Apache-2.0
"""Asks for an API key on every route but those that must be open."""

from server import metrics
from server.asgi import App, Receive, Scope, Send, header, send_error
from server.keys import KeyStore
from server.routes import page

OPEN_PATHS = page.PATHS | {"/health", "/ready", "/metrics", "/ping"}
"""The page, and what load balancers and Prometheus read; everything else asks for a key, vLLM's routes outside /v1
too, which its own check leaves open, and whatever has a body."""
_READING = frozenset({"GET", "HEAD"})


class Authentication:
    """Middleware: 401 without a valid key. Leaves the key's name in ``scope["pvq.key"]`` (empty if no key is
    needed).
    """

    def __init__(self, app: App, keys: KeyStore) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection scope."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        name = self.keys.name_of(header(scope, b"authorization")) if len(self.keys) else ""
        scope["pvq.key"] = name or ""
        method = scope.get("method")
        is_open = (method in _READING and scope["path"] in OPEN_PATHS) or method == "OPTIONS"
        if name is not None or is_open:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "no valid API key"})
        else:
            metrics.REJECTED.labels("no_valid_key").inc()
            await send_error(
                send,
                401,
                "give a valid API key in the header Authorization: Bearer KEY",
                "invalid_api_key",
                headers=[(b"www-authenticate", b"Bearer")],
            )
