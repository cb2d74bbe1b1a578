# SPDX-License-Identifier: Apache-2.0
"""Tables, signs, counters and kernels of a GPU under threads, streams and captured graphs."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pvq_vllm import _C, cuda_constants, ops

NUM_STREAMS = 200  # more than there are spare counters


@pytest.mark.cuda_build
def test_every_stream_and_every_capture_has_counters_of_its_own():
    counters = cuda_constants.Counters(torch.device("cpu"))
    asked = [(stream, capture) for stream in range(NUM_STREAMS) for capture in (None, 0, 7)]
    addresses = [counters.address(*key) for key in asked]
    assert len(set(addresses)) == len(asked)
    bytes_apart = sorted(b - a for a, b in zip(sorted(addresses), sorted(addresses)[1:], strict=False))
    assert bytes_apart[0] >= 4 * _C.cuda.num_counters
    assert [counters.address(*key) for key in asked] == addresses
    assert not any(row.any() for row in counters._rows.values())


@pytest.mark.cuda_build
def test_threads_that_load_at_once_share_one_table_and_its_address(monkeypatch):
    made = []

    def make_slowly(values, device):
        made.append(torch.zeros(len(values), dtype=torch.int32))
        time.sleep(0.05)
        return made[-1]

    monkeypatch.setattr(cuda_constants, "_words", make_slowly)
    device = -7  # nobody else's entry of the cache
    with ThreadPoolExecutor(8) as threads:
        addresses = list(threads.map(lambda _: cuda_constants.table_address(2, device), range(8)))
    assert len(made) == 1 and set(addresses) == {made[0].data_ptr()}


def chain(layer, x: torch.Tensor, products: int) -> torch.Tensor:
    """Products that divide their reduction, one after another; the last one's output."""
    for _ in range(products):
        y = ops.linear(x, layer.on_gpu, None, layer.rows, layer.plan)
    return y


@pytest.mark.cuda
def test_two_captured_models_replayed_at_the_same_time(kit):
    """torch captures both on one stream; they must not meet in its counters."""
    layers = [kit.build_layer([("pvq4", 64)], 8192, "a8", 0), kit.build_layer([("pvq3", 48)], 8192, "a8", 0)]
    inputs = [kit.random_tokens(4, 8192, torch.bfloat16) for _ in layers]
    expected = [
        ops.linear(x, layer.on_cpu, None, layer.rows, layer.plan)
        for layer, x in zip(layers, inputs, strict=True)
    ]
    on_gpu, graphs, outputs = [x.cuda() for x in inputs], [], []
    for layer, x in zip(layers, on_gpu, strict=True):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            outputs.append(chain(layer, x, 200))
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        for output in outputs:
            output.zero_()
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for output, want in zip(outputs, expected, strict=True):
            assert kit.describe_difference(output.cpu(), want) == ""


@pytest.mark.cuda
def test_graphs_beyond_the_spare_counters(kit):
    """Their counters are made in the capture, and zeroed by every replay."""
    layer = kit.build_layer([("pvq4", 64)], 8192, "a8", 0)
    x = kit.random_tokens(4, 8192, torch.bfloat16)
    expected = ops.linear(x, layer.on_cpu, None, layer.rows, layer.plan)
    on_gpu, graphs = x.cuda(), []
    for _ in range(cuda_constants.Counters._FIRST_ROWS + 4):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphs.append((graph, chain(layer, on_gpu, 2)))
    device = on_gpu.device.index
    assert not cuda_constants.counters(device)._spare
    for _ in range(2):
        for graph, _ in graphs:
            graph.replay()
    torch.cuda.synchronize()
    assert {kit.describe_difference(y.cpu(), expected) for _, y in graphs} == {""}


@pytest.mark.cuda
def test_the_number_of_a_capture(kit):
    device = torch.cuda.current_device()
    kit.build_layer([("pvq4", 8)], 64)  # torch has a context by now

    def number() -> int | None:
        return _C.cuda.capture_of(device, torch.cuda.current_stream().cuda_stream)

    numbers = [number()]
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            numbers.append(number())
            torch.zeros(1, device="cuda")
        numbers.append(number())
    before, first, between, second, after = numbers
    assert before is None and between is None and after is None and None not in (first, second)
    assert first != second


CALLS = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from conftest import build_layer, random_tokens
from pvq_vllm import _C, ops

for mode in ("a8", "a16", "pvq:16,58"):
    for blocks in (0, 1, 16):
        layer = build_layer([("pvq4", 96), ("pvq2", 400)], 2048, mode, blocks)
        ready = _C.cuda.num_prepared(0)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for tokens in [*range(1, 34), 48, 64, 65, 100, 129, 200, 257, 450, 600, 900, 1500, 2100]:
                ops.linear(random_tokens(tokens, 2048, dtype).cuda(), layer.on_gpu, None, layer.rows, layer.plan)
        print(ready, _C.cuda.num_prepared(0))
"""


@pytest.mark.cuda
def test_no_call_makes_a_kernel_ready():
    """What a call would load or set could be in a capture: packing has done it, for any number of tokens and any type."""
    folder = str(Path(__file__).parent)
    result = subprocess.run(
        [sys.executable, "-c", CALLS, folder], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    counts = [[int(n) for n in line.split()] for line in result.stdout.splitlines()]
    assert len(counts) == 9 and all(before == after > 0 for before, after in counts)
    assert counts[-1][0] > counts[0][0]
