"""Faults in a round: what does not validate is refused, told, and never averaged; the run goes on."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from safetensors.numpy import load_file
from toy import (
    ScriptedGrid,
    failure,
    final_model,
    lines,
    run_toy,
    same_bits,
    toy_config,
    toy_task,
    with_difference,
)

import client_app
import server_app
import strategies.base
from flexfed.averaging import Averager
from flexfed.batchnorm import apply_statistics
from flexfed.config import Experiment
from flexfed.cost import num_parameters
from flexfed.data import DataConfig, load_server, normalisation, normalise
from flexfed.flower.grid import InProcessGrid
from flexfed.flower.messages import code_fingerprint, to_record_of_arrays
from flexfed.jobs import Assignment
from flexfed.methods import METHODS
from flexfed.submodel import Submodel, full, pack, unpack
from flexfed.training import evaluate

VICTIM = 1
WEAK = '[[class]]\nkind = "weak"\nshare = 1.0\ncapacity = 0.35\n'


def only(kind: str, change: Callable[[Message, Message], Message | None]) -> Any:
    """Alter what the victim replies to messages of one kind."""

    def alter(request: Message, reply: Message, partition: int) -> Message | None:
        hit = request.metadata.message_type == kind and partition == VICTIM
        return change(request, reply) if hit else reply

    return alter


@pytest.fixture(scope="module")
def without_victim(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a strategy in which the victim's training fails: what a refused reply must equal."""
    runs: dict[str, Path] = {}

    def run(strategy: str) -> Path:
        if strategy not in runs:
            folder = tmp_path_factory.mktemp(strategy)
            runs[strategy] = run_toy(folder, strategy, alter=only("train", lambda request, _: failure(request)))
        return runs[strategy]

    return run


# --- replies that are wrong -------------------------------------------------------------------------------------


def array(dtype: str = "float32", stype: str = "flexfed.raw", num: int = 57_706) -> ArrayRecord:
    size = num * np.dtype(dtype).itemsize
    return ArrayRecord({"part": Array(dtype=dtype, shape=(num,), stype=stype, data=bytes(size))})


def put(record: str, value: Any) -> Callable[[Message, Message], Message]:
    def change(_: Message, reply: Message) -> Message:
        reply.content[record] = value
        return reply

    return change


def drop(record: str) -> Callable[[Message, Message], Message]:
    def change(_: Message, reply: Message) -> Message:
        del reply.content[record]
        return reply

    return change


def numbers(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Message, Message], Message]:
    return lambda _, reply: with_difference(reply, change)


