# SPDX-License-Identifier: Apache-2.0
"""The commands `pvq quantize`, `pvq inspect` and `pvq eval`: arguments in, functions of this package, tables
out.
"""

import json
import os
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from pvq_vllm.codec.errors import PVQError

ENOUGH_TOKENS = 8  # of calibration, for each column of the widest input

# Heavy imports (torch, transformers) happen inside the commands, so that --help answers at once.


def _use_threads(threads: int | None) -> None:
    """Set the threads of torch; None stands for all cores that this process may use."""
    import torch

    if threads is not None and threads < 1:
        raise PVQError(f"--threads is {threads}, but must be at least 1")
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))


def quantize(
    model: Annotated[Path, typer.Argument(help="Local Hugging Face folder with safetensors.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it is moved into place at the end.")],
    bits: Annotated[
        str | None, typer.Option(help="Bits a weight of the linear layers: 2, 3, 4 (the default) or 8.")
    ] = None,
    codebook: Annotated[
        str, typer.Option(help="'serving' (as --bits says) or 'canonical' (with the next three options).")
    ] = "serving",
    group_size: Annotated[int | None, typer.Option(help="canonical: D, weights of a group.")] = None,
    num_pulses: Annotated[int | None, typer.Option(help="canonical: K, pulses of a group.")] = None,
    amplitude_bits: Annotated[
        int | None, typer.Option(help="canonical: bits of a group's amplitude.")
    ] = None,
    amplitude: Annotated[
        str,
        typer.Option(
            help="canonical: amplitude levels, 'lloyd_max' (fitted to each matrix) or 'beta' (theory, as in "
            "the paper)."
        ),
    ] = "lloyd_max",
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=BITS",
            help="Other rate for modules whose name matches: 2, 3, 4, 8, 16 (not quantized) or D,K,b. "
            "Repeatable; the last one that matches counts.",
        ),
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(
            help="Average bits a weight of the layers: a rate for every module is chosen by measured "
            "sensitivity (needs --calibration; instead of --bits)."
        ),
    ] = None,
    rate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BITS",
            help="With --target-bpw: a rate to choose from, 2, 3, 4, 8 or D,K,b. Repeatable; default 2, 3, 4, 8.",
        ),
    ] = None,
    lm_head: Annotated[int, typer.Option(help="Bits of the head: 16, 8 or 4.")] = 8,
    embeddings: Annotated[int, typer.Option(help="Bits of the input embedding: 16 or 8.")] = 16,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|FOLDER|builtin|self",
            help="Data for error feedback: a text, a dataset (.parquet, .jsonl or a folder of them, with a "
            "column text or messages), 'builtin' (the text that ships) or 'self' (sampled from the model). "
            "Without it: rounding to nearest.",
        ),
    ] = None,
    calibration_sequences: Annotated[int, typer.Option(help="Sequences of calibration data.")] = 24,
    calibration_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 1024,
    token_weights: Annotated[
        str,
        typer.Option(
            help="How much each calibration token counts: gradient (as much as the model's output depends on the "
            "layer's at that token) or uniform."
        ),
    ] = "gradient",
    tune_epochs: Annotated[
        int,
        typer.Option(
            help="Passes over the calibration data that tune row scales and norms together, at the end; holds the "
            "model in memory. 10 is enough."
        ),
    ] = 0,
    rotation: Annotated[
        str,
        typer.Option(
            help="block:N (every input at run time, in blocks of at most N columns), online (over its whole width), "
            "residual (folded into the weights, only down_proj's input at run time), residual:N (that one in blocks "
            "of at most N) or none; auto: residual:128 where the model allows it, else block:128."
        ),
    ] = "block:128",
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of whatever is drawn: signs of the rotation, labels of the gradients, sampled tokens, order of "
            "tuning."
        ),
    ] = 0,
    tensor_parallel: Annotated[
        int,
        typer.Option(
            help="Largest tensor-parallel size to serve with: o_proj and down_proj are rotated in blocks that so many "
            "ranks can share."
        ),
    ] = 1,
    activation: Annotated[
        str, typer.Option(help="Activation mode to serve with: a8, a16 or pvq:D,K (pyramids, as pvq:16,58).")
    ] = "a8",
    device: Annotated[
        str, typer.Option(help="Where to compute: cpu, cuda, or auto (a GPU if there is one).")
    ] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run; the result has the same bytes.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, or an interrupted run.")
    ] = False,
    evaluate: Annotated[
        bool | None,
        typer.Option(
            "--evaluate/--no-evaluate",
            help="Measure OUT against MODEL at the end, as `pvq eval OUT --reference MODEL --update-card` does. "
            "Default: if there is memory for both.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads (default: all cores this process may use).")
    ] = None,
) -> None:
    """Quantize a model folder into a checkpoint that vLLM serves."""

    from .device import choose_device
    from .plan import Settings, codebook_from_text, parse_override
    from .quantize_checkpoint import quantize_checkpoint

    _use_threads(threads)
    places = model.absolute(), out.absolute()  # what a relative path starts from may be moved away meanwhile
    if target_bpw is not None and (bits is not None or codebook != "serving"):
        given = "--bits" if bits is not None else "--codebook canonical"
        raise PVQError(
            f"{given} and --target-bpw exclude each other, since that chooses a rate for every module (from those that "
            "--rate names): leave one out"
        )
    canonical = (group_size, num_pulses, amplitude_bits)
    if codebook == "canonical":
        if None in canonical:
            raise PVQError("--codebook canonical needs --group-size, --num-pulses and --amplitude-bits")
        if bits is not None:
            raise PVQError(
                "--bits belongs to --codebook serving: leave it out, K and D decide the rate of canonical"
            )
        chosen = codebook_from_text(",".join(map(str, canonical)), "--codebook canonical")
    elif codebook != "serving":
        raise PVQError(f"--codebook is '{codebook}', but must be serving or canonical")
    elif canonical != (None, None, None):
        raise PVQError(
            "--group-size, --num-pulses and --amplitude-bits belong to --codebook canonical: add it"
        )
    elif bits not in (None, "2", "3", "4", "8"):
        raise PVQError(f"--bits is '{bits}', but must be 2, 3, 4 or 8")
    else:
        chosen = codebook_from_text(bits or "4", "--bits")
    settings = Settings(
        codebook=chosen,
        overrides=tuple(parse_override(text) for text in override or []),
        lm_head_bits=lm_head,
        embedding_bits=embeddings,
        activation=activation,
        rotation=rotation,
        seed=seed,
        tensor_parallel=tensor_parallel,
        calibration=calibration,
        calibration_sequences=calibration_sequences,
        calibration_length=calibration_length,
        token_weights=token_weights,
        tune_epochs=tune_epochs,
        amplitude=amplitude,
        target_bpw=target_bpw,
        rates=tuple(rate or []),
        device=choose_device(device),
    )
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("reading the model", total=None)

        def show(name: str, weights: int) -> None:
            bar.update(task, advance=weights, description=name.removeprefix("model."))

        report = quantize_checkpoint(
            model, out, settings, resume, overwrite, show, lambda weights: bar.update(task, total=weights)
        )
    console.print(
        f"{out}: {report['bits_per_weight']:.3f} bits a weight, "
        f"{report['size_bytes_quantized'] / 1e6:,.1f} MB "
        f"(base {report['size_bytes_base'] / 1e6:,.1f} MB)"
    )
    if report["unquantized_share"]:
        console.print(
            f"{report['unquantized_share']:.1%} of the weights in the layers stay as they are; the average counts them"
        )
    if calibration is None:
        console.print(
            "rounded to nearest, for want of data: --calibration builtin, or better a text like those the model will "
            "see, leaves a quarter of the KL divergence or less"
        )
    widest = max((module["in_features"] for module in report["modules"].values()), default=0)
    if calibration is not None and report["calibration_tokens"] < ENOUGH_TOKENS * widest:
        console.print(
            f"{report['calibration_tokens']:,} tokens of calibration are few for inputs of {widest} columns: "
            "--calibration-sequences 128 --calibration-length 2048 fits the codes to them less"
        )
    if evaluate is not False:
        _measure_new(*places, settings.device, threads, is_wanted=evaluate is True)


