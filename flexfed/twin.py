"""Another network of the same kind, without building it: a copy of one that has no memory."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

_KNOWN_CODE = ("torch", "torchvision", "flexfed")
_CONSTANTS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.Size)
_TABLES = (dict, OrderedDict)
_LISTS = (list, set, tuple)


def twin(model: nn.Module) -> nn.Module:
    """A copy of a network on `meta`, which shares nothing with it that either could change.

    Building it again would run torch's initialisers in vain, and `copy.deepcopy` asks each of the dozen tables of
    hooks that a module has how it wants to be copied: five and four times as long.

    Args:
        model: `has_twins`.
    """
    known: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    known |= {id(buffer): buffer.detach() for buffer in model.buffers()}
    modules = list(model.modules())
    known |= {id(module): object.__new__(type(module)) for module in modules}
    for module in modules:
        vars(known[id(module)]).update((name, _copied(value, known)) for name, value in vars(module).items())
    found: nn.Module = known[id(model)]
    return found


def _copied(value: Any, known: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _TABLES:
        return kind((_copied(key, known), _copied(each, known)) for key, each in value.items()) if value else kind()
    if kind in _LISTS:
        return kind(_copied(each, known) for each in value) if value else kind()
    return known.get(id(value), value)


def has_twins(model: nn.Module) -> bool:
    """Whether a copy certainly does what another network from the same factory would do.

    So where all modules are torch's, torchvision's or this project's, with values that say no more than what stands
    in them. Anybody else's may count how many they are, draw numbers, or hold functions that lead to the network for
    which they were made.
    """
    modules, tensors = list(model.modules()), [*model.parameters(), *model.buffers()]
    inside = {id(each) for each in (*modules, *tensors)}
    ordinary = all(type(t) in (nn.Parameter, torch.Tensor) and not vars(t) for t in tensors)
    return ordinary and all(
        _is_known(type(m)) and all(_says_all(value, inside) for value in vars(m).values()) for m in modules
    )


def _is_known(kind: type) -> bool:
    """Whether a class, and what it builds on, is of code that is known here, and has no own way to be copied."""
    bases = [base for base in kind.__mro__ if base not in (nn.Module, object)]
    own_ways = any(way in vars(base) for base in bases for way in ("__deepcopy__", "__getstate__", "__reduce__"))
    return not own_ways and all(base.__module__.partition(".")[0] in _KNOWN_CODE for base in bases)


def _says_all(value: Any, inside: set[int]) -> bool:
    """Whether a value is a constant, belongs to the network, or holds nothing else."""
    kind = type(value)
    if id(value) in inside or kind in _CONSTANTS or isinstance(value, type):
        return True
    if kind in _TABLES:
        return all(_says_all(each, inside) for each in (*value.keys(), *value.values()))
    if kind in _LISTS:
        return all(_says_all(each, inside) for each in value)
    if kind is FunctionType:
        return value.__closure__ is None and value.__module__.partition(".")[0] in _KNOWN_CODE
    if kind is BuiltinFunctionType:
        return value.__self__ is None
    return dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen and _is_known(kind)  # type: ignore[attr-defined]
