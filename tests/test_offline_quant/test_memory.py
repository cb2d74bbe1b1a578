# SPDX-License-Identifier: Apache-2.0
"""Free memory is that of the container, where it has a limit."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from offline_quant import memory

AVAILABLE = 64 << 30


@pytest.fixture
def group(tmp_path, monkeypatch):
    """A function: writes files of a control group, by name."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=AVAILABLE))

    def write(folder: str, **files: str | int) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        for name, content in files.items():
            Path(tmp_path / folder / f"memory.{name}").write_text(f"{content}\n")

    return write


def test_without_a_control_group_it_is_that_of_the_machine(group):
    assert memory.free_memory("cpu") == AVAILABLE


def test_a_limit_of_version_2_counts_without_cached_files(group):
    group("", max=10_000, current=4_000, stat="anon 3000\ninactive_file 600\nactive_file 400")
    assert memory.free_memory("cpu") == 10_000 - 4_000 + 1_000
    group("", max="max")
    assert memory.free_memory("cpu") == AVAILABLE
    group("", max=AVAILABLE * 4)
    assert memory.free_memory("cpu") == AVAILABLE


def test_a_limit_of_version_1_counts_without_cached_files(group):
    group(
        "memory",
        limit_in_bytes=10_000,
        usage_in_bytes=4_000,
        stat="total_inactive_file 600\nactive_file 7\ntotal_active_file 400",
    )
    assert memory.free_memory("cpu") == 10_000 - 4_000 + 1_000
    group("memory", limit_in_bytes=2**63 - 4096)  # none
    assert memory.free_memory("cpu") == AVAILABLE
    group("memory", limit_in_bytes=3_000)
    assert memory.free_memory("cpu") == 0
