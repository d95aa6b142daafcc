"""The data room: what is loaded, that nobody shares a sample, and what is said when it cannot be done."""

from __future__ import annotations

import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexfed.data import (
    DataConfig,
    check_partition,
    client_labels,
    dataset_info,
    load_client,
    load_server,
    normalisation,
    normalise,
)
from flexfed.data.partitions import partition_rows
from flexfed.data.sources import locate, source
from flexfed.training import Samples

MIRROR = os.environ.get("FLEXFED_DATA", "")
needs_mirror = pytest.mark.skipif(not MIRROR, reason="FLEXFED_DATA does not name a folder with the data sets")

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write tables as <folder>/<split>-0.parquet, or by save_to_disk; gives the folder's path."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write_tables(tables: dict[str, Any], saved: bool = False) -> str:
        folder = tmp_path / f"data{len(list(tmp_path.iterdir()))}"
        if saved:
            datasets.DatasetDict(tables).save_to_disk(str(folder))
            return str(folder)
        folder.mkdir()
        for split, table in tables.items():
            table.to_parquet(str(folder / f"{split}-0.parquet"))
        return str(folder)

    return write_tables


def vectors(start: int, stop: int, num_classes: int = 4, **more: Sequence[Any]) -> Any:
    """A table whose row i has the input (i, -i), by which a sample is known again, and the label i modulo."""
    from datasets import ClassLabel, Dataset, Features, List, Value

    rows = range(start, stop)
    columns = {"x": [[float(i), float(-i)] for i in rows], "label": [i % num_classes for i in rows], **more}
    features = Features(
        {
            "x": List(Value("float32"), length=2),
            "label": ClassLabel(names=[f"class {c}" for c in range(num_classes)]),
            **{name: Dataset.from_dict({name: values}).features[name] for name, values in more.items()},
        }
    )
    return Dataset.from_dict(columns, features=features)


def images(count: int, shape: tuple[int, ...] = (4, 6), column: str = "image") -> Any:
    """A table of images whose pixels are all the row number."""
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as pil

    pictures = [pil.fromarray(np.full(shape, i, np.uint8)) for i in range(count)]
    features = Features({column: Image(), "label": ClassLabel(names=["a", "b"])})
    return Dataset.from_dict({column: pictures, "label": [i % 2 for i in range(count)]}, features=features)


def numbers(samples: Samples) -> list[int]:
    """The row numbers of samples from `vectors`."""
    return [int(x) for x in samples.inputs[:, 0]]


def all_samples(config: DataConfig, num_partitions: int) -> list[Samples]:
    server = load_server(config)
    clients = [load_client(config, i, num_partitions) for i in range(num_partitions)]
    return [server.proxy, server.test, *(part for c in clients for part in (c.train, c.validation))]


# --- digits ---------------------------------------------------------------------------------------------


def test_digits_has_its_fixed_split() -> None:
    server = load_server(DataConfig())
    assert server.info == dataset_info(DataConfig())
    assert (server.info.num_classes, server.info.input_shape, server.info.num_train) == (10, (1, 8, 8), 1200)
    assert server.info.label_names == tuple("0123456789")
    assert server.proxy.inputs.shape == (150, 1, 8, 8)
    assert server.test.inputs.shape == (447, 1, 8, 8)
    assert server.test.inputs.dtype == torch.float32
    assert server.test.labels.dtype == torch.int64
    assert server.test.inputs.min() == 0
    assert server.test.inputs.max() == 1
    assert set(server.proxy.labels.tolist()) == set(range(10))


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "pathological"])
def test_digits_server_and_clients_hold_every_sample_once(partition: str) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    expected = Counter((image.tobytes(), int(label)) for image, label in zip(digits.images, digits.target, strict=True))
    found = Counter(
        (np.float64(image * 16).tobytes(), int(label))
        for samples in all_samples(DataConfig(partition=partition), 12)
        for image, label in zip(samples.inputs[:, 0].numpy(), samples.labels, strict=True)
    )
    assert found == expected


