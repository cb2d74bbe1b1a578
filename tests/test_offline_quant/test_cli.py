# SPDX-License-Identifier: Apache-2.0
"""The commands as a user types them: what they print, and one sentence for each mistake."""

import json
import os
import re
import shutil
from importlib.metadata import EntryPoint

import pytest
import torch

from offline_quant import memory
from offline_quant.device import choose_device
from offline_quant.model_card import NOT_MEASURED
from pvq_vllm import cli
from pvq_vllm.codec.errors import PVQError

# As in pyproject.toml; stated here so that the tests run on a checkout that is not installed.
COMMANDS = {"quantize": "quantize", "inspect": "inspect", "eval": "eval_"}


def main(arguments: list[str]) -> int:
    entries = {
        name: EntryPoint(name, f"offline_quant.cli:{attr}", cli.COMMAND_GROUP)
        for name, attr in COMMANDS.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "commands", lambda: entries)
        return cli.main(arguments)


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "out"
    assert (
        main(
            [
                "quantize",
                str(tiny_llama),
                str(out),
                "--bits",
                "3",
                "--override",
                "down_proj=4",
                "--lm-head",
                "16",
                "--no-evaluate",
            ]
        )
        == 0
    )
    return out


def test_inspect_prints_a_table_or_json(checkpoint, capsys):
    assert main(["inspect", str(checkpoint)]) == 0
    printed = capsys.readouterr().out
    assert "pvq3" in printed and "pvq4" in printed and "verified" in printed
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    codebooks = {module["name"]: module["codebook"] for module in result["modules"]}
    assert codebooks["model.layers.1.mlp.down_proj"] == "pvq4" and "lm_head" not in codebooks