def one(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[len(values) // 2] = value
        return values

    return change


def metrics(**values: Any) -> Callable[[Message, Message], Message]:
    return put("metrics", MetricRecord({"weight": 10.0, "train-loss": 0.5, "macs": 1.0, **values}))


def everything(_: Message, reply: Message) -> Message:
    """Claim the whole network, with numbers that fit the claim."""
    layout = toy_task().layout
    reply.content["submodel"] = ConfigRecord(pack(full(layout)))  # type: ignore[arg-type]
    return with_difference(reply, lambda _: np.ones(57_706, dtype=np.float32))


def one_unit_less(_: Message, reply: Message) -> Message:
    """A part that is no level, with numbers that fit it: the last unit but the classes'."""
    layout = toy_task().layout
    units = np.unpackbits(np.frombuffer(reply.content.config_records["submodel"]["units"], dtype=np.uint8))  # type: ignore[arg-type]
    units[np.flatnonzero(units[:240])[-1]] = 0
    less = Submodel(units[: layout.num_units].astype(bool))
    reply.content["submodel"] = ConfigRecord(pack(less))  # type: ignore[arg-type]
    return with_difference(reply, lambda _: np.zeros(num_parameters(layout, less), dtype=np.float32))


def claimed(change: Callable[[Submodel], Submodel]) -> Callable[[Message, Message], Message]:
    """Another submodel than what was trained, with numbers that fit it."""

    def alter(_: Message, reply: Message) -> Message:
        layout = toy_task().layout
        submodel = change(unpack(layout, dict(reply.content.config_records["submodel"])))  # type: ignore[arg-type]
        reply.content["submodel"] = ConfigRecord(pack(submodel))  # type: ignore[arg-type]
        return with_difference(reply, lambda _: np.ones(num_parameters(layout, submodel), dtype=np.float32))

    return alter


def without_a_group(submodel: Submodel) -> Submodel:
    span, units = toy_task().layout.groups["conv2"], submodel.units.copy()
    units[span.start : span.stop] = False
    return Submodel(units, cut=submodel.cut)


def one_other_unit(submodel: Submodel) -> Submodel:
    span, units = toy_task().layout.groups["conv1"], submodel.units.copy()
    units[span.start + int(units[span.start : span.stop].argmax())] = False
    return Submodel(units)


def one_unit_more(submodel: Submodel) -> Submodel:
    units = submodel.units.copy()
    units[int(units.argmin())] = True
    return Submodel(units)


def every_tensor_named(submodel: Submodel) -> Submodel:
    return replace(submodel, keys=frozenset(toy_task().layout.shapes))


FAULTS: dict[str, tuple[str, Callable[[Message, Message], Message], str]] = {
    "nan": ("fedavg", numbers(one(np.nan)), "1 of 57706 numbers are NaN or infinite"),
    "infinity": ("fedavg", numbers(one(np.inf)), "1 of 57706 numbers are NaN or infinite"),
    "one number": ("fedavg", numbers(lambda v: v[:1]), r"a difference of 57706 numbers is expected, got shape \(1,\)"),
    "one too few": ("fedavg", numbers(lambda v: v[:-1]), "a difference of 57706 numbers is expected"),
    "two axes": ("fedavg", numbers(lambda v: v[None]), r"got shape \(1, 57706\)"),
    "doubles": (
        "fedavg",
        numbers(lambda v: v.astype(np.float64)),
        "it has [0-9,]+ bytes; a reply to what it was asked has at most",
    ),
    "integers": ("fedavg", put("arrays", array("int32")), "must be float32 or .* got 'int32'"),
    "encoding": ("fedavg", put("arrays", array(stype="pickle")), "got 'float32' as 'pickle'"),
    "no arrays": ("fedavg", drop("arrays"), "reply lacks 'arrays'"),
    "no submodel": ("fedavg", drop("submodel"), "reply lacks 'submodel'"),
    "no metrics": ("fedavg", drop("metrics"), "reply lacks 'metrics'"),
    "nothing": ("fedavg", lambda request, _: Message(RecordDict(), reply_to=request), "reply lacks 'arrays'"),
    "weight 0": ("fedavg", metrics(weight=0.0), "weight"),
    "weight below 0": ("fedavg", metrics(weight=-5.0), "weight"),
    "weight nan": ("fedavg", metrics(weight=float("nan")), "weight"),
    "weight 0 of equals": ("heterofl", metrics(weight=0.0), "weight"),
    "weight below 0 of equals": ("heterofl", metrics(weight=-5.0), "weight"),
    "loss nan": ("fedavg", metrics(**{"train-loss": float("nan")}), "must be finite numbers"),
    "bits": ("fedavg", put("submodel", ConfigRecord({"units": b"\1"})), "units of a submodel should be 32 bytes"),
    "text": ("fedavg", put("submodel", ConfigRecord({"units": "all"})), "what it tells besides, must be bytes"),
    "never sent": ("heterofl", claimed(one_unit_more), "claims units or tensors that it was never sent"),
    "all that was never sent": (
        "heterofl",
        everything,
        "it has [0-9,]+ bytes; a reply to what it was asked has at most",
    ),
    "nothing of a group": ("fedavg", claimed(without_a_group), "it holds no unit of group 'conv2'"),
    "nothing of a group, own models": ("fedlps", claimed(without_a_group), "it holds no unit of group 'conv2'"),
    "other units": ("fedlps", claimed(one_other_unit), "it holds other units than it was asked to train"),
    "tensors named": ("fedavg", claimed(every_tensor_named), "it leaves out whole tensors, or single entries"),
    "work without end": ("fedavg", metrics(macs=1.7e308), r"macs of a reply must lie in \[0, 1e\+18\]"),
    "work below 0": ("fedavg", metrics(macs=-1.0), "macs of a reply must lie in"),
    "time below 0": ("fedavg", metrics(seconds=-1.0), "seconds be >= 0, got 1.0, -1.0"),
    "no level": ("flexfl", one_unit_less, "its units are those of no level"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_wrong_reply_is_refused_told_and_never_averaged(
    fault: str, tmp_path: Path, without_victim: Callable[[str], Path]
) -> None:
    strategy, change, reason = FAULTS[fault]
    run = run_toy(tmp_path, strategy, alter=only("train", change))
    (line,) = lines(run)
    assert [told["partition"] for told in line["refused"]] == [VICTIM]
    with pytest.raises(ValueError, match=reason):
        raise ValueError(line["refused"][0]["reason"])
    assert line["failed"] == []
    assert line["trained"] == lines(without_victim(strategy))[0]["trained"]
    assert same_bits(final_model(run), final_model(without_victim(strategy)))


@pytest.mark.parametrize("strategy", ["fedavg", "heterofl", "flexfl"])
def test_a_client_that_raises_is_told_with_its_cause(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_victim: Callable[[str], Path]
) -> None:
    method = METHODS[strategy]

    def break_down(job: Any, *args: Any) -> Any:
        if job.device.partition == VICTIM:
            raise MemoryError("no room for the\n gradients")
        return method.local_update(job, *args)

    monkeypatch.setitem(METHODS, strategy, replace(method, local_update=break_down))
    run = run_toy(tmp_path, strategy)
    (line,) = lines(run)
    assert line["refused"] == []
    assert [told["partition"] for told in line["failed"]] == [VICTIM]
    assert "no room for the" in line["failed"][0]["reason"]
    assert "\n" not in line["failed"][0]["reason"]
    assert same_bits(final_model(run), final_model(without_victim(strategy)))


# --- rounds without any valid reply -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda request, reply: failure(request, "battery is empty"), "client 3 said: battery is empty"),
        (numbers(lambda v: v * np.nan), "client 3 said: .*NaN or infinite"),
    ],
    ids=["failed", "refused"],
)
def test_a_run_without_any_valid_reply_ends_with_an_error_that_names_a_cause(
    change: Callable[[Message, Message], Message], cause: str, tmp_path: Path
) -> None:
    def alter(request: Message, reply: Message, _: int) -> Message:
        return change(request, reply) if request.metadata.message_type == "train" else reply

    with pytest.raises(RuntimeError, match=f"no valid reply in any of 2 rounds; {cause}"):
        run_toy(tmp_path, "fedavg", {"num-server-rounds": 2}, alter=alter)
    (folder,) = tmp_path.iterdir()
    assert [len(line["failed"]) + len(line["refused"]) for line in lines(folder)] == [4, 4]
    assert not (folder / "summary.json").exists()


@pytest.mark.parametrize("strategy", ["fedavg", "heterofl", "flexfl"])
def test_a_round_without_any_valid_reply_keeps_the_model_and_the_run_goes_on(strategy: str, tmp_path: Path) -> None:
    def alter(request: Message, reply: Message, _: int) -> Message:
        first = request.metadata.group_id == "1" and request.metadata.message_type == "train"
        return failure(request) if first else reply

    run = run_toy(tmp_path, strategy, {"num-server-rounds": 2, "batch-norm": "batch"}, alter=alter)
    before, after = lines(run)
    assert (before["trained"], "train-loss" in before) == ({}, False)
    assert after["trained"]
    assert before["accuracy"] != after["accuracy"]


def test_no_device_qualifies_for_a_round_and_the_run_survives(tmp_path: Path) -> None:
    """Two devices that hold the whole model in some rounds only."""
    fleet = tmp_path / "moody.toml"
    fleet.write_text('[[class]]\nkind = "moody"\nshare = 1.0\navailability = [0.3, 0.5, 0.7, 0.9, 1.0]\n')
    run = run_toy(tmp_path / "runs", "exclusive", {"fleet": str(fleet), "num-server-rounds": 6}, clients=2)
    empty = [line for line in lines(run) if not line["cohort"]]
    assert 0 < len(empty) < 6
    for line in empty:
        assert line["failed"] == line["refused"] == []
        assert line["dispatched"] == line["trained"] == {}
        assert line["bytes-down"] == line["bytes-up"] == line["macs"] == 0
        assert 0 <= line["accuracy"] <= 1
    before = {line["round"]: line["accuracy"] for line in lines(run)}
    assert all(line["accuracy"] == before[line["round"] - 1] for line in empty if line["round"] > 1)


def test_a_fleet_in_which_no_device_ever_qualifies_stops_before_round_1(tmp_path: Path) -> None:
    fleet = tmp_path / "weak.toml"
    fleet.write_text(WEAK)
    with pytest.raises(ValueError, match="no device can train anything; see capacity, memory-bytes and round-deadline"):
        run_toy(tmp_path / "runs", "exclusive", {"fleet": str(fleet)})


# --- evaluations, statistics and profiles that are wrong --------------------------------------------------------

TESTS: dict[str, Callable[[Message, Message], Message]] = {
    "failed": lambda request, _: failure(request, "evaluation broke"),
    "nothing": lambda request, _: Message(RecordDict(), reply_to=request),
    "no number": put("metrics", MetricRecord({"correct": 1})),
    "nan": put("metrics", MetricRecord({"correct": float("nan"), "loss-sum": 1.0, "num-samples": 2})),
    "infinity": put("metrics", MetricRecord({"correct": float("inf"), "loss-sum": 1.0, "num-samples": 2})),
    "lists": put("metrics", MetricRecord({"correct": [1, 2], "loss-sum": 1.0, "num-samples": 2})),
    "too good": put("metrics", MetricRecord({"correct": 3, "loss-sum": 1.0, "num-samples": 2})),
    "below zero": put("metrics", MetricRecord({"correct": -1, "loss-sum": 1.0, "num-samples": 2})),
    "loss": put("metrics", MetricRecord({"correct": 1, "loss-sum": float("inf"), "num-samples": 2})),
}


@pytest.mark.parametrize("fault", list(TESTS))
def test_a_wrong_evaluation_is_left_out_and_told(fault: str, tmp_path: Path) -> None:
    run = run_toy(tmp_path, "fedavg", {"fraction-evaluate": 1.0}, alter=only("evaluate", TESTS[fault]))
    (line,) = lines(run)
    assert [told["partition"] for told in line["failed"]] == [VICTIM]
    assert "evaluation" in line["failed"][0]["reason"]
    assert 0 <= line["accuracy-clients"] <= 1


def sums(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Message, Message], Message]:
    """Alter the statistics that a client sends."""

    def alter(_: Message, reply: Message) -> Message:
        for name, record in list(reply.content.array_records.items()):
            values = {n: np.frombuffer(a.data, dtype=a.dtype).copy() for n, a in record.items()}
            reply.content[name] = to_record_of_arrays({n: change(v) for n, v in values.items()})
        return reply

    return alter


STATISTICS: dict[str, Callable[[Message, Message], Message]] = {
    "failed": lambda request, _: failure(request),
    "nan": sums(lambda v: v * np.nan),
    "shape": sums(lambda v: v[:-1]),
    "type": sums(lambda v: v.astype(np.float32)),
    "count": sums(lambda v: np.concatenate([[0.5], v[1:]])),
    "layers": put("b", to_record_of_arrays({"norm": np.zeros(3)})),
    "level": put("z", to_record_of_arrays({"norm1": np.zeros(33)})),
}


@pytest.mark.parametrize("fault", list(STATISTICS))
def test_wrong_statistics_are_left_out_and_told(fault: str, tmp_path: Path) -> None:
    run = run_toy(tmp_path, "heterofl", alter=only("query.statistics", STATISTICS[fault]))
    (line,) = lines(run)
    assert [told["partition"] for told in line["failed"]] == [VICTIM]
    assert "statistics query" in line["failed"][0]["reason"]
    assert line["accuracy"] == pytest.approx(lines(run_toy(tmp_path, "heterofl"))[0]["accuracy"], abs=0.3)


@pytest.mark.parametrize("fault", ["failed", "nothing seen"])
def test_without_any_statistics_the_proxy_split_stands_in(fault: str, tmp_path: Path) -> None:
    change = STATISTICS["failed"] if fault == "failed" else sums(np.zeros_like)

    def alter(request: Message, reply: Message, _: int) -> Message:
        return change(request, reply) if request.metadata.message_type == "query.statistics" else reply

    run = run_toy(tmp_path, "heterofl", alter=alter)
    by_proxy = run_toy(tmp_path, "heterofl", {"heterofl.batch-norm": "proxy"})
    assert lines(run)[0]["accuracy"] == lines(by_proxy)[0]["accuracy"]


PROFILES: dict[str, Callable[[Message, Message], Message]] = {
    "failed": lambda request, _: failure(request, "who am I?"),
    "nothing": lambda request, _: Message(RecordDict(), reply_to=request),
    "device": put("device", ConfigRecord({"partition": 1})),
    "impossible": lambda request, reply: _impossible(reply),
    "number": put("config", ConfigRecord({"code": "x"})),
}


def _impossible(reply: Message) -> Message:
    reply.content.config_records["device"]["capacity"] = -1.0
    return reply


@pytest.mark.parametrize("fault", list(PROFILES))
def test_a_client_that_cannot_say_who_it_is_is_left_out(fault: str, tmp_path: Path) -> None:
    run = run_toy(tmp_path, "fedavg", alter=only("query.profile", PROFILES[fault]))
    assert lines(run)[0]["cohort"] == [0, 2, 3]
    assert lines(run)[0]["trained"] == {"full": 3}


def test_nobody_says_who_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no client answered the profile query: .*who am I"):
        run_toy(tmp_path, "fedavg", alter=lambda request, reply, _: failure(request, "who am I?"))


# --- other code -------------------------------------------------------------------------------------------------


class OtherServer(ScriptedGrid):
    """Messages of some kinds reach the victim, or everybody, as a server with other code would send them."""

    kinds: tuple[str, ...] = ()
    victims: tuple[int, ...] = (VICTIM,)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        for message in messages:
            if message.metadata.message_type in self.kinds and self.partition(message) in self.victims:
                message.content.config_records["config"]["code"] = "0123456789ab"
        return super().push_messages(messages)


def test_a_client_with_other_code_refuses_and_both_fingerprints_are_told(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "heterofl", {"fraction-evaluate": 1.0})
    for kind in ("train", "evaluate", "query.statistics"):
        grid = OtherServer(client_app.app, 4, config)
        grid.kinds = (kind,)
        (line,) = lines(server_app.run(grid, config, f"other-{kind}"))
        assert [told["partition"] for told in line["failed"]] == [VICTIM]
        assert code_fingerprint() in line["failed"][0]["reason"]
        assert "0123456789ab" in line["failed"][0]["reason"]


def test_if_all_clients_have_other_code_nothing_starts(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "fedavg")
    grid = OtherServer(client_app.app, 4, config)
    grid.kinds, grid.victims = ("query.profile",), (0, 1, 2, 3)
    with pytest.raises(RuntimeError, match=f"other code \\({code_fingerprint()}\\) than the server \\(0123456789ab\\)"):
        server_app.run(grid, config, "other")


# --- messages that are lost -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["cohort", "arrival"])
@pytest.mark.parametrize("in_flight", [1, 64])
def test_a_client_that_never_answers_closes_the_round_late(order: str, in_flight: int, tmp_path: Path) -> None:
    def lose(request: Message, reply: Message, partition: int) -> Message | None:
        return None if request.metadata.message_type == "train" and partition == 3 else reply

    values = {"round-timeout": 0.5, "reply-order": order, "replies-in-flight": in_flight}
    run = run_toy(tmp_path, "small", values, alter=lose)
    (line,) = lines(run)
    assert [told["partition"] for told in line["failed"]] == [3]
    assert "no reply before round-timeout" in line["failed"][0]["reason"]
    assert line["trained"] == {"small": 3}


def test_every_client_of_the_cohort_is_accounted_for_when_the_round_closes_late(tmp_path: Path) -> None:
    values = {"round-timeout": 0.5, "replies-in-flight": 1}
    run = run_toy(tmp_path, "small", values, alter=only("train", lambda request, reply: None))
    (line,) = lines(run)
    assert line["trained"] == {"small": 1}
    assert [told["partition"] for told in line["failed"]] == [1, 2, 3]


class Gone(ScriptedGrid):
    """The victim vanishes after it told its profile."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids: list[str] = []
        for message in messages:
            lost = message.metadata.message_type != "query.profile" and self.partition(message) == VICTIM
            ids += [""] if lost else super().push_messages([message])
        return ids


@pytest.mark.parametrize("order", ["cohort", "arrival"])
def test_a_client_that_is_gone_is_told_by_its_partition(
    order: str, tmp_path: Path, without_victim: Callable[[str], Path]
) -> None:
    config = toy_config(tmp_path, "fedavg", {"reply-order": order})
    run = server_app.run(Gone(client_app.app, 4, config), config, "gone")
    told = [told for told in lines(run)[0]["failed"] if "evaluation" not in told["reason"]]
    assert [t["partition"] for t in told] == [VICTIM]
    assert "could not be delivered" in told[0]["reason"]
    if order == "cohort":
        assert same_bits(final_model(run), final_model(without_victim("fedavg")))


# --- what is out there, and what is kept ------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["cohort", "arrival"])
def test_no_more_than_the_limit_is_sent_and_not_folded(
    order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, folded, most = 0, 0, 0

    class Counted(Averager):
        def add(self, *args: Any) -> None:
            nonlocal folded
            super().add(*args)
            folded += 1

    class Watched(ScriptedGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            nonlocal sent, most
            messages = list(messages)
            sent += sum(message.metadata.message_type == "train" for message in messages)
            most = max(most, sent - folded)
            return super().push_messages(messages)

    monkeypatch.setattr(strategies.base, "Averager", Counted)
    config = toy_config(tmp_path, "small", {"replies-in-flight": 3, "reply-order": order})
    rng = np.random.default_rng(0)
    server_app.run(Watched(client_app.app, 12, config, delay=lambda: int(rng.integers(2))), config, "watched")
    assert (sent, folded) == (12, 12)
    assert 1 < most <= 3


def test_few_parts_are_held_where_every_client_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    part = strategies.base.SubmodelStrategy.part

    def counted(self: Any, parts: strategies.base.Parts, assignment: Assignment, **how: Any) -> dict[str, Array]:
        found = part(self, parts, assignment, **how)
        held.append(len(parts))
        assert parts[assignment.submodel.key, assignment.codec] is found
        return found

    monkeypatch.setattr(strategies.base.SubmodelStrategy, "part", counted)
    values = {"fedlps.pattern": "random", "ratio-policy": "fixed", "personal": "global-masked", "fleet": "equal"}
    run_toy(tmp_path, "fedlps", values, clients=12)
    assert len(held) == 24  # jobs and tests
    assert max(held) == strategies.base.PARTS_KEPT


def test_replies_are_dropped_once_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    aggregate = strategies.base.SubmodelStrategy.aggregate_train

    def watch(self: Any, server_round: int, replies: Iterable[Message]) -> Any:
        seen: list[weakref.ref[Message]] = []

        def passed() -> Iterator[Message]:
            for reply in replies:
                gc.collect()
                alive.append(sum(ref() is not None for ref in seen))
                seen.append(weakref.ref(reply))
                yield reply
                del reply

        return aggregate(self, server_round, passed())

    monkeypatch.setattr(strategies.base.SubmodelStrategy, "aggregate_train", watch)
    run_toy(tmp_path, "small", clients=8)
    assert len(alive) == 8
    assert max(alive) <= 1


@pytest.mark.parametrize("strategy", ["fedavg", "heterofl", "flexfl"])
def test_a_part_is_cut_once_for_all_that_get_it(strategy: str, tmp_path: Path) -> None:
    cut: dict[str, set[int]] = {"train": set(), "evaluate": set()}
    kept: list[bytes] = []

    def listen(request: Message, reply: Message, _: int) -> Message:
        if request.metadata.message_type in cut:
            data = request.content.array_records["arrays"]["part"].data
            kept.append(data)  # an id is only unique while its object lives
            cut[request.metadata.message_type].add(id(data))
        return reply

    run = run_toy(tmp_path, strategy, {"fraction-evaluate": 1.0}, clients=8, alter=listen)
    assert len(cut["train"]) == len(lines(run)[0]["dispatched"])
    assert len(cut["evaluate"]) <= 3


@pytest.mark.parametrize("strategy", ["heterofl", "flexfl"])
def test_a_plain_grid_gives_the_same_numbers(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = run_toy(tmp_path, strategy)
    monkeypatch.setattr(server_app, "stream", lambda grid, *_: grid)
    config = toy_config(tmp_path, strategy)
    plain = server_app.run(InProcessGrid(client_app.app, 4, config), config, "plain000")
    assert (plain / "metrics.jsonl").read_bytes() == (streamed / "metrics.jsonl").read_bytes()


# --- the shared knobs of a round --------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "clients", "size"), [(0.5, 5, 2), (0.29, 7, 2), (0.01, 4, 1), (1.0, 3, 3)])
def test_cohorts_are_rounded_down_but_never_empty(fraction: float, clients: int, size: int, tmp_path: Path) -> None:
    run = run_toy(tmp_path, "small", {"fraction-train": fraction, "num-server-rounds": 2}, clients=clients)
    assert [len(line["cohort"]) for line in lines(run)] == [size, size]


def test_evaluation_follows_its_knobs(tmp_path: Path) -> None:
    run = run_toy(tmp_path, "small", {"num-server-rounds": 5, "evaluate-every": 3, "fraction-evaluate": 0.0})
    assert ["accuracy" in line for line in lines(run)] == [False, False, True, False, True]
    assert not any("accuracy-clients" in line for line in lines(run))


def test_clients_of_a_round_have_seeds_and_rates_of_their_own(tmp_path: Path) -> None:
    seeds: list[Any] = []

    def listen(request: Message, reply: Message, partition: int) -> Message:
        if request.metadata.message_type == "train":
            config = request.content.config_records["config"]
            seeds.append(config["seed"])
            assert config["round"] == int(request.metadata.group_id)
        return reply

    run_toy(tmp_path, "small", {"num-server-rounds": 2}, alter=listen)
    assert len(set(seeds)) == 8


def test_statistics_of_a_client_fit_what_it_was_asked(tmp_path: Path) -> None:
    """The sums of a client that holds the large level speak of the small one too."""
    levels: dict[int, set[str]] = {}

    def listen(request: Message, reply: Message, partition: int) -> Message:
        if request.metadata.message_type == "query.statistics":
            levels[partition] = set(reply.content.array_records)
        return reply

    run_toy(tmp_path, "heterofl", alter=listen)
    assert levels == {0: {"b"}, 1: {"b"}, 2: {"b"}, 3: {"a", "b"}}


def test_a_reply_that_weighs_more_than_it_told_is_refused(tmp_path: Path) -> None:
    """Finite, and yet enough to overflow every sum."""
    run = run_toy(tmp_path, "fedavg", alter=only("train", metrics(weight=1e39)))
    (line,) = lines(run)
    assert "has told of" in line["refused"][0]["reason"]
    assert np.isfinite(line["loss"])


def test_the_model_file_gives_the_accuracy_reported(tmp_path: Path) -> None:
    """Loaded as a plain network, with the statistics that stand beside the tensors."""
    run = run_toy(tmp_path, "flexfl")
    saved = load_file(run / "model.safetensors")
    task = Experiment.read({"strategy": "flexfl"}).task(10, (1, 8, 8))
    model = task.network({name: array for name, array in saved.items() if "running" not in name})
    found = {
        name.removesuffix(".running_mean"): (array, saved[name.replace("mean", "var")])
        for name, array in saved.items()
        if name.endswith("running_mean")
    }
    apply_statistics(model, found)
    raw = load_server(DataConfig())
    test = normalise(raw.test, *normalisation(raw.proxy))
    assert evaluate(model, test).accuracy == pytest.approx(lines(run)[0]["accuracy"])
