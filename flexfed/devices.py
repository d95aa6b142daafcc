"""Devices that are not equal: what one can carry, and simulated fleets of them read from TOML files."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
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
        width: largest ratio of every layer's units that it can keep, FedLPS's capability z; infinite = never told.
        capacity_spread: standard deviation of what other programs take from it; see `capacity_now`.
        memory_bytes: nominally free for training, beside Python, torch and the data; infinite = never told.
        memory_spread_bytes: standard deviation of what other programs take from it; see `memory_now`.
        measure_memory: a real device, which looks at the memory really free whenever a job arrives.
        availability: shares of its power, one of which it has in each round; empty = always all of it.
        speed_macs_s: multiply-accumulates a second.
        link_bytes_s: bytes a second away from the device, and towards it unless the next one says otherwise.
        download_bytes_s: bytes a second towards the device; 0 = as `link_bytes_s`, which then is the speed both ways.
        compute_watts: power while it computes.
        radio_watts: power while it sends or receives.
        num_examples: its training samples.
        labels: classes among them.
    """

    partition: int
    kind: str = "device"
    capacity: float = 1.0
    width: float = math.inf
    capacity_spread: float = 0.0
    memory_bytes: float = math.inf
    memory_spread_bytes: float = 0.0
    measure_memory: bool = False
    availability: tuple[float, ...] = ()
    speed_macs_s: float = 1e9
    link_bytes_s: float = 1e6
    download_bytes_s: float = 0.0
    compute_watts: float = 1.0
    radio_watts: float = 1.0
    num_examples: int = 0
    labels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for key in ("capacity", "speed_macs_s", "link_bytes_s"):
            if not (math.isfinite(getattr(self, key)) and getattr(self, key) > 0):
                raise ValueError(f"device {self.partition}: {_key(key)} must be > 0, got {getattr(self, key)}")
        for key in ("memory_bytes", "width"):
            if not getattr(self, key) > 0:
                raise ValueError(f"device {self.partition}: {_key(key)} must be > 0, got {getattr(self, key)}")
        if not all(0 < share <= 1 for share in self.availability):
            raise ValueError(f"device {self.partition}: availability must lie in (0, 1], got {self.availability}")
        others = ("download_bytes_s", "compute_watts", "radio_watts", "num_examples")
        for key in ("capacity_spread", "memory_spread_bytes", *others):
            if not (math.isfinite(getattr(self, key)) and getattr(self, key) >= 0):
                raise ValueError(f"device {self.partition}: {_key(key)} must be >= 0, got {getattr(self, key)}")

    def capacity_now(self, rng: np.random.Generator) -> float:
        """Capacity left at this moment: it can only fall below nominal (FlexFL's uncertainty model).

        capacity - |u| with u ~ Normal(0, capacity_spread).
        """
        return self.capacity - abs(float(rng.normal(0.0, self.capacity_spread)))

    def memory_now(self, rng: np.random.Generator) -> float:
        """Bytes left for training at this moment, drawn as `capacity_now` is."""
        return self.memory_bytes - abs(float(rng.normal(0.0, self.memory_spread_bytes)))

    def in_round(self, server_round: int, seed: int) -> Device:
        """The device as it is in one round: capacity, width, memory and speed times one of its `availability`.

        Drawn from (seed, round, partition), so that the server and the device itself know the same.
        """
        if not self.availability:
            return self
        rng = np.random.default_rng([seed, server_round, self.partition, 2])
        return self._with(float(rng.choice(self.availability)))

    def states(self) -> tuple[Device, ...]:
        """The device as it may be in a round."""
        return tuple(self._with(share) for share in self.availability) or (self,)

    def _with(self, share: float) -> Device:
        return replace(
            self,
            capacity=share * self.capacity,
            width=share * self.width,
            memory_bytes=share * self.memory_bytes,
            speed_macs_s=share * self.speed_macs_s,
            availability=(),
        )


@dataclass(frozen=True)
class DeviceClass:
    """One row of a fleet file: what its devices have, in the units of `Device`.

    Attributes:
        kind: what people call them.
        share: of all devices, in [0, 1].
        capacity_spread: values, one of which each device gets.
    """

    kind: str
    share: float
    capacity: float = 1.0
    width: float = math.inf
    capacity_spread: tuple[float, ...] = (0.0,)
    memory_bytes: float = math.inf
    memory_spread_bytes: float = 0.0
    availability: tuple[float, ...] = ()
    speed_macs_s: float = 1e9
    link_bytes_s: float = 1e6
    download_bytes_s: float = 0.0
    compute_watts: float = 1.0
    radio_watts: float = 1.0

    def __post_init__(self) -> None:
        lists = ("capacity_spread", "availability")
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("kind", *lists)}
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
    """Classes of simulated devices, weakest first; partitions are dealt to them in order.

    Attributes:
        classes: whose shares add up to 1.
    """

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
        """The device of one partition of `num`; its spread is drawn once, from (seed, partition).

        Raises:
            ValueError: there is no such partition.
        """
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
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path.name}: each class of a fleet is a table [[class]], got {rows!r}")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    return Fleet(tuple(_device_class(row, path.name) for row in rows))


