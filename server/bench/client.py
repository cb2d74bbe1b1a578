# SPDX-License-Identifier: Apache-2.0
"""One streamed request through the official ``openai`` client, and what is recorded of it.

The client is asked for the raw response: the bytes of a server-sent event are stamped when they arrive, and
only then parsed. The client's own event objects cost four times as much processor time, which would become
part of the latencies of a fast server.
"""

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai

from server.bench.target import Target
from server.bench.workload import Prompt

CONNECTION, TIMEOUT, STREAM_CUT = "connection", "timeout", "stream cut"
STREAM_ERROR, NO_USAGE, NO_CONTENT = "error in stream", "no usage", "no content"
_MESSAGE_LENGTH = 200


@dataclasses.dataclass
class Record:
    """What happened to one request. Times are in seconds on one clock, from the start of its load.

    ``scheduled_s`` is when it was to be sent (equal to ``sent_s`` in a closed loop), ``chunk_s`` when the
    first content and every later piece of the answer arrived, ``end_s`` when the stream ended. Token counts
    are the server's. ``failure`` is empty for a completed request, else its kind ("http 429", "timeout", ...)
    with ``message``.
    """

    index: int
    scheduled_s: float
    sent_s: float
    chunk_s: list[float] = dataclasses.field(default_factory=list)
    end_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = ""
    failure: str = ""
    message: str = ""

    def fail(self, kind: str, message: object) -> None:
        """Note a failure; the first one stays."""
        if not self.failure:
            self.failure = kind
            self.message = " ".join(str(message).split())[:_MESSAGE_LENGTH] or kind


@dataclasses.dataclass(frozen=True)
class RequestOptions:
    """What all requests have in common. ``ignore_eos`` (of vLLM) makes answers as long as asked."""

    chat: bool = False
    ignore_eos: bool = True
    timeout_s: float = 600.0


@contextlib.asynccontextmanager
async def connect(target: Target, timeout_s: float) -> AsyncIterator[openai.AsyncOpenAI]:
    """Yield a client for ``target`` that never repeats a request and opens as many connections as needed."""
    unlimited = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    http_client = openai.DefaultAsyncHttpxClient(limits=unlimited, timeout=timeout_s)
    async with openai.AsyncOpenAI(
        base_url=f"{target.url}/v1",
        api_key=target.api_key or "none",
        max_retries=0,
        timeout=timeout_s,
        http_client=http_client,
    ) as client:
        yield client


async def send(
    client: openai.AsyncOpenAI,
    model: str,
    prompt: Prompt,
    options: RequestOptions,
    index: int = 0,
    started: float = 0.0,
    scheduled_s: float | None = None,
) -> Record:
    """Send one request and return its record; a failure is noted there and not raised.

    Args:
        started: what ``time.perf_counter`` said at the start of the load.
        scheduled_s: when the request was due, seconds from the start; None: now.
    """
    # In extra_body the client takes the prompt as it is; as an argument it would look at every token id.
    field = "messages" if options.chat else "prompt"
    arguments: dict[str, Any] = {
        "model": model,
        "max_tokens": prompt.output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "extra_body": {field: prompt.content, **({"ignore_eos": True} if options.ignore_eos else {})},
        field: [] if options.chat else "",
    }
    route = client.chat.completions if options.chat else client.completions
    sent_s = time.perf_counter() - started
    record = Record(index, sent_s if scheduled_s is None else scheduled_s, sent_s)
    done = False
    try:
        async with (
            asyncio.timeout(options.timeout_s),
            route.with_streaming_response.create(**arguments) as response,
        ):
            async for now, data in _events(response.iter_bytes()):
                if data == b"[DONE]":
                    done = True
                elif not _read_event(record, json.loads(data), now - started):
                    break
        _check_end(record, done)
    except (TimeoutError, openai.APITimeoutError, httpx2.TimeoutException):
        record.fail(TIMEOUT, f"no answer within {options.timeout_s:g} s")
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        record.fail(f"http {error.status_code}", body.get("message") or error.message)
    except openai.APIConnectionError as error:
        record.fail(CONNECTION, error.__cause__ or error)
    except httpx2.HTTPError as error:
        record.fail(STREAM_CUT, error)
    except ValueError as error:
        record.fail(STREAM_ERROR, f"no JSON in the stream: {error}")
    record.end_s = record.end_s or time.perf_counter() - started
    return record


async def _events(parts: AsyncIterator[bytes]) -> AsyncIterator[tuple[float, bytes]]:
    """Yield the data of each server-sent event with the time at which its bytes were there.

    Split at newline bytes only: JSON may hold other characters that count as line ends elsewhere.
    """
    rest = b""
    async for part in parts:
        now = time.perf_counter()
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield now, line[5:].strip()


def _read_event(record: Record, event: Any, now_s: float) -> bool:
    """Note one event of the stream; return False if it ends the request with an error."""
    if not isinstance(event, dict) or event.get("error"):
        error = event.get("error") if isinstance(event, dict) else event
        record.fail(STREAM_ERROR, error.get("message", error) if isinstance(error, dict) else error)
        return False
    for choice in event.get("choices") or ():
        # Once the answer has begun, a token may have no text of its own: half a character, or a special one.
        if record.chunk_s or _has_content(choice):
            record.chunk_s.append(now_s)
        record.finish_reason = choice.get("finish_reason") or record.finish_reason
    if usage := event.get("usage"):
        record.prompt_tokens = usage.get("prompt_tokens") or 0
        record.completion_tokens = usage.get("completion_tokens") or 0
    record.end_s = now_s
    return True


def _has_content(choice: dict[str, Any]) -> bool:
    """Return whether there is text in a choice; the first event of a chat has only the role."""
    delta = choice.get("delta") or {}
    keys = ("content", "reasoning", "reasoning_content", "tool_calls")
    return bool(choice.get("text") or any(delta.get(key) for key in keys))


def _check_end(record: Record, done: bool) -> None:
    """Note a stream that ended early, or without what the numbers need."""
    if record.failure:
        return
    if not done and not record.finish_reason:
        record.fail(STREAM_CUT, "the stream ended before the answer was complete")
    elif not record.completion_tokens:
        record.fail(NO_USAGE, "the server did not say how many tokens it made (stream_options.include_usage)")
    elif not record.chunk_s:
        record.fail(NO_CONTENT, "no piece of the answer had any text")
    # A last event may bring only the reason of the end, and no token.
    del record.chunk_s[max(record.completion_tokens, 1) :]
