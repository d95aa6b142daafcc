"""Simulating clients: the in-process grid and Ray beside a bare PyTorch loop over the same clients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from flwr.app import ConfigRecord
from torch import nn
from torch.nn import functional

import server_app
from benchmarks.measuring import Row, interleaved
from benchmarks.rounds import in_process_strategy, run_config
from flexfed.config import Experiment
from flexfed.data import load_client, normalise
from flexfed.flower.messages import to_record_of_arrays
from flexfed.jobs import initial_arrays
from flexfed.training import Samples

NUM_CLIENTS = 20
REPETITIONS = 15
BOUND = 1.10
RAY_ROUNDS = 12
# Everything to everybody, no tests: what a bare loop does. The seed makes both loops train on the same samples.
SAME: Mapping[str, object] = {"fraction-train": 1.0, "fraction-evaluate": 0.0, "fleet": "equal"}
CASES: Mapping[str, Mapping[str, object]] = {
    "cnn on digits": {},
    "cnn on shapes": {"dataset": "shapes"},
    "heterofl-conv-quarter on shapes": {"dataset": "shapes", "model": "heterofl-conv-quarter"},
}


def in_process_round(values: Mapping[str, object]) -> Callable[[], None]:
    """One training round of FedAvg through strategy, messages and grid: from asking for jobs to the new model."""
    strategy, grid = in_process_strategy("fedavg", NUM_CLIENTS, {**SAME, **values})
    held = {"arrays": to_record_of_arrays(initial_arrays(strategy.task, "", 1)), "round": 0}

    def round_() -> None:
        held["round"] += 1
        jobs = strategy.configure_train(held["round"], held["arrays"], ConfigRecord(), grid)
        held["arrays"], _ = strategy.aggregate_train(held["round"], grid.send_and_receive(jobs))

    return round_


def bare_round(values: Mapping[str, object]) -> Callable[[], None]:
    """The same by hand: load the weights into one network, train, add the trained weights up, divide."""
    experiment = Experiment.read(run_config("fedavg", {**SAME, **values}))
    server, transform = server_app._normalised(server_app.load_server(experiment.data))
    mean, std = tuple(transform["input-mean"]), tuple(transform["input-std"])
    clients = [
        normalise(load_client(experiment.data, number, NUM_CLIENTS).train, mean, std) for number in range(NUM_CLIENTS)
    ]
    model = experiment.task(server.info.num_classes, server.info.input_shape).factory()
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def round_() -> None:
        sums = {name: torch.zeros_like(tensor) for name, tensor in held.items()}
        for samples in clients:
            model.load_state_dict(held)
            train(model, samples, experiment.training)
            for name, tensor in model.state_dict().items():
                sums[name] += tensor
        held.update({name: total / len(clients) for name, total in sums.items()})

    return round_


def train(model: nn.Module, samples: Samples, knobs: Any) -> None:
    """A client's epochs, as any tutorial has them; batches are indexed, which is faster than a DataLoader."""
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=knobs.learning_rate, momentum=knobs.momentum, weight_decay=knobs.weight_decay
    )
    for _ in range(knobs.local_epochs):
        order = torch.randperm(len(samples.labels))
        for batch in order.split(knobs.batch_size):
            if len(batch) < knobs.batch_size:  # as `drop-last`
                continue
            optimizer.zero_grad()
            functional.cross_entropy(model(samples.inputs[batch]), samples.labels[batch]).backward()
            optimizer.step()


def against_bare_loop(name: str, values: Mapping[str, object]) -> Row:
    """Processor time of a round in process, beside the bare loop's."""
    torch.set_num_threads(1)
    seconds = interleaved({"ours": in_process_round(values), "bare": bare_round(values)}, REPETITIONS)
    ours, bare = (1e3 * seconds[variant] / NUM_CLIENTS for variant in ("ours", "bare"))
    return Row(f"{name}: in process / bare loop", ours / bare, "x", BOUND, f"{ours:.1f} and {bare:.1f} ms a client")


def against_ray() -> Row:
    """Wall clock of a round under Flower's simulation with one CPU, beside the in-process grid."""
    taken = {kind: _round_seconds(flags) for kind, flags in (("ray", ["--cpus", "1"]), ("own", ["--in-process"]))}
    ray, own = (1e3 * taken[kind] / NUM_CLIENTS for kind in ("ray", "own"))
    return Row("cnn on digits: Flower's simulation (Ray) / in process", ray / own, "x", None,
               f"wall clock {ray:.1f} and {own:.1f} ms a client, rounds 2 to {RAY_ROUNDS}")  # fmt: skip


def _round_seconds(flags: list[str]) -> float:
    """Median seconds of a run's rounds after the first, which starts the actors and loads the data."""
    with tempfile.TemporaryDirectory() as runs:
        values = {**SAME, "strategy": "fedavg", "num-server-rounds": RAY_ROUNDS, "evaluate-every": RAY_ROUNDS}
        told = " ".join(f"{key}={value!r}" for key, value in {**values, "runs-dir": runs}.items())
        words = [sys.executable, "-m", "flexfed.cli", "run", "--supernodes", str(NUM_CLIENTS), *flags, "-c", told]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
        (timing,) = Path(runs).glob("*/timing.jsonl")
        lines = [json.loads(line) for line in timing.read_text().splitlines()]
    return median(line["seconds"] for line in lines[1:-1])


def command_start() -> Row:
    """Wall clock of `flexfed --help`: what every command pays."""
    taken = []
    for _ in range(5):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "flexfed.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - begin)
    return Row("start of the command", median(taken), "s", None, f"{min(taken):.2f} to {max(taken):.2f} s")


def rows() -> list[Row]:
    """All of it."""
    return [*(against_bare_loop(name, values) for name, values in CASES.items()), against_ray(), command_start()]
