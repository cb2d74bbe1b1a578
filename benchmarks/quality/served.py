# SPDX-License-Identifier: Apache-2.0
"""Does a served checkpoint give the perplexity that `pvq eval` measures?

    python -m benchmarks.quality.served CHECKPOINT --reference BASE [--text FILE] [--sequences 10] [--length 1024]

Starts `pvq serve`, asks the API for the log-probabilities of the prompt's tokens, for the sequences that `pvq eval`
takes from the same text, and compares. Ends with 1 if the perplexities differ by more than half a percent.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from benchmarks.bench_server import served
from offline_quant.calibration_data import tokenize
from offline_quant.device import choose_device
from offline_quant.evaluate import evaluate, evaluation_text

TOLERANCE = 0.005


def mean_loss(client: OpenAI, tokens: list[int]) -> float:
    """Return the mean of -log p of every token but the first, given those before it."""
    answer = client.completions.create(
        model="m", prompt=tokens, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
    )
    given = answer.choices[0].model_extra["prompt_logprobs"]
    if len(given) != len(tokens) or given[0] is not None:
        raise SystemExit(f"the server gave {len(given)} log-probabilities for {len(tokens)} tokens")
    losses = [-entry[str(token)]["logprob"] for token, entry in zip(tokens[1:], given[1:], strict=True)]
    return sum(losses) / len(losses)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--text", type=Path, default=evaluation_text())
    parser.add_argument("--sequences", type=int, default=10)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ids = tokenize(arguments.reference, arguments.text)[: arguments.sequences * arguments.length]
    flags = ["--max-model-len", str(arguments.length + 1), "--enforce-eager"]
    with (
        tempfile.TemporaryDirectory() as folder,
        served("pvq serve", str(arguments.checkpoint), flags, Path(folder)) as url,
    ):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
        losses = [mean_loss(client, sequence.tolist()) for sequence in ids.split(arguments.length)]
    over_api = math.exp(sum(losses) / len(losses))
    result = evaluate(
        arguments.checkpoint, arguments.reference, arguments.text, arguments.sequences, arguments.length,
        device=choose_device("auto"),
    )  # fmt: skip
    difference = over_api / result["perplexity"] - 1
    table = Table("", "perplexity")
    table.add_row("pvq eval", f"{result['perplexity']:.4f}")
    table.add_row("vLLM, over the API", f"{over_api:.4f}")
    table.add_row("difference", f"{100 * difference:+.3f}%")
    Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps({"perplexity": result["perplexity"], "perplexity_over_api": over_api}, indent=2) + "\n"
        )
    return 0 if abs(difference) <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
