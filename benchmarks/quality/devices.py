# SPDX-License-Identifier: Apache-2.0
"""Does a checkpoint answer the same on a CPU and on a GPU?

    python -m benchmarks.quality.devices CHECKPOINT [--devices cpu,cuda] [--activation a16] [--dtype float32] [--tokens 48]

Asks eight questions on both devices, greedily, in transformers, and says where an answer parts from the other one and by how
much the best token there was ahead of the next. The linear layers give the same bits on both; attention and norms add in another
order. Ends with 1 if an answer differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer

from offline_quant.evaluate import load_model

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "What is 7 times 8?",
    "Name three colours.",
    "Who wrote Romeo and Juliet?",
    "Explain photosynthesis in two sentences.",
    "Translate 'good morning' into Spanish.",
    "Give me a recipe for pancakes.",
)


class Answer(NamedTuple):
    token_ids: list[int]
    leads: list[float]  # by token: how far the best one's log-probability is above the next one's
    text: str


class Model:
    def __init__(self, folder: Path, device: str, dtype: torch.dtype, activation: str | None) -> None:
        self.model = load_model(folder, dtype, device, activation)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    @torch.inference_mode()
    def answer(self, question: str, max_tokens: int) -> Answer:
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).to(self.model.device)
        generated = self.model.generate(
            **prompt,
            max_new_tokens=max_tokens,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        token_ids = generated.sequences[0, prompt["input_ids"].shape[1] :].tolist()
        best = [score[0].float().log_softmax(-1).topk(2).values.tolist() for score in generated.scores]
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return Answer(token_ids, [first - second for first, second in best], text)


def parting(one: Answer, other: Answer) -> int | None:
    """The first token in which they differ, None if there is none."""
    if one.token_ids == other.token_ids:
        return None
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    shorter = min(len(one.token_ids), len(other.token_ids))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), shorter)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--devices", default="cpu,cuda", help="two (default: %(default)s)")
    parser.add_argument("--activation", help="a8 or a16 (default: the checkpoint's)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, at most (default: %(default)s)")
    options = parser.parse_args(arguments)
    devices = options.devices.split(",")
    if len(devices) != 2:
        parser.error("--devices: two, such as cpu,cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    dtype = getattr(torch, options.dtype)
    models = [Model(options.checkpoint, device, dtype, options.activation) for device in devices]
    same = 0
    for question in QUESTIONS:
        one, other = (model.answer(question, options.tokens) for model in models)
        place = parting(one, other)
        same += place is None
        if place is None:
            verdict = f"the same {len(one.token_ids)} tokens"
        else:
            leads = " and ".join(
                f"{answer.leads[place]:.4f}" for answer in (one, other) if place < len(answer.leads)
            )
            verdict = f"part at token {place}, where the best is ahead by {leads}"
        print(f"{question} {one.text.split(chr(10))[0][:60]!r}: {verdict}", flush=True)
    print(f"{same} of {len(QUESTIONS)} answers are the same token by token on {devices[0]} and {devices[1]}")
    return int(same < len(QUESTIONS))


if __name__ == "__main__":
    sys.exit(main())
