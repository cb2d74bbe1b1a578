# SPDX-License-Identifier: Apache-2.0
"""What the numbers of a load test are, from timestamps written down by hand."""

import json

import numpy
import pytest

from server.bench import intervals, metrics
from server.bench.client import Record
from server.bench.load import ClientHealth, LoadRun
from server.bench.metrics import LoadPoint, Objective, point
from server.bench.search import FOUND, NO_LIMIT, NOT_CARRIED, PRECISION, highest_rate, is_carried

QUIET = ClientHealth(0.1, 1.0, 1.0)


def record(sent_s=0.0, chunk_s=(0.5, 0.6, 0.8), end_s=0.85, tokens=3, **fields):
    return Record(0, sent_s, sent_s, list(chunk_s), end_s, 10, tokens, "length", **fields)


def failed(kind="http 429", **fields):
    return Record(1, 0.0, 0.0, end_s=0.1, failure=kind, message="busy", **fields)


def test_times_of_one_request():
    one = record(sent_s=0.25)
    assert metrics.ttft_ms(one) == 250
    assert metrics.itl_ms(one) == pytest.approx([100, 200])
    assert metrics.tpot_ms(one) == pytest.approx(150)  # 300 ms for the two tokens after the first
    assert metrics.e2el_ms(one) == pytest.approx(600)


def test_time_per_token_counts_tokens_and_not_pieces():
    one = record(chunk_s=[1.0, 1.4], tokens=9)  # 8 tokens after the first, in one piece or more
    assert metrics.tpot_ms(one) == pytest.approx(50)
    assert metrics.tpot_ms(record(chunk_s=[1.0], tokens=1)) is None


def test_a_point_adds_up():
    runs = [
        LoadRun([record(), record(sent_s=1.0, chunk_s=(1.2, 1.3), end_s=2.0, tokens=2), failed()], QUIET),
        LoadRun([record(), failed("timeout")], ClientHealth(0.2, 2.0, 0.5)),
    ]
    made = point("a", 4, runs, Objective())
    assert (made.completed, made.failed, made.failures) == (3, 2, {"http 429": 1, "timeout": 1})
    assert made.errors == {"http 429: busy": 1, "timeout: busy": 1}
    assert made.duration_s == pytest.approx(2.0 + 0.85)  # of both rounds, first request to last end
    assert made.output_tokens_per_s == pytest.approx(8 / 2.85)
    assert made.total_tokens_per_s == pytest.approx(38 / 2.85)
    assert made.requests_per_s == pytest.approx(3 / 2.85)
    assert made.ttft_ms["samples"] == 3 and made.ttft_ms["mean"] == pytest.approx((500 + 200 + 500) / 3)
    assert made.tokens_per_chunk == 1 and made.output_tokens == {
        "mean": pytest.approx(8 / 3),
        "min": 2,
        "max": 3,
    }
    assert made.client == {"cpu_share": 0.2, "loop_lag_ms": 2.0, "send_lag_ms": 1.0}, (
        "the worst of the rounds"
    )
    assert made.good is made.attainment is made.goodput_per_s is None and made.warnings == {}
    assert json.dumps(made.__dict__, allow_nan=False)


def test_statistics_of_nothing_are_absent_not_zero():
    made = point("a", 1, [LoadRun([failed(), failed()], QUIET)], Objective(ttft_ms=1))
    assert (made.completed, made.failed, made.attainment, made.goodput_per_s) == (0, 2, 0.0, 0.0)
    assert set(made.ttft_ms.values()) == {None, 0} and made.ttft_ms["samples"] == 0
    assert made.tokens_per_chunk is None and json.dumps(made.__dict__, allow_nan=False)


def test_percentiles_are_marked_until_there_are_enough_samples():
    assert [metrics.samples_needed(share) for share in (50, 90, 99)] == [5, 29, 299]
    times = metrics.statistics(list(range(1, 101)))
    assert (times["p50"], times["p90"], times["samples"]) == (50.5, pytest.approx(90.1), 100)
    assert not metrics.is_uncertain(times, "p90") and metrics.is_uncertain(times, "p99")
    assert not metrics.is_uncertain(times, "mean")
    assert not metrics.is_uncertain(metrics.statistics([1.0] * 299), "p99")


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ((500, None), True),
        ((499, None), False),
        ((None, 150.1), True),
        ((None, 149), False),
        ((500, 149), False),
    ],
)
def test_a_good_request_keeps_to_every_limit(limits, good):
    assert Objective(*limits).is_met(record()) is good
    assert not Objective(*limits).is_met(failed())