@pytest.mark.parametrize(("num", "expected"), [(0, 447), (7, 7), (447, 447), (9999, 447)])
def test_the_server_may_test_on_fewer_samples_spread_evenly(num: int, expected: int) -> None:
    whole, some = load_server(DataConfig()), load_server(DataConfig(test_samples=num))
    assert len(whole.test.labels) == 447
    assert len(some.test.labels) == expected
    rows = [i * 447 // expected for i in range(expected)]
    assert torch.equal(some.test.inputs, whole.test.inputs[rows])
    assert torch.equal(some.test.labels, whole.test.labels[rows])
    assert torch.equal(some.proxy.inputs, whole.proxy.inputs)


def test_fewer_test_samples_leave_the_clients_as_they_are() -> None:
    few = DataConfig(test_samples=7, test_per_label=3)
    one, other = load_client(few, 0, 4), load_client(DataConfig(test_per_label=3), 0, 4)
    assert torch.equal(one.test.inputs, other.test.inputs)
    assert torch.equal(one.train.inputs, other.train.inputs)
    with pytest.raises(ValueError, match="test-samples must be"):
        DataConfig(test_samples=-1)


def test_server_samples_do_not_depend_on_the_seed() -> None:
    one, two = load_server(DataConfig(seed=1)), load_server(DataConfig(seed=2))
    assert torch.equal(one.proxy.inputs, two.proxy.inputs)
    assert torch.equal(one.test.labels, two.test.labels)


def test_same_seed_same_client_and_other_seed_other_client() -> None:
    one, again = (load_client(DataConfig(seed=1), 3, 10) for _ in range(2))
    other = load_client(DataConfig(seed=2), 3, 10)
    assert torch.equal(one.train.inputs, again.train.inputs)
    assert one.labels == again.labels
    assert one.train.inputs.shape != other.train.inputs.shape or not torch.equal(one.train.inputs, other.train.inputs)


def test_what_a_client_gets_cannot_be_damaged_for_the_next() -> None:
    first = load_client(DataConfig(), 0, 4).train
    kept = first.inputs.clone()
    first.inputs.zero_()
    assert torch.equal(load_client(DataConfig(), 0, 4).train.inputs, kept)


def test_digits_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("network call")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_client(DataConfig(seed=77), 0, 5)


def test_iid_digits_need_no_data_set_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("datasets", "flwr_datasets", "flwr"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it now fails
    assert load_client(DataConfig(partition="iid", seed=77), 0, 5).info == load_server(DataConfig()).info


# --- partitions -----------------------------------------------------------------------------------------

LABELS = np.arange(600) % 6


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "pathological"])
@pytest.mark.parametrize("num_partitions", [1, 7, 20])
def test_partitions_cover_all_rows_once(partition: str, num_partitions: int) -> None:
    config = DataConfig(partition=partition, classes_per_client=6 if num_partitions == 1 else 2)
    parts = partition_rows(config, LABELS, None, num_partitions)
    assert len(parts) == num_partitions
    assert sorted(np.concatenate(parts).tolist()) == list(range(600))


def test_iid_cuts_as_iid_partitioner_does() -> None:
    from datasets import Dataset
    from flwr_datasets.partitioner import IidPartitioner

    parts = partition_rows(DataConfig(partition="iid"), LABELS, None, 7)
    oracle = IidPartitioner(7)
    oracle.dataset = Dataset.from_dict({"row": np.concatenate(parts)})
    for i, part in enumerate(parts):
        assert part.tolist() == oracle.load_partition(i)["row"][:]


@pytest.mark.parametrize("least", [1, 10, 15])
def test_dirichlet_clients_have_the_least_size(least: int) -> None:
    parts = partition_rows(DataConfig(alpha=0.3, min_partition_size=least), LABELS, None, 20)
    assert min(map(len, parts)) >= least


