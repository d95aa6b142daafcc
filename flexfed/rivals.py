"""Other ways to choose a client's ratio, to compare P-UCBV with; all on equal arms that are never split.

The rivals are an index of a line or two each: MABWiser, SMPyBandits, BanditLab and PyBandits choose among all arms,
with a generator of their own and state inside objects (MABWiser's Thompson sampling wants rewards of 0 and 1, and it
has no UCB-V), while here the arms that a device may pull change, draws come from outside and state is plain arrays.
"""

from __future__ import annotations

import math

import numpy as np

from flexfed.bandits import COUNT, MEAN, PUCBV, ArmBandit, Bandit, Draws, between, variances_of


class Fixed(Bandit):
    """Always `bandit.ratio`: of the network where the cap allows that ("clip"), or of the cap ("relative")."""

    def _choose(self, cap: float, draws: Draws) -> tuple[float, int, bool]:
        return min(cap, self.config.ratio), 0, False


class Uniform(Bandit):
    """Anywhere in the allowed part of [low, high], equally likely; learns nothing."""

    def _choose(self, cap: float, draws: Draws) -> tuple[float, int, bool] | None:
        low, high = self.config.low, self.config.high
        return (between(low, min(high, cap), draws[2]), 0, False) if low < cap else None


class UCB1(ArmBandit):
    """Largest mean + sqrt(2 ln t / n), t = pulls of all arms; takes rewards to lie in [0, 1].

    "Finite-time Analysis of the Multiarmed Bandit Problem" (Auer, Cesa-Bianchi, Fischer, Machine Learning 2002).
    """

    def _select(self, arms: np.ndarray, draws: Draws) -> int:
        return int((arms[MEAN] + np.sqrt(2 * math.log(self.arms[COUNT].sum()) / arms[COUNT])).argmax())


class UCBV(ArmBandit):
    """Largest mean + sqrt(2 var e / n) + 3 e / n with e = 1.2 ln t; takes rewards to lie in [0, 1].

    "Exploration-exploitation tradeoff using variance estimates in multi-armed bandits" (Audibert, Munos, Szepesvari,
    Theoretical Computer Science 2009), with b = 1, c = 1 and zeta = 1.2.
    """

    def _select(self, arms: np.ndarray, draws: Draws) -> int:
        bonus = 1.2 * math.log(self.arms[COUNT].sum()) / arms[COUNT]
        return int((arms[MEAN] + np.sqrt(2 * variances_of(arms) * bonus) + 3 * bonus).argmax())


class EpsilonGreedy(ArmBandit):
    """Any arm with probability epsilon, else the largest mean; any scale of rewards (Sutton and Barto, section 2.2)."""

    def _select(self, arms: np.ndarray, draws: Draws) -> int:
        explore, which, _ = draws
        return int(which * arms.shape[1]) if explore < self.config.epsilon else int(arms[MEAN].argmax())


class Thompson(ArmBandit):
    """Largest draw from N(sum / (n + 1), 1 / (n + 1)); takes rewards to vary by about 1 around means near 0 to 1.

    "Further Optimal Regret Bounds for Thompson Sampling" (Agrawal, Goyal, AISTATS 2013), the Gaussian prior. Its
    normal numbers come from a generator that the first two draws seed: a resumed run goes on the same.
    """

    def _select(self, arms: np.ndarray, draws: Draws) -> int:
        rng = np.random.default_rng([int(draw * 2**53) for draw in draws[:2]])  # exact: a draw has 53 bits
        normals = rng.standard_normal(arms.shape[1])
        return int((arms[MEAN] * arms[COUNT] / (arms[COUNT] + 1) + normals / np.sqrt(arms[COUNT] + 1)).argmax())


BANDITS: dict[str, type[Bandit]] = {
    "p-ucbv": PUCBV,
    "ucb1": UCB1,
    "ucb-v": UCBV,
    "epsilon-greedy": EpsilonGreedy,
    "thompson": Thompson,
    "uniform": Uniform,
    "fixed": Fixed,
}
