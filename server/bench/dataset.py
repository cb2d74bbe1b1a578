# SPDX-License-Identifier: Apache-2.0
"""Prompts from a file: ShareGPT's JSON, or JSON lines of prompts or messages."""

import json
from pathlib import Path
from typing import Any

import numpy

from server.bench.workload import Draw, Lengths, Prompt, Vocabulary, generator
from server.errors import ServerError

CHARACTERS_PER_TOKEN = 4.0
"""Of English text in usual vocabularies; for the length of answers that come as text."""

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class DatasetPrompts:
    """Prompts of a file in an order given by the seed; the file starts again when it is used up.

    An entry is a conversation of ShareGPT (``{"conversations": [{"from": "human", "value": ...}, {"from":
    "gpt", ...}]}``: its first question, and an answer as long as its first answer), or ``{"prompt": ...}`` or
    ``{"messages": [...]}`` with ``output_tokens`` or the text ``completion``. ``output_tokens`` of the
    constructor, where given, overrules the file.
    """

    def __init__(self, path: Path, output_tokens: Lengths | None, seed: int) -> None:
        rows = _read(path)
        self._entries = [entry for row in rows if (entry := _entry(row)) is not None]
        self.name = path.name
        self.output_tokens = output_tokens
        if not self._entries:
            raise ServerError(
                f"--dataset {path} has no prompt in it: give ShareGPT's JSON, or JSON lines with prompt or messages"
            )
        if output_tokens is None and any(length is None for _, length in self._entries):
            raise ServerError(
                f"--dataset {path}: not every entry says how long its answer is: give --output-tokens"
            )
        self._order = generator(seed, Draw.ORDER).permutation(len(self._entries))

    def __len__(self) -> int:
        """Return how many prompts there are."""
        return len(self._entries)

    def prompt(
        self, vocabulary: Vocabulary, number: int, random: numpy.random.Generator, chat: bool
    ) -> Prompt:
        """Return the prompt ``number`` of the order, as a text or as messages."""
        messages, length = self._entries[self._order[number % len(self._order)]]
        answer = self.output_tokens.draw(random) if self.output_tokens else length
        assert answer is not None, "checked by the constructor"
        if chat:
            return Prompt(messages, answer)
        return Prompt("\n".join(message["content"] for message in messages), answer)


def _read(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ServerError(f"--dataset {path} cannot be read ({reason}): give a JSON file") from None
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
        # Not splitlines(): it also splits at U+2028 and others, which JSON allows inside strings.
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise ServerError(
            f"--dataset {path} is neither JSON nor JSON lines ({error}): correct the file"
        ) from None


def _entry(row: Any) -> tuple[list[dict[str, str]], int | None] | None:
    """Return the messages of ``row`` and the length of the answer; None for a row without a question."""
    if not isinstance(row, dict):
        return None
    answer = row.get("completion")
    if isinstance(row.get("prompt"), str):
        messages = [{"role": "user", "content": row["prompt"]}]
    else:
        turns = row.get("messages") or row.get("conversations") or []
        messages, answer = [], answer
        for turn in turns if isinstance(turns, list) else []:
            if not isinstance(turn, dict):
                return None
            role = _ROLES.get(turn.get("role") or turn.get("from") or "")
            text = turn.get("content") or turn.get("value")
            if role is None or not isinstance(text, str):
                return None
            if role == "assistant" and "conversations" in row:
                answer = text
                break
            messages.append({"role": role, "content": text})
    if not messages or not any(message["content"].strip() for message in messages):
        return None
    length = row.get("output_tokens")
    if not isinstance(length, int) or length < 1:
        length = max(1, round(len(answer) / CHARACTERS_PER_TOKEN)) if isinstance(answer, str) else None
    return messages, length
