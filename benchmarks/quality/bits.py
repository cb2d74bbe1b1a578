# SPDX-License-Identifier: Apache-2.0
"""How many bits a method stores for a weight: indices, scales, zero points and all.

Only what a checkpoint has to hold is counted. Padding that a file format or a kernel adds is not, and neither is
what a model keeps unquantized (embedding, norms, head), which is the same for every method.
"""

import math

from pvq_vllm.codec.pyramid import index_bits

# Bits of a block of 256 (or of the 32 that the older types have), by ggml's type name, from ggml-common.h: the
# packed structures have no padding, so bytes * 8 is what counts.
GGML_BLOCKS = {
    "Q4_0": (32, 18), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "IQ4_NL": (32, 18),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ2_S": (256, 82), "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_XS": (256, 136),
}  # fmt: skip


def group_width(in_features: int, wanted: int) -> int:
    """Return the divisor of ``in_features`` that is nearest to ``wanted``, the larger of two.

    Packages refuse groups that do not divide a row, so 128 becomes 144 where a row has 576 weights: fewer
    bits than asked for, never more than half as many groups again.
    """
    divisors = [size for size in range(1, in_features + 1) if in_features % size == 0]
    return min(divisors, key=lambda size: (abs(math.log(size / wanted)), -size))


def largest_pulses(group: int, bits: float) -> int:
    """Return the largest K for which an index of S(group, K) takes at most ``bits`` bits a weight."""
    pulses = 1
    while index_bits(group, pulses + 1) <= bits * group:
        pulses += 1
    return pulses


def pyramid_bits(
    in_features: int, group: int, pulses: int, amplitude_bits: int, scale_bits: int = 16
) -> float:
    """Bits a weight of rows whose groups have an index on S(group, pulses) and an amplitude each."""
    return (index_bits(group, pulses) + amplitude_bits) / group + scale_bits / in_features


def grouped_integer_bits(bits: int, group: int, scale_bits: int = 16, zero_bits: int = 0) -> float:
    """Bits a weight of integers in groups that have a scale (and a zero point) each."""
    return bits + (scale_bits + zero_bits) / group


def nf4_bits(block: int = 64, nested_block: int | None = 256) -> float:
    """Bits a weight of NF4: 4, and a float32 maximum for each block, or with double quantization 8 bits for it
    and a float32 for each ``nested_block`` blocks (QLoRA, section 3).
    """
    return 4 + (32 if nested_block is None else 8 + 32 / nested_block) / block


def ggml_bits(type_name: str) -> float:
    """Bits a weight of one of ggml's types."""
    weights, size = GGML_BLOCKS[type_name]
    return 8 * size / weights


def mean_bits(modules: list[tuple[int, float]]) -> float:
    """Mean over modules of (number of weights, bits a weight).

    Raises:
        ValueError: no weights at all.
    """
    weights = sum(count for count, _ in modules)
    if not weights:
        raise ValueError("there are no weights to take a mean over")
    return sum(count * bits for count, bits in modules) / weights
