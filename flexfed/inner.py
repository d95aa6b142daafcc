"""A narrower network inside a network: it has no weights of its own, it computes with slices of the other's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from flexfed.cost import network_on_meta
from flexfed.networks import Factory
from flexfed.submodel import Submodel, as_slice, narrow_shapes, relative_positions
from flexfed.units import Layout


class InnerNetwork:
    """A part of a network that is at hand; what it learns, the outer network learns.

    Args:
        factory: builds the full network.
        layout: its numbering.
        outer: what the network at hand holds.
        inner: what this one holds; within `outer`.

    Attributes:
        skeleton: the narrow network without memory, in train mode; batch norm uses the statistics of the batch.
    """

    def __init__(self, factory: Factory, layout: Layout, outer: Submodel, inner: Submodel):
        shapes = narrow_shapes(layout, inner)
        self.skeleton = network_on_meta(factory, tuple(shapes.items()))
        self._cuts = {name: _cuts(relative_positions(layout, outer, inner, name)) for name in shapes}

    def __call__(self, network: nn.Module, inputs: Tensor) -> Tensor:
        """Its output on a batch. The weights are sliced anew, so that gradients reach those of `network`."""
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        weights = {name: _cut(tensors[name], cuts) for name, cuts in self._cuts.items()}
        logits: Tensor = functional_call(self.skeleton, weights, (inputs,))
        return logits


Cut = tuple[int, slice | Tensor]
"""(axis, what is kept of it): a run, or where it has gaps positions, int64 (kept,)."""


def _cuts(kept: Sequence[np.ndarray | None]) -> list[Cut]:
    """Axes with gaps are rare: behind a concatenation a prefix of each part is kept."""
    cuts: list[Cut] = []
    for axis, index in enumerate(kept):
        if index is not None:
            run = as_slice(index)
            cuts.append((axis, torch.from_numpy(index) if run is None else run))
    return cuts


def _cut(tensor: Tensor, cuts: Sequence[Cut]) -> Tensor:
    """The part of a tensor: a view, but for axes with gaps."""
    for axis, kept in cuts:
        if isinstance(kept, slice):
            tensor = tensor.narrow(axis, kept.start, kept.stop - kept.start)
        else:
            tensor = tensor.index_select(axis, kept.to(tensor.device))
    return tensor
