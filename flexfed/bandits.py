"""How much of the network a client trains, learned from what it brought: P-UCBV.

P-UCBV is the ratio policy of FedLPS, "Learnable Sparse Customization in Heterogeneous Edge Computing" (Xue, Sun,
Liu, Wang, Liu, Wang, ICDE 2025, https://arxiv.org/abs/2412.07216). Only the abstract and the released code were to
be had. The code credits rewards to the wrong arms and never eliminates one; this is its algorithm with the indexing
put right (profile `aligned`), and by default every arm is tried once before (`sweep`, ours).

A client has one bandit, kept by the server. An arm is an interval of ratios. `choose` changes nothing; `observe`
commits when the reward has come, so that a device that fails leaves no trace.

Its rivals stand in `flexfed.rivals`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal, get_args, get_type_hints

import numpy as np

if TYPE_CHECKING:
    from flexfed.units import Arrays

Draws = tuple[float, float, float]
"""Three uniform numbers in [0, 1), in this order: explore or not, which arm, where in the arm."""
Baseline = Literal["first", "zero"]

LO, HI, COUNT, MEAN, SQUARES = range(5)
"""Rows of an array of arms: the interval [lo, hi), how many rewards it has, their mean, and the sum of the squares of
their distances from it. P-UCBV's own pull count n is always the number of rewards, so it is not kept twice."""
ROWS = ("lo", "hi", "count", "mean", "squares")
_HAIR = 1e-9  # binary fractions make 0.2 - 0.05 a hair more than 0.15


@dataclass(frozen=True)
class BanditConfig:
    """The knobs of ratio policies, `bandit.<name>` in the configuration."""

    method: ClassVar[str] = "bandit"

    profile: Literal["sweep", "aligned"] = "sweep"  # try each arm once first (ours); or start with a reward of 0 each
    cap: Literal["clip", "relative"] = "clip"  # cut arms off at the device's cap; or multiply by the cap (both ours)
    low: float = 0.5  # least ratio of the arms
    high: float = 1.0
    num_arms: int = 5  # at the start
    min_width: float = 0.04  # narrower arms are not split; `sweep` only
    drop: float = 0.05  # an arm after which the accuracy fell by more than this is removed
    ratio: float = 0.5  # of the policy "fixed"
    epsilon: float = 0.1  # how often epsilon-greedy explores
    baseline: Baseline = "first"  # a client's first reward: 0, or compared with an accuracy of 0 as released
    reference_mflops: float = 0.0  # C_ref; 0 = what the dense model trains in one local round
    upload_mb_s: float = 14.9  # MB = 2**20 bytes

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(BanditConfig).items():
            if known := [value for value in get_args(hint) if isinstance(value, str)]:
                self._require(name, getattr(self, name) in known, f"one of {', '.join(known)}")
        self._require("low", 0 < self.low < self.high, f"above 0 and below bandit.high={self.high}")
        self._require("high", self.high <= 1, "at most 1")
        self._require("num_arms", self.num_arms >= 1, "at least 1")
        self._require("min_width", 0 <= self.min_width <= 1, "in [0, 1]")
        self._require("drop", 0 <= self.drop <= 1, "a fraction, in [0, 1]")
        self._require("ratio", 0 < self.ratio <= 1, "in (0, 1]")
        self._require("epsilon", 0 <= self.epsilon <= 1, "in [0, 1]")
        self._require("reference_mflops", 0 <= self.reference_mflops < math.inf, ">= 0; 0 = the dense model's own")
        self._require("upload_mb_s", 0 < self.upload_mb_s < math.inf, "> 0")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"bandit.{name.replace('_', '-')} must be {rule}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Pull:
    """What a bandit chose.

    Attributes:
        ratio: what the device gets; never above its cap.
        point: where that lies among the arms; not `ratio` where arms are relative to the cap.
        arm: index of the arm at the time of the pull; -1 = bypass: no arm fits the device, nothing is credited.
        sweep: the arm's first pull, only to have tried it.
    """

    ratio: float
    point: float
    arm: int
    sweep: bool = False


