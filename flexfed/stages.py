"""The stages of a network: where its resolution changes, or as it names them itself; what comes out of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flexfed.networks import STAGES_ATTRIBUTE, Factory, build_on_meta

MOST_STAGES = 4
"""Of a network's own: as many as the papers' networks have."""


def own_stages(factory: Factory, input_shape: tuple[int, ...]) -> tuple[str, ...]:
    """A network's stages: those that its attribute `stages` names, or the last modules at each spatial resolution.

    Of the latter the deepest `MOST_STAGES` that have weights of their own count. They are looked for among the
    outermost modules, and inside containers that run them one after the other. In torchvision's ResNets they are layer1
    to layer4, in its VGGs the layers before the pools.

    Args:
        factory: of the network.
        input_shape: of one sample.

    Raises:
        ValueError: there are not two of them; says how to name stages.
    """
    model = build_on_meta(factory)
    if named := getattr(model, STAGES_ATTRIBUTE, None):
        return tuple(named)
    stages = _with_weights(model, _resolutions(model, input_shape))[-MOST_STAGES:]
    if len(stages) < 2:
        top = ", ".join(name for name, _ in model.named_children())
        raise ValueError(
            f"{type(model).__name__} has no stages of its own, for its outermost modules keep one resolution or none; "
            f"name two modules or more behind which it may end, like stages='a, b'; its outermost ones are {top}"
        )
    return tuple(_outermost(model, name, stages) for name in stages)


def _resolutions(model: nn.Module, input_shape: tuple[int, ...]) -> list[tuple[str, int]]:
    """The modules that run once each, in order, with the number of places of their outputs; 0 = none."""
    ran: list[tuple[str, int]] = []

    def note(name: str) -> Any:
        def hook(_: nn.Module, __: object, output: object) -> None:
            ran.append((name, output[0, 0].numel() if isinstance(output, Tensor) and output.dim() > 2 else 0))

        return hook

    for name in _sequence(model):
        model.get_submodule(name).register_forward_hook(note(name))
    with torch.no_grad():
        model(torch.zeros(2, *input_shape, device="meta"))
    calls = Counter(name for name, _ in ran)
    return [(name, places) for name, places in ran if calls[name] == 1]


def _with_weights(model: nn.Module, ran: Sequence[tuple[str, int]]) -> list[str]:
    """The last modules at each resolution in front of the classifier, where weights were used since the one before."""
    weights = [any(tensor.dim() > 1 for tensor in model.get_submodule(name).parameters()) for name, _ in ran]
    classifier = max((position for position, uses in enumerate(weights) if uses), default=0)
    last = {places: name for name, places in ran[:classifier]}  # later ones replace earlier ones
    stages, has_weights = [], False
    for (name, places), uses in zip(ran[:classifier], weights, strict=False):
        has_weights |= uses
        if places and last[places] == name and has_weights:
            stages.append(name)
            has_weights = False
    return stages


def _sequence(model: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the outermost modules, those inside plain containers in their stead."""
    for name, module in model.named_children():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            yield from _sequence(module, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _outermost(model: nn.Module, name: str, stages: Sequence[str]) -> str:
    """The container that ends with a module and holds no other stage, if there is one: they have one output."""
    parent, _, leaf = name.rpartition(".")
    container = model.get_submodule(parent) if parent else None
    alone = not any(stage.startswith(f"{parent}.") for stage in stages if stage != name)
    if alone and isinstance(container, nn.Sequential) and leaf == list(container._modules)[-1]:
        return _outermost(model, parent, stages)
    return name


def stage_shapes(model: nn.Module, stages: Sequence[str], input_shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shape of each stage's output for one sample.

    Args:
        model: on `meta`.
        stages: names of modules.
        input_shape: of one sample.
    """
    refuse_unknown(model, stages)
    shapes: dict[str, tuple[int, ...]] = {}
    handles = [
        model.get_submodule(stage).register_forward_hook(
            lambda _, __, output, stage=stage: shapes.update({stage: tuple(output.shape[1:])})
        )
        for stage in stages
    ]
    try:
        with torch.no_grad():
            model(torch.zeros(2, *input_shape, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return [shapes[stage] for stage in stages]


def refuse_unknown(model: nn.Module, stages: Sequence[str]) -> None:
    """Stop at names that a network has no module for.

    Raises:
        ValueError: names the first.
    """
    known = dict(model.named_modules())
    if unknown := [stage for stage in stages if stage not in known]:
        top = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"{type(model).__name__} has no stage {unknown[0]!r}; its outermost modules are {top}")
