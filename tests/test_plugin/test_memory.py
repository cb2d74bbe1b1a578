# SPDX-License-Identifier: Apache-2.0
"""A process holds the packed bytes of its layers and nothing else of what it loaded.

Seen from outside: its resident size, or what torch has allocated on a GPU.
"""

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SIZE, LAYERS = 4096, 8
PACKED_BYTES = SIZE * SIZE // 2  # of one layer at 4 bits


def resident_bytes() -> int:
    """Return the resident private bytes of this process, files mapped into it left out."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line[:7] == "RssAnon"]
    return int(line.split()[1]) * 1024


def load_layers_and_measure(path: str, device: str) -> None:
    """Load 8 layers of 4096 x 4096 weights, "vllm"'s or "hf"'s, on "cpu" or "cuda", run them, print by how many bytes memory has
    grown there."""
    from pvq_vllm import quantizer_ops
    from pvq_vllm.codec.format import CheckpointConfig, Codebook, ModuleSpec

    checkpoint = CheckpointConfig(
        "a8", Codebook("pvq4"), 0, {SIZE: [SIZE]}, {"layer": ModuleSpec(Codebook("pvq4"), 1)}
    )
    pattern = torch.randn(64, 8 * 64)
    codes, _ = quantizer_ops.quantize_rows(pattern, "pvq4", quantizer_ops.search_row_scale(pattern, "pvq4"))
    packed = codes.flatten(0, 1).repeat(SIZE * SIZE // 8 // 4096, 1).view(SIZE, SIZE // 8, 4)
    scale = torch.full((SIZE,), 1e-3).half()

    def from_file() -> dict[str, torch.Tensor]:
        """Return the checkpoint's tensors in memory that malloc does not manage, as from a mapped file."""
        copy = torch.frombuffer(mmap.mmap(-1, packed.nbytes), dtype=torch.uint8).view(packed.shape)
        return {"weight_packed": copy.copy_(packed), "weight_scale": scale}

    def used_bytes() -> int:
        return resident_bytes() if device == "cpu" else torch.cuda.memory_allocated()

    def from_vllm():
        from vllm.model_executor.layers import linear

        from pvq_vllm.config import PVQConfig

        linear.get_tensor_model_parallel_rank = lambda: 0
        linear.get_tensor_model_parallel_world_size = lambda: 1
        with torch.device(device):
            layer = linear.ReplicatedLinear(
                SIZE, SIZE, bias=False, quant_config=PVQConfig(checkpoint), prefix="layer", return_bias=False
            )
        for name, tensor in from_file().items():
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor)
        layer.quant_method.process_weights_after_loading(layer)
        return layer

    def from_hf():
        from pvq_vllm.hf_quantizer import PVQLinear

        layer = PVQLinear("layer", checkpoint, SIZE, SIZE, False, torch.bfloat16)
        for name, tensor in from_file().items():
            setattr(layer, name, tensor.to(device))
        layer.pack()
        return layer

    make = {"vllm": from_vllm, "hf": from_hf}[path]
    inputs = [torch.randn(tokens, SIZE).bfloat16().to(device) for tokens in (1, 64)]
    first = make()  # whatever is allocated once and for all
    for x in inputs:
        first(x)
    before = used_bytes()
    layers = [make() for _ in range(LAYERS)]
    for layer in layers:
        for x in inputs:
            layer(x)
    print(used_bytes() - before)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("path", ["vllm", "hf"])
def test_memory_grows_by_the_packed_bytes(path, device):
    """A dense bfloat16 copy would take 4 times the packed bytes, int8 twice, a second packed copy once
    more."""
    if path == "vllm":
        pytest.importorskip("vllm")
    command = [sys.executable, __file__, path, device]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    growth = int(result.stdout.splitlines()[-1])
    assert 0.95 * LAYERS * PACKED_BYTES < growth < 1.05 * LAYERS * PACKED_BYTES


if __name__ == "__main__":
    load_layers_and_measure(*sys.argv[1:])
