# SPDX-License-Identifier: Apache-2.0
"""Tokens per second inside vLLM on a GPU, dummy weights in the shape of an 8B Llama: fp16, int4, fp8 and PVQ in one run.

    python benchmarks/bench_vllm_cuda.py [--models fp16,int4,fp8,pvq4,pvq3] [--profile] [--json FILE] [--markdown FILE]

Each model runs in a process of its own, with torch.compile and CUDA graphs. int4 is compressed-tensors W4A16 in groups of 128
(Machete on Hopper), fp8 is compressed-tensors W8A8 with per-token activations; both get random weights, because vLLM's dummy
loader leaves them as zeros or whatever was in memory. lm_head and embedding are fp16 in all models (--pvq-head int8 for ours).
Decode: greedy tokens per second of all sequences together, the prefill subtracted. Prefill: prompt tokens per second of
--prefill COUNTxLENGTH prompts with one token out. The best of --rounds counts. --profile adds what the time per step consists of.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("fp16", "int4", "fp8", "pvq4", "pvq3")
RESIDUAL = "-residual"  # pvq models with the rotation of the residual stream folded into the weights
KNOWN_MODELS = (*MODELS, "pvq2", *(name + RESIDUAL for name in ("pvq4", "pvq3", "pvq2")))
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 4096, 14336, 32, 8, 32000
PROMPT_TOKENS = 16  # of the decode cases
PROFILED_STEPS = 32
TOP_KERNELS = 15

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, in which the worker registers "pvq"
    "TOKENIZERS_PARALLELISM": "false",
}


# ---- the models -----------------------------------------------------------------------------------------------------------


def quantization_config(model: str, layers: int, activation: str, head: str) -> dict | None:
    """`quantization_config` of config.json; None for fp16."""
    if model == "fp16":
        return None
    if model.startswith("pvq"):
        linear = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
        linear += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        names = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in linear]
        folded = int(model.endswith(RESIDUAL))  # only down_proj's input is rotated at run time
        modules: dict[str, dict] = {
            name: {"rotation_blocks": 1 - folded * (not name.endswith("down_proj"))} for name in names
        }
        if head != "none":
            modules["lm_head"] = {"rotation_blocks": 1 - folded, "codebook": {"name": head}}
        return {
            "quant_method": "pvq",
            "format_version": 1,
            "activation": activation,
            "codebook": {"name": model.removesuffix(RESIDUAL)},
            "rotation": {
                "seed": 0,
                "factors": {str(HIDDEN): [HIDDEN], str(INTERMEDIATE): [28, INTERMEDIATE // 28]},
            },
            "modules": modules,
        }
    weights = {"symmetric": True, "dynamic": False, "observer": "minmax"}
    if model == "int4":
        weights |= {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
        inputs = None
    else:
        weights |= {"num_bits": 8, "type": "float", "strategy": "channel"}
        inputs = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if model == "int4" else "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"output_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def write_config(folder: Path, model: str, options: argparse.Namespace) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": options.layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": options.dtype,
    }
    if quantization := quantization_config(model, options.layers, options.activation, options.pvq_head):
        config["quantization_config"] = quantization
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def engine_arguments(folder: Path, options: argparse.Namespace) -> dict:
    """Arguments of LLM, the same for all models; --llm has the last word."""
    largest = max([1, *options.batches])
    sizes = sorted({size for size in (1, 2, 4, 8, 16, 32, 64, *options.batches) if size <= largest})
    arguments = {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": options.dtype,
        "gpu_memory_utilization": 0.6,
        "max_model_len": 4096,
        "max_num_seqs": max(64, largest),
        "max_num_batched_tokens": 8192,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "enforce_eager": options.eager,
        "seed": 0,
    }
    if not options.eager:
        arguments["compilation_config"] = {"cudagraph_capture_sizes": sizes}
    return arguments | json.loads(options.llm)


# ---- the worker: one model in a process of its own ------------------------------------------------------------------------


def describe_layers(model) -> dict[str, int]:
    """How often each quantization method, with its scheme and kernel, occurs among the linear layers."""
    from vllm.model_executor.layers.linear import LinearBase

    found: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, LinearBase):
            scheme = getattr(module, "scheme", None)
            kernel = getattr(scheme, "kernel", None) or getattr(scheme, "fp8_linear", None)
            parts = [part for part in (module.quant_method, scheme, kernel) if part is not None]
            found["/".join(type(part).__name__ for part in parts)] += 1
    return dict(found)


def fill_weights(model) -> int:
    """Put random weights where vLLM's dummy loader put none, in place; returns the bytes of all parameters.

    Equal bits cost less power than random ones, and a GPU at its power limit is then faster.
    """
    import torch

    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        if parameter.numel() < 1 << 16 or parameter.dtype not in (torch.int32, torch.float8_e4m3fn):
            continue
        flat = torch.empty(0, dtype=torch.uint8, device=parameter.device).set_(
            parameter.data.untyped_storage()
        )
        for part in flat.split(1 << 26):
            if parameter.dtype == torch.int32:
                part.random_(0, 256)
            else:
                gaussian = torch.randn(part.shape, dtype=torch.float16, device=part.device) * 100
                part.copy_(gaussian.clamp_(-448, 448).to(parameter.dtype).view(torch.uint8))
    return total


def kernel_times(run) -> Counter[str]:
    """Microseconds of GPU time by kernel name while `run` runs."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            times[event.name] += event.time_range.elapsed_us()
    return times


