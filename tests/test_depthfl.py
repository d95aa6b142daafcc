"""DepthFL's mathematics and its client, against the worked examples, plain numpy and training written out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from test_budget import excess, random_fleet
from torch import Tensor
from torch.nn import functional
from toy import random_arrays, same_bits

from flexfed.config import Experiment
from flexfed.cost import _Storages, num_parameters, part_bytes
from flexfed.data import ClientData, load_server
from flexfed.devices import Device
from flexfed.evaluation import measure_levels
from flexfed.exits import ExitNetwork, depth_keys
from flexfed.jobs import Job, Task, Update, initial_arrays
from flexfed.methods import depthfl
from flexfed.methods.depthfl import (
    DepthFLConfig,
    client_step,
    consistency_weight,
    depth_part,
    divergence,
    dynamic_term,
    local_update,
    memory_beside,
    mutual_loss,
    server_step,
    trained_part,
)
from flexfed.networks import EXITS
from flexfed.submodel import Submodel, extract, full, unflatten
from flexfed.training import Samples, Training, build_optimizer
from flexfed.units import Arrays
from strategies.depthfl import DepthFL

IMAGE, WINDOW = (1, 8, 8), (3, 64)
EXAMPLE = [[1.0, 0.0, 0.0], [1.5, 0.5, 0.0], [2.0, 0.0, -1.0]]
"""The three exits of worked example S1; the label is 0."""
STEEP = Training(learning_rate=0.05, momentum=0.9, weight_decay=0.02, local_epochs=3, batch_size=16)


def experiment(**values: Any) -> Experiment:
    own = {f.replace("_", "-"): v for f, v in values.items()}
    knobs = {f"depthfl.{k}" if k in KNOBS else k: v for k, v in own.items()}
    return Experiment.read({"strategy": "depthfl", **knobs})


KNOBS = ("heads", "distillation", "ramp-rounds", "feddyn-alpha", "weights", "assign", "shares", "train")


@cache
def plain_task(model: str = "cnn", shape: tuple[int, ...] = IMAGE, stages: str = "", train: str = "all") -> Task:
    return experiment(model=model, stages=stages, train=train).task(10, shape)


def task_of(model: str = "cnn", shape: tuple[int, ...] = IMAGE, stages: str = "", **knobs: Any) -> Task:
    task = plain_task(model, shape, stages, knobs.get("train", "all"))
    return replace(task, method=DepthFLConfig(**knobs), training=STEEP)


# --- the weight of the distillation, and the loss -----------------------------------------------------------------


# Worked example D1 of the paper page.
@pytest.mark.parametrize(
    ("rounds", "weight"),
    [(0, 0.006738), (1, 0.006966), (75, 0.060055), (150, 0.286505), (299, 0.999944), (300, 1.0), (1000, 1.0)],
)
def test_the_consistency_weight_of_the_worked_example(rounds: int, weight: float) -> None:
    assert consistency_weight(rounds, 300) == pytest.approx(weight, abs=5e-7)


def test_without_a_ramp_the_weight_is_1() -> None:
    assert consistency_weight(0, 0) == consistency_weight(10, 10) == 1.0


def example() -> list[Tensor]:
    return [torch.tensor([z], dtype=torch.float64, requires_grad=True) for z in EXAMPLE]


# Worked example D2 of the paper page, reproduced with the authors' own class.
def test_the_divergences_and_the_loss_of_the_worked_example() -> None:
    logits, labels = example(), torch.tensor([0])
    found = [[divergence(teacher, student).item() for teacher in logits] for student in logits]
    expected = [[0, 0.016954, 0.183383], [0.018895, 0, 0.117312], [0.254226, 0.147068, 0]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-7)
    clean, added = (mutual_loss(logits, labels, 1.0, more).item() for more in (0.0, 1e-7))
    assert (int(1e6 * clean), int(1e6 * added)) == (1554578, 1554579), "the page cuts digits off"
    assert (clean, added) == pytest.approx((1.5545785687, 1.5545794687), abs=1e-9)


def test_the_prediction_of_the_worked_example_is_the_mean_of_the_logits() -> None:
    network = plain_task(stages="relu1, relu2, relu4").factory()
    assert isinstance(network, ExitNetwork)
    np.testing.assert_allclose(network.predict(example()).detach()[0], [1.5, 0.166667, -0.333333], atol=5e-7)


def test_the_loss_is_a_sum_over_the_classifiers() -> None:
    logits, labels = example(), torch.tensor([0])
    one = functional.cross_entropy(logits[0], labels)
    assert torch.equal(mutual_loss(logits[:1], labels, 1.0), one), "nobody teaches it"
    assert mutual_loss([logits[0]] * 3, labels, 1.0).item() == pytest.approx(3 * one.item())
    each = sum(functional.cross_entropy(z, labels) for z in logits)
    assert mutual_loss(logits, labels, 0.0).item() == pytest.approx(torch.as_tensor(each).item())


def test_teachers_are_not_taught() -> None:
    """The gradient of each exit as a formula: p_i - y, and w / (M - 1) of p_i - p_j for each teacher."""
    rng = np.random.default_rng(1)
    values, labels, weight = rng.standard_normal((3, 5, 4)), rng.integers(0, 4, 5), 0.7
    logits = [torch.tensor(z, requires_grad=True) for z in values]
    mutual_loss(logits, torch.from_numpy(labels), weight).backward()  # type: ignore[no-untyped-call]
    p = np.exp(values) / np.exp(values).sum(2, keepdims=True)
    for i in range(3):
        taught = sum(p[i] - p[j] for j in range(3) if j != i)
        expected = (p[i] - np.eye(4)[labels] + weight / 2 * taught) / 5
        np.testing.assert_allclose(logits[i].grad, expected, atol=1e-12)


# --- FedDyn -------------------------------------------------------------------------------------------------------


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.tensor([3.0]))


def test_the_dynamic_term_by_hand() -> None:
    model, start = Two(), {"a": torch.tensor([0.0, 4.0]), "b": torch.tensor([1.0])}
    own = {"a": torch.tensor([10.0, 20.0])}  # b was never trained: its g is 0
    term = dynamic_term(model, start, own, 0.5)
    assert term.item() == -(10 * 1 + 20 * -2) + 0.25 * (1 + 4 + 4)
    term.backward()  # type: ignore[no-untyped-call]
    assert model.a.grad is not None
    assert model.b.grad is not None
    assert model.a.grad.tolist() == [-10 + 0.5 * 1, -20 + 0.5 * -2]
    assert model.b.grad.tolist() == [0.5 * 2]
    assert dynamic_term(model, {}, {}, 0.0).item() == 0.0


def vector(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_a_client_moves_what_it_trained_and_keeps_the_rest() -> None:
    own = {"deep": vector(7), "both": vector(1, 2)}
    before = {"both": vector(1, 1), "new": vector(0)}
    after = {"both": vector(2, 0), "new": vector(5), "buffer": vector(9)}
    found = client_step(own, before, after, 0.5)
    assert {name: array.tolist() for name, array in found.items()} == {
        "deep": [7.0],
        "both": [0.5, 2.5],
        "new": [-2.5],
    }
    assert own["both"].tolist() == [1.0, 2.0]


# Worked example D3 of the paper page, reproduced with the authors' own code.
def test_the_server_step_of_the_worked_example() -> None:
    model, memory = server_step({"w": vector(1)}, {"w": vector(1.2)}, {}, {"w": 10}, 100, 0.1)
    assert memory["w"] == pytest.approx(-0.002)
    assert model["w"] == pytest.approx(1.22)
    further, memory = server_step(model, {"w": vector(1.22)}, memory, {"w": 10}, 100, 0.1)
    assert memory["w"] == pytest.approx(-0.002), "the mean stood still"
    assert further["w"] == pytest.approx(1.24), "and h goes on"


def test_what_nobody_held_keeps_its_bytes_and_its_h() -> None:
    previous = {"held": vector(1), "absent": vector(1, -0.0), "buffer": vector(1)}
    averaged = {"held": vector(2), "absent": vector(1, -0.0), "buffer": vector(3)}
    memory = {"held": vector(0.5), "absent": vector(0.25, 3)}
    model, found = server_step(previous, averaged, memory, {"held": 1, "absent": 0}, 4, 0.5)
    assert same_bits({"x": model["absent"], "h": found["absent"]}, {"x": previous["absent"], "h": memory["absent"]})
    assert model["buffer"].tolist() == [3.0], "no parameter: the mean"
    assert found["held"].tolist() == [0.5 - 0.5 / 4]
    assert model["held"].tolist() == [2 - (0.5 - 0.5 / 4) / 0.5]
    assert "buffer" not in found
    assert memory["held"].tolist() == [0.5]


def test_law_1_nothing_moves_while_h_is_0() -> None:
    rng = np.random.default_rng(0)
    previous = {"w": rng.standard_normal((3, 4)).astype(np.float32), "zero": vector(0.0, -0.0)}
    model, memory = server_step(previous, dict(previous), {}, dict.fromkeys(previous, 2), 3, 0.1)
    assert same_bits(model, previous)
    assert not any(h.any() for h in memory.values())
    assert same_bits(server_step(previous, dict(previous), memory, dict.fromkeys(previous, 2), 3, 0.1)[0], previous)


# --- the configuration --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"heads": "best"}, "depthfl.heads must be one of linear, scalefl, depthfl, got 'best'"),
        ({"weights": "none"}, "depthfl.weights must be one of uniform, examples"),
        ({"assign": "dynamic"}, "depthfl.assign must be one of capacity, fix"),
        ({"train": "some"}, "depthfl.train must be one of all, deepest"),
        ({"ramp_rounds": -1}, "depthfl.ramp-rounds must be >= 0"),
        ({"feddyn_alpha": -0.1}, "depthfl.feddyn-alpha must be >= 0, 0 = off"),
        ({"feddyn_alpha": float("nan")}, "depthfl.feddyn-alpha must be >= 0"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        DepthFLConfig(**values)


def test_classifiers_that_are_not_trained_do_not_predict() -> None:
    assert depthfl.exits(DepthFLConfig(heads="linear"), ("a", "b")).ensemble
    assert depthfl.exits(DepthFLConfig(heads="linear"), ("a", "b")).design == "linear"
    assert not depthfl.exits(DepthFLConfig(train="deepest"), ()).ensemble


# --- parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "shape"), [("cnn", IMAGE), ("cnn1d", WINDOW), ("heterofl-resnet18", (3, 32, 32))])
def test_a_part_is_a_network_that_ends_early_and_has_nothing_else(model: str, shape: tuple[int, ...]) -> None:
    task = task_of(model, shape)
    sizes = []
    for depth in (1, 2, 3, 4):
        part = depth_part(task, depth)
        assert part.units.all(), "widths are never cut"
        arrays = {name: np.zeros(task.layout.shapes[name], np.float32) for name in depth_keys(task.factory)[depth - 1]}
        network = task.network(arrays)
        assert isinstance(network, ExitNetwork)
        assert network.num_exits == depth
        assert sum(p.numel() for p in network.parameters()) == num_parameters(task.layout, part)
        sizes.append(num_parameters(task.layout, part))
    assert sizes == sorted(set(sizes))
    assert part == full(task.layout), "the whole network has one form"


def test_a_reply_reports_what_is_trained() -> None:
    every, deepest = task_of(), task_of(train="deepest")
    for depth in (1, 2, 3, 4):
        part = depth_part(every, depth)
        assert trained_part(every, part) is part
        held = {name for name in deepest.layout.shapes if trained_part(deepest, part).holds(name)}
        heads = sorted({name.split(".")[1] for name in held if name.startswith(f"{EXITS}.")})
        assert heads == ([f"relu{depth}"] if depth < 4 else [])
        left_out = set(depth_keys(deepest.factory)[depth - 1]) - held
        assert all(name.startswith(f"{EXITS}.") for name in left_out)
        assert bool(left_out) == (depth > 1)


# --- who trains which depth ---------------------------------------------------------------------------------------


def server(devices: Sequence[Device] = (), **values: Any) -> DepthFL:
    made = DepthFL(setting := experiment(**values), setting.task(10, IMAGE), load_server(setting.data))
    made.federation.devices = made.devices = {device.partition: device for device in devices}
    made.federation.num_partitions = len(devices)
    return made


@pytest.mark.parametrize(
    ("capacity", "level"),
    [(2.0, "a"), (1.0, "a"), (0.99, "b"), (0.67, "b"), (0.65, "c"), (0.33, "c"), (0.32, "d"), (0.1, "d"), (0.001, "d")],
)
def test_a_device_trains_the_deepest_level_that_it_holds(capacity: float, level: str) -> None:
    """The levels of the small network hold 14, 33, 66 and 100 % of the parameters; the shallowest is for all."""
    device = Device(0, capacity=capacity, width=0.1)
    made = server([device])
    assigned = made.part_of(device, 1)
    assert (assigned.level, assigned.submodel) == (level, depth_part(made.task, "dcba".index(level) + 1))
    assert list(made.levels()) == [level, "a"][: 1 + (level != "a")]
    assert made.level_for_evaluation(device) == level
    assert server(ratio_policy="budget").can_train(device) is (capacity >= 0.15)


def test_memory_and_deadline_bind_besides() -> None:
    made = server(round_deadline=2.0)
    need = [made.budget.memory(part) for part in made._parts]
    assert need == sorted(need, reverse=True)
    assert made.part_of(Device(0, memory_bytes=need[1]), 1).level == "b"
    assert made.part_of(Device(0, memory_bytes=need[1] - 1), 1).level == "c"
    assert not made.can_train(Device(0, memory_bytes=need[3] - 1))
    slow = Device(0, num_examples=100, speed_macs_s=1e8)
    assert made.budget.seconds(slow, made._parts[0]) > 2.0 > made.budget.seconds(slow, made._parts[3])
    assert made.part_of(slow, 1).level != "a"
    assert not made.can_train(replace(slow, speed_macs_s=1.0))


def test_levels_may_be_dealt() -> None:
    devices = [Device(p) for p in range(8)]
    made = server(devices, assign="fix", shares="a1-b1-d2")
    assert [made.part_of(device, 1).level for device in devices] == ["a", "a", "b", "b", "d", "d", "d", "d"]
    assert list(made.levels()) == ["d", "b", "a"]
    exclusive = server(devices, assign="fix", shares="b1")
    assert {exclusive.part_of(device, 1).level for device in devices} == {"b"}
    weak = replace(devices[0], memory_bytes=made.budget.memory(made._parts[2]))
    assert made.part_of(weak, 1).level == "c", "dealt more than it bears"


def test_the_levels_are_those_of_the_devices_that_are_known_and_can_train() -> None:
    made = server([Device(0)])
    assert list(made.levels()) == ["a"]
    made.federation.devices = {0: Device(0, capacity=0.5), 1: Device(1, memory_bytes=1.0)}
    assert list(made.levels()) == ["c", "a"]


def test_what_cannot_be_dealt_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match=r"depthfl.shares: expected levels a to d, .* got 'e1'"):
        server(assign="fix", shares="a1-e1")
    with pytest.raises(ValueError, match=r"depthfl.shares: expected levels a to b, .* got 'c1'"):
        server(assign="fix", stages="relu1, relu4")
    with pytest.raises(ValueError, match=r"depthfl\.train='deepest' leaves classifiers untrained"):
        server(train="deepest", personal="stored-local")


def test_the_worked_example_in_a_federation_most_of_whose_clients_are_absent() -> None:
    """D3: ten of a hundred hold the first level, none more; twelve are here."""
    made = server([Device(p) for p in range(12)])
    made.federation.num_partitions = 100
    held = depth_part(made.task, 1)
    shapes = made.task.layout.shapes
    previous = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    averaged = {n: np.full_like(a, 1.2) if held.holds(n) else a for n, a in previous.items()}
    for partition in range(10):
        made.observe(1, partition, Update(held, np.zeros(0, np.float32), 1.0, {}))
    model = made.finish(previous, averaged)
    for name, array in model.items():
        np.testing.assert_allclose(array, 1.22 if held.holds(name) else 1.0, rtol=1e-6)
    assert made.state_dict().keys() == {f"feddyn/{name}" for name in shapes if held.holds(name)}
    np.testing.assert_allclose(made.state_dict()["feddyn/conv1.bias"], -0.002, rtol=1e-5)
    assert server(feddyn_alpha=0.0).finish(previous, averaged) is averaged


@pytest.mark.parametrize("deadline", [0.0, 2.0])
@pytest.mark.parametrize("policy", ["level", "budget"])
def test_law_11_over_random_fleets(policy: str, deadline: float) -> None:
    """Nobody trains more than it holds, but the shallowest level, which is for all; FedDyn's memory counts."""
    rng = np.random.default_rng([policy == "level", int(deadline)])
    made, levels, left_out = server(ratio_policy=policy, round_deadline=deadline), set(), 0
    for server_round in range(1, 9):
        devices = random_fleet(rng)
        made.federation.devices = devices
        left_out += sum(not made.can_train(device) for device in devices.values())
        for partition, assignment in made.assign(server_round, devices, rng).items():
            over = excess(made, devices[partition], assignment.submodel, deadline)
            for_all = policy == "level" and assignment.level == "d"
            assert set(over) <= {"width"} | ({"capacity"} if for_all else set()), (devices[partition], assignment.level)
            levels.add(assignment.level)
    assert len(levels) > 2
    assert left_out > 0


