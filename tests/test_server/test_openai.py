# SPDX-License-Identifier: Apache-2.0
"""What the official client can do with the server. The model is random, so form is tested and not sense."""

import asyncio
import json

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

HELLO = [{"role": "user", "content": "hello"}]
GREEDY = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}}
TOOL = {
    "type": "function",
    "function": {
        "name": "switch",
        "description": "turn a lamp on or off",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        },
    },
}


def test_models_lists_the_served_name_with_the_facts(client):
    (model,) = client.models.list()
    assert model.id == "tiny" and model.object == "model"
    assert model.pvq["weight_bytes"] > 100_000 and model.pvq["quantization"] is None


def test_one_model_by_its_name(client):
    import openai

    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nosuch")


def test_cancelling_a_response_that_is_not_there_says_so(client):
    """The client sends a content type and no body."""
    import openai

    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_nosuch")


def test_chat_answers_with_as_many_tokens_as_asked(client):
    reply = client.chat.completions.create(messages=HELLO, max_tokens=6, **GREEDY)
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 6
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 6


def test_streaming_gives_the_same_text_as_not_streaming(client):
    request = dict(prompt="the quick brown fox", max_tokens=8, **GREEDY)
    whole = client.completions.create(**request)
    parts = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole.choices[0].text
    assert sum(bool(part.choices) for part in parts) > 1
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens == 8


def test_chat_streams_and_the_async_client_works_too(client, served):
    from openai import AsyncOpenAI

    whole = client.chat.completions.create(messages=HELLO, max_tokens=8, **GREEDY)

    async def stream():
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0) as openai:
            parts = await openai.chat.completions.create(messages=HELLO, max_tokens=8, stream=True, **GREEDY)
            return "".join([part.choices[0].delta.content or "" async for part in parts])

    assert asyncio.run(stream()) == whole.choices[0].message.content


def test_n_answers_differ_and_a_seed_repeats_them(client):
    request = dict(
        model="tiny", prompt="a", max_tokens=12, n=3, temperature=1, extra_body={"ignore_eos": True}
    )
    first, again, other = (client.completions.create(**request, seed=seed) for seed in (7, 7, 8))
    texts = [[choice.text for choice in reply.choices] for reply in (first, again, other)]
    assert len(set(texts[0])) == 3 and texts[0] == texts[1] != texts[2]
    assert sorted(choice.index for choice in first.choices) == [0, 1, 2]


def test_stop_ends_the_text_before_the_word(client):
    text = client.completions.create(prompt="a", max_tokens=30, **GREEDY).choices[0].text
    stop = text[10:12]
    choice = client.completions.create(prompt="a", max_tokens=30, stop=[stop], **GREEDY).choices[0]
    assert choice.finish_reason == "stop" and choice.text == text[: text.index(stop)]


def test_logprobs_are_those_of_the_likeliest_tokens(client):
    reply = client.chat.completions.create(
        messages=HELLO, max_tokens=4, logprobs=True, top_logprobs=3, **GREEDY
    )
    tokens = reply.choices[0].logprobs.content
    assert len(tokens) == 4
    for token in tokens:
        top = [one.logprob for one in token.top_logprobs]
        assert len(top) == 3 and top == sorted(top, reverse=True) and token.logprob == top[0] <= 0
    old = client.completions.create(prompt="a", max_tokens=4, logprobs=2, **GREEDY).choices[0].logprobs
    assert len(old.token_logprobs) == 4 and all(len(top) >= 2 for top in old.top_logprobs)


def test_a_json_schema_is_kept_to(client):
    schema = {"name": "switch", "schema": TOOL["function"]["parameters"], "strict": True}
    reply = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": schema},
    )
    assert set(json.loads(reply.choices[0].message.content)) == {"on"}


def test_a_named_tool_is_called_with_its_arguments(client):
    choice = {"type": "function", "function": {"name": "switch"}}
    request = dict(model="tiny", messages=HELLO, temperature=0, tools=[TOOL], tool_choice=choice)
    (call,) = client.chat.completions.create(**request).choices[0].message.tool_calls
    assert call.function.name == "switch" and set(json.loads(call.function.arguments)) == {"on"}
    parts = [
        part.choices[0].delta
        for part in client.chat.completions.create(**request, stream=True)
        if part.choices
    ]
    pieces = [call.function.arguments or "" for part in parts for call in part.tool_calls or ()]
    assert json.loads("".join(pieces)) == json.loads(call.function.arguments)


def test_tools_may_be_left_unused(client):
    reply = client.chat.completions.create(
        messages=HELLO, max_tokens=4, tools=[TOOL], tool_choice="none", **GREEDY
    )
    assert not reply.choices[0].message.tool_calls and reply.usage.completion_tokens == 4


def test_responses_answer_too(client):
    reply = client.responses.create(model="tiny", input="hello", max_output_tokens=4, temperature=0)
    assert reply.output and reply.usage.output_tokens <= 4


def test_token_ids_echo_and_bias_are_understood(client):
    reply = client.completions.create(
        model="tiny", prompt=[5, 6, 7], max_tokens=3, temperature=0, echo=True, logit_bias={"9": 100}
    )
    assert reply.usage.prompt_tokens == 3 and reply.usage.completion_tokens == 3
    assert len(reply.choices[0].text) > 3


def test_the_clients_request_id_comes_back(client):
    raw = client.completions.with_raw_response.create(
        prompt="x", max_tokens=1, extra_headers={"X-Request-Id": "mine-1"}, **GREEDY
    )
    assert raw.headers["x-request-id"] == "mine-1" and raw.parse().id.endswith("mine-1")


def test_two_requests_with_the_same_id_both_get_answers(served):
    from openai import AsyncOpenAI

    async def both():
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0) as openai:
            request = dict(prompt="x", max_tokens=20, extra_headers={"X-Request-Id": "twice"}, **GREEDY)
            return await asyncio.gather(*[openai.completions.create(**request) for _ in range(4)])

    assert [reply.usage.completion_tokens for reply in asyncio.run(both())] == [20] * 4


@pytest.mark.parametrize(
    ("error", "request_"),
    [
        ("NotFoundError", {"model": "nosuch", "prompt": "x"}),
        ("BadRequestError", {"model": "tiny", "prompt": "x", "temperature": -1}),
        ("BadRequestError", {"model": "tiny", "prompt": [5] * 600}),
        ("APIStatusError", {"model": "tiny", "prompt": "x", "max_tokens": 401}),
        ("APIStatusError", {"model": "tiny", "prompt": ["x"] * 21}),
    ],
)
def test_mistakes_are_the_clients_own_exceptions(client, error, request_):
    import openai

    with pytest.raises(getattr(openai, error)) as raised:
        client.completions.create(**request_)
    assert raised.value.status_code in (400, 404, 413) and raised.value.body["message"]


def test_without_a_length_the_answer_ends_at_the_servers_bound(client):
    reply = client.completions.create(prompt="x", **GREEDY)
    assert reply.usage.completion_tokens <= 400


def test_a_wrong_key_is_refused(served):
    from openai import AuthenticationError, OpenAI

    with pytest.raises(AuthenticationError):
        OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0).models.list()