def test_goodput_counts_good_requests_of_all():
    made = point(
        "a", 1, [LoadRun([record(), record(sent_s=0.4), failed(), failed()], QUIET)], Objective(ttft_ms=400)
    )
    assert (made.good, made.attainment) == (1, 0.25)
    assert made.goodput_per_s == pytest.approx(1 / 0.85)
    assert is_carried(made, 0.25) and not is_carried(made, 0.26)


@pytest.mark.parametrize(
    ("health", "load", "kinds"),
    [
        (ClientHealth(0.9, 1, 1), 1, {"busy client"}),
        (ClientHealth(0.1, 11, 1), 1, {"late client"}),
        (ClientHealth(0.1, 1, 11), 0.5, {"late requests"}),
        (ClientHealth(0.1, 1, 11), None, set()),  # all at once is as fast as it goes
        (QUIET, 1, set()),
    ],
)
def test_a_client_that_does_not_keep_up_is_warned_about(health, load, kinds):
    made = point("a", load, [LoadRun([record()], health)], Objective())
    assert set(made.warnings) == kinds
    assert [text for _, text, _ in metrics.worst_warnings([made])] == list(made.warnings.values())


def test_slices_hold_all_tokens_and_all_seconds():
    records = [record(), record(sent_s=0.2, chunk_s=(1.0, 1.9), end_s=2.0, tokens=8), failed()]
    parts = intervals.slices(records)
    assert parts.sum(axis=0) == pytest.approx([11, 2.0])
    assert parts[:, 0].tolist() == pytest.approx([0, 0, 1, 1, 1, 4, 0, 0, 0, 4])


METRIC = {metric.title: metric for metric in intervals.METRICS}


def ratio(a, b, title="TTFT p50", **options):
    return intervals.ratio(a, b, METRIC[title].statistic, METRIC[title].enough, **options)


def test_a_ratio_of_few_values_has_no_interval_and_of_none_is_none():
    few = ratio([numpy.ones(9)], [numpy.full(20, 2.0)])
    assert (few.value, few.low, few.high, few.is_clear) == (2.0, None, None, False)
    assert ratio([numpy.ones(99)], [numpy.ones(99)], "TTFT p99").low is None
    assert ratio([numpy.ones(0)], [numpy.ones(20)]) is None


@pytest.mark.parametrize("title", ["TTFT p50", "TTFT p99"])
def test_intervals_hold_the_true_ratio_about_as_often_as_they_say(monkeypatch, title):
    monkeypatch.setattr(intervals, "RESAMPLES", 150)
    random = numpy.random.default_rng(5)
    held, trials = 0, 80
    for trial in range(trials):
        a, b = (random.lognormal(numpy.log(center), 0.4, size=METRIC[title].enough) for center in (100, 125))
        found = ratio([a], [b], title, seed=trial)
        held += found.low <= 1.25 <= found.high
    assert 0.88 * trials <= held < trials, held


def test_rounds_that_drift_together_cancel_in_a_pair_and_widen_the_interval_otherwise():
    random = numpy.random.default_rng(1)
    drift = (1.0, 1.6, 0.7, 1.3)
    a = [factor * random.normal(100, 2, size=40) for factor in drift]
    b = [factor * random.normal(110, 2, size=40) for factor in drift]
    paired, apart = (ratio(a, b, "TTFT p50", paired=pair) for pair in (True, False))
    assert paired.low < 1.1 < paired.high and paired.is_clear and not apart.is_clear
    assert apart.high - apart.low > 5 * (paired.high - paired.low)


@pytest.mark.parametrize("capacity", [0.4, 1.0, 7.3, 900.0])
def test_the_search_ends_close_to_what_is_carried(capacity):
    tried = []
    found = highest_rate("a", 1.0, lambda rate: tried.append(rate) or rate <= capacity)
    assert found.rate <= capacity < found.failed_rate <= found.rate * PRECISION and found.outcome == FOUND
    assert len(tried) == len(set(tried)) <= 16


def test_the_search_ends_without_a_limit():
    nothing, everything = (
        highest_rate("a", 2.0, lambda rate, answer=answer: answer) for answer in (False, True)
    )
    assert (nothing.rate, nothing.failed_rate, nothing.outcome) == (None, 0.125, NOT_CARRIED)
    assert (everything.failed_rate, everything.outcome) == (None, NO_LIMIT)


def test_a_point_has_a_name_for_every_latency():
    assert {f"{name}_ms" for name in metrics.LATENCIES} <= set(LoadPoint.__dataclass_fields__)
