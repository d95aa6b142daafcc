"""Methods that can give a device any width: by their own levels, or by a policy that knows no method."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import cached_property
from typing import Any

from flexfed.budget import STEPS
from flexfed.checkpoint import State
from flexfed.cost import part_bytes, round_macs
from flexfed.devices import Device
from flexfed.jobs import Assignment, Update
from flexfed.ratios import Outcome, RatioPolicy, ratio_policy
from flexfed.submodel import Submodel, full
from strategies.base import SubmodelStrategy


class WidthStrategy(SubmodelStrategy):
    """`ratio-policy` says how much of the network a device gets, the method which units those are."""

    policy: RatioPolicy | None
    """None: the method's own levels."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # A run that is given more rounds later goes on with a longer horizon.
        horizon = self.settings.num_server_rounds * self.settings.fraction_train
        self.policy = ratio_policy(
            self.settings.ratio_policy, self.experiment.bandit, self.settings.seed, max(1.0, horizon)
        )

    @abstractmethod
    def part_at(self, ratio: float, server_round: int) -> Submodel:
        """The method's part of a ratio in (0, 1]; a larger ratio never costs less."""

    @abstractmethod
    def own_part(self, device: Device, server_round: int) -> Assignment:
        """What the method gives a device by its levels."""

    def sized_part(self, ratio: float, device: Device, server_round: int) -> Assignment:
        """The job for a ratio that is no level's."""
        return Assignment(self.part_at(ratio, server_round), f"{ratio:g}", {"ratio": ratio})

    def part_of(self, device: Device, server_round: int) -> Assignment:
        """The method's own choice, or the part of the ratio that the policy chooses."""
        if self.policy is None:
            return self.own_part(device, server_round)
        ratio = self.policy.choose(device.partition, self._cap(device), server_round)
        return self.sized_part(self.rounded(ratio), device, server_round)

    def largest_part(self, device: Device, server_round: int) -> Assignment | None:
        """The part of its level, or the largest that its budget allows, whatever the policy would give it."""
        if not self.can_train(device):
            return None
        if self.policy is None:
            return self.own_part(device, server_round)
        return self.sized_part(self._cap(device), device, server_round)

    def rounded(self, ratio: float) -> float:
        """The ratio that a policy's choice becomes: down to a multiple of 1/64, as budgets are."""
        return max(1, math.floor(ratio * STEPS + 1e-9)) / STEPS

    def can_train(self, device: Device) -> bool:
        """Under a policy, whether the device holds any part at all."""
        return self.policy is None or self.cap_of(device) is not None

    def _cap(self, device: Device) -> float:
        cap = self.cap_of(device)
        if cap is None:
            raise ValueError(f"partition {device.partition} ({device.kind}) cannot train even the smallest part")
        return cap

    @cached_property
    def _caps(self) -> dict[tuple[float, ...], float | None]:
        return {}

    def cap_of(self, device: Device) -> float | None:
        """The largest ratio that a device can train; parts cost the same in every round."""
        power: tuple[float, ...] = (device.capacity, device.width, device.memory_bytes)
        if self.settings.round_deadline:
            power += (device.speed_macs_s, device.link_bytes_s, device.download_bytes_s, device.num_examples)
        if power not in self._caps:
            self._caps[power] = self.largest_ratio(device)
        return self._caps[power]

    def largest_ratio(self, device: Device) -> float | None:
        """Here the largest in the device's budget; None = none."""
        return self.budget.largest(device, lambda ratio: self.part_at(ratio, 1))

    def check(self, assignment: Assignment, update: Update) -> None:
        """A reply says how accurate the client was, and what that took: a policy learns from both.

        Raises:
            ValueError: it does not, or not as numbers that can be.
        """
        super().check(assignment, update)
        accuracy, macs = (update.metrics.get(key, -1.0) for key in ("train-accuracy", "macs"))
        if self.policy is not None and not (0 <= accuracy <= 1 and macs >= 0):
            raise ValueError(
                f"a reply should tell train-accuracy, a fraction in [0, 1], and macs; got {accuracy} and {macs}"
            )

    def observe(self, server_round: int, partition: int, update: Update) -> None:
        """Let the policy learn from what the job brought and cost."""
        if self.policy is None:
            return
        device, layout = self.devices[partition], self.task.layout
        whole = round_macs(self.task.macs(full(layout)), device.num_examples, self.task.training)
        accuracy, macs = update.metrics["train-accuracy"], int(update.metrics["macs"])
        self.policy.observe(partition, Outcome(accuracy, macs, whole, part_bytes(layout, update.submodel)))

    def state_dict(self) -> State:
        """What the policy has learned."""
        return {} if self.policy is None else self.policy.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Put it back."""
        if self.policy is not None:
            self.policy.load_state_dict(dict(state))
