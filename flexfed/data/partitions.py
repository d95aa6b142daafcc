"""Dividing labelled rows among clients, by the partitioners of flwr-datasets."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flexfed.data.config import DataConfig

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

# flwr-datasets gives up after 11 draws that leave a client too small; FlexFL's code draws for ever. This many
# times 11 draws take about a second for 100 clients of the digits, after which a hopeless request is refused.
_DIRICHLET_TRIES = 60


def partition_rows(
    config: DataConfig, labels: np.ndarray, ids: Sequence[Any] | None, num_partitions: int
) -> tuple[np.ndarray, ...]:
    """Row numbers of each client, disjoint; the same for equal configurations on every machine.

    Rows are shuffled by `config.seed` first (the partitioners keep the order within a class, and the iid one
    altogether). "iid" cuts as IidPartitioner does, without its import of one to two seconds. "pathological"
    gives client i the class i modulo the number of classes and draws the others, as its paper does
    (https://arxiv.org/abs/2102.02079): with as many clients as classes, or more, no class is left out.
    "shards" sorts by label, cuts shards of equal size and deals `shards_per_client` random ones to each client,
    as FedLPS does (https://arxiv.org/abs/2412.07216, released code) and FedAvg before it. Nothing makes a shard
    end where a label does: one that lies across a border holds the labels on both sides, so its client can have
    more labels than shards.

    Args:
        config: partition, its parameters, seed.
        labels: int64 (n,).
        ids: whose each row is, of length n; needed by the natural partition only.
        num_partitions: clients; the natural partition takes the first ones of the sorted ids.

    Returns:
        One int64 array per client; together all rows, except that "pathological" may leave classes out and
        "natural" the ids beyond `num_partitions`, and "shards" leaves out the shards that nobody draws and the
        rows after the last whole one.

    Raises:
        ValueError: more clients than rows or ids, fewer rows than the clients' least sizes add up to, or no
            partition that fulfils the settings was found.
    """
    if not 1 <= num_partitions <= len(labels):
        raise ValueError(
            f"num-partitions must be between 1 and the {len(labels)} training samples, got {num_partitions}"
        )
    if config.partition == "dirichlet" and num_partitions * config.min_partition_size > len(labels):
        raise ValueError(_no_partition(config, len(labels), num_partitions, "there are too few samples"))
    if config.partition == "shards":
        _check_shards(config, len(labels), num_partitions)
    order = np.random.default_rng(config.seed).permutation(len(labels))
    if config.partition == "iid":
        return tuple(np.array_split(order, num_partitions))
    partitioner = _partitioner(config, num_partitions)
    partitioner.dataset = _table(order, labels, ids)
    if config.partition == "natural":
        _check_ids(config.id_column, partitioner.num_partitions, num_partitions)
    return _draw(config, partitioner, labels, num_partitions)


def _check_shards(config: DataConfig, num_rows: int, num_partitions: int) -> None:
    """Refuse more shards than there are, and say what would do."""
    shards, size = config.shards_per_client, config.shard_size
    needed = num_partitions * shards * size
    if needed <= num_rows:
        return
    most = {
        "clients": num_rows // (shards * size),
        "shard-size": num_rows // (num_partitions * shards),
        "shards-per-client": num_rows // (num_partitions * size),
    }
    possible = " or ".join(f"{key} <= {value}" for key, value in most.items() if value) or "lower values of both"
    raise ValueError(
        f"partition 'shards': {num_partitions} clients with shards-per-client = {shards} and shard-size = {size} "
        f"need {needed} training samples, there are {num_rows}; possible: {possible}"
    )


def _check_ids(column: str, num_ids: int, num_partitions: int) -> None:
    """Refuse fewer ids than clients, and say how many ids are left over."""
    if num_partitions > num_ids:
        raise ValueError(
            f"partition 'natural': id-column {column!r} has {num_ids} ids, fewer than the {num_partitions} clients"
        )
    if num_partitions < num_ids:
        logging.getLogger("flwr").warning(
            "partition 'natural': %d of the %d ids of id-column %r are left out (%d clients)",
            *(num_ids - num_partitions, num_ids, column, num_partitions),
        )


def _partitioner(config: DataConfig, num_partitions: int) -> Partitioner:
    from flwr_datasets import partitioner as known

    if config.partition == "dirichlet":
        return known.DirichletPartitioner(
            num_partitions,
            partition_by="label",
            alpha=float(config.alpha),
            min_partition_size=config.min_partition_size,
            self_balancing=config.partition_balance,
            seed=config.seed,
        )
    if config.partition == "pathological":
        return known.PathologicalPartitioner(
            num_partitions,
            partition_by="label",
            num_classes_per_partition=config.classes_per_client,
            class_assignment_mode="first-deterministic",
            seed=config.seed,
        )
    if config.partition == "shards":
        return known.ShardPartitioner(
            num_partitions,
            partition_by="label",
            num_shards_per_partition=config.shards_per_client,
            shard_size=config.shard_size,
            shuffle=False,
            seed=config.seed,
        )
    return known.NaturalIdPartitioner(partition_by="id")


def _table(order: np.ndarray, labels: np.ndarray, ids: Sequence[Any] | None) -> Any:
    """Rows, labels and ids only: partitioners need no images, and this keeps them from being decoded."""
    from datasets import Dataset

    columns: dict[str, Any] = {"row": order, "label": labels[order]}
    if ids is not None:
        columns["id"] = [ids[row] for row in order]
    return Dataset.from_dict(columns)


def _draw(
    config: DataConfig, partitioner: Partitioner, labels: np.ndarray, num_partitions: int
) -> tuple[np.ndarray, ...]:
    """Ask for the partitions, several times where the draw is random."""
    problem = "alpha is too near zero"
    for _ in range(_DIRICHLET_TRIES if config.partition == "dirichlet" else 1):
        try:
            with _quiet():
                rows = tuple(_rows(partitioner.load_partition(i)) for i in range(num_partitions))
        except ValueError as error:
            problem = "every draw left a client too small" if config.partition == "dirichlet" else str(error)
            continue
        if config.partition == "pathological":
            _log_absent_classes(labels, rows)
        if config.partition != "dirichlet" or len(np.unique(np.concatenate(rows))) == len(labels):
            return rows
        break  # proportions underflowed to 0/0: only an alpha near zero does that
    raise ValueError(_no_partition(config, len(labels), num_partitions, problem))


def _rows(partition: Any) -> np.ndarray:
    return np.asarray(partition.with_format("numpy")[:]["row"], dtype=np.int64)


def _log_absent_classes(labels: np.ndarray, rows: Sequence[np.ndarray]) -> None:
    absent = np.setdiff1d(labels, labels[np.concatenate(rows)])
    if len(absent):
        logging.getLogger("flwr").warning(
            "partition 'pathological': no client has the classes %s (too few clients)", absent.tolist()
        )


def _no_partition(config: DataConfig, num_rows: int, num_partitions: int, problem: str) -> str:
    asked = {
        "dirichlet": f"alpha = {config.alpha} and min-partition-size = {config.min_partition_size}",
        "pathological": f"classes-per-client = {config.classes_per_client}",
    }.get(config.partition, f"id-column = {config.id_column!r}")
    return (
        f"partition {config.partition!r} with {asked} found no way to divide {num_rows} samples among "
        f"{num_partitions} clients: {problem.rstrip('.')}. Use fewer clients, or change these settings."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop the warnings of failed draws, and NaturalIdPartitioner's progress bar, which has no switch."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