def work(request_file: str) -> None:
    """Measure one model; every result is written as soon as it is known."""
    request = json.loads(Path(request_file).read_text())
    from pvq_vllm.vllm_compat import patch_distribution_version

    patch_distribution_version()
    if request["name"].startswith("pvq"):
        import pvq_vllm

        pvq_vllm.register()
    import torch
    import vllm

    result: dict = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "complete": False,
        "decode": {},
        "profile": {},
    }
    if torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()

    def save() -> None:
        Path(request["result"]).write_text(json.dumps(result))

    begin = time.perf_counter()
    llm = vllm.LLM(**request["engine"])
    result["start_s"] = time.perf_counter() - begin
    result["layers"] = llm.apply_model(describe_layers)[0]
    if request["name"] != "fp16" and any("Unquantized" in method for method in result["layers"]):
        raise SystemExit(f"{request['name']} is not quantized: {result['layers']}")
    result["parameter_bytes"] = llm.apply_model(fill_weights)[0]
    save()

    def run(count: int, length: int, new_tokens: int, salt: int) -> float:
        token = lambda i, j: (salt + 7919 * i + 104729 * j) % (VOCABULARY - 10) + 5  # noqa: E731
        prompts = [{"prompt_token_ids": [token(i, j) for j in range(length)]} for i in range(count)]
        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        if any(len(output.outputs[0].token_ids) != new_tokens for output in outputs):
            raise SystemExit("a sequence ended early")
        return seconds

    salts = range(2, 2 + request["rounds"])
    new_tokens = request["new_tokens"]
    for batch in request["batches"]:
        run(batch, PROMPT_TOKENS, 16, 1)
        short = min(run(batch, PROMPT_TOKENS, 1, salt) for salt in salts)
        longer = min(run(batch, PROMPT_TOKENS, new_tokens, salt) for salt in salts)
        step = (longer - short) / (new_tokens - 1)
        result["decode"][batch] = {"tokens_per_s": batch / step, "ms_per_step": 1e3 * step}
        save()
    if request["prefill"]:
        count, length = request["prefill"]
        run(count, length, 1, 1)
        seconds = min(run(count, length, 1, salt) for salt in salts)
        result["prefill"] = {"tokens_per_s": count * length / seconds, "ms": 1e3 * seconds}
        save()
    for batch in request["profile"]:
        run(batch, PROMPT_TOKENS, 4, 1)
        times = kernel_times(lambda b=batch: run(b, PROMPT_TOKENS, 1 + PROFILED_STEPS, 2))
        times.subtract(kernel_times(lambda b=batch: run(b, PROMPT_TOKENS, 1, 2)))
        steps = {name: us / PROFILED_STEPS for name, us in times.most_common() if us > 0}
        result["profile"][batch] = steps  # microseconds a step
        save()
    result["complete"] = True
    save()


