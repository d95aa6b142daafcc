"""The data room: a hub name, a local folder or the built-in digits -> samples of the server and the clients.

Values are raw (images in [0, 1], channels first; arrays as they are): the server measures mean and deviation
on its proxy samples, and everybody normalises with those. Data sets stay open for the life of the process and
each row is decoded once, so a worker that serves many clients pays once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from flexfed.data.config import PARTITIONS, DataConfig
from flexfed.data.partitions import partition_rows
from flexfed.data.sources import Source, Split, own_folder, server_rows, source
from flexfed.training import Samples

__all__ = [
    "PARTITIONS",
    "ClientData",
    "DataConfig",
    "DatasetInfo",
    "ServerData",
    "check_partition",
    "client_labels",
    "dataset_info",
    "load_client",
    "load_server",
    "normalisation",
    "normalise",
]


@dataclass(frozen=True)
class DatasetInfo:
    """What a network and a report need to know of a data set.

    Attributes:
        num_classes: labels are below it.
        input_shape: of one sample, without the batch.
        num_train: samples that are divided among the clients (a client's own folder: all its samples).
        label_names: one name per class.
    """

    num_classes: int
    input_shape: tuple[int, ...]
    num_train: int
    label_names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ServerData:
    """The server's samples, raw: `proxy` for statistics and pre-training, `test` for evaluation."""

    proxy: Samples
    test: Samples
    info: DatasetInfo


@dataclass(frozen=True, eq=False)
class ClientData:
    """A client's samples, raw.

    Attributes:
        train: what it trains on.
        validation: its own samples that it does not train on.
        test: what it is evaluated on; the very object `validation` unless `test_per_label` is set.
        labels: those present in train or validation, in order.
        info: of its data set.
    """

    train: Samples
    validation: Samples
    test: Samples
    labels: tuple[int, ...]
    info: DatasetInfo

    def to(self, device: torch.device) -> ClientData:
        """The same on a torch device; tensors that are there stay."""
        validation = self.validation.to(device)
        test = validation if self.test is self.validation else self.test.to(device)
        return replace(self, train=self.train.to(device), validation=validation, test=test)


def dataset_info(config: DataConfig) -> DatasetInfo:
    """Classes, input shape and number of training samples; of the own folder if `config.data_path` is set.

    Labels that are plain integers count up to the largest one found, so a client's own folder may show fewer
    classes than the server's data set: the server's number holds.

    Raises:
        ValueError: the data cannot be found or read, or their columns are not clear.
    """
    data = _source(config)
    shape = data.train.inputs(np.array([0])).shape[1:]
    return DatasetInfo(data.num_classes, tuple(shape), len(_client_rows(config)), data.label_names)


def load_server(config: DataConfig) -> ServerData:
    """The server's proxy and test samples, the same for every seed, disjoint, and held by no client.

    The test samples are the test split (else the validation split, else 20 % of the training split), or
    `config.test_samples` of it; the proxy samples come from the training split. `config.data_path` is a client's and
    plays no part.

    Raises:
        ValueError: the data cannot be found or read, or their columns are not clear.
    """
    data = source(config.dataset, config.subset, config.image_column, config.label_column)
    proxy, _, clients = server_rows(data, config.proxy_fraction)
    split, rows = _test_rows(data, config.proxy_fraction)
    test_samples = _samples(split, _spread_evenly(rows, config.test_samples))
    shape = tuple(test_samples.inputs.shape[1:])
    info = DatasetInfo(data.num_classes, shape, len(clients), data.label_names)
    return ServerData(_samples(data.train, proxy), test_samples, info)


def load_client(config: DataConfig, partition: int, num_partitions: int) -> ClientData:
    """One client's samples: its partition of the data set, or all of its own folder's training split.

    The validation samples are drawn by (seed, partition) and rounded down, so at least one sample is left to
    train on and a client of few samples may have none to validate with. With `config.test_per_label` its test
    samples are drawn by (seed, partition) as well, without those labels of the client that nobody can be
    tested on; without it, or where an own folder has no test split, they are the validation samples.

    Raises:
        ValueError: no such partition, or the data or the partition cannot be made.
    """
    train, validation = _split_rows(config, partition, num_partitions)
    split = _source(config).train
    labels = _labels(split, train, validation)
    kept = _samples(split, validation)
    drawn = _drawn_test(config, partition, labels)
    test = kept if drawn is None else drawn
    return ClientData(_samples(split, train), kept, test, labels, dataset_info(config))


def client_labels(config: DataConfig, partition: int, num_partitions: int) -> tuple[int, tuple[int, ...]]:
    """Number of training samples of one client and its `ClientData.labels`, without decoding its inputs.

    Raises:
        ValueError: as `load_client`, except for inputs that cannot be decoded.
    """
    train, validation = _split_rows(config, partition, num_partitions)
    return len(train), _labels(_source(config).train, train, validation)


def check_partition(config: DataConfig, num_partitions: int) -> None:
    """Make the partition, without decoding its inputs; a client's own folder is not partitioned.

    Raises:
        ValueError: the data cannot be found or read, or cannot be divided so among the clients.
    """
    if not config.data_path:
        _partitions(config, num_partitions)


def normalisation(samples: Samples) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel (axis 1 of the inputs) over all samples and positions.

    A channel that does not vary (deviation below 1e-6) gets deviation 1, so that it is only centred.

    Raises:
        ValueError: there are no samples.
    """
    if not len(samples.labels):
        raise ValueError("cannot measure mean and deviation on no samples; set proxy-fraction > 0")
    channels = samples.inputs.double().transpose(0, 1).flatten(1)
    std = channels.std(dim=1, correction=0)
    return tuple(channels.mean(dim=1).tolist()), tuple(torch.where(std < 1e-6, 1.0, std).tolist())


def normalise(samples: Samples, mean: tuple[float, ...], std: tuple[float, ...]) -> Samples:
    """Samples with (input - mean) / std per channel.

    Raises:
        ValueError: not one mean and one deviation per channel.
    """
    num_channels = samples.inputs.shape[1]
    if not len(mean) == len(std) == num_channels:
        raise ValueError(
            f"inputs of shape {tuple(samples.inputs.shape[1:])} need {num_channels} means and deviations, "
            f"got {len(mean)} and {len(std)}"
        )
    return Samples((samples.inputs - _spread(mean, samples.inputs)) / _spread(std, samples.inputs), samples.labels)


def _spread(values: tuple[float, ...], inputs: Tensor) -> Tensor:
    return torch.tensor(values, dtype=inputs.dtype).view(-1, *[1] * (inputs.ndim - 2))


def _source(config: DataConfig) -> Source:
    """The client's own folder, which has no subsets, or the data set."""
    if config.data_path:
        return source(own_folder(config.data_path), "", config.image_column, config.label_column)
    return source(config.dataset, config.subset, config.image_column, config.label_column)


@lru_cache(maxsize=16)
def _client_rows(config: DataConfig) -> np.ndarray:
    """Training rows that belong to clients."""
    data = _source(config)
    return np.arange(len(data.train.labels)) if config.data_path else server_rows(data, config.proxy_fraction)[2]


def _split_rows(config: DataConfig, partition: int, num_partitions: int) -> tuple[np.ndarray, np.ndarray]:
    """One client's rows to train on and to validate with."""
    if not 0 <= partition < num_partitions:
        raise ValueError(f"partition-id must be in 0..{num_partitions - 1} (num-partitions), got {partition}")
    rows = _client_rows(config) if config.data_path else _partitions(config, num_partitions)[partition]
    rows = np.random.default_rng([config.seed, partition]).permutation(rows)
    validation, train = np.split(rows, [int(config.validation_fraction * len(rows))])
    return train, validation


def _drawn_test(config: DataConfig, partition: int, labels: tuple[int, ...]) -> Samples | None:
    """The client's `test_per_label` samples of each of its labels; None if it tests on its validation samples."""
    data = _source(config)
    if not config.test_per_label or (config.data_path and data.test is None):
        return None
    split, rows = _test_rows(data, config.proxy_fraction)
    rng = np.random.default_rng([config.seed, partition, 1])  # 1: not the numbers that drew the validation samples
    of_label = (rows[split.labels[rows] == label] for label in labels)
    return _samples(split, np.concatenate([rng.permutation(found)[: config.test_per_label] for found in of_label]))


def _test_rows(data: Source, proxy_fraction: float) -> tuple[Split, np.ndarray]:
    """The server's test rows, and the split that they are rows of."""
    if data.test is None:
        return data.train, server_rows(data, proxy_fraction)[1]
    return data.test, np.arange(len(data.test.labels))


def _spread_evenly(rows: np.ndarray, num: int) -> np.ndarray:
    """So many of the rows, or all where `num` is 0 or there are fewer."""
    return rows[np.arange(num) * len(rows) // num] if 0 < num < len(rows) else rows


def _partitions(config: DataConfig, num_partitions: int) -> tuple[np.ndarray, ...]:
    """Training rows of each client."""
    made = _partitions_or_error(config, num_partitions)
    if isinstance(made, str):
        raise ValueError(made)
    return made


@lru_cache(maxsize=16)
def _partitions_or_error(config: DataConfig, num_partitions: int) -> tuple[np.ndarray, ...] | str:
    """The partition, or why there is none: a cache keeps no exceptions, and every client would draw again."""
    rows, split = _client_rows(config), _source(config).train  # outside the try: the hub may answer next time
    ids = None
    try:
        if config.partition == "natural":
            column = split.ids(config.id_column)
            ids = [column[row] for row in rows]
        parts = partition_rows(config, split.labels[rows], ids, num_partitions)
    except ValueError as error:
        return str(error)
    return tuple(rows[part] for part in parts)


def _labels(split: Split, *rows: np.ndarray) -> tuple[int, ...]:
    return tuple(np.unique(split.labels[np.concatenate(rows)]).tolist())


def _samples(split: Split, rows: np.ndarray) -> Samples:
    return Samples(torch.from_numpy(split.inputs(rows)), torch.from_numpy(split.labels[rows]))
