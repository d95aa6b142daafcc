"""Simulated devices without any work of their own: their replies come from a stock, with honest bytes.

What a server costs shows only beside clients that cost nothing; the time they do take is kept apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import cast

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.rounds import Stopwatch
from flexfed.batchnorm import BatchNormSums, norm_widths, pack_sums
from flexfed.cost import num_parameters
from flexfed.devices import Device, load_fleet
from flexfed.flower.grid import InProcessGrid
from flexfed.flower.messages import evaluation_content, profile_content, to_record_of_arrays, update_content
from flexfed.jobs import Task, Update
from flexfed.methods.fedlps import FedLPSConfig, ranking_of
from flexfed.submodel import Submodel, extract, full, unpack
from flexfed.training import Evaluation

NUM_EXAMPLES = 50
STOCK = 64  # different rankings, and kinds of differences
LABELS = tuple(range(10))


class CannedGrid(InProcessGrid):
    """Devices that answer at once what a real one could, and whose replies arrive late.

    Nothing comes back until as many messages are out as may be, or nobody sends more; then half of the replies come,
    in any order. So as many are alive at once as ever can be.

    Args:
        task: of the run.
        num: devices.
        fleet: they are of.
        in_flight: the limit that the server keeps to.
        failing: every so many-th device fails whenever it is asked to train; 0 = none.

    Attributes:
        clients: time spent on making replies.
        folded: replies that the server is done with; it is told, by `counted`.
        most_alive: messages sent and not yet folded, the most at any time.
    """

    def __init__(self, task: Task, num: int, fleet: str, in_flight: int = 64, failing: int = 0):
        self.clients = Stopwatch()
        super().__init__(cast(ClientApp, self.clients.timed(self._reply)), num)
        self.folded = self.most_alive = 0
        self._task, self._num, self._fleet = task, num, load_fleet(fleet)
        self._in_flight, self._failing = in_flight, failing
        self._rng = np.random.default_rng(0)
        size = num_parameters(task.layout, full(task.layout))
        self._noise = 0.01 * self._rng.standard_normal(size + STOCK, dtype=np.float32)
        scores = self._rng.standard_normal((STOCK, task.layout.num_units))
        asked = isinstance(task.method, FedLPSConfig) and task.method.is_told
        self._rankings = [ranking_of(task.layout, row) for row in scores] if asked else []
        self._sums = lru_cache(maxsize=16)(self._sums_of)
        self._grew = False

    def counted(self, replies: Iterable[Message]) -> Iterator[Message]:
        """The same replies; whoever asks for the next one is done with the one before."""
        for reply in replies:
            yield reply
            del reply
            self.folded += 1

    def rest(self) -> None:
        """Begin to count anew: all that was sent is folded."""
        self.folded, self.most_alive = self._pushed, 0

    # When replies arrive --------------------------------------------------------------------------------------------

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer, and hold the answers back."""
        ids = super().push_messages(messages)
        self._grew = True
        self.most_alive = max(self.most_alive, self._pushed - self.folded)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Half of what is out, if no more will be sent before some of it arrives."""
        grew, self._grew = self._grew, False
        if grew and len(self._replies) < self._in_flight:
            return []
        out = [i for i in message_ids if i in self._replies]
        return super().pull_messages(self._rng.permutation(out)[: -(-len(out) // 2)].tolist())

    # What they say --------------------------------------------------------------------------------------------------

    def _reply(self, message: Message, context: Context) -> Message:
        kind, partition = message.metadata.message_type, int(context.node_config["partition-id"])
        if self._failing and kind == "train" and not partition % self._failing:
            raise RuntimeError("out of memory: the part needs 3.4 MB, 1.2 MB are free")
        make = {
            "query.profile": self._profile,
            "query.statistics": self._statistics,
            "train": self._update,
            "evaluate": self._test,
        }[kind]
        return Message(make(message.content, partition), reply_to=message)

    def _profile(self, content: RecordDict, partition: int) -> RecordDict:
        nominal = self._fleet.device(partition, self._num, seed=1)
        device = Device(**{**vars(nominal), "num_examples": NUM_EXAMPLES, "labels": LABELS})
        return profile_content(device, self._num)

    def _submodel(self, units: bytes) -> Submodel:
        return unpack(self._task.layout, {"units": units})

    def _update(self, content: RecordDict, partition: int) -> RecordDict:
        units = cast(bytes, content.config_records["submodel"]["units"])
        start = int(self._rng.integers(STOCK))
        told = {"ranking": self._rankings[start]} if self._rankings else {}
        metrics = {"train-loss": 1.0, "train-accuracy": 0.5 + start / 200, "macs": 1e7, "seconds": 0.01}
        state = {"scores": np.zeros(1)} if self._rankings else {}  # only that there is one travels
        submodel = self._submodel(units)
        part = self._noise[start : start + num_parameters(self._task.layout, submodel)]
        update = Update(submodel, part, NUM_EXAMPLES, metrics, state, told)
        return update_content(update, self._task.layout)

    def _test(self, content: RecordDict, partition: int) -> RecordDict:
        personal = bool(content.config_records["config"].get("personal", False))
        return evaluation_content(Evaluation(30, 50.0, NUM_EXAMPLES), personal)

    def _statistics(self, content: RecordDict, partition: int) -> RecordDict:
        levels = content.config_records["levels"]
        return RecordDict({name: self._sums(cast(bytes, units)) for name, units in levels.items()})

    def _sums_of(self, units: bytes) -> ArrayRecord:
        whole = {name: np.zeros(shape, dtype=np.float32) for name, shape in self._task.layout.shapes.items()}
        widths = norm_widths(self._task.network(extract(self._task.layout, self._submodel(units), whole)))
        ones = {name: np.ones(width) for name, width in widths.items()}
        sums = BatchNormSums(self._task.method.statistics, dict.fromkeys(widths, 1), ones, ones)
        return to_record_of_arrays(pack_sums(sums))
