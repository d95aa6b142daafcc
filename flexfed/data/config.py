"""Which data a run uses and how they are divided among clients."""

from __future__ import annotations

import math
from dataclasses import dataclass

PARTITIONS = ("dirichlet", "iid", "natural", "pathological", "shards")


@dataclass(frozen=True)
class DataConfig:
    """The data settings of a run; a field's key in the configuration has hyphens for underscores.

    Attributes:
        dataset: "digits" (scikit-learn's) or "shapes" (procedural images), both built in, the name of a set on
            the Hugging Face hub, or the path of a local folder or parquet file (absolute, or beginning with ~ or
            a dot).
        subset: the hub's name of a configuration of the set, if it has several.
        data_path: a client's own folder (from its node-config); wins over `dataset` and is not partitioned.
        image_column: column of the inputs (images or arrays of numbers); empty = found by its type.
        label_column: column of the labels; empty = found by its type.
        partition: one of PARTITIONS.
        alpha: concentration of the Dirichlet partition; small = each client holds few classes.
        classes_per_client: labels per client of the pathological partition.
        id_column: column whose values are the clients of the natural partition.
        min_partition_size: the Dirichlet partition is drawn again until each client has this many samples.
        partition_balance: a client that already holds its equal share gets nothing of the next class
            (Dirichlet only). Off by default, which is the plain Dirichlet partition; FlexFL's code balances,
            and stops a client at its share where flwr-datasets stops it one sample above.
        shards_per_client: shards that each client of the shards partition draws; two may have the same label.
        shard_size: training samples in each shard of the shards partition.
        test_per_label: what a client is evaluated on. 0 = its own validation samples. n > 0 = n random samples
            of each label that it holds, from the samples the server tests on (the test split, if there is
            one), or all where there are fewer. A client's own folder brings its own test split for this;
            where it has none, its validation samples are used whatever n is.
        test_samples: so many of its test samples the server tests on, spread evenly over them; 0 = all.
        validation_fraction: part of a client's samples it does not train on, in [0, 1).
        proxy_fraction: part of the training split the server keeps, in [0, 1), at most 1,000 samples; digits
            has its own fixed split and ignores it.
        seed: of the partition and of each client's validation and `test_per_label` samples; never of the
            server's proxy or test samples.
    """

    dataset: str = "digits"
    subset: str = ""
    data_path: str = ""
    image_column: str = ""
    label_column: str = ""
    partition: str = "dirichlet"
    alpha: float = 0.3
    classes_per_client: int = 2
    id_column: str = ""
    min_partition_size: int = 10
    partition_balance: bool = False
    shards_per_client: int = 2
    shard_size: int = 100
    test_per_label: int = 0
    test_samples: int = 0
    validation_fraction: float = 0.1
    proxy_fraction: float = 0.1
    seed: int = 1

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
            ValueError: with the key as the user writes it and what is possible.
        """
        if not self.dataset:
            raise ValueError('dataset must be "digits", a hub name or the path of a local folder, got ""')
        if self.partition not in PARTITIONS:
            raise ValueError(f"unknown partition {self.partition!r}; known: {', '.join(PARTITIONS)}")
        if self.partition == "natural" and not (self.id_column or self.data_path):
            raise ValueError('partition "natural" needs id-column, the column that says whose a sample is')
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be a number > 0, got {self.alpha}")
        self._check_at_least("classes-per-client", self.classes_per_client, 1)
        self._check_at_least("min-partition-size", self.min_partition_size, 1)
        self._check_at_least("shards-per-client", self.shards_per_client, 1)
        self._check_at_least("shard-size", self.shard_size, 1)
        self._check_at_least("test-per-label", self.test_per_label, 0)
        self._check_at_least("test-samples", self.test_samples, 0)
        self._check_at_least("seed", self.seed, 0)
        self._check_fraction("validation-fraction", self.validation_fraction)
        self._check_fraction("proxy-fraction", self.proxy_fraction)

    def most_validation(self, num_examples: int) -> int:
        """Validation samples of a client at most, from the number that it trains on."""
        share = self.validation_fraction
        return math.floor(share / (1 - share) * num_examples + 1e-9)

    def most_tested(self, num_examples: int, num_labels: int) -> int:
        """Samples that a client tests on at most; one with an own folder may have no test samples of its labels."""
        return max(self.most_validation(num_examples), self.test_per_label * num_labels)

    @staticmethod
    def _check_at_least(key: str, value: int, least: int) -> None:
        if value != int(value) or value < least:
            raise ValueError(f"{key} must be a whole number >= {least}, got {value}")

    @staticmethod
    def _check_fraction(key: str, value: float) -> None:
        if not 0 <= value < 1:
            raise ValueError(f"{key} must be in [0, 1), got {value}")
