"""ScaleFL's server: every device trains a level that it holds, so many exits deep and so wide."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cached_property
from typing import Any

from flexfed.cost import num_parameters
from flexfed.devices import Device
from flexfed.jobs import Assignment
from flexfed.methods.heterofl import LEVELS
from flexfed.methods.scalefl import gamma_in, levels_of
from flexfed.methods.scalefl_levels import Level, part_of_level
from flexfed.submodel import Submodel
from strategies.levels import LevelStrategy

log = logging.getLogger("flwr")


class ScaleFL(LevelStrategy):
    """Levels of one width and one depth each; see `flexfed.methods.scalefl`."""

    @cached_property
    def _pairs(self) -> tuple[Level, ...]:
        return levels_of(self.task)

    @cached_property
    def _parts(self) -> tuple[Submodel, ...]:
        return tuple(part_of_level(self.task.factory, self.task.layout, pair) for pair in self._pairs)

    @property
    def parts(self) -> tuple[Submodel, ...]:
        """What each level holds."""
        return self._parts

    def is_narrow(self, device: Device, level: int) -> bool:
        """Whether a device can keep units as wide as a level's."""
        return self._pairs[level].width <= device.width + 1e-9

    def summary(self) -> None:
        """Log what is about to run."""
        super().summary()
        told = (
            f"{LEVELS[i]}: width {pair.width:g}, {pair.exits} exits, {size:.1%} of the parameters"
            for i, (pair, size) in enumerate(zip(self._pairs, self.sizes, strict=True))
        )
        log.info("levels %s", "; ".join(told))

    def facts(self) -> dict[str, Any]:
        """What each level is, and costs."""
        return {"scalefl.levels": {LEVELS[i]: self._facts_of(i) for i in range(len(self.parts))}}

    def _facts_of(self, level: int) -> dict[str, float]:
        pair, part = self._pairs[level], self.parts[level]
        costs = {"parameters": num_parameters(self.task.layout, part), "macs": self.task.macs(part)}
        return {**pair._asdict(), **costs}

    def part_of(self, device: Device, server_round: int) -> Assignment:
        """The part of its level, and how much its exits learn from the last one in this round."""
        gamma = gamma_in(self.task.method, server_round, self.settings.num_server_rounds)
        return replace(super().part_of(device, server_round), config={"gamma": gamma})
