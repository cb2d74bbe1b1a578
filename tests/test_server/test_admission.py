# SPDX-License-Identifier: Apache-2.0
"""What is refused before the engine sees it, at once and in OpenAI's error shape."""

import asyncio
import json

import pytest
from starlette.testclient import TestClient

from server.admission import Admission, Limits
from server.asgi import send_bytes

PATH = "/v1/completions"


class App:
    """Answers with the body it got; POST /tokenize counts words. Waits for ``go`` if it is set to wait."""

    def __init__(self):
        self.calls, self.go = [], None

    async def __call__(self, scope, receive, send):
        body = (await receive())["body"]
        self.calls.append((scope["path"], body))
        if scope["path"] == "/tokenize":
            asked = json.loads(body)
            contents = [message["content"] for message in asked.get("messages", ())]
            if not all(isinstance(content, str) for content in contents):
                await send_bytes(send, 400, b"{}")
                return
            text = asked.get("prompt") or " ".join(contents)
            body = json.dumps({"count": len(text.split())}).encode()
        if self.go is not None:
            await self.go.wait()
        await send_bytes(send, 200, body)


@pytest.fixture
def app():
    return App()


@pytest.fixture
def client(app):
    """Return a function: limits -> client of ``app`` behind them."""

    def make(**limits):
        return TestClient(Admission(app, Limits(**{"sequences": 8, "body_bytes": 10_000, **limits})))

    return make


