"""Law 9: a run that was killed and goes on is the run that was never killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from flwr.app import Message
from remembering import CLIENTS, NAME, registered
from toy import QUICK, ROOT, InProcessGrid, failure, lines, run_toy, same_bits, toy_config, with_difference

import client_app
import server_app
from flexfed import diary
from flexfed.checkpoint import load_checkpoint, save_checkpoint
from flexfed.client_state import load_state
from flexfed.flower.request import client_data
from flexfed.overrides import defaults, parse_overrides, with_resumed
from flexfed.resume import run_identity
from flexfed.runs import RunFolder, load_run
from strategies import STRATEGIES

FILES = ("metrics.jsonl", "model.safetensors")
ROUNDS = 3
_ids = count()


class Killed(BaseException):
    """What stands for a kill where a real one would end the tests, too."""


@pytest.fixture(autouse=True)
def _without_pictures() -> Iterator[None]:
    with patch("flexfed.report.curves_png"), registered():
        yield


def run(folder: Path, values: Mapping[str, Any], clients: int = CLIENTS) -> Path:
    config = toy_config(folder, "flexfl", {"num-server-rounds": ROUNDS, **values})
    return server_app.run(InProcessGrid(client_app.app, clients, config), config, f"{next(_ids):08d}")


def go_on(folder: Path, values: Mapping[str, Any] | None = None, clients: int = CLIENTS) -> Path:
    """As `flexfed run -c "resume='...'"` does it."""
    config = {**defaults(ROOT), **with_resumed({"resume": str(folder), **(values or {})})}
    return server_app.run(InProcessGrid(client_app.app, clients, config), config, "unused")


def killed_run(folder: Path, values: Mapping[str, Any], where: str, server_round: int) -> Path:
    """A run that is killed in a round: before its line is written, before its checkpoint, or after it."""

    def before_line(self: RunFolder, metrics: Mapping[str, Any]) -> None:
        if metrics["round"] == server_round:
            raise Killed
        append(self, metrics)

    def at_checkpoint(path: Path, checkpoint: Any) -> None:
        if checkpoint.server_round == server_round and where == "before its checkpoint":
            raise Killed
        save(path, checkpoint)
        if checkpoint.server_round == server_round:
            raise Killed

    append, save = RunFolder.append_round, diary.save_checkpoint
    with pytest.MonkeyPatch.context() as patched:
        if where == "before its line":
            patched.setattr(RunFolder, "append_round", before_line)
        else:
            patched.setattr(diary, "save_checkpoint", at_checkpoint)
        with pytest.raises(Killed):
            run(folder, values)
    (left,) = folder.iterdir()
    assert not (left / "summary.json").exists()
    return left


def same_run(one: Path, other: Path) -> bool:
    """The same rounds and the same model, byte for byte."""
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in FILES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of three rounds that nobody killed."""
    found: dict[str, Path] = {}

    def get(strategy: str) -> Path:
        if strategy not in found:
            found[strategy] = run(tmp_path_factory.mktemp("whole"), {"strategy": strategy})
        return found[strategy]

    return get


@pytest.mark.parametrize("strategy", [*sorted(STRATEGIES), NAME])
def test_law_9_killed_and_resumed_is_never_killed(strategy: str, tmp_path: Path, whole: Callable[[str], Path]) -> None:
    left = killed_run(tmp_path, {"strategy": strategy}, "after it", 2)
    assert go_on(left) == left
    assert same_run(left, whole(strategy))


PERSONAL = {
    "fedlps": {"strategy": "fedlps", "fraction-train": 0.5},
    "heterofl": {"strategy": "heterofl", "ratio-policy": "p-ucbv", "personal": "stored-local", "fraction-train": 0.5},
    "flexfl": {"strategy": "flexfl", "ratio-policy": "p-ucbv", "flexfl.scores": "0.4, 0.5, 0.6, 0.7"},
}
SMALL = {"partition": "shards", "shard-size": 20, "test-per-label": 8, "batch-size": 8, "seed": 2, "fleet": "equal"}


