# SPDX-License-Identifier: Apache-2.0
"""The command ``pvq bench``. Heavy imports are inside the functions, after the cheap checks."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.errors import ServerError, one_sentence

if TYPE_CHECKING:
    from rich.console import Console

    from server.bench.plan import OnDone, Plan
    from server.bench.target import Target

SEARCH_DURATION_S = 30.0
"""How long each rate of a search lasts, unless told otherwise: an overloaded queue needs time to grow."""

WIDTH_OF_FILES = 150
INTERRUPTED = 130
"""The exit status of a program that Ctrl-C ended."""

group = typer.Typer(add_completion=False, rich_markup_mode=None)


@contextlib.contextmanager
def _written_to(out: Path) -> Iterator[None]:
    """Turn an OSError on the way to the results into a ServerError."""
    try:
        yield
    except OSError as error:
        raise ServerError(
            f"--out {out} cannot be written ({error.strerror}): free some space or give another folder"
        ) from None


@group.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    url: Annotated[
        list[str] | None,
        typer.Option(
            help="Address of a server; repeat it to measure several in turn.  [default: port 8000 here]"
        ),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="Name of each --url in the results.  [default: its model]")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Name in requests, for all or each --url.  [default: the first that is served]"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html, load.json and the CSV files.")] = Path(
        "bench"
    ),
    concurrency: Annotated[
        str | None, typer.Option(help="Requests at once, one load each, such as 1,2,4.  [default: 1,2,4,8]")
    ] = None,
    request_rate: Annotated[
        str | None, typer.Option(help="Instead: requests arriving a second (Poisson), such as 0.5,1,2,inf.")
    ] = None,
    find_rate: Annotated[
        bool,
        typer.Option("--find-rate", help="Instead: search the highest rate within the objective."),
    ] = False,
    ttft_objective_ms: Annotated[
        float | None, typer.Option(min=0, help="Good requests have their first token within so many ms.")
    ] = None,
    tpot_objective_ms: Annotated[
        float | None,
        typer.Option(min=0, help="Good requests take at most so many ms for each further token."),
    ] = None,
    attainment: Annotated[
        float, typer.Option(min=0, max=1, help="Share of good requests at which a rate counts as carried.")
    ] = 0.9,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="Requests for each load (at least twice the concurrency).  [default: 16]"),
    ] = None,
    duration_s: Annotated[
        float | None,
        typer.Option(min=0.1, help="Instead, for rates: as many as arrive in so many seconds."),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(min=1, help="How often to go through all loads and servers; not with --find-rate."),
    ] = 1,
    warmup: Annotated[
        int | None,
        typer.Option(
            min=0, help="Requests before each load, not measured.  [default: the concurrency, or 2]"
        ),
    ] = None,
    input_tokens: Annotated[
        str, typer.Option(help="Length of random prompts: 128, 64-256, normal:128:32, lognormal:128:0.8.")
    ] = "128",
    output_tokens: Annotated[
        str | None, typer.Option(help="Length of answers, likewise.  [default: 64, or from --dataset]")
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="Prompts from a file: ShareGPT's JSON, or JSON lines.")
    ] = None,
    endpoint: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    stop_at_eos: Annotated[
        bool, typer.Option("--stop-at-eos", help="Let the model end answers (ignore_eos is vLLM's own).")
    ] = False,
    timeout_s: Annotated[
        float, typer.Option(min=0.1, help="Seconds after which a request has failed.")
    ] = 600.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of prompts, lengths and arrival times.")] = 0,
) -> None:
    """Load-test running servers: latency, throughput and goodput against load.

    The API key comes from PVQ_API_KEY or OPENAI_API_KEY. The exit status is 1 if every request failed. pvq
    bench compare A B compares two results folders.
    """
    if context.invoked_subcommand is not None:
        return
    from server.bench import workload
    from server.bench.dataset import DatasetPrompts
    from server.bench.metrics import Objective
    from server.bench.search import MIN_REQUESTS

    with one_sentence():
        if sum((concurrency is not None, request_rate is not None)) > 1 or (find_rate and concurrency):
            raise ServerError(
                "--concurrency, --request-rate and --find-rate exclude each other: give one of them "
                "(--find-rate may start from one --request-rate)"
            )
        if endpoint not in ("completions", "chat"):
            raise ServerError(f"--endpoint {endpoint} is unknown: give completions or chat")
        objective = Objective(ttft_objective_ms, tpot_objective_ms, attainment)
        if find_rate and not objective:
            raise ServerError(
                "--find-rate needs an objective: give --ttft-objective-ms or --tpot-objective-ms"
            )
        if find_rate and rounds > 1:
            raise ServerError(
                f"--find-rate measures each rate once, not in --rounds {rounds}: leave --rounds out, "
                "or make each rate longer with --duration-s"
            )
        rates = find_rate or request_rate is not None
        if duration_s is not None and (requests is not None or not rates):
            raise ServerError("--duration-s is for rates and instead of --requests: leave one of them out")
        if rates:
            loads = workload.parse_loads(request_rate or "1", "--request-rate")
        else:
            loads = workload.parse_loads(concurrency or "1,2,4,8", "--concurrency")
        if duration_s is not None and None in loads:
            raise ServerError(
                "--duration-s says nothing about the rate inf: give --requests, or leave out inf"
            )
        if find_rate and (len(loads) != 1 or loads[0] is None):
            raise ServerError(f"--find-rate starts at one rate, not at {request_rate}: give one number")
        if find_rate and requests is None:
            duration_s, requests = duration_s or SEARCH_DURATION_S, MIN_REQUESTS
        answers = workload.Lengths.parse(output_tokens or "64", "--output-tokens")
        if dataset is not None:
            source: Any = DatasetPrompts(dataset, answers if output_tokens else None, seed)
        else:
            source = workload.RandomPrompts(workload.Lengths.parse(input_tokens, "--input-tokens"), answers)

        from server.bench.client import RequestOptions
        from server.bench.plan import Plan
        from server.bench.target import find_targets

        plan = Plan(
            axis=workload.REQUEST_RATE if rates else workload.CONCURRENCY,
            loads=loads,
            source=source,
            requests=requests or (16 if duration_s is None else 1),
            duration_s=duration_s,
            rounds=rounds,
            warmup=warmup,
            seed=seed,
            options=RequestOptions(endpoint == "chat", not stop_at_eos, timeout_s),
            objective=objective,
        )
        key = os.environ.get("PVQ_API_KEY") or os.environ.get("OPENAI_API_KEY")
        targets = find_targets(url or ["http://127.0.0.1:8000"], label or [], model or [], key)
        with _written_to(out):
            out.mkdir(parents=True, exist_ok=True)
        raise typer.Exit(_measure(plan, targets, find_rate, out))


def _measure(plan: "Plan", targets: "list[Target]", find_rate: bool, out: Path) -> int:
    """Run ``plan``, print the table, write the results and return the exit status."""
    import dataclasses

    from server.bench import compare, results
    from server.bench import plan as planning
    from server.bench.metrics import errors, worst_warnings
    from server.bench.page import render
    from server.bench.search import search

    found = []
    if find_rate:
        assert plan.loads[0] is not None, "checked before"
        with _progress(plan, None) as on_done:
            found, runs = search(plan, targets, plan.loads[0], on_done)
        complete = len(found) == len(targets)
        plan = dataclasses.replace(plan, loads=tuple(sorted({load for _, load in runs if load is not None})))
    else:
        total = plan.rounds * len(targets) * sum(map(plan.requests_at, plan.loads))
        with _progress(plan, total) as on_done:
            runs = planning.run(plan, targets, on_done)
        complete = sum(map(len, runs.values())) == plan.rounds * len(targets) * len(plan.loads)
    if not runs:
        print("pvq: interrupted before the first load was complete: nothing is written", file=sys.stderr)
        return INTERRUPTED
    points = planning.points(runs, plan.objective)
    rounds = {key: [run.records for run in parts] for key, parts in runs.items()}
    content = results.report(plan, targets, points, found)
    comparisons = [] if find_rate else compare.compare_targets(rounds)
    console = _console()
    console.print(results.table(points, plan.axis))
    if comparisons:
        console.print(compare.table(comparisons, plan.axis, "Side by side"))
    for result in found:
        rate = "none" if result.rate is None else f"{result.rate:.3g} requests/s"
        print(f"{result.label}: highest rate within the objective: {rate} ({result.outcome})")
    with _written_to(out):
        results.write(out, content, runs)
        (out / "report.html").write_text(render(content, points, rounds, comparisons), encoding="utf-8")
    print(f"{out / 'load.json'} and {out / 'report.html'} written")
    for point, text, count in worst_warnings(points):
        print(f"pvq: {results.place(point, plan.axis)}: {text}{results.others(count)}", file=sys.stderr)
    for label, reason, count in errors(points):
        print(f"pvq: {label}: {count} failed: {reason}", file=sys.stderr)
    if content["completed"] == 0:
        print("pvq: every request failed", file=sys.stderr)
        return 1
    if not complete:
        print("pvq: interrupted: what was complete until then is written", file=sys.stderr)
        return INTERRUPTED
    return 0


def _console() -> "Console":
    """Return the console of stdout; a file or a pipe gets lines long enough for every table."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=WIDTH_OF_FILES)


