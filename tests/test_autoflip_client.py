"""AutoFLIP's client: exploration, masked training, and FedLEx's scaled gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy import Ties, random_arrays, same_bits

from flexfed.data import ClientData
from flexfed.devices import Device
from flexfed.jobs import Job, Task
from flexfed.methods import fedavg
from flexfed.methods.autoflip import (
    AutoFLIPConfig,
    exploration,
    explore,
    guidance_bytes,
    guidance_from,
    local_update,
    masked_step,
    prunable_tensors,
    read_deviations,
    scale_gradients,
)
from flexfed.methods.autoflip_masks import keep_above, random_scores, squared_deviations
from flexfed.methods.autoflip_units import masked_part
from flexfed.submodel import Submodel, extract, full, unflatten
from flexfed.training import Samples, Training, fit
from flexfed.units import Arrays, trace_layout

LAYOUT = trace_layout(Ties, (1, 4, 4))
NORMS = {"norm.weight", "norm.bias", "joined.weight", "joined.bias"}
HARD = Training(learning_rate=0.05, momentum=0.9, weight_decay=0.02, local_epochs=3, batch_size=8)
ADAM = replace(HARD, optimizer="adam", learning_rate=0.01)


class Bench(NamedTuple):
    task: Task
    arrays: Arrays
    data: ClientData

    def job(self, submodel: Submodel | None = None, **values: Any) -> Job:
        part = submodel or full(LAYOUT)
        return replace(Job(part, extract(LAYOUT, part, self.arrays), Device(0), {}, 5, 1), **values)

    @property
    def found(self) -> Submodel:
        return Submodel(full(LAYOUT).units, prunable_tensors(self.task))


def bench(training: Training = HARD, seed: int = 1, num: int = 32, **knobs: Any) -> Bench:
    arrays = {n: np.float32(0.3) * a for n, a in random_arrays(LAYOUT, np.random.default_rng(1)).items()}
    rng = np.random.default_rng(seed)
    inputs = torch.from_numpy(rng.standard_normal((num, 1, 4, 4), dtype=np.float32))
    samples = Samples(inputs, torch.from_numpy(rng.integers(0, 3, num)))
    data = ClientData(samples, samples, samples, (0, 1, 2), None)  # type: ignore[arg-type]
    return Bench(Task(Ties, LAYOUT, (1, 4, 4), 3, training, AutoFLIPConfig(**knobs)), arrays, data)


def random_part(quantile: float = 0.4) -> Submodel:
    shapes = {n: s for n, s in LAYOUT.shapes.items() if n not in NORMS}
    return masked_part(LAYOUT, keep_above(random_scores(shapes, np.random.default_rng(2)), quantile).masks)


# --- what may be pruned -----------------------------------------------------------------------------------------


def test_all_parameters_but_norms_may_be_pruned() -> None:
    assert prunable_tensors(bench().task) == LAYOUT.shapes.keys() - NORMS


def test_only_matrices_may_be_pruned_on_request() -> None:
    found = prunable_tensors(bench(prunable="matrices").task)
    assert found == {name for name, shape in LAYOUT.shapes.items() if len(shape) > 1}


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("offset", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.offset


def test_buffers_are_never_pruned() -> None:
    layout = replace(LAYOUT, groups={}, axes={"fc.weight": (None, None), "fc.bias": (None,), "offset": (None,)},
                     shapes={"fc.weight": (3, 4), "fc.bias": (3,), "offset": (3,)}, fixed=frozenset())  # fmt: skip
    task = Task(Buffered, layout, (4,), 3, HARD, AutoFLIPConfig())
    assert prunable_tensors(task) == {"fc.weight", "fc.bias"}


# --- exploration ------------------------------------------------------------------------------------------------


def test_an_explorer_replies_with_squares_of_its_prunable_tensors_and_nothing_else() -> None:
    b = bench(explore_epochs=4, explore_patience=9)
    update = explore(b.job(), b.task, b.data)
    assert update.submodel == b.found
    assert update.weight == 32
    assert update.state == {} and update.told == {} and update.trained is None  # noqa: PT018
    assert update.metrics["epochs"] == 4
    assert update.metrics["macs"] == 3 * b.task.macs(full(LAYOUT)) * 4 * 32
    found = read_deviations(LAYOUT, b.found, update)
    assert all((array >= 0).all() for array in found.values())
    assert any((array > 0).any() for array in found.values())
    assert update.difference.dtype == np.float32


def test_exploration_is_plain_training_with_its_own_optimiser_from_the_received_network() -> None:
    b = bench(explore_epochs=3, explore_patience=9, explore_learning_rate=0.01)
    got = read_deviations(LAYOUT, b.found, explore(b.job(), b.task, b.data))
    model = b.task.network(b.arrays)
    rng = np.random.default_rng(5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        order = torch.from_numpy(rng.permutation(32))
        for start in range(0, 32, 8):
            index = order[start : start + 8]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(b.data.train.inputs[index]), b.data.train.labels[index]).backward()
            optimizer.step()
    for name, parameter in model.named_parameters():
        if name not in NORMS:
            np.testing.assert_array_equal(got[name], (parameter.detach().numpy() - b.arrays[name]) ** 2)


def test_i1_deviations_depend_on_the_explorer_alone() -> None:
    first, second = bench(seed=1, explore_epochs=2), bench(seed=2, explore_epochs=2)
    before = {name: array.copy() for name, array in first.arrays.items()}
    alone = explore(second.job(), second.task, second.data).difference
    explore(first.job(), first.task, first.data)
    assert np.array_equal(explore(second.job(), second.task, second.data).difference, alone)
    assert same_bits(first.arrays, before)


def test_exploration_stops_early() -> None:
    b = bench(explore_epochs=50, explore_patience=2, explore_optimizer="sgd", explore_learning_rate=30.0)
    assert 2 < explore(b.job(), b.task, b.data).metrics["epochs"] < 50


def test_i11_deviations_of_a_quadratic_client() -> None:
    eta, steps = 0.2, 7
    config = AutoFLIPConfig(explore_optimizer="sgd", explore_learning_rate=eta, explore_epochs=steps)
    training = exploration(replace(HARD, clip_norm=0.1, batch_size=4), config)
    target = torch.tensor([[0.3, -1.0, 2.0]])
    model = nn.Linear(3, 1, bias=False)
    start = {"weight": model.weight.detach().numpy().copy()}

    def loss(network: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        network(inputs)
        return 0.5 * ((network.weight - target) ** 2).sum()  # type: ignore[operator]

    samples = Samples(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    fit(model, samples, training, training.learning_rate, np.random.default_rng(0), loss)
    got = squared_deviations(start, {"weight": model.weight.detach().numpy()})["weight"]
    expected = (1 - (1 - eta) ** steps) ** 2 * (target.numpy() - start["weight"]) ** 2
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e-3])
def test_deviations_that_are_no_squares_are_refused(bad: float) -> None:
    b = bench(explore_epochs=1)
    update = explore(b.job(), b.task, b.data)
    update.difference[3] = bad
    with pytest.raises(ValueError, match="should be squares, finite and >= 0"):
        read_deviations(LAYOUT, b.found, update)


def test_deviations_of_other_tensors_are_refused() -> None:
    b = bench(explore_epochs=1)
    update = explore(b.job(), b.task, b.data)
    with pytest.raises(ValueError, match="deviations of other tensors"):
        read_deviations(LAYOUT, full(LAYOUT), update)


# --- masked training --------------------------------------------------------------------------------------------


class Point(nn.Module):
    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))


def test_masked_sgd_of_the_worked_example() -> None:
    mask = np.array([True, False, True])
    model = Point([1.0, -2.0, 0.5])  # a client receives 0 there; what decay and momentum make of -2 must not leak
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    step = masked_step(model, {"w": mask})
    for expected in ([0.899, 0, 0.5495], [0.717301, 0, 0.6385505]):
        optimizer.zero_grad()
        (0.5 * ((model.w - torch.tensor([0.0, 1.0, 1.0])) ** 2).sum()).backward()
        step(optimizer)
        np.testing.assert_allclose(model.w.detach().numpy(), expected, atol=1e-6)
        assert model.w[1] == 0


@pytest.mark.parametrize("training", [HARD, ADAM, replace(HARD, clip_norm=0.1)], ids=["sgd", "adam", "clipped"])
def test_i6_masked_entries_are_exactly_zero_after_every_step(training: Training) -> None:
    b, part = bench(training), random_part()
    model = b.task.network(extract(LAYOUT, part, b.arrays))
    inner, steps = masked_step(model, part.masks), 0

    def step(optimizer: torch.optim.Optimizer) -> None:
        nonlocal steps
        inner(optimizer)
        steps += 1
        for name, mask in part.masks.items():
            assert not model.get_parameter(name).detach().numpy()[~mask].any(), name
            state = optimizer.state.get(model.get_parameter(name), {})
            for memory in state.values():
                if isinstance(memory, Tensor) and memory.shape == mask.shape:
                    assert not memory.numpy()[~mask].any(), name

    fit(model, b.data.train, training, training.learning_rate, np.random.default_rng(0), step=step)
    assert steps == 12


def test_a_reply_holds_the_kept_entries_only_and_they_have_moved() -> None:
    b, part = bench(), random_part()
    update = local_update(b.job(part), b.task, b.data)
    sizes = {n: int(part.masks[n].sum()) if n in part.masks else int(np.prod(s)) for n, s in LAYOUT.shapes.items()}
    assert update.submodel == part
    assert update.difference.shape == (sum(sizes.values()),)
    assert update.weight == 32
    assert update.trained is not None
    for name, difference in unflatten(LAYOUT, part, update.difference).items():
        after = update.trained.arrays[name]
        np.testing.assert_allclose(difference, after - b.job(part).arrays[name], atol=1e-7)
        assert difference.any()
        if name in part.masks:
            assert not after[~part.masks[name]].any()
    assert update.metrics["macs"] == 3 * b.task.macs(full(LAYOUT)) * 3 * 32  # masked entries are multiplied, too


def test_i7_without_a_mask_the_client_is_fedavgs() -> None:
    b = bench()
    ours, theirs = local_update(b.job(), b.task, b.data), fedavg.local_update(b.job(), b.task, b.data)
    assert ours.difference.tobytes() == theirs.difference.tobytes()
    assert ours.metrics == theirs.metrics


def test_a_device_refuses_what_does_not_fit_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    b = bench()
    monkeypatch.setattr("flexfed.jobs.free_memory", lambda: 1000)
    for work in (local_update, explore):
        with pytest.raises(RuntimeError, match="out of memory"):
            work(b.job(device=Device(0, measure_memory=True)), b.task, b.data)


# --- FedLEx -----------------------------------------------------------------------------------------------------


def test_gradients_are_scaled_before_they_are_clipped() -> None:
    model = Point([0.0, 0.0])
    scale_gradients(model, {"w": np.array([0.5, 0.0], dtype=np.float32), "other": np.ones(1, dtype=np.float32)})
    (model.w * torch.tensor([3.0, 400.0])).sum().backward()
    np.testing.assert_allclose(model.w.grad, [1.5, 0])
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    np.testing.assert_allclose(model.w.grad, [1, 0], atol=1e-5)


def test_a_fedlex_job_moves_nothing_that_the_guidance_calls_useless() -> None:
    b = bench(replace(HARD, momentum=0.0, weight_decay=0.0), fedlex=True)
    guidance = {n: np.zeros(s) for n, s in LAYOUT.shapes.items()}
    guidance["fc.weight"][2] = 1.0
    told = guidance_bytes(LAYOUT, prunable_tensors(b.task), guidance)
    assert len(told) == 4 * sum(int(np.prod(LAYOUT.shapes[n])) for n in prunable_tensors(b.task))
    update = local_update(b.job(config={"guidance": told}), b.task, b.data)
    moved = unflatten(LAYOUT, full(LAYOUT), update.difference)
    assert {n for n, array in moved.items() if array.any()} == {"fc.weight", *NORMS}
    assert np.flatnonzero(moved["fc.weight"].any(axis=1)).tolist() == [2]
    again = guidance_from(b.task, told)
    assert all(np.array_equal(again[n], guidance[n].astype(np.float32)) for n in again)


@pytest.mark.parametrize("told", [b"123", "text", b"\0" * 8])
def test_a_guidance_that_does_not_fit_is_refused(told: Any) -> None:
    b = bench()
    with pytest.raises(ValueError, match=r"guidance of a job|a flat part of"):
        local_update(b.job(config={"guidance": told}), b.task, b.data)
