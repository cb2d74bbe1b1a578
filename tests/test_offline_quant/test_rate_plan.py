# SPDX-License-Identifier: Apache-2.0
"""An average rate from the command to the checkpoint: the budget is kept and used, and a killed run resumes."""

import json
from types import SimpleNamespace

import pytest

from offline_quant.inspect import inspect_checkpoint
from offline_quant.plan import Settings, codebook_from_text
from offline_quant.quantize_checkpoint import quantize_checkpoint
from offline_quant.rate_plan import choose_rates
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import check_checkpoint, read_shard_headers

CALIBRATED = {"calibration": "builtin", "calibration_sequences": 2, "calibration_length": 48}
# The smallest module of the tiny model is a 30th of its weights: no closer can an average come.
STEP = 64 * 128 / (2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 192))


def average_settings(target: float, **others) -> Settings:
    return Settings(**{**CALIBRATED, **others, "target_bpw": target})


def test_the_average_is_kept_and_used_and_the_loss_falls_with_it(tiny_llama, tmp_path):
    before = float("inf")
    for target in (2.0, 2.2, 3.0, 3.4, 5.0, 8.0, 9.0):
        out = tmp_path / str(target)
        report = quantize_checkpoint(tiny_llama, out, average_settings(target))
        reached = inspect_checkpoint(out)["bits_per_weight"]
        assert reached == pytest.approx(report["bits_per_weight"])
        step = STEP if target < 4 else 4 * STEP  # the rate above 4 bits is 8
        assert target - step < reached <= target or (target == 9.0 and 8 < reached < 9)
        assert report["predicted_kl_divergence"] < before
        before = report["predicted_kl_divergence"]
        config = check_checkpoint(out)[0]
        names = {spec.codebook.name for name, spec in config.modules.items() if name != "lm_head"}
        assert ("canonical" in names) == (target == 2.0)  # only there are whole bits and scales too many


def test_rates_and_overrides_are_respected(tiny_llama, tmp_path):
    overrides = (("q_proj", "8"), (r"layers\.0\.mlp\.down", "16"))
    settings = average_settings(5.5, rates=("2", "16,27,3", "4"), overrides=overrides)
    report = quantize_checkpoint(tiny_llama, tmp_path / "out", settings)
    config = check_checkpoint(tmp_path / "out")[0]
    chosen = {name: str(spec.codebook) for name, spec in config.modules.items()}
    assert "model.layers.0.mlp.down_proj" not in chosen
    assert all(book == "int8" for name, book in chosen.items() if "q_proj" in name)
    others = {book for name, book in chosen.items() if "q_proj" not in name and name != "lm_head"}
    assert others <= {"pvq2", "canonical(16,27,3)", "pvq4"} and len(others) > 1
    assert 5.5 - 2 * STEP < report["bits_per_weight"] <= 5.5  # what stays at 16 bits is counted
    assert inspect_checkpoint(tmp_path / "out")["bits_per_weight"] == pytest.approx(report["bits_per_weight"])
    stored = read_shard_headers(tmp_path / "out")
    kinds = ("_packed", "_scale", "_levels", "_proj.weight")
    bits = 8 * sum(
        info.nbytes for name, info in stored.items() if ".layers." in name and name.endswith(kinds)
    )
    weights = 2 * (128 * 128 * 2 + 64 * 128 * 2 + 3 * 128 * 192)
    assert report["bits_per_weight"] == pytest.approx(bits / weights, rel=0.01)  # but for the levels
    assert report["unquantized_share"] == pytest.approx(128 * 192 / weights)
    with pytest.raises(
        PVQError, match=r"take 4\.3083 bits a weight, together with 24,576 weights of the layers that stay"
    ):
        quantize_checkpoint(
            tiny_llama, tmp_path / "less", average_settings(3.5, rates=("2", "4"), overrides=overrides)
        )


def test_two_runs_agree_and_an_interrupted_one_resumes_to_the_same_bytes(tiny_llama, tmp_path, killer):
    """Killed at every file in turn: gradients, sensitivities of each layer, parts, shards."""
    settings = average_settings(3.4)
    report = quantize_checkpoint(tiny_llama, tmp_path / "whole", settings)
    out = tmp_path / "out"
    measured = []
    for kills in range(60):
        killer.allowed = max(2, kills)  # state.json is one of them; in the end the last files need more
        try:
            assert quantize_checkpoint(tiny_llama, out, settings, resume=kills > 0) == report
            break
        except killer.Killed:
            measured.append(sorted(file.name for file in out.with_name("out.partial").rglob("losses-*.json")))
    assert ["losses-00000.json"] in measured and ["losses-00000.json", "losses-00001.json"] in measured
    for name in ("model.safetensors", "config.json", "report.json", "README.md"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (out / "work").exists()


def test_mistakes_are_sentences(tiny_llama, tmp_path):
    with pytest.raises(PVQError, match="--target-bpw needs data"):
        Settings(target_bpw=3.0)
    with pytest.raises(PVQError, match=r"--target-bpw is 0\.5, but must be from 1 to 16"):
        average_settings(0.5)
    with pytest.raises(PVQError, match="--target-bpw is nan"):
        average_settings(float("nan"))
    with pytest.raises(PVQError, match="--rate belongs to --target-bpw"):
        Settings(rates=("2",))
    with pytest.raises(PVQError, match="--rate: '7' must be"):
        average_settings(3.0, rates=("7",))
    with pytest.raises(PVQError, match="--rate 16 is not possible"):
        average_settings(3.0, rates=("16",))
    with pytest.raises(PVQError, match=r"--target-bpw 2.5: the smallest rates take 3\.1\d* bits a weight"):
        quantize_checkpoint(tiny_llama, tmp_path / "out", average_settings(2.5, rates=("3", "4")))
    with pytest.raises(
        PVQError, match=r"down_proj has 192 input columns, .* --rate 128,386,4 and 128,225,4 fits"
    ):
        settings = average_settings(4.1, rates=("128,386,4", "128,225,4"))
        quantize_checkpoint(tiny_llama, tmp_path / "out", settings)
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_no_token_reached_gets_what_the_others_leave():
    """Its largest rate within the target, 3.125 bits, or its smallest where the other module takes 4.125."""
    source = SimpleNamespace(weight_shape=lambda name: (128, 128), left_as_is=lambda modules: (0, 0))
    two, three, four = (codebook_from_text(bits, "") for bits in "234")
    candidates = {"expert": [three, two], "other": [two, four]}
    losses = {"other": {"pvq2": 1.0, "pvq4": 0.1}}
    chosen = choose_rates(source, candidates, losses, 3.2)
    assert chosen == {"expert": three, "other": two}
    candidates["other"], losses["other"] = [four], {"pvq4": 0.1}
    assert choose_rates(source, candidates, losses, 3.2) == {"expert": two, "other": four}
    with pytest.raises(PVQError, match=r"--target-bpw 3.1: even the smallest rates take more: raise it"):
        choose_rates(source, candidates, losses, 3.1)


def test_report_and_config_name_the_mixture(tiny_llama, tmp_path):
    report = quantize_checkpoint(tiny_llama, tmp_path / "out", average_settings(3.0))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["codebook"]["name"] in report["codebook"] and "(" in report["codebook"]
    assert report["target_bpw"] == 3.0
