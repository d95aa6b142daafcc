"""Run what a suite lacks, each run in a child process of its own."""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from flexfed.runs import write_atomic
from flexfed.suites import SuiteRun, begun_folder, finished_folder, mark_finished

log = logging.getLogger("flwr")

_TAIL = 15
_LOOK_S = 0.5  # between two looks at a run that another process is at


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

    What was begun and killed goes on from its last checkpoint. Where another process is at work on a run, such as the
    child of a comparison that was killed, its end is waited for.

    Args:
        runs: all of the suite, or some.
        workers: child processes at a time, one thread each.
        app_dir: folder of server_app.py.
        on_done: called after each missing run, with the reason if it failed.

    Returns:
        how many failed.
    """
    todo = [run for run in runs if finished_folder(run) is None]
    children = _Children(_places(todo, workers))
    pool = ThreadPoolExecutor(workers)
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


def _places(runs: Sequence[SuiteRun], workers: int) -> list[str | None]:
    """The GPU that each worker's children see, the first of them again after the last; None = what this process sees.

    Several children share a GPU: each takes the memory that it needs.
    """
    names = {str(run.config.get("torch-device", "cpu")) for run in runs}
    if not names & {"auto", "cuda"}:  # on the CPU, or on a GPU that the suite names
        return [None] * workers
    gpus = visible_gpus()
    return [gpus[i % len(gpus)] if len(gpus) > 1 else None for i in range(workers)]


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process sees, as CUDA_VISIBLE_DEVICES has them."""
    import torch

    num, told = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    named = [name.strip() for name in told.split(",")] if told is not None else [str(i) for i in range(num)]
    return named[:num]


class _Children:
    """The child processes that run now; after `stop` there are none, and none begins.

    Args:
        places: one for each that may run at the same time: the GPU that it sees, None = all.
    """

    def __init__(self, places: Sequence[str | None]) -> None:
        self._free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for place in places:
            self._free.put(place)
        self._lock = threading.Lock()
        self._live: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, start: Callable[[str | None], subprocess.Popen[bytes]]) -> int:
        """Start a child on a free place and wait for it; its exit code."""
        place = self._free.get()
        try:
            return self._run(lambda: start(place))
        finally:
            self._free.put(place)

    def _run(self, start: Callable[[], subprocess.Popen[bytes]]) -> int:
        with self._lock:
            if self._stopped:
                raise RunFailed("stopped")
            child = start()
            self._live.add(child)
        code = child.wait()
        with self._lock:
            self._live.discard(child)
        return code

    @property
    def is_stopped(self) -> bool:
        """Whether none may begin any more."""
        return self._stopped

    def stop(self) -> None:
        """End all children."""
        with self._lock:
            self._stopped = True
            for child in self._live:
                child.terminate()


def _run_one(run: SuiteRun, app_dir: Path, children: _Children) -> None:
    import tomli_w

    run.folder.mkdir(parents=True, exist_ok=True)
    text = run.folder / "log.txt"
    with _claimed(run, children) as claim:
        if finished_folder(run):  # by whoever was at work here
            return
        begun = begun_folder(run)
        overrides = {**run.overrides, **({"resume": str(begun)} if begun else {})}
        write_atomic(run.folder / "overrides.toml", tomli_w.dumps(overrides).encode())
        with text.open("ab" if begun else "wb") as file:
            code = children.run(lambda gpu: _start(run, app_dir, file, claim, gpu))
        if not code:
            return mark_finished(run, begun)
    tail = text.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
    raise RunFailed("\n".join([f"exit code {code}; {text} ends with:", *tail]))


@contextmanager
def _claimed(run: SuiteRun, children: _Children) -> Iterator[int]:
    """Hold a run's lock, once nobody else does; gives its file descriptor, for the child to hold it, too.

    A comparison that is killed leaves children that work on. None is to be joined by a second one; and were its run
    taken for a failed one, a row would choose its value without it.

    Raises:
        RunFailed: we were stopped while somebody else held it.
    """
    with (run.folder / "lock").open("w") as file:
        if not _lock(file):
            log.warning("%s: waiting for another process that is at work in %s", run.name, run.folder)
            while not _lock(file):
                if children.is_stopped:
                    raise RunFailed("stopped")
                time.sleep(_LOOK_S)
        yield file.fileno()


def _lock(file: IO[str]) -> bool:
    """Try to lock a file; whether that went well."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _start(run: SuiteRun, app_dir: Path, log: IO[bytes], claim: int, gpu: str | None = None) -> subprocess.Popen[bytes]:
    seen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    return subprocess.Popen(
        child_command(run), cwd=app_dir, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **seen}, start_new_session=True, pass_fds=(claim,),
    )  # fmt: skip
