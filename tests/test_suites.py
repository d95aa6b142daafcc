"""Suites: reading them, knowing what is finished, running what is missing."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from flexfed import workers
from flexfed.config import Experiment
from flexfed.devices import load_fleet
from flexfed.models import MODELS
from flexfed.overrides import defaults
from flexfed.runs import RunFolder
from flexfed.suites import (
    MARKER,
    begun_folder,
    finished_folder,
    load_suite,
    mark_finished,
    same_config,
    suite_comparison,
    suite_runs,
)
from flexfed.workers import RunFailed, child_command, run_missing
from strategies import STRATEGIES

ROOT = Path(__file__).parent.parent
KNOWN = {"strategy": "flexfl", "seed": 1, "runs-dir": "~/runs", "num-server-rounds": 30, "flexfl.kd-weight": -1.0}
SUITE = """
name = "my suite"
seeds = [1, 2]
baseline = "exclusive"
supernodes = 4
metrics = ["accuracy"]
[base]
num-server-rounds = 3
runs-dir = "runs"
[[row]]
name = "exclusive"
strategy = "exclusive"
[[row]]
name = "flexfl, no KD"
strategy = "flexfl"
flexfl.kd-weight = 0
"""


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "s.toml").write_text(SUITE)
    return load_suite(tmp_path / "s.toml", KNOWN)


def test_a_suite_is_its_rows_times_its_seeds(suite, tmp_path):
    assert (suite.name, suite.seeds, suite.baseline, suite.supernodes) == ("my suite", (1, 2), "exclusive", 4)
    assert suite.rows["flexfl, no KD"]["flexfl.kd-weight"] == 0
    found = suite_runs(suite, KNOWN)
    assert [run.name for run in found] == [
        "exclusive seed 1",
        "flexfl, no KD seed 1",
        "exclusive seed 2",
        "flexfl, no KD seed 2",
    ]
    last = found[-1]
    assert last.folder == tmp_path / "runs" / "my-suite" / "flexfl-no-KD-seed2"
    assert last.overrides["seed"] == 2
    assert last.overrides["runs-dir"] == str(last.folder)
    assert last.config == {**KNOWN, **last.overrides}


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("seeds = [1, 2]", "sedes = [1]", r"s\.toml: unknown key 'sedes'; did you mean seeds"),
        ("seeds = [1, 2]", "seeds = [1, 1]", r"seeds must be distinct, got \[1, 1\]"),
        ("seeds = [1, 2]", "seeds = [true]", "seeds must be a list of whole numbers"),
        ('baseline = "exclusive"', 'baseline = "x"', "baseline 'x' is no row; rows: exclusive, flexfl, no KD"),
        ("flexfl.kd-weight", "flexfl.kdweight", r"row 'flexfl, no KD': unknown configuration key"),
        ('name = "flexfl, no KD"', 'name = "exclusive"', "two rows are called 'exclusive'"),
        ('name = "flexfl, no KD"', "", r"every \[\[row\]\] needs a name"),
        ("seeds = [1, 2]", "seeds = 2", r"s\.toml: seeds must be a list of whole numbers >= 0, got 2"),
        ("seeds = [1, 2]", "seeds = [-1]", r"seeds must be a list of whole numbers >= 0, got \[-1\]"),
        ('metrics = ["accuracy"]', 'metrics = "accuracy"', "metrics must be a list of names"),
        ('metrics = ["accuracy"]', "metrics = []", r"metrics must be a list of names, .* got \[\]"),
        ('name = "my suite"', 'name = ""', "name must be text that can name a folder, got ''"),
        ('name = "my suite"', 'name = ".."', r"name must be text that can name a folder, got '\.\.'"),
        ('[[row]]\nname = "exclusive"\nstrategy = "exclusive"\n[[row]]', "[row]", r"rows are written \[\[row\]\]"),
        ("num-server-rounds = 3", "seed = 3", "the seed comes from `seeds`"),
        ("supernodes = 4", "supernodes = 0", "supernodes must be a whole number >= 1, got 0"),
        ("supernodes = 4", "supernodes = 2.5", r"supernodes must be a whole number >= 1, got 2\.5"),
        ("supernodes = 4", "supernodes = true", "supernodes must be a whole number >= 1, got True"),
        (SUITE, "", r"has no \[\[row\]\]"),
    ],
)
def test_mistakes_in_a_suite_are_named(old, new, match, tmp_path):
    assert old in SUITE
    (tmp_path / "s.toml").write_text(SUITE.replace(old, new))
    with pytest.raises(ValueError, match=match):
        load_suite(tmp_path / "s.toml", KNOWN)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "suites").glob("*.toml")), ids=lambda path: path.stem)
def test_the_suites_we_ship_fit_the_configuration(path):
    known = defaults(ROOT)
    assert suite_runs(load_suite(path, known), known)


SHIPPED = sorted((ROOT / "benchmarks" / "suites").glob("*.toml"))
PAPERS = [path for path in SHIPPED if path.stem.startswith("paper-")]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_row_that_we_ship_can_be_run(path):
    known = defaults(ROOT)
    for overrides in load_suite(path, known).rows.values():
        settings = Experiment.read({**known, **overrides}).settings
        load_fleet(settings.fleet)
        assert settings.model in MODELS or settings.model.startswith("stitched:")


def test_the_smoke_suite_has_every_strategy():
    rows = load_suite(ROOT / "benchmarks" / "suites" / "smoke.toml", defaults(ROOT)).rows
    assert sorted(row["strategy"] for row in rows.values()) == sorted(STRATEGIES)


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_the_papers_suites_run_on_a_gpu_beside_both_controls_and_tell_their_cost(path):
    known = defaults(ROOT)
    suite, text = load_suite(path, known), path.read_text(encoding="utf-8")
    kinds = {}
    for overrides in suite.rows.values():
        assert overrides["torch-device"] == "auto"
        place = tuple(overrides.get(key) for key in ("partition", "alpha", "num-server-rounds"))
        kinds.setdefault(place, []).append(overrides["strategy"])
    assert all({"exclusive", "small"} <= set(strategies) for strategies in kinds.values())
    assert suite.name == path.stem
    runs, rounds = len(suite_runs(suite, known)), sum(r.config["num-server-rounds"] for r in suite_runs(suite, known))
    assert f"# Cost: {runs} runs, {rounds:,} rounds" in text
    hours = suite.cost.removesuffix(" GPU hours, an estimate and not measured")
    assert f"not measured: {hours} GPU hours" in " ".join(text.replace("\n# ", " ").split())
    assert "An estimate, not measured" in " ".join(text.replace("\n# ", " ").split())


# --- what is finished ---------------------------------------------------------------------------------------


def pretend_finished(run, name="20260101-000000-x-1", accuracy=0.5):
    folder = run.folder / name
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f'strategy = "x"\nseed = {run.seed}\n')
    summary = {"seed": run.seed, "final": {"accuracy": accuracy}, "last10": {"accuracy": accuracy}, "best": {}}
    (folder / "summary.json").write_text(json.dumps(summary))
    mark_finished(run)
    return folder


def test_a_marked_run_counts_until_the_configuration_changes(suite):
    run = suite_runs(suite, KNOWN)[0]
    assert finished_folder(run) is None
    folder = pretend_finished(run)
    assert finished_folder(run) == folder
    changed = suite_runs(suite, {**KNOWN, "flexfl.kd-weight": 1.0, "num-server-rounds": 5})[0]
    assert finished_folder(changed) is None  # whose knob it is does not matter: the run knew it
    newer = {**KNOWN, "learning-rate": 0.1}  # a key that did not exist then, with its default
    assert finished_folder(suite_runs(suite, newer)[0]) == folder
    for rate, found in ((0.5, None), (0.1, folder)):
        rows = {**suite.rows, "exclusive": {**suite.rows["exclusive"], "learning-rate": rate}}
        assert finished_folder(suite_runs(replace(suite, rows=rows), newer)[0]) == found
    (folder / "summary.json").unlink()
    assert finished_folder(run) is None


def test_a_run_without_summary_cannot_be_marked(suite):
    with pytest.raises(ValueError, match="no finished run in"):
        mark_finished(suite_runs(suite, KNOWN)[0])


def test_same_config_ignores_places_and_new_knobs_of_other_methods():
    recorded = {"strategy": "flexfl", "runs-dir": "/a", "seed": 1, "flexfl.x": 1, "small.ratio": 0.5}
    assert same_config(recorded, {**recorded, "runs-dir": "/b", "fedlps.y": 2})
    assert not same_config(recorded, {**recorded, "flexfl.new": 2})
    assert not same_config(recorded, {**recorded, "small.ratio": 0.25})
    assert not same_config(recorded, {**recorded, "momentum": 0.9})


def test_comparison_of_what_is_there(suite):
    runs = suite_runs(suite, KNOWN)
    for run in runs[:3]:
        pretend_finished(run, accuracy=0.5 if run.row == "exclusive" else 0.75)
    found = suite_comparison(suite, runs)
    assert [(row.name, sorted(row.runs)) for row in found.rows] == [("exclusive", [1, 2]), ("flexfl, no KD", [1])]
    assert found.notes[:2] == ["Seeds 1, 2; 4 devices.", "Runs still missing: 1."]
    assert found.notes[2].startswith("Rows have unequal seeds (exclusive: 1, 2; flexfl, no KD: 1)")


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_damaged_marker_or_run_counts_as_none(suite, text):
    runs = suite_runs(suite, KNOWN)
    (pretend_finished(runs[0]) / "summary.json").write_text(text)
    pretend_finished(runs[1])
    (runs[1].folder / MARKER).write_text(text)
    assert [finished_folder(run) for run in runs[:2]] == [None, None]
    assert suite_comparison(suite, runs).notes[-1] == "Runs still missing: 4."


def test_a_metric_that_no_run_has_is_an_error(suite):
    wrong = replace(suite, metrics=("accuracy", "acuracy"))
    runs = suite_runs(wrong, KNOWN)
    assert suite_comparison(wrong, runs).rows  # nothing has run: nothing is known
    for run in runs:
        assert suite_comparison(wrong, runs).rows  # one that failed may be the one that has it
        pretend_finished(run)
    with pytest.raises(ValueError, match="no finished run has the metric 'acuracy'; known: accuracy"):
        suite_comparison(wrong, runs)


# --- running ------------------------------------------------------------------------------------------------

CHILD = """
import json, os, pathlib, sys, tomllib
config = tomllib.loads(pathlib.Path(sys.argv[1]).read_text())
print("threads", os.environ["OMP_NUM_THREADS"])
if config["strategy"] == "flexfl" and config["seed"] == 1:
    sys.exit("it broke")
