"""FedRolex's server: HeteroFL with a window that rolls on by one unit a round."""

from __future__ import annotations

from flexfed.devices import Device
from flexfed.methods.fedrolex import rolling
from flexfed.submodel import Submodel, full
from strategies.heterofl import HeteroFL


class FedRolex(HeteroFL):
    """Rolling windows; only the full model is reported: a prefix of a rolled network is nobody's model."""

    def levels(self) -> dict[str, Submodel]:
        """The full network."""
        return {"full": full(self.task.layout)}

    def part_at(self, ratio: float, server_round: int) -> Submodel:
        """This round's window."""
        return rolling(self.task.layout, ratio, server_round, self.task.method.direction)

    def level_for_evaluation(self, device: Device) -> str | None:
        """Devices that train the full network test it; no smaller model exists."""
        if self.settings.ratio_policy != "level":
            return "full" if self.budget.holds(device, full(self.task.layout)) else None
        return "full" if self.task.method.ratios[self.level_of(device)] == 1 else None