def refusal(response):
    """Return status and code of an error, after a look at its shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return response.status_code, error["code"]


def test_a_good_request_arrives_as_it_was_sent(client, app):
    body = b'{"prompt":  "x\\u00e9", "n":2}'
    response = client().post(PATH, content=body, headers={"Content-Type": "application/json"})
    assert response.content == body and app.calls == [(PATH, body)]


def test_other_bodies_pass_unread(client):
    assert (
        client().post("/v1/audio", content=b"\xff{[", headers={"Content-Type": "audio/wav"}).status_code
        == 200
    )


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_too_large_is_refused(client, app, chunked):
    body = b'{"prompt": "' + b"a" * 10_000 + b'"}'
    content = iter([body[:6000], body[6000:]]) if chunked else body
    response = client().post(PATH, content=content, headers={"Content-Type": "application/json"})
    assert refusal(response) == (413, "body_too_large") and app.calls == []


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b" ", "not JSON"),
        (b"{", "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": ' + b"[" * 65 + b"]" * 65 + b"}", "nested deeper than 64"),
        (b"[" * 5000, "nested deeper than 64"),
        (b'{"seed": 9223372036854775808}', "64 bits"),
        (b'{"a": [{"b": -9223372036854775809}]}', "64 bits"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"stop": ["a\\ud800"]}', "surrogate"),
        (b'{"\\uDFFF": 1}', "surrogate"),
        (b'{"temperature": NaN}', "NaN, which is not JSON"),
        (b'{"temperature": -Infinity}', "Infinity, which is not JSON"),
        (b'{"structured_outputs": [1]}', "structured_outputs must be an object"),
        (b'{"top_k": "9223372036854775808"}', "top_k does not fit"),
    ],
)
def test_json_that_breaks_what_is_behind_is_refused(client, app, body, reason):
    response = client().post(PATH, content=body, headers={"Content-Type": "application/json; charset=utf-8"})
    assert refusal(response)[0] == 400 and reason in response.json()["error"]["message"]
    assert app.calls == []


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": ' + b"[" * 63 + b"]" * 63 + b"}",
        b'{"seed": 9223372036854775807, "x": -9223372036854775808, "text": "99999999999999999999"}',
        b'{"prompt": [' + b",".join([b"[1]"] * 100) + b'], "n": 0}',
        b'{"prompt": "\\ud83d\\ude00 \\\\ud800"}',
        b'{"top_k": "5", "prompt": "9223372036854775808"}',
        b"[]",
        b"5",
        b"",
    ],
)
def test_json_at_the_limits_passes(client, body):
    response = client(sequences=1000).post(PATH, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "request_",
    [
        {"prompt": "x", "n": 9},
        {"prompt": ["x"] * 9},
        {"prompt": [[1]] * 3, "n": 3},
        {"prompt": "x", "best_of": 9},
        {"prompt": "x", "n": "9"},  # vLLM takes these for numbers too
        {"prompt": "x", "n": 9.0},
        {"input": ["x"] * 9},
        {"query": "x", "items": ["x"] * 9},
        {"messages": [[{"role": "user", "content": "x"}]] * 9},
        {"token_ids": [1], "sampling_params": {"n": 9}},
    ],
)
def test_a_request_for_more_sequences_than_there_can_be_is_refused(client, request_):
    assert refusal(client().post(PATH, json=request_)) == (413, "too_many_sequences")


@pytest.mark.parametrize(
    "request_",
    [
        {"prompt": "x", "n": 8},
        {"prompt": [1] * 9},
        {"prompt": ["x"] * 8, "n": True},
        {"prompt": "x", "n": "nine"},
        {"messages": [{"role": "user", "content": "x"}] * 9},
        {"input": [{"role": "user", "content": "x"}] * 9},
    ],
)
def test_fewer_sequences_pass(client, request_):
    assert client().post(PATH, json=request_).status_code == 200


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_an_answer_too_long_is_refused(client, field):
    limited = client(output_tokens=20)
    response = limited.post(PATH, json={"prompt": "x", field: 21})
    assert refusal(response) == (413, "output_too_long") and response.json()["error"]["param"] == field
    assert refusal(limited.post(PATH, json={"prompt": "x", field: "21"})) == (413, "output_too_long")
    assert limited.post(PATH, json={"prompt": "x", field: 20}).status_code == 200
    nested = {"token_ids": [1], "sampling_params": {"max_tokens": 21}}
    assert refusal(limited.post(PATH, json=nested)) == (413, "output_too_long")


LONG = "word " * 30  # 30 tokens for the fake /tokenize


@pytest.mark.parametrize(
    "request_",
    [
        {"prompt": LONG},
        {"prompt": ["x", LONG]},
        {"prompt": [7] * 21},
        {"prompt": [[7], [7] * 21]},
        {"messages": [{"role": "user", "content": LONG}]},
        {"messages": [[{"role": "user", "content": LONG}]]},
        {"input": LONG},
        {"input": [{"role": "user", "content": LONG}]},
        {"input": "x", "instructions": LONG},
        {"token_ids": [7] * 21},
        {"messages": [{"role": "user", "content": "x"}], "system": LONG},
        {"messages": [{"role": "user", "content": "x"}], "system": [{"type": "text", "text": LONG}]},
        # /tokenize does not take these
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": LONG}]}]},
    ],
)
def test_a_prompt_too_long_is_refused(client, app, request_):
    assert refusal(client(prompt_tokens=20).post(PATH, json=request_)) == (413, "prompt_too_long")
    assert PATH not in [path for path, _ in app.calls]


@pytest.mark.parametrize(
    "request_",
    [
        {"prompt": "long " * 20},
        {"prompt": [7] * 20},
        {"prompt": {}},
        {"messages": 5, "prompt": 5},
        {"messages": [[], 5], "system": "x", "sampling_params": 5},
        {},
    ],
)
def test_a_prompt_that_fits_passes(client, request_):
    padded = {**request_, "user": "x" * 100}  # so that it has to be counted
    assert client(prompt_tokens=20).post(PATH, json=padded).status_code == 200


def test_a_prompt_that_vllm_cannot_count_is_left_to_vllm(client, app, caplog):
    async def broken(scope, receive, send):
        if scope["path"] == "/tokenize":
            await send_bytes(send, 500, b"{}")
            raise RuntimeError("broken")
        await app(scope, receive, send)

    limited = TestClient(Admission(broken, Limits(sequences=8, body_bytes=10_000, prompt_tokens=20)))
    assert limited.post(PATH, json={"prompt": LONG}).status_code == 200
    assert "could not count" in caplog.text


def test_a_short_body_is_not_counted(client, app):
    client(prompt_tokens=200).post(PATH, json={"prompt": "a b"})
    assert [path for path, _ in app.calls] == [PATH]


async def call(admission, body, key="", chunks=None):
    """Send one request straight to ``admission``; return status, code and headers."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": PATH,
        "headers": [(b"content-type", b"application/json")],
        "pvq.key": key,
    }
    messages = []
    parts = [json.dumps(body).encode()] if chunks is None else chunks

    async def receive():
        return (
            parts.pop(0)
            if parts and isinstance(parts[0], dict)
            else {"type": "http.request", "body": parts.pop(0)}
        )

    async def send(message):
        messages.append(message)

    await admission(scope, receive, send)
    if not messages:
        return None
    status, headers = messages[0]["status"], dict(messages[0]["headers"])
    return status, json.loads(messages[1]["body"])["error"]["code"] if status != 200 else "", headers


async def fill(admission, app, count, key="", body=None):
    """Start ``count`` requests and return them once all are in the app."""
    app.go = asyncio.Event()
    tasks = [asyncio.create_task(call(admission, body or {"prompt": "x"}, key)) for _ in range(count)]
    while len(app.calls) < count:
        await asyncio.sleep(0)
    return tasks


