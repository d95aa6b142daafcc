"""What is left of a suite, said before it starts: runs, rounds, client updates; of what has run before, time and work.

Nothing is guessed: seconds and multiply-adds are those of finished runs of the same row, on whatever machine they ran;
of rows that never finished a run only what the suite's author says of the whole is known, and that is said.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexfed.overrides import Scalar
from flexfed.report import cost, duration
from flexfed.runs import Run
from flexfed.suites import Suite, SuiteRun, finished_run, suite_runs, tuned, tuning_runs

_MOST_NAMES = 6


@dataclass(frozen=True)
class Foresight:
    """What is left to run.

    Attributes:
        num_runs: of the suite, tries not counted.
        num_tries: runs by which rows choose a value for themselves.
        missing: runs of either kind without a finished folder.
        finished: row -> its finished runs, of either kind.
        stated: cost of the whole suite, as its author says; "" = not said.
    """

    num_runs: int
    num_tries: int
    missing: Sequence[SuiteRun]
    finished: Mapping[str, Sequence[Run]]
    stated: str = ""

    def known(self, total: str) -> tuple[float, int]:
        """The sum of a total of summary.json over the missing runs whose rows have it, and how many runs these are."""
        means = {row: _mean(runs, total) for row, runs in self.finished.items()}
        values = [mean for run in self.missing if (mean := means.get(run.row)) is not None]
        return sum(values), len(values)

    @property
    def unknown_rows(self) -> list[str]:
        """Rows to run that never finished a run."""
        return list(dict.fromkeys(run.row for run in self.missing if run.row not in self.finished))


def _mean(runs: Iterable[Run], total: str) -> float | None:
    found = [float(run.summary[total]) for run in runs if run.summary and run.summary.get(total) is not None]
    return statistics.fmean(found) if found else None


def foresee(suite: Suite, known: Mapping[str, Scalar]) -> Foresight:
    """Look at what is there, and run nothing.

    Args:
        suite: as it was read.
        known: every configuration key with its default.
    """
    tries = tuning_runs(suite, known)
    tried = [(run, finished_run(run)) for run in tries]
    if all(found for _, found in tried):
        suite = tuned(suite, tries)  # only now is it known which runs there will be
    runs = suite_runs(suite, known)
    missing, finished = [], dict[str, list[Run]]()
    for run, found in [*tried, *((run, finished_run(run)) for run in runs)]:
        if found:
            finished.setdefault(run.row, []).append(found)
        else:
            missing.append(run)
    return Foresight(len(runs), len(tries), missing, finished, suite.cost)


def to_text(name: str, found: Foresight, workers: int) -> str:
    """Some lines for the reader, before anything starts.

    Args:
        name: of the suite.
        found: what is left of it.
        workers: runs at the same time.
    """
    left = len(found.missing)
    done = found.num_runs + found.num_tries - left
    choosing = f" and {found.num_tries} by which rows choose a value" if found.num_tries else ""
    head = f"suite {name}: {found.num_runs} runs{choosing}; {done} are finished, {left} are left"
    return "\n".join([head, *_work(found.missing), *_of_finished(found, workers)]) if left else head


def _work(missing: Sequence[SuiteRun]) -> list[str]:
    """What the configurations tell; runs may end early, and cohorts be smaller."""
    rounds = updates = epochs = 0
    for run in missing:
        config: Mapping[str, Any] = run.config
        cohort = max(config["min-replies"], int(config["fraction-train"] * run.supernodes + 1e-9))
        rounds += config["num-server-rounds"]
        updates += config["num-server-rounds"] * cohort
        epochs += config["num-server-rounds"] * cohort * config["local-epochs"]
    return [f"at most {rounds:,} rounds, in which clients train {updates:,} times, {epochs:,} local epochs in all"]


def _of_finished(found: Foresight, workers: int) -> list[str]:
    """What earlier runs of the same rows took, for those that are left."""
    (seconds, timed), (macs, counted) = found.known("wall-seconds"), found.known("macs")
    told = []
    if timed:
        together = min(workers, timed)
        pace = f", about {duration(seconds / together)} {together} at a time" if together > 1 else ""
        told.append(f"{_share(timed, found)} {duration(seconds)} one after the other{pace}")
    if counted:
        told.append(f"{_share(counted, found)} {cost('macs', macs)} multiply-adds")
    if rows := found.unknown_rows:
        told += [f"the whole suite, its author says: {found.stated}"] if found.stated else []
        names = ", ".join(rows[:_MOST_NAMES]) + (", ..." if len(rows) > _MOST_NAMES else "")
        told.append(f"of {len(rows)} rows nothing is known, none of their runs has finished: {names}")
    return told


def _share(num: int, found: Foresight) -> str:
    which = "all of them" if num == len(found.missing) else f"{num} of them"
    return f"{which}, by finished runs of the same rows:"