# ---- the report -----------------------------------------------------------------------------------------------------------


def markdown_table(headers: list[str], rows: list[list[str]]) -> str:
    """A table that reads well in a terminal, too; the first two columns are text."""
    widths = [max(3, *(len(row[i]) for row in [headers, *rows])) for i in range(len(headers))]
    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in [headers, rule, *rows]
    )


def report(results: dict[str, dict]) -> str:
    cases: dict[str, dict[str, dict]] = {}
    for model, result in results.items():
        for batch, values in result["decode"].items():
            cases.setdefault(f"decode, batch {batch}", {})[model] = values
        if "prefill" in result:
            cases.setdefault("prefill", {})[model] = result["prefill"]
    rows = []
    for case, by_model in cases.items():
        for model, values in by_model.items():
            rate, base = values["tokens_per_s"], [by_model.get(name) for name in ("int4", "fp16")]
            compared = [f"{rate / other['tokens_per_s']:.2f}" if other else "" for other in base]
            milliseconds = values.get("ms_per_step", values.get("ms"))
            rows.append([case, model, f"{rate:.0f}", f"{milliseconds:.3f}", *compared])
    headers = ["case", "model", "tokens/s", "ms per step (prefill: in all)", "/ int4", "/ fp16"]
    parts = [markdown_table(headers, rows), ""]
    rows = [
        [
            model,
            ", ".join(f"{count} {method}" for method, count in result.get("layers", {}).items()),
            f"{result.get('parameter_bytes', 0) / 1e9:.2f}",
            f"{result.get('start_s', 0):.0f}",
        ]
        for model, result in results.items()
    ]
    parts += [markdown_table(["model", "linear layers", "GB of parameters", "start, s"], rows), ""]
    for model, result in results.items():
        for batch, times in result["profile"].items():
            step, busy = 1e3 * result["decode"][batch]["ms_per_step"], sum(times.values())
            parts += [
                f"{model}, batch {batch}: {step:.0f} us a step without the profiler; kernels {busy:.0f} us "
                "(kernels that overlap count twice):",
                "",
            ]
            top = list(times.items())[:TOP_KERNELS]
            rest = busy - sum(us for _, us in top)
            rows = [[f"{us:.1f}", f"{100 * us / busy:.0f}%", _shorten(name)] for name, us in top]
            rows.append(
                [f"{rest:.1f}", f"{100 * rest / busy:.0f}%", f"{max(0, len(times) - len(top))} others"]
            )
            parts += [markdown_table(["us", "share", "kernel"], rows), ""]
    return "\n".join(parts)


def _shorten(name: str) -> str:
    name = name.replace("|", "/").removeprefix("void ")
    return name if len(name) <= 90 else f"{name[:60]}...{name[-27:]}"


# ---- the run --------------------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", default=",".join(MODELS), help="default: %(default)s; also pvq2, pvq4-residual, ..."
    )
    parser.add_argument("--batches", default="1,16,64", help="of the decode cases; may be empty")
    parser.add_argument(
        "--prefill", default="8x2048", help="prompts x tokens, or empty (default: %(default)s)"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=128, help="of the decode cases (default: %(default)s)"
    )
    parser.add_argument("--layers", type=int, default=32, help="fewer for a quick run")
    parser.add_argument("--activation", default="a8", choices=("a8", "a16"), help="of the PVQ models")
    parser.add_argument(
        "--pvq-head", default="none", choices=("none", "int8", "pvq4"), help="codebook of lm_head"
    )
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument(
        "--profile",
        nargs="?",
        const="1",
        default="",
        metavar="BATCHES",
        help="GPU time by kernel of a decode step at these batch sizes, of --batches (without a value: 1)",
    )
    parser.add_argument(
        "--llm", default="{}", metavar="JSON", help="further arguments of vllm.LLM, for all models"
    )
    parser.add_argument(
        "--timeout", type=float, default=200, help="seconds for a model (default: %(default)s)"
    )
    parser.add_argument("--logs", help="folder for the engines' logs (default: a temporary one)")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--markdown", help="write the tables to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        options.batches = [int(n) for n in options.batches.split(",") if n]
        options.profile = [int(n) for n in options.profile.split(",") if n]
        options.prefill = [int(n) for n in options.prefill.split("x") if n]
        json.loads(options.llm)
    except ValueError as error:
        parser.error(f"--batches, --prefill, --profile or --llm: {error}")
    if len(options.prefill) not in (0, 2):
        parser.error("--prefill is prompts x tokens, such as 8x2048")
    if not set(options.profile) <= set(options.batches):
        parser.error("--profile takes batch sizes that are in --batches")
    options.models = options.models.split(",")
    if unknown := set(options.models) - set(KNOWN_MODELS):
        parser.error(f"--models: unknown {', '.join(sorted(unknown))}; known are {', '.join(KNOWN_MODELS)}")
    return options


