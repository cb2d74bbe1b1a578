# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/bench_linear_cuda.py compares: its rotations, its arguments."""

import importlib
from pathlib import Path

import pytest

from benchmarks.linear_contenders import rotation_of

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.mark.parametrize(
    "rotation, wide, tall",  # of 4096 x 14336 (a down_proj) and of 28672 x 4096
    [
        ("online", (1, [28, 512]), (1, [4096])),
        ("residual", (1, [28, 512]), (0, [])),
        ("block:128", (112, [128]), (32, [128])),
        ("residual:128", (112, [128]), (0, [])),
        ("residual:3000", (7, [2048]), (0, [])),
    ],
)
def test_blocks_and_factors(rotation, wide, tall):
    assert rotation_of(rotation, 4096, 14336) == wide
    assert rotation_of(rotation, 28672, 4096) == tall


def test_names_are_checked_before_the_run(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench = importlib.import_module("bench_linear_cuda")
    assert bench.parse([]).rotations == ["block:128", "residual:128"]
    assert bench.parse(["--rotations", "residual:128,block:64"]).rotations == ["residual:128", "block:64"]
    for unknown in ("resdiual", "block", "block:", "online:128", "residual:x"):
        with pytest.raises(SystemExit):
            bench.parse(["--rotations", unknown])
        assert f"--rotations: unknown {unknown};" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.parse(["--without", "fp8,fp9"])
    assert "--without: unknown fp9; known are" in capsys.readouterr().err
