"""FedLPS's learned importance: one score for each unit, trained beside the weights, private to its client.

See `flexfed.methods.fedlps` for the source. A score is what keeps its unit: the units with the highest scores of
each group are the submodel (`flexfed.select.top`). Scores of all groups stand in one vector over the layout's units;
entries of outputs mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from flexfed.compute import numbers, place_of
from flexfed.submodel import Submodel, axes_cut
from flexfed.units import Arrays, Layout, out_axis

if TYPE_CHECKING:
    from flexfed.jobs import Task

BETAS = (0.9, 0.999)
EPSILON = 1e-8  # these two are Adam's own defaults
_FIELDS = ("values", "first", "second", "steps")


@dataclass(frozen=True)
class Scores:
    """A client's scores and what Adam remembers of each; all are vectors over the layout's units.

    Attributes:
        values: float32, the scores.
        first: float32, running mean of the gradients.
        second: float32, running mean of their squares.
        steps: float32, how often each score was updated: units come and go, so each has a count of its own.
    """

    values: Tensor
    first: Tensor
    second: Tensor
    steps: Tensor

    def arrays(self) -> Arrays:
        """For the client's private state."""
        return {f"scores/{name}": numbers(getattr(self, name)) for name in _FIELDS}

    def to(self, device: torch.device) -> Scores:
        """The same on a device."""
        return Scores(*(getattr(self, name).to(device) for name in _FIELDS))


def initial_scores(layout: Layout, rng: np.random.Generator) -> Scores:
    """Standard normals that fall within each group, so that the first mask of every client is a prefix."""
    values = np.zeros(layout.num_units, dtype=np.float32)
    for span in layout.groups.values():
        values[span.start : span.stop] = -np.sort(-rng.standard_normal(len(span)))
    zeros = [torch.zeros(layout.num_units) for _ in range(3)]
    return Scores(torch.from_numpy(values), *zeros)


def kept_scores(state: Mapping[str, np.ndarray]) -> Scores:
    """Undo `Scores.arrays`."""
    return Scores(
        *(torch.from_numpy(state[f"scores/{name}"].copy()) for name in ("values", "first", "second", "steps"))
    )


class Rows:
    """Where the rows of each unit stand in the tensors of a part: what sums over a unit's entries need.

    A unit's rows are its entries along the outputs of a layer: weights, and bias and norm where `vectors` is set.

    Args:
        layout: the network's numbering.
        submodel: the part.
        model: the network; its modules tell which axis holds a layer's outputs.
        vectors: count biases, and scales and shifts of norms, among a unit's entries.
    """

    def __init__(self, layout: Layout, submodel: Submodel, model: nn.Module, vectors: bool):
        self.num_units = layout.num_units
        self.places: dict[str, tuple[int, Tensor]] = {}  # tensor -> (axis of the outputs, unit of each position)
        self._device = place_of(model)
        outputs = layout.fixed_units
        for name, shape in layout.shapes.items():
            if not submodel.holds(name) or not shape or (len(shape) == 1 and not vectors):
                continue
            axis = out_axis(model, name)
            units, held = layout.axes[name][axis], axes_cut(layout, submodel, name)[axis]
            if units is not None and not outputs[units].any():
                kept = units if held is None else units[submodel.units[units]]
                self.places[name] = axis, torch.from_numpy(kept).to(self._device)

    def sums(self, entries: Mapping[str, Tensor]) -> Tensor:
        """Sum over the entries of each unit, (num_units,); 0 for units that are not there.

        Args:
            entries: tensor name -> values of the shape that the part has; names that are absent count nothing.
        """
        total = torch.zeros(self.num_units, device=self._device)
        for name, (axis, units) in self.places.items():
            if name in entries:
                values = entries[name].movedim(axis, 0)
                total.index_add_(0, units, values.reshape(len(units), -1).sum(1))
        return total


def unit_norms(rows: Rows, tensors: Mapping[str, Tensor]) -> Tensor:
    """L1 norm of each unit's weights, (num_units,): all layers of a group together; vectors have no part in it."""
    return rows.sums({name: tensor.detach().abs() for name, tensor in tensors.items() if tensor.ndim > 1})


def straight_through(scores: Tensor, products: Tensor) -> Tensor:
    """Gradient of the loss with respect to the scores, if the mask's own derivative is taken as the sigmoid's.

    sigma'(Q_j) * sum over the unit's entries of dL/dw * w.

    Args:
        scores: Q, (num_units,).
        products: the sum for each unit, (num_units,).
    """
    sigmoid = torch.sigmoid(scores)
    return sigmoid * (1 - sigmoid) * products


