# SPDX-License-Identifier: Apache-2.0
"""Requests that no server should have to see: each kind once or at random, from a seed."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/chat/completions/batch",
    "/tokenize",
    "/detokenize",
    "/invocations",
    "/generative_scoring",
)

# Values that are wrong nearly everywhere, or allowed and extreme.
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    -(2**63) - 1,
    10**400,
    1e308,
    -1e-308,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "x",
    "\ud800",
    "\x00",
    "💥" * 50,
    "a" * 5000,
    [],
    {},
    [None],
    [[]],
    [[[]]],
    [{}],
    {"": None},
    {"type": "object"},
    [1, "a"],
    [-1],
    [2**31],
    [2**70],
    ["\udfff"],
    {"type": "function"},
    {"type": "json_schema"},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/nosuch"}}},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "minItems": 10**9}}},
    {"regex": "(a+)+$("},
    {"grammar": "root ::= root"},
    {"choice": []},
    {"json": "{"},
)

_FIELDS = (
    "model messages prompt input system stream stream_options n best_of max_tokens max_completion_tokens "
    "max_output_tokens min_tokens temperature top_p top_k min_p seed stop stop_token_ids stop_sequences logprobs "
    "top_logprobs prompt_logprobs echo suffix logit_bias presence_penalty frequency_penalty repetition_penalty "
    "length_penalty user tools tool_choice parallel_tool_calls response_format structured_outputs reasoning "
    "reasoning_effort chat_template chat_template_kwargs documents add_generation_prompt continue_final_message "
    "truncate_prompt_tokens priority request_id allowed_token_ids bad_words ignore_eos skip_special_tokens "
    "return_token_ids return_tokens_as_token_ids cache_salt kv_transfer_params vllm_xargs mm_processor_kwargs "
    "media_io_kwargs use_beam_search include_stop_str_in_output spaces_between_special_tokens prompt_embeds "
    "thinking previous_response_id store background instructions text truncation include metadata tokens "
    "add_special_tokens logits_processors repetition_detection query items label_token_ids"
)
FIELDS = _FIELDS.split()

_KINDS = (
    "field field field field field two_fields nested nested_raw not_json truncated not_utf8 escapes huge_number "
    "duplicate_keys wrong_top content_type encoding header unknown_model unknown_path method oversized "
    "message_shape many empty query"
)
KINDS = _KINDS.split()


@dataclass(frozen=True)
class Malformed:
    """One request as it goes over the wire; ``kind`` groups it in reports."""

    kind: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def _valid(path: str, model: str) -> dict[str, Any]:
    """Return a small good body for ``path``."""
    message = [{"role": "user", "content": "hello"}]
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "hello", "max_tokens": 2},
        "/invocations": {"prompt": "hello", "max_tokens": 2},
        "/v1/responses": {"input": "hello", "max_output_tokens": 2},
        "/v1/chat/completions/batch": {"messages": [message], "max_tokens": 2},
        "/tokenize": {"prompt": "hello"},
        "/detokenize": {"tokens": [5, 6]},
        "/generative_scoring": {"query": "a", "items": ["b"], "label_token_ids": [5, 6]},
    }
    return {"model": model, **bodies.get(path, {"messages": message, "max_tokens": 2})}


def _dump(body: Any) -> bytes:
    return json.dumps(body).encode()


def _nest(draw: random.Random, depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value] if draw.random() < 0.5 else {"a": value}
    return value


def _raw_nesting(depth: int, field: str, good: dict[str, Any]) -> bytes:
    """Nest lists so deeply that Python's own encoder would give up."""
    whole = _dump({**good, field: "@"})
    return whole.replace(b'"@"', b"[" * depth + b"]" * depth)


