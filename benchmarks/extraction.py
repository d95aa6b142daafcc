"""Making parts for the clients: how often in a round, and how long beside a bare copy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from unittest import mock

import numpy as np
from flwr.app import ConfigRecord

import strategies.base
from benchmarks.folding import RATES, draw_model, plan, resnet_layout
from benchmarks.measuring import Row, interleaved
from benchmarks.rounds import in_process_strategy
from flexfed.flower.messages import to_array, to_record_of_arrays
from flexfed.jobs import initial_arrays
from flexfed.select import prefix_ratio
from flexfed.submodel import Submodel, extract, flatten
from flexfed.units import Arrays, Layout

METHODS: dict[str, dict[str, object]] = {
    "heterofl": {"heterofl.assign": "fix"},
    "fedrolex": {"fedrolex.assign": "fix"},
    "flexfl": {"flexfl.pretrain-epochs": 1},
}
NUM_CLIENTS = 20
REPETITIONS = 15


@contextmanager
def counted() -> Iterator[Counter[bytes]]:
    """Count the extractions that the strategies' base class makes, by submodel."""
    calls: Counter[bytes] = Counter()

    def counting(layout: Layout, submodel: Submodel, arrays: Mapping[str, np.ndarray]) -> Arrays:
        calls[submodel.key] += 1
        return extract(layout, submodel, arrays)

    with mock.patch.object(strategies.base, "extract", counting):
        yield calls


def times_extracted(method: str) -> Row:
    """Extractions for one round's jobs over the distinct submodels among them; 20 clients, all of them asked."""
    strategy, grid = in_process_strategy(method, NUM_CLIENTS, {"fraction-train": 1.0, **METHODS[method]})
    arrays = to_record_of_arrays(initial_arrays(strategy.task, "", 1))
    configure = partial(strategy.configure_train, arrays=arrays, config=ConfigRecord(), grid=grid)
    list(configure(1))  # meets the clients
    with counted() as calls:
        messages = list(configure(2))
    distinct = {m.content.config_records["submodel"]["units"] for m in messages}
    detail = f"{sum(calls.values())} for {len(messages)} jobs of {len(distinct)} distinct submodels"
    return Row(f"{method}: extractions / distinct submodels of a round", max(calls.values()), "x", 1.0, detail)


def against_copy(rate: float) -> Row:
    """A part ready for its message, over one slice-by-slice copy into a flat vector."""
    layout = resnet_layout()
    model, submodel = draw_model(layout), prefix_ratio(layout, rate)
    steps = plan(layout, submodel)
    flat = np.empty(sum(math.prod(shape) for _, shape, _ in steps), dtype=np.float32)

    def copy() -> None:
        start = 0
        for name, shape, where in steps:
            stop = start + math.prod(shape)
            flat[start:stop].reshape(shape)[...] = model[name][where]
            start = stop

    seconds = interleaved(
        {"ours": lambda: to_array(flatten(layout, submodel, extract(layout, submodel, model))), "bare": copy},
        REPETITIONS,
    )
    detail = f"{1e3 * seconds['ours']:.2f} ms, copy {1e3 * seconds['bare']:.2f} ms, once for each distinct submodel"
    return Row(
        f"part of rate {rate:g} for its message / slice copy", seconds["ours"] / seconds["bare"], "x", None, detail
    )


def rows() -> list[Row]:
    """All of it."""
    return [*map(times_extracted, METHODS), *map(against_copy, RATES)]
