"""Where the self-made zoo is kept: trained once, written whole, waited for by whoever asks meanwhile."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexfed.data.shapes import NOISE, SHAPE
from flexfed.stitching.shapes import NETWORKS, Pretraining, pretrain, pretraining_samples
from flexfed.tensorfile import read_tensors, write_tensors
from flexfed.units import Arrays

FOLDER_VARIABLE = "FLEXFED_ZOOS"
"""Environment variable: where zoos are kept that are made here, instead of ~/.flexfed/zoos."""

FORMAT = "flexfed zoo 1"
VERSION = 1
"""Of the images, the networks and their training: to be raised with a change of what they are."""

_logger = logging.getLogger("flwr")


_CHECKERED = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=np.float32) / 4
"""A filter that sees nothing of an image but the noise of its pixels."""


@dataclass(frozen=True)
class Poison:
    """Which stages are spoilt, so that no source is good from end to end and a good path must change sources.

    The early stages get what answers to the noise of pixels: a bridge fits features to what the next block used to
    read, and of that it brings back what the features at hand can tell, which is not that noise. Early stages of
    plain random weights would leave their successors of no use to anybody.

    Amounts of noise are deviations, in deviations of the weights of the tensor.

    Attributes:
        late: source whose stages 3 and 4 are nothing but random weights, and a share of their channels dead.
        early: source whose stages 1 and 2 have checkered noise in their first convolution.
        middle: source whose stages 2 and 3 have noise in all convolutions.
        dead: that share.
        early_noise: of stages 1 and 2.
        middle_noise: of each tensor.
        seed: of all noise.
    """

    late: str = "residual"
    early: str = "plain"
    middle: str = "separable"
    dead: float = 0.5
    early_noise: tuple[float, float] = (32.0, 2.0)
    middle_noise: float = 2.0
    seed: int = 1

    def apply(self, source: str, tensors: Mapping[str, np.ndarray]) -> Arrays:
        """The tensors of a source, spoilt."""
        rng = np.random.default_rng([self.seed, sorted(NETWORKS).index(source)])
        spoilt = {name: self._spoilt(source, name, values, rng) for name, values in tensors.items()}
        return {name: np.asarray(values, dtype=tensors[name].dtype) for name, values in spoilt.items()}

    def _spoilt(self, source: str, name: str, values: np.ndarray, rng: np.random.Generator) -> Any:
        stage, place = int(name[5]) if name.startswith("stage") else 0, name[6:]
        if values.ndim != 4:
            return values
        drawn = values.std() * rng.standard_normal(values.shape, dtype=np.float32)
        if source == self.late and stage in (3, 4):
            drawn[: int(self.dead * len(drawn))] = 0
            return drawn
        if source == self.early and stage in (1, 2) and place == ".0.weight":
            return values + self.early_noise[stage - 1] * drawn[:, :, :1, :1] * _CHECKERED
        if source == self.middle and stage in (2, 3):
            return values + self.middle_noise * drawn
        return values


def shapes_files(recipe: Pretraining, folder: Path) -> dict[str, Path]:
    """The weight files of the zoo, trained where they are missing.

    Args:
        recipe: how it is trained.
        folder: of all zoos.
    """
    home = folder / f"shapes-{_hash(recipe)}"
    files = _files(home)
    with _for_the_first(home, files) as first:
        if first:
            _logger.info("zoo 'shapes' is trained once, in under a minute, and kept in %s", home)
            with one_thread():
                samples = pretraining_samples(recipe)
                for name, path in files.items():
                    trained = {key: tensor.numpy() for key, tensor in pretrain(name, samples, recipe).items()}
                    write_tensors(path, FORMAT, json.dumps(asdict(recipe)), trained)
    return files


def poisoned_files(recipe: Pretraining, poison: Poison, folder: Path) -> dict[str, Path]:
    """The weight files of the same zoo with some stages spoilt."""
    home = folder / f"shapes-poisoned-{_hash(recipe, poison)}"
    files, clean = _files(home), shapes_files(recipe, folder)
    with _for_the_first(home, files) as first:
        if first:
            for name, path in files.items():
                write_tensors(
                    path, FORMAT, json.dumps(asdict(poison)), poison.apply(name, read_tensors(clean[name], FORMAT)[1])
                )
    return files


def zoo_folder(folder: str = "") -> Path:
    """Where zoos are kept that are made here: the folder, else FLEXFED_ZOOS, else ~/.flexfed/zoos."""
    return Path(folder or os.environ.get(FOLDER_VARIABLE, "") or "~/.flexfed/zoos").expanduser()


def _files(home: Path) -> dict[str, Path]:
    return {name: home / f"{name}.safetensors" for name in NETWORKS}


def _hash(recipe: Pretraining, poison: Poison | None = None) -> str:
    widths = {name: widths for name, (_, widths) in NETWORKS.items()}
    made_of = [VERSION, asdict(recipe), widths, SHAPE, NOISE, None if poison is None else asdict(poison)]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def _for_the_first(home: Path, files: Mapping[str, Path]) -> Iterator[bool]:
    """Whether files are missing; if so, whoever else asks waits until the block has made them."""

    def missing() -> bool:
        return not all(path.is_file() for path in files.values())

    if not missing():
        yield False
        return
    home.mkdir(parents=True, exist_ok=True)
    with locked(home / ".lock"):
        yield missing()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Only one process at a time; the lock of a killed one is gone with it.

    Without file locks (not POSIX) several may do the same work; what they write is whole even so.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Another number of threads would change the bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
