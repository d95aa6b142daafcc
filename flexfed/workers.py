"""Run what a suite lacks, each run in a child process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from flexfed.runs import write_atomic
from flexfed.suites import SuiteRun, begun_folder, finished_folder, mark_finished

_TAIL = 15


class RunFailed(RuntimeError):
    """A child process of a suite failed; the text holds the end of its log."""


def child_command(run: SuiteRun) -> list[str]:
    """How one run is started: in process, which gives the same numbers as Flower, sooner."""
    config = ["-c", str(run.folder / "overrides.toml")]
    nodes = ["--supernodes", str(run.supernodes)]
    return [sys.executable, "-m", "flexfed.cli", "run", "--in-process", *nodes, *config]


def run_missing(
    runs: Sequence[SuiteRun], workers: int, app_dir: Path, on_done: Callable[[SuiteRun, str | None], None]
) -> int:
    """Run what is not finished, `workers` at a time; a failure does not stop the others.

    What was begun and killed goes on from its last checkpoint.

    Args:
        runs: all of the suite, or some.
        workers: child processes at a time, one thread each.
        app_dir: folder of server_app.py.
        on_done: called after each missing run, with the reason if it failed.

    Returns:
        how many failed.
    """
    children = _Children()
    pool = ThreadPoolExecutor(workers)
    todo = [run for run in runs if finished_folder(run) is None]
    futures: dict[Future[None], SuiteRun] = {pool.submit(_run_one, run, app_dir, children): run for run in todo}
    failed = 0
    try:
        for future in as_completed(futures):
            error = future.exception()
            failed += error is not None
            on_done(futures[future], str(error) if error else None)
    finally:
        children.stop()  # nothing is left to stop, unless Ctrl-C brought us here
        pool.shutdown(wait=True, cancel_futures=True)
    return failed


class _Children:
    """The child processes that run now; after `stop` there are none, and none begins."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, start: Callable[[], subprocess.Popen[bytes]]) -> int:
        """Start a child and wait for it; its exit code."""
        with self._lock:
            if self._stopped:
                raise RunFailed("stopped")
            child = start()
            self._live.add(child)
        code = child.wait()
        with self._lock:
            self._live.discard(child)
        return code

    def stop(self) -> None:
        """End all children."""
        with self._lock:
            self._stopped = True
            for child in self._live:
                child.terminate()


def _run_one(run: SuiteRun, app_dir: Path, children: _Children) -> None:
    import tomli_w

    run.folder.mkdir(parents=True, exist_ok=True)
    log = run.folder / "log.txt"
    with _claimed(run.folder) as claim:
        begun = begun_folder(run)
        overrides = {**run.overrides, **({"resume": str(begun)} if begun else {})}
        write_atomic(run.folder / "overrides.toml", tomli_w.dumps(overrides).encode())
        with log.open("ab" if begun else "wb") as file:
            code = children.run(lambda: _start(run, app_dir, file, claim))
        if not code:
            return mark_finished(run)
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
    raise RunFailed("\n".join([f"exit code {code}; {log} ends with:", *tail]))


@contextmanager
def _claimed(folder: Path) -> Iterator[int]:
    """Hold a run's lock; gives its file descriptor, for the child to hold it, too.

    Whoever is killed leaves a child that works on: it is not to be joined by a second one.

    Raises:
        RunFailed: somebody else holds it.
    """
    import fcntl

    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFailed(f"another process is at work in {folder}: wait until it has ended, or end it") from None
        yield file.fileno()


def _start(run: SuiteRun, app_dir: Path, log: IO[bytes], claim: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        child_command(run), cwd=app_dir, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True, pass_fds=(claim,),
    )  # fmt: skip
