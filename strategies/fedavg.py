"""FedAvg, and its two controls: `small` on every device, and `exclusive` among those that hold everything."""

from __future__ import annotations

from functools import cached_property

from flexfed.budget import STEPS
from flexfed.devices import Device
from flexfed.jobs import Assignment
from flexfed.select import prefix_ratio
from flexfed.submodel import Submodel, full
from strategies.base import SubmodelStrategy


class FedAvg(SubmodelStrategy):
    """Everybody trains everything: whatever share of the network its device calls its capacity, not beyond memory."""

    def whole(self) -> Submodel:
        """What everybody trains."""
        return next(iter(self.levels().values()))

    def can_train(self, device: Device) -> bool:
        """Whether memory and deadline allow it."""
        return self.budget.bears(device, self.whole())

    def level_for_evaluation(self, device: Device) -> str | None:
        """Every device tests what it trains."""
        able = self.can_train(device) and self.budget.tests(device, self.whole())
        return next(iter(self.levels())) if able else None


class Small(FedAvg):
    """Everybody trains the same small model; it is the model that the run reports."""

    def levels(self) -> dict[str, Submodel]:
        """The small model only: nothing larger was trained."""
        return {"small": prefix_ratio(self.task.layout, self._ratio)}

    @cached_property
    def _ratio(self) -> float:
        """The configuration's; under a budget the largest that all devices hold at their weakest, if they hold any."""
        if self.settings.ratio_policy == "level":
            return float(self.task.method.ratio)
        states = {state for device in self.federation.devices.values() for state in device.states()}
        largest = [ratio for ratio in map(self._largest, states) if ratio is not None]
        return min(largest, default=1 / STEPS)

    def _largest(self, device: Device) -> float | None:
        return self.budget.largest(device, lambda ratio: prefix_ratio(self.task.layout, ratio))

    def can_train(self, device: Device) -> bool:
        """Whether memory and deadline allow it, and under a budget its capacity, too."""
        rule = self.budget.bears if self.settings.ratio_policy == "level" else self.budget.holds
        return rule(device, self.whole())

    def part_of(self, device: Device, server_round: int) -> Assignment:
        """The small model."""
        return Assignment(self.whole(), "small")


class Exclusive(SubmodelStrategy):
    """FedAvg among the devices that nominally hold the whole model; a round may be empty."""

    def can_train(self, device: Device) -> bool:
        """Whether the device holds everything."""
        return self.budget.holds(device, full(self.task.layout))
