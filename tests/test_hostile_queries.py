"""Lies beside the replies of a round: profiles, tests, statistics, explorations, answers in phases."""

from __future__ import annotations

import logging
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hostile import CHANGES, Victim, corrupted, impossible_profile, pick
from test_hostile import Opened, digest, failed_reply, message_of, opened, state_of
from toy import ScriptedGrid, final_model, lines, same_bits, toy_config
from toy_zoo import knobs, toy_zoos, write_zoo

import client_app
import server_app
from flexfed.flower.federation import Federation, _questions
from flexfed.flower.grid import StreamingGrid
from flexfed.flower.messages import cause_of, to_record_of_arrays
from flexfed.jobs import Assignment
from strategies.phases import Phase, Phases

CASES = 300


# --- profiles ---------------------------------------------------------------------------------------------------


class Told(StreamingGrid):
    """Hands out the replies it was given, whatever is asked."""

    def __init__(self, replies: Callable[[list[Message]], Iterable[Message]], nodes: Iterable[int] = ()):
        self.replies, self.nodes, self._origins = replies, list(nodes), {}

    def get_node_ids(self) -> Iterable[int]:
        return self.nodes

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        yield from self.replies(list(messages))


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> list[Message]:
    """What four honest clients tell."""
    grid = ScriptedGrid(client_app.app, 4, toy_config(tmp_path_factory.mktemp("runs"), "fedavg"))
    federation = Federation()
    federation._grid = grid
    questions = list(_questions(sorted(grid.get_node_ids())))
    return [next(iter(grid.pull_messages(grid.push_messages([question])))) for question in questions]


def test_a_profile_that_cannot_be_changes_nothing_for_the_others(profiles: list[Message]) -> None:
    rng = np.random.default_rng(1)
    nodes = [reply.metadata.src_node_id for reply in profiles]
    kinds: Counter[str] = Counter()
    for number in range(2 * CASES):
        liar = number % 4
        kind, records = impossible_profile(profiles[liar].content, rng)
        kinds[kind] += 1
        replies = list(profiles)
        replies[liar] = message_of(profiles[liar], records) if kind != "an error" else failed_reply(profiles[liar], rng)
        order = rng.permutation(4)
        federation = Federation()
        federation.meet(Told(lambda _, found=replies, order=order: (found[i] for i in order), nodes), 5.0)
        assert list(federation.devices) == [p for p in range(4) if p != liar], kind
        assert federation.num_partitions == 4
    assert len(kinds) >= 20
    assert min(kinds.values()) >= 4


def test_a_partition_belongs_to_the_first_node_that_says_so(
    profiles: list[Message], caplog: pytest.LogCaptureFixture
) -> None:
    nodes = [reply.metadata.src_node_id for reply in profiles]
    twice = [*profiles, message_of(profiles[2], dict(profiles[2].content), 99)]
    federation = Federation()
    with caplog.at_level(logging.WARNING, "flwr"):
        federation.meet(Told(lambda _: twice, [*nodes, 99]), 5.0)
    assert federation.nodes == dict(zip(range(4), nodes, strict=True))
    assert federation.partition_of(twice[-1]) == -1
    assert "it says that it is partition 2, as another node does" in caplog.text


def test_a_claim_of_many_partitions_is_outvoted_and_its_client_left_out(profiles: list[Message]) -> None:
    nodes = [reply.metadata.src_node_id for reply in profiles]
    records = {name: ConfigRecord(dict(record)) for name, record in profiles[0].content.items()}  # type: ignore
    records["config"]["num-partitions"] = 1_000_000
    replies = [message_of(profiles[0], records), *profiles[1:]]
    federation = Federation()
    federation.meet(Told(lambda _: replies, nodes), 5.0)
    assert (list(federation.devices), federation.num_partitions) == ([1, 2, 3], 4)


# --- clients' own tests -----------------------------------------------------------------------------------------


def honest(grid: ScriptedGrid, messages: Iterable[Message]) -> list[Message]:
    return [next(iter(grid.pull_messages(grid.push_messages([message])))) for message in messages]


def scripted(round_: Opened) -> ScriptedGrid:
    grid = round_.grid._grid
    assert isinstance(grid, ScriptedGrid)
    return grid


