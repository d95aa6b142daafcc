"""FedStitch on a client: what it answers in each phase, from the message and from what it kept, forward passes only.

A client keeps bridges and the scores of native outputs (`flexfed.stitching.scoring`), so that neither has to travel or
to be found out twice. It needs none of it: a message to a client that kept nothing brings all bridges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np

from flexfed.compute import numbers
from flexfed.cost import memory_budget
from flexfed.jobs import free_memory_of
from flexfed.methods.fedstitch import FedStitchConfig, pool_of
from flexfed.questions import Answer, Question
from flexfed.stitching.actuators import Rapl, open_actuator
from flexfed.stitching.blocks import Pool
from flexfed.stitching.bridges import Sums
from flexfed.stitching.clocks import ModelledClock, WallClock
from flexfed.stitching.dvfs import dvfs_of
from flexfed.stitching.energy import Controller, Instruments, Spent
from flexfed.stitching.path import Bridge, Path, ids_of, packed, unpacked
from flexfed.stitching.phases import (
    GROUP,
    Work,
    balanced_subset,
    bridge_sums,
    count_correct,
    head_sums,
    modelled_peak_bytes,
    plan_bridge,
    plan_count,
    plan_head,
)
from flexfed.stitching.scoring import Scoring, score_blocks
from flexfed.units import Arrays

if TYPE_CHECKING:
    from flexfed.data import ClientData

Plan = Callable[[int], Work]
"""Batch size -> the work of a phase."""


@dataclass(frozen=True)
class Memory:
    """What a client keeps.

    Attributes:
        episode: of its bridges.
        bridges: position in the path -> bridge.
        targets: block -> how well its native output tells this client's classes.
    """

    episode: int = 0
    bridges: Mapping[int, Bridge] = field(default_factory=dict)
    targets: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, question: Question) -> Memory:
        """What it kept, and what came; bridges of another episode are forgotten."""
        kept, episode = question.state, int(cast(int, question.config["episode"]))
        same = bool(kept) and int(kept["episode"]) == episode
        bridges = {**(unpacked(kept) if same else {}), **unpacked(question.arrays)}
        targets = dict(zip(kept["targets/ids"].tolist(), kept["targets/values"].tolist(), strict=True)) if kept else {}
        return cls(episode, bridges, targets)

    def state(self) -> Arrays:
        """For the client's disk."""
        return {
            "episode": np.array(self.episode),
            "targets/ids": np.array(sorted(self.targets), dtype=np.int64),
            "targets/values": np.array([self.targets[b] for b in sorted(self.targets)], dtype=np.float64),
            **packed(self.bridges),
        }


class Bench:
    """What a phase works with: the blocks, the path so far, and whoever sets the frequencies until it is left."""

    def __init__(self, question: Question, config: FedStitchConfig):
        self.question, self.config = question, config
        self.pool: Pool = pool_of(config, question.input_shape)
        asked = question.config
        if asked["digest"] != self.pool.digest:
            raise ValueError(
                f"this device's zoo {config.zoo!r} holds other blocks (digest {self.pool.digest[:12]}) than the "
                f"server's ({str(asked['digest'])[:12]}): copy the server's folder of weights here"
            )
        self.memory = Memory.of(question)
        ids = ids_of(str(asked.get("path", "")))
        self.path = Path(ids, {p: b for p, b in self.memory.bridges.items() if p < len(ids)})
        self._actuator = open_actuator(config.actuator)
        self.pacer = self._controller()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._actuator.close()

    def _controller(self) -> Controller:
        config, asked = self.config, self.question.config
        measured = config.clock == "measured"
        rng = np.random.default_rng([self.question.seed, 3])
        instruments = Instruments(
            WallClock() if measured else ModelledClock(rng, config.slowdown),
            self._actuator,
            Rapl() if measured else None,
        )
        dvfs = dvfs_of(self.question.device, self._actuator.clock_ghz)
        deadline, correction = (float(cast(float, asked[key])) for key in ("deadline", "correction"))
        return Controller(dvfs, deadline, correction, config.energy_config, instruments)

    def batch_size(self, plan: Plan) -> int:
        """Images at a time: halved until the phase fits into the memory that is free.

        Raises:
            RuntimeError: not even the smallest group of images does.
        """
        size, free = self.config.batch_size, free_memory_of(self.question.device, self.question.seed)
        while (need := memory_budget(modelled_peak_bytes(self.pool, plan(size), size))) > free:
            if size <= GROUP:
                raise RuntimeError(f"out of memory: the phase needs {need / 1e6:.0f} MB, {free / 1e6:.0f} MB are free")
            size //= 2
        return size

    def answer(self, arrays: Arrays, macs: int, told: Mapping[str, float], keeps: Memory | None = None) -> Answer:
        """The answer, and what it cost."""
        spent = self.pacer.spent()
        levels = np.array(spent.levels, dtype=np.uint8)
        is_new = keeps is not None or bool(self.question.arrays.keys() - {"head"})  # bridges came
        state = (keeps or self.memory).state() if is_new else {}
        return Answer({**told, **costs(spent, macs)}, {**arrays, "levels": levels}, state)


