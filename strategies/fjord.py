"""FjORD's server: HeteroFL's prefixes, each of which trains all smaller ones, too."""

from __future__ import annotations

from flexfed.cost import training_macs
from flexfed.methods import fjord
from flexfed.submodel import Submodel
from strategies.heterofl import HeteroFL


class FjORD(HeteroFL):
    """Prefixes with ordered dropout; every width up to the largest that somebody holds is trained, and reported."""

    def _trained(self) -> set[int]:
        """All levels from the largest that a device holds to the smallest."""
        return set(range(min(super()._trained(), default=0), len(self._parts)))

    def macs_beside(self, submodel: Submodel) -> int:
        """The student's passes, forward and backward, were it always the widest; without distillation none."""
        student = fjord.widest_student(self.task, submodel)
        return 0 if student is None else training_macs(self.task.macs(student), 1)

    def memory_beside(self, submodel: Submodel) -> int:
        """What the student's pass takes."""
        return fjord.memory_beside(self.task, submodel)
