"""The federated round that all methods share; the only place that drives one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from flexfed.averaging import Averager
from flexfed.batchnorm import Statistics
from flexfed.budget import Budget
from flexfed.checkpoint import Checkpoint, refuse_other_network
from flexfed.config import Experiment
from flexfed.cost import num_parameters
from flexfed.data import DatasetInfo, ServerData
from flexfed.evaluation import measure_levels, with_statistics
from flexfed.flower.limits import most_of_reply, refuse_large
from flexfed.flower.messages import (
    cause_of,
    encoded,
    from_record_of_arrays,
    job_content,
    num_bytes,
    read_update,
    to_record_of_arrays,
)
from flexfed.jobs import Assignment, Scalar, Task, Update, initial_arrays
from flexfed.methods import METHODS
from flexfed.soundness import check_parts
from flexfed.submodel import Submodel, extract, flatten, full, pack
from flexfed.units import Arrays, Layout
from strategies.federated import OnRound
from strategies.holdings import Holdings
from strategies.method import MethodStrategy
from strategies.preparation import Preparation
from strategies.record import RoundRecord
from strategies.testing import ClientTests

log = logging.getLogger("flwr")


Parts = dict[tuple[bytes, str], dict[str, Array]]
"""(key of a submodel, codec) -> its part for the wire."""

PARTS_KEPT = 8
"""Extracted parts held at a time: levels are few, and clients that have a part each would fill the memory."""

MOST_MACS = 1e18
"""A reply that claims more is not believed: a year's work of the fastest machines. Nor any other number beyond it."""


