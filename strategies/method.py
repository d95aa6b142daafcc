"""What a method says of itself; the rounds ask for it (`strategies.base`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from flwr.serverapp import Grid

from flexfed.batchnorm import Statistics
from flexfed.budget import Budget
from flexfed.checkpoint import State
from flexfed.codecs import PLAIN, through
from flexfed.devices import Device
from flexfed.evaluation import part_statistics
from flexfed.jobs import Assignment, Task, Update
from flexfed.methods import METHODS
from flexfed.submodel import Submodel, extract, full
from flexfed.units import Arrays
from strategies.federated import FederatedStrategy


class MethodStrategy(FederatedStrategy):
    """The questions that a method answers, with FedAvg's answers. A method overrides a few of them.

    Attributes:
        per: what an entry's mean divides by: the weight that covers it, or that of all replies.
        may_choose_units: clients may train fewer units than they were sent; the method checks which.
        task: the network and how it is trained.
        budget: what devices can carry.
    """

    per: Literal["coverage", "total"] = "coverage"
    may_choose_units: bool = False
    task: Task
    budget: Budget

    def levels(self) -> dict[str, Submodel]:
        """The submodels that are evaluated, by name; the last one is what `accuracy` reports."""
        return {"full": full(self.task.layout)}

    def level_codec(self, name: str) -> str:
        """How the numbers of an evaluated level are kept on a device that uses it: what is tested is that."""
        return PLAIN

    def tested_codec(self, name: str) -> str:
        """How an evaluated level travels to the devices that test it: as they would use it, else as the run says."""
        own = self.level_codec(name)
        return self.settings.codec if own == PLAIN else own

    def deployed(self, name: str, arrays: Arrays) -> Arrays:
        """The tensors of an evaluated level, as a device would use them."""
        level = self.levels()[name]
        return through(self.level_codec(name), self.task.layout, level, self.as_used(level, arrays))

    def as_used(self, submodel: Submodel, arrays: Arrays) -> Arrays:
        """A part of the model, as the network that a device uses."""
        part = extract(self.task.layout, submodel, arrays)
        return METHODS[self.settings.strategy].as_used(self.task, submodel, part)

    def headline(self) -> tuple[str, ...]:
        """The levels whose mean is `accuracy-levels`."""
        return tuple(self.levels())

    def prepare(self, grid: Grid) -> None:
        """Before round 1, once every device is known: pre-training, exploration (`strategies.preparation`)."""

    def assign(
        self, server_round: int, devices: Mapping[int, Device], rng: np.random.Generator
    ) -> Mapping[int, Assignment]:
        """Who trains what: all devices in, the cohort out. Here a uniform cohort of those that `can_train`."""
        able = sorted(partition for partition, device in devices.items() if self.can_train(device))
        cohort = sorted(rng.permutation(able)[: self.cohort_size(len(devices))].tolist())
        parts: dict[Submodel, Submodel] = {}  # equal ones as one object: they are few, and devices may be many
        assigned = {}
        for partition in cohort:
            found = self.part_of(devices[partition], server_round)
            assigned[partition] = replace(found, submodel=parts.setdefault(found.submodel, found.submodel))
        return assigned

    def can_train(self, device: Device) -> bool:
        """Whether a device may be in a cohort."""
        return True

    def part_of(self, device: Device, server_round: int) -> Assignment:
        """What a device of the cohort trains."""
        return Assignment(full(self.task.layout), "full")

    def largest_part(self, device: Device, server_round: int) -> Assignment | None:
        """The most that a device can train in a round; None = nothing."""
        return self.part_of(device, server_round) if self.can_train(device) else None

    @property
    def asks_to_tell(self) -> frozenset[str]:
        """What a reply may tell beside its numbers (`Update.told`)."""
        return frozenset()

    def weigh(self, update: Update) -> float:
        """A reply's weight in the mean: its number of examples, or one where the method's key `weights` says so."""
        return 1.0 if getattr(self.task.method, "weights", "examples") == "uniform" else update.weight

    def counted(self, update: Update) -> tuple[Submodel, np.ndarray]:
        """What of a reply the mean counts, and its differences, float32 and flat in wire order: all of it."""
        return update.submodel, update.difference

    def level_trained(self, assignment: Assignment, update: Update) -> str:
        """Name of the level that a reply holds; here what was sent."""
        return assignment.level

    def macs_beside(self, submodel: Submodel) -> int:
        """Multiply-accumulates a sample beside training a part itself, for the round's deadline."""
        return 0

    def memory_beside(self, submodel: Submodel) -> int:
        """Bytes that must be free on a device beside training a part itself."""
        return 0

    def bytes_beside(self) -> int:
        """Bytes that a job carries besides its part, at most, for memory and the round's deadline."""
        return 0

    def download_of(self, submodel: Submodel) -> Submodel:
        """What a device is sent that is to train a part: the part, unless it cuts that out itself."""
        return submodel

    def level_for_evaluation(self, device: Device) -> str | None:
        """The evaluated level that a device tests: the largest it can hold and test; None if there is none."""
        levels = self.levels()
        fitting = [
            n for n, level in levels.items() if self.budget.holds(device, level) and self.budget.tests(device, level)
        ]
        return max(fitting, key=lambda name: self.budget.share(levels[name]), default=None)

    def check(self, assignment: Assignment, update: Update) -> None:
        """Refuse a reply, before any of it counts, that the method could not learn from. Nothing may raise later.

        Raises:
            ValueError: says why.
        """
        held, sent = update.submodel, assignment.submodel
        if held.keys != sent.keys or held.masks_key != sent.masks_key:
            raise ValueError("it leaves out whole tensors, or single entries")
        if not self.may_choose_units and (held.cut != sent.cut or self._leaves_out_units(sent, held)):
            raise ValueError("it leaves out units that it was asked to train")

    def _leaves_out_units(self, sent: Submodel, held: Submodel) -> bool:
        """Outputs may be missing: of labels that a client does not hold."""
        missing = sent.units & ~held.units & ~self.task.layout.fixed_units
        return bool(missing.any())

    def observe(self, server_round: int, partition: int, update: Update) -> None:
        """Learn from an accepted reply (bandits, votes, masks)."""

    def can_hold(self, device: Device, own: Submodel, server_round: int) -> bool:
        """Whether a device may test, in this round, the part that it trained last: none larger than it would get."""
        largest = self.largest_part(device, server_round)
        fits = largest is not None and self.budget.share(own) <= self.budget.share(largest.submodel) + 1e-9
        return fits and self.budget.tests(device, own)

    def kept_units(self, update: Update) -> np.ndarray:
        """Units of the part that the client trained, outputs included that its reply left out: its own model."""
        units: np.ndarray = update.submodel.units | self.task.layout.fixed_units
        return units

    def finish(self, previous: Arrays, averaged: Arrays) -> Arrays:
        """The server's own step after the mean."""
        return averaged

    def level_statistics(self, server_round: int, arrays: Arrays, grid: Grid) -> dict[str, Statistics | None]:
        """Batch-norm statistics of every evaluated level; None = those of the test batch."""
        if self.settings.batch_norm == "batch":
            return dict.fromkeys(self.levels())
        return {
            name: part_statistics(self.task, self.deployed(name, arrays), self.server.proxy) for name in self.levels()
        }

    def state_dict(self) -> State:
        """What a method has learned beside the model: arrays, and values that JSON holds exactly."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Undo `state_dict`; takes the place of `prepare` when a run goes on."""

    def round_facts(self) -> dict[str, float]:
        """Numbers of this round that only this method has, for its line."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What a method wants to leave in summary.json besides."""
        return {}
