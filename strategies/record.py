"""One round's line of the record: who took part, what it cost, how good the model is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flexfed.cost import modelled_joules, modelled_seconds
from flexfed.devices import Device
from flexfed.jobs import Update
from flexfed.runs import KIND_PREFIX, Measured
from flexfed.training import Evaluation
from strategies.preparation import Preparation


@dataclass
class RoundRecord:
    """Filled while a round runs; nothing that depends on the clock enters its line."""

    server_round: int
    before: Preparation = field(default_factory=Preparation)  # of round 1
    dispatched: dict[int, str] = field(default_factory=dict)  # partition -> level
    trained: Counter[str] = field(default_factory=Counter)
    bytes_down: dict[int, int] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_beside: int = 0  # of the clients' own tests and of queries
    macs_beside: int = 0
    macs: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)  # of each phase, its slowest device
    joules: float = 0.0
    client_seconds: float = 0.0  # of processor time, as the clients measured their training
    client_joules: float | None = None  # as their own meters told, where one had any
    losses: list[tuple[float, float]] = field(default_factory=list)  # (weight, loss)
    clipped: int | None = None  # replies scaled down; None = the run clips none
    refused: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    quality: dict[str, float] = field(default_factory=dict)
    clients: list[tuple[str, Evaluation]] = field(default_factory=list)  # (kind of device, test of its level)
    personal: list[tuple[str, Evaluation]] = field(default_factory=list)  # (capability, test of a client's own model)
    is_void: bool = False  # replies came, but fewer than `min-replies`: the model stayed as it was

    def count(self, device: Device, level: str, update: Update, bytes_up: int) -> None:
        """Add an accepted reply: a synchronous round lasts as long as its slowest device."""
        macs = int(update.metrics.get("macs", 0))
        self.trained[level] += 1
        self.bytes_up += bytes_up
        self.macs += macs
        self.client_seconds += update.metrics.get("seconds", 0.0)
        self._spend("train", device, macs, self.bytes_down.get(device.partition, 0), bytes_up)
        self.losses.append((update.weight, update.metrics.get("train-loss", 0.0)))

    def count_beside(self, phase: str, device: Device, macs: int, bytes_down: int, bytes_up: int) -> None:
        """Add what a device did beside training: a query answered, a test of its own."""
        self.bytes_beside += bytes_down + bytes_up
        self.macs_beside += macs
        self._spend(phase, device, macs, bytes_down, bytes_up)

    def count_sent(self, kind: str, partition: int, num_bytes: int) -> None:
        """Add a question of a phase (`strategies.phases`); phases of evaluation are counted beside."""
        if kind.startswith("train"):
            self.bytes_down[partition] = self.bytes_down.get(partition, 0) + num_bytes
        else:
            self.bytes_beside += num_bytes

    def count_answer(
        self, kind: str, device: Device, metrics: Mapping[str, float], bytes_down: int, bytes_up: int
    ) -> None:
        """Add an answer: the client tells time and energy of its work, at the frequencies that it chose."""
        macs, joules = int(metrics.get("macs", 0)), metrics.get("measured-joules")
        if kind.startswith("train"):
            self.bytes_up += bytes_up
            self.macs += macs
            self.client_seconds += metrics.get("seconds", 0.0)
        else:
            self.bytes_beside += bytes_up
            self.macs_beside += macs
        seconds = metrics.get("modelled-seconds", 0.0) + modelled_seconds(device, 0, bytes_down, bytes_up)
        self.seconds[kind] = max(self.seconds.get(kind, 0.0), seconds)
        self.joules += metrics.get("modelled-joules", 0.0) + modelled_joules(device, 0, bytes_down, bytes_up)
        if joules is not None:
            self.client_joules = (self.client_joules or 0.0) + joules

    def _spend(self, phase: str, device: Device, macs: int, bytes_down: int, bytes_up: int) -> None:
        """Phases follow each other; within one, devices work side by side."""
        seconds = modelled_seconds(device, macs, bytes_down, bytes_up)
        self.seconds[phase] = max(self.seconds.get(phase, 0.0), seconds)
        self.joules += modelled_joules(device, macs, bytes_down, bytes_up)

    @property
    def measured(self) -> Measured:
        """What its clients measured, before round 1 too; not in the line."""
        return Measured(self.client_seconds + self.before.client_seconds, self.client_joules)

    def line(self) -> dict[str, Any]:
        """The line of metrics.jsonl; keys without a value this round are left out."""
        prepared = sum(self.before.seconds.values())
        line: dict[str, Any] = {
            "round": self.server_round,
            "cohort": sorted(self.dispatched),
            "dispatched": dict(sorted(Counter(self.dispatched.values()).items())),
            "trained": dict(sorted(self.trained.items())),
            "bytes-down": sum(self.bytes_down.values()) + self.before.bytes_down,
            "bytes-up": self.bytes_up + self.before.bytes_up,
            "bytes-evaluation": self.bytes_beside,
            "macs": int(self.macs + self.before.macs),
            "macs-evaluation": self.macs_beside,
            "modelled-seconds": sum(self.seconds.values()) + prepared,
            "modelled-seconds-training": sum(s for name, s in self.seconds.items() if name.startswith("train"))
            + prepared,
            "joules": self.joules + self.before.joules,
            **self.before.line(),
            **({} if self.clipped is None else {"clipped": self.clipped}),
            "refused": self.refused,
            "failed": self.failed,
            **self.quality,
            **({"void": True} if self.is_void else {}),
        }
        if self.losses:
            total = sum(weight for weight, _ in self.losses)
            line["train-loss"] = sum(weight * loss for weight, loss in self.losses) / total
        return {**line, **self._clients_line(), **self._personal_line()}

    def _clients_line(self) -> dict[str, Any]:
        """Accuracy of levels on the clients' own samples: mean, worst tenth, and by kind where there are several."""
        tested = [(kind, e.accuracy) for kind, e in self.clients if e.num_samples]
        if not tested:
            return {}
        all_of_them = [accuracy for _, accuracy in tested]
        by_kind = _mean_by_group(tested)
        return {
            "accuracy-clients": float(np.mean(all_of_them)),
            "accuracy-worst-tenth": worst_tenth(all_of_them),
            **({f"{KIND_PREFIX}{kind}": mean for kind, mean in by_kind.items()} if len(by_kind) > 1 else {}),
        }

    def _personal_line(self) -> dict[str, Any]:
        """Accuracy of the clients' own models: mean over clients, their worst tenth, and by capability."""
        tested = [(group, e.accuracy) for group, e in self.personal if e.num_samples]
        if not tested:
            return {}
        all_of_them = [accuracy for _, accuracy in tested]
        return {
            "clients-personal": len(tested),
            "accuracy-personal": float(np.mean(all_of_them)),
            "accuracy-personal-worst-tenth": worst_tenth(all_of_them),
            **{f"accuracy-personal-{group}": mean for group, mean in _mean_by_group(tested).items()},
        }


def _mean_by_group(tested: Sequence[tuple[str, float]]) -> dict[str, float]:
    groups = sorted({group for group, _ in tested})
    return {name: float(np.mean([accuracy for group, accuracy in tested if group == name])) for name in groups}


def worst_tenth(accuracies: list[float]) -> float:
    """Mean of the lowest tenth of the clients, one at least."""
    return float(np.mean(sorted(accuracies)[: max(1, len(accuracies) // 10)]))