def _measure_new(model: Path, out: Path, device: str, threads: int | None, is_wanted: bool) -> None:
    """Measure a new checkpoint, for its card. Where nobody asked for that, whatever prevents it is only told."""
    from .evaluate import check_evaluation_memory, longest_sequence
    from .model_source import ModelSource

    console = Console(stderr=True)
    console.print(f"measuring {out} against {model} (--no-evaluate leaves this out)")
    later = f"pvq eval {shlex.quote(str(out))} --reference {shlex.quote(str(model))} --update-card"
    try:
        source = ModelSource.open(model)
        if not is_wanted:
            check_evaluation_memory(source, device, "a machine with more can do it")
        length = longest_sequence(source)
        eval_(out, reference=model, length=length, update_card=True, device=device, threads=threads)
    except Exception as error:
        if is_wanted:
            raise
        said = str(error) if isinstance(error, PVQError) else f"{type(error).__name__}: {error}"
        console.print(
            f"not measured: {said}\n{out} is complete; to measure it later: {later}", highlight=False
        )


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="PVQ checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Verify a checkpoint and show codebook, bits and error of every layer."""
    from .inspect import inspect_checkpoint

    result = inspect_checkpoint(checkpoint)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    table = Table("module", "codebook", "shape", "rotation", "bits/weight", "weight SNR dB", "output SNR dB")
    for column in table.columns[2:]:
        column.justify = "right"
    for module in result["modules"]:
        table.add_row(
            module["name"],
            module["codebook"],
            f"{module['out_features']} x {module['in_features']}",
            f"{module['rotation_blocks']} block{'s' * (module['rotation_blocks'] != 1)}"
            if module["rotation_blocks"]
            else "none",
            f"{module['bits_per_weight']:.3f}",
            *(
                "" if module[key] is None else f"{module[key]:.2f}"
                for key in ("weight_snr_db", "output_snr_db")
            ),
        )
    console = Console()
    console.print(table)
    console.print(
        f"{checkpoint}: verified; {result['bits_per_weight']:.3f} bits a weight in the layers, "
        f"{result['size_bytes'] / 1e6:,.1f} MB, activations {result['activation']}"
    )


