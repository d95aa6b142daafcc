"""What travels between server and client, and what both know from the configuration alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from flexfed.batchnorm import Statistics, apply_statistics
from flexfed.codecs import PLAIN
from flexfed.compute import free_gpu_memory, place_of, seed_draws, state_numbers, torch_device
from flexfed.cost import forward_macs, memory_budget, testing_memory, training_macs, training_memory
from flexfed.devices import Device
from flexfed.exits import Exits
from flexfed.measure import free_memory
from flexfed.models import load_weights
from flexfed.narrowing import narrow
from flexfed.networks import Factory, travelling
from flexfed.submodel import Submodel, flatten, relative_positions, split_flat, take, travelling_numbers, unflatten
from flexfed.training import (
    Evaluation,
    Loss,
    Samples,
    Step,
    Training,
    cross_entropy,
    evaluate_exits,
    fit,
    plain_step,
    use_batch_statistics,
)
from flexfed.units import Arrays, Layout

if TYPE_CHECKING:
    from flexfed.data import ClientData

Scalar = str | int | float | bool | bytes | list[int] | list[float] | list[str] | list[bytes]


TEST_BATCH = 128
"""Samples in a batch wherever a network is tested, or its batch-norm statistics are collected."""


@dataclass(frozen=True)
class Job:
    """Work for one client: train this part.

    Attributes:
        submodel: what the part holds, in the full network's numbering.
        arrays: the part, narrow.
        device: who is asked.
        config: what this method's client needs besides.
        seed: of this client and round; every draw on the client comes from it.
        server_round: counted from 1.
        state: what this client kept for itself after an earlier round; it never travels.
        codec: how the part came; `arrays` are decoded.
        reply_codec: how the reply is to travel.
    """

    submodel: Submodel
    arrays: Arrays
    device: Device
    config: Mapping[str, Scalar]
    seed: int
    server_round: int
    state: Arrays = field(default_factory=dict)
    codec: str = PLAIN
    reply_codec: str = PLAIN


class Part(NamedTuple):
    """A submodel and its tensors."""

    submodel: Submodel
    arrays: Arrays


@dataclass(frozen=True)
class Update:
    """What a client learned.

    Attributes:
        submodel: what it trained and reports; within the job's.
        difference: float32, flat in wire order: trained part minus received part.
        weight: its weight in the mean where the method weighs by examples.
        metrics: numbers for the record of the round, among them "macs" and "train-loss".
        state: what the client keeps for itself until its next job; it never travels. Empty = nothing new.
        told: what else the method tells the server (FedLPS: the order of its units).
        trained: the part after training, whole: the client's own model. It never travels.
    """

    submodel: Submodel
    difference: np.ndarray
    weight: float
    metrics: Mapping[str, float]
    state: Arrays = field(default_factory=dict)
    told: Mapping[str, bytes] = field(default_factory=dict)
    trained: Part | None = None


@dataclass(frozen=True)
class Assignment:
    """Who trains what.

    Attributes:
        submodel: the part.
        level: its name in the record.
        config: what else this client's job needs.
        codec: how the part travels, a key of `flexfed.codecs.CODECS`; '' = as the run says.
        reply_codec: how the reply does; likewise.
    """

    submodel: Submodel
    level: str
    config: Mapping[str, Scalar] = field(default_factory=dict)
    codec: str = ""
    reply_codec: str = ""


@dataclass(frozen=True)
class Task:
    """The network and how it is trained: the same on the server and on every client.

    Attributes:
        factory: of the whole network, its exits included.
        exits: those that the method attached to it.
        torch_device: name of the one on which networks compute here (`flexfed.compute.torch_device`).
    """

    factory: Factory
    layout: Layout
    input_shape: tuple[int, ...]
    num_classes: int
    training: Training
    method: Any
    exits: Exits | None = None
    torch_device: str = "cpu"

    @property
    def place(self) -> torch.device:
        """Where networks compute here.

        Raises:
            ValueError: there is no such device.
        """
        return torch_device(self.torch_device)

    def macs(self, submodel: Submodel) -> int:
        """Multiply-accumulates of one sample's forward pass through a part."""
        return forward_macs(self.factory, self.layout, submodel, self.input_shape)

    def memory_to_train(self, submodel: Submodel) -> int:
        """Bytes that must be free to train a part that has been received."""
        return memory_budget(training_memory(self.factory, self.layout, submodel, self.input_shape, self.training))

    def memory_to_test(self, submodel: Submodel) -> int:
        """Bytes that must be free to test a part that has been received, or to collect its batch-norm statistics."""
        return memory_budget(testing_memory(self.factory, self.layout, submodel, self.input_shape, TEST_BATCH))

    def network(self, arrays: Arrays) -> torch.nn.Module:
        """A narrow network for training, on its device: batch norm uses the statistics of the batch."""
        return use_batch_statistics(narrow(self.factory, arrays)).to(self.place)


class Trained(NamedTuple):
    """A network after local training, and what training showed; see `flexfed.training.FitResult`."""

    arrays: Arrays
    loss: float
    num_samples: int
    accuracy: float


