# SPDX-License-Identifier: Apache-2.0
"""benchmarks/bench_vllm_cuda.py without a GPU: its models, its report, and a run with another worker."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.vllm_models import BLOCKS, HIDDEN, INTERMEDIATE, is_known, quantization_config
from pvq_vllm.codec.format import CheckpointConfig
from pvq_vllm.codec.rotation import rotation_layout

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"
SUFFIXES = {"": None, "-residual": None}
SUFFIXES |= {f"-{kind}{block}": block for kind in ("block", "residual") for block in BLOCKS}

# Stands for vllm_worker.py: fp16 works, int4 fails after the first case, fp8 before it.
WORKER = """
import json, sys
from pathlib import Path
request = json.loads(Path(sys.argv[1]).read_text())
name = request["name"]
print("engine arguments", sorted(request["engine"]))
if name == "fp8":
    sys.exit("no kernel")
decode = {"1": {"tokens_per_s": 200.0, "ms_per_step": 5.0}}
result = {"vllm": "0", "torch": "0", "complete": name == "fp16", "start_s": 12.0, "decode": decode, "profile": {}}
if name == "fp16":
    result["prefill"] = {"tokens_per_s": 30000.0, "ms": 500.0}
Path(request["result"]).write_text(json.dumps(result))
sys.exit(0 if name == "fp16" else "out of memory")
"""


@pytest.fixture
def vllm_report(monkeypatch):
    """As the script imports it."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("vllm_report")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("head", ["none", "int8"])
def test_models_are_rotated_as_the_quantizer_would(suffix, head):
    config = CheckpointConfig.from_dict(quantization_config(f"pvq3{suffix}", 2, "a8", head))
    assert config.codebook.name == "pvq3"
    assert len(config.modules) == 2 * 7 + (head != "none")
    for name, module in config.modules.items():
        inner = name.endswith("down_proj")
        width = INTERMEDIATE if inner else HIDDEN
        if suffix.startswith("-residual") and not inner:
            assert module.rotation_blocks == 0
        else:
            blocks, factors = rotation_layout(width, 1, SUFFIXES[suffix])
            assert module.rotation_blocks == blocks
            assert config.rotation_factors[width // blocks] == factors


@pytest.mark.parametrize(
    "name", ["", "pvq", "pvq5", "pvq4-", "pvq4-block", "pvq4-block32", "pvq4-residual100", "fp16-residual"]
)
def test_other_models_are_unknown(name):
    assert not is_known(name)


def test_a_line_tells_what_was_measured(vllm_report):
    result = {
        "complete": True,
        "start_s": 43.4,
        "decode": {"1": {"tokens_per_s": 210.4}, "16": {"tokens_per_s": 2510.0}},
        "prefill": {"tokens_per_s": 30111.0},
    }
    line = vllm_report.summary("pvq4-block128", result, 95.0)
    assert line == (
        "pvq4-block128: decode 1: 210, decode 16: 2510, prefill: 30111 tokens/s; start 43 s, 95 s in all"
    )
    assert vllm_report.summary("pvq4", None, 7) == "pvq4: no rates; 7 s in all, INCOMPLETE"


def test_report_compares_with_fp16_and_lists_the_kernels_of_a_profile(vllm_report):
    def result(milliseconds: float) -> dict:
        decode = {"1": {"tokens_per_s": 1e3 / milliseconds, "ms_per_step": milliseconds}}
        return {"decode": decode, "profile": {"1": {f"void kernel_{i}<a|b>": 9.0 for i in range(20)}}}

    text = vllm_report.report({"fp16": result(4.0), "pvq4-residual128": result(2.0)})
    row = next(line for line in text.splitlines() if "pvq4-residual128" in line)
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["pvq4-residual128", "500", "2.000", "", "2.00"]
    assert " kernel_0<a/b> |" in text and " 5 others |" in text


def test_help_needs_neither_torch_nor_vllm():
    blocked = (
        "import sys; sys.modules.update(torch=None, vllm=None, pvq_vllm=None); sys.argv = ['x', '--help']\n"
    )
    code = f"{blocked}sys.path.insert(0, {str(BENCHMARKS)!r})\nimport bench_vllm_cuda\nbench_vllm_cuda.main()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pvq4-residual128" in run.stdout


def test_every_model_is_printed_when_it_is_done(monkeypatch, tmp_path, capfd):
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench = importlib.import_module("bench_vllm_cuda")
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(bench, "WORKER", worker)
    outputs = [
        "--json",
        f"{tmp_path}/all.json",
        "--markdown",
        f"{tmp_path}/all.md",
        "--logs",
        f"{tmp_path}/logs",
    ]
    monkeypatch.setattr(sys, "argv", ["bench", "--models", "fp16,int4,fp8", "--layers", "2", *outputs])
    with pytest.raises(SystemExit, match="not everything could be measured"):
        bench.main()
    out, err = capfd.readouterr()
    assert [line.partition(" s in all")[0].rpartition(" ")[0] for line in out.splitlines()[:3]] == [
        "fp16: decode 1: 200, prefill: 30000 tokens/s; start 12 s,",
        "int4: decode 1: 200 tokens/s; start 12 s,",
        "fp8: no rates;",
    ]
    assert "int4 failed" in err and "out of memory" in err and "no kernel" in err
    assert list(json.loads((tmp_path / "all.json").read_text())) == ["fp16", "int4"]
    assert "| decode, batch 1 | int4" in (tmp_path / "all.md").read_text()
    config = json.loads((tmp_path / "logs" / "int4" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
