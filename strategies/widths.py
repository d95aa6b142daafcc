"""Methods that can give a device any width: by their own levels, or by a policy that knows no method."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property

from flexfed.devices import Device
from flexfed.jobs import Assignment
from flexfed.submodel import Submodel
from strategies.base import SubmodelStrategy


class WidthStrategy(SubmodelStrategy):
    """`ratio-policy` says how much of the network a device gets, the method which units those are."""

    @abstractmethod
    def part_at(self, ratio: float, server_round: int) -> Submodel:
        """The method's part of a ratio in (0, 1]; a larger ratio never costs less."""

    @abstractmethod
    def own_part(self, device: Device, server_round: int) -> Assignment:
        """What the method gives a device by its levels."""

    def sized_part(self, ratio: float, server_round: int) -> Assignment:
        """The job for a ratio that is no level's."""
        return Assignment(self.part_at(ratio, server_round), f"{ratio:g}", {"ratio": ratio})

    def part_of(self, device: Device, server_round: int) -> Assignment:
        """The method's own choice, or the largest part that the device's budget allows."""
        if self.settings.ratio_policy == "level":
            return self.own_part(device, server_round)
        ratio = self.ratio_of(device)
        if ratio is None:
            raise ValueError(f"partition {device.partition} ({device.kind}) cannot train even the smallest part")
        return self.sized_part(ratio, server_round)

    def can_train(self, device: Device) -> bool:
        """Under a budget, whether the device holds any part at all."""
        return self.settings.ratio_policy == "level" or self.ratio_of(device) is not None

    @cached_property
    def _ratios(self) -> dict[Device, float | None]:
        return {}

    def ratio_of(self, device: Device) -> float | None:
        """The largest ratio in the device's budget; parts cost the same in every round."""
        if device not in self._ratios:
            self._ratios[device] = self.budget.largest(device, lambda ratio: self.part_at(ratio, 1))
        return self._ratios[device]