def test_quantize_says_what_calibration_would_gain_and_measures_its_result(tiny_llama, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["quantize", str(tiny_llama), str(out), "--bits", "4", "--device", "cpu"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "--calibration builtin" in " ".join(printed.err.split())
    assert "kl_divergence" in printed.out
    measured = r"^\| KL divergence.* 10 x 1024 tokens of evaluation.txt, \w+ on cpu \|$"
    assert re.search(measured, card_of(out), re.M) and NOT_MEASURED not in card_of(out)
    calibrated = ["--overwrite", "--calibration", "builtin", "--calibration-sequences", "2"]
    calibrated += ["--calibration-length", "64", "--no-evaluate"]
    assert main([*arguments, *calibrated]) == 0
    printed = capsys.readouterr()
    assert "--calibration builtin" not in " ".join(printed.err.split())
    assert "kl_divergence" not in printed.out
    assert NOT_MEASURED in card_of(out) and not re.search(measured, card_of(out), re.M)
    assert "128 tokens of calibration are few for inputs of 192 columns" in " ".join(printed.err.split())


def test_quantize_measures_only_with_memory_for_both_models(tiny_llama, tmp_path, capsys, monkeypatch):
    arguments = ["quantize", str(tiny_llama), str(tmp_path / "out"), "--device", "cpu"]
    monkeypatch.setattr(memory, "free_memory", lambda device: 1_000_000)
    assert main(arguments) == 0
    printed = capsys.readouterr()
    said = " ".join(printed.err.split())
    assert (
        "not measured: measuring needs 2 whole models in memory, 0.0 GB with what it computes, and 0.0 GB are free: "
        "a machine with more can do it" in said
    )
    assert f"pvq eval {tmp_path / 'out'} --reference {tiny_llama} --update-card" in "".join(said.split("\n"))
    assert "kl_divergence" not in printed.out and NOT_MEASURED in card_of(tmp_path / "out")
    assert main([*arguments, "--overwrite", "--evaluate"]) == 0  # as asked, whatever the memory
    assert "kl_divergence" in capsys.readouterr().out and NOT_MEASURED not in card_of(tmp_path / "out")


@pytest.mark.parametrize(("options", "status"), [([], 0), (["--evaluate"], 2)])
def test_a_result_that_cannot_be_measured_is_an_error_only_if_that_was_asked_for(
    tiny_llama, tmp_path, capsys, options, status
):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "tokenizer.json").unlink()
    assert main(["quantize", str(model), str(tmp_path / "out"), *options]) == status
    said = " ".join(capsys.readouterr().err.split())
    assert ("not measured: " in said) == (status == 0) and "tokenizer" in said
    assert main(["inspect", str(tmp_path / "out")]) == 0


def test_a_fault_while_nobody_asked_to_measure_leaves_the_run_a_success(tiny_llama, tmp_path, capsys):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    assert main(["quantize", str(model), str(tmp_path / "out")]) == 0
    assert "not measured: " in capsys.readouterr().err


def test_a_folder_quantized_into_where_one_stands_is_measured(tiny_llama, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main(["quantize", str(tiny_llama), str(out), "--no-evaluate"]) == 0
    monkeypatch.chdir(out)
    model = os.path.relpath(tiny_llama, out)
    assert main(["quantize", model, ".", "--overwrite"]) == 0
    assert "kl_divergence" in capsys.readouterr().out and NOT_MEASURED not in card_of(out)


def card_of(folder):
    return (folder / "README.md").read_text()


def test_eval_writes_its_json(checkpoint, tiny_llama, tmp_path, capsys):
    options = ["--sequences", "2", "--length", "32", "--json", str(tmp_path / "result.json")]
    assert main(["eval", str(checkpoint), "--reference", str(tiny_llama), *options]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert {"perplexity", "kl_divergence", "top1_agreement"} <= set(result)
    assert all(len(result[f"{key}_ci95"]) == 2 for key in ("perplexity", "kl_divergence", "top1_agreement"))
    assert "kl_divergence" in capsys.readouterr().out


def test_eval_on_a_full_disk_still_prints_its_result(checkpoint, tiny_llama, capsys):
    options = ["--sequences", "1", "--length", "16", "--json", "/dev/full"]
    assert main(["eval", str(checkpoint), "--reference", str(tiny_llama), *options]) == 2
    printed = capsys.readouterr()
    assert "kl_divergence" in printed.out
    last = printed.err.strip().split("\n")[-1]
    assert last.endswith("--json /dev/full cannot be written (No space left on device): name another file")


def test_canonical_codebook_from_the_command_line(tiny_llama, tmp_path, capsys):
    options = ["--codebook", "canonical", "--group-size", "32", "--num-pulses", "40", "--amplitude-bits", "4"]
    assert main(["quantize", str(tiny_llama), str(tmp_path / "out"), *options, "--no-evaluate"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    modules = json.loads(capsys.readouterr().out)["modules"]
    assert {module["codebook"] for module in modules if module["name"] != "lm_head"} == {"canonical(32,40,4)"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--bits", "5"], "--bits is '5'"),
        (["--lm-head", "3"], "--lm-head is 3"),
        (["--embeddings", "4"], "--embeddings is 4"),
        (["--activation", "a4"], "--activation is 'a4'"),
        (["--activation", "pvq:128,386"], "down_proj has 192 input columns"),
        (["--override", "down_proj"], "--override 'down_proj' must look like"),
        (["--override", "(=4"], "is not a regular expression"),
        (["--override", "down_proj=5"], "'5' must be 2, 3, 4, 8, 16 or D,K,b"),
        (["--override", "down_proj=8,0,3"], "num_pulses is 0"),
        (["--override", "nothing=3"], "--override 'nothing=3' matches no linear module"),
        (["--codebook", "grid"], "--codebook is 'grid'"),
        (["--codebook", "canonical"], "needs --group-size, --num-pulses and --amplitude-bits"),
        (["--group-size", "8"], "belong to --codebook canonical"),
        (["--bits", "3", "--target-bpw", "3.4"], "--bits and --target-bpw exclude each other"),
        (["--codebook", "canonical", "--target-bpw", "3.4"], "--codebook canonical and --target-bpw exclude"),
        (
            [
                "--codebook",
                "canonical",
                "--group-size",
                "8",
                "--num-pulses",
                "8",
                "--amplitude-bits",
                "4",
                "--bits",
                "3",
            ],
            "--bits belongs to --codebook serving",
        ),
        (["--tensor-parallel", "3", "--rotation", "none"], "in_features 128 cannot be divided among 3 ranks"),
        (["--override", "lm_head=4"], "the head has --lm-head"),
        (["--calibration", "nowhere.txt"], "--calibration nowhere.txt: there is no such file"),
        (["--calibration-sequences", "64"], "--calibration-sequences belongs to --calibration"),
        (["--token-weights", "uniform"], "--token-weights belongs to --calibration"),
        (["--seed", "-1"], "--seed is -1"),
        (["--tensor-parallel", "0"], "--tensor-parallel is 0"),
        (["--tensor-parallel", "5"], "_proj: in_features"),
        (["--rotation", "sideways"], "--rotation is sideways"),
        (["--threads", "0"], "--threads is 0"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--amplitude", "linear"], "--amplitude is linear"),
    ],
)
def test_each_mistake_is_one_sentence_and_nothing_is_written(tiny_llama, tmp_path, capsys, options, says):
    assert main(["quantize", str(tiny_llama), str(tmp_path / "out"), *options]) == 2
    printed = capsys.readouterr().err.strip().split("\n")[-1]
    assert says in printed and "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused_and_auto_is_the_cpu():
    assert choose_device("auto") == "cpu"
    with pytest.raises(PVQError, match="--device cuda: torch finds no GPU"):
        choose_device("cuda")


def test_mistakes_of_the_other_commands(tiny_llama, tmp_path, capsys):
    for arguments, says in (
        (["inspect", str(tmp_path / "nowhere")], "nowhere is not a folder"),
        (["inspect", str(tiny_llama)], "is not quantized, run `pvq quantize`"),
        (["eval", str(tiny_llama), "--reference", str(tmp_path / "nowhere")], "nowhere"),
        (["eval", str(tiny_llama), "--reference", str(tiny_llama), "--dtype", "int4"], "--dtype is 'int4'"),
        (
            ["eval", str(tiny_llama), "--reference", str(tiny_llama), "--json", "no/where.json"],
            "--json no/where.json",
        ),
        (["quantize", str(tiny_llama), str(tmp_path / "a" / "b")], "does not exist: create it first"),
        (["eval", str(tiny_llama), "--reference", str(tiny_llama), "--threads", "0"], "--threads is 0"),
    ):
        assert main(arguments) == 2
        assert says in capsys.readouterr().err.replace("\n", " ")
