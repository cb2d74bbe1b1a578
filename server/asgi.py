# SPDX-License-Identifier: Apache-2.0
"""The few pieces of ASGI that the middleware share: types, answers in OpenAI's error shape, headers."""

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "service_unavailable_error",
}


def error_body(status: int, message: str, code: str, param: str | None = None) -> bytes:
    """Return the body of an error as OpenAI's API has it: ``{"error": {message, type, param, code}}``."""
    error = {"message": message, "type": _TYPES[status], "param": param, "code": code}
    return json.dumps({"error": error}).encode()


def header(scope: Scope, name: bytes) -> str:
    """Return the first header ``name`` (lower case) of a request, or an empty string."""
    for key, value in scope["headers"]:
        if key == name:
            return value.decode("latin-1")
    return ""


async def send_bytes(
    send: Send,
    status: int,
    body: bytes,
    headers: Iterable[tuple[bytes, bytes]] = (),
    content_type: bytes = b"application/json",
) -> None:
    """Send a whole answer."""
    fields = [(b"content-type", content_type), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})


async def send_error(
    send: Send,
    status: int,
    message: str,
    code: str,
    *,
    param: str | None = None,
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    """Send ``error_body``; with Retry-After where a later try may succeed."""
    fields = list(headers)
    if status in (429, 503) and not any(name == b"retry-after" for name, _ in fields):
        fields.append((b"retry-after", b"1"))
    await send_bytes(send, status, error_body(status, message, code, param), fields)
