"""Modelled latency and energy of a client's forward passes, and the frequencies that meet a deadline at least energy.

FedStitch (see `flexfed.stitching.dvfs`) has each client choose its frequencies by feedback, for the least energy
within the server's deadline. Its models and its solver could not be read: the models, the exhaustive search, the
correction and the rule of the deadline are choices of ours, the last one after SmartPC (RTSS 2019).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np

from flexfed.stitching.actuators import FrequencyActuator, Rapl, Recorder
from flexfed.stitching.clocks import Clock, ModelledClock
from flexfed.stitching.dvfs import Bill, Dvfs, Work, bill

HAIR = 1e-9  # seconds; sums of a phase's batches are rounded


@dataclass(frozen=True)
class EnergyConfig:
    """How frequencies are chosen; all of it is our choice.

    Attributes:
        policy: choose them ("on"), or always the fastest ("max"), the ablation.
        window: energy counts while the device works ("busy"), or until the deadline, idling included.
        idle_watts: of idling; only with window "deadline".
        gain: a, weight of the last batch in the correction, in (0, 1].
        overhead_s: T_0, seconds of a phase that no frequency shortens.
        cycles_per_image: c_pre, CPU cycles that prepare one image for one forward pass: a few a number of 32x32x3.
    """

    policy: Literal["on", "max"] = "on"
    window: Literal["busy", "deadline"] = "busy"
    idle_watts: float = 0.5
    gain: float = 0.5
    overhead_s: float = 0.0
    cycles_per_image: float = 1e4

    def __post_init__(self) -> None:
        for name, known in (("policy", ("on", "max")), ("window", ("busy", "deadline"))):
            if getattr(self, name) not in known:
                raise ValueError(f"energy {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("idle_watts", "overhead_s", "cycles_per_image"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"energy {name.replace('_', '-')} must be >= 0, got {getattr(self, name)}")
        if not 0 < self.gain <= 1:
            raise ValueError(f"energy gain must lie in (0, 1], got {self.gain}")


DEFAULTS = EnergyConfig()


class Choice(NamedTuple):
    """A level's number, what it costs, and whether it meets the deadline."""

    level: int
    seconds: float
    joules: float
    feasible: bool


def work_of(dvfs: Dvfs, images: int, macs: int, config: EnergyConfig = DEFAULTS) -> Work:
    """W_c = images * c_pre and W_g = macs / (macs per cycle).

    Args:
        dvfs: the device's table.
        images: that are prepared, each as often as it goes through the network.
        macs: of all forward passes.
        config: T_0 and c_pre.
    """
    return Work(images * config.cycles_per_image / 1e9, macs / (1e9 * dvfs.macs_per_cycle), config.overhead_s)


def fastest_seconds(
    dvfs: Dvfs, images: int, macs: int, correction: float = 1.0, config: EnergyConfig = DEFAULTS
) -> float:
    """T_min, what a client tells the server of its next phase: at the fastest level, times its correction (ours)."""
    return correction * float(bill(dvfs, work_of(dvfs, images, macs, config)).seconds.min())


def idle_joules(config: EnergyConfig, seconds: np.ndarray, deadline_s: float) -> np.ndarray:
    """Of waiting for the deadline, where the window counts that; nobody waits for a deadline that is infinite."""
    if config.window == "busy" or math.isinf(deadline_s):
        return np.zeros_like(seconds)
    return np.asarray(config.idle_watts * np.maximum(deadline_s - seconds, 0.0))


def choose(table: Bill, deadline_s: float, config: EnergyConfig = DEFAULTS, margin: float = 0.0) -> Choice:
    """The cheapest level that meets the deadline, else the fastest one; ties go to the shorter, then to the first.

    Args:
        table: what the levels cost.
        deadline_s: D; infinite = none.
        config: policy and window; idling counts in the joules that come back.
        margin: share of the deadline kept free.

    Raises:
        ValueError: a deadline that is not above 0, or a margin outside [0, 1).
    """
    _check_deadline(deadline_s)
    if not 0 <= margin < 1:
        raise ValueError(f"the margin of a deadline must lie in [0, 1), got {margin}")
    whole = Bill(table.seconds, table.joules + idle_joules(config, table.seconds, deadline_s))
    level = cheapest(whole, (1 - margin) * deadline_s, config.policy)
    seconds, joules = float(whole.seconds[level]), float(whole.joules[level])
    return Choice(level, seconds, joules, seconds <= (1 - margin) * deadline_s)


