"""Nodes that come, go, return and are late: a round asks who is there and free, and the run goes on."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from flwr.app import Error, Message
from toy import AVERAGING, ScriptedGrid, failure, final_model, lines, run_toy, same_bits, toy_config
from toy_zoo import knobs, toy_zoos, write_zoo

import client_app
import server_app
from flexfed.flower.federation import Federation
from flexfed.runs import load_run
from strategies.federated import FederatedStrategy

Scene = Callable[[int], Mapping[int, int]]
"""Round -> partition -> node id, of those that are connected when it opens (before round 1: round 1's)."""


class Stage(ScriptedGrid):
    """Four clients, connected under the node ids that a scene gives them."""

    def __init__(self, config: Mapping[str, Any], scene: Scene, **more: Any):
        super().__init__(client_app.app, 4, config, **more)
        self._scene, self._home = scene, dict(enumerate(self._contexts.values()))
        self.asked: list[tuple[int, str, int]] = []  # (round, type, partition)
        self.opened = 0  # rounds: each asks once more who is there
        self._set(1)

    def _set(self, server_round: int) -> None:
        self._contexts = {node: self._home[partition] for partition, node in self._scene(server_round).items()}
        self._at = {node: partition for partition, node in self._scene(server_round).items()}

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def open(self, server_round: int) -> None:
        self._set(server_round)

    def partition(self, request: Message) -> int:
        return self._at.get(request.metadata.dst_node_id, -1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        for message in messages:
            self.asked.append(
                (int(message.metadata.group_id or 0), message.metadata.message_type, self.partition(message))
            )
        return super().push_messages(messages)


def play(
    folder: Path, scene: Scene, strategy: str = "fedavg", values: Mapping[str, Any] | None = None, **more: Any
) -> tuple[Path, Stage]:
    """A run in which the scene changes as each round opens."""
    config = toy_config(folder, strategy, {"num-server-rounds": 3, "evaluate-every": 3, **(values or {})})
    stage = Stage(config, scene, **more)
    open_round = FederatedStrategy.open_round

    def opening(self: Any, server_round: int) -> Any:
        stage.open(server_round)
        return open_round(self, server_round)

    with (
        patch("flexfed.report.curves_png"),
        patch("flexfed.flower.federation._WAIT_S", 0.2),
        patch("flexfed.flower.federation._AGAIN_S", 0.0),
        patch.object(FederatedStrategy, "open_round", opening),
    ):
        return server_app.run(stage, config, "stage000"), stage


def trainers(stage: Stage, server_round: int) -> list[int]:
    """Who was asked to train in a round."""
    return [partition for told, kind, partition in stage.asked if (told, kind) == (server_round, "train")]


def ids(*partitions: int) -> dict[int, int]:
    return {partition: 1000 + partition for partition in partitions}


# --- coming and going -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", AVERAGING)
def test_every_strategy_works_with_whoever_is_there(strategy: str, tmp_path: Path) -> None:
    """Partition 3 joins in round 2, partition 0 leaves then and is back in round 3; nobody absent is asked."""
    here = {1: ids(0, 1, 2), 2: ids(1, 2, 3), 3: ids(0, 1, 2, 3)}
    quick = {"fleet": "equal", "autoflip.explore-epochs": 1, "heterofl.batch-norm": "batch"}
    run, stage = play(tmp_path, here.__getitem__, strategy, quick)
    for line in lines(run):
        assert set(line["cohort"]) <= set(here[line["round"]])
        assert (line["failed"], line["refused"]) == ([], [])
    assert 0 not in trainers(stage, 2)
    assert {p for told, _, p in stage.asked if told > 1} >= {3}
    assert -1 not in [partition for *_, partition in stage.asked]
    assert load_run(run).summary["clients"] == 4  # type: ignore[index]


@pytest.mark.parametrize("assign", ["fix", "dynamic"])
def test_levels_that_are_dealt_by_partition_stay_with_it(assign: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "heterofl.assign": assign,
        "heterofl.shares": "a1-b1",
        "heterofl.ratios": "1.0, 0.5",
        "fleet": "equal",
    }
    gone, _ = play(tmp_path / "gone", lambda r: ids(0, 1, 2, 3) if r == 1 else ids(1, 3), "heterofl", values)
    everybody, _ = play(tmp_path / "all", lambda r: ids(0, 1, 2, 3), "heterofl", values)
    assert [line["cohort"] for line in lines(gone)] == [[0, 1, 2, 3], [1, 3], [1, 3]]
    if assign == "fix":
        assert lines(gone)[1]["dispatched"] == {"a": 1, "b": 1}
    assert lines(gone)[0] == lines(everybody)[0]


def test_a_fleet_that_does_not_change_is_asked_who_it_is_once(tmp_path: Path) -> None:
    _, stage = play(tmp_path, lambda r: ids(0, 1, 2, 3))
    assert [kind for _, kind, _ in stage.asked].count("query.profile") == 4


def test_who_comes_back_is_asked_again_who_it_is(tmp_path: Path) -> None:
    """Under the same node id, or another one, as a SuperNode without a key has after a restart."""
    back = {0: 1000, 1: 2001, 2: 1002}
    scene = {1: ids(0, 1, 2), 2: ids(2), 3: back}
    run, stage = play(tmp_path, scene.__getitem__)
    profiles = [partition for _, kind, partition in stage.asked if kind == "query.profile"]
    assert profiles == [0, 1, 2, 0, 1]
    assert [line["cohort"] for line in lines(run)] == [[0, 1, 2], [2], [0, 1, 2]]
    assert lines(run)[2]["trained"] == {"full": 3}


def test_a_node_that_says_it_is_another_ones_partition_waits_until_that_one_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A killed SuperNode's entry stays for a minute; whoever was there first keeps its place so long."""

    class Twice(Stage):
        def _set(self, server_round: int) -> None:
            super()._set(server_round)
            if server_round >= 2:
                self._contexts[2001] = self._home[1]
                self._at[2001] = 1
            if server_round == 3:
                del self._contexts[1001], self._at[1001]

    with patch.dict(globals(), Stage=Twice), caplog.at_level(logging.INFO, "flwr"):
        run, stage = play(tmp_path, lambda r: ids(0, 1, 2))
    assert "it says that it is partition 1, as another node does; give each its own partition-id" in caplog.text
    assert [line["cohort"] for line in lines(run)] == [[0, 1, 2]] * 3
    assert [line["failed"] for line in lines(run)] == [[]] * 3
    profiles = [partition for _, kind, partition in stage.asked if kind == "query.profile"]
    assert profiles == [0, 1, 2, 1, 1]


def test_a_node_that_comes_back_as_another_partition_is_that_one_from_then_on(tmp_path: Path) -> None:
    class Other(Stage):
        def open(self, server_round: int) -> None:
            super().open(server_round)
            if server_round == 3:  # node 1001, which was partition 1, now has the data of partition 3
                self._contexts[1001], self._at[1001] = self._home[3], 3

    scene = {1: ids(0, 1), 2: ids(0), 3: ids(0, 1)}
    with patch.dict(globals(), Stage=Other):
        run, _ = play(tmp_path, scene.__getitem__)
    assert [line["cohort"] for line in lines(run)] == [[0, 1], [0], [0, 3]]
    assert [line["failed"] for line in lines(run)] == [[]] * 3


@pytest.mark.parametrize("late", [False, True])
def test_a_client_of_another_fleet_is_left_out(late: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Who divides the data by another number trains on other samples than the server believes."""

    def lies(request: Message, reply: Message, partition: int) -> Message:
        if request.metadata.message_type == "query.profile" and partition == 2:
            reply.content.config_records["config"]["num-partitions"] = 9
        return reply

    first = ids(0, 1) if late else ids(0, 1, 2)
    with caplog.at_level(logging.INFO, "flwr"):
        run, stage = play(tmp_path, lambda r: first if r == 1 else ids(0, 1, 2), alter=lies)
    assert "it says that there are 9 partitions, most others 4" in caplog.text
    assert [line["cohort"] for line in lines(run)] == [[0, 1]] * 3
    assert [p for _, kind, p in stage.asked if kind == "query.profile"].count(2) == 1
    assert load_run(run).summary["clients"] == 2  # type: ignore[index]


def test_a_node_that_does_not_tell_who_it_is_is_asked_less_and_less_often(tmp_path: Path) -> None:
    """Each time the round has to wait for it."""

    def silent(request: Message, reply: Message, partition: int) -> Message:
        lost = request.metadata.message_type == "query.profile" and partition == 2
        return Message(Error(code=0, reason="silence"), reply_to=request) if lost else reply

    config = toy_config(tmp_path, "fedavg")
    stage, federation = Stage(config, lambda r: ids(0, 1, 2), alter=silent), Federation()
    clock, asked = [1000.0], []
    with patch.multiple(
        "flexfed.flower.federation.time", monotonic=lambda: clock[0], sleep=lambda s: clock.__setitem__(0, clock[0] + s)
    ):
        federation.meet(stage, 60.0)
        for _ in range(100):  # a look every ten seconds
            clock[0] += 10
            before = len(stage.asked)
            federation.look_around(1, 60.0)
            asked += [clock[0]] * (len(stage.asked) - before)
    pauses = [b - a for a, b in itertools.pairwise(asked)]
    assert 3 <= len(asked) <= 5
    assert all(b >= 2 * a - 20 for a, b in itertools.pairwise(pauses))
    assert sorted(federation.present) == [0, 1]


@pytest.mark.parametrize("real_time", [True, False])
def test_whoever_connects_first_does_not_say_how_many_there_are(real_time: bool, tmp_path: Path) -> None:
    """On real devices the first meeting lasts a few seconds; simulated ones are all there at once."""

    def alone(request: Message, reply: Message, partition: int) -> Message:
        if request.metadata.message_type == "query.profile" and partition == 0:
            reply.content.config_records["config"]["num-partitions"] = 1
        return reply

    class Late(Stage):
        looks = 0

        def get_node_ids(self) -> Iterable[int]:
            self.looks += 1
            return list(super().get_node_ids())[: 1 if self.looks < 5 else 4]

    stage, federation = Late(toy_config(tmp_path, "fedavg"), lambda r: ids(0, 1, 2, 3), alter=alone), Federation()
    stage.real_time = real_time  # type: ignore[attr-defined]
    with patch("flexfed.flower.federation._SETTLE_S", 0.5):
        federation.meet(stage, 60.0)
    assert sorted(federation.devices) == ([1, 2, 3] if real_time else [0])
    assert federation.num_partitions == (4 if real_time else 1)


def test_a_client_with_other_code_is_asked_once_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def stale(request: Message, reply: Message, partition: int) -> Message:
        is_profile = request.metadata.message_type == "query.profile"
        return failure(request, "other code") if is_profile and partition == 2 else reply

    with caplog.at_level(logging.INFO, "flwr"):
        run, stage = play(tmp_path, lambda r: ids(0, 1, 2), alter=stale)
    assert [p for _, kind, p in stage.asked if kind == "query.profile"] == [0, 1, 2]
    assert [line["cohort"] for line in lines(run)] == [[0, 1]] * 3
    assert caplog.text.count("a client is left out: other code") == 1


# --- too late, too few ------------------------------------------------------------------------------------------


def test_who_still_works_for_an_earlier_round_is_not_asked_again_until_it_has_replied(tmp_path: Path) -> None:
    """One device, one job at a time: a phone that is late would else train two networks at once."""
    held: list[Message] = []

    class Late(Stage):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            found = list(super().pull_messages(message_ids))
            if self.opened == 3 and held:
                found.append(held.pop())
            return found

        def open(self, server_round: int) -> None:
            super().open(server_round)
            self.opened = server_round

    def keep(request: Message, reply: Message, partition: int) -> Message | None:
        if partition == 1 and request.metadata.message_type == "train" and request.metadata.group_id == "1":
            held.append(reply)
            return None
        return reply

    with patch.dict(globals(), Stage=Late):
        run, _ = play(tmp_path, lambda r: ids(0, 1, 2, 3), values={"round-timeout": 0.5}, alter=keep)
    assert [line["cohort"] for line in lines(run)] == [[0, 1, 2, 3], [0, 2, 3], [0, 1, 2, 3]]
    assert [[told["partition"] for told in line["failed"]] for line in lines(run)] == [[1], [], []]
    assert [line["trained"] for line in lines(run)] == [{"full": 3}, {"full": 3}, {"full": 4}]
    assert not held


def fails_in_round(server_round: int) -> Any:
    """Partitions 2 and 3 fail to train in a round."""

    def alter(request: Message, reply: Message, partition: int) -> Message:
        hit = request.metadata.message_type == "train" and request.metadata.group_id == str(server_round)
        return failure(request) if hit and partition > 1 else reply

    return alter


@pytest.mark.parametrize("strategy", AVERAGING)
def test_a_round_with_too_few_valid_replies_leaves_the_model_as_it_was(strategy: str, tmp_path: Path) -> None:
    """Momentum and noise included: round 2 leaves the bits of round 1."""
    values = {"fleet": "equal", "compressed.server-momentum": 0.5, "autoflip.mask-mode": "static"}
    values |= {"fedlps.noise": 0.001, "ratio-policy": "level", "fedlps.pattern": "ordered", "num-server-rounds": 2}
    void = run_toy(tmp_path / "2", strategy, {**values, "min-replies": 3}, alter=fails_in_round(2))
    once = run_toy(tmp_path / "1", strategy, {**values, "num-server-rounds": 1})
    first, second = lines(void)
    assert "void" not in first
    assert second["void"] is True
    assert sum(second["trained"].values()) == 2
    assert [told["partition"] for told in second["failed"]] == [2, 3]
    assert same_bits(final_model(void), final_model(once))
    enough = run_toy(tmp_path / "3", strategy, {**values, "min-replies": 2}, alter=fails_in_round(2))
    assert "void" not in lines(enough)[1]
    assert not same_bits(final_model(enough), final_model(once))


def test_a_run_that_never_had_enough_replies_fails_and_says_so(tmp_path: Path) -> None:
    says = r"never 3 valid replies \(min-replies\) in any of 1 rounds; client 3 said: out of memory"
    with pytest.raises(RuntimeError, match=says):
        run_toy(tmp_path, values={"min-replies": 3}, alter=fails_in_round(1))


def test_more_replies_than_there_are_clients_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="min-replies=5, but there are only 4 clients; lower it"):
        run_toy(tmp_path, values={"min-replies": 5})


def test_a_cohort_is_at_least_as_large_as_it_needs_to_be(tmp_path: Path) -> None:
    run = run_toy(tmp_path, values={"min-replies": 3, "fraction-train": 0.25})
    assert len(lines(run)[0]["cohort"]) == 3


def test_a_round_waits_for_as_many_devices_as_it_needs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Slow(Stage):
        looks = 0

        def get_node_ids(self) -> Iterable[int]:
            self.looks += 1
            here = list(super().get_node_ids())
            return here[:1] if self.opened == 2 and self.looks % 4 else here

        def open(self, server_round: int) -> None:
            super().open(server_round)
            self.opened, self.looks = server_round, 0

    with patch.dict(globals(), Stage=Slow), caplog.at_level(logging.INFO, "flwr"):
        run, _ = play(tmp_path, lambda r: ids(0, 1, 2), values={"min-replies": 2, "round-timeout": 2.0})
    assert "1 clients are here and free, waiting for 2" in caplog.text
    assert [line["cohort"] for line in lines(run)] == [[0, 1, 2]] * 3


def test_a_round_in_which_nobody_is_left_passes_and_the_run_goes_on(tmp_path: Path) -> None:
    scene = {1: ids(0, 1, 2), 2: {}, 3: ids(2)}
    run, _ = play(tmp_path, scene.__getitem__, values={"round-timeout": 0.2})
    assert [line["cohort"] for line in lines(run)] == [[0, 1, 2], [], [2]]
    assert not any("void" in line for line in lines(run))  # no reply was thrown away


# --- FedStitch: phases --------------------------------------------------------------------------------------------


def test_a_network_is_stitched_with_whoever_is_there(tmp_path: Path) -> None:
    zoo = write_zoo(tmp_path / "zoo")
    here = {1: ids(0, 1, 2), 2: ids(1, 2, 3), 3: ids(3)}
    with toy_zoos():
        values = {**knobs(zoo, path="0-5-10-3"), "num-server-rounds": 3, "fraction-train": 1.0}
        run, stage = play(tmp_path, here.__getitem__, "fedstitch", values)
    assert [line["cohort"] for line in lines(run)] == [[0, 1, 2], [1, 2, 3], [3]]
    assert [line["failed"] + line["refused"] for line in lines(run)] == [[], [], []]
    assert {p for told, kind, p in stage.asked if told == 3 and kind != "query.profile"} == {3}


@pytest.mark.parametrize("kind", ["train.stitch", "train.head"])
def test_a_phase_with_too_few_answers_is_asked_once_more_from_the_start(kind: str, tmp_path: Path) -> None:
    """What the first attempt brought is not counted twice."""
    zoo, seen = write_zoo(tmp_path / "zoo"), list[int]()

    def once(request: Message, reply: Message, partition: int) -> Message:
        first = request.metadata.message_type == kind and request.metadata.group_id == "2" and partition not in seen
        seen.extend([partition] if first else [])
        return failure(request) if first and partition > 1 else reply

    with toy_zoos():
        values = {**knobs(zoo, path="0-5-10-3"), "num-server-rounds": 2, "min-replies": 3}
        again = run_toy(tmp_path / "again", "fedstitch", values, alter=once)
        whole = run_toy(tmp_path / "whole", "fedstitch", values)
    assert sorted(seen) == [0, 1, 2, 3]
    assert [told["partition"] for told in lines(again)[1]["failed"]] == [2, 3]
    assert lines(again)[1]["accuracy"] == lines(whole)[1]["accuracy"]
    assert same_bits(final_model(again), final_model(whole))


def test_a_phase_that_twice_has_too_few_answers_ends_the_run_with_what_there_is(tmp_path: Path) -> None:
    zoo = write_zoo(tmp_path / "zoo")

    def lost(request: Message, reply: Message, partition: int) -> Message:
        hit = request.metadata.message_type == "train.head" and request.metadata.group_id == "2"
        return failure(request) if hit and partition > 1 else reply

    with toy_zoos():
        values = {**knobs(zoo, path="0-5-10-3"), "num-server-rounds": 3, "min-replies": 3}
        run = run_toy(tmp_path / "lost", "fedstitch", values, alter=lost)
        short = run_toy(tmp_path / "short", "fedstitch", {**values, "num-server-rounds": 1})
    assert [line["round"] for line in lines(run)] == [1, 2]
    assert same_bits(final_model(run), final_model(short))
