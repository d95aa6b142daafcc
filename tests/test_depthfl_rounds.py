"""DepthFL's rounds: what travels, FedDyn's two states over whole runs, and that neither moves where nothing counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from flwr.app import Message
from test_resume import go_on, killed_run, run, same_run
from toy import (
    failure,
    final_model,
    initial_model,
    lines,
    run_toy,
    same_bits,
    sent_part,
    task_of,
    toy_task,
    with_difference,
)

from flexfed.checkpoint import load_checkpoint
from flexfed.client_state import load_state
from flexfed.cost import num_parameters
from flexfed.exits import depth_keys
from flexfed.flower.messages import from_array, num_bytes
from flexfed.jobs import Task, initial_arrays
from flexfed.methods.depthfl import depth_part, named
from flexfed.networks import EXITS
from flexfed.submodel import unflatten
from flexfed.units import Arrays

SWINGS = '[[class]]\nkind = "swings"\nshare = 1.0\ncapacity = 1.0\navailability = [0.15, 0.35, 0.7, 1.0]\n'
"""Devices that have another depth in every round."""
ALPHA = 0.1
LIGHT = {"depthfl.heads": "linear", "batch-norm": "batch", "fraction-evaluate": 0.0}


@pytest.fixture(autouse=True)
def _without_pictures() -> Iterator[None]:
    with patch("flexfed.report.curves_png"):
        yield


def swinging(folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "swings.toml").write_text(SWINGS)
    return {"fleet": str(folder / "swings.toml"), "seed": 3, **LIGHT}


@dataclass
class Reference:
    """FedDyn over a run's replies, by plain loops in double precision."""

    task: Task
    clients: int
    model: dict[str, np.ndarray]
    memory: dict[str, np.ndarray] = field(default_factory=dict)
    own: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    replies: dict[int, dict[int, Arrays]] = field(default_factory=dict)  # round -> partition -> difference

    def listen(self, request: Message, reply: Message, partition: int) -> Message:
        if request.metadata.message_type == "train":
            part = sent_part(request, reply, self.task.layout)
            flat = from_array(reply.content.array_records["arrays"]["part"])
            server_round = int(request.metadata.group_id)
            self.replies.setdefault(server_round, {})[partition] = unflatten(self.task.layout, part, flat)
        return reply

    def fold(self, server_round: int, without: tuple[int, ...] = ()) -> None:
        replies = {p: d for p, d in self.replies[server_round].items() if p not in without}
        for name in self.task.layout.shapes:
            held = [difference[name].astype(np.float64) for difference in replies.values() if name in difference]
            if held:
                mean = self.model[name] + sum(held) / len(held)
                h = self.memory.get(name, 0.0) - ALPHA * len(held) / self.clients * (mean - self.model[name])
                self.memory[name], self.model[name] = h, mean - h / ALPHA
        for partition, difference in replies.items():
            own = self.own.setdefault(partition, {})
            for name, values in difference.items():
                own[name] = own.get(name, 0.0) - ALPHA * values.astype(np.float64)

    def check(self, folder: Path) -> None:
        """The run's model, h and every client's g_m are these; and h is the mean of g_m over all clients."""
        stood = load_checkpoint(folder / "checkpoint")
        assert stood is not None
        assert close(stood.arrays, self.model)
        assert close(named(stood.state), self.memory)
        rounds: Mapping[str, int] = stood.facts["private-rounds"]
        assert sorted(map(int, rounds)) == sorted(self.own)
        kept = {int(p): named(load_state(folder / "clients" / f"{int(p):06d}", r)) for p, r in rounds.items()}
        for partition, own in kept.items():
            assert close(own, self.own[partition])
        for name, h in named(stood.state).items():
            mean = sum(own[name] for own in kept.values() if name in own) / self.clients
            np.testing.assert_allclose(h, mean, rtol=1e-4, atol=1e-6, err_msg=name)


def close(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> bool:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=2e-6, err_msg=name)
    return True


def reference(clients: int, seed: int = 3) -> Reference:
    task = toy_task("depthfl", **LIGHT)
    return Reference(task, clients, dict(initial_arrays(task, "", seed)))


def test_feddyn_over_rounds_in_which_clients_rest_and_change_their_depth(tmp_path: Path) -> None:
    expected = reference(6)
    values = {**swinging(tmp_path), "num-server-rounds": 4, "fraction-train": 0.5}
    found = run_toy(tmp_path / "runs", "depthfl", values, clients=6, alter=expected.listen)
    depths: dict[int, set[int]] = {}
    for server_round in range(1, 5):
        expected.fold(server_round)
        for partition, held in expected.replies[server_round].items():
            depths.setdefault(partition, set()).add(len(held))
    assert max(map(len, depths.values())) > 1, "a depth changes"
    assert len({len(own) for own in expected.own.values()}) > 1
    expected.check(found)


