"""A suite's finished runs as FedStitch's claims ask for them: what was spent when, and how good a network was then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

from flexfed.compare import Row
from flexfed.cost import modelled_joules, modelled_seconds
from flexfed.devices import load_fleet
from flexfed.overrides import Scalar, defaults
from flexfed.runs import Run
from flexfed.suites import load_suite, suite_comparison, suite_runs

ROOT = Path(__file__).resolve().parent.parent
STITCHES = "fedstitch"
WITH_BLOCKS = "-with-blocks"
"""At the end of a cost's key: and had the blocks been sent to every client once, before round 1."""


@dataclass(frozen=True)
class Study:
    """A suite's rows, and what they are compared to.

    Attributes:
        name: of the suite.
        rows: with their finished runs, in the suite's order.
        configs: row -> its configuration, without seed and place.
        baseline: a row that stitches.
        notes: seeds, devices, what is missing.
    """

    name: str
    rows: Sequence[Row]
    configs: Mapping[str, Mapping[str, Scalar]]
    baseline: Row
    notes: Sequence[str]

    @property
    def training(self) -> list[Row]:
        """The rows that train."""
        return [row for row in self.rows if self.configs[row.name]["strategy"] != STITCHES]

    @property
    def stitching(self) -> list[Row]:
        """The rows that stitch."""
        return [row for row in self.rows if self.configs[row.name]["strategy"] == STITCHES]

    @property
    def other_energy(self) -> list[Row]:
        """The rows that differ from the baseline in nothing but the energy optimiser."""
        own = self.configs[self.baseline.name]
        return [row for row in self.rows if differing(own, self.configs[row.name]) == {"fedstitch.energy"}]

    @property
    def seeds(self) -> list[int]:
        """Of which there is any run."""
        return sorted({seed for row in self.rows for seed in row.runs})


def differing(one: Mapping[str, Scalar], other: Mapping[str, Scalar]) -> set[str]:
    """The keys whose values differ."""
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def load_study(path: Path) -> Study:
    """Read the finished runs of a suite.

    Raises:
        ValueError: the suite cannot be read, or its baseline is no row that stitches.
    """
    known = defaults(ROOT)
    suite = load_suite(path, known)
    configs = {name: {**known, **overrides} for name, overrides in suite.rows.items()}
    if suite.baseline is None or configs[suite.baseline]["strategy"] != STITCHES:
        raise ValueError(f"{path.name}: baseline must be a row whose strategy is {STITCHES!r}, got {suite.baseline!r}")
    found = suite_comparison(suite, suite_runs(suite, known))
    (baseline,) = (row for row in found.rows if row.name == suite.baseline)
    return Study(suite.name, found.rows, configs, baseline, found.notes)


# --- of one run ---------------------------------------------------------------------------------------------


def facts(run: Run) -> Mapping[str, Any]:
    """The summary of a run that is finished."""
    return run.summary or {}


def final(run: Run) -> float | None:
    """Accuracy of the finished network."""
    accuracy: float | None = facts(run)["final"].get("accuracy")
    return accuracy


def finals(row: Row) -> list[float]:
    """The same, of every seed."""
    return [accuracy for run in row.runs.values() if (accuracy := final(run)) is not None]


def sending_blocks(run: Run) -> dict[str, float]:
    """What it costs, modelled, to send every client all blocks; nothing where a run uses none."""
    num_bytes, num, seed = facts(run).get("pool-bytes", 0), facts(run)["clients"], int(run.config["seed"])
    devices = [load_fleet(str(run.config["fleet"])).device(partition, num, seed) for partition in range(num)]
    seconds = max(modelled_seconds(device, 0, num_bytes, 0) for device in devices)
    joules = sum(modelled_joules(device, 0, num_bytes, 0) for device in devices)
    return {f"modelled-seconds{WITH_BLOCKS}": seconds, f"joules{WITH_BLOCKS}": joules}


def total(run: Run, key: str) -> float | None:
    """One of a run's totals."""
    value: float | None = facts(run).get(key.removesuffix(WITH_BLOCKS))
    return value + sending_blocks(run)[key] if value is not None and key.endswith(WITH_BLOCKS) else value


