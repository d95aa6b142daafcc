"""The shards partition, and test samples of the labels that a client holds: FedLPS's set-up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_data
import torch
from test_data import Write, numbers, vectors
from toy import lines, run_toy

from flexfed.data import (
    ClientData,
    DataConfig,
    check_partition,
    client_labels,
    load_client,
    load_server,
)
from flexfed.data.partitions import partition_rows
from flexfed.flower.request import client_data
from flexfed.training import Samples

write = test_data.write  # the fixture

ALIGNED = np.random.default_rng(0).permutation(np.repeat(np.arange(6), 100))
"""100 samples of each of 6 labels: shards of 20 and 50 end where labels do."""


def shards(per_client: int = 2, size: int = 20, seed: int = 1, **more: Any) -> DataConfig:
    return DataConfig(partition="shards", shards_per_client=per_client, shard_size=size, seed=seed, **more)


def same(one: Samples, other: Samples) -> bool:
    return torch.equal(one.inputs, other.inputs) and torch.equal(one.labels, other.labels)


# --- the partition --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("per_client", "size", "clients"), [(1, 50, 12), (2, 20, 15), (3, 20, 4), (7, 10, 8)])
def test_clients_hold_equal_shares_of_few_labels_and_none_twice(per_client: int, size: int, clients: int) -> None:
    parts = partition_rows(shards(per_client, size), ALIGNED, None, clients)
    assert [len(part) for part in parts] == [per_client * size] * clients
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together)
    assert max(len(np.unique(ALIGNED[part])) for part in parts) <= per_client
    for part in parts:  # a shard is of one label, and a client may draw two of the same label
        assert all(np.bincount(ALIGNED[part]) % size == 0)


def test_a_client_may_draw_the_same_label_twice() -> None:
    parts = partition_rows(shards(), ALIGNED, None, 15)
    assert {len(np.unique(ALIGNED[part])) for part in parts} == {1, 2}


def test_shards_are_cut_from_the_rows_sorted_by_label() -> None:
    """The oracle: shuffle, sort, cut, deal. Shards of 30 lie across labels: each is dealt whole or not at all."""
    rng = np.random.default_rng(7)
    order = np.random.default_rng(7).permutation(600)
    cut = order[np.argsort(ALIGNED[order], kind="stable")].reshape(20, 30)
    dealt = cut[rng.permutation(20)[:15]].reshape(5, 90)
    parts = partition_rows(shards(3, 30, seed=7), ALIGNED, None, 5)
    assert np.array_equal(np.stack(parts), dealt)
    mixed = [shard for part in parts for shard in part.reshape(3, 30) if len(np.unique(ALIGNED[shard])) > 1]
    assert mixed
    assert all(np.ptp(ALIGNED[shard]) == 1 for shard in mixed)


def test_rows_after_the_last_whole_shard_are_nobodys() -> None:
    """Shards of 40 from 600 samples: 15, all of them drawn; from 590, 14, and the last 30 samples are left."""
    assert len(np.unique(partition_rows(shards(5, 40), ALIGNED, None, 3))) == 600
    labels = np.sort(ALIGNED)[:590]
    drawn = np.concatenate(partition_rows(shards(7, 40), labels, None, 2))
    assert len(drawn) == 560
    assert np.bincount(labels[drawn]).tolist() == [100, 100, 100, 100, 100, 60]


def test_the_draw_is_the_seeds() -> None:
    one, again, other = (partition_rows(shards(seed=seed), ALIGNED, None, 12) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(np.array_equal(np.sort(a), np.sort(b)) for a, b in zip(one, other, strict=True))
    held = [[sorted(set(ALIGNED[part].tolist())) for part in parts] for parts in (one, other)]
    assert held[0] != held[1]


@pytest.mark.parametrize(
    ("config", "clients", "message"),
    [
        (
            shards(2, 100),
            4,
            "4 clients with shards-per-client = 2 and shard-size = 100 need 800 training samples, there are 600; "
            "possible: clients <= 3 or shard-size <= 75 or shards-per-client <= 1$",
        ),
        (shards(2, 500), 4, "possible: shard-size <= 75$"),
        (shards(1, 601), 1, "possible: shard-size <= 600$"),
        (shards(601, 1), 1, "possible: shards-per-client <= 600$"),
        (shards(601, 601), 1, "possible: lower values of both$"),
        (shards(), 601, "between 1 and the 600 training samples, got 601"),
    ],
)
def test_too_few_samples_are_refused(config: DataConfig, clients: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition_rows(config, ALIGNED, None, clients)


def test_what_the_refusal_calls_possible_is() -> None:
    for config, clients in ((shards(2, 100), 3), (shards(2, 75), 4), (shards(1, 100), 4)):
        assert len(partition_rows(config, ALIGNED, None, clients)) == clients


def test_the_refusal_reaches_who_asks_for_data() -> None:
    with pytest.raises(ValueError, match=r"shards-per-client = 2 and shard-size = 100 need 4000 .* 1200"):
        check_partition(DataConfig(partition="shards"), 20)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shards_per_client": 0}, "shards-per-client must be a whole number >= 1, got 0"),
        ({"shard_size": 0}, "shard-size must be a whole number >= 1, got 0"),
        ({"test_per_label": -1}, "test-per-label must be a whole number >= 0, got -1"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**wrong)


def test_a_client_trains_and_validates_on_its_shards() -> None:
    client = load_client(shards(2, 20, validation_fraction=0.1), 3, 20)
    assert (len(client.train.labels), len(client.validation.labels)) == (36, 4)
    assert client_labels(shards(2, 20), 3, 20) == (36, client.labels)


# --- test samples of the client's labels ----------------------------------------------------------------


def counts(samples: Samples) -> dict[int, int]:
    labels, found = samples.labels.unique(return_counts=True)
    return dict(zip(labels.tolist(), found.tolist(), strict=True))


def test_without_it_a_client_tests_on_its_validation_samples_themselves(write: Write) -> None:
    own = write({"train": vectors(0, 40), "test": vectors(500, 520)})
    for config in (DataConfig(), DataConfig(data_path=own)):
        client = load_client(config, 0, 5)
        assert client.test is client.validation


def test_there_are_so_many_of_each_label_of_the_client() -> None:
    for partition in range(5):
        client = load_client(shards(test_per_label=7), partition, 20)
        assert counts(client.test) == dict.fromkeys(client.labels, 7)


def test_they_are_the_servers_and_no_clients() -> None:
    config = shards(2, 30, test_per_label=9)
    server = {image.numpy().tobytes() for image in load_server(config).test.inputs}
    clients = [load_client(config, i, 20) for i in range(20)]
    held = {image.numpy().tobytes() for c in clients for part in (c.train, c.validation) for image in part.inputs}
    tested = {image.numpy().tobytes() for c in clients for image in c.test.inputs}
    assert tested <= server
    assert not tested & held


def test_validation_and_training_samples_stay_what_they_were() -> None:
    plain, more = load_client(shards(), 2, 20), load_client(shards(test_per_label=5), 2, 20)
    assert same(plain.train, more.train)
    assert same(plain.validation, more.validation)


def test_they_are_drawn_by_seed_and_partition(write: Write) -> None:
    folder = write({"train": vectors(0, 100), "test": vectors(500, 900)})

    def drawn(seed: int, partition: int) -> list[int]:
        config = DataConfig(dataset=folder, partition="iid", seed=seed, test_per_label=10)
        client = load_client(config, partition, 3)
        assert counts(client.test) == dict.fromkeys(range(4), 10)
        assert len(set(numbers(client.test))) == 40
        return numbers(client.test)

    assert drawn(1, 0) == drawn(1, 0)
    assert len({tuple(sorted(drawn(seed, partition))) for seed in (1, 2) for partition in (0, 1, 2)}) == 6


def test_the_draw_depends_on_nothing_but_the_numbers(write: Write) -> None:
    """The oracle, by numbers that are the same in every process and on every machine."""
    folder = write({"train": vectors(0, 100), "test": vectors(500, 540)})
    client = load_client(DataConfig(dataset=folder, partition="iid", seed=3, test_per_label=6), 2, 4)
    rng = np.random.default_rng([3, 2, 1])
    expected = [n for label in range(4) for n in rng.permutation(np.arange(500 + label, 540, 4))[:6]]
    assert numbers(client.test) == expected


def test_a_label_with_fewer_gives_all_and_one_without_gives_none(write: Write) -> None:
    test = vectors(500, 540).filter(lambda row: row["label"] != 3 and not (row["label"] == 2 and row["x"][0] > 510))
    config = DataConfig(dataset=write({"train": vectors(0, 100), "test": test}), partition="iid", test_per_label=5)
    client = load_client(config, 0, 3)
    assert client.labels == (0, 1, 2, 3)
    assert counts(client.test) == {0: 5, 1: 5, 2: 3}
    assert {n for n in numbers(client.test) if n % 4 == 2} == {502, 506, 510}


def test_a_client_whose_labels_nobody_tests_has_no_test_samples(write: Write) -> None:
    test = vectors(500, 540).filter(lambda row: row["label"] == 0)
    train = vectors(0, 40).filter(lambda row: row["label"] == 1)
    folder = write({"train": train, "test": test})
    client = load_client(DataConfig(dataset=folder, partition="iid", proxy_fraction=0.0, test_per_label=5), 0, 1)
    assert client.test.inputs.shape == (0, 2)
    assert len(client.test.labels) == 0


def test_without_a_test_split_they_come_from_the_servers_fifth(write: Write) -> None:
    folder = write({"train": vectors(0, 200)})
    config = DataConfig(dataset=folder, partition="iid", test_per_label=3)
    server = set(numbers(load_server(config).test))
    assert len(server) == 40
    for partition in range(4):
        client = load_client(config, partition, 4)
        assert set(numbers(client.test)) <= server
        assert counts(client.test) == dict.fromkeys(range(4), 3)


def test_an_own_folder_brings_its_own_test_split(write: Write) -> None:
    both = write({"train": vectors(700, 720), "test": vectors(800, 840)})
    client = load_client(DataConfig(data_path=both, test_per_label=2), 3, 10)
    assert counts(client.test) == dict.fromkeys(range(4), 2)
    assert set(numbers(client.test)) <= set(range(800, 840))
    alone = load_client(DataConfig(data_path=write({"train": vectors(700, 720)}), test_per_label=2), 3, 10)
    assert alone.test is alone.validation
    assert sorted(numbers(alone.train) + numbers(alone.validation)) == list(range(700, 720))


# --- in a run -------------------------------------------------------------------------------------------


def normalised(**values: Any) -> ClientData:
    settings = {"strategy": "fedavg", "partition": "shards", "shard-size": 20}
    key = (*settings.items(), *((name.replace("_", "-"), value) for name, value in values.items()))
    return client_data(key, 2, 20, "", (0.5,), (0.25,))


def test_test_samples_are_normalised_once() -> None:
    raw = load_client(shards(test_per_label=4), 2, 20)
    assert torch.equal(normalised(test_per_label=4).test.inputs, (raw.test.inputs - 0.5) / 0.25)
    plain = normalised()
    assert plain.test is plain.validation
    assert torch.equal(plain.validation.inputs, (raw.validation.inputs - 0.5) / 0.25)


def test_a_run_tests_clients_on_their_labels(tmp_path: Path) -> None:
    values = {"partition": "shards", "shards-per-client": 3, "shard-size": 20, "test-per-label": 6}
    sizes: dict[int, int] = {}

    def listen(request: Any, reply: Any, partition: int) -> Any:
        if request.metadata.message_type == "evaluate":
            sizes[partition] = int(reply.content["metrics"]["num-samples"])
        return reply

    run = run_toy(tmp_path, "fedavg", {**values, "fraction-evaluate": 1.0}, alter=listen)
    assert 0 <= lines(run)[0]["accuracy"] <= 1
    config = replace(shards(3), test_per_label=6)
    assert sizes == {i: 6 * len(load_client(config, i, 4).labels) for i in range(4)}
