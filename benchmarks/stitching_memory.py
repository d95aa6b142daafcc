"""Memory of a client that stitches against one that trains the same network: `python -m benchmarks.stitching_memory`.

Both are measured in fresh processes that have loaded everything but data and weights, from there until the client's
work is done. Stitching: all phases of all rounds until the network stands, one block in memory at a time; what the
server would solve is drawn at random. Training: a part received, three batches, and the update. `growth` is what the
system gave, `torch` the most that torch had allocated at once, by its profiler (the part received is not torch's),
`modelled` what FedStitch's page (stitching) and `flexfed.cost` (training) say.

Prints the table and writes it to results/stitching-memory.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path as File
from statistics import median
from typing import NamedTuple

import numpy as np
import psutil
import torch
from safetensors.torch import save_file

from benchmarks.measuring import in_child
from benchmarks.memory import allocated_peak, can_measure_growth, growth_of, job_of, profiled_peak, table
from benchmarks.speed import ONE_THREAD, machine
from flexfed.cost import training_memory
from flexfed.jobs import Task, make_update, train_network
from flexfed.stitching.blocks import Pool, make_pool
from flexfed.stitching.families import torchvision_source
from flexfed.stitching.network import build_stitched
from flexfed.stitching.path import Bridge, Path
from flexfed.stitching.phases import (
    Work,
    bridge_sums,
    count_correct,
    head_sums,
    modelled_peak_bytes,
    plan_bridge,
    plan_count,
    plan_head,
)
from flexfed.stitching.scoring import ScoreRule, Scoring, score_blocks
from flexfed.stitching.zoos import open_pool
from flexfed.submodel import full
from flexfed.training import Training
from flexfed.units import whole_layout

NUM_CLASSES = 10
NUM_IMAGES = 64  # of every phase: FedStitch's page has so many for scoring
ROWS_MAX = 4096  # that a bridge is fitted on, as the page has it
CLAIM = 0.795
RESULTS = File(__file__).resolve().parent / "results" / "stitching-memory.md"


@dataclass(frozen=True)
class Case:
    """A network that is stitched from a zoo, and how many samples are taken at a time.

    Attributes:
        zoo: its name; weights of "torchvision" are drawn at random, since none may be at hand.
        sources: of the zoo, whose blocks are the candidates; empty = all.
        side: of the images.
        ids: the path.
        name: of the network.
        batch_size: of either client.
    """

    zoo: str
    sources: str
    side: int
    ids: tuple[int, ...]
    name: str
    batch_size: int = 16

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Of one image."""
        return (3, self.side, self.side)

    def pool(self, folder: str) -> Pool:
        """The blocks.

        Args:
            folder: where the random weights of "torchvision" are.
        """
        if self.zoo != "torchvision":
            return open_pool(self.zoo, self.input_shape, self.sources)
        sources = [torchvision_source(name) for name in self.sources.split(",")]
        pool, _ = make_pool("torchvision", sources, self.input_shape)
        return replace(pool, files={source.name: weight_file(folder, source.name) for source in sources})

    def task(self, pool: Pool) -> Task:
        """The stitched network, to be trained whole."""
        factory = partial(build_stitched, pool, self.ids, NUM_CLASSES)
        training = Training(local_epochs=1, batch_size=self.batch_size)
        return Task(factory, whole_layout(factory), self.input_shape, NUM_CLASSES, training, None)


NETWORKS = (
    Case("shapes", "", 24, (0, 1, 2, 3), "residual"),
    Case("shapes", "", 24, (0, 5, 10, 3), "mixed path"),
    Case("cifar", "cifar-resnet20,cifar-resnet56", 32, (0, 1, 2, 3), "resnet20"),
    Case("cifar", "cifar-resnet20,cifar-resnet56", 32, (4, 5, 6, 7), "resnet56"),
    Case("cifar", "cifar-resnet20,cifar-resnet56", 32, (0, 5, 2, 7), "mixed path"),
    Case("torchvision", "resnet18,mobilenet_v2", 64, (0, 1, 2, 3), "resnet18"),
    Case("torchvision", "resnet18,mobilenet_v2", 64, (4, 5, 6, 7), "mobilenet_v2"),
    Case("torchvision", "resnet18,mobilenet_v2", 64, (0, 5, 2, 7), "mixed path"),
)
CASES = tuple(replace(case, batch_size=size) for case in NETWORKS for size in (16, 32))


def weight_file(folder: str, source: str) -> File:
    """Where a source's random weights are."""
    return File(folder) / f"{source}.safetensors"


def draw_weights(folder: str, cases: Sequence[Case]) -> None:
    """Random weights for all of torchvision's networks; their memory is that of trained ones."""
    for name in sorted({name for case in cases if case.zoo == "torchvision" for name in case.sources.split(",")}):
        state = torchvision_source(name).build().state_dict()
        save_file({tensor: value.contiguous() for tensor, value in state.items()}, weight_file(folder, name))


class Bytes(NamedTuple):
    """What one client takes."""

    growth: int
    torch: int
    modelled: int


class Step(NamedTuple):
    """A phase: what it will do, and how to do it."""

    work: Work
    run: Callable[[], object]


