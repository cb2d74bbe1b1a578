# SPDX-License-Identifier: Apache-2.0
"""NF4 with double quantization by bitsandbytes, blocks of 64 as its default."""

from importlib.metadata import version

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from exchange import decoder_linears, load_model, read_job, write_answer


def main() -> None:
    job = read_job()
    tensors, stored = {}, {}
    for name, module in decoder_linears(load_model(job)).items():
        weight = module.weight.detach()
        packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        tensors[f"{name}.weight"] = dequantize_4bit(packed, state).reshape(weight.shape).float()
        nested = state.state2
        stored[name] = 8 * packed.numel() + 8 * state.absmax.numel() + 32 * nested.absmax.numel() + 32
        if packed.dtype != torch.uint8 or state.absmax.dtype != torch.uint8:
            raise SystemExit(f"bitsandbytes stored {packed.dtype} and {state.absmax.dtype}, not bytes")
    write_answer(job, tensors, stored, package=f"bitsandbytes {version('bitsandbytes')}")


if __name__ == "__main__":
    main()
