# SPDX-License-Identifier: Apache-2.0
"""The highest request rate at which enough requests keep to the objective."""

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence

from server.bench.metrics import LoadPoint, point
from server.bench.plan import OnDone, Plan, Runs, Stage, run_stage
from server.bench.target import Target

PRECISION = 1.1
"""The search ends when the lowest rate that fails is at most this much above the highest that passes."""

MAX_DOUBLINGS, MAX_HALVINGS = 12, 4
MIN_REQUESTS = 10
"""At every rate, unless told otherwise; a share of fewer says little."""

FOUND = "found"
NOT_CARRIED = "no rate was carried: start lower, or loosen the objective"
NO_LIMIT = "every rate was carried: start higher, or send more requests"


@dataclasses.dataclass(frozen=True)
class HighestRate:
    """The result for one target: the highest rate a second that was carried (None: none was), the lowest that
    was not (None: none), and which end the search came to.
    """

    label: str
    rate: float | None
    failed_rate: float | None
    outcome: str


def is_carried(point: LoadPoint, wanted: float) -> bool:
    """Return whether at least the share ``wanted`` of all requests, failed ones included, was good."""
    return point.attainment is not None and point.attainment >= wanted


def highest_rate(label: str, start: float, carried: Callable[[float], bool]) -> HighestRate:
    """Search by doubling or halving from ``start`` requests a second, then by geometric bisection.

    ``carried`` puts a rate on the server and says whether it was carried. It need not be monotonic, as chance
    has a part in it; the result is then one of the rates where it changes.
    """
    low = high = None
    rate = start
    while start / 2**MAX_HALVINGS <= rate <= start * 2**MAX_DOUBLINGS:
        if carried(rate):
            low = rate
        else:
            high = rate
        if low is not None and high is not None:
            if high <= low * PRECISION:
                break
            rate = math.sqrt(low * high)
        else:
            rate = rate * 2 if high is None else rate / 2
    outcome = NOT_CARRIED if low is None else NO_LIMIT if high is None else FOUND
    return HighestRate(label, low, high, outcome)


def search(
    plan: Plan, targets: Sequence[Target], start: float, on_done: OnDone = lambda stage, record: None
) -> tuple[list[HighestRate], Runs]:
    """Search the highest rate of each target in turn; return the results and the records of every probe.

    Probe i of every target gets the same prompts; all probes have the same arrival times but for a factor.
    Ctrl-C ends the search: the target it came in has no result.
    """
    runs: Runs = {}
    found: list[HighestRate] = []
    with contextlib.suppress(KeyboardInterrupt):
        for target in targets:
            probes = 0
            first = 0

            def carried(rate: float, target: Target = target) -> bool:
                nonlocal probes, first
                stage = Stage(target, rate, 0, probes, first)
                result = asyncio.run(run_stage(plan, stage, on_done))
                runs.setdefault((target.label, rate), []).append(result)
                probes += 1
                first += plan.requests_at(rate)
                return is_carried(
                    point(target.label, rate, [result], plan.objective), plan.objective.attainment
                )

            found.append(highest_rate(target.label, start, carried))
    return found, runs
