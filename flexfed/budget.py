"""What a device can carry: by its declared capacity, its memory, and the time that a round may take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from flexfed.codecs import PLAIN
from flexfed.cost import decoded_bytes, message_bytes, modelled_seconds, round_macs, shares
from flexfed.devices import Device
from flexfed.jobs import Task
from flexfed.select import kept_units
from flexfed.submodel import Submodel
from flexfed.training import samples_trained

N = TypeVar("N", int, float)

STEPS = 64
"""Ratios are multiples of 1/64: few enough to cost them all, and devices that share one share its submodel."""


def _nothing(_: Submodel) -> int:
    return 0


def _none() -> int:
    return 0


def _itself(submodel: Submodel) -> Submodel:
    return submodel


@dataclass(frozen=True)
class Budget:
    """Compares what training a part asks for with what a device has. What a device never told does not bind it.

    Attributes:
        task: the network and how it is trained.
        round_deadline: modelled seconds that a device may take to receive a part, train it and send it back; 0 = any.
        macs_beside: part -> multiply-accumulates a sample beside training the part itself (distillation teachers).
        download_of: part -> what a device is sent for it, where it cuts the part out itself.
        codec: how parts travel. In memory their numbers stand beside the message.
        bytes_beside: of what every job carries besides its part; while training it is held once more.
        memory_beside: part -> bytes that must be free beside training the part itself.
    """

    task: Task
    round_deadline: float = 0.0
    macs_beside: Callable[[Submodel], int] = _nothing
    download_of: Callable[[Submodel], Submodel] = _itself
    codec: str = PLAIN
    bytes_beside: Callable[[], int] = _none
    memory_beside: Callable[[Submodel], int] = _nothing
    _known: dict[tuple[str, bytes], float] = field(default_factory=dict, repr=False, compare=False)

    def holds(self, device: Device, submodel: Submodel) -> bool:
        """Whether capacity, width, memory and deadline all allow to train a part."""
        return self.carries(device, submodel) and self.is_narrow(submodel, device.width)

    def carries(self, device: Device, submodel: Submodel) -> bool:
        """Whether all but the width allow it: for a method that rounds widths in a way of its own."""
        return self.share(submodel) <= device.capacity + 1e-9 and self.bears(device, submodel)

    def is_narrow(self, submodel: Submodel, width: float) -> bool:
        """Whether a part keeps at most `width` of every group's units, rounded up; outputs do not count."""
        if width >= 1:
            return True
        return bool(self._once(f"width {width}", submodel, lambda: int(self._within_width(submodel, width))))

    def _within_width(self, submodel: Submodel, width: float) -> bool:
        layout = self.task.layout
        cut = {group: span for group, span in layout.groups.items() if group not in layout.fixed}
        return all(submodel.units[s.start : s.stop].sum() <= kept_units(width, len(s)) for s in cut.values())

    def bears(self, device: Device, submodel: Submodel) -> bool:
        """Whether memory and deadline allow it, whatever share of the network the device calls its capacity."""
        fits = device.memory_bytes == math.inf or self.memory(submodel) <= device.memory_bytes
        return fits and (not self.round_deadline or self.seconds(device, submodel) <= self.round_deadline)

    def tests(self, device: Device, submodel: Submodel) -> bool:
        """Whether memory allows to test a part: in larger batches than it trains."""
        return device.memory_bytes == math.inf or self.memory_to_test(submodel) <= device.memory_bytes

    def share(self, submodel: Submodel) -> float:
        """Parameters of a part, as a share of the network's."""
        return self._once("share", submodel, lambda: shares(self.task.layout, {"part": submodel})["part"])

    def memory(self, submodel: Submodel) -> int:
        """Bytes that a device needs to receive a part and to train it."""
        received = self._received(self.download_of(submodel)) + 2 * self.bytes_beside()
        beside = self._once("memory beside", submodel, lambda: self.memory_beside(submodel))
        return received + beside + self._once("train", submodel, lambda: self.task.memory_to_train(submodel))

    def memory_to_test(self, submodel: Submodel) -> int:
        """Bytes that a device needs to receive a part and to test it."""
        return self._received(submodel) + self._once("test", submodel, lambda: self.task.memory_to_test(submodel))

    def seconds(self, device: Device, submodel: Submodel) -> float:
        """Modelled seconds of a device's training: receive a part, train it, send it back."""
        training = self.task.training
        macs = round_macs(self._once("macs", submodel, lambda: self.task.macs(submodel)), device.num_examples, training)
        beside = self._once("beside", submodel, lambda: self.macs_beside(submodel))
        macs += beside * samples_trained(device.num_examples, training)
        download = self._message(self.download_of(submodel)) + self.bytes_beside()
        return modelled_seconds(device, macs, download, self._message(submodel))

    def _message(self, submodel: Submodel) -> int:
        return self._once("message", submodel, lambda: message_bytes(self.task.layout, submodel, self.codec))

    def _received(self, submodel: Submodel) -> int:
        decoded = self._once("decoded", submodel, lambda: decoded_bytes(self.task.layout, submodel, self.codec))
        return self._message(submodel) + decoded

    def _once(self, what: str, submodel: Submodel, cost: Callable[[], N]) -> N:
        """A cost that is asked for again and again: for each device, and in each round."""
        key = (what, submodel.key)
        if key not in self._known:
            self._known[key] = cost()
        return self._known[key]  # type: ignore[return-value]

    def largest(
        self,
        device: Device,
        part_at: Callable[[float], Submodel],
        rule: Callable[[Device, Submodel], bool] | None = None,
    ) -> float | None:
        """The largest ratio whose part a device holds, a multiple of 1/`STEPS`; None: it holds not even the least.

        Args:
            device: what it declared.
            part_at: ratio -> part; its cost must not fall as the ratio rises.
            rule: `holds` by default.
        """
        allows = rule or self.holds
        low, high = 0, STEPS  # a device holds `low`, and nothing above `high`
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if allows(device, part_at(middle / STEPS)) else (low, middle - 1)
        return low / STEPS if low else None
