"""Columns of a `datasets` table: which one holds inputs or labels, and their decoding to numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

LABEL_NAMES = ("label", "labels", "fine_label", "y", "target", "targets", "class")
CHUNK = 1000  # rows decoded at a time, so that few images exist as Python objects at once

_NUMBERS = ("int", "uint", "float")
_SAMPLED_MODES = 64


class Inputs:
    """The input column of a table, decoded row by row on first use and kept.

    Images are kept as uint8 (n, channels, height, width) and returned scaled to [0, 1]; arrays are kept and
    returned as they are. Memory is taken by the rows that were asked for only.
    """

    def __init__(self, table: Dataset, column: str) -> None:
        """Open the column; decodes the first row for its shape."""
        from datasets import Image

        is_image = isinstance(table.features[column], Image)
        self._decode = _image_decoder(table, column) if is_image else _array_decoder(table, column)
        self._scale = np.float32(255.0 if is_image else 1.0)
        first = self._decode(np.array([0]))
        self._column = column
        self._values: np.ndarray = np.empty((len(table), *first.shape[1:]), first.dtype)
        self._known = np.zeros(len(table), dtype=bool)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        return tuple(self._values.shape[1:])

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Inputs of `rows`, float32 (n, ...).

        Raises:
            ValueError: a row has another shape than the first one, is missing, or is not finite.
        """
        missing = np.unique(rows[~self._known[rows]])
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            decoded = self._decode(chunk)
            if decoded.shape[1:] != self.shape:
                raise shape_error(self._column, self.shape, decoded.shape[1:])
            self._values[chunk] = decoded
            self._known[chunk] = True
        values: np.ndarray = self._values[rows].astype(np.float32)
        values /= self._scale
        return values


def input_column(features: Mapping[str, Any], named: str, where: str) -> str:
    """The column of the inputs: the named one, or the only one with images or arrays of numbers.

    Raises:
        ValueError: no such column, of another type, or not exactly one candidate.
    """
    if named:
        return _named(features, named, _is_input, "image-column", "images or arrays of numbers", where)
    return _only([c for c in features if _is_input(features[c])], features, "image-column", where)


def label_column(features: Mapping[str, Any], named: str, where: str) -> str:
    """The column of the labels: the named one, else the only ClassLabel, else integers with a usual name.

    Of several class labels the one with a usual name wins (CIFAR-100's fine_label over its coarse_label).

    Raises:
        ValueError: no such column, of another type, or not exactly one candidate.
    """
    from datasets import ClassLabel

    if named:
        return _named(features, named, _is_label, "label-column", "class labels or integers", where)
    classes = [c for c in features if isinstance(features[c], ClassLabel)]
    candidates = classes or [c for c in features if _is_label(features[c])]
    usual = [c for c in candidates if c in LABEL_NAMES]
    return _only(classes if len(classes) == 1 else usual, features, "label-column", where)


def labels(table: Dataset, column: str) -> np.ndarray:
    """Labels of all rows, int64 (n,).

    Raises:
        ValueError: a label is missing or negative.
    """
    values = np.asarray(table.select_columns([column]).with_format("numpy")[:][column])
    if len(values) and (values.dtype.kind not in "iu" or values.min() < 0):
        raise ValueError(f"label-column {column!r} has rows without a label (missing or negative); remove them first")
    return values.astype(np.int64)


def shape_error(column: str, expected: tuple[int, ...], got: tuple[int, ...]) -> ValueError:
    """The error for inputs that do not all have one shape."""
    return ValueError(
        f"image-column {column!r} holds inputs of different shapes, {expected} and {got}; bring them to one shape first"
    )


def _is_input(feature: Any) -> bool:
    from datasets import Array2D, Array3D, Array4D, Array5D, Image

    if isinstance(feature, (Image, Array2D, Array3D, Array4D, Array5D)):
        return True
    return feature is not _innermost(feature) and _is_number(_innermost(feature))


