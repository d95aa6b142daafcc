"""What Flower puts together from a client's bytes is bounded by what was asked for, and each reply apart."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.clientapp import ClientApp
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.superlink.grid import HttpGrid

from flexfed.flower.grid import InProcessGrid, StreamingGrid
from flexfed.flower.inflating import arrays_of_at_most, replies_apart
from flexfed.flower.messages import from_array, to_array

MEGABYTE = 1_000_000


def inflated(array: Array) -> Array:
    """There and back, as Flower sends it."""
    contents = {key: thing.deflate() for key, thing in get_all_nested_objects(array).items()}
    found = inflate_object_from_contents(array.object_id, contents)
    assert isinstance(found, Array)
    return found


def bomb(times: int, index: int = 0) -> tuple[str, dict[str, bytes]]:
    """One chunk of a megabyte, named many times."""
    chunk = ArrayChunk(memoryview(bytes(MEGABYTE)))
    told = {"dtype": "float32", "shape": [1], "stype": "flexfed.raw", "arraychunk_ids": [index] * times}
    body = json.dumps(told).encode()
    content = f"Array {chunk.object_id} {len(body)}".encode() + b"\0" + body
    return get_object_id(content), {get_object_id(content): content, chunk.object_id: chunk.deflate()}


@pytest.mark.parametrize("num", [0, 1, 1000, 3_000_000])
def test_arrays_that_fit_come_as_they_were(num: int) -> None:
    for values in (np.arange(num, dtype=np.float32), np.zeros(num, dtype=np.float32)):
        with arrays_of_at_most(values.nbytes):
            assert np.array_equal(from_array(inflated(to_array(values))), values)


@pytest.mark.parametrize("index", [0, -1])
def test_a_chunk_named_too_often_is_refused_before_anything_is_joined(index: int) -> None:
    name, contents = bomb(500, index)
    tracemalloc.start()
    try:
        with (
            arrays_of_at_most(10 * MEGABYTE),
            pytest.raises(ValueError, match="arrays of more than 10,000,000 bytes, one of 500,000,000; expected"),
        ):
            inflate_object_from_contents(name, contents)
        assert tracemalloc.get_traced_memory()[1] < 3 * MEGABYTE
    finally:
        tracemalloc.stop()


def test_only_while_it_lasts_and_for_repeated_chunks_that_fit() -> None:
    name, contents = bomb(5)
    with arrays_of_at_most(5 * MEGABYTE):
        assert len(inflate_object_from_contents(name, dict(contents)).data) == 5 * MEGABYTE  # type: ignore[attr-defined]
    with arrays_of_at_most(3 * MEGABYTE), pytest.raises(ValueError, match="arrays of more than 3,000,000 bytes"):
        inflate_object_from_contents(name, dict(contents))
    assert len(inflate_object_from_contents(name, dict(contents)).data) == 5 * MEGABYTE  # type: ignore[attr-defined]


# --- a whole pull, through Flower's own grid ----------------------------------------------------------------------


class SuperLink:
    """What Flower's grid asks: replies that nodes left, as objects; each reply is handed out once."""

    def __init__(self) -> None:
        self.left: dict[str, tuple[Any, Any]] = {}  # id of the message asked -> reply without content, its objects
        self.objects: dict[str, bytes] = {}
        self.confirmed: list[str] = []

    def leave(self, asked: str, reply: Message, garble: Callable[[dict[str, bytes], str], None] | None = None) -> None:
        reply.metadata.__dict__["_message_id"] = reply.object_id
        contents = {key: thing.deflate() for key, thing in get_all_nested_objects(reply).items()}
        told = message_to_proto(remove_content_from_message(reply))
        told.metadata.reply_to_message_id = asked
        if garble is not None:
            garble(contents, reply.object_id)
        self.objects |= contents
        self.left[asked] = told, get_object_tree(reply)

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:
        found = [self.left.pop(asked) for asked in request.message_ids if asked in self.left]
        return PullAppMessagesResponse(messages_list=[r for r, _ in found], message_object_trees=[t for _, t in found])

    def PullObject(self, request: Any) -> PullObjectResponse:
        content = self.objects[request.object_id]
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> None:
        self.confirmed.append(request.message_object_id)


