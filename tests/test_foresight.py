"""What a suite says of its cost before it starts."""

import json
from pathlib import Path

import pytest
from toy import ROOT

from flexfed.foresight import foresee, to_text
from flexfed.overrides import defaults
from flexfed.suites import load_suite, mark_finished, suite_runs, tuned, tuning_runs

KNOWN = defaults(ROOT)
SUITE = """
seeds = [1, 2]
supernodes = 10
[base]
num-server-rounds = 3
fraction-train = 0.25
local-epochs = 5
runs-dir = "runs"
[[row]]
name = "fedavg"
strategy = "fedavg"
[[row]]
name = "small"
strategy = "small"
num-server-rounds = 7
"""
TUNE = '[tune]\nkey = "learning-rate"\nvalues = [0.1, 0.2]\nseed = 9\n'


def suite_of(folder: Path, text: str = SUITE):
    (folder / "s.toml").write_text(text)
    return load_suite(folder / "s.toml", KNOWN)


def finish(run, seconds=100.0, **totals):
    folder = run.folder / "20260101-000000-x-1"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f"seed = {run.seed}\n")
    accuracy = {"accuracy": run.tried or 0.5}
    summary = {"seed": run.seed, "final": accuracy, "last10": accuracy, "best": {}, "wall-seconds": seconds, **totals}
    (folder / "summary.json").write_text(json.dumps(summary))
    mark_finished(run)


def said(suite, workers=2):
    return to_text(suite.name, foresee(suite, KNOWN), workers).splitlines()


def test_at_first_only_what_the_configuration_tells(tmp_path):
    assert said(suite_of(tmp_path)) == [
        "suite s: 4 runs; 0 are finished, 4 are left",
        "at most 20 rounds, in which clients train 40 times, 200 local epochs in all",  # 2 of 10 clients
        "of 2 rows nothing is known, none of their runs has finished: fedavg, small",
    ]


def test_a_cohort_has_at_least_the_replies_that_a_round_needs(tmp_path):
    text = SUITE.replace("local-epochs", "min-replies = 4\nlocal-epochs")
    assert said(suite_of(tmp_path, text))[1] == (
        "at most 20 rounds, in which clients train 80 times, 400 local epochs in all"
    )


def test_what_a_row_took_is_what_its_next_run_takes(tmp_path):
    suite = suite_of(tmp_path)
    first, other, _, _ = suite_runs(suite, KNOWN)
    finish(first, 1000.0, macs=4e9)
    assert said(suite)[2:] == [
        "1 of them, by finished runs of the same rows: 17 min one after the other",
        "1 of them, by finished runs of the same rows: 4 G multiply-adds",
        "of 1 rows nothing is known, none of their runs has finished: small",
    ]
    finish(other, 3000.0)  # an older run, which counted nothing
    assert said(suite) == [
        "suite s: 4 runs; 2 are finished, 2 are left",
        "at most 10 rounds, in which clients train 20 times, 100 local epochs in all",
        "all of them, by finished runs of the same rows: 67 min one after the other, about 33 min 2 at a time",
        "1 of them, by finished runs of the same rows: 4 G multiply-adds",
    ]
    assert said(suite, workers=1)[2].endswith("rows: 67 min one after the other")
    assert said(suite, workers=16)[2].endswith("about 33 min 2 at a time"), "no more than there are"


def test_what_the_author_says_stands_beside_rows_of_which_nothing_is_known(tmp_path):
    suite = suite_of(tmp_path, f'cost = "2 h on a laptop"\n{SUITE}')
    assert said(suite)[2] == "the whole suite, its author says: 2 h on a laptop"
    first, other, _, _ = suite_runs(suite, KNOWN)
    finish(first)
    assert said(suite)[3] == "the whole suite, its author says: 2 h on a laptop"
    finish(other)
    assert not any("author" in line for line in said(suite)), "now it is known here"


def test_nothing_is_left(tmp_path):
    suite = suite_of(tmp_path)
    for run in suite_runs(suite, KNOWN):
        finish(run)
    assert said(suite) == ["suite s: 4 runs; 4 are finished, 0 are left"]


def test_rows_that_choose_run_more_often(tmp_path):
    suite = suite_of(tmp_path, SUITE.replace("[base]", f"{TUNE}[base]"))
    assert said(suite)[0] == "suite s: 4 runs and 4 by which rows choose a value; 0 are finished, 8 are left"
    tries = tuning_runs(suite, KNOWN)
    for run in tries:
        finish(run, 50.0 if run.tried == 0.1 else 150.0)
    assert said(suite)[0].endswith("4 are finished, 4 are left")
    assert "rows: 7 min one" in said(suite)[2]  # the mean of both values, four times
    finish(suite_runs(tuned(suite, tries), KNOWN)[0])
    assert said(suite)[0].endswith("5 are finished, 3 are left"), "the run with the value that was chosen"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "suites").glob("*.toml")), ids=lambda path: path.stem)
def test_every_suite_that_we_ship_tells_its_cost(path):
    suite = load_suite(path, KNOWN)
    assert suite.cost
    lines = said(suite)
    assert lines[0].startswith("suite ")
    assert len(lines) > 1 or lines[0].endswith(" 0 are left")
