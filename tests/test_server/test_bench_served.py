# SPDX-License-Identifier: Apache-2.0
"""``pvq bench`` against ``pvq serve`` with a tiny random model."""

import json

import pytest

from pvq_vllm import cli


@pytest.mark.vllm
@pytest.mark.slow
def test_a_real_server_gets_exact_lengths_and_the_report_its_facts(served, tmp_path, monkeypatch):
    monkeypatch.setenv("PVQ_API_KEY", served.key)
    command = [
        "bench",
        "--url",
        served.url,
        "--requests",
        "6",
        "--input-tokens",
        "16",
        "--output-tokens",
        "4-8",
    ]
    assert cli.main([*command, "--concurrency", "1,2", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "load.json").read_text())
    assert (content["completed"], content["failed"], content["model"]) == (12, 0, "tiny")
    assert content["targets"][0]["info"]["versions"]["vllm"]
    for point in content["points"]:
        assert point["input_tokens"] == {"mean": 16, "min": 16, "max": 16}
        assert 4 <= point["output_tokens"]["min"] <= point["output_tokens"]["max"] <= 8
        assert 0 < point["ttft_ms"]["p50"] < point["e2el_ms"]["p50"] and point["output_tokens_per_s"] > 0
    chat = [*command, "--endpoint", "chat", "--request-rate", "20", "--out", str(tmp_path / "chat")]
    assert cli.main(chat) == 0
    point = json.loads((tmp_path / "chat" / "load.json").read_text())["points"][0]
    assert (point["completed"], point["failed"]) == (6, 0) and point["input_tokens"]["mean"] > 8