@pytest.mark.parametrize("case", PERSONAL)
def test_law_9_with_bandits_and_models_of_the_clients_own(case: str, tmp_path: Path) -> None:
    """A client that rests in the last round tests what it trained before the kill."""
    values = {**SMALL, **PERSONAL[case]}
    never = run(tmp_path / "never", values)
    left = killed_run(tmp_path / "killed", values, "after it", 2)
    found = load_checkpoint(left / "checkpoint")
    assert found is not None
    seen = sorted({partition for line in lines(left) for partition in line["cohort"]})
    assert found.state["bandit/partition"].tolist() == seen
    assert 0 < found.state["bandit/count"].sum() <= sum(len(line["cohort"]) for line in lines(left))
    if case != "flexfl":
        assert found.state["personal/partitions"].tolist() == seen
        assert len(found.state["personal/units"]) == len(seen)
        assert set(seen) - set(lines(never)[2]["cohort"]), "one rests"
        assert lines(never)[2]["clients-personal"] == CLIENTS
    if case == "fedlps":
        assert found.state["ranking/partitions"].tolist() == seen
    go_on(left)
    assert same_run(left, never)
    states = [load_checkpoint(folder / "checkpoint") for folder in (left, never)]
    one, other = ({k: v for k, v in state.state.items() if isinstance(v, np.ndarray)} for state in states if state)
    assert same_bits(one, other)


EXPLORED: dict[str, tuple[dict[str, Any], str, int]] = {
    "before round 1 ended": ({}, "before its line", 1),
    "static, narrow": ({"autoflip.mask-mode": "static", "autoflip.structured": "units"}, "after it", 2),
    "fedlex": ({"autoflip.fedlex": True}, "after it", 1),
}


@pytest.mark.parametrize("case", EXPLORED)
def test_law_9_what_was_explored_is_not_explored_again(case: str, tmp_path: Path) -> None:
    more, where, server_round = EXPLORED[case]
    values = {"strategy": "autoflip", "fraction-train": 0.5, **more}
    never = run(tmp_path / "never", values)
    left = killed_run(tmp_path / "killed", values, where, server_round)
    before = {path: path.stat().st_mtime_ns for path in (left / "exploration").iterdir()}
    go_on(left)
    assert same_run(left, never)
    assert before == {path: path.stat().st_mtime_ns for path in (left / "exploration").iterdir()}
    assert len(before) == CLIENTS


