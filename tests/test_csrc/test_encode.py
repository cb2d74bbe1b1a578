# SPDX-License-Identifier: Apache-2.0
"""The quantizer's inner loops against brute force and closed forms."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from pvq_vllm import ops
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
    _, q = ops.quantize_rows(groups, name, scale)
    found = ((groups - q - 0.5) ** 2).sum(dim=1)
    best = torch.cdist(groups.abs().double(), _all_magnitudes(name) + 0.5).amin(dim=1) ** 2
    assert torch.allclose(found.double(), best, rtol=1e-4)


def test_search_with_refinement_finds_the_nearest_codeword():
    """pvq4 has 17 million codewords: for every shape and gain the best refinement is a choice per coordinate."""
    book, table = SERVING["pvq4"], shapes("pvq4")
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(24, 8, generator=generator) * torch.linspace(0.3, 2.5, 24)[:, None] * book.target_rms
    _, q = ops.quantize_rows(groups, "pvq4", torch.ones(24))
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
    scale = ops.search_row_scale(weight, name)
    codes, q = ops.quantize_rows(weight, name, scale)
    assert torch.equal(ops.decode_codes(codes, name), q)
    assert np.array_equal(decode_groups(codes.numpy(), name).reshape(33, 96), q.numpy())


@pytest.mark.parametrize(("name", "decibels"), [("pvq2", 10.1), ("pvq3", 15.7), ("pvq4", 21.5)])
def test_signal_to_noise_on_gaussian_weights(name, decibels):
    weight = torch.randn(128, 4096, generator=torch.Generator().manual_seed(0))
    scale = ops.search_row_scale(weight, name)
    _, q = ops.quantize_rows(weight, name, scale)
    error = weight - (q + 0.5) * scale[:, None]
    assert 10 * torch.log10(weight.square().sum() / error.square().sum()) >= decibels


def test_rows_of_zeros_and_outliers_have_valid_codes():
    weight = torch.zeros(4, 64)
    weight[1] = 1e-9
    weight[2, 0] = 1e4
    weight[3] = torch.randn(64) * 1e5
    for name in NAMES:
        scale = ops.search_row_scale(weight, name)
        assert scale[0] == 0
        codes, q = ops.quantize_rows(weight, name, scale)
        assert torch.equal(ops.decode_codes(codes, name), q)


@pytest.mark.parametrize("name", [*NAMES, "int8"])
def test_feedback_equals_the_loop_written_out(name):
    """LLVQ, Algorithm 1, in double precision around the same encoder: W[:, R] -= (E U_QQ^-1) U_QR."""
    torch.manual_seed(0)
    rows, columns = 19, 40
    inputs = torch.randn(400, columns, dtype=torch.float64) @ torch.randn(
        columns, columns, dtype=torch.float64
    )
    hessian = inputs.T @ inputs / 400 + 0.01 * torch.eye(columns, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).contiguous()
    weight = torch.randn(rows, columns)
    scale = ops.search_row_scale(weight, name)
    codes, q, error = ops.feedback_block(weight, factor.float(), name, scale)

    half = 0.0 if name == "int8" else 0.5
    w = weight.double()
    for g in range(0, columns, 8):
        block, rest = slice(g, g + 8), slice(g + 8, columns)
        # the loop's own quantizer input may differ in the last bit: accept its codes, check what was fed back
        e = (w[:, block] - (q[:, block] + half) * scale[:, None]) @ torch.linalg.inv(factor[block, block])
        assert torch.allclose(error[:, block].double(), e, rtol=2e-3, atol=2e-3 * float(e.abs().max()))
        _, nearest = ops.quantize_rows(w[:, block].float().contiguous(), name, scale)
        assert (nearest == q[:, block]).float().mean() > 0.99
        w[:, rest] -= e @ factor[block, rest]
    assert torch.equal(ops.decode_codes(codes, name), q)


def test_feedback_lowers_the_loss_it_is_made_for():
    torch.manual_seed(0)
    columns = 128
    inputs = torch.randn(1000, columns, dtype=torch.float64) @ torch.randn(
        columns, columns, dtype=torch.float64
    )
    hessian = inputs.T @ inputs / 1000
    hessian += 0.01 * hessian.diag().mean() * torch.eye(columns, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float().contiguous()
    weight = torch.randn(64, columns)
    scale = ops.search_row_scale(weight, "pvq3")
    losses = []
    for q in (
        ops.quantize_rows(weight, "pvq3", scale)[1],
        ops.feedback_block(weight, factor, "pvq3", scale)[1],
    ):
        d = (weight - (q + 0.5) * scale[:, None]).double()
        losses.append(float(torch.einsum("ri,ij,rj->", d, hessian, d)))
    assert (
        losses[1] < 0.7 * losses[0]
    )  # 0.58 here; feedback of the wrong sign or factor makes it larger than 1


def test_instruction_sets_choose_the_same_codes():
    script = (
        "import hashlib, torch; from pvq_vllm import ops; torch.manual_seed(0); w = torch.randn(50, 128);"
        "u = torch.eye(128) + torch.triu(torch.randn(128, 128) * 0.1, 1); h = hashlib.sha256()\n"
        "for name in ('pvq2', 'pvq3', 'pvq4', 'int8'):\n"
        "    s = ops.search_row_scale(w, name); h.update(s.numpy().tobytes())\n"
        "    for t in (*ops.quantize_rows(w, name, s), *ops.feedback_block(w, u, name, s)): h.update(t.numpy().tobytes())\n"
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
