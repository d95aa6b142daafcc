"""End processes for certain, found by a mark in their environment; and be ended without leaving any."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_GENTLE_S = 8.0  # Ray's own shutdown takes a second or two
_FORCED_S = 5.0


def marked_processes(mark: str) -> set[int]:
    """Ids of our running processes that were started with `mark` ("NAME=value") in their environment.

    The mark finds also those whose parent is gone, as Ray's agents are, and nobody else's.
    """
    proc = Path("/proc")
    found = _from_proc(proc, mark) if (proc / "self" / "environ").exists() else _from_ps(mark)
    return found - {os.getpid()}


def _from_proc(proc: Path, mark: str) -> set[int]:
    found = set()
    for folder in proc.iterdir():
        if folder.name.isdigit():
            # Gone meanwhile, or somebody else's. A zombie's environment reads as empty, so it does not count.
            with contextlib.suppress(OSError):
                if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.add(int(folder.name))
    return found


def _from_ps(mark: str) -> set[int]:
    """For systems without /proc, such as macOS, whose ps shows the environment behind the command."""
    listing = subprocess.run(["ps", "-axwwE", "-o", "pid=,command="], capture_output=True, text=True, check=True)
    rows = (line.split(maxsplit=1) for line in listing.stdout.splitlines())
    return {int(row[0]) for row in rows if len(row) == 2 and mark in row[1].split(" ")}


def stop_processes(mark: str, gentle_s: float = _GENTLE_S) -> None:
    """End every marked process: ask first, force what stays after `gentle_s`, wait until all are gone.

    Raises:
        RuntimeError: some are still there; names their ids.
    """
    for number, patience in ((signal.SIGTERM, gentle_s), (signal.SIGKILL, _FORCED_S)):
        deadline = time.monotonic() + patience
        told: set[int] = set()
        while left := marked_processes(mark):
            for pid in left - told:  # also what was started since the last look
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
            told |= left
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            return
    if left := marked_processes(mark):
        raise RuntimeError(f"could not end processes {sorted(left)}, started with {mark}")


# --- signals ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """Let a request to end (a time limit, a closed terminal) stop the run like Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    with _handlers(dict.fromkeys(("SIGTERM", "SIGHUP"), interrupt)):
        yield


@contextlib.contextmanager
def ignore_interrupts() -> Iterator[None]:
    """A second Ctrl-C must not leave half of Flower running."""
    with _handlers(dict.fromkeys(("SIGINT", "SIGTERM", "SIGHUP"), signal.SIG_IGN)):
        yield


@contextlib.contextmanager
def _handlers(handlers: Mapping[str, Any]) -> Iterator[None]:
    """Set signal handlers for a while; outside the main thread Python allows none, and nothing is done."""
    numbers = {getattr(signal, name): handler for name, handler in handlers.items() if hasattr(signal, name)}
    try:
        before = {number: signal.signal(number, handler) for number, handler in numbers.items()}
    except ValueError:
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
