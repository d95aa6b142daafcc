"""DepthFL's server: levels of depth, the mean over those that hold a tensor, FedDyn's step behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord

from flexfed.checkpoint import State
from flexfed.devices import Device
from flexfed.exits import depth_keys
from flexfed.jobs import Assignment, Update
from flexfed.methods.depthfl import DepthFLConfig, depth_part, memory_beside, named, server_step, stated, trained_part
from flexfed.networks import build_on_meta
from flexfed.submodel import Submodel
from flexfed.units import Arrays
from strategies.holdings import Holdings
from strategies.levels import LevelStrategy
from strategies.testing import ClientTests


class DepthFL(LevelStrategy):
    """Depths by level, a the deepest; see `flexfed.methods.depthfl`.

    A capacity is a share of the parameters of the network with its classifiers; a `width` says nothing of depths.
    """

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

    @property
    def _config(self) -> DepthFLConfig:
        config: DepthFLConfig = self.task.method
        return config

    # Levels -----------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> tuple[Submodel, ...]:
        """Of every level, the deepest first."""
        return self._parts

    @cached_property
    def _parts(self) -> tuple[Submodel, ...]:
        return tuple(depth_part(self.task, depth) for depth in range(len(depth_keys(self.task.factory)), 0, -1))

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