@pytest.mark.filterwarnings("ignore")
def test_dirichlet_draws_more_often_than_flwr_datasets() -> None:
    """Fifty clients of at least 10 samples out of 24 on average: eleven draws are not enough here."""
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner

    labels = np.arange(1200) % 10
    oracle = DirichletPartitioner(50, "label", 0.3, min_partition_size=10, self_balancing=False, seed=3)
    oracle.dataset = Dataset.from_dict({"label": labels})
    with pytest.raises(ValueError, match="max number of attempts"):
        oracle.load_partition(0)
    parts = partition_rows(DataConfig(seed=3), labels, None, 50)
    assert min(map(len, parts)) >= 10


def test_balance_bounds_what_a_client_holds() -> None:
    """Nobody gets a further class with its share exceeded: at most the share and one class."""
    share, one_class = 600 / 10, 100
    for seed in range(5):
        parts = partition_rows(DataConfig(seed=seed, alpha=0.3, partition_balance=True), LABELS, None, 10)
        assert max(map(len, parts)) <= share + one_class


def test_large_alpha_is_nearly_even_and_small_alpha_is_not() -> None:
    def classes(alpha: float) -> float:
        parts = partition_rows(DataConfig(alpha=alpha, min_partition_size=1), LABELS, None, 6)
        return float(np.mean([len(np.unique(LABELS[part])) for part in parts]))

    assert classes(1000.0) == 6
    assert classes(0.05) < 4


def test_pathological_clients_have_so_many_classes_and_their_own_first() -> None:
    parts = partition_rows(DataConfig(partition="pathological", classes_per_client=2), LABELS, None, 12)
    for i, part in enumerate(parts):
        assert len(np.unique(LABELS[part])) == 2
        assert i % 6 in LABELS[part]


def test_pathological_says_which_classes_nobody_has(caplog: pytest.LogCaptureFixture) -> None:
    config = DataConfig(partition="pathological", classes_per_client=1)
    with caplog.at_level("WARNING", logger="flwr"):
        parts = partition_rows(config, LABELS, None, 2)
    assert sorted(np.unique(LABELS[np.concatenate(parts)])) == [0, 1]
    assert "no client has the classes [2, 3, 4, 5]" in caplog.text


def test_natural_partition_is_by_sorted_id(capfd: pytest.CaptureFixture[str]) -> None:
    ids = [("zoe", "ann", "bob")[i % 3] for i in range(600)]
    config = DataConfig(partition="natural", id_column="user")
    parts = partition_rows(config, LABELS, ids, 3)
    assert [{ids[row] for row in part} for part in parts] == [{"ann"}, {"bob"}, {"zoe"}]
    first = partition_rows(config, LABELS, ids, 2)
    assert all(np.array_equal(a, b) for a, b in zip(parts, first, strict=False))
    assert capfd.readouterr().err == ""


def test_natural_says_how_many_ids_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    config, ids = DataConfig(partition="natural", id_column="user"), ["a", "b", "c"] * 200
    with caplog.at_level("INFO", logger="flwr"):
        partition_rows(config, LABELS, ids, 3)
        assert not caplog.records
        partition_rows(config, LABELS, ids, 1)
    assert [record.getMessage() for record in caplog.records] == [
        "partition 'natural': 2 of the 3 ids of id-column 'user' are left out (1 clients)"
    ]


