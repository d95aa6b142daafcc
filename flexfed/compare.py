"""Compare runs: which may be compared, means over seeds, differences paired by seed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexfed.config import BANDIT_PREFIX, with_defaults
from flexfed.methods import METHODS
from flexfed.overrides import Scalar
from flexfed.runs import Run, find_runs, leaves_devices_out, load_run

# Keys that say which method runs, where files lie and how the machine is used: not what is compared on.
METHOD_KEYS = frozenset({"strategy", "ratio-policy"})
PLACE_KEYS = frozenset({"runs-dir", "state-dir", "resume", "replies-in-flight", "torch-device", "torch-threads"})


# --- what may be compared -----------------------------------------------------------------------------------


def shared_config(run: Run) -> dict[str, Scalar]:
    """The configuration that is not the method's own: data, network, fleet, seed, rounds, training.

    Dotted keys are knobs of one method.
    """
    left_out = METHOD_KEYS | PLACE_KEYS
    return {key: value for key, value in with_defaults(run.config).items() if "." not in key and key not in left_out}


def comparable(one: Run, other: Run) -> bool:
    """Whether two runs differ in the method only."""
    return shared_config(one) == shared_config(other) and _num_clients(one) == _num_clients(other)


def _num_clients(run: Run) -> Any:
    """Number of clients; no configuration key, because the federation decides it."""
    return (run.summary or {}).get("clients")


def find_comparable(run: Run, strategy: str = "exclusive") -> Run | None:
    """The newest finished run of `strategy` beside this one that differs from it in the method only.

    None, too, for a run of that strategy itself.
    """
    if run.config.get("strategy") == strategy:
        return None
    for path in reversed(find_runs(run.path.parent)):
        # The name is cheap to look at, and there may be hundreds of runs.
        if path == run.path or f"-{strategy}-" not in path.name:
            continue
        other = _load_sound(path)
        if other and other.summary and other.config.get("strategy") == strategy and comparable(run, other):
            return other
    return None


def _load_sound(path: Path) -> Run | None:
    """The run in a folder; None where the folder is damaged: a neighbour's damage must not fail this run."""
    try:
        return load_run(path)
    except ValueError:
        return None


# --- rows and their numbers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One method (or variant) of a comparison.

    Attributes:
        name: of its row.
        runs: seed -> finished run.
    """

    name: str
    runs: Mapping[int, Run]

    def values(self, part: str, metric: str) -> dict[int, float]:
        """Seed -> a metric of the summary's `final`, `last10` or `best`; runs without a number are left out."""
        found = {seed: _summary(run)[part].get(metric) for seed, run in sorted(self.runs.items())}
        return {seed: value for seed, value in found.items() if value is not None}

    def values_within(self, num_bytes: float, metric: str) -> dict[int, float]:
        """Seed -> a metric as it stood when so many bytes had travelled: the mean of the last ten rounds before that.

        Training's bytes count, both ways, with what travelled before round 1; those of evaluations do not.
        """
        found = {seed: _mean_within(run, num_bytes, metric) for seed, run in sorted(self.runs.items())}
        return {seed: value for seed, value in found.items() if value is not None}

    def seeds_without_number(self, metric: str) -> list[int]:
        """Seeds whose run measured a metric, but had no number in one of its last ten rounds: it diverged."""
        parts = {seed: _summary(run)["last10"] for seed, run in sorted(self.runs.items())}
        return [seed for seed, part in parts.items() if metric in part and part[metric] is None]

    def leaves_devices_out(self, metric: str) -> bool:
        """Whether a mean over devices is one over the strong devices only."""
        return any(leaves_devices_out(run.summary, metric) for run in self.runs.values())

    def mean_total(self, key: str) -> float | None:
        """Mean over seeds of a total, such as bytes-up."""
        found = [_summary(run)[key] for run in self.runs.values() if _summary(run).get(key) is not None]
        return statistics.fmean(found) if found else None


@dataclass(frozen=True)
class Comparison:
    """What is shown: rows, the one the others are measured against, and the metrics.

    Attributes:
        title: name of the suite.
        rows: in the order of the table.
        baseline: name of a row; None = no differences.
        metrics: names as in summary.json.
        megabytes: amounts of data after which the first metric is compared, too.
        notes: sentences for the reader, under the tables.
    """

    title: str
    rows: Sequence[Row]
    baseline: str | None
    metrics: Sequence[str]
    notes: Sequence[str] = ()
    megabytes: Sequence[float] = ()

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(f"baseline {self.baseline!r} is no row; rows: {', '.join(names)}")


def _mean_within(run: Run, num_bytes: float, metric: str) -> float | None:
    travelled, before = 0.0, []
    for line in run.rounds:
        travelled += line.get("bytes-down", 0) + line.get("bytes-up", 0)
        if travelled > num_bytes:
            break
        before.append(line)
    values = [line[metric] for line in before[-10:] if metric in line]
    return statistics.fmean(values) if values and None not in values else None  # as in a summary


def _summary(run: Run) -> Mapping[str, Any]:
    if run.summary is None:
        raise ValueError(f"{run.path} is not finished: it has no summary.json")
    return run.summary


