"""The server of compressed local models: a tier for each device, and a dense model that learns from all of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from flexfed.checkpoint import State
from flexfed.codecs import CODECS, PLAIN, through
from flexfed.cost import modelled_seconds, round_macs
from flexfed.devices import Device
from flexfed.jobs import Assignment, Part, Update
from flexfed.methods.compressed import CompressedConfig, Mode, memory_to_train, num_steps, training_in
from flexfed.methods.compressed_server import Coverage, fidelity_weight, server_step
from flexfed.methods.compressed_tiers import Tier, TierCost, compression_error, pruned, tier_cost
from flexfed.methods.fedlps import model_norms
from flexfed.networks import build_on_meta
from flexfed.select import prefix_ratio, top, window
from flexfed.submodel import Submodel, extract, full
from flexfed.units import Arrays
from strategies.base import SubmodelStrategy

log = logging.getLogger("flwr")

_NOBODY = 2**32 - 1  # in the place of a partition: what is evaluated is no client's


class Compressed(SubmodelStrategy):
    """Compressed local models; see `flexfed.methods.compressed`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.per = "total" if self._config.aggregate == "zero-fill" else "coverage"
        self._mode: Mode = self._config.mode_for(self.task.training)
        self._velocity: Arrays = {}
        self._known: tuple[Arrays, dict[tuple[float, float, int, int], Submodel]] | None = (
            None  # a global model, its parts
        )
        self._tiers_in_use: tuple[Mapping[int, Device], dict[str, Tier]] | None = None
        self._error = 0.0  # of the part that the reply at hand was trained from
        self._begin_round()
        if self.settings.personal == "global-masked" and any(t.prune or t.codec for t in self._config.tiers.values()):
            raise ValueError(
                "personal='global-masked' sends the units of a client's model dense, which a device of a pruned or "
                "quantised tier need not hold: choose 'stored-local', or a ladder of widths only"
            )

    def _begin_round(self) -> None:
        self._errors: dict[tuple[str, bytes], float] = {}  # tier and part -> compression error of what is sent
        self._coverage = Coverage(self.task.layout)
        self._steps = self._examples = 0.0  # sums of n H and of n over the replies

    @property
    def _config(self) -> CompressedConfig:
        config: CompressedConfig = self.task.method
        return config

    # Who gets which tier ----------------------------------------------------------------------------------------

    @cached_property
    def _costs(self) -> dict[str, TierCost]:
        codecs = self.settings.codec, self._config.reply_codec
        return {name: tier_cost(self.task.layout, tier, *codecs) for name, tier in self._config.tiers.items()}

    @cached_property
    def _dense_bytes(self) -> int:
        return tier_cost(self.task.layout, Tier("full")).model_bytes

    @cached_property
    def _widths(self) -> dict[str, Submodel]:
        """Tier -> a part of its width, for what does not depend on which units those are."""
        return {name: prefix_ratio(self.task.layout, tier.ratio) for name, tier in self._config.tiers.items()}

    @cached_property
    def _memory(self) -> dict[str, int]:
        """Tier -> bytes to receive and to train it."""
        model = self._config.memory == "model"
        return {
            name: cost.train_bytes
            if model
            else cost.down_bytes
            + cost.decoded_bytes
            + memory_to_train(self.task, self._widths[name], self._config.tiers[name])
            for name, cost in self._costs.items()
        }

    def tier_of(self, device: Device) -> Tier | None:
        """The first tier of the ladder that a device can hold; None = none."""
        return next((tier for tier in self._config.tiers.values() if self._is_feasible(device, tier)), None)

    def _is_feasible(self, device: Device, tier: Tier) -> bool:
        """Whether capacity, width, memory and deadline all allow to train a tier."""
        share = self._costs[tier.name].model_bytes / self._dense_bytes
        if share > device.capacity + 1e-9 or not self.budget.is_narrow(self._widths[tier.name], device.width):
            return False
        if device.memory_bytes < math.inf and self._memory[tier.name] > device.memory_bytes:
            return False
        deadline = self.settings.round_deadline
        return not deadline or self._seconds(device, tier) <= deadline

    def _seconds(self, device: Device, tier: Tier) -> float:
        """Modelled seconds to receive a tier, train it, and send its gradient back."""
        training = training_in(self._mode, self.task.training)
        macs = round_macs(self.task.macs(self._widths[tier.name]), device.num_examples, training)
        cost, beside = self._costs[tier.name], 256 * len(self.task.layout.shapes)
        sizes = (math.ceil(1.02 * size) + beside for size in (cost.down_bytes, cost.up_bytes))
        return modelled_seconds(device, macs, *sizes)

    def can_train(self, device: Device) -> bool:
        """Whether any tier is feasible."""
        return self.tier_of(device) is not None

    def prepare(self, grid: Grid) -> None:
        """Say so where some weights can never learn, or where the ladder is not one.

        Raises:
            ValueError: devices measure their memory, which must hold what torch needs; tiers are not chosen by that.
        """
        self._refuse_measuring_devices()
        tiers, codec = self._used().values(), CODECS[self.settings.codec]
        finer = [tier.name for tier in tiers if tier.codec and CODECS[tier.codec].bits > codec.bits]
        if finer:
            log.warning("codec=%s is coarser than tiers %s: larger tiers travel in fewer bits", codec.name, finer)
        fixed = self._config.width_selection in ("prefix", "l1")
        if all(tier.prune or (tier.ratio < 1 and fixed) for tier in tiers):
            log.warning(
                "no device covers the whole model (tiers %s): weights that are small or last may never learn; a tier "
                "that is quantised only, or compressed.width-selection='rolling', would reach them",
                ", ".join(tier.name for tier in tiers) or "none",
            )

    def _refuse_measuring_devices(self) -> None:
        measured = [p for p, device in self.federation.devices.items() if device.measure_memory]
        if self._config.memory == "model" and measured:
            raise ValueError(
                "compressed.memory='model' gives devices tiers that they then refuse, because partitions "
                f"{measured[:5]} measure their memory (measure-memory=true): leave compressed.memory='training'"
            )

    # Which part -------------------------------------------------------------------------------------------------

    def part_of(self, device: Device, server_round: int) -> Assignment:
        """The part of the device's tier, and how it travels.

        Raises:
            ValueError: it can train none.
        """
        tier = self.tier_of(device)
        if tier is None:
            raise ValueError(f"partition {device.partition} ({device.kind}) cannot train any tier of the ladder")
        submodel = self._part(tier, self.arrays, server_round, device.partition)
        reply = self._config.reply_codec if tier.codec else ""
        return Assignment(submodel, tier.name, {"tier": tier.name}, codec=tier.codec, reply_codec=reply)

    def largest_part(self, device: Device, server_round: int) -> Assignment | None:
        """The part of its tier; None for a quantised one: parts without a codec of their own would be too large."""
        tier = self.tier_of(device)
        return None if tier is None or tier.codec else self.part_of(device, server_round)

    def _part(self, tier: Tier, arrays: Arrays, server_round: int, partition: int = _NOBODY) -> Submodel:
        """What a tier keeps of a global model; ranking all weights takes time, so each once for each model."""
        if self._known is None or self._known[0] is not arrays:
            self._known = arrays, {}
        parts, selection = self._known[1], self._config.width_selection
        moves = tier.ratio < 1 and selection in ("rolling", "random")
        drawn_for = partition if moves and selection == "random" else 0
        key = (tier.ratio, tier.prune, server_round if moves else 0, drawn_for)  # whatever its codec
        if key not in parts:
            units = self._units(tier.ratio, arrays, server_round, partition)
            parts[key] = pruned(self.task.layout, units, tier, arrays, self._config.prune_scope)
        return parts[key]

    def _units(self, ratio: float, arrays: Arrays, server_round: int, partition: int) -> Submodel:
        layout, selection = self.task.layout, self._config.width_selection
        if selection == "rolling":
            return window(layout, ratio, server_round - 1)
        if selection == "l1" and ratio < 1:
            return top(layout, model_norms(layout, build_on_meta(self.task.factory), arrays), ratio)
        if selection == "random" and ratio < 1:
            rng = np.random.default_rng([self.settings.seed, server_round, partition, 7])
            return top(layout, rng.random(layout.num_units), ratio)
        return prefix_ratio(layout, ratio)

    def assign(
        self, server_round: int, devices: Mapping[int, Device], rng: np.random.Generator
    ) -> Mapping[int, Assignment]:
        """A uniform cohort of those that can hold a tier, and how far from the global model each one's part is."""
        self._begin_round()
        assigned = super().assign(server_round, devices, rng)
        for assignment in assigned.values():
            key = (assignment.level, assignment.submodel.key)
            if key not in self._errors:
                codec = assignment.codec or self.settings.codec
                self._errors[key] = self._error_of(assignment.submodel, codec)
        return assigned

    def _error_of(self, submodel: Submodel, codec: str) -> float:
        layout = self.task.layout
        sent = through(codec, layout, submodel, extract(layout, submodel, self.arrays))
        return compression_error(layout, self.arrays, Part(submodel, sent))

    # Replies and the server's step ------------------------------------------------------------------------------

    def check(self, assignment: Assignment, update: Update) -> None:
        """A gradient of all that was sent, and as many steps as there can be.

        Raises:
            ValueError: it leaves something out, or tells steps that cannot be.
        """
        super().check(assignment, update)
        if update.submodel != assignment.submodel:
            raise ValueError("it holds another part than it was sent")
        steps = update.metrics.get("steps", 0.0)
        most = num_steps(int(update.weight), training_in(self._mode, self.task.training))
        if not (1 <= steps <= most and steps == int(steps)):
            raise ValueError(f"it should tell its steps, a whole number in 1..{most}, got {steps}")
        self._error = self._errors[assignment.level, assignment.submodel.key]

    def weigh(self, update: Update) -> float:
        """By examples, and by how near its part was to the global model where `alpha` asks for it."""
        return fidelity_weight(update.weight, self._error, self._config.alpha)

    def observe(self, server_round: int, partition: int, update: Update) -> None:
        """Count what it covers, and its steps."""
        self._coverage.add(update.submodel)
        self._steps += update.weight * update.metrics["steps"]
        self._examples += update.weight

    def finish(self, previous: Arrays, averaged: Arrays) -> Arrays:
        """W = W - eta V; with eta = 1 and no momentum what the mean says."""
        covered = self._coverage.counts() if self._config.freeze_uncovered else None
        new, self._velocity = server_step(
            previous, averaged, self._velocity, self._learning_rate(), self._config.server_momentum, covered
        )
        return new

    def _learning_rate(self) -> float:
        local, given = self.task.training.rate_at(self.record.server_round), self._config.server_learning_rate
        if self._mode == "grad":
            return given or local
        return (given or 1.0) * (local * self._steps / self._examples if self._mode == "pseudo" else 1.0)

    def round_facts(self) -> dict[str, float]:
        """Compression error of every tier that was sent, and how many replies cover an entry."""
        found: dict[str, list[float]] = {}
        for (level, _), error in self._errors.items():
            found.setdefault(level, []).append(error)
        errors = {f"delta2-{level}": float(np.mean(values)) for level, values in sorted(found.items())}
        return {**errors, **self._coverage.facts()}

    # Evaluation -------------------------------------------------------------------------------------------------

    def levels(self) -> dict[str, Submodel]:
        """What devices would deploy, one level a tier in use, and last the dense model."""
        server_round, arrays = self.record.server_round, self.arrays
        tiers = {name: tier for name, tier in reversed(self._used().items()) if name != "full"}
        parts = {name: self._part(tier, arrays, server_round) for name, tier in tiers.items()}
        return {**parts, "full": full(self.task.layout)}

    def _used(self) -> dict[str, Tier]:
        """The tiers that devices hold in some round, in the ladder's order."""
        devices = self.federation.devices
        if self._tiers_in_use is None or self._tiers_in_use[0] is not devices:
            held = {self.tier_of(state) for device in devices.values() for state in device.states()}
            self._tiers_in_use = devices, {n: t for n, t in self._config.tiers.items() if t in held}
        return self._tiers_in_use[1]

    def level_codec(self, name: str) -> str:
        """The tier's."""
        tier = self._config.tiers.get(name)
        return tier.codec if tier is not None and tier.codec else PLAIN

    def level_for_evaluation(self, device: Device) -> str | None:
        """The device's tier, if its memory allows to test that."""
        tier = self.tier_of(device)
        return tier.name if tier is not None and self.budget.tests(device, self._widths[tier.name]) else None

    def can_hold(self, device: Device, own: Submodel, server_round: int) -> bool:
        """Whether it is no wider than the device's tier; its own model is as compressed as it was sent."""
        tier = self.tier_of(device)
        fits = tier is not None and self.budget.share(own) <= self.budget.share(self._widths[tier.name]) + 1e-9
        return fits and self.budget.tests(device, own)

    # The record -------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What each tier costs, for summary.json."""
        costs = ((name, self._costs[name]) for name in self._config.tiers)
        return {"tiers": {n: {"model-bytes": c.model_bytes, "train-bytes": c.train_bytes} for n, c in costs}}

    def state_dict(self) -> State:
        """The server's momentum."""
        return {f"velocity/{name}": array for name, array in self._velocity.items()}

    def load_state_dict(self, state: State) -> None:
        """Put it back."""
        known = {key.removeprefix("velocity/"): v for key, v in state.items() if key.startswith("velocity/")}
        self._velocity = dict(known)
