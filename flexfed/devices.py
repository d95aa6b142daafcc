"""Devices that are not equal: what one can carry, and simulated fleets of them read from TOML files."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

FLEETS = Path(__file__).resolve().parent.parent / "configs" / "fleets"


@dataclass(frozen=True)
class Device:
    """What the server knows of a client's device.

    Attributes:
        partition: the client's index: its data and its identity across runs.
        kind: name of its class in the fleet.
        capacity: nominal share of the full model's parameters that it can train; above 1 leaves room to spare.
        capacity_spread: standard deviation of what other programs take from it; see `capacity_now`.
        speed_macs_s: multiply-accumulates a second.
        link_bytes_s: bytes a second, both ways.
        compute_watts: power while it computes.
        radio_watts: power while it sends or receives.
        num_examples: its training samples.
        labels: classes among them.
    """

    partition: int
    kind: str = "device"
    capacity: float = 1.0
    capacity_spread: float = 0.0
    speed_macs_s: float = 1e9
    link_bytes_s: float = 1e6
    compute_watts: float = 1.0
    radio_watts: float = 1.0
    num_examples: int = 0
    labels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for key in ("capacity", "speed_macs_s", "link_bytes_s"):
            if not (math.isfinite(getattr(self, key)) and getattr(self, key) > 0):
                raise ValueError(f"device {self.partition}: {_key(key)} must be > 0, got {getattr(self, key)}")
        for key in ("capacity_spread", "compute_watts", "radio_watts", "num_examples"):
            if not (math.isfinite(getattr(self, key)) and getattr(self, key) >= 0):
                raise ValueError(f"device {self.partition}: {_key(key)} must be >= 0, got {getattr(self, key)}")

    def capacity_now(self, rng: np.random.Generator) -> float:
        """Capacity left at this moment: it can only fall below nominal (FlexFL's uncertainty model).

        capacity - |u| with u ~ Normal(0, capacity_spread).
        """
        return self.capacity - abs(float(rng.normal(0.0, self.capacity_spread)))


@dataclass(frozen=True)
class DeviceClass:
    """One row of a fleet file; `capacity_spread` holds the values one of which each device gets."""

    kind: str
    share: float
    capacity: float
    capacity_spread: tuple[float, ...] = (0.0,)
    speed_macs_s: float = 1e9
    link_bytes_s: float = 1e6
    compute_watts: float = 1.0
    radio_watts: float = 1.0

    def __post_init__(self) -> None:
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("kind", "capacity_spread")}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"class {self.kind!r}: {_key(name)} must be a number, got {value!r}")
        if not self.capacity_spread:
            raise ValueError(f"class {self.kind!r}: capacity-spread must hold at least one number, got none")
        for spread in self.capacity_spread:
            self.device(0, spread)  # refuses impossible values before anything runs

    def device(self, partition: int, spread: float) -> Device:
        """A device of this class."""
        facts = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("share", "capacity_spread")}
        return Device(partition=partition, capacity_spread=spread, **facts)


@dataclass(frozen=True)
class Fleet:
    """Classes of simulated devices, weakest first; partitions are dealt to them in order."""

    classes: tuple[DeviceClass, ...]

    def __post_init__(self) -> None:
        total = sum(c.share for c in self.classes)
        if not self.classes or any(c.share < 0 for c in self.classes) or not math.isclose(total, 1.0):
            raise ValueError(
                f"shares of a fleet's classes must be >= 0 and sum to 1, got {[c.share for c in self.classes]}"
            )

    def counts(self, num: int) -> list[int]:
        """Devices of each class: floor(num * share), the remainder goes to the last class."""
        counts = [math.floor(num * c.share + 1e-9) for c in self.classes[:-1]]
        return [*counts, num - sum(counts)]

    def device(self, partition: int, num: int, seed: int) -> Device:
        """The device of one partition; its spread is drawn once, from (seed, partition)."""
        if not 0 <= partition < num:
            raise ValueError(f"partition must be in 0..{num - 1}, got {partition}")
        ends = np.cumsum(self.counts(num))
        kind = self.classes[int(np.searchsorted(ends, partition, side="right"))]
        spread = float(np.random.default_rng([seed, partition]).choice(kind.capacity_spread))
        return kind.device(partition, spread)


@lru_cache(maxsize=8)
def load_fleet(name: str) -> Fleet:
    """Read a fleet: a name from `configs/fleets`, or the absolute path of a TOML file.

    Raises:
        ValueError: no such fleet (lists those there are), or a row that is not a device class.
    """
    path = Path(name).expanduser() if name.endswith(".toml") else FLEETS / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FLEETS.glob("*.toml")))
        raise ValueError(f"unknown fleet {name!r}; known: {known}, or the absolute path of a .toml file")
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8")).get("class", [])
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    return Fleet(tuple(_device_class(row, path.name) for row in rows))


def _device_class(row: Mapping[str, Any], where: str) -> DeviceClass:
    values = {key.replace("-", "_"): value for key, value in row.items()}
    known = {f.name for f in fields(DeviceClass)}
    if not {"kind", "share", "capacity"} <= values.keys() <= known:
        raise ValueError(
            f"{where}: a [[class]] needs kind, share, capacity and may have {_keys(known)}; got {_keys(values)}"
        )
    spread = values.get("capacity_spread", 0.0)
    values["capacity_spread"] = tuple(spread) if isinstance(spread, Sequence) else (float(spread),)
    return DeviceClass(**values)


def declared(device: Device, node_config: Mapping[str, Any]) -> Device:
    """The device as its SuperNode's node-config declares it: keys there win over the fleet's."""
    names = {f.name for f in fields(Device)} - {"partition", "num_examples", "labels"}
    told: dict[str, Any] = {name: node_config[_key(name)] for name in names if _key(name) in node_config}
    for name, value in told.items():
        if name != "kind" and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(
                f"node-config of partition {device.partition}: {_key(name)} must be a number, got {value!r}"
            )
    if "capacity" in told:
        told.setdefault("capacity_spread", 0.0)  # what a device says of itself is not blurred by the fleet's noise
    values: dict[str, Any] = {name: value if name == "kind" else float(value) for name, value in told.items()}
    return replace(device, **values)


def to_record(device: Device) -> dict[str, Any]:
    """A device as plain values for a message."""
    return {_key(name): list(v) if isinstance(v, tuple) else v for name, v in asdict(device).items()}


def from_record(record: Mapping[str, Any]) -> Device:
    """Undo `to_record`.

    Raises:
        ValueError: keys are missing or unknown, or a value is impossible.
    """
    values = {key.replace("-", "_"): value for key, value in record.items()}
    expected = {f.name for f in fields(Device)}
    if values.keys() != expected:
        raise ValueError(f"a device's profile should have {_keys(expected)}; got {_keys(values)}")
    return Device(**{**values, "labels": tuple(int(x) for x in values["labels"])})


def _key(name: str) -> str:
    return name.replace("_", "-")


def _keys(names: Any) -> str:
    return ", ".join(sorted(_key(n) for n in names))
