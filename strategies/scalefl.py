"""ScaleFL's server: every device trains a level, a width and a number of exits, that it holds."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from flexfed.cost import num_parameters, shares
from flexfed.devices import Device
from flexfed.jobs import Assignment, Update
from flexfed.methods.heterofl import LEVELS, capacity_level, fixed_levels
from flexfed.methods.scalefl import distills, levels_of
from flexfed.methods.scalefl_levels import part_of_level
from flexfed.submodel import Submodel
from strategies.base import SubmodelStrategy

log = logging.getLogger("flwr")


class ScaleFL(SubmodelStrategy):
    """Levels of one width and one depth each; see `flexfed.methods.scalefl`."""

    _tested: tuple[Mapping[int, Device], dict[str, Submodel]] | None = None  # whose they are, and the levels

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._levels = levels_of(self.task)  # now: what cannot be is refused before anything runs
        task = self.task
        self._parts = tuple(part_of_level(task.factory, task.layout, level) for level in self._levels)
        self._sizes = list(shares(task.layout, dict(zip(LEVELS, self._parts, strict=False))).values())
        if task.method.assign == "fix":
            task.method.parts_of_shares(len(self._parts))

    def summary(self) -> None:
        """Log what is about to run."""
        super().summary()
        told = (
            f"{name}: width {level.width:g}, {level.exits} exits, {size:.1%} of the parameters"
            for name, level, size in zip(LEVELS, self._levels, self._sizes, strict=False)
        )
        log.info("levels %s", "; ".join(told))

    def facts(self) -> dict[str, Any]:
        """What each level is, and costs."""
        found = zip(LEVELS, self._levels, self._parts, strict=False)
        return {
            "scalefl.levels": {
                name: {
                    "width": level.width,
                    "exits": level.exits,
                    "parameters": num_parameters(self.task.layout, part),
                    "macs": self.task.macs(part),
                }
                for name, level, part in found
            }
        }

    def levels(self) -> dict[str, Submodel]:
        """The levels that devices train, smallest first, and always the largest."""
        devices = self.federation.devices
        if self._tested is None or self._tested[0] is not devices:
            states = [state for device in devices.values() for state in device.states()]
            used = sorted({self.level_of(state) for state in states if self.can_train(state)} | {0}, reverse=True)
            self._tested = devices, {LEVELS[i]: self._parts[i] for i in used}
        return self._tested[1]

    def level_of(self, device: Device) -> int:
        """A device's level: by capacity or by fixed shares; less where memory or deadline do not allow it."""
        level = self._nominal_level(device)
        borne = (i for i in range(level, len(self._parts)) if self.budget.bears(device, self._parts[i]))
        return next(borne, len(self._parts) - 1)

    def _nominal_level(self, device: Device) -> int:
        if self.task.method.assign == "fix":
            return int(self._fixed[device.partition])
        narrow = (i for i, level in enumerate(self._levels) if level.width <= device.width + 1e-9)
        return max(capacity_level(device.capacity, self._sizes), next(narrow, len(self._levels) - 1))

    @cached_property
    def _fixed(self) -> np.ndarray:
        parts = self.task.method.parts_of_shares(len(self._parts))
        return fixed_levels(self.federation.num_partitions, parts)

    def can_train(self, device: Device) -> bool:
        """Whether memory and deadline allow the smallest level, which everybody gets who holds no other (ours)."""
        return self.budget.bears(device, self._parts[self.level_of(device)])

    def part_of(self, device: Device, server_round: int) -> Assignment:
        """The part of its level, and how much its exits learn from the last one in this round."""
        level, method = self.level_of(device), self.task.method
        gamma = method.gamma if distills(method, server_round, self.settings.num_server_rounds) else 0.0
        return Assignment(self._parts[level], LEVELS[level], {"gamma": gamma})

    def level_for_evaluation(self, device: Device) -> str | None:
        """The level that it trains, or a smaller one that its memory allows to test."""
        if not self.can_train(device):
            return None
        smaller = range(self.level_of(device), len(self._parts))
        fitting = (LEVELS[i] for i in smaller if LEVELS[i] in self.levels() and self._tests(device, i))
        return next(fitting, None)

    def _tests(self, device: Device, level: int) -> bool:
        return self.budget.tests(device, self._parts[level])

    def weigh(self, update: Update) -> float:
        """Uniform, or by examples."""
        return 1.0 if self.task.method.weights == "uniform" else update.weight
