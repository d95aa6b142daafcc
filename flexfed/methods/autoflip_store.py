"""Where a server keeps what AutoFLIP's explorers found."""

from __future__ import annotations

from pathlib import Path

from flexfed.tensorfile import read_tensors, write_tensors
from flexfed.units import Arrays

FORMAT = "flexfed exploration 1"


class DeviationStore:
    """What each explorer found, on disk: one is as large as the network. In memory where there is no folder.

    Args:
        folder: made at the first one that is put.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._held: dict[int, Arrays] = {}

    def put(self, partition: int, deviations: Arrays) -> None:
        """Keep an explorer's."""
        if self._folder is None:
            self._held[partition] = {name: array.copy() for name, array in deviations.items()}
        else:
            write_tensors(self._path(self._folder, partition), FORMAT, "", deviations)

    def get(self, partition: int) -> Arrays:
        """Find it again.

        Raises:
            ValueError: its file is missing or damaged.
        """
        if self._folder is None:
            return self._held[partition]
        return read_tensors(self._path(self._folder, partition), FORMAT)[1]

    def _path(self, folder: Path, partition: int) -> Path:
        return folder / f"{partition:06d}.safetensors"
