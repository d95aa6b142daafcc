"""Folding replies into the model: the Averager against a bare slice-add, and against Flower's FedAvg."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from benchmarks.measuring import Row, in_child, interleaved, memory_peak
from flexfed.averaging import Averager
from flexfed.cost import num_parameters
from flexfed.flower.messages import from_array, read_update, update_content
from flexfed.jobs import Update
from flexfed.methods.heterofl import limit_classes
from flexfed.models import model_factory
from flexfed.select import prefix_ratio, window
from flexfed.submodel import Submodel, full, narrow_shapes, positions
from flexfed.units import Arrays, Layout, trace_layout

INPUT_SHAPE = (3, 32, 32)
NUM_CLASSES = 10
RATES = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
NUM_REPLIES = 100
NUM_FULL = 20  # replies of full models, for Flower's FedAvg
REPETITIONS = 7


@lru_cache(maxsize=1)
def resnet_layout() -> Layout:
    """HeteroFL's ResNet-18: 11,172,170 parameters."""
    return trace_layout(model_factory("heterofl-resnet18", NUM_CLASSES, INPUT_SHAPE), INPUT_SHAPE)


def draw_model(layout: Layout) -> Arrays:
    """Tensors of a model, drawn."""
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in layout.shapes.items()}


def reply(layout: Layout, submodel: Submodel, number: int) -> RecordDict:
    """A client's reply as it comes out of a message, with bytes of its own."""
    size = num_parameters(layout, submodel)
    noise = np.resize(np.random.default_rng(number).standard_normal(1 << 16, dtype=np.float32), size)
    return update_content(Update(submodel, noise, 10.0 + number % 7, {"train-loss": 1.0, "macs": 1e9}))


def level(layout: Layout, number: int) -> Submodel:
    """Rates in turn."""
    return prefix_ratio(layout, RATES[number % len(RATES)])


def limited(layout: Layout, number: int) -> Submodel:
    """Rates in turn, with the classifier rows of two labels only."""
    present = np.zeros(NUM_CLASSES, dtype=bool)
    present[np.random.default_rng(number).permutation(NUM_CLASSES)[:2]] = True
    return limit_classes(layout, level(layout, number), present)


def rolled(layout: Layout, number: int) -> Submodel:
    """FedRolex windows in turn, of one round: they wrap around."""
    return window(layout, RATES[number % len(RATES)], start=37)


def fold(layout: Layout, previous: Arrays, contents: Iterator[RecordDict]) -> Arrays:
    """What the server does with its replies: parse, check, weigh, add, result."""
    averager = Averager(layout, previous)
    for content in contents:
        update = read_update(content, layout)
        averager.add(update.submodel, update.difference, update.weight)
    return averager.result()


class SliceAdd:
    """The yardstick: adds the same bytes tensor by tensor into a full model, without parsing or weights."""

    def __init__(self, layout: Layout, submodels: list[Submodel], contents: list[RecordDict]):
        self.into = {name: np.zeros(shape, dtype=np.float32) for name, shape in layout.shapes.items()}
        self.steps = [self._steps(layout, s, c) for s, c in zip(submodels, contents, strict=True)]

    def _steps(self, layout: Layout, submodel: Submodel, content: RecordDict) -> list[tuple[np.ndarray, ...]]:
        """(view into the full model, rows or None, values) of every tensor."""
        flat, stop, steps = from_array(content.array_records["arrays"]["part"]), 0, []
        for name, shape in narrow_shapes(layout, submodel).items():
            start, stop = stop, stop + int(np.prod(shape))
            steps.append((*self._place(layout, submodel, name), flat[start:stop].reshape(shape)))
        return steps

    def _place(self, layout: Layout, submodel: Submodel, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        view, rows = self.into[name], None
        for axis, kept in enumerate(positions(layout, submodel, name)):
            if kept is not None and axis == 0 and kept[-1] != len(kept) - 1:
                rows = kept  # classifier rows of some labels
            elif kept is not None:
                view = view[(slice(None),) * axis + (slice(len(kept)),)]
        return view, rows

    def __call__(self) -> None:
        """Add every reply."""
        for steps in self.steps:
            for view, rows, values in steps:
                if rows is None:
                    view += values
                else:
                    view[rows] += values


def against_slice_add(kind: str) -> Row:
    """100 replies of five rates: the Averager's time over the slice-add's, start to result."""
    layout, make = resnet_layout(), {"prefixes": level, "label-limited rows": limited}[kind]
    submodels = [make(layout, number) for number in range(NUM_REPLIES)]
    contents = [reply(layout, submodel, number) for number, submodel in enumerate(submodels)]
    previous, bare = draw_model(layout), SliceAdd(layout, submodels, contents)
    seconds = interleaved(
        {"ours": lambda: fold(layout, previous, iter(contents)), "bare": bare}, REPETITIONS
    )
    detail = f"{_per_reply(seconds['ours'])} a reply, bare {_per_reply(seconds['bare'])}"
    return Row(f"folding, {kind}: Averager / slice-add", seconds["ours"] / seconds["bare"], "x", 1.5, detail)


def _per_reply(seconds: float, num: int = NUM_REPLIES) -> str:
    return f"{1e3 * seconds / num:.2f} ms"


def against_flower() -> Row:
    """20 replies of full models: Flower's FedAvg and the Averager, time and what each holds."""
    layout, previous = resnet_layout(), draw_model(resnet_layout())
    contents = [reply(layout, full(layout), number) for number in range(NUM_FULL)]
    theirs = [_flower_reply(previous, number) for number in range(NUM_FULL)]
    seconds = interleaved(
        {
            "ours": lambda: fold(layout, previous, iter(contents)),
            "flower": lambda: aggregate_arrayrecords(theirs, "num-examples"),
        },
        REPETITIONS,
    )
    ours, flower = (_per_reply(seconds[name], NUM_FULL) for name in ("ours", "flower"))
    detail = f"{ours} a reply, Flower {flower}"
    return Row("folding, full models: Averager / Flower's FedAvg", seconds["ours"] / seconds["flower"], "x", None, detail)


def _flower_reply(arrays: Arrays, number: int) -> RecordDict:
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    return RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 10 + number % 7})})


KINDS = {"prefixes": level, "label-limited rows": limited, "rolling windows": rolled}


def peak_over_model(kind: str, num_replies: int) -> float:
    """Memory above the start while so many replies are folded, in models; replies come one at a time."""
    layout, make = resnet_layout(), KINDS[kind]
    previous = draw_model(layout)
    contents = [reply(layout, make(layout, number), number) for number in range(min(num_replies, 2 * len(RATES)))]
    with memory_peak() as peak:
        fold(layout, previous, (contents[number % len(contents)] for number in range(num_replies)))
    return peak.above_start / sum(array.nbytes for array in previous.values())


def memory() -> Iterator[Row]:
    """The Averager's memory at 10 and at 1,000 replies, each in a fresh process."""
    for kind in KINDS:
        for num in (10, 1000):
            peak = in_child(peak_over_model, kind, num)
            yield Row(f"memory above start, {kind}, {num:,} replies", peak, "models", 3.0, "model: 44.7 MB")


def rows() -> Iterator[Row]:
    """All of it."""
    yield against_slice_add("prefixes")
    yield against_slice_add("label-limited rows")
    yield against_flower()
    yield from memory()
