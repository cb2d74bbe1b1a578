# SPDX-License-Identifier: Apache-2.0
"""GPTQ and AWQ by llm-compressor. Options: method ("gptq" or "awq"), bits, symmetric, groups (input width to
group size).
"""

from importlib.metadata import version

import torch
from compressed_tensors.quantization import fake_quantize
from exchange import calibration_tokens, decoder_linears, load_model, read_job, write_answer
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch.utils.data import DataLoader


def main() -> None:
    job = read_job()
    options = job["options"]
    model = load_model(job, torch.bfloat16)
    tokens = calibration_tokens(job)
    linears = decoder_linears(model)
    config_groups = {}
    for index, (width, group) in enumerate(sorted(options["groups"].items())):
        config_groups[f"group_{index}"] = {
            "targets": [name for name, module in linears.items() if module.in_features == int(width)],
            "weights": {
                "num_bits": options["bits"],
                "type": "int",
                "symmetric": options["symmetric"],
                "strategy": "group",
                "group_size": group,
                "observer": options["observer"],
            },
        }
    if options["method"] == "gptq":
        recipe = [GPTQModifier(config_groups=config_groups, ignore=["lm_head"])]
    else:
        if not torch.accelerator.is_available():
            # Pinned memory only makes copies to an accelerator faster, but AWQModifier asks for it always.
            IntermediatesCache.pin_memory = lambda cache, index: None
        recipe = [
            AWQModifier(n_grid=options["n_grid"]),
            QuantizationModifier(config_groups=config_groups, ignore=["lm_head"]),
        ]
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens.split(1)]
    oneshot(
        model=model,
        dataset=DataLoader(batches, batch_size=None),  # taken as it is
        recipe=recipe,
        num_calibration_samples=len(batches),
        max_seq_length=tokens.shape[1],
    )
    stored = {}
    with torch.no_grad():
        for name, module in linears.items():
            args = module.quantization_scheme.weights
            zero_point = getattr(module, "weight_zero_point", None)
            scale = module.weight_scale.half().float()  # 16 bits are counted
            module.weight.copy_(fake_quantize(module.weight, scale, zero_point, args))
            scales = module.weight_scale.numel()
            zero_bits = 0 if args.symmetric else args.num_bits
            stored[name] = args.num_bits * module.weight.numel() + scales * (16 + zero_bits)
    state = {name: tensor for name, tensor in model.named_parameters() if "weight_" not in name}
    write_answer(job, state, stored, package=f"llmcompressor {version('llmcompressor')}")


if __name__ == "__main__":
    main()
