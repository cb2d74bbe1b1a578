# SPDX-License-Identifier: Apache-2.0
"""The codeword search in a metric (csrc/metric_search.h) against exhaustive and exact searches, and the passes built on it."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from pvq_vllm import quantizer_ops
from pvq_vllm.codec.serving import SERVING, shapes

NAMES = list(SERVING)


def correlated_factor(columns: int, seed: int, condition: float = 100.0) -> torch.Tensor:
    """U, float64 upper, of the inverse of a Hessian with eigenvalues from 1 / condition to 1 in random directions.

    The metrics of groups in rotated coordinates have condition numbers from 1.2 to 3 (SmolLM2).
    """
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    inverse = basis * torch.logspace(0, np.log10(condition), columns, dtype=torch.float64) @ basis.T
    return torch.linalg.cholesky(inverse, upper=True)


def metrics_of(factor: torch.Tensor) -> torch.Tensor:
    """Metrics of the groups on the diagonal of U, float32 [n / 8, 2, 8, 8]."""
    blocks = [factor[i : i + 8, i : i + 8] for i in range(0, len(factor), 8)]
    return torch.stack([torch.stack([u, torch.linalg.inv(u.T @ u).T]) for u in blocks]).float().contiguous()


def search(targets: torch.Tensor, factor: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Choices for single groups, [rows, 8]: (q + 1/2, cost), both float64."""
    u = factor.float().contiguous()
    codes, q, _ = quantizer_ops.feedback_block(
        targets.float().contiguous(), u, metrics_of(factor), name, torch.ones(len(targets))
    )
    assert torch.equal(quantizer_ops.decode_codes(codes, name), q)
    chosen = q.double() + 0.5
    return chosen, ((targets - chosen) @ torch.linalg.inv(factor)).square().sum(dim=1)


