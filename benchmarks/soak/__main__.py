# SPDX-License-Identifier: Apache-2.0
"""Does the server stand what it should? Run it against a server, or let it start one:

    python benchmarks/soak all --model build/demo/pvq --minutes 30
    python benchmarks/soak malformed --url http://127.0.0.1:8000 --requests 1000
    python benchmarks/soak disconnect --url ... --clients 200
    python benchmarks/soak overload --url ... --seconds 30
    python benchmarks/soak mixed --url ... --minutes 30 --rate 4 --pid PID

The key comes from PVQ_API_KEY. The exit status is 1 if a check fails.
"""

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checks
from target import Target

START_TIMEOUT_S = 600


@contextlib.contextmanager
def served(model: str, flags: list[str], log: Path) -> Iterator[tuple[str, int]]:
    """Serve ``model`` for the duration of the context; yield URL and process id once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "pvq_vllm.cli", "serve", model, "--port", str(port), *flags]
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(urllib.error.URLError, OSError):
                if urllib.request.urlopen(f"{url}/ready", timeout=15).status == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the server did not start, see {log}")
            time.sleep(0.5)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(120)


async def run(options: argparse.Namespace, url: str, pid: int | None, which: list[str]) -> dict[str, Any]:
    """Run the checks ``which`` in turn and return their results by name."""
    results = {}
    async with Target(url, os.environ.get("PVQ_API_KEY"), pid) as target:
        for name in which:
            check = {
                "malformed": lambda: checks.check_malformed(target, options.requests, options.seed),
                "disconnect": lambda: checks.check_disconnect(target, options.clients),
                "overload": lambda: checks.check_overload(target, options.seconds),
                "mixed": lambda: checks.check_mixed(target, options.minutes * 60, options.rate, options.seed),
            }[name]
            results[name] = await check()
            print(f"{'ok  ' if results[name]['ok'] else 'FAIL'} {results[name]['text']}", flush=True)
    return results


def main() -> int:
    """Run what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("check", choices=["malformed", "disconnect", "overload", "mixed", "all"])
    parser.add_argument("--url", help="a running server")
    parser.add_argument("--pid", type=int, help="its process, to watch its memory")
    parser.add_argument("--model", help="or a model to serve")
    parser.add_argument("--requests", type=int, default=1000, help="malformed requests")
    parser.add_argument("--clients", type=int, default=200, help="clients that leave")
    parser.add_argument("--seconds", type=float, default=30, help="of each half of the overload")
    parser.add_argument("--minutes", type=float, default=30, help="of mixed load")
    parser.add_argument("--rate", type=float, default=4, help="requests a second of mixed load")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="serve --model without torch.compile")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    if bool(options.url) == bool(options.model):
        parser.error("give --url or --model, one of them")
    if options.url:
        which = (
            ["malformed", "disconnect", "overload", "mixed"] if options.check == "all" else [options.check]
        )
        results = asyncio.run(run(options, options.url, options.pid, which))
    else:
        os.environ.setdefault("PVQ_API_KEY", secrets.token_hex(16))
        results = {}
        # Overload needs few slots, so that ten times what they carry is a load that one client can make.
        many = [name for name in ("malformed", "disconnect", "mixed") if options.check in (name, "all")]
        few = [name for name in ("overload",) if options.check in (name, "all")]
        with tempfile.TemporaryDirectory() as folder:
            for names, slots in ((few, 8), (many, 256)):
                if names:
                    flags = ["--max-num-seqs", str(slots), "--max-model-len", "512", "--no-access-log"]
                    flags += ["--enforce-eager"] if options.eager else []
                    with served(options.model, flags, Path(folder) / "serve.log") as (url, pid):
                        results |= asyncio.run(run(options, url, pid, names))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(result["ok"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
