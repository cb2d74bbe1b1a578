# SPDX-License-Identifier: Apache-2.0
"""One model of bench_vllm_cuda.py, measured in a process of its own: python benchmarks/vllm_worker.py REQUEST

REQUEST is a JSON file that bench_vllm_cuda.measure writes; the results go to the file that it names. torch and vLLM are imported
after the plugin is registered and the distribution's name is patched, hence inside functions.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path

from vllm_models import VOCABULARY

PROMPT_TOKENS = 16  # of the decode cases
PROFILED_STEPS = 32


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

    def save() -> None:  # whole or not at all: the process may be ended for its time
        part = Path(request["result"] + ".part")
        part.write_text(json.dumps(result))
        part.replace(request["result"])

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


if __name__ == "__main__":
    work(sys.argv[1])