def cheapest(table: Bill, seconds: float, policy: str = "on") -> int:
    """The number of the cheapest level that takes at most so many seconds, else, or with policy "max", the fastest."""
    feasible = table.seconds <= seconds
    if policy == "max" or not feasible.any():
        return int(np.lexsort((table.joules, table.seconds))[0])
    return int(np.lexsort((table.seconds, np.where(feasible, table.joules, np.inf)))[0])


def _check_deadline(deadline_s: float) -> None:
    if not deadline_s > 0:
        raise ValueError(f"a deadline must be above 0 seconds, got {deadline_s}; infinite = none")


def best_frequency(
    gcycles: float, cubic_watts: float, static_watts: float, deadline_s: float, limits_ghz: tuple[float, float]
) -> float:
    """Of one clock that can have any frequency within its limits: clamp(max(f0, W / D)), f0 = (P_s / 2k)^(1/3).

    Below f0 the static power costs more than the slower clock saves. A check of the table's search, not used by it.

    Args:
        gcycles: W.
        cubic_watts: k, so that the energy is W (k f^2 + P_s / f); above 0.
        static_watts: P_s.
        deadline_s: D.
        limits_ghz: lowest and highest frequency.
    """
    cheapest_ghz = math.cbrt(static_watts / (2 * cubic_watts))
    low, high = limits_ghz
    return min(max(cheapest_ghz, gcycles / deadline_s, low), high)


def deadline(times: Iterable[float], q: float = 1.0, slack: float = 0.0) -> float:
    """The server's deadline of a round: the ceil(q n)-th smallest of the clients' shortest times, times 1 + slack.

    With q = 1 nobody is late, and the round is as long as without any choice of frequencies.

    Args:
        times: seconds of each client of the cohort at its fastest level.
        q: share of the clients that can meet it, in (0, 1].
        slack: added share, >= 0.

    Raises:
        ValueError: no times, times that are not above 0 and finite, or an impossible q or slack.
    """
    ordered = sorted(times)
    if not ordered or not all(0 < time < math.inf for time in ordered):
        raise ValueError(f"a deadline needs the clients' shortest times, above 0 and finite, got {ordered}")
    if not 0 < q <= 1:
        raise ValueError(f"the deadline's share of clients q must lie in (0, 1], got {q}")
    if not 0 <= slack < math.inf:
        raise ValueError(f"the deadline's slack must be >= 0, got {slack}")
    return ordered[math.ceil(q * len(ordered) - HAIR) - 1] * (1 + slack)


# --- batch by batch ---------------------------------------------------------------------------------------------


class Pacer(Protocol):
    """What a phase of forward passes tells whoever sets the frequencies."""

    def plan(self, num_batches: int, images: int, macs: int) -> None:
        """A phase's whole work, before it begins.

        Args:
            num_batches: how often `batch` will be called; batches count the same.
            images: that are prepared, each as often as it goes through a network.
            macs: of all forward passes.
        """

    def batch(self) -> AbstractContextManager[None]:
        """Around each mini-batch."""


class _NoPace:
    def plan(self, num_batches: int, images: int, macs: int) -> None:
        """Nothing is planned."""

    def batch(self) -> AbstractContextManager[None]:
        """Nothing is done."""
        return nullcontext()


NO_PACE: Pacer = _NoPace()


class Spent(NamedTuple):
    """What the phases of one message took.

    Attributes:
        seconds: by the clock: modelled ones of a simulated device.
        joules: modelled, and longer or shorter as the batches were; idling included where the window says so.
        levels: numbers of the levels, one a batch.
        missed: the deadline passed before the end.
        correction: c, how much longer batches take than modelled; for the client's next round.
        measured_joules: of all processors of this machine and all its programs; None = not measured.
    """

    seconds: float
    joules: float
    levels: tuple[int, ...]
    missed: bool
    correction: float
    measured_joules: float | None


