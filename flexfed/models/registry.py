"""Networks by name: the papers', a few small ones, torchvision's, stitched ones, and a user's own."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from flexfed.models.autoflip import autoflip_cnn
from flexfed.models.cifar import DEPTHS, cifar_resnet, cifar_resnet8
from flexfed.models.fedlps import fedlps_cnn, fedlps_vgg
from flexfed.models.flexfl import flexfl_mobilenetv2, flexfl_resnet34, flexfl_vgg16
from flexfed.models.heterofl import heterofl_conv, heterofl_resnet18
from flexfed.models.small import cnn, cnn1d
from flexfed.models.zoo import torchvision_model, torchvision_names
from flexfed.networks import Convention

Builder = Callable[[int, tuple[int, ...]], nn.Module]


MODELS: dict[str, Builder] = {
    "flexfl-vgg16": flexfl_vgg16,
    "flexfl-vgg16-textbook": partial(flexfl_vgg16, pools="textbook"),
    "flexfl-vgg16-slim": partial(flexfl_vgg16, pools="textbook", divisor=8),
    "flexfl-resnet34": flexfl_resnet34,
    "flexfl-mobilenetv2": flexfl_mobilenetv2,
    "heterofl-conv": heterofl_conv,
    "heterofl-conv-quarter": partial(heterofl_conv, widths=(16, 32, 64, 128)),
    "heterofl-resnet18": heterofl_resnet18,
    "fedlps-cnn": fedlps_cnn,
    "fedlps-vgg11": partial(fedlps_vgg, depth=11),
    "fedlps-vgg13": partial(fedlps_vgg, depth=13),
    "fedlps-vgg16": partial(fedlps_vgg, depth=16),
    "autoflip-cnn": autoflip_cnn,
    "autoflip-cnn-128": partial(autoflip_cnn, width=128),
    "cnn": cnn,
    "cnn1d": cnn1d,
    **{f"cifar-resnet{depth}": partial(cifar_resnet, units=units) for depth, units in DEPTHS.items()},
    "cifar-resnet8": cifar_resnet8,
}

STITCHED = "stitched:"
"""Begins the name of a network stitched from blocks of a zoo: "stitched:<zoo>:<ids joined by ->"."""


def find_builder(name: str) -> Builder:
    """The builder of `name`: of MODELS, 'stitched:<zoo>:<ids>', 'package.module:factory', or a torchvision network.

    Raises:
        ValueError: nothing is called so, or the user's own module or factory cannot be found.
    """
    if name in MODELS:
        return MODELS[name]
    if name.startswith(STITCHED):
        return _stitched(name)
    # Constants that an imported module makes must be real even while a network is built on meta.
    with torch.device("cpu"):
        if ":" in name:
            return partial(_build_own, name, _load_factory(name))
        if name in torchvision_names():
            return partial(torchvision_model, name)
    raise ValueError(
        f"unknown model {name!r}; known: {', '.join(MODELS)}, any torchvision classification network by "
        "its own name (resnet18, vgg11_bn, mobilenet_v3_small, ...), 'stitched:<zoo>:<ids>' for blocks of a "
        "zoo, or 'package.module:factory' for a function or class of your own from an installed package"
    )


def input_convention(name: str, channels: int) -> Convention | None:
    """How a network wants its inputs normalised; None = by their own mean and deviation."""
    if not name.startswith(STITCHED):
        return None
    from flexfed.stitching import zoos
    from flexfed.stitching.network import parse_name

    return zoos.input_convention(parse_name(name)[0], channels)


def check_request(name: str, num_classes: int, input_shape: tuple[int, ...]) -> None:
    """Refuse a class count below 1, empty inputs, and inputs of a rank that the named network lacks.

    Raises:
        ValueError: one of these, with what the network takes instead.
    """
    if num_classes < 1:
        raise ValueError(f"model {name!r}: expected at least one class, got {num_classes}")
    if not input_shape or min(input_shape) < 1:
        raise ValueError(f"model {name!r}: expected an input shape of positive sizes, got {input_shape}")
    if ":" in name and not name.startswith(STITCHED):
        return  # only its author knows which rank it takes
    rank, takes = (2, "windows (channels, time)") if name == "cnn1d" else (3, "images (channels, height, width)")
    if len(input_shape) != rank:
        fitting = {2: "'cnn1d'", 3: "'cnn'"}.get(len(input_shape), "a 'package.module:factory' of your own")
        raise ValueError(f"model {name!r} takes {takes}; got input shape {input_shape}, choose {fitting}")


def build_model(name: str, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Build the network `name`, randomly initialised, on torch's default device.

    Args:
        name: see `find_builder`.
        num_classes: outputs of the classifier.
        input_shape: one sample's shape, without the batch, such as (3, 32, 32) or (3, 200).

    Raises:
        ValueError: unknown name, or inputs of the wrong rank. Whether images are large enough is
            found by `check_model`, which runs the network.
    """
    builder = find_builder(name)
    check_request(name, num_classes, input_shape)
    return builder(num_classes, tuple(input_shape))


def model_factory(name: str, num_classes: int, input_shape: tuple[int, ...]) -> Callable[[], nn.Module]:
    """`build_model` with its arguments filled in: picklable, and a fresh network at every call.

    Raises:
        ValueError: as `build_model`, at once instead of at the first call.
    """
    find_builder(name)
    check_request(name, num_classes, input_shape)
    return partial(build_model, name, num_classes, tuple(input_shape))


def _stitched(name: str) -> Builder:
    from flexfed.stitching.network import parse_name, stitched_model  # which needs networks of this room
    from flexfed.stitching.zoos import source_names

    zoo, sources, _ = parse_name(name)
    source_names(zoo, sources)  # refuses unknown ones
    return partial(stitched_model, name)


def _load_factory(name: str) -> Callable[..., object]:
    module_name, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"model {name!r} cannot be imported: {error}; expected 'package.module:factory' of a package "
            "that is installed wherever the app runs"
        ) from error
    if not callable(factory):
        raise ValueError(f"model {name!r} is of type {type(factory).__name__}; expected a function or class")
    checked: Callable[..., object] = factory
    return checked


def _build_own(name: str, factory: Callable[..., object], num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Call a user's factory with those of the two arguments that its signature takes."""
    offered: dict[str, Any] = {"num_classes": num_classes, "input_shape": input_shape}
    parameters = inspect.signature(factory).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        taken = {p.name for p in parameters}
        offered = {key: value for key, value in offered.items() if key in taken}
    model = factory(**offered)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r} returned {type(model).__name__}; expected a torch.nn.Module")
    return model