def _is_label(feature: Any) -> bool:
    from datasets import ClassLabel

    return isinstance(feature, ClassLabel) or (_is_number(feature) and not feature.dtype.startswith("float"))


def _is_number(feature: Any) -> bool:
    from datasets import Value

    return isinstance(feature, Value) and feature.dtype.startswith(_NUMBERS)


def _innermost(feature: Any) -> Any:
    """What a nested list is made of; the feature itself if it is no list."""
    from datasets import LargeList, List

    while isinstance(feature, (List, LargeList)):
        feature = feature.feature
    return feature


def _named(
    features: Mapping[str, Any], name: str, fits: Callable[[Any], bool], key: str, expected: str, where: str
) -> str:
    if name not in features:
        raise ValueError(f"{where} has no column {name!r} ({key}); its columns: {_describe(features)}")
    if not fits(features[name]):
        raise ValueError(f"{key} {name!r} of {where} must hold {expected}; its columns: {_describe(features)}")
    return name


def _only(candidates: list[str], features: Mapping[str, Any], key: str, where: str) -> str:
    if len(candidates) != 1:
        found = "several columns could be" if candidates else "no column looks like"
        raise ValueError(f"{where}: {found} the {key}; name it with {key}; its columns: {_describe(features)}")
    return candidates[0]


def _describe(features: Mapping[str, Any]) -> str:
    return ", ".join(f"{column} ({_type_name(feature)})" for column, feature in features.items())


def _type_name(feature: Any) -> str:
    inner = _innermost(feature)
    if inner is not feature:
        return f"list of {_type_name(inner)}"
    return str(getattr(feature, "dtype", "")) if type(feature).__name__ == "Value" else type(feature).__name__


def _array_decoder(table: Dataset, column: str) -> Callable[[np.ndarray], np.ndarray]:
    view = table.select_columns([column]).with_format("numpy")

    def decode(rows: np.ndarray) -> np.ndarray:
        values = view[rows][column]
        if values.dtype == object:
            raise ValueError(f"image-column {column!r} must hold arrays of one shape; lengths differ or are missing")
        if not np.isfinite(values).all():
            raise ValueError(f"image-column {column!r} must hold finite numbers; some are missing, infinite or NaN")
        return np.asarray(values, dtype=np.float32)

    return decode


def _image_decoder(table: Dataset, column: str) -> Callable[[np.ndarray], np.ndarray]:
    view = table.select_columns([column])
    grey = _is_grey(view, column)

    def decode(rows: np.ndarray) -> np.ndarray:
        images = [_pixels(image, grey, column) for image in view[rows][column]]
        shapes = {image.shape for image in images}
        if len(shapes) > 1:
            raise shape_error(column, *sorted(shapes)[:2])
        return np.stack(images)

    return decode


def _is_grey(view: Dataset, column: str) -> bool:
    """Whether the images have one channel: all of a spread sample do.

    A sample, because sets such as Tiny ImageNet hold some grey images among the coloured ones.
    """
    rows = np.unique(np.linspace(0, len(view) - 1, _SAMPLED_MODES).astype(int))
    return all(_one_channel(image, column) for image in view[rows][column])


def _one_channel(image: Image | None, column: str) -> bool:
    if image is None:
        raise ValueError(f"image-column {column!r} has rows without an image; remove them first")
    if image.mode in ("L", "1"):
        return True
    if image.mode in ("RGB", "RGBA", "P", "LA", "PA", "CMYK", "YCbCr"):
        return False
    raise ValueError(f"image-column {column!r} has an image of mode {image.mode!r}; expected 8-bit grey or colour")


def _pixels(image: Image | None, grey: bool, column: str) -> np.ndarray:
    """One image as uint8 (channels, height, width)."""
    one_channel = _one_channel(image, column)
    assert image is not None  # refused just before
    if grey and not one_channel:
        raise ValueError(f"image-column {column!r} mixes grey and coloured images; convert them to one mode first")
    pixels = np.asarray(image.convert("L" if grey else "RGB"))
    return pixels[None] if grey else pixels.transpose(2, 0, 1)
