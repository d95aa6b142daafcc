"""The ServerApp: configuration -> strategy -> rounds -> run folder."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flexfed.compare import find_comparable
from flexfed.config import Experiment, Settings
from flexfed.cost import num_parameters
from flexfed.data import ServerData, check_partition, load_server, normalisation, normalise
from flexfed.devices import load_fleet
from flexfed.flower.grid import InProcessGrid, StreamingGrid
from flexfed.flower.messages import from_record_of_arrays, to_record_of_arrays
from flexfed.jobs import Task
from flexfed.models import load_weights
from flexfed.networks import travelling
from flexfed.report import EventWriter, final_table, round_line
from flexfed.runs import RunFolder, load_run
from flexfed.soundness import check_parts
from flexfed.units import Arrays
from strategies import STRATEGIES
from strategies.base import SubmodelStrategy

app = ServerApp()
log = logging.getLogger("flwr")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one experiment under Flower."""
    run(grid, context.run_config, str(context.run_id))


def run_in_process(values: Mapping[str, Any], supernodes: int, run_id: str = "") -> Path:
    """Run one experiment without Ray: the same numbers, in one process.

    Args:
        values: overrides of the defaults in pyproject.toml.
        supernodes: simulated clients.
        run_id: the end of the run folder's name; drawn at random by default.

    Returns:
        The run folder.
    """
    import client_app
    from flexfed.overrides import check_known, defaults

    known = defaults(Path(__file__).resolve().parent)
    check_known(values, known)
    config = {**known, **values}
    data = Experiment.read(config).data
    check_partition(data, supernodes)
    return run(InProcessGrid(client_app.app, supernodes, config), config, run_id or secrets.token_hex(4))


def run(grid: Grid, config: Mapping[str, Any], run_id: str) -> Path:
    """Check the configuration, run its rounds, and leave a run folder.

    Raises:
        ValueError: an unknown name or an impossible value, before round 1.
        RuntimeError: clients were asked, and no valid reply came in any round.
    """
    experiment = Experiment.read(config)
    settings = experiment.settings
    torch.set_num_threads(settings.torch_threads)
    load_fleet(settings.fleet)
    server, transform = _normalised(load_server(experiment.data))
    task = experiment.task(server.info.num_classes, server.info.input_shape)
    initial = initial_arrays(task, settings.weights, settings.seed)
    check_parts(task.factory, task.layout, initial, task.input_shape)
    diary = _Diary(config, settings, run_id)
    strategy = STRATEGIES[settings.strategy](experiment, task, server, transform, diary.write)
    in_order = settings.reply_order == "cohort"
    streaming = StreamingGrid(grid, in_order, settings.replies_in_flight, 0.02 if in_order else 0.25)
    with _quiet_start():
        result = strategy.start(
            streaming, to_record_of_arrays(initial), settings.num_server_rounds, settings.round_timeout
        )
    diary.close()
    if strategy.asked and not strategy.accepted:
        raise RuntimeError(f"no valid reply in any of {settings.num_server_rounds} rounds; {diary.last_complaint}")
    final = from_record_of_arrays(result.arrays) if result.arrays else initial
    _close(diary.folder, strategy, final)
    return diary.folder.path


def initial_arrays(task: Task, weights: str, seed: int) -> Arrays:
    """The global model before round 1: freshly drawn from the seed, or read."""
    torch.manual_seed(seed)
    model = task.factory()
    if weights:
        load_weights(model, weights)
    return {name: tensor.detach().numpy() for name, tensor in travelling(model).items()}


def _normalised(raw: ServerData) -> tuple[ServerData, dict[str, Any]]:
    """The server's data by the proxy split's mean and deviation, and what clients need to do the same."""
    mean, std = normalisation(raw.proxy)
    server = replace(raw, proxy=normalise(raw.proxy, mean, std), test=normalise(raw.test, mean, std))
    return server, {
        "num-classes": raw.info.num_classes,
        "input-shape": list(raw.info.input_shape),
        "input-mean": list(mean),
        "input-std": list(std),
    }


class _Diary:
    """Writes each finished round to the run folder, the log and TensorBoard."""

    def __init__(self, config: Mapping[str, Any], settings: Settings, run_id: str):
        self._config = config
        self._settings = settings
        self._run_id = run_id
        self._last = time.monotonic()
        self._first = 0.0
        self.last_complaint = "see the log"

    @cached_property
    def folder(self) -> RunFolder:
        """Made when there is something to write: a run that never begins leaves none."""
        return RunFolder.create(self._settings.runs_dir, self._settings.strategy, self._run_id, dict(self._config))

    @cached_property
    def _events(self) -> EventWriter:
        return EventWriter(self.folder.path)

    def write(self, line: dict[str, Any]) -> None:
        """One round is over."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        # The first round is no measure of the others: it holds the start of the clients and any pre-training.
        pace = (now - self._first) / (line["round"] - 1) if self._first else seconds
        self._first = self._first or now
        left = pace * (self._settings.num_server_rounds - line["round"])
        self.folder.append_round(line)
        self.folder.append_timing(line["round"], seconds)
        self._events.add(line)
        for complaint in [*line["failed"], *line["refused"]][-1:]:
            self.last_complaint = f"client {complaint['partition']} said: {complaint['reason']}"
        log.info(round_line(line, self._settings.num_server_rounds, seconds, left))

    def close(self) -> None:
        """Close what is open."""
        self._events.close()


def _close(folder: RunFolder, strategy: SubmodelStrategy, final: Arrays) -> None:
    """Model, summary, picture; then the table."""
    settings, layout = strategy.settings, strategy.task.layout
    top = list(strategy.levels().values())[-1]
    facts = {
        "strategy": settings.strategy,
        "model": settings.model,
        "dataset": strategy.experiment.data.dataset,
        "seed": settings.seed,
        "clients": len(strategy.federation.devices),
        "clients-testing": len(strategy.testers()),
        "parameters": num_parameters(layout, top),
        "headline-levels": list(strategy.headline()),
        **strategy.facts(),
    }
    summary = folder.finish(strategy.final_model(final), facts)
    done = load_run(folder.path)
    log.info("%s", final_table(summary, done.rounds, find_comparable(done), folder.path))


@contextmanager
def _quiet_start() -> Iterator[None]:
    """Flower's `start` logs several lines a round; ours is one."""

    def ours(record: logging.LogRecord) -> bool:
        return "serverapp/strategy" not in record.pathname.replace("\\", "/")

    log.addFilter(ours)
    try:
        yield
    finally:
        log.removeFilter(ours)
