# SPDX-License-Identifier: Apache-2.0
"""Choose a rate for every module so that the sum of their losses is least under a budget of bits.

A multiple-choice knapsack, solved exactly by dynamic programming over the bits spent: with L_m(s) the least
loss of the first m modules in s units of bits above their cheapest rates,

    L_m(s) = min over rates r of L_(m-1)(s - cost_m(r)) + loss_m(r)

The unit is the greatest common divisor of all differences of costs. Where that would make more than
``MAX_STATES`` states (canonical rates beside rates of whole bits), a larger unit is taken and costs are
rounded up to it: the budget is kept, and less than 1 / MAX_STATES of the range is lost for each module.
"""

import math
from collections.abc import Sequence

import numpy as np

MAX_STATES = 1 << 17


def allocate(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int
) -> list[int] | None:
    """Return for each module the number of its rate.

    Args:
        costs: of each module the bits that each of its rates takes.
        losses: of each module the loss of each of its rates, finite.
        budget: bits that all modules together may take.
    Returns:
        The choice with the least sum of losses; of equals the cheaper one. None if even the cheapest rates
        take more than the budget. A greater budget never gives a greater loss.
    """
    floor = [min(module) for module in costs]
    spare = budget - sum(floor)
    if spare < 0:
        return None
    above = [[cost - low for cost in module] for module, low in zip(costs, floor, strict=True)]
    whole_range = sum(max(module) for module in above)
    unit = max(1, math.gcd(*(cost for module in above for cost in module)), -(-whole_range // MAX_STATES))
    units = [[-(-cost // unit) for cost in module] for module in above]
    states = min(spare // unit, sum(max(module) for module in units)) + 1

    best = np.zeros(states)
    choices = np.empty((len(costs), states), dtype=np.uint8)
    for module, (steps, loss) in enumerate(zip(units, losses, strict=True)):
        trials = np.full((len(steps), states), np.inf)
        for rate, (step, value) in enumerate(zip(steps, loss, strict=True)):
            if step < states:
                trials[rate, step:] = best[: states - step] + value
        choices[module] = trials.argmin(axis=0)
        best = trials.min(axis=0)
    state = int(best.argmin())
    result = [0] * len(costs)
    for module in reversed(range(len(costs))):
        result[module] = int(choices[module, state])
        state -= units[module][result[module]]
    return result
