"""FedAvg, and its two controls: `small` on every device, and `exclusive` among those that hold everything."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flexfed.devices import Device
from flexfed.jobs import Assignment
from flexfed.select import prefix_ratio
from flexfed.submodel import Submodel
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
        return {"small": prefix_ratio(self.task.layout, self.task.method.ratio)}

    def part_of(self, device: Device, server_round: int) -> Assignment:
        """The small model."""
        return Assignment(self.levels()["small"], "small")


class Exclusive(SubmodelStrategy):
    """FedAvg among the devices whose nominal capacity holds the whole model; a round may be empty."""

    def assign(
        self, server_round: int, devices: Mapping[int, Device], rng: np.random.Generator
    ) -> Mapping[int, Assignment]:
        """A cohort of the usual size, or as many as there are, from the devices that can."""
        able = sorted(partition for partition, device in devices.items() if device.capacity >= 1)
        cohort = sorted(rng.permutation(able)[: self.cohort_size(len(devices))].tolist())
        return {partition: self.part_of(devices[partition], server_round) for partition in cohort}
