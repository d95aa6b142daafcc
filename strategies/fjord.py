"""FjORD's server: HeteroFL's prefixes, each of which trains all smaller ones, too."""

from __future__ import annotations

from flexfed.cost import training_macs
from flexfed.submodel import Submodel, within
from strategies.heterofl import HeteroFL


class FjORD(HeteroFL):
    """Prefixes with ordered dropout; every width up to the largest that somebody holds is trained, and reported."""

    def _trained(self) -> set[int]:
        """All levels from the largest that a device holds to the smallest."""
        return set(range(min(super()._trained(), default=0), len(self._parts)))

    def macs_beside(self, submodel: Submodel) -> int:
        """The student's passes, forward and backward, were it always the widest; without distillation none."""
        if not self.task.method.self_distillation:
            return 0
        inside = (self.task.macs(part) for part in self._parts if part != submodel and within(part, submodel))
        return training_macs(max(inside, default=0), 1)