def utility(accuracy: float) -> float:
    """U(x) = 10 - 20 / (1 + exp(0.35 x)) = 10 tanh(0.175 x), of an accuracy as a fraction: nearly linear there."""
    return 10 * math.tanh(0.175 * accuracy)


def reward(
    accuracy: float,
    best: float | None,
    mflops: float,
    upload_mb: float,
    capability: float,
    reference_mflops: float,
    upload_mb_s: float,
    baseline: Baseline = "first",
) -> float:
    """How much usefulness a round added, over what it cost; negative where accuracy is below the best so far.

        r = (U(accuracy) - U(best)) / (3 mflops / (reference_mflops capability) + upload_mb / upload_mb_s)

    as FedLPS's code has it. The 3 stands for forward and backward, which `mflops` has in it already: that only
    rescales. The code compares a client's first accuracy with 0, a reward that no later one comes near
    (`baseline="zero"`); by default the first is credited 0.

    Args:
        accuracy: of this round, a fraction; if it is not finite, no bandit credits the reward.
        best: the best accuracy before it; None = there was none.
        mflops: 10^6 floating point operations that the client trained this round.
        upload_mb: what it sent, MB = 2**20 bytes.
        capability: fraction of the strongest device that it had this round.
        reference_mflops: what a capability of 1 is measured against.
        upload_mb_s: MB that a device sends in a second.
        baseline: what a first accuracy is worth.

    Raises:
        ValueError: an accuracy in percent, or a cost that is not a positive number.
    """
    if math.isfinite(accuracy) and not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy must be a fraction in [0, 1], got {accuracy}; divide percentages by 100")
    work = reference_mflops * capability
    price = 3 * mflops / work + upload_mb / upload_mb_s if work > 0 and upload_mb_s > 0 else math.nan
    if not 0 < price < math.inf:
        raise ValueError(
            f"the cost of a round must be positive, got {price} from mflops={mflops}, upload_mb={upload_mb}, "
            f"capability={capability}, reference_mflops={reference_mflops}, upload_mb_s={upload_mb_s}"
        )
    if best is None:
        best = accuracy if baseline == "first" else 0.0
    return (utility(accuracy) - utility(best)) / price


def index(
    means: np.ndarray, variances: np.ndarray, counts: np.ndarray, horizon: float, epsilon: float, num_arms: int
) -> np.ndarray:
    """P-UCBV's index of arms that have rewards: mean + sqrt(rho (var + 2) max(0, ln(psi H eps)) / (4 n)).

    rho = 1/2 and psi = H / K^2, from EUCBV: "Efficient-UCBV" (Mukherjee, Naveen, Sudarsanam, Ravindran, AAAI 2018,
    https://arxiv.org/abs/1711.03591). There epsilon is halved once a phase, here at every pull, so the second term is
    gone after a few pulls and what still explores is chance. It takes rewards to be of the order of 1.

    Args:
        means: (arms,) of the rewards.
        variances: (arms,) of the rewards, population.
        counts: (arms,) of the rewards, each at least 1.
        horizon: H, pulls expected in all.
        epsilon: 1 at the start.
        num_arms: K, those left out here included.
    """
    confidence = math.log(max(1.0, (horizon / num_arms) ** 2 * epsilon))
    return np.asarray(means + np.sqrt((variances + 2) * (confidence / 8) / counts))


