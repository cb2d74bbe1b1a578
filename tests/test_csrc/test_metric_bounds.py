# SPDX-License-Identifier: Apache-2.0
"""The search in a metric leaves out gains and pyramids that cannot be better than what it has (csrc/cpu/feedback_loops.h): it
must find what the search of csrc/metric_search.h, written out here, finds in all of them."""

import numpy as np
import pytest
import torch

from pvq_vllm import quantizer_ops
from pvq_vllm.codec.serving import SERVING

NAMES = list(SERVING)


class PlainSearch:
    """Nearest plane, pulses moved where that costs least, then single and double moves: one target, one gain of one pyramid."""

    def __init__(self, u: np.ndarray, base: int, step: int, pulses: int, refinement_bits: int) -> None:
        self.u, self.inverse = u, np.linalg.inv(u)
        self.m = self.inverse @ self.inverse.T
        self.base, self.step, self.last = base + 0.5, step, (127 - base) // step
        self.pulses, self.bits = pulses, refinement_bits

    def cost(self, target: np.ndarray) -> float:
        """Return what the codeword that is found costs; infinity where there is none."""
        x, cells = self._nearest_plane(target)
        while cells.sum() != self.pulses:
            way = 1 if cells.sum() < self.pulses else -1
            steps = self._to_cells(target, x, cells + way)
            costs = np.where(self._exists(cells + way), self._costs(target, x, steps), np.inf)
            i = costs.argmin()
            if costs[i] == np.inf:
                return np.inf
            x[i] += steps[i]
            cells[i] += way
        for _ in range(24):
            if not self._move(target, x, cells):
                break
        return self._total(target - x)

    def _total(self, error: np.ndarray) -> float:
        return error @ self.m @ error

    def _exists(self, cells: np.ndarray) -> np.ndarray:
        return (cells >= 0) & (cells <= self.last >> self.bits)

    def _nearest_plane(self, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, scaled, levels = np.zeros(8), np.zeros(8), np.zeros(8, dtype=int)
        for i in range(8):
            wanted = target[i] - scaled[:i] @ self.u[:i, i]
            levels[i] = min(max(int((abs(wanted) - self.base) / self.step + 0.5), 0), self.last)
            x[i] = np.copysign(self.base + self.step * levels[i], wanted)
            scaled[i] = (wanted - x[i]) / self.u[i, i]
        return x, levels >> self.bits

    def _wanted(self, target: np.ndarray, x: np.ndarray) -> np.ndarray:
        return x + (target - x) @ self.m / self.m.diagonal()

    def _to_cells(self, target: np.ndarray, x: np.ndarray, cells: np.ndarray) -> np.ndarray:
        """Return the steps from ``x`` to the values of ``cells`` that are nearest to where each coordinate would best lie."""
        wanted = self._wanted(target, x)
        magnitude = self.base + (cells << self.bits) * self.step
        if self.bits == 1:
            upper = (abs(wanted) > magnitude + self.step / 2) & (2 * cells < self.last)
            magnitude = magnitude + upper * self.step
        return np.where(wanted < 0, -magnitude, magnitude) - x

    def _costs(self, target: np.ndarray, x: np.ndarray, steps: np.ndarray) -> np.ndarray:
        return steps * (steps * self.m.diagonal() - 2 * (target - x) @ self.m)

    def _second(self, target: np.ndarray, x: np.ndarray, cells: np.ndarray, best: np.ndarray) -> np.ndarray:
        """Return, where ``x`` is already the best value of its cells, the second best, else the best."""
        low = self.base + (cells << self.bits) * self.step
        others = [-best]
        if self.bits == 1:
            half = np.copysign(np.where(abs(best) == low, low + self.step, low), best)
            sign = -np.copysign(low, best)
            wanted = self._wanted(target, x)
            flip = ((sign - wanted) ** 2 < (half - wanted) ** 2) | (2 * cells >= self.last)
            others = [np.where(flip, sign, half)]
        return np.where(x == best, others[0], best)

    def _move(self, target: np.ndarray, x: np.ndarray, cells: np.ndarray) -> bool:
        """Make the best single or double move, in place; return False if none helps."""
        down, up = (self._to_cells(target, x, cells + way) for way in (-1, 1))
        same = self._second(target, x, cells, self._to_cells(target, x, cells) + x) - x
        moves = [{i: (same[i], 0)} for i in range(8)]
        for i in range(8):
            for k in range(8):
                if i < k:
                    moves.append({i: (same[i], 0), k: (same[k], 0)})
                if i != k and cells[i] > 0 and cells[k] < self.last >> self.bits:
                    moves.append({i: (down[i], -1), k: (up[k], 1)})
        before, costs = self._total(target - x), []
        for move in moves:
            error = target - x
            for i, (step, _) in move.items():
                error[i] -= step
            costs.append(self._total(error))
        if min(costs) >= before * (1 - 1e-6):
            return False
        for i, (step, way) in moves[int(np.argmin(costs))].items():
            x[i] += step
            cells[i] += way
        return True


def factor_of(condition: float, seed: int) -> torch.Tensor:
    """U, float64 upper, of a metric with eigenvalues from 1 to ``condition`` in random directions."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))
    inverse = basis * torch.logspace(0, np.log10(condition), 8, dtype=torch.float64) @ basis.T
    return torch.linalg.cholesky(inverse, upper=True)


def search(targets: torch.Tensor, factor: torch.Tensor, name: str) -> torch.Tensor:
    """Return q for single groups, int8 [rows, 8]."""
    inverse = torch.linalg.inv(factor)
    metrics = torch.stack([factor, inverse @ inverse.T])[None].float().contiguous()
    scale = torch.ones(len(targets))
    _, q, _ = quantizer_ops.feedback_block(
        targets.float().contiguous(), factor.float().contiguous(), metrics, name, scale
    )
    return q


def targets_of(name: str, rows: int) -> torch.Tensor:
    """Groups of Gaussian weights, some of them much smaller or larger than the codebook is made for."""
    generator = torch.Generator().manual_seed(0)
    size = SERVING[name].target_rms * 2.0 ** torch.randint(-2, 3, (rows, 1), generator=generator)
    return torch.randn(rows, 8, generator=generator, dtype=torch.float64) * size


@pytest.mark.parametrize("condition", [1.0, 4.0, 100.0])
@pytest.mark.parametrize("name", NAMES)
def test_no_gain_or_pyramid_that_could_be_better_is_left_out(name, condition):
    factor, targets, book = factor_of(condition, 1), targets_of(name, 24), SERVING[name]
    searches = [
        PlainSearch(factor.numpy(), base, step, pulses, book.refinement_bits)
        for pulses, gains in zip(book.pyramids, book.gains, strict=True)
        for base, step in gains
    ]
    expected = torch.tensor([min(one.cost(target) for one in searches) for target in targets.numpy()])
    error = (targets - search(targets, factor, name) - 0.5) @ torch.linalg.inv(factor)
    # of two moves that cost the same another may be made, hence not all
    agreeing = (error.square().sum(dim=1) / expected - 1).abs() < 1e-4
    assert agreeing.float().mean() >= 0.95


@pytest.mark.parametrize("name", NAMES)
def test_the_size_of_a_metric_changes_nothing(name):
    factor, targets = factor_of(4.0, 2), targets_of(name, 200)
    expected = search(targets, factor, name)
    for power in (-40, -10, 10, 40):  # of M by 2^-80 to 2^80
        assert torch.equal(search(targets, factor * 2.0**power, name), expected)


@pytest.mark.parametrize("name", NAMES)
def test_bounds_that_overflow_leave_nothing_out(name):
    targets = torch.full((1, 8), -5e18, dtype=torch.float64)  # costs 2e38, but |sum|^2 is 1.6e39
    assert (search(targets, torch.eye(8, dtype=torch.float64), name) < 0).all()
