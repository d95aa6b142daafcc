"""Measure a real device: the memory that is free at this moment, training speed, and the node-config that says both.

torch is imported where speed is measured: a job's start asks for the free memory only, before anything heavy is loaded.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import psutil

from flexfed.cgroups import cgroup_headrooms, kernel_text

if TYPE_CHECKING:
    from flexfed.networks import Factory

# What a client has loaded once it works, torch by way of them: it must be there before what is left can be measured.
MODULES = (
    "torchvision",
    "torch_pruning",
    "torch._dynamo",
    "flwr.clientapp",
    "flexfed.methods",
    "flexfed.data",
    "flwr_datasets",
)

# Own limits count what is reserved, not what is touched. Beyond what it touched, training a ResNet-18 reserved 96 to
# 130 MB of address space and 29 to 63 MB of data: the heap and stack of autograd's thread, above all.
RESERVED = {"RLIMIT_AS": 136 << 20, "RLIMIT_DATA": 64 << 20}

Kind = Literal["machine", "cgroup", "process limit"]


class Limit(NamedTuple):
    """Something that bounds a process's memory: what it is, its name, and the bytes it still leaves (may be < 0)."""

    kind: Kind
    name: str
    free_bytes: int


def num_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- memory -------------------------------------------------------------------------------------------------


def free_memory() -> int:
    """Bytes this process can still take at this moment: what the tightest of `memory_limits` leaves, at least 0.

    Raises:
        ValueError: a file of a cgroup holds something other than what Linux writes there.
    """
    return max(0, min(limit.free_bytes for limit in memory_limits()))


def memory_limits() -> tuple[Limit, ...]:
    """All that bounds this process's memory: the machine's available memory, cgroups, the process's own limits."""
    machine = Limit("machine", "available memory", psutil.virtual_memory().available)
    cgroups = (Limit("cgroup", str(folder), free) for folder, free in cgroup_headrooms().items())
    return (machine, *cgroups, *process_limits())


def process_limits() -> tuple[Limit, ...]:
    """What this process's own limits leave to be touched; none where the system has no such limits."""
    if sys.platform == "win32":
        return ()
    import resource

    memory = psutil.Process().memory_info()
    taken = {"RLIMIT_AS": memory.vms, "RLIMIT_DATA": getattr(memory, "data", None)}  # only Linux tells data
    soft = {name: resource.getrlimit(getattr(resource, name))[0] for name in taken}
    return tuple(
        Limit("process limit", name, soft[name] - used - RESERVED[name])
        for name, used in taken.items()
        if used is not None and soft[name] != resource.RLIM_INFINITY
    )


# --- speed --------------------------------------------------------------------------------------------------

_SHAPE, _BATCH, _REPEATS = (3, 32, 32), 16, 3


def training_speed(seconds: float = 1.0, threads: int = 1) -> float:
    """Multiply-accumulates a second while training: a convolution network, batch by batch.

    The median over the batches trained in `seconds`, at least three, after a warm-up. Counted as
    `flexfed.cost.training_macs` counts, so that `modelled_seconds` of a job is about what it takes here: for
    networks of plain convolutions that fill the CPU. Depthwise ones (MobileNet) take about ten times as long for
    each MAC, very small ones twice: no single speed is right for all.

    Args:
        seconds: how long to measure.
        threads: of torch; the number before is restored.

    Raises:
        ValueError: a time or a number of threads that is not positive.
    """
    from flexfed.cost import forward_macs, training_macs
    from flexfed.models import model_factory
    from flexfed.submodel import full
    from flexfed.units import trace_layout

    if not 0 < seconds < 3600:
        raise ValueError(f"seconds of the speed measurement must be > 0 and below an hour, got {seconds}")
    factory = model_factory("cnn", 10, _SHAPE)
    layout = trace_layout(factory, _SHAPE)
    macs = training_macs(forward_macs(factory, layout, full(layout), _SHAPE), _BATCH)
    with _torch_threads(threads):
        return macs / statistics.median(_batch_seconds(factory, seconds))