class Bandit(ABC):
    """Chooses a client's ratio and learns from the reward; remembers its best and its previous accuracy.

    Attributes:
        pulls: how many were credited, sweeps not counted.
        best: highest accuracy so far, which the reward compares with; None before the first.
        previous: accuracy of the last credited pull.
        arms: (5, arms) float64, rows as named above, by rising lo; replaced, never written.

    Args:
        config: the knobs.
        horizon: pulls expected in all (rounds times the share of clients in a cohort); read by P-UCBV only.
    """

    def __init__(self, config: BanditConfig, horizon: float):
        if not 0 < horizon < math.inf:
            raise ValueError(f"the horizon must be a positive number of pulls, got {horizon}")
        self.config, self.horizon = config, horizon
        self.pulls = 0
        self.best: float | None = None
        self.previous: float | None = None
        self.arms = self._first_arms()

    def choose(self, cap: float, draws: Draws) -> Pull:
        """The ratio for a device that can hold `cap` of every group, above 0; changes nothing.

        A device of which no arm lies below its cap gets its cap, and no arm is credited. Caps above 1 count as 1.

        Raises:
            ValueError: a cap that is not above 0, or a draw outside [0, 1).
        """
        if not cap > 0:
            raise ValueError(f"a device's cap must be above 0, got {cap}")
        if not all(0 <= draw < 1 for draw in draws):
            raise ValueError(f"draws must be three numbers in [0, 1), got {draws}")
        cap = min(float(cap), 1.0)
        clip = self.config.cap == "clip"
        found = self._choose(cap if clip else 1.0, draws)
        if found is None:
            return Pull(cap, cap, -1)
        point, arm, sweep = found
        return Pull(point if clip else cap * point, point, arm, sweep)

    def observe(self, pull: Pull, reward: float, accuracy: float) -> None:
        """Commit a pull; a bypassed one, or a reward or accuracy that is not finite, leaves everything as it is.

        Raises:
            ValueError: the pull is not one of this bandit as it stands; nothing has been credited.
        """
        if pull.arm < 0 or not (math.isfinite(reward) and math.isfinite(accuracy)):
            return
        self._credit(pull, float(reward), float(accuracy))
        self.pulls += not pull.sweep
        self.previous = float(accuracy)
        self.best = self.previous if self.best is None else max(self.best, self.previous)

    def state(self) -> Arrays:
        """All that it has learned, exactly: "arms", and "pulls", "best" and "previous" (nan = none) as float64."""
        return {
            "arms": self.arms,
            "pulls": np.array(self.pulls, dtype=np.int64),
            "best": np.array(or_nan(self.best)),
            "previous": np.array(or_nan(self.previous)),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on where a bandit of the same policy and knobs gave its `state`."""
        self.arms = np.array(state["arms"], dtype=np.float64)
        self.pulls = int(state["pulls"])
        self.best, self.previous = or_none(float(state["best"])), or_none(float(state["previous"]))

    def _first_arms(self) -> np.ndarray:
        return np.empty((5, 0))

    @abstractmethod
    def _choose(self, cap: float, draws: Draws) -> tuple[float, int, bool] | None:
        """Point, arm and whether it is a sweep, or None for a bypass."""

    def _credit(self, pull: Pull, reward: float, accuracy: float) -> None:  # noqa: B027 - not every policy learns
        """Learn; raises before anything is changed."""


class ArmBandit(Bandit):
    """Chooses an interval, by its rewards, and a point in it by chance. Arms never pulled come first, lowest first."""

    def _first_arms(self) -> np.ndarray:
        return equal_arms(self.config.low, self.config.high, self.config.num_arms)

    def _choose(self, cap: float, draws: Draws) -> tuple[float, int, bool] | None:
        num_eligible = int(self.arms[LO].searchsorted(cap))  # those with lo < cap
        if not num_eligible:
            return None
        arms = self.arms[:, :num_eligible]
        arm = int(arms[COUNT].argmin())
        sweep = bool(arms[COUNT, arm] == 0)
        if not sweep:
            arm = self._select(arms, draws)
        lo, hi = float(arms[LO, arm]), float(arms[HI, arm])
        return between(lo, min(hi, cap), draws[2]), arm, sweep

    @abstractmethod
    def _select(self, arms: np.ndarray, draws: Draws) -> int:
        """Which of the eligible arms, all of which have been pulled."""

    def _credit(self, pull: Pull, reward: float, accuracy: float) -> None:
        self._check(pull)
        self.arms = self.arms.copy()
        self.arms[:, pull.arm] = _with_reward(self.arms[:, pull.arm], reward)

    def _check(self, pull: Pull) -> None:
        if pull.arm < self.arms.shape[1]:
            lo, hi, count = self.arms[: COUNT + 1, pull.arm]
            if lo <= pull.point < hi and pull.sweep == (count == 0):
                return
        raise ValueError(
            f"{pull} is not one of this bandit as it stands, with arms {self.arms[: HI + 1].T.tolist()}: observe each "
            "pull once, and before the next is observed"
        )


class PUCBV(ArmBandit):
    """P-UCBV: the arm that was pulled is split there, so that intervals grow fine where they pay.

    Differences from the released code: rewards belong to arms, not to positions in two lists; a pull is credited to
    the arm it came from, not to the one that its capped ratio falls into; elimination compares fractions with 0.05
    (the code has -5, which never happens) and deletes the arm just credited; no arm is pulled above the device's cap
    (the code pulls any, and cuts the ratio); draws are seeded. `profile="sweep"` differs further: see `BanditConfig`.
    """

    @property
    def epsilon(self) -> float:
        """Halved at every pull, sweeps not counted."""
        return math.ldexp(1.0, -self.pulls)

    def _first_arms(self) -> np.ndarray:
        arms = super()._first_arms()
        if self.config.profile == "aligned":
            arms = arms.copy()
            arms[COUNT] = 1  # a reward of 0 that nobody gave
        return arms

    def _select(self, arms: np.ndarray, draws: Draws) -> int:
        explore, which, _ = draws
        if explore < 1 / max(self.pulls, 1):
            return int(which * arms.shape[1])
        found = index(arms[MEAN], variances_of(arms), arms[COUNT], self.horizon, self.epsilon, self.arms.shape[1])
        return int(found.argmax())

    def _credit(self, pull: Pull, reward: float, accuracy: float) -> None:
        self._check(pull)
        arm, num_arms = pull.arm, self.arms.shape[1]
        credited = _with_reward(self.arms[:, pull.arm], reward)[:, None]
        pieces = [self.arms[:, :arm]]
        if self._splits(pull):
            left = self.arms[:, arm : arm + 1].copy()
            left[HI] = credited[LO] = pull.point
            pieces.append(left)
            num_arms += 1
        if num_arms == 1 or not self._fell(accuracy):
            pieces.append(credited)
        self.arms = np.concatenate([*pieces, self.arms[:, arm + 1 :]], axis=1)

    def _splits(self, pull: Pull) -> bool:
        lo, hi = self.arms[: HI + 1, pull.arm]
        narrow = self.config.profile == "sweep" and hi - lo < self.config.min_width - _HAIR
        return not (pull.sweep or narrow or pull.point == lo)

    def _fell(self, accuracy: float) -> bool:
        return self.previous is not None and accuracy < self.previous - self.config.drop - _HAIR


@lru_cache(maxsize=8)
def equal_arms(low: float, high: float, num_arms: int) -> np.ndarray:
    """Equal intervals without rewards, read-only: (5, num_arms)."""
    edges = np.linspace(low, high, num_arms + 1)
    edges[1:-1] = edges[1:-1].round(12)  # 0.1, not a hair less: a device of cap 0.1 has nothing of the arm above
    arms = np.zeros((5, num_arms))
    arms[LO], arms[HI] = edges[:-1], edges[1:]
    arms.setflags(write=False)
    return arms


def between(lo: float, top: float, share: float) -> float:
    """A point in [lo, top), however it is rounded."""
    return min(lo + float(share) * (top - lo), math.nextafter(top, lo))


def _with_reward(arm: np.ndarray, reward: float) -> np.ndarray:
    """A copy of one arm with one reward more: Welford's update, which does not cancel."""
    lo, hi, count, mean, squares = arm.tolist()
    moved = mean + (reward - mean) / (count + 1)
    return np.array([lo, hi, count + 1, moved, squares + (reward - mean) * (reward - moved)])


def variances_of(arms: np.ndarray) -> np.ndarray:
    """Population variance of each arm's rewards."""
    return np.asarray(arms[SQUARES] / arms[COUNT])


def or_nan(value: float | None) -> float:
    """None as an array holds it."""
    return math.nan if value is None else value


def or_none(value: float) -> float | None:
    """Undo `or_nan`."""
    return None if math.isnan(value) else value
