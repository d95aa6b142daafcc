"""Who is out there: node ids of this run, the partition and device behind each."""

from __future__ import annotations

import logging
import time

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from flexfed.devices import Device
from flexfed.flower.messages import cause_of, code_fingerprint, read_profile

log = logging.getLogger("flwr")
_WAIT_S = 60.0  # for nodes that have not connected yet
_POLL_S = 0.02


class Federation:
    """Knows every client by its partition: node ids are random and differ from run to run."""

    def __init__(self) -> None:
        self.devices: dict[int, Device] = {}
        self.nodes: dict[int, int] = {}  # partition -> node id
        self.num_partitions = 0  # that the clients speak of, here or not
        self._partitions: dict[int, int] = {}  # node id -> partition
        self._grid: Grid | None = None

    def meet(self, grid: Grid, timeout: float) -> None:
        """Ask every node who it is; waits until as many answer as the first one says there are.

        Raises:
            RuntimeError: nobody answered, or all that did have other code; says what they said.
        """
        self._grid = grid
        asked: set[int] = set()
        expected = 1
        reasons: list[str] = []
        end = time.monotonic() + min(timeout, _WAIT_S)
        while len(self.devices) < expected and time.monotonic() < end:
            new = sorted(set(grid.get_node_ids()) - asked)
            if not new:
                if asked and len(asked) >= expected:
                    break
                time.sleep(_POLL_S)
                continue
            asked.update(new)
            for reply in grid.send_and_receive(self._questions(new), timeout=timeout):
                expected = max(expected, self._learn(reply, reasons))
        if not self.devices:
            raise RuntimeError(f"no client answered the profile query: {reasons[0] if reasons else 'none connected'}")
        self.num_partitions = expected
        self.devices = dict(sorted(self.devices.items()))
        log.info("%s of %s clients are here", len(self.devices), expected)

    def _questions(self, nodes: list[int]) -> list[Message]:
        return [
            Message(
                RecordDict({"config": ConfigRecord({"code": code_fingerprint()})}),
                dst_node_id=node,
                message_type="query.profile",
            )
            for node in nodes
        ]

    def _learn(self, reply: Message, reasons: list[str]) -> int:
        if reply.has_error():
            reasons.append(cause_of(reply.error))
            if reasons.count(reasons[-1]) == 1:  # once, not once for each client
                log.warning("a client did not tell its profile: %s", reasons[-1])
            return 1
        try:
            device, expected = read_profile(reply.content)
        except (KeyError, TypeError, ValueError) as cause:
            reasons.append(f"its profile is not one: {cause!r}")
            log.warning("a client is left out: %s", reasons[-1])
            return 1
        if device.partition in self.devices:
            raise RuntimeError(f"two nodes say they are partition {device.partition}; give each its own partition-id")
        node = self._node_of(reply)
        self.devices[device.partition] = device
        self.nodes[device.partition], self._partitions[node] = node, device.partition
        return expected

    def _node_of(self, reply: Message) -> int:
        origin = getattr(self._grid, "origin", None)
        return int(origin(reply)) if origin else reply.metadata.src_node_id

    def partition_of(self, reply: Message) -> int:
        """The partition a reply comes from; -1 for a node that was never met."""
        return self._partitions.get(self._node_of(reply), -1)

    def message(self, partition: int, content: RecordDict, message_type: str, server_round: int) -> Message:
        """A message to one client."""
        return Message(
            content, dst_node_id=self.nodes[partition], message_type=message_type, group_id=str(server_round)
        )
