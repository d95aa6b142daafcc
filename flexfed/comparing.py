"""What `flexfed compare` does: say what a suite costs, run what it lacks, show the comparison and write it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flexfed import foresight
from flexfed.compare import Comparison, compare_runs, load_runs
from flexfed.config import Experiment
from flexfed.devices import load_fleet
from flexfed.outputs import write_comparison
from flexfed.overrides import defaults
from flexfed.processes import signals_as_interrupt
from flexfed.suites import (
    Suite,
    SuiteRun,
    finished_folder,
    load_suite,
    suite_comparison,
    suite_runs,
    tuned,
    tuning_runs,
)
from flexfed.tables import to_text
from flexfed.workers import run_missing


def compare_folders(folders: Sequence[str], baseline: str | None) -> Comparison:
    """A comparison of given run folders.

    Raises:
        ValueError: one is no run folder, or unfinished, or two are the same run.
    """
    return compare_runs(load_runs(map(Path, folders)), baseline)


def tell(
    comparison: Comparison, app_dir: Path, targets: Sequence[str], baseline: str | None, place: Path | None
) -> None:
    """Show a comparison, and write its files where there is a place for them.

    Args:
        comparison: of finished runs.
        app_dir: from where on paths are named.
        targets: what was compared, as the command named it.
        baseline: as the command named it.
        place: path of the tables; None = nothing is written.
    """
    typer.echo(to_text(comparison))
    if place:
        written = write_comparison(comparison, _command(targets, baseline, app_dir), place)
        typer.echo("\nwritten: " + ", ".join(map(str, written)))


def read_suite(target: str, baseline: str | None, app_dir: Path) -> Suite:
    """A suite, with another baseline if one is given.

    Raises:
        ValueError: the file is missing, something in it is wrong, or it has no such row.
    """
    suite = load_suite(Path(target), defaults(app_dir))
    if baseline and baseline not in suite.rows:
        raise ValueError(f"{Path(target).name}: baseline {baseline!r} is no row; rows: {', '.join(suite.rows)}")
    return replace(suite, baseline=baseline) if baseline else suite


def compare_suite(suite: Suite, workers: int, app_dir: Path) -> tuple[Comparison, int]:
    """Say what a suite costs, run what it lacks, and compare; also the number of runs that failed.

    Args:
        suite: as it was read.
        workers: runs at the same time.
        app_dir: folder of server_app.py.

    Raises:
        ValueError: a row cannot be run as it is written; nothing has begun then.
    """
    known = defaults(app_dir)
    found = foresight.foresee(suite, known)
    _check_configurations(suite.name, found.missing)
    typer.echo(foresight.to_text(suite.name, found, workers), err=True)
    with signals_as_interrupt():
        if tries := tuning_runs(suite, known):
            with _progress(tries) as on_done:
                run_missing(tries, workers, app_dir, on_done)  # a value with which a run fails is not chosen
        suite = tuned(suite, tries)
        runs = suite_runs(suite, known)
        with _progress(runs) as on_done:
            failed = run_missing(runs, workers, app_dir, on_done)
    return suite_comparison(suite, runs), failed


def _check_configurations(suite: str, runs: Sequence[SuiteRun]) -> None:
    """Refuse an impossible row now, and not when its turn comes after hours."""
    for run in {(run.row, run.tried): run for run in runs}.values():
        try:
            load_fleet(Experiment.read(run.config).settings.fleet)
        except ValueError as error:
            raise ValueError(f"suite {suite}, {run.name}: {error}") from error


@contextmanager
def _progress(runs: Sequence[SuiteRun]) -> Iterator[Callable[[SuiteRun, str | None], None]]:
    """A bar over the runs of a suite; gives what is to be called when one is done."""
    columns = (
        TextColumn("runs"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    there = sum(finished_folder(run) is not None for run in runs)
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("runs", total=len(runs), completed=there)

        def on_done(run: SuiteRun, error: str | None) -> None:
            bar.advance(task)
            if error:
                bar.console.print(f"{run.name} failed: {error}", markup=False, highlight=False)

        yield on_done


def _command(targets: Sequence[str], baseline: str | None, app_dir: Path) -> str:
    """The command line without places of this machine."""
    words = ["flexfed", "compare", *(_portable(target, app_dir) for target in targets)]
    return " ".join(words + (["--baseline", f'"{baseline}"'] if baseline else []))


def _portable(target: str, app_dir: Path) -> str:
    """A path from the app's folder on, else only its name."""
    path = Path(target).resolve()
    return str(path.relative_to(app_dir)) if path.is_relative_to(app_dir) else path.name