@dataclass(frozen=True)
class Instruments:
    """What a controller reads and sets; by default those of a simulated device without surprises."""

    clock: Clock = field(default_factory=ModelledClock)
    actuator: FrequencyActuator = field(default_factory=Recorder)
    meter: Rapl | None = None


class Controller:
    """Chooses each batch's level by feedback: the cheapest at which the rest is done in time, as it goes now.

    Before batch i of nb: the cheapest level with (nb - i) t_l c <= D - elapsed, where t_l = T_l / nb; none: the
    fastest. After it: c <- (1 - a) c + a (seconds taken / t_l). The choice looks at the phase at hand: what is left of
    the deadline is for it alone.

    Args:
        dvfs: the device's levels.
        deadline_s: D, for all the phases that are planned with this controller together; infinite = none.
        correction: c, as the client's last round left it.
        config: how to choose.
        instruments: clock, actuator and meter.

    Raises:
        ValueError: a deadline or correction that is not above 0.
    """

    def __init__(
        self,
        dvfs: Dvfs,
        deadline_s: float = math.inf,
        correction: float = 1.0,
        config: EnergyConfig = DEFAULTS,
        instruments: Instruments | None = None,
    ):
        _check_deadline(deadline_s)
        if not 0 < correction < math.inf:
            raise ValueError(f"a correction must be above 0 and finite, got {correction}; a client's first is 1")
        self._dvfs, self._deadline, self._config = dvfs, deadline_s, config
        self._instruments = instruments or Instruments()
        self._correction = correction
        self._seconds = self._joules = 0.0
        self._levels: list[int] = []
        self._measured: float | None = None if self._instruments.meter is None else 0.0
        self._left = 0

    def plan(self, num_batches: int, images: int, macs: int) -> None:
        """See `Pacer`; time and energy of earlier phases stay counted.

        Raises:
            ValueError: numbers below 0, or work without a batch.
        """
        if min(num_batches, images, macs) < 0 or (images + macs > 0 and not num_batches):
            raise ValueError(
                f"a phase needs batches for its work, got {num_batches} batches, {images} images, {macs} MACs"
            )
        whole = bill(self._dvfs, work_of(self._dvfs, images, macs, self._config))
        self._each = Bill(whole.seconds / max(num_batches, 1), whole.joules / max(num_batches, 1))
        self._left = num_batches
        self._instruments.clock.begin()
        if self._instruments.meter is not None:
            self._instruments.meter.joules()  # what was drawn before is not this phase's

    @contextmanager
    def batch(self) -> Iterator[None]:
        """See `Pacer`; a batch that raises is not counted.

        Raises:
            ValueError: one batch more than planned.
        """
        if not self._left:
            raise ValueError("a batch beyond those that were planned; plan each phase's number of batches")
        level = self._next_level()
        if [level] != self._levels[-1:]:
            self._instruments.actuator.apply(self._dvfs.levels[level])
        yield
        self._note(level, self._instruments.clock.observe(float(self._each.seconds[level])))

    def spent(self) -> Spent:
        """All of it, so far."""
        idle = float(idle_joules(self._config, np.array(self._seconds), self._deadline))
        missed = self._seconds > self._deadline + HAIR
        joules, levels = self._joules + idle, tuple(self._levels)
        return Spent(self._seconds, joules, levels, missed, self._correction, self._measured)

    def _next_level(self) -> int:
        seconds, joules = (self._left * self._correction * each for each in self._each)
        remaining = self._deadline - self._seconds
        rest = Bill(seconds, joules + idle_joules(self._config, seconds, remaining))
        return cheapest(rest, remaining + HAIR, self._config.policy)

    def _note(self, level: int, seconds: float) -> None:
        """One batch done."""
        planned = float(self._each.seconds[level])
        slower = seconds / planned if planned else 1.0  # a phase without work tells nothing
        self._joules += slower * float(self._each.joules[level])
        self._seconds += seconds
        if planned:
            self._correction += self._config.gain * (slower - self._correction)
        self._levels.append(level)
        self._left -= 1
        if self._instruments.meter is not None:
            drawn = self._instruments.meter.joules()
            self._measured = None if drawn is None or self._measured is None else self._measured + drawn
