# SPDX-License-Identifier: Apache-2.0
"""What is sent: loads, lengths, prompts and arrival times, all drawn from one seed.

Every draw has a generator of its own, made from the seed and the place of the draw in the run. So the prompts
do not depend on how fast a server answers, every target gets the same ones, and no prompt comes twice in a
run, which a server's prefix cache would answer.
"""

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy

from server.errors import ServerError

CONCURRENCY, REQUEST_RATE = "concurrency", "request_rate"

_WORDS = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work government number night point "
    "home water room mother area money story fact month lot right study book eye job word business issue "
    "side kind head house service friend father power hour game line end member law car city community name "
    "president team minute idea body information back parent face others level office door health person "
    "art war history party result change morning reason research girl guy moment air teacher force education "
    "river mountain winter summer garden music paper window bridge ship island forest market doctor letter "
    "green blue black white early late small large young old long short high low near far open close read "
    "write speak listen carry build break hold bring leave begin follow create spend grow offer remember"
)
WORDS = tuple(_WORDS.split())
"""Common English words: one token each in most vocabularies, with a space before it."""


class Draw(enum.IntEnum):
    """What a generator is for; a part of its seed."""

    WARMUP, PROMPT, ARRIVAL, ORDER = range(4)


def generator(seed: int, draw: Draw, *place: int) -> numpy.random.Generator:
    """Return the generator of the draw at ``place`` (round, load, request)."""
    return numpy.random.default_rng((seed, draw, *place))


def parse_loads(text: str, flag: str) -> tuple[float | None, ...]:
    """Return the loads of a list such as "1,2,4" or, for rates, "0.5,2,inf"; inf becomes None.

    Raises:
        ServerError: an entry is no positive number, or no whole one where ``flag`` is --concurrency.
    """
    loads: list[float | None] = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        whole_needed = flag == "--concurrency"
        if not value > 0 or (whole_needed and not value.is_integer()):
            kind = "whole numbers above 0" if whole_needed else "numbers above 0, or inf"
            raise ServerError(f"{flag} {text} cannot be used: give {kind}, separated by commas")
        loads.append(None if math.isinf(value) else value)
    return tuple(dict.fromkeys(loads))


def load_label(load: float | None) -> str:
    """Return ``load`` as text: "4", "0.5", or "inf" for all at once."""
    return "inf" if load is None else f"{load:.4g}" if load < 1000 else f"{load:.0f}"


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens, at least 1 each; ``text`` is how it was given.

    ``kind`` is "fixed" (first), "uniform" (first to second, both included), "normal" (mean, standard
    deviation) or "lognormal" (median, standard deviation of the logarithm).
    """

    text: str
    kind: str
    first: float
    second: float = 0.0

    @classmethod
    def parse(cls, text: str, flag: str) -> "Lengths":
        """Return the distribution of "128", "64-256", "normal:128:32" or "lognormal:128:0.8".

        Raises:
            ServerError: ``text`` is none of these; the message names ``flag``.
        """
        kind, *numbers = text.split(":")
        if not numbers:
            kind, numbers = ("uniform", text.split("-")) if "-" in text else ("fixed", [text])
        try:
            values = [float(number) for number in numbers]
        except ValueError:
            values = []
        whole = all(value.is_integer() for value in values)
        good = {
            "fixed": len(values) == 1 and whole,
            "uniform": len(values) == 2 and whole and values[0] <= values[-1],
            "normal": len(values) == 2,
            "lognormal": len(values) == 2,
        }
        if not good.get(kind) or not all(map(math.isfinite, values)) or values[0] < 1 or values[-1] < 0:
            raise ServerError(
                f"{flag} {text} cannot be used: give a number of tokens such as 128, a range such as 64-256, "
                "normal:MEAN:DEVIATION or lognormal:MEDIAN:SIGMA"
            )
        return cls(text, kind, *values)

    def draw(self, random: numpy.random.Generator) -> int:
        """Return one length in tokens."""
        if self.kind == "fixed":
            return int(self.first)
        if self.kind == "uniform":
            return int(random.integers(int(self.first), int(self.second) + 1))
        if self.kind == "normal":
            return max(1, round(random.normal(self.first, self.second)))
        return max(1, round(random.lognormal(math.log(self.first), self.second)))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One request: a text, token ids, or the messages of a chat; and how many tokens to answer."""

    content: str | list[int] | list[dict[str, Any]]
    output_tokens: int


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What random prompts for one target are made of: ids of ordinary tokens, and tokens a word of ``WORDS``.

    Without ids (the server has no /tokenize) prompts are words, one token each if the vocabulary is usual.
    """

    token_ids: tuple[int, ...] = ()
    tokens_per_word: float = 1.0


class PromptSource(Protocol):
    """Where prompts come from."""

    def prompt(
        self, vocabulary: Vocabulary, number: int, random: numpy.random.Generator, chat: bool
    ) -> Prompt:
        """Return the prompt of the request ``number`` of a run; ``random`` is that request's own."""


@dataclasses.dataclass(frozen=True)
class RandomPrompts:
    """Random tokens, exactly as many as drawn (text prompts and chats: words, about as many)."""

    input_tokens: Lengths
    output_tokens: Lengths

    def prompt(
        self, vocabulary: Vocabulary, number: int, random: numpy.random.Generator, chat: bool
    ) -> Prompt:
        """Return random ids of the vocabulary, or random words where it has none or a chat is asked for."""
        length, answer = self.input_tokens.draw(random), self.output_tokens.draw(random)
        if vocabulary.token_ids and not chat:
            chosen = random.integers(len(vocabulary.token_ids), size=length)
            return Prompt([vocabulary.token_ids[index] for index in chosen], answer)
        count = max(1, round(length / vocabulary.tokens_per_word))
        text = " ".join(WORDS[index] for index in random.integers(len(WORDS), size=count))
        return Prompt([{"role": "user", "content": text}] if chat else text, answer)


def arrival_times(rate: float | None, count: int, random: numpy.random.Generator) -> Sequence[float]:
    """Return when each of ``count`` requests is to be sent, seconds after the first: a Poisson process of
    ``rate`` a second, or all at once where ``rate`` is None.

    The gaps of one seed at two rates differ by a factor only, which takes noise out of comparisons.
    """
    if rate is None:
        return [0.0] * count
    return [0.0, *(numpy.cumsum(random.exponential(size=count - 1)) / rate).tolist()]
