"""Networks before they are cut: built without memory, what of them travels, and which cannot be cut at all."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import lru_cache

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from flexfed.twin import has_twins, twin

Factory = Callable[[], nn.Module]
"""Builds the full network, every time the same, whatever stands outside of it; hashable."""

Convention = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation of each channel by which a network wants its inputs normalised, images being in 0..1."""

EXITS = "exits"
"""Name of the module that holds a network's early classifiers; each is called after its stage, with "_" for "."."""

STAGES_ATTRIBUTE = "stages"
"""Of a network that names its own stages (`flexfed.stages`): names of modules, in the order in which they run."""

WAY_OUT = "; replace that module, or give the network a hand-written Layout as its attribute `layout`"


_MIXING = (
    nn.ChannelShuffle,
    nn.GLU,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.MultiheadAttention,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.RNNBase,
    nn.Softmax2d,
)
"""Layers that mix the channels they see, or order them: a part of them is not a part of their result."""


def build_on_meta(factory: Factory) -> nn.Module:
    """The network without memory; one that reads values while it is built is built for real and then emptied.

    It is the caller's own. Torch's initialisers take most of the time, even on `meta`, and a process needs the same
    network for every client and round: where a copy certainly does as well, the factory is called once.
    """
    if torch.is_inference_mode_enabled():  # tensors of another kind
        return _build(factory)
    skeleton = _skeleton(factory, torch.get_default_dtype())
    return _build(factory) if skeleton is None else twin(skeleton)


@lru_cache(maxsize=16)
def _skeleton(factory: Factory, dtype: torch.dtype) -> nn.Module | None:
    """The network that copies are made of; None where each has to be built."""
    built = _build(factory)
    return built if has_twins(built) else None


def _build(factory: Factory) -> nn.Module:
    try:
        with torch.device("meta"):
            return factory()
    except RuntimeError:  # torch's, of tensors without values; one of the network's own comes again
        return factory().to("meta")


def holding(model: nn.Module, tensors: Collection[str]) -> nn.Module:
    """A network as far as it can be had with these tensors of its state dict alone (`flexfed.exits`)."""
    missing = [name for name in travelling(model) if name not in tensors]
    without = getattr(model, "without", None)
    return without(missing) if missing and without is not None else model


def outputs(model: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All that a network computes: the logits of every exit where it has several (`flexfed.exits`)."""
    found = model(inputs, every=True) if hasattr(model, "predict") else model(inputs)
    return found if isinstance(found, tuple) else (found,)


def predicted(model: nn.Module, found: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The prediction, from what a network's call gave: it may have been asked for the logits of every exit."""
    return model.predict(found) if isinstance(found, tuple) else found  # type: ignore[operator]


def travelling(model: nn.Module) -> dict[str, torch.Tensor]:
    """The floating-point tensors of a network that are trained and sent: all but batch norm's statistics."""
    local = {
        f"{name}.{buffer}" if name else buffer
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for buffer in ("running_mean", "running_var")
    }
    return {n: t for n, t in model.state_dict().items() if n not in local and t.is_floating_point()}


def refuse_uncuttable(model: nn.Module) -> None:
    """Stop at layers whose part would not compute a part of the result, and at shared parameters.

    A module of one's own can say that it is such a layer: its attribute `uncuttable` tells why.

    Raises:
        ValueError: names the module or the parameters, and the way out.
    """
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in names:
            raise ValueError(f"{name!r} and {names[id(parameter)]!r} are one shared parameter; untie them{WAY_OUT}")
        names[id(parameter)] = name
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, _MIXING):
            raise ValueError(
                f"module {name!r} ({kind}) cannot be cut: its result depends on which units are present "
                f"(of norms use batch norm){WAY_OUT}"
            )
        if reason := getattr(module, "uncuttable", ""):
            raise ValueError(f"module {name!r} ({kind}) cannot be cut: {reason}{WAY_OUT}")
        if isinstance(module, _BatchNorm) and not module.affine:
            raise ValueError(
                f"module {name!r} ({kind}) cannot be cut: without affine parameters no tensor tells its width{WAY_OUT}"
            )
        groups = getattr(module, "groups", 1)
        if isinstance(module, nn.modules.conv._ConvNd) and groups > 1 and not is_depthwise(module):
            raise ValueError(f"module {name!r} ({kind} with groups={groups}) cannot be traced{WAY_OUT}")


def refuse_lost_buffers(model: nn.Module) -> None:
    """Stop at buffers that would not travel.

    Raises:
        ValueError: names the buffer, and the way out.
    """
    norms = {name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for name, _ in model.named_buffers():
        if name.rpartition(".")[0] not in norms and name not in travelling(model):
            raise ValueError(
                f"buffer {name!r} would be lost on the way: not saved in the state dict, or no floats{WAY_OUT}"
            )


def is_depthwise(conv: nn.modules.conv._ConvNd) -> bool:
    """One filter for each channel."""
    return bool(conv.groups == conv.in_channels == conv.out_channels)
