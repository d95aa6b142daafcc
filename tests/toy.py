"""What several test files share: a network with every kind of tie, a dense oracle, and a four-client run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from flwr.app import Array, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from safetensors.numpy import load_file
from torch import Tensor, nn

import client_app
import server_app
from flexfed.checkpoint import load_checkpoint
from flexfed.config import Experiment
from flexfed.flower.grid import InProcessGrid
from flexfed.jobs import Task, initial_arrays
from flexfed.overrides import defaults
from flexfed.runs import load_run
from flexfed.submodel import Submodel, narrow_shapes, positions, unflatten, unpack
from flexfed.units import Arrays, Layout, trace_layout
from strategies import STRATEGIES
from strategies.base import SubmodelStrategy

AVERAGING = sorted(name for name, kind in STRATEGIES.items() if issubclass(kind, SubmodelStrategy))
"""The strategies whose clients train parts of a network; FedStitch's answer questions."""
ROOT = Path(__file__).resolve().parent.parent
DIGITS = (1, 8, 8)
Reply = tuple[Submodel, np.ndarray, float]
"""What the averager takes: submodel, flat difference, weight."""


class Ties(nn.Module):
    """Channels tied by a residual sum, a depthwise convolution, a concatenation and a flatten; (1, 4, 4) in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 5, 3, padding=1)
        self.back = nn.Conv2d(5, 6, 1, bias=False)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.side = nn.Conv2d(6, 4, 1)
        self.joined = nn.BatchNorm2d(10)
        self.fc = nn.Linear(10 * 4, 7)
        self.classifier = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.back(self.inner(x).relu())
        x = self.joined(torch.cat([self.depthwise(x), self.side(x)], 1))
        x = nn.functional.max_pool2d(x, 2)
        return self.classifier(self.fc(x.flatten(1)).relu())


class Plain(nn.Sequential):
    """No norms; digits in."""

    def __init__(self, num_classes: int) -> None:
        layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, num_classes)]
        super().__init__(*layers)


class Decoder(nn.Module):
    """Transposed convolutions, whose output axis is the second one; (2, 3, 3) in."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv2d(2, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.out = nn.ConvTranspose2d(6, 5, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.up(self.encode(x).relu())).relu())


def by_hand() -> Layout:
    """A layout nobody traced: a scalar, a tensor that is never cut, one cut on its second axis only."""
    a, b = np.arange(5), 5 + np.arange(4)
    return Layout(
        groups={"a": range(0, 5), "b": range(5, 9), "out": range(9, 12)},
        axes={
            "temperature": (),
            "table": (None, None),
            "embedding": (None, a),
            "mix.weight": (b, np.repeat(a, 3)),
            "mix.bias": (b,),
            "out.weight": (9 + np.arange(3), np.concatenate([a, b])),
        },
        shapes={
            "temperature": (),
            "table": (2, 3),
            "embedding": (7, 5),
            "mix.weight": (4, 15),
            "mix.bias": (4,),
            "out.weight": (3, 9),
        },
        fixed=frozenset({"out"}),
    )


LAYOUTS: dict[str, Callable[[], Layout]] = {
    "ties": lambda: trace_layout(Ties, (1, 4, 4)),
    "decoder": lambda: trace_layout(Decoder, (2, 3, 3)),
    "by-hand": by_hand,
}


# --- random parts ---------------------------------------------------------------------------------------------


def random_arrays(layout: Layout, rng: np.random.Generator) -> Arrays:
    """A full model of normal numbers."""
    return {n: np.asarray(rng.standard_normal(shape), dtype=np.float32) for n, shape in layout.shapes.items()}


def random_units(layout: Layout, rng: np.random.Generator, ratio: float | None = None) -> np.ndarray:
    """A random subset of every group, with gaps, one unit at least; class outputs whole."""
    units = layout.fixed_units.copy()
    for name, span in layout.groups.items():
        if name not in layout.fixed:
            share = rng.uniform() if ratio is None else ratio
            kept = max(1, round(share * len(span)))
            units[span.start + rng.permutation(len(span))[:kept]] = True
    return units


