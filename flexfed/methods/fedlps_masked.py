"""FedLPS on a device that holds the whole network: masks that may change at every batch, for parity with the code.

See `flexfed.methods.fedlps`. The default trains a physically narrow network instead and needs none of this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from flexfed.compute import numbers, place_of
from flexfed.methods.fedlps_scores import Rows, ScoreLearner, unit_norms
from flexfed.select import top
from flexfed.submodel import full
from flexfed.training import proximal
from flexfed.units import Arrays

if TYPE_CHECKING:
    from flexfed.jobs import Task


class MaskedNetwork:
    """A full network whose forward pass sees only the rows of the units with the highest scores.

    Weights are never overwritten: a masked unit keeps its values, and returns with them when it is kept again. What
    is masked in a batch does not move in that batch, whatever the optimiser remembers. Where masked units are silent
    (`mask-bias`), the columns behind them do not move either, as in a narrow network.

    Args:
        task: the network and FedLPS's settings.
        arrays: the full model.
        learner: the client's scores, learned at every step.
        ratio: kept fraction of the units.

    Raises:
        ValueError: a layer whose outputs stand on another axis than the first.
    """

    def __init__(self, task: Task, arrays: Arrays, learner: ScoreLearner, ratio: float):
        self.model = task.network(arrays)
        self._task = task
        self._learner = learner
        self._ratio = ratio
        prox = task.method.prox
        self._start = {name: p.detach().clone() for name, p in self.model.named_parameters()} if prox else {}
        self._axes = {name: p.ndim for name, p in self.model.named_parameters()}
        self._rows = Rows(task.layout, full(task.layout), self.model, vectors=task.method.mask_bias)
        self._effective: dict[str, Tensor] = {}
        for name, (axis, _) in self._rows.places.items():
            if axis:
                raise ValueError(f"{name!r} has its outputs on axis {axis}: set fedlps.mask-update='round'")
        self._take_mask()

    def _take_mask(self) -> None:
        """Keep the units with the highest scores."""
        self.units = top(self._task.layout, numbers(self._learner.scores.values), self._ratio, "floor").units
        self._active = torch.from_numpy(self.units.copy()).to(place_of(self.model))

    def loss(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the masked network, and the proximal term."""
        if self._task.method.mask_update == "batch":
            self._take_mask()
        self._effective = {}
        for name, parameter in model.named_parameters():
            if name in self._rows.places:
                self._effective[name] = parameter * self._row_mask(name)
                if parameter.requires_grad:
                    self._effective[name].retain_grad()  # scores learn from all rows, masked or not
        logits: Tensor = functional_call(model, self._effective, (inputs,))
        return functional.cross_entropy(logits, labels) + proximal(model, self._start, self._task.method.prox)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Learn the scores, step, and put back what is masked."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            products = {n: e.grad * parameters[n] for n, e in self._effective.items() if e.grad is not None}
            scope = self._active if self._task.method.score_scope == "active" else torch.ones_like(self._active)
            self._learner.learn(self._rows.sums(products), unit_norms(self._rows, self._effective), self._active, scope)
            before = {name: p.clone() for name, p in parameters.items()}
            optimizer.step()
            for name, parameter in parameters.items():
                mask = self._entry_mask(name)
                parameter.copy_(torch.where(mask, parameter, before[name]))
                for remembered in optimizer.state[parameter].values():
                    if isinstance(remembered, Tensor) and remembered.shape == parameter.shape:
                        remembered.mul_(mask)

    def _row_mask(self, name: str) -> Tensor:
        """Bool, broadcast over all axes but the first."""
        _, units = self._rows.places[name]
        return self._active[units].view(-1, *[1] * (self._axes[name] - 1))

    def _entry_mask(self, name: str) -> Tensor:
        """Bool, entries that may move in this batch."""
        mask = (
            self._row_mask(name)
            if name in self._rows.places
            else torch.ones((), dtype=torch.bool, device=self._active.device)
        )
        axes = self._task.layout.axes[name]
        if self._task.method.mask_bias and len(axes) > 1 and axes[1] is not None:
            columns = self._active[torch.from_numpy(axes[1]).to(self._active.device)]
            mask = mask & columns.view(1, -1, *[1] * (len(axes) - 2))
        return mask

    def mask_of(self, name: str) -> np.ndarray:
        """The rows of a tensor that the last mask kept, as bool that broadcasts to its shape."""
        return numbers(self._row_mask(name)) if name in self._rows.places else np.ones((), dtype=bool)
