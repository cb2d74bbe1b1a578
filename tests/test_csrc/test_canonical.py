# SPDX-License-Identifier: Apache-2.0
"""csrc/canonical*.cpp against codec.canonical: the same sizes, indices, points, bytes and integers."""

import numpy as np
import pytest
import torch

from pvq_vllm import _C, canonical_ops
from pvq_vllm.codec import canonical
from pvq_vllm.codec.errors import PVQError

PYRAMIDS = [(1, 1), (1, 4096), (2, 7), (6, 6), (8, 8), (16, 58), (128, 225), (256, 443), (1024, 300)]
# N just below, at and above a power of 2^64 of some size, where a carry or a word could be lost.
WORD_EDGES = [(16, 57), (16, 58), (16, 59), (32, 105), (32, 106), (1024, 7)]


def indices_from_pulses(pulses, num_pulses):
    count, group_size = pulses.shape
    words = np.empty((count, _C.canonical_index_words(group_size, num_pulses)), dtype=np.uint64)
    _C.canonical_index_from_pulses(pulses.ctypes.data, count, group_size, num_pulses, words.ctypes.data)
    return [int.from_bytes(row.tobytes(), "little") for row in words]


def pulses_from_indices(indices, group_size, num_pulses):
    size = 8 * _C.canonical_index_words(group_size, num_pulses)
    words = np.frombuffer(b"".join(i.to_bytes(size, "little") for i in indices), dtype=np.uint64).copy()
    pulses = np.empty((len(indices), group_size), dtype=np.int16)
    invalid = _C.canonical_pulses_from_index(
        words.ctypes.data, len(indices), group_size, num_pulses, pulses.ctypes.data
    )
    return pulses, invalid


@pytest.mark.parametrize(
    "group_size, num_pulses", [*PYRAMIDS, *WORD_EDGES, (1024, 4096), (200, 4096), (1000, 1)]
)
def test_codebook_size_equals_the_exact_one(group_size, num_pulses):
    size = int.from_bytes(_C.canonical_codebook_size(group_size, num_pulses), "little")
    assert size == canonical.codebook_size(group_size, num_pulses)
    assert _C.canonical_index_bits(group_size, num_pulses) == canonical.index_bits(group_size, num_pulses)


@pytest.mark.parametrize("group_size, num_pulses", [(0, 1), (1025, 1), (1, 0), (1, 4097)])
def test_a_pyramid_out_of_range_is_refused(group_size, num_pulses):
    with pytest.raises(ValueError, match="must be 1 to"):
        _C.canonical_index_bits(group_size, num_pulses)


