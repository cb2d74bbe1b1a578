# SPDX-License-Identifier: Apache-2.0
"""From folder to folder: what is written, and that an interrupted run ends with the same bytes."""

import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_quant import checkpoint_writer, quantize_checkpoint
from offline_quant.inspect import inspect_checkpoint
from offline_quant.plan import Settings, codebook_from_text
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import check_checkpoint

quantize = quantize_checkpoint.quantize_checkpoint
# Online, so that the other tensors stay as they are; test_rotation_choices.py has the rotations.
PLAIN = Settings(rotation="online")
TIMED = {"timings.json", "report.html"}
CALIBRATED = Settings(
    rotation="online", calibration="builtin", calibration_sequences=2, calibration_length=48
)


def contents(folder: Path) -> dict[str, bytes]:
    """All files but those that tell times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in TIMED
    }


def test_the_checkpoint_is_an_ordinary_folder(tiny_llama, tmp_path):
    done: list[str] = []
    report = quantize(tiny_llama, tmp_path / "out", PLAIN, progress=lambda name, weights: done.append(name))
    config, _ = check_checkpoint(tmp_path / "out")
    assert sorted(done) == sorted(config.modules) and len(done) == 2 * 7 + 1
    source = load_file(tiny_llama / "model.safetensors")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in source.items():  # what is not quantized is unchanged
        assert name.removesuffix(".weight") in config.modules or torch.equal(stored[name], tensor)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in tiny_llama.iterdir()} | {"README.md", "report.json"} | TIMED
    base_config = json.loads((tiny_llama / "config.json").read_text())
    new_config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {**new_config, "quantization_config": None} == {**base_config, "quantization_config": None}
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("settings", [PLAIN, CALIBRATED], ids=["plain", "calibrated"])
def test_two_runs_write_the_same_bytes(tiny_qwen2, tmp_path, settings):
    quantize(tiny_qwen2, tmp_path / "a", settings)
    quantize(tiny_qwen2, tmp_path / "b", settings)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


SHARDED = {"max_shard_bytes": 60_000, "lm_head_bits": 4}


@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])
def test_a_run_interrupted_anywhere_resumes_to_the_same_bytes(tiny_llama, tmp_path, killer, calibrated):
    """Each rename of a finished file is a place to be killed at: among the parts, the shards and the last
    files.
    """
    settings = Settings(**{**vars(CALIBRATED if calibrated else PLAIN), **SHARDED})
    quantize(tiny_llama, tmp_path / "whole", settings)
    expected = contents(tmp_path / "whole")
    assert sum(name.endswith(".safetensors") for name in expected) > 2
    out = tmp_path / "out"
    for kills in range(60):
        killer.allowed = kills + 1  # state.json is one of them; each run gets further than the last
        try:
            quantize(tiny_llama, out, settings, resume=kills > 0)
            break
        except killer.Killed:
            assert not out.exists() or (out / "work").exists()  # whole but for the cleaning up
    assert 4 < kills < 20
    assert contents(out) == expected
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize("settings", [PLAIN, CALIBRATED], ids=["plain", "calibrated"])
def test_a_killed_process_resumes_to_the_same_bytes(tiny_llama, tmp_path, settings):
    quantize(tiny_llama, tmp_path / "whole", settings)
    program = (
        "import os, pickle, signal, sys\n"
        "from offline_quant.quantize_checkpoint import quantize_checkpoint\n"
        "def progress(name, weights):\n"
        "    if 'layers.1.mlp' in name: os.kill(os.getpid(), signal.SIGKILL)\n"
        "settings = pickle.load(sys.stdin.buffer)\n"
        "quantize_checkpoint(sys.argv[1], sys.argv[2], settings, progress=progress)\n"
    )
    command = [sys.executable, "-c", program, str(tiny_llama), str(tmp_path / "out")]
    run = subprocess.run(command, input=pickle.dumps(settings), check=False)
    assert run.returncode == -9 and not (tmp_path / "out").exists()
    kept = {path.name for path in (tmp_path / "out.partial" / "work").glob("*.safetensors")}
    assert "gradients.safetensors" in kept or settings == PLAIN
    with pytest.raises(PVQError, match="unfinished run: add --resume"):
        quantize(tiny_llama, tmp_path / "out", settings)
    with pytest.raises(PVQError, match="another seed: repeat the options"):
        quantize(tiny_llama, tmp_path / "out", replace(settings, seed=1), resume=True)
    quantize(tiny_llama, tmp_path / "out", settings, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_runs_cannot_share_a_folder(tiny_llama, tmp_path):
    messages = []

    def start_another(name, weights):
        if not messages:
            with pytest.raises(PVQError, match="in use by another run"):
                quantize(tiny_llama, tmp_path / "out", PLAIN, resume=True)
            messages.append(name)

    quantize(tiny_llama, tmp_path / "out", PLAIN, progress=start_another)
    assert messages


def test_an_existing_folder_is_kept_unless_told_otherwise(tiny_llama, tmp_path):
    out = tmp_path / "out"
    quantize(tiny_llama, out, PLAIN)
    before = contents(out)
    with pytest.raises(PVQError, match="out exists: name another folder, or add --overwrite"):
        quantize(tiny_llama, out, Settings(seed=5))
    assert contents(out) == before
    quantize(tiny_llama, out, Settings(seed=5), overwrite=True)
    assert check_checkpoint(out)[0].rotation_seed == 5
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(PVQError, match="not a model folder, so it is not replaced"):
        quantize(tiny_llama, tmp_path / "photos", PLAIN, overwrite=True)
    with pytest.raises(PVQError, match="does not exist: create it first"):
        quantize(tiny_llama, tmp_path / "no" / "where", PLAIN)


def test_the_model_itself_is_never_replaced(tiny_llama, tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    model = shutil.copytree(tiny_llama, tmp_path / "hub" / "model.partial")
    shutil.copy(model / "config.json", tmp_path / "hub")
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(model)
    before = contents(tmp_path)
    for out in (
        model,
        tmp_path / "hub",
        tmp_path / "hub" / "model",
        tmp_path / "link",
        Path("."),
        Path(".."),
    ):
        with pytest.raises(PVQError, match="is, or holds, the model to quantize: name another OUT"):
            quantize(model, out, PLAIN, overwrite=True)
    assert contents(tmp_path) == before


def test_a_run_is_not_continued_by_another_program(tiny_llama, tmp_path, monkeypatch):
    def stop(name, weights):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_llama, tmp_path / "out", CALIBRATED, progress=stop)
    with monkeypatch.context() as patch:
        patch.setattr(quantize_checkpoint, "program_digest", lambda: "another version")
        with pytest.raises(PVQError, match="was made with another program: repeat"):
            quantize(tiny_llama, tmp_path / "out", CALIBRATED, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(quantize_checkpoint, "forward_dtype", lambda device: torch.float64)
        with pytest.raises(PVQError, match="was made with another forward_dtype: repeat"):
            quantize(tiny_llama, tmp_path / "out", CALIBRATED, resume=True)
    quantize(tiny_llama, tmp_path / "out", CALIBRATED, resume=True)


def test_a_snapshot_of_the_cache_has_the_name_of_its_model(tiny_llama, tmp_path):
    folder = tmp_path / "models--Maker--Model-1B" / "snapshots" / "060db64"
    shutil.copytree(tiny_llama, folder)
    report = quantize(folder, tmp_path / "out", PLAIN)
    assert report["base_model"] == "Maker/Model-1B"
    assert report["command"].startswith("pvq quantize Maker/Model-1B OUT ")


def test_a_failed_run_leaves_the_existing_folder_alone(tiny_llama, tmp_path):
    out = tmp_path / "out"
    quantize(tiny_llama, out, PLAIN)
    before = contents(out)
    damaged = shutil.copytree(tiny_llama, tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.inf
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(PVQError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        quantize(damaged, out, Settings(seed=5), overwrite=True)
    assert contents(out) == before


def test_a_disk_too_small_is_noticed_before_anything_is_written(tiny_llama, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=50_000_000)
    monkeypatch.setattr(checkpoint_writer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(PVQError, match=r"has 0\.05 GB free, but 0\.07 GB are needed"):
        quantize(tiny_llama, tmp_path / "out", PLAIN)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_one_sentence_and_the_run_can_go_on(tiny_llama, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    def fill_up(name, weights):
        if "layers.1" in name:
            monkeypatch.setattr(checkpoint_writer.os, "fsync", full)

    with pytest.raises(
        PVQError, match=r"the disk of .*out\.partial is full: free some space and continue with --resume"
    ):
        quantize(tiny_llama, tmp_path / "out", PLAIN, progress=fill_up)
    monkeypatch.undo()
    quantize(tiny_llama, tmp_path / "out", PLAIN, resume=True)
    quantize(tiny_llama, tmp_path / "whole", PLAIN)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_overrides_choose_rates_layer_by_layer(tiny_llama, tmp_path):
    overrides = (("down_proj", "2"), (r"layers\.1\.mlp\.down", "8"), ("v_proj", "16"), ("o_proj", "16,20,3"))
    settings = Settings(codebook=codebook_from_text("3", "--bits"), overrides=overrides, lm_head_bits=16)
    report = quantize(tiny_llama, tmp_path / "out", settings)
    codebooks = {
        name: str(spec.codebook) for name, spec in check_checkpoint(tmp_path / "out")[0].modules.items()
    }
    assert codebooks["model.layers.0.mlp.down_proj"] == "pvq2"
    assert codebooks["model.layers.1.mlp.down_proj"] == "int8"
    assert codebooks["model.layers.0.self_attn.o_proj"] == "canonical(16,20,3)"
    assert codebooks["model.layers.0.self_attn.q_proj"] == "pvq3"
    assert "model.layers.0.self_attn.v_proj" not in codebooks and "lm_head" not in codebooks
    assert 3 < report["bits_per_weight"] < 4.5
    assert inspect_checkpoint(tmp_path / "out")["verified"]


@pytest.mark.parametrize(
    ("settings", "tied", "head", "embedding"),
    [
        (Settings(lm_head_bits=16), True, None, None),
        (Settings(lm_head_bits=8), False, "int8", None),
        (Settings(lm_head_bits=4), False, "pvq4", None),
        (Settings(lm_head_bits=16, embedding_bits=8), False, None, "int8"),
        (Settings(lm_head_bits=4, embedding_bits=8), False, "pvq4", "int8"),
    ],
)
def test_a_tied_head_is_untied_only_when_it_must_be(
    tiny_model_folder, tmp_path, settings, tied, head, embedding
):
    base = tiny_model_folder("qwen3-tied")
    quantize(base, tmp_path / "out", replace(settings, rotation="online"))
    config, tensors = check_checkpoint(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is tied
    found = {
        name: str(config.modules[name].codebook)
        for name in ("lm_head", "model.embed_tokens")
        if name in config.modules
    }
    assert found == {
        name: book for name, book in (("lm_head", head), ("model.embed_tokens", embedding)) if book
    }
    assert ("lm_head.weight" in tensors) == (head is None and not tied)
    assert ("model.embed_tokens.weight" in tensors) == (embedding is None)
    if head is None and not tied:
        stored = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(
            stored["lm_head.weight"], load_file(base / "model.safetensors")["model.embed_tokens.weight"]
        )


def test_tensor_parallelism_splits_the_rotation_of_row_parallel_layers(tiny_llama, tmp_path):
    quantize(tiny_llama, tmp_path / "out", replace(PLAIN, tensor_parallel=2))
    config, _ = check_checkpoint(tmp_path / "out")
    blocks = {name.rpartition(".")[2]: spec.rotation_blocks for name, spec in config.modules.items()}
    assert blocks["o_proj"] == blocks["down_proj"] == 2
    assert {blocks[name] for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")} == {1}
    assert config.rotation_factors == {128: [128], 64: [64], 96: [12, 8]}
    with pytest.raises(PVQError, match=r"model\.layers\.0\.self_attn\.o_proj.*128.*=16"):
        quantize(tiny_llama, tmp_path / "other", replace(PLAIN, tensor_parallel=3))


def test_calibration_lowers_the_error_of_the_outputs(tiny_llama, tmp_path):
    settings = Settings(**{**vars(CALIBRATED), "lm_head_bits": 4})
    report = quantize(tiny_llama, tmp_path / "out", settings)
    plain = quantize(tiny_llama, tmp_path / "plain", replace(PLAIN, lm_head_bits=4))
    for name, entry in report["modules"].items():
        assert entry["output_snr_db"] > entry["weight_snr_db"], name
        assert plain["modules"][name]["output_snr_db"] is None
        assert plain["modules"][name]["weight_snr_db"] > entry["weight_snr_db"], name


def test_the_model_card_states_facts_and_keeps_the_licence(tiny_llama, tmp_path):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: some\nlanguage: [en]\n---\n# Base\n")
    (base / "LICENSE").write_text("some licence")
    report = quantize(base, tmp_path / "out", PLAIN)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: other\nlicense_name: some\n" in card and "language" not in card
    assert f"| {report['bits_per_weight']:.3f} |" in card and "| pvq4 |" in card
    assert (tmp_path / "out" / "LICENSE").read_text() == "some licence"
