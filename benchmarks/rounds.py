"""The in-process grid: what a round costs beside the clients' own work, and how soon a run begins."""

from __future__ import annotations

import importlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, ParamSpec, TypeVar
from unittest import mock

import torch
from flwr.app import ConfigRecord

import client_app
import server_app
from benchmarks.measuring import Row, in_child
from flexfed.config import Experiment
from flexfed.data import load_server
from flexfed.flower.grid import InProcessGrid, StreamingGrid
from flexfed.flower.messages import to_record_of_arrays
from flexfed.jobs import evaluate_part, initial_arrays
from flexfed.methods import METHODS
from flexfed.overrides import defaults
from strategies import STRATEGIES
from strategies.base import SubmodelStrategy

P = ParamSpec("P")
R = TypeVar("R")
NUM_CLIENTS = 20
NUM_ROUNDS = 15
NUM_STARTS = 5
CLIENT_BOUND_MS = 2.0
START_BOUND_S = 1.0


def run_config(strategy: str, values: Mapping[str, object]) -> dict[str, Any]:
    """The defaults of pyproject.toml (cnn on digits) with some values changed."""
    root = Path(server_app.__file__).resolve().parent
    return {**defaults(root), "strategy": strategy, **values}


def in_process_strategy(
    name: str, num_clients: int, values: Mapping[str, object]
) -> tuple[SubmodelStrategy, StreamingGrid]:
    """A strategy and the grid it speaks to, as the ServerApp makes them."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    config = run_config(name, values)
    experiment = Experiment.read(config)
    server, transform = server_app._normalised(load_server(experiment.data))
    task = experiment.task(server.info.num_classes, server.info.input_shape)
    grid = StreamingGrid(InProcessGrid(client_app.app, num_clients, config))
    return STRATEGIES[name](experiment, task, server, {**transform, "run": "benchmark"}), grid


@dataclass(frozen=True)
class Clock:
    """Processor and wall-clock seconds; the first is no matter of how busy the machine is."""

    processor_s: float
    wall_s: float

    @classmethod
    def now(cls) -> Clock:
        """Both clocks at this moment."""
        return cls(time.process_time(), time.perf_counter())

    def __sub__(self, other: Clock) -> Clock:
        return Clock(self.processor_s - other.processor_s, self.wall_s - other.wall_s)

    def __add__(self, other: Clock) -> Clock:
        return Clock(self.processor_s + other.processor_s, self.wall_s + other.wall_s)


class Stopwatch:
    """Adds up the time inside functions: the clients' own work."""

    def __init__(self) -> None:
        self.total = Clock(0.0, 0.0)

    def timed(self, function: Callable[P, R]) -> Callable[P, R]:
        """The same function on the watch."""

        def watched(*args: P.args, **kwargs: P.kwargs) -> R:
            begin = Clock.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.total += Clock.now() - begin

        return watched


def overhead_per_client() -> list[Row]:
    """Milliseconds a client of the two halves of a round, less what the clients compute.

    Training: from asking the strategy for jobs to the new model, less `local_update`. Evaluation: from the
    first message to the last answer, less the network's own test. Every client is asked in every round.
    """
    work, method = Stopwatch(), METHODS["heterofl"]
    with (
        mock.patch.dict(METHODS, heterofl=replace(method, local_update=work.timed(method.local_update))),
        mock.patch.object(client_app, "evaluate_part", work.timed(evaluate_part)),
    ):
        rounds = list(_rounds(work))[1:]  # the first loads the clients' data
    training, evaluation = zip(*rounds, strict=True)
    return [_overhead_row("training", training), _overhead_row("evaluation", evaluation)]


Spans = tuple[Clock, Clock]  # the whole, and the clients' own work in it


def _rounds(work: Stopwatch) -> Iterator[tuple[Spans, Spans]]:
    """Train and evaluate round after round."""
    strategy, grid = in_process_strategy("heterofl", NUM_CLIENTS, {"fraction-train": 1.0, "fraction-evaluate": 1.0})
    arrays, config = to_record_of_arrays(initial_arrays(strategy.task, "", 1)), ConfigRecord()
    for server_round in range(1, NUM_ROUNDS + 2):
        begin, own = Clock.now(), work.total
        jobs = strategy.configure_train(server_round, arrays, config, grid)
        averaged, _ = strategy.aggregate_train(server_round, grid.send_and_receive(jobs))
        training = Clock.now() - begin, work.total - own
        arrays = averaged or arrays
        questions = strategy.configure_evaluate(server_round, arrays, config, grid)  # the server's own test
        begin, own = Clock.now(), work.total
        strategy.aggregate_evaluate(server_round, grid.send_and_receive(questions))
        yield training, (Clock.now() - begin, work.total - own)


def _overhead_row(half: str, spans: Sequence[Spans]) -> Row:
    beside = [whole - own for whole, own in spans]
    processor, wall, own = (
        1e3 * median(values) / NUM_CLIENTS
        for values in (
            [clock.processor_s for clock in beside],
            [clock.wall_s for clock in beside],
            [own.processor_s for _, own in spans],
        )
    )
    detail = f"wall clock {wall:.2f} ms; own work {own:.1f} ms"
    return Row(f"{half}: a client, beside its own work", processor, "ms", CLIENT_BOUND_MS, detail)


# Start-up -------------------------------------------------------------------------------------------------


class _FirstMessageError(Exception):
    pass


def time_to_first(kind: str, strategy: str, all_imported: bool) -> Clock:
    """From calling `run_in_process` to the first message of a kind, in this fresh process.

    Args:
        kind: type of the message.
        strategy: name of the method.
        all_imported: import before the clock starts what the run imports when it needs it: torch's own
            tracer (any run on meta), scikit-learn, flwr-datasets, Torch-Pruning.
    """
    if all_imported:
        for module in ("torch._dynamo", "sklearn.datasets", "flwr_datasets", "torch_pruning"):
            importlib.import_module(module)
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    push = InProcessGrid.push_messages

    def stop_at_first(grid: InProcessGrid, messages: Any) -> Any:
        messages = list(messages)
        if messages[0].metadata.message_type == kind:
            raise _FirstMessageError
        return push(grid, messages)

    with tempfile.TemporaryDirectory() as runs, mock.patch.object(InProcessGrid, "push_messages", stop_at_first):
        begin = Clock.now()
        try:
            server_app.run_in_process({"strategy": strategy, "runs-dir": runs}, NUM_CLIENTS)
        except _FirstMessageError:
            return Clock.now() - begin
    raise RuntimeError(f"no message of type {kind!r} was sent")


def start_up(kind: str, what: str, bound: float | None, all_imported: bool = True) -> Row:
    """Median of several fresh processes."""
    taken = [in_child(time_to_first, kind, "heterofl", all_imported) for _ in range(NUM_STARTS)]
    wall = [clock.wall_s for clock in taken]
    detail = f"wall clock {min(wall):.2f} to {max(wall):.2f} s in {NUM_STARTS} fresh processes"
    return Row(f"start to {what}", median(clock.processor_s for clock in taken), "s", bound, detail)


def rows() -> list[Row]:
    """All of it."""
    return [
        *overhead_per_client(),
        start_up("query.profile", "the first message", START_BOUND_S),
        start_up("train", f"the first job, {NUM_CLIENTS} clients asked who they are", None),
        start_up("query.profile", "the first message, libraries' own late imports included", None, False),
    ]
