from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from toy import DIGITS, Decoder, Ties, random_arrays, random_units, toy_task

from flexfed.cost import (
    forward_macs,
    message_bytes,
    modelled_joules,
    modelled_seconds,
    num_parameters,
    part_bytes,
    round_macs,
    shares,
    training_macs,
)
from flexfed.devices import Device
from flexfed.models import model_factory
from flexfed.narrowing import narrow
from flexfed.select import prefix_ratio
from flexfed.submodel import Submodel, extract, flatten, full
from flexfed.training import Samples, Training, fit, use_batch_statistics
from flexfed.units import trace_layout


def test_parameters_of_the_main_jobs_network() -> None:
    layout = toy_task().layout
    assert num_parameters(layout, full(layout)) == 57_706


@pytest.mark.parametrize(("ratio", "size"), [(1, 1_556_874), (1 / 2, 391_370), (1 / 4, 98_922), (1 / 16, 6_594)])
def test_parameters_of_the_released_networks(ratio: float, size: int) -> None:
    layout = trace_layout(model_factory("heterofl-conv", 10, (1, 28, 28)), (1, 28, 28))
    assert num_parameters(layout, prefix_ratio(layout, ratio)) == size


def test_parameters_are_those_of_the_narrow_network() -> None:
    rng = np.random.default_rng(0)
    for factory, shape in ((Ties, (1, 4, 4)), (Decoder, (2, 3, 3))):
        layout = trace_layout(factory, shape)
        arrays = {name: np.zeros(size, dtype=np.float32) for name, size in layout.shapes.items()}
        for _ in range(5):
            part = Submodel(random_units(layout, rng))
            model = narrow(factory, extract(layout, part, arrays))
            assert num_parameters(layout, part) == sum(p.numel() for p in model.parameters())


def test_macs_of_layers_by_hand() -> None:
    def network() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1, groups=6),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(6 * 4, 5),
        )

    layout = trace_layout(network, (2, 4, 4))
    macs = 6 * 2 * 9 * 16 + 6 * 9 * 16 + 24 * 5
    assert forward_macs(network, layout, full(layout), (2, 4, 4)) == macs
    half = 3 * 2 * 9 * 16 + 3 * 9 * 16 + 12 * 5
    assert forward_macs(network, layout, prefix_ratio(layout, 0.5), (2, 4, 4)) == half


def test_macs_of_the_main_jobs_network() -> None:
    macs = 16 * 9 * 64 + 32 * 16 * 9 * 64 + 64 * 32 * 9 * 16 + 256 * 128 + 128 * 10
    task = toy_task()
    assert task.macs(full(task.layout)) == macs


def test_macs_of_a_1d_network() -> None:
    task_shape = (3, 200)
    factory = model_factory("cnn1d", 6, task_shape)
    layout = trace_layout(factory, task_shape)
    macs = 16 * 3 * 5 * 200 + 32 * 16 * 5 * 200 + 64 * 32 * 5 * 50 + 256 * 128 + 128 * 6
    assert forward_macs(factory, layout, full(layout), task_shape) == macs


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_macs_are_half_the_flops_torch_counts_in_the_real_network(name: str) -> None:
    shape, batch = (3, 32, 32), 3
    factory = model_factory(name, 10, shape)
    layout = trace_layout(factory, shape)
    rng = np.random.default_rng(0)
    arrays = random_arrays(layout, rng)
    mixed = (Submodel(random_units(layout, rng)) for _ in range(2))
    for part in (*(prefix_ratio(layout, ratio) for ratio in (1, 1 / 4, 1 / 16)), *mixed):
        model = use_batch_statistics(narrow(factory, extract(layout, part, arrays)))
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(batch, *shape))
        assert 2 * batch * forward_macs(factory, layout, part, shape) == counter.get_total_flops()


def test_cost_rises_with_the_ratio() -> None:
    task = toy_task()
    parts = [prefix_ratio(task.layout, ratio) for ratio in np.linspace(0.05, 1, 12)]
    for cost in ([num_parameters(task.layout, part) for part in parts], [task.macs(part) for part in parts]):
        assert all(a < b for a, b in pairwise(cost))


def test_counting_macs_allocates_nothing() -> None:
    def huge() -> nn.Module:  # 14 GB
        return nn.Sequential(nn.Linear(4, 60_000), nn.Linear(60_000, 60_000), nn.Linear(60_000, 2))

    layout = trace_layout(huge, (4,))
    assert forward_macs(huge, layout, full(layout), (4,)) == 6 * 60_000 + 60_000**2


def test_training_is_three_forward_passes() -> None:
    assert training_macs(1000, 7) == 3 * 1000 * 7


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_a_round_is_what_fit_trains_on(batch_size: int, drop_last: bool) -> None:
    training = Training(learning_rate=0.01, batch_size=batch_size, drop_last=drop_last, local_epochs=2)
    for num in range(2, 20):
        samples = Samples(torch.zeros(num, 3), torch.zeros(num, dtype=torch.int64))
        seen = fit(nn.Linear(3, 2), samples, training, 0.01, np.random.default_rng(0)).num_samples
        assert round_macs(7, num, training) == training_macs(7, seen)


def test_a_message_is_four_bytes_a_parameter() -> None:
    layout = toy_task().layout
    arrays = random_arrays(layout, np.random.default_rng(0))
    for part in (full(layout), prefix_ratio(layout, 0.3)):
        assert part_bytes(layout, part) == flatten(layout, part, extract(layout, part, arrays)).nbytes
        assert message_bytes(layout, part) == math.ceil(1.02 * part_bytes(layout, part)) + 256 * len(layout.shapes)


def test_seconds_and_joules_of_a_device() -> None:
    device = Device(0, speed_macs_s=2e9, link_bytes_s=1e6, compute_watts=5.0, radio_watts=0.5)
    assert modelled_seconds(device, 4_000_000_000, 1_000_000, 2_000_000) == pytest.approx(2 + 3)
    assert modelled_joules(device, 4_000_000_000, 1_000_000, 2_000_000) == pytest.approx(2 * 5 + 3 * 0.5)
    assert modelled_seconds(device, 0, 0, 0) == modelled_joules(device, 0, 0, 0) == 0


def test_a_link_may_be_faster_towards_the_device() -> None:
    device = Device(0, speed_macs_s=2e9, link_bytes_s=1e6, download_bytes_s=4e6, compute_watts=5.0, radio_watts=0.5)
    assert modelled_seconds(device, 4_000_000_000, 2_000_000, 3_000_000) == pytest.approx(2 + 0.5 + 3)
    assert modelled_joules(device, 4_000_000_000, 2_000_000, 3_000_000) == pytest.approx(2 * 5 + 3.5 * 0.5)


def test_shares_are_of_the_full_network() -> None:
    layout = toy_task().layout
    found = shares(layout, {"half": prefix_ratio(layout, 0.5), "full": full(layout)})
    assert found == {"half": pytest.approx(14_906 / 57_706), "full": 1.0}


def test_inputs_of_the_task_are_digits() -> None:
    assert toy_task().input_shape == DIGITS