def mean_and_deviation(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (n - 1); None where there are too few values."""
    numbers = list(values)
    mean = statistics.fmean(numbers) if numbers else None
    return mean, statistics.stdev(numbers) if len(numbers) > 1 else None


def paired_differences(row: Row, baseline: Row, metric: str) -> dict[int, float]:
    """Seed -> the row's mean of the last ten rounds minus the baseline's, for the seeds that both have.

    Pairing takes out what a seed does to every method alike: the partition, the start, the cohorts. There is no
    difference where only one of the two leaves weak devices out of the metric.
    """
    if row.leaves_devices_out(metric) != baseline.leaves_devices_out(metric):
        return {}
    ours, theirs = row.values("last10", metric), baseline.values("last10", metric)
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def compare_runs(runs: Sequence[Run], baseline: str | None = None) -> Comparison:
    """A comparison of given runs: equal configurations but for the seed make one row.

    Rows are named by strategy, and by the knobs that tell them apart. Without a `baseline` it is the row
    `exclusive`, if there is one.

    Raises:
        ValueError: a run is unfinished, or two have the same configuration and seed.
    """
    groups: dict[tuple[tuple[str, Scalar], ...], dict[int, Run]] = {}
    for run in runs:
        group = groups.setdefault(_variant(run), {})
        seed = int(_summary(run).get("seed", run.config.get("seed", 0)))
        if seed in group:
            raise ValueError(f"two runs of one configuration have seed {seed}: {group[seed].path} and {run.path}")
        group[seed] = run
    rows = [Row(name, by_seed) for name, by_seed in zip(_row_names(list(groups)), groups.values(), strict=True)]
    if baseline is None and any(row.name == "exclusive" for row in rows):
        baseline = "exclusive"
    metrics = _accuracies(runs)
    return Comparison("runs", rows, baseline, metrics, [*_notes(rows), *notes_on(rows, metrics)])


def _variant(run: Run) -> tuple[tuple[str, Scalar], ...]:
    """What makes a row: all keys but the seed and other methods' knobs, and the number of clients."""
    config, clients = with_defaults(run.config), _num_clients(run)
    own = f"{config.get('strategy')}."
    # A method may name another one that its run becomes (FedStitch's fine-tuning), whose knobs it then reads.
    followed = {f"{value}." for key, value in config.items() if key.startswith(own) and value in METHODS}
    read = (own, BANDIT_PREFIX, *followed)
    keys = [key for key in config if key not in PLACE_KEYS | {"seed"} and ("." not in key or key.startswith(read))]
    return (*((key, config[key]) for key in sorted(keys)), *([("clients", clients)] if clients is not None else []))


def _row_names(variants: Sequence[tuple[tuple[str, Scalar], ...]]) -> list[str]:
    """The strategy, and those keys whose values differ among the rows of that strategy."""
    tables = [dict(variant) for variant in variants]
    names = []
    for table in tables:
        same = [other for other in tables if other.get("strategy") == table.get("strategy")]
        keys = [key for key in table if any(other.get(key) != table[key] for other in same)]
        words = [f"{key.rpartition('.')[2]}={table[key]}" for key in keys]
        names.append(" ".join([str(table.get("strategy", "?")), *words]))
    return names


def _accuracies(runs: Sequence[Run]) -> list[str]:
    """The accuracies that all runs have; levels have other names in every method."""
    if not runs:
        raise ValueError("no runs to compare")
    names = set.intersection(*(set(_summary(run)["last10"]) for run in runs))
    if not (found := sorted(name for name in names if name.startswith("accuracy"))):
        raise ValueError(f"these {len(runs)} runs have no accuracy in common: some never tested a model")
    return found


def _notes(rows: Sequence[Row]) -> list[str]:
    """A warning where rows differ in more than the method."""
    configs = [{**shared_config(run), "clients": _num_clients(run)} for row in rows for run in row.runs.values()]
    keys = sorted({key for config in configs for key in config} - {"seed"})
    differing = [key for key in keys if len({repr(config.get(key)) for config in configs}) > 1]
    return [f"Rows differ in more than the method: {', '.join(differing)}."] if differing else []


def notes_on(rows: Sequence[Row], metrics: Sequence[str]) -> list[str]:
    """What the reader of any table of these rows has to know: unequal seeds, runs that diverged, other devices."""
    return [*_seed_notes(rows), *_divergence_notes(rows, metrics), *device_notes(rows)]


def _seed_notes(rows: Sequence[Row]) -> list[str]:
    seeds = {row.name: sorted(row.runs) for row in rows if row.runs}
    if all(own == next(iter(seeds.values())) for own in seeds.values()):
        return []
    told = "; ".join(f"{name}: {', '.join(map(str, own))}" for name, own in seeds.items())
    return [f"Rows have unequal seeds ({told}): means are over each row's own, differences over those of both."]


def _divergence_notes(rows: Sequence[Row], metrics: Sequence[str]) -> list[str]:
    """Means over the seeds that did not diverge flatter a row, so the others are named."""
    told = [
        f"{row.name} {metric} (seed {', '.join(map(str, seeds))})"
        for row in rows
        for metric in metrics
        if (seeds := row.seeds_without_number(metric))
    ]
    return (
        [f"Diverged, and so not in the means of the last ten rounds, nor in the differences: {'; '.join(told)}."]
        if told
        else []
    )


def device_notes(rows: Sequence[Row]) -> list[str]:
    """A note where runs computed on different devices: the same seed then has other bits, and other seconds."""
    on: dict[str, list[str]] = {}
    for row in rows:
        for place in sorted({str((run.summary or {}).get("torch-device", "cpu")) for run in row.runs.values()}):
            on.setdefault(place, []).append(row.name)
    if len(on) < 2:
        return []
    told = "; ".join(f"{place}: {', '.join(names)}" for place, names in on.items())
    return [f"Runs computed on different devices ({told}): differences paired by seed hold those, too."]


def load_runs(paths: Iterable[Path]) -> list[Run]:
    """Read run folders; an unfinished one is an error."""
    runs = [load_run(path) for path in paths]
    for run in runs:
        _summary(run)
    return runs
