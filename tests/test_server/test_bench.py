# SPDX-License-Identifier: Apache-2.0
"""The load test against canned results of vLLM's client: what is counted, what is written, what ends with
which status.
"""

import json
import math

import pytest

from pvq_vllm import cli
from server.bench import client
from server.bench.picture import draw
from server.bench.results import point_from_result, point_without_result, report, table
from server.errors import ServerError

# Cut down from a result of `vllm bench serve --save-detailed` (0.32.0).
RESULT = {
    "duration": 10.5,
    "completed": 6,
    "failed": 2,
    "request_throughput": 0.57,
    "output_throughput": 9.15,
    **{
        f"{kind}_{name}_ms": 100.0 + offset
        for offset, kind in enumerate(("mean", "median", "p90", "p99"))
        for name in ("ttft", "tpot", "itl", "e2el")
    },
    "p50_ttft_ms": 999.0,
    "errors": ["", "", "Bad Request", "", "Traceback\n  File\nBad Request", "", "", ""],
}
TARGET = client.Target("http://127.0.0.1:9", "demo", "/models/demo", "key")
NONE = dict.fromkeys(("mean", "p50", "p90", "p99"))


def test_failed_requests_are_counted_apart_and_by_reason():
    point = point_from_result(4, RESULT)
    assert (point.completed, point.failed, point.errors) == (6, 2, {"Bad Request": 2})
    assert point.ttft_ms == {"mean": 100.0, "p50": 101.0, "p90": 102.0, "p99": 103.0}
    assert (point.output_tokens_per_s, point.requests_per_s, point.duration_s) == (9.15, 0.57, 10.5)


def test_statistics_of_nothing_are_absent_not_zero():
    nothing = {**RESULT, "completed": 0, "failed": 8, "mean_ttft_ms": 0.0, "mean_tpot_ms": math.nan}
    point = point_from_result(1, nothing)
    assert point.ttft_ms == point.tpot_ms == NONE
    assert point_from_result(1, {**RESULT, "mean_tpot_ms": math.nan}).tpot_ms["mean"] is None


def test_report_adds_up_and_is_strict_json():
    points = [point_from_result(1, RESULT), point_without_result(2, 8, "no result")]
    made = report(points, model="demo", axis=client.CONCURRENCY)
    assert (made["completed"], made["failed"], made["model"]) == (6, 10, "demo")
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert [point["load"] for point in made["points"]] == [1, 2]


def test_picture_and_table_also_of_a_load_that_failed(tmp_path):
    points = [point_from_result(None, RESULT), point_without_result(2, 8, "no result")]
    draw(points, client.REQUEST_RATE, "title", tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    assert table(points, client.REQUEST_RATE).row_count == 2


@pytest.mark.parametrize(
    ("text", "flag", "loads"),
    [
        ("1,2,4", "--concurrency", (1, 2, 4)),
        ("0.5,inf", "--request-rate", (0.5, None)),
        ("2,2", "--concurrency", (2,)),
    ],
)
def test_loads_are_parsed(text, flag, loads):
    assert client.parse_loads(text, flag) == loads


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
        client.parse_loads(text, flag)


def test_command_warms_up_as_much_as_it_loads_and_never_repeats_a_seed(tmp_path):
    workload = client.Workload(
        client.CONCURRENCY, (1, 16), requests=4, input_tokens=8, output_tokens=4, seed=7
    )
    first, second = (client.bench_command(TARGET, workload, index, tmp_path, "x.json") for index in (0, 1))

    def value(command, flag):
        return command[command.index(flag) + 1]

    assert [value(second, flag) for flag in ("--max-concurrency", "--num-warmups", "--num-prompts")] == [
        "16",
        "16",
        "32",
    ]
    assert value(first, "--seed") != value(second, "--seed")
    assert "key" not in first, "the key goes by environment, where other users cannot read it"
    rate = client.Workload(client.REQUEST_RATE, (0.5, None), 4, 8, 4)
    assert value(client.bench_command(TARGET, rate, 0, tmp_path, "x"), "--request-rate") == "0.5"
    assert value(client.bench_command(TARGET, rate, 1, tmp_path, "x"), "--request-rate") == "inf"


FAKE_LAUNCHER = """
import json, os, sys
from pathlib import Path
for part in " ".join(sys.argv[1:]).split(" --next "):
    words = part.split()
    value = lambda flag: words[words.index(flag) + 1]
    assert os.environ["OPENAI_API_KEY"] == "key"
    if value("--max-concurrency") == "2":
        print("client failed"); continue
    Path(value("--result-dir"), value("--result-filename")).write_text(json.dumps(RESULT))
"""


def test_a_load_without_result_counts_as_failed_and_the_next_one_runs(tmp_path, monkeypatch):
    (tmp_path / "fake_vllm_launcher.py").write_text(f"RESULT = {RESULT!r}\n{FAKE_LAUNCHER}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(client, "LAUNCHER", "fake_vllm_launcher")
    started = []
    workload = client.Workload(client.CONCURRENCY, (1, 2, 4), requests=8, input_tokens=8, output_tokens=4)
    points = client.run(TARGET, workload, tmp_path / "out", started.append)
    assert [(point.completed, point.failed) for point in points] == [(6, 2), (0, 8), (6, 2)]
    assert started[0] == 0 and started[-1] == 3
    assert "client.log" in next(iter(points[1].errors))
    assert "client failed" in (tmp_path / "out" / "client.log").read_text()


def test_no_server_is_one_sentence_and_status_2(run_pvq, free_port):
    done = run_pvq("bench", "--url", f"http://127.0.0.1:{free_port}")
    assert done.returncode == 2
    assert done.stderr.startswith("pvq: --url") and "no server answers" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_full_disk_is_one_sentence_after_the_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(client, "find_target", lambda *arguments: TARGET)
    monkeypatch.setattr(client, "run", lambda *arguments: [point_from_result(2.0, RESULT)])
    (tmp_path / "load.json").symlink_to("/dev/full")
    assert cli.main(["bench", "--concurrency", "2", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.err.strip().split("\n")[-1] == (
        f"pvq: --out {tmp_path} cannot be written (No space left on device): "
        "free some space or give another folder"
    )
    assert "9.2" in printed.out  # tokens per second, in the table


def test_both_axes_at_once_are_refused(run_pvq):
    done = run_pvq("bench", "--concurrency", "1", "--request-rate", "1")
    assert done.returncode == 2 and "exclude each other" in done.stderr


def test_launcher_splits_commands():
    from pvq_vllm.vllm_launcher import split_commands

    assert split_commands(["bench", "a", "--next", "bench", "b"]) == [["bench", "a"], ["bench", "b"]]
    assert split_commands(["--next", "x"]) == [["x"]] and split_commands([]) == []