def costs(spent: Spent, macs: int) -> dict[str, float]:
    """What an answer tells of its cost."""
    told = {
        "macs": float(macs),
        "modelled-seconds": spent.seconds,
        "modelled-joules": spent.joules,
        "correction": spent.correction,
        "deadline-missed": float(spent.missed),
    }
    return told if spent.measured_joules is None else {**told, "measured-joules": spent.measured_joules}


def score(question: Question, config: FedStitchConfig, data: ClientData) -> Answer:
    """Scores of the candidates, on a fixed balanced subset of the client's training samples."""
    with Bench(question, config) as bench:
        asked: Any = question.config
        candidates = tuple(asked["candidates"])
        rng = np.random.default_rng([int(asked["subset-seed"]), question.device.partition])
        rows = balanced_subset(numbers(data.train.labels), config.score_images, rng)
        known = bench.memory.targets
        scoring = Scoring(bench.pool, bench.path, candidates, config.score_rule, known)
        found = score_blocks(
            bench.pool,
            bench.path,
            candidates,
            data.train.inputs[rows],
            data.train.labels[rows],
            question.num_classes,
            config.score_rule,
            question.seed,
            known,
            bench.pacer,
            bench.batch_size(lambda size: scoring.work(len(rows), size)),
        )
        keeps = Memory(bench.memory.episode, bench.memory.bridges, found.targets)
        return bench.answer({"scores": found.values}, found.macs, {"examples": len(data.train.labels)}, keeps)


def stitch(question: Question, config: FedStitchConfig, data: ClientData) -> Answer:
    """Sums for the bridge in front of the block that was chosen."""
    with Bench(question, config) as bench:
        block, inputs = int(cast(int, question.config["block"])), data.train.inputs
        size = bench.batch_size(lambda size: plan_bridge(bench.pool, bench.path, block, len(inputs), size))
        rng = np.random.default_rng([question.seed, 4])
        found = bridge_sums(bench.pool, bench.path, block, inputs, config.bridge_rows, rng, bench.pacer, size)
        return bench.answer(_sums(found.sums), found.macs, {"rows": found.sums.num_rows})


def head(question: Question, config: FedStitchConfig, data: ClientData) -> Answer:
    """Sums for the head behind the path."""
    with Bench(question, config) as bench:
        inputs, labels, classes = data.train.inputs, data.train.labels, question.num_classes
        size = bench.batch_size(lambda size: plan_head(bench.pool, bench.path, classes, len(inputs), size))
        found = head_sums(bench.pool, bench.path, inputs, labels, classes, bench.pacer, size)
        return bench.answer(_sums(found.sums), found.macs, {"rows": found.sums.num_rows})


def test(question: Question, config: FedStitchConfig, data: ClientData) -> Answer:
    """How many of the client's validation samples the path and its head get right."""
    with Bench(question, config) as bench:
        inputs, labels, classes = data.validation.inputs, data.validation.labels, question.num_classes
        size = bench.batch_size(lambda size: plan_count(bench.pool, bench.path, classes, len(inputs), size))
        found = count_correct(bench.pool, bench.path, question.arrays["head"], inputs, labels, bench.pacer, size)
        return bench.answer({}, found.macs, {"correct": found.correct, "num-samples": found.num_images})


def _sums(sums: Sums) -> Arrays:
    return {"gram": sums.gram, "cross": sums.cross}
