"""Law 9: a run that was killed and goes on is the run that was never killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from remembering import CLIENTS, NAME, registered
from toy import QUICK, ROOT, InProcessGrid, lines, toy_config

import client_app
import server_app
from flexfed import diary
from flexfed.client_state import load_state
from flexfed.overrides import defaults, with_resumed
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


@pytest.mark.parametrize("where", ["before its line", "before its checkpoint", "after it"])
@pytest.mark.parametrize("server_round", [1, 3])
def test_law_9_wherever_it_was_killed(
    where: str, server_round: int, tmp_path: Path, whole: Callable[[str], Path]
) -> None:
    left = killed_run(tmp_path, {"strategy": NAME}, where, server_round)
    go_on(left)
    assert same_run(left, whole(NAME))
    assert list(load_run(left).timing) == [1, 2, 3]


def test_clients_keep_three_versions_of_their_state_in_the_run_folder(whole: Callable[[str], Path]) -> None:
    folder = whole(NAME) / "clients" / "000002"
    assert 1 <= len(list(folder.iterdir())) <= 3
    assert load_state(folder, ROUNDS + 1)["seen"][0] >= 1
    assert not (whole("heterofl") / "clients").exists()


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
    go_on(short, {"num-server-rounds": 4})
    long = run(tmp_path / "b", {"strategy": NAME, "num-server-rounds": 4})
    assert same_run(short, long)
    found = load_run(short)
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
        del summary["wall-seconds"]
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
    (left / "checkpoint" / "round-00000001.safetensors").write_bytes(b"nonsense")
    before = (left / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be used"):
        go_on(left)
    assert (left / "metrics.jsonl").read_bytes() == before


def test_lost_lines_are_an_error(tmp_path: Path) -> None:
    left = killed_run(tmp_path, {"strategy": "fedavg"}, "after it", 2)
    os.truncate(left / "metrics.jsonl", 10)
    with pytest.raises(ValueError, match=r"metrics.jsonl has 10 bytes, \d+ at round 2: lines are lost"):
        go_on(left)


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
    with pytest.raises(ValueError, match="the run had 4 clients, now there are 6"):
        go_on(left, clients=6)


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
    one = {"alpha": 1, "drop-last": True, "seed": 1, "num-server-rounds": 3, "resume": ""}
    assert run_identity(one) == run_identity({**one, "alpha": 1.0, "num-server-rounds": 9, "resume": "/x"})
    for other in ({"seed": 2}, {"drop-last": False}, {"drop-last": 1}, {"new": 1}):
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
