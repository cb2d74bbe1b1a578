# SPDX-License-Identifier: Apache-2.0
"""The tables of bench_linear_cuda.py."""

from __future__ import annotations

import statistics

OTHERS = ("fp16", "marlin", "machete", "fp8", "int8")


def markdown_table(headers: list[str], rows: list[list[str]], text_columns: int = 0) -> str:
    """A table that reads well in a terminal, too; the first `text_columns` are text, the others numbers."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    rule = ["-" * width if i < text_columns else "-" * (width - 1) + ":" for i, width in enumerate(widths)]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if i < text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    return "\n".join(line(cells) for cells in [headers, rule, *rows])


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def ratios(seconds: dict[str, float], name: str) -> dict[str, float]:
    """Time of each contender over that of `name`; "int4" is the better of Marlin and Machete, "best" of all."""
    ours = seconds[name]
    found = {other: seconds[other] / ours for other in OTHERS if other in seconds}
    for group, members in {
        "int4": ("marlin", "machete"),
        "best": OTHERS,
    }.items():
        if known := [found[member] for member in members if member in found]:
            found[group] = min(known)
    return found


def report(cases: list[dict], names: list[str], bandwidth: float) -> str:
    columns = (*OTHERS, "int4", "best")
    parts = ["Microseconds of a call:", ""]
    kernels = [*names, *(other for other in OTHERS if any(other in case["seconds"] for case in cases))]
    rows = [
        [case["shape"], str(case["tokens"])] + [number(_us(case, kernel), 1) for kernel in kernels]
        for case in cases
    ]
    parts += [markdown_table(["out x in", "tokens", *kernels], rows), ""]
    for name in names:
        known = [case for case in cases if name in case["seconds"]]
        rows = []
        for case in known:
            seconds, compared = case["seconds"][name], ratios(case["seconds"], name)
            rate = case["weight_bytes"][name] / seconds
            rows.append(
                [
                    case["shape"],
                    str(case["tokens"]),
                    number(seconds * 1e6, 1),
                    number(rate / 1e12, 2),
                    f"{100 * rate / bandwidth:.0f}%",
                    number(_operations(case) / seconds / 1e12, 0 if case["tokens"] >= 64 else 1),
                    *[number(compared.get(column), 2) for column in columns],
                ]
            )
        headers = ["out x in", "tokens", "us", "TB/s", "of copy", "TOPS", *columns]
        parts += [f"{name}: time of the others over ours (int4: the better one; best: of all):", ""]
        parts += [markdown_table(headers, rows), "", f"{name}: geometric mean over the shapes (worst):", ""]
        rows = []
        for tokens in sorted({case["tokens"] for case in known}):
            compared = [ratios(case["seconds"], name) for case in known if case["tokens"] == tokens]
            rows.append([str(tokens), *[_mean_and_worst(compared, column) for column in columns]])
        parts += [markdown_table(["tokens", *columns], rows), ""]
    parts += _between_ours(cases, names)
    return "\n".join(parts)


def _us(case: dict, kernel: str) -> float | None:
    return case["seconds"][kernel] * 1e6 if kernel in case["seconds"] else None


def _operations(case: dict) -> int:
    return 2 * case["tokens"] * case["out_features"] * case["in_features"]


def _mean_and_worst(compared: list[dict[str, float]], column: str) -> str:
    values = [entry[column] for entry in compared if column in entry]
    return f"{statistics.geometric_mean(values):.2f} ({min(values):.2f})" if values else ""


def _between_ours(cases: list[dict], names: list[str]) -> list[str]:
    """What fewer bits gain and 16-bit activations cost: every variant of ours over the first one."""
    if len(names) < 2:
        return []
    rows = []
    for case in cases:
        if names[0] in case["seconds"]:
            first = case["seconds"][names[0]]
            values = [
                number(first / case["seconds"][n] if n in case["seconds"] else None, 2) for n in names[1:]
            ]
            rows.append([case["shape"], str(case["tokens"]), *values])
    return [
        f"Time of {names[0]} over that of:",
        "",
        markdown_table(["out x in", "tokens", *names[1:]], rows),
        "",
    ]
