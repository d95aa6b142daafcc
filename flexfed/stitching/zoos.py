"""Zoos by name: which pre-trained networks there are, where their weights are, and how their data are normalised."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from urllib.parse import urlparse

import torch

from flexfed.models.cifar import DEPTHS, cifar_resnet, cifar_resnet8, keras_name
from flexfed.networks import Convention
from flexfed.stitching.blocks import NUM_BLOCKS, Pool, make_pool
from flexfed.stitching.families import torchvision_source
from flexfed.stitching.shapes import NETWORKS, Pretraining, shapes_source
from flexfed.stitching.shelf import Poison, poisoned_files, shapes_files, zoo_folder
from flexfed.stitching.sources import Intake, Source, Unit
from flexfed.stitching.weightfiles import in_parts

IMAGENET: Convention = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PIXELS: Convention = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
"""Raw 0..255."""

_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_FILES = {f"cifar-resnet{depth}": f"resnet{depth}-cifar10.safetensors" for depth in DEPTHS}
_CIFAR_FILES["cifar-resnet8"] = "resnet8-cifar10-keras.safetensors"
_logger = logging.getLogger("flwr")


@dataclass(frozen=True)
class Zoo:
    """Where a zoo's sources come from.

    Attributes:
        default: names of its sources, in the order in which their blocks are numbered.
        source: name -> the source.
        files: (names, folder) -> the weight file of each.
        any_source: sources beside the default ones may be named.
        convention: how data are to be normalised; None = by their own mean and deviation.
        size: smaller images are resized to this side; 0 = never.
    """

    default: tuple[str, ...]
    source: Callable[[str], Source]
    files: Callable[[Sequence[str], str], Mapping[str, Path]]
    any_source: bool = False
    convention: Convention | None = None
    size: int = 0


def open_pool(
    zoo: str, input_shape: tuple[int, ...], sources: str = "", folder: str = "", num_blocks: int = NUM_BLOCKS
) -> Pool:
    """The blocks of a zoo, with the weights that `Pool.module` reads one block at a time.

    Args:
        zoo: one of ZOOS. "shapes" and "shapes-poisoned" are trained once and kept; nothing is ever downloaded.
        input_shape: of one sample of the data: images of one channel or three.
        sources: names of its networks, separated by commas; empty = all (torchvision: the five of StitchNet).
        folder: where weights are; empty = $FLEXFED_ZOOS or ~/.flexfed/zoos for the self-made ones,
            $FLEXFED_DATA/weights for "cifar", torch hub's cache for "torchvision".
        num_blocks: that each source is cut into.

    Raises:
        ValueError: an unknown zoo or source, data that are no images, no source that can run them, or missing weights.
    """
    pool = plan_pool(zoo, input_shape, sources, num_blocks)
    return replace(pool, files=ZOOS[zoo].files(pool.sources, folder))


def plan_pool(zoo: str, input_shape: tuple[int, ...], sources: str = "", num_blocks: int = NUM_BLOCKS) -> Pool:
    """The same without weights: `Pool.skeleton` works, `Pool.module` does not.

    Raises:
        ValueError: as `open_pool`, but for the weights.
    """
    return _plan(zoo, tuple(input_shape), sources.replace(" ", ""), num_blocks)


@lru_cache(maxsize=16)
def _plan(zoo: str, input_shape: tuple[int, ...], sources: str, num_blocks: int) -> Pool:
    kept = find_zoo(zoo)
    if len(input_shape) != 3 or input_shape[0] not in (1, 3):
        raise ValueError(
            f"zoo {zoo!r} takes images of one channel or three, (channels, height, width); got {input_shape}"
        )
    fitted = (_fitted(kept, kept.source(name), input_shape) for name in source_names(zoo, sources))
    pool, left_out = make_pool(zoo, fitted, input_shape, num_blocks)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
    if not pool.blocks:
        raise ValueError(
            f"zoo {zoo!r}: no source can run data of shape {input_shape}, so there are no blocks ({reasons})"
        )
    if left_out:
        _logger.info("zoo %r: left out are sources that cannot run data of shape %s (%s)", zoo, input_shape, reasons)
    return pool


def find_zoo(zoo: str) -> Zoo:
    """A zoo by its name.

    Raises:
        ValueError: there is none.
    """
    if zoo not in ZOOS:
        raise ValueError(f"unknown zoo {zoo!r}; known: {', '.join(ZOOS)}")
    return ZOOS[zoo]


def source_names(zoo: str, sources: str = "") -> tuple[str, ...]:
    """The names in a comma-separated list, or all the sources of a zoo.

    Raises:
        ValueError: a name twice, or one that the zoo does not have.
    """
    kept = find_zoo(zoo)
    names = tuple(name.strip() for name in sources.split(",")) if sources.strip() else kept.default
    wrong = [name for name in names if not kept.any_source and name not in kept.default]
    if wrong:
        raise ValueError(f"zoo {zoo!r} has no source {wrong[0]!r}; known: {', '.join(kept.default)}")
    if len(set(names)) < len(names):
        raise ValueError(f"sources of zoo {zoo!r} must be named once each, got {', '.join(names)}")
    return names


def input_convention(zoo: str, channels: int = 3) -> Convention | None:
    """How data must be normalised for a zoo: mean and deviation of each channel; None = by their own.

    One channel is normalised by the mean over the three; the start block makes up for the difference.

    Raises:
        ValueError: unknown zoo.
    """
    convention = find_zoo(zoo).convention
    if convention is None or channels != 1:
        return convention
    mean, deviation = (sum(values) / len(values) for values in convention)
    return (mean,), (deviation,)


def _fitted(zoo: Zoo, source: Source, input_shape: tuple[int, ...]) -> Source:
    """The source with what data need in front of it."""
    channels, *sides = input_shape
    size = (zoo.size, zoo.size) if min(sides) < zoo.size else None
    scale, shift = _difference(zoo.convention, source.convention or zoo.convention, channels)
    intake = Intake(channels, size, scale, shift)
    return source if intake == Intake(3) else replace(source, intake=intake)


def _difference(
    given: Convention | None, wanted: Convention | None, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale and shift from one convention to the other; empty where there is nothing to do."""
    if given is None or wanted is None:
        return (), ()
    if channels == 1:
        given = tuple((sum(values) / len(values),) * 3 for values in given)  # type: ignore[assignment]
    if given == wanted:
        return (), ()
    pairs = list(zip(*given, *wanted, strict=True))
    scale = tuple(std / own_std for _, std, _, own_std in pairs)
    return scale, tuple((mean - own_mean) / own_std for mean, _, own_mean, own_std in pairs)


