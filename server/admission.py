# SPDX-License-Identifier: Apache-2.0
"""Decides which requests reach the engine, so that those that do keep their latency whatever arrives.

The unit is the sequence: a request with n = 4 and two prompts is eight. At most ``sequences`` are admitted at a
time, as many as the engine runs and those that may wait; the next one is refused at once with 429. The caller can try
elsewhere or later, which a queue that grows would keep from it.
"""

import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from server import metrics
from server.asgi import App, Receive, Refused, Scope, Send, send_error
from server.body import Disconnected, is_json, parse, read_body
from server.disconnect import run_while_connected
from server.prompts import count_sequences, longest_prompt_tokens, output_tokens
from server.unusable import check

_BUFFERED_BODIES = 32
"""Bodies of the largest size that may be in memory before they are admitted."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is admitted; None: no limit.

    ``sequences`` and ``sequences_per_key`` count at a time, ``requests_per_minute`` is per key, ``prompt_tokens``
    and ``output_tokens`` per sequence, ``body_bytes`` per request.
    """

    sequences: int
    body_bytes: int
    sequences_per_key: int | None = None
    requests_per_minute: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None


class _Rate:
    """A token bucket for each key: as many requests a minute on average, and at most so many at once."""

    def __init__(self, per_minute: int) -> None:
        self._per_s, self._most = per_minute / 60, float(per_minute)
        self._buckets: dict[str, tuple[float, float]] = {}  # key -> tokens left, when

    def take(self, key: str) -> float:
        """Take a token for ``key``; return 0, or the seconds until there will be one."""
        now = time.monotonic()
        left, when = self._buckets.get(key, (self._most, now))
        left = min(self._most, left + (now - when) * self._per_s)
        self._buckets[key] = (left - 1 if left >= 1 else left, now)
        return 0.0 if left >= 1 else (1 - left) / self._per_s


class Admission:
    """Middleware around everything with a body; must be inside ``Authentication``."""

    def __init__(self, app: App, limits: Limits) -> None:
        self.app, self.limits = app, limits
        self._running = 0
        self._running_of: defaultdict[str, int] = defaultdict(int)
        self._buffered_bytes = 0
        self._rate = _Rate(limits.requests_per_minute) if limits.requests_per_minute else None
        metrics.SEQUENCES_MAX.set(limits.sequences)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection scope."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        try:
            key = scope.get("pvq.key", "")
            self._check_room(1, key)  # before the body is read: under overload that is all the work there is
            if self._rate and (wait_s := self._rate.take(key)):
                text = f"this key may send {self.limits.requests_per_minute} requests a minute: wait"
                raise Refused(429, "requests_per_minute", text, retry_after_s=int(wait_s) + 1)
            with self._buffer() as keep:
                body = await read_body(scope, receive, self.limits.body_bytes, keep)
                # Clients name the type of a body that is not there, too: /v1/responses/ID/cancel has none.
                request = parse(body) if body and is_json(scope) else None
                check(request)
                await self._check_lengths(scope, request, len(body))
            admitted = self._admitted(count_sequences(request), key)
        except Refused as refusal:
            metrics.REJECTED.labels(refusal.code).inc()
            await send_error(
                send,
                refusal.status,
                str(refusal),
                refusal.code,
                param=refusal.param,
                retry_after_s=refusal.retry_after_s,
            )
        except Disconnected:
            return
        else:
            with admitted:
                await run_while_connected(self.app, scope, body, receive, send)

    def _check_room(self, sequences: int, key: str) -> None:
        limits = self.limits
        if sequences > limits.sequences:
            text = (
                f"the request asks for {sequences} sequences, the server takes {limits.sequences} at a time"
            )
            raise Refused(413, "too_many_sequences", text + ": send several requests")
        if self._running + sequences > limits.sequences:
            raise Refused(
                429, "server_busy", "the server has as many requests as it can carry: try again later"
            )
        if limits.sequences_per_key and self._running_of[key] + sequences > limits.sequences_per_key:
            text = f"this key may have {limits.sequences_per_key} sequences at a time: wait for earlier ones to end"
            raise Refused(429, "sequences_per_key", text)

    @contextlib.contextmanager
    def _buffer(self) -> Iterator[Callable[[int], None]]:
        """Account for the memory of a body, as it arrives: one that was only announced takes nothing from others."""
        held = 0

        def keep(size: int) -> None:
            nonlocal held
            if self._buffered_bytes + size > _BUFFERED_BODIES * self.limits.body_bytes:
                raise Refused(
                    429, "server_busy", "the server is reading as much as it can hold: try again later"
                )
            held += size
            self._buffered_bytes += size

        try:
            yield keep
        finally:
            self._buffered_bytes -= held

    async def _check_lengths(self, scope: Scope, request: Any, body_bytes: int) -> None:
        if not isinstance(request, dict):
            return
        param, wanted = output_tokens(request)
        if self.limits.output_tokens and wanted > self.limits.output_tokens:
            text = f"{param} is {wanted}, the server gives at most {self.limits.output_tokens} tokens: ask for fewer"
            raise Refused(413, "output_too_long", text, param)
        # A token is at least one byte, so a body with fewer bytes than tokens are allowed needs no count.
        if self.limits.prompt_tokens and body_bytes > self.limits.prompt_tokens:
            tokens = await longest_prompt_tokens(self.app, scope, request, self.limits.prompt_tokens)
            if tokens > self.limits.prompt_tokens:
                text = f"the prompt has {tokens} tokens, the server takes {self.limits.prompt_tokens}: shorten it"
                raise Refused(413, "prompt_too_long", text)

    @contextlib.contextmanager
    def _hold(self, sequences: int, key: str) -> Iterator[None]:
        try:
            yield
        finally:
            self._running -= sequences
            self._running_of[key] -= sequences
            if not self._running_of[key]:
                del self._running_of[key]
            metrics.SEQUENCES.set(self._running)

    def _admitted(self, sequences: int, key: str) -> contextlib.AbstractContextManager[None]:
        """Take the room for ``sequences`` at once and return the context that gives it back."""
        self._check_room(sequences, key)
        self._running += sequences
        self._running_of[key] += sequences
        metrics.SEQUENCES.set(self._running)
        return self._hold(sequences, key)
