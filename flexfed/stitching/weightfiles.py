"""Some tensors of a weight file, without reading the others: safetensors, and what torch.save writes."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flexfed.runs import replacing

_COUNTER = "num_batches_tracked"  # of batch norm; plays no part in eval mode, and many files lack it


def read_some(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of some tensors of a file; counters of batch norm that it lacks are zero.

    Args:
        path: a .safetensors file, or one of torch.save in its present (zip) form.
        like: name in the file -> a tensor of the expected shape and type, on any device.

    Raises:
        ValueError: no such file, one that cannot be read, or a tensor that is missing or has another shape.
    """
    found: dict[str, Tensor] = {}
    with _opened(path) as tensors:
        for name, expected in like.items():
            value = tensors(name)
            if value is None and name.endswith(_COUNTER):
                value = torch.zeros(expected.shape)
            if value is None:
                raise ValueError(f"weight file {path} is of another network: it has no tensor {name!r}")
            if value.shape != expected.shape:
                raise ValueError(
                    f"weight file {path} is of another network: {name!r} has shape {tuple(value.shape)}, "
                    f"expected {tuple(expected.shape)}"
                )
            found[name] = value.to(expected.dtype, copy=True)
    return found


class _Tensors:
    """Tensors of an open file by name; None for a name that it lacks."""

    def __init__(self, names: set[str], get: object) -> None:
        self._names = names
        self._get = get

    def __call__(self, name: str) -> Tensor | None:
        return self._get(name) if name in self._names else None  # type: ignore[operator]


@contextmanager
def _opened(path: Path) -> Iterator[_Tensors]:
    if not path.is_file():
        raise ValueError(f"weight file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                yield _Tensors(set(file.keys()), file.get_tensor)
        else:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            yield _Tensors(set(state), state.__getitem__)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"weight file {path} cannot be read, it may be truncated: {error}") from error


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
