# SPDX-License-Identifier: Apache-2.0
"""The tables of bench_vllm_cuda.py, and the line it prints when a model is done."""

from __future__ import annotations

from linear_report import markdown_table

TEXT_COLUMNS = 2  # of every table
TOP_KERNELS = 15  # of a profile; the others are one line


def summary(model: str, result: dict | None, seconds: float) -> str:
    """One line of what was measured; `start` is until the engine was ready, `seconds` all of the process."""
    result = result or {"complete": False, "decode": {}}
    rates = [f"decode {batch}: {values['tokens_per_s']:.0f}" for batch, values in result["decode"].items()]
    if "prefill" in result:
        rates.append(f"prefill: {result['prefill']['tokens_per_s']:.0f}")
    measured = f"{', '.join(rates)} tokens/s" if rates else "no rates"
    start = f"start {result['start_s']:.0f} s, " if "start_s" in result else ""
    return f"{model}: {measured}; {start}{seconds:.0f} s in all{'' if result['complete'] else ', INCOMPLETE'}"


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
    parts = [markdown_table(headers, rows, TEXT_COLUMNS), ""]
    rows = [
        [
            model,
            ", ".join(f"{count} {method}" for method, count in result.get("layers", {}).items()),
            f"{result.get('parameter_bytes', 0) / 1e9:.2f}",
            f"{result.get('start_s', 0):.0f}",
        ]
        for model, result in results.items()
    ]
    parts += [
        markdown_table(["model", "linear layers", "GB of parameters", "start, s"], rows, TEXT_COLUMNS),
        "",
    ]
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
            parts += [markdown_table(["us", "share", "kernel"], rows, TEXT_COLUMNS), ""]
    return "\n".join(parts)


def _shorten(name: str) -> str:
    name = name.replace("|", "/").removeprefix("void ")
    return name if len(name) <= 90 else f"{name[:60]}...{name[-27:]}"
