"""Training memory, predicted and seen: `python -m benchmarks.memory`.

Predicted: `flexfed.cost.training_memory`. Profiler: the peak of torch's own allocations. Growth: what the system
gives a fresh process that has loaded everything and received its part, from then until the update is ready.
Budget: what `flexfed.cost.memory_budget` asks to be free. Prints the table and writes it to results/memory.md.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import in_child
from benchmarks.speed import ONE_THREAD, machine
from flexfed.cost import BUDGET_BYTES, BUDGET_FACTOR, memory_budget, num_parameters, training_memory
from flexfed.devices import Device
from flexfed.jobs import Job, Task, make_update, train_network
from flexfed.models import model_factory
from flexfed.select import prefix_ratio
from flexfed.submodel import Submodel, narrow_shapes
from flexfed.training import Samples, Training, fit
from flexfed.units import trace_layout

NUM_BATCHES = 3
RATIOS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
RESULTS = Path(__file__).resolve().parent / "results" / "memory.md"
PROC = Path("/proc/self")


SGD = Training(local_epochs=1)
ADAM = Training(local_epochs=1, optimizer="adam")
LARGE = Training(local_epochs=1, batch_size=32)


@dataclass(frozen=True)
class Case:
    """A network, the part of it and how it is trained."""

    model: str
    side: int
    ratio: float
    channels: int = 3
    training: Training = SGD

    @property
    def name(self) -> str:
        """As the table has it."""
        optimizer = ", Adam" if self.training.optimizer == "adam" else ""
        return f"{self.model}, {self.side}x{self.side}, batch {self.training.batch_size}{optimizer}"

    def task(self) -> Task:
        """The network, traced."""
        return _task(self.model, (self.channels, self.side, self.side), self.training)

    def submodel(self, task: Task) -> Submodel:
        """The part."""
        return prefix_ratio(task.layout, self.ratio)


@lru_cache(maxsize=8)
def _task(model: str, shape: tuple[int, ...], training: Training) -> Task:
    factory = model_factory(model, 10, shape)
    return Task(factory, trace_layout(factory, shape), shape, 10, training, None)


CASES = (
    *(Case(model, 64, ratio) for model in ("resnet18", "mobilenet_v2") for ratio in RATIOS),
    *(Case("resnet18", 96, ratio, training=LARGE) for ratio in (1.0, 1 / 4)),
    *(Case("flexfl-vgg16", 32, ratio) for ratio in (1.0, 1 / 4)),
    *(Case("heterofl-resnet18", 32, ratio, training=ADAM) for ratio in (1.0, 1 / 4)),
    Case("fedlps-cnn", 28, 1.0, channels=1),
)


@dataclass(frozen=True)
class Measured:
    """Bytes of one case."""

    parameters: int
    predicted: int
    profiler: int
    growth: int


def job_of(task: Task, submodel: Submodel) -> tuple[Job, Samples]:
    """A part as a client has received it, and three batches of noise."""
    rng = np.random.default_rng(0)
    shapes = narrow_shapes(task.layout, submodel)
    arrays = {name: np.asarray(0.05 * rng.standard_normal(s), dtype=np.float32) for name, s in shapes.items()}
    num = NUM_BATCHES * task.training.batch_size
    samples = Samples(torch.randn(num, *task.input_shape), torch.randint(task.num_classes, (num,)))
    return Job(submodel, arrays, Device(0), {}, seed=0, server_round=1), samples


def profiled_peak(task: Task, submodel: Submodel) -> int:
    """The most bytes that torch had allocated at once while training, by its profiler; the weights included."""
    job, samples = job_of(task, submodel)
    model = task.network(job.arrays)

    def train() -> None:
        copied = copy.deepcopy(model)  # narrow's tensors are numpy's, which torch does not see
        fit(copied, samples, task.training, 0.01, np.random.default_rng(0))

    return allocated_peak(train)


def allocated_peak(work: Callable[[], object]) -> int:
    """The most bytes that torch has allocated at once during some work, by its profiler."""
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda event: event["ts"])
    return int(np.cumsum([event["args"]["Bytes"] for event in memory]).max())


def resident_growths(cases: Sequence[Case]) -> list[int]:
    """For each case, how far the process's resident memory rose above where it stood with the part in hand.

    Call it in a fresh process: what is trained first also pays for the kernels that are then loaded.
    """
    return [_growth(case) for case in cases]


def _growth(case: Case) -> int:
    task = case.task()
    submodel = case.submodel(task)
    job, samples = job_of(task, submodel)
    task.memory_to_train(submodel), task.macs(submodel)  # a client asks before it looks at what is free

    def train() -> None:
        trained = train_network(task.network(job.arrays), job, task, samples)
        make_update(job, task, submodel, job.arrays, trained, 1.0)

    return growth_of(train)


def growth_of(work: Callable[[], object]) -> int:
    """How far this process's resident memory rises during some work above where it stood before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory freed before must not be found again unnoticed
    (PROC / "clear_refs").write_text("5")  # forget the highest so far
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = (PROC / "status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def can_measure_growth() -> bool:
    """Linux lets a process ask for the highest its memory has been."""
    return sys.platform == "linux" and os.access(PROC / "clear_refs", os.W_OK)


def measure(case: Case) -> Measured:
    """One row; called in a process of its own."""
    (growth,) = resident_growths([case])  # first, while nothing has been trained in this process
    task = case.task()
    part = case.submodel(task)
    predicted = training_memory(task.factory, task.layout, part, task.input_shape, task.training)
    return Measured(num_parameters(task.layout, part), predicted, profiled_peak(task, part), growth)


def row(case: Case, found: Measured) -> list[str]:
    """A row's cells."""
    budget = memory_budget(found.predicted)
    sizes = [f"{size / 1e6:.1f}" for size in (found.predicted, found.profiler, found.growth, budget)]
    quotients = [f"{found.predicted / found.profiler:.2f}", f"{budget / found.growth:.2f}"]
    part = [case.name, f"{case.ratio:g}", f"{found.parameters:,}"]
    return [*part, sizes[0], sizes[1], quotients[0], sizes[2], sizes[3], quotients[1]]


HEADS = ("network", "ratio", "parameters", "predicted", "profiler", "p / p", "growth", "budget", "b / g")


def table(rows: Sequence[Sequence[str]], heads: Sequence[str] = HEADS) -> list[str]:
    """Lines of a Markdown table, columns aligned."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |" for cells in (heads, *rows)
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def report(measured: dict[Case, Measured]) -> str:
    """The page of results."""
    ratios = [found.predicted / found.profiler for found in measured.values()]
    kept = sum(found.growth <= memory_budget(found.predicted) for found in measured.values())
    rule = f"{BUDGET_FACTOR:g} x predicted + {BUDGET_BYTES / 1e6:g} MB"
    lines = [
        "# Training memory",
        "",
        "Written by `python -m benchmarks.memory`; `benchmarks/README.md` says how to read it. Sizes in MB (10^6).",
        "",
        f"{machine()} {psutil.virtual_memory().total / 1e9:.0f} GB of memory.",
        "",
        *table([row(case, found) for case, found in measured.items()]),
        "",
        f"Predicted over profiler: {min(ratios):.2f} to {max(ratios):.2f}. The budget, {rule}, covers the growth in "
        f"{kept} of {len(measured)} cases.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__).parse_args()
    if not can_measure_growth():
        raise SystemExit("the growth of a process can be measured on Linux only: /proc/self/clear_refs is missing")
    os.environ.update(ONE_THREAD)
    text = report({case: in_child(measure, case) for case in CASES})
    print(text)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text)


if __name__ == "__main__":
    main()