def _cifar_source(name: str) -> Source:
    if name == "cifar-resnet8":
        stages: tuple[Unit, ...] = (("stem",), ("stack1",), ("stack2",), ("stack3",))
        build = partial(cifar_resnet8, 10, _CIFAR_SHAPE, running_statistics=True)
        return Source(name, build, stages, _CIFAR_SHAPE, file_name=keras_name, convention=PIXELS)
    num = DEPTHS[int(name.removeprefix("cifar-resnet"))]
    residual = tuple((f"layer{stage}.{unit}",) for stage in (1, 2, 3) for unit in range(num))
    units: tuple[Unit, ...] = (("conv1", "bn1", "relu"), *residual)
    return Source(name, partial(cifar_resnet, 10, _CIFAR_SHAPE, num, running_statistics=True), units, _CIFAR_SHAPE)


def _cifar_files(names: Sequence[str], folder: str) -> Mapping[str, Path]:
    root = folder or (os.environ.get("FLEXFED_DATA", "") and os.environ["FLEXFED_DATA"] + "/weights")
    if not root:
        raise ValueError(
            f"zoo 'cifar' needs a folder with {', '.join(_CIFAR_FILES[name] for name in names)}; none is named, "
            "and the variable FLEXFED_DATA is not set"
        )
    files = {name: Path(root).expanduser() / _CIFAR_FILES[name] for name in names}
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise ValueError(f"zoo 'cifar': weight files are missing, looked for {', '.join(missing)}")
    return files


def _torchvision_files(names: Sequence[str], folder: str) -> Mapping[str, Path]:
    found = {name: _torchvision_places(name, folder) for name in names}
    missing = [
        f"{url} expected as {places[0]}" for url, places in found.values() if not any(p.is_file() for p in places)
    ]
    if missing:
        raise ValueError(f"zoo 'torchvision': nothing is downloaded silently, and there is no {'; no '.join(missing)}")
    files = {name: next(path for path in places if path.is_file()) for name, (_, places) in found.items()}
    return {name: in_parts(path, zoo_folder() / "torchvision") for name, path in files.items()}


def _torchvision_places(name: str, folder: str) -> tuple[str, list[Path]]:
    """The address of a network's weights, and where the file may be."""
    from torchvision import models

    url = str(models.get_model_weights(name)["IMAGENET1K_V1"].url)
    root = Path(folder).expanduser() if folder else Path(torch.hub.get_dir(), "checkpoints")
    return url, [root / Path(urlparse(url).path).name, root / f"{name}.safetensors"]


def _shapes_files(names: Sequence[str], folder: str) -> Mapping[str, Path]:
    return shapes_files(Pretraining(), zoo_folder(folder))


def _poisoned_files(names: Sequence[str], folder: str) -> Mapping[str, Path]:
    return poisoned_files(Pretraining(), Poison(), zoo_folder(folder))


STITCHNET_SOURCES = ("resnet50", "alexnet", "densenet121", "mobilenet_v3_small", "vgg16")
"""What StitchNet (arXiv:2301.01947) stitches; FedStitch's own zoo is disclosed nowhere that we could read."""

ZOOS: dict[str, Zoo] = {
    "shapes": Zoo(tuple(NETWORKS), shapes_source, _shapes_files),
    "shapes-poisoned": Zoo(tuple(NETWORKS), shapes_source, _poisoned_files),
    "cifar": Zoo(tuple(_CIFAR_FILES), _cifar_source, _cifar_files, convention=IMAGENET),
    "torchvision": Zoo(STITCHNET_SOURCES, torchvision_source, _torchvision_files, True, IMAGENET, 224),
}
"""Name -> zoo."""
