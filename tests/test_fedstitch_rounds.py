"""FedStitch's rounds with clients that fail, lie, forget, or come late: told, left out, and the run goes on."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, Message, MetricRecord, RecordDict
from toy import failure, final_model, lines, run_toy, same_bits, toy_config
from toy_zoo import knobs, toy_zoos, write_zoo

import client_app
import server_app
from flexfed.flower.grid import InProcessGrid
from flexfed.flower.messages import from_array, num_bytes, to_record_of_arrays
from strategies.fedstitch import FedStitch
from strategies.phases import Phases

CLIENTS = 4
VICTIM = 1
SCORE, STITCH, HEAD, TEST = "train.score", "train.stitch", "train.head", "evaluate.stitched"
MIXED = "0-5-10-3"
"""A path with three bridges."""

Change = Callable[[Message, Message], Message | None]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(autouse=True)
def _zoos() -> Iterator[None]:
    with toy_zoos():
        yield


def stitch(folder: Path, zoo: Path, alter: Any = None, clients: int = CLIENTS, **values: Any) -> Path:
    return run_toy(folder, "fedstitch", knobs(zoo, **values), clients=clients, alter=alter)


def kind_of(request: Message) -> str:
    return request.metadata.message_type


def round_of(request: Message) -> int:
    return int(request.metadata.group_id or 0)


def only(kind: str, change: Change, server_round: int = 0, victims: Iterable[int] = (VICTIM,)) -> Any:
    """Alter what some clients reply to messages of one kind, in one round or in all."""

    def alter(request: Message, reply: Message, partition: int) -> Message | None:
        hit = kind_of(request) == kind and partition in victims and server_round in (0, round_of(request))
        return change(request, reply) if hit else reply

    return alter


def fails(request: Message, _: Message) -> Message:
    return failure(request, "battery is empty")


def without(lines_: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in keys} for line in lines_]


# --- answers that are wrong -------------------------------------------------------------------------------------


def arrays(change: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]) -> Change:
    """Other arrays in an answer."""

    def alter(_: Message, reply: Message) -> Message:
        record = reply.content.array_records["arrays"]
        reply.content["arrays"] = to_record_of_arrays(change({n: from_array(a).copy() for n, a in record.items()}))
        return reply

    return alter


def one(name: str, change: Callable[[np.ndarray], Any]) -> Change:
    """Another value of one array."""
    return arrays(lambda found: {**found, name: np.asarray(change(found[name]), dtype=found[name].dtype)})


def entry(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values.reshape(-1)[0] = value
        return values

    return change


def told(**values: Any) -> Change:
    """Other numbers in an answer."""

    def alter(_: Message, reply: Message) -> Message:
        own = dict(reply.content.metric_records["metrics"])
        reply.content["metrics"] = MetricRecord({**own, **{k.replace("_", "-"): v for k, v in values.items()}})
        return reply

    return alter


def drop(record: str) -> Change:
    def alter(_: Message, reply: Message) -> Message:
        del reply.content[record]
        return reply

    return alter


def pickled(_: Message, reply: Message) -> Message:
    record = reply.content.array_records["arrays"]
    record["scores"] = Array(dtype="float64", shape=(3,), stype="numpy.ndarray", data=bytes(24))
    return reply


def ten_times(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums that agree with each other, of more rows than the client has."""
    return {**found, "gram": 10 * found["gram"], "cross": 10 * found["cross"]}


def many(request: Message, reply: Message) -> Message | None:
    rows = reply.content.metric_records["metrics"]["rows"]
    return told(rows=10 * rows)(request, arrays(ten_times)(request, reply) or reply)  # type: ignore[operator]


def twisted(gram: np.ndarray) -> np.ndarray:
    """Symmetric, and yet of no rows."""
    gram[0, 1] = gram[1, 0] = 1e3 * (gram[0, 0] + gram[1, 1] + 1)
    return gram


