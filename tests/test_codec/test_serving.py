# SPDX-License-Identifier: Apache-2.0
"""The serving codebooks against their definition in docs/format.md §4.1."""

from math import comb

import numpy as np
import pytest

from pvq_vllm import _C
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.serving import SERVING, codebook_id, decode_groups, shapes

NAMES = list(SERVING)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_shape_table_is_the_enumeration(name):
    words = np.array(_C.shape_table(SERVING[name].id), dtype=np.int64)
    digits = np.stack([words >> (8 * (i % 4) + 4 * (i // 4)) & 15 for i in range(8)], axis=1)
    assert np.array_equal(digits, shapes(name))


@pytest.mark.parametrize(
    ("name", "sizes"), [("pvq4", (6435, 1716, 36)), ("pvq3", (6435, 1716, 36)), ("pvq2", (120, 8))]
)
def test_shapes_are_the_pyramids_of_the_specification(name, sizes):
    book = SERVING[name]
    assert tuple(comb(k + 7, 7) for k in book.pyramids) == sizes
    table, start = shapes(name), 0
    assert len(table) == book.num_shapes <= 1 << book.shape_bits
    for pulses, size in zip(book.pyramids, sizes, strict=True):
        part = table[start : start + size]
        assert (part.sum(axis=1) == pulses).all() and (part >= 0).all()
        assert [tuple(row) for row in part] == sorted({tuple(row) for row in part})
        start += size


def test_first_and_last_shape_of_each_pyramid():
    table = shapes("pvq4")
    assert table[0].tolist() == [0, 0, 0, 0, 0, 0, 0, 8] and table[6434].tolist() == [8, 0, 0, 0, 0, 0, 0, 0]
    assert table[6435].tolist() == [0, 0, 0, 0, 0, 0, 0, 6] and table[8186].tolist() == [
        2,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
    ]


def test_a_group_decoded_by_hand():
    # shape 0 = (0,0,0,0,0,0,0,8), gain index 1 (base 3, step 7), signs of weights 0 and 7, refinement of weight 1
    code = 0 | 1 << 13
    group = np.array([code & 255, code >> 8, 0b10000001, 0b00000010], dtype=np.uint8)
    # j = 2m + f = 0,1,0,0,0,0,0,16; b = 3 + 7j = 3,10,3,3,3,3,3,115; a set sign turns b into -1 - b
    assert decode_groups(group, "pvq4").tolist() == [-4, 10, 3, 3, 3, 3, 3, -116]


@pytest.mark.parametrize("name", NAMES)
def test_every_gain_reaches_every_shape_or_is_refused(name):
    book = SERVING[name]
    table = shapes(name)
    for gain_index in range(len(book.gains[0])):
        code = np.arange(book.num_shapes) | gain_index << book.shape_bits
        columns = [code & 255, code >> 8] if book.shape_bits > 8 else [code]
        extra = book.bytes_per_group - len(columns)
        codes = np.stack([*columns, *[np.zeros_like(code)] * extra], axis=1).astype(np.uint8)
        pyramid = np.repeat(np.arange(len(book.pyramids)), [comb(k + 7, 7) for k in book.pyramids])
        gain = np.array([g[gain_index] for g in book.gains])[pyramid]
        b = gain[:, :1] + gain[:, 1:] * (table << book.refinement_bits)
        good = (b <= 127).all(axis=1)
        assert good.any()
        assert np.array_equal(decode_groups(codes[good], name), b[good])
        if not good.all():
            with pytest.raises(PVQError, match="above 127"):
                decode_groups(codes[~good][:1], name)


def test_codes_out_of_range_are_refused():
    with pytest.raises(PVQError, match="shape 8187"):
        decode_groups(np.array([8187 & 255, 8187 >> 8, 0, 0], dtype=np.uint8), "pvq4")
    with pytest.raises(PVQError, match="-128"):
        decode_groups(np.array([0, 0x80, 0, 0, 0, 0, 0, 0], dtype=np.uint8), "int8")
    with pytest.raises(PVQError, match="pvq5"):
        codebook_id("pvq5")