@contextlib.contextmanager
def _progress(plan: "Plan", total: int | None) -> "Iterator[OnDone]":
    """Show a bar of finished requests where stderr is a terminal; yield what is to be called for each."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from server.bench.workload import load_label

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    failed = 0
    # Drawn seldom: it takes milliseconds in which no piece of an answer is stamped.
    shown = {
        "console": console,
        "disable": not console.is_terminal,
        "transient": True,
        "refresh_per_second": 2,
    }
    with Progress(*columns, **shown) as progress:
        task = progress.add_task("load test", total=total)

        def on_done(stage: Any, record: Any) -> None:
            nonlocal failed
            failed += bool(record.failure)
            now = f"{escape(stage.target.label)}, {plan.axis.replace('_', ' ')} {load_label(stage.load)}"
            if plan.rounds > 1:
                now += f", round {stage.round + 1} of {plan.rounds}"
            progress.update(
                task, advance=1, description=now + (f", [red]{failed} failed[/red]" if failed else "")
            )

        yield on_done


@group.command("compare")
def compare_command(
    a: Annotated[Path, typer.Argument(metavar="A", help="Results folder of the one measurement.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Results folder of the other one.")],
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the ratios here, too.")
    ] = None,
) -> None:
    """Print ratios of two results folders, B / A."""
    from rich.markup import escape

    from server.bench import compare, results

    with one_sentence():
        read_a, read_b = results.read(a), results.read(b)
        comparisons, warnings = compare.compare_folders(read_a, read_b)
        if comparisons:
            title = f"B / A: {escape(str(b))} / {escape(str(a))}"
            _console().print(compare.table(comparisons, read_a[0]["axis"], title))
        for sentence in compare.compare_rates(read_a[0], read_b[0]):
            print(sentence)
        for text in warnings:
            print(f"pvq: {text}", file=sys.stderr)
        if json_path is not None:
            text = json.dumps(compare.as_json(comparisons, warnings), indent=2, allow_nan=False)
            try:
                json_path.write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                raise ServerError(
                    f"--json {json_path} cannot be written ({error.strerror}): give another file"
                ) from None


# The entry point is the group; `pvq --help` reads the line above without importing anything.
group.__doc__ = bench.__doc__
bench = group  # type: ignore[assignment]
