"""The ServerApp: configuration -> strategy -> rounds -> run folder."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flexfed.compare import find_comparable
from flexfed.compute import use
from flexfed.config import Experiment
from flexfed.data import ServerData, check_partition, load_server, normalisation, normalise
from flexfed.devices import load_fleet
from flexfed.diary import Diary
from flexfed.flower.grid import InProcessGrid, stream
from flexfed.flower.messages import CHANGED, to_record_of_arrays
from flexfed.networks import Convention
from flexfed.report import final_table
from flexfed.resume import open_run
from flexfed.runs import RunFolder, load_run
from flexfed.units import Arrays
from strategies import STRATEGIES
from strategies.federated import FederatedStrategy, RunOver

app = ServerApp()
log = logging.getLogger("flwr")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one experiment under Flower."""
    run(grid, context.run_config, f"{context.run_id % 2**32:08x}")


def run_in_process(values: Mapping[str, Any], supernodes: int, run_id: str = "") -> Path:
    """Run one experiment without Ray: the same numbers, in one process.

    Args:
        values: overrides of the defaults in pyproject.toml.
        supernodes: simulated clients.
        run_id: the end of the run folder's name; drawn at random by default. Not used by a run that goes on.

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
    """One run, and those that are to follow it (fine-tuning); the folder of the last one.

    Raises:
        ValueError: as `run_one`.
        RuntimeError: likewise.
    """
    folder, told = run_one(grid, config, run_id)
    if not told:
        return folder
    log.info("now %s, in a run of its own", ", ".join(f"{key}={value!r}" for key, value in told.items()))
    try:
        return run_one(grid, {**config, "resume": "", **told}, sha256(run_id.encode()).hexdigest()[:8], told)[0]
    except ValueError as error:
        raise ValueError(
            f"the run in {folder} is finished and stays, the one to follow it cannot be: {error}"
        ) from error


def run_one(
    grid: Grid, config: Mapping[str, Any], run_id: str, told: Mapping[str, Any] | None = None
) -> tuple[Path, Mapping[str, Any]]:
    """Check the configuration, run its rounds or those that are left, and leave a run folder.

    Args:
        grid: to the clients.
        config: of the run.
        run_id: the end of the folder's name.
        told: keys in which this configuration is not the one that clients were given: messages carry them.

    Returns:
        The folder, and keys of the configuration that a run has which is to follow; none = nothing follows.

    Raises:
        ValueError: an unknown name or an impossible value, or a run that cannot go on so; before any round.
        RuntimeError: clients were asked, and no valid reply came in any round.
    """
    experiment = Experiment.read(config)
    settings = experiment.settings
    resumed = open_run(settings.resume, config) if settings.resume else None
    if resumed and resumed.is_finished:
        _show(resumed.folder)
        return resumed.folder.path, {}
    torch.set_num_threads(settings.torch_threads)
    use(settings.torch_device)
    load_fleet(settings.fleet)
    kind = STRATEGIES[settings.strategy]
    raw = load_server(experiment.data)
    server, transform = _normalised(raw, kind.convention(experiment, raw.info.input_shape[0]))
    stood = resumed.checkpoint if resumed else None
    task, initial = kind.set_up(experiment, server.info, stood)
    diary = Diary(config, settings, run_id, resumed)
    transform["run"] = stood.facts["run"] if stood else diary.folder.path.name
    if changed := (stood.facts.get(CHANGED, "") if stood else json.dumps(told) if told else ""):
        transform[CHANGED] = changed
    folder = diary.folder.path
    strategy = kind(experiment, task, server, transform, diary.write, stood, folder)
    try:
        _drive(strategy, grid, initial, diary)
    finally:
        diary.close()
    if strategy.asked and not strategy.accepted:
        need = (
            "no valid reply"
            if settings.min_replies == 1
            else f"never {settings.min_replies} valid replies (min-replies)"
        )
        raise RuntimeError(f"{need} in any of {settings.num_server_rounds} rounds; {diary.last_complaint}")
    model = strategy.final_model()
    diary.folder.finish(model, strategy.summary_facts(), strategy.model_metadata(model))
    _show(diary.folder)
    return diary.folder.path, strategy.next_run(diary.folder.path)


def _drive(strategy: FederatedStrategy, grid: Grid, initial: Arrays, diary: Diary) -> None:
    """Run rounds until there are none left, or the strategy says that it is over."""
    settings = strategy.settings
    streaming = stream(grid, settings.reply_order, settings.replies_in_flight)
    strategy.meet(streaming)
    diary.begin(strategy.federation.num_partitions)
    strategy.begin(initial, streaming)
    diary.save(strategy.checkpoint())
    num_rounds = diary.num_rounds_left()
    with _quiet_start(), suppress(RunOver):
        if num_rounds and not strategy.is_over:
            strategy.start(streaming, to_record_of_arrays(initial), num_rounds, settings.round_timeout)


def _normalised(raw: ServerData, convention: Convention | None = None) -> tuple[ServerData, dict[str, Any]]:
    """The server's data, normalised, and what clients need to do the same.

    By a network's own convention where it has one, else by the proxy split's mean and deviation.
    """
    mean, std = convention or normalisation(raw.proxy)
    server = replace(raw, proxy=normalise(raw.proxy, mean, std), test=normalise(raw.test, mean, std))
    return server, {
        "num-classes": raw.info.num_classes,
        "input-shape": list(raw.info.input_shape),
        "input-mean": list(mean),
        "input-std": list(std),
    }


def _show(folder: RunFolder) -> None:
    """The table at the end of a run."""
    done = load_run(folder.path)
    log.info("%s", final_table(dict(done.summary or {}), done.rounds, find_comparable(done), folder.path))


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
