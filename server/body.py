# SPDX-License-Identifier: Apache-2.0
"""Reads a request's body within a limit, and checks JSON for what breaks the code behind it."""

import json
import re
from collections.abc import Callable
from typing import Any

from server.asgi import Receive, Refused, Scope, header

MAX_JSON_DEPTH = 64
"""Deepest nesting of lists and objects; deeper bodies end in a RecursionError in the code behind."""

_INTEGER_LIMIT = 2**63
_MANY_DIGITS = re.compile(rb"[0-9]{19}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Disconnected(Exception):
    """The client left before its request was complete."""


def declared_length(scope: Scope) -> int | None:
    """Return Content-Length; None if there is none (a chunked body)."""
    text = header(scope, b"content-length")
    return int(text) if text.isdecimal() else None


async def read_body(scope: Scope, receive: Receive, max_bytes: int, keep: Callable[[int], None]) -> bytes:
    """Return the whole body.

    Args:
        keep: told how many bytes each part has before it is kept; it may raise.
    Raises:
        Refused: it is, or says that it is, longer than ``max_bytes``; nothing more is kept in memory.
        Disconnected: the client left.
    """
    too_large = Refused(413, "body_too_large", f"the body is larger than {max_bytes} bytes: send less")
    if (declared_length(scope) or 0) > max_bytes:
        raise too_large
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise too_large
        keep(len(part))
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def is_json(scope: Scope) -> bool:
    """Return whether the request says that its body is JSON."""
    return header(scope, b"content-type").partition(";")[0].strip().lower() == "application/json"


def _bad_json(reason: str) -> Refused:
    return Refused(400, "bad_json", f"the body {reason}")


def _refuse_constant(name: str) -> Any:
    raise _bad_json(f"holds {name}, which is not JSON: give a number")


def parse(body: bytes) -> Any:
    """Return the value of the JSON text ``body``.

    Raises:
        Refused: it is not JSON in UTF-8, is nested deeper than ``MAX_JSON_DEPTH``, or holds NaN, Infinity, half of a
            surrogate pair or an integer that does not fit in 64 bits (which vLLM's messages between processes cannot carry).
    """
    try:
        value = json.loads(body.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _bad_json(f"is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise _bad_json(f"is nested deeper than {MAX_JSON_DEPTH} levels") from None
    except ValueError as error:
        raise _bad_json(f"is not JSON ({str(error)[:200]})") from None
    if body.count(b"[") + body.count(b"{") > MAX_JSON_DEPTH or _MANY_DIGITS.search(body):
        _check(value)
    if _SURROGATE.search(body):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _bad_json("holds half of a surrogate pair, which is no text") from None
    return value


def _check(value: Any) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        inner: list[Any] = []
        for item in level:
            if type(item) is int and not -_INTEGER_LIMIT <= item < _INTEGER_LIMIT:
                raise _bad_json("holds an integer that does not fit in 64 bits")
            if type(item) is list:
                inner += item
            elif type(item) is dict:
                inner += item.values()
        if not inner:
            return
        level = inner
    raise _bad_json(f"is nested deeper than {MAX_JSON_DEPTH} levels")
