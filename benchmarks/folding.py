"""Folding replies into the model: the Averager against a bare slice-add, and against Flower's FedAvg."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Literal

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
from flexfed.select import prefix_ratio, top, window
from flexfed.submodel import Submodel, as_slice, full, narrow_shapes, positions
from flexfed.units import Arrays, Layout, trace_layout

INPUT_SHAPE = (3, 32, 32)
NUM_CLASSES = 10
RATES = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
NUM_REPLIES = 100
NUM_FULL = 20  # replies of full models, for Flower's FedAvg
REPETITIONS = 9
BOUND = 1.5
ALONE = (1 / 2, 1 / 4)  # rates of units that never recur
UNITS_BOUND = 6.0
MEMORY_BOUND = 3.0


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
    noise = np.random.default_rng(number).standard_normal(1 << 16, dtype=np.float32)
    difference = np.resize(noise, num_parameters(layout, submodel))
    return update_content(Update(submodel, difference, 10.0 + number % 7, {"train-loss": 1.0, "macs": 1e9}), layout)


# Kinds of replies: what number so-and-so holds ------------------------------------------------------------


def prefix(layout: Layout, number: int) -> Submodel:
    """HeteroFL's levels in turn."""
    return prefix_ratio(layout, RATES[number % len(RATES)])


def limited(layout: Layout, number: int) -> Submodel:
    """The same with the classifier rows of two labels only, other ones in every reply."""
    present = np.zeros(NUM_CLASSES, dtype=bool)
    present[np.random.default_rng(number).permutation(NUM_CLASSES)[:2]] = True
    return limit_classes(layout, prefix(layout, number), present)


def rolled(layout: Layout, number: int) -> Submodel:
    """FedRolex's windows of one round, in turn; they wrap around."""
    return window(layout, RATES[number % len(RATES)], start=37)


def scattered(layout: Layout, number: int) -> Submodel:
    """Windows that begin elsewhere in every reply: hardly two alike."""
    return window(layout, RATES[number % len(RATES)], start=number)


def chosen(layout: Layout, number: int, rate: float) -> Submodel:
    """The best units by scores of the client's own, as FedLPS has them: no two replies hold the same."""
    return top(layout, np.random.default_rng(number).standard_normal(layout.num_units), rate)


Kind = Callable[[Layout, int], Submodel]
Per = Literal["coverage", "total"]
KINDS: dict[str, Kind] = {
    "prefixes": prefix,
    "label-limited rows": limited,
    "rolling windows": rolled,
    "windows all different": scattered,
}
BOUNDED = ("prefixes", "label-limited rows")  # what the bound on time was asked for


# Time -----------------------------------------------------------------------------------------------------


def fold(layout: Layout, previous: Arrays, contents: Iterator[RecordDict], per: Per = "coverage") -> Arrays:
    """What the server does with its replies: parse, check, weigh, add, take the mean."""
    averager = Averager(layout, previous, per)
    for content in contents:
        update = read_update(content, layout)
        averager.add(update.submodel, update.difference, update.weight)
    return averager.result()


Plan = list[tuple[str, tuple[int, ...], tuple[slice | np.ndarray, ...]]]  # tensor, its narrow shape, its place


def plan(layout: Layout, submodel: Submodel) -> Plan:
    """Where every tensor of a part goes; made before the clock starts."""
    shapes = narrow_shapes(layout, submodel)
    return [(name, shape, _place(layout, submodel, name)) for name, shape in shapes.items()]


def _place(layout: Layout, submodel: Submodel, name: str) -> tuple[slice | np.ndarray, ...]:
    kept = positions(layout, submodel, name)
    runs = [slice(None) if index is None else as_slice(index) for index in kept]
    return tuple(run if run is not None else index for run, index in zip(runs, kept, strict=True))  # type: ignore[misc]


def slice_add(layout: Layout, plans: Sequence[Plan], flats: Sequence[np.ndarray]) -> Arrays:
    """The yardstick: the same bytes added slice by slice to zeros, neither parsed, checked, weighed nor divided."""
    into = {name: np.zeros(shape, dtype=np.float32) for name, shape in layout.shapes.items()}
    for steps, flat in zip(plans, flats, strict=True):
        start = 0
        for name, shape, where in steps:
            stop = start + math.prod(shape)
            into[name][where] += flat[start:stop].reshape(shape)
            start = stop
    return into