def score_targets(norms: Tensor, active: Tensor, layout: Layout, standardised: bool = False) -> Tensor:
    """What the regulariser draws scores to: sigma(L1 norm of the masked unit), so 0.5 where it is masked.

    The sigmoid is as good as 1 for wide layers (a 3x3 convolution of 64 to 128 channels, freshly drawn: 0.99999 and
    more). `standardised` (ours) subtracts mean and divides by deviation over the active units of each group first.

    Args:
        norms: (num_units,).
        active: bool, (num_units,).
        layout: the network's numbering.
        standardised: see above.
    """
    masked = torch.where(active, norms, torch.zeros_like(norms))
    if standardised:
        masked = masked.clone()
        for span in layout.groups.values():
            here = slice(span.start, span.stop)
            kept = masked[here][active[here]]
            if len(kept):
                deviation = kept.std(correction=0)
                masked[here][active[here]] = (kept - kept.mean()) / (deviation if deviation > 0 else 1.0)
    return torch.sigmoid(masked)


def group_sizes(layout: Layout) -> Tensor:
    """J of each unit's group, float32 (num_units,)."""
    sizes = torch.ones(layout.num_units)
    for span in layout.groups.values():
        sizes[span.start : span.stop] = len(span)
    return sizes


def regulariser_gradient(scores: Tensor, targets: Tensor, sizes: Tensor) -> Tensor:
    """Derivative of the mean over a group's J units of (Q_j - t_j)^2: 2 / J (Q_j - t_j).

    The released code subtracts along two axes instead, and so pulls every score to the mean target.

    Args:
        scores: Q, (num_units,).
        targets: t, (num_units,).
        sizes: J of each unit's group.
    """
    return 2 / sizes * (scores - targets)


def adam_step(scores: Scores, gradient: Tensor, active: Tensor, learning_rate: float) -> Scores:
    """One step of Adam on the active units alone, each with its own count of steps.

    Torch's Adam counts steps for a whole tensor; a unit that is active for the first time in round 50 would then
    begin with a step several times too long.
    """
    first = BETAS[0] * scores.first + (1 - BETAS[0]) * gradient
    second = BETAS[1] * scores.second + (1 - BETAS[1]) * gradient**2
    steps = scores.steps + 1
    size = first / (1 - BETAS[0] ** steps) / ((second / (1 - BETAS[1] ** steps)).sqrt() + EPSILON)
    new = Scores(scores.values - learning_rate * size, first, second, steps)
    return _where(active, new, scores)


def sgd_step(scores: Scores, gradient: Tensor, active: Tensor, rate: float, momentum: float, decay: float) -> Scores:
    """One step of SGD on the active units alone; `first` holds the momentum. As torch's, when begun at zero."""
    first = momentum * scores.first + gradient + decay * scores.values
    return _where(active, replace(scores, values=scores.values - rate * first, first=first), scores)


def _where(active: Tensor, new: Scores, old: Scores) -> Scores:
    return Scores(*(torch.where(active, getattr(new, name), getattr(old, name)) for name in _FIELDS))


class ScoreLearner:
    """Moves the scores once for every step of the weights.

    Args:
        scores: of this client, so far.
        task: FedLPS's settings, and the weights' own momentum and decay, which "shared-sgd" takes over.
        learning_rate: of the weights in this round; "shared-sgd" takes it over, too.
    """

    def __init__(self, scores: Scores, task: Task, learning_rate: float):
        self.scores = scores
        self._task = task
        self._rate = learning_rate
        self._sizes = group_sizes(task.layout).to(scores.values.device)

    def learn(self, products: Tensor, norms: Tensor, active: Tensor, scope: Tensor) -> None:
        """One step.

        Args:
            products: sum over each unit's entries of gradient times weight, (num_units,).
            norms: L1 norm of each unit's weights.
            active: bool, units that the mask kept.
            scope: bool, units whose scores may move.
        """
        config = self._task.method
        values = self.scores.values
        gradient = straight_through(values, products)
        if config.importance_weight:
            standardised = config.importance_target == "sigmoid-zscore-l1"
            targets = score_targets(norms, active, self._task.layout, standardised)
            gradient += config.importance_weight * regulariser_gradient(values, targets, self._sizes)
        if config.score_optimizer == "adam":
            self.scores = adam_step(self.scores, gradient, scope, config.score_learning_rate)
        else:
            training = self._task.training
            sgd = training.momentum, training.weight_decay
            self.scores = sgd_step(self.scores, gradient, scope, self._rate, *sgd)
