# SPDX-License-Identifier: Apache-2.0
"""One log line, one set of metrics and one id for each request."""

import asyncio
import logging
import re
import time
import uuid

from server import metrics
from server.asgi import App, Message, Receive, Scope, Send, header, send_error

logger = logging.getLogger("pvq.access")

_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
REFUSED = "pvq.refused"
"""In a scope: the status of the answer that connection.py gave, and logged, because the rest of the request was late."""

_QUIET = frozenset({"/health", "/ready", "/metrics"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})


class RequestLog:
    """Outermost middleware. The id is the client's X-Request-Id if it is sane, else a new one; it is in the answer's
    header X-Request-Id, in the log, and in vLLM's ids of requests and answers.
    """

    def __init__(self, app: App, enabled: bool = True) -> None:
        """``enabled`` is whether lines are logged; ids and metrics are there in any case."""
        self.app, self.enabled = app, enabled

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection scope."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        given = header(scope, b"x-request-id")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        fields = [pair for pair in scope["headers"] if pair[0] != b"x-request-id"]
        scope["headers"] = [*fields, (b"x-request-id", request_id.encode())]
        status, first_byte_s, sent_bytes, complete, ended = 0, 0.0, 0, False, False

        async def send_with_id(message: Message) -> None:
            nonlocal status, first_byte_s, sent_bytes, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            elif message["type"] == "http.response.body":
                body = message.get("body", b"")
                if body and not sent_bytes:
                    first_byte_s = time.perf_counter() - start
                sent_bytes += len(body)
                complete = not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # the server ends and this request had no time left
            ended = True
            if status:
                raise
            await send_error(send_with_id, 503, "the server ended before it could answer", "server_ended")
        finally:
            self._record(scope, request_id, status, start, first_byte_s, sent_bytes, complete, ended)

    def _record(
        self,
        scope: Scope,
        request_id: str,
        status: int,
        start: float,
        first_byte_s: float,
        sent_bytes: int,
        complete: bool,
        ended: bool,
    ) -> None:
        seconds = time.perf_counter() - start
        # The path as routed (/v1/responses/{response_id}): what clients make up must not become a label.
        route = getattr(scope.get("route"), "path", None) or (
            scope["path"] if scope["path"] in _QUIET else "other"
        )
        method = scope["method"] if scope["method"] in _METHODS else "other"
        refused = scope.get(REFUSED)
        status = status or refused or 0
        metrics.REQUESTS.labels(method, route, str(status)).inc()
        left = not complete and not ended and not refused
        if left:
            metrics.DISCONNECTED.inc()
        if route not in _QUIET:
            metrics.SECONDS.labels(route).observe(seconds)
            if first_byte_s:
                metrics.FIRST_BYTE_SECONDS.labels(route).observe(first_byte_s)
        level = logging.DEBUG if route in _QUIET else logging.INFO
        if self.enabled and not refused and logger.isEnabledFor(level):
            client = scope.get("client") or ("", 0)
            facts = {
                "request_id": request_id,
                "client": client[0],
                "key": scope.get("pvq.key", ""),
                "method": scope["method"],
                # Still percent-encoded: a decoded line break would make two log lines of one.
                "path": scope.get("raw_path", b"").decode("latin-1"),
                "status": status,
                "duration_ms": round(seconds * 1e3, 3),
                "first_byte_ms": round(first_byte_s * 1e3, 3),
                "bytes": sent_bytes,
                "complete": complete,
            }
            text = (
                "%(client)s %(method)s %(path)s %(status)s %(duration_ms)s ms id=%(request_id)s key=%(key)s"
            )
            how = " (server ended)" if ended else " (client left)" if left else ""
            logger.log(level, text + how, facts, extra={"facts": facts})