@pytest.mark.parametrize(
    ("config", "num_partitions", "message"),
    [
        (DataConfig(), 601, "between 1 and the 600 training samples, got 601"),
        (DataConfig(), 0, "between 1 and the 600 training samples, got 0"),
        (DataConfig(min_partition_size=61), 10, "min-partition-size = 61 .* 600 samples .* 10 clients: .* too few"),
        (DataConfig(alpha=0.1), 60, "min-partition-size = 10 .* 60 clients"),
        (
            DataConfig(partition="pathological", classes_per_client=7),
            4,
            "classes-per-client = 7 .* 4 clients",
        ),
        (DataConfig(partition="natural", id_column="u"), 4, "'u' has 2 ids, fewer than the 4 clients"),
    ],
)
def test_impossible_partitions_are_refused(config: DataConfig, num_partitions: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition_rows(config, LABELS, ["a", "b"] * 300, num_partitions)


@pytest.mark.parametrize(("least", "num_partitions"), [(60, 20), (10, 100)])
def test_a_hopeless_partition_is_refused_once_for_all_clients(
    least: int, num_partitions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least sizes add up to no more than the 1,200 digits, so only drawing shows that there is no way."""
    calls: list[int] = []

    def counted(config: DataConfig, labels: np.ndarray, ids: Any, number: int) -> tuple[np.ndarray, ...]:
        calls.append(number)
        return partition_rows(config, labels, ids, number)

    monkeypatch.setattr("flexfed.data.partition_rows", counted)
    config = DataConfig(min_partition_size=least, seed=77)
    message = f"min-partition-size = {least} found no way .* {num_partitions} clients: every draw left a client too"
    with pytest.raises(ValueError, match=message):
        check_partition(config, num_partitions)
    for load in (load_client, client_labels):
        for partition in (0, num_partitions - 1):
            with pytest.raises(ValueError, match=message):
                load(config, partition, num_partitions)
    assert calls == [num_partitions]


def test_a_vanishing_alpha_loses_no_sample() -> None:
    config = DataConfig(alpha=1e-4, min_partition_size=1)
    try:
        parts = partition_rows(config, LABELS, None, 4)
    except ValueError as error:
        assert "alpha" in str(error)  # noqa: PT017
    else:
        assert sorted(np.concatenate(parts).tolist()) == list(range(600))


# --- clients --------------------------------------------------------------------------------------------


def test_validation_is_a_part_of_the_client_and_leaves_something_to_train_on() -> None:
    for fraction in (0.0, 0.25, 0.99):
        config = DataConfig(partition="iid", validation_fraction=fraction)
        client = load_client(config, 2, 1200 // 10)
        assert len(client.validation.labels) == int(fraction * 10)
        assert len(client.train.labels) == 10 - int(fraction * 10) >= 1
    single = load_client(DataConfig(partition="iid", validation_fraction=0.99), 0, 1200)
    assert len(single.train.labels) == 1
    assert len(single.validation.labels) == 0
    assert single.validation.inputs.shape == (0, 1, 8, 8)


def test_labels_are_those_of_the_client() -> None:
    client = load_client(DataConfig(partition="pathological", classes_per_client=3), 1, 10)
    present = torch.cat([client.train.labels, client.validation.labels])
    assert client.labels == tuple(sorted(set(present.tolist())))
    assert len(client.labels) == 3


@pytest.mark.parametrize("partition", [-1, 5])
def test_partition_ids_beyond_the_range_are_refused(partition: int) -> None:
    for load in (load_client, client_labels):
        with pytest.raises(ValueError, match=rf"partition-id must be in 0\.\.4 .* got {partition}"):
            load(DataConfig(), partition, 5)


def test_client_labels_are_the_loaded_clients_without_decoding(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write({"train": vectors(0, 100), "test": vectors(500, 520)})
    own = write({"train": vectors(700, 721)})
    for more in ({"dataset": folder, "min_partition_size": 2}, {"data_path": own}):
        config = DataConfig(validation_fraction=0.3, **more)
        clients = [load_client(config, i, 5) for i in range(5)]
        with monkeypatch.context() as patch:
            patch.setattr("flexfed.data.columns.Inputs.__call__", None)
            check_partition(config, 5)
            found = [client_labels(config, i, 5) for i in range(5)]
        assert found == [(len(client.train.labels), client.labels) for client in clients]


def test_an_own_folder_has_no_partition_to_check() -> None:
    check_partition(DataConfig(data_path="nowhere"), 10**6)
    with pytest.raises(ValueError, match="between 1 and the 1200 training samples, got 1000000"):
        check_partition(DataConfig(), 10**6)


# --- local folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_local_folder_every_training_row_once(write: Write, saved: bool, partition: str) -> None:
    folder = write({"train": vectors(0, 100), "test": vectors(500, 520)}, saved=saved)
    config = DataConfig(dataset=folder, partition=partition, min_partition_size=2)
    server = load_server(config)
    assert server.info.num_train == 90
    assert server.info.input_shape == (2,)
    assert server.info.label_names == ("class 0", "class 1", "class 2", "class 3")
    assert numbers(server.test) == list(range(500, 520))
    assert len(server.proxy.labels) == 10
    parts = all_samples(config, 5)
    del parts[1]  # test
    assert sorted(n for part in parts for n in numbers(part)) == list(range(100))
    assert all(n % 4 == label for part in parts for n, label in zip(numbers(part), part.labels, strict=True))


def test_without_a_test_split_a_fifth_of_train_becomes_it(write: Write) -> None:
    config = DataConfig(dataset=write({"train": vectors(0, 100)}), partition="iid", proxy_fraction=0.5)
    server = load_server(config)
    assert (len(server.test.labels), len(server.proxy.labels), server.info.num_train) == (20, 40, 40)
    assert sorted(n for part in all_samples(config, 4) for n in numbers(part)) == list(range(100))


def test_a_validation_split_stands_in_for_test(write: Write) -> None:
    folder = write({"train": vectors(0, 50), "validation": vectors(500, 510)})
    assert numbers(load_server(DataConfig(dataset=folder)).test) == list(range(500, 510))


def test_proxy_is_at_most_a_thousand(write: Write) -> None:
    folder = write({"train": vectors(0, 3000), "test": vectors(0, 1)})
    assert len(load_server(DataConfig(dataset=folder, proxy_fraction=0.9)).proxy.labels) == 1000
    assert len(load_server(DataConfig(dataset=folder, proxy_fraction=0.0)).proxy.labels) == 0


@pytest.mark.parametrize(("shape", "expected"), [((4, 6), (1, 4, 6)), ((4, 6, 3), (3, 4, 6)), ((4, 6, 4), (3, 4, 6))])
def test_images_are_scaled_and_channels_first(write: Write, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    folder = write({"train": images(30, shape), "test": images(5, shape)})
    test = load_server(DataConfig(dataset=folder)).test
    assert test.inputs.shape == (5, *expected)
    assert test.inputs.dtype == torch.float32
    assert torch.equal(test.inputs[3], torch.full(expected, 3 / 255))
    client = load_client(DataConfig(dataset=folder, partition="iid"), 0, 2)
    assert client.info.input_shape == expected
    assert client.labels == (0, 1)


def test_axes_of_an_image_are_not_mixed_up(write: Write) -> None:
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as pil

    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    columns = {"image": [pil.fromarray(p) for p in pixels], "label": [0, 1, 0, 1, 0]}
    folder = write({"train": images(9, (4, 6, 3)), "test": Dataset.from_dict(columns, features=features)})
    test = load_server(DataConfig(dataset=folder)).test
    assert torch.equal(test.inputs, torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255))


def test_arrays_stay_as_they_are(write: Write) -> None:
    from datasets import Array2D, Dataset, Features, Value

    values = np.random.default_rng(0).normal(size=(40, 3, 200)).astype(np.float32)
    features = Features({"x": Array2D((3, 200), "float32"), "y": Value("int32"), "subject": Value("string")})
    columns = {
        "x": list(values),
        "y": [i % 3 for i in range(40)],
        "subject": [f"s{i % 4}" for i in range(40)],
    }
    train = Dataset.from_dict(columns, features=features)
    folder = write({"train": train, "test": train.select(range(10))})
    config = DataConfig(dataset=folder, partition="natural", id_column="subject", proxy_fraction=0.0)
    server = load_server(config)
    assert server.info.input_shape == (3, 200)
    assert server.info.label_names == ("0", "1", "2")
    assert np.array_equal(server.test.inputs.numpy(), values[:10])
    assert sum(len(load_client(config, i, 4).labels) > 0 for i in range(4)) == 4
    with pytest.raises(ValueError, match="'subject' has 4 ids, fewer than the 5 clients"):
        load_client(config, 0, 5)
    with pytest.raises(ValueError, match=r"no column 'user' \(id-column\); columns: x, y, subject"):
        load_client(DataConfig(dataset=folder, partition="natural", id_column="user"), 0, 2)


def test_a_parquet_file_and_a_saved_table_are_training_splits(write: Write, tmp_path: Path) -> None:
    folder = write({"train": vectors(0, 50)})
    vectors(0, 50).save_to_disk(str(tmp_path / "table"))
    for path in (f"{folder}/train-0.parquet", str(tmp_path / "table")):
        assert dataset_info(DataConfig(dataset=path)).num_train == 36  # 50 less 10 test and 4 proxy


def test_own_folder_is_all_the_clients_and_no_servers(write: Write) -> None:
    own = write({"train": vectors(700, 720), "test": vectors(0, 4)})
    config = DataConfig(data_path=own, validation_fraction=0.2)
    client = load_client(config, 3, 10)
    assert sorted(numbers(client.train) + numbers(client.validation)) == list(range(700, 720))
    assert client.info.num_train == 20
    assert len(client.validation.labels) == 4
    assert load_server(config).info.input_shape == (1, 8, 8)
    with pytest.raises(ValueError, match="data-path 'nowhere': there is no such folder"):
        load_client(DataConfig(data_path="nowhere"), 0, 1)


# --- columns --------------------------------------------------------------------------------------------


def test_columns_that_are_not_clear_are_listed_and_can_be_named(write: Write) -> None:
    more = {"z": [[float(i), 1.0] for i in range(40)], "note": ["n"] * 40}
    folder = write({"train": vectors(0, 40, **more)})
    with pytest.raises(ValueError, match=r"several columns could be the image-column; .* z \(list of float64\)"):
        load_server(DataConfig(dataset=folder))
    server = load_server(DataConfig(dataset=folder, image_column="z"))
    assert set(server.test.inputs[:, 1].tolist()) == {1.0}
    with pytest.raises(ValueError, match=r"no column 'w' \(image-column\).*label \(ClassLabel\), .*note \(string\)"):
        load_server(DataConfig(dataset=folder, image_column="w"))
    with pytest.raises(ValueError, match=r"image-column 'note' .* must hold images or arrays"):
        load_server(DataConfig(dataset=folder, image_column="note"))
    with pytest.raises(ValueError, match=r"label-column 'note' .* must hold class labels or integers"):
        load_server(DataConfig(dataset=folder, image_column="z", label_column="note"))


def test_label_column_by_type_then_by_name(write: Write) -> None:
    from datasets import Dataset

    inputs = [[float(i)] for i in range(20)]
    usual = Dataset.from_dict({"x": inputs, "fine_label": [1] * 20, "coarse_label": [0] * 20, "age": [9] * 20})
    assert set(load_server(DataConfig(dataset=write({"train": usual}))).test.labels.tolist()) == {1}
    unusual = usual.remove_columns("fine_label")
    folder = write({"train": unusual})
    with pytest.raises(ValueError, match=r"no column looks like the label-column; .* age \(int64\)"):
        load_server(DataConfig(dataset=folder))
    assert load_server(DataConfig(dataset=folder, label_column="age")).info.num_classes == 10


def test_labels_that_are_missing_are_refused(write: Write) -> None:
    from datasets import Dataset

    for labels in ([0] * 19 + [-1], [0] * 19 + [None]):
        table = Dataset.from_dict({"x": [[1.0]] * 20, "label": labels})
        with pytest.raises(ValueError, match="'label' has rows without a label"):
            load_server(DataConfig(dataset=write({"train": table})))


def test_inputs_that_do_not_fit_together_are_refused(write: Write) -> None:
    from datasets import Dataset, concatenate_datasets

    cases = {
        "lengths differ": Dataset.from_dict({"x": [[1.0]] * 19 + [[1.0, 2.0]], "label": [0] * 20}),
        "finite numbers": Dataset.from_dict({"x": [[1.0]] * 19 + [[float("nan")]], "label": [0] * 20}),
        r"different shapes, .*\(1, 5, 6\)": concatenate_datasets([images(19), images(1, (5, 6))]),
        "several columns|no column looks like": Dataset.from_dict({"x": [1.0] * 20, "label": [0] * 20}),
    }
    for message, table in cases.items():
        config = DataConfig(dataset=write({"train": table}), partition="iid", proxy_fraction=0.5)
        with pytest.raises(ValueError, match=message):
            all_samples(config, 1)


def test_train_and_test_of_different_shapes_are_refused(write: Write) -> None:
    folder = write({"train": images(20), "test": images(5, (5, 6))})
    with pytest.raises(ValueError, match=r"different shapes, \(1, 4, 6\) and \(1, 5, 6\)"):
        load_server(DataConfig(dataset=folder))


# --- where data are -------------------------------------------------------------------------------------


def test_mirror_holds_names_and_known_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXFED_DATA", str(tmp_path))
    (tmp_path / "fashion-mnist" / "parquet").mkdir(parents=True)
    expected = str(tmp_path / "fashion-mnist" / "parquet")
    assert locate("fashion-mnist/parquet") == locate("zalando-datasets/fashion_mnist") == expected
    assert locate("uoft-cs/cifar10") == "uoft-cs/cifar10"
    monkeypatch.delenv("FLEXFED_DATA")
    assert locate("fashion-mnist/parquet") == "fashion-mnist/parquet"


def test_a_stray_folder_does_not_shadow_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "uoft-cs" / "cifar10").mkdir(parents=True)
    monkeypatch.delenv("FLEXFED_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"hub name and also a folder here; for the folder write {tmp_path}"):
        locate("uoft-cs/cifar10")
    assert locate("./uoft-cs/cifar10") == str(tmp_path / "uoft-cs" / "cifar10")
    with pytest.raises(ValueError, match=r"dataset '\./nothing': there is no such folder"):
        locate("./nothing")


def test_without_network_the_error_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.delenv("FLEXFED_DATA", raising=False)
    message = "'some/set' could not be loaded; tried .*FLEXFED_DATA.*Couldn't reach the Hub.*absolute path"
    with pytest.raises(ValueError, match=message):
        load_server(DataConfig(dataset="some/set"))


def test_a_folder_without_training_samples_is_refused(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs a split 'train' with samples; it has 'test' \(5\)"):
        load_server(DataConfig(dataset=write({"test": vectors(0, 5)})))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"could not be loaded; tried the folder or file .*empty"):
        load_server(DataConfig(dataset=str(tmp_path / "empty")))


# --- configuration and normalisation --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dataset": ""}, "dataset must be"),
        (
            {"partition": "dirchlet"},
            "unknown partition 'dirchlet'; known: dirichlet, iid, natural, pathological",
        ),
        ({"partition": "natural"}, "needs id-column"),
        ({"alpha": 0.0}, "alpha must be a number > 0, got 0"),
        ({"alpha": float("nan")}, "alpha must be a number > 0, got nan"),
        ({"classes_per_client": 0}, "classes-per-client must be a whole number >= 1, got 0"),
        ({"min_partition_size": 0}, "min-partition-size must be a whole number >= 1, got 0"),
        ({"seed": -1}, "seed must be a whole number >= 0, got -1"),
        ({"validation_fraction": 1.0}, r"validation-fraction must be in \[0, 1\), got 1"),
        ({"proxy_fraction": -0.1}, r"proxy-fraction must be in \[0, 1\), got -0.1"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**wrong)


@pytest.mark.parametrize("shape", [(50, 3, 4, 5), (50, 3, 7), (50, 3)])
def test_normalised_samples_have_mean_zero_and_deviation_one(shape: tuple[int, ...]) -> None:
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4 + 2
    samples = Samples(inputs, torch.zeros(50, dtype=torch.int64))
    mean, std = normalisation(samples)
    axes = tuple(axis for axis in range(len(shape)) if axis != 1)
    assert np.allclose(mean, inputs.numpy().mean(axis=axes), atol=1e-5)
    assert np.allclose(std, inputs.numpy().std(axis=axes), atol=1e-5)
    again = normalisation(normalise(samples, mean, std))
    assert np.allclose(again[0], 0, atol=1e-6)
    assert np.allclose(again[1], 1, atol=1e-6)
    assert normalise(samples, mean, std).inputs.dtype == torch.float32


def test_a_constant_channel_is_only_centred() -> None:
    samples = Samples(torch.full((4, 2), 7.0), torch.zeros(4, dtype=torch.int64))
    assert normalisation(samples) == ((7.0, 7.0), (1.0, 1.0))


def test_normalisation_refuses_no_samples_and_other_channels() -> None:
    with pytest.raises(ValueError, match="no samples; set proxy-fraction > 0"):
        normalisation(Samples(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"\(3, 4\) need 3 means and deviations, got 1 and 1"):
        normalise(Samples(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64)), (0.0,), (1.0,))


# --- the mirror -----------------------------------------------------------------------------------------

# Sizes printed by the call in the mirror's README:
#   DirichletPartitioner(num_partitions=20, partition_by="label", alpha=0.3, min_partition_size=10,
#                        self_balancing=False, seed=42) on the whole training split
CIFAR10_SIZES = "3968 1467 1540 2302 4216 1226 1094 4890 3035 3205 2658 3802 2202 1607 949 1286 812 2358 5262 2121"
FASHION_SIZES = "4764 1760 1848 2760 5061 1469 1311 5868 3647 3847 3186 4565 2640 1932 1135 1545 974 2830 6313 2545"


@needs_mirror
@pytest.mark.parametrize(
    ("name", "sizes"), [("uoft-cs/cifar10", CIFAR10_SIZES), ("zalando-datasets/fashion_mnist", FASHION_SIZES)]
)
def test_dirichlet_sizes_are_those_of_a_hub_run(name: str, sizes: str) -> None:
    config = DataConfig(dataset=name, partition_balance=False, seed=42)
    parts = partition_rows(config, source(name, "", "", "").train.labels, None, 20)
    assert [len(part) for part in parts] == [int(size) for size in sizes.split()]


@needs_mirror
def test_fashion_mnist_has_its_published_statistics() -> None:
    client = load_client(DataConfig(dataset="fashion-mnist/parquet", partition="iid"), 0, 20)
    assert client.info.input_shape == (1, 28, 28)
    assert client.info.num_train == 59_000
    mean, std = normalisation(client.train)
    assert abs(mean[0] - 0.2860) < 0.01
    assert abs(std[0] - 0.3530) < 0.01


@needs_mirror
def test_cifar10_mirror_is_called_lossy(caplog: pytest.LogCaptureFixture) -> None:
    from flexfed.data import sources

    sources._table_source.cache_clear()
    with caplog.at_level("WARNING", logger="flwr"):
        info = dataset_info(DataConfig(dataset="uoft-cs/cifar10", subset="plain_text"))
    assert info.input_shape == (3, 32, 32)
    assert info.label_names[0] == "airplane"
    assert "lossy" in caplog.text


@needs_mirror
def test_wisdm_clients_are_its_users() -> None:
    config = DataConfig(dataset="wisdm-watch-accel", partition="natural", id_column="subject_id")
    client = load_client(config, 45, 46)
    assert client.train.inputs.shape[1:] == (3, 200)
    assert client.info.num_classes == 18
    assert 150 < len(client.train.labels) + len(client.validation.labels) <= 278
    with pytest.raises(ValueError, match="46 ids, fewer than the 47 clients"):
        load_client(config, 0, 47)
