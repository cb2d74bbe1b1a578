# SPDX-License-Identifier: Apache-2.0
"""The allocation of rates against every possible choice, and its behaviour over budgets."""

import itertools
import random

import pytest

from offline_quant import rate_allocation
from offline_quant.rate_allocation import allocate


def random_problem(seed: int, modules: int, rates: int) -> tuple[list[list[int]], list[list[float]]]:
    """Sizes are unequal, losses fall roughly as 4^-bits and do not always fall at all."""
    chance = random.Random(seed)
    costs, losses = [], []
    for _ in range(modules):
        size = chance.choice([3, 8, 40, 64])
        bits = sorted(chance.sample(range(1, 12), rates))
        costs.append([size * b + 16 for b in bits])
        losses.append([chance.uniform(0.5, 2) * size * 4.0**-b * chance.choice([1, 1, 1, 30]) for b in bits])
    return costs, losses


def total(table: list[list], choice: list[int] | tuple[int, ...]) -> float:
    return sum(row[index] for row, index in zip(table, choice, strict=True))


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_of_all(seed):
    costs, losses = random_problem(seed, modules=5, rates=4)
    low, high = sum(map(min, costs)), sum(map(max, costs))
    for share in (0, 0.1, 0.37, 0.5, 0.9, 1, 1.5):
        budget = int(low + share * (high - low))
        choice = allocate(costs, losses, budget)
        possible = [c for c in itertools.product(range(4), repeat=5) if total(costs, c) <= budget]
        assert total(costs, choice) <= budget
        assert total(losses, choice) == pytest.approx(min(total(losses, c) for c in possible), rel=1e-12)


def test_more_bits_never_make_it_worse_and_are_spent():
    costs, losses = random_problem(7, modules=60, rates=4)
    for loss in losses:
        loss.sort(reverse=True)
    low, high = sum(map(min, costs)), sum(map(max, costs))
    before = float("inf")
    for budget in range(low, high + 100, 13):
        choice = allocate(costs, losses, budget)
        assert total(losses, choice) <= before
        assert budget - total(costs, choice) <= 64 or budget > high  # a module of one more bit does not fit
        before = total(losses, choice)


def test_costs_without_a_common_unit_keep_the_budget_and_lose_little(monkeypatch):
    monkeypatch.setattr(rate_allocation, "MAX_STATES", 2000)
    chance = random.Random(1)
    costs = [[100_003 * b + chance.randrange(9973) for b in (2, 3, 4, 8)] for _ in range(6)]
    losses = [[chance.uniform(0.5, 2) * 4.0**-b for b in (2, 3, 4, 8)] for _ in range(6)]
    before = float("inf")
    for budget in range(sum(map(min, costs)), sum(map(max, costs)), 300_007):
        choice = allocate(costs, losses, budget)
        assert total(costs, choice) <= budget
        loss = total(losses, choice)
        assert loss <= before
        before = loss
        slack = 6 * (sum(map(max, costs)) - sum(map(min, costs))) // 2000
        if budget - slack >= sum(map(min, costs)):
            exact = min(
                total(losses, c)
                for c in itertools.product(range(4), repeat=6)
                if total(costs, c) <= budget - slack
            )
            assert loss <= exact + 1e-12


def test_a_budget_below_the_cheapest_rates_is_refused():
    assert allocate([[20, 30], [5, 9]], [[1, 0], [1, 0]], 24) is None
    assert allocate([[20, 30], [5, 9]], [[1, 0], [1, 0]], 25) == [0, 0]
    assert allocate([[20, 30], [5, 9]], [[1, 0], [1, 0.5]], 30) == [0, 1]
