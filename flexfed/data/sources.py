"""Where data come from: the built-in digits and shapes, a local folder, or the Hugging Face hub."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flexfed.data import columns, shapes

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

# Folders of an offline mirror, below $FLEXFED_DATA; other sets are looked up there under their own name.
MIRRORS = {"zalando-datasets/fashion_mnist": "fashion-mnist/parquet", "uoft-cs/cifar10": "cifar10-jpeg"}
LOSSY_MIRRORS = ("cifar10-jpeg",)
TEST_SPLITS = ("test", "validation", "valid", "val")

_LOGGER = logging.getLogger("flwr")
_FIXED_SEED = 0  # of the splits that must not depend on a run's seed
_TEST_FRACTION = 0.2


@dataclass(frozen=True, eq=False)
class Split:
    """Samples by row number, decoded only when asked for.

    Attributes:
        labels: int64 (n,).
        inputs: row numbers -> float32 (rows, ...), raw; images in [0, 1], channels first.
        ids: column name -> its values.
    """

    labels: np.ndarray
    inputs: Callable[[np.ndarray], np.ndarray]
    ids: Callable[[str], Sequence[Any]]


@dataclass(frozen=True, eq=False)
class Source:
    """A data set: all its training samples, those that belong to no client included.

    Attributes:
        train: the split of the clients and the proxy samples (and the test samples, where `test` is None).
        test: the test split, or None.
        num_proxy: a fixed number of proxy samples, or None.
        num_classes: labels are below it.
        label_names: one name per class.
    """

    train: Split
    test: Split | None
    num_proxy: int | None
    num_classes: int
    label_names: tuple[str, ...]


def fixed_permutation(size: int) -> np.ndarray:
    """The same shuffled order of 0..size-1 in every run, whatever its seed."""
    return np.random.default_rng(_FIXED_SEED).permutation(size)


def source(dataset: str, subset: str, image_column: str, label_column: str) -> Source:
    """Open a data set; little more than its labels is read, and a second call in this process is free.

    Raises:
        ValueError: it cannot be found or read, or its columns are not clear.
    """
    if dataset in BUILT_IN:
        return BUILT_IN[dataset]()
    location = locate(dataset)
    subset = subset if location == dataset or dataset not in MIRRORS else ""  # the mirror has no subsets
    return _table_source(dataset, location, subset, image_column, label_column)


def server_rows(data: Source, proxy_fraction: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training rows in three disjoint parts: the server's proxy, test (none if there is a split), clients.

    The same in every run: first 20 % for the test where it is missing, then `proxy_fraction` of the rest,
    at most 1,000; both are drawn without regard to labels.
    """
    rows = fixed_permutation(len(data.train.labels))
    num_test = 0 if data.test is not None else int(_TEST_FRACTION * len(rows))
    num_rest = len(rows) - num_test
    num_proxy = min(int(proxy_fraction * num_rest), 1000) if data.num_proxy is None else data.num_proxy
    test, proxy, clients = np.split(rows, [num_test, num_test + num_proxy])
    return proxy, test, np.sort(clients)


def locate(dataset: str) -> str:
    """Where a data set that is not built in is: an absolute path, or the name itself if it must be on the hub.

    A path begins with /, ~ or a dot. A name is looked for below $FLEXFED_DATA first.

    Raises:
        ValueError: the path does not exist, or a folder in the working directory would shadow the hub's set.
    """
    path = Path(dataset).expanduser()
    if path.is_absolute() or dataset.startswith("."):
        if not path.exists():
            raise ValueError(f"dataset {dataset!r}: there is no such folder or file; give its absolute path")
        return str(path.resolve())
    mirror = _mirror(dataset)
    if mirror is None and path.exists():
        raise ValueError(
            f"dataset {dataset!r} is a hub name and also a folder here; for the folder write {path.resolve()}"
        )
    return dataset if mirror is None else str(mirror)


def own_folder(data_path: str) -> str:
    """A client's own folder or parquet file as an absolute path.

    Raises:
        ValueError: it does not exist.
    """
    path = Path(data_path).expanduser().resolve()
    if not path.exists():
        raise ValueError(f"data-path {data_path!r}: there is no such folder or file ({path}); give its absolute path")
    return str(path)


def _mirror(dataset: str) -> Path | None:
    root = os.environ.get("FLEXFED_DATA", "")
    folder = MIRRORS.get(dataset, dataset)
    path = Path(root).expanduser().resolve() / folder
    return path if root and path.exists() else None


