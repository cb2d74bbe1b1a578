# SPDX-License-Identifier: Apache-2.0
"""What the host believes about a GPU and the code that it runs: csrc/cuda/device.cpp alone, then on a real GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pvq_vllm import _C, cuda_ops, ops
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.rotation import rotation_layout

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def on_fake_runtime(tmp_path_factory):
    """Return a function: (capability, PTX version) -> what device_check.cpp prints."""
    toolkits = [Path("/usr/local/cuda")]
    if nvcc := shutil.which("nvcc"):
        toolkits.append(Path(nvcc).resolve().parent.parent)
    include = next((t / "include" for t in toolkits if (t / "include/cuda_runtime.h").exists()), None)
    if include is None or shutil.which("g++") is None:
        pytest.skip("no headers of CUDA, or no g++")
    program = tmp_path_factory.mktemp("device") / "device"
    here = Path(__file__).parent
    sources = [ROOT / "csrc/cuda/device.cpp", here / "fake_runtime.cpp", here / "device_check.cpp"]
    flags = ["-std=c++17", "-DPVQ_WITH_WGMMA", f"-I{ROOT / 'csrc/cuda'}", f"-I{include}"]
    subprocess.run(["g++", *flags, *sources, "-o", program], check=True)

    def run(capability: int, ptx_version: int) -> list[str]:
        arguments = [program, str(capability), str(ptx_version)]
        return subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()

    return run


@pytest.mark.parametrize(
    "capability, ptx_version, expected",
    [
        (90, 90, "90 1"),
        (90, 80, "80 0"),  # a build for 8.0 on an H100: its kernels are empty where they need 9.0
        (120, 80, "80 0"),
        (120, 120, "120 0"),
        (86, 80, "80 0"),
        (103, 100, "100 0"),
    ],
)
def test_the_host_believes_in_what_the_loaded_code_can_do(on_fake_runtime, capability, ptx_version, expected):
    assert on_fake_runtime(capability, ptx_version)[0] == expected


def test_a_kernel_that_could_not_be_prepared_is_prepared_again(on_fake_runtime):
    """Both settings at the second call, none at the third."""
    assert on_fake_runtime(90, 90)[1:] == ["shared memory of a kernel: no memory", "2"]


@pytest.mark.cuda
def test_the_newest_code_of_the_build_is_loaded():
    report = _C.cuda.describe_device(torch.cuda.current_device())
    built = [int("".join(filter(str.isdigit, name))) for name in _C.cuda.architectures.split(", ")]
    fitting = [n for n in built if n // 10 == report.capability // 10 and n <= report.capability]
    if not fitting:
        pytest.skip(f"this build, for {_C.cuda.architectures}, has only PTX for this GPU")
    assert report.code == max(fitting)


@pytest.mark.cuda
@pytest.mark.parametrize("width", [128, 512, 4096, 76 * 4])
def test_the_widest_tokens_that_shared_memory_takes(kit, width):
    """Rotated in warps, through shared memory by warps and by more, and with a matrix of 23 kB beside the token."""
    factors = rotation_layout(width)[1]

    def plan(blocks: int) -> str:
        return ops.make_plan([("pvq4", 16)], blocks * width, rotation_blocks=blocks, factors=factors)

    def runs(blocks: int) -> bool:
        return cuda_ops.explain_plan(report, 0, plan(blocks)) is None

    report = _C.cuda.describe_device(torch.cuda.current_device())
    blocks = next(filter(runs, range(65536 // width, 0, -1)))
    if blocks < 65536 // width:
        with pytest.raises(PVQError, match="of shared memory for a block"):
            ops.check_device(torch.device("cuda"), plan(blocks + 1))
    layer = kit.build_layer([("pvq4", 16)], blocks * width, "a16", blocks)
    for tokens in (1, 3, 40):
        x = kit.random_tokens(tokens, blocks * width, torch.bfloat16)
        assert kit.describe_difference(*layer.both(x)) == ""


def run_python(program: str, **settings: str) -> str:
    path = os.pathsep.join(filter(None, sys.path))
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path} | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout.splitlines()[-1]


# Kernels of torch may have no PTX, so it only allocates and copies.
QUANTIZE = """
import numpy as np
import torch
from pvq_vllm import _C, cuda_constants, ops
from pvq_vllm.codec.rotation import rotation_layout
report = _C.cuda.describe_device(0)
if report.fault:
    print("fault:", report.fault)
    raise SystemExit
scales = []
for columns in (8192, 14336):
    blocks, factors = rotation_layout(columns)
    plan = ops.make_plan([("int8", 8)], columns, rotation_blocks=blocks, factors=factors)
    layer = cuda_constants.make_plan(plan)
    signs = torch.from_numpy(np.array(layer.sign_bits, dtype=np.uint32).view(np.int32)).cuda()
    constants = _C.cuda.Constants([0] * 4, signs.data_ptr())  # on_device() would have all kernels compiled
    at = layer.workspace_offsets(3)
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
    on_gpu, workspace = x.cuda(), torch.empty(at["bytes"], dtype=torch.uint8).cuda()
    _C.cuda.quantize_activations(layer, constants, on_gpu.data_ptr(), 0, 3, workspace.data_ptr(), 0, 0)
    got = workspace.cpu()[at["token_scale"] :][:12].view(torch.float32)
    scales.append(torch.equal(got, ops.quantize_activations(x, plan)[1]))
print(report.code, *scales)
"""


@pytest.mark.cuda
@pytest.mark.slow
def test_kernels_that_the_driver_compiles_from_older_ptx():
    """As on a GPU that is newer than the build, which must have PTX: CMAKE_CUDA_ARCHITECTURES="80;90a-real" for an H100."""
    line = run_python(QUANTIZE, CUDA_FORCE_PTX_JIT="1", CUDA_MODULE_LOADING="LAZY")
    if line.startswith("fault"):
        pytest.skip(f"this build, for {_C.cuda.architectures}, has no PTX for this GPU ({line})")
    assert line.split()[1:] == ["True", "True"], line


ON_THE_SECOND_GPU = """
import torch
from pvq_vllm import ops
plan = ops.make_plan([("pvq4", 16)], 64)
codes, scale = torch.zeros(16, 8, 4, dtype=torch.uint8), torch.ones(16)
packed = ops.pack_linear([codes.to("cuda:1")], scale.to("cuda:1"), plan)
ops.linear(torch.ones(2, 64).to("cuda:1"), packed, None, 16, plan).cpu()
print(torch._C._cuda_hasPrimaryContext(0), torch.cuda.current_device())
"""


@pytest.mark.cuda
def test_work_on_one_gpu_leaves_the_others_alone():
    """A context takes hundreds of MB."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    assert run_python(ON_THE_SECOND_GPU) == "False 0"