def spent(run: Run, measure: str) -> list[float] | None:
    """What a run had spent after each of its rounds; None where that is not known of every round."""
    told = {line["round"]: line.get(measure.removesuffix(WITH_BLOCKS)) for line in run.rounds}
    costs = [(run.client_timing if measure == "client-seconds" else told).get(line["round"]) for line in run.rounds]
    known = [cost for cost in costs if cost is not None]
    if not known or len(known) < len(costs):
        return None
    before = sending_blocks(run)[measure] if measure.endswith(WITH_BLOCKS) else 0.0
    return list(accumulate(known, initial=before))[1:]


def path_of(run: Run) -> str:
    """The blocks by source, and their ids: "residual 1-2, plain 3 (0-1-6)"."""
    blocks = [name.rpartition(".") for name in facts(run).get("path", ())]
    grouped = [(source, [block[2] for block in group]) for source, group in groupby(blocks, lambda block: block[0])]
    ids: list[int] = next(
        (at["stitching"]["path"] for at in reversed(run.rounds) if "path" in at.get("stitching", {})), []
    )
    return ", ".join(f"{source} {'-'.join(places)}" for source, places in grouped) + f" ({dashed(ids)})"


def dashed(ids: Sequence[int]) -> str:
    """Ids of blocks as a run's configuration has them."""
    return "-".join(map(str, ids))


def missed(run: Run) -> int:
    """Deadlines, in all rounds."""
    return sum(line.get("stitching", {}).get("missed", 0) for line in run.rounds)


def weights(run: Run) -> dict[str, list[float]]:
    """Client -> its weights in the rounds in which it was heard."""
    found: dict[str, list[float]] = {}
    for line in run.rounds:
        for client, weight in line.get("stitching", {}).get("weights", {}).items():
            found.setdefault(client, []).append(weight)
    return found


def episode_ends(run: Run) -> dict[int, Mapping[str, Any]]:
    """Episode -> the last of its rounds that brought a block."""
    told = [line for line in run.rounds if "reward" in line.get("stitching", {})]
    return {line["stitching"]["episode"]: line for line in told}


# --- of a run and the baseline's with the same seed ---------------------------------------------------------


class Pair(NamedTuple):
    """Two runs of one seed."""

    run: Run
    base: Run


class Point(NamedTuple):
    """A round in which the network was tested."""

    round: int
    accuracy: float
    spent: float  # until its end, as a multiple of what the other run spent in all


def pairs(row: Row, baseline: Row) -> list[Pair]:
    """The seeds of which there are both."""
    return [Pair(row.runs[seed], baseline.runs[seed]) for seed in sorted(row.runs.keys() & baseline.runs.keys())]


def differences(row: Row, baseline: Row) -> list[float]:
    """Final accuracy less the baseline's, seed by seed."""
    found = [(final(run), final(base)) for run, base in pairs(row, baseline)]
    return [mine - other for mine, other in found if mine is not None and other is not None]


def ratios(row: Row, baseline: Row, key: str) -> list[float]:
    """A total of a row's run as a multiple of the baseline's, seed by seed."""
    found = [(total(run, key), total(base, key)) for run, base in pairs(row, baseline)]
    return [mine / other for mine, other in found if mine is not None and other]


def measured_pairs(row: Row, baseline: Row, measure: str) -> list[Pair]:
    """Those of which it is known what both spent, the other more than nothing, and how good its network is."""
    known = [(pair, spent(pair.run, measure), spent(pair.base, measure)) for pair in pairs(row, baseline)]
    return [pair for pair, mine, other in known if mine and other and other[-1] and final(pair.base) is not None]


def curve(pair: Pair, measure: str) -> list[Point]:
    """The rounds in which the run was tested."""
    mine, other = spent(pair.run, measure), spent(pair.base, measure)
    assert mine
    assert other
    lines = zip(pair.run.rounds, mine, strict=True)
    return [Point(at["round"], at["accuracy"], c / other[-1]) for at, c in lines if at.get("accuracy") is not None]


def at_equal(pair: Pair, measure: str) -> Point | None:
    """Where the run has spent as much as the other did in all; None = it ended before."""
    return next((point for point in curve(pair, measure) if point.spent >= 1), None)


def as_good(pair: Pair, measure: str) -> Point | None:
    """Where the run first is as accurate as the other is at its end; None = nowhere."""
    wanted = final(pair.base)
    assert wanted is not None
    return next((point for point in curve(pair, measure) if point.accuracy >= wanted), None)
