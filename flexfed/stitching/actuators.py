"""Setting clock frequencies, and reading joules, where a machine lets us; recording what was asked for elsewhere."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from flexfed.cgroups import kernel_text
from flexfed.stitching.dvfs import Level

log = logging.getLogger("flwr")

STEPS = 8  # of a clock of which only the ends are known; ours


class FrequencyActuator(Protocol):
    """Whatever sets a device's clocks.

    Attributes:
        clock_ghz: frequencies that it can set; empty = it sets none, and whatever is asked for is recorded.
    """

    clock_ghz: tuple[float, ...]

    def apply(self, level: Level) -> None:
        """Set the clocks."""

    def close(self) -> None:
        """Leave them as they were found."""


class Recorder:
    """Sets nothing: for simulated devices.

    Attributes:
        applied: every level that was asked for.
    """

    def __init__(self) -> None:
        self.clock_ghz: tuple[float, ...] = ()
        self.applied: list[Level] = []

    def apply(self, level: Level) -> None:
        """Note the level."""
        self.applied.append(level)

    def close(self) -> None:
        """There is nothing to restore."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _Clock:
    """Cores of a machine that share a clock, as Linux shows it: kHz, which may be set within [low, high]."""

    cap: Path
    before: str
    available: tuple[int, ...]

    def nearest(self, khz: float) -> int:
        """The slowest frequency that is fast enough, else the fastest."""
        return min((f for f in self.available if f >= khz - 0.5), default=self.available[-1])


class Cpufreq(Recorder):
    """Caps the CPU's clocks through Linux's cpufreq files, and puts back what it found there.

    It writes `scaling_max_freq` of every clock, never above what stands there at the start. Where a file is missing
    or may not be written, it sets nothing and is a recorder; one line of the log says why. A process that is killed
    leaves its last cap behind. For one client a machine: a second one would take the first one's cap for the
    machine's own.

    Args:
        root: where Linux shows the CPUs.
    """

    def __init__(self, root: Path = Path("/sys/devices/system/cpu")):
        super().__init__()
        self._clocks: tuple[_Clock, ...] = ()
        try:
            found = _clocks(root)
            for clock in found:
                clock.cap.write_text(clock.before, encoding="ascii")  # may we?
        except (OSError, ValueError) as error:
            self._give_up(error)
            return
        self._clocks = found
        self.clock_ghz = tuple(khz / 1e6 for khz in max((c.available for c in found), key=lambda khz: khz[-1]))

    def apply(self, level: Level) -> None:
        """Cap every clock at the slowest frequency that is not below the level's CPU frequency."""
        super().apply(level)
        try:
            for clock in self._clocks:
                clock.cap.write_text(str(clock.nearest(1e6 * level.cpu_ghz)), encoding="ascii")
        except OSError as error:
            self.close()
            self._give_up(error)

    def close(self) -> None:
        """Put back every cap, even where another one cannot be; then set nothing more."""
        clocks, self._clocks = self._clocks, ()
        for clock in clocks:
            try:
                clock.cap.write_text(clock.before, encoding="ascii")
            except OSError as error:
                log.warning("%s could not be put back to %s: %s", clock.cap, clock.before, error)

    def _give_up(self, error: Exception) -> None:
        log.warning("frequencies are recorded, not set: %s", error)


def _clocks(root: Path) -> tuple[_Clock, ...]:
    """The machine's clocks; cores that share one show the same folder."""
    folders = sorted({path.resolve() for path in root.glob("cpu[0-9]*/cpufreq")})
    if not folders:
        raise ValueError(f"{root} has no cpu*/cpufreq: this kernel shows no clocks, as in most virtual machines")
    return tuple(_clock(folder) for folder in folders)


def _clock(folder: Path) -> _Clock:
    cap = folder / "scaling_max_freq"
    low, high = _number(folder / "scaling_min_freq"), _number(cap)
    listed = (kernel_text(folder / "scaling_available_frequencies") or "").split()
    khz = {int(word) for word in listed} or {low + (high - low) * step // (STEPS - 1) for step in range(STEPS)}
    allowed = tuple(sorted(f for f in khz if low <= f <= high)) or (high,)
    return _Clock(cap, str(high), allowed)


def _number(path: Path) -> int:
    text = path.read_text(encoding="ascii").strip()
    if not text.isdecimal():
        raise ValueError(f"{path} should hold a number, got {text[:40]!r}")
    return int(text)


ACTUATORS: dict[str, type[Recorder]] = {"record": Recorder, "cpufreq": Cpufreq}


def open_actuator(name: str) -> Recorder:
    """An actuator by name, to be closed: "record", or "cpufreq" for this machine's clocks.

    Raises:
        ValueError: an unknown name.
    """
    if name not in ACTUATORS:
        raise ValueError(f"unknown actuator {name!r}; known: {', '.join(ACTUATORS)}")
    return ACTUATORS[name]()


class Rapl:
    """Joules that this machine's processors drew, all programs together, by the counters of Intel and AMD.

    Args:
        root: where Linux shows them; kernels let only root read them.
    """

    def __init__(self, root: Path = Path("/sys/class/powercap")):
        # A package is shown a second time under intel-rapl-mmio, and its parts (core, dram) in folders of their own.
        packages = sorted(root.glob("intel-rapl:*"))
        self._folders = tuple(f for f in packages if (kernel_text(f / "name") or "").startswith("package"))
        self._before = self._read()

    def joules(self) -> float | None:
        """Since the last call, or since this object was made; None where there is no counter that can be read.

        A counter starts anew at `max_energy_range_uj`, minutes or hours apart: ask more often than that.
        """
        before, self._before = self._before, self._read()
        if before is None or self._before is None:
            return None
        return sum(_drawn(*counters) for counters in zip(before, self._before, strict=True)) / 1e6

    def _read(self) -> tuple[tuple[int, int], ...] | None:
        """(microjoules, where the counter starts anew) of each package."""
        try:
            names = ("energy_uj", "max_energy_range_uj")
            counters = tuple((_number(f / names[0]), _number(f / names[1])) for f in self._folders)
        except (OSError, ValueError):
            return None
        return counters or None


def _drawn(before: tuple[int, int], after: tuple[int, int]) -> int:
    """Microjoules between two readings, of (counter, its range)."""
    passed = after[0] - before[0]
    return passed if passed >= 0 else passed + after[1]