LocalUpdate = Callable[[Job, Task, "ClientData"], Update]
"""A method's work on the client."""


def initial_arrays(task: Task, weights: str, seed: int) -> Arrays:
    """The global model before round 1: freshly drawn from the seed, or read."""
    torch.manual_seed(seed)
    model = task.factory()
    if weights:
        load_weights(model, weights)
    return {name: tensor.detach().numpy() for name, tensor in travelling(model).items()}


def free_memory_of(device: Device, seed: int) -> float:
    """Bytes free at this moment: measured on a real device, drawn from a message's seed for a simulated one."""
    if device.measure_memory:
        return float(_measured_memory())
    return device.memory_now(np.random.default_rng([seed, 2]))


def _measured_memory() -> int:
    """Bytes free here; where a GPU computes, also on it: parts are received here, and copied there."""
    on_gpu = free_gpu_memory()
    return free_memory() if on_gpu is None else min(free_memory(), on_gpu)


def require_memory(device: Device, part: Submodel, needed: Callable[[Submodel], int]) -> None:
    """Refuse, on a real device, what would not fit into the memory that is free: the system would kill the client.

    Args:
        device: which is to do it.
        part: that is to be trained or tested.
        needed: part -> bytes that must be free: `Task.memory_to_train` or `Task.memory_to_test`.

    Raises:
        RuntimeError: says what the part needs, and what there is.
    """
    if not device.measure_memory:
        return
    need, free = needed(part), _measured_memory()
    if need > free:
        raise RuntimeError(f"out of memory: the part needs {need / 1e6:.0f} MB, {free / 1e6:.0f} MB are free")


def train_network(
    model: torch.nn.Module,
    job: Job,
    task: Task,
    samples: Samples,
    loss: Loss = cross_entropy,
    step: Step = plain_step,
    answering: Sequence[torch.nn.Module] = (),
) -> Trained:
    """Train a network with the run's settings and the job's seed, in place; see `flexfed.training.fit`."""
    rng = np.random.default_rng(job.seed)
    seed_draws(job.seed, place_of(model))
    learning_rate = task.training.rate_at(job.server_round)
    result = fit(model, samples, task.training, learning_rate, rng, loss, step, answering=answering)
    return Trained(state_numbers(model), result.loss, result.num_samples, result.accuracy)


def make_update(
    job: Job,
    task: Task,
    received: Submodel,
    arrays: Arrays,
    trained: Trained,
    weight: float,
    macs: int = 0,
    reported: Submodel | None = None,
) -> Update:
    """The difference between what was trained and what was received.

    Args:
        job: as received.
        task: of the run.
        received: what was trained.
        arrays: its tensors before training.
        trained: and after.
        weight: number of examples.
        macs: multiply-accumulates beside training the network itself (distillation teachers).
        reported: the part of `received` that is sent back; all of it by default.
    """
    difference = flatten(task.layout, received, trained.arrays)
    for name, values in split_flat(task.layout, received, difference).items():
        values -= travelling_numbers(received, name, arrays[name])  # in place: no room for a third copy of the part
    metrics = {
        "train-loss": trained.loss,
        "train-accuracy": trained.accuracy,
        "macs": float(training_macs(task.macs(received), trained.num_samples) + macs),
    }
    if reported is not None and reported.key != received.key:
        difference = _part_of(task.layout, received, reported, difference)
    return Update(reported or received, difference, weight, metrics, trained=Part(received, trained.arrays))


def _part_of(layout: Layout, outer: Submodel, inner: Submodel, difference: np.ndarray) -> np.ndarray:
    return flatten(layout, inner, shrink(layout, outer, inner, unflatten(layout, outer, difference)))


def shrink(layout: Layout, outer: Submodel, inner: Submodel, part: Mapping[str, np.ndarray]) -> Arrays:
    """Cut a part further, without the full network: what a device does when its memory is short.

    Args:
        layout: the full network's numbering.
        outer: what `part` holds.
        inner: what is to be left of it; both in the full numbering.
        part: tensor -> narrow array of `outer`.

    Returns:
        Tensor -> narrow array of `inner`; may share memory with `part`.
    """
    return {
        name: take(part[name], relative_positions(layout, outer, inner, name))
        for name in layout.shapes
        if inner.holds(name)
    }


def evaluate_part(
    task: Task, arrays: Arrays, statistics: Statistics | None, samples: Samples, batch_size: int = TEST_BATCH
) -> Evaluation:
    """Test a part with the batch-norm statistics of its level, or with those of each batch (None)."""
    return evaluate_part_exits(task, arrays, statistics, samples, batch_size)[0]


def evaluate_part_exits(
    task: Task, arrays: Arrays, statistics: Statistics | None, samples: Samples, batch_size: int = TEST_BATCH
) -> list[Evaluation]:
    """The same of the part's prediction, and behind it of each of its exits, if it has several."""
    if statistics is None and len(samples.labels) % batch_size == 1:
        return [Evaluation(0, 0.0, 0)]  # a batch of one sample has no variance: nothing to report
    model = task.network(arrays)
    if statistics is not None:
        apply_statistics(model, statistics)
    return evaluate_exits(model, samples, batch_size, task.training.precision)
