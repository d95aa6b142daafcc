"""What every benchmark here shares: rows of the table, interleaved timing, memory peaks, fresh processes."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from statistics import median
from typing import ParamSpec, TypeVar

import psutil
import torch

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: what was measured.
        measured: the number.
        unit: "x" for ratios, "ms", "s".
        bound: what it may be at most; None where nothing was asked.
        detail: the absolute numbers behind it.
    """

    what: str
    measured: float
    unit: str
    bound: float | None = None
    detail: str = ""

    @property
    def verdict(self) -> str:
        """Is the bound kept? '' without one."""
        if self.bound is None:
            return ""
        return "yes" if self.measured <= self.bound else "NO"


def interleaved(variants: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median processor seconds of each variant.

    The variants take turns, so that a busy moment of the machine meets all of them; one turn before the clock
    starts is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in range(repetitions + 1):
        for name, variant in variants.items():
            gc.collect()
            begin = time.process_time()
            variant()
            if repetition:
                seconds[name].append(time.process_time() - begin)
    return {name: median(values) for name, values in seconds.items()}


@dataclass
class Peak:
    """Resident memory of this process above the start, the highest that was seen."""

    start_bytes: int
    peak_bytes: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    @property
    def above_start(self) -> int:
        """Bytes above the start."""
        return self.peak_bytes - self.start_bytes


@contextmanager
def memory_peak(every_s: float = 0.001) -> Iterator[Peak]:
    """Watch resident memory from a second thread: tracemalloc does not see torch's."""
    gc.collect()
    if sys.platform == "linux":  # memory freed before the start must not be found again unnoticed
        ctypes.CDLL(None).malloc_trim(0)
    process = psutil.Process()
    peak = Peak(process.memory_info().rss)

    def watch() -> None:
        while not peak._stop.wait(every_s):
            peak.peak_bytes = max(peak.peak_bytes, process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        peak._stop.set()
        thread.join()
        peak.peak_bytes = max(peak.peak_bytes, process.memory_info().rss)


def in_child(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a module's function in a fresh process of one torch thread: no caches, memory of its own."""
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return pool.submit(function, *args, **kwargs).result()