def _one(draw: random.Random, model: str, big_body_bytes: int) -> Malformed:
    path = draw.choice(PATHS[:2] if draw.random() < 0.5 else PATHS)
    good = _valid(path, model)
    headers = {"Content-Type": "application/json"}
    kind = draw.choice(KINDS)
    method, body = "POST", _dump(good)
    if kind in ("field", "two_fields"):
        for field in draw.sample(FIELDS, 1 if kind == "field" else 2):
            good[field] = draw.choice(VALUES)
        body = _dump(good)
    elif kind == "nested":
        body = _dump({**good, draw.choice(FIELDS): _nest(draw, draw.choice((20, 60, 200, 800)))})
    elif kind == "nested_raw":
        body = _raw_nesting(draw.choice((500, 5_000, 100_000)), draw.choice(FIELDS), good)
    elif kind == "not_json":
        body = draw.choice((b"hello", b"{", b"}", b"[", b'{"a":}', b"\x00", b"'", b"{'a': 1}", b"nul", b'"'))
    elif kind == "truncated":
        body = body[: draw.randrange(len(body))]
    elif kind == "not_utf8":
        body = body.replace(
            b"hello", draw.choice((b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80"))
        )
        headers["Content-Type"] = draw.choice(("application/json", "application/json; charset=utf-16"))
    elif kind == "escapes":
        body = body.replace(b"hello", draw.choice((b"\\ud800", b"\\udfff\\ud800", b"\\u0000", b"\\x", b"\n")))
    elif kind == "huge_number":
        number = draw.choice(
            (b"9" * 5000, b"1e99999", b"-1e99999", b"0." + b"1" * 5000, b"NaN", b"-Infinity")
        )
        body = _dump({**good, draw.choice(FIELDS): "@"}).replace(b'"@"', number)
    elif kind == "duplicate_keys":
        body = body[:-1] + b', "model": 7, "max_tokens": [1], "max_tokens": {}}'
    elif kind == "wrong_top":
        body = _dump(draw.choice(VALUES[:12] + VALUES[21:31]))
    elif kind == "content_type":
        headers["Content-Type"] = draw.choice(
            (
                "text/plain",
                "application/xml",
                "",
                "multipart/form-data",
                "application/x-www-form-urlencoded",
                "\u00ff",
            )
        )
    elif kind == "encoding":
        headers["Content-Encoding"] = draw.choice(("gzip", "br", "x"))
    elif kind == "header":
        name = draw.choice(
            (
                "X-Request-Id",
                "Accept",
                "traceparent",
                "X-data-parallel-rank",
                "endpoint-load-metrics-format",
                "Range",
            )
        )
        headers[name] = draw.choice(("a" * 4000, "-1", "x y\tz", "00-0-0-0", "\u00e9\u00ff", "None", "1e9"))
    elif kind == "unknown_model":
        body = _dump({**good, "model": draw.choice(("nosuch", "../../etc/passwd", "a" * 2000, "%00"))})
    elif kind == "unknown_path":
        path = draw.choice(
            ("/v1/nosuch", "/v1//completions", "/%00", "/../../etc/passwd", "/v1/models/x/y", "/%ff")
        )
    elif kind == "method":
        method = draw.choice(("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE"))
        path = draw.choice(
            (*PATHS, "/metrics", "/health", "/v1/models", "/v1/responses/x", "/v1/responses/x/cancel")
        )
    elif kind == "oversized":
        body = b'{"model": "' + b"a" * big_body_bytes + b'"}'
    elif kind == "message_shape":
        good["messages"] = draw.choice(
            (
                [{"role": "user"}],
                [{"role": "nosuch", "content": "x"}],
                [{"role": "user", "content": [{"type": "text"}]}],
                [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,x"}}]}],
                [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
                [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "x", "format": 1}}]}],
                [{"role": "user", "content": [{"type": "nosuch"}]}],
                [{"role": "assistant", "tool_calls": [{"function": {"name": 1, "arguments": "{"}}]}],
                [{"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function",
                  "function": {"name": "f", "arguments": "[]"}}]}],
                [{"role": "assistant", "content": None, "tool_calls": {}}],
                [{"role": "tool", "content": "x"}],
                [[{"role": "user", "content": "x"}]],
                [{"role": "user", "content": 5}],
                [{"role": "user", "content": "\ud83d"}],
                [{"content": "x"}],
                [7],
            )
        )  # fmt: skip
        body = _dump(good)
    elif kind == "many":
        change = draw.choice(
            (
                {"prompt": ["a"] * 5000},
                {"n": 10**6},
                {"stop": ["x"] * 5000},
                {"messages": [{"role": "user", "content": "x"}] * 3000},
                {"prompt": list(range(5, 500)) * 40},
                {"prompt": [[5]] * 5000},
                {"prompt": [10**6]},
                {"logit_bias": {str(token): 100 for token in range(5000)}},
                {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(500)]},
                {"best_of": 10**6, "use_beam_search": True, "n": 10**6},
            )
        )
        body = _dump({**good, **change})
    elif kind == "empty":
        body = b""
    elif kind == "query":
        path += draw.choice(("?%ff=%zz", "?" + "a=b&" * 2000, "?stream=true"))
    return Malformed(kind, method, path, headers, body)


def requests(count: int, seed: int, model: str, big_body_bytes: int) -> Iterator[Malformed]:
    """Yield ``count`` malformed requests.

    Args:
        count: how many.
        seed: the same seed gives the same requests.
        model: the served name, so that the rest of the request is good.
        big_body_bytes: size of the oversized bodies; take more than the server allows.
    """
    draw = random.Random(seed)
    for _ in range(count):
        yield _one(draw, model, big_body_bytes)
