"""What a whole round leaves behind, against the same work done by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from toy import final_model

import server_app
from flexfed.config import Experiment
from flexfed.data import load_client, load_server, normalisation, normalise
from flexfed.devices import Device, load_fleet
from flexfed.jobs import Job, Update, initial_arrays, train_network
from flexfed.submodel import full
from flexfed.training import Samples
from strategies import STRATEGIES
from strategies.base import SubmodelStrategy

QUICK = {"num-server-rounds": 1, "partition": "iid", "fraction-evaluate": 0.0, "local-epochs": 1, "batch-size": 64}


def strategy_of(name: str, **values: object) -> SubmodelStrategy:
    experiment = Experiment.read({**QUICK, "strategy": name, **{k.replace("_", "-"): v for k, v in values.items()}})
    server = load_server(experiment.data)
    moments = normalisation(server.proxy)
    server = type(server)(normalise(server.proxy, *moments), normalise(server.test, *moments), server.info)
    return STRATEGIES[name](experiment, experiment.task(10, (1, 8, 8)), server)


def test_one_client_with_everything_gives_the_model_that_it_trained(tmp_path: Path) -> None:
    """FedAvg of one client is that client's training, to rounding: received plus difference is trained."""
    folder = server_app.run_in_process({**QUICK, "strategy": "fedavg", "runs-dir": str(tmp_path)}, 1)
    strategy = strategy_of("fedavg")
    task, data = strategy.task, load_client(strategy.experiment.data, 0, 1)
    samples = normalise(data.train, *normalisation(load_server(strategy.experiment.data).proxy))
    arrays = initial_arrays(task, "", 1)
    job = Job(full(task.layout), arrays, Device(0), {}, strategy.seed_of(1, 0), 1)
    trained = train_network(task.network(arrays), job, task, samples).arrays
    final = final_model(folder)
    assert any(not np.array_equal(final[name], arrays[name]) for name in final)
    for name, array in final.items():
        np.testing.assert_allclose(array, trained[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_dropout_draws_from_the_seed_of_the_job() -> None:
    task = strategy_of("fedavg").task
    arrays, rng = initial_arrays(task, "", 1), np.random.default_rng(0)
    samples = Samples(torch.from_numpy(rng.standard_normal((12, 1, 8, 8), dtype=np.float32)), torch.arange(12) % 10)
    job = Job(full(task.layout), arrays, Device(0), {}, 3, 1)
    found = []
    for drawn_before in (1, 2):
        torch.rand(drawn_before)
        found.append(train_network(nn.Sequential(task.network(arrays), nn.Dropout(0.5)), job, task, samples).loss)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        ("fedavg", None, 30.0),
        ("small", None, 30.0),
        ("exclusive", None, 30.0),
        ("flexfl", None, 30.0),
        ("heterofl", "uniform", 1.0),
        ("heterofl", "examples", 30.0),
        ("fedrolex", "uniform", 1.0),
        ("fedrolex", "examples", 30.0),
        ("fjord", None, 30.0),
        ("fjord", "uniform", 1.0),
    ],
)
def test_what_a_reply_weighs(name: str, weights: str | None, expected: float) -> None:
    values = {} if weights is None else {f"{name}.weights": weights}
    strategy = strategy_of(name, **values)
    update = Update(full(strategy.task.layout), np.zeros(1, dtype=np.float32), 30.0, {})
    assert strategy.weigh(update) == expected


def test_flexfl_devices_test_the_main_level_that_they_nominally_hold() -> None:
    strategy = strategy_of("flexfl", **{"flexfl.scores": "0.5"})
    strategy.prepare(None)
    fleet = load_fleet("skewed")
    held = [strategy.level_for_evaluation(fleet.device(partition, 20, 1)) for partition in range(20)]
    assert held == ["S"] * 12 + ["M"] * 6 + ["L"] * 2
