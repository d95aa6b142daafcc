"""Named arrays and a text in one safetensors file: written whole or not at all, and never believed when damaged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flexfed.runs import replacing
from flexfed.units import Arrays

_ENTRY = "flexfed"  # of the file's metadata


def write_tensors(path: Path, form: str, text: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a file; what kills at such a moment left beside it is swept away.

    Args:
        path: its folder is made where it is missing.
        form: what the file is.
        text: anything, JSON as a rule.
        tensors: of any type and shape.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(".*.tmp"):
        left.unlink(missing_ok=True)
    dense = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    with replacing(path) as beside:
        save_file(dense, beside, metadata_of(form, text, dense))


def metadata_of(form: str, text: str, tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """What makes a safetensors file one that `read_tensors` reads.

    One entry: safetensors writes several in an order that changes from process to process.
    """
    told = {"format": form, "text": text, "digest": _digest(text, tensors)}
    return {_ENTRY: json.dumps(told)}


def read_tensors(path: Path, form: str) -> tuple[str, Arrays]:
    """The text and the arrays of a file that `write_tensors` made.

    Raises:
        ValueError: no such file, truncated, changed, or something else; names the file.
    """
    metadata, tensors = open_tensors(path)
    metadata = json.loads(metadata.get(_ENTRY, "{}"))
    if metadata.get("format") != form:
        raise ValueError(f"{path} is no {form}: its format is {metadata.get('format')!r}")
    if metadata.get("digest") != _digest(metadata.get("text", ""), tensors):
        raise ValueError(f"{path} is damaged: its digest is not that of its content")
    return metadata["text"], tensors


def open_tensors(path: Path) -> tuple[dict[str, str], Arrays]:
    """The metadata and the arrays of any safetensors file.

    Raises:
        ValueError: no such file, or one that cannot be read; names it.
    """
    try:
        with safe_open(path, framework="np") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read, it may be truncated: {error}") from error


def _digest(text: str, tensors: Mapping[str, np.ndarray]) -> str:
    """It tells damage that leaves the file readable."""
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(tensors.items()):
        digest.update(f"\0{name}\0{array.dtype}{array.shape}\0".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
