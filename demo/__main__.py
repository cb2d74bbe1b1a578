# SPDX-License-Identifier: Apache-2.0
"""Quantize SmolLM2-135M-Instruct to about 4 bits a weight, serve it with vLLM, ask it a question and put load
on it.

    python -m demo [--folder build/demo] [--bits 4] [--until quantize]

Steps and what they leave in the folder: ``base`` (bf16 model), ``pvq`` (checkpoint), ``eval.json``,
``load/``, ``serve.log`` and at the end ``report.json``. A step whose result is there and was made by the same
command and sources is not run again.
"""

import argparse
import contextlib
import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

QUESTION = "What is the capital of France?"
SERVED_NAME = "pvq-demo"
# Eager: the demo serves for a minute, and compiling would take longer than that.
SERVE_FLAGS = ("--served-model-name", SERVED_NAME, "--max-model-len", "2048", "--enforce-eager")
BENCH_FLAGS = ("--concurrency", "1,2,4", "--requests", "8", "--input-tokens", "64", "--output-tokens", "32")
QUANTIZER_SOURCES = ("csrc", "pvq_vllm/codec", "offline_quant")
SOURCE_SUFFIXES = (".py", ".cpp", ".h")
START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 60

console = Console()


class DemoError(RuntimeError):
    """A step failed; the message says which and where its output is."""


def run_step(title: str, command: Sequence[str]) -> None:
    """Run ``command`` with this Python and show its output."""
    console.rule(title)
    console.print(f"[dim]$ {' '.join(command)}[/dim]", soft_wrap=True)
    started = time.monotonic()
    module = ["-m", "pvq_vllm.cli", *command[1:]] if command[0] == "pvq" else list(command[1:])
    if subprocess.run([sys.executable, *module], check=False).returncode != 0:
        raise DemoError(f"the step '{title}' failed; its message is above")
    console.print(f"[dim]{time.monotonic() - started:.0f} s[/dim]")


def digest(folders: Sequence[str]) -> str:
    """Return one hash over the C++ and Python files of ``folders`` of this project."""
    root = Path(__file__).resolve().parent.parent
    files = sorted(
        path for folder in folders for path in (root / folder).rglob("*") if path.suffix in SOURCE_SUFFIXES
    )
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def run_once(
    title: str,
    command: Sequence[str],
    result: Path,
    made_from: Sequence[str] = (),
    newer_than: Path | None = None,
) -> None:
    """Run a step unless ``result`` is there, made by the same command and from the same sources.

    What was run is noted in ``NAME.step`` beside the result.

    Args:
        made_from: folders of this project whose sources determine the result.
        newer_than: a file that the result must not be older than.
    """
    note = result.with_name(result.name + ".step")
    text = f"{' '.join(command)}\n{digest(made_from)}\n"
    old = newer_than is not None and note.exists() and note.stat().st_mtime < newer_than.stat().st_mtime
    if result.exists() and note.exists() and note.read_text() == text and not old:
        console.print(f"[dim]{title}: {result} is there[/dim]")
        return
    run_step(title, command)
    note.write_text(text)


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def served(checkpoint: Path, log_path: Path, key: str) -> Iterator[str]:
    """Run ``pvq serve`` on ``checkpoint`` for the duration of the context; yield its URL once it is
    healthy.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    console.rule("serve")
    console.print(
        f"[dim]$ pvq serve {checkpoint} --port {port} {' '.join(SERVE_FLAGS)}[/dim]", soft_wrap=True
    )
    command = [
        sys.executable,
        "-m",
        "pvq_vllm.cli",
        "serve",
        str(checkpoint),
        "--port",
        str(port),
        *SERVE_FLAGS,
    ]
    with open(log_path, "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(os.environ, PVQ_API_KEY=key),
        )
    try:
        with console.status("vLLM is starting"):
            wait_until_healthy(process, url, log_path)
        yield url
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_healthy(process: subprocess.Popen, url: str, log_path: Path) -> None:
    """Return when /ready says 200; DemoError if the server ends or takes too long."""
    started = time.monotonic()
    while time.monotonic() - started < START_TIMEOUT_S:
        if process.poll() is not None:
            last = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise DemoError(
                f"the server ended with status {process.returncode}: {' '.join(last)} (all in {log_path})"
            )
        with contextlib.suppress(urllib.error.URLError, OSError):
            if urllib.request.urlopen(f"{url}/ready", timeout=15).status == 200:
                console.print(f"[dim]ready at {url} after {time.monotonic() - started:.0f} s[/dim]")
                return
        time.sleep(0.5)
    raise DemoError(f"the server was not ready within {START_TIMEOUT_S} s, see {log_path}")


def ask(url: str, key: str) -> str:
    """Return the answer of the served model to QUESTION, through the official client."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key=key)
    reply = client.chat.completions.create(
        model=SERVED_NAME, messages=[{"role": "user", "content": QUESTION}], max_tokens=64, temperature=0
    )
    return (reply.choices[0].message.content or "").strip()