def steps(case: Case, pool: Pool) -> Iterator[Step]:
    """All that a client does until the network stands; candidates are the blocks at the path's next place."""
    images = torch.randn(NUM_IMAGES, *case.input_shape, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(NUM_IMAGES) % NUM_CLASSES
    size, rule, rng = case.batch_size, ScoreRule(), np.random.default_rng(0)
    path, targets = Path(), dict[int, float]()
    for place, block in enumerate(case.ids):
        candidates = tuple(b.id for b in pool.blocks if b.index == place + 1)
        scoring = Scoring(pool, path, candidates, rule, dict(targets)).work(NUM_IMAGES, size)
        score = partial(score_blocks, pool, path, candidates, images, labels, NUM_CLASSES, rule, 0, dict(targets))
        yield Step(scoring, partial(score, batch_size=size))
        targets |= dict.fromkeys(candidates, 0.5)
        bridge = None
        if path.needs_bridge(pool, block):
            fit = partial(bridge_sums, pool, path, block, images, ROWS_MAX, rng, batch_size=size)
            yield Step(plan_bridge(pool, path, block, NUM_IMAGES, size), fit)
            bridge = _random_bridge(pool, path, block, rng)
        path = path.then(block, bridge)
        classify = partial(head_sums, pool, path, images, labels, NUM_CLASSES, batch_size=size)
        yield Step(plan_head(pool, path, NUM_CLASSES, NUM_IMAGES, size), classify)
        head = np.zeros((pool.blocks[block].shape_out[0] + 1, NUM_CLASSES))
        count = partial(count_correct, pool, path, head, images, labels, batch_size=size)
        yield Step(plan_count(pool, path, NUM_CLASSES, NUM_IMAGES, size), count)


def _random_bridge(pool: Pool, path: Path, block: int, rng: np.random.Generator) -> Bridge:
    before, after = pool.blocks[path.ids[-1]].shape_out[0], pool.blocks[block].shape_in[0]
    weight = rng.standard_normal((after, before), dtype=np.float32) / np.float32(np.sqrt(before))
    return Bridge(weight, np.zeros(after, dtype=np.float32))


def stitching(case: Case, folder: str) -> Bytes:
    """The client that stitches; called in a process of its own."""
    pool = case.pool(folder)
    works = [step.work for step in steps(case, pool)]  # and whatever is traced once

    def stitch() -> None:
        for step in steps(case, pool):
            step.run()

    modelled = max(modelled_peak_bytes(pool, work, case.batch_size) for work in works)
    return Bytes(growth_of(stitch), allocated_peak(stitch), modelled)


def training(case: Case, folder: str) -> Bytes:
    """The client that trains; called in a process of its own."""
    task = case.task(case.pool(folder))
    part = full(task.layout)
    task.memory_to_train(part), task.macs(part)  # a client asks before it looks at what is free

    def train() -> None:
        job, samples = job_of(task, part)
        trained = train_network(task.network(job.arrays), job, task, samples)
        make_update(job, task, part, job.arrays, trained, 1.0)

    modelled = training_memory(task.factory, task.layout, part, task.input_shape, task.training)
    return Bytes(growth_of(train), profiled_peak(task, part), modelled)


HEADS = ("network", "batch", *(f"{k}: {what}" for k in Bytes._fields for what in ("stitching", "training", "less")))


def row(case: Case, stitched: Bytes, trained: Bytes) -> list[str]:
    """A row's cells."""
    cells = [f"{case.zoo}, {case.name}", str(case.batch_size)]
    for small, large in zip(stitched, trained, strict=True):
        cells += [f"{small / 1e6:.1f}", f"{large / 1e6:.1f}", f"{saved(small, large):.1%}"]
    return cells


def saved(small: int, large: int) -> float:
    """Share of the larger number that the smaller one does without."""
    return 1 - small / large


def summary(measured: Mapping[Case, tuple[Bytes, Bytes]]) -> list[str]:
    """What the rows say of the claim."""
    lines = []
    for kind in Bytes._fields:
        shares = [saved(getattr(small, kind), getattr(large, kind)) for small, large in measured.values()]
        kept = sum(share >= CLAIM for share in shares)
        lines.append(
            f"- {kind}: {min(shares):.1%} to {max(shares):.1%} less, median {median(shares):.1%}; "
            f"{CLAIM:.1%} or more in {kept} of {len(shares)} cases."
        )
    return lines


def report(measured: Mapping[Case, tuple[Bytes, Bytes]]) -> str:
    """The page of results."""
    rows = [row(case, *found) for case, found in measured.items()]
    lines = [
        "# Memory of a client that stitches",
        "",
        "Written by `python -m benchmarks.stitching_memory`, which says what was measured. Sizes in MB (10^6).",
        "",
        f"{machine()} {psutil.virtual_memory().total / 1e9:.0f} GB of memory.",
        "",
        *table(rows, HEADS),
        "",
        f'The claim to examine is {CLAIM:.1%} less memory than training ("up to"; FedStitch\'s abstract). Here:',
        "",
        *summary(measured),
        "",
        "`growth` and `torch` are measured, `modelled` is not. Growth holds kernels that torch loads at the first "
        "batch, for either client; it counts weight files while they are mapped. Not in any number: Python, torch and "
        "the app themselves, which are the same for both. Every source's block is scored at its place, so the largest "
        "block of the pool rules, whichever path is taken. The model of stitching counts a block with its input and "
        "output, not what it holds inside. Weights of torchvision's networks are random.",
        "",
    ]
    return "\n".join(lines)


def possible(case: Case) -> bool:
    """Whether the weights are at hand."""
    return case.zoo != "cifar" or bool(os.environ.get("FLEXFED_DATA"))


def main() -> None:
    """Measure, print, write."""
    argparse.ArgumentParser(prog="python -m benchmarks.stitching_memory", description=__doc__).parse_args()
    if not can_measure_growth():
        raise SystemExit("the growth of a process can be measured on Linux only: /proc/self/clear_refs is missing")
    os.environ.update(ONE_THREAD)
    cases = [case for case in CASES if possible(case)]
    with tempfile.TemporaryDirectory() as folder:
        draw_weights(folder, cases)
        found = {case: (in_child(stitching, case, folder), in_child(training, case, folder)) for case in cases}
    text = report(found)
    print(text)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text)


if __name__ == "__main__":
    main()