def against_slice_add(kind: str) -> Row:
    """100 replies of five rates: the Averager's time over the slice-add's.

    Windows have prefixes of the same sizes for a yardstick: the slice-add could not add them by slices.
    """
    seconds = _seconds(KINDS[kind], KINDS[kind] if kind in BOUNDED else prefix)
    return _row(f"100 replies, {kind}: Averager / slice-add", seconds, NUM_REPLIES, BOUND if kind in BOUNDED else None)


def units_that_never_recur(rate: float, per: Per) -> Row:
    """100 replies of one rate, other units in each; the yardstick are prefixes of the same sizes, as with windows."""
    seconds = _seconds(partial(chosen, rate=rate), lambda layout, _: prefix_ratio(layout, rate), per)
    what = f"100 replies, rate {rate:g}, units that never recur, mean per {per}: Averager / slice-add"
    return _row(what, seconds, NUM_REPLIES, UNITS_BOUND)


def _seconds(kind: Kind, yardstick: Kind, per: Per = "coverage") -> dict[str, float]:
    layout = resnet_layout()
    contents = [reply(layout, kind(layout, number), number) for number in range(NUM_REPLIES)]
    previous, plans = draw_model(layout), [plan(layout, yardstick(layout, number)) for number in range(NUM_REPLIES)]
    flats = [from_array(content.array_records["arrays"]["part"]) for content in contents]
    return interleaved(
        {
            "ours": lambda: fold(layout, previous, iter(contents), per),
            "bare": lambda: slice_add(layout, plans, flats),
        },
        REPETITIONS,
    )


def against_flower() -> Row:
    """20 replies of full models: the Averager's time over that of Flower's FedAvg."""
    layout, previous = resnet_layout(), draw_model(resnet_layout())
    contents = [reply(layout, full(layout), number) for number in range(NUM_FULL)]
    theirs = [_flower_reply(previous, number) for number in range(NUM_FULL)]
    seconds = interleaved(
        {
            "ours": lambda: fold(layout, previous, iter(contents)),
            "Flower": lambda: aggregate_arrayrecords(theirs, "num-examples"),
        },
        REPETITIONS,
    )
    return _row("20 replies, full models: Averager / Flower's FedAvg", seconds, NUM_FULL, None)


def _flower_reply(arrays: Arrays, number: int) -> RecordDict:
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    return RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 10 + number % 7})})


def _row(what: str, seconds: dict[str, float], num_replies: int, bound: float | None) -> Row:
    (ours, mine), (other, theirs) = ((name, s / num_replies) for name, s in seconds.items())
    return Row(what, mine / theirs, "x", bound, f"{ours} {1e3 * mine:.2f} ms a reply, {other} {1e3 * theirs:.2f} ms")


# Memory ---------------------------------------------------------------------------------------------------


def peak_bytes(kind: str, num_replies: int) -> int:
    """Memory above the start while so many replies are folded, each gone before the next is made."""
    layout = resnet_layout()
    previous = draw_model(layout)
    stock = [reply(layout, KINDS[kind](layout, number), number) for number in range(min(num_replies, 20))]
    with memory_peak() as peak:
        fold(layout, previous, (stock[number % len(stock)] for number in range(num_replies)))
    return peak.above_start


def memory() -> Iterator[Row]:
    """The Averager's memory at 10 and at 1,000 replies, each in a fresh process."""
    model = 4 * num_parameters(resnet_layout(), full(resnet_layout()))
    for kind in KINDS:
        for num in (10, 1000):
            peak = in_child(peak_bytes, kind, num)
            detail = f"{peak / 1e6:.0f} MB, the model is {model / 1e6:.0f} MB"
            yield Row(f"memory, {num:,} replies, {kind}: above start / model", peak / model, "x", MEMORY_BOUND, detail)


def rows() -> list[Row]:
    """All of it."""
    times = [against_slice_add(kind) for kind in KINDS]
    alone = [units_that_never_recur(rate, per) for per in ("coverage", "total") for rate in ALONE]
    return [*times, *alone, against_flower(), *memory()]
