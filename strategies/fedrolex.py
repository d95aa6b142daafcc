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
        whole = full(self.task.layout)
        if self.policy is None:
            trains = self.can_train(device) and self.task.method.ratios[self.level_of(device)] == 1
        else:
            trains = self.budget.holds(device, whole)
        return "full" if trains and self.budget.tests(device, whole) else None
