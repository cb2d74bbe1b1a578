# SPDX-License-Identifier: Apache-2.0
import pytest

from offline_quant import checkpoint_writer


class Killed(Exception):
    pass


class Killer:
    """Ends a run with `Killed` in place of the rename of a file, after `allowed` renames; below 0 never."""

    Killed = Killed

    def __init__(self, replace) -> None:
        self._replace, self.allowed = replace, -1

    def replace(self, source, destination) -> None:
        if self.allowed == 0:
            raise Killed
        self.allowed -= 1
        self._replace(source, destination)


@pytest.fixture
def killer(monkeypatch) -> Killer:
    """Lets the writer rename no more files than `killer.allowed`, once a test has set it."""
    killer = Killer(checkpoint_writer.os.replace)
    monkeypatch.setattr(checkpoint_writer.os, "replace", killer.replace)
    return killer
