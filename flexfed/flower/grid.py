"""Two grids: one that calls the ClientApp in this process, one that hands out replies one at a time."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity  # internal, and imported nowhere else

from flexfed.flower.inflating import replies_apart
from flexfed.flower.messages import num_bytes

IN_FLIGHT = 64
"""Messages sent and not yet folded, where replies are folded in the order of the messages."""

PULLED_BYTES = 256 * 2**20
"""Of the replies that are pulled at once, about."""

MOST_BYTES = 4 * 2**30
"""Of the replies that are pulled at once, if all of them are as large as can be."""

MOST_TIMES = 8
"""A reply is at most this many times as large as what was sent (4 bits there, 32 back), beside `ROOM_BYTES`."""

ROOM_BYTES = 2**26
"""For answers to small questions: FedStitch's sums over 2,800 channels."""

LATE_S = 1.0
"""To wait for what a late node has announced and not sent yet; it is dropped anyway."""

POLL_S = 0.25
"""Between two questions to a SuperLink for replies: each takes about 20 ms of it."""

_BATCH = 64  # ids asked for at once, at most


class InProcessGrid(Grid):
    """A federation in one process: a message is answered while it is pushed.

    The same numbers as Flower's simulation, without Ray and in a fraction of the time: for tests, debugging and
    `flexfed run --in-process`. Contexts live as long as the grid, as they do in a simulation.

    Args:
        app: the ClientApp.
        num_supernodes: simulated clients; partition ids 0, 1, ...
        run_config: what clients find in `context.run_config`.
    """

    def __init__(self, app: ClientApp, num_supernodes: int, run_config: Mapping[str, Any] | None = None):
        if num_supernodes < 1:
            raise ValueError(f"num-supernodes must be at least 1, got {num_supernodes}")
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self._app = app
        self._replies: dict[str, Message] = {}
        self._pushed = 0
        self._contexts = {
            1000 + i: Context(
                run_id=1,
                node_id=1000 + i,
                node_config={"partition-id": i, "num-partitions": num_supernodes},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for i in range(num_supernodes)
        }

    @property
    def run(self) -> Any:
        """No run is registered anywhere."""
        return None

    def set_run(self, run: Any) -> None:
        """Nothing to set: there is one run."""

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Deprecated in Flower; build a `Message` instead."""
        raise RuntimeError("create_message is deprecated in Flower; build a flwr.app.Message")

    def get_node_ids(self) -> Iterable[int]:
        """All nodes; in process they are always there."""
        return list(self._contexts)

    def get_nodes(self) -> Iterable[Any]:
        """Node records exist only where a SuperLink keeps them."""
        raise RuntimeError("the in-process grid has no node records; use get_node_ids()")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer each message at once; ids of those that reached a node ('' for the others)."""
        ids = []
        for message in messages:
            context = self._contexts.get(message.metadata.dst_node_id)
            if context is None:
                ids.append("")
                continue
            self._pushed += 1
            message_id = str(self._pushed)
            message.metadata.__dict__["_message_id"] = message_id
            self._replies[message_id] = self._answer(message, context)
            ids.append(message_id)
        return ids

    def _answer(self, message: Message, context: Context) -> Message:
        try:
            return self._app(message, context)
        except Exception as error:  # as Flower's runtimes do: a client's failure is a reply
            return Message(Error(code=2, reason=f"{type(error).__name__}: {error}"), reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are ready, each once."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All replies at once."""
        return self.pull_messages(self.push_messages(messages))


class StreamingGrid(Grid):
    """Wraps a grid so that `send_and_receive` yields replies one at a time, as they can be folded.

    Nothing is sent before the caller iterates, and no more than `in_flight` messages are sent and not yet
    folded: that bounds what waits on either side. One question asks for the replies to several messages: for as many
    as fill `PULLED_BYTES`, if a reply is as large as what was sent.

    Args:
        grid: Flower's.
        ordered: yield in the order sent (the same bits every time), or as replies arrive.
        in_flight: limit on messages sent minus replies handed out; None = all are sent at once.
        poll_s: pause between questions to the grid.
        real_time: on real devices `timeout` is counted from the first message; where devices are simulated and take
            turns, from the last reply.
    """

    def __init__(
        self,
        grid: Grid,
        ordered: bool = True,
        in_flight: int | None = IN_FLIGHT,
        poll_s: float = 0.02,
        real_time: bool = False,
    ):
        self._grid = grid
        self._ordered = ordered
        self._in_flight = in_flight
        self._poll_s = poll_s
        self.real_time = real_time
        self._origins: dict[str, int] = {}
        self._owed: dict[str, tuple[int, int]] = {}  # message id -> node, and bytes sent to it, of late replies
        self._at_work: set[int] = set()
        self._until = math.inf
        self._largest = 1  # bytes of a message of this exchange

    @property
    def run(self) -> Any:
        """The wrapped grid's run."""
        return self._grid.run

    def set_run(self, run: Any) -> None:
        """Set the wrapped grid's run."""
        self._grid.set_run(run)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Deprecated in Flower; build a `Message` instead."""
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """The wrapped grid's nodes."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """The wrapped grid's node records."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push to the wrapped grid."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull from the wrapped grid."""
        return self._grid.pull_messages(message_ids)

    def origin(self, reply: Message) -> int:
        """The node that a reply belongs to, whatever the reply says; errors made by the SuperLink name none."""
        return self._origins.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)

    def busy(self) -> set[int]:
        """Nodes that still work for an exchange that was closed without them; what they send now is dropped."""
        self._until = time.monotonic() + LATE_S
        self._largest = max((size for _, size in self._owed.values()), default=1)
        for ids in self._batches(list(self._owed)):
            for message_id, reply in self._read(ids):
                self._owed.pop(message_id, None)
                del reply
        return {node for node, _ in self._owed.values()}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Yield every reply once; a message without one by `timeout` seconds gives an error reply."""
        patience = timeout if timeout is not None else math.inf
        self._at_work = self.busy() if self.real_time else set()
        self._origins.clear()
        self._largest = 1
        todo = iter(messages)
        waiting: OrderedDict[str, Message] = OrderedDict()  # message id -> what to say if no reply comes
        ready: dict[str, Message] = {}
        end, more = time.monotonic() + patience, True
        self._until = end
        while more or waiting:
            for message in self._to_send(todo, waiting):
                yield from self._push(message, waiting, patience)
                del message
                if not self.real_time:  # over a network a question takes as long as many messages
                    self._pull([i for i in waiting if i not in ready], waiting, ready)
                    yield from self._hand_out(waiting, ready)
            more = self._in_flight is not None and len(waiting) >= self._in_flight
            got = False
            for ids in self._batches([i for i in waiting if i not in ready]):
                got |= self._pull(ids, waiting, ready)
                yield from self._hand_out(waiting, ready)
            if got and not self.real_time:
                self._until = end = time.monotonic() + patience
            if waiting and time.monotonic() > end:
                yield from self._give_up(waiting, ready, todo)
                return
            if waiting and (self.real_time or not got):
                time.sleep(self._poll_s)

    def _to_send(self, todo: Iterator[Message], waiting: Mapping[str, Message]) -> Iterator[Message]:
        """The next messages, while there is room for them."""
        while self._in_flight is None or len(waiting) < self._in_flight:
            message = next(todo, None)
            if message is None:
                return
            yield message
            del message

    def _push(self, message: Message, waiting: OrderedDict[str, Message], patience: float) -> Iterator[Message]:
        if self.real_time and math.isfinite(patience):  # who finds it later need not work for a round that is over
            message.metadata.ttl = min(message.metadata.ttl, 2 * patience)
        node = message.metadata.dst_node_id
        if node in self._at_work:
            yield self._unsent(message, "not sent: it still owes the reply to an earlier message")
            return
        self._largest = max(self._largest, num_bytes(message))
        ids = list(self._grid.push_messages([message]))
        if ids and ids[0]:
            self._origins[ids[0]] = node
            waiting[ids[0]] = _error(message, ids[0], "no reply before round-timeout")
        else:
            yield self._unsent(message, "the message could not be delivered: no such node", code=5)

    def _unsent(self, message: Message, reason: str, code: int = 0) -> Message:
        """What to say of a message that never left, and therefore has no id."""
        node = message.metadata.dst_node_id
        self._origins[f"unsent-{node}"] = node
        return _error(message, f"unsent-{node}", reason, code)

    @property
    def _most(self) -> int:
        """Bytes of a reply of this exchange, at most."""
        return MOST_TIMES * self._largest + ROOM_BYTES

    def _batches(self, ids: list[str]) -> Iterator[list[str]]:
        """Ids to ask for at once: a reply is about as large as what was sent."""
        size = max(1, min(_BATCH, PULLED_BYTES // self._largest, MOST_BYTES // self._most))
        return (ids[start : start + size] for start in range(0, len(ids), size))

    def _pull(self, ids: list[str], waiting: Mapping[str, Message], ready: dict[str, Message]) -> bool:
        """Put what has come beside what is ready; whether anything has."""
        got = False
        for message_id, reply in self._read(ids):
            if message_id in waiting:
                ready[message_id] = _error(waiting[message_id], message_id, reply) if isinstance(reply, str) else reply
                got = True
        return got

    def _read(self, ids: list[str]) -> Iterator[tuple[str, Message | str]]:
        """The replies that have come, by the message that they answer; a text for one that cannot be read."""
        try:
            with replies_apart(self._grid, self._most, self._until) as unreadable:
                replies = [reply for reply in self._grid.pull_messages(ids) if isinstance(reply, Message)]
        except Exception as error:
            if _is_of_the_link(error):
                raise
            if len(ids) > 1:
                for message_id in ids:
                    yield from self._read([message_id])
            else:
                yield ids[0], f"its reply cannot be read: {type(error).__name__}: {error}"
            return
        yield from ((message_id, f"its reply cannot be read: {why}") for message_id, why in unreadable.items())
        while replies:
            reply = replies.pop(0)
            yield reply.metadata.reply_to_message_id, reply
            del reply

    def _hand_out(self, waiting: OrderedDict[str, Message], ready: dict[str, Message]) -> Iterator[Message]:
        while ready:
            first = next(iter(waiting)) if self._ordered else next(iter(ready))
            if first not in ready:
                return
            del waiting[first]
            yield ready.pop(first)

    def _give_up(
        self, waiting: OrderedDict[str, Message], ready: dict[str, Message], unsent: Iterator[Message]
    ) -> Iterator[Message]:
        """What is there, and an error for each message that has no reply or was never sent."""
        self._owed |= {i: (self._origins[i], self._largest) for i in waiting if i not in ready}
        for message_id, late in waiting.items():
            yield ready.get(message_id, late)
        for message in unsent:
            yield self._unsent(message, "not sent before round-timeout")


def stream(grid: Grid, reply_order: str = "auto", in_flight: int = 0) -> StreamingGrid:
    """A streaming grid as a run's settings ask for it, and as suits what is behind the grid.

    Args:
        grid: Flower's.
        reply_order: "auto", "cohort" or "arrival".
        in_flight: 0 = as it suits.
    """
    real = not is_simulated(grid)
    ordered = reply_order == "cohort" or (reply_order == "auto" and not real)
    limit = in_flight or (None if real and not ordered else IN_FLIGHT)
    return StreamingGrid(grid, ordered, limit, POLL_S if real else 0.02, real)


def is_simulated(grid: Grid) -> bool:
    """Whether the nodes behind a grid are simulated: by Flower's engine, or in this process."""
    return isinstance(grid, InProcessGrid) or type(grid).__name__ == "InMemoryGrid"  # Flower's own, not public


def _is_of_the_link(error: Exception) -> bool:
    """Whether an error says that the SuperLink is gone or the run is stopped, and nothing of a client's reply."""
    kinds = type(error).__mro__
    return isinstance(error, OSError) or any(
        kind.__module__.partition(".")[0] == "httpx" or kind.__name__ == "RunNotRunningException" for kind in kinds
    )


def _error(message: Message, message_id: str, reason: str, code: int = 0) -> Message:
    """An error reply of our own to a message."""
    reply = Message(Error(code=code, reason=reason), reply_to=message)
    reply.metadata.__dict__["_reply_to_message_id"] = message_id
    return reply
