# SPDX-License-Identifier: Apache-2.0
"""What a load test sends: lengths, prompts, files, arrival times and the order of the stages."""

import json

import numpy
import pytest

from server.bench.client import RequestOptions
from server.bench.dataset import DatasetPrompts
from server.bench.plan import Plan, prompts, stages
from server.bench.target import Target
from server.bench.workload import (
    CONCURRENCY,
    REQUEST_RATE,
    WORDS,
    Draw,
    Lengths,
    RandomPrompts,
    Vocabulary,
    arrival_times,
    generator,
    parse_loads,
)
from server.errors import ServerError

SHAREGPT = [
    {
        "conversations": [
            {"from": "human", "value": "Why is the sky blue?"},
            {"from": "gpt", "value": "x" * 80},
        ]
    },
    {"conversations": [{"from": "gpt", "value": "an answer without a question"}]},
    {"conversations": [{"from": "human", "value": "And at night?"}, {"from": "gpt", "value": "Black."}]},
]


def random_prompts(input_tokens="8", output_tokens="4"):
    return RandomPrompts(
        Lengths.parse(input_tokens, "--input-tokens"), Lengths.parse(output_tokens, "--output-tokens")
    )


def targets(count=2):
    vocabulary = Vocabulary(tuple(range(100, 900)), 1.5)
    return [Target(name, f"http://{name}", "m", vocabulary=vocabulary) for name in "abc"[:count]]


@pytest.mark.parametrize(
    ("text", "flag", "loads"),
    [
        ("1,2,4", "--concurrency", (1, 2, 4)),
        ("0.5,inf", "--request-rate", (0.5, None)),
        ("2,2", "--concurrency", (2,)),
    ],
)
def test_loads_are_parsed(text, flag, loads):
    assert parse_loads(text, flag) == loads


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("", "--concurrency"),
        ("0", "--concurrency"),
        ("1.5", "--concurrency"),
        ("inf", "--concurrency"),
        ("1,x", "--request-rate"),
        ("nan", "--request-rate"),
        ("-1", "--request-rate"),
    ],
)
def test_bad_loads_are_refused(text, flag):
    with pytest.raises(ServerError, match=flag):
        parse_loads(text, flag)


@pytest.mark.parametrize(
    ("text", "median", "low", "high"),
    [
        ("128", 128, 128, 128),
        ("64-256", 160, 64, 256),
        ("normal:100:20", 100, 20, 180),
        ("lognormal:100:0.5", 100, 5, 2000),
        ("normal:2:50", 2, 1, 250),  # cut at one token
    ],
)
def test_lengths_follow_their_distribution(text, median, low, high):
    lengths, random = Lengths.parse(text, "--input-tokens"), generator(3, Draw.PROMPT)
    drawn = [lengths.draw(random) for _ in range(3000)]
    assert all(isinstance(length, int) for length in drawn)
    assert low <= min(drawn) and max(drawn) <= high
    assert numpy.median(drawn) == pytest.approx(median, rel=0.05, abs=2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "1.5",
        "x",
        "8-4",
        "1-2-3",
        "normal:8",
        "normal:8:-1",
        "uniform",
        "gamma:1:2",
        "nan",
        "normal:8:inf",
    ],
)
def test_bad_lengths_are_refused(text):
    with pytest.raises(ServerError, match="--input-tokens"):
        Lengths.parse(text, "--input-tokens")


def test_arrivals_are_a_poisson_process_that_scales_with_the_rate():
    times = arrival_times(4.0, 20_000, generator(0, Draw.ARRIVAL))
    gaps = numpy.diff(times)
    assert times[0] == 0 and gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(1, rel=0.03), "exponential gaps"
    assert numpy.corrcoef(gaps[1:], gaps[:-1])[0, 1] == pytest.approx(0, abs=0.03)
    assert arrival_times(8.0, 20_000, generator(0, Draw.ARRIVAL)) == pytest.approx(numpy.array(times) / 2)
    assert arrival_times(None, 3, generator(0, Draw.ARRIVAL)) == [0, 0, 0]


def test_all_targets_get_the_same_prompts_and_none_comes_twice():
    plan = Plan(CONCURRENCY, (1, 2), random_prompts(), requests=6, rounds=2, seed=7)
    by_target = {"a": [], "b": []}
    for stage in stages(plan, targets()):
        measured, warmup = prompts(plan, stage)
        by_target[stage.target.label] += [*measured, *warmup]
    assert by_target["a"] == by_target["b"]
    contents = [tuple(prompt.content) for prompt in by_target["a"]]
    assert len(contents) == len(set(contents)) == 2 * (6 + 1 + 6 + 2)
    assert all(len(content) == 8 and set(content) <= set(range(100, 900)) for content in contents)
    again, other = (
        [prompts(plan, stage) for stage in stages(plan, targets())]
        for plan in (plan, Plan(CONCURRENCY, (1, 2), random_prompts(), requests=6, rounds=2, seed=8))
    )
    assert again == [prompts(plan, stage) for stage in stages(plan, targets())] != other


