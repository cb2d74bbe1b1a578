# SPDX-License-Identifier: Apache-2.0
"""A whole run: every load on every target in every round, in an order that is fair to all targets.

A round puts each load on each target in turn. The target that comes first changes from round to round, so
that a slow drift of the machine meets all alike. Targets never run at the same time: they would share what is
to be measured if they are on one machine.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from server.bench.client import Record, RequestOptions, connect
from server.bench.load import LoadRun, run_load
from server.bench.metrics import LoadPoint, Objective, point
from server.bench.target import Target
from server.bench.workload import (
    CONCURRENCY,
    Draw,
    Prompt,
    PromptSource,
    arrival_times,
    generator,
)

RATE_WARMUP = 2
"""Requests before a rate is measured, unless told otherwise."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to do, whoever the targets are.

    Attributes:
        axis: CONCURRENCY or REQUEST_RATE.
        loads: each a concurrency, or a rate a second (None: all at once).
        requests: for each load and round; at least twice the concurrency are sent.
        duration_s: for a rate: as many requests as arrive in this time on average, at least ``requests``.
        warmup: requests before each load; None: the concurrency, or RATE_WARMUP.
    """

    axis: str
    loads: tuple[float | None, ...]
    source: PromptSource
    requests: int = 16
    duration_s: float | None = None
    rounds: int = 1
    warmup: int | None = None
    seed: int = 0
    options: RequestOptions = dataclasses.field(default_factory=RequestOptions)
    objective: Objective = dataclasses.field(default_factory=Objective)

    def requests_at(self, load: float | None) -> int:
        """Return how many requests are measured at ``load`` in a round."""
        if self.axis == CONCURRENCY:
            return max(self.requests, 2 * int(load or 0))
        if self.duration_s is not None and load is not None:
            return max(self.requests, round(self.duration_s * load))
        return self.requests

    def warmup_at(self, load: float | None) -> int:
        """Return how many requests come before those that are measured."""
        if self.warmup is not None:
            return self.warmup
        return int(load) if self.axis == CONCURRENCY and load else RATE_WARMUP


@dataclasses.dataclass(frozen=True)
class Stage:
    """One load on one target in one round. ``place`` numbers the loads of all rounds and gives, with the seed,
    the prompts (the round gives the arrival times); ``first`` is the number of its first prompt in the run.
    """

    target: Target
    load: float | None
    round: int
    place: int
    first: int


Runs = dict[tuple[str, float | None], list[LoadRun]]
"""Label and load -> the rounds."""

OnDone = Callable[[Stage, Record], None]


def stages(plan: Plan, targets: Sequence[Target]) -> Iterator[Stage]:
    """Yield the stages of a run in the order in which they run."""
    place = first = 0
    for round_ in range(plan.rounds):
        turn = round_ % len(targets)
        for load in plan.loads:
            for target in [*targets[turn:], *targets[:turn]]:
                yield Stage(target, load, round_, place, first)
            place += 1
            first += plan.requests_at(load)


def prompts(plan: Plan, stage: Stage) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts that are measured in ``stage``, and those of its warm-up."""
    chat = plan.options.chat

    def prompt(draw: Draw, number: int, index: int) -> Prompt:
        random = generator(plan.seed, draw, stage.place, index)
        return plan.source.prompt(stage.target.vocabulary, number, random, chat)

    measured = [
        prompt(Draw.PROMPT, stage.first + index, index) for index in range(plan.requests_at(stage.load))
    ]
    count = plan.warmup_at(stage.load)
    # Prompts of a file are taken from its end, the last that will be measured.
    warmup = [prompt(Draw.WARMUP, -1 - stage.place * count - index, index) for index in range(count)]
    return measured, warmup


async def run_stage(plan: Plan, stage: Stage, on_done: OnDone) -> LoadRun:
    """Put the load of ``stage`` on its target."""
    measured, warmup = prompts(plan, stage)
    arrivals = (
        arrival_times(stage.load, len(measured), generator(plan.seed, Draw.ARRIVAL, stage.round))
        if plan.axis != CONCURRENCY
        else []
    )
    async with connect(stage.target, plan.options.timeout_s) as client:
        return await run_load(
            client,
            stage.target.model,
            plan.axis,
            stage.load,
            measured,
            warmup,
            arrivals,
            plan.options,
            lambda record: on_done(stage, record),
        )


def run(plan: Plan, targets: Sequence[Target], on_done: OnDone = lambda stage, record: None) -> Runs:
    """Run all stages and return the records by label and load. Ctrl-C returns what is complete until then."""
    runs: Runs = {}
    with contextlib.suppress(KeyboardInterrupt):
        for stage in stages(plan, targets):
            result = asyncio.run(run_stage(plan, stage, on_done))
            runs.setdefault((stage.target.label, stage.load), []).append(result)
    return runs


def points(runs: Runs, objective: Objective) -> list[LoadPoint]:
    """Return one point for each label and load, in the order of their first round."""
    return [point(label, load, rounds, objective) for (label, load), rounds in runs.items()]
