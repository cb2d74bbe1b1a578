# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's quantizers: ggml_quantize_chunk of the library inside the package xllamacpp, with an importance
matrix, read back by the package gguf.

Options: recipe (names the type of each tensor as llama-quantize chooses it for such a file, see ``recipe_type``),
across_rows. The types with "K" and "IQ" in their names work on blocks of 256 weights of one row. Where a row is
no multiple of 256, llama-quantize takes another, larger type (``FALLBACK``). With across_rows the tensor is
quantized as if it had fewer and longer rows, which llama.cpp could not run but which shows the types themselves.
"""

import ctypes
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import torch
from exchange import calibration_tokens, decoder_linears, load_model, read_job, write_answer
from safetensors.torch import load_file, save_file

FALLBACK = {
    "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    "IQ2_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL",
}  # fmt: skip


def recipe_type(recipe: str, kind: str, layer: int, layers: int) -> str:
    """The type of a decoder layer's tensor in a file of type ``recipe``, made with an importance matrix.

    For Llama models with fewer than four query heads to a key head (llama.cpp, src/llama-quant.cpp).
    ``kind`` is the module's last name.
    """
    eighth = layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    if recipe in ("Q4_K_M", "Q5_K_M"):
        base = recipe.removesuffix("_M")
        return "Q6_K" if more and kind in ("v_proj", "down_proj") else base
    if recipe == "Q3_K_M":
        if kind == "v_proj":
            return "Q5_K" if layer < 2 else "Q4_K"
        if kind == "down_proj":
            return "Q5_K" if layer < layers // 16 else "Q4_K"
        return "Q4_K" if kind == "o_proj" else "Q3_K"
    if recipe == "IQ3_M":
        is_large = kind in ("v_proj", "o_proj") or (kind == "down_proj" and layer < eighth)
        return "Q4_K" if is_large else "IQ3_S"
    if recipe == "IQ3_XXS":
        return {"q_proj": "IQ2_S", "k_proj": "IQ2_S", "o_proj": "IQ3_S"}.get(kind, "IQ3_XXS")
    if recipe in ("IQ4_XS", "IQ3_S"):
        return recipe
    raise SystemExit(f"unknown recipe {recipe}")


def importance(job: dict, model) -> dict[str, torch.Tensor]:
    """Mean square of each input of each linear layer over the calibration tokens, float32 [in_features]."""
    path = Path(job["calibration"]).with_name("importance.safetensors")
    if path.exists():
        return load_file(path)
    sums: dict[str, torch.Tensor] = {}
    tokens = calibration_tokens(job)

    def hook(name: str):
        def add(_module, args) -> None:
            x = args[0].detach().float().reshape(-1, args[0].shape[-1])
            sums[name] = sums.get(name, 0) + x.square().sum(0)

        return add

    handles = [
        module.register_forward_pre_hook(hook(name)) for name, module in decoder_linears(model).items()
    ]
    with torch.inference_mode():
        for row in tokens:
            model.base_model(input_ids=row[None].to(job["device"]), use_cache=False)
    for handle in handles:
        handle.remove()
    result = {name: (total / tokens.numel()).cpu() for name, total in sums.items()}
    save_file(result, path)
    return result


def load_library() -> ctypes.CDLL:
    import xllamacpp

    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    floats = ctypes.POINTER(ctypes.c_float)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, floats, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, floats,
    ]  # fmt: skip
    return library


def quantize(library, weight: np.ndarray, weights_importance: np.ndarray, kind: gguf.GGMLQuantizationType):
    """Return (the dequantized weight, bytes stored) of float32 [rows, columns]."""
    rows, columns = weight.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    stored = np.zeros((rows, columns // block * size), dtype=np.uint8)
    floats = ctypes.POINTER(ctypes.c_float)
    written = library.ggml_quantize_chunk(
        int(kind), weight.ctypes.data_as(floats), stored.ctypes.data, 0, rows, columns,
        weights_importance.ctypes.data_as(floats),
    )  # fmt: skip
    if written != stored.nbytes:
        raise SystemExit(f"ggml wrote {written} bytes of {kind.name}, not {stored.nbytes}")
    return gguf.quants.dequantize(stored, kind), stored.nbytes


def main() -> None:
    job = read_job()
    options = job["options"]
    model = load_model(job)
    linears = decoder_linears(model)
    matrix = importance(job, model)
    layers = model.config.num_hidden_layers
    library = load_library()
    tensors, stored, types = {}, {}, {}
    for name, module in linears.items():
        weight = np.ascontiguousarray(module.weight.detach().float().cpu().numpy())
        rows, columns = weight.shape
        layer = int(name.split(".layers.")[1].split(".")[0])
        kind = recipe_type(options["recipe"], name.rpartition(".")[2], layer, layers)
        repeat = 1
        if columns % 256:
            if options["across_rows"]:
                repeat = 256 // np.gcd(columns, 256)
            else:
                kind = FALLBACK[kind]
        if rows % repeat:
            raise SystemExit(f"{name}: {rows} rows cannot be joined by {repeat}")
        restored, size = quantize(
            library,
            weight.reshape(rows // repeat, columns * repeat),
            np.ascontiguousarray(np.tile(matrix[name].numpy(), repeat)),
            gguf.GGMLQuantizationType[kind],
        )
        tensors[f"{name}.weight"] = torch.from_numpy(restored.reshape(rows, columns))
        stored[name] = 8 * size
        types[kind] = types.get(kind, 0) + 1
    package = f"xllamacpp {version('xllamacpp')}, gguf {version('gguf')}"
    write_answer(job, tensors, stored, package=package, types=types)


if __name__ == "__main__":
    main()
