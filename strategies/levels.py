"""Methods whose devices train one of a few parts of the network: the largest that they hold, or by fixed shares."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from flexfed.cost import shares
from flexfed.devices import Device
from flexfed.jobs import Assignment
from flexfed.methods import METHODS
from flexfed.methods.heterofl import LEVELS, capacity_level, fixed_levels, parse_shares
from flexfed.submodel import Submodel
from strategies.base import SubmodelStrategy


class LevelStrategy(SubmodelStrategy):
    """Levels a, b, c, ..., the largest first.

    The method's configuration says who gets which: `assign` "capacity" = the largest level that a device holds, "fix" =
    `shares` of the clients keep one; and what a reply weighs: `weights`. A device that holds no level gets the smallest
    (ours), under `ratio-policy = "budget"` none.
    """

    _used: tuple[Mapping[int, Device], dict[str, Submodel]] | None = None  # by which devices, and the levels

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.parts and self.task.method.assign == "fix":  # both now: what cannot be is refused before round 1
            self._shares()

    @property
    @abstractmethod
    def parts(self) -> tuple[Submodel, ...]:
        """What each level holds, the largest first."""

    def is_narrow(self, device: Device, level: int) -> bool:
        """Whether a device can keep units as wide as a level's."""
        return True

    @cached_property
    def sizes(self) -> list[float]:
        """Parameters of each level, as a share of the network's."""
        return list(shares(self.task.layout, {LEVELS[i]: part for i, part in enumerate(self.parts)}).values())

    def _shares(self) -> tuple[int, ...]:
        try:
            return parse_shares(self.task.method.shares, len(self.parts))
        except ValueError as error:
            raise ValueError(f"{METHODS[self.settings.strategy].prefix}shares: {error}") from error

    @cached_property
    def _fixed(self) -> np.ndarray:
        return fixed_levels(self.federation.num_partitions, self._shares())

    def levels(self) -> dict[str, Submodel]:
        """The levels that devices train, smallest first, and always the largest."""
        devices = self.federation.devices
        if self._used is None or self._used[0] is not devices:
            states = [state for device in devices.values() for state in device.states()]
            used = {self.level_of(state) for state in states if self.can_train(state)} | {0}
            self._used = devices, {LEVELS[i]: self.parts[i] for i in sorted(used, reverse=True)}
        return self._used[1]

    def level_of(self, device: Device) -> int:
        """A device's level: by capacity or by fixed shares; less where memory or deadline do not allow it."""
        level = self._nominal_level(device)
        borne = (i for i in range(level, len(self.parts)) if self.budget.bears(device, self.parts[i]))
        return next(borne, len(self.parts) - 1)

    def _nominal_level(self, device: Device) -> int:
        if self.task.method.assign == "fix":
            return int(self._fixed[device.partition])
        level = capacity_level(device.capacity + 1e-9, self.sizes)
        narrow = (i for i in range(level, len(self.parts)) if self.is_narrow(device, i))
        return next(narrow, len(self.parts) - 1)

    def can_train(self, device: Device) -> bool:
        """Whether memory and deadline allow its level, and under a budget capacity and width do, too."""
        level = self.level_of(device)
        if self.settings.ratio_policy == "level":
            return self.budget.bears(device, self.parts[level])
        return self.budget.carries(device, self.parts[level]) and self.is_narrow(device, level)

    def part_of(self, device: Device, server_round: int) -> Assignment:
        """The part of its level."""
        level = self.level_of(device)
        return Assignment(self.parts[level], LEVELS[level])

    def level_for_evaluation(self, device: Device) -> str | None:
        """The level that it trains, or a smaller one that its memory allows to test."""
        if not self.can_train(device):
            return None
        smaller = range(self.level_of(device), len(self.parts))
        fitting = (LEVELS[i] for i in smaller if LEVELS[i] in self.levels() and self._tests(device, i))
        return next(fitting, None)

    def _tests(self, device: Device, level: int) -> bool:
        return self.budget.tests(device, self.parts[level])
