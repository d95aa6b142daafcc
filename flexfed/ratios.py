"""How much of the network a device gets, apart from which units those are: any policy works with any width method.

A policy turns a device's cap, the largest ratio that it can train, into the ratio of one job: all of it ("budget"),
or what a bandit of this client chooses from it (`flexfed.bandits`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flexfed.bandits import ROWS, Bandit, BanditConfig, Pull, or_nan, reward
from flexfed.rivals import BANDITS
from flexfed.units import Arrays

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Outcome:
    """What a job brought, and what it cost.

    Attributes:
        accuracy: of the client while it trained, as a fraction.
        macs: multiply-accumulates of its training.
        full_macs: those that the full network would have taken.
        bytes_up: of the part it sent back.
    """

    accuracy: float
    macs: int
    full_macs: int
    bytes_up: int


class RatioPolicy(Protocol):
    """Chooses the ratio of each job."""

    def choose(self, partition: int, cap: float, server_round: int) -> float:
        """A ratio of at most `cap`."""

    def observe(self, partition: int, outcome: Outcome) -> None:
        """Learn from the reply to the last job of a client."""

    def state_dict(self) -> Arrays:
        """What was learned."""

    def load_state_dict(self, arrays: Arrays) -> None:
        """Undo `state_dict`."""


class AllOfIt:
    """As much as the device can train."""

    def choose(self, partition: int, cap: float, server_round: int) -> float:
        """The cap."""
        return cap

    def observe(self, partition: int, outcome: Outcome) -> None:
        """Nothing to learn."""

    def state_dict(self) -> Arrays:
        """Nothing."""
        return {}

    def load_state_dict(self, arrays: Arrays) -> None:
        """Nothing."""


class OneBanditEach:
    """A bandit for each client, kept on the server; which draws it gets follows from (seed, round, client).

    Args:
        name: of the bandit, a key of `BANDITS`.
        config: the bandits' knobs, and the constants of the reward.
        seed: of the run.
        horizon: how often a client will be asked, about: rounds times the share of clients in a cohort.
    """

    def __init__(self, name: str, config: BanditConfig, seed: int, horizon: float):
        self._name = name
        self._config = config
        self._seed = seed
        self._horizon = horizon
        self._bandits: dict[int, Bandit] = {}
        self._pulls: dict[int, tuple[Pull, float]] = {}  # of the jobs that are out, with the device's cap

    def choose(self, partition: int, cap: float, server_round: int) -> float:
        """What the client's bandit says; nothing is credited until its reply is accepted."""
        if partition not in self._bandits:
            self._bandits[partition] = BANDITS[self._name](self._config, self._horizon)
        u, v, w = np.random.default_rng([self._seed, server_round, partition, 4]).random(3)
        pull = self._bandits[partition].choose(cap, (float(u), float(v), float(w)))
        self._pulls[partition] = pull, cap
        return pull.ratio

    def observe(self, partition: int, outcome: Outcome) -> None:
        """Credit the arm; the reward compares with the client's own best accuracy before."""
        pull, cap = self._pulls.pop(partition)
        bandit, known = self._bandits[partition], self._config.reference_mflops
        gained = reward(
            accuracy=outcome.accuracy,
            best=bandit.best,
            mflops=2e-6 * outcome.macs,
            upload_mb=outcome.bytes_up / MEBIBYTE,
            capability=cap,
            reference_mflops=known or 2e-6 * outcome.full_macs,
            upload_mb_s=self._config.upload_mb_s,
            baseline=self._config.baseline,
        )
        bandit.observe(pull, gained, outcome.accuracy)

    def state_dict(self) -> Arrays:
        """All clients' bandits in a few arrays."""
        return pack_bandits(self._bandits)

    def load_state_dict(self, arrays: Arrays) -> None:
        """Put them back."""
        self._bandits = unpack_bandits(self._name, self._config, self._horizon, arrays)


def ratio_policy(name: str, config: BanditConfig, seed: int, horizon: float) -> RatioPolicy | None:
    """The policy of a name; None for "level": the method has its own."""
    if name == "level":
        return None
    return AllOfIt() if name == "budget" else OneBanditEach(name, config, seed, horizon)


def pack_bandits(bandits: Mapping[int, Bandit]) -> Arrays:
    """Every client's bandit as a few flat arrays, by rising partition.

    "bandit/partition", "bandit/pulls", "bandit/best" and "bandit/previous" (nan = none) have one entry a client;
    "bandit/offset" one more: client i's arms are entries offset[i] to offset[i + 1] of "bandit/lo", "bandit/hi",
    "bandit/count", "bandit/mean" and "bandit/squares".
    """
    ordered = [bandits[partition] for partition in sorted(bandits)]
    arms = np.concatenate([np.empty((5, 0)), *(bandit.arms for bandit in ordered)], axis=1)
    packed: Arrays = {
        "partition": np.array(sorted(bandits), dtype=np.int64),
        "offset": np.cumsum([0, *(bandit.arms.shape[1] for bandit in ordered)], dtype=np.int64),
        "pulls": np.array([bandit.pulls for bandit in ordered], dtype=np.int64),
        "best": np.array([or_nan(bandit.best) for bandit in ordered], dtype=np.float64),
        "previous": np.array([or_nan(bandit.previous) for bandit in ordered], dtype=np.float64),
        **dict(zip(ROWS, arms, strict=True)),
    }
    return {f"bandit/{key}": np.ascontiguousarray(array) for key, array in packed.items()}


def unpack_bandits(
    name: str, config: BanditConfig, horizon: float, arrays: Mapping[str, np.ndarray]
) -> dict[int, Bandit]:
    """Bandits of one policy from what `pack_bandits` made of them; each goes on bit for bit.

    Raises:
        ValueError: no such policy, or an array that is missing or does not fit the others.
    """
    if name not in BANDITS:
        raise ValueError(f"unknown bandit {name!r}; known: {', '.join(sorted(BANDITS))}")
    packed = {key.removeprefix("bandit/"): array for key, array in arrays.items() if key.startswith("bandit/")}
    _check_packed(packed)
    arms = np.stack([packed[row] for row in ROWS])
    offsets = packed["offset"].tolist()
    found = {}
    for i, partition in enumerate(packed["partition"].tolist()):
        found[partition] = bandit = BANDITS[name](config, horizon)
        one = {key: packed[key][i] for key in ("pulls", "best", "previous")}
        bandit.restore({"arms": arms[:, offsets[i] : offsets[i + 1]], **one})
    return found


def _check_packed(packed: Mapping[str, np.ndarray]) -> None:
    clients, per_client = len(packed.get("partition", ())), ("partition", "pulls", "best", "previous")
    num_arms = int(packed["offset"][-1]) if len(packed.get("offset", ())) else 0
    lengths = {**dict.fromkeys(per_client, clients), "offset": clients + 1, **dict.fromkeys(ROWS, num_arms)}
    for key, length in lengths.items():
        if key not in packed or packed[key].shape != (length,):
            got = packed[key].shape if key in packed else "no such array"
            raise ValueError(f"bandits in a checkpoint: 'bandit/{key}' should have shape ({length},), got {got}")