@pytest.mark.parametrize("where", ["before its line", "before its checkpoint", "after it"])
@pytest.mark.parametrize("server_round", [1, 3])
def test_law_9_wherever_it_was_killed(
    where: str, server_round: int, tmp_path: Path, whole: Callable[[str], Path]
) -> None:
    left = killed_run(tmp_path, {"strategy": NAME}, where, server_round)
    go_on(left)
    assert same_run(left, whole(NAME))
    assert [json.loads(line)["round"] for line in (left / "timing.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_clients_keep_three_versions_of_their_state_in_the_run_folder(whole: Callable[[str], Path]) -> None:
    folder = whole(NAME) / "clients" / "000002"
    assert [path.name for path in sorted(folder.iterdir())] == [f"round-{r:08d}.safetensors" for r in (1, 2, 3)]
    assert load_state(folder, ROUNDS)["seen"].tolist() == [3.0, pytest.approx(6 / 7)]
    assert not (whole("heterofl") / "clients").exists()


@pytest.mark.parametrize("kind", ["lost", "refused"])
def test_law_2_a_reply_that_never_counted_leaves_no_trace_on_its_client(kind: str, tmp_path: Path) -> None:
    """A client whose first reply is lost or refused is afterwards as one that failed before it trained."""

    def lose(request: Message, reply: Message, partition: int) -> Message | None:
        if partition != 1 or request.metadata.message_type != "train" or request.metadata.group_id != "1":
            return reply
        return failure(request) if kind == "lost" else with_difference(reply, lambda flat: flat * np.nan)

    def fail(request: Message, reply: Message, partition: int) -> Message:
        first = partition == 1 and request.metadata.message_type == "train" and request.metadata.group_id == "1"
        if first:
            for path in (tmp_path / "failed").rglob("clients/000001/*"):
                path.unlink()
        return failure(request) if first else reply

    values = {"num-server-rounds": ROUNDS}
    one = run_toy(tmp_path / "lost", NAME, values, alter=lose)
    other = run_toy(tmp_path / "failed", NAME, values, alter=fail)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize("place", ["", "state"])
def test_a_run_folder_may_be_renamed(place: str, tmp_path: Path, whole: Callable[[str], Path]) -> None:
    values = {"strategy": NAME, "state-dir": str(tmp_path / place) if place else ""}
    left = killed_run(tmp_path / "runs", values, "after it", 2)
    moved = left.rename(tmp_path / "elsewhere")
    go_on(moved)
    assert same_run(moved, whole(NAME))
    assert not left.exists()
    assert place == "" or [path.name for path in (tmp_path / place).iterdir()] == [left.name]


def test_a_node_may_keep_its_state_in_a_place_of_its_own(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "runs", NAME, {"state-dir": str(tmp_path / "shared")})
    grid = InProcessGrid(client_app.app, CLIENTS, config)
    next(iter(grid._contexts.values())).node_config["state-dir"] = str(tmp_path / "card")
    left = server_app.run(grid, config, "places00")
    assert [path.name for path in (tmp_path / "card" / left.name).iterdir()] == ["000000"]
    assert sorted(path.name for path in (tmp_path / "shared" / left.name).iterdir()) == ["000001", "000002", "000003"]


def test_state_that_is_gone_makes_its_client_fail_and_not_start_anew(tmp_path: Path) -> None:
    left = killed_run(tmp_path, {"strategy": NAME}, "after it", 2)
    shutil.rmtree(left / "clients" / "000003")
    go_on(left)
    (last,) = [line for line in lines(left) if line["round"] == 3]
    assert [f["partition"] for f in last["failed"]] == [3]
    assert "the private state of round 2 is missing" in last["failed"][0]["reason"]


def test_preparation_is_taken_up_and_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = killed_run(tmp_path, {"strategy": "flexfl"}, "before its line", 1)
    assert [path.name for path in (left / "checkpoint").iterdir()] == ["round-00000000.safetensors"]
    monkeypatch.setattr("strategies.flexfl.measure_scores", lambda *_: pytest.fail("trained again"))
    go_on(left)
    assert load_run(left).summary is not None


def test_resume_toml_is_the_run_wherever_its_folder_is(tmp_path: Path, whole: Callable[[str], Path]) -> None:
    left = killed_run(tmp_path, {"strategy": "heterofl"}, "after it", 1)
    moved = shutil.copytree(left, tmp_path / "copy")
    values = parse_overrides([str(moved / "resume.toml")], defaults(ROOT))
    assert values["resume"] == str(moved)
    config = {**defaults(ROOT), **values}
    server_app.run(InProcessGrid(client_app.app, CLIENTS, config), config, "unused00")
    assert same_run(moved, whole("heterofl"))
    assert len(lines(left)) == 1


def test_a_finished_run_shows_its_summary_and_changes_nothing(
    whole: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = whole("fedavg")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    caplog.set_level("INFO", "flwr")
    caplog.clear()
    assert go_on(folder) == folder
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert f"run folder: {folder}" in caplog.text
    assert "round " not in caplog.text.replace("3 rounds", "")


def test_a_finished_run_goes_on_when_more_rounds_are_asked_for(tmp_path: Path) -> None:
    short = run(tmp_path / "a", {"strategy": NAME, "num-server-rounds": 2})
    shutil.copytree(short, tmp_path / "killed")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(diary, "save_checkpoint", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            go_on(tmp_path / "killed", {"num-server-rounds": 4})
    assert load_run(tmp_path / "killed").summary is None  # a summary means that the run is finished
    go_on(short, {"num-server-rounds": 4})
    long = run(tmp_path / "b", {"strategy": NAME, "num-server-rounds": 4})
    assert same_run(short, long)
    found = load_run(short)
    assert found.config["runs-dir"] == str(tmp_path / "a")
    assert found.summary is not None
    assert found.summary["rounds"] == found.config["num-server-rounds"] == 4


def test_a_run_killed_between_its_last_round_and_its_summary_is_finished(
    tmp_path: Path, whole: Callable[[str], Path]
) -> None:
    left = killed_run(tmp_path, {"strategy": "flexfl"}, "after it", ROUNDS)
    go_on(left)
    assert same_run(left, whole("flexfl"))
    mine, theirs = (json.loads((path / "summary.json").read_text()) for path in (left, whole("flexfl")))
    for summary in (mine, theirs):
        del summary["wall-seconds"], summary["client-seconds"]
    assert mine == theirs


def test_a_damaged_checkpoint_makes_one_more_round_run_again(
    tmp_path: Path, whole: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    left = killed_run(tmp_path, {"strategy": NAME}, "after it", 2)
    newest = left / "checkpoint" / "round-00000002.safetensors"
    os.truncate(newest, 1000)
    go_on(left)
    assert "round-00000002.safetensors cannot be read" in caplog.text
    assert same_run(left, whole(NAME))


def test_no_checkpoint_that_can_be_read_is_an_error_and_loses_nothing(tmp_path: Path) -> None:
    left = killed_run(tmp_path, {"strategy": "fedavg"}, "after it", 1)
    for path in (left / "checkpoint").iterdir():
        path.write_bytes(b"nonsense")
    before = (left / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be used"):
        go_on(left)
    assert (left / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("server_round", [2, ROUNDS])
def test_lost_rounds_are_an_error(server_round: int, tmp_path: Path) -> None:
    left = killed_run(tmp_path, {"strategy": "fedavg"}, "after it", server_round)
    os.truncate(left / "metrics.jsonl", 10)
    with pytest.raises(ValueError, match=r"metrics.jsonl has 10 bytes, but had \d+ at the last checkpoint: rounds are"):
        go_on(left)
    assert not (left / "summary.json").exists()


def test_rounds_without_a_checkpoint_are_not_run_over(tmp_path: Path) -> None:
    done = run(tmp_path, {"strategy": "fedavg"})
    shutil.rmtree(done / "checkpoint")
    before = (done / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"has 3 rounds, but no checkpoint to go on from"):
        go_on(done, {"num-server-rounds": 5})
    assert (done / "metrics.jsonl").read_bytes() == before
    assert go_on(done) == done  # its summary needs none


def test_a_run_that_is_over_by_a_new_goal_ends_where_its_checkpoint_is(tmp_path: Path) -> None:
    left = killed_run(tmp_path, {"strategy": "fedavg"}, "before its checkpoint", 3)
    goal = lines(left)[1]["accuracy"]
    go_on(left, {"stop-at-accuracy": goal})
    found = load_run(left)
    assert found.summary is not None
    assert found.summary["rounds"] == len(found.rounds) == 2
    assert found.config["stop-at-accuracy"] == goal
    two = run(tmp_path / "two", {"strategy": "fedavg", "num-server-rounds": 2})
    assert same_run(left, two)


def test_what_a_killed_writer_left_behind_the_checkpoint_is_cut(tmp_path: Path, whole: Callable[[str], Path]) -> None:
    left = killed_run(tmp_path, {"strategy": "fedavg"}, "after it", 2)
    with (left / "metrics.jsonl").open("ab") as file:
        file.write(b"\x00\x00 half a li\nne")
    go_on(left)
    assert same_run(left, whole("fedavg"))


def test_a_run_that_never_begins_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no client answered the profile query"):
        run_toy(tmp_path, "fedavg", alter=lambda request, *_: failure(request))
    assert not list(tmp_path.iterdir())


def test_a_second_server_in_the_same_folder_is_noticed(tmp_path: Path) -> None:
    def write_too(request: Message, reply: Message, partition: int) -> Message:
        if request.metadata.group_id == "2" and partition == 0 and request.metadata.message_type == "train":
            (folder,) = tmp_path.iterdir()
            RunFolder(folder).append_round({"round": 2})
        return reply

    with pytest.raises(RuntimeError, match=r"another process writes to .*, too: end one, and resume"):
        run_toy(tmp_path, "fedavg", {"num-server-rounds": 3}, alter=write_too)


def test_other_data_are_refused_and_other_code_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = killed_run(tmp_path, {"strategy": "fedavg"}, "after it", 2)
    with monkeypatch.context() as patched:
        patched.setattr(server_app, "normalisation", lambda samples: ((0.25,), (0.5,)))
        with pytest.raises(ValueError, match=r"the run's data have changed: input-mean was \[.*\], is \[0.25\]"):
            go_on(left)
    found = load_checkpoint(left / "checkpoint")
    assert found is not None
    facts = {key: value for key, value in found.facts.items() if key not in ("masks-held", "masks-only", "preparation")}
    save_checkpoint(left / "checkpoint", replace(found, facts={**facts, "code": "other"}))  # as an older version
    go_on(left)
    assert "the run was begun by other code (other) than this (" in caplog.text


def test_another_network_is_refused(tmp_path: Path) -> None:
    left = killed_run(tmp_path, {"strategy": "fedavg"}, "after it", 2)
    found = load_checkpoint(left / "checkpoint")
    assert found is not None
    arrays = {**found.arrays, "fc.weight": np.zeros((3, 3), dtype=np.float32)}
    save_checkpoint(left / "checkpoint", replace(found, arrays=arrays))
    with pytest.raises(ValueError, match=r"tensor 'fc.weight' should have shape .*, got \(3, 3\)"):
        go_on(left)


def test_a_key_that_a_run_does_not_know_yet_has_its_default(tmp_path: Path, whole: Callable[[str], Path]) -> None:
    left = killed_run(tmp_path, {"strategy": "fedavg"}, "after it", 2)
    for name in ("config.toml", "resume.toml"):
        text = (left / name).read_text()
        assert "round-deadline = 0.0" in text
        (left / name).write_text(text.replace("round-deadline = 0.0\n", ""))
    go_on(left)
    assert same_run(left, whole("fedavg"))


def test_the_record_counts_what_came_before(tmp_path: Path) -> None:
    """A run whose every later reply fails has had valid ones."""
    left = killed_run(tmp_path, {"strategy": "fedavg"}, "after it", 2)
    with patch("flexfed.flower.request.load_client", side_effect=OSError("no disk")):
        client_data.cache_clear()
        go_on(left)
    assert [len(line["failed"]) > 0 for line in lines(left)] == [False, False, True]


def test_another_configuration_is_refused_and_says_which_keys_differ(whole: Callable[[str], Path]) -> None:
    folder = whole("flexfl")
    with pytest.raises(
        ValueError, match=r"seed \(1 there, 2 now\), strategy \('flexfl' there, 'fedavg' now\); give it"
    ):
        go_on(folder, {"seed": 2, "strategy": "fedavg"})
    with pytest.raises(ValueError, match=r"flexfl.kd-weight \(-1.0 there, 5.0 now\)"):
        go_on(folder, {"flexfl.kd-weight": 5.0})
    with pytest.raises(ValueError, match="has num-server-rounds=3; a continued run needs as many or more, got 2"):
        go_on(folder, {"num-server-rounds": 2})
    with pytest.raises(ValueError, match="is no run folder"):
        run(folder.parent, {"resume": str(folder.parent)})
    with pytest.raises(ValueError, match="no such file"):
        go_on(folder / "nowhere")


def test_another_number_of_clients_is_refused(tmp_path: Path) -> None:
    left = killed_run(tmp_path, {"strategy": "fedavg"}, "after it", 1)
    with pytest.raises(ValueError, match="the run had 4 clients, now there are 6, so their data would be o"):
        go_on(left, clients=6)


def test_a_client_that_was_away_may_be_back(tmp_path: Path) -> None:
    """What counts is how many clients share the data, not how many answered."""

    def away(request: Message, reply: Message, partition: int) -> Message:
        return failure(request) if partition == 3 and request.metadata.message_type == "query.profile" else reply

    folder = run_toy(tmp_path, "fedavg", {"num-server-rounds": 1}, alter=away)
    assert lines(folder)[0]["cohort"] == [0, 1, 2]
    go_on(folder, {"num-server-rounds": 2})
    assert lines(folder)[1]["cohort"] == [0, 1, 2, 3]


def test_stop_at_accuracy_ends_a_run_early(tmp_path: Path) -> None:
    values = {"strategy": "fedavg", "num-server-rounds": 8, "seed": 3}
    whole = run(tmp_path / "whole", values)
    reached = [line["accuracy"] for line in lines(whole)]
    goal = sorted(reached)[4]
    ends = next(i for i, accuracy in enumerate(reached, 1) if accuracy >= goal)
    assert 1 < ends < 8
    early = run(tmp_path / "early", {**values, "stop-at-accuracy": goal})
    assert lines(early) == lines(whole)[:ends]
    summary = load_run(early).summary
    assert summary is not None
    assert summary["rounds"] == ends
    go_on(early)
    assert lines(early) == lines(whole)[:ends]  # it is finished
    go_on(early, {"stop-at-accuracy": 0.0})
    assert same_run(early, whole)


def test_the_same_configuration_is_the_same_run_however_numbers_are_written() -> None:
    one = {"strategy": "fedavg", "alpha": 1, "drop-last": False, "seed": 1, "num-server-rounds": 3, "resume": ""}
    assert run_identity(one) == run_identity({**one, "alpha": 1.0, "num-server-rounds": 9, "resume": "/x"})
    assert run_identity(one) == run_identity({**one, "momentum": 0.5})  # a new key at its default
    for other in ({"seed": 2}, {"drop-last": True}, {"drop-last": 0}, {"strategy": "small"}, {"momentum": 0.6}):
        assert run_identity(one) != run_identity({**one, **other})


# --- kill -9 ----------------------------------------------------------------------------------------------------


class Runner:
    """A process that forks runs for us to kill."""

    def __init__(self, log: Path):
        self.log = log
        path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "remembering.py")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def warm_up(self, values: Mapping[str, Any]) -> None:
        self._say(values)

    def start(self, values: Mapping[str, Any]) -> int:
        self._say(values)
        return int(self._line())

    def _say(self, values: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(dict(values)) + "\n")

    def wait(self) -> int:
        return int(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline() or pytest.fail(self.log.read_text())

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()  # type: ignore[union-attr]


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    found = Runner(tmp_path / "log")
    yield found
    found.end()


@pytest.mark.slow
def test_law_9_ten_real_kills_over_one_run(runner: Runner, tmp_path: Path) -> None:
    """kill -9, each at a moment of its own in some round; final arrays and metrics.jsonl are the unkilled run's."""
    values = {**QUICK, "strategy": NAME, "num-server-rounds": 30, "fraction-train": 0.5, "seed": 5}
    values |= {"runs-dir": str(tmp_path / "runs"), "batch-norm": "batch", "fraction-evaluate": 0.0}
    runner.warm_up({**values, "num-server-rounds": 1, "runs-dir": str(tmp_path / "warm")})
    rng = random.Random(5)
    folder: Path | None = None
    for _ in range(10):
        pid = runner.start(with_resumed({"resume": str(folder)}) if folder else values)
        folder = wait_for_rounds(tmp_path / "runs", rng.randint(1, 2))
        time.sleep(rng.uniform(0, 0.15))
        os.kill(pid, signal.SIGKILL)
        assert runner.wait() == -signal.SIGKILL, runner.log.read_text()
    assert folder is not None
    assert not (folder / "summary.json").exists()
    for rest in (with_resumed({"resume": str(folder)}), {**values, "runs-dir": str(tmp_path / "whole")}):
        runner.start(rest)
        assert runner.wait() == 0, runner.log.read_text()
    (whole,) = (tmp_path / "whole").iterdir()
    assert same_run(folder, whole)


def wait_for_rounds(runs: Path, more: int, seconds: float = 120) -> Path:
    """The run folder, once it has so many more rounds than it has now."""
    end = time.monotonic() + seconds
    goal = more + sum(map(num_lines, runs.glob("*/metrics.jsonl")))
    while time.monotonic() < end:
        if sum(map(num_lines, runs.glob("*/metrics.jsonl"))) >= goal:
            (folder,) = runs.iterdir()
            return folder
        time.sleep(0.005)
    raise TimeoutError(f"no {more} rounds in {seconds} s")


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")