class SphereDecoder:
    """The exact optimum: depth-first over coordinates, cut where the cost is no better than the best (Schnorr, Euchner)."""

    def __init__(self, name: str, factor: np.ndarray) -> None:
        self.book, self.factor = SERVING[name], factor
        self.size = 1 << self.book.refinement_bits

    def best_cost(self, target: np.ndarray, radius: float) -> float:
        """Return the least cost of all codewords, or `radius` where none costs less."""
        self.target, self.best = target, radius
        for pulses, gains in zip(self.book.pyramids, self.book.gains, strict=True):
            for base, step in gains:
                self.base, self.step, self.last = base, step, (127 - base) // step
                self._descend(0, pulses, 0.0, np.zeros(8))
        return self.best

    def _descend(self, i: int, left: int, cost: float, scaled: np.ndarray) -> None:
        wanted = self.target[i] - scaled[:i] @ self.factor[:i, i]
        cells = [left] if i == 7 else range(left + 1)
        levels = [j for m in cells for j in range(m * self.size, (m + 1) * self.size) if j <= self.last]
        values = [(sign * (self.base + 0.5 + self.step * j), j) for j in levels for sign in (1, -1)]
        for value, j in sorted(values, key=lambda pair: abs(pair[0] - wanted)):
            scaled[i] = (wanted - value) / self.factor[i, i]
            total = cost + scaled[i] ** 2
            if total >= self.best:
                return
            if i == 7:
                self.best = total
            else:
                self._descend(i + 1, left - j // self.size, total, scaled)


def targets_of(name: str, rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 8, generator=generator, dtype=torch.float64) * SERVING[name].target_rms


def test_pvq2_against_all_its_codewords():
    """65,536 codewords: the search and the decoder that judges it elsewhere."""
    book, table = SERVING["pvq2"], torch.from_numpy(shapes("pvq2")).double()
    magnitudes = []
    for index, pulses in enumerate(book.pyramids):
        for base, step in book.gains[index]:
            magnitudes.append(base + 0.5 + step * table[table.sum(dim=1) == pulses])
    signs = 1 - 2 * (torch.arange(256)[:, None] >> torch.arange(8) & 1).double()
    words = (torch.cat(magnitudes)[:, None] * signs).reshape(-1, 8)
    factor, targets = correlated_factor(8, 1, 4.0), targets_of("pvq2", 60)
    _, cost = search(targets, factor, "pvq2")
    inverse = torch.linalg.inv(factor)
    best = torch.cdist(targets @ inverse, words @ inverse).amin(dim=1).square()
    decoder = SphereDecoder("pvq2", factor.numpy())
    exact = [decoder.best_cost(target, np.inf) for target in targets.numpy()]
    assert np.allclose(exact, best, rtol=1e-9)
    assert (cost > best * (1 - 1e-5)).all()
    assert (cost < best * (1 + 1e-5)).float().mean() >= 0.8
    assert cost.sum() <= best.sum() * 1.01


@pytest.mark.parametrize("name", ["pvq3", "pvq4"])
def test_search_is_nearly_always_the_optimum(name):
    factor, targets = correlated_factor(8, 2, 4.0), targets_of(name, 40)
    _, cost = search(targets, factor, name)
    decoder = SphereDecoder(name, factor.numpy())
    best = torch.tensor(
        [decoder.best_cost(t, c * (1 + 1e-5)) for t, c in zip(targets.numpy(), cost.tolist(), strict=True)]
    )
    assert (cost < best * (1 + 1e-4)).float().mean() >= 0.8
    assert cost.sum() <= best.sum() * 1.02


@pytest.mark.parametrize("name", NAMES)
def test_the_identity_metric_gives_the_nearest_codeword(name):
    targets = targets_of(name, 200, seed=3)
    _, cost = search(targets, torch.eye(8, dtype=torch.float64), name)
    _, q = quantizer_ops.quantize_rows(targets.float().contiguous(), name, torch.ones(200))
    nearest = (targets - q.double() - 0.5).square().sum(dim=1)
    assert (cost >= nearest * (1 - 1e-5)).all()
    assert cost.sum() <= nearest.sum() * 1.002


@pytest.mark.parametrize("name", NAMES)
def test_the_metric_choice_beats_the_euclidean_one(name):
    factor, targets = correlated_factor(8, 4, 10.0), targets_of(name, 300)
    _, cost = search(targets, factor, name)
    _, q = quantizer_ops.quantize_rows(targets.float().contiguous(), name, torch.ones(300))
    euclidean = ((targets - q.double() - 0.5) @ torch.linalg.inv(factor)).square().sum(dim=1)
    assert (cost <= euclidean * (1 + 1e-5)).float().mean() >= 0.98
    assert cost.sum() < 0.9 * euclidean.sum()


@pytest.mark.parametrize("name", [*NAMES, "int8"])
def test_feedback_equals_the_loop_written_out(name):
    """LLVQ, Algorithm 1, in double precision around the same search: W[:, R] -= (E U_QQ^-1) U_QR."""
    columns = 40
    factor = correlated_factor(columns, 8)
    weight = torch.randn(19, columns, generator=torch.Generator().manual_seed(9))
    scale = torch.full((19,), 1 / 40 if name == "int8" else 1 / SERVING[name].target_rms)
    metrics = metrics_of(factor)
    codes, q, error = quantizer_ops.feedback_block(weight, factor.float().contiguous(), metrics, name, scale)
    half = 0.0 if name == "int8" else 0.5
    w = weight.double()
    for g in range(0, columns, 8):
        block, rest = slice(g, g + 8), slice(g + 8, columns)
        u = factor[block, block]
        # the loop's own input may differ in the last bit: accept the codes, check what was fed back
        e = (w[:, block] - (q[:, block] + half) * scale[:, None]) @ torch.linalg.inv(u)
        assert torch.allclose(error[:, block].double(), e, rtol=2e-3, atol=2e-3 * float(e.abs().max()))
        alone = w[:, block].float().contiguous()
        _, expected, _ = quantizer_ops.feedback_block(
            alone, u.float().contiguous(), metrics[g // 8 : g // 8 + 1], name, scale
        )
        assert (expected == q[:, block]).float().mean() > 0.98
        w[:, rest] -= e @ factor[block, rest]
    assert torch.equal(quantizer_ops.decode_codes(codes, name), q)


def test_int8_rounds_one_weight_after_the_other():
    """Which is feedback in groups of one: GPTQ."""
    factor = correlated_factor(24, 10)
    weight = torch.randn(31, 24, generator=torch.Generator().manual_seed(11))
    _, q, _ = quantizer_ops.feedback_block(
        weight, factor.float().contiguous(), metrics_of(factor), "int8", torch.full((31,), 0.02)
    )
    w, agreeing = weight.double(), 0
    for i in range(24):
        agreeing += ((w[:, i] / 0.02).round().clamp(-127, 127) == q[:, i]).sum().item()
        w[:, i + 1 :] -= ((w[:, i] - q[:, i] * 0.02) / factor[i, i])[:, None] * factor[i, i + 1 :]
    assert agreeing >= 31 * 24 * 0.99


def descent_problem(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    columns = 48
    factor = correlated_factor(columns, 5)
    hessian = torch.linalg.inv(factor.T @ factor).contiguous()
    weight = torch.randn(37, columns, generator=torch.Generator().manual_seed(6))
    scale = torch.full((37,), 1 / 40 if name == "int8" else 1 / SERVING[name].target_rms)
    codes, q, _ = quantizer_ops.feedback_block(
        weight, factor.float().contiguous(), metrics_of(factor), name, scale
    )
    return weight, scale, hessian, codes, q


def hessian_metrics(hessian: torch.Tensor) -> torch.Tensor:
    blocks = [hessian[i : i + 8, i : i + 8] for i in range(0, len(hessian), 8)]
    return torch.cat(
        [metrics_of(torch.linalg.cholesky(torch.linalg.inv(block), upper=True)) for block in blocks]
    )


@pytest.mark.parametrize("name", [*NAMES, "int8"])
def test_descent_lowers_the_loss_of_every_row_and_settles(name):
    weight, scale, hessian, codes, q = descent_problem(name)
    half = 0.0 if name == "int8" else 0.5

    def loss() -> torch.Tensor:
        error = (weight - (q + half) * scale[:, None]).double()
        return (error @ hessian * error).sum(dim=1)

    def descend() -> None:
        gradient = ((weight - (q + half) * scale[:, None]).double() @ hessian).float()
        quantizer_ops.descend_block(
            weight, codes, q, gradient, hessian.float(), hessian_metrics(hessian), name, scale
        )

    losses = [loss()]
    for _ in range(20):
        descend()
        losses.append(loss())
        assert (losses[-1] <= losses[-2] * (1 + 1e-4)).all()
        assert torch.equal(quantizer_ops.decode_codes(codes, name), q)
    assert losses[-1].sum() < 0.97 * losses[0].sum()
    before = q.clone()
    descend()
    assert torch.equal(q, before)


def test_descent_changes_a_group_to_what_is_best_given_the_others():
    """With one group the choice is that of the search for the target itself."""
    factor = correlated_factor(8, 7)
    hessian = torch.linalg.inv(factor.T @ factor).contiguous()
    targets = targets_of("pvq4", 50)
    expected, _ = search(targets, factor, "pvq4")
    codes, q = quantizer_ops.quantize_rows(targets.float().contiguous(), "pvq4", torch.ones(50))
    gradient = ((targets - q - 0.5) @ hessian).float().contiguous()
    quantizer_ops.descend_block(
        targets.float().contiguous(),
        codes,
        q,
        gradient,
        hessian.float(),
        hessian_metrics(hessian),
        "pvq4",
        torch.ones(50),
    )
    assert (expected == q + 0.5).all(dim=1).float().mean() >= 0.95


HASH = """
import hashlib, torch
from pvq_vllm import quantizer_ops
torch.manual_seed(0)
digest = hashlib.sha256()
for name in ("pvq2", "pvq3", "pvq4", "int8"):
    weight, factor = torch.randn(45, 64), torch.randn(64, 64).triu() * 0.2 + torch.eye(64)
    u = factor.view(8, 8, 8, 8)[torch.arange(8), :, torch.arange(8), :]
    inverse = torch.linalg.inv(u)
    metrics = torch.stack([u, inverse @ inverse.mT], dim=1).contiguous()
    scale = quantizer_ops.search_row_scale(weight, name)
    codes, q, error = quantizer_ops.feedback_block(weight, factor, metrics, name, scale)
    digest.update(codes.numpy().tobytes() + error.numpy().tobytes())
    gradient = torch.randn(45, 64)
    quantizer_ops.descend_block(weight, codes, q, gradient, factor @ factor.T, metrics, name, scale)
    digest.update(codes.numpy().tobytes())
print(digest.hexdigest())
"""


def test_every_instruction_set_and_thread_count_gives_the_same_codes():
    hashes = {}
    for isa, threads in (("portable", "1"), ("avx2", "2"), ("avx512", "1"), ("avx512", "3")):
        environment = {**os.environ, "PVQ_CPU_ISA": isa, "OMP_NUM_THREADS": threads}
        run = subprocess.run(
            [sys.executable, "-c", HASH], env=environment, capture_output=True, text=True, check=True
        )
        hashes[isa, threads] = run.stdout.strip()
    assert len(set(hashes.values())) == 1, hashes
