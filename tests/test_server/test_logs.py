# SPDX-License-Identifier: Apache-2.0
"""The log lines of vLLM's processes, which read logs_vllm.json as vLLM does; a real one is in test_serve.py."""

import json
import subprocess
import sys
from pathlib import Path

import server

CONFIG = Path(server.__file__).parent / "logs_vllm.json"
AS_VLLM = f"""
import json, logging.config, pathlib, warnings
logging.config.dictConfig(json.loads(pathlib.Path({str(CONFIG)!r}).read_text()))
"""


def lines_of(code: str) -> list[dict]:
    """Return the lines that a process with vLLM's configuration writes when it runs ``code``."""
    command = [sys.executable, "-c", AS_VLLM + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == ""
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_a_warning_of_several_lines_is_one_object():
    (line,) = lines_of("warnings.warn('first\\nsecond', FutureWarning)")
    assert (line["logger"], line["level"]) == ("py.warnings", "warning")
    assert "FutureWarning: first\nsecond" in line["message"]


def test_lines_of_vllm_and_of_other_libraries_are_objects():
    lines = lines_of("for name in ('vllm.v1', 'asyncio'): logging.getLogger(name).error('x')")
    assert [(line["logger"], line["message"]) for line in lines] == [("vllm.v1", "x"), ("asyncio", "x")]
