"""Who is out there: node ids of this run, the partition and device behind each."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from flexfed.devices import Device
from flexfed.flower.limits import refuse_large
from flexfed.flower.messages import cause_of, code_fingerprint, in_one_line, read_profile

log = logging.getLogger("flwr")
_WAIT_S = 60.0  # for nodes that have not connected yet, and for their profiles
_POLL_S = 0.02
_SETTLE_S = 3.0  # real devices connect one after the other: whoever is first does not decide how many there are
_AGAIN_S = 60.0  # before a node that did not become a client is asked again; twice as long each time
_RAISED = 2  # Flower's code of an error that the ClientApp raised
MOST_BYTES = 1_000_000
"""Of a profile; its labels are the most of it."""


class Federation:
    """Knows every client by its partition: node ids are random and differ from run to run.

    Attributes:
        devices: of all that ever told their profile, by partition; another object whenever somebody new comes.
        nodes: partition -> node id.
        present: the partitions that are connected and free to work.
        num_partitions: that most clients speak of, here or not; who speaks of another number is left out.
    """

    def __init__(self) -> None:
        self.devices: Mapping[int, Device] = {}
        self.nodes: dict[int, int] = {}
        self.present: frozenset[int] = frozenset()
        self.num_partitions = 0
        self._partitions: dict[int, int] = {}  # node id -> partition
        self._settled: set[int] = set()  # connected nodes that need not be asked who they are
        self._grid: Grid | None = None
        self._claims: dict[int, int] = {}  # partition -> number of partitions that its client speaks of
        self._again: dict[int, tuple[float, float]] = {}  # node -> when it may be asked again, and the pause after that
        self._reasons: list[str] = []  # why nodes did not become clients

    def meet(self, grid: Grid, timeout: float) -> None:
        """Ask every node who it is; waits until as many answer as most of them say there are.

        A node whose profile cannot be, or that says it is a partition that another one is already, is left out.

        Raises:
            RuntimeError: nobody answered, or all that did have other code; says what they said.
        """
        self._grid = grid
        asked: set[int] = set()
        end = time.monotonic() + min(timeout, _WAIT_S)
        settled = time.monotonic() + (min(timeout, _SETTLE_S) if getattr(grid, "real_time", False) else 0.0)
        while self._is_expected(settled) and time.monotonic() < end:
            connected = set(grid.get_node_ids())
            if new := sorted(connected - asked):
                asked.update(new)
                self._ask(new, connected, timeout)
            elif asked and len(asked) >= max(1, self.num_partitions) and time.monotonic() > settled:
                break
            else:
                time.sleep(_POLL_S)
        self._leave_out_of_other_fleets()
        if not self.devices:
            why = self._reasons[0] if self._reasons else "none connected"
            raise RuntimeError(f"no client answered the profile query: {why}")
        self.present = frozenset(self.nodes)
        log.info("%s of %s clients are here", len(self.devices), self.num_partitions)

    def _is_expected(self, settled: float) -> bool:
        """Whether more clients may come, from what those say that are here."""
        return len(self.devices) < max(1, self.num_partitions) or time.monotonic() < settled

    def look_around(self, at_least: int, timeout: float) -> None:
        """Before a round: meet who is new or back, and see who has left or still works for an earlier round.

        Args:
            at_least: waits until so many are free to work; where fewer are left, until `timeout`.
            timeout: seconds.
        """
        end, told = time.monotonic() + timeout, False
        while True:
            self._see()
            if len(self.present) >= at_least or time.monotonic() > end:
                return
            if not told:
                log.warning("%s clients are here and free, waiting for %s", len(self.present), at_least)
                told = True
            time.sleep(min(1.0, timeout / 10))

    def _see(self) -> None:
        assert self._grid is not None, "meet first"
        connected = set(self._grid.get_node_ids())
        self._settled &= connected  # who comes back may be another device now
        now = time.monotonic()
        if new := sorted(n for n in connected - self._settled if self._again.get(n, (0.0, 0.0))[0] <= now):
            self._ask(new, connected, _WAIT_S)
            self._leave_out_of_other_fleets()
        busy: set[int] = getattr(self._grid, "busy", set)()
        here = frozenset(p for p, node in self.nodes.items() if node in connected and node not in busy)
        if here != self.present:
            came, left = here - self.present, self.present - here
            log.info(
                "here now: partitions %s; left, or still at work on an earlier round: %s", sorted(came), sorted(left)
            )
        self.present = here

    def _ask(self, nodes: list[int], connected: set[int], timeout: float) -> None:
        """Ask nodes who they are."""
        assert self._grid is not None
        devices = dict(self.devices)
        for reply in self._grid.send_and_receive(_questions(nodes), timeout=timeout):
            self._learn(reply, connected, devices)
            del reply
        if devices != self.devices:
            self.devices = dict(sorted(devices.items()))
        if not self.present:  # of the first meeting: later ones have to agree with it
            claims = Counter(self._claims.values())
            self.num_partitions = min(claims, key=lambda claim: (-claims[claim], claim), default=0)

    def _leave_out_of_other_fleets(self) -> None:
        """Who speaks of another number of partitions has the data of another partition than we believe."""
        others = {p: self.nodes[p] for p, claim in self._claims.items() if claim != self.num_partitions}
        for partition, node in others.items():
            why = f"it says that there are {self._claims.pop(partition)} partitions, most others {self.num_partitions}"
            self._leave_out(node, why, for_good=True)
            del self.nodes[partition], self._partitions[node]
        if others:
            self.devices = {p: device for p, device in self.devices.items() if p not in others}

    def _learn(self, reply: Message, connected: set[int], devices: dict[int, Device]) -> None:
        node = self._node_of(reply)
        if reply.has_error():
            self._leave_out(node, in_one_line(cause_of(reply.error)), for_good=reply.error.code == _RAISED)
            return
        try:
            refuse_large(reply, MOST_BYTES)
            device, num_partitions = read_profile(reply.content)
        except ValueError as cause:
            self._leave_out(node, in_one_line(f"its profile is not one: {cause}"), for_good=True)
            return
        other = self.nodes.get(device.partition, node)
        if other != node and other in connected:
            why = (
                f"it says that it is partition {device.partition}, as another node does; give each its own partition-id"
            )
            self._leave_out(node, why, for_good=False)  # the other one may be a dead node's entry, which lapses soon
            return
        self.nodes.pop(self._partitions.get(node, -1), None)
        self._partitions.pop(other, None)
        self.nodes[device.partition], self._partitions[node] = node, device.partition
        devices[device.partition], self._claims[device.partition] = device, num_partitions
        self._settled.add(node)
        self._again.pop(node, None)

    def _leave_out(self, node: int, reason: str, for_good: bool) -> None:
        """Go on without a node; one that is not left out for good is asked again, less and less often."""
        pause = self._again.get(node, (0.0, _AGAIN_S))[1]
        self._again[node] = time.monotonic() + pause, 2 * pause
        if for_good:
            self._settled.add(node)
        if reason not in self._reasons:  # once, not once for each client and round
            self._reasons.append(reason)
            log.warning("a client is left out: %s", reason)

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


def _questions(nodes: list[int]) -> Iterator[Message]:
    for node in nodes:
        content = RecordDict({"config": ConfigRecord({"code": code_fingerprint()})})
        yield Message(content, dst_node_id=node, message_type="query.profile")
