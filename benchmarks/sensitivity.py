# SPDX-License-Identifier: Apache-2.0
"""How well the losses that choose rates predict KL divergence, one module at a time.

    python benchmarks/sensitivity.py MODEL [--rate 2] [--modules 16] [--layers 8]

Modules spread over kinds and layers are quantized alone, each as `pvq quantize` would, and the KL divergence of
the model with this one weight changed is measured on the evaluation text. It is compared with three predictions: the loss
of ``offline_quant.sensitivity`` (output error weighted by the Fisher information), the output error
tr(dW H dW^T) alone, and the output error over the output's power. Printed is the correlation of the logarithms.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from offline_quant.calibration import LayerwiseForward
from offline_quant.calibration_data import calibration_tokens, tokenize
from offline_quant.evaluate import compare_logits, evaluation_text, load_model
from offline_quant.gradients import output_gradients
from offline_quant.model_source import ModelSource
from offline_quant.part_worker import HessianCache, module_rotation
from offline_quant.plan import Settings, codebook_from_text, plan_checkpoint
from offline_quant.quantize_checkpoint import COPIED_NAMES
from offline_quant.weight_quantizer import quantize_weight


def first_layers(model: Path, layers: int, folder: Path) -> Path:
    """Write a model of the first decoder layers alone into ``folder`` and return it: less to compute."""
    source = ModelSource.open(model)
    dropped = tuple(f"{source.layers_name}.{layer}." for layer in range(layers, len(source.layers)))
    tensors = {name: source.read(name) for name in source.tensors if not name.startswith(dropped)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**source.config, "num_hidden_layers": layers}))
    for name in COPIED_NAMES:
        if (model / name).is_file():
            shutil.copyfile(model / name, folder / name)
    return folder


def correlation(x: list[float], y: list[float]) -> float:
    """Return Pearson's correlation of the logarithms."""
    return torch.corrcoef(torch.tensor([x, y], dtype=torch.float64).log())[0, 1].item()


def chosen_modules(source: ModelSource, count: int) -> list[str]:
    """Return ``count`` modules: every kind in turn, each time of a later layer."""
    depth = len(source.layers)
    kinds = len(source.linear_names(0))
    chosen = [source.linear_names(index * depth // count)[index % kinds] for index in range(count)]
    return list(dict.fromkeys(chosen))


def divergence(model: torch.nn.Module, ids: torch.Tensor, reference: list[torch.Tensor]) -> float:
    """Return the mean KL divergence in nats a token."""
    with torch.inference_mode():
        samples = [
            compare_logits(model(input_ids=sequence[None], use_cache=False).logits[0], expected, sequence)
            for sequence, expected in zip(ids, reference, strict=True)
        ]
    return sum(sample["kl_divergence"] for sample in samples) / len(samples)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--rate", default="2")
    parser.add_argument("--modules", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=4, help="of calibration and of evaluation")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, help="use only so many decoder layers")
    arguments = parser.parse_args()
    if arguments.layers is None:
        compare(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.model = first_layers(arguments.model, arguments.layers, Path(folder))
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    source = ModelSource.open(arguments.model)
    codebook = codebook_from_text(arguments.rate, "--rate")
    settings = Settings(codebook=codebook, calibration="builtin", rotation="online")
    config = plan_checkpoint(source, settings)
    tokens = calibration_tokens(source.folder, "builtin", arguments.sequences * 2, arguments.length)
    gradients = output_gradients(source, tokens, 0, "cpu")
    ids = tokenize(source.folder, evaluation_text())[: arguments.sequences * arguments.length]
    ids = ids.reshape(arguments.sequences, arguments.length)
    model = load_model(arguments.model, torch.float32)
    with torch.inference_mode():
        reference = [model(input_ids=sequence[None], use_cache=False).logits[0] for sequence in ids]

    table = Table(title=f"One module at a time at rate {codebook}, {len(source.layers)} layers")
    for column in ("module", "KL divergence", "predicted", "output error", "output error / power"):
        table.add_column(column, justify="left" if column == "module" else "right")
    columns: list[list[float]] = [[], [], [], []]
    wanted = set(chosen_modules(source, arguments.modules))
    forward, weights = LayerwiseForward(source, tokens), gradients.token_weights()
    for layer in range(len(source.layers)):
        names = [name for name in source.linear_names(layer) if name in wanted]
        with forward.loaded(layer):
            sums = forward.collect(layer, names, weights)
            forward.advance(layer)
        for name in names:
            weight = source.read(source.weight_name(name)).float()
            rotation, hessian = module_rotation(source, config, name), sums[name].mean()
            rotated = HessianCache().rotated(sums[name], rotation)
            result = quantize_weight(weight, codebook, rotation, rotated, dequantize=True)
            error = weight - result.dequantized
            rows = ((error @ hessian) * error).sum(dim=1)
            power = ((weight @ hessian) * weight).sum().item()
            linear = model.get_submodule(name)
            before = linear.weight.data
            linear.weight.data = result.dequantized
            measured = divergence(model, ids, reference)
            linear.weight.data = before
            values = (
                measured,
                0.5 * (gradients.outputs[name] @ rows).item(),
                rows.sum().item(),
                rows.sum().item() / power,
            )
            for column, value in zip(columns, values, strict=True):
                column.append(value)
            table.add_row(name.removeprefix(f"{source.layers_name}."), *(f"{value:.3g}" for value in values))
    correlations = [f"{correlation(columns[0], column):.3f}" for column in columns[1:]]
    table.add_section()
    table.add_row("correlation of logarithms", "", *correlations)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