def summary(report: dict[str, Any]) -> Table:
    """Return the one table of the demo."""
    table = Table(title="PVQ demo: SmolLM2-135M-Instruct")
    table.add_column("")
    for column in ("bf16", "PVQ"):
        table.add_column(column, justify="right")
    table.add_row("bits a weight (quantized layers)", "16", f"{report['bits_per_weight']:.3f}")
    table.add_row(
        "size, MB", f"{report['size_bytes_base'] / 1e6:.1f}", f"{report['size_bytes_quantized'] / 1e6:.1f}"
    )
    table.add_row("perplexity", f"{report['perplexity_base']:.3f}", f"{report['perplexity_quantized']:.3f}")
    table.add_row("KL divergence to bf16, nats", "0", f"{report['kl_divergence']:.4f}")
    for point in report["load"]["points"]:
        ttft = point["ttft_ms"]["p50"]
        table.add_row(
            f"{point['load']:g} at once: tokens/s | TTFT p50, ms",
            "",
            f"{point['output_tokens_per_s']:.1f} | {'-' if ttft is None else format(ttft, '.0f')}",
        )
    return table


def make_checkpoint(folder: Path, bits: int) -> tuple[Path, Path]:
    """Run the first two steps in ``folder``; return the folders of the bf16 model and of the checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    base, checkpoint = folder / "base", folder / "pvq"
    run_once("base model", ["python", "-m", "offline_quant.demo_model", str(base)], base)
    os.environ["HF_HUB_OFFLINE"] = "1"  # from here on everything is local
    # --overwrite: an older checkpoint, or an interrupted run, was made from other sources.
    quantize = [
        "pvq",
        "quantize",
        str(base),
        str(checkpoint),
        "--bits",
        str(bits),
        "--calibration",
        "builtin",
        "--no-evaluate",  # a step of its own
        "--overwrite",
    ]
    run_once("quantize", quantize, checkpoint, made_from=QUANTIZER_SOURCES)
    return base, checkpoint


def demo(folder: Path, bits: int) -> dict[str, Any]:
    """Run all steps in ``folder`` and return the report that is also written to ``folder /
    "report.json"``.
    """
    base, checkpoint = make_checkpoint(folder, bits)
    evaluation, load = folder / "eval.json", folder / "load"
    measure = [
        "pvq",
        "eval",
        str(checkpoint),
        "--reference",
        str(base),
        "--json",
        str(evaluation),
        "--update-card",
    ]
    run_once("evaluate", measure, evaluation, newer_than=checkpoint / "config.json")
    key = secrets.token_hex(16)
    with served(checkpoint, folder / "serve.log", key) as url:
        answer = ask(url, key)
        console.print(f"Q: {QUESTION}\nA: [bold]{answer}[/bold]", highlight=False)
        os.environ["PVQ_API_KEY"] = key
        run_step("load test", ["pvq", "bench", "--url", url, "--out", str(load), *BENCH_FLAGS])
    made = json.loads((checkpoint / "report.json").read_text())
    measured = json.loads(evaluation.read_text())
    report = {
        "bits_per_weight": made["bits_per_weight"],
        "size_bytes_base": made["size_bytes_base"],
        "size_bytes_quantized": made["size_bytes_quantized"],
        "perplexity_base": measured["perplexity_reference"],
        "perplexity_quantized": measured["perplexity"],
        "kl_divergence": measured["kl_divergence"],
        "top1_agreement": measured["top1_agreement"],
        "question": QUESTION,
        "answer": answer,
        "load": json.loads((load / "load.json").read_text()),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def main() -> int:
    """Run the demo; status 1 if a step or a request failed."""
    parser = argparse.ArgumentParser(
        prog="python -m demo", description="Quantize, evaluate, serve and load-test a real model."
    )
    parser.add_argument("--folder", type=Path, default=Path("build/demo"), help="where everything is written")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), default=4, help="bits a weight")
    parser.add_argument("--until", choices=("quantize",), help="end with this step, the checkpoint made")
    arguments = parser.parse_args()
    started = time.monotonic()
    try:
        if arguments.until:
            make_checkpoint(arguments.folder, arguments.bits)
            return 0
        report = demo(arguments.folder, arguments.bits)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    console.rule("result")
    console.print(summary(report))
    console.print(f"Q: {report['question']}\nA: [bold]{report['answer']}[/bold]", highlight=False)
    console.print(
        f"{report['load']['completed']} requests completed, {report['load']['failed']} failed; "
        f"{arguments.folder / 'report.json'} and {arguments.folder / 'load' / 'report.html'} written after "
        f"{time.monotonic() - started:.0f} s"
    )
    return 1 if report["load"]["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
