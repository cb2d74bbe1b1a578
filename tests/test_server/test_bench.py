# SPDX-License-Identifier: Apache-2.0
"""``pvq bench`` from the command line to its results folder, on small servers without a model."""

import csv
import html.parser
import json
import signal
import xml.etree.ElementTree

import numpy
import pytest

from pvq_vllm import cli
from server.bench import intervals, page, results
from server.bench import plan as planning
from server.bench.metrics import ttft_ms
from server.bench.target import find_target
from server.bench.workload import CONCURRENCY, Lengths, RandomPrompts
from tests.test_server.fake_openai import make_app, running

NAME = 'the <b>"new"</b> & one [red]'


@pytest.fixture(scope="module")
def urls():
    """Two servers that ask for a key; the second takes half the time."""
    with (
        running(make_app(0.02, 0.004, model="demo", key="key")) as slow,
        running(make_app(0.01, 0.002, model="demo", key="key")) as fast,
    ):
        yield slow, fast


@pytest.fixture(autouse=True)
def api_key(monkeypatch):
    monkeypatch.setenv("PVQ_API_KEY", "key")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Leave out what takes seconds and is tested with ``folder``: the plots, and most resamples."""
    monkeypatch.setattr(page, "plots", lambda *arguments: [])
    monkeypatch.setattr(intervals, "RESAMPLES", 100)


@pytest.fixture(scope="module")
def folder(urls, tmp_path_factory):
    """The results of two servers, two loads and two rounds."""
    out = tmp_path_factory.mktemp("bench") / "two"
    command = ["bench", "--url", urls[0], "--label", "old", "--url", urls[1], "--label", NAME]
    command += ["--concurrency", "1,2", "--requests", "8", "--rounds", "2", "--ttft-objective-ms", "5000"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PVQ_API_KEY", "key")
        patch.setattr(intervals, "RESAMPLES", 100)
        assert cli.main([*command, "--input-tokens", "5-9", "--output-tokens", "6", "--out", str(out)]) == 0
    return out


def test_every_number_follows_from_the_recorded_times(folder):
    content, rounds = results.read(folder)
    assert (content["completed"], content["failed"], content["failures"]) == (64, 0, {})
    assert [(point["label"], point["load"]) for point in content["points"]] == [
        ("old", 1), (NAME, 1), ("old", 2), (NAME, 2)
    ]  # fmt: skip
    for point in content["points"]:
        parts = rounds[point["label"], point["load"]]
        records = [record for part in parts for record in part]
        assert [len(part) for part in parts] == [8, 8] and point["completed"] == 16
        assert point["ttft_ms"]["p50"] == pytest.approx(numpy.median([*map(ttft_ms, records)]), abs=0.01)
        seconds = sum(max(one.end_s for one in part) - min(one.sent_s for one in part) for part in parts)
        assert point["output_tokens_per_s"] == pytest.approx(16 * 6 / seconds, rel=1e-3)
        assert 5 <= point["input_tokens"]["min"] <= point["input_tokens"]["max"] <= 9
        assert point["output_tokens"] == {"mean": 6, "min": 6, "max": 6}
        assert (point["good"], point["attainment"]) == (16, 1.0)


def test_the_tables_of_the_folder_agree_with_its_json(folder):
    points = json.loads((folder / "load.json").read_text())["points"]
    rows = list(csv.DictReader((folder / "load.csv").read_text().splitlines()))
    assert [(row["label"], float(row["ttft_ms_p99"])) for row in rows] == [
        (point["label"], point["ttft_ms"]["p99"]) for point in points
    ]
    requests = list(csv.DictReader((folder / "requests.csv").read_text().splitlines()))
    assert len(requests) == 64 and {row["failure"] for row in requests} == {""}
    assert not any("key" in path.read_text().split() for path in folder.iterdir()), "the API key is nowhere"


class PageParser(html.parser.HTMLParser):
    """Collects tags, attributes and text, and checks that tags close in order."""

    VOID = ("meta", "br", "link", "img", "input")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_report_is_one_file_that_needs_nothing_else(folder):
    text = (folder / "report.html").read_text()
    parser = PageParser()
    parser.feed(text)
    parser.close()
    assert parser.open == [] and parser.tags.count("svg") == 7 and parser.tags.count("table") == 3
    assert not {"script", "link", "img", "iframe"} & set(parser.tags)
    links = [value for name, value in parser.attributes if name in ("href", "src", "xlink:href")]
    assert all(value.startswith("#") for value in links), "nothing is fetched"
    ids = [value for name, value in parser.attributes if name == "id"]
    assert len(ids) == len(set(ids)) and {value[1:] for value in links} <= set(ids)
    assert NAME in "".join(parser.words) and "<b>" not in text, "names are text and not markup"
    for part in text.split("<svg")[1:]:
        xml.etree.ElementTree.fromstring("<svg" + part.partition("</svg>")[0] + "</svg>")
    assert "#0101" not in text and "#0301" not in text, "colors are the page's"


def test_compare_of_a_folder_with_itself_is_one(folder, tmp_path, capsys):
    assert cli.main(["bench", "compare", str(folder), str(folder), "--json", str(tmp_path / "c.json")]) == 0
    made = json.loads((tmp_path / "c.json").read_text())
    assert len(made["comparisons"]) == 4 and made["warnings"] == []
    for one in made["comparisons"]:
        assert {ratio["value"] for ratio in one["ratios"].values()} == {1}
        bounds = {name: (ratio["low"], ratio["high"]) for name, ratio in one["ratios"].items()}
        assert bounds.pop("TTFT p99") == (None, None), "16 requests say nothing of it"
        assert all(low < 1 < high for low, high in bounds.values())
    assert "1.00 (" in capsys.readouterr().out


def test_compare_says_what_does_not_fit(folder, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    content = json.loads((folder / "load.json").read_text())
    content["settings"]["output_tokens"] = "99"
    (other / "load.json").write_text(json.dumps(content))
    (other / "requests.jsonl").write_text((folder / "requests.jsonl").read_text())
    assert cli.main(["bench", "compare", str(folder), str(other)]) == 0
    assert "the workloads differ in output_tokens: 6 and 99" in capsys.readouterr().err
    (other / "load.json").write_text('{"points": []}')
    assert cli.main(["bench", "compare", str(folder), str(other)]) == 2
    assert "has format 1 and not 2" in capsys.readouterr().err
    assert cli.main(["bench", "compare", str(folder), str(tmp_path / "none")]) == 2
    assert "is no results folder" in capsys.readouterr().err


def test_failures_are_counted_apart_and_by_kind(urls, tmp_path, capsys):
    rows = [{"prompt": text, "output_tokens": 3} for text in ("good one", "429", "cut", "429 again")]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["bench", "--url", urls[0], "--dataset", str(tmp_path / "data.jsonl"), "--request-rate", "inf"]
    out = tmp_path / "out"
    assert cli.main([*command, "--requests", "8", "--warmup", "0", "--out", str(out)]) == 0
    content = json.loads((out / "load.json").read_text())
    assert (content["completed"], content["failed"]) == (2, 6)
    assert content["failures"] == {"http 429": 4, "stream cut": 2}
    assert content["points"][0]["load"] is None and content["points"][0]["ttft_ms"]["samples"] == 2
    assert "4 failed: http 429: refused with 429" in capsys.readouterr().err
    assert "refused with 429" in (out / "report.html").read_text()


def test_the_status_is_1_when_every_request_failed(urls, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text('{"prompt": "500", "output_tokens": 3}')
    command = ["bench", "--url", urls[0], "--dataset", str(tmp_path / "data.jsonl"), "--concurrency", "1"]
    assert cli.main([*command, "--requests", "2", "--out", str(tmp_path / "out")]) == 1
    assert "every request failed" in capsys.readouterr().err
    assert "report.html" in {path.name for path in (tmp_path / "out").iterdir()}


def test_find_rate_reports_the_rates_it_tried(urls, tmp_path, capsys):
    command = ["bench", "--url", urls[1], "--find-rate", "--request-rate", "2000", "--requests", "4"]
    command += ["--output-tokens", "2", "--input-tokens", "4", "--warmup", "1", "--out", str(tmp_path)]
    assert cli.main([*command, "--ttft-objective-ms", "0.001"]) == 0
    found = json.loads((tmp_path / "load.json").read_text())
    assert [point["load"] for point in found["points"]] == [2000, 1000, 500, 250, 125]
    assert {point["attainment"] for point in found["points"]} == {0}
    assert found["highest_rates"][0]["rate"] is None
    assert "no rate was carried" in capsys.readouterr().out
    assert "no rate was carried" in (tmp_path / "report.html").read_text()


def test_compare_of_two_searches_gives_the_ratio_of_their_rates(folder, tmp_path, capsys):
    for name, rate in (("a", 4.0), ("b", 6.0)):
        (tmp_path / name).mkdir()
        content = json.loads((folder / "load.json").read_text())
        content["highest_rates"] = [{"label": "old", "rate": rate, "failed_rate": 9, "outcome": "found"}]
        (tmp_path / name / "load.json").write_text(json.dumps(content))
        (tmp_path / name / "requests.jsonl").touch()
    assert cli.main(["bench", "compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "old: highest rate 4 and 6 requests/s, B / A 1.50" in capsys.readouterr().out


def test_the_bar_is_for_terminals_only(urls, tmp_path, capsys, monkeypatch):
    command = ["bench", "--url", urls[1], "--concurrency", "1", "--requests", "2", "--output-tokens", "2"]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "concurrency 1" not in capsys.readouterr().err.replace("demo, concurrency 1: the client", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "demo, concurrency 1" in capsys.readouterr().err


@pytest.fixture
def heard_signals():
    """Ctrl-C as in a terminal: a shell starts commands in the background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_keeps_what_is_complete(urls, heard_signals):
    lengths = Lengths.parse("2", "")
    # So many that the second load cannot be over when the signal takes effect.
    plan = planning.Plan(CONCURRENCY, (1, 2), RandomPrompts(lengths, lengths), requests=20)
    target = find_target(urls[1], "key")

    def interrupt(stage, record):
        if stage.load == 2:
            signal.raise_signal(signal.SIGINT)

    assert list(planning.run(plan, [target], interrupt)) == [("demo", 1)]