def _batch_seconds(factory: Factory, seconds: float) -> list[float]:
    """Seconds that each training batch took, of as many as fit."""
    import numpy as np
    import torch

    from flexfed.training import Samples, Training, fit, use_batch_statistics

    # No random numbers: a measurement must not move the generators of the program that asks for it.
    inputs = torch.linspace(-1, 1, _BATCH * int(np.prod(_SHAPE))).reshape(_BATCH, *_SHAPE)
    samples = Samples(inputs, torch.arange(_BATCH) % 10)
    with torch.random.fork_rng(devices=[]):
        model = use_batch_statistics(factory())
    training = Training(local_epochs=1, batch_size=_BATCH)

    def train_batch() -> float:
        begin = time.perf_counter()
        fit(model, samples, training, 1e-6, np.random.default_rng(0))
        return time.perf_counter() - begin

    for _ in range(_REPEATS):
        train_batch()
    end, taken = time.perf_counter() + seconds, [train_batch() for _ in range(_REPEATS)]
    while time.perf_counter() < end:
        taken.append(train_batch())
    return taken


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    import torch

    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- the device ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """What was measured of this device, with everything loaded that a client loads.

    Attributes:
        limits: all that bounds memory, with what each leaves beside the process as it is.
        base_bytes: resident size of the process: Python, torch, the app; no data, no network.
        speed_macs_s: multiply-accumulates a second while training; see `training_speed`.
        threads: of torch, with which the speed was measured.
        hardware: the board's name, else the CPU's.
        cores: CPUs this process may use.
        seconds: the measurement took.
    """

    limits: tuple[Limit, ...]
    base_bytes: int
    speed_macs_s: float
    threads: int
    hardware: str
    cores: int
    seconds: float

    @property
    def binding(self) -> Limit:
        """The limit that leaves least."""
        return min(self.limits, key=lambda limit: limit.free_bytes)

    @property
    def memory_bytes(self) -> int:
        """Free for training, beyond the base."""
        return max(0, self.binding.free_bytes)

    def node_config(
        self, partition: int = 0, num_partitions: int = 1, kind: str | None = None, link_bytes_s: float | None = None
    ) -> str:
        """What to give `flower-supernode --node-config` in single quotes; `flexfed.devices.declared` reads it.

        Three digits of each number, memory rounded down.

        Args:
            partition: which share of the data this client has, 0..num_partitions - 1.
            num_partitions: number of clients.
            kind: name of its class; by default what was measured.
            link_bytes_s: bytes a second to and from the server; left out when None.

        Raises:
            ValueError: an impossible value, or no memory is free.
        """
        check_declared(partition, num_partitions, kind, link_bytes_s)
        if not self.memory_bytes:
            raise ValueError(f"no memory is free for training: {self.binding.name} leaves none; free some, or raise it")
        words = {
            "partition-id": str(partition),
            "num-partitions": str(num_partitions),
            "memory-bytes": three_digits(self.memory_bytes, ROUND_DOWN),
            "measure-memory": "true",
            "speed-macs-s": three_digits(self.speed_macs_s),
            "link-bytes-s": three_digits(link_bytes_s) if link_bytes_s is not None else "",
            "kind": f'"{_printable(self.hardware) if kind is None else kind}"',
        }
        return " ".join(f"{key}={word}" for key, word in words.items() if word)


def three_digits(value: float, rounding: str = ROUND_HALF_EVEN) -> str:
    """A positive number with three digits, in TOML's and Python's notation of floats: 23612345678 is 2.36e10."""
    exact = Decimal(value)
    mantissa = exact.scaleb(-exact.adjusted()).quantize(Decimal("0.01"), rounding)
    return f"{float(mantissa):g}e{exact.adjusted()}"


def check_declared(partition: int, num_partitions: int, kind: str | None, link_bytes_s: float | None) -> None:
    """Refuse what a node-config cannot say; before the measurement, which takes its time.

    Raises:
        ValueError: no such partition, a link without bandwidth, or a kind with a quote, a backslash or a control
            character, for which Flower's `--node-config` has no escape.
    """
    if not 0 <= partition < num_partitions:
        raise ValueError(f"partition-id must be in 0..num-partitions - 1, got {partition} of {num_partitions}")
    if link_bytes_s is not None and not 0 < link_bytes_s < float("inf"):
        raise ValueError(f"link-bytes-s must be > 0, got {link_bytes_s}")
    if kind is not None and kind != _printable(kind):
        raise ValueError(f"kind may hold no quote, backslash or control character, got {kind!r}; choose another name")


def _printable(text: str) -> str:
    return "".join(c for c in text if c.isprintable() and c not in "'\"\\")


def measure_device(seconds: float = 1.0, threads: int = 1) -> Measurement:
    """Load what a client loads, see what memory that leaves, then measure the speed.

    Meant for a process of its own, as a client is: what else it holds counts as base.

    Args:
        seconds: how long to measure the speed.
        threads: of torch; the run's `torch-threads`.

    Raises:
        ValueError: see `training_speed` and `free_memory`.
    """
    begin = time.perf_counter()
    for name in MODULES:
        importlib.import_module(name)
    base, limits = psutil.Process().memory_info().rss, memory_limits()  # before the speed: it leaves its scratch behind
    speed = training_speed(seconds, threads)
    return Measurement(limits, base, speed, threads, hardware_name(), num_cpus(), time.perf_counter() - begin)


def hardware_name(root: Path = Path("/")) -> str:
    """The board's name where the firmware tells it (Raspberry Pi, Jetson), else the CPU's, else its architecture."""
    board = (kernel_text(root / "proc/device-tree/model") or "").strip("\0 \n")
    cpu = re.search(r"^model name\s*:\s*(.+)$", kernel_text(root / "proc/cpuinfo") or "", re.MULTILINE)
    return board or (cpu[1].strip() if cpu else "") or platform.processor() or platform.machine() or "device"
