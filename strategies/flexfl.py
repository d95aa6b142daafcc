"""FlexFL's server: measure APoZ, build the pool, draw sizes first and then devices able to hold them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

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
)
from flexfed.methods.flexfl_pretraining import measure_scores
from flexfed.select import RatioGroup, prefix, ratio_groups, ratio_widths
from flexfed.submodel import Submodel, pack
from strategies.base import SubmodelStrategy

log = logging.getLogger("flwr")


class FlexFL(SubmodelStrategy):
    """Five nested levels; the device shrinks what it was sent; see `flexfed.methods.flexfl`."""

    _pool: dict[str, Submodel]
    _apoz: tuple[float, ...]

    def prepare(self) -> None:
        """Pre-train on proxy data for the APoZ scores (unless they are given), then cut the pool, once."""
        layout, method = self.task.layout, self.task.method
        groups = ratio_groups(layout, self.task.factory())
        apoz = given_scores(method.scores, groups) or measure_scores(self.task, self.server, self.settings.seed)
        scores = keep_scores(apoz, self._group_parameters(groups))
        pool = build_pool(scores, lambda r: self._share(groups, r), method, [g.name for g in groups])
        self._pool = {
            name: prefix(layout, ratio_widths(layout, groups, ratios.tolist()))
            for name, ratios in zip(LEVELS, pool, strict=True)
        }
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

    def _share(self, groups: tuple[RatioGroup, ...], ratios: np.ndarray) -> float:
        """Size of the network at given ratios; the classifier counts in neither part of the quotient."""
        cut = prefix(self.task.layout, ratio_widths(self.task.layout, groups, ratios.tolist()))
        return self._hidden_parameters(cut) / self._hidden_parameters(Submodel(np.ones_like(cut.units)))

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
        """Draw sizes, then devices nominally able to hold them."""
        method = self.task.method
        able = eligible({p: 100 * d.capacity for p, d in devices.items()}, method)
        draw = largest_first if method.dispatch == "largest-first" else redraw
        chosen = draw(able, self.cohort_size(len(devices)), rng)
        return {partition: self._assignment(level) for partition, level in chosen.items()}

    def _assignment(self, level: int) -> Assignment:
        """The level and the bits of all smaller ones: to shrink to, and to learn from."""
        names = LEVELS[: level + 1]
        bits: list[bytes] = [pack(self._pool[name])["units"] for name in names]
        return Assignment(self._pool[LEVELS[level]], LEVELS[level], {"levels": bits})

    def level_trained(self, assignment: Assignment, update: Update) -> str:
        """The level that was trained, by the units of the reply: never assume the one dispatched."""
        for name, submodel in self._pool.items():
            if submodel.key == update.submodel.key:
                return name
        raise ValueError("its units are those of no level")

    def level_for_evaluation(self, device: Device) -> str | None:
        """The main level that the device nominally holds; the smallest is for everybody."""
        capable = capable_level(100 * device.capacity, self.task.method)
        return LEVELS[max(i for i in MAIN_LEVELS if i <= capable)]
