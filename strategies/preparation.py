"""What a method has its clients do before round 1, and what that costs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flwr.app import Message
from flwr.serverapp import Grid

from flexfed.cost import modelled_joules, modelled_seconds
from flexfed.devices import Device
from flexfed.flower.messages import in_one_line, num_bytes
from flexfed.jobs import Assignment, Update

if TYPE_CHECKING:
    from strategies.base import SubmodelStrategy

log = logging.getLogger("flwr")


@dataclass
class Preparation:
    """What clients did and what travelled before round 1 (exploration); it counts in round 1's line.

    Attributes:
        seconds: of each phase, its slowest device.
    """

    bytes_down: int = 0
    bytes_up: int = 0
    macs: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    joules: float = 0.0
    client_seconds: float = 0.0

    def count(self, phase: str, device: Device, update: Update, bytes_down: int, bytes_up: int) -> None:
        """Add a reply that was received."""
        macs = int(update.metrics.get("macs", 0))
        self.bytes_up += bytes_up
        self.macs += macs
        self.client_seconds += update.metrics.get("seconds", 0.0)
        self.seconds[phase] = max(self.seconds.get(phase, 0.0), modelled_seconds(device, macs, bytes_down, bytes_up))
        self.joules += modelled_joules(device, macs, bytes_down, bytes_up)

    def line(self) -> dict[str, Any]:
        """Its share of round 1's line; nothing where nothing was done."""
        if not self.bytes_down:
            return {}
        return {
            "bytes-preparation": self.bytes_down + self.bytes_up,
            "macs-preparation": int(self.macs),
            "modelled-seconds-preparation": sum(self.seconds.values()),
        }

    def ask(
        self,
        strategy: SubmodelStrategy,
        grid: Grid,
        action: str,
        assigned: Mapping[int, Assignment],
        receive: Callable[[int, Update], None],
    ) -> set[int]:
        """Have clients do one of their method's actions before round 1; what it costs counts in that round's line.

        Args:
            strategy: whose clients.
            grid: to them.
            action: a key of `Method.actions`.
            assigned: partition -> the part of the global model that it is sent.
            receive: is given the replies, one at a time; one for which it raises ValueError is left out.

        Returns:
            The partitions whose replies were received.
        """
        asked = {partition: strategy.with_codecs(assignment) for partition, assignment in sorted(assigned.items())}
        sent: dict[int, int] = {}  # partition -> bytes

        def messages() -> Iterator[Message]:
            for partition, message in strategy.messages(f"train.{action}", 0, asked):
                sent[partition] = num_bytes(message)
                self.bytes_down += sent[partition]
                yield message

        received: set[int] = set()
        for reply in grid.send_and_receive(messages(), timeout=strategy.settings.round_timeout):
            partition = strategy.federation.partition_of(reply)
            try:
                if partition in received or partition not in asked:
                    raise ValueError("it was not asked, or has replied already")
                update = strategy.read(reply, asked[partition])
                receive(partition, update)
            except ValueError as cause:
                log.warning("%s: client %s left out: %s", action, partition, in_one_line(str(cause)))
            else:
                received.add(partition)
                device = strategy.federation.devices[partition]
                self.count(action, device, update, sent[partition], num_bytes(reply))
        return received
