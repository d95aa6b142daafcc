"""FIARSE's importance: the largest entries (or units) that a size keeps, their threshold, the gradient through it.

See `flexfed.methods.fiarse` for the paper, and for what of this is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from flexfed.cost import num_parameters
from flexfed.methods.fedlps_scores import Rows
from flexfed.networks import Factory, build_on_meta
from flexfed.select import top
from flexfed.submodel import Submodel
from flexfed.units import Arrays, Layout, out_axis

Scope = Literal["global", "layerwise"]
Least = Literal["none", "one", "row"]

_STEPS = 64  # layer by layer, widths are multiples of 1/64


@dataclass(frozen=True)
class Size:
    """What one size keeps of a network.

    Attributes:
        submodel: the part.
        thresholds: tensor (with units: group) -> theta; empty where everything is kept.
    """

    submodel: Submodel
    thresholds: Mapping[str, float]


class Kept(NamedTuple):
    """The threshold, and bool of the scores' shape: what is kept."""

    threshold: float
    mask: np.ndarray


def maskable_tensors(layout: Layout, factory: Factory) -> tuple[str, ...]:
    """Weights and biases of convolutions and linear layers, in wire order; norms and all else stay whole."""
    modules = dict(build_on_meta(factory).named_modules())
    names = (name for name in layout.shapes if name.rpartition(".")[2] in ("weight", "bias"))
    return tuple(n for n in names if isinstance(modules[n.rpartition(".")[0]], _ConvNd | nn.Linear))


def num_kept(size: float, num: int) -> int:
    """floor(s N); 1e-9 is added first, since 0.29 * 100 is a hair less than 29."""
    return math.floor(size * num + 1e-9)


def gradient_factor(scores: Tensor, threshold: float | Tensor) -> Tensor:
    """1 + 2 theta |w| / (|w| + theta)^2: between 1 and 1.5, largest at the threshold; 1 where that is 0.

    Args:
        scores: |w| of entries that are kept, or the scores of units.
        threshold: theta >= 0, one or of the same shape.
    """
    bottom = (scores + threshold).square_()
    return (2 * threshold * scores).div_(bottom).masked_fill_(bottom == 0, 0).add_(1)


# Single entries ---------------------------------------------------------------------------------------------


def keep_largest(scores: np.ndarray, k: int) -> Kept:
    """Exactly k entries, those of the largest scores; of equal ones those that come first.

    Raises:
        ValueError: k is not in 1..number of entries.
    """
    if not 1 <= k <= scores.size:
        raise ValueError(f"expected to keep 1..{scores.size} of {scores.size} entries, got {k}")
    flat = scores.reshape(-1)
    threshold = np.partition(flat, flat.size - k)[flat.size - k]
    mask = flat > threshold
    ties = np.flatnonzero(flat == threshold)[: k - int(np.count_nonzero(mask))]
    mask[ties] = True
    return Kept(float(threshold), mask.reshape(scores.shape))


def keep_with(scores: np.ndarray, k: int, wanted: np.ndarray) -> Kept:
    """Exactly k entries again, but `wanted` among them whatever their scores: the least of the others go.

    Args:
        scores: flat, >= 0.
        k: how many.
        wanted: bool of the same shape.

    Raises:
        ValueError: more than k are wanted.
    """
    plain, num = keep_largest(scores, k), int(np.count_nonzero(wanted))
    if num > k:
        raise ValueError(
            f"{num} entries must stay, but only {k} may; leave that size out, or let min-per-tensor ask for less"
        )
    if plain.mask[wanted].all():
        return plain
    if num == k:
        return Kept(float(scores[wanted].min()), wanted.copy())
    others = keep_largest(np.where(wanted, -1.0, scores), k - num)
    return Kept(others.threshold, others.mask | wanted)


def entry_size(
    arrays: Mapping[str, np.ndarray],
    size: float,
    scope: Scope = "global",
    wanted: Mapping[str, np.ndarray] | None = None,
) -> tuple[Arrays, dict[str, float]]:
    """Masks of a size, and the threshold of each tensor.

    Args:
        arrays: the tensors that may be masked, whole.
        size: s, in (0, 1).
        scope: one threshold over all of them, of which floor(s N) entries stay; or one for each of its own.
        wanted: tensor -> bool of its shape: entries that stay in any case.

    Raises:
        ValueError: floor(s N) is 0, or less than what is wanted.
    """
    scores = {name: np.abs(array).reshape(-1) for name, array in arrays.items()}
    must = {n: np.zeros(a.size, dtype=bool) if wanted is None else wanted[n].reshape(-1) for n, a in scores.items()}
    if scope == "layerwise":
        found = {
            n: keep_with(a, max(num_kept(size, a.size), 1, int(must[n].sum())), must[n]) for n, a in scores.items()
        }
        return {n: kept.mask.reshape(arrays[n].shape) for n, kept in found.items()}, {
            n: kept.threshold for n, kept in found.items()
        }
    everything = np.concatenate(list(scores.values()))
    k = num_kept(size, everything.size)
    if k < 1:
        raise ValueError(f"size {size:g} keeps floor({size:g} * {everything.size}) = 0 entries; expected at least 1")
    one = keep_with(everything, k, np.concatenate(list(must.values())))
    ends = np.cumsum([a.size for a in scores.values()])[:-1]
    pieces = zip(arrays.items(), np.split(one.mask, ends), strict=True)
    return {name: mask.reshape(array.shape) for (name, array), mask in pieces}, dict.fromkeys(arrays, one.threshold)