@pytest.mark.parametrize("group_size, num_pulses", [(1, 3), (2, 7), (3, 5), (4, 4), (5, 3), (6, 6), (8, 8)])
def test_every_index_of_a_small_pyramid_round_trips(group_size, num_pulses):
    indices = list(range(canonical.codebook_size(group_size, num_pulses)))
    pulses, invalid = pulses_from_indices(indices, group_size, num_pulses)
    assert invalid == -1
    assert (np.abs(pulses).sum(axis=1) == num_pulses).all()
    assert indices_from_pulses(pulses, num_pulses) == indices
    for index in indices[:: max(1, len(indices) // 300)]:
        assert pulses[index].tolist() == canonical.pulses_from_index(index, group_size, num_pulses)


@pytest.mark.parametrize("group_size, num_pulses", PYRAMIDS + WORD_EDGES)
def test_indices_equal_the_exact_ones(group_size, num_pulses):
    rng = np.random.default_rng(group_size * num_pulses)
    size = canonical.codebook_size(group_size, num_pulses)
    exact = 3 if group_size == 1024 else 20
    random = [int.from_bytes(rng.bytes(size.bit_length() // 8 + 8), "little") % size for _ in range(2000)]
    indices = [0, size - 1, size // 2, *random]
    pulses, invalid = pulses_from_indices(indices, group_size, num_pulses)
    assert invalid == -1
    assert indices_from_pulses(pulses, num_pulses) == indices
    for index, point in list(zip(indices, pulses, strict=True))[:exact]:
        assert point.tolist() == canonical.pulses_from_index(index, group_size, num_pulses)
        assert canonical.index_from_pulses(point) == index


def test_the_largest_pyramid_round_trips():
    pulses = canonical_ops.search_pulses(
        np.random.default_rng(0).standard_normal((5, 1024)).astype(np.float32), 4096
    )
    indices = indices_from_pulses(pulses, 4096)
    assert max(indices) < canonical.codebook_size(1024, 4096)
    assert (pulses_from_indices(indices, 1024, 4096)[0] == pulses).all()


@pytest.mark.parametrize("group_size, num_pulses", [(2, 7), (16, 58), (128, 225)])
def test_the_first_invalid_index_is_reported(group_size, num_pulses):
    size = canonical.codebook_size(group_size, num_pulses)
    largest = (1 << (64 * _C.canonical_index_words(group_size, num_pulses))) - 1
    for bad in (size, size + 1, largest):
        assert pulses_from_indices([0, size - 1, bad, bad], group_size, num_pulses)[1] == 2


@pytest.mark.parametrize(
    "group_size, num_pulses",
    [(1, 7), (3, 50), (8, 16), (16, 12), (16, 58), (64, 3), (128, 187), (100, 386), (1024, 500)],
)
def test_search_equals_the_reference(group_size, num_pulses):
    rng = np.random.default_rng(num_pulses)
    x = rng.standard_normal((40_000 // group_size, group_size)).astype(np.float32)
    x[0] = 0
    x[1, : group_size // 2] = 0
    x[2] = np.sign(x[2])  # nothing but ties
    x[3:20] = np.rint(4 * x[3:20])  # many ties
    x[20] *= 1e-38
    x[21] = rng.standard_cauchy(group_size)
    assert (canonical_ops.search_pulses(x, num_pulses) == canonical.search_pulses(x, num_pulses)).all()


@pytest.mark.parametrize(
    "group_size, num_pulses, bits, in_features",
    [(8, 16, 4, 64), (12, 9, 0, 48), (16, 58, 5, 48), (16, 57, 1, 16), (128, 225, 7, 256), (5, 4096, 3, 35)],
)
@pytest.mark.parametrize("amplitude", ["beta", "lloyd_max"])
def test_bytes_and_integers_equal_the_reference(group_size, num_pulses, bits, in_features, amplitude):
    weight = np.random.default_rng(bits).standard_normal((7, in_features)).astype(np.float32)
    weight[2] = 0
    weight[3, 0] = 30
    reference = canonical.encode_weight(weight, group_size, num_pulses, bits, amplitude)
    encoded = canonical_ops.encode_canonical(
        torch.from_numpy(weight), group_size, num_pulses, bits, amplitude
    )
    for tensor, array in zip(encoded, reference, strict=True):
        assert tensor.numpy().dtype == array.dtype
        assert (tensor.numpy() == array).all()
    packed, levels, _ = encoded
    q = canonical_ops.decode_canonical(packed, levels, group_size, num_pulses, bits, in_features)
    assert q.dtype == torch.int8 and q.shape == weight.shape
    expected = canonical.decode_weight(*reference[:2], group_size, num_pulses, bits, in_features)
    assert (q.numpy() == expected).all()


def test_many_rows_equal_few():
    """Rows are split over threads and into sweeps; neither may show."""
    weight = torch.randn(600, 64, generator=torch.Generator().manual_seed(1))
    packed, levels, _ = canonical_ops.encode_canonical(weight, 8, 16, 3)
    q = canonical_ops.decode_canonical(packed, levels, 8, 16, 3, 64)
    for row in (0, 1, 299, 300, 599):
        one = canonical_ops.decode_canonical(packed[row : row + 1], levels, 8, 16, 3, 64)
        assert torch.equal(one[0], q[row])
        expected = canonical.decode_weight(packed[row : row + 1].numpy(), levels.numpy(), 8, 16, 3, 64)
        assert (one.numpy() == expected).all()


# Greedy search and Beta amplitudes without rounding to int8, as measured with a NumPy prototype.
@pytest.mark.parametrize(
    "group_size, num_pulses, bits, decibels",
    [
        (16, 27, 4, 17.01),
        (16, 27, 6, 17.12),
        (128, 187, 4, 16.25),
        (128, 187, 6, 16.26),
        (128, 386, 4, 22.29),
    ],
)
def test_signal_to_noise_of_gaussian_weights(group_size, num_pulses, bits, decibels):
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    measured = {}
    for amplitude in ("beta", "lloyd_max"):
        packed, levels, scale = canonical_ops.encode_canonical(
            weight, group_size, num_pulses, bits, amplitude
        )
        q = canonical_ops.decode_canonical(packed, levels, group_size, num_pulses, bits, 4096)
        error = weight - q.float() * scale.float()[:, None]
        measured[amplitude] = 10 * torch.log10(weight.pow(2).sum() / error.pow(2).sum()).item()
    assert measured["beta"] == pytest.approx(decibels, abs=0.1)
    assert measured["lloyd_max"] > measured["beta"] - 0.01


def test_a_damaged_row_is_named():
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(2))
    packed, levels, _ = canonical_ops.encode_canonical(weight, 8, 8, 4)  # 3 * (18 + 4) = 66 bits in 9 bytes

    def decode(packed, levels=levels):
        return canonical_ops.decode_canonical(packed, levels, 8, 8, 4, 24)

    damaged = packed.clone()
    damaged[17, 0:3] = torch.tensor([0xFF, 0xFF, 0xFF], dtype=torch.uint8)
    with pytest.raises(PVQError, match=r"row 17: group 0 has an index that is not below N\(8, 8\)"):
        decode(damaged)
    damaged = packed.clone()
    damaged[33, 8] |= 4
    with pytest.raises(PVQError, match="row 33: an unused bit"):
        decode(damaged)
    with pytest.raises(PVQError, match="row 0: group 0 has a weight outside"):
        decode(packed, levels * 100)
    with pytest.raises(PVQError, match="ascending"):
        decode(packed, levels.flip(0))
    with pytest.raises(PVQError, match="finite"):
        decode(packed, levels * float("nan"))
    with pytest.raises(PVQError, match=r"expected uint8 \[out_features, 9\]"):
        decode(packed[:, :8])
    with pytest.raises(PVQError, match="weight_levels has shape"):
        decode(packed, levels[:8])


def test_bad_weights_are_refused():
    with pytest.raises(PVQError, match="not finite"):
        canonical_ops.encode_canonical(torch.full((2, 8), float("nan")), 8, 8, 4)
    with pytest.raises(PVQError, match="expected float32"):
        canonical_ops.encode_canonical(torch.ones(2, 8, dtype=torch.float64), 8, 8, 4)
    with pytest.raises(PVQError, match="does not divide"):
        canonical_ops.encode_canonical(torch.ones(2, 12), 8, 8, 4)
