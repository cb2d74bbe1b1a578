# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
from collections.abc import Callable

import pytest


@pytest.fixture
def run_on_isa() -> Callable[[str, str], None]:
    """Run a program that prints "isa NAME" first, on an instruction set; skip where this machine lacks it."""

    def run(isa: str, program: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PVQ_CPU_ISA": isa},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        first_line = done.stdout.splitlines()[0] if done.stdout else ""
        if done.returncode == 0 and first_line != f"isa {isa}":
            pytest.skip(
                f"this machine has no {isa}; the cases ran with {first_line.removeprefix('isa ')} instead"
            )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    return run
