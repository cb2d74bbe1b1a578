# SPDX-License-Identifier: Apache-2.0
"""From an average rate to a codebook for every module: which are possible, and which are chosen.

The average is over the matrices of the decoder layers, row scales included, as in report.json's
``bits_per_weight``. A module that an --override names keeps that rate and counts, and so does what is not quantized.
Modules that vLLM fuses (q, k, v; gate, up) may get different rates: a fused layer holds segments of any codebooks.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import CheckpointConfig, Codebook

from .model_source import ModelSource
from .plan import Settings, codebook_from_text
from .rate_allocation import allocate

DEFAULT_RATES = ("2", "3", "4", "8")
BELOW_TWO = "16,8,2"  # 1.69 bits: lets an average reach 2.0 in spite of the row scales


def rate_candidates(
    source: ModelSource, config: CheckpointConfig, settings: Settings
) -> dict[str, list[Codebook]]:
    """Return the codebooks that each module of the decoder layers may get.

    Raises:
        PVQError: no rate fits a module, or the smallest ones take more than the budget.
    """
    rates = settings.rates or DEFAULT_RATES
    codebooks = [codebook_from_text(rate, "--rate") for rate in rates]
    candidates: dict[str, list[Codebook]] = {}
    for layer in range(len(source.layers)):
        for name in source.linear_names(layer):
            if name not in config.modules:
                continue
            if any(re.search(pattern, name) for pattern, _ in settings.overrides):
                candidates[name] = [config.modules[name].codebook]
            else:
                candidates[name] = [codebook for codebook in codebooks if _fits(codebook, source, name)]
                if not candidates[name]:
                    raise PVQError(
                        f"{name} has {source.weight_shape(name)[1]} input columns, which none of --rate "
                        f"{' and '.join(rates)} fits: add a --rate of 2, 3, 4 or 8 bits, or a D,K,b whose D divides "
                        "them"
                    )
    if not settings.rates and smallest_average(source, candidates) > settings.target_bpw:
        below = codebook_from_text(BELOW_TWO, "--rate")
        for name, books in candidates.items():
            if len(books) > 1 and _fits(below, source, name):
                books.insert(0, below)
    smallest = smallest_average(source, candidates)
    if smallest > settings.target_bpw:
        left = source.left_as_is(candidates)[0]
        rest = f", together with {left:,} weights of the layers that stay as they are" if left else ""
        raise PVQError(
            f"--target-bpw {settings.target_bpw:g}: the smallest rates take {smallest:.4f} bits a weight{rest}: raise "
            "it, or add a smaller --rate D,K,b of the canonical codebook"
        )
    return candidates


def _fits(codebook: Codebook, source: ModelSource, name: str) -> bool:
    try:
        codebook.packed_shape(*source.weight_shape(name))
    except PVQError:
        return False
    return True


def module_bits(codebook: Codebook, shape: tuple[int, int]) -> int:
    """Return the bits of a module's codes and row scales."""
    return 8 * math.prod(codebook.packed_shape(*shape)) + 16 * shape[0]


def smallest_average(source: ModelSource, candidates: Mapping[str, list[Codebook]]) -> float:
    """Return the bits a weight when every module gets its smallest rate."""
    shapes = {name: source.weight_shape(name) for name in candidates}
    left, left_bits = source.left_as_is(candidates)
    bits = sum(min(module_bits(book, shapes[name]) for book in books) for name, books in candidates.items())
    return (bits + left_bits) / (sum(map(math.prod, shapes.values())) + left)


def choose_rates(
    source: ModelSource,
    candidates: Mapping[str, list[Codebook]],
    losses: Mapping[str, Mapping[str, float]],
    target_bpw: float,
) -> dict[str, Codebook]:
    """Return the codebook of every module: the least sum of losses at ``target_bpw`` bits a weight or less.

    Args:
        losses: see ``sensitivity.measure_losses``. A module without losses (no token reached it) gets its
            largest rate within the target, or its smallest.
    Raises:
        PVQError: even the smallest rates take more.
    """
    shapes = {name: source.weight_shape(name) for name in candidates}
    left, left_bits = source.left_as_is(candidates)
    budget = math.floor(target_bpw * (sum(map(math.prod, shapes.values())) + left)) - left_bits
    for unmeasured in (-1, 0):  # the largest rate, or the smallest if the others cannot pay for that
        possible: dict[str, list[Codebook]] = {}
        for name, books in candidates.items():
            books = sorted(books, key=lambda book: module_bits(book, shapes[name]))
            if name not in losses:
                limit = target_bpw * math.prod(shapes[name])
                within = [book for book in books if module_bits(book, shapes[name]) <= limit]
                books = [(within or books[:1])[unmeasured]]
            possible[name] = books
        costs = [[module_bits(book, shapes[name]) for book in books] for name, books in possible.items()]
        values = [
            [losses[name][str(book)] if name in losses else 0.0 for book in books]
            for name, books in possible.items()
        ]
        choice = allocate(costs, values, budget)
        if choice is not None:
            return {name: books[index] for (name, books), index in zip(possible.items(), choice, strict=True)}
    raise PVQError(f"--target-bpw {target_bpw:g}: even the smallest rates take more: raise it")


def with_codebooks(config: CheckpointConfig, chosen: Mapping[str, Codebook]) -> CheckpointConfig:
    """Return ``config`` with other codebooks; the most frequent one becomes the checkpoint's."""
    modules = {
        name: replace(spec, codebook=chosen.get(name, spec.codebook)) for name, spec in config.modules.items()
    }
    counts = Counter(modules[name].codebook for name in chosen)
    return replace(config, codebook=counts.most_common(1)[0][0], modules=modules)
