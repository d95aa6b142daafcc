"""FlexFL's server: measure APoZ, build the pool, draw sizes first and then devices able to hold them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from flexfed.checkpoint import State
from flexfed.cost import num_parameters, shares
from flexfed.devices import Device
from flexfed.importance import runs_inside
from flexfed.jobs import Assignment, Update
from flexfed.methods.flexfl import (
    LEVELS,
    MAIN_LEVELS,
    build_pool,
    capable_level,
    eligible,
    given_scores,
    keep_scores,
    largest_first,
    redraw,
    sized_ratios,
    teacher_levels,
)
from flexfed.methods.flexfl_pretraining import measure_scores
from flexfed.select import RatioGroup, prefix, ratio_groups, ratio_widths
from flexfed.submodel import Submodel, full, pack, within
from strategies.widths import WidthStrategy

log = logging.getLogger("flwr")
SHRINK_STEPS = 16
"""Under a budget a device that has less than it declared shrinks by sixteenths of the width, down to the next level."""


class FlexFL(WidthStrategy):
    """Five nested levels; the device shrinks what it was sent; see `flexfed.methods.flexfl`."""

    may_choose_units = True  # levels, which `level_trained` tells

    _pool: dict[str, Submodel]
    _apoz: tuple[float, ...]
    _scores: np.ndarray
    _parts: dict[float, Submodel]  # by ratio, under a budget

    def prepare(self, grid: Grid) -> None:
        """Pre-train on proxy data for the APoZ scores (unless they are given), then cut the pool, once."""
        given = given_scores(self.task.method.scores, self._groups)
        self._cut_pool(given or measure_scores(self.task, self.server, self.settings.seed))

    def state_dict(self) -> State:
        """The scores, from which the pool follows, and what the policy has learned."""
        return {**super().state_dict(), "apoz": list(self._apoz)}

    def load_state_dict(self, state: State) -> None:
        """Cut the same pool again."""
        super().load_state_dict(state)
        self._cut_pool(state["apoz"])

    def _cut_pool(self, apoz: Sequence[float] | np.ndarray) -> None:
        layout, groups = self.task.layout, self._groups
        self._scores = keep_scores(apoz, self._group_parameters(groups))
        pool = build_pool(self._scores, self._share, self.task.method, [g.name for g in groups])
        self._pool = {name: self._cut(ratios) for name, ratios in zip(LEVELS, pool, strict=True)}
        self._parts = {}
        self._apoz = tuple(float(a) for a in apoz)
        log.info("APoZ %s", " ".join(f"{g.name}:{a:.3f}" for g, a in zip(groups, apoz, strict=True)))
        log.info("pool %s", " ".join(f"{n}:{s:.3f}" for n, s in shares(layout, self._pool).items()))

    def facts(self) -> dict[str, Any]:
        """The scores, to pass as `flexfl.scores` another time, and each level's parameters."""
        parameters = {name: num_parameters(self.task.layout, level) for name, level in self._pool.items()}
        return {"flexfl.scores": ", ".join(map(repr, self._apoz)), "level-parameters": parameters}

    def _group_parameters(self, groups: tuple[RatioGroup, ...]) -> list[int]:
        """P_i: parameters of the tensors in each group's modules."""
        shapes = self.task.layout.shapes
        return [
            sum(int(np.prod(shape)) for name, shape in shapes.items() if runs_inside(name, group.modules))
            for group in groups
        ]

    @cached_property
    def _groups(self) -> tuple[RatioGroup, ...]:
        return ratio_groups(self.task.layout, self.task.factory())

    def _cut(self, ratios: np.ndarray) -> Submodel:
        return prefix(self.task.layout, ratio_widths(self.task.layout, self._groups, ratios.tolist()))

    def _share(self, ratios: np.ndarray) -> float:
        """Size of the network at given ratios; the classifier counts in neither part of the quotient."""
        return self._hidden_parameters(self._cut(ratios)) / self._all_hidden

    @cached_property
    def _all_hidden(self) -> int:
        return self._hidden_parameters(full(self.task.layout))

    def _hidden_parameters(self, submodel: Submodel) -> int:
        layout = self.task.layout
        hidden = frozenset(name for name in layout.shapes if not layout.fixed.intersection(layout.groups_of(name)))
        return num_parameters(layout, Submodel(submodel.units, hidden))

    def levels(self) -> dict[str, Submodel]:
        """The pool, smallest first."""
        return self._pool

    def headline(self) -> tuple[str, ...]:
        """The paper's average is over the levels that are dispatched."""
        return tuple(LEVELS[i] for i in MAIN_LEVELS)

    def assign(
        self, server_round: int, devices: Mapping[int, Device], rng: np.random.Generator
    ) -> Mapping[int, Assignment]:
        """Draw sizes, then devices nominally able to hold them; under a budget every device of a cohort has its own."""
        if self.policy is not None:
            return super().assign(server_round, devices, rng)
        method = self.task.method
        able = eligible({p: 100 * d.capacity for p, d in devices.items()}, method)
        able = {
            level: [p for p in able[level] if self.budget.bears(devices[p], self._pool[LEVELS[level]])]
            for level in able
        }
        draw = largest_first if method.dispatch == "largest-first" else redraw
        chosen = draw(able, self.cohort_size(len(devices)), rng)
        jobs = {level: self._assignment(level) for level in set(chosen.values())}
        return {partition: jobs[level] for partition, level in chosen.items()}

    def _assignment(self, level: int) -> Assignment:
        """The level, and what the device needs to shrink to all smaller ones and to learn from them."""
        held = LEVELS[: level + 1]
        targets = [100 * target for target in self.task.method.level_targets]
        return self._job([self._pool[name] for name in held], targets[: level + 1], LEVELS[level], level + 1)

    def _job(self, nested: Sequence[Submodel], sizes: list[float], level: str, num_levels: int) -> Assignment:
        """Train the last of nested parts: bits of all, and how much of the network each asks for, in percent."""
        bits: list[bytes] = [pack(part)["units"] for part in nested]
        return Assignment(nested[-1], level, {"levels": bits, "sizes": sizes, "num-levels": num_levels})

    def can_train(self, device: Device) -> bool:
        """Whether memory and deadline allow the smallest level, which the paper gives to everybody."""
        if self.policy is None:
            return self.budget.bears(device, self._pool[LEVELS[0]])
        return super().can_train(device)

    def own_part(self, device: Device, server_round: int) -> Assignment:
        """The largest level that the device nominally holds; `assign` draws sizes first, and does not ask."""
        return self._assignment(self._capable(device))

    def part_at(self, ratio: float, server_round: int) -> Submodel:
        """As wide as the scores say, and at most as large as a network that keeps `ratio` of every group."""
        if ratio not in self._parts:
            target = self._share(np.full(len(self._groups), ratio))
            names = [group.name for group in self._groups]
            self._parts[ratio] = self._cut(sized_ratios(self._scores, target, self._share, names))
        return self._parts[ratio]

    def sized_part(self, ratio: float, device: Device, server_round: int) -> Assignment:
        """Any size; to shrink to, parts a few steps smaller, and the levels inside it."""
        part = self.part_at(ratio, server_round)
        inside = self._levels_inside(part)
        if inside and inside[-1] == part:
            return self._assignment(len(inside) - 1)
        steps = [ratio - k / SHRINK_STEPS for k in range(SHRINK_STEPS)]
        smaller = [self.part_at(step, server_round) for step in reversed(steps) if step > 0]
        between = [p for p in smaller if p != part and all(within(level, p) and level != p for level in inside)]
        nested = [*inside, *dict.fromkeys(between), part]
        targets = [100 * target for target in self.task.method.level_targets]
        sizes = [*targets[: len(inside)], *(100 * self.budget.share(p) for p in nested[len(inside) :])]
        return self._job(nested, sizes, f"{ratio:g}", len(inside))

    def _levels_inside(self, part: Submodel) -> list[Submodel]:
        return [level for level in self._pool.values() if within(level, part)]

    def macs_beside(self, submodel: Submodel) -> int:
        """The teachers' forward passes."""
        if not self.task.method.kd_weight:
            return 0
        teachers = [level for level in self._levels_inside(submodel) if level != submodel]
        return sum(self.task.macs(teachers[j]) for j in teacher_levels(len(teachers), self.task.method))

    def level_trained(self, assignment: Assignment, update: Update) -> str:
        """The level that was trained, by the units of the reply: never assume the one dispatched.

        Raises:
            ValueError: they are those of no level.
        """
        for name, submodel in self._pool.items():
            if submodel.key == update.submodel.key:
                return name
        for ratio, part in self._parts.items():
            if part.key == update.submodel.key:
                return f"{ratio:g}"
        raise ValueError("its units are those of no level")

    def level_for_evaluation(self, device: Device) -> str | None:
        """The main level that the device nominally holds, the smallest for everybody; what memory and time allow."""
        if self.policy is not None:
            return super().level_for_evaluation(device)
        main = [self._pool[LEVELS[i]] for i in MAIN_LEVELS if i <= self._capable(device)]
        fitting = [part for part in main if self.budget.bears(device, part) and self.budget.tests(device, part)]
        return LEVELS[list(self._pool.values()).index(fitting[-1])] if fitting else None

    def _capable(self, device: Device) -> int:
        level = capable_level(100 * device.capacity, self.task.method)
        return next((i for i in range(level, 0, -1) if self.budget.bears(device, self._pool[LEVELS[i]])), 0)
