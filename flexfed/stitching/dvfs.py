"""Clock frequencies that a device can choose from, and what it draws at each: FedStitch's energy model.

FedStitch (Zhan, Wu, Tian, Zhao, Li, IWQoS 2024, https://arxiv.org/abs/2409.07202) chooses frequencies on every
client; its models, its devices and its tables could not be read. The model here is a choice of ours from what is
common: dynamic power cubic in the frequency (Tran et al., INFOCOM 2019). So are the tiers, which thin out the table
of a real board. Every number that follows from them is modelled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from flexfed.devices import Device

# The frequencies of a Jetson AGX Orin, from a public power-mode script.
ORIN_CPU_MHZ: tuple[float, ...] = (
    *(268.8, 422.4, 576, 729.6, 883.2, 1036.8, 1190.4),
    *(1344, 1497.6, 1651.2, 1804.8, 1958.4, 2112, 2201.6),
)
ORIN_GPU_MHZ: tuple[float, ...] = (
    *(114.75, 216.75, 318.75, 420.75, 522.75, 624.75, 726.75),
    *(828.75, 930.75, 1032.75, 1134.75, 1236.75, 1300.5),
)


class Level(NamedTuple):
    """Frequencies of the two processors, in GHz."""

    cpu_ghz: float
    gpu_ghz: float


@dataclass(frozen=True)
class Dvfs:
    """What a device's clocks can be set to, and what follows from that.

    Attributes:
        levels: any combination that may be set.
        static_watts: drawn at every level.
        cpu_watts: kc, watts of a CPU at 1 GHz; at f GHz it draws f^3 times that while it works.
        gpu_watts: kg, the same of the GPU.
        macs_per_cycle: multiply-accumulates in one cycle of the GPU.
    """

    levels: tuple[Level, ...]
    static_watts: float
    cpu_watts: float
    gpu_watts: float
    macs_per_cycle: float

    def __post_init__(self) -> None:
        frequencies = [frequency for level in self.levels for frequency in level]
        if not frequencies or not all(0 < frequency < math.inf for frequency in frequencies):
            raise ValueError(f"a DVFS table needs levels of frequencies above 0 GHz, got {self.levels}")
        for name in ("static_watts", "cpu_watts", "gpu_watts"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} of a DVFS table must be >= 0, got {getattr(self, name)}")
        if not 0 < self.macs_per_cycle < math.inf:
            raise ValueError(f"macs_per_cycle of a DVFS table must be > 0, got {self.macs_per_cycle}")

    @property
    def fastest(self) -> Level:
        """The highest frequency of the GPU, and with it of the CPU."""
        return max(self.levels, key=lambda level: (level.gpu_ghz, level.cpu_ghz))

    @property
    def speed_macs_s(self) -> float:
        """Multiply-accumulates a second at the fastest level: `Device.speed_macs_s`."""
        return 1e9 * self.macs_per_cycle * self.fastest.gpu_ghz

    @property
    def compute_watts(self) -> float:
        """Power of multiplying at the fastest level: `Device.compute_watts`."""
        return self.static_watts + self.gpu_watts * self.fastest.gpu_ghz**3


def grid(cpu_ghz: Sequence[float], gpu_ghz: Sequence[float]) -> tuple[Level, ...]:
    """Every frequency of the CPU with every one of the GPU."""
    return tuple(Level(c, g) for c in cpu_ghz for g in gpu_ghz)


def _tier(part: slice, static_watts: float, macs_per_cycle: float) -> Dvfs:
    cpu, gpu = ([mhz / 1e3 for mhz in table[part]] for table in (ORIN_CPU_MHZ, ORIN_GPU_MHZ))
    return Dvfs(grid(cpu, gpu), static_watts, 0.35, 2.2, macs_per_cycle)


TIERS = {
    "high": _tier(slice(None, None, 2), 1.5, 256),
    "mid": _tier(slice(None, None, 3), 1.0, 128),
    "low": _tier(slice(7), 0.7, 64),
}
"""Every second, every third and the lowest half (7 each) of the board's frequencies, counted from the lowest."""


def dvfs_of(device: Device, clock_ghz: Sequence[float] = ()) -> Dvfs:
    """The table of a device; how a device gets its tier is ours.

    A device whose kind is a tier's name is of that tier, any other by its capacity: from 2/3 high, from 1/3 mid. At
    the fastest level it has the speed and the watts that the device declares, so that a method that trains and
    FedStitch are billed by one model; a device of `configs/fleets/tiers.toml` has its tier's table as it is.

    Args:
        device: as it is in this round.
        clock_ghz: what the clock of a real device that computes on its CPU can be set to
            (`FrequencyActuator.clock_ghz`): then all work runs at that one clock. Empty = the tier's frequencies.
    """
    tier = TIERS[tier_of(device)]
    table = replace(tier, levels=tuple(Level(f, f) for f in clock_ghz)) if clock_ghz else tier
    power = device.compute_watts / tier.compute_watts
    cubic = (tier.fastest.gpu_ghz / table.fastest.gpu_ghz) ** 3  # static and dynamic power keep their shares
    gpu_watts = _scaled(tier.gpu_watts, power * cubic)
    return replace(
        table,
        static_watts=_scaled(tier.static_watts, power),
        cpu_watts=gpu_watts if clock_ghz else _scaled(tier.cpu_watts, power),
        gpu_watts=gpu_watts,
        macs_per_cycle=_scaled(table.macs_per_cycle, device.speed_macs_s / table.speed_macs_s),
    )


def tier_of(device: Device) -> str:
    """The name of a device's tier."""
    if device.kind in TIERS:
        return device.kind
    return "high" if device.capacity >= 2 / 3 else "mid" if device.capacity >= 1 / 3 else "low"


def _scaled(value: float, factor: float) -> float:
    """`value` itself where the factor is 1 but for rounding."""
    return value if math.isclose(factor, 1.0, rel_tol=1e-12) else value * factor


class Work(NamedTuple):
    """What a phase computes: billions of cycles of each processor, and seconds that no frequency shortens."""

    cpu_gcycles: float
    gpu_gcycles: float
    overhead_s: float = 0.0


class Bill(NamedTuple):
    """What a table's levels cost; both (levels,) float64."""

    seconds: np.ndarray
    joules: np.ndarray


def bill(dvfs: Dvfs, work: Work) -> Bill:
    """Seconds and joules of a work at every level, one processor after the other.

    T = T_0 + W_c / f_c + W_g / f_g and E = P_s T + kc f_c^2 W_c + kg f_g^2 W_g.
    """
    f_c, f_g = np.array(dvfs.levels, dtype=np.float64).T
    seconds = work.overhead_s + work.cpu_gcycles / f_c + work.gpu_gcycles / f_g
    dynamic = dvfs.cpu_watts * f_c**2 * work.cpu_gcycles + dvfs.gpu_watts * f_g**2 * work.gpu_gcycles
    return Bill(seconds, dvfs.static_watts * seconds + dynamic)