def measure(model: str, options: argparse.Namespace, folder: Path) -> dict | None:
    """Run one model in a fresh process. What it measured before it failed counts, too; None if nothing."""
    write_config(folder / model, model, options)
    request_file, result_file, log_file = (folder / f"{model}.{end}" for end in ("request", "result", "log"))
    result_file.unlink(missing_ok=True)
    request = {
        "name": model,
        "engine": engine_arguments(folder / model, options),
        "result": str(result_file),
        **{key: getattr(options, key) for key in ("batches", "prefill", "new_tokens", "rounds", "profile")},
    }
    request_file.write_text(json.dumps(request))
    environment = ENVIRONMENT | os.environ
    if list((ROOT / "pvq_vllm").glob("_C*.so")):  # built in the checkout, perhaps not installed
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(request_file)]
    begin = time.perf_counter()
    with log_file.open("w") as log:
        try:
            status = subprocess.run(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=options.timeout
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"none after {options.timeout:.0f} s"
    result = json.loads(result_file.read_text()) if result_file.exists() else None
    if not (result and result["complete"]):  # an engine that fails while it shuts down has done its work
        lines = log_file.read_text(errors="replace").splitlines()
        print(f"{model} failed (exit status {status}); the last lines of its log:", file=sys.stderr)
        print("\n".join(f"  {line[:400]}" for line in lines[-40:]), file=sys.stderr, flush=True)
    for line in log_file.read_text(errors="replace").splitlines():
        if "Kernel for" in line or "attention backend" in line.lower():
            print(f"{model}: {line.strip()[-150:]}", file=sys.stderr)
    if result:
        rates = [
            f"decode {batch}: {values['tokens_per_s']:.0f}" for batch, values in result["decode"].items()
        ]
        if "prefill" in result:
            rates.append(f"prefill: {result['prefill']['tokens_per_s']:.0f}")
        print(
            f"{model}: {', '.join(rates)}; {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True
        )
    return result


def title(results: dict[str, dict], options: argparse.Namespace) -> str:
    first = next(iter(results.values()))
    prefill = "x".join(str(n) for n in options.prefill)
    return (
        f"{first.get('gpu', 'CPU')}, torch {first['torch']}, vLLM {first['vllm']}; {options.layers} layers, {options.dtype}, "
        f"{'eager' if options.eager else 'torch.compile and CUDA graphs'}; PVQ: {options.activation}, lm_head "
        f"{'fp16' if options.pvq_head == 'none' else options.pvq_head}; prefill {prefill or 'not measured'} tokens; best of "
        f"{options.rounds}"
    )


def main() -> None:
    options = parse()
    if options.worker:
        work(options.worker)
        return
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.logs or temporary).resolve()
        for model in options.models:
            if result := measure(model, options, folder):
                results[model] = result
    if not results:
        sys.exit("no model could be measured")
    text = f"{title(results, options)}\n\n{report(results)}"
    print(text)
    if options.markdown:
        Path(options.markdown).write_text(text)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))
    if len(results) < len(options.models) or not all(result["complete"] for result in results.values()):
        sys.exit("not everything could be measured, see above")


if __name__ == "__main__":
    main()
