"""What a message asks of a client, and what it takes to answer: the run's configuration, the network, data, device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ConfigRecord, Context, Message

from flexfed import compute
from flexfed.client_state import known_masks, load_state, save_state, state_folder
from flexfed.config import Experiment
from flexfed.data import ClientData, client_labels, load_client, normalise
from flexfed.devices import Device, declared, load_fleet
from flexfed.flower.messages import check_code, read_job, record_of
from flexfed.jobs import Job, Task
from flexfed.units import Arrays


class Request:
    """A message to this client, and its context. What is read of them is read when it is needed, and once.

    Args:
        message: from the server; its content may be anything, and is believed as far as each property says.
        context: of this client: who it is, and the run's configuration.

    Attributes:
        config: what the message says beside arrays.
        key: the run configuration as something to cache by: a process serves many clients and rounds of a run.

    Raises:
        RuntimeError: the server has other code.
    """

    def __init__(self, message: Message, context: Context):
        self.message, self.context = message, context
        self.config: Mapping[str, Any] = record_of(message.content, "config", ConfigRecord)
        check_code(self.config)
        self.key: _Key = tuple(sorted(context.run_config.items()))

    @cached_property
    def experiment(self) -> Experiment:
        """The run's configuration, checked."""
        return _experiment(self.key)

    @cached_property
    def place(self) -> tuple[int, int]:
        """(partition id, number of partitions) of this client.

        Raises:
            ValueError: its node-config does not tell.
        """
        node = self.context.node_config
        try:
            return int(node["partition-id"]), int(node["num-partitions"])
        except KeyError as missing:
            raise ValueError(
                f"the node-config lacks {missing}; start the SuperNode with "
                "--node-config 'partition-id=0 num-partitions=3'"
            ) from missing

    @cached_property
    def device(self) -> Device:
        """This client's, as it is nominally; its node-config may say more of it than the fleet."""
        told = tuple(sorted(self.context.node_config.items()))
        return _device(self.key, *self.place, self._data_path, cast(_Key, told))

    @cached_property
    def torch_device(self) -> str:
        """Where networks compute on this client: as its node-config says, else as the run does."""
        return str(self.context.node_config.get("torch-device", self.experiment.settings.torch_device))

    @cached_property
    def data(self) -> ClientData:
        """This client's data, normalised as the server's are; makes the process ready to compute with them."""
        torch.set_num_threads(self.experiment.settings.torch_threads)
        compute.use(self.torch_device)
        mean, std = tuple(self.config["input-mean"]), tuple(self.config["input-std"])
        return client_data(self.key, *self.place, self._data_path, mean, std)

    @cached_property
    def task(self) -> Task:
        """The network as the server has it, and how it is trained."""
        task = _task(self.key, int(self.config["num-classes"]), tuple(self.config["input-shape"]))
        return replace(task, torch_device=self.torch_device)

    def job(self, state: Arrays) -> Job:
        """The job, for this device as it is in this round.

        Args:
            state: where it keeps the masks that it was sent last.
        """
        job = read_job(self.message.content, self.task.layout, self.device, known_masks(self.task.layout, state))
        return replace(job, device=job.device.in_round(job.server_round, self.experiment.settings.seed))

    @cached_property
    def state(self) -> Arrays:
        """The private state that the server counts on."""
        return load_state(self._state_folder, self._base)

    def save(self, server_round: int, state: Arrays) -> None:
        """Write a new private state."""
        save_state(self._state_folder, server_round, state, self._base)

    @cached_property
    def _base(self) -> int:
        """The round of the private state that the server counts on; 0 = none."""
        return int(self.config["private-round"])

    @property
    def _state_folder(self) -> Path:
        settings, (partition, _) = self.experiment.settings, self.place
        node_dir, run = str(self.context.node_config.get("state-dir", "")), str(self.config["run"])
        return state_folder(node_dir, settings.state_dir, settings.resume, settings.runs_dir, run, partition)

    @property
    def _data_path(self) -> str:
        return str(self.context.node_config.get("data-path", ""))


_Key = tuple[tuple[str, Any], ...]


@lru_cache(maxsize=4)
def _experiment(key: _Key) -> Experiment:
    return Experiment.read(dict(key))


@lru_cache(maxsize=4)
def _task(key: _Key, num_classes: int, input_shape: tuple[int, ...]) -> Task:
    return _experiment(key).task(num_classes, input_shape)


@lru_cache(maxsize=32)
def client_data(
    key: _Key, partition: int, partitions: int, path: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> ClientData:
    """A client's data, normalised; those of the last clients are remembered."""
    raw = load_client(replace(_experiment(key).data, data_path=path), partition, partitions)
    validation = normalise(raw.validation, mean, std)
    test = validation if raw.test is raw.validation else normalise(raw.test, mean, std)
    return replace(raw, train=normalise(raw.train, mean, std), validation=validation, test=test)


@lru_cache(maxsize=1024)
def _device(key: _Key, partition: int, partitions: int, path: str, told: _Key) -> Device:
    experiment = _experiment(key)
    device = load_fleet(experiment.settings.fleet).device(partition, partitions, experiment.settings.seed)
    num_train, labels = client_labels(replace(experiment.data, data_path=path), partition, partitions)
    device = replace(device, num_examples=num_train, labels=labels)
    return declared(device, dict(told))