def random_difference(layout: Layout, submodel: Submodel, rng: np.random.Generator) -> np.ndarray:
    """A flat difference that fits: of masked tensors the kept entries only."""
    shapes = narrow_shapes(layout, submodel)
    size = sum(int(submodel.masks.get(name, np.ones(shape)).sum()) for name, shape in shapes.items())
    return np.asarray(rng.standard_normal(size), dtype=np.float32)


def scatter(layout: Layout, submodel: Submodel, part: Mapping[str, np.ndarray]) -> Arrays:
    """A part put back where it stands, zero elsewhere: by plain indexing, not by the library's way."""
    full: Arrays = {name: np.zeros(shape, dtype=np.float32) for name, shape in layout.shapes.items()}
    for name, values in part.items():
        full[name][place(layout, submodel, name)] = values
    return full


def place(layout: Layout, submodel: Submodel, name: str) -> tuple[np.ndarray, ...]:
    """The open mesh of the positions that a submodel keeps of a tensor."""
    kept = positions(layout, submodel, name)
    shape = layout.shapes[name]
    return np.ix_(*[np.arange(n) if index is None else index for index, n in zip(kept, shape, strict=True)])


def dense_mean(
    layout: Layout, previous: Arrays, replies: Sequence[Reply], per: str = "coverage"
) -> tuple[Arrays, dict[str, np.ndarray]]:
    """The covered mean entry by entry in float64, and which entries were covered: the averager's oracle."""
    top = {name: np.zeros(array.shape) for name, array in previous.items()}
    bottom = {name: np.zeros(array.shape) for name, array in previous.items()}
    for submodel, flat, weight in replies:
        for name, values in unflatten(layout, submodel, flat).items():
            mask = submodel.masks.get(name, np.ones(values.shape, dtype=bool))
            top[name][place(layout, submodel, name)] += weight * mask * values.astype(np.float64)
            bottom[name][place(layout, submodel, name)] += weight * mask
    covered = {name: weight > 0 for name, weight in bottom.items()}
    if per == "total":
        bottom = {name: np.full(b.shape, sum(weight for *_, weight in replies)) for name, b in bottom.items()}
    mean = {n: np.divide(top[n], bottom[n], out=np.zeros(top[n].shape), where=covered[n]) for n in previous}
    return {name: previous[name] + mean[name] for name in previous}, covered


def same_bits(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    """Are two sets of arrays equal byte for byte?"""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in a
    )


# --- a run with four clients ----------------------------------------------------------------------------------

QUICK: dict[str, Any] = {
    "num-server-rounds": 1,
    "fraction-train": 1.0,
    "local-epochs": 1,
    "batch-size": 64,
    "flexfl.pretrain-epochs": 1,
    "autoflip.explore-epochs": 1,
}
Alter = Callable[[Message, Message, int], Message | None]
"""(request, reply, partition) -> the reply that arrives, or None: it is lost."""