folder = pathlib.Path(config["runs-dir"]) / "20260101-000000-x-1"
folder.mkdir()
(folder / "config.toml").write_text("seed = 1")
(folder / "summary.json").write_text('{"final": {}, "last10": {}}')
"""


def use_child(monkeypatch, code):
    monkeypatch.setattr(
        workers, "child_command", lambda run: [sys.executable, "-S", "-c", code, str(run.folder / "overrides.toml")]
    )


def test_what_is_missing_runs_and_a_failure_does_not_stop_the_rest(suite, tmp_path, monkeypatch):
    use_child(monkeypatch, CHILD)
    runs, done = suite_runs(suite, KNOWN), {}
    failed = run_missing(runs, 2, tmp_path, lambda run, error: done.update({run.name: error}))
    assert failed == 1
    assert len(done) == 4
    assert "exit code 1" in done["flexfl, no KD seed 1"]
    assert "it broke" in done["flexfl, no KD seed 1"]
    assert (runs[0].folder / "log.txt").read_text() == "threads 1\n"
    again = []
    run_missing(runs, 2, tmp_path, lambda run, error: again.append(run.name))
    assert again == ["flexfl, no KD seed 1"]


SEEING = CHILD.replace(
    'if config["strategy"] == "flexfl" and config["seed"] == 1:\n    sys.exit("it broke")', ""
).replace('print("threads"', 'print("sees", os.environ.get("CUDA_VISIBLE_DEVICES"), "threads"')


@pytest.mark.parametrize(
    ("told", "num", "seen"),
    [(None, 0, {"None"}), (None, 1, {"None"}), (None, 2, {"0", "1"}), ("5, 7", 2, {"5", "7"}), ("5", 1, {"5"})],
)
def test_children_are_spread_over_the_gpus(suite, tmp_path, monkeypatch, told, num, seen):
    use_child(monkeypatch, SEEING)
    monkeypatch.setattr("torch.cuda.device_count", lambda: num)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if told:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    runs = suite_runs(suite, {**KNOWN, "torch-device": "auto"})
    assert run_missing(runs, 2, tmp_path, lambda run, error: None) == 0
    lines = {(run.folder / "log.txt").read_text().split()[1] for run in runs}
    assert lines == seen


def test_places_are_dealt_in_turn_and_only_to_who_asks_for_a_gpu(suite, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for told, places in (("cpu", [None] * 3), ("cuda:1", [None] * 3), ("cuda", ["0", "1", "0"])):
        assert workers._places(suite_runs(suite, {**KNOWN, "torch-device": told}), 3) == places


def test_a_child_that_leaves_no_run_has_failed(suite, tmp_path, monkeypatch):
    use_child(monkeypatch, "")
    errors = []
    assert run_missing(suite_runs(suite, KNOWN)[:1], 1, tmp_path, lambda run, error: errors.append(error)) == 1
    assert "no finished run" in errors[0]


def test_ctrl_c_ends_the_children(suite, tmp_path, monkeypatch):
    use_child(monkeypatch, CHILD.replace("print(", 'config["seed"] == 2 and __import__("time").sleep(60)\nprint('))

    def interrupt(run, error):
        raise KeyboardInterrupt

    start, threads = time.monotonic(), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        run_missing(suite_runs(suite, KNOWN), 4, tmp_path, interrupt)
    assert time.monotonic() - start < 10
    assert threading.active_count() == threads
    assert not any((run.folder / MARKER).exists() for run in suite_runs(suite, KNOWN) if run.seed == 2)


def test_the_child_is_our_own_command(suite):
    command = child_command(suite_runs(suite, KNOWN)[0])
    assert command[:6] == [sys.executable, "-m", "flexfed.cli", "run", "--in-process", "--supernodes"]
    assert command[6] == "4"
    assert command[-1].endswith("overrides.toml")


# --- after a kill -------------------------------------------------------------------------------------------

TINY = """
seeds = [1]
supernodes = 4
[base]
runs-dir = "runs"
strategy = "fedavg"
dataset = "digits"
num-server-rounds = 4
fraction-train = 1.0
fraction-evaluate = 0.0
[[row]]
name = "only"
"""


def test_a_killed_comparison_goes_on_where_it_was(tmp_path, monkeypatch):
    known = defaults(ROOT)
    one, other = (tmp_path / name / "tiny.toml" for name in ("whole", "killed"))
    for path in (one, other):
        path.parent.mkdir()
        path.write_text(TINY)
    (whole,), (killed,) = (suite_runs(load_suite(path, known), known) for path in (one, other))
    assert run_missing([whole], 1, ROOT, lambda run, error: None) == 0

    comparing = [sys.executable, "-m", "flexfed.cli", "compare", str(other), "--workers", "1"]
    parent = subprocess.Popen(comparing, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: [*killed.folder.glob("*/metrics.jsonl")])
    (child,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    child.suspend()  # the orphan lives: nobody may join it, nor take its run for a failed one
    written, errors, said = metrics_in(killed), [], []
    monkeypatch.setattr(workers.log, "warning", lambda *words: said.append(words))
    told = threading.Thread(
        target=run_missing, args=([killed], 1, ROOT, lambda run, error: errors.append(error)), daemon=True
    )
    told.start()
    wait_for(lambda: said)
    time.sleep(3 * workers._LOOK_S)
    assert (errors, metrics_in(killed)) == ([], written)
    assert len([*killed.folder.glob("*/summary.json")]) == 0
    child.kill()
    told.join(120)
    assert errors == [None]
    assert len([*killed.folder.glob("*/config.toml")]) == 1
    assert "go on" in (killed.folder / "log.txt").read_text()
    assert metrics_of(killed) == metrics_of(whole)


def metrics_in(run):
    (path,) = run.folder.glob("*/metrics.jsonl")
    return path.read_text()


def test_what_another_process_finishes_is_not_run_again(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_LOOK_S", 0.01)
    use_child(monkeypatch, "raise SystemExit('a second one began')")
    run, done = suite_runs(suite, KNOWN)[0], []
    run.folder.mkdir(parents=True)
    with (run.folder / "lock").open("w") as file:
        assert workers._lock(file)
        told = threading.Thread(target=run_missing, args=([run], 1, tmp_path, lambda *found: done.append(found)))
        told.start()
        pretend_finished(run)
    told.join(60)
    assert done == [(run, None)]
    children = workers._Children([None])
    children.stop()
    with (run.folder / "lock").open("w") as file:
        assert workers._lock(file)
        with pytest.raises(RunFailed, match="stopped"):
            workers._run_one(run, tmp_path, children)


def test_a_run_that_goes_on_is_marked_beside_newer_ones_of_other_configurations(suite, tmp_path, monkeypatch):
    run = suite_runs(suite, KNOWN)[0]
    pretend_finished(run, "20260102-000000-x-2", accuracy=0.9)  # newer, and of another configuration
    begun = run.folder / "20260101-000000-x-1"
    begun.mkdir()
    (begun / "config.toml").write_text("seed = 1")
    (run.folder / MARKER).unlink()
    monkeypatch.setattr(workers, "begun_folder", lambda run: begun)
    summary = '{"final": {}, "last10": {"accuracy": 0.5}}'
    use_child(monkeypatch, f"import pathlib; pathlib.Path({str(begun / 'summary.json')!r}).write_text({summary!r})")
    assert run_missing([run], 1, tmp_path, lambda run, error: None) == 0
    assert finished_folder(run) == begun


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def metrics_of(run):
    return (finished_folder(run) / "metrics.jsonl").read_text()


def test_a_run_of_another_configuration_or_federation_is_not_gone_on_with(tmp_path):
    known = defaults(ROOT)
    (tmp_path / "tiny.toml").write_text(TINY)
    (run,) = suite_runs(load_suite(tmp_path / "tiny.toml", known), known)
    RunFolder(run.folder / "20260101-000000-fedavg-1").begin(run.config, clients=4)
    assert begun_folder(run).name == "20260101-000000-fedavg-1"
    assert begun_folder(replace(run, supernodes=5)) is None
    assert begun_folder(replace(run, config={**run.config, "learning-rate": 0.5})) is None
    RunFolder(run.folder / "20260102-000000-fedavg-1").begin({**run.config, "momentum": 0.9}, clients=4)
    assert begun_folder(run).name == "20260101-000000-fedavg-1"
    (run.folder / "20260101-000000-fedavg-1" / "config.toml").write_text("x")
    assert begun_folder(run) is None
