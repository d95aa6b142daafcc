"""How long a mini-batch took: really, or as a simulated device would have it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np


class Clock(Protocol):
    """Tells how long each batch of a phase took."""

    def begin(self) -> None:
        """A phase begins."""

    def observe(self, planned_seconds: float) -> float:
        """Seconds since the batch before, or since the beginning.

        Args:
            planned_seconds: what the model says of this batch at its level.
        """


class ModelledClock:
    """A simulated device's: what the model says, times chance.

    Args:
        rng: for a client's message, from its seed; None where there is no chance.
        spread: standard deviation of the logarithm of a batch's slowdown; 0 = exact.

    Raises:
        ValueError: a spread below 0, or chance without a generator.
    """

    def __init__(self, rng: np.random.Generator | None = None, spread: float = 0.0):
        if not 0 <= spread < math.inf:
            raise ValueError(f"the spread of a batch's time must be >= 0, got {spread}")
        if spread and rng is None:
            raise ValueError(f"a spread of {spread} needs a generator; without one, only 0 is possible")
        self._rng, self._spread = rng, spread

    def begin(self) -> None:
        """Nothing passes between batches."""

    def observe(self, planned_seconds: float) -> float:
        """The plan times exp(spread * normal)."""
        if self._rng is None or not self._spread:
            return planned_seconds
        return planned_seconds * math.exp(self._spread * float(self._rng.standard_normal()))


class WallClock:
    """A real device's: what passes between batches, such as loading a block, counts to the next one.

    Args:
        now: seconds from some fixed moment on.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self.begin()

    def begin(self) -> None:
        """From now on."""
        self._last = self._now()

    def observe(self, planned_seconds: float) -> float:
        """What has passed, whatever was planned."""
        last, self._last = self._last, self._now()
        return self._last - last
