# SPDX-License-Identifier: Apache-2.0
"""The few pieces of ASGI that the middleware share: types, answers in OpenAI's error shape, headers, refusals."""

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
    404: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "service_unavailable_error",
}


class Refused(Exception):
    """A request that is not let in: status, code, message, the parameter at fault, and seconds to wait where a later
    try may succeed.
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after_s: int = 1
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s


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
    retry_after_s: int = 1,
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    """Send ``error_body``; with Retry-After where a later try may succeed."""
    fields = list(headers)
    if status in (429, 503):
        fields.append((b"retry-after", str(retry_after_s).encode()))
    await send_bytes(send, status, error_body(status, message, code, param), fields)
