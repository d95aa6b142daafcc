"""What FedStitch's claims ask of a suite's runs, on made-up ones: three seeds that stitch, two of which train, too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.stitching import main, number, points, report, spread, unit
from benchmarks.stitching_runs import (
    Pair,
    Study,
    as_good,
    at_equal,
    load_study,
    measured_pairs,
    path_of,
    ratios,
    spent,
    total,
    weights,
)
from flexfed.overrides import defaults
from flexfed.runs import Measured, RunFolder, load_run, summarise
from flexfed.suites import SuiteRun, load_suite, mark_finished, suite_runs

ROOT = Path(__file__).parent.parent
SUITE = """
name = "made-up"
seeds = [2, 1, 3]
supernodes = 4
baseline = "best | path"
metrics = ["accuracy"]
[base]
strategy = "fedstitch"
runs-dir = "runs"
fleet = "tiers"  # of four: one has 1 MB/s at 1 W, one 2 at 1, two 4 at 1.5
[[row]]
name = "best | path"
[[row]]
name = "fast clocks"
fedstitch.energy = "max"
[[row]]
name = "fast clocks, votes"
fedstitch.energy = "max"
fedstitch.aggregate = "vote"
[[row]]
name = "again and again"
fedstitch.episodes = 2
[[row]]
name = "trained"
strategy = "fedavg"
[[row]]
name = "trained badly"
strategy = "heterofl"
[[row]]
name = "not run"
strategy = "fedavg"
"""
NAMES = ("residual.1", "residual.2", "plain.3")
IDS = (0, 1, 6)


def stitched(
    accuracy: float, joules: float = 2.0, missed: int = 0, episodes: int = 1, seconds: float = 1.0
) -> list[dict[str, Any]]:
    """Rounds of two blocks an episode, and the last round of three; the network is tested when it is whole."""
    rounds: list[dict[str, Any]] = []
    for episode in range(1, episodes + 1):
        for place in (1, 2, 3):
            share = 0.25 * episode + 0.01 * place
            told = {"episode": episode, "path": list(IDS[:place]), "reward": 0.125 * place, "missed": missed}
            told["weights"] = {"2": share, "10": 1 - share} if place > 1 else {}
            rounds.append({"joules": joules, "modelled-seconds": seconds, "stitching": told, "client-seconds": 4.0})
            rounds[-1] |= {"validation-accuracy": 0.1 * place + 0.01 * episode, "modelled-seconds-training": 0.5}
        rounds[-1]["accuracy"] = accuracy
    return rounds


def trained(*accuracies: float | None, joules: float = 1.0) -> list[dict[str, Any]]:
    """Rounds that spend a sixth of the energy, two thirds of the modelled time and a quarter of the clients' time."""
    costs = {"joules": joules, "modelled-seconds": 2.0, "client-seconds": 3.0, "bytes-up": 100}
    return [costs | ({} if accuracy is None else {"accuracy": accuracy}) for accuracy in accuracies]


def write(run: SuiteRun, rounds: Sequence[dict[str, Any]]) -> None:
    """A finished run as the server leaves it, but for the network and its curves."""
    folder = RunFolder(run.folder / "20260101-000000-x-1")
    folder.begin(run.config)
    for at, told in enumerate(rounds, 1):
        folder.append_round({"round": at, **{key: told[key] for key in told if key != "client-seconds"}})
        folder.append_timing(at, 9.0, Measured(told["client-seconds"]))
    facts: dict[str, Any] = {
        "client-seconds": sum(told["client-seconds"] for told in rounds),
        "seed": run.seed,
        "clients": 4,
    }
    if run.config["strategy"] == "fedstitch":
        facts |= {"path": list(NAMES), "pool-bytes": 5_000_000}
    summary = summarise(load_run(folder.path).rounds, facts)
    (folder.path / "summary.json").write_text(json.dumps(summary))
    mark_finished(run)