def test_testing_needs_memory_of_its_own() -> None:
    made = server()
    made.task = replace(made.task, training=replace(made.task.training, batch_size=2))
    made.budget = replace(made.budget, task=made.task)
    parts = made._parts
    enough = Device(0, memory_bytes=max(made.budget.memory_to_test(parts[0]), made.budget.memory(parts[0])))
    made.federation.devices = {0: enough, 1: Device(1, capacity=0.2)}
    assert made.level_for_evaluation(enough) == "a"
    short = Device(0, memory_bytes=made.budget.memory_to_test(parts[0]) - 1)
    assert made.level_of(short) == 0, "it trains in small batches"
    assert made.level_for_evaluation(short) == "d", "the next one that is evaluated"


# --- memory -------------------------------------------------------------------------------------------------------


def peak_of_a_step(model: torch.nn.Module, loss: Any, held: Sequence[Tensor]) -> int:
    optimizer = build_optimizer(model, STEEP, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with _Storages() as storages:
        for tensor in [*model.parameters(), *held]:
            storages.follow(tensor)
        loss().backward()
        optimizer.step()
    peak: int = storages.peak_bytes
    return peak


@pytest.mark.parametrize("depth", [2, 4])
def test_feddyns_memory_is_counted(depth: int) -> None:
    task = task_of()
    part = depth_part(task, depth)
    model = task.network(extract(task.layout, part, initial_arrays(task, "", 1)))
    inputs, labels = torch.randn(4, *IMAGE), torch.zeros(4, dtype=torch.int64)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    own = {n: torch.ones_like(p) for n, p in start.items()}

    def plain() -> Tensor:
        return mutual_loss(model(inputs, every=True), labels, 1.0)

    def whole() -> Tensor:
        return plain() + dynamic_term(model, start, own, 0.1)

    beside = peak_of_a_step(model, whole, [*start.values(), *own.values()]) - peak_of_a_step(model, plain, [])
    told = memory_beside(task, part)
    assert told == 4 * part_bytes(task.layout, part)
    assert 0.8 * told < beside <= 1.1 * told, "and a temporary result or two"
    with_it, without = (server(feddyn_alpha=alpha).budget.memory(part) for alpha in (0.1, 0.0))
    assert with_it - without == told


def test_g_m_is_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    task, places = task_of(), set[tuple[str, int]]()

    def watched(model: Any, start: Any, own: dict[str, Tensor], alpha: float) -> Tensor:
        places.update((name, tensor.data_ptr()) for name, tensor in own.items())
        return dynamic_term(model, start, own, alpha)

    monkeypatch.setattr("flexfed.methods.depthfl.dynamic_term", watched)
    given = job(task, 2, state=given_state(task))
    kept = {name: array.copy() for name, array in given.state.items()}
    local_update(given, task, samples())
    assert places == {(n, given.state[f"feddyn/{n}"].ctypes.data) for n in depth_keys(task.factory)[1]}
    assert all(array.tobytes() == kept[name].tobytes() for name, array in given.state.items()), "it is only read"


def test_a_real_device_is_asked_for_that_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    task, made = task_of(), job()
    need = task.memory_to_train(made.submodel) + memory_beside(task, made.submodel)
    real = replace(made, device=Device(0, measure_memory=True))
    monkeypatch.setattr("flexfed.jobs.free_memory", lambda: need - 1)
    with pytest.raises(RuntimeError, match="out of memory"):
        local_update(real, task, samples())
    monkeypatch.setattr("flexfed.jobs.free_memory", lambda: need)
    assert local_update(real, task, samples()).state


# --- the client ---------------------------------------------------------------------------------------------------


def job(task: Task | None = None, depth: int = 3, server_round: int = 40, state: Arrays | None = None) -> Job:
    task = task or task_of()
    part = depth_part(task, depth)
    arrays = extract(task.layout, part, initial_arrays(task, "", 1))
    return Job(part, arrays, Device(0), {}, 5, server_round, state or {})


def samples(shape: tuple[int, ...] = IMAGE, num: int = 16) -> ClientData:
    """One batch, so that the order of the samples matters to rounding only."""
    rng = np.random.default_rng(3)
    found = Samples(
        torch.from_numpy(rng.standard_normal((num, *shape), dtype=np.float32)),
        torch.from_numpy(rng.integers(0, 10, num)),
    )
    return ClientData(found, found, found, tuple(range(10)), None)  # type: ignore[arg-type]


def given_state(task: Task) -> Arrays:
    """g_m of every tensor, as if the client had trained everything once; and what other rooms keep."""
    found = random_arrays(task.layout, np.random.default_rng(4))
    return {**{f"feddyn/{n}": 0.03 * a for n, a in found.items()}, "model/part": np.ones(3, np.float32)}


def trained_by_hand(task: Task, given: Job, data: ClientData) -> Arrays:
    """SGD with momentum and weight decay on the loss of the page, in double precision and without the library."""
    config, net = task.method, task.network(given.arrays).double()
    old = {n: p.detach().clone() for n, p in net.named_parameters()}
    pulls = {n: torch.from_numpy(given.state[f"feddyn/{n}"]).double() for n in old if f"feddyn/{n}" in given.state}
    weight = (
        float(np.exp(-5 * (1 - min(given.server_round - 1, config.ramp_rounds) / config.ramp_rounds) ** 2))
        if config.distillation
        else 0.0
    )
    rate, speed = STEEP.rate_at(given.server_round), {n: torch.zeros_like(p) for n, p in old.items()}
    for _ in range(STEEP.local_epochs):
        logits = net(data.train.inputs.double(), every=True)
        losses = [functional.cross_entropy(z, data.train.labels) for z in logits]
        logs = [z.log_softmax(1) for z in logits]
        taught = sum(
            (logs[j].exp() * (logs[j] - logs[i])).detach().sum(1).mean()
            + (logs[j].exp().detach() * (logs[i].detach() - logs[i])).sum(1).mean()
            for i in range(len(logits))
            for j in range(len(logits))
            if i != j
        )
        total: Any = losses[-1] if config.train == "deepest" else sum(losses)
        if config.train == "all" and len(logits) > 1:
            total = total + weight / (len(logits) - 1) * taught
        gradients = torch.autograd.grad(total, list(net.parameters()), allow_unused=True)
        with torch.no_grad():
            for (name, p), gradient in zip(net.named_parameters(), gradients, strict=True):
                if gradient is None:
                    continue
                if config.feddyn_alpha:
                    gradient = gradient + config.feddyn_alpha * (p - old[name]) - pulls.get(name, torch.zeros(()))
                speed[name] = STEEP.momentum * speed[name] + gradient + STEEP.weight_decay * p
                p -= rate * speed[name]
    return {n: p.detach().numpy() for n, p in net.named_parameters()}


VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "no distillation": {"distillation": False},
    "fedavg": {"distillation": False, "feddyn_alpha": 0.0},
    "no feddyn": {"feddyn_alpha": 0.0, "ramp_rounds": 10},
    "inclusive": {"distillation": False, "feddyn_alpha": 0.0, "train": "deepest"},
    "deepest with feddyn": {"train": "deepest"},
    "linear": {"heads": "depthfl", "feddyn_alpha": 0.3},
}


