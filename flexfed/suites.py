"""Suites: variants and seeds in one TOML file, the runs they ask for, and which of them are finished."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexfed.compare import PLACE_KEYS, Comparison, Row, notes_on
from flexfed.config import with_defaults
from flexfed.overrides import (
    Scalar,
    check_known,
    flatten,
    near_matches,
    read_toml,
    resolve_paths,
    resumed_supernodes,
)
from flexfed.runs import Run, find_runs, load_run, write_atomic
from flexfed.tuning import Tuning, read_tuning

MARKER = "finished.json"
_KEYS = ("name", "cost", "seeds", "baseline", "supernodes", "metrics", "megabytes", "base", "tune", "row")


@dataclass(frozen=True)
class Suite:
    """A comparison as its TOML file states it.

    Attributes:
        name: of the suite, and of its folder.
        seeds: each row runs once per seed.
        baseline: the row that the others are measured against; None = no differences.
        supernodes: simulated clients.
        metrics: columns; names as in summary.json.
        megabytes: amounts of data after which the first metric is compared, too.
        rows: row -> its overrides, those of [base] included.
        runs_dir: where the suite's folder goes.
        tuning: what each row chooses for itself before its runs; None = nothing, or it is chosen (`tuned`).
        notes: for the reader of its tables.
        cost: of all its runs, as its author says, and on what machine; "" = not said.
    """

    name: str
    seeds: tuple[int, ...]
    baseline: str | None
    supernodes: int
    metrics: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Scalar]]
    runs_dir: Path
    megabytes: tuple[float, ...] = ()
    tuning: Tuning | None = None
    notes: tuple[str, ...] = ()
    cost: str = ""

    @property
    def folder(self) -> Path:
        """Of all its runs."""
        return self.runs_dir / _slug(self.name)


@dataclass(frozen=True)
class SuiteRun:
    """One run of a suite: a row with a seed, and with the value that it tries if it is one of those that decide."""

    row: str
    seed: int
    folder: Path  # its run folders, log and marker go here
    overrides: Mapping[str, Scalar]
    config: Mapping[str, Scalar]  # resolved: the app's defaults and the overrides
    supernodes: int
    tried: Scalar | None = None

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{self.row} seed {self.seed}" + ("" if self.tried is None else f" trying {self.tried}")


# --- reading ------------------------------------------------------------------------------------------------


def load_suite(path: Path, known: Mapping[str, Scalar]) -> Suite:
    """Read a suite.

    Args:
        path: the TOML file; relative paths in it start at its folder.
        known: every configuration key with its default.

    Raises:
        ValueError: a key, row or seed is missing, doubled or unknown; the message names the file and the row.
    """
    table = read_toml(path)
    for key in table.keys() - set(_KEYS):
        near = near_matches(key, _KEYS) or _KEYS
        raise ValueError(f"{path.name}: unknown key {key!r}; did you mean {', '.join(near)}?")
    seeds = _read_seeds(path, table.get("seeds", [1]))
    base = resolve_paths(flatten(table.get("base", {})), path.parent)
    rows = _read_rows(path, table.get("row", []), base, known)
    baseline = table.get("baseline")
    if baseline is not None and baseline not in rows:
        raise ValueError(f"{path.name}: baseline {baseline!r} is no row; rows: {', '.join(rows)}")
    return Suite(
        name=_read_name(path, table.get("name", path.stem)),
        cost=str(table.get("cost", "")),
        seeds=seeds,
        baseline=baseline,
        supernodes=_read_supernodes(path, table.get("supernodes", 20)),
        metrics=_read_metrics(path, table.get("metrics", ["accuracy", "accuracy-levels"])),
        rows=rows,
        megabytes=_read_megabytes(path, table.get("megabytes", [])),
        tuning=_read_tuning(path, table.get("tune"), seeds, known, rows),
        runs_dir=Path(str(base.get("runs-dir", known.get("runs-dir", "~/.flexfed/runs")))).expanduser(),
    )


def _read_name(path: Path, name: Any) -> str:
    if not isinstance(name, str) or not _slug(name).strip("."):
        raise ValueError(f"{path.name}: name must be text that can name a folder, got {name!r}")
    return name


def _read_seeds(path: Path, seeds: Any) -> tuple[int, ...]:
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"{path.name}: seeds must be a list of whole numbers >= 0, got {seeds!r}")
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"{path.name}: seeds must be distinct, got {seeds!r}")
    return tuple(seeds)


def _read_metrics(path: Path, metrics: Any) -> tuple[str, ...]:
    if not isinstance(metrics, list) or not metrics or not all(isinstance(name, str) and name for name in metrics):
        raise ValueError(f"{path.name}: metrics must be a list of names, the first of which is judged, got {metrics!r}")
    return tuple(metrics)


def _read_supernodes(path: Path, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{path.name}: supernodes must be a whole number >= 1, got {value!r}")
    return value


def _read_megabytes(path: Path, values: Any) -> tuple[float, ...]:
    wrong = not isinstance(values, list) or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values)
    if wrong or any(value <= 0 for value in values):
        raise ValueError(f"{path.name}: megabytes must be a list of numbers > 0, got {values!r}")
    return tuple(float(value) for value in values)


def _read_rows(
    path: Path, entries: Any, base: Mapping[str, Scalar], known: Mapping[str, Scalar]
) -> dict[str, dict[str, Scalar]]:
    rows: dict[str, dict[str, Scalar]] = {}
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError(f"{path.name}: rows are written [[row]], each with its keys below")
    for entry in entries:
        name = entry.get("name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{path.name}: every [[row]] needs a name, got {dict(entry)}")
        if _slug(name) in map(_slug, rows):
            raise ValueError(f"{path.name}: two rows are called {name!r} or would share a folder")
        own = flatten({key: value for key, value in entry.items() if key != "name"})
        rows[name] = {**base, **resolve_paths(own, path.parent)}
        _check_row(f"{path.name}, row {name!r}", rows[name], known)
    if not rows:
        raise ValueError(f"{path.name} has no [[row]]")
    return rows


def _read_tuning(
    path: Path,
    table: Mapping[str, Any] | None,
    seeds: Sequence[int],
    known: Mapping[str, Scalar],
    rows: Mapping[str, Mapping[str, Scalar]],
) -> Tuning | None:
    tuning = read_tuning(path, table, seeds, known)
    if tuning and all(tuning.key in overrides for overrides in rows.values()):
        raise ValueError(
            f"{path.name}: [tune] is to choose {tuning.key}, but [base] or every row sets it; leave it out there"
        )
    return tuning


def _check_row(where: str, overrides: Mapping[str, Scalar], known: Mapping[str, Scalar]) -> None:
    try:
        check_known(overrides, known)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if "seed" in overrides:
        raise ValueError(f"{where}: the seed comes from `seeds`, not from the row")


def _slug(name: str) -> str:
    """A row's name as a folder's."""
    return re.sub(r"[^\w.=-]+", "-", name).strip("-")


def suite_runs(suite: Suite, known: Mapping[str, Scalar]) -> list[SuiteRun]:
    """Every run of a suite, seed by seed, so that an early stop leaves whole rows of few seeds."""
    return [_suite_run(suite, row, seed, known) for seed in suite.seeds for row in suite.rows]


def _suite_run(
    suite: Suite, row: str, seed: int, known: Mapping[str, Scalar], tried: Mapping[str, Scalar] | None = None
) -> SuiteRun:
    words = [_slug(row), *(_slug(f"{key}={value}") for key, value in (tried or {}).items()), f"seed{seed}"]
    folder = suite.folder / "-".join(words)
    overrides = {**suite.rows[row], **(tried or {}), "seed": seed, "runs-dir": str(folder)}
    value = next(iter((tried or {}).values()), None)
    return SuiteRun(row, seed, folder, overrides, {**known, **overrides}, suite.supernodes, value)


def tuning_runs(suite: Suite, known: Mapping[str, Scalar]) -> list[SuiteRun]:
    """The runs by which rows choose; none where there is nothing to choose."""
    tuning = suite.tuning
    if tuning is None:
        return []
    rows = [row for row, overrides in suite.rows.items() if tuning.key not in overrides]
    return [_suite_run(suite, row, tuning.seed, known, {tuning.key: v}) for v in tuning.values for row in rows]


def tuned(suite: Suite, runs: Iterable[SuiteRun]) -> Suite:
    """The suite whose rows have what they chose by their finished runs; itself where there is nothing to choose.

    Raises:
        ValueError: no finished run has the metric that decides; lists those there are.
    """
    if suite.tuning is None:
        return suite
    tried: dict[str, dict[Scalar, Run]] = {}
    for run in runs:
        own, finished = tried.setdefault(run.row, {}), finished_run(run)
        if finished is not None and run.tried is not None:
            own[run.tried] = finished
    _check_metrics(suite.name, [suite.tuning.metric], [run for own in tried.values() for run in own.values()])
    chosen = {row: suite.tuning.best(own) for row, own in tried.items()}
    own_values = {row: {suite.tuning.key: value} for row, value in chosen.items() if value is not None}
    rows = {row: {**overrides, **own_values.get(row, {})} for row, overrides in suite.rows.items()}
    return replace(suite, rows=rows, tuning=None, notes=(*suite.notes, suite.tuning.note(chosen, tried)))


# --- what is there ------------------------------------------------------------------------------------------


def finished_folder(run: SuiteRun) -> Path | None:
    """The run folder of an earlier, finished run with the same configuration and as many clients.

    A damaged marker or run folder counts as none: the run is done again.
    """
    found = finished_run(run)
    return found.path if found else None


def finished_run(run: SuiteRun) -> Run | None:
    """The run in that folder (`finished_folder`)."""
    try:
        record = json.loads((run.folder / MARKER).read_text(encoding="utf-8"))
        same = same_config(with_defaults(record["config"]), with_defaults(run.config))
        found = load_run(run.folder / record["run"]) if same and record["supernodes"] == run.supernodes else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):  # no marker, or damage
        return None
    return found if found and found.summary else None


def begun_folder(run: SuiteRun) -> Path | None:
    """The newest run folder that this run can go on in, as after a kill; None = it begins anew."""
    from flexfed.resume import open_run

    for path in reversed(find_runs(run.folder)):
        try:
            if resumed_supernodes({"resume": str(path)}) == run.supernodes:
                open_run(str(path), run.config)
                return path
        except (ValueError, OSError):  # of another configuration, or damaged
            continue
    return None


def same_config(recorded: Mapping[str, Scalar], expected: Mapping[str, Scalar]) -> bool:
    """Whether two resolved configurations give the same run.

    Places do not matter, and neither does a knob of another method that only one of them knows: adding a
    method to the project must not throw away every earlier run.
    """
    own = f"{expected.get('strategy')}."
    differing = {key for key in recorded.keys() | expected.keys() if recorded.get(key) != expected.get(key)}
    return all(key in PLACE_KEYS or _is_foreign(key, own, recorded, expected) for key in differing)


def _is_foreign(key: str, own: str, recorded: Mapping[str, Scalar], expected: Mapping[str, Scalar]) -> bool:
    one_sided = (key in recorded) != (key in expected)
    return one_sided and "." in key and not key.startswith(own)


def mark_finished(run: SuiteRun, resumed: Path | None = None) -> None:
    """Note which run folder belongs to this configuration.

    Args:
        run: that has ended.
        resumed: the folder that it went on in; None = it began anew, in what is now the newest folder. Runs of other
            configurations may stand beside it, also newer ones.

    Raises:
        ValueError: the child ended well but left no finished run.
    """
    there = [resumed] if resumed else find_runs(run.folder)
    done = [path for path in there if (path / "summary.json").is_file()]
    if not done:
        raise ValueError(f"no finished run in {run.folder}")
    record = {"config": dict(run.config), "supernodes": run.supernodes, "run": done[-1].name}
    write_atomic(run.folder / MARKER, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())


def suite_comparison(suite: Suite, runs: Iterable[SuiteRun]) -> Comparison:
    """The suite's tables from the runs that are finished.

    Raises:
        ValueError: no finished run has one of the suite's metrics; lists those there are.
    """
    found: dict[str, dict[int, Run]] = {row: {} for row in suite.rows}
    missing = 0
    for run in runs:
        finished = finished_run(run)
        if finished is None:
            missing += 1
        else:
            found[run.row][run.seed] = finished
    if not missing:  # one that failed may be the one that has it
        _check_metrics(suite.name, suite.metrics, [run for by_seed in found.values() for run in by_seed.values()])
    notes = [f"Seeds {', '.join(map(str, suite.seeds))}; {suite.supernodes} devices."]
    notes += [*suite.notes, *([f"Runs still missing: {missing}."] if missing else [])]
    rows = [Row(*item) for item in found.items()]
    notes += notes_on(rows, suite.metrics)
    return Comparison(suite.name, rows, suite.baseline, suite.metrics, notes, suite.megabytes)


def _check_metrics(suite: str, metrics: Sequence[str], runs: Sequence[Run]) -> None:
    known = sorted({name for run in runs for name in (run.summary or {})["last10"]})
    for metric in metrics if runs else ():
        if metric not in known:
            raise ValueError(f"suite {suite}: no finished run has the metric {metric!r}; known: {', '.join(known)}")
