# SPDX-License-Identifier: Apache-2.0
"""Runs killed while they remove a folder: parts of another run are never taken, and a finished OUT is found."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from offline_quant import whole_files
from offline_quant.plan import Settings
from offline_quant.quantize_checkpoint import quantize_checkpoint
from pvq_vllm.codec.errors import PVQError

PLAIN = Settings(rotation="online")
TIMED = {"timings.json", "report.html"}


@pytest.fixture(scope="module")
def whole(tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize_checkpoint(tiny_llama, out, PLAIN)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes() for file in folder.iterdir() if file.is_file() and file.name not in TIMED
    }


@pytest.fixture
def interrupted(tiny_llama, tmp_path, killer):
    """OUT of a run with another seed that was killed after some parts."""
    killer.allowed = 8
    with pytest.raises(killer.Killed):
        quantize_checkpoint(tiny_llama, tmp_path / "out", replace(PLAIN, seed=1))
    killer.allowed = -1
    assert len(list((tmp_path / "out.partial" / "work").glob("*.safetensors"))) == 3
    return tmp_path / "out"


def remove_only_state(folder, **_options):
    """In place of shutil.rmtree: remove state.json first, and be killed."""
    states = list(Path(folder).rglob("state.json"))
    for state in states:
        state.unlink()
    if states:
        raise KeyboardInterrupt


def test_a_run_killed_while_it_starts_over_leaves_no_parts_to_resume(
    tiny_llama, interrupted, whole, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(whole_files.shutil, "rmtree", remove_only_state)
        quantize_checkpoint(tiny_llama, interrupted, PLAIN, overwrite=True)
    quantize_checkpoint(tiny_llama, interrupted, PLAIN, resume=True)
    assert contents(interrupted) == contents(whole)
    assert list(interrupted.parent.iterdir()) == [interrupted]


def test_parts_without_state_are_not_resumed(tiny_llama, interrupted, whole):
    (interrupted.with_name("out.partial") / "work" / "state.json").unlink()
    with pytest.raises(PVQError, match="unfinished run: add --resume"):
        quantize_checkpoint(tiny_llama, interrupted, PLAIN)
    quantize_checkpoint(tiny_llama, interrupted, PLAIN, resume=True)
    assert contents(interrupted) == contents(whole)
    assert list(interrupted.parent.iterdir()) == [interrupted]


def test_a_run_killed_anywhere_while_it_cleans_up_is_found_finished(tiny_llama, whole, tmp_path, monkeypatch):
    """Each removal and each rename behind the one that names OUT is a place to be killed at."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)  # to be replaced, so that OUT.old is there to be removed as well
    allowed, killed = 100, []

    def killed_at_last(function):
        def call(path, *arguments, **options):
            nonlocal allowed
            if out.exists() and not out.with_name("out.partial").exists():
                if not allowed:
                    raise KeyboardInterrupt
                allowed -= 1
            return function(path, *arguments, **options)

        return call

    for name in ("unlink", "rmdir", "replace"):  # shutil.rmtree and pathlib use them too
        monkeypatch.setattr(os, name, killed_at_last(getattr(os, name)))

    def arm(_name, _weights):
        nonlocal allowed
        allowed = 0

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tiny_llama, out, PLAIN, overwrite=True, progress=arm)
    for _ in range(30):
        assert contents(out) == contents(whole)
        allowed = 1
        try:
            report = quantize_checkpoint(tiny_llama, out, PLAIN, resume=True)
            break
        except KeyboardInterrupt as error:
            killed.append(error)
    assert len(killed) > 5
    assert report == json.loads((whole / "report.json").read_text())
    assert list(tmp_path.iterdir()) == [out] and not (out / "work").exists()
