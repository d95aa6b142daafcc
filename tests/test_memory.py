"""Predicted training memory against what torch's profiler and the system see."""

from __future__ import annotations

import os
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn
from toy import random_units

from benchmarks.measuring import in_child
from benchmarks.memory import Case, can_measure_growth, profiled_peak, resident_growths
from benchmarks.speed import ONE_THREAD
from flexfed.cost import memory_budget, training_memory
from flexfed.jobs import Task
from flexfed.networks import Factory
from flexfed.select import prefix_ratio
from flexfed.submodel import Submodel, full
from flexfed.training import Training
from flexfed.units import trace_layout

NETWORKS = ("resnet18", "mobilenet_v2")
RATIOS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


def predicted(task: Task, part: Submodel, training: Training | None = None) -> int:
    return training_memory(task.factory, task.layout, part, task.input_shape, training or task.training)


def memory(factory: Factory, input_shape: tuple[int, ...], training: Training) -> int:
    layout = trace_layout(factory, input_shape)
    return training_memory(factory, layout, full(layout), input_shape, training)


# --- by hand ------------------------------------------------------------------------------------------------------


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def test_many_samples_by_hand() -> None:
    """Worst is the backward pass of the ReLU: its result, and the gradients of its result and of its input."""
    n = 1000
    batch = n * 4 * 4 + n * 8
    hidden = n * 6 * 4
    weights, gradients = 4 * (4 * 6 + 6 + 6 * 3 + 3), 4 * (6 * 3 + 3)
    loss = 4 + 4  # and its own gradient, 1
    found = memory(two_layers, (4,), Training(momentum=0.0, weight_decay=0.0, batch_size=n))
    assert found == weights + batch + 3 * hidden + gradients + loss


def one_layer() -> nn.Module:
    return nn.Linear(1000, 50, bias=False)


LOSS, LOGITS, STEP = 4, 2 * 50 * 4, 4


@pytest.mark.parametrize(
    ("training", "copies", "besides"),
    [
        # In the backward pass: weights, their gradients; the logits' gradient and the loss's.
        (Training(momentum=0.0, weight_decay=0.0, batch_size=2), 2, LOGITS + 4),
        (Training(momentum=0.5, weight_decay=0.0, batch_size=2), 3, LOGITS + 4),
        # In the optimiser's step: the gradient plus decay; two moments, the root of one, and that root corrected.
        (Training(momentum=0.5, weight_decay=1e-4, batch_size=2), 4, 0),
        (Training(optimizer="adam", weight_decay=0.0, batch_size=2), 6, STEP),
    ],
)
def test_few_samples_by_hand(training: Training, copies: int, besides: int) -> None:
    batch = 2 * 1000 * 4 + 2 * 8
    assert memory(one_layer, (1000,), training) == copies * 1000 * 50 * 4 + batch + LOSS + besides


def test_a_frozen_parameter_has_neither_gradient_nor_state() -> None:
    def network(frozen: bool) -> nn.Module:
        model = nn.Sequential(nn.Linear(500, 400), nn.ReLU(), nn.Linear(400, 10))
        model[0].weight.requires_grad_(not frozen)
        return model

    training = Training(momentum=0.5, weight_decay=1e-4, batch_size=2)
    whole, part = (memory(lambda frozen=frozen: network(frozen), (500,), training) for frozen in (False, True))
    decayed = 4 * (500 * 400 - 400 * 10)  # the largest gradient plus decay is now the second layer's
    assert whole - part == pytest.approx(2 * 500 * 400 * 4 + decayed, rel=0.02)


def test_counting_allocates_nothing_and_draws_no_random_numbers() -> None:
    def huge() -> nn.Module:  # 14 GB
        return nn.Sequential(nn.Linear(4, 60_000), nn.Dropout(), nn.Linear(60_000, 60_000), nn.Linear(60_000, 2))

    layout = trace_layout(huge, (4,))
    before = torch.get_rng_state()
    assert training_memory(huge, layout, full(layout), (4,), Training(momentum=0.0)) > 2 * 4 * 60_000**2
    assert torch.equal(torch.get_rng_state(), before)


# --- laws ---------------------------------------------------------------------------------------------------------


def test_memory_rises_with_the_ratio_and_with_the_batch() -> None:
    task = Case("cnn", 8, 1.0, channels=1).task()
    of_ratio = [predicted(task, prefix_ratio(task.layout, step / 16)) for step in range(1, 17)]
    of_batch = [predicted(task, full(task.layout), Training(batch_size=size)) for size in range(2, 12)]
    for found in (of_ratio, of_batch):
        assert found == sorted(found)
        assert found[0] < found[-1]


def test_a_budget_is_more_than_the_memory_it_is_for() -> None:
    assert memory_budget(10**9) > 10**9
    assert memory_budget(2 * 10**9) > memory_budget(10**9)


# --- reality ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", NETWORKS)
def test_prediction_is_within_15_percent_of_the_profilers_peak(model: str) -> None:
    task = Case(model, 64, 1.0).task()
    mixed = Submodel(random_units(task.layout, np.random.default_rng(0)))
    for part in (*(prefix_ratio(task.layout, ratio) for ratio in RATIOS[1:]), mixed):
        assert predicted(task, part) == pytest.approx(profiled_peak(task, part), rel=0.15)


@pytest.mark.parametrize(
    ("model", "training"),
    [
        ("heterofl-conv", Training(local_epochs=1, optimizer="adam")),
        ("flexfl-vgg16-slim", Training(local_epochs=1)),  # dropout
        ("fedlps-cnn", Training(local_epochs=1, batch_size=64)),
        ("squeezenet1_1", Training(local_epochs=1, momentum=0.0, batch_size=8)),  # concatenations, max-pools
    ],
)
def test_prediction_holds_for_other_networks_and_optimisers(model: str, training: Training) -> None:
    task = Case(model, 32, 1.0, training=training).task()
    part = full(task.layout)  # oneDNN pads layers of very few channels to 8 or 16 of them, which is not counted
    assert predicted(task, part) == pytest.approx(profiled_peak(task, part), rel=0.15)


@pytest.mark.skipif(not can_measure_growth(), reason="only Linux tells the highest resident memory of a process")
@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.slow
def test_budget_covers_the_growth_of_the_process(model: str) -> None:
    """In a fresh process, smallest part first: it also pays for the kernels that are loaded."""
    cases = [Case(model, 64, ratio) for ratio in RATIOS]
    with patch.dict(os.environ, ONE_THREAD):
        growths = in_child(resident_growths, cases)
    task = cases[0].task()
    for case, growth in zip(cases, growths, strict=True):
        memory_needed = predicted(task, case.submodel(task))
        assert memory_needed / 2 < growth <= memory_budget(memory_needed)
