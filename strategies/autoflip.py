"""AutoFLIP's server: ask devices to explore, cut the network at a quantile of what they found, step with momentum."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from flexfed.budget import Budget
from flexfed.checkpoint import State
from flexfed.cost import layer_uses
from flexfed.devices import Device
from flexfed.jobs import Assignment, Task, Update
from flexfed.methods.autoflip import (
    AutoFLIPConfig,
    exploration,
    guidance_bytes,
    momentum_step,
    prunable_tensors,
    read_deviations,
)
from flexfed.methods.autoflip_masks import (
    Deviations,
    agreed_scores,
    guidance,
    keep_above,
    mean_deviations,
    random_scores,
)
from flexfed.methods.autoflip_store import DeviationStore
from flexfed.methods.autoflip_units import Producer, close, covered, masked_part, producers, without_least_units
from flexfed.networks import build_on_meta
from flexfed.submodel import Submodel, full, narrow_sizes, pack, unpack
from flexfed.units import Arrays
from strategies.fedavg import FedAvg

log = logging.getLogger("flwr")

_KINDS = ("part/", "velocity/")  # of a checkpoint's tensors


class AutoFLIP(FedAvg):
    """One mask for all, found by exploration before round 1; see `flexfed.methods.autoflip`.

    A device takes part if it can train the network that it might be sent: the narrow one where that is known (static
    masks), else the whole. To explore it has to train the whole one with the optimiser of exploration.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._explored: dict[int, tuple[float, int]] = {}  # partition -> examples, epochs
        self._part = full(self.task.layout)  # of this round; masked once there is a mask
        self._held = covered(self.task.layout, self._part)
        self._velocity: Arrays = {}
        if self.settings.personal == "global-masked":
            raise ValueError(
                "personal='global-masked' says nothing new of autoflip, whose clients all have the published network: "
                "choose 'stored-local' or 'none'"
            )

    @property
    def _config(self) -> AutoFLIPConfig:
        config: AutoFLIPConfig = self.task.method
        return config

    # Exploration ------------------------------------------------------------------------------------------------

    def prepare(self, grid: Grid) -> None:
        """Explore, and cut at once where one mask is to last."""
        if self._config.score == "guidance":
            self._explore(grid)
        if self._config.mask_mode == "static" and not self._config.fedlex:
            self._cut(list(self._explored))

    def _explore(self, grid: Grid) -> None:
        """Ask for deviations; whoever fails, or tells of none that can be, is no explorer.

        Raises:
            ValueError: nobody explored.
        """
        job = Assignment(self._whole, "full", reply_codec="float32")  # squares span many magnitudes: exact in any run
        self.preparation.ask(self, grid, "explore", dict.fromkeys(self._chosen(), job), self._receive)
        if not self._explored:
            raise ValueError(
                "no device has explored: none can train the whole network with autoflip.explore-optimizer, or all that "
                "were asked have failed; without deviations there is no guidance"
            )
        epochs = [epochs for _, epochs in self._explored.values()]
        log.info("%s devices explored for %s to %s epochs", len(epochs), min(epochs), max(epochs))

    def _chosen(self) -> list[int]:
        """Devices that are to explore: a uniform choice among those that can."""
        devices = self.federation.devices
        task = replace(self.task, training=exploration(self.task.training, self._config))
        budget = Budget(task, codec=self.settings.codec)
        able = sorted(p for p, device in devices.items() if budget.bears(device, self._whole))
        num = max(1, round(self._config.explore_fraction * len(devices)))
        rng = np.random.default_rng([self.settings.seed, 0, 7])  # not the rounds' own
        return sorted(rng.permutation(able)[:num].tolist())

    def _receive(self, partition: int, update: Update) -> None:
        """Keep what an explorer found.

        Raises:
            ValueError: it cannot be.
        """
        told, epochs = self.devices[partition].num_examples, update.metrics.get("epochs", 0.0)
        if update.weight > told or not 1 <= epochs <= self._config.explore_epochs:
            raise ValueError(
                f"it claims {update.weight:g} examples and {epochs:g} epochs; expected at most {told} examples, as it "
                f"told, and 1 to {self._config.explore_epochs} epochs"
            )
        found = read_deviations(self.task.layout, Submodel(self._whole.units, self._prunable), update)
        self._store.put(partition, found)
        self._explored[partition] = update.weight, int(epochs)

    @cached_property
    def _store(self) -> DeviationStore:
        return DeviationStore(None if self.folder is None else self.folder / "exploration")

    @cached_property
    def _whole(self) -> Submodel:
        return full(self.task.layout)

    @cached_property
    def _prunable(self) -> frozenset[str]:
        return prunable_tensors(self.task)

    # The mask ---------------------------------------------------------------------------------------------------

    def assign(
        self, server_round: int, devices: Mapping[int, Device], rng: np.random.Generator
    ) -> Mapping[int, Assignment]:
        """FedAvg's cohort; its own deviations make the round's mask, whoever of it fails later."""
        cohort = list(super().assign(server_round, devices, rng))
        if cohort and self._config.mask_mode == "per-round" and not self._config.fedlex:
            self._cut(cohort)
        return {partition: self.part_of(devices[partition], server_round) for partition in cohort}

    def part_of(self, device: Device, server_round: int) -> Assignment:
        """The masked network; FedLEx's clients get the guidance from round 2 on."""
        if self._config.fedlex and server_round > 1:
            return Assignment(self._part, "full", {"guidance": self._told_guidance})
        return Assignment(self._part, "full")

    def _cut(self, cohort: Sequence[int]) -> None:
        config, layout = self._config, self.task.layout
        scores, alive = self._scores(cohort), None
        masks = keep_above(scores, config.quantile).masks
        if config.structured == "units":
            masks = without_least_units(layout, self._producers, masks, scores, config.unit_share)
        if config.structured != "off":
            masks, alive = close(layout, self._producers, masks)
        self._take(masked_part(layout, masks, alive))

    def _take(self, part: Submodel) -> None:
        """This round's part, and the entries that it holds, as masks of full shape."""
        if part != self._part:
            self._part, self._held = part, covered(self.task.layout, part)

    @cached_property
    def _producers(self) -> dict[str, Producer]:
        made = producers(self.task.layout, build_on_meta(self.task.factory))
        return {group: producer for group, producer in made.items() if producer.tensor in self._prunable}

    @cached_property
    def _random_scores(self) -> Arrays:
        """One draw for the run."""
        shapes = {name: shape for name, shape in self.task.layout.shapes.items() if name in self._prunable}
        rng = np.random.default_rng([self.settings.seed, 0, 8])
        return guidance(random_scores(shapes, rng), self._config.normalise)

    def _scores(self, cohort: Sequence[int]) -> Arrays:
        """Scores of the prunable entries: of the cohort's explorers, of all where it has none."""
        config = self._config
        if config.score == "random":
            return self._random_scores
        if config.score == "magnitude":
            return guidance(
                {n: np.abs(self.arrays[n]) for n in self.task.layout.shapes if n in self._prunable}, config.normalise
            )
        explorers = [p for p in cohort if p in self._explored] or list(self._explored)
        if config.agreement:
            return agreed_scores(self._deviations(explorers), config.quantile, config.normalise)
        return guidance(mean_deviations(self._deviations(explorers)), config.normalise)

    def _deviations(self, explorers: Sequence[int]) -> Iterator[Deviations]:
        """In the order of partitions, so that the order of replies does not matter."""
        for partition in sorted(explorers):
            weight = self._explored[partition][0] if self._config.explore_weights == "examples" else 1.0
            yield Deviations(weight, self._store.get(partition))

    @cached_property
    def _told_guidance(self) -> bytes:
        """Of all explorers."""
        return guidance_bytes(self.task.layout, self._prunable, self._scores(list(self._explored)))

    # Who takes part, and the server's step ----------------------------------------------------------------------

    def bytes_beside(self) -> int:
        """FedLEx's guidance: float32 for every prunable entry."""
        sizes = narrow_sizes(self.task.layout, self._whole)
        return 4 * sum(sizes[name] for name in self._prunable) if self._config.fedlex else 0

    def levels(self) -> dict[str, Submodel]:
        """The masked network: what is published."""
        return {"full": self._part}

    def can_train(self, device: Device) -> bool:
        """Whether memory and deadline allow it."""
        known = self._config.mask_mode == "static"
        return self.budget.bears(device, self._part if known else self._whole)

    def can_hold(self, device: Device, own: Submodel, server_round: int) -> bool:
        """Whether a device may test what it trained last: what it could train, masked or not, it holds."""
        return self.can_train(device) and self.budget.tests(device, own)

    def finish(self, previous: Arrays, averaged: Arrays) -> Arrays:
        """A step with momentum; masked entries keep their values, or become zero."""
        config = self._config
        new, self._velocity = momentum_step(previous, averaged, self._velocity, self._held, config.server_momentum)
        if not config.is_hard:
            return new
        masked = {name: np.where(self._held[name], new[name], np.float32(0)) for name in self._prunable}
        return {**new, **masked}

    # Record and checkpoint --------------------------------------------------------------------------------------

    def round_facts(self) -> dict[str, float]:
        """How sparse the network is, and what its forward pass costs: as it is computed, and counting non-zeros only.

        The second is no saving that this project makes: masked entries are multiplied, too.
        """
        num = sum(self._held[name].size for name in self._prunable)
        kept = sum(int(np.count_nonzero(self._held[name])) for name in self._prunable)
        once = {"explorers": len(self._explored), "explored-epochs": self._explored_epochs}
        return {
            "sparsity": 1 - kept / num,
            "compression-rate": num / kept,
            "macs-forward": self.task.macs(self._part),
            "macs-forward-nonzero": nonzero_macs(self.task, self._part),
            **(once if self.record.server_round == 1 and self._explored else {}),
        }

    @property
    def _explored_epochs(self) -> int:
        return sum(epochs for _, epochs in self._explored.values())

    def facts(self) -> dict[str, Any]:
        """What exploration was; its bytes, MACs and seconds stand in round 1 and in the totals."""
        return {"explorers": len(self._explored), "explored-epochs": self._explored_epochs}

    def state_dict(self) -> State:
        """Who explored, the mask and the momentum; the deviations are in the run folder."""
        return {
            **super().state_dict(),
            "explored": {str(p): [weight, epochs] for p, (weight, epochs) in sorted(self._explored.items())},
            **{f"part/{key}": np.frombuffer(bits, dtype=np.uint8) for key, bits in pack(self._part).items()},
            **{f"velocity/{name}": v for name, v in self._velocity.items()},
        }

    def load_state_dict(self, state: State) -> None:
        """Put them back."""
        super().load_state_dict(state)
        self._explored = {int(p): (float(weight), int(epochs)) for p, (weight, epochs) in state["explored"].items()}
        of = {kind: {n.removeprefix(kind): a for n, a in state.items() if n.startswith(kind)} for kind in _KINDS}
        self._take(unpack(self.task.layout, {key: bits.tobytes() for key, bits in of["part/"].items()}))
        self._velocity = of["velocity/"]


def nonzero_macs(task: Task, submodel: Submodel) -> int:
    """Multiply-accumulates of one sample's forward pass with weights that are not masked: the count of papers."""
    uses = layer_uses(task.factory, tuple(task.layout.shapes.items()), task.input_shape)
    sizes = narrow_sizes(task.layout, submodel)
    return sum(use.weight_uses * sizes[f"{name}.weight" if name else "weight"] for name, use in uses.items())
