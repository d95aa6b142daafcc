"""FedLPS's server: the units that a client ranked highest, as many as the ratio policy says, added up."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from flexfed.checkpoint import State
from flexfed.cost import modelled_seconds, num_parameters
from flexfed.devices import Device
from flexfed.jobs import Assignment, Update
from flexfed.methods.fedlps import FedLPSConfig, add_noise, model_norms, ranked_scores, scores_from
from flexfed.methods.fedlps_cost import (
    download_bits_dense,
    flops_nnz,
    flops_structural,
    round_flops,
    upload_bits_row_sparse,
)
from flexfed.networks import build_on_meta
from flexfed.select import prefix_ratio, top
from flexfed.submodel import Submodel, full
from flexfed.units import Arrays
from strategies.widths import WidthStrategy


class FedLPS(WidthStrategy):
    """Learned personal submodels; see `flexfed.methods.fedlps`.

    A client's capability z is its device's `width`, or less where capacity, memory or deadline ask for it. With
    `ratio-policy = "level"` it keeps as many units as that allows (the ablation RCR).
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.per = "total" if self._config.normalise == "all" else "coverage"
        self._rankings: dict[int, bytes] = {}  # partition -> the order of its units, as it last told
        self._accounts: list[dict[str, float]] = []  # of this round's replies
        self._measured: tuple[Arrays, np.ndarray] | None = None  # a global model, and its units' norms
        if self.settings.personal == "global-masked" and not self._config.mask_bias:
            raise ValueError(
                "personal='global-masked' needs masked units to be silent: leave fedlps.mask-bias=true, or choose "
                "'stored-local'"
            )

    @property
    def _config(self) -> FedLPSConfig:
        config: FedLPSConfig = self.task.method
        return config

    # How many units ---------------------------------------------------------------------------------------------

    def largest_ratio(self, device: Device) -> float | None:
        """The capability z; None = the device can train nothing."""
        if self._config.is_masked:  # it trains the whole network, whatever the ratio
            borne = 1.0 if self.budget.bears(device, full(self.task.layout)) else None
        else:
            borne = self.budget.largest(device, lambda ratio: self.part_at(ratio, 1), self.budget.carries)
        return None if borne is None else min(borne, device.width)

    def can_train(self, device: Device) -> bool:
        """Whether capacity, memory and deadline allow anything."""
        return self.cap_of(device) is not None

    def rounded(self, ratio: float) -> float:
        """As it was chosen."""
        return ratio

    def download_of(self, submodel: Submodel) -> Submodel:
        """The part where the server knows the units, else everything."""
        return submodel if self._config.is_told else full(self.task.layout)

    # Which units ------------------------------------------------------------------------------------------------

    def part_at(self, ratio: float, server_round: int) -> Submodel:
        """What any choice of units costs: the narrow network is equally large."""
        return prefix_ratio(self.task.layout, ratio, "floor")

    def own_part(self, device: Device, server_round: int) -> Assignment:
        """As many units as the capability allows."""
        return self.sized_part(self._cap(device), device, server_round)

    def sized_part(self, ratio: float, device: Device, server_round: int) -> Assignment:
        """The units that the pattern ranks highest for this client; everything where it chooses them itself."""
        units = self._units(ratio, device.partition, server_round) if self._config.is_told else full(self.task.layout)
        return Assignment(units, f"{ratio:.2f}", {"ratio": ratio})

    def largest_part(self, device: Device, server_round: int) -> Assignment | None:
        """Of personal models: never more than the capability, whoever chooses the units."""
        cap = self.cap_of(device)
        if cap is None:
            return None
        return Assignment(self._units(cap, device.partition, server_round), f"{cap:.2f}")

    def _units(self, ratio: float, partition: int, server_round: int) -> Submodel:
        config = self._config
        rng = np.random.default_rng([self.settings.seed, server_round, partition, 5])
        ranking = b"" if config.score_reset else self._rankings.get(partition, b"")
        scores = (
            self._norms() if config.pattern == "magnitude" else ranked_scores(config, self.task.layout, ranking, rng)
        )
        return top(self.task.layout, scores, ratio, "floor")

    def _norms(self) -> np.ndarray:
        """L1 norms of the global model's units, once for each model."""
        if self._measured is None or self._measured[0] is not self.arrays:
            self._measured = self.arrays, model_norms(self.task.layout, self._skeleton, self.arrays)
        return self._measured[1]

    @cached_property
    def _skeleton(self) -> nn.Module:
        return build_on_meta(self.task.factory)

    # Replies ----------------------------------------------------------------------------------------------------

    may_choose_units = True  # `check` says how many

    @property
    def asks_to_tell(self) -> frozenset[str]:
        """The order of its units, where the server chooses them."""
        return frozenset({"ranking"} if self._config.is_told and self._config.pattern == "learned" else ())

    def check(self, assignment: Assignment, update: Update) -> None:
        """As many units as were asked for, and a ranking that is one, only where it is asked for.

        Raises:
            ValueError: other units or another cut, or a ranking that is none, is missing, or that nobody asked for.
        """
        super().check(assignment, update)
        if not self._is_asked(assignment, update.submodel):
            raise ValueError("it holds other units than it was asked to train, or other rows of them")
        if self.asks_to_tell:
            scores_from(self.task.layout, update.told.get("ranking", b""))

    def _is_asked(self, assignment: Assignment, held: Submodel) -> bool:
        """Where clients choose the units themselves, the server knows only how many, and of which axes."""
        config, layout = self._config, self.task.layout
        if config.is_told:
            return held == assignment.submodel
        as_many = self.part_at(float(str(assignment.config["ratio"])), self.record.server_round).units
        cut = ("rows" if config.mask_bias else "weight-rows") if config.is_masked else "all"
        spans = [slice(span.start, span.stop) for span in layout.groups.values()]
        return held.cut == cut and all(held.units[here].sum() == as_many[here].sum() for here in spans)

    def observe(self, server_round: int, partition: int, update: Update) -> None:
        """Remember the ranking, and let the policy learn."""
        super().observe(server_round, partition, update)
        if "ranking" in update.told:
            self._rankings[partition] = update.told["ranking"]
        self._accounts.append(self._account(self.devices[partition], update))

    def _account(self, device: Device, update: Update) -> dict[str, float]:
        """What a reply cost as FedLPS counts: the whole network comes, rows go back, and rows are what is computed."""
        task, training = self.task, self.task.training
        network = (task.factory, task.layout, update.submodel, task.input_shape, training.batch_size)
        flops = {
            key: round_flops(
                sum(count(*network).values()), device.num_examples, training.batch_size, training.local_epochs
            )
            for key, count in (("flops-nnz", flops_nnz), ("flops-structural", flops_structural))
        }
        bits_up = upload_bits_row_sparse(task.layout, update.submodel, self._config.mask_bias)
        bytes_down, bytes_up = download_bits_dense(task.layout) // 8, -(-bits_up // 8)
        seconds = modelled_seconds(device, flops["flops-nnz"] // 2, bytes_down, bytes_up)
        return {**flops, "bits-up-row-sparse": bits_up, "modelled-seconds-nnz": seconds}

    def round_facts(self) -> dict[str, float]:
        """The round's cost by FedLPS's own model, beside the project's: sums, and the slowest device's seconds."""
        accounts, self._accounts = self._accounts, []
        sums = {key: sum(a[key] for a in accounts) for key in ("flops-nnz", "flops-structural", "bits-up-row-sparse")}
        return {**sums, "modelled-seconds-nnz": max((a["modelled-seconds-nnz"] for a in accounts), default=0.0)}

    def can_hold(self, device: Device, own: Submodel, server_round: int) -> bool:
        """Whether it is no larger than the device's capability allows, whichever its units."""
        cap = self.cap_of(device)
        if cap is None:
            return False
        if not self._config.mask_bias:  # the device holds the whole network anyway
            return self.budget.tests(device, own)
        layout = self.task.layout
        limit = num_parameters(layout, self.part_at(cap, server_round))
        return num_parameters(layout, own) <= limit and self.budget.tests(device, own)

    def kept_units(self, update: Update) -> np.ndarray:
        """Where masked units are not silent, a client's own model is the whole network, with zero rows."""
        return super().kept_units(update) if self._config.mask_bias else full(self.task.layout).units

    def finish(self, previous: Arrays, averaged: Arrays) -> Arrays:
        """Noise, where a run asks for it."""
        if not self._config.noise:
            return averaged
        rng = np.random.default_rng([self.settings.seed, self.record.server_round, 6])
        return add_noise(averaged, self._config.noise, rng)

    # Evaluation and the checkpoint ------------------------------------------------------------------------------

    def level_for_evaluation(self, device: Device) -> str | None:
        """None: devices test models of their own."""
        return None

    def state_dict(self) -> State:
        """The rankings, and what the policy has learned."""
        known = sorted(self._rankings)
        told = {
            "ranking/partitions": np.array(known, dtype=np.int64),
            "ranking/orders": np.array([np.frombuffer(self._rankings[p], dtype="<u2") for p in known]),
        }
        return {**super().state_dict(), **(told if known else {})}

    def load_state_dict(self, state: State) -> None:
        """Put them back."""
        super().load_state_dict(state)
        partitions, orders = state.get("ranking/partitions", []), state.get("ranking/orders", [])
        self._rankings = {int(p): order.tobytes() for p, order in zip(partitions, orders, strict=True)}
