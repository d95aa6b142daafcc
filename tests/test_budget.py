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
from flwr.app import Message
from toy import DIGITS, QUICK, lines, run_toy, toy_task

from flexfed.budget import STEPS, Budget
from flexfed.config import Experiment
from flexfed.cost import memory_budget, message_bytes, num_parameters, part_bytes, training_memory
from flexfed.data import load_server
from flexfed.devices import Device, load_fleet
from flexfed.jobs import Task, initial_arrays
from flexfed.submodel import Submodel, full
from strategies import STRATEGIES

MB = 1e6
METHODS = ("exclusive", "fedavg", "fedlps", "fedrolex", "fjord", "flexfl", "heterofl", "small")
WIDTH_METHODS = ("fedlps", "fedrolex", "fjord", "flexfl", "heterofl")
POLICIES = ("level", "budget", "p-ucbv", "thompson", "uniform", "fixed")
PRODUCT = [(s, p) for s in METHODS for p in (POLICIES if s in WIDTH_METHODS else POLICIES[:2])]


ARRAYS = initial_arrays(toy_task(), "", 1)


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


def random_fleet(rng: np.random.Generator, least_mb: float = 24) -> dict[int, Device]:
    """Devices of any kind: some tell their memory, some their capacity, links and speeds over two decades."""
    downloads, widths = rng.spawn(2)
    return {
        partition: Device(
            partition,
            capacity=float(rng.choice([1.0, rng.uniform(0.001, 1.6)])),
            width=float(widths.choice([math.inf, math.inf, math.inf, widths.uniform(0.02, 1)])),
            memory_bytes=float(rng.choice([math.inf, rng.uniform(least_mb, 38) * MB])),
            speed_macs_s=float(10 ** rng.uniform(7, 9)),
            link_bytes_s=float(10 ** rng.uniform(4, 6)),
            download_bytes_s=float(downloads.choice([0.0, 10 ** downloads.uniform(4, 7)])),
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
    for group, span in layout.groups.items():
        allowed = math.ceil(device.width * len(span) - 1e-9) if device.width < 1 else len(span)
        if group not in layout.fixed and submodel.units[span.start : span.stop].sum() > max(1, allowed):
            found.append("width")
            break
    memory = training_memory(task.factory, layout, submodel, task.input_shape, training)
    if memory_budget(memory) + strategy.memory_beside(submodel) + 4 * numbers + beside > device.memory_bytes:
        found.append("memory")
    batches = device.num_examples // training.batch_size * training.batch_size or device.num_examples
    macs = training.local_epochs * batches * (3 * task.macs(submodel) + strategy.macs_beside(submodel))
    download = device.download_bytes_s if device.download_bytes_s else device.link_bytes_s
    radio = (4 * numbers + beside) * (1 / download + 1 / device.link_bytes_s)
    if deadline and macs / device.speed_macs_s + radio > deadline:
        found.append("deadline")
    return found


@pytest.mark.parametrize("deadline", [0.0, 2.0])
@pytest.mark.parametrize(("strategy", "policy"), PRODUCT)
def test_law_11_over_random_fleets(strategy: str, policy: str, deadline: float) -> None:
    rng = np.random.default_rng([METHODS.index(strategy), POLICIES.index(policy), int(deadline)])
    sent = left_out = 0
    for server_round in range(1, 9):
        chosen = server(strategy, ratio_policy=policy, round_deadline=deadline)
        chosen.federation.devices = devices = random_fleet(rng)
        chosen.prepare(None)
        chosen._arrays = ARRAYS
        left_out += sum(not chosen.can_train(device) for device in devices.values())
        for partition, assignment in chosen.assign(server_round, devices, rng).items():
            over = excess(chosen, devices[partition], assignment.submodel, deadline)
            if policy == "level" and strategy == "flexfl":  # its own measure of capacity is the level's target
                assert set(over) <= {"capacity", "width"}
            elif policy == "level" and over and set(over) <= {"capacity", "width"}:
                assert assignment.level in ("e", "full", "small"), "the smallest level and the controls' are for all"
                assert strategy != "exclusive"
            elif strategy == "fedavg":  # the control that ignores capacity
                assert set(over) <= {"capacity", "width"}
            else:
                assert not over, (devices[partition], assignment.level)
            sent += 1
    assert sent > (0 if strategy == "exclusive" else 3)
    assert left_out > 0


@pytest.mark.parametrize("strategy", WIDTH_METHODS)
def test_a_budget_buys_the_largest_part_that_fits(strategy: str) -> None:
    """The next step up is too much; a device that tells nothing gets everything."""
    chosen = server(strategy, ratio_policy="budget", round_deadline=3.0)
    chosen.prepare(None)
    rng = np.random.default_rng(3)
    bound = 0
    for device in [d for _ in range(6) for d in random_fleet(rng, 29).values()]:
        ratio = chosen.cap_of(device)
        tight = 0.0 if ratio is None else ratio
        if tight == device.width:  # FedLPS's own measure, exactly
            continue
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
    chosen.prepare(None)
    parts = [chosen.part_at(k / STEPS, 1) for k in range(1, STEPS + 1)]
    for cost in (chosen.budget.share, chosen.budget.memory, chosen.task.macs, chosen.macs_beside):
        assert all(a <= b for a, b in pairwise(map(cost, parts))), cost
    assert parts[-1] == full(chosen.task.layout)


def test_flexfls_part_is_as_large_as_a_uniform_one_of_the_ratio() -> None:
    """So that a ratio means the same for every method; the widths differ."""
    chosen, uniform = server("flexfl", ratio_policy="budget"), server("heterofl")
    chosen.prepare(None)
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


def test_a_codec_saves_time_and_costs_memory() -> None:
    task = toy_task()
    whole, device = full(task.layout), Device(0, link_bytes_s=1e3)
    plain, coded = Budget(task), Budget(task, codec="int8")
    assert coded.seconds(device, whole) < 0.4 * plain.seconds(device, whole)
    more = (
        message_bytes(task.layout, whole, "int8") + part_bytes(task.layout, whole) - message_bytes(task.layout, whole)
    )
    assert coded.memory(whole) - plain.memory(whole) == more > 0
    assert coded.memory_to_test(whole) - plain.memory_to_test(whole) == more


def test_a_masked_part_takes_more_memory_than_its_message() -> None:
    task = toy_task()
    whole = full(task.layout)
    masks = {name: np.arange(np.prod(shape)).reshape(shape) % 5 == 0 for name, shape in task.layout.shapes.items()}
    masked, budget = Submodel(whole.units, masks=masks), Budget(task)
    assert message_bytes(task.layout, masked) < 0.4 * message_bytes(task.layout, whole)
    assert budget.memory(masked) > budget.memory(whole)


def test_devices_that_hold_nothing_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fleet = tmp_path / "fleet.toml"
    rows = [("tiny", 1e6), ("large", 1e9)]
    fleet.write_text("".join(f'[[class]]\nkind = "{k}"\nshare = 0.5\nmemory-bytes = {m}\n' for k, m in rows))
    caplog.set_level("INFO", "flwr")
    for strategy in METHODS:
        for policy in ("level", "budget", "p-ucbv")[: 3 if strategy in WIDTH_METHODS else 2]:
            run = run_toy(tmp_path / "runs", strategy, {"fleet": str(fleet), "ratio-policy": policy})
            if strategy != "small" or policy == "budget":  # `small` has a size of its own
                assert set(lines(run)[0]["cohort"]) <= {2, 3}, (strategy, policy)
                assert "2 of 4 devices cannot train: partitions [0, 1]" in caplog.text
            caplog.clear()


@pytest.mark.parametrize("policy", ["level", "budget", "p-ucbv"])
@pytest.mark.parametrize("strategy", WIDTH_METHODS)
def test_law_11_holds_for_every_message_of_every_round(strategy: str, policy: str, tmp_path: Path) -> None:
    """Jobs, tests and queries: what a device is sent is within the power that it has in that round."""
    fleet = load_fleet("fedlps")
    seen: dict[str, int] = {}

    def listen(request: Message, reply: Message, partition: int) -> Message:
        if "arrays" in request.content.array_records:
            numbers = len(request.content.array_records["arrays"]["part"].data) / 4
            now = fleet.device(partition, 4, 1).in_round(int(request.metadata.group_id), 1)
            kind = request.metadata.message_type
            assert reply.has_content(), reply
            assert numbers / whole <= now.capacity + 1e-9 or allowed(numbers / whole, now.capacity), (kind, now)
            seen[kind] = seen.get(kind, 0) + 1
        return reply

    def allowed(share: float, capacity: float) -> bool:
        """The level policy's own measures: FlexFL's targets, and the smallest level for everybody."""
        return policy == "level" and ((strategy == "flexfl" and share <= max(0.32, capacity + 0.06)) or share < 0.01)

    task = toy_task()
    whole = num_parameters(task.layout, full(task.layout))
    values = {"fleet": "fedlps", "num-server-rounds": 6, "fraction-train": 1.0, "fraction-evaluate": 1.0}
    values |= {"fraction-train": 0.5} if strategy == "fedlps" else {}  # those just trained test what they keep
    run_toy(tmp_path, strategy, {**values, "ratio-policy": policy}, alter=listen)
    assert seen["train"] >= 6
    assert seen["evaluate"] > 0 or strategy == "fedrolex"


def test_time_and_energy_are_those_of_the_rounds_device(tmp_path: Path) -> None:
    """A device at a tenth of its speed is as slow as one of that speed."""
    rows = {"swings": "speed-macs-s = 1e8\navailability = [0.1]", "slow": "speed-macs-s = 1e7\ncapacity = 0.1\n"}
    found = []
    for name, row in rows.items():
        path = tmp_path / f"{name}.toml"
        path.write_text(f'[[class]]\nkind = "{name}"\nshare = 1.0\n{row}\n')
        run = run_toy(tmp_path / name, "heterofl", {"fleet": str(path)})
        found.append([(line["modelled-seconds"], line["joules"], line["dispatched"]) for line in lines(run)])
    assert found[0] == found[1]


def test_small_is_small_enough_for_a_fleets_weakest_moment(tmp_path: Path) -> None:
    values = {"fleet": "fedlps", "ratio-policy": "budget", "num-server-rounds": 4, "fraction-train": 1.0}
    run = run_toy(tmp_path, "small", values)
    assert [len(line["cohort"]) for line in lines(run)] == [4] * 4


def test_a_fleet_that_can_train_nothing_stops_before_round_1(tmp_path: Path) -> None:
    for strategy in METHODS:
        for policy in ("level", "budget"):
            with pytest.raises(ValueError, match="no device can train anything; see capacity, memory-bytes and round"):
                run_toy(tmp_path, strategy, {"round-deadline": 1e-6, "ratio-policy": policy})


@pytest.mark.parametrize("strategy", ["heterofl", "fedrolex", "fjord"])
def test_two_rules_for_who_gets_how_much_are_one_too_many(strategy: str) -> None:
    with pytest.raises(ValueError, match=f"{strategy}.assign='fix' says who gets which level, ratio-policy='budget'"):
        experiment_of(strategy, ratio_policy="budget", **{f"{strategy}.assign": "fix"})


def test_levels_dealt_out_by_share_are_cut_to_what_a_device_bears() -> None:
    devices = {p: Device(p, memory_bytes=1e9, speed_macs_s=1e7, num_examples=100) for p in range(5)}
    for assign in ("fix", "dynamic"):
        chosen = server("heterofl", round_deadline=5.0, **{"heterofl.assign": assign, "heterofl.shares": "a1"})
        chosen.federation.devices = devices
        for assignment in chosen.assign(1, devices, np.random.default_rng(1)).values():
            assert assignment.level != "a"
            assert not excess(chosen, devices[0], assignment.submodel, 5.0)


def test_testing_needs_memory_of_its_own() -> None:
    """A batch of 128 may need more than training in small ones; then a smaller level is tested, or none."""
    for strategy in ("fedrolex", "fjord", "flexfl", "heterofl"):
        for policy in ("level", "budget"):
            chosen = server(strategy, ratio_policy=policy)
            chosen.task = replace(chosen.task, training=replace(chosen.task.training, batch_size=2))
            chosen.budget = Budget(chosen.task)
            for memory in np.linspace(20, 40, 41) * MB:
                device = Device(0, memory_bytes=float(memory))
                chosen.federation.devices = chosen.devices = {0: device}
                chosen.prepare(None)
                name = chosen.level_for_evaluation(device)
                if name is not None:
                    part = chosen.levels()[name]
                    assert chosen.task.memory_to_test(part) + 4 * num_parameters(chosen.task.layout, part) <= memory
                    assert chosen.task.memory_to_train(part) <= memory
            assert name is not None


def test_what_was_never_told_does_not_bind() -> None:
    task = toy_task()
    whole = full(task.layout)
    assert Budget(task).holds(Device(0), whole)
    assert not Budget(task).holds(Device(0, capacity=0.99), whole)
    assert not Budget(task).holds(Device(0, width=0.99), whole)
    assert Budget(task).bears(Device(0, capacity=0.01), whole)
    slow = Device(0, speed_macs_s=1.0, num_examples=100)
    assert Budget(task).bears(slow, whole)
    assert not Budget(task, round_deadline=1e3).bears(slow, whole)
