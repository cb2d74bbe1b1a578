# SPDX-License-Identifier: Apache-2.0
"""Which commands the demo runs; that they work is `make demo`."""

import pytest

import demo.__main__ as program


def test_the_evaluation_goes_into_the_model_card(tmp_path, monkeypatch):
    base, checkpoint = tmp_path / "base", tmp_path / "pvq"
    checkpoint.mkdir()
    (checkpoint / "config.json").touch()
    commands = []

    def stop(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "make_checkpoint", lambda folder, bits: (base, checkpoint))
    monkeypatch.setattr(program, "run_step", lambda title, command: commands.append(command))
    monkeypatch.setattr(program, "served", stop)
    with pytest.raises(KeyboardInterrupt):
        program.demo(tmp_path, 4)
    (measure,) = commands
    assert measure[:3] == ["pvq", "eval", str(checkpoint)]
    assert "--update-card" in measure and measure[measure.index("--reference") + 1] == str(base)
