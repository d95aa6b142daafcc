"""What a submodel costs: parameters, bytes, multiply-accumulates, modelled seconds and joules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from flexfed.devices import Device
from flexfed.networks import Factory, build_on_meta
from flexfed.submodel import Submodel, narrow_shapes, resize
from flexfed.training import use_batch_statistics
from flexfed.units import Layout

BYTES_PER_NUMBER = 4
BACKWARD_FACTOR = 2  # a backward pass multiplies twice as much as the forward pass: by weights and by activations


def num_parameters(layout: Layout, submodel: Submodel) -> int:
    """Numbers in the tensors of a part: what travels, and what is trained."""
    return sum(math.prod(shape) for shape in narrow_shapes(layout, submodel).values())


def forward_macs(factory: Factory, layout: Layout, submodel: Submodel, input_shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of one sample's forward pass, counted by torch on `meta` (it counts two FLOPs for each).

    Convolutions and matrix products count; norms, activations and pooling do not, as is usual.
    """
    shapes = narrow_shapes(layout, submodel)
    return _forward_macs(factory, tuple(shapes.items()), input_shape)


@lru_cache(maxsize=256)
def _forward_macs(
    factory: Factory, shapes: tuple[tuple[str, tuple[int, ...]], ...], input_shape: tuple[int, ...]
) -> int:
    model = use_batch_statistics(resize(build_on_meta(factory), dict(shapes))).train()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, *input_shape, device="meta"))
    return int(counter.get_total_flops()) // 4  # two samples, two FLOPs a MAC


def training_macs(forward: int, num_samples: int) -> int:
    """Multiply-accumulates of training on `num_samples`: forward and backward."""
    return (1 + BACKWARD_FACTOR) * forward * num_samples


def modelled_seconds(device: Device, macs: int, num_bytes: int) -> float:
    """Compute time plus transfer time on a device, from its declared speed and link."""
    return macs / device.speed_macs_s + num_bytes / device.link_bytes_s


def modelled_joules(device: Device, macs: int, num_bytes: int) -> float:
    """Energy of computing and sending on a device, from its declared watts."""
    return device.compute_watts * macs / device.speed_macs_s + device.radio_watts * num_bytes / device.link_bytes_s


def shares(layout: Layout, submodels: Mapping[str, Submodel]) -> dict[str, float]:
    """Each submodel's parameters as a share of the full network's."""
    whole = sum(math.prod(shape) for shape in layout.shapes.values())
    return {name: num_parameters(layout, submodel) / whole for name, submodel in submodels.items()}