@pytest.mark.parametrize("depth", [1, 3, 4])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_local_training_is_what_the_page_says(variant: str, depth: int) -> None:
    task = task_of(**VARIANTS[variant])
    config: DepthFLConfig = task.method
    given = job(task, depth, state=given_state(task) if config.feddyn_alpha else None)
    update = local_update(given, task, samples())
    expected = trained_by_hand(task, given, samples())
    reported = trained_part(task, given.submodel)
    assert update.submodel == reported
    for name, moved in unflatten(task.layout, reported, update.difference).items():
        np.testing.assert_allclose(moved, expected[name] - given.arrays[name], atol=2e-5, err_msg=name)
        assert np.abs(moved).max() > 1e-5 or "norm" in name
    frozen = [name for name in given.arrays if not reported.holds(name)]
    assert bool(frozen) == (config.train == "deepest" and depth > 1)
    assert update.trained is not None
    for name in frozen:
        np.testing.assert_array_equal(update.trained.arrays[name], given.arrays[name])
    check_state(task, given, update)


def check_state(task: Task, given: Job, update: Update) -> None:
    """g_m moved where something was trained, by what the server is told; every other tensor keeps its bytes."""
    alpha = task.method.feddyn_alpha
    if not alpha:
        assert update.state == {}
        return
    moved = unflatten(task.layout, update.submodel, update.difference)
    for name in task.layout.shapes:
        before, after = given.state[f"feddyn/{name}"], update.state[f"feddyn/{name}"]
        assert after.dtype == np.float32
        if name in moved:
            np.testing.assert_allclose(after, before - alpha * moved[name], atol=1e-7, err_msg=name)
        else:
            assert after.tobytes() == before.tobytes()
    assert "model/part" not in update.state, "who keeps that adds it"


