"""What FedStitch's server knows of each client, and the questions that follow from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flexfed.flower.limits import most_of_arrays
from flexfed.jobs import Scalar
from flexfed.methods.fedstitch import FedStitchConfig
from flexfed.questions import Answer
from flexfed.stitching.bridges import Sums, no_rows, valid_sums
from flexfed.stitching.dvfs import dvfs_of
from flexfed.stitching.energy import deadline, fastest_seconds
from flexfed.stitching.path import Path, packed
from flexfed.stitching.phases import Work
from flexfed.units import Arrays
from strategies.phases import Asked, Phase, Phases, Receive

if TYPE_CHECKING:
    from strategies.stitch_run import StitchRun

SLOWEST = 1e4
"""How many times slower, or faster, than modelled a device can say that it is; more is not believed.

A CPU that declared the speed of a board with a GPU is a thousand times slower. With `deadline-share` 1 the slowest
client sets everybody's deadline; a smaller share bounds what one can do.
"""

PHASES = ("train.score", "train.stitch", "train.head", "evaluate.stitched")


class StitchClients:
    """Asks clients, and remembers what each of them holds and how its speed differs from the model.

    Args:
        strategy: whose clients.
        state: of `state_dict`; empty = nobody was asked yet.
    """

    def __init__(self, strategy: StitchRun, state: Mapping[str, Any]):
        self._strategy = strategy
        self._config: FedStitchConfig = strategy.config
        self.phases = Phases(strategy, state.get("bases"))
        self.corrections = {int(p): c for p, c in state.get("corrections", {}).items()}
        self._held: dict[int, tuple[int, int]] = {int(p): (e, n) for p, (e, n) in state.get("held", {}).items()}
        self._known: dict[int, set[int]] = {int(p): set(ids) for p, ids in state.get("known", {}).items()}
        self.missed = 0  # deadlines, in this round

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "bases": self.phases.facts(),
            "corrections": {str(p): c for p, c in sorted(self.corrections.items())},
            "held": {str(p): list(held) for p, held in sorted(self._held.items())},
            "known": {str(p): sorted(ids) for p, ids in sorted(self._known.items())},
        }

    def known_to(self, partition: int) -> set[int]:
        """The blocks of which a client remembers how well they tell its classes."""
        return self._known.get(partition, set()) if partition in self.phases.bases else set()

    def scored(self, partition: int, found: Iterable[int]) -> None:
        """A client has found out how well blocks tell its classes, and remembers that."""
        self._known[partition] = self.known_to(partition) | set(found)

    def phase(
        self,
        kind: str,
        path: Path,
        receive: Receive,
        works: Mapping[int, Work],
        asked: Mapping[str, Scalar],
        shapes: Mapping[str, tuple[int, ...]],
        head: np.ndarray | None = None,
    ) -> Phase:
        """A phase with its deadline; clients are sent the bridges that they do not hold.

        Args:
            kind: of its messages.
            path: that clients work on.
            receive: takes the answers.
            works: partition -> what it will have to do, as far as the server can know; none = no deadline.
            asked: what all are asked.
            shapes: of the arrays that are to come back.
            head: that goes with it.
        """
        strategy, episode = self._strategy, self._strategy.now.episode
        limit = self._deadline(works)
        shared = {**asked, "episode": episode, "digest": strategy.task.digest, "deadline": limit}
        if path.ids:  # Flower cannot count the bytes of an empty value
            shared["path"] = path.name
        extra: Arrays = {} if head is None else {"head": head}

        def ask(partition: int) -> Asked:
            num = self._num_held(partition)
            new = packed({position: bridge for position, bridge in path.bridges.items() if position >= num})
            return Asked({**shared, "correction": self.corrections.get(partition, 1.0)}, {**new, **extra})

        def take(partition: int, answer: Answer) -> None:
            correction = answer.metrics.get("correction", 1.0)
            if not 1 / SLOWEST <= correction <= SLOWEST:
                raise ValueError(
                    f"the correction of an answer must lie in [{1 / SLOWEST}, {SLOWEST}], got {correction}"
                )
            late = bool(answer.metrics.get("deadline-missed"))
            if late and self._config.drop_late:
                self.missed += 1
                self.corrections[partition] = correction  # or the next deadline would be as short
                raise ValueError(f"it missed the deadline of {limit:.3g} modelled seconds")
            receive(partition, answer)
            self.missed += late
            self.corrections[partition] = correction
            if answer.metrics.get("kept-state"):
                self._held[partition] = (episode, len(path.ids))

        step = len(PHASES) * strategy.record.server_round + PHASES.index(kind)
        arrays = {**dict.fromkeys(shapes, "float64"), "levels": "uint8"}  # of the clocks, one a batch
        largest = most_of_arrays((name, math.prod(shape)) for name, shape in shapes.items())
        return Phase(kind, step, ask, take, arrays, largest)

    def _num_held(self, partition: int) -> int:
        """How many positions of the path a client knows."""
        episode, num = self._held.get(partition, (0, 0))
        return num if partition in self.phases.bases and episode == self._strategy.now.episode else 0

    def _deadline(self, works: Mapping[int, Work]) -> float:
        """Of a phase; infinite where there is no work."""
        times = [self._fastest(partition, work) for partition, work in works.items() if work.macs]
        return deadline(times, self._config.deadline_share, self._config.deadline_slack) if times else math.inf

    def _fastest(self, partition: int, work: Work) -> float:
        table, correction = dvfs_of(self._strategy.devices[partition]), self.corrections.get(partition, 1.0)
        return fastest_seconds(table, work.images, work.macs, correction, self._config.energy_config)


Valid = Callable[[Sums, int, int], str | None]


class Total:
    """Clients' sums, added up as they arrive.

    Args:
        channels_in: of the features.
        channels_out: of what they are mapped to.
        most: partition -> rows that it can have at most.
        valid: why sums of so many channels cannot be used, if they cannot.
    """

    def __init__(self, channels_in: int, channels_out: int, most: Callable[[int], int], valid: Valid = valid_sums):
        self._most, self._valid, self._channels = most, valid, (channels_in, channels_out)
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.sums, self._answers = no_rows(*self._channels), 0

    def __len__(self) -> int:
        """Answers that held something."""
        return self._answers

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the arrays that a client sends."""
        return {"gram": self.sums.gram.shape, "cross": self.sums.cross.shape}

    def receive(self, partition: int, answer: Answer) -> None:
        """Add a client's.

        Raises:
            ValueError: they cannot be added.
        """
        told = Sums(answer.arrays["gram"], answer.arrays["cross"], int(answer.metrics.get("rows", -1)))
        if wrong := self._valid(told, *self._channels):
            raise ValueError(wrong)
        if told.num_rows > (most := self._most(partition)):
            raise ValueError(f"sums of {told.num_rows} rows; of what it has told of, there are at most {most}")
        self.sums += told
        self._answers += bool(told.num_rows)
