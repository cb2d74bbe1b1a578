# SPDX-License-Identifier: Apache-2.0
"""Which kernels a call launches, on GPUs that are made up: dispatch_check.cpp, linked to the compiled kernels' host code."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cuda_build

ROOT = Path(__file__).resolve().parent.parent.parent
GPUS = {  # capability, multiprocessors, shared memory of a block
    "A100": (80, 108, 166912),
    "A10": (86, 72, 101376),
    "L40S": (89, 142, 101376),
    "H100": (90, 132, 232448),
    "B200": (100, 148, 232448),
    "RTX 5090": (120, 170, 101376),
}


@pytest.fixture(scope="module")
def dispatch_check() -> Path:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    kernels = "CMakeFiles/_C.dir/csrc/cuda/dispatch.cu.o"
    built = [path for path in (ROOT / "build").glob(f"{tag}-*") if (path / kernels).exists()]
    if not built or shutil.which("cmake") is None:
        pytest.skip("the module was not compiled in this checkout, or there is no cmake")
    cache = (built[0] / "CMakeCache.txt").read_text()
    program = re.search(r"^CMAKE_MAKE_PROGRAM:\w+=(.*)$", cache, re.MULTILINE)
    if program is None or not Path(program[1]).exists():
        pytest.skip("the module was compiled in an environment that is gone")
    command = ["cmake", "--build", built[0], "--target", "dispatch_check"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        pytest.fail(result.stdout[-3000:])
    return built[0] / "dispatch_check"


@pytest.mark.parametrize("gpu", GPUS)
def test_every_launch_is_one_that_the_gpu_takes_and_prepared(dispatch_check, gpu):
    seed, plans = 1, 60
    arguments = [str(number) for number in (*GPUS[gpu], seed, plans)]
    result = subprocess.run([dispatch_check, *arguments], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    launches, kernels = (int(part.split()[0]) for part in result.stdout.splitlines()[-1].split(", ")[:2])
    assert launches > 50 * plans and kernels > 60
