"""Two grids: one that calls the ClientApp in this process, one that hands out replies one at a time."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity  # internal, and imported nowhere else

_BATCH = 64  # ids asked for at once


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
    folded: that bounds what waits on either side.

    Args:
        grid: Flower's.
        ordered: yield in the order sent (the same bits every time), or as replies arrive.
        in_flight: limit on messages sent minus replies handed out.
        poll_s: pause between questions to the grid when nothing is ready.
    """

    def __init__(self, grid: Grid, ordered: bool = True, in_flight: int = 64, poll_s: float = 0.02):
        self._grid = grid
        self._ordered = ordered
        self._in_flight = in_flight
        self._poll_s = poll_s
        self._origins: dict[str, int] = {}

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
        """The node that a reply belongs to; errors made by the SuperLink do not name it themselves."""
        return self._origins.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Yield every reply once; a message without one by `timeout` seconds gives an error reply."""
        end = time.monotonic() + (timeout if timeout is not None else float("inf"))
        self._origins.clear()
        todo = iter(messages)
        waiting: OrderedDict[str, Message] = OrderedDict()  # message id -> what to say if no reply comes
        ready: dict[str, Message] = {}
        more = True
        while more or waiting:
            while more and len(waiting) < self._in_flight:
                message = next(todo, None)
                if message is None:
                    more = False
                    break
                yield from self._push(message, waiting)
                del message
                self._pull(waiting, ready)
                yield from self._hand_out(waiting, ready)
            if waiting and not self._pull(waiting, ready):
                if time.monotonic() > end:
                    yield from self._give_up(waiting, ready, todo)
                    return
                time.sleep(self._poll_s)
            yield from self._hand_out(waiting, ready)

    def _push(self, message: Message, waiting: OrderedDict[str, Message]) -> Iterator[Message]:
        ids = list(self._grid.push_messages([message]))
        if ids and ids[0]:
            waiting[ids[0]] = self._error(message, ids[0], "no reply before round-timeout")
        else:
            lost = f"undelivered-{message.metadata.dst_node_id}"
            yield self._error(message, lost, "the message could not be delivered: no such node", code=5)

    def _pull(self, waiting: Mapping[str, Message], ready: dict[str, Message]) -> bool:
        ids = [i for i in waiting if i not in ready]
        got = False
        for start in range(0, len(ids), _BATCH):
            for reply in self._grid.pull_messages(ids[start : start + _BATCH]):
                ready[reply.metadata.reply_to_message_id] = reply
                got = True
        return got

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
        for message_id, late in waiting.items():
            yield ready.get(message_id, late)
        for message in unsent:
            yield self._error(message, f"unsent-{message.metadata.dst_node_id}", "not sent before round-timeout")

    def _error(self, message: Message, message_id: str, reason: str, code: int = 0) -> Message:
        """An error reply of our own to a message."""
        self._origins[message_id] = message.metadata.dst_node_id
        reply = Message(Error(code=code, reason=reason), reply_to=message)
        reply.metadata.__dict__["_reply_to_message_id"] = message_id
        return reply