def reply_of(number: int, size: int = 10) -> Message:
    InProcessGrid(ClientApp(), 1)  # tells Flower its task, without which it makes no message
    asked = Message(RecordDict(), dst_node_id=1, message_type="train")
    asked.metadata.__dict__["_message_id"] = f"asked{number}"
    array = ArrayRecord({"part": to_array(np.full(size, number, dtype=np.float32))})
    return Message(RecordDict({"arrays": array}), reply_to=asked)


def http_grid(link: SuperLink) -> HttpGrid:
    grid = HttpGrid(token="x")
    grid.__dict__["_client"], grid.__dict__["_run"] = link, SimpleNamespace(run_id=1)
    return grid


def no_object(contents: dict[str, bytes], root: str) -> None:
    contents[root] = b"rubbish"


def no_head(contents: dict[str, bytes], root: str) -> None:
    contents[root] = b"\xff\xfe\0\0"


def another_kind(contents: dict[str, bytes], root: str) -> None:
    contents[root] = next(content for content in contents.values() if content.startswith(b"RecordDict"))


def no_fields(contents: dict[str, bytes], root: str) -> None:
    head, _, body = contents[root].partition(b"\0")
    contents[root] = head + b"\0" + b"\xff" * len(body)


def many_chunks(contents: dict[str, bytes], root: str) -> None:
    name = next(key for key, content in contents.items() if content.startswith(b"Array "))
    head, _, body = contents[name].partition(b"\0")
    told = json.loads(body)
    told["arraychunk_ids"] = told["arraychunk_ids"] * 100_000
    body = json.dumps(told).encode()
    kind, children, _ = head.split(b" ")
    contents[name] = b" ".join([kind, children, str(len(body)).encode()]) + b"\0" + body


GARBAGE = (no_object, no_head, another_kind, no_fields)


@pytest.mark.parametrize("garble", [*GARBAGE, many_chunks])
def test_one_reply_of_garbage_takes_no_other_one_with_it(garble: Callable[[dict[str, bytes], str], None]) -> None:
    """All of a pull have been handed out by then, and would be lost."""
    link = SuperLink()
    for number in range(4):
        link.leave(f"asked{number}", reply_of(number), garble if number == 1 else None)
    grid = http_grid(link)
    with replies_apart(grid, MEGABYTE) as unreadable:
        pulled = [r for r in grid.pull_messages([f"asked{n}" for n in range(4)]) if isinstance(r, Message)]
    assert [reply.metadata.reply_to_message_id for reply in pulled] == ["asked0", "asked2", "asked3"]
    assert [from_array(reply.content["arrays"]["part"])[0] for reply in pulled] == [0, 2, 3]  # type: ignore[index]
    assert list(unreadable) == ["asked1"]
    assert unreadable["asked1"]


@pytest.mark.parametrize("garble", GARBAGE)
def test_flowers_own_pull_fails_on_garbage_and_has_it_back_afterwards(
    garble: Callable[[dict[str, bytes], str], None],
) -> None:
    link = SuperLink()
    grid = http_grid(link)
    with replies_apart(grid, MEGABYTE):
        pass
    assert "PullMessages" not in vars(link)
    for number in range(2):
        link.leave(f"asked{number}", reply_of(number), garble if number == 1 else None)
    with pytest.raises(Exception, match=r"."):
        grid.pull_messages(["asked0", "asked1"])


@pytest.mark.parametrize("garble", GARBAGE)
def test_a_round_refuses_garbage_and_names_its_node(garble: Callable[[dict[str, bytes], str], None]) -> None:
    link = SuperLink()

    class Posted(HttpGrid):
        """The SuperLink's nodes have answered as soon as they are asked."""

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            ids = []
            for message in messages:
                number = message.metadata.dst_node_id
                link.leave(f"asked{number}", reply_of(number), garble if number == 2 else None)
                ids.append(f"asked{number}")
            return ids

    Posted.__module__ = HttpGrid.__module__
    grid = Posted(token="x")
    grid.__dict__["_client"], grid.__dict__["_run"] = link, SimpleNamespace(run_id=1)
    stream = StreamingGrid(grid, ordered=False, in_flight=None, poll_s=0, real_time=True)
    asked = [Message(RecordDict(), dst_node_id=node, message_type="train") for node in range(1, 5)]
    replies = list(stream.send_and_receive(asked, timeout=5))
    assert sorted(stream.origin(reply) for reply in replies if not reply.has_error()) == [1, 3, 4]
    (bad,) = [reply for reply in replies if reply.has_error()]
    assert stream.origin(bad) == 2
    assert bad.error.reason.startswith("its reply cannot be read: ")
    assert len(link.confirmed) == 4