class SubmodelStrategy(MethodStrategy):
    """One method's server: the rounds, given what the method says (`strategies.method`).

    Args are those of `FederatedStrategy`; `task` is the network and how it is trained.
    """

    def __init__(
        self,
        experiment: Experiment,
        task: Task,
        server: ServerData,
        transform: Mapping[str, Scalar] | None = None,
        on_round: OnRound | None = None,
        resumed: Checkpoint | None = None,
        folder: Path | None = None,
    ):
        super().__init__(experiment, task, server, transform, on_round, resumed, folder)
        self.preparation = Preparation()
        codec, deadline = self.settings.codec, self.settings.round_deadline
        self.budget = Budget(
            task, deadline, self.macs_beside, self.download_of, codec, self.bytes_beside, self.memory_beside
        )
        self.tests = ClientTests(self)
        self._assigned: Mapping[int, Assignment] = {}
        self._replied: set[int] = set()  # whose reply of this round counts
        self._most_bytes: dict[tuple[bytes, str], int] = {}
        self._statistics: Mapping[str, Statistics | None] = {}
        self.holdings = Holdings()
        if resumed is not None:
            self._statistics = resumed.statistics
            self.holdings = Holdings.from_facts(resumed.facts)
            self.preparation = Preparation(**resumed.facts.get("preparation", {}))  # older runs have none

    @classmethod
    def set_up(cls, experiment: Experiment, info: DatasetInfo, stood: Checkpoint | None) -> tuple[Task, Arrays]:
        """The network, traced, and its first weights."""
        task = experiment.task(info.num_classes, info.input_shape)
        if stood is not None:
            refuse_other_network(stood, task.layout)
            return task, stood.arrays
        initial = initial_arrays(task, experiment.settings.weights, experiment.settings.seed)
        check_parts(task.factory, task.layout, initial, task.input_shape)  # a run that goes on was checked
        return task, initial

    # The round ------------------------------------------------------------------------------------------------

    def summary(self) -> None:
        """Log what is about to run."""
        layout, name = self.task.layout, self.settings.strategy
        size = num_parameters(layout, full(layout))
        log.info(
            "%s on %s: %s parameters, %s units in %s groups",
            name,
            self.settings.model,
            f"{size:,}",
            layout.num_units,
            len(layout.groups),
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterator[Message]:
        """Assign parts now; extract each distinct one once and make the messages one by one, as they are sent."""
        server_round += self._offset
        self._arrays = from_record_of_arrays(arrays)
        if not self._begun:
            self.meet(grid)
            self.begin(self._arrays, grid)
        self.record = RoundRecord(server_round, self.preparation if server_round == 1 else Preparation())
        rng = self.open_round(server_round)
        self._replied = set()
        assigned = sorted(self.assign(server_round, self.devices, rng).items())
        self._assigned = {partition: self.with_codecs(assignment) for partition, assignment in assigned}
        self.asked += len(self._assigned)
        self.record.dispatched = {p: a.level for p, a in self._assigned.items()}
        return self._jobs(server_round)

    def begin(self, arrays: Arrays, grid: Grid) -> None:
        """Prepare, once the devices are known; or take up what a run that goes on had prepared.

        Raises:
            ValueError: no device can train anything.
        """
        self._arrays, self._begun = arrays, True
        if self._resumed is None:
            self.devices = self.federation.devices
            self.prepare(grid)
        else:
            self.load_state_dict(self._resumed.state)
            self.tests.load_state_dict(self._resumed.state)
        self.devices = self.federation.devices
        left_out = [p for p, d in self.devices.items() if not any(map(self.can_train, d.states()))]
        if len(left_out) == len(self.devices):
            raise ValueError("no device can train anything; see capacity, memory-bytes and round-deadline")
        if left_out:
            log.info("%s of %s devices cannot train: partitions %s", len(left_out), len(self.devices), left_out)

    def checkpoint(self) -> Checkpoint:
        """All that is needed to go on after the last finished round."""
        return Checkpoint(
            server_round=self.record.server_round,
            arrays=self._arrays,
            levels={name: pack(level) for name, level in self.levels().items()},
            statistics=self._statistics,
            state={**self.state_dict(), **self.tests.state_dict()},
            facts={**self.run_facts(), "level-codecs": {name: self.level_codec(name) for name in self.levels()}},
        )

    def run_facts(self) -> dict[str, Any]:
        """What describes the run in its checkpoint."""
        return {**super().run_facts(), **self.holdings.facts(), "preparation": asdict(self.preparation)}

    def _jobs(self, server_round: int) -> Iterator[Message]:
        for partition, message in self.messages("train", server_round, self._assigned):
            self.record.bytes_down[partition] = num_bytes(message)
            yield message

    def messages(
        self, kind: str, server_round: int, assigned: Mapping[int, Assignment]
    ) -> Iterator[tuple[int, Message]]:
        """One job after the other, each distinct part made once."""
        parts: Parts = {}
        for partition, assignment in assigned.items():
            part, seed = self.part(parts, assignment), self.seed_of(server_round, partition)
            extra, masks = {**self.transform, **self.holdings.base_of(partition)}, self.holdings.masks_of(partition)
            content = job_content(part, assignment, seed, server_round, extra, masks)
            yield partition, self.federation.message(partition, content, kind, server_round)

    def read(self, reply: Message, asked: Assignment) -> Update:
        """A reply, believing no more of it than what was asked allows.

        Raises:
            ValueError: says what is wrong with it.
        """
        if reply.has_error():
            raise ValueError(cause_of(reply.error))
        key = asked.submodel.key, asked.reply_codec
        if key not in self._most_bytes:  # levels are few; where clients have a part each, none is asked for twice
            self._most_bytes = self._most_bytes if len(self._most_bytes) < PARTS_KEPT else {}
            self._most_bytes[key] = most_of_reply(self.task.layout, asked)
        refuse_large(reply, self._most_bytes[key])
        update = read_update(reply.content, self.task.layout, asked)
        refuse_unbelievable(update)
        if other := [name[:40] for name in update.told if name not in self.asks_to_tell]:
            raise ValueError(f"it tells {', '.join(other[:3])}, which it was not asked for")
        return update

    def with_codecs(self, assignment: Assignment) -> Assignment:
        """How its messages travel: as the method says, else as the run does."""
        codec = self.settings.codec
        return replace(assignment, codec=assignment.codec or codec, reply_codec=assignment.reply_codec or codec)

    def part(self, parts: Parts, assignment: Assignment, used: bool = False) -> dict[str, Array]:
        """A part of the global model for the wire, extracted and encoded once for all that need it.

        Args:
            parts: those of this round that were needed last: where every client has its own, no more may be held.
            assignment: which, and how it is to travel.
            used: as a device uses it, not as it trains it.
        """
        layout, submodel, codec = self.task.layout, assignment.submodel, assignment.codec or self.settings.codec
        key = (submodel.key, codec)
        if key not in parts:
            found = self.as_used(submodel, self._arrays) if used else extract(layout, submodel, self._arrays)
            parts[key] = encoded(codec, layout, submodel, flatten(layout, submodel, found))
        parts[key] = parts.pop(key)  # the last one needed is the last to go
        if len(parts) > PARTS_KEPT:
            del parts[next(iter(parts))]
        return parts[key]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold replies one at a time; those that fail or do not validate count as never sampled."""
        server_round += self._offset
        averager = Averager(self.task.layout, self._arrays, self.per, self.settings.max_update_norm)
        for reply in replies:
            partition = self.federation.partition_of(reply)
            if reply.has_error():
                self.note(self.record.failed, partition, cause_of(reply.error))
                self.holdings.note_failure(partition, cause_of(reply.error))
            else:
                try:
                    self._fold(averager, server_round, partition, reply)
                except ValueError as cause:
                    self.note(self.record.refused, partition, str(cause))
            del reply
        self.record.clipped = averager.num_clipped if self.settings.max_update_norm else None
        if averager.num_replies < self.settings.min_replies:
            self.record.is_void = bool(averager.num_replies)
            log.warning("round %s: %s; the model stays as it was", server_round, self._why_void(averager.num_replies))
            return None, None
        self.accepted += averager.num_replies
        self._arrays = self.finish(self._arrays, averager.result())
        return to_record_of_arrays(self._arrays), None

    def _why_void(self, num_replies: int) -> str:
        if num_replies:
            return f"{num_replies} valid replies, and min-replies={self.settings.min_replies}"
        return "no valid reply" if self.record.dispatched else "no device qualifies"

    def _fold(self, averager: Averager, server_round: int, partition: int, reply: Message) -> None:
        assignment = self._assigned.get(partition)
        if assignment is None or partition in self._replied:
            raise ValueError("it was sent no job this round, or has replied already")
        update = self.read(reply, assignment)
        level = self.level_trained(assignment, update)
        told = self.devices[partition].num_examples
        if update.weight > told:
            raise ValueError(f"it weighs {update.weight}, but has told of {told} examples")
        refuse_empty(self.task.layout, assignment.submodel, update.submodel)
        self.check(assignment, update)
        averager.add(*self.counted(update), self.weigh(update))
        self._replied.add(partition)
        self.record.count(self.devices[partition], level, update, num_bytes(reply))
        recur = METHODS[self.settings.strategy].masks_recur
        self.holdings.note(partition, server_round, update, assignment.submodel.masks_key if recur else b"")
        self.tests.keep(partition, update)
        self.observe(server_round, partition, update)

    # Evaluation -----------------------------------------------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Test every level on the server, then ask devices to test theirs, and models of their own."""
        server_round += self._offset
        last = server_round == self.settings.num_server_rounds
        if server_round % self.settings.evaluate_every and not last:
            return []
        found = self.level_statistics(server_round, self._arrays, grid)
        self._statistics = found
        self.record.quality = measure_levels(
            self.task, found, self.headline(), lambda name: self.deployed(name, self._arrays), self.server.test
        )
        return self.tests.messages(server_round, found)

    def num_testers(self) -> int:
        """Devices that can test an evaluated level in some round."""
        devices = self.federation.devices.values()
        return sum(any(self.level_for_evaluation(state) is not None for state in d.states()) for d in devices)

    def summary_facts(self) -> dict[str, Any]:
        """What stands in summary.json beside what the rounds say."""
        top = list(self.levels().values())[-1]
        return {
            **super().summary_facts(),
            "clients-testing": self.num_testers(),
            "parameters": num_parameters(self.task.layout, top),
            "headline-levels": list(self.headline()),
            **self.facts(),
        }

    def final_model(self) -> Arrays:
        """The model that the run reports, with the batch-norm statistics it was last evaluated with."""
        name = list(self.levels())[-1]
        return with_statistics(self.deployed(name, self._arrays), self._statistics.get(name))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Collect the clients' own tests and close the round's record.

        Raises:
            RunOver: the model is as good as `stop-at-accuracy` asks for.
        """
        server_round += self._offset
        for reply in replies:
            partition = self.federation.partition_of(reply)
            try:
                self.tests.read(partition, reply)
            except ValueError as cause:
                self.note(self.record.failed, partition, str(cause))
        self.close_round(self.round_facts())
        return None


def refuse_empty(layout: Layout, sent: Submodel, held: Submodel) -> None:
    """Stop at a reply that holds nothing of a group that was sent.

    Raises:
        ValueError: names the group.
    """
    for group, span in layout.groups.items():
        here = slice(span.start, span.stop)
        if sent.units[here].any() and not held.units[here].any():
            raise ValueError(f"it holds no unit of group {group!r}")


def refuse_unbelievable(update: Update) -> None:
    """Stop at a reply that tells of work that cannot be.

    Raises:
        ValueError: says which.
    """
    macs, seconds = update.metrics.get("macs", 0.0), update.metrics.get("seconds", 0.0)
    if not (0 <= macs <= MOST_MACS and seconds >= 0):
        raise ValueError(f"macs of a reply must lie in [0, {MOST_MACS:.0e}] and seconds be >= 0, got {macs}, {seconds}")
    for key, value in update.metrics.items():
        if not abs(value) <= MOST_MACS:
            raise ValueError(f"metrics of a reply must lie within +-{MOST_MACS:.0e}, got {key}={value:g}")
