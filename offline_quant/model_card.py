# SPDX-License-Identifier: Apache-2.0
"""The README.md of a checkpoint: where it comes from, its licence, a table of facts and how to use it."""

import re
from pathlib import Path

from pvq_vllm.codec.errors import PVQError

NOT_MEASURED = (
    "What the model lost was not measured: `pvq eval . --reference BASE_MODEL --update-card` does it."
)


def model_card(base: Path, report: dict) -> str:
    """Return the model card for a checkpoint made from the folder ``base``; ``report`` as
    ``quantize_checkpoint`` returns it.

    The licence lines of the base's own card are kept, since the checkpoint stays under that licence.
    """
    front = [
        "---",
        *_license_lines(base),
        f"base_model: {report['base_model']}",
        "library_name: vllm",
        "tags: [pvq]",
        "---",
    ]
    calibration = (
        f"{report['calibration_tokens']:,} tokens"
        if report["calibration_tokens"]
        else "none (rounded to nearest)"
    )
    ratio = report["size_bytes_base"] / report["size_bytes_quantized"]
    rows = [
        ("Base model", report["base_model"]),
        ("Codebook", report["codebook"]),
        ("Bits per weight, layers", f"{report['bits_per_weight']:.3f}"),
        *(
            [
                (
                    "Left at their own bits",
                    f"{report['unquantized_share']:.1%} of the layers' weights, counted here",
                )
            ]
            if report["unquantized_share"]
            else []
        ),
        (
            "Bits per weight, head and embedding included where quantized",
            f"{report['bits_per_weight_with_head']:.3f}",
        ),
        (
            "Size",
            f"{report['size_bytes_quantized'] / 1e6:,.1f} MB, the base {ratio:.2f} times as much",
        ),
        ("Rotation", report["rotation"]),
        ("Activations", report["activation"]),
        ("Calibration", calibration),
    ]
    table = ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
    text = [
        f"# {report['base_model']}, quantized with PVQ",
        "",
        "Pyramid vector quantization of the linear layers in rotated coordinates. The licence is that of",
        "the base model; see the files LICENSE and NOTICE, where there are any.",
        "",
        *table,
        "",
        "Error of every layer: `report.html`, `report.json`, or `pvq inspect .`.",
        NOT_MEASURED,
        "Made by",
        "",
        "```console",
        report["command"],
        "```",
        "",
        "Serve it:",
        "",
        "```console",
        "pip install 'pvq-vllm[cuda]'  # without a GPU: [cpu]",
        "vllm serve PATH_OF_THIS_FOLDER",
        "```",
        "",
        "With transformers: `import pvq_vllm.hf_quantizer`, then `AutoModelForCausalLM.from_pretrained`.",
    ]
    return "\n".join([*front, *text]) + "\n"


def check_card(card: str) -> None:
    """Refuse a card that ``add_evaluation`` cannot take.

    Raises:
        PVQError: it has no table of facts any more.
    """
    if not any(line.startswith("| Calibration |") for line in card.split("\n")):
        raise PVQError(
            "README.md has no row '| Calibration |' to put the evaluation behind: restore the card"
        )


def add_evaluation(card: str, result: dict, text: str) -> str:
    """Return the model card with the numbers of an evaluation in its table, in the place of older ones or of the sentence
    that there are none.

    Args:
        card: as ``model_card`` made it, perhaps edited since.
        result: as ``evaluate`` returns it; text: name of the text.
    Raises:
        PVQError: the card has no table of facts any more.
    """
    on = f"{result['sequences']} x {result['length']} tokens of {text}, {result['dtype']} on {result['device']}"
    rows = {
        "Perplexity": f"{result['perplexity']:.3f} (base {result['perplexity_reference']:.3f}), {on}",
        "KL divergence to the base": f"{result['kl_divergence']:.4f} nats a token, {on}",
        "Top-1 agreement with the base": f"{result['top1_agreement']:.4f}, {on}",
    }
    replaced = NOT_MEASURED, *(f"| {name} |" for name in rows)
    lines = [line for line in card.split("\n") if not line.startswith(replaced)]
    check_card(card)
    places = [index for index, line in enumerate(lines) if line.startswith("| Calibration |")]
    new = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([*lines[: places[0] + 1], *new, *lines[places[0] + 1 :]])


def _license_lines(base: Path) -> list[str]:
    """Return the lines of the base card's front matter that state its licence."""
    card = base / "README.md"
    if not card.is_file():
        return []
    text = card.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    if front is None:
        return []
    return [line for line in front.group(1).split("\n") if re.match(r"licen[sc]e(_name|_link)?:", line)]
