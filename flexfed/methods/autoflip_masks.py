"""AutoFLIP's masks: how far clients had to move each entry, made comparable between tensors, cut at one quantile.

See `flexfed.methods.autoflip` for the paper, and for what of this is ours. The order is fixed: square, mean over
clients, normalise each tensor, one threshold for all. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from flexfed.units import Arrays

Normalise = Literal["minmax", "robust"]


class Deviations(NamedTuple):
    """What one explorer found: its weight in the mean, and tensor -> squared deviation of each entry."""

    weight: float
    arrays: Mapping[str, np.ndarray]


class Kept(NamedTuple):
    """The threshold, and tensor -> bool of its shape: the entries kept."""

    threshold: float
    masks: Arrays


def squared_deviations(start: Mapping[str, np.ndarray], end: Mapping[str, np.ndarray]) -> Arrays:
    """(end - start)^2 of every entry of the tensors of `start`."""
    return {name: np.square(end[name] - before) for name, before in start.items()}


def mean_deviations(explorers: Iterable[Deviations]) -> Arrays:
    """Their mean, one explorer in memory at a time.

    Raises:
        ValueError: there is none.
    """
    total: Arrays = {}
    weights = 0.0
    for weight, arrays in explorers:
        for name, array in arrays.items():
            total[name] = total.get(name, 0.0) + weight * array.astype(np.float64)
        weights += weight
    if not weights:
        raise ValueError("a mean of deviations needs at least one explorer with a weight, got none")
    return {name: array / weights for name, array in total.items()}


def guidance(mean: Mapping[str, np.ndarray], normalise: Normalise = "minmax") -> Arrays:
    """The guidance: high where clients had to move an entry far to fit their data, compared within its tensor.

    Where a tensor has one value only the released code divides 0 by 0, which makes the whole mask zero. Here such a
    tensor scores 1 throughout (ours): knowing nothing must not mean unimportant.

    Args:
        mean: tensor -> mean squared deviation of each entry.
        normalise: "minmax", (d - min) / (max - min), or "robust", (d - lower median) / (q75 - q25), which is minmax
            where the quartiles are equal (ours).
    """
    rule = {"minmax": _minmax, "robust": _robust}[normalise]
    return {name: rule(np.asarray(array, dtype=np.float64)) for name, array in mean.items()}


def _minmax(array: np.ndarray) -> np.ndarray:
    low, high = array.min(), array.max()
    return (array - low) / (high - low) if high > low else np.ones_like(array)


def _robust(array: np.ndarray) -> np.ndarray:
    low, high = np.quantile(array, (0.25, 0.75))
    if low == high:
        return _minmax(array)
    middle = (array.size - 1) // 2  # of an even number the smaller of the two in the middle
    return np.asarray((array - np.partition(array, middle, axis=None)[middle]) / (high - low))


def keep_above(scores: Mapping[str, np.ndarray], quantile: float) -> Kept:
    """Keep what scores above the quantile over all tensors together; what equals it is pruned.

    Without ties at the threshold floor(quantile * (N - 1)) + 1 of N entries are pruned, with ties more. Two guards
    are ours: a quantile of 0 prunes nothing (the formula prunes the least entry), and where the threshold reaches the
    highest score, the entries that have that score are kept (the formula prunes everything).

    Raises:
        ValueError: the quantile is not in [0, 1).
    """
    if not 0 <= quantile < 1:
        raise ValueError(f"the quantile must be in [0, 1), got {quantile}")
    if quantile == 0:
        return Kept(-np.inf, {name: np.ones(array.shape, dtype=bool) for name, array in scores.items()})
    everything = np.concatenate([array.reshape(-1) for array in scores.values()])
    threshold, highest = float(np.quantile(everything, quantile)), float(everything.max())
    if threshold >= highest:
        return Kept(threshold, {name: array == highest for name, array in scores.items()})
    return Kept(threshold, {name: array > threshold for name, array in scores.items()})


def agreed_scores(explorers: Iterable[Deviations], quantile: float, normalise: Normalise) -> Arrays:
    """Guidance times the share of explorers that would keep an entry by themselves (ours; off by default).

    Versions 4 and 5 of the paper say that pruning is refined by how much clients agree. Their formula is not known
    to us, and this is not it.

    Raises:
        ValueError: there is no explorer.
    """
    votes: Arrays = {}
    num = 0

    def counted() -> Iterable[Deviations]:
        nonlocal num
        for explorer in explorers:
            for name, mask in keep_above(guidance(explorer.arrays, normalise), quantile).masks.items():
                votes[name] = votes.get(name, 0.0) + mask.astype(np.float64)
            num += 1
            yield explorer

    scores = guidance(mean_deviations(counted()), normalise)
    return {name: array * votes[name] / num for name, array in scores.items()}


def random_scores(shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator) -> Arrays:
    """Uniform in [0, 1): the baseline that knows nothing."""
    return {name: rng.random(shape) for name, shape in shapes.items()}


def num_pruned(masks: Mapping[str, np.ndarray]) -> int:
    """Entries that masks leave out."""
    return sum(int(mask.size - np.count_nonzero(mask)) for mask in masks.values())