def other_counts(change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Other numbers of rows of the classes."""

    def alter(cross: np.ndarray) -> np.ndarray:
        cross[-1] = change(cross[-1])
        return cross

    return one("cross", alter)


FAULTS: dict[str, tuple[str, Change, str]] = {
    "score nan": (SCORE, one("scores", entry(np.nan)), r"scores of candidates \[0\] are not finite"),
    "score inf": (SCORE, one("scores", entry(np.inf)), r"scores of candidates \[0\] are not finite"),
    "score below 0": (SCORE, one("scores", entry(-0.01)), r"outside \[0, 1\]: \[-0.01\]"),
    "score above 1": (SCORE, one("scores", entry(1.01)), r"outside \[0, 1\]: \[1.01\]"),
    "one too few": (SCORE, one("scores", lambda v: v[:-1]), r"scores have shape \(2,\), expected \(3,\)"),
    "no scores": (SCORE, arrays(lambda _: {}), "arrays of an answer should be .*; they differ in levels, scores"),
    "two axes": (SCORE, one("scores", lambda v: v[None]), r"scores have shape \(1, 3\)"),
    "encoding": (SCORE, pickled, "as 'numpy.ndarray'"),
    "no metrics": (SCORE, drop("metrics"), "answer lacks 'metrics'"),
    "no arrays": (SCORE, drop("arrays"), "answer lacks 'arrays'"),
    "nothing": (SCORE, lambda request, _: Message(RecordDict(), reply_to=request), "answer lacks 'metrics'"),
    "macs": (SCORE, told(macs=1e19), r"macs of an answer must lie in \[0, 1e\+18\]"),
    "macs below 0": (SCORE, told(macs=-1.0), "macs of an answer must lie in"),
    "macs nan": (SCORE, told(macs=float("nan")), "metrics of an answer must be finite numbers"),
    "numbers in a list": (SCORE, told(macs=[1.0, 2.0]), "metrics of an answer must be finite numbers"),
    "seconds": (SCORE, told(seconds=-1e-3), "seconds of an answer must lie in"),
    "modelled seconds": (SCORE, told(modelled_seconds=1e10), "modelled-seconds of an answer must lie in"),
    "joules": (SCORE, told(modelled_joules=-1.0), "modelled-joules of an answer must lie in"),
    "measured joules": (SCORE, told(measured_joules=-1.0), "measured-joules of an answer must lie in"),
    "correction": (SCORE, told(correction=1e5), "correction of an answer must lie in"),
    "correction beyond all": (SCORE, told(correction=1e300), "metrics of an answer must lie within"),
    "correction below 0": (SCORE, told(correction=-2.0), "correction of an answer must lie in"),
    "gram nan": (HEAD, one("gram", entry(np.nan)), "sums are not finite"),
    "gram shape": (HEAD, one("gram", lambda v: v[:-1]), "sums have shapes"),
    "no gram": (HEAD, arrays(lambda found: {"cross": found["cross"]}), "they differ in gram, levels"),
    "cross inf": (HEAD, one("cross", entry(np.inf)), "sums are not finite"),
    "cross shape": (HEAD, one("cross", lambda v: v[:, 1:]), "sums have shapes"),
    "cross beyond all": (HEAD, one("cross", entry(1e308)), "sums are not finite, or beyond 1e"),
    "cross beyond its gram": (HEAD, one("cross", entry(1e15)), "sums are not those of any rows: features of a class"),
    "more labels than rows": (HEAD, other_counts(lambda v: 2 * v), r"rows of the classes, which are not \d+ rows"),
    "labels below 0": (HEAD, other_counts(lambda v: v + [-v[0] - 1, v[0] + 1, *[0] * 8]), "rows of the classes, which"),
    "rows below 0": (HEAD, told(rows=-1), "sums say -1 rows"),
    "rows missing": (HEAD, told(rows=0), "sums say 0 rows, but their last entry counts"),
    "more rows than images": (HEAD, many, "rows; of what it has told of, there are at most"),
    "squares below 0": (HEAD, one("gram", entry(-1.0)), "sums are not those of any rows"),
    "products too large": (HEAD, one("gram", twisted), "sums are not those of any rows"),
    "stitch nan": (STITCH, one("gram", entry(np.nan)), "sums are not finite"),
    "stitch shape": (STITCH, one("cross", lambda v: v[:, 1:]), "sums have shapes"),
    "more rows than asked for": (STITCH, many, "rows; of what it has told of, there are at most 256"),
    "too many right": (TEST, told(correct=1e6), "validation samples cannot be right"),
    "right below 0": (TEST, told(correct=-1), "validation samples cannot be right"),
    "nothing right": (TEST, told(correct=float("inf")), "metrics of an answer must be finite numbers"),
    "tested beyond all": (TEST, told(correct=1e9, num_samples=1e9), "and has told of samples for at most"),
}


@pytest.fixture(scope="module")
def without_victim(tmp_path_factory: pytest.TempPathFactory, zoo: Path) -> Callable[[str], Path]:
    """The run in which the victim fails in one phase of every round: what a refused answer must equal."""
    runs: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in runs:
            runs[kind] = stitch(tmp_path_factory.mktemp("failed"), zoo, only(kind, fails), **settings(kind))
        return runs[kind]

    return run


def settings(kind: str) -> dict[str, Any]:
    """Of a run of one or two rounds, in which that phase occurs."""
    fixed = {"path": "0-5"} if kind == STITCH else {}
    return {**fixed, "shared": {"num-server-rounds": 2 if kind == STITCH else 1}}


BESIDE = ("refused", "failed", "bytes-up", "bytes-evaluation")


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_wrong_answer_is_refused_told_and_never_counted(
    fault: str, tmp_path: Path, zoo: Path, without_victim: Callable[[str], Path]
) -> None:
    kind, change, reason = FAULTS[fault]
    run = stitch(tmp_path, zoo, only(kind, change), **settings(kind))
    last = lines(run)[-1]
    assert [told["partition"] for told in last["refused"]] == [VICTIM]
    with pytest.raises(ValueError, match=reason):
        raise ValueError(last["refused"][0]["reason"])
    assert last["failed"] == []
    assert without(lines(run), *BESIDE) == without(lines(without_victim(kind)), *BESIDE)
    assert same_bits(final_model(run), final_model(without_victim(kind)))


def test_law_2_a_failed_client_is_as_one_never_sampled(
    tmp_path: Path, zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as sums and scores go; what was sent to it was sent."""

    def alter(request: Message, reply: Message, partition: int) -> Message:
        return failure(request) if partition == VICTIM and kind_of(request) != "query.profile" else reply

    failed = stitch(tmp_path / "failed", zoo, alter)
    draw = FedStitch._draw_cohort
    monkeypatch.setattr(FedStitch, "_draw_cohort", lambda self, rng: [p for p in draw(self, rng) if p != VICTIM])
    never = stitch(tmp_path / "never", zoo)
    assert same_bits(final_model(failed), final_model(never))
    for one_, other in zip(lines(failed), lines(never), strict=True):
        assert {**one_["stitching"]} == {**other["stitching"]}
        assert one_["validation-accuracy"] == other["validation-accuracy"]
        assert [told["partition"] for told in one_["failed"]] == [VICTIM] * len(one_["failed"])


@pytest.mark.parametrize("order", ["cohort", "arrival"])
def test_law_2_late_and_shuffled_answers_change_nothing(order: str, tmp_path: Path, zoo: Path) -> None:
    rng = np.random.default_rng(0)
    config = knobs(zoo, shared={"reply-order": order, "replies-in-flight": 3, "num-server-rounds": 2})
    prompt = run_toy(tmp_path / "prompt", "fedstitch", config, clients=CLIENTS)
    late = run_toy(tmp_path / "late", "fedstitch", config, clients=CLIENTS, delay=lambda: int(rng.integers(3)))
    if order == "cohort":
        assert (late / "metrics.jsonl").read_bytes() == (prompt / "metrics.jsonl").read_bytes()
        assert same_bits(final_model(late), final_model(prompt))
    for one_, other in zip(lines(late), lines(prompt), strict=True):
        assert one_["stitching"]["scores"] == pytest.approx(other["stitching"]["scores"])
        assert one_["stitching"]["path"] == other["stitching"]["path"]
    for name, array in final_model(late).items():
        np.testing.assert_allclose(array, final_model(prompt)[name], rtol=1e-3, atol=1e-5)


def test_an_answer_that_comes_twice_or_from_nobody_asked_does_not_count(
    tmp_path: Path, zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Phases.take
    kept: list[Message] = []

    def more(self: Phases, phase: Any, replies: Iterable[Message]) -> None:
        own = list(replies)
        twice = [reply for reply in own if self._strategy.federation.partition_of(reply) == VICTIM]
        strangers = [] if phase.kind != HEAD else kept
        kept.extend(reply for reply in own if phase.kind == SCORE)
        phase.sent = {p: n for p, n in phase.sent.items() if p != 2} if phase.kind == HEAD else phase.sent
        take(self, phase, [*own, *twice, *strangers[2:3]])

    whole = stitch(tmp_path / "whole", zoo, only(HEAD, fails, victims=[2]), shared={"num-server-rounds": 1})
    monkeypatch.setattr(Phases, "take", more)
    run = stitch(tmp_path / "run", zoo, shared={"num-server-rounds": 1})
    (line,) = lines(run)
    reasons = [(told["partition"], told["reason"]) for told in line["refused"]]
    unasked = "it was not asked, or has answered already"
    assert reasons == [(VICTIM, unasked), (2, unasked), (VICTIM, unasked), (2, unasked), (VICTIM, unasked)]
    assert same_bits(final_model(run), final_model(whole))


# --- phases without any valid answer ----------------------------------------------------------------------------

EVERYBODY = range(CLIENTS)
EMPTY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "scores": (SCORE, "no scores; the network stays as it is", {}),
    "bridges": (STITCH, "nobody stitched; the network stays as it is", {"path": MIXED}),
    "heads": (HEAD, "no head; the network stays as it is", {"path": MIXED}),
}


@pytest.mark.parametrize("case", list(EMPTY))
def test_a_phase_that_fails_twice_ends_the_run_with_what_there_is(
    case: str, tmp_path: Path, zoo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind, says, own = EMPTY[case]
    asked = []

    def listen(request: Message, reply: Message, partition: int) -> Message:
        asked.append((kind_of(request), round_of(request)))
        return alter(request, reply, partition)

    alter = only(kind, fails, 2, EVERYBODY)
    with caplog.at_level(logging.INFO, "flwr"):
        run = stitch(tmp_path, zoo, listen, **own)
    short = stitch(tmp_path / "short", zoo, **own, shared={"num-server-rounds": 1})
    assert [line["round"] for line in lines(run)] == [1, 2]
    assert f"round 2: {says}" in caplog.text
    assert asked.count((kind, 2)) == 2 * CLIENTS
    assert lines(run)[1]["trained"] == {}
    assert lines(run)[1]["accuracy"] == lines(run)[0]["accuracy"]
    assert same_bits(final_model(run), final_model(short))
    again = run_toy(tmp_path, "fedstitch", {**knobs(zoo, **own), "resume": str(run)}, clients=CLIENTS)
    assert (again, len(lines(run))) == (run, 2)


@pytest.mark.parametrize("kind", [SCORE, HEAD])
def test_a_phase_that_fails_once_is_asked_once_more(kind: str, tmp_path: Path, zoo: Path) -> None:
    seen: list[int] = []

    def alter(request: Message, reply: Message, partition: int) -> Message:
        first = kind_of(request) == kind and partition not in seen
        seen.extend([partition] if first else [])
        return failure(request) if first else reply

    run = stitch(tmp_path / "twice", zoo, alter, shared={"num-server-rounds": 1})
    once = stitch(tmp_path / "once", zoo, shared={"num-server-rounds": 1})
    assert [told["partition"] for told in lines(run)[0]["failed"]] == list(EVERYBODY)
    assert lines(run)[0]["stitching"] == lines(once)[0]["stitching"]
    assert same_bits(final_model(run), final_model(once))


@pytest.mark.parametrize("kind", [SCORE, HEAD])
def test_nothing_at_all_in_the_first_round_is_an_error_that_names_a_cause(kind: str, tmp_path: Path, zoo: Path) -> None:
    with pytest.raises(RuntimeError, match="no valid reply in any of 8 rounds; client 3 said: battery is empty"):
        stitch(tmp_path, zoo, only(kind, fails, 0, EVERYBODY))
    (folder,) = tmp_path.iterdir()
    assert not (folder / "summary.json").exists()


def test_no_valid_test_teaches_nothing(tmp_path: Path, zoo: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = stitch(tmp_path, zoo, only(TEST, fails, 0, EVERYBODY), shared={"num-server-rounds": 2})
    assert [line["stitching"]["reward"] for line in lines(run)] == [0, 0]
    assert not any("validation-accuracy" in line for line in lines(run))
    assert "no validation samples; nothing is learned" in caplog.text
    first, second = (line["stitching"]["weights"] for line in lines(run))
    assert first == pytest.approx(second, rel=1e-12)


# --- clients that forget, or come late --------------------------------------------------------------------------


class Forgetful(InProcessGrid):
    """Clients whose disk is wiped in front of a message, and what they were asked."""

    def __init__(self, *args: Any, forgets: Callable[[Message, int], bool], folder: Path):
        super().__init__(*args)
        self.forgets, self.folder = forgets, folder
        self.asked: list[tuple[str, int, set[str]]] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids: list[str] = []
        for message in messages:
            partition = list(self.get_node_ids()).index(message.metadata.dst_node_id)
            if kind_of(message) != "query.profile":
                names = set(message.content.array_records["arrays"])
                self.asked.append((f"{kind_of(message)} {round_of(message)}", partition, names))
                if self.forgets(message, partition):
                    for state in self.folder.rglob(f"clients/{partition:06d}"):
                        shutil.rmtree(state)
            ids += super().push_messages([message])
        return ids


def forgetful(folder: Path, zoo: Path, forgets: Callable[[Message, int], bool], **own: Any) -> tuple[Path, Forgetful]:
    config = toy_config(folder, "fedstitch", knobs(zoo, **own))
    grid = Forgetful(client_app.app, CLIENTS, config, forgets=forgets, folder=folder)
    return server_app.run(grid, config, "forget00"), grid


@pytest.mark.parametrize(("kind", "path"), [(SCORE, ""), (STITCH, MIXED), (HEAD, MIXED), (TEST, MIXED)])
def test_a_client_that_lost_all_it_kept_is_asked_again_with_all_bridges(
    kind: str, path: str, tmp_path: Path, zoo: Path
) -> None:
    """It loses it once, in front of the last phase of that kind."""

    def forgets(message: Message, partition: int) -> bool:
        now = kind_of(message) == kind and round_of(message) == 3 and partition == VICTIM
        done, gone[0] = gone[0], gone[0] or now
        return now and not done

    gone = [False]
    whole, _ = forgetful(tmp_path / "whole", zoo, lambda *_: False, path=path)
    run, grid = forgetful(tmp_path / "run", zoo, forgets, path=path)
    asked = [names for what, partition, names in grid.asked if (what, partition) == (f"{kind} 3", VICTIM)]
    assert len(asked) == 2
    bridges = {"bridge/1/weight", "bridge/1/bias"} if path else set()
    assert bridges <= asked[1]
    assert not bridges & asked[0]
    costs = ("bytes-down", "bytes-evaluation", "macs", "macs-evaluation", "joules")
    times = ("modelled-seconds", "modelled-seconds-training")
    assert without(lines(run), *costs, *times) == without(lines(whole), *costs, *times)
    assert same_bits(final_model(run), final_model(whole))
    assert all(line["failed"] == line["refused"] == [] for line in lines(run))


def test_a_client_whose_state_is_damaged_is_asked_again_too(tmp_path: Path, zoo: Path) -> None:
    def damage(request: Message, reply: Message, partition: int) -> Message:
        if (kind_of(request), round_of(request), partition) == (TEST, 1, VICTIM):
            for state in (tmp_path / "run").rglob(f"clients/{VICTIM:06d}/*.safetensors"):
                state.write_bytes(state.read_bytes()[:-7])
        return reply

    run = stitch(tmp_path / "run", zoo, damage, shared={"num-server-rounds": 2})
    whole = stitch(tmp_path / "whole", zoo, shared={"num-server-rounds": 2})
    assert all(line["failed"] == line["refused"] == [] for line in lines(run))
    assert same_bits(final_model(run), final_model(whole))


def test_a_bridge_travels_to_each_client_once(tmp_path: Path, zoo: Path) -> None:
    sent: dict[tuple[int, str], int] = {}
    sizes: dict[int, int] = {}

    def listen(request: Message, reply: Message, partition: int) -> Message:
        if kind_of(request) != "query.profile":
            for name in request.content.array_records["arrays"]:
                sent[partition, name] = sent.get((partition, name), 0) + 1
            if kind_of(request).startswith("train"):
                sizes[round_of(request)] = sizes.get(round_of(request), 0) + num_bytes(request)
        return reply

    run = stitch(tmp_path, zoo, listen, path=MIXED)
    assert {key: num for key, num in sent.items() if "bridge" in key[1]} == {
        (partition, f"bridge/{position}/{part}"): 1
        for partition in EVERYBODY
        for position in (1, 2, 3)
        for part in ("weight", "bias")
    }
    assert [line["bytes-down"] for line in lines(run)] == [sizes[number] for number in sorted(sizes)]


def test_whoever_comes_late_is_sent_all_bridges(tmp_path: Path, zoo: Path) -> None:
    """Small cohorts: a client of a later round was not there when the first bridges were made."""
    shared = {"fraction-train": 0.2, "num-server-rounds": 4}
    seen: dict[int, set[str]] = {}
    late = 0

    def listen(request: Message, reply: Message, partition: int) -> Message:
        nonlocal late
        if round_of(request):
            late += partition not in seen and round_of(request) > 2
            seen.setdefault(partition, set()).update(request.content.array_records["arrays"])
        if kind_of(request) == HEAD:
            needed = {f"bridge/{position}/weight" for position in range(1, round_of(request))}
            assert needed <= seen[partition]
        return reply

    run = stitch(tmp_path, zoo, listen, clients=10, path=MIXED, shared=shared)
    assert [len(line["cohort"]) for line in lines(run)] == [2, 2, 2, 2]
    assert late
    assert all(line["failed"] == line["refused"] == [] for line in lines(run))