def test_a_reply_that_was_refused_or_failed_moves_neither_h_nor_its_clients_g(tmp_path: Path) -> None:
    """Client 1 is refused in round 1, client 2 fails after training in round 2; both train again in round 3."""
    expected = reference(4)

    def spoil(request: Message, reply: Message, partition: int) -> Message:
        expected.listen(request, reply, partition)
        kind, server_round = request.metadata.message_type, request.metadata.group_id
        if (kind, server_round, partition) == ("train", "1", 1):
            return with_difference(reply, lambda values: values * np.nan)
        return failure(request) if (kind, server_round, partition) == ("train", "2", 2) else reply

    values = {**swinging(tmp_path), "num-server-rounds": 3}
    found = run_toy(tmp_path / "runs", "depthfl", values, alter=spoil)
    assert [len(line["refused"]) + len(line["failed"]) for line in lines(found)] == [1, 1, 0]
    expected.fold(1, without=(1,))
    expected.fold(2, without=(2,))
    expected.fold(3)
    expected.check(found)


@pytest.mark.parametrize("personal", ["none", "stored-local"])
def test_a_round_with_too_few_replies_moves_neither_of_them(personal: str, tmp_path: Path) -> None:
    """Replies of round 2 were valid, and yet do not count: their clients go on from round 1."""
    expected, stored = reference(4), Counter[str]()

    def fail(request: Message, reply: Message, partition: int) -> Message:
        expected.listen(request, reply, partition)
        if request.metadata.message_type == "evaluate" and "arrays" not in request.content:
            stored[request.metadata.group_id] += 1
        void = request.metadata.message_type == "train" and request.metadata.group_id == "2" and partition > 1
        return failure(request) if void else reply

    values = {**swinging(tmp_path), "num-server-rounds": 3, "min-replies": 3, "personal": personal}
    found = run_toy(tmp_path / "runs", "depthfl", values, alter=fail)
    assert [line.get("void", False) for line in lines(found)] == [False, True, False]
    if personal == "stored-local":
        assert [line["clients-personal"] for line in lines(found)] == [4, 4, 4]
        assert stored["2"], "those that can hold it test what they kept of round 1"
        assert [told for told in lines(found)[1]["failed"] if "evaluation" in told["reason"]] == []
    expected.fold(1)
    expected.fold(3)
    expected.check(found)


def test_a_first_round_with_too_few_replies_leaves_nothing(tmp_path: Path) -> None:
    expected = reference(4)

    def fail(request: Message, reply: Message, partition: int) -> Message:
        expected.listen(request, reply, partition)
        void = request.metadata.message_type == "train" and request.metadata.group_id == "1" and partition > 1
        return failure(request) if void else reply

    values = {
        "num-server-rounds": 2,
        "min-replies": 3,
        "personal": "stored-local",
        "fleet": "equal",
        "seed": 3,
        **LIGHT,
    }
    found = run_toy(tmp_path, "depthfl", values, alter=fail)
    first, second = lines(found)
    assert first["void"]
    assert [told["reason"] for told in first["failed"]] == ["out of memory"] * 2
    assert first["clients-personal"] == second["clients-personal"] == 4, "none has a model of its own yet: sent one"
    expected.fold(2)
    expected.check(found)


@pytest.mark.parametrize("case", ["depths that change", "models of their own"])
def test_law_9_feddyns_states_survive_a_kill_bit_for_bit(case: str, tmp_path: Path) -> None:
    values = {"strategy": "depthfl", "fraction-train": 0.5, **swinging(tmp_path)}
    values |= {"personal": "stored-local"} if case == "models of their own" else {}
    never = run(tmp_path / "never", values)
    left = killed_run(tmp_path / "killed", values, "after it", 2)
    go_on(left)
    assert same_run(left, never)
    states = [load_checkpoint(folder / "checkpoint") for folder in (left, never)]
    one, other = (named(state.state) for state in states if state)
    assert one
    assert same_bits(one, other)
    for folder in (never / "clients").iterdir():
        newest = sorted(folder.iterdir())[-1]
        assert newest.read_bytes() == (left / "clients" / folder.name / newest.name).read_bytes()


def test_law_9_a_run_that_goes_on_knows_how_deep_its_clients_own_models_are(tmp_path: Path) -> None:
    """One client trains in each round; those that rest test what they trained before the kill."""
    values = {"strategy": "depthfl", "personal": "stored-local", "fleet": "skewed", "fraction-train": 0.2, **LIGHT}
    never = run(tmp_path / "never", values)
    left = killed_run(tmp_path / "killed", values, "after it", 2)
    stood = load_checkpoint(left / "checkpoint")
    assert stood is not None
    owners, depth = stood.state["personal/partitions"].tolist(), stood.state["personal/depth"].tolist()
    kept = {p: stood.state["personal/depths"][own] for p, own in zip(owners, depth, strict=True)}
    assert any(kept[p] is not None for p in kept.keys() - set(lines(never)[2]["cohort"])), "one of them is short"
    go_on(left)
    assert same_run(left, never)