def test_one_too_many_gets_429_and_there_is_room_again_later(app):
    async def scenario():
        admission = Admission(app, Limits(sequences=4, body_bytes=1000))
        running = await fill(admission, app, 2, body={"prompt": "x", "n": 2})
        status, code, headers = await call(admission, {"prompt": "x"})
        assert (status, code) == (429, "server_busy") and int(headers[b"retry-after"]) >= 1
        app.go.set()
        assert [(await task)[0] for task in running] == [200, 200]
        assert (await call(admission, {"prompt": "x", "n": 4}))[0] == 200

    asyncio.run(scenario())


def test_a_full_server_refuses_before_it_reads_the_body(app):
    async def scenario():
        admission = Admission(app, Limits(sequences=1, body_bytes=1000))
        running = await fill(admission, app, 1)

        async def never():
            raise AssertionError("the body was read")

        answers = []
        scope = {"type": "http", "method": "POST", "path": PATH, "headers": [], "pvq.key": ""}

        async def send(message):
            answers.append(message)

        await admission(scope, never, send)
        assert answers[0]["status"] == 429
        app.go.set()
        await running[0]

    asyncio.run(scenario())


def test_bodies_that_do_not_arrive_take_no_room(app):
    async def scenario():
        admission = Admission(app, Limits(sequences=100, body_bytes=100))
        scope = {"type": "http", "method": "POST", "path": PATH, "headers": [], "pvq.key": ""}

        async def silent():
            await asyncio.Event().wait()

        idle = [asyncio.create_task(admission(dict(scope), silent, None)) for _ in range(50)]
        await asyncio.sleep(0)
        assert (await call(admission, {"prompt": "x"}))[0] == 200
        for task in idle:
            task.cancel()

    asyncio.run(scenario())


def test_bodies_that_arrive_are_bounded_together(app):
    async def scenario():
        admission = Admission(app, Limits(sequences=100, body_bytes=100))
        part = {"type": "http.request", "body": b"x" * 100, "more_body": True}
        scope = {"type": "http", "method": "POST", "path": PATH, "headers": [], "pvq.key": ""}

        def holding():
            parts = [part]

            async def receive():
                if not parts:
                    await asyncio.Event().wait()
                return parts.pop()

            return receive

        held = [asyncio.create_task(admission(dict(scope), holding(), None)) for _ in range(32)]
        await asyncio.sleep(0)
        assert (await call(admission, {"prompt": "x"}))[:2] == (429, "server_busy")
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        assert (await call(admission, {"prompt": "x"}))[0] == 200

    asyncio.run(scenario())


def test_one_key_cannot_take_the_room_of_others(app):
    async def scenario():
        admission = Admission(app, Limits(sequences=4, body_bytes=1000, sequences_per_key=2))
        running = await fill(admission, app, 2, key="alice")
        assert (await call(admission, {"prompt": "x"}, "alice"))[:2] == (429, "sequences_per_key")
        other = asyncio.create_task(call(admission, {"prompt": "x"}, "bob"))
        app.go.set()
        assert (await other)[0] == 200 and [(await task)[0] for task in running] == [200, 200]
        assert (await call(admission, {"prompt": "x"}, "alice"))[0] == 200

    asyncio.run(scenario())


def test_requests_a_minute_are_counted_for_each_key(app, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("server.admission.time.monotonic", lambda: now[0])

    async def scenario():
        admission = Admission(app, Limits(sequences=4, body_bytes=1000, requests_per_minute=2))
        statuses = [(await call(admission, {"prompt": "x"}, "alice"))[0] for _ in range(3)]
        assert statuses == [200, 200, 429]
        _, code, headers = await call(admission, {"prompt": "x"}, "alice")
        assert code == "requests_per_minute" and 30 <= int(headers[b"retry-after"]) <= 31
        assert (await call(admission, {"prompt": "x"}, "bob"))[0] == 200
        now[0] += 30.1
        assert (await call(admission, {"prompt": "x"}, "alice"))[0] == 200

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [RuntimeError("broken"), asyncio.CancelledError()])
def test_room_comes_back_when_a_request_fails_or_its_client_leaves(error):
    async def failing(scope, receive, send):
        raise error

    async def scenario():
        admission = Admission(failing, Limits(sequences=1, body_bytes=1000))
        for _ in range(3):
            with pytest.raises(type(error)):
                await call(admission, {"prompt": "x"})

    asyncio.run(scenario())


def test_a_client_that_leaves_while_it_sends_is_forgotten(app):
    async def scenario():
        admission = Admission(app, Limits(sequences=1, body_bytes=1000))
        parts = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
        for _ in range(3):
            assert await call(admission, None, chunks=list(parts)) is None
        assert app.calls == [] and (await call(admission, {"prompt": "x"}))[0] == 200

    asyncio.run(scenario())
