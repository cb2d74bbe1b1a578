# SPDX-License-Identifier: Apache-2.0
"""Quantizers side by side on one model, one calibration text and one evaluation text.

    python -m benchmarks.quality.rebase MODEL build/quality/base         # see docs/quality.md for why
    python -m benchmarks.quality.peers.environments build/quality/peers  # the other quantizers, optional
    python -m benchmarks.quality --model build/quality/base [--only 'pvq-*,gptq-*'] [--redo] [--docs]

One row for each method, each kept as a JSON file, so that an interrupted run goes on where it was. A row whose
environment is missing, or that fails, is reported and left out. The table and the picture are written from all
rows that exist; those of docs/ from docs/measurements/quality.json, into which --docs puts the rows of this machine.
"""

import argparse
import fnmatch
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path

import torch

from offline_quant.calibration import forward_dtype
from offline_quant.calibration_data import calibration_text
from offline_quant.device import choose_device
from offline_quant.evaluate import evaluation_text
from offline_quant.whole_files import write_file
from pvq_vllm.codec.errors import PVQError

from .peers.environments import MissingEnvironment
from .project import ROOT, commit
from .protocol import Protocol
from .report import KeptRows, write_report
from .rows import ROWS, Row

DOCS = ROOT / "docs"
KEPT = DOCS / "measurements" / "quality.json"


def run_row(row: Row, protocol: Protocol, peers: Path, keep: bool) -> dict:
    """Make and evaluate one row; return its record."""
    work = protocol.folder / "work" / row.key
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    begin = time.monotonic()
    version = commit()
    made = row.make(protocol, peers, work)
    seconds = time.monotonic() - begin
    evaluation = protocol.evaluate(made.folder)
    if not keep:
        shutil.rmtree(work)
    return {
        "key": row.key,
        "family": row.family,
        "label": row.label,
        "bits_per_weight": made.bits_per_weight,
        **evaluation,
        "details": made.details,
        "seconds": round(seconds, 1),
        "commit": version,
        "threads": torch.get_num_threads(),
        "device": protocol.device,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "build/quality/base")
    parser.add_argument("--calibration", type=Path, default=calibration_text(), help="a UTF-8 text")
    parser.add_argument("--evaluation", type=Path, default=evaluation_text(), help="a UTF-8 text")
    parser.add_argument("--calibration-sequences", type=int, default=24)
    parser.add_argument("--evaluation-sequences", type=int, default=10)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=ROOT / "build/quality")
    parser.add_argument("--peers", type=Path, default=ROOT / "build/quality/peers")
    parser.add_argument("--only", default="*", help="rows to run, patterns with commas between; '' for none")
    parser.add_argument("--redo", action="store_true", help="run rows again that are there")
    parser.add_argument("--keep", action="store_true", help="keep the quantized models")
    parser.add_argument(
        "--docs",
        action="store_true",
        help="put the rows into docs/: table, picture, measurements/quality.json",
    )
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every program that is run"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the evaluation's forward pass")
    parser.add_argument("--list", action="store_true", help="list the rows and stop")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{row.key:24} {row.label}" for row in ROWS.values()))
        return 0
    torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else forward_dtype(device)
    protocol = Protocol(
        arguments.model, arguments.calibration, arguments.evaluation, arguments.out,
        arguments.calibration_sequences, arguments.evaluation_sequences, arguments.length, device, dtype,
    )  # fmt: skip
    patterns = [pattern for pattern in arguments.only.split(",") if pattern]
    unknown = [pattern for pattern in patterns if not fnmatch.filter(ROWS, pattern)]
    if unknown:
        parser.error(f"--only {unknown[0]} matches no row: --list shows them")
    try:
        kept = KeptRows(KEPT, protocol.setting) if arguments.docs else None
    except PVQError as error:
        parser.error(str(error))
    folder = protocol.folder / "rows"
    folder.mkdir(exist_ok=True)
    failed, new = 0, []
    for key in [key for key in ROWS if any(fnmatch.fnmatch(key, pattern) for pattern in patterns)]:
        path = folder / f"{key}.json"
        if path.exists() and not arguments.redo:
            continue
        try:
            record = run_row(ROWS[key], protocol, arguments.peers, arguments.keep)
        except (MissingEnvironment, PVQError, RuntimeError, ValueError) as error:
            failed += 1
            print(f"{key}: {error}", file=sys.stderr)
            if not isinstance(error, MissingEnvironment | PVQError):
                traceback.print_exc()
            continue
        new.append(record)
        write_file(path, f"{json.dumps(record, indent=2)}\n".encode())
        print(
            f"{key:24} {record['bits_per_weight']:6.3f} bits  KL {record['kl_divergence']:.4f}  "
            f"perplexity {record['perplexity']:.3f}  {record['seconds']:.0f} s",
            flush=True,
        )
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if kept is not None:
        kept.add(new, records)
        records = kept.rows()
    if records:
        write_report(records, DOCS if arguments.docs else protocol.folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