def test_a_first_job_begins_with_nothing_and_keeps_what_it_trained() -> None:
    task = task_of()
    update = local_update(job(task, 2), task, samples())
    assert update.state.keys() == {f"feddyn/{name}" for name in depth_keys(task.factory)[1]}
    assert all(array.any() for array in update.state.values())


def test_windows_are_trained_as_images_are() -> None:
    task = task_of("cnn1d", WINDOW)
    given = job(task, 2)
    update = local_update(given, task, samples(WINDOW))
    expected = trained_by_hand(task, given, samples(WINDOW))
    for name, moved in unflatten(task.layout, update.submodel, update.difference).items():
        np.testing.assert_allclose(moved, expected[name] - given.arrays[name], atol=2e-5, err_msg=name)


def test_the_accuracy_while_training_is_that_of_the_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classifiers 1 and 2 are each wrong where their mean is right."""
    task = replace(task_of(stages="relu1, relu4"), training=replace(STEEP, local_epochs=1))
    arrays = planted(task, [[3, 2, 0], [0, 2, 3]])
    data = samples()
    right = replace(data, train=Samples(data.train.inputs, torch.ones_like(data.train.labels)))
    whole = full(task.layout)
    found = local_update(Job(whole, arrays, Device(0), {}, 5, 1), task, right)
    assert found.metrics["train-accuracy"] == 1.0


# --- evaluation ---------------------------------------------------------------------------------------------------


def planted(task: Task, logits: Sequence[Sequence[float]]) -> Arrays:
    """A model each of whose classifiers gives the same logits whatever it sees."""
    arrays = initial_arrays(task, "", 1)
    names = [f"{EXITS}.{stage}." for stage in ("relu1", "relu2", "relu3", "relu4")[: len(logits) - 1]]
    last = {name: [t for t in arrays if t.startswith(name)][-2:] for name in names}
    for (weight, bias), values in zip([*last.values(), ["classifier.weight", "classifier.bias"]], logits, strict=True):
        assert (arrays[weight].shape[0], arrays[bias].shape) == (10, (10,))
        arrays[weight] = np.zeros_like(arrays[weight])
        arrays[bias] = np.asarray([*values, *[-9.0] * (10 - len(values))], dtype=np.float32)
    return arrays


def test_every_exit_has_its_own_number_and_the_prediction_is_the_mean_of_the_logits() -> None:
    """As worked example S1's network would be tested, with logits that no two exits agree on."""
    task = plain_task(stages="relu1, relu2, relu4")
    arrays = planted(task, [[3, 2, 0, 0], [0, 2, 3, 0], [0, 0, 0, 9]])
    labels = torch.tensor([0] * 1 + [1] * 2 + [2] * 3 + [3] * 4)
    test = Samples(torch.randn(10, *IMAGE), labels)
    parts = {"c": depth_part(task, 1), "b": depth_part(task, 2), "a": depth_part(task, 3)}
    found = measure_levels(
        task,
        dict.fromkeys(parts),
        tuple(parts),
        lambda name: extract(task.layout, parts[name], arrays),
        test,
    )
    exits = {key: round(value, 6) for key, value in found.items() if key.startswith("exit-")}
    assert exits == {
        "exit-accuracy-b-1": 0.1, "exit-accuracy-b-2": 0.3,
        "exit-accuracy-a-1": 0.1, "exit-accuracy-a-2": 0.3, "exit-accuracy-a-3": 0.4,
    }  # fmt: skip
    assert found["accuracy-c"] == pytest.approx(0.1), "its one exit"
    assert found["accuracy-b"] == pytest.approx(0.2), "the mean of [3, 2, 0] and [0, 2, 3] is highest at 1"
    assert found["accuracy-a"] == found["accuracy"] == pytest.approx(0.4)
    mean = torch.tensor([1.0, 4 / 3, 1.0, 3.0, *[-9.0] * 6])
    losses = [functional.cross_entropy(mean, label) for label in labels]
    assert found["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_where_only_the_deepest_is_trained_it_predicts() -> None:
    task = plain_task(stages="relu1, relu4", train="deepest")
    arrays = planted(task, [[9, 0], [0, 1]])
    network = task.network(arrays)
    assert network(torch.randn(3, *IMAGE)).argmax(1).tolist() == [1, 1, 1]


def test_a_reply_with_rows_left_out_is_refused() -> None:
    made = server([Device(0)])
    assignment = made.part_of(Device(0, capacity=0.4), 1)
    units = assignment.submodel.units.copy()
    units[np.flatnonzero(made.task.layout.fixed_units)[0]] = False
    nothing = np.zeros(0, dtype=np.float32)
    made.check(assignment, Update(assignment.submodel, nothing, 1.0, {}))
    for held in (Submodel(units, assignment.submodel.keys), depth_part(made.task, 1), full(made.task.layout)):
        with pytest.raises(ValueError, match="it holds other tensors or units than it was asked to train"):
            made.check(assignment, Update(held, nothing, 1.0, {}))