class ScriptedGrid(InProcessGrid):
    """An in-process federation whose replies can be altered, lost, and late.

    Args:
        app: the ClientApp.
        num_supernodes: clients.
        run_config: of the run.
        alter: see `Alter`.
        delay: drawn for each message: how many pulls find nothing before its reply is there.
    """

    def __init__(
        self,
        app: ClientApp,
        num_supernodes: int,
        run_config: Mapping[str, Any] | None = None,
        alter: Alter | None = None,
        delay: Callable[[], int] = lambda: 0,
    ):
        super().__init__(app, num_supernodes, run_config)
        self.requests: dict[str, Message] = {}
        self.pulls_left: dict[str, int] = {}
        self.alter = alter or (lambda request, reply, partition: reply)
        self.delay = delay

    def partition(self, request: Message) -> int:
        """The client that a message goes to."""
        return list(self.get_node_ids()).index(request.metadata.dst_node_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push, and remember what was asked."""
        ids = []
        for message in messages:
            ids += super().push_messages([message])
            self.requests[ids[-1]] = message
            self.pulls_left[ids[-1]] = self.delay()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull what is due, altered, the last sent first."""
        due = []
        for message_id in reversed(list(message_ids)):
            self.pulls_left[message_id] -= 1
            if self.pulls_left[message_id] < 0:
                for reply in super().pull_messages([message_id]):
                    request = self.requests[message_id]
                    due.append(self.alter(request, reply, self.partition(request)))
        return [reply for reply in due if reply is not None]


_ids = count()


def run_toy(
    folder: Path,
    strategy: str = "fedavg",
    values: Mapping[str, Any] | None = None,
    clients: int = 4,
    alter: Alter | None = None,
    delay: Callable[[], int] = lambda: 0,
) -> Path:
    """One quick run of a strategy in this process, without its picture; returns the run folder."""
    config = toy_config(folder, strategy, values)
    grid = ScriptedGrid(client_app.app, clients, config, alter, delay)
    with patch("flexfed.report.curves_png"):
        return server_app.run(grid, config, f"toy{next(_ids):05d}")  # as long as any other: it travels


def toy_config(folder: Path, strategy: str, values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The whole flat configuration of a quick run."""
    return {**defaults(ROOT), **QUICK, "strategy": strategy, "runs-dir": str(folder), **(values or {})}


def toy_task(strategy: str = "fedavg", **values: Any) -> Task:
    """The default network on digits, as a run of that strategy has it."""
    given = {key.replace("_", "-"): value for key, value in values.items()}
    return Experiment.read({"strategy": strategy, **given}).task(10, DIGITS)


def task_of(folder: Path) -> Task:
    """The network of a quick run, as the run has it."""
    return Experiment.read(load_run(folder).config).task(10, DIGITS)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The rounds of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_model(folder: Path) -> Arrays:
    """The trained tensors of the model that a run left, without batch norm's statistics."""
    found = load_file(folder / "model.safetensors")
    return {name: array for name, array in found.items() if not name.endswith((".running_mean", ".running_var"))}


def initial_model(folder: Path, seed: int = 1) -> Arrays:
    """The model that a run began with, cut to the size of the one it left."""
    initial = initial_arrays(task_of(folder), "", seed)
    return {n: initial[n][tuple(slice(k) for k in array.shape)] for n, array in final_model(folder).items()}


def published(folder: Path, arrays: Arrays) -> Arrays:
    """Tensors as the run would leave them in its model: zero where its last mask leaves entries out."""
    stood = load_checkpoint(folder / "checkpoint")
    assert stood is not None
    masks = unpack(task_of(folder).layout, list(stood.levels.values())[-1]).masks
    return {name: np.where(masks.get(name, True), array, np.float32(0)) for name, array in arrays.items()}


def sent_part(request: Message, reply: Message | None = None, layout: Layout | None = None) -> Submodel:
    """The part that a job holds, or its reply, in a first round: masks that both share travel once."""
    layout = layout or toy_task().layout
    sent = unpack(layout, dict(request.content.config_records["submodel"]))  # type: ignore[arg-type]
    if reply is None:
        return sent
    return unpack(layout, dict(reply.content.config_records["submodel"]), sent)  # type: ignore[arg-type]


def with_difference(reply: Message, change: Callable[[np.ndarray], np.ndarray]) -> Message:
    """The same train reply with another difference."""
    array = reply.content.array_records["arrays"]["part"]
    values = np.ascontiguousarray(change(np.frombuffer(array.data, dtype=array.dtype).copy()))
    reply.content.array_records["arrays"]["part"] = Array(
        dtype=str(values.dtype), shape=values.shape, stype=array.stype, data=values.tobytes()
    )
    return reply


def as_message(content: RecordDict) -> Message:
    """Records as a message; Flower wants to know its task first, which a grid tells it."""
    InProcessGrid(client_app.app, 1)
    return Message(content, dst_node_id=1, message_type="train")


def failure(request: Message, reason: str = "out of memory") -> Message:
    """The reply of a client that failed."""
    return Message(Error(code=2, reason=reason), reply_to=request)
