"""Comparisons: who may be compared, means over seeds, paired differences, tables."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from flexfed.compare import (
    Comparison,
    Row,
    comparable,
    compare_runs,
    device_notes,
    find_comparable,
    load_runs,
    mean_and_deviation,
    notes_on,
    paired_differences,
)
from flexfed.runs import Run, RunFolder, load_run, summarise
from flexfed.tables import tables, to_markdown, to_text

CONFIG = {"strategy": "flexfl", "dataset": "digits", "seed": 1, "runs-dir": "/x", "flexfl.kd-weight": 10}


def run(strategy="flexfl", seed=1, accuracy=0.5, config=None, name="r", **metrics):
    values = {**CONFIG, "strategy": strategy, "seed": seed, **(config or {})}
    rounds = [{"round": 1, "accuracy": accuracy, "bytes-up": 1000, **metrics}]
    facts = {"seed": seed, "clients": 20, "clients-testing": 2 if strategy == "exclusive" else 20}
    return Run(Path(name), values, rounds, {}, summarise(rounds, facts))


def row(name, *accuracies, seeds=(1, 2, 3)):
    return Row(name, {seed: run(seed=seed, accuracy=a) for seed, a in zip(seeds, accuracies, strict=False)})


# --- who may be compared ------------------------------------------------------------------------------------


def test_runs_that_differ_in_the_method_only_are_comparable():
    other = {
        "runs-dir": "/y",
        "flexfl.kd-weight": 3,
        "ratio-policy": "p-ucbv",
        "torch-threads": 2,
        "torch-device": "cuda",
    }
    assert comparable(run(), run("exclusive", config=other))


@pytest.mark.parametrize("change", [{"dataset": "x"}, {"seed": 2}, {"learning-rate": 1.0}])
def test_runs_that_differ_in_more_are_not(change):
    assert not comparable(run(), run("exclusive", config=change))


def test_a_key_that_a_run_is_too_old_to_know_has_its_default():
    new = run("exclusive", config={"precision": "float32", "alpha": 0.3})
    assert comparable(run(), new)
    assert not comparable(run(), run("exclusive", config={"precision": "bfloat16"}))
    found = compare_runs([run(), run(seed=2, config={"precision": "float32", "flexfl.sizes": "grid"}), new])
    assert [item.name for item in found.rows] == ["flexfl", "exclusive"]
    assert not any("more than the method" in note for note in found.notes)


def test_the_number_of_clients_counts_too():
    one = run()
    assert not comparable(one, replace(one, summary={**one.summary, "clients": 10}))


def written(tmp_path, strategy, day, config=None, finished=True):
    values = {**CONFIG, "strategy": strategy, **(config or {})}
    folder = RunFolder.named(tmp_path, strategy, day, now=datetime(2026, 1, day))
    folder.begin(values)
    folder.append_round({"round": 1, "accuracy": 0.5})
    if finished:
        folder.finish({}, {"strategy": strategy, "seed": values["seed"]})
    return folder.path


def test_find_comparable_takes_the_newest_finished_one(tmp_path):
    written(tmp_path, "exclusive", 1)
    wanted = written(tmp_path, "exclusive", 2)
    written(tmp_path, "exclusive", 3, {"seed": 9})
    written(tmp_path, "exclusive", 4, finished=False)
    written(tmp_path, "small", 5)
    mine = load_run(written(tmp_path, "flexfl", 6))
    assert find_comparable(mine).path == wanted
    assert find_comparable(load_run(wanted)) is None
    assert find_comparable(mine, "heterofl") is None


@pytest.mark.parametrize(("file", "text"), [("summary.json", "{"), ("summary.json", "{}"), ("config.toml", "x")])
def test_a_damaged_neighbour_is_passed_over(tmp_path, file, text):
    wanted = written(tmp_path, "exclusive", 1)
    (written(tmp_path, "exclusive", 2) / file).write_text(text)
    assert find_comparable(load_run(written(tmp_path, "flexfl", 3))).path == wanted


# --- numbers ------------------------------------------------------------------------------------------------


def test_mean_and_deviation():
    assert mean_and_deviation([1.0, 2.0, 6.0]) == (3.0, pytest.approx(2.6457513))
    assert mean_and_deviation([2.0]) == (2.0, None)
    assert mean_and_deviation([]) == (None, None)


def test_differences_are_paired_by_seed():
    ours, base = row("a", 0.5, 0.75, 1.0), row("b", 0.25, 0.875, seeds=(1, 2))
    assert paired_differences(ours, base, "accuracy") == {1: 0.25, 2: -0.125}
    assert paired_differences(ours, base, "accuracy-S") == {}


def test_pairing_does_not_depend_on_order():
    ours = Row("a", {2: run(accuracy=0.5, seed=2), 1: run(accuracy=0.75)})
    assert paired_differences(ours, row("b", 0.25, 0.25), "accuracy") == {1: 0.5, 2: 0.25}


LAST10, PARTS, DIFFERENCE, VERDICT, COST = (
    "Mean of the last",
    "after the last",
    "Difference to",
    "t-test",
    "Cost of a run",
)


def test_rows_that_ran_on_different_devices_are_named():
    one, other, third = (row(name, 0.5, 0.6) for name in "abc")
    runs = {seed: replace(run, summary={**run.summary, "torch-device": "cuda (X)"}) for seed, run in other.runs.items()}
    assert device_notes([one, third]) == [], "runs of older code ran on the CPU"
    assert device_notes([Row("b", runs)]) == []
    (note,) = device_notes([one, Row("b", runs), Row("c", {**third.runs, 2: runs[2]})])
    assert note.startswith("Runs computed on different devices (cpu: a, c; cuda (X): b, c)")


def cell(comparison, table, name, column):
    (found,) = (found for found in tables(comparison) if table in found.caption)
    (line,) = (line for line in found.body if line[0] == name)
    return line[found.head.index(column)]


EXAMPLE = Comparison("t", [row("base", 0.80, 0.82, 0.84), row("new", 0.85, 0.82, 0.83)], "base", ["accuracy"])


def test_tables_of_a_worked_example():
    assert cell(EXAMPLE, LAST10, "base", "accuracy") == "82.0 ± 2.0 (82.0)"
    assert cell(EXAMPLE, LAST10, "new", "seeds") == "3"
    # Differences +5, 0, -1 points: mean 4/3, deviation sqrt(31/3).
    assert cell(EXAMPLE, DIFFERENCE, "new", "accuracy") == "+1.3 ± 3.2 (+0-)"
    assert cell(EXAMPLE, COST, "new", "sent back") == "1 kB"


def test_the_tables_tell_the_end_the_last_ten_and_the_best():
    rounds = [{"round": n, "accuracy": value} for n, value in enumerate([0.9, *[0.5] * 9, 0.6], 1)]
    one = Run(Path("r"), CONFIG, rounds, {}, summarise(rounds, {"seed": 1}))
    found = Comparison("t", [Row("a", {1: one})], None, ["accuracy"])
    assert [cell(found, PARTS, "a", name) for name in ("final", "mean of the last ten", "best")] == [
        "60.0",
        "51.0",
        "90.0",
    ]


def test_exits_have_a_table_of_the_rows_that_have_them():
    deep = run(**{"exit-accuracy-b-1": 0.1, "exit-accuracy-a-10": 0.2, "exit-accuracy-a-2": 0.3})
    found = Comparison("t", [row("flat", 0.5), Row("deep", {1: deep})], None, ["accuracy"])
    (exits,) = (table for table in tables(found) if "every exit" in table.caption)
    assert exits.head == ["method", "a exit 2", "a exit 10", "b exit 1"]
    assert exits.body == [["deep", "30.0", "20.0", "10.0"]]
    assert not any("every exit" in table.caption for table in tables(EXAMPLE))


def test_the_verdict_follows_from_a_worked_example():
    rows = [row("base", 0.50, 0.52, 0.54), row("better", 0.60, 0.63, 0.64), row("same", 0.51, 0.51, 0.55)]
    found = Comparison("t", [*rows, row("one", 0.9)], "base", ["accuracy"])
    # Differences 10, 11, 10: mean 31/3, error 1/3, t = 31 with two degrees of freedom.
    columns = ("difference", "from", "to", "p", "corrected", "verdict")
    told = [cell(found, VERDICT, "better", name) for name in columns]
    assert told == ["+10.3", "+8.9", "+11.8", "0.001", "0.002", "better"]
    assert cell(found, VERDICT, "same", "verdict") == "not shown"
    assert [cell(found, VERDICT, "one", name) for name in ("difference", "p", "verdict")] == ["+40.0", "-", "-"]
    assert cell(replace(found, baseline="better"), VERDICT, "base", "verdict") == "worse"
    by_loss = Comparison("t", [Row(n, {s: run(seed=s, loss=v) for s, v in enumerate(vs)}) for n, vs in
                               (("base", (3.0, 3.1)), ("low", (1.0, 1.1001)))], "base", ["loss"])  # fmt: skip
    assert cell(by_loss, VERDICT, "low", "verdict") == "better"


def test_costs_hold_evaluation_and_energy():
    costs = {"bytes-evaluation": 2_000_000, "macs-evaluation": 3_000_000, "joules": 1500}
    found = Comparison("t", [Row("a", {1: run(**costs)})], None, ["accuracy"])
    cells = [cell(found, COST, "a", name) for name in ("for evaluation", "for evaluation, as well", "modelled energy")]
    assert cells == ["2 MB", "3 M", "1.50 kJ"]
    assert cell(found, COST, "a", "measured client time") == "-", "a run of older code has none"
    assert max(map(len, to_text(found).splitlines())) <= 120


def test_one_seed_has_no_deviation_and_absent_metrics_are_dashes():
    found = Comparison("t", [row("base", 0.8), row("new", 0.9), Row("none", {})], "base", ["accuracy", "loss"])
    assert cell(found, LAST10, "base", "accuracy") == "80.0 (80.0)"
    assert cell(found, DIFFERENCE, "new", "accuracy") == "+10.0 (+)"
    assert cell(found, LAST10, "new", "loss") == "-"
    assert cell(found, DIFFERENCE, "none", "accuracy") == "-"
    assert cell(found, COST, "none", "sent back") == "-"


def test_accuracy_by_data_stops_where_the_data_stops():
    rounds = [{"round": n, "accuracy": n / 100, "bytes-down": 6e5, "bytes-up": 4e5} for n in range(1, 15)]
    rounds[0]["bytes-down"] += 2e6  # exploration
    long = Run(Path("r"), CONFIG, rounds, {}, summarise(rounds, {"seed": 1}))
    one = Row("a", {1: long})
    assert one.values_within(2.9e6, "accuracy") == {}
    assert one.values_within(3e6, "accuracy") == {1: pytest.approx(0.01)}
    assert one.values_within(5.5e6, "accuracy") == {1: pytest.approx(0.02)}  # rounds 1, 2 and 3
    assert one.values_within(14e6, "accuracy") == {1: pytest.approx(sum(range(3, 13)) / 1000)}
    table = tables(Comparison("t", [one], None, ["accuracy"], megabytes=[1, 5.5]))[2]
    assert (table.head, table.body) == (["method", "1 MB", "5.5 MB"], [["a", "-", "2.0"]])


def test_a_run_without_a_number_shows_no_earlier_one_by_data():
    rounds = [{"round": n, "accuracy": 0.5, "bytes-up": 1e6} for n in (1, 2, 3)]
    rounds[1]["accuracy"] = None
    one = Row("a", {1: Run(Path("r"), CONFIG, rounds, {}, summarise(rounds, {"seed": 1}))})
    assert one.values_within(1e6, "accuracy") == {1: 0.5}
    assert one.values_within(3e6, "accuracy") == {}


def test_a_diverged_run_and_unequal_seeds_are_told():
    bad = row("a", 0.5, 0.6, None)
    assert bad.values("last10", "accuracy") == {1: 0.5, 2: 0.6}
    assert notes_on([bad, row("b", 0.5, 0.6, 0.7)], ["accuracy", "loss"]) == [
        "Diverged, and so not in the means of the last ten rounds, nor in the differences: a accuracy (seed 3)."
    ]
    (unequal,) = notes_on([row("a", 0.5, 0.6), row("b", 0.5), Row("none", {})], ["accuracy"])
    assert unequal.startswith("Rows have unequal seeds (a: 1, 2; b: 1): ")
    runs = [run(seed=1), run(seed=2, accuracy=None), run("exclusive")]
    assert [note.split(" ")[0] for note in compare_runs(runs).notes] == ["Rows", "Diverged,"]


def test_losses_are_no_percentages():
    found = Comparison("t", [Row("a", {1: run(loss=0.25)})], None, ["loss"])
    assert cell(found, LAST10, "a", "loss") == "0.250 (0.250)"
    diverged = Comparison("t", [Row("a", {1: run(loss=2.92e29)})], None, ["loss"])
    assert cell(diverged, LAST10, "a", "loss") == "2.92e+29 (2.92e+29)"
    assert len(tables(found)) == 3


def test_exclusive_is_not_praised_for_the_devices_it_leaves_out():
    worst = {"accuracy-worst-tenth": 0.9}
    rows = [Row("base", {1: run("exclusive", **worst)}), Row("new", {1: run(**{"accuracy-worst-tenth": 0.2})})]
    found = Comparison("t", rows, "base", ["accuracy", "accuracy-worst-tenth"])
    assert cell(found, LAST10, "base", "accuracy-worst-tenth") == "90.0 (90.0)*"
    assert cell(found, LAST10, "new", "accuracy-worst-tenth") == "20.0 (20.0)"
    assert cell(found, DIFFERENCE, "new", "accuracy-worst-tenth") == "-"
    assert "* Without the devices too weak" in to_markdown(found, "c")
    assert "* Without" not in to_markdown(EXAMPLE, "c")


def test_an_unknown_baseline_is_an_error():
    with pytest.raises(ValueError, match="baseline 'x' is no row; rows: a"):
        Comparison("t", [row("a", 0.5)], "x", ["accuracy"])


# --- given runs ---------------------------------------------------------------------------------------------


def test_given_runs_make_rows_by_configuration():
    runs = [run(seed=1), run(seed=2), run("exclusive"), run(config={"flexfl.kd-weight": 0})]
    found = compare_runs(runs)
    assert [item.name for item in found.rows] == ["flexfl kd-weight=10", "exclusive", "flexfl kd-weight=0"]
    assert sorted(found.rows[0].runs) == [1, 2]
    assert (found.baseline, found.metrics) == ("exclusive", ["accuracy"])
    assert compare_runs([runs[0], *runs[2:]]).notes == []


def test_rows_that_differ_in_more_than_the_method_carry_a_note():
    found = compare_runs([run(), run("exclusive", config={"dataset": "x"})])
    assert found.notes == ["Rows differ in more than the method: dataset."]


def test_other_numbers_of_clients_are_other_rows_and_noted():
    one, other = run(), run()
    other = replace(other, summary={**other.summary, "clients": 10})
    found = compare_runs([one, other])
    assert [item.name for item in found.rows] == ["flexfl clients=20", "flexfl clients=10"]
    assert found.notes == ["Rows differ in more than the method: clients."]


def test_knobs_of_other_methods_do_not_split_rows():
    found = compare_runs([run("small", 1), run("small", 2, config={"flexfl.kd-weight": 1})])
    assert [item.name for item in found.rows] == ["small"]


def test_knobs_of_the_bandit_and_of_what_a_run_becomes_split_rows():
    caps = [run("fedlps", seed, config={"bandit.cap": cap}) for seed, cap in ((1, "relative"), (2, "clip"))]
    assert [item.name for item in compare_runs(caps).rows] == ["fedlps cap=relative", "fedlps cap=clip"]
    tuned = {"fedstitch.finetune": "small"}
    after = [run("fedstitch", config={**tuned, "small.ratio": ratio}) for ratio in (0.5, 0.25)]
    assert [item.name for item in compare_runs(after).rows] == ["fedstitch ratio=0.5", "fedstitch ratio=0.25"]


def test_given_runs_show_the_accuracies_that_all_have():
    runs = [run(**{"accuracy-S": 0.5, "accuracy-levels": 0.5}), run("exclusive", **{"accuracy-levels": 0.5})]
    assert compare_runs(runs).metrics == ["accuracy", "accuracy-levels"]
    with pytest.raises(ValueError, match="no runs to compare"):
        compare_runs([])
    untested = run()
    untested.summary["last10"].clear()
    with pytest.raises(ValueError, match="these 2 runs have no accuracy in common"):
        compare_runs([run("exclusive"), untested])


def test_doubles_and_unfinished_runs_are_errors(tmp_path):
    with pytest.raises(ValueError, match="two runs of one configuration have seed 1: one and two"):
        compare_runs([run(name="one"), run(name="two")])
    with pytest.raises(ValueError, match="is not finished"):
        load_runs([written(tmp_path, "small", 1, finished=False)])


# --- output -------------------------------------------------------------------------------------------------


def test_text_shows_all_tables():
    text = to_text(replace(EXAMPLE, notes=["careful"]))
    assert "82.0 ± 2.0 (82.0)" in text
    assert "paired by seed" in text
    assert text.endswith("Note: careful")


def test_markdown_has_the_command_on_top():
    lines = to_markdown(EXAMPLE, "flexfed compare suite.toml").splitlines()
    assert lines[:5] == ["# t", "", "```", "flexfed compare suite.toml", "```"]
    assert "| base | 3 | 82.0 ± 2.0 (82.0) |" in lines
    assert "| new | +1.3 ± 3.2 (+0-) |" in lines


def test_names_cannot_break_the_tables():
    found = Comparison("t", [row("a|b [red]", 0.5)], None, ["accuracy"])
    assert "| a\\|b [red] |" in to_markdown(found, "c")
    assert "a|b [red]" in to_text(found)
