# SPDX-License-Identifier: Apache-2.0
"""The command that makes a checkpoint, from its settings, for the model card: to be typed again."""

import dataclasses
import shlex

from .plan import CODEBOOK_OF_BITS, Settings

# Options whose names are not those of the fields.
OPTIONS = {
    "overrides": "--override",
    "lm_head_bits": "--lm-head",
    "embedding_bits": "--embeddings",
    "rates": "--rate",
}
ALWAYS = ("rotation", "device")  # shown even where they are as by default: `auto` chose them
WITHOUT_OPTION = ("codebook", "max_shard_bytes")


def command_line(model: str, settings: Settings, threads: int | None = None) -> str:
    """Return `pvq quantize MODEL OUT ...` with every option that decides the bytes and is not the default.

    Args:
        threads: of the run, where they decide the bytes.
    """
    words = ["pvq", "quantize", model, "OUT"]
    if settings.codebook.name == "canonical":
        words += ["--codebook", "canonical"]
        for option in ("group_size", "num_pulses", "amplitude_bits"):
            words += [_option(option), str(getattr(settings.codebook, option))]
    elif settings.target_bpw is None:
        bits = next(bits for bits, codebook in CODEBOOK_OF_BITS.items() if codebook == settings.codebook)
        words += ["--bits", bits]
    for field in dataclasses.fields(Settings):
        value = getattr(settings, field.name)
        if field.name in WITHOUT_OPTION or (value == field.default and field.name not in ALWAYS):
            continue
        option = OPTIONS.get(field.name, _option(field.name))
        if isinstance(value, tuple):
            words += [word for entry in value for word in (option, _text(entry))]
        else:
            words += [option, str(value)]
    if threads is not None:
        words += ["--threads", str(threads)]
    return shlex.join(words)


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")


def _text(entry: str | tuple[str, str]) -> str:
    return entry if isinstance(entry, str) else "=".join(entry)
