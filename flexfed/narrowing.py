"""A physically smaller network: the whole one's modules with narrow tensors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from flexfed.networks import Factory, build_on_meta, holding, travelling


def resize(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """Give a network on `meta` narrow tensors, and modules the channel counts that follow from them."""
    return _with(model, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})


def _with(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The network with these tensors by name, in place; batch norm's statistics on `meta` follow their width."""
    for name, tensor in tensors.items():
        _put(model, name, tensor)
    for module in model.modules():
        _fit_counts(module)
    return model


def _put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace a parameter or a buffer; a frozen parameter stays frozen."""
    module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    if leaf in module._parameters:
        old = module._parameters[leaf]
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=old is None or old.requires_grad)
    else:
        module._buffers[leaf] = tensor


def _fit_counts(module: nn.Module) -> None:
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd) and weight is not None:
        first, second = weight.shape[:2]
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            first, second = second, first
        if 1 < module.groups == module.in_channels:  # depthwise: one input channel to a filter
            module.groups = first
        module.out_channels, module.in_channels = first, second * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape  # type: ignore[union-attr]
    elif isinstance(module, _BatchNorm):
        if weight is not None:
            module.num_features = weight.shape[0]
        for name in ("running_mean", "running_var"):
            statistics = getattr(module, name)
            if statistics is not None and statistics.is_meta:
                setattr(module, name, torch.empty(module.num_features, device="meta"))


def _fill_statistics(norm: _BatchNorm) -> None:
    if norm.running_mean is not None and norm.running_mean.is_meta:
        norm.running_mean = torch.zeros(norm.num_features)
    if norm.running_var is not None and norm.running_var.is_meta:
        norm.running_var = torch.ones(norm.num_features)
    if norm.num_batches_tracked is not None and norm.num_batches_tracked.is_meta:
        norm.num_batches_tracked = torch.zeros((), dtype=torch.long)


def narrow(factory: Factory, arrays: Mapping[str, np.ndarray]) -> nn.Module:
    """A physically smaller network, from the shapes of its tensors alone.

    Built on `meta`, so that a weak device never holds the full one. Needs no layout. Batch norm starts with
    fresh running statistics (where it keeps any), unless `arrays` holds them.

    Args:
        factory: builds the full network.
        arrays: narrow tensors by state-dict name; copied.

    Raises:
        ValueError: a tensor the network does not have, one it has and `arrays` lacks, or a buffer that is not
            part of the state dict (its values would be lost).
    """
    model = holding(build_on_meta(factory), arrays)
    extra, missing = arrays.keys() - model.state_dict().keys(), travelling(model).keys() - arrays.keys()
    if extra or missing:
        raise ValueError(
            f"arrays do not fit the network {type(model).__name__}: unknown {sorted(extra)[:3]}, "
            f"missing {sorted(missing)[:3]}; give one array for each tensor of the part"
        )
    _with(model, {name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()})
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            _fill_statistics(module)
    lost = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if lost:
        raise ValueError(f"buffer {lost[0]!r} is not part of the state dict, so its values are lost when narrowing")
    return model
