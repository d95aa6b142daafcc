"""What a device can carry: by its declared capacity, its memory, and the time that a round may take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from flexfed.cost import message_bytes, modelled_seconds, round_macs, shares
from flexfed.devices import Device
from flexfed.jobs import Task
from flexfed.submodel import Submodel
from flexfed.training import samples_trained

STEPS = 64
"""Ratios are multiples of 1/64: few enough to cost them all, and devices that share one share its submodel."""


def _nothing(_: Submodel) -> int:
    return 0


@dataclass(frozen=True)
class Budget:
    """Compares what training a part asks for with what a device has. What a device never told does not bind it.

    Attributes:
        task: the network and how it is trained.
        round_deadline: modelled seconds that a device may take for a round, transfers included; 0 = any.
        macs_beside: part -> multiply-accumulates a sample beside training the part itself (distillation teachers).
    """

    task: Task
    round_deadline: float = 0.0
    macs_beside: Callable[[Submodel], int] = _nothing

    def holds(self, device: Device, submodel: Submodel) -> bool:
        """Whether capacity, memory and deadline all allow a part."""
        return self.share(submodel) <= device.capacity + 1e-9 and self.bears(device, submodel)

    def bears(self, device: Device, submodel: Submodel) -> bool:
        """Whether memory and deadline allow a part, whatever share of the network the device calls its capacity."""
        fits = device.memory_bytes == math.inf or self.memory(submodel) <= device.memory_bytes
        return fits and (not self.round_deadline or self.seconds(device, submodel) <= self.round_deadline)

    def share(self, submodel: Submodel) -> float:
        """Parameters of a part, as a share of the network's."""
        return shares(self.task.layout, {"part": submodel})["part"]

    def memory(self, submodel: Submodel) -> int:
        """Bytes that a device needs to receive a part and to train it."""
        return self.task.memory_to_train(submodel) + message_bytes(self.task.layout, submodel)

    def seconds(self, device: Device, submodel: Submodel) -> float:
        """Modelled seconds of a device's round: receive a part, train it, send it back."""
        task = self.task
        macs = round_macs(task.macs(submodel), device.num_examples, task.training)
        macs += self.macs_beside(submodel) * samples_trained(device.num_examples, task.training)
        return modelled_seconds(device, macs, 2 * message_bytes(task.layout, submodel))

    def largest(self, device: Device, part_at: Callable[[float], Submodel]) -> float | None:
        """The largest ratio whose part a device holds, a multiple of 1/`STEPS`; None: it holds not even the least.

        Args:
            device: what it declared.
            part_at: ratio -> part; its cost must not fall as the ratio rises.
        """
        low, high = 0, STEPS  # a device holds `low`, and nothing above `high`
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.holds(device, part_at(middle / STEPS)) else (low, middle - 1)
        return low / STEPS if low else None
