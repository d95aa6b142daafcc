"""Asks clients one phase of a round after another, and counts what that costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from flexfed.client_state import LOST
from flexfed.flower.limits import refuse_large
from flexfed.flower.messages import cause_of, num_bytes
from flexfed.flower.questions import question_content, read_answer
from flexfed.jobs import Scalar
from flexfed.questions import Answer
from flexfed.units import Arrays

if TYPE_CHECKING:
    from strategies.federated import FederatedStrategy

Receive = Callable[[int, Answer], None]
"""Given a partition and its answer; a ValueError that it raises refuses the answer."""


class Asked(NamedTuple):
    """What one client is asked."""

    config: Mapping[str, Scalar]
    arrays: Arrays


@dataclass
class Phase:
    """One exchange with the cohort.

    Attributes:
        kind: the type of its messages.
        step: number of the phase in the whole run, from 1: clients keep what they remember under it.
        ask: partition -> what it is asked.
        receive: takes the answers, one at a time.
        arrays: name -> dtype of the arrays that an answer holds.
        largest: bytes of an answer at most, beside one for each sample of its client.
        answered: whose answers were received.
        lost: who no longer has what it remembered, and is to be asked again.
    """

    kind: str
    step: int
    ask: Callable[[int], Asked]
    receive: Receive
    arrays: Mapping[str, str]
    largest: int
    answered: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    sent: dict[int, int] = field(default_factory=dict)  # partition -> bytes


class Phases:
    """Carries out phases for a strategy, and remembers what each client keeps on its own disk.

    Attributes:
        bases: partition -> step of its last accepted private state.
    """

    def __init__(self, strategy: FederatedStrategy, bases: Mapping[str, int] | None = None):
        self._strategy = strategy
        self.bases = {int(partition): step for partition, step in (bases or {}).items()}

    def facts(self) -> dict[str, int]:
        """For the checkpoint."""
        return {str(partition): step for partition, step in sorted(self.bases.items())}

    def carry_out(self, grid: Grid, phase: Phase, partitions: Iterable[int]) -> None:
        """Ask, take all answers, and ask those again, once, who had lost what they remembered."""
        timeout = self._strategy.settings.round_timeout
        self.take(phase, grid.send_and_receive(self.messages(phase, partitions), timeout=timeout))
        self.ask_again(grid, phase)

    def ask_again(self, grid: Grid, phase: Phase) -> None:
        """Ask those again, from nothing, who had lost what they remembered."""
        lost, phase.lost = sorted(phase.lost), set()
        if lost:
            timeout = self._strategy.settings.round_timeout
            self.take(phase, grid.send_and_receive(self.messages(phase, lost), timeout=timeout))

    def messages(self, phase: Phase, partitions: Iterable[int]) -> Iterator[Message]:
        """The questions, one after the other."""
        strategy = self._strategy
        server_round = strategy.record.server_round
        for partition in partitions:
            config, arrays = phase.ask(partition)
            extra = {**strategy.transform, "step": phase.step, "private-round": self.bases.get(partition, 0)}
            content = question_content(config, arrays, self._seed(phase, partition), server_round, extra)
            message = strategy.federation.message(partition, content, phase.kind, server_round)
            phase.sent[partition] = num_bytes(message)
            strategy.record.count_sent(phase.kind, partition, phase.sent[partition])
            yield message

    def _seed(self, phase: Phase, partition: int) -> int:
        entropy = [self._strategy.settings.seed, self._strategy.record.server_round, partition, phase.step]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def take(self, phase: Phase, replies: Iterable[Message]) -> None:
        """Take replies one at a time; those that fail or do not validate count as never asked."""
        strategy = self._strategy
        for reply in replies:
            partition = strategy.federation.partition_of(reply)
            cause = cause_of(reply.error) if reply.has_error() else ""
            if LOST in cause and self.bases.pop(partition, 0):
                phase.lost.add(partition)
            elif cause:
                strategy.note(strategy.record.failed, partition, cause)
            else:
                try:
                    self._take_one(phase, partition, reply)
                except ValueError as refusal:
                    strategy.note(strategy.record.refused, partition, str(refusal))
            del reply

    def _take_one(self, phase: Phase, partition: int, reply: Message) -> None:
        if partition not in phase.sent or partition in phase.answered:
            raise ValueError("it was not asked, or has answered already")
        device = self._strategy.devices[partition]
        refuse_large(reply, phase.largest + device.num_examples)
        found = read_answer(reply.content, phase.arrays)
        refuse_impossible(found.metrics)
        phase.receive(partition, found)
        phase.answered.add(partition)
        if found.metrics.get("kept-state"):
            self.bases[partition] = phase.step
        self._strategy.record.count_answer(phase.kind, device, found.metrics, phase.sent[partition], num_bytes(reply))


COSTS = {"macs": 1e18, "modelled-seconds": 1e9, "modelled-joules": 1e12, "measured-joules": 1e12, "seconds": 1e9}
"""What an answer may claim of its cost at most; more is not believed."""
MOST = 1e18
"""What any other number of an answer may be: a count that numpy still holds."""


def refuse_impossible(metrics: Mapping[str, Any]) -> None:
    """Stop at an answer that tells of costs that cannot be.

    Raises:
        ValueError: says which.
    """
    for key, most in COSTS.items():
        if not 0 <= metrics.get(key, 0.0) <= most:
            raise ValueError(f"{key} of an answer must lie in [0, {most:.0e}], got {metrics[key]}")
    for key, value in metrics.items():
        if not abs(value) <= MOST:
            raise ValueError(f"metrics of an answer must lie within +-{MOST:.0e}, got {key}={value:g}")
