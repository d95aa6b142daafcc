"""AutoFLIP's structured level: which units a mask leaves nothing of, and the narrow network that remains.

The paper calls its pruning hybrid; how it selects units could not be read, and its code has masks of entries only.
All of this file is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from torch import nn

from flexfed.submodel import Submodel, positions, take
from flexfed.units import Arrays, Layout, out_axis


class Producer(NamedTuple):
    """The one tensor that computes a group's units, and its axis that they stand on."""

    tensor: str
    axis: int


def producers(layout: Layout, model: nn.Module) -> dict[str, Producer]:
    """The groups whose units may leave: hidden ones that a single layer computes.

    Channels of residual sums and of depthwise convolutions have several layers that compute them; outputs stay.

    Args:
        layout: the network's numbering.
        model: the network, on `meta`: its modules tell which axis holds a layer's outputs.
    """
    found: dict[str, list[Producer]] = {group: [] for group in layout.groups}
    for name, shape in layout.shapes.items():
        if len(shape) > 1:
            axis = out_axis(model, name)
            for group in layout.groups_of(name, axis):
                found[group].append(Producer(name, axis))
    return {group: made[0] for group, made in found.items() if len(made) == 1 and group not in layout.fixed}


def unit_means(layout: Layout, group: str, made: Producer, scores: np.ndarray) -> np.ndarray:
    """Mean score of each unit's incoming weights, (units of the group,)."""
    return np.asarray(_by_unit(layout, group, made, scores) / _by_unit(layout, group, made, np.ones_like(scores)))


def _by_unit(layout: Layout, group: str, made: Producer, values: np.ndarray) -> np.ndarray:
    """Sums over a layer's incoming weights, for every unit of the group."""
    span, units = layout.groups[group], layout.axes[made.tensor][made.axis]
    rows = np.moveaxis(values, made.axis, 0).reshape(values.shape[made.axis], -1).sum(axis=1)
    if units is None:
        raise ValueError(f"axis {made.axis} of {made.tensor!r} holds no units of group {group!r}")
    inside = (units >= span.start) & (units < span.stop)
    return np.bincount(units[inside] - span.start, weights=rows[inside], minlength=len(span))


def without_least_units(
    layout: Layout, made: Mapping[str, Producer], masks: Arrays, scores: Arrays, share: float
) -> Arrays:
    """Mask all incoming weights of the units that score least: floor(share * J + 1e-9) of a group's J, never all.

    Ranks units as L1-norm filter pruning does (Li et al., ICLR 2017), by the mean score instead of the norm; of equal
    means the lower unit goes first.
    """
    result = dict(masks)
    for group, producer in made.items():
        means = unit_means(layout, group, producer, scores[producer.tensor])
        num = min(int(share * len(means) + 1e-9), len(means) - 1)
        least = layout.groups[group].start + np.argsort(means, kind="stable")[:num]
        rows = ~np.isin(layout.axes[producer.tensor][producer.axis], least)  # type: ignore[arg-type]
        mask = result[producer.tensor]
        result[producer.tensor] = mask & _along(rows, producer.axis, mask.ndim)
    return result


def close(layout: Layout, made: Mapping[str, Producer], masks: Arrays) -> tuple[Arrays, np.ndarray]:
    """Units whose incoming weights are all masked are dead: mask their bias and what reads them, until nothing changes.

    The network's function changes only by the constants that such units passed on. A group keeps one unit at least,
    the first of those that would die last.

    Args:
        layout: the network's numbering.
        made: the groups whose units may die.
        masks: tensor -> bool of its full shape.

    Returns:
        The closed masks, and bool (num_units,): the units that are alive.
    """
    closed, alive = dict(masks), np.ones(layout.num_units, dtype=bool)
    while True:
        left = alive.copy()
        for group, producer in made.items():
            here = slice(layout.groups[group].start, layout.groups[group].stop)
            fed = alive[here] & (_by_unit(layout, group, producer, closed[producer.tensor]) > 0)
            fed[np.argmax(alive[here])] |= not fed.any()
            left[here] = fed
        if np.array_equal(left, alive):
            return closed, alive
        alive = left
        closed = {name: _without(layout, name, mask, alive) for name, mask in closed.items()}


def _without(layout: Layout, name: str, mask: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """A tensor's mask without the positions of dead units."""
    for axis, units in enumerate(layout.axes[name]):
        if units is not None:
            mask = mask & _along(alive[units], axis, mask.ndim)
    return mask


def _along(row: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    """A vector as an array that is broadcast along all other axes."""
    return row.reshape([-1 if i == axis else 1 for i in range(ndim)])


def masked_part(layout: Layout, masks: Mapping[str, np.ndarray], alive: np.ndarray | None = None) -> Submodel:
    """The submodel that is left: units that are alive, and masks of their tensors, where those leave anything out.

    Args:
        layout: the network's numbering.
        masks: tensor -> bool of its full shape.
        alive: bool, (num_units,); all by default.
    """
    outline = Submodel(np.ones(layout.num_units, dtype=bool) if alive is None else alive)
    narrow = {name: take(mask, positions(layout, outline, name)) for name, mask in masks.items()}
    return Submodel(outline.units, masks={n: np.ascontiguousarray(m) for n, m in narrow.items() if not m.all()})


def covered(layout: Layout, submodel: Submodel) -> Arrays:
    """Tensor -> bool of its full shape: the entries that a submodel holds."""
    whole: Arrays = {}
    for name, shape in layout.shapes.items():
        kept = positions(layout, submodel, name)
        here = np.ix_(*[np.arange(n) if index is None else index for index, n in zip(kept, shape, strict=True)])
        whole[name] = np.zeros(shape, dtype=bool)
        whole[name][here] = submodel.masks.get(name, True)
    return whole
