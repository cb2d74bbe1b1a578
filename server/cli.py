# SPDX-License-Identifier: Apache-2.0
"""The commands ``pvq serve`` and ``pvq bench``. Heavy imports are inside the functions, after the cheap
checks.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from server.errors import ServerError


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """Print a ServerError as one sentence and end with status 2."""
    try:
        yield
    except ServerError as error:
        print(f"pvq: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of the model; before the flags of vLLM.")
    ],
    host: Annotated[
        str | None, typer.Option(help="Address to listen on.  [PVQ_HOST, default 127.0.0.1]")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.  [PVQ_PORT, default 8000]")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Key for /v1 and /pvq; prefer the variable, other users can read flags.  [PVQ_API_KEY]"
        ),
    ] = None,
    health_timeout_s: Annotated[
        float | None,
        typer.Option(help="Seconds in which a healthy engine answers.  [PVQ_HEALTH_TIMEOUT_S, default 10]"),
    ] = None,
    drain_timeout_s: Annotated[
        int | None,
        typer.Option(help="Seconds for running requests at the end.  [PVQ_DRAIN_TIMEOUT_S, default 10]"),
    ] = None,
    cpu_kv_cache_gib: Annotated[
        int | None,
        typer.Option(
            help="GiB of key-value cache on a CPU.  [PVQ_CPU_KV_CACHE_GIB, default: a quarter of free memory]"
        ),
    ] = None,
    cpu_threads_bind: Annotated[
        str | None,
        typer.Option(help="Cores to use on a CPU, such as 0-3 or auto.  [PVQ_CPU_THREADS_BIND]"),
    ] = None,
) -> None:
    """Serve MODEL with vLLM behind an OpenAI-compatible API.

    Every other flag is passed on to vLLM, for example --max-model-len 2048 --served-model-name demo.
    """
    from server.listen import bind
    from server.model import check_folder, read_config
    from server.settings import load_settings

    with _one_sentence():
        settings = load_settings(
            host=host,
            port=port,
            api_key=api_key,
            health_timeout_s=health_timeout_s,
            drain_timeout_s=drain_timeout_s,
            cpu_kv_cache_gib=cpu_kv_cache_gib,
            cpu_threads_bind=cpu_threads_bind,
        )
        config = read_config(model)
        listener = bind(settings.host, settings.port)
        if config is not None:
            check_folder(model, config)
        from server import engine

        status = engine.run(model, settings, context.args, listener)
    raise typer.Exit(status)


serve.context_settings = {"allow_extra_args": True, "ignore_unknown_options": True}  # type: ignore[attr-defined]


def bench(
    url: Annotated[str, typer.Option(help="Address of the server.")] = "http://127.0.0.1:8000",
    out: Annotated[Path, typer.Option(help="Folder for load.json, load.png and the raw results.")] = Path(
        "bench"
    ),
    concurrency: Annotated[
        str | None, typer.Option(help="Requests at once, one load each, such as 1,2,4.  [default: 1,2,4,8]")
    ] = None,
    request_rate: Annotated[
        str | None, typer.Option(help="Instead: requests arriving a second, such as 0.5,1,2,inf.")
    ] = None,
    requests: Annotated[
        int, typer.Option(min=1, help="Requests for each load (at least twice the concurrency).")
    ] = 16,
    input_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each random prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 64,
    model: Annotated[
        str | None, typer.Option(help="Name in requests.  [default: the first that is served]")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder of the tokenizer.  [default: the folder the server was started with]"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the prompts.")] = 0,
) -> None:
    """Load-test a running server: latency and throughput against load.

    The API key comes from PVQ_API_KEY or OPENAI_API_KEY. The exit status is 1 if every request failed.
    """
    import os

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from server.bench import client, results

    with _one_sentence():
        if concurrency and request_rate:
            raise ServerError("--concurrency and --request-rate exclude each other: give one of them")
        if request_rate:
            axis, loads = client.REQUEST_RATE, client.parse_loads(request_rate, "--request-rate")
        else:
            axis, loads = client.CONCURRENCY, client.parse_loads(concurrency or "1,2,4,8", "--concurrency")
        key = os.environ.get("PVQ_API_KEY") or os.environ.get("OPENAI_API_KEY")
        target = client.find_target(url, key, model, tokenizer)
        workload = client.Workload(axis, loads, requests, input_tokens, output_tokens, seed)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ServerError(f"--out {out} cannot be made ({error.strerror}): give another folder") from None
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("load test", total=len(loads))

            def show(index: int) -> None:
                now = (
                    f"{axis.replace('_', ' ')} {results.load_label(loads[index])}"
                    if index < len(loads)
                    else "done"
                )
                progress.update(task, completed=index, description=now)

            points = client.run(target, workload, out, show)
    facts = {"url": target.url, "model": target.model, "axis": axis, "input_tokens": input_tokens}
    report = results.report(points, **facts, output_tokens=output_tokens)
    Console().print(results.table(points, axis))
    from server.bench.picture import draw

    with _one_sentence():
        try:
            (out / "load.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            draw(
                points,
                axis,
                f"{target.model}: {input_tokens} tokens in, {output_tokens} out",
                out / "load.png",
            )
        except OSError as error:
            raise ServerError(
                f"--out {out} cannot be written ({error.strerror}): free some space or give another folder"
            ) from None
    print(f"{out / 'load.json'} and {out / 'load.png'} written")
    for reason, count in {
        reason: count for point in points for reason, count in point.errors.items()
    }.items():
        print(f"pvq: {count} failed: {reason}", file=sys.stderr)
    if report["completed"] == 0:
        print("pvq: every request failed", file=sys.stderr)
        raise typer.Exit(1)