def test_a_reply_that_is_too_large_is_not_pulled_to_its_end() -> None:
    link, pulled = SuperLink(), list[int]()
    link.leave("asked0", reply_of(0, 10_000_000))  # 40 MB, in chunks of 5 MB
    link.leave("asked1", reply_of(1))
    once = link.PullObject
    link.PullObject = lambda request: (pulled.append(1), once(request))[1]  # type: ignore[method-assign]
    grid = http_grid(link)
    with replies_apart(grid, 8 * MEGABYTE):
        bad, good = grid.pull_messages(["asked0", "asked1"])
    assert bad.has_error()
    assert bad.metadata.reply_to_message_id == "asked0"
    assert from_array(good.content["arrays"]["part"])[0] == 1  # type: ignore[index]
    assert 1 < sum(pulled) < 12


def test_what_a_client_says_its_reply_answers_does_not_count() -> None:
    link = SuperLink()
    lie = reply_of(7)  # says that it answers asked7
    link.leave("asked0", lie)
    with replies_apart(http_grid(link), MEGABYTE):
        (reply,) = http_grid(link).pull_messages(["asked0"])
    assert reply.metadata.reply_to_message_id == "asked0"


def test_other_grids_stay_as_they_are() -> None:
    grid = InProcessGrid(ClientApp(), 1)
    before = dict(vars(grid))
    with replies_apart(grid, 1) as unreadable:
        assert vars(grid) == before
    assert unreadable == {}


def test_a_reply_that_is_announced_and_not_sent_is_not_waited_for_beyond_the_deadline() -> None:
    """The SuperLink hands a reply out before its pieces have come; Flower would wait for them for two hours."""
    link = SuperLink()
    for number in range(3):
        link.leave(f"asked{number}", reply_of(number))
    missing = {
        key for key in link.objects if link.objects[key].startswith(b"ArrayChunk") and b"\x80?" in link.objects[key]
    }
    sent = link.PullObject

    def pull(request: Any) -> PullObjectResponse:
        if request.object_id in missing:
            return PullObjectResponse(object_found=True, object_available=False)
        return sent(request)

    assert len(missing) == 1  # of the reply whose numbers are 1
    link.PullObject = pull  # type: ignore[method-assign]
    grid = http_grid(link)
    start = time.monotonic()
    with replies_apart(grid, MEGABYTE, until=start + 0.3):
        pulled = list(grid.pull_messages([f"asked{n}" for n in range(3)]))
    assert 0.3 <= time.monotonic() - start < 30
    assert [reply.metadata.reply_to_message_id for reply in pulled] == ["asked0", "asked1", "asked2"]
    assert [reply.has_error() for reply in pulled] == [False, True, False]


@pytest.mark.parametrize("first", [True, False])
def test_a_reply_that_is_too_large_takes_no_piece_of_another_with_it(first: bool) -> None:
    """Equal pieces (here what both say of themselves) are one object in the SuperLink."""
    link = SuperLink()
    large = reply_of(0, 10_000_000)
    for reply in (large, small := reply_of(1)):
        reply.content["submodel"] = ConfigRecord({"units": bytes(range(200))})
    sizes = {"asked0": large, "asked1": small}
    for asked in sorted(sizes, reverse=not first):
        link.leave(asked, sizes[asked])
    grid = http_grid(link)
    with replies_apart(grid, 8 * MEGABYTE):
        pulled = {r.metadata.reply_to_message_id: r for r in grid.pull_messages(list(link.left))}
    assert pulled["asked0"].has_error()
    assert not pulled["asked1"].has_error()
    assert pulled["asked1"].content["submodel"]["units"] == bytes(range(200))  # type: ignore[index]