def test_no_server_is_one_sentence_and_status_2(run_pvq, free_port):
    done = run_pvq("bench", "--url", f"http://127.0.0.1:{free_port}")
    assert done.returncode == 2
    assert done.stderr.startswith("pvq: --url") and "no server answers" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_full_disk_is_one_sentence_after_the_table(urls, tmp_path, capsys):
    (tmp_path / "load.json").symlink_to("/dev/full")
    command = ["bench", "--url", urls[1], "--concurrency", "1", "--requests", "2", "--output-tokens", "2"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.err.strip().split("\n")[-1] == (
        f"pvq: --out {tmp_path} cannot be written (No space left on device): "
        "free some space or give another folder"
    )
    assert "Load test" in printed.out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--concurrency", "1", "--request-rate", "1"], "exclude each other"),
        (["--concurrency", "1", "--find-rate"], "exclude each other"),
        (["--find-rate"], "needs an objective"),
        (["--find-rate", "--ttft-objective-ms", "1", "--request-rate", "1,2"], "starts at one rate"),
        (["--find-rate", "--ttft-objective-ms", "1", "--rounds", "3"], "leave --rounds out"),
        (["--duration-s", "5"], "--duration-s is for rates"),
        (["--duration-s", "5", "--request-rate", "1,inf"], "leave out inf"),
        (["--endpoint", "embeddings"], "--endpoint embeddings is unknown"),
        (["--output-tokens", "many"], "--output-tokens many"),
        (["--dataset", "/nowhere.json"], "cannot be read"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, reason, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert reason in capsys.readouterr().err


def test_compare_is_in_the_help(capsys):
    assert cli.main(["bench", "--help"]) == 0
    assert "compare" in capsys.readouterr().out
