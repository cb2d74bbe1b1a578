# SPDX-License-Identifier: Apache-2.0
"""AutoRound. Options: bits, groups (input width to group size), iterations, sequence_length."""

from importlib.metadata import version

import torch
from auto_round import AutoRound
from exchange import calibration_tokens, decoder_linears, load_model, read_job, write_answer
from transformers import AutoTokenizer


def main() -> None:
    job = read_job()
    options = job["options"]
    model = load_model(job, torch.bfloat16)
    linears = decoder_linears(model)
    shapes = {name: tuple(module.weight.shape) for name, module in linears.items()}
    tokens = calibration_tokens(job)
    tokens = tokens.reshape(-1, options["sequence_length"])
    batch = 8
    dataset = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in tokens.split(batch)]
    default = options["groups"][max(options["groups"], key=int)]
    layer_config = {
        name: {"bits": options["bits"], "group_size": options["groups"][str(shape[1])], "sym": True}
        for name, shape in shapes.items()
    }
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job["model"], local_files_only=True),
        bits=options["bits"],
        group_size=default,
        sym=True,
        layer_config=layer_config,
        iters=options["iterations"],
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        batch_size=batch,
        dataset=dataset,
        device_map=job["device"],
        seed=42,
    )
    quantized, resolved = rounder.quantize()
    modules = dict(quantized.named_modules())
    stored = {}
    for name, (out_features, in_features) in shapes.items():
        used = resolved[name]
        if (used["bits"], used["group_size"]) != (options["bits"], options["groups"][str(in_features)]):
            raise SystemExit(f"AutoRound quantized {name} with {used}, not as asked")
        groups = out_features * in_features // used["group_size"]
        stored[name] = used["bits"] * out_features * in_features + 16 * groups
    state = {f"{name}.weight": modules[name].weight.float() for name in shapes}
    write_answer(
        job, state, stored, package=f"auto-round {version('auto-round')}", iterations=options["iterations"]
    )


if __name__ == "__main__":
    main()