def test_without_feddyn_clients_keep_nothing(tmp_path: Path) -> None:
    found = run_toy(tmp_path, "depthfl", {"depthfl.feddyn-alpha": 0.0, **LIGHT})
    assert not (found / "clients").exists()
    stood = load_checkpoint(found / "checkpoint")
    assert stood is not None
    assert stood.state == {}


def test_what_a_device_does_not_train_never_travels(tmp_path: Path) -> None:
    task = toy_task("depthfl")
    sizes: dict[str, list[int]] = {}

    def listen(request: Message, reply: Message, _: int) -> Message:
        if request.metadata.message_type == "train":
            part = sent_part(request, layout=task.layout)
            level = "dcba"[[depth_part(task, depth) for depth in (1, 2, 3, 4)].index(part)]
            assert sent_part(request, reply, task.layout) == part
            numbers = num_parameters(task.layout, part)
            for message in (request, reply):
                assert len(message.content.array_records["arrays"]["part"].data) == 4 * numbers
                assert num_bytes(message) < 4 * numbers + 4_000, "names of tensors, and numbers"
            sizes.setdefault(level, []).append(num_bytes(reply))
        return reply

    values = {"depthfl.assign": "fix", "fleet": "equal"}
    found = run_toy(tmp_path, "depthfl", values, alter=listen)
    assert lines(found)[0]["trained"] == dict.fromkeys("abcd", 1)
    assert list(lines(found)[0]["trained"]) == sorted(lines(found)[0]["trained"])
    assert max(sizes["d"]) < 0.2 * min(sizes["a"])
    exits = {key for key in lines(found)[0] if key.startswith("exit-accuracy-")}
    assert exits == {
        f"exit-accuracy-{level}-{e}" for level, most in zip("abc", (4, 3, 2), strict=True) for e in range(1, most + 1)
    }


def test_what_nobody_trained_keeps_its_bytes_whatever_h_is_elsewhere(tmp_path: Path) -> None:
    """Exclusive learning of level c: the deeper stages and classifiers are as they were."""
    values = {"depthfl.assign": "fix", "depthfl.shares": "c1", "fleet": "equal", "num-server-rounds": 3, **LIGHT}
    found = run_toy(tmp_path, "depthfl", values)
    assert lines(found)[2]["trained"] == {"c": 4}
    task, before, after = task_of(found), initial_model(found), final_model(found)
    held = depth_keys(task.factory)[1]
    for name, array in after.items():
        assert (array.tobytes() == before[name].tobytes()) == (name not in held), name


def test_only_the_deepest_classifier_of_each_part_is_trained(tmp_path: Path) -> None:
    """Levels c and a: of the classifiers the second and the last, whatever weight decay and FedDyn would do."""
    values = {
        "depthfl.assign": "fix",
        "depthfl.shares": "a1-c1",
        "depthfl.train": "deepest",
        "fleet": "equal",
        "weight-decay": 0.1,
    }
    found = run_toy(tmp_path, "depthfl", values)
    assert lines(found)[0]["trained"] == {"a": 2, "c": 2}
    before, after = initial_model(found), final_model(found)
    for name, array in after.items():
        frozen = name.startswith((f"{EXITS}.relu1.", f"{EXITS}.relu3."))
        assert (array.tobytes() == before[name].tobytes()) == frozen, name
    line = lines(found)[0]
    assert line["accuracy-c"] == line["exit-accuracy-c-2"]
    assert line["accuracy"] == line["exit-accuracy-a-4"]


def test_each_client_counts_once_or_by_its_examples(tmp_path: Path) -> None:
    values = {"depthfl.feddyn-alpha": 0.0, "fleet": "equal", **LIGHT}
    one = run_toy(tmp_path / "1", "depthfl", values)
    other = run_toy(tmp_path / "2", "depthfl", {**values, "depthfl.weights": "examples"})
    assert not same_bits(final_model(one), final_model(other))


def test_the_weight_of_the_distillation_rises_from_round_to_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def note(rounds: int, ramp: int) -> float:
        asked.append((rounds, ramp))
        return 0.5

    monkeypatch.setattr("flexfed.methods.depthfl.consistency_weight", note)
    run_toy(tmp_path, "depthfl", {"num-server-rounds": 2, "depthfl.ramp-rounds": 7, **LIGHT}, clients=1)
    assert asked == [(0, 7), (1, 7)]
