# SPDX-License-Identifier: Apache-2.0
"""What is recorded of requests to a small server with known delays. Its delays are lower bounds of the times;
upper ones would depend on how busy the machine is.
"""

import asyncio
import time

import pytest
from fastapi import FastAPI

from server.bench import load
from server.bench.client import RequestOptions, connect, send
from server.bench.metrics import itl_ms, tpot_ms, ttft_ms
from server.bench.target import find_target, find_targets
from server.bench.workload import CONCURRENCY, REQUEST_RATE, WORDS, Prompt
from server.errors import ServerError
from tests.test_server.fake_openai import make_app, running

TTFT_S, TPOT_S = 0.06, 0.01


@pytest.fixture(scope="module")
def app():
    return make_app(TTFT_S, TPOT_S, key="key")


@pytest.fixture(scope="module")
def target(app):
    with running(app) as url:
        yield find_target(url, "key")


def ask(target, prompt="hello you", tokens=5, **options):
    async def one():
        async with connect(target, 5) as client:
            return await send(client, target.model, Prompt(prompt, tokens), RequestOptions(**options))

    return asyncio.run(one())


def test_times_and_tokens_of_a_completion(target, app):
    record = ask(target)
    assert not record.failure, record.message
    assert (record.prompt_tokens, record.completion_tokens, record.finish_reason) == (2, 5, "length")
    assert len(record.chunk_s) == 5 and record.chunk_s == sorted(record.chunk_s)
    assert record.sent_s < record.chunk_s[0] <= record.chunk_s[-1] <= record.end_s
    assert ttft_ms(record) >= TTFT_S * 1e3
    # The sum of sleeps on the server's side; a single gap may be shorter where a piece was late.
    assert tpot_ms(record) * 4 + ttft_ms(record) >= (TTFT_S + 4 * TPOT_S) * 1e3
    assert len(itl_ms(record)) == 4
    body = app.state.bodies[-1]
    assert body["stream_options"] == {"include_usage": True} and body["ignore_eos"] is True
    assert (body["prompt"], body["max_tokens"], body["temperature"]) == ("hello you", 5, 0)


def test_a_chat_has_its_first_token_when_there_is_content(target, app):
    record = ask(target, [{"role": "user", "content": "hi"}], chat=True, ignore_eos=False)
    assert not record.failure and record.completion_tokens == len(record.chunk_s) == 5
    assert ttft_ms(record) >= TTFT_S * 1e3, "the first event has only the role"
    assert "ignore_eos" not in app.state.bodies[-1] and app.state.bodies[-1]["messages"][0]["content"] == "hi"


def test_tokens_are_counted_by_the_server_and_not_by_pieces():
    with running(make_app(0, TPOT_S, tokens_per_chunk=4)) as url:
        record = ask(find_target(url, None), tokens=10)
    assert record.completion_tokens == 10 and len(record.chunk_s) == 3
    assert tpot_ms(record) == pytest.approx((record.chunk_s[-1] - record.chunk_s[0]) * 1e3 / 9)


@pytest.mark.parametrize(
    ("prompt", "kind", "message"),
    [
        ("429", "http 429", "refused with 429"),
        ("500", "http 500", "refused with 500"),
        ("cut", "stream cut", ""),
        ("error", "error in stream", "the engine died"),
        ("silent", "no usage", "include_usage"),
        ("empty", "no content", ""),
        ("slow", "timeout", "0.3 s"),
    ],
)
def test_a_failure_has_a_kind_and_a_message(target, prompt, kind, message):
    record = ask(target, prompt, timeout_s=0.3 if prompt == "slow" else 30)
    assert record.failure == kind and message in record.message and record.message
    assert record.end_s > record.sent_s


def test_no_connection_and_a_wrong_key_are_failures_too(target, free_port):
    import dataclasses

    gone = ask(dataclasses.replace(target, url=f"http://127.0.0.1:{free_port}"))
    assert gone.failure == "connection"
    assert ask(dataclasses.replace(target, api_key="wrong")).failure == "http 401"


def test_a_closed_loop_keeps_its_concurrency():
    app = make_app(0.01)

    async def run(target):
        async with connect(target, 30) as client:
            prompts, warmup = [Prompt("measured", 2)] * 9, [Prompt("warm up", 2)] * 3
            return await load.run_load(client, "fake", CONCURRENCY, 3, prompts, warmup, [], RequestOptions())

    with running(app) as url:
        result = asyncio.run(run(find_target(url, None)))
    assert app.state.most == 3
    assert [record.index for record in result.records] == list(range(9))
    asked = [body["prompt"] for body in app.state.bodies]
    assert asked == ["warm up"] * 3 + ["measured"] * 9, "the warm-up is over before the measurement begins"
    ends = sorted(record.end_s for record in result.records)
    assert all(record.sent_s >= ends[record.index - 3] for record in result.records[3:]), (
        "a request leaves when one has ended"
    )


def test_an_open_loop_does_not_wait_for_answers():
    """One slot of 0.15 s a request, a request every 0.01 s: each leaves when it is due, and its wait counts."""
    due = [0.01 * index for index in range(5)]

    async def run(target):
        async with connect(target, 30) as client:
            prompts = [Prompt("x", 1)] * len(due)
            return await load.run_load(client, "fake", REQUEST_RATE, 100, prompts, [], due, RequestOptions())

    with running(make_app(0.15, slots=1)) as url:
        records = asyncio.run(run(find_target(url, None))).records
    assert [record.scheduled_s for record in records] == due
    assert all(record.sent_s >= record.scheduled_s for record in records)
    assert max(record.sent_s for record in records) < min(record.end_s for record in records)
    waits = sorted(ttft_ms(record) for record in records)
    assert waits[-1] >= 5 * 150 - 1e3 * max(record.sent_s for record in records)


def test_a_client_that_is_held_up_notices():
    async def run():
        async with load._watched() as lags:
            await asyncio.sleep(0.05)
            time.sleep(0.1)  # what a busy core does to the event loop
            await asyncio.sleep(0.05)
        return lags

    assert max(asyncio.run(run())) >= 0.07


def test_the_vocabulary_comes_from_the_server(target):
    assert target.vocabulary.tokens_per_word == 2 and len(target.vocabulary.token_ids) > 50
    with running(make_app(tokenizer=False)) as url:
        plain = find_target(url, None)
    assert plain.vocabulary.token_ids == () and plain.vocabulary.tokens_per_word == 1
    assert len(set(WORDS)) == len(WORDS)


def test_a_server_that_is_loading_is_not_ready():
    loading = FastAPI()
    loading.get("/v1/models", status_code=503)(lambda: {"error": {"message": "the model is loading"}})
    with running(loading) as url, pytest.raises(ServerError, match="not ready"):
        find_target(url, None)


def test_targets_have_labels_that_differ(target):
    both = find_targets([target.url, target.url + "/v1"], ["a", "b"], [], "key")
    assert [one.label for one in both] == ["a", "b"] and both[0].url == both[1].url
    with pytest.raises(ServerError, match="do not differ"):
        find_targets([target.url, target.url], [], [], "key")
    with pytest.raises(ServerError, match="1 --label for 2 --url"):
        find_targets([target.url, target.url], ["a"], [], "key")
    with pytest.raises(ServerError, match="--model other is not served"):
        find_targets([target.url], [], ["other"], "key")
    with pytest.raises(ServerError, match="PVQ_API_KEY"):
        find_target(target.url, "wrong")
    with pytest.raises(ServerError, match=r"does not answer like an OpenAI server \(status 404\)"):
        find_target(target.url + "/elsewhere", "key")
