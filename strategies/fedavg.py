"""FedAvg, and its two controls: `small` on every device, and `exclusive` among those that hold everything."""

from __future__ import annotations

from functools import cached_property

from flexfed.devices import Device
from flexfed.jobs import Assignment
from flexfed.select import prefix_ratio
from flexfed.submodel import Submodel, full
from strategies.base import SubmodelStrategy


class FedAvg(SubmodelStrategy):
    """Everybody trains everything, whatever its device can hold."""

    def level_for_evaluation(self, device: Device) -> str | None:
        """Every device tests what it trains."""
        return next(iter(self.levels()))


class Small(FedAvg):
    """Everybody trains the same small model; it is the model that the run reports."""

    def levels(self) -> dict[str, Submodel]:
        """The small model only: nothing larger was trained."""
        return {"small": prefix_ratio(self.task.layout, self._ratio)}

    @cached_property
    def _ratio(self) -> float:
        """The one of the configuration; under a budget the largest that every device holds that holds any."""
        if self.settings.ratio_policy == "level":
            return float(self.task.method.ratio)
        largest = [ratio for ratio in map(self._largest, self.federation.devices.values()) if ratio is not None]
        if not largest:
            raise ValueError("no device can train even the smallest part; see memory-bytes and round-deadline")
        return min(largest)

    def _largest(self, device: Device) -> float | None:
        return self.budget.largest(device, lambda ratio: prefix_ratio(self.task.layout, ratio))

    def can_train(self, device: Device) -> bool:
        """Under a budget, whether the device holds the small model."""
        return self.settings.ratio_policy == "level" or self.budget.holds(device, self.levels()["small"])

    def part_of(self, device: Device, server_round: int) -> Assignment:
        """The small model."""
        return Assignment(self.levels()["small"], "small")


class Exclusive(SubmodelStrategy):
    """FedAvg among the devices that nominally hold the whole model; a round may be empty."""

    def can_train(self, device: Device) -> bool:
        """Whether the device holds everything."""
        return self.budget.holds(device, full(self.task.layout))
