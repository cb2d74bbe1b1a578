# SPDX-License-Identifier: Apache-2.0
"""What a request asks of the engine, read from its JSON: sequences, prompt tokens, output tokens.

Only what is there is counted; whether the types are right is for vLLM to say.
"""

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

from pydantic import TypeAdapter, ValidationError

from server.asgi import App, Message, Scope

logger = logging.getLogger("pvq.server")

_INTEGER = TypeAdapter(int)
_OUTPUT_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_PROMPT_FIELDS = ("prompt", "messages", "input", "items")
"""Fields with one prompt or a list of them; a prompt is a text or a list of tokens or messages."""


def whole_number(value: Any, default: int) -> int:
    """Return the integer that vLLM reads from ``value``, for which "4" and 4.0 are 4; ``default`` if it is none."""
    try:
        return _INTEGER.validate_python(value)
    except ValidationError:
        return default


def _asked(request: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of ``request``, with those of vLLM's own API, which has them in an object."""
    inner = request.get("sampling_params")
    return {**inner, **request} if isinstance(inner, dict) else request


def count_sequences(request: Any) -> int:
    """Return how many sequences ``request`` makes: prompts times the larger of n and best_of."""
    if not isinstance(request, dict):
        return 1
    request = _asked(request)
    several = [
        len(value)
        for value in map(request.get, _PROMPT_FIELDS)
        if isinstance(value, list) and value and isinstance(value[0], (str, list))
    ]
    answers = max(1, whole_number(request.get("n"), 1), whole_number(request.get("best_of"), 1))
    return max(several, default=1) * answers


def output_tokens(request: dict[str, Any]) -> tuple[str, int]:
    """Return the field that asks for most output tokens, and how many; 0 if none does."""
    request = _asked(request)
    wanted = ((name, whole_number(request.get(name), 0)) for name in _OUTPUT_FIELDS)
    return max(wanted, key=lambda pair: pair[1])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _questions(request: dict[str, Any], limit: int) -> Iterator[int | dict[str, Any]]:
    """Yield the tokens of each prompt, or the body that asks /tokenize for them."""
    messages = request.get("messages")
    if isinstance(messages, list):
        several = messages if messages and isinstance(messages[0], list) else [messages]
        kept = {name: request[name] for name in ("tools", "chat_template_kwargs") if request.get(name)}
        if system := "\n".join(_strings(request.get("system"))):  # of /v1/messages
            first = {"role": "system", "content": system}
            several = [[first, *one] for one in several if isinstance(one, list)]
        for one in several:
            yield {"messages": one, **kept}
    prompt = next((request[name] for name in ("prompt", "input", "token_ids") if name in request), None)
    instructions = "\n".join(_strings(request.get("instructions")))  # of /v1/responses
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        yield len(prompt)
    elif isinstance(prompt, list) and prompt and isinstance(prompt[0], list):
        yield max(len(one) if isinstance(one, list) else 0 for one in prompt)
    else:
        # A list of texts is several prompts; a list of objects is one conversation, here without its template.
        texts = prompt if isinstance(prompt, list) and all(isinstance(one, str) for one in prompt) else None
        for text in texts if texts is not None else ["\n".join(_strings(prompt))]:
            text = f"{instructions}\n{text}" if instructions else text
            if len(text.encode("utf-8", "surrogatepass")) > limit:
                yield {"prompt": text}


async def longest_prompt_tokens(app: App, scope: Scope, request: dict[str, Any], limit: int) -> int:
    """Return the tokens of the longest prompt in ``request``, counted by vLLM's own route /tokenize in ``app``.

    Args:
        scope: of the request; its headers are used again.
        limit: prompts that surely have no more tokens are not counted.
    Returns:
        0 if vLLM cannot count them; it will then say what is wrong with the request itself.
    """
    longest = 0
    for question in _questions(request, limit):
        if isinstance(question, dict):
            model = {"model": request.get("model")}
            count = await _tokenize(app, scope, {**model, **question})
            if (
                count is None and "messages" in question
            ):  # as the template does not take them; without it, then
                count = await _tokenize(app, scope, {**model, "prompt": "\n".join(_strings(question))})
            question = count or 0
        longest = max(longest, question)
    return longest


async def _tokenize(app: App, scope: Scope, question: dict[str, Any]) -> int | None:
    """Return the number of tokens; None if the route answers with an error."""
    body = json.dumps(question).encode()
    fields = [pair for pair in scope["headers"] if pair[0] not in (b"content-length", b"transfer-encoding")]
    inner = {
        name: scope[name] for name in ("asgi", "http_version", "server", "client", "scheme") if name in scope
    }
    inner |= {
        "type": "http",
        "method": "POST",
        "path": "/tokenize",
        "raw_path": b"/tokenize",
        "query_string": b"",
        "root_path": scope.get("root_path", ""),
        "headers": [*fields, (b"content-length", str(len(body)).encode())],
        "state": dict(scope.get("state", {})),
    }
    answer, status, given = bytearray(), 0, False

    async def receive() -> Message:
        nonlocal given
        if given:
            await asyncio.Event().wait()  # this client never leaves; the waiting task is cancelled at the end
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        answer.extend(message.get("body", b""))

    try:
        await app(inner, receive, send)
    except (
        Exception
    ):  # it has answered 500 before; what is wrong will show when the request itself comes to it
        logger.warning("vLLM could not count the tokens of a request", exc_info=True)
        return None
    return int(json.loads(answer).get("count", 0)) if status == 200 else None
