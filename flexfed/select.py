"""Which units a submodel keeps: a prefix, a rolling window, or the best by score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import nn

from flexfed.submodel import Submodel
from flexfed.units import Layout

Rounding = Literal["ceil", "floor"]


@dataclass(frozen=True)
class RatioGroup:
    """Layers that share one width ratio (FlexFL prunes by such groups, not layer by layer).

    A network that has its own table carries it as the attribute `ratio_groups: tuple[RatioGroup, ...]`.

    Attributes:
        name: how the group is called in messages.
        modules: module names; the tensors of these modules and of everything below them are the
            group's parameters (P in FlexFL), and their ReLUs measure its APoZ.
        widths: convolution or linear module -> multiple m. The module's W outputs are cut to
            m * floor(W / m * ratio), so m = 6 keeps an inverted residual's hidden width six times its input's.
    """

    name: str
    modules: tuple[str, ...]
    widths: Mapping[str, int]


def kept_units(ratio: float, size: int, rounding: Rounding = "ceil") -> int:
    """Number of units an axis of `size` keeps at `ratio`: rounded, at least 1, at most `size`.

    Binary fractions make 0.07 * 100 a hair more than 7, so 1e-9 is taken off before rounding up and
    added before rounding down (the released HeteroFL and ScaleFL code does not: it gets 8, not 7).

    Raises:
        ValueError: the ratio is not in (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    exact = ratio * size
    kept = math.ceil(exact - 1e-9) if rounding == "ceil" else math.floor(exact + 1e-9)
    return min(max(kept, 1), size)


def prefix(layout: Layout, sizes: Mapping[str, int]) -> Submodel:
    """The first `sizes[group]` units of every group; groups not named, and fixed ones, stay whole.

    Raises:
        ValueError: a size below 1 or above the group's.
    """
    units = np.ones(layout.num_units, dtype=bool)
    for group, size in sizes.items():
        span = layout.groups[group]
        if group in layout.fixed:
            continue
        if not 1 <= size <= len(span):
            raise ValueError(f"group {group!r} has {len(span)} units; expected to keep 1..{len(span)}, got {size}")
        units[span.start + size : span.stop] = False
    return Submodel(units)


def prefix_ratio(layout: Layout, ratio: float, rounding: Rounding = "ceil") -> Submodel:
    """The first `ratio` of every group that may be cut (HeteroFL's static, nested submodels)."""
    return prefix(layout, {g: kept_units(ratio, len(span), rounding) for g, span in layout.groups.items()})


def window(layout: Layout, ratio: float, start: int, step: int = 1) -> Submodel:
    """A window of `ratio` of every group that begins at unit `start` and wraps around (FedRolex).

    Args:
        layout: the network's numbering.
        ratio: kept fraction of each group, in (0, 1].
        start: where the window begins, in units, taken modulo each group's own width.
        step: 1 rolls forwards as the paper has it, -1 backwards as the released code does.
    """
    units = np.zeros(layout.num_units, dtype=bool)
    for group, span in layout.groups.items():
        size = len(span)
        kept = size if group in layout.fixed else kept_units(ratio, size)
        units[span.start + (step * start + np.arange(kept)) % size] = True
    return Submodel(units)


def top(layout: Layout, scores: np.ndarray, ratio: float, rounding: Rounding = "ceil") -> Submodel:
    """The `ratio` of every group with the highest scores; of equal scores the lower unit number wins.

    Args:
        layout: the network's numbering.
        scores: one for each unit, (num_units,); those of fixed groups, which stay whole, do not matter.
        ratio: kept fraction of each group, in (0, 1].
        rounding: of the units that a group keeps; at least one.
    """
    units = np.zeros(layout.num_units, dtype=bool)
    for group, span in layout.groups.items():
        size = len(span)
        kept = size if group in layout.fixed else kept_units(ratio, size, rounding)
        order = np.argsort(-scores[span.start : span.stop], kind="stable")
        units[span.start + order[:kept]] = True
    return Submodel(units)


def ratio_groups(layout: Layout, model: nn.Module) -> tuple[RatioGroup, ...]:
    """The network's own ratio groups, or one for each layout group that may be cut.

    Without a table of its own, a group's parameters are the tensors whose output axis belongs to it; a norm
    behind a concatenation spans several groups and counts for the first.
    """
    table = getattr(model, "ratio_groups", None)
    if table is not None:
        return tuple(table)
    members: dict[str, list[str]] = {g: [] for g in layout.groups if g not in layout.fixed}
    for name in layout.shapes:
        owner = next(iter(layout.groups_of(name)), "")
        if owner in members:
            members[owner].append(name.rpartition(".")[0])
    return tuple(RatioGroup(g, tuple(dict.fromkeys(names)), {g: 1}) for g, names in members.items())


def ratio_widths(layout: Layout, groups: Sequence[RatioGroup], ratios: Sequence[float]) -> dict[str, int]:
    """Units each layout group keeps when ratio group i keeps `ratios[i]`: floor(W * r), at least one.

    Raises:
        ValueError: not one ratio for each ratio group.
    """
    if len(groups) != len(ratios):
        raise ValueError(f"expected one ratio for each of {len(groups)} ratio groups, got {len(ratios)}")
    sizes: dict[str, int] = {}
    for group, ratio in zip(groups, ratios, strict=True):
        for module, multiple in group.widths.items():
            name = layout.group_of(f"{module}.weight")
            base = len(layout.groups[name]) // multiple
            sizes[name] = multiple * max(1, math.floor(base * ratio))
    return sizes
