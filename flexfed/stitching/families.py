"""Where torchvision's networks may be cut, family by family."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from torch import nn

from flexfed.models.zoo import torchvision_model, torchvision_names
from flexfed.networks import build_on_meta
from flexfed.stitching.sources import Source, Unit

NATIVE_SHAPE = (3, 224, 224)
_NUM_CLASSES = 1000
_OLD_NAME = re.compile(r"(denselayer\d+\.(?:norm|conv))(\d\.)")


@dataclass(frozen=True)
class Units:
    """A row of units, and the cuts to be preferred; as in `Source`."""

    units: tuple[Unit, ...]
    cuts: tuple[int, ...] = ()
    last_relu: bool = False


def _resnet(model: nn.Module) -> Units:
    """Stem and residual units; cut behind stages."""
    stages = [[(f"layer{n}.{i}",) for i in range(len(_part(model, f"layer{n}")))] for n in range(1, 5)]
    stem: Unit = ("conv1", "bn1", "relu", "maxpool")
    cuts = [1 + end for end in accumulate(len(stage) for stage in stages[:-1])]
    return Units((stem, *(unit for stage in stages for unit in stage)), tuple(cuts))


def _plain(model: nn.Module) -> Units:
    """VGG, AlexNet: each convolution with what follows it; cut behind max-pools."""
    layers = _part(model, "features")
    starts = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    pairs = list(zip(starts, [*starts[1:], len(layers)], strict=True))
    units = tuple(tuple(f"features.{i}" for i in range(start, stop)) for start, stop in pairs)
    pooled = [number for number, (_, stop) in enumerate(pairs) if isinstance(layers[stop - 1], nn.MaxPool2d)]
    return Units(units, tuple(number + 1 for number in pooled))


def _densenet(model: nn.Module) -> Units:
    """Stem, and dense blocks with the transition behind each; the final norm is followed by a ReLU."""
    names = [name for name, _ in _part(model, "features").named_children()]
    starts = [0, *(i for i, name in enumerate(names) if name.startswith("denseblock"))]
    stops = [*starts[1:], len(names)]
    units = tuple(
        tuple(f"features.{name}" for name in names[start:stop]) for start, stop in zip(starts, stops, strict=True)
    )
    return Units(units, tuple(range(2, len(units))), last_relu=True)


def _mobilenet(model: nn.Module) -> Units:
    """Children of `features`; cut in front of those that halve the map."""
    children = list(_part(model, "features"))
    halving = tuple(i for i, unit in enumerate(children) if i and _has_stride(unit))
    return Units(tuple((f"features.{i}",) for i in range(len(children))), halving)


def _has_stride(module: nn.Module) -> bool:
    return any(isinstance(layer, nn.Conv2d) and layer.stride[0] > 1 for layer in module.modules())


def _part(model: nn.Module, path: str) -> nn.Sequential:
    part = model.get_submodule(path)
    assert isinstance(part, nn.Sequential)  # so in all of these families
    return part


FAMILIES: dict[str, Callable[[nn.Module], Units]] = {
    "ResNet": _resnet,
    "VGG": _plain,
    "AlexNet": _plain,
    "DenseNet": _densenet,
    "MobileNetV2": _mobilenet,
    "MobileNetV3": _mobilenet,
    "EfficientNet": _mobilenet,
}
"""torchvision's class -> its units."""


def torchvision_source(name: str) -> Source:
    """A torchvision network as a source.

    Raises:
        ValueError: no such network, or one of a family that is not known here.
    """
    if name not in torchvision_names():
        raise ValueError(f"unknown source {name!r}: torchvision has no classification network of that name")
    return family_source(name, partial(torchvision_model, name, _NUM_CLASSES, NATIVE_SHAPE))


def family_source(name: str, build: Callable[[], nn.Module]) -> Source:
    """A network of one of torchvision's classes as a source.

    Raises:
        ValueError: it is of a family that is not known here.
    """
    model = build_on_meta(build)
    family = type(model).__name__
    if family not in FAMILIES:
        raise ValueError(f"source {name!r} is a {family}; cut into blocks can be {', '.join(FAMILIES)} of torchvision")
    units = FAMILIES[family](model)
    rename = dense_name if family == "DenseNet" else str
    return Source(name, build, units.units, NATIVE_SHAPE, units.cuts, units.last_relu, rename)


def dense_name(name: str) -> str:
    """What a tensor of a DenseNet is called in torchvision's files: they are older than the network's names."""
    return _OLD_NAME.sub(r"\1.\2", name)
