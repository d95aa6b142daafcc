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

    def submodel(self, level: int, server_round: int) -> Submodel:
        """This round's window."""
        method = self.task.method
        return rolling(self.task.layout, method.ratios[level], server_round, method.direction)

    def level_for_evaluation(self, device: Device) -> str | None:
        """Devices whose level is the full network test it; no smaller model exists."""
        return "full" if self.task.method.ratios[self.level_of(device)] == 1 else None
