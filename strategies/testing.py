"""What clients are asked to test on their own samples: evaluated levels, and models of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Message, RecordDict

from flexfed.batchnorm import Statistics, norm_widths
from flexfed.checkpoint import State
from flexfed.devices import Device
from flexfed.flower.limits import ROOM_BYTES, refuse_large
from flexfed.flower.messages import (
    is_personal,
    job_content,
    num_bytes,
    read_evaluation,
    statistics_content,
    stored_model_content,
)
from flexfed.jobs import Assignment, Update
from flexfed.networks import build_on_meta
from flexfed.submodel import Submodel

if TYPE_CHECKING:
    from strategies.base import Parts, SubmodelStrategy


class ClientTests:
    """The clients' part of an evaluation.

    - `fraction-evaluate` of the devices test the largest evaluated level that they hold.
    - Where the run has personal models, every client tests its own, on its own samples and with batch-norm statistics
      of its own training samples: the part that it trained last, as it left it ("stored-local"), or the same units of
      the global model ("global-masked"). A client that has none, or whose device cannot hold it in this round, tests
      the largest part of the global model that its device can train. One whose device can train nothing tests nothing.
    """

    def __init__(self, strategy: SubmodelStrategy):
        self._strategy = strategy
        self._levels: dict[int, str] = {}  # this round's testers of levels
        self._kept: dict[int, Submodel] = {}  # partition -> the part that it trained last, without masks
        self._depths: dict[frozenset[str] | None, frozenset[str] | None] = {}  # equal sets of tensors as one object
        self._sent: dict[tuple[bool, int], tuple[Submodel, int]] = {}  # (personal, partition) -> part, bytes
        self._parts: Parts = {}

    @property
    def mode(self) -> str:
        """Which personal models there are."""
        return self._strategy.settings.personal

    # Asking -----------------------------------------------------------------------------------------------------

    def messages(self, server_round: int, found: Mapping[str, Statistics | None]) -> Iterator[Message]:
        """All that is to be tested in this round.

        Args:
            server_round: counted from 1.
            found: batch-norm statistics of each evaluated level.
        """
        self._levels, self._sent, self._parts = self.testers(), {}, {}
        return self._all(server_round, found)

    def _all(self, server_round: int, found: Mapping[str, Statistics | None]) -> Iterator[Message]:
        yield from self._of_levels(server_round, found)
        if self.mode != "none":
            yield from self._of_personal_models(server_round)

    def testers(self) -> dict[int, str]:
        """The partitions whose device can test an evaluated level in this round, and which."""
        strategy = self._strategy
        found = {p: strategy.level_for_evaluation(device) for p, device in strategy.devices.items()}
        return {partition: name for partition, name in found.items() if name is not None}

    def _of_levels(self, server_round: int, found: Mapping[str, Statistics | None]) -> Iterator[Message]:
        strategy, levels = self._strategy, self._strategy.levels()
        rng = np.random.default_rng([strategy.settings.seed, server_round, 1])
        num = int(np.ceil(strategy.settings.fraction_evaluate * len(self._levels)))
        for partition in sorted(rng.permutation(sorted(self._levels))[:num].tolist()):
            name = self._levels[partition]
            assignment = Assignment(levels[name], name, codec=strategy.tested_codec(name))
            content = self._part_content(partition, assignment, server_round, {})
            if found[name] is not None:
                content["statistics"] = statistics_content(found[name])  # type: ignore[arg-type]
            yield self._message(False, partition, levels[name], content, server_round)

    def _of_personal_models(self, server_round: int) -> Iterator[Message]:
        strategy = self._strategy
        for partition, device in strategy.devices.items():
            own = self._held(partition, device, server_round)
            part = own or self._fallback(device, server_round)
            if part is None:
                continue
            if own is not None and self.mode == "stored-local":
                content = stored_model_content(
                    server_round, {**strategy.transform, **strategy.holdings.base_of(partition)}
                )
            else:
                content = self._part_content(partition, Assignment(part, "personal"), server_round, {"personal": True})
            yield self._message(True, partition, part, content, server_round)

    def _held(self, partition: int, device: Device, server_round: int) -> Submodel | None:
        """The part that a client trained last, if its device can hold it in this round."""
        if partition not in self._kept:
            return None
        own = self._kept[partition]
        return own if self._strategy.can_hold(device, own, server_round) else None

    def _fallback(self, device: Device, server_round: int) -> Submodel | None:
        """The largest part that a device can train, if it can test that."""
        largest = self._strategy.largest_part(device, server_round)
        testable = largest is not None and self._strategy.budget.tests(device, largest.submodel)
        return largest.submodel if largest is not None and testable else None

    def _part_content(
        self, partition: int, assignment: Assignment, server_round: int, extra: Mapping[str, Any]
    ) -> RecordDict:
        strategy, found = self._strategy, self._strategy.with_codecs(assignment)
        extra = {**strategy.transform, **strategy.holdings.base_of(partition), **extra}
        known = strategy.holdings.masks_of(partition)
        return job_content(strategy.part(self._parts, found, used=True), found, 0, server_round, extra, known)

    def _message(
        self, personal: bool, partition: int, part: Submodel, content: RecordDict, server_round: int
    ) -> Message:
        message = self._strategy.federation.message(partition, content, "evaluate", server_round)
        self._sent[personal, partition] = part, num_bytes(message)
        return message

    # Hearing ----------------------------------------------------------------------------------------------------

    def read(self, partition: int, reply: Message) -> None:
        """Count a client's test, and what it cost.

        Raises:
            ValueError: it failed, or is impossible.
        """
        strategy, result = self._strategy, read_evaluation(reply)
        personal = is_personal(reply)
        if (personal, partition) not in self._sent:
            raise ValueError("evaluation: it was not asked to test that, or has replied already")
        refuse_large(reply, ROOM_BYTES)
        device, samples = strategy.devices[partition], result.num_samples
        told = strategy.federation.devices[partition]
        if samples > (most := strategy.experiment.data.most_tested(told.num_examples, len(told.labels))):
            raise ValueError(f"evaluation of {samples} samples; of what it has told of, there are at most {most}")
        part, bytes_down = self._sent.pop((personal, partition))
        if personal:
            strategy.record.personal.append((self.group_of(partition), result))
            samples += device.num_examples if self._own_statistics else 0
        else:
            strategy.record.clients.append((told.kind, result))
        macs = samples * strategy.task.macs(part)
        phase = "personal" if personal else "test"  # a device does one after the other
        strategy.record.count_beside(phase, device, macs, bytes_down, num_bytes(reply))

    @cached_property
    def _own_statistics(self) -> bool:
        """Whether clients run their training samples through their own models, for the norms' statistics."""
        task = self._strategy.task
        return self._strategy.settings.batch_norm == "static" and bool(norm_widths(build_on_meta(task.factory)))

    def group_of(self, partition: int) -> str:
        """The capability that a client's personal accuracy is counted under: its kind, or its power in this round."""
        nominal = self._strategy.federation.devices[partition]
        return f"{self._strategy.devices[partition].capacity:g}" if nominal.availability else nominal.kind

    def keep(self, partition: int, update: Update) -> None:
        """An accepted reply: its client keeps what it trained."""
        if self.mode != "none":
            keys = self._depths.setdefault(update.submodel.keys, update.submodel.keys)
            self._kept[partition] = Submodel(self._strategy.kept_units(update), keys)

    # The checkpoint ---------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """Which units and tensors each client keeps."""
        if not self._kept:
            return {}
        kept = [self._kept[partition] for partition in sorted(self._kept)]
        found: dict[str, Any] = {
            "personal/partitions": np.array(sorted(self._kept), dtype=np.int64),
            "personal/units": np.packbits(np.stack([part.units for part in kept]), axis=1),
        }
        depths = list(dict.fromkeys(part.keys for part in kept))
        if depths != [None]:
            found["personal/depths"] = [None if keys is None else sorted(keys) for keys in depths]
            found["personal/depth"] = np.array([depths.index(part.keys) for part in kept], dtype=np.int64)
        return found

    def load_state_dict(self, state: State) -> None:
        """Undo `state_dict`."""
        num_units = self._strategy.task.layout.num_units
        partitions, units = state.get("personal/partitions", []), state.get("personal/units", [])
        depths = [None if names is None else frozenset(names) for names in state.get("personal/depths", [None])]
        own = state.get("personal/depth", [0] * len(partitions))
        self._depths = {keys: keys for keys in depths}
        for partition, bits, depth in zip(partitions, units, own, strict=True):
            unpacked = np.unpackbits(bits, count=num_units).astype(bool)
            self._kept[int(partition)] = Submodel(unpacked, depths[int(depth)])
