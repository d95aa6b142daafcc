"""FIARSE: every client trains the largest weights of the global model, as many as its size allows.

"FIARSE: Model-Heterogeneous Federated Learning via Importance-Aware Submodel Extraction" (Feijie Wu, Xingchen Wang,
Yaqing Wang, Tianci Liu, Lu Su, Jing Gao, NeurIPS 2024, arXiv 2407.19389; released code HarliWu/FIARSE). Magnitude is
importance: a client of size s trains the floor(s N) largest entries, and a biased gradient through the threshold has
training itself sort them (`flexfed.methods.fiarse_masks`), so one dense model serves every size. Only the kept entries
and a bit for each entry travel; a masked network computes densely: `unstructured` sizes save bytes, no memory and no
time.

Differences from the released code, which the formulas follow: of the paper only abstract and results were read.
- Clients train `local-epochs` with the run's optimiser, batch and decay, not a number of mini-batches with plain SGD:
  with `momentum=0 weight-decay=0` it is theirs. Whatever the optimiser remembers, an entry that has dropped out stays
  where it was when it dropped out, and is zero in the network.
- They mask the dense model on the client; here the server sends only what is kept, with its threshold. What was sent
  below the threshold (one of `min-per-tensor`, or rounded down by a codec) stays in for the round.
- Of entries that equal the threshold the first are kept, so that there are exactly floor(s N).
- The mean: see `coverage`; "nonzero" is theirs. With "mask" a client has no say in where an entry went that has dropped
  out: one that everybody moves below the threshold keeps its value on the server. "sent" counts those votes, too.
- Who trains which size follows the device's capacity: the largest s that is not above it, the smallest for all others.
  Norms and all else that is never masked come on top of s.
- With one threshold a layer ("layerwise"), each keeps one entry at least.
- Norms have no running statistics, as there; tests have those of each size on the server's proxy data (`batch-norm`).
- `min-per-tensor`; the released code lets small sizes empty whole layers, which the record tells (`emptied-layers`).

`mode = "units"` is ours, not the authors': units are scored by the root mean square of their entries, and the best make
a physically narrow network, which saves memory and time as well. Its entries feel the same gradient factor, with the
score of their unit in place of |w|, but units do not drop out within a round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from flexfed.compute import numbers, place_of
from flexfed.cost import BYTES_PER_NUMBER, memory_budget, training_memory
from flexfed.jobs import Job, Part, Task, Update, make_update, require_memory, train_network
from flexfed.methods.fedlps_scores import Rows
from flexfed.methods.fiarse_masks import Least, Scope, gradient_factor, maskable_tensors, unit_scores
from flexfed.methods.heterofl import LEVELS
from flexfed.submodel import Submodel, narrow_shapes, narrow_sizes, split_flat, unflatten
from flexfed.units import Arrays, Layout

if TYPE_CHECKING:
    from flexfed.data import ClientData

Mode = Literal["unstructured", "units"]
Coverage = Literal["mask", "sent", "nonzero"]


@dataclass(frozen=True)
class FIARSEConfig:
    """What a run may set of FIARSE.

    Attributes:
        sizes: kept shares of the entries at levels a, b, c, ..., largest first; 1 = everything, without a mask.
        mode: single entries ("unstructured", as published), or whole units ("units", ours).
        scope: one threshold for the whole network, or one for each tensor ("layerwise").
        coverage: which replies an entry's mean counts: those that keep it to the end ("mask"), all that were sent it
            ("sent", ours), or those that changed it ("nonzero", the released code). With units all three but
            "nonzero" are the same: what was sent.
        min_per_tensor: what stays of a weight in any case: nothing ("none", as published), its largest entry ("one"),
            or the largest of each of its output rows ("row"). Units keep one of each group anyway.
    """

    sizes: tuple[float, ...] = (1.0, 0.25, 0.0625, 0.015625)
    mode: Mode = "unstructured"
    scope: Scope = "global"
    coverage: Coverage = "mask"
    min_per_tensor: Least = "none"

    def __post_init__(self) -> None:
        s = self.sizes
        falling = all(a > b for a, b in pairwise(s))
        if not 1 <= len(s) <= len(LEVELS) or not falling or not (s[-1] > 0 and s[0] <= 1):
            raise ValueError(f"fiarse.sizes must fall from at most 1 to above 0, largest first, got {s}")
        choices = {"mode": Mode, "scope": Scope, "coverage": Coverage, "min_per_tensor": Least}
        for key, known in choices.items():
            if getattr(self, key) not in get_args(known):
                listed = ", ".join(get_args(known))
                raise ValueError(f"fiarse.{key.replace('_', '-')} must be one of {listed}, got {getattr(self, key)!r}")
        if self.mode == "units" and self.min_per_tensor != "none":
            raise ValueError(
                "fiarse.min-per-tensor is about single entries; leave it at 'none' with fiarse.mode='units'"
            )


def changed_entries(layout: Layout, update: Update) -> tuple[Submodel, np.ndarray]:
    """Of a reply the entries that changed, as a submodel with masks, and their differences: coverage "nonzero"."""
    moved = {}
    for name, values in unflatten(layout, update.submodel, update.difference).items():
        if not (values != 0).all():
            moved[name] = values != 0
    pieces = split_flat(layout, update.submodel, update.difference)
    kept = [values[values != 0] for values in pieces.values()]
    return replace(update.submodel, masks=moved), np.concatenate(kept)


# The client -------------------------------------------------------------------------------------------------


class _Masked:
    """A tensor that trains under a shrinking mask: it holds zeros where entries are not kept."""

    def __init__(self, parameter: Tensor, mask: np.ndarray, threshold: float):
        self._flat = parameter.detach().view(-1)
        self._shape = parameter.shape
        self._threshold = threshold
        place = parameter.device
        self._kept = torch.from_numpy(np.flatnonzero(mask).astype(np.int32)).to(place)
        self._stays = self._flat[self._kept].abs() < threshold  # sent although it is below: stays for the round
        self._left = self._kept[:0]  # entries that have dropped out, and their values then
        self._values = self._flat[:0]
        self._flat[torch.from_numpy(~mask.reshape(-1)).to(place)] = 0.0
        if parameter.requires_grad:
            parameter.register_hook(self._through_threshold)  # type: ignore[no-untyped-call]

    def _through_threshold(self, gradient: Tensor) -> Tensor:
        """dL/dw from dL/dw_eff, before it is clipped: nothing moves that is not kept."""
        found = torch.zeros_like(self._flat)
        factor = gradient_factor(self._flat[self._kept].abs(), self._threshold)
        found[self._kept] = gradient.reshape(-1)[self._kept] * factor
        return found.view(self._shape)

    def shrink(self) -> None:
        """Entries that a step has moved below the threshold drop out; momentum moves none that has."""
        self._flat[self._left] = 0.0
        values = self._flat[self._kept]
        out = (values.abs() < self._threshold) & ~self._stays
        if out.any():
            self._left = torch.cat([self._left, self._kept[out]])
            self._values = torch.cat([self._values, values[out]])
            self._flat[self._kept[out]] = 0.0
            self._kept, self._stays = self._kept[~out], self._stays[~out]

    def mask(self) -> np.ndarray:
        """Bool of the tensor's shape: what is kept now."""
        mask = np.zeros(len(self._flat), dtype=bool)
        mask[numbers(self._kept)] = True
        return mask.reshape(self._shape)

    def values(self) -> np.ndarray:
        """The tensor, entries that have dropped out as they were then."""
        whole = self._flat.clone()
        whole[self._left] = self._values
        return numbers(whole.view(self._shape))


