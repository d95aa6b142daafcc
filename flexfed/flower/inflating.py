"""What Flower 1.41 puts together from the bytes of a client: bounded, and each reply apart from the others.

An array travels as chunks and a list of their numbers, and `Array.inflate` joins what the list names: a chunk of 1 MB
that is named 500 times is 500 MB, and nothing of that has travelled. Equal chunks do travel once (an array of zeros),
so repeating is no fault by itself; only the size can be.

The grid of a deployment puts the replies of a pull together one after the other, and raises where one cannot be. By
then the SuperLink has handed the others out, once and for all: one client's garbage would cost all of them their work.

Both reach into Flower; where its inner parts are called otherwise, nothing is changed, and nothing bounded.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from flwr.app import Array, Message
from flwr.serverapp import Grid

_inflate: Any = Array.inflate.__func__  # type: ignore[attr-defined]


@contextmanager
def arrays_of_at_most(most: int) -> Iterator[None]:
    """While it lasts, Flower joins arrays of no more bytes, all together.

    Args:
        most: bytes.

    Raises:
        ValueError: inside, where there would be more, by more than a chunk for each; before anything is allocated.
    """
    left = most

    def inflate(cls: type[Array], content: bytes, children: dict[str, Any] | None = None) -> Array:
        nonlocal left
        largest = max((len(chunk.data) for chunk in (children or {}).values() if hasattr(chunk, "data")), default=0)
        named = json.loads(content[content.find(b"\0") + 1 :])["arraychunk_ids"]
        if (size := len(named) * largest) > left + largest:  # the last chunk may be shorter
            raise ValueError(f"arrays of more than {most:,} bytes, one of {size:,}; expected at most that")
        array: Array = _inflate(cls, content, children)
        left -= len(array.data)
        return array

    with _replaced(Array, "inflate", classmethod(inflate)):
        yield


@contextmanager
def replies_apart(grid: Grid, most: int, until: float = math.inf) -> Iterator[dict[str, str]]:
    """While it lasts, a reply that cannot be read takes no other one of its pull with it.

    What is pulled in its place is no `Message`; a reply belongs to the message that the SuperLink says it answers,
    whatever the client has written into it.

    Args:
        grid: of a deployment; any other stays as it is.
        most: bytes that one reply may have, as it travels and put together.
        until: by `time.monotonic`: what a node has announced, and not sent by then, is not waited for.

    Yields:
        Id of a message -> why its reply cannot be read; filled while replies are pulled.
    """
    module: Any = sys.modules.get(type(grid).__module__)
    client: Any = getattr(grid, "_runtime_client", None)
    put_together: Any = getattr(module, "inflate_object_from_contents", None)
    if put_together is None or not (hasattr(client, "PullMessages") and hasattr(client, "PullObject")):
        yield {}
        return
    pull = _Pull(most, until, client.PullMessages, client.PullObject, put_together)
    with ExitStack() as stack:
        stack.enter_context(_replaced(client, "PullMessages", pull.messages))
        stack.enter_context(_replaced(client, "PullObject", pull.object))
        stack.enter_context(_replaced(module, "inflate_object_from_contents", pull.put_together))
        yield pull.unreadable


@dataclass
class _Pull:
    """One pull of replies, as Flower's grid goes through it.

    Attributes:
        unreadable: see `replies_apart`.
    """

    most: int
    until: float
    pull_messages: Any
    pull_object: Any
    inflate: Any
    unreadable: dict[str, str] = field(default_factory=dict)
    _asked: dict[str, str] = field(default_factory=dict)  # id of a reply -> of the message that it answers
    _owners: dict[str, set[str]] = field(default_factory=dict)  # id of an object -> of the replies that hold it
    _bytes: dict[str, int] = field(default_factory=dict)  # pulled, of each reply

    def messages(self, request: Any) -> Any:
        """Which replies there are; their objects come one by one."""
        response = self.pull_messages(request)
        for reply, tree in zip(response.messages_list, response.message_object_trees, strict=False):
            self._asked[reply.metadata.message_id] = reply.metadata.reply_to_message_id
            trees = [tree]
            while trees:
                one = trees.pop()
                self._owners.setdefault(one.object_id, set()).add(reply.metadata.message_id)
                trees += one.children
        return response

    def object(self, request: Any) -> Any:
        """A piece of a reply; where one is too large, or late, it is as if there were none: Flower tells an error then.

        Equal pieces of several replies travel once; a reply that is too large takes none of the others' with it.
        """
        owners = self._owners.get(request.object_id, {""})
        if all(self._bytes.get(owner, 0) > self.most for owner in owners):
            return _NOTHING
        response = self.pull_object(request)
        if not response.object_available and time.monotonic() > self.until:
            return _NOTHING
        for owner in owners:
            self._bytes[owner] = self._bytes.get(owner, 0) + len(response.object_content)
        return response

    def put_together(self, object_id: str, contents: dict[str, bytes], **options: Any) -> Any:
        """The reply; what stands in its place if there is none."""
        asked = self._asked.get(object_id, "")
        try:
            with arrays_of_at_most(self.most):
                reply = self.inflate(object_id, contents, **options)
            if not isinstance(reply, Message):
                raise TypeError(f"expected a message, got {type(reply).__name__}")
        except Exception as error:  # garbage raises in many ways, and no network is asked here
            self.unreadable[asked] = f"{type(error).__name__}: {error}"
            return SimpleNamespace(metadata=SimpleNamespace())
        reply.metadata.__dict__["_reply_to_message_id"] = asked
        return reply


_NOTHING = SimpleNamespace(object_found=False, object_available=False, object_content=b"")


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of something has another value while it lasts."""
    own = vars(owner).get(name, _replaced)  # whether it is the owner's own, or its class's
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is _replaced:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
