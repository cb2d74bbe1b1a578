# SPDX-License-Identifier: Apache-2.0
"""The quantizer's inner loops against brute force and closed forms."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from pvq_vllm import quantizer_ops
from pvq_vllm.codec.serving import SERVING, decode_groups, shapes

NAMES = list(SERVING)


def _all_magnitudes(name: str) -> torch.Tensor:
    """Every magnitude vector b of a codebook, [codewords, 8], by trying all shapes, gains and refinements."""
    book = SERVING[name]
    pyramid = np.repeat(
        np.arange(len(book.pyramids)), [(shapes(name).sum(1) == k).sum() for k in book.pyramids]
    )
    rows = []
    for gain_index in range(len(book.gains[0])):
        gain = np.array([g[gain_index] for g in book.gains])[pyramid]
        for refinement in range(1 << (8 * book.refinement_bits)):
            bits = refinement >> np.arange(8) & 1
            b = gain[:, :1] + gain[:, 1:] * ((shapes(name) << book.refinement_bits) + bits)
            rows.append(b[(b <= 127).all(axis=1)])
    return torch.from_numpy(np.concatenate(rows)).double()


@pytest.mark.parametrize("name", ["pvq2", "pvq3"])
def test_search_finds_the_nearest_codeword(name):
    generator = torch.Generator().manual_seed(0)
    groups = (
        torch.randn(60, 8, generator=generator)
        * torch.linspace(0.2, 3.0, 60)[:, None]
        * SERVING[name].target_rms
    )
    scale = torch.ones(60)
    _, q = quantizer_ops.quantize_rows(groups, name, scale)
    found = ((groups - q - 0.5) ** 2).sum(dim=1)
    best = torch.cdist(groups.abs().double(), _all_magnitudes(name) + 0.5).amin(dim=1) ** 2
    assert torch.allclose(found.double(), best, rtol=1e-4)


def test_search_with_refinement_finds_the_nearest_codeword():
    """pvq4 has 17 million codewords: for every shape and gain the best refinement is a choice per coordinate."""
    book, table = SERVING["pvq4"], shapes("pvq4")
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(24, 8, generator=generator) * torch.linspace(0.3, 2.5, 24)[:, None] * book.target_rms
    _, q = quantizer_ops.quantize_rows(groups, "pvq4", torch.ones(24))
    found = ((groups - q - 0.5) ** 2).sum(dim=1)
    for row, group in enumerate(groups.abs().double().numpy()):
        best = np.inf
        for base, step in book.gains[0]:
            b = np.stack([base + step * (2 * table + f) for f in (0, 1)])
            cost = np.where(b <= 127, (group - b - 0.5) ** 2, np.inf)
            best = min(best, cost.min(axis=0).sum(axis=1).min())
        assert float(found[row]) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("name", [*NAMES, "int8"])
def test_codes_decode_to_q(name):
    weight = torch.randn(33, 96, generator=torch.Generator().manual_seed(1))
    scale = quantizer_ops.search_row_scale(weight, name)
    codes, q = quantizer_ops.quantize_rows(weight, name, scale)
    assert torch.equal(quantizer_ops.decode_codes(codes, name), q)
    assert np.array_equal(decode_groups(codes.numpy(), name).reshape(33, 96), q.numpy())


@pytest.mark.parametrize(("name", "decibels"), [("pvq2", 10.1), ("pvq3", 15.7), ("pvq4", 21.5)])
def test_signal_to_noise_on_gaussian_weights(name, decibels):
    weight = torch.randn(128, 4096, generator=torch.Generator().manual_seed(0))
    scale = quantizer_ops.search_row_scale(weight, name)
    _, q = quantizer_ops.quantize_rows(weight, name, scale)
    error = weight - (q + 0.5) * scale[:, None]
    assert 10 * torch.log10(weight.square().sum() / error.square().sum()) >= decibels


def test_rows_of_zeros_and_outliers_have_valid_codes():
    weight = torch.zeros(4, 64)
    weight[1] = 1e-9
    weight[2, 0] = 1e4
    weight[3] = torch.randn(64) * 1e5
    for name in NAMES:
        scale = quantizer_ops.search_row_scale(weight, name)
        assert scale[0] == 0
        codes, q = quantizer_ops.quantize_rows(weight, name, scale)
        assert torch.equal(quantizer_ops.decode_codes(codes, name), q)


def test_instruction_sets_choose_the_same_codes():
    script = (
        "import hashlib, torch; from pvq_vllm import quantizer_ops; torch.manual_seed(0); w = torch.randn(50, 128);"
        "h = hashlib.sha256()\n"
        "for name in ('pvq2', 'pvq3', 'pvq4', 'int8'):\n"
        "    s = quantizer_ops.search_row_scale(w, name); h.update(s.numpy().tobytes())\n"
        "    for t in quantizer_ops.quantize_rows(w, name, s): h.update(t.numpy().tobytes())\n"
        "print(h.hexdigest())"
    )
    digests = set()
    for isa in ("portable", "avx2", "avx512"):
        env = {**os.environ, "PVQ_CPU_ISA": isa}
        run = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
        )
        digests.add(run.stdout)
    assert len(digests) == 1