def eval_(
    model: Annotated[Path, typer.Argument(help="Model folder, quantized or not.")],
    reference: Annotated[Path, typer.Option(help="The model to compare with: the unquantized base.")],
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text (default: the evaluation text that ships).")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result to this file as well.")
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences, from the beginning of the text.")] = 10,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 1024,
    update_card: Annotated[
        bool, typer.Option("--update-card", help="Write the result into the model card, MODEL/README.md.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="auto, bfloat16 or float32: arithmetic of what is not quantized.")
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda; auto takes a GPU if there is one.")
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="Threads (default: all cores this process may use).")
    ] = None,
) -> None:
    """Measure perplexity, KL divergence and top-1 agreement against a reference model."""
    import torch

    from .device import choose_device
    from .evaluate import evaluate, evaluation_text
    from .model_card import add_evaluation, check_card
    from .whole_files import write_file

    _use_threads(threads)
    text, card = text or evaluation_text(), model / "README.md"
    dtypes = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
    if dtype not in dtypes:
        raise PVQError(f"--dtype is '{dtype}', but must be one of {', '.join(dtypes)}")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise PVQError(f"--json {json_file}: its folder does not exist, create it first")
    if update_card and not card.is_file():
        raise PVQError(f"--update-card: there is no {card}: give a checkpoint that `pvq quantize` made")
    if update_card:
        check_card(card.read_text(encoding="utf-8"))
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("sequence"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=sequences)
        result = evaluate(
            model,
            reference,
            text,
            sequences,
            length,
            dtypes[dtype],
            lambda done: bar.update(task, completed=done),
            choose_device(device),
        )
    table = Table("", "value", "95% confidence")
    for key in ("perplexity", "perplexity_reference", "kl_divergence", "top1_agreement"):
        interval = result[f"{key}_ci95"]
        table.add_row(
            key, f"{result[key]:.4f}", "" if interval is None else f"{interval[0]:.4f} ... {interval[1]:.4f}"
        )
    Console().print(table)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise PVQError(
                f"--json {json_file} cannot be written ({error.strerror}): name another file"
            ) from error
    if update_card:
        content = add_evaluation(card.read_text(encoding="utf-8"), result, text.name)
        try:
            write_file(card, content.encode())
        except OSError as error:
            raise PVQError(
                f"--update-card: {card} cannot be written ({error.strerror}): make its folder writable"
            ) from error
