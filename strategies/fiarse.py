"""FIARSE's server: every size's largest entries of the model of the moment, each to the devices that hold the size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from flexfed.devices import Device
from flexfed.jobs import Assignment, Scalar, Update
from flexfed.methods.fedlps_scores import Rows
from flexfed.methods.fiarse import FIARSEConfig, changed_entries, memory_beside
from flexfed.methods.fiarse_masks import (
    Size,
    entry_size,
    least_entries,
    maskable_tensors,
    output_axes,
    unit_scores,
    unit_size,
)
from flexfed.methods.heterofl import LEVELS
from flexfed.networks import build_on_meta
from flexfed.submodel import Submodel, full, masks_within
from flexfed.units import Arrays
from strategies.base import SubmodelStrategy


class FIARSE(SubmodelStrategy):
    """Submodels by magnitude, drawn anew from each round's model; see `flexfed.methods.fiarse`.

    Capacity is compared with a size itself, the share of the entries that may be masked: what is never masked (norms)
    comes on top. Memory and deadline are those of the network as it is trained, which single entries do not narrow.
    """

    _of: tuple[Arrays, dict[str, Size]] | None = None  # a model, and its sizes

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        names = {LEVELS[i]: size for i, size in enumerate(self._config.sizes)}
        self._shares = dict(reversed(names.items()))  # level -> s, smallest first

    @property
    def _config(self) -> FIARSEConfig:
        config: FIARSEConfig = self.task.method
        return config

    # Sizes --------------------------------------------------------------------------------------------------------

    def levels(self) -> dict[str, Submodel]:
        """Every size of the model of the moment, smallest first."""
        return {name: size.submodel for name, size in self._sizes().items()}

    def _sizes(self) -> dict[str, Size]:
        if self._of is None or self._of[0] is not self.arrays:
            cut = self._units if self._config.mode == "units" else self._entries
            self._of = self.arrays, cut({name: self.arrays[name] for name in self._maskable})
        return self._of[1]

    def _entries(self, arrays: Arrays) -> dict[str, Size]:
        config, found = self._config, {}
        wanted = least_entries(arrays, config.min_per_tensor, self._axes)
        for name, share in self._shares.items():
            if share == 1:
                found[name] = self._everything
                continue
            masks, thresholds = entry_size(arrays, share, config.scope, wanted)
            found[name] = Size(Submodel(self._everything.submodel.units, masks=masks), thresholds)
        return found

    def _units(self, arrays: Arrays) -> dict[str, Size]:
        layout, found = self.task.layout, {}
        scores = unit_scores(self._rows, {name: torch.from_numpy(np.array(a)) for name, a in arrays.items()}).numpy()
        for name, share in self._shares.items():
            whole = share == 1
            found[name] = self._everything if whole else unit_size(layout, scores, share, self._config.scope)
        return found

    @cached_property
    def _everything(self) -> Size:
        return Size(full(self.task.layout), {})

    @cached_property
    def _maskable(self) -> tuple[str, ...]:
        return maskable_tensors(self.task.layout, self.task.factory)

    @cached_property
    def _axes(self) -> dict[str, int]:
        return output_axes(self._maskable, self.task.factory)

    @cached_property
    def _rows(self) -> Rows:
        return Rows(self.task.layout, full(self.task.layout), build_on_meta(self.task.factory), vectors=True)

    # Who trains which ---------------------------------------------------------------------------------------------

    def level_of(self, device: Device) -> str:
        """The largest size that a device holds; the smallest one if it holds none."""
        levels = self.levels()
        held = (name for name in reversed(levels) if self._holds(device, name, levels[name]))
        return next(held, next(iter(levels)))

    def _holds(self, device: Device, name: str, part: Submodel) -> bool:
        if self.settings.ratio_policy != "level":
            return self.budget.holds(device, part)
        narrow = self._config.mode == "unstructured" or self.budget.is_narrow(part, device.width)
        return self._shares[name] <= device.capacity + 1e-9 and narrow and self.budget.bears(device, part)

    def can_train(self, device: Device) -> bool:
        """Whether memory and deadline allow the size that it gets; under a budget capacity, too.

        The smallest may ask for more memory than the largest: masks take some, and everything has none.
        """
        rule = self.budget.bears if self.settings.ratio_policy == "level" else self.budget.holds
        return rule(device, self.levels()[self.level_of(device)])

    def part_of(self, device: Device, server_round: int) -> Assignment:
        """The part of its size, with the thresholds that its training needs."""
        level = self.level_of(device)
        size = self._sizes()[level]
        told: Mapping[str, Scalar] = {"thresholds": list(size.thresholds.values())} if size.thresholds else {}
        return Assignment(size.submodel, level, told)

    def memory_beside(self, submodel: Submodel) -> int:
        """What its masks take in training."""
        return memory_beside(self.task, submodel)

    def bytes_beside(self) -> int:
        """The thresholds."""
        return 8 * max(len(size.thresholds) for size in self._sizes().values())

    def level_for_evaluation(self, device: Device) -> str | None:
        """The size that it trains, or the largest below it that its memory allows to test."""
        if not self.can_train(device):
            return None
        levels = list(self.levels().items())
        own = [name for name, _ in levels].index(self.level_of(device))
        fitting = (name for name, part in reversed(levels[: own + 1]) if self.budget.tests(device, part))
        return next(fitting, None)

    def can_hold(self, device: Device, own: Submodel, server_round: int) -> bool:
        """Whether a device may test what it trained last: masked, it is as large as any.

        Of the global model its own are its size's entries of the moment, not those it trained last.
        """
        if self._config.mode == "units":
            return super().can_hold(device, own, server_round)
        mine = self.settings.personal == "stored-local"
        return mine and self.can_train(device) and self.budget.tests(device, own)

    # Replies ------------------------------------------------------------------------------------------------------

    def check(self, assignment: Assignment, update: Update) -> None:
        """Entries may have dropped out of a reply that counts by its mask; else it holds what was sent.

        Raises:
            ValueError: it holds other entries.
        """
        held, sent = update.submodel, assignment.submodel
        if self._config.coverage == "mask" and sent.masks and masks_within(held, sent):
            update = replace(update, submodel=replace(held, masks=sent.masks))
        super().check(assignment, update)

    def weigh(self, update: Update) -> float:
        """Uniform."""
        return 1.0

    def counted(self, update: Update) -> tuple[Submodel, np.ndarray]:
        """All of a reply, or with coverage "nonzero" what it changed."""
        if self._config.coverage == "nonzero":
            return changed_entries(self.task.layout, update)
        return super().counted(update)

    def round_facts(self) -> dict[str, float]:
        """How many layers the smallest size leaves without a weight."""
        masks = next(iter(self.levels().values())).masks
        return {"emptied-layers": sum(1 for mask in masks.values() if mask.ndim > 1 and not mask.any())}