def _device_class(row: Mapping[str, Any], where: str) -> DeviceClass:
    values = {key.replace("-", "_"): value for key, value in row.items()}
    known = {f.name for f in fields(DeviceClass)}
    if not {"kind", "share"} <= values.keys() <= known or len(values) < len(row):
        raise ValueError(f"{where}: a [[class]] needs kind and share and may have {_keys(known)}; got {_keys(row)}")
    if not isinstance(values["kind"], str):
        raise ValueError(f"{where}: kind must be a string, got {values['kind']!r}")
    for name in {"capacity_spread", "availability"} & values.keys():
        given = values[name] if isinstance(values[name], list) else [values[name]]
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in given):
            raise ValueError(
                f"class {values['kind']!r}: {_key(name)} must be a number or a list of them, got {given!r}"
            )
        values[name] = tuple(map(float, given))
    return DeviceClass(**values)


_SPREADS = {"capacity": "capacity_spread", "memory_bytes": "memory_spread_bytes"}


def declared(device: Device, node_config: Mapping[str, Any]) -> Device:
    """The device as its SuperNode's node-config declares it: keys there win over the fleet's.

    The keys: kind, capacity, width, capacity-spread, memory-bytes, memory-spread-bytes, measure-memory, speed-macs-s,
    link-bytes-s, download-bytes-s, compute-watts, radio-watts. A device that tells of itself is not blurred by its
    fleet's noise; one that tells its memory is no simulated device: what it holds follows from that, and from its own
    `capacity` if it tells one. One that tells of its link alone has that speed both ways.

    Raises:
        ValueError: a value of the wrong kind, or a key that looks like one of these.
    """
    names = {_key(f.name): f.name for f in fields(Device)}
    for other in ("partition", "availability", "num-examples", "labels"):
        del names[other]
    told = {names[key]: node_config[key] for key in names.keys() & node_config.keys()}
    for key in node_config.keys() - names.keys():
        if near := get_close_matches(key.replace("_", "-"), names, 1, 0.9):
            raise ValueError(
                f"node-config of partition {device.partition}: unknown key {key!r}; did you mean {near[0]}?"
            )
    values = {name: _declared_value(device.partition, name, value) for name, value in told.items()}
    if "memory_bytes" in told:
        values = {"capacity": 1.0, "width": math.inf, "capacity_spread": 0.0, **values}
    if "link_bytes_s" in told:
        values.setdefault("download_bytes_s", 0.0)
    if told.keys() - {"kind", "link_bytes_s", "download_bytes_s", "compute_watts", "radio_watts"}:
        values["availability"] = ()
    for name in _SPREADS.keys() & told.keys():
        values.setdefault(_SPREADS[name], 0.0)
    return replace(device, **values)


def _declared_value(partition: int, name: str, value: Any) -> Any:
    kind = {"kind": str, "measure_memory": bool}.get(name, float)
    given = float(value) if kind is float and isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(given, kind):
        words = {str: "a string", bool: "true or false", float: "a number"}[kind]
        raise ValueError(f"node-config of partition {partition}: {_key(name)} must be {words}, got {value!r}")
    return given


def to_record(device: Device) -> dict[str, Any]:
    """A device as plain values for a message."""
    return {_key(name): list(v) if isinstance(v, tuple) else v for name, v in asdict(device).items()}


_LEAST, _MOST = 1e-6, 1e18  # of a number that a client tells of its device: what is divided by it is still a number
_MOST_EXAMPLES = 10**9
_LONGEST = {"availability": 1000, "labels": 100_000}
_DIVISORS = ("capacity", "width", "memory_bytes", "speed_macs_s", "link_bytes_s")


def from_record(record: Mapping[str, Any]) -> Device:
    """Undo `to_record`, believing no numbers that no device has.

    Raises:
        ValueError: keys are missing or unknown, or a value is impossible.
    """
    values = {key.replace("-", "_"): value for key, value in record.items()}
    expected = {f.name for f in fields(Device)}
    if values.keys() != expected:
        raise ValueError(f"a device's profile should have {_keys(expected)}; got {_keys(values)}")
    for name, value in values.items():
        if wrong := _wrong_in_profile(name, value):
            raise ValueError(f"{_key(name)} of a device's profile should be {wrong}")
    lists = {"labels": tuple(values["labels"]), "availability": tuple(map(float, values["availability"]))}
    return Device(**{**values, **lists})


def _wrong_in_profile(name: str, value: Any) -> str:
    """What a value of a profile should be; empty = it is."""
    if name == "kind":
        right = isinstance(value, str) and 0 < len(value) <= 64 and value.isprintable()
        return "" if right else "a name of 1 to 64 characters"
    if name == "measure_memory":
        return "" if isinstance(value, bool) else "true or false"
    if name in _LONGEST:
        least, most, kind = (0, 2**31, int) if name == "labels" else (_LEAST, 1, float)
        right = isinstance(value, list) and len(value) <= _LONGEST[name] and all(_is_number(v, kind) for v in value)
        right = right and all(least <= v <= most for v in value)
        return "" if right else f"a list of at most {_LONGEST[name]} numbers from {least:g} to {most}"
    if name in ("partition", "num_examples"):
        most = _MOST_EXAMPLES if name == "num_examples" else 2**31
        return "" if _is_number(value, int) and 0 <= value <= most else f"a whole number from 0 to {most}"
    least = _LEAST if name in _DIVISORS else 0
    right = _is_number(value, float) and (least <= value <= _MOST or value == math.inf)  # whatever may be infinite
    return "" if right else f"a number from {least:g} to {_MOST:g}"


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)


def _key(name: str) -> str:
    return name.replace("_", "-")


def _keys(names: Any) -> str:
    return ", ".join(sorted(_key(n) for n in names))
