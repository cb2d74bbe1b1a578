# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals for the ratio of two measurements, by a bootstrap in two stages.

A measurement is a list of rounds, a round the values of its requests. Each resample draws rounds with
replacement, and requests within each drawn round (Davison and Hinkley, Bootstrap Methods, 1997, section 3.8).
So what differs from round to round (a machine that warms up, a noisy neighbour) widens the interval, as soon
as there is more than one round. Two servers of one run got the same prompts in the same rounds, one after the
other: their rounds and requests are drawn in pairs, and what both had in common cancels.

Throughput has no value for a request. Its values are the tokens and seconds of equal slices of a round
(batch means).
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy

from server.bench.client import Record
from server.bench.metrics import duration_s, latencies

RESAMPLES = 1000
CONFIDENCE = 0.95
SLICES = 10
Round = numpy.ndarray
"""Values of one round: [n] latencies, or [slices, 2] tokens and seconds."""


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A ratio b / a with its confidence interval; the bounds are None where there are too few values."""

    value: float
    low: float | None
    high: float | None

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 1."""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number that two measurements are compared by. ``better`` is "lower" or "higher"; with fewer values than
    ``enough`` on either side it has no interval.
    """

    key: str
    title: str
    better: str
    statistic: Callable[[numpy.ndarray], float]
    enough: int


def _rate(values: numpy.ndarray) -> float:
    amount, seconds = values.sum(axis=0)
    return float(amount / seconds) if seconds else 0.0


def _median(values: numpy.ndarray) -> float:
    return float(numpy.median(values))


def _p99(values: numpy.ndarray) -> float:
    return float(numpy.percentile(values, 99))


# With 10 and 100 values intervals hold the true ratio about as often as they say (tests/test_server/test_bench_metrics.py).
METRICS = (
    Metric("throughput", "output tokens/s", "higher", _rate, SLICES),
    Metric("ttft", "TTFT p50", "lower", _median, 10),
    Metric("ttft", "TTFT p99", "lower", _p99, 100),
    Metric("tpot", "TPOT p50", "lower", _median, 10),
    Metric("e2el", "request p50", "lower", _median, 10),
)


def slices(records: Sequence[Record]) -> Round:
    """Return tokens and seconds of SLICES equal parts of a round [SLICES, 2]; the tokens of an answer are
    spread evenly over its pieces.
    """
    seconds = duration_s(records)
    result = numpy.zeros((SLICES, 2))
    result[:, 1] = seconds / SLICES
    if seconds:
        first = min(record.sent_s for record in records)
        for record in records:
            if record.failure:
                continue
            share = record.completion_tokens / len(record.chunk_s)
            places = (numpy.asarray(record.chunk_s) - first) / seconds * SLICES
            numpy.add.at(result[:, 0], numpy.clip(places.astype(int), 0, SLICES - 1), share)
    return result


def values(rounds: Sequence[Sequence[Record]], metric: Metric) -> list[Round]:
    """Return the values of ``metric`` in each round."""
    if metric.key == "throughput":
        return [slices(records) for records in rounds]
    return [numpy.asarray(latencies(records)[metric.key]) for records in rounds]


def ratio(
    a: Sequence[Round],
    b: Sequence[Round],
    statistic: Callable[[numpy.ndarray], float],
    enough: int,
    paired: bool = False,
    seed: int = 0,
) -> Ratio | None:
    """Return the ratio of ``statistic`` over ``b`` to that over ``a``, and its confidence interval if both
    sides have ``enough`` values.

    Args:
        paired: value j of round i is of the same request on both sides.

    Returns:
        None where a side has no values or its statistic is 0.
    """
    paired = paired and len(a) == len(b) and all(map(len, [*a, *b]))
    a, b = ([part for part in side if len(part)] for side in (a, b))
    if not a or not b:
        return None
    below, above = (statistic(numpy.concatenate(side)) for side in (a, b))
    if not below or not above:
        return None
    if min(sum(map(len, side)) for side in (a, b)) < enough:
        return Ratio(above / below, None, None)
    random = numpy.random.default_rng(seed)
    found = numpy.empty(RESAMPLES)
    for index in range(RESAMPLES):
        rounds_a = random.integers(len(a), size=len(a))
        rounds_b = rounds_a if paired else random.integers(len(b), size=len(b))
        drawn_a = [_draw(a[place], random) for place in rounds_a]
        if paired and all(len(a[place]) == len(b[place]) for place in rounds_a):
            drawn_b = drawn_a  # request i had the same prompt on both sides
        else:
            drawn_b = [_draw(b[place], random) for place in rounds_b]
        low, high = (
            statistic(
                numpy.concatenate([side[place][rows] for place, rows in zip(places, drawn, strict=True)])
            )
            for side, places, drawn in ((a, rounds_a, drawn_a), (b, rounds_b, drawn_b))
        )
        found[index] = high / low if low else numpy.nan
    tail = (1 - CONFIDENCE) / 2 * 100
    bounds = numpy.nanpercentile(found, [tail, 100 - tail])
    return Ratio(above / below, float(bounds[0]), float(bounds[1]))


def _draw(part: Round, random: numpy.random.Generator) -> numpy.ndarray:
    """Return the rows of one resample of ``part``."""
    return random.integers(len(part), size=len(part))