@pytest.mark.parametrize("personal", ["none", "stored-local"])
def test_a_test_that_cannot_be_is_no_test(personal: str, tmp_path: Path) -> None:
    round_ = opened(tmp_path, "fedavg", {"personal": personal, "fraction-evaluate": 1.0, "test-per-label": 2})
    strategy, rng = round_.strategy, np.random.default_rng(2)
    strategy.aggregate_train(1, list(round_.replies.values()))
    messages = list(strategy.configure_evaluate(1, to_record_of_arrays(strategy.arrays), ConfigRecord(), round_.grid))
    replies = honest(scripted(round_), messages)
    assert len(replies) == (4 if personal == "none" else 8)
    kinds: Counter[str] = Counter()
    for _ in range(CASES):
        like = pick(rng, replies)
        kind, records = pick(rng, [lied_test, corrupted])(like.content, rng)
        kinds[kind] += 1
        before, told = state_of(strategy), len(strategy.record.failed)
        with patch.object(strategy, "close_round"):
            strategy.aggregate_evaluate(1, [message_of(like, records)])
        assert len(strategy.record.failed) == told + 1, (kind, records)
        note = strategy.record.failed[-1]
        assert note["partition"] == strategy.federation.partition_of(like)
        assert "evaluation" in note["reason"] or "bytes" in note["reason"], note
        assert state_of(strategy) == before, kind
    assert len(kinds) >= 6
    assert min(kinds.values()) >= 10
    with patch.object(strategy, "close_round"):
        strategy.aggregate_evaluate(1, replies)
        assert len(strategy.record.clients) == 4
        assert len(strategy.record.personal) == len(replies) - 4
        strategy.aggregate_evaluate(1, replies)  # twice
    assert "has replied already" in strategy.record.failed[-1]["reason"]
    assert len(strategy.record.clients) == 4


def lied_test(content: RecordDict, rng: np.random.Generator) -> tuple[str, dict[str, Any]]:
    numbers = dict(content["metrics"])
    num = int(numbers["num-samples"])  # type: ignore[call-overload]
    lies: list[dict[str, Any]] = [
        {"correct": num + 1}, {"correct": -1}, {"num-samples": -1}, {"num-samples": 10**6}, {"num-samples": 2**62},
        {"num-samples": 1e300}, {"num-samples": 10**400}, {"correct": 1e308, "num-samples": 1e308},
        {"correct": 10**18, "num-samples": 10**18}, {"loss-sum": 10**400}, {"correct": "metrics"},
        {"num-samples": [num]}, {"loss-sum": float("nan")},
    ]  # fmt: skip
    lie = pick(rng, lies)
    if lie.get("correct") == "metrics":
        lie = {"correct" + str(i).zfill(4): 1 for i in range(9000)}
    return "a lie", {"metrics": MetricRecord({**numbers, **lie})}  # type: ignore[dict-item]


