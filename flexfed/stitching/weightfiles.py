"""Some tensors of a weight file, without reading the others: safetensors, and what torch.save writes."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flexfed.runs import replacing

_COUNTER = "num_batches_tracked"  # of batch norm; plays no part in eval mode, and many files lack it
_HELD_BYTES = 1 << 20  # read of a file before it is opened anew


def read_some(path: Path, like: Mapping[str, Tensor], renamed: Callable[[str], str] = str) -> dict[str, Tensor]:
    """Copies of some tensors of a file; counters of batch norm that it lacks are zero.

    Args:
        path: a .safetensors file, or one of torch.save in its present (zip) form.
        like: name -> a tensor of the expected shape and type, on any device.
        renamed: what a tensor is called in the file that is not there under its own name.

    Raises:
        ValueError: no such file, one that cannot be read, or a tensor that is missing or has another shape.
    """
    with _opened(path) as get:
        return {name: _fitting(path, name, _either(get, name, renamed(name)), like[name]) for name in like}


def _either(get: _Get, name: str, other: str) -> Tensor | None:
    found = get(name)
    return get(other) if found is None else found


def _fitting(path: Path, name: str, value: Tensor | None, expected: Tensor) -> Tensor:
    if value is None and name.endswith(_COUNTER):
        value = torch.zeros(expected.shape)
    if value is None:
        raise ValueError(f"weight file {path} is of another network: it has no tensor {name!r}")
    if value.shape != expected.shape:
        raise ValueError(
            f"weight file {path} is of another network: {name!r} has shape {tuple(value.shape)}, "
            f"expected {tuple(expected.shape)}"
        )
    return value.to(expected.dtype, copy=True)


_Get = Callable[[str], Tensor | None]
"""Name -> tensor of an open file; None where it has none of that name."""


@contextmanager
def _opened(path: Path) -> Iterator[_Get]:
    if not path.is_file():
        raise ValueError(f"weight file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            yield _Reader(path).get
        else:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            yield state.get
    except (OSError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise ValueError(f"weight file {path} cannot be read, it may be truncated: {error}") from error


class _Reader:
    """Copies of single tensors; the file is closed between them where they are large.

    A file that stays open keeps in memory all that was read of it, which would double a block.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open()

    def _open(self) -> None:
        file: Any = safe_open(self._path, framework="np")
        self._file = file
        self._names, self._num_bytes = frozenset(file.keys()), 0

    def get(self, name: str) -> Tensor | None:
        if name not in self._names:
            return None
        if self._num_bytes > _HELD_BYTES:
            self._open()
        tensor = torch.from_numpy(self._file.get_tensor(name))
        self._num_bytes += tensor.nbytes
        return tensor


def in_parts(path: Path, folder: Path) -> Path:
    """A file of which single tensors can be read: this one, or a copy of one in torch.save's old form.

    The old form can be read only as a whole, so that is done once; the copy is kept in `folder`.

    Raises:
        ValueError: it cannot be read.
    """
    if path.suffix == ".safetensors" or zipfile.is_zipfile(path):
        return path
    stat = path.stat()
    copy = folder / f"{path.stem}-{stat.st_size}-{stat.st_mtime_ns}.safetensors"
    if not copy.is_file():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a pickle fails in many ways
            raise ValueError(f"weight file {path} cannot be read: {error}") from error
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(copy) as beside:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, beside)
    return copy
