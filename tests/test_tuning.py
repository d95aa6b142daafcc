"""Rows of a suite choose a knob for themselves, on a seed that is not reported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from flexfed import workers
from flexfed.overrides import Scalar
from flexfed.suites import Suite, SuiteRun, load_suite, mark_finished, suite_comparison, suite_runs, tuned, tuning_runs
from flexfed.workers import run_missing

KNOWN: dict[str, Scalar] = {
    "strategy": "flexfl",
    "seed": 1,
    "runs-dir": "~/runs",
    "learning-rate": 0.1,
    "num-server-rounds": 30,
    "fraction-train": 0.5,
    "min-replies": 1,
    "local-epochs": 2,
}
SUITE = """
name = "tuned"
seeds = [1, 2]
metrics = ["accuracy"]
[base]
runs-dir = "runs"
[tune]
key = "learning-rate"
values = [0.03, 0.1, 0.3]
seed = 9
[[row]]
name = "exclusive"
strategy = "exclusive"
[[row]]
name = "flexfl"
strategy = "flexfl"
[[row]]
name = "flexfl, its paper's"
strategy = "flexfl"
learning-rate = 0.01
"""


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    (tmp_path / "s.toml").write_text(SUITE)
    return load_suite(tmp_path / "s.toml", KNOWN)


def finish(run: SuiteRun, accuracy: float | None, loss: float = 1.0) -> None:
    folder = run.folder / "20260101-000000-x-1"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f'strategy = "x"\nseed = {run.seed}\n')
    last10 = {"accuracy": accuracy, "loss": loss}
    (folder / "summary.json").write_text(json.dumps({"seed": run.seed, "final": last10, "last10": last10, "best": {}}))
    mark_finished(run)


def test_every_row_without_a_value_of_its_own_tries_each_on_the_other_seed(suite: Suite) -> None:
    tries = tuning_runs(suite, KNOWN)
    assert [(run.row, run.tried, run.seed) for run in tries] == [
        (row, value, 9) for value in (0.03, 0.1, 0.3) for row in ("exclusive", "flexfl")
    ]
    assert all(run.config["learning-rate"] == run.tried == run.overrides["learning-rate"] for run in tries)
    assert len({run.folder for run in [*tries, *suite_runs(suite, KNOWN)]}) == 6 + 6
    assert tries[0].name == "exclusive seed 9 trying 0.03"


def test_each_row_runs_with_its_own_best_and_the_table_says_so(suite: Suite) -> None:
    tries = tuning_runs(suite, KNOWN)
    scores = {("exclusive", 0.03): 0.7, ("exclusive", 0.1): 0.6, ("exclusive", 0.3): None}
    scores |= {("flexfl", 0.03): 0.5, ("flexfl", 0.1): 0.8, ("flexfl", 0.3): 0.8}
    for run in tries:
        finish(run, scores[run.row, run.tried])  # type: ignore[index]
    found = tuned(suite, tries)
    assert found.tuning is None
    rates = {run.row: run.config["learning-rate"] for run in suite_runs(found, KNOWN)}
    assert rates == {"exclusive": 0.03, "flexfl": 0.1, "flexfl, its paper's": 0.01}
    assert {run.seed for run in suite_runs(found, KNOWN)} == {1, 2}
    assert suite_comparison(found, suite_runs(found, KNOWN)).notes == [
        "Seeds 1, 2; 20 devices.",
        "learning-rate: each row's best of 0.03, 0.1, 0.3 by accuracy (mean of the last ten rounds) with seed 9, which "
        "is not reported: exclusive 0.03, flexfl 0.1.",
        "Runs still missing: 6.",
    ]


def test_a_row_that_never_had_a_number_keeps_the_suites_value(suite: Suite) -> None:
    tries = tuning_runs(suite, KNOWN)
    for run in tries:
        if run.row == "flexfl":
            finish(run, None)
    found = tuned(suite, tries)
    assert {run.config["learning-rate"] for run in suite_runs(found, KNOWN) if run.row != "flexfl, its paper's"} == {
        0.1
    }
    assert "exclusive none, flexfl none" in found.notes[0]
    assert found.notes[0].endswith("; without a finished run: exclusive 0.03, exclusive 0.1, exclusive 0.3.")


def test_a_value_whose_run_failed_is_told(suite: Suite) -> None:
    tries = tuning_runs(suite, KNOWN)
    for run in tries:
        if (run.row, run.tried) != ("flexfl", 0.3):
            finish(run, 0.5)
    assert tuned(suite, tries).notes[0].endswith("flexfl 0.03; without a finished run: flexfl 0.3.")


def test_another_metric_may_decide(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(SUITE.replace("seed = 9", 'seed = 9\nmetric = "loss"'))
    suite = load_suite(tmp_path / "s.toml", KNOWN)
    tries = tuning_runs(suite, KNOWN)
    for run in tries:
        finish(run, 0.5, loss=abs(float(run.tried or 0) - 0.1))
    assert {run.config["learning-rate"] for run in suite_runs(tuned(suite, tries), KNOWN)} == {0.1, 0.01}, "the lowest"


def test_a_metric_that_no_run_has_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(SUITE.replace("seed = 9", 'seed = 9\nmetric = "acuracy"'))
    suite = load_suite(tmp_path / "s.toml", KNOWN)
    tries = tuning_runs(suite, KNOWN)
    finish(tries[0], 0.5)
    with pytest.raises(ValueError, match="no finished run has the metric 'acuracy'; known: accuracy, loss"):
        tuned(suite, tries)


def test_a_suite_without_it_is_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(SUITE.replace(SUITE[SUITE.index("[tune]") : SUITE.index("[[row]]")], ""))
    suite = load_suite(tmp_path / "s.toml", KNOWN)
    assert tuning_runs(suite, KNOWN) == []
    assert tuned(suite, []) is suite


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('key = "learning-rate"', "", r"s\.toml: \[tune\] lacks key; it takes key, values, seed, metric"),
        ("seed = 9", "seed = 9\nsedes = 1", r"s\.toml: \[tune\] has sedes; it takes"),
        ("seed = 9", "seed = 2", "must be a whole number that `seeds` does not hold, got 2"),
        ("seed = 9", 'seed = "9"', "must be a whole number that `seeds` does not hold, got '9'"),
        ("[0.03, 0.1, 0.3]", "[0.1]", r"a list of two or more different ones, got \[0\.1\]"),
        ("[0.03, 0.1, 0.3]", '"0.1, 0.3"', "a list of two or more different ones"),
        ("[0.03, 0.1, 0.3]", "[[0.1], [0.1]]", "a list of two or more different ones"),
        (
            'key = "learning-rate"',
            'key = "seed"',
            r"s\.toml: \[tune\] has the key 'seed': seeds and places are nothing",
        ),
        ('key = "learning-rate"', 'key = "runs-dir"', "has the key 'runs-dir'"),
        ('runs-dir = "runs"', "learning-rate = 0.1", r"s\.toml: \[tune\] is to choose learning-rate, but \[base\]"),
        ('key = "learning-rate"', 'key = "learning-rat"', r"s\.toml, \[tune\]: unknown configuration key"),
    ],
)
def test_mistakes_are_named(old: str, new: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(SUITE.replace(old, new))
    with pytest.raises(ValueError, match=says):
        load_suite(tmp_path / "s.toml", KNOWN)


def test_values_may_be_paths(tmp_path: Path) -> None:
    text = SUITE.replace('key = "learning-rate"', 'key = "fleet"').replace(
        "[0.03, 0.1, 0.3]", '["fleets/a.toml", "b.toml"]'
    )
    (tmp_path / "s.toml").write_text(text)
    known = {**KNOWN, "fleet": ""}
    tries = tuning_runs(load_suite(tmp_path / "s.toml", known), known)
    assert [run.config["fleet"] for run in tries[::3]] == [str(tmp_path / "fleets/a.toml"), str(tmp_path / "b.toml")]
    assert {run.folder.parent for run in tries} == {tmp_path / "runs/tuned"}
    assert len({run.folder for run in tries}) == len(tries) == 6


CHILD = """
import json, pathlib, sys, tomllib
config = tomllib.loads(pathlib.Path(sys.argv[1]).read_text())
folder = pathlib.Path(config["runs-dir"]) / "20260101-000000-x-1"
folder.mkdir()
(folder / "config.toml").write_text(f"seed = {config['seed']}")
last10 = {"accuracy": config["learning-rate"]}
(folder / "summary.json").write_text(json.dumps({"final": last10, "last10": last10, "best": {}}))
"""


def test_the_command_tries_first_and_then_runs_what_was_chosen(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexfed import comparing

    monkeypatch.setattr(
        workers, "child_command", lambda run: [sys.executable, "-S", "-c", CHILD, str(run.folder / "overrides.toml")]
    )
    monkeypatch.setattr(comparing, "defaults", lambda _: KNOWN)
    read = comparing.read_suite(str(tmp_path / "s.toml"), None, tmp_path)
    comparison, failed = comparing.compare_suite(read, 2, tmp_path)
    assert failed == 0
    rates = {row.name: set(row.values("last10", "accuracy").values()) for row in comparison.rows}
    assert rates == {"exclusive": {0.3}, "flexfl": {0.3}, "flexfl, its paper's": {0.01}}
    done: list[str] = []
    run_missing(tuning_runs(suite, KNOWN), 1, tmp_path, lambda run, _: done.append(run.name))
    assert done == [], "what was tried is not tried again"
