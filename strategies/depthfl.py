"""DepthFL's server: levels of depth, the mean over those that hold a tensor, FedDyn's step behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord

from flexfed.checkpoint import State
from flexfed.cost import shares
from flexfed.devices import Device
from flexfed.exits import depth_keys
from flexfed.jobs import Assignment, Update
from flexfed.methods.depthfl import DepthFLConfig, depth_part, memory_beside, named, server_step, stated, trained_part
from flexfed.methods.heterofl import LEVELS, capacity_level, fixed_levels, parse_shares
from flexfed.networks import build_on_meta
from flexfed.submodel import Submodel
from flexfed.units import Arrays
from strategies.base import SubmodelStrategy
from strategies.holdings import Holdings
from strategies.testing import ClientTests


class DepthFL(SubmodelStrategy):
    """Depths by level, a the deepest; see `flexfed.methods.depthfl`.

    A capacity is a share of the parameters of the network with its classifiers; a `width` says nothing of depths. A
    device that holds no level gets the shallowest, under `ratio-policy = "budget"` none.
    """

    _levels: tuple[Mapping[int, Device], dict[str, Submodel]] | None = None  # whose they are, and the levels

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._memory: Arrays = {}  # h
        self._replies: Counter[Submodel] = Counter()  # of this round that count, by what they hold
        config = self._config
        if config.train == "deepest" and self.settings.personal != "none":
            raise ValueError(
                "depthfl.train='deepest' leaves classifiers untrained, which models of the clients' own would need: "
                "leave personal='none', or train all"
            )
        if config.assign == "fix":
            self._shares()  # refuses what cannot be, before round 1

    @property
    def _config(self) -> DepthFLConfig:
        config: DepthFLConfig = self.task.method
        return config

    # Levels -----------------------------------------------------------------------------------------------------

    @cached_property
    def _parts(self) -> tuple[Submodel, ...]:
        """Of every level, the deepest first."""
        return tuple(depth_part(self.task, depth) for depth in range(len(depth_keys(self.task.factory)), 0, -1))

    @cached_property
    def _sizes(self) -> list[float]:
        return list(shares(self.task.layout, {LEVELS[i]: part for i, part in enumerate(self._parts)}).values())

    def _shares(self) -> tuple[int, ...]:
        try:
            return parse_shares(self._config.shares, len(self._parts))
        except ValueError as error:
            raise ValueError(f"depthfl.shares: {error}") from error

    @cached_property
    def _fixed(self) -> np.ndarray:
        return fixed_levels(self.federation.num_partitions, self._shares())

    def levels(self) -> dict[str, Submodel]:
        """The levels that devices train, the shallowest first, and always the whole network."""
        devices = self.federation.devices
        if self._levels is None or self._levels[0] is not devices:
            states = [state for device in devices.values() for state in device.states() if self.can_train(state)]
            used = {self.level_of(state) for state in states} | {0}
            self._levels = devices, {LEVELS[i]: self._parts[i] for i in sorted(used, reverse=True)}
        return self._levels[1]

    def level_of(self, device: Device) -> int:
        """A device's level: by capacity or by fixed shares; less where it cannot bear that."""
        if self._config.assign == "fix":
            level = int(self._fixed[device.partition])
        else:
            level = capacity_level(device.capacity + 1e-9, self._sizes)
        borne = (i for i in range(level, len(self._parts)) if self.budget.bears(device, self._parts[i]))
        return next(borne, len(self._parts) - 1)

    def can_train(self, device: Device) -> bool:
        """Whether memory and deadline allow the shallowest level, and under a budget its capacity, too."""
        rule = self.budget.bears if self.settings.ratio_policy == "level" else self.budget.carries
        return rule(device, self._parts[-1])

    def part_of(self, device: Device, server_round: int) -> Assignment:
        """The part of the device's level."""
        level = self.level_of(device)
        return Assignment(self._parts[level], LEVELS[level])

    def level_for_evaluation(self, device: Device) -> str | None:
        """The level that it trains, or a shallower one that its memory allows to test."""
        if not self.can_train(device):
            return None
        depths = range(self.level_of(device), len(self._parts))
        levels = self.levels()
        return next((LEVELS[i] for i in depths if LEVELS[i] in levels and self._tests(device, i)), None)

    def _tests(self, device: Device, level: int) -> bool:
        return self.budget.tests(device, self._parts[level])

    def memory_beside(self, submodel: Submodel) -> int:
        """What FedDyn holds on the client."""
        return memory_beside(self.task, submodel)

    # Replies ----------------------------------------------------------------------------------------------------

    def assign(
        self, server_round: int, devices: Mapping[int, Device], rng: np.random.Generator
    ) -> Mapping[int, Assignment]:
        """A uniform cohort."""
        self._replies.clear()
        return super().assign(server_round, devices, rng)

    def check(self, assignment: Assignment, update: Update) -> None:
        """A reply holds every entry of the tensors that were trained: FedDyn counts replies by tensor.

        Raises:
            ValueError: it holds something else.
        """
        if update.submodel != trained_part(self.task, assignment.submodel):
            raise ValueError("it holds other tensors or units than it was asked to train")

    def weigh(self, update: Update) -> float:
        """Uniform, or by examples."""
        return 1.0 if self._config.weights == "uniform" else update.weight

    def observe(self, server_round: int, partition: int, update: Update) -> None:
        """Count who held what."""
        self._replies[update.submodel] += 1

    def finish(self, previous: Arrays, averaged: Arrays) -> Arrays:
        """FedDyn's step, of the parameters that somebody held."""
        if not self._config.feddyn_alpha:
            return averaged
        held = {n: sum(num for part, num in self._replies.items() if part.holds(n)) for n in self._parameters}
        everybody, alpha = self.federation.num_partitions, self._config.feddyn_alpha
        model, self._memory = server_step(previous, averaged, self._memory, held, everybody, alpha)
        return model

    @cached_property
    def _parameters(self) -> tuple[str, ...]:
        return tuple(name for name, _ in build_on_meta(self.task.factory).named_parameters())

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As usual; of a round with too few replies the clients keep nothing, as the server does not."""
        known, kept = Holdings.from_facts(self.holdings.facts()), self.tests.state_dict()
        found = super().aggregate_train(server_round, replies)
        if self.record.is_void:
            self.holdings, self.tests = known, ClientTests(self)
            self.tests.load_state_dict(kept)
        return found

    # The checkpoint ---------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """FedDyn's h."""
        return stated(self._memory)

    def load_state_dict(self, state: State) -> None:
        """Put it back."""
        self._memory = named(state)