def least_entries(arrays: Mapping[str, np.ndarray], least: Least, axes: Mapping[str, int]) -> Arrays:
    """The entries that stay in any case: the largest of each weight ("one"), or of each of its output rows ("row").

    Args:
        arrays: the tensors that may be masked.
        least: see above; "none" = none.
        axes: tensor -> the axis on which its outputs stand. Vectors (biases) may be emptied always.
    """
    found = {name: np.zeros(array.shape, dtype=bool) for name, array in arrays.items()}
    for name, array in arrays.items():
        if least == "none" or array.ndim < 2:
            continue
        rows = np.abs(np.moveaxis(array, axes[name], 0)).reshape(array.shape[axes[name]] if least == "row" else 1, -1)
        chosen = np.zeros(rows.shape, dtype=bool)
        chosen[np.arange(len(rows)), rows.argmax(axis=1)] = True
        moved = np.moveaxis(array, axes[name], 0).shape
        found[name] = np.moveaxis(chosen.reshape(moved), 0, axes[name])
    return found


def output_axes(tensors: Sequence[str], factory: Factory) -> dict[str, int]:
    """Tensor -> the axis on which its outputs stand."""
    model = build_on_meta(factory)
    return {name: out_axis(model, name) for name in tensors}


# Units (ours) -----------------------------------------------------------------------------------------------


def unit_scores(rows: Rows, tensors: Mapping[str, Tensor]) -> Tensor:
    """Root mean square of each unit's entries in all layers of its group, (num_units,); 0 where it has none.

    A unit's entries are its rows, weights and bias: what computes it. The columns that read it count for the units
    that they compute.

    Args:
        rows: where they stand.
        tensors: those that may be masked, of the shapes that the part has.
    """
    squares = rows.sums({name: tensor.square() for name, tensor in tensors.items()})
    counts = rows.sums({name: torch.ones_like(tensor) for name, tensor in tensors.items()})
    return (squares / counts.clamp(min=1)).sqrt()


def unit_size(layout: Layout, scores: np.ndarray, size: float, scope: Scope = "global") -> Size:
    """The units of a size: as many as its share of the network's parameters allows, the best of each group at least.

    Args:
        layout: the network's numbering.
        scores: of each unit.
        size: s, a share of all parameters, norms and class outputs counted.
        scope: "global" keeps the best of all groups together, above one threshold; "layerwise" the same share of
            each group, rounded up.

    Raises:
        ValueError: one unit of each group is more than that.
    """
    whole = sum(math.prod(shape) for shape in layout.shapes.values())
    choose = _best_of_all(layout, scores) if scope == "global" else _best_of_each(layout, scores)

    def fits(step: int) -> bool:
        return num_parameters(layout, choose(step)) <= size * whole + 1e-9

    if not fits(0):
        least = num_parameters(layout, choose(0)) / whole
        raise ValueError(
            f"size {size:g} cannot be met by whole units: one of each group takes {least:.4f} of the network's "
            "parameters; leave that size out, or choose mode 'unstructured'"
        )
    low, high = 0, _STEPS - 1 if scope == "layerwise" else layout.num_units
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    units = choose(low).units
    return Size(Submodel(units), _unit_thresholds(layout, scores, units, scope))


def _best_of_all(layout: Layout, scores: np.ndarray) -> Callable[[int], Submodel]:
    """Step -> the best of each group, and so many of the others, from the highest score down."""
    least, order = top(layout, scores, 1 / layout.num_units).units, np.argsort(-scores, kind="stable")
    others = order[~least[order]]

    def choose(step: int) -> Submodel:
        units = least.copy()
        units[others[:step]] = True
        return Submodel(units)

    return choose


def _best_of_each(layout: Layout, scores: np.ndarray) -> Callable[[int], Submodel]:
    return lambda step: top(layout, scores, (step + 1) / _STEPS)


def _unit_thresholds(layout: Layout, scores: np.ndarray, units: np.ndarray, scope: Scope) -> dict[str, float]:
    """Theta of each group: the least score that is kept, of all groups or of its own.

    With one theta for all, a group whose best unit is below that has its score: it is the group's threshold.
    """
    groups = {group: span for group, span in layout.groups.items() if group not in layout.fixed}
    kept = {g: scores[s.start : s.stop][units[s.start : s.stop]] for g, s in groups.items()}
    if scope == "layerwise":
        return {group: float(own.min()) for group, own in kept.items()}
    chosen = [own[np.argsort(-own)[1:]] for own in kept.values()]  # without the best of each, which stay anyway
    rest = np.concatenate(chosen) if chosen else np.zeros(0)
    best = {group: float(own.max()) for group, own in kept.items()}
    theta = float(rest.min()) if rest.size else max(best.values())
    return {group: min(theta, own) for group, own in best.items()}