# --- HeteroFL's statistics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("definition", ["batches", "pooled"])
def test_statistics_that_cannot_be_are_those_of_nobody(definition: str, tmp_path: Path) -> None:
    round_ = opened(tmp_path, "heterofl", {"heterofl.statistics": definition})
    strategy, rng = round_.strategy, np.random.default_rng(3)
    found: list[Message] = []

    def ask(lies: Callable[[Message], list[Message]]) -> tuple[Any, int]:
        """The statistics where every honest answer comes with lies in front, and behind."""

        def replies(messages: list[Message]) -> Iterator[Message]:
            found[:] = found or honest(scripted(round_), messages)
            for reply in found:
                yield from lies(reply)
                yield reply
                yield message_of(reply, dict(reply.content))  # twice

        strategy.record.failed.clear()
        result = strategy.level_statistics(1, strategy.arrays, Told(replies))
        return digest(result, set()), len(strategy.record.failed)

    expected, failed = ask(lambda _: [])
    assert failed == len(found) == 4
    for _ in range(CASES // 20):
        kinds: list[str] = []

        def lies(like: Message, kinds: list[str] = kinds) -> list[Message]:
            told = [pick(rng, [corrupted, lied_sums])(like.content, rng) for _ in range(5)]
            kinds += [kind for kind, _ in told]
            stranger = message_of(like, dict(like.content), 5)
            return [*(message_of(like, records) for _, records in told), failed_reply(like, rng), stranger]

        result, failed = ask(lies)
        assert result == expected, kinds
        assert failed == 4 * (1 + 5 + 2), kinds


def lied_sums(content: RecordDict, rng: np.random.Generator) -> tuple[str, dict[str, Any]]:
    records: dict[str, Any] = {name: ArrayRecord(dict(record)) for name, record in content.items()}  # type: ignore
    record = records[pick(rng, records)]
    name = pick(rng, record)
    values = np.frombuffer(record[name].data).copy()
    half = 1 + (len(values) - 1) // 2
    place, value = pick(
        rng, [(0, -1.0), (0, 0.5), (0, 1e18), (0, 2.0**60), (half, -1.0), (-1, -1e-3), (1, 1e31), (half, 1e40)]
    )
    values[place] = value
    record[name] = Array("float64", values.shape, "flexfed.raw", values.tobytes())
    return "sums", records


def test_levels_that_a_client_was_not_asked_for_are_not_its_to_tell(tmp_path: Path) -> None:
    strategy = opened(tmp_path, "heterofl", {}).strategy

    def replies(messages: list[Message]) -> Iterator[Message]:
        answers = honest(grid, messages)
        strong = next(reply for reply in answers if set(reply.content) == {"a", "b"})
        weak = next(reply for reply in answers if set(reply.content) == {"b"})
        yield message_of(weak, dict(strong.content))
        yield message_of(strong, dict(weak.content))

    grid: Any = strategy.grid_of_test._grid  # type: ignore[attr-defined]
    strategy.level_statistics(1, strategy.arrays, Told(replies))
    reasons = [told["reason"] for told in strategy.record.failed]
    assert "expected sums of levels ['b'], got ['a', 'b']" in reasons[0]
    assert "expected sums of levels ['a', 'b'], got ['b']" in reasons[1]


# --- AutoFLIP's exploration -------------------------------------------------------------------------------------


def test_an_exploration_that_cannot_be_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    round_ = opened(tmp_path, "autoflip", {})
    strategy: Any = round_.strategy
    rng, found, kinds = np.random.default_rng(4), {}, Counter[str]()
    expected = digest((strategy._explored, strategy._store), set())

    def replies(messages: list[Message]) -> Iterator[Message]:
        for message in messages:
            (reply,) = honest(scripted(round_), [message])
            partition = strategy.federation.partition_of(reply)
            round_.replies[partition], strategy._assigned[partition] = reply, job
            found[partition] = reply
            victim = round_.victim(partition)
            for _ in range(CASES // 4):
                kind = pick(rng, [*CHANGES, "negative", "epochs"])
                lied = CHANGES.get(kind, partial(lied_exploration, kind))
                records = lied(victim, rng)
                if records is not None:
                    kinds[kind] += 1
                    yield message_of(reply, records)
            yield failed_reply(reply, rng)
            yield reply
            yield message_of(reply, dict(reply.content))

    job = Assignment(strategy._whole, "full", reply_codec="float32")
    strategy._explored.clear()
    with patch.dict(strategy.__dict__, {"_assigned": dict(strategy._assigned)}), caplog.at_level("WARNING", "flwr"):
        strategy._store.__dict__["_held"].clear()
        strategy._explore(Told(replies))
    assert digest((strategy._explored, strategy._store), set()) == expected
    assert sum(kinds.values()) + 2 * 4 == sum("left out" in record.message for record in caplog.records)
    assert len(kinds) >= 30


def lied_exploration(kind: str, victim: Victim, rng: np.random.Generator) -> dict[str, Any]:
    records = victim.fresh()
    if kind == "epochs":
        records["metrics"]["epochs"] = pick(rng, [0, -1, 0.5, 11, 1e9])
        return records
    old = records["arrays"]["part"]
    values = np.frombuffer(old.data, np.float32).copy()
    values[int(rng.integers(len(values)))] = pick(rng, [-1e-3, -1.0, -1e30, np.nan, np.inf, 1.1e18])
    records["arrays"]["part"] = Array(old.dtype, old.shape, old.stype, values.tobytes())
    return records


# --- FedStitch's phases -----------------------------------------------------------------------------------------


def test_no_lie_in_a_phase_leaves_a_trace(tmp_path: Path) -> None:
    """Every honest answer of a whole run comes with lies around it; the run is the one without."""

    zoo, rng, kinds = write_zoo(tmp_path / "zoo"), np.random.default_rng(5), Counter[str]()
    values = {**knobs(zoo, path="0-5-10-3"), "fraction-train": 1.0}
    take_one, take = Phases._take_one, Phases.take

    def with_lies(self: Any, phase: Phase, replies: Iterable[Message]) -> None:
        def around() -> Iterator[Message]:
            for reply in replies:
                for _ in range(3):
                    kind, records = pick(rng, [corrupted, lied_answer])(reply.content, rng)
                    kinds[kind, phase.kind] += 1  # type: ignore[index]
                    yield message_of(reply, records)
                yield message_of(reply, dict(reply.content), 5)
                yield reply
                yield message_of(reply, dict(reply.content))

        take(self, phase, around())

    def watched(self: Any, phase: Phase, partition: int, reply: Message) -> None:
        strategy = self._strategy
        before = [digest(vars(thing), set()) for thing in (strategy.aggregator, strategy.clients, strategy.record)]
        try:
            take_one(self, phase, partition, reply)
        except ValueError:
            after = [digest(vars(thing), set()) for thing in (strategy.aggregator, strategy.clients, strategy.record)]
            assert after == before
            raise

    runs = []
    with toy_zoos(), patch("flexfed.report.curves_png"):
        for number, patched in enumerate((False, True)):
            config = toy_config(tmp_path / str(number), "fedstitch", values)
            grid = ScriptedGrid(client_app.app, 4, config)
            changed = {"take": with_lies, "_take_one": watched} if patched else {"take": take}
            with patch.multiple(Phases, **changed):
                runs.append(server_app.run(grid, config, f"phases{number}"))
    plain, lied = (lines(run) for run in runs)
    assert sum(len(line["refused"]) for line in plain) == 0
    assert sum(len(line["refused"]) for line in lied) == sum(kinds.values()) // 3 * 5 > 200
    assert [{**line, "refused": []} for line in lied] == plain
    assert same_bits(final_model(runs[1]), final_model(runs[0]))
    assert {kind for _, kind in kinds} >= {"train.stitch", "train.head", "evaluate.stitched"}  # type: ignore[misc]


def lied_answer(content: RecordDict, rng: np.random.Generator) -> tuple[str, dict[str, Any]]:
    records: dict[str, Any] = {name: type(record)(dict(record)) for name, record in content.items()}  # type: ignore
    lies = [{"macs": -1.0}, {"macs": 1e300}, {"seconds": -1.0}, {"modelled-joules": 1e30}, {"correction": 0.0}]
    lies += [{"correction": 2.0, "deadline-missed": 1.0, "rows": -5, "correct": -1}]  # refused for the last two alone
    lies += [{"correction": 1e10}, {"correction": 10**30}, {"rows": 10**400}, {"num-samples": 10**30}]  # type: ignore
    records["metrics"].update(pick(rng, lies))
    return "a lie", records


# --- memory -----------------------------------------------------------------------------------------------------


def test_no_claim_makes_the_server_allocate(tmp_path: Path) -> None:
    """Nothing follows what is claimed, and what is too large is not copied."""
    round_ = opened(tmp_path, "fedavg", {})
    strategy, like = round_.again(), round_.replies[1]
    part = like.content["arrays"]["part"]  # type: ignore[index]
    large = bytes(50_000_000)

    def lie(array: Array, name: str = "arrays") -> Message:
        return message_of(like, {**like.content, name: ArrayRecord({"part": array})})

    shapes = [(10**9,), (10**12,), (2**62,), (2**40,) * 8, (10**400,), (0, 10**12), (10**6,) * 100_000, (1,) * 10**6]
    lies = [lie(Array(part.dtype, shape, part.stype, part.data)) for shape in shapes]
    lies += [lie(Array("float32", (12_500_000,), part.stype, large), name) for name in ("arrays", "told", "more")]
    lies += [lie(Array("float64", (6_250_000,), part.stype, large)), lie(Array("int8", (1,), "pickle", large))]
    packed = {"units": large, "keys": large, "cut": large, "masks": large, "mask:conv1.weight": large, "more": large}
    for key, data in packed.items():
        record = ConfigRecord({**dict(like.content["submodel"]), key: data})  # type: ignore[dict-item]
        lies.append(message_of(like, {**like.content, "submodel": record}))
    lies.append(message_of(like, {**like.content, "told": ConfigRecord({"ranking": large})}))
    strategy.aggregate_train(1, lies[:1])  # whatever is looked up once
    for reply in lies:
        tracemalloc.start()
        try:
            strategy.aggregate_train(1, [reply])
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 200_000, strategy.record.refused[-1]
    assert len(strategy.record.refused) == 1 + len(lies)


def test_of_an_endless_reason_the_end_is_what_was_raised() -> None:
    reason = "Traceback (most recent call last)\n" + "  File x\n" * 500_000 + "ValueError: no room"
    assert cause_of(Error(2, reason)) == "ValueError: no room"
    assert len(cause_of(Error(2, "x" * 1_000_000))) < 21_000


# --- who a reply is from ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
def test_a_reply_belongs_to_the_node_that_was_asked_whatever_it_says(ordered: bool, tmp_path: Path) -> None:
    config = toy_config(tmp_path, "fedavg")

    def alter(request: Message, reply: Message, partition: int) -> Message:
        if partition == 1:  # it says that it is another node
            reply.metadata.__dict__["_src_node_id"] = 1003
        if partition == 2:  # it answers a message that nobody sent
            reply.metadata.__dict__["_reply_to_message_id"] = "12345"
        return reply

    grid = StreamingGrid(ScriptedGrid(client_app.app, 4, config, alter), ordered, poll_s=0.001)
    federation = Federation()
    federation._grid = grid
    questions = list(_questions(sorted(grid.get_node_ids())))
    replies = list(grid.send_and_receive(questions, timeout=0.3))
    assert sorted(grid.origin(reply) for reply in replies) == [1000, 1001, 1002, 1003]
    (silent,) = (reply for reply in replies if reply.has_error())
    assert grid.origin(silent) == 1002