def test_chats_and_servers_without_a_tokenizer_get_words():
    random = generator(0, Draw.PROMPT)
    chat = random_prompts("30").prompt(Vocabulary((1, 2), 1.5), 0, random, chat=True)
    assert chat.content[0]["role"] == "user" and len(chat.content[0]["content"].split()) == 20
    text = random_prompts("30").prompt(Vocabulary(), 0, random, chat=False)
    assert len(text.content.split()) == 30 and set(text.content.split()) <= set(WORDS)


def test_the_first_target_changes_from_round_to_round():
    plan = Plan(CONCURRENCY, (1, 4), random_prompts(), requests=4, rounds=3)
    order = [(stage.round, stage.load, stage.target.label) for stage in stages(plan, targets())]
    assert order[:4] == [(0, 1, "a"), (0, 1, "b"), (0, 4, "a"), (0, 4, "b")]
    assert order[4:8] == [(1, 1, "b"), (1, 1, "a"), (1, 4, "b"), (1, 4, "a")]
    assert order[8][2] == "a" and len(order) == 12


def test_how_many_requests_a_load_gets():
    closed = Plan(CONCURRENCY, (1, 16), random_prompts(), requests=4)
    assert [(closed.requests_at(load), closed.warmup_at(load)) for load in (1, 16)] == [(4, 1), (32, 16)]
    open_ = Plan(REQUEST_RATE, (0.5, None), random_prompts(), requests=4, duration_s=20, warmup=0)
    assert [open_.requests_at(load) for load in (0.5, 0.01, None)] == [10, 4, 4] and open_.warmup_at(0.5) == 0


def write(tmp_path, rows, lines=False):
    path = tmp_path / "data.json"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return path


def test_sharegpt_gives_first_questions_and_the_lengths_of_their_answers(tmp_path):
    source = DatasetPrompts(write(tmp_path, SHAREGPT), None, seed=0)
    assert len(source) == 2
    got = [source.prompt(Vocabulary(), number, generator(0, Draw.PROMPT), chat=False) for number in range(4)]
    assert {(prompt.content, prompt.output_tokens) for prompt in got} == {
        ("Why is the sky blue?", 20),
        ("And at night?", 2),
    }
    assert got[:2] == got[2:], "the file starts again"
    chat = source.prompt(Vocabulary(), 0, generator(0, Draw.PROMPT), chat=True)
    assert chat.content == [{"role": "user", "content": got[0].content}]


def test_json_lines_of_prompts_and_messages(tmp_path):
    rows = [
        {"prompt": "one", "output_tokens": 7},
        {
            "messages": [{"role": "system", "content": "be short"}, {"role": "user", "content": "two"}],
            "completion": "x" * 12,
        },
    ]
    source = DatasetPrompts(write(tmp_path, rows, lines=True), None, seed=0)
    got = [source.prompt(Vocabulary(), number, generator(0, Draw.PROMPT), chat=False) for number in range(2)]
    assert sorted((prompt.content, prompt.output_tokens) for prompt in got) == [
        ("be short\ntwo", 3),
        ("one", 7),
    ]
    fixed = DatasetPrompts(
        write(tmp_path, [{"prompt": "one"}]), Lengths.parse("5", "--output-tokens"), seed=0
    )
    assert fixed.prompt(Vocabulary(), 0, generator(0, Draw.PROMPT), chat=False).output_tokens == 5


def test_other_line_breaks_inside_strings_do_not_end_a_line(tmp_path):
    path = tmp_path / "data.jsonl"
    texts = ["one\u2028still one", "two\u0085still two"]
    rows = [json.dumps({"prompt": text, "output_tokens": 1}, ensure_ascii=False) for text in texts]
    path.write_bytes("\r\n".join(rows).encode())
    source = DatasetPrompts(path, None, seed=0)
    got = [source.prompt(Vocabulary(), number, generator(0, Draw.PROMPT), chat=False) for number in range(2)]
    assert sorted(prompt.content for prompt in got) == texts


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "no prompt"),
        ("{oops", "neither JSON"),
        ('[{"prompt": "x"}]', "--output-tokens"),
        ("[1, null]", "no prompt"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, reason):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(ServerError, match=reason):
        DatasetPrompts(path, None, seed=0)
    with pytest.raises(ServerError, match="cannot be read"):
        DatasetPrompts(tmp_path / "none", None, seed=0)


def test_warmup_of_a_file_takes_other_prompts_than_the_measurement(tmp_path):
    rows = [{"prompt": f"question {index}", "output_tokens": 3} for index in range(20)]
    plan = Plan(
        CONCURRENCY,
        (2,),
        DatasetPrompts(write(tmp_path, rows), None, 0),
        requests=6,
        options=RequestOptions(),
    )
    measured, warmup = prompts(plan, next(stages(plan, targets(1))))
    assert len({prompt.content for prompt in [*measured, *warmup]}) == 8