class EntryMasks:
    """Masks that are evaluated anew after every step of local training; thetas are fixed for the round.

    Args:
        model: in place: entries that its masks leave out become zero, gradients pass through the thresholds.
        masks: tensor -> bool of its shape, the entries that were sent.
        thresholds: tensor -> theta.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, np.ndarray], thresholds: Mapping[str, float]):
        self._tensors = {n: _Masked(p, masks[n], thresholds[n]) for n, p in model.named_parameters() if n in masks}

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """A step of the weights, and of what they keep."""
        optimizer.step()
        for tensor in self._tensors.values():
            tensor.shrink()

    def masks(self) -> Arrays:
        """What is kept now."""
        return {name: tensor.mask() for name, tensor in self._tensors.items()}

    def values(self) -> Arrays:
        """The masked tensors, with the values at which entries dropped out."""
        return {name: tensor.values() for name, tensor in self._tensors.items()}


class UnitFactors:
    """The gradient factor of whole units, by their score of the moment.

    Args:
        task: the network and its settings.
        job: the narrow part, and the theta of each group that may be cut.
        model: in place: its gradients pass through the thresholds.
    """

    def __init__(self, task: Task, job: Job, model: nn.Module):
        maskable = maskable_tensors(task.layout, task.factory)
        self._rows = Rows(task.layout, job.submodel, model, vectors=True)
        self._tensors = {n: p for n, p in model.named_parameters() if n in maskable and n in self._rows.places}
        self._thresholds = torch.zeros(task.layout.num_units, device=place_of(model))
        for group, theta in thresholds_of(job, cut_groups(task.layout)).items():
            span = task.layout.groups[group]
            self._thresholds[span.start : span.stop] = theta
        self._rescore()
        for name, parameter in self._tensors.items():
            if parameter.requires_grad:
                parameter.register_hook(self._of(name))  # type: ignore[no-untyped-call]

    def _rescore(self) -> None:
        scores = unit_scores(self._rows, {name: p.detach() for name, p in self._tensors.items()})
        self._factors = gradient_factor(scores, self._thresholds)

    def _of(self, name: str) -> Callable[[Tensor], Tensor]:
        axis, units = self._rows.places[name]

        def scale(gradient: Tensor) -> Tensor:
            shape = [1] * gradient.ndim
            shape[axis] = -1
            return gradient * self._factors[units].view(shape)

        return scale

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """A step of the weights, and the scores of what they are now."""
        optimizer.step()
        self._rescore()


def cut_groups(layout: Layout) -> tuple[str, ...]:
    """The groups that may be cut, in their order."""
    return tuple(group for group in layout.groups if group not in layout.fixed)


def thresholds_of(job: Job, names: tuple[str, ...]) -> dict[str, float]:
    """Theta of each tensor (of each group), as a job tells them in this order.

    Raises:
        ValueError: another number of them.
    """
    told = job.config["thresholds"]
    if not isinstance(told, list) or len(told) != len(names):
        raise ValueError(f"a job of fiarse should tell {len(names)} thresholds, got {told!r}")
    return {name: float(cast(float, theta)) for name, theta in zip(names, told, strict=True)}


def memory_beside(task: Task, submodel: Submodel) -> int:
    """Bytes that must be free for the masks, beside those for training the network itself; at most.

    Of every kept entry its place is known, and whether it must stay, or where it was when it dropped out: 8 bytes.
    While a tensor's gradient passes, further vectors of its kept entries stand there; after training the reply does,
    three times, beside what the network is then.
    """
    if not submodel.masks:
        return 0
    kept = [int(np.count_nonzero(mask)) for mask in submodel.masks.values()]
    passing = max(32 * num + 4 * mask.size for num, mask in zip(kept, submodel.masks.values(), strict=True))
    plain = training_memory(task.factory, task.layout, submodel, task.input_shape, task.training)
    whole = BYTES_PER_NUMBER * sum(map(math.prod, narrow_shapes(task.layout, submodel).values()))
    after = (1 if task.method.coverage == "mask" else 2) * whole + 9 * sum(kept)
    return memory_budget(8 * sum(kept) + max(plain + passing, after)) - memory_budget(plain)


def local_update(job: Job, task: Task, data: ClientData) -> Update:
    """Train what was sent; entries that fall below their threshold drop out, and are not sent back."""
    require_memory(job.device, job.submodel, lambda part: task.memory_to_train(part) + memory_beside(task, part))
    model, weight = task.network(job.arrays), float(len(data.train.labels))
    if job.submodel.masks:
        return _masked_update(job, task, data, model, weight)
    if "thresholds" in job.config:
        trained = train_network(model, job, task, data.train, step=UnitFactors(task, job, model).step)
    else:
        trained = train_network(model, job, task, data.train)
    return make_update(job, task, job.submodel, job.arrays, trained, weight)


def _masked_update(job: Job, task: Task, data: ClientData, model: nn.Module, weight: float) -> Update:
    names = tuple(name for name in task.layout.shapes if name in job.submodel.masks)
    entries = EntryMasks(model, job.submodel.masks, thresholds_of(job, names))
    trained = train_network(model, job, task, data.train, step=entries.step)
    if task.method.coverage == "mask":
        update = make_update(job, task, job.submodel, job.arrays, trained, weight)
        return _kept_to_the_end(task.layout, update, entries.masks())
    whole = trained._replace(arrays={**trained.arrays, **entries.values()})
    update = make_update(job, task, job.submodel, job.arrays, whole, weight)
    return replace(update, trained=Part(job.submodel, trained.arrays))


def _kept_to_the_end(layout: Layout, update: Update, masks: Arrays) -> Update:
    """Of an update the entries that no step has dropped; what is not masked is all there."""
    sent = update.submodel
    bits = [
        masks[name][sent.masks[name]] if name in masks else np.ones(size, dtype=bool)
        for name, size in narrow_sizes(layout, sent).items()
    ]
    return replace(update, submodel=replace(sent, masks=masks), difference=update.difference[np.concatenate(bits)])
