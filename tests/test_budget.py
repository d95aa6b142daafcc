"""Law 11: what a device trains never exceeds what it declared, whoever chooses how much."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import DIGITS, QUICK, lines, run_toy, toy_task

from flexfed.budget import STEPS, Budget
from flexfed.config import Experiment
from flexfed.cost import memory_budget, message_bytes, num_parameters, training_memory
from flexfed.data import load_server
from flexfed.devices import Device, load_fleet
from flexfed.jobs import Task
from flexfed.select import prefix_ratio
from flexfed.submodel import Submodel, full
from strategies import STRATEGIES

MB = 1e6
METHODS = ("exclusive", "fedrolex", "flexfl", "heterofl", "small")
WIDTH_METHODS = ("fedrolex", "flexfl", "heterofl")


@cache
def task_of(strategy: str) -> Task:
    """One for all servers of a strategy: costs are remembered by network."""
    return experiment_of(strategy).task(10, DIGITS)


def experiment_of(strategy: str, **values: Any) -> Experiment:
    given = {**QUICK, "batch-size": 16, "strategy": strategy, "flexfl.scores": "0.4, 0.5, 0.6, 0.7"}
    return Experiment.read({**given, **{k.replace("_", "-"): v for k, v in values.items()}})


def server(strategy: str, **values: Any) -> Any:
    experiment = experiment_of(strategy, **values)
    return STRATEGIES[strategy](experiment, task_of(strategy), load_server(experiment.data))


def random_fleet(rng: np.random.Generator) -> dict[int, Device]:
    """Devices of any kind: some tell their memory, some their capacity, links and speeds over two decades."""
    return {
        partition: Device(
            partition,
            capacity=float(rng.choice([1.0, rng.uniform(0.001, 1.6)])),
            memory_bytes=float(rng.choice([math.inf, rng.uniform(30, 38) * MB])),
            speed_macs_s=float(10 ** rng.uniform(7, 9)),
            link_bytes_s=float(10 ** rng.uniform(4, 6)),
            num_examples=int(rng.integers(2, 200)),
        )
        for partition in range(int(rng.integers(1, 12)))
    }


def excess(strategy: Any, device: Device, submodel: Submodel, deadline: float, beside: int = 0) -> list[str]:
    """What a part asks for beyond a device, by plain formulas; messages weigh `beside` more than their numbers."""
    task = strategy.task
    layout, training = task.layout, task.training
    numbers = num_parameters(layout, submodel)
    found = []
    if numbers / num_parameters(layout, full(layout)) > device.capacity + 1e-9:
        found.append("capacity")
    memory = training_memory(task.factory, layout, submodel, task.input_shape, training)
    if memory_budget(memory) + 4 * numbers + beside > device.memory_bytes:
        found.append("memory")
    batches = device.num_examples // training.batch_size * training.batch_size or device.num_examples
    macs = training.local_epochs * batches * (3 * task.macs(submodel) + strategy.macs_beside(submodel))
    if deadline and macs / device.speed_macs_s + 2 * (4 * numbers + beside) / device.link_bytes_s > deadline:
        found.append("deadline")
    return found


@pytest.mark.parametrize("deadline", [0.0, 2.0])
@pytest.mark.parametrize(
    ("strategy", "policy"), [(s, p) for s in METHODS for p in ("level", "budget") if (s, p) != ("small", "level")]
)  # the size of `small` is the configuration's: small.ratio
def test_law_11_over_random_fleets(strategy: str, policy: str, deadline: float) -> None:
    rng = np.random.default_rng([len(strategy), len(policy), int(deadline)])
    sent = 0
    for server_round in range(1, 9):
        chosen = server(strategy, ratio_policy=policy, round_deadline=deadline)
        chosen.federation.devices = devices = random_fleet(rng)
        chosen.prepare()
        if strategy == "small" and not any(map(chosen._largest, devices.values())):
            with pytest.raises(ValueError, match="no device can train even the smallest part"):
                chosen.levels()
            continue
        for partition, assignment in chosen.assign(server_round, devices, rng).items():
            over = excess(chosen, devices[partition], assignment.submodel, deadline)
            if policy == "level" and strategy == "flexfl":  # its own measure of capacity is the level's target
                assert set(over) <= {"capacity"}
            elif policy == "level" and over == ["capacity"]:
                assert assignment.level == "e", "only the smallest level is for everybody"
            else:
                assert not over, (devices[partition], assignment.level)
            sent += 1
    assert sent > (0 if strategy == "exclusive" else 8)


@pytest.mark.parametrize("strategy", WIDTH_METHODS)
def test_a_budget_buys_the_largest_part_that_fits(strategy: str) -> None:
    """The next step up is too much; a device that tells nothing gets everything."""
    chosen = server(strategy, ratio_policy="budget", round_deadline=3.0)
    chosen.prepare()
    rng = np.random.default_rng(3)
    bound = 0
    for device in [d for _ in range(6) for d in random_fleet(rng).values()]:
        ratio = chosen.ratio_of(device)
        tight = 0.0 if ratio is None else ratio
        assert tight * STEPS == int(tight * STEPS)
        if tight < 1:
            step = chosen.part_at(tight + 1 / STEPS, 1)
            beside = message_bytes(chosen.task.layout, step) - 4 * num_parameters(chosen.task.layout, step)
            assert excess(chosen, device, step, 3.0, beside), (device, ratio)
            bound += 1
    assert bound > 5
    assert server(strategy, ratio_policy="budget").budget.largest(Device(0), lambda r: chosen.part_at(r, 1)) == 1.0


@pytest.mark.parametrize("strategy", WIDTH_METHODS)
def test_cost_never_falls_as_the_ratio_rises(strategy: str) -> None:
    chosen = server(strategy, ratio_policy="budget")
    chosen.prepare()
    parts = [chosen.part_at(k / STEPS, 1) for k in range(1, STEPS + 1)]
    for cost in (chosen.budget.share, chosen.budget.memory, chosen.task.macs, chosen.macs_beside):
        assert all(a <= b for a, b in pairwise(map(cost, parts))), cost
    assert parts[-1] == full(chosen.task.layout)


def test_flexfls_part_is_as_large_as_a_uniform_one_of_the_ratio() -> None:
    """So that a ratio means the same for every method; the widths differ."""
    chosen, uniform = server("flexfl", ratio_policy="budget"), server("heterofl")
    chosen.prepare()
    for ratio in (0.25, 0.5, 0.75):
        mine, theirs = chosen.part_at(ratio, 1), uniform.part_at(ratio, 1)
        assert mine != theirs
        assert chosen.budget.share(mine) == pytest.approx(chosen.budget.share(theirs), abs=0.06)


@pytest.mark.parametrize("strategy", METHODS)
def test_a_run_keeps_its_deadline(strategy: str, tmp_path: Path) -> None:
    """Modelled seconds as the run itself reports them, messages weighed and teachers counted."""
    values = {
        "ratio-policy": "budget",
        "round-deadline": 0.1,
        "fleet": "boards",
        "fraction-evaluate": 0.0,
        "batch-norm": "batch",
        "batch-size": 16,
        "num-server-rounds": 2,
    }
    run = run_toy(tmp_path, strategy, values, clients=6)
    for line in lines(run):
        assert not line["failed"]
        assert not line["refused"]
        assert 0 < line["modelled-seconds"] <= 0.1 or not line["cohort"]
    if strategy in WIDTH_METHODS:
        assert len(set().union(*(line["dispatched"] for line in lines(run)))) > 1  # unequal devices, unequal parts


def test_devices_that_hold_nothing_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fleet = tmp_path / "fleet.toml"
    rows = [("tiny", 1e6), ("large", 1e9)]
    fleet.write_text("".join(f'[[class]]\nkind = "{k}"\nshare = 0.5\nmemory-bytes = {m}\n' for k, m in rows))
    caplog.set_level("INFO", "flwr")
    for strategy in METHODS:
        for policy in ("level", "budget"):
            run = run_toy(tmp_path / "runs", strategy, {"fleet": str(fleet), "ratio-policy": policy})
            if strategy != "small" or policy == "budget":  # `small` has a size of its own
                assert set(lines(run)[0]["cohort"]) <= {2, 3}, (strategy, policy)
                assert "2 of 4 devices cannot train: partitions [0, 1]" in caplog.text
            caplog.clear()


def test_power_that_changes_from_round_to_round_is_followed(tmp_path: Path) -> None:
    values = {"fleet": "fedlps", "num-server-rounds": 6, "fraction-train": 1.0, "fraction-evaluate": 0.0}
    run = run_toy(tmp_path, "heterofl", {**values, "batch-norm": "batch"})
    device = load_fleet("fedlps").device(2, 4, 1)
    for line in lines(run):
        expected = [device_level(replace(device, partition=p), line["round"]) for p in range(4)]
        assert line["dispatched"] == {level: expected.count(level) for level in sorted(set(expected))}
    levels = {key for key in lines(run)[0] if key.startswith("accuracy-")} - {"accuracy-levels"}
    assert levels == {"accuracy-a", "accuracy-b", "accuracy-c", "accuracy-d"}  # all that its power may allow


def device_level(device: Device, server_round: int) -> str:
    """The largest level whose share of the parameters is within this round's power."""
    task = toy_task()
    power = device.in_round(server_round, 1).capacity
    whole = num_parameters(task.layout, full(task.layout))
    ratios = dict(zip("abcde", (1.0, 0.5, 0.25, 0.125, 0.0625), strict=True))
    fitting = [
        n for n, r in ratios.items() if num_parameters(task.layout, prefix_ratio(task.layout, r)) / whole <= power
    ]
    return fitting[0] if fitting else "e"


def test_what_was_never_told_does_not_bind() -> None:
    task = toy_task()
    whole = full(task.layout)
    assert Budget(task).holds(Device(0), whole)
    assert not Budget(task).holds(Device(0, capacity=0.99), whole)
    assert Budget(task).bears(Device(0, capacity=0.01), whole)
    slow = Device(0, speed_macs_s=1.0, num_examples=100)
    assert Budget(task).bears(slow, whole)
    assert not Budget(task, round_deadline=1e3).bears(slow, whole)
