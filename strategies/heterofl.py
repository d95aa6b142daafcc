"""HeteroFL's server: nested prefixes by level, classifier rows by label, static batch norm asked of the clients."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from flexfed.batchnorm import BatchNormSums, Statistics, add_sums, norm_widths, statistics, unpack_sums
from flexfed.checkpoint import State
from flexfed.cost import shares
from flexfed.devices import Device
from flexfed.evaluation import level_statistics
from flexfed.flower.limits import most_of_arrays, refuse_large
from flexfed.flower.messages import cause_of, from_record_of_arrays, job_content, num_bytes
from flexfed.jobs import Assignment
from flexfed.methods.heterofl import LEVELS, capacity_level, dynamic_levels, fixed_levels, parse_shares
from flexfed.select import prefix_ratio
from flexfed.submodel import Submodel, extract, pack
from flexfed.units import Arrays
from strategies.base import Parts
from strategies.widths import WidthStrategy

log = logging.getLogger("flwr")

MOST_BATCHES = 64
"""Batches that a norm sees for a sample, at most: a layer may run several times."""
MOST_VALUES = 2**24
"""Values of a channel that a norm sees for a sample, at most."""


class Asked(NamedTuple):
    """What a client was asked for statistics."""

    levels: frozenset[str]
    num_bytes: int


class HeteroFL(WidthStrategy):
    """Static prefixes; see `flexfed.methods.heterofl`."""

    _levels: tuple[Mapping[int, Device], dict[str, Submodel]] | None = None  # whose they are, and the levels
    _dynamic: np.ndarray | None = None  # this round's draw, one level for each partition

    def levels(self) -> dict[str, Submodel]:
        """The levels that devices hold, smallest first, and always the largest."""
        devices = self.federation.devices
        if self._levels is None or self._levels[0] is not devices:
            self._levels = devices, self._used()
        return self._levels[1]

    def _used(self) -> dict[str, Submodel]:
        return {LEVELS[i]: self._parts[i] for i in sorted(self._trained() | {0}, reverse=True)}

    def _trained(self) -> set[int]:
        """The levels that somebody trains."""
        if self.task.method.assign == "dynamic":
            return set(range(len(self.task.method.ratios)))
        return {self.level_of(state) for device in self.federation.devices.values() for state in device.states()}

    @cached_property
    def _parts(self) -> tuple[Submodel, ...]:
        return tuple(prefix_ratio(self.task.layout, ratio) for ratio in self.task.method.ratios)

    @cached_property
    def _sizes(self) -> list[float]:
        return list(shares(self.task.layout, {LEVELS[i]: part for i, part in enumerate(self._parts)}).values())

    def level_of(self, device: Device) -> int:
        """A device's level: by capacity, by fixed shares, or as drawn this round; less where it cannot bear that."""
        level = self._nominal_level(device)
        borne = (i for i in range(level, len(self._parts)) if self.budget.bears(device, self._parts[i]))
        return next(borne, len(self._parts) - 1)

    def _nominal_level(self, device: Device) -> int:
        method = self.task.method
        if method.assign == "capacity":
            narrow = (i for i, ratio in enumerate(method.ratios) if ratio <= device.width + 1e-9)
            return max(capacity_level(device.capacity, self._sizes), next(narrow, len(method.ratios) - 1))
        if method.assign == "dynamic" and self._dynamic is not None:
            return int(self._dynamic[device.partition])
        return int(self._fixed[device.partition])

    @cached_property
    def _fixed(self) -> np.ndarray:
        method = self.task.method
        return fixed_levels(self.federation.num_partitions, parse_shares(method.shares, len(method.ratios)))

    def state_dict(self) -> State:
        """The levels drawn last, and what the policy has learned."""
        return {**super().state_dict(), **({} if self._dynamic is None else {"dynamic": self._dynamic})}

    def load_state_dict(self, state: State) -> None:
        """Put them back."""
        super().load_state_dict(state)
        self._dynamic = state.get("dynamic")

    def assign(
        self, server_round: int, devices: Mapping[int, Device], rng: np.random.Generator
    ) -> Mapping[int, Assignment]:
        """A uniform cohort; with `assign = "dynamic"` every client draws its level anew."""
        method = self.task.method
        if method.assign == "dynamic":
            drawn_from = parse_shares(method.shares, len(method.ratios))
            self._dynamic = dynamic_levels(self.federation.num_partitions, drawn_from, rng)  # whoever is here
        return super().assign(server_round, devices, rng)

    def own_part(self, device: Device, server_round: int) -> Assignment:
        """The part of the device's level."""
        level = self.level_of(device)
        ratio = self.task.method.ratios[level]
        return Assignment(self.part_at(ratio, server_round), LEVELS[level], {"ratio": ratio})

    def part_at(self, ratio: float, server_round: int) -> Submodel:
        """The prefix; the same in every round."""
        return prefix_ratio(self.task.layout, ratio)

    def can_train(self, device: Device) -> bool:
        """Whether memory and deadline allow the smallest level, which the paper gives to everybody."""
        if self.policy is None:
            return self.budget.bears(device, self._parts[-1])
        return super().can_train(device)

    def level_for_evaluation(self, device: Device) -> str | None:
        """The level that it trains, or a smaller one that its memory allows to test; under a budget the largest."""
        if self.policy is not None:
            return super().level_for_evaluation(device)
        if not self.can_train(device):
            return None
        sizes = range(self.level_of(device), len(self._parts))
        return next((LEVELS[i] for i in sizes if LEVELS[i] in self.levels() and self._tests(device, i)), None)

    def _tests(self, device: Device, level: int) -> bool:
        return self.budget.tests(device, self._parts[level])

    def level_statistics(self, server_round: int, arrays: Arrays, grid: Grid) -> dict[str, Statistics | None]:
        """Asked of the clients, taken from the proxy split, or none."""
        mode = self.task.method.batch_norm
        if mode == "batch" or self.settings.batch_norm == "batch":
            return dict.fromkeys(self.levels())
        found = self._asked(server_round, arrays, grid) if mode == "federated" else {}
        missing = {name: level for name, level in self.levels().items() if name not in found}
        proxy = {n: level_statistics(self.task, level, arrays, self.server.proxy) for n, level in missing.items()}
        return {name: (found | proxy)[name] for name in self.levels()}

    def _asked(self, server_round: int, arrays: Arrays, grid: Grid) -> dict[str, Statistics]:
        """Statistics of each level, summed over the clients that can hold it; none for a level nobody answers for.

        Nobody is asked where the network has no norms.
        """
        sums: dict[str, BatchNormSums] = {}
        sent: dict[int, Asked] = {}
        levels = self.levels()
        widths = {
            name: norm_widths(self.task.network(extract(self.task.layout, level, arrays)))
            for name, level in levels.items()
        }
        if not any(widths.values()):
            return {}
        for reply in grid.send_and_receive(
            self._questions(server_round, arrays, sent), timeout=self.settings.round_timeout
        ):
            partition = self.federation.partition_of(reply)
            try:
                answer = self._answer(partition, reply, sent, widths)
            except ValueError as cause:
                self.note(self.record.failed, partition, f"statistics query: {cause}")
                continue
            for name, own in answer.items():
                sums[name] = add_sums(sums[name], own) if name in sums else own
            device, asked = self.devices[partition], sent.pop(partition)
            macs = device.num_examples * sum(self.task.macs(levels[name]) for name in answer)
            self.record.count_beside("statistics", device, macs, asked.num_bytes, num_bytes(reply))
        return {name: statistics(total) for name, total in sums.items() if any(total.counts.values())}

    def _questions(self, server_round: int, arrays: Arrays, sent: dict[int, Asked]) -> Iterator[Message]:
        """One message a client: its largest level, and the bits of the smaller ones it can cut out of it."""
        levels = self.levels()
        parts: Parts = {}
        for partition, device in self.devices.items():
            name = self.level_for_evaluation(device)
            if name is None:
                continue
            held = list(levels)[: list(levels).index(name) + 1]
            asked = self.with_codecs(Assignment(levels[name], name))
            content = job_content(self.part(parts, asked), asked, 0, server_round, self.transform)
            content["levels"] = ConfigRecord({n: pack(levels[n])["units"] for n in held})
            content["query"] = ConfigRecord({"definition": self.task.method.statistics})
            message = self.federation.message(partition, content, "query.statistics", server_round)
            sent[partition] = Asked(frozenset(held), num_bytes(message))
            yield message

    def _answer(
        self, partition: int, reply: Message, sent: Mapping[int, Asked], widths: Mapping[str, Mapping[str, int]]
    ) -> dict[str, BatchNormSums]:
        """A client's sums of the levels that it was asked for, checked.

        Raises:
            ValueError: says what is wrong with them.
        """
        if reply.has_error():
            raise ValueError(cause_of(reply.error))
        if partition not in sent:
            raise ValueError("it was not asked, or has replied already")
        expected, content = sent[partition].levels, reply.content
        refuse_large(reply, most_of_arrays((n, 1 + 2 * num) for level in expected for n, num in widths[level].items()))
        records = {name: record for name, record in content.items() if isinstance(record, ArrayRecord)}
        if set(content) != expected or set(records) != expected:
            raise ValueError(f"expected sums of levels {sorted(expected)}, got {sorted(content)}")
        definition: Any = self.task.method.statistics
        most = self.devices[partition].num_examples * (MOST_VALUES if definition == "pooled" else MOST_BATCHES)
        return {n: unpack_sums(from_record_of_arrays(r), widths[n], definition, most) for n, r in records.items()}