@lru_cache(maxsize=1)
def _digits() -> Source:
    """Scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: 1,200 for clients, 150 proxy, 447 test.

    Shuffled with a fixed seed, not stratified; a run's seed plays no part.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.asarray(digits.images / 16, dtype=np.float32)[:, None]
    targets = np.asarray(digits.target, dtype=np.int64)
    order = fixed_permutation(len(targets))
    train, test = (_array_split("digits", images[rows], targets[rows]) for rows in np.split(order, [1350]))
    return Source(train, test, 150, 10, tuple(str(name) for name in digits.target_names))


@lru_cache(maxsize=1)
def _shapes() -> Source:
    """Procedural images of 3 x 24 x 24 (`flexfed.data.shapes`): 400 of each of 10 classes, and 100 to test.

    The classes that the zoo "shapes" was not trained on, in order of their ids. The same in every run.
    """
    ids, rng = shapes.FEDERATED_IDS, np.random.default_rng([_FIXED_SEED, 2])
    train, test = (_array_split("shapes", *shapes.balanced_images(ids, count, rng)) for count in (400, 100))
    return Source(train, test, None, len(ids), tuple(shapes.class_name(number) for number in ids))


BUILT_IN: dict[str, Callable[[], Source]] = {"digits": _digits, "shapes": _shapes}
"""Data sets that need no files."""


def _array_split(dataset: str, inputs: np.ndarray, labels: np.ndarray) -> Split:
    def ids(column: str) -> Sequence[Any]:
        raise ValueError(f"dataset {dataset!r} has no column {column!r} (id-column); use another partition")

    return Split(labels, inputs.__getitem__, ids)


@lru_cache(maxsize=4)
def _table_source(dataset: str, location: str, subset: str, image_column: str, label_column: str) -> Source:
    tables = _read(dataset, location, subset)
    where = f"dataset {dataset!r}"
    if not len(tables.get("train", ())):
        raise ValueError(f"{where} needs a split 'train' with samples; it has {_sizes(tables)}")
    train = tables["train"]
    inputs = columns.input_column(train.features, image_column, where)
    label = columns.label_column(train.features, label_column, where)
    test_name = next((name for name in TEST_SPLITS if len(tables.get(name, ()))), None)
    splits = [_table_split(tables[name], inputs, label) for name in ("train", test_name) if name]
    shapes = [split.inputs(np.array([0])).shape[1:] for split in splits]
    if len(set(shapes)) > 1:
        raise columns.shape_error(inputs, *shapes)
    names = _label_names(train.features[label], [split.labels for split in splits], where)
    return Source(splits[0], splits[1] if test_name else None, None, len(names), names)


def _sizes(tables: DatasetDict) -> str:
    return ", ".join(f"{name!r} ({len(table)})" for name, table in tables.items()) or "none"


def _table_split(table: Dataset, inputs: str, label: str) -> Split:
    def ids(column: str) -> Sequence[Any]:
        if column not in table.features:
            raise ValueError(f"there is no column {column!r} (id-column); columns: {', '.join(table.features)}")
        return list(table.select_columns([column]).with_format(None)[:][column])

    return Split(columns.labels(table, label), columns.Inputs(table, inputs), ids)


def _label_names(feature: Any, labels: Sequence[np.ndarray], where: str) -> tuple[str, ...]:
    """The names of the class labels, or "0", "1", ... up to the largest integer."""
    largest = max(int(values.max()) for values in labels)
    names = tuple(getattr(feature, "names", None) or map(str, range(largest + 1)))
    if largest >= len(names):
        raise ValueError(f"{where} has {len(names)} class names but the label {largest}")
    return names


def _read(dataset: str, location: str, subset: str) -> DatasetDict:
    """All splits of a data set, memory-mapped."""
    import datasets

    datasets.disable_progress_bars()
    _log_place(dataset, location)
    try:
        tables = _load(location, subset)
    except Exception as error:  # whatever the libraries raise: the user needs what was tried
        raise ValueError(_not_loaded(dataset, location, error)) from error
    return datasets.DatasetDict({"train": tables}) if isinstance(tables, datasets.Dataset) else tables


def _load(location: str, subset: str) -> Any:
    import datasets

    path = Path(location)
    if not path.is_absolute():
        return datasets.load_dataset(location, subset or None)
    if path.suffix == ".parquet" and path.is_file():
        return datasets.load_dataset("parquet", data_files={"train": str(path)})
    # load_dataset reads a save_to_disk folder's side files as a data set of one row, without an error.
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset(str(path), subset or None)


def _log_place(dataset: str, location: str) -> None:
    if not Path(location).is_absolute():
        _LOGGER.info("dataset %r: from the Hugging Face hub or its cache", dataset)
    elif location.endswith(LOSSY_MIRRORS):
        _LOGGER.warning("dataset %r: using a lossy JPEG mirror; accuracies are not the data set's", dataset)


def _not_loaded(dataset: str, location: str, error: Exception) -> str:
    if Path(location).is_absolute():
        tried = f"the folder or file {location}"
    else:
        mirror = os.environ.get("FLEXFED_DATA") or "not set"
        tried = f"the mirror named by the variable FLEXFED_DATA ({mirror}), the Hugging Face hub and its cache"
    return (
        f"dataset {dataset!r} could not be loaded; tried {tried} ({type(error).__name__}: {error}). "
        'Without network use "digits", or give the absolute path of a folder with train-*.parquet and '
        "test-*.parquet, or one written by save_to_disk"
    )
