"""What the server of compressed local models computes: weights, coverage, and its step. Plain arrays, no Flower.

See `flexfed.methods.compressed` for whose method this is.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flexfed.submodel import Submodel, positions
from flexfed.units import Arrays, Layout

_KINDS = 8  # of replies that are counted by their number before they are added up entry by entry
_LEAST = 1e-9  # of a weight: a reply that was asked for counts, if hardly


def pseudo_gradient(difference: np.ndarray, learning_rate: float, num_steps: int) -> np.ndarray:
    """A mean gradient for each step: (u_0 - u_H) / (eta * H), negated as differences are.

    Recommended by us after "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization" (Wang
    et al., NeurIPS 2020, https://arxiv.org/abs/2007.07481): clients with more steps do not count twice.
    """
    return np.asarray(difference / np.float32(learning_rate * num_steps), dtype=np.float32)


def fidelity_weight(num_examples: float, error: float, alpha: float) -> float:
    """N (1 - error)^alpha: what a reply weighs whose model was so far from the global one (ours).

    Args:
        num_examples: of the client.
        error: `flexfed.methods.compressed_tiers.compression_error` of the part that it was sent.
        alpha: 0 = by examples alone.
    """
    return max(num_examples * max(1 - error, 0.0) ** alpha, _LEAST) if alpha else num_examples


class Coverage:
    """How many replies cover each entry; replies of equal parts are counted once with their number."""

    def __init__(self, layout: Layout):
        self._layout = layout
        self._kinds: dict[bytes, tuple[Submodel, int]] = {}
        self._counts: dict[str, np.ndarray] = {}
        self.num_replies = 0

    def add(self, submodel: Submodel) -> None:
        """Count one reply."""
        self.num_replies += 1
        _, known = self._kinds.get(submodel.key, (submodel, 0))
        self._kinds[submodel.key] = (submodel, known + 1)
        if len(self._kinds) > _KINDS:
            self._count()

    def counts(self) -> dict[str, np.ndarray]:
        """Tensor -> int32 of its full shape: replies that cover each entry."""
        self._count()
        return {n: self._counts.get(n, np.zeros(shape, np.int32)) for n, shape in self._layout.shapes.items()}

    def _count(self) -> None:
        for submodel, num in self._kinds.values():
            for name, shape in self._layout.shapes.items():
                if submodel.holds(name):
                    into = self._counts.setdefault(name, np.zeros(shape, np.int32))
                    kept = positions(self._layout, submodel, name)
                    mesh = np.ix_(*[np.arange(n) if i is None else i for i, n in zip(kept, shape, strict=True)])
                    into[mesh] += num * submodel.masks.get(name, np.True_)
        self._kinds = {}

    def facts(self) -> dict[str, float]:
        """The least covered entry, the mean, and the share of entries that so many replies cover, for the record."""
        found = np.zeros(self.num_replies + 1, dtype=np.int64)
        for counts in self.counts().values():
            found += np.bincount(counts.reshape(-1), minlength=self.num_replies + 1)
        shares = found / max(1, found.sum())
        histogram = {f"covered-by-{n}": float(share) for n, share in enumerate(shares) if share}
        least = int(np.flatnonzero(found)[0]) if found.any() else 0
        return {"gamma-min": least, "coverage-mean": float(shares @ np.arange(len(shares))), **histogram}


def server_step(
    previous: Mapping[str, np.ndarray],
    averaged: Mapping[str, np.ndarray],
    velocity: Mapping[str, np.ndarray],
    learning_rate: float,
    momentum: float,
    coverage: Mapping[str, np.ndarray] | None = None,
) -> tuple[Arrays, Arrays]:
    """V = momentum V + A, W = W - learning_rate V, where A = previous - averaged is the mean gradient.

    Args:
        previous: W.
        averaged: W - A, as `flexfed.averaging.Averager` gives it.
        velocity: V of the round before; tensors that are missing count as zeros.
        learning_rate: of the server.
        momentum: 0 = none, and no V is kept.
        coverage: where given, entries of count 0 keep W and V: nothing moves that nobody trained. Without it V decays
            there, and still moves W, which is ordinary momentum.

    Returns:
        The new W and V.
    """
    if learning_rate == 1 and not momentum:
        return dict(averaged), {}  # the same, and no rounding
    new: Arrays = {}
    kept: Arrays = {}
    for name, old in previous.items():
        mean = old - averaged[name]
        before = velocity.get(name, np.zeros_like(old))
        speed = momentum * before + mean if momentum else mean
        moved = old - learning_rate * speed
        if coverage is not None and name in coverage:
            still = coverage[name] == 0
            moved, speed = np.where(still, old, moved), np.where(still, before, speed)
        new[name] = np.asarray(moved, dtype=old.dtype)
        kept[name] = np.asarray(speed, dtype=old.dtype)
    return new, kept if momentum else {}