ROUNDS = {
    "best | path": {seed: stitched(accuracy) for seed, accuracy in ((1, 0.5), (2, 0.6), (3, 0.7))},
    "fast clocks": {1: stitched(0.5, joules=4.0, missed=1), 2: stitched(0.6, joules=8.0), 3: stitched(0.7, joules=4.0)},
    "again and again": {2: stitched(0.4, episodes=2, seconds=0.5)},
    "trained": {
        1: trained(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7),  # as much client time after 4 rounds, modelled after 2
        2: trained(0.1, None, 0.3, 0.4, 0.65, 0.6, 0.55),  # the second round is not tested
    },
    "trained badly": {1: trained(0.2, 0.3, 0.4, 0.4)},
}


def make(folder: Path) -> Path:
    """The suite's file, and its runs."""
    path = folder / "made-up.toml"
    path.write_text(SUITE)
    known = defaults(ROOT)
    for run in suite_runs(load_suite(path, known), known):
        if rounds := ROUNDS.get(run.row, {}).get(run.seed):
            write(run, rounds)
    return path


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """The suite of one test, which may change its runs."""
    return make(tmp_path)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The same, read, for all tests that only look."""
    return load_study(make(tmp_path_factory.mktemp("study")))


def pair(study: Study, name: str, seed: int) -> Pair:
    """A row's run, and the baseline's."""
    (row,) = (row for row in study.rows if row.name == name)
    return Pair(row.runs[seed], study.baseline.runs[seed])


def cells(page: str, caption: str) -> dict[str, list[str]]:
    """Row -> its cells, of the table under a caption."""
    table = page[page.index(caption) :].split("\n\n")[1].splitlines()
    lines = [line.strip("| ").split(" | ") for line in table[2:]]
    return {line[0]: line[1:] for line in lines}


# --- what is read -------------------------------------------------------------------------------------------


def test_rows_that_train_are_known_by_their_strategy(study: Study) -> None:
    assert [row.name for row in study.training] == ["trained", "trained badly", "not run"]
    assert [row.name for row in study.stitching][-1] == "again and again"
    assert study.baseline.name == "best | path"


def test_the_optimiser_is_judged_by_rows_that_differ_in_nothing_else(study: Study) -> None:
    assert [row.name for row in study.other_energy] == ["fast clocks"]


@pytest.mark.parametrize("baseline", ['baseline = "trained"', ""])
def test_a_baseline_must_stitch(baseline: str, tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(SUITE.replace('baseline = "best | path"', baseline))
    with pytest.raises(ValueError, match=r"s\.toml: baseline must be a row whose strategy is 'fedstitch', got"):
        load_study(path)


def test_what_was_spent_adds_up(study: Study) -> None:
    run, base = pair(study, "trained", 1)
    assert spent(run, "joules") == [1, 2, 3, 4, 5, 6, 7]
    assert spent(run, "client-seconds") == [3, 6, 9, 12, 15, 18, 21]
    assert spent(base, "modelled-seconds") == [1, 2, 3]


def test_the_blocks_may_be_counted_as_sent(study: Study) -> None:
    run, base = pair(study, "trained", 1)
    assert spent(base, "modelled-seconds-with-blocks") == [6, 7, 8]  # 5 MB on the slowest link
    assert spent(base, "joules-with-blocks") == [13.25, 15.25, 17.25]  # 5 + 2.5 + 2 x 1.875 J
    assert total(base, "joules-with-blocks") == 17.25
    assert spent(run, "joules-with-blocks") == spent(run, "joules")
    assert at_equal(pair(study, "trained", 1), "modelled-seconds-with-blocks") == (4, 0.4, 1.0)


def test_what_was_not_measured_of_every_round_is_not_known(suite: Path) -> None:
    run = pair(load_study(suite), "trained", 1).run
    timing = run.path / "timing.jsonl"
    timing.write_text("".join(timing.read_text().splitlines(keepends=True)[1:]))
    found = load_study(suite)
    row, other = found.training[0], found.baseline
    assert spent(row.runs[1], "client-seconds") is None
    assert [both.run.path for both in measured_pairs(row, other, "client-seconds")] == [row.runs[2].path]
    assert len(measured_pairs(row, other, "joules")) == 2
    assert spent(run, "flops-nnz") is None


def test_the_first_tested_round_at_or_after_equal_costs(study: Study) -> None:
    one = pair(study, "trained", 1)
    assert at_equal(one, "client-seconds") == (4, 0.4, 1.0)  # 12 s: at, not after
    assert at_equal(one, "modelled-seconds") == (2, 0.2, 4 / 3)
    assert at_equal(one, "joules") == (6, 0.6, 1.0)
    assert at_equal(pair(study, "trained", 2), "modelled-seconds") == (3, 0.3, 2.0)  # round 2 is not tested
    assert at_equal(pair(study, "trained badly", 1), "joules") is None  # 4 of 6 J


def test_the_first_round_as_good_as_the_stitched_network_of_its_seed(study: Study) -> None:
    assert as_good(pair(study, "trained", 1), "joules") == (5, 0.5, 5 / 6)  # as good, not better
    assert as_good(pair(study, "trained", 2), "joules") == (5, 0.65, 5 / 6)
    assert as_good(pair(study, "trained", 1), "client-seconds") == (5, 0.5, 1.25)
    assert as_good(pair(study, "trained badly", 1), "joules") is None


def test_ratios_are_by_seed_and_not_of_means(study: Study) -> None:
    (fast,) = study.other_energy
    assert ratios(fast, study.baseline, "joules") == [2, 4, 2]


def test_weights_of_the_rounds_in_which_a_client_was_heard(study: Study) -> None:
    found = weights(pair(study, "again and again", 2).run)
    assert found["2"] == pytest.approx([0.27, 0.28, 0.52, 0.53])


def test_a_path_is_told_by_source_and_by_ids(study: Study) -> None:
    assert path_of(pair(study, "fast clocks", 1).run) == "residual 1-2, plain 3 (0-1-6)"


# --- how it is written --------------------------------------------------------------------------------------


def test_numbers() -> None:
    assert spread([1.0, 2.0, 6.0], number) == "3 ± 2.65"
    assert (spread([2.0], number), spread([], number)) == ("2", "-")
    assert points([0.1, -0.02, 0.0]) == "+2.7 ± 6.4 (+-0)"
    assert points([-0.1]) == "-10.0 (-)"
    assert points([]) == "-"
    assert [unit(*cost) for cost in (("joules", 1500), ("modelled-seconds", 0.5), ("macs", 2e9), ("bytes-up", 10))] == [
        "1.50 kJ",
        "0.5 s",
        "2 G",
        "10 B",
    ]
    assert (number(0.01234), number(1234.5)) == ("0.0123", "1234")


def test_accuracy_and_paths(study: Study) -> None:
    page = report(study, "")
    found = cells(page, "Accuracy of the finished network")
    assert found["best \\| path"] == ["60.0 ± 10.0", "-", "3, 3, 3", "0, 0, 0", "0, 0, 0"]
    assert found["trained"] == ["62.5 ± 10.6", "+7.5 ± 17.7 (+-)", "7, 7", "0, 0", "0, 0"]
    assert found["again and again"][:3] == ["40.0", "-20.0 (-)", "6"]
    assert found["not run"] == ["-"] * 5
    path = "residual 1-2, plain 3 (0-1-6)"
    assert cells(page, "The path of each seed")["again and again"] == ["-", path, "-"]


def test_costs_and_their_multiples(study: Study) -> None:
    page = report(study, "")
    assert cells(page, "Costs of a run")["fast clocks"][0] == "12 s ± 0 s"
    assert cells(page, "Costs of a run")["fast clocks"][3] == "16 J ± 6.93 J"
    assert cells(page, "Costs of a run")["fast clocks"][4:6] == ["8 s ± 0 s", "27.2 J ± 6.93 J"]
    assert cells(page, "Costs of a run")["again and again"][-1] == "5 MB"
    assert cells(page, "Costs of a run")["trained"][-1] == "-"
    assert cells(page, "The same as multiples")["fast clocks"][3] == "2.67 ± 1.15"
    assert cells(page, "The same as multiples")["trained"][:2] == ["1.75 ± 0", "4.67 ± 0"]


def test_stitching_against_training(study: Study) -> None:
    page = report(study, "")
    equal = cells(page, "Accuracy in %, measured, in the first tested round")
    once = ["40.0 ± 0.0 (round 4, 4)", "25.0 ± 7.1 (round 2, 3)", "60.0 ± 0.0 (round 6, 6)"]
    sent = ["40.0 ± 0.0 (round 4, 4)", "-"]  # 8 s, and 17.25 J
    assert equal["trained"] == [*once, *sent, "62.5 ± 10.6"]
    assert equal["trained badly"] == ["40.0 (round 4)", "30.0 (round 2)", "-", "40.0 (round 4)", "-", "40.0"]
    lead = cells(page, "By how many points best | path is more accurate")["trained"]
    assert lead[:3] == ["+15.0 ± 7.1 (++)", "+30.0 ± 0.0 (++)", "-5.0 ± 7.1 (-0)"]
    assert lead[3:] == ["+15.0 ± 7.1 (++)", "-", "-7.5 ± 17.7 (-+)"]
    need = cells(page, "What a run spends until")
    assert need["trained"][0] == "1.25 ± 0 (round 5, 5)"
    assert need["trained"][4] == "0.29 ± 0 (round 5, 5)"
    assert need["trained badly"] == ["never in 4 rounds"] * 5
    assert need["not run"] == ["-"] * 5
    assert "Claimed: up to +20.93." in page
    assert "up to 8.12 of time; 89.41 % less energy, which is 9.44." in page


def test_a_seed_that_never_gets_there_is_told(suite: Path) -> None:
    known = defaults(ROOT)
    for run in suite_runs(load_suite(suite, known), known):
        if (run.row, run.seed) == ("trained", 3):
            write(run, trained(0.1, 0.2))
    page = report(load_study(suite), "")
    assert cells(page, "What a run spends until")["trained"][0] == "1.25 ± 0 (round 5, 5, never in 2)"
    assert cells(page, "Accuracy in %, measured, in the first")["trained"][0] == "40.0 ± 0.0 (round 4, 4, -)"


def test_costs_that_nobody_measured_are_not_never(suite: Path) -> None:
    (pair(load_study(suite), "trained badly", 1).run.path / "timing.jsonl").unlink()
    row = cells(report(load_study(suite), ""), "What a run spends")["trained badly"]
    assert row == ["-", *["never in 4 rounds"] * 4]


def test_the_energy_optimiser(study: Study) -> None:
    found = cells(report(study, ""), "A phase's deadline")
    path = "residual 1-2, plain 3 (0-1-6)"
    times = ["3 s ± 0 s", "1.5 s ± 0 s"]
    assert found["best \\| path"] == ["on", "6 J ± 0 J", *times, "-", "0, 0, 0", ", ".join([path] * 3)]
    assert found["fast clocks"][5] == "3, 0, 0"
    assert found["fast clocks"][4] == "58.3 ± 14.4"  # 50, 75 and 50 %
    assert set(found) == {"best \\| path", "fast clocks"}


def test_weights_and_episodes(study: Study) -> None:
    page = report(study, "")
    learned = cells(page, "again and again: each client's first and last weight")
    assert learned == {"2": ["0.2700, 0.5300"], "10": ["0.7300, 0.4700"]}
    assert list(learned) == ["2", "10"]
    ends = cells(page, "The last round of each episode")
    assert ends == {"again and again, seed 2": ["31.0; +0.375; 0-1-6", "32.0; +0.375; 0-1-6"]}


def test_a_page_for_each_suite(suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(suite), "--out", str(tmp_path / "pages")])
    page = tmp_path / "pages" / "made-up-costs.md"
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text()
    assert "python -m benchmarks.stitching benchmarks/suites/made-up.toml" in text
    assert str(tmp_path) not in text
    assert "Runs still missing: 11." in text


def test_a_suite_of_which_nothing_was_run_makes_a_page(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(SUITE)
    page = report(load_study(tmp_path / "s.toml"), "")
    assert cells(page, "Costs of a run")["trained"] == ["-"] * 11
    assert "## Weights" not in page
