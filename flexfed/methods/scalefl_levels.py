"""ScaleFL's levels: how wide and how deep each is, as written, or searched for under budgets.

The paper searches a grid for pairs of width and depth that meet a given cost at each level; how, its page does not say.
The search here is ours: see `search`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flexfed.exits import depth_keys
from flexfed.networks import Factory
from flexfed.select import prefix_ratio
from flexfed.submodel import Submodel
from flexfed.units import Layout


class Level(NamedTuple):
    """How much of the network a level keeps: the share of every layer's units, and the number of exits."""

    width: float
    exits: int

    def holds(self, other: Level) -> bool:
        """Whether another level lies inside this one, and is not the same."""
        return self != other and other.width <= self.width and other.exits <= self.exits


def evenly_deep(num_levels: int, num_exits: int) -> tuple[int, ...]:
    """Exits kept at each level, largest first, from all of them evenly down: 4 levels of 4 exits keep 4, 3, 2, 1.

    Where exits are fewer than levels, there are as many levels as exits (ours).
    """
    num = min(num_levels, num_exits)
    return tuple(math.ceil(num_exits * (num - i) / num) for i in range(num))


def grid(num_widths: int, num_exits: int) -> tuple[Level, ...]:
    """Every pair of a width, a multiple of 1 / `num_widths`, and a number of exits; the widest and deepest first."""
    return tuple(Level(w / num_widths, exits) for w in range(num_widths, 0, -1) for exits in range(num_exits, 0, -1))


def search(costs: Mapping[Level, float], budgets: Sequence[float], nested: bool) -> tuple[Level, ...]:
    """For each budget the pair whose cost is the closest at or below it.

    With `nested` each level lies inside the one before, and the sum of what they leave unused of their budgets, each as
    a share of its budget, is the least that such levels can have. Of equal ones the deeper is taken.

    Args:
        costs: of each pair, as a share of the full network's.
        budgets: of each level, largest first.
        nested: whether smaller levels must lie inside larger ones.

    Raises:
        ValueError: nothing is as cheap as a budget, or no nested levels are; tells the least cost.
    """
    for budget in budgets:
        if not any(_within(cost, budget) for cost in costs.values()):
            least = min(costs.values())
            raise ValueError(f"no width and number of exits costs at most {budget:g}; the least of the grid, {least:g}")
    if not nested:
        return tuple(
            min(_fitting(costs, budget).items(), key=lambda found: (*found[1], found[0]))[0] for budget in budgets
        )
    return _nested(costs, budgets)


_Rank = tuple[float, int]
"""What is left unused, rounded so that equal costs are equal; minus the exits."""


def _within(cost: float, budget: float) -> bool:
    return cost <= budget + 1e-9


def _fitting(costs: Mapping[Level, float], budget: float) -> dict[Level, _Rank]:
    return {
        level: (round((budget - cost) / budget, 9), -level.exits)
        for level, cost in costs.items()
        if _within(cost, budget)
    }


def _nested(costs: Mapping[Level, float], budgets: Sequence[float]) -> tuple[Level, ...]:
    """The best chain, from the smallest level up: of each pair the best chain that begins with it."""
    chains: dict[Level, tuple[_Rank, tuple[Level, ...]]] = {}
    for i, budget in enumerate(reversed(budgets)):
        longer = {}
        for level, (unused, exits) in _fitting(costs, budget).items():
            inside = [chain for first, chain in chains.items() if level.holds(first)] if i else [((0.0, 0), ())]
            if inside:
                (rest, deeper), levels = min(inside)
                longer[level] = (round(unused + rest, 9), exits + deeper), (level, *levels)
        chains = longer
    if not chains:
        told = ", ".join(f"{budget:g}" for budget in budgets)
        raise ValueError(f"no levels of the grid, each inside the one before, cost at most {told}")
    return min(chains.values())[1]


def part_of_level(factory: Factory, layout: Layout, level: Level) -> Submodel:
    """What a level keeps: of every group the first units, rounded down; no tensor behind its last exit.

    Args:
        factory: of the network with its exits.
        layout: its numbering.
        level: exits are counted from 1.
    """
    depths = depth_keys(factory)
    keys = None if level.exits == len(depths) else depths[level.exits - 1]
    return Submodel(prefix_ratio(layout, level.width, "floor").units, keys)
