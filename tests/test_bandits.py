"""Ratio policies: the worked examples of P-UCBV, its invariants, a slow oracle, and rivals that learn."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexfed.bandits import (
    COUNT,
    HI,
    LO,
    MEAN,
    SQUARES,
    Bandit,
    BanditConfig,
    Pull,
    index,
    reward,
    utility,
)
from flexfed.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from flexfed.config import read
from flexfed.ratios import pack_bandits, unpack_bandits
from flexfed.rivals import BANDITS

LEARNERS = ("p-ucbv", "ucb1", "ucb-v", "epsilon-greedy", "thompson")
ALIGNED = BanditConfig(profile="aligned")
LAST = 1 - 2**-53  # the largest draw


def pucbv(config: BanditConfig = ALIGNED, horizon: float = 20) -> Any:
    return BANDITS["p-ucbv"](config, horizon)


def edges(bandit: Any) -> list[float]:
    assert (bandit.arms[HI, :-1] == bandit.arms[LO, 1:]).all(), "these arms have a gap"
    return [*bandit.arms[LO].tolist(), float(bandit.arms[HI, -1])]


def indices(bandit: Any) -> np.ndarray:
    """Of all arms."""
    arms = bandit.arms
    variances = arms[SQUARES] / arms[COUNT]
    return index(arms[MEAN], variances, arms[COUNT], bandit.horizon, bandit.epsilon, arms.shape[1])


def step(bandit: Bandit, draws: Any, earned: float, *, cap: float = 1.0, accuracy: float = 0.7) -> Pull:
    pull = bandit.choose(cap, draws)
    bandit.observe(pull, earned, accuracy)
    return pull


def bits(bandit: Bandit) -> dict[str, bytes]:
    return {key: array.tobytes() for key, array in bandit.state().items()}


# Worked examples; the numbers are those of an independent script.

INDEX_TABLE = {
    1.0: (2.772589, 0.832555, 0.794563, 0.821429, 0.490175),
    0.5: (2.079442, 0.721013, 0.714907, 0.756036, 0.411106),
    0.25: (1.386294, 0.588705, 0.620419, 0.678469, 0.317317),
    0.125: (0.693147, 0.416277, 0.497281, 0.577381, 0.195087),
    0.0625: (0.0, 0.0, 0.2, 0.333333, -0.1),
}


@pytest.mark.parametrize("epsilon", INDEX_TABLE)
def test_index(epsilon: float):
    rewards = ([0], [0, 0.4], [0, 0.4, 0.6], [0, -0.2])
    means, variances = np.array([np.mean(r) for r in rewards]), np.array([np.var(r) for r in rewards])
    counts = np.array([1, 2, 3, 2])
    confidence, *expected = INDEX_TABLE[epsilon]
    np.testing.assert_allclose(index(means, variances, counts, 20, epsilon, 5), expected, atol=1e-6)
    bonus = index(np.zeros(1), np.zeros(1), np.ones(1), 20, epsilon, 5)  # sqrt of a quarter of it
    np.testing.assert_allclose(4 * bonus**2, confidence, atol=1e-6)


ALIGNED_PULLS = (  # draws, arm, ratio, reward
    ((0.3, 0.1, 0.5), 0, 0.55, 0.10),
    ((0.9, 0.7, 0.25), 4, 0.825, 0.50),
    ((0.2, 0.45, 0.5), 3, 0.75, 0.30),
    ((0.9, 0.0, 0.4), 6, 0.855, 0.62),
    ((0.6, 0.0, 0.5), 7, 0.8775, 0.58),
    ((0.1, 0.99, 0.5), 9, 0.95, 0.05),
)
INDICES_BEFORE = {
    1: (0.6548, 0.5133, 0.6548, 0.6548, 0.6548, 0.6548),
    2: (0.4223, 0.3488, 0.4223, 0.4223, 0.4223, 0.5532, 0.4223),
}


def play_aligned(last_accuracy: float = 0.7) -> Any:
    bandit = pucbv()
    for i, (draws, arm, ratio, earned) in enumerate(ALIGNED_PULLS):
        if i in INDICES_BEFORE:
            np.testing.assert_allclose(indices(bandit), INDICES_BEFORE[i], atol=5e-5)
        pull = step(bandit, draws, earned, accuracy=last_accuracy if i == 5 else 0.7)
        assert (pull.arm, pull.sweep) == (arm, False)
        np.testing.assert_allclose((pull.ratio, pull.point), ratio, atol=1e-12)
    return bandit


def test_aligned_sequence():
    bandit = play_aligned()
    assert (bandit.epsilon, bandit.pulls) == (1 / 64, 6)
    expected = (0.5, 0.55, 0.6, 0.7, 0.75, 0.8, 0.825, 0.855, 0.8775, 0.9, 0.95, 1)
    np.testing.assert_allclose(edges(bandit), expected, atol=1e-12)
    assert bandit.arms[COUNT].tolist() == [1, 2, 1, 1, 2, 1, 2, 3, 4, 1, 2]
    for arm, rewards in ((8, [0, 0.5, 0.62, 0.58]), (10, [0, 0.05])):
        np.testing.assert_allclose(bandit.arms[MEAN, arm], np.mean(rewards), atol=1e-12)
        np.testing.assert_allclose(bandit.arms[SQUARES, arm] / len(rewards), np.var(rewards), atol=1e-12)


def test_aligned_greedy_indices():
    """Before pulls 4 and 5 the bonus is gone: the largest mean."""
    bandit = pucbv()
    for draws, *_, earned in ALIGNED_PULLS[:3]:
        step(bandit, draws, earned)
    np.testing.assert_allclose(indices(bandit)[6], 0.25, atol=1e-12)
    step(bandit, ALIGNED_PULLS[3][0], 0.62)
    np.testing.assert_allclose(indices(bandit)[7], 0.373333, atol=1e-6)


def test_elimination_deletes_the_credited_arm():
    whole, fallen = play_aligned(), play_aligned(last_accuracy=0.60)
    assert (fallen.arms == whole.arms[:, :10]).all()
    assert fallen.arms.shape == (5, 10)
    assert (play_aligned(last_accuracy=0.66).arms == whole.arms).all()


@pytest.mark.parametrize(("before", "after"), [(0.70, 0.65), (0.20, 0.15), (0.53, 0.48)])
def test_a_fall_of_exactly_the_threshold_eliminates_nothing(before: float, after: float):
    bandit = pucbv()
    step(bandit, (0.0, 0.5, 0.5), 0.1, accuracy=before)
    step(bandit, (0.0, 0.5, 0.5), 0.1, accuracy=after)
    assert bandit.arms.shape[1] == 7


def test_the_last_arm_stays():
    bandit = pucbv(BanditConfig(num_arms=1, min_width=0.6))
    step(bandit, (0.0, 0.0, 0.5), 0.3, accuracy=0.9)
    step(bandit, (0.0, 0.0, 0.5), 0.1, accuracy=0.1)
    assert bandit.arms.shape[1] == 1
    assert bandit.arms[COUNT, 0] == 2


def test_elimination_leaves_a_gap_and_may_leave_nothing_for_a_weak_device():
    bandit = pucbv(BanditConfig(profile="aligned", num_arms=2))
    step(bandit, (0.0, 0.0, 0.5), 0.3, accuracy=0.9)  # [0.5, 0.625) and [0.625, 0.75)
    step(bandit, (0.0, 0.0, 0.0), 0.1, accuracy=0.8)  # s = lo: no split, the arm itself goes
    assert bandit.arms[LO].tolist() == [0.625, 0.75]
    assert bandit.choose(0.6, (0.0, 0.0, 0.5)) == Pull(0.6, 0.6, -1)
    assert bandit.choose(0.7, (0.0, 0.0, 0.5)).arm == 0


def test_sweep_sequence():
    bandit = pucbv(BanditConfig(), 20)
    for arm, (ratio, earned) in enumerate(
        zip((0.55, 0.65, 0.75, 0.85, 0.95), (0, 0.41, 0.83, 0.79, 0.40), strict=True)
    ):
        pull = step(bandit, (0.0, 0.9, 0.5), earned)
        assert (pull.arm, pull.sweep) == (arm, True)
        np.testing.assert_allclose(pull.ratio, ratio, atol=1e-12)
    assert (bandit.pulls, bandit.epsilon) == (0, 1.0)
    np.testing.assert_allclose(indices(bandit), (0.8326, 1.2426, 1.6626, 1.6226, 1.2326), atol=5e-5)
    rows = (  # draws, arm, ratio, reward, index of the arm where it is greedy
        ((0.0, 0.1, 0.5), 0, 0.55, 0.02, None),
        ((0.5, 0.99, 0.25), 5, 0.925, 0.47, None),
        ((0.7, 0.0, 0.5), 3, 0.75, 0.85, 1.2523),
        ((0.4, 0.0, 0.5), 4, 0.775, 0.71, 0.84),
        ((0.9, 0.0, 0.75), 4, 0.76875, 0.84, 0.84),
    )
    for draws, arm, ratio, earned, greedy in rows:
        if greedy is not None:
            np.testing.assert_allclose(indices(bandit)[arm], greedy, atol=5e-5)
        pull = step(bandit, draws, earned)
        assert (pull.arm, pull.sweep) == (arm, False)
        np.testing.assert_allclose(pull.ratio, ratio, atol=1e-12)
    assert (bandit.pulls, bandit.epsilon) == (5, 1 / 32)
    np.testing.assert_allclose(edges(bandit), (0.5, 0.55, 0.6, 0.7, 0.75, 0.775, 0.8, 0.9, 0.925, 1), atol=1e-12)
    assert bandit.arms[COUNT].tolist() == [1, 2, 1, 1, 3, 3, 1, 1, 2]
    means = (0, 0.01, 0.41, 0.83, 0.84, 0.796667, 0.79, 0.40, 0.435)
    np.testing.assert_allclose(bandit.arms[MEAN], means, atol=1e-6)


def test_capped_sequence():
    bandit, draws = pucbv(), (0.9, 0.9, 0.5)
    untouched = bits(bandit)
    for cap in (0.5, 0.25):
        assert step(bandit, draws, 0.9, cap=cap) == Pull(cap, cap, -1)
        assert bits(bandit) == untouched
    first, second = step(bandit, draws, 0.4), step(bandit, draws, 0.3, cap=0.65)
    assert (first.arm, second.arm) == (4, 1)
    np.testing.assert_allclose((first.ratio, second.ratio), (0.95, 0.625), atol=1e-12)
    assert (bandit.epsilon, bandit.pulls) == (0.25, 2)
    np.testing.assert_allclose(edges(bandit), (0.5, 0.6, 0.625, 0.7, 0.8, 0.9, 0.95, 1), atol=1e-12)
    assert bandit.arms[COUNT].tolist() == [1, 1, 2, 1, 1, 1, 2]
    expected = (0.422300, 0.422300, 0.450286, 0.422300, 0.422300, 0.422300, 0.501583)
    np.testing.assert_allclose(indices(bandit), expected, atol=1e-6)


DENSE_MFLOPS, DENSE_MB = 2788.128, 21_840 * 32 / 8 / 2**20


def mnist_reward(accuracy: float, best: float | None, share: float, capability: float, **more: Any) -> float:
    return reward(accuracy, best, share * DENSE_MFLOPS, share * DENSE_MB, capability, DENSE_MFLOPS, 1.0, **more)


def test_utility_and_reward():
    np.testing.assert_allclose(
        [utility(x) for x in (0.5, 0.6, 0.9, 1)], (0.872774, 1.046158, 1.562105, 1.732352), atol=1e-6
    )
    assert utility(0) == 0
    np.testing.assert_allclose(utility(0.37), 10 - 20 / (1 + math.exp(0.35 * 0.37)), atol=1e-12)
    np.testing.assert_allclose(mnist_reward(0.60, 0.0, 1.0, 1.0), 0.339297, atol=1e-6)
    np.testing.assert_allclose(mnist_reward(0.65, 0.60, 0.5, 0.5), 0.028426, atol=1e-6)
    np.testing.assert_allclose(mnist_reward(0.55, 0.65, 1.0, 1.0), -0.056135, atol=1e-6)


def test_the_first_reward():
    assert mnist_reward(0.6, None, 1.0, 1.0) == 0
    assert mnist_reward(0.6, None, 1.0, 1.0, baseline="zero") == mnist_reward(0.6, 0.0, 1.0, 1.0)
    assert math.isnan(mnist_reward(math.nan, 0.5, 1.0, 1.0))
    assert math.isnan(mnist_reward(math.nan, None, 1.0, 1.0))


# Invariants.


@dataclass
class SlowArm:
    lo: float
    hi: float
    rewards: list[float]


@dataclass
class SlowPUCBV:
    """P-UCBV by loops over lists, as it is described."""

    config: BanditConfig
    horizon: float
    arms: list[SlowArm] = field(default_factory=list)
    m: int = 0
    epsilon: float = 1.0
    previous: float | None = None

    def __post_init__(self) -> None:
        c = self.config
        width = (c.high - c.low) / c.num_arms
        first = [] if c.profile == "sweep" else [0.0]
        self.arms = [SlowArm(c.low + i * width, c.low + (i + 1) * width, list(first)) for i in range(c.num_arms)]

    def index(self, arm: SlowArm) -> float:
        n, k = len(arm.rewards), len(self.arms)
        mean = sum(arm.rewards) / n
        variance = sum((r - mean) ** 2 for r in arm.rewards) / n
        inside = self.horizon / k**2 * self.horizon * self.epsilon
        confidence = max(0.0, math.log(inside)) if inside > 0 else 0.0
        return mean + math.sqrt(0.5 * (variance + 2) * confidence / (4 * n))

    def choose(self, cap: float, draws: Any) -> tuple[float, int, bool]:
        """Ratio, arm and sweep; arm -1 = bypass."""
        cap = min(cap, 1.0)
        top = cap if self.config.cap == "clip" else 1.0
        u, v, omega = draws
        eligible = [arm for arm in self.arms if arm.lo < top - 1e-12]
        if not eligible:
            return cap, -1, False
        empty = [arm for arm in eligible if not arm.rewards]
        if empty:
            arm = empty[0]
        elif u < 1 / max(self.m, 1):
            arm = eligible[math.floor(v * len(eligible))]
        else:
            arm = eligible[0]
            for other in eligible[1:]:
                if self.index(other) > self.index(arm):
                    arm = other
        point = arm.lo + omega * (min(arm.hi, top) - arm.lo)
        return point * (1.0 if self.config.cap == "clip" else cap), self.arms.index(arm), bool(empty)

    def observe(self, pull: Pull, earned: float, accuracy: float) -> None:
        """Credit it, at the point that the fast one chose: its last bits decide which arms are too narrow."""
        if pull.arm < 0:
            return
        arm, c = self.arms[pull.arm], self.config
        narrow = c.profile == "sweep" and arm.hi - arm.lo < c.min_width - 1e-9
        if pull.sweep or narrow or pull.point <= arm.lo:
            arm.rewards.append(earned)
        else:
            right = SlowArm(pull.point, arm.hi, [*arm.rewards, earned])
            arm.hi = pull.point
            self.arms.insert(pull.arm + 1, right)
            arm = right
        if not pull.sweep:
            self.epsilon, self.m = self.epsilon / 2, self.m + 1
        if self.previous is not None and accuracy < self.previous - c.drop - 1e-9 and len(self.arms) >= 2:
            self.arms = [other for other in self.arms if other is not arm]
        self.previous = accuracy


CAPS = (1 / 16, 1 / 4, 1 / 2, 0.55, 0.6, 0.75, 0.97, 1.0, 1.3)
CONFIGS = [
    BanditConfig(profile=profile, cap=cap, low=low, high=high, num_arms=arms, min_width=width, drop=drop)  # type: ignore[arg-type]
    for profile, width in (("sweep", 0.04), ("sweep", 0.0), ("aligned", 0.04))
    for cap in ("clip", "relative")
    for low, high, arms, drop in ((0.5, 1.0, 5, 0.05), (0.1, 0.9, 8, 0.3), (0.0625, 1.0, 1, 0.0))
]


@pytest.mark.parametrize("config", CONFIGS)
def test_agrees_with_the_oracle(config: BanditConfig):
    for seed in range(4):
        rng = np.random.default_rng([seed, len(config.profile)])
        fast, slow = pucbv(config, 20.0), SlowPUCBV(config, 20.0)
        for _ in range(40):
            cap, draws = float(rng.choice(CAPS)), tuple(rng.random(3).tolist())
            pull = fast.choose(cap, draws)
            ratio, arm, sweep = slow.choose(cap, draws)
            assert (pull.arm, pull.sweep) == (arm, sweep)
            np.testing.assert_allclose(pull.ratio, ratio, atol=1e-9)
            earned, accuracy = 5 + float(rng.normal()), float(rng.random())
            fast.observe(pull, earned, accuracy)
            slow.observe(pull, earned, accuracy)
        np.testing.assert_allclose(fast.arms[LO], [a.lo for a in slow.arms], atol=1e-9)
        np.testing.assert_allclose(fast.arms[HI], [a.hi for a in slow.arms], atol=1e-9)
        assert fast.arms[COUNT].tolist() == [len(a.rewards) for a in slow.arms]
        filled = [(i, a.rewards) for i, a in enumerate(slow.arms) if a.rewards]
        for i, rewards in filled:
            np.testing.assert_allclose(fast.arms[MEAN, i], np.mean(rewards), atol=1e-9)
            np.testing.assert_allclose(fast.arms[SQUARES, i] / len(rewards), np.var(rewards), atol=1e-9)
        assert (fast.pulls, fast.epsilon, fast.previous) == (slow.m, slow.epsilon, slow.previous)


UNIT = st.floats(0, 1, exclude_max=True)
ROUND = st.tuples(
    st.one_of(st.sampled_from(CAPS), st.floats(0.01, 1.5)),
    st.tuples(UNIT, UNIT, UNIT),
    st.floats(-3, 3),
    st.one_of(st.floats(0, 1), st.just(math.nan)),
)


def check_arms(bandit: Any, config: BanditConfig, gone: float) -> None:
    """Sorted, disjoint, and all of the space but what was removed."""
    lo, hi = bandit.arms[LO], bandit.arms[HI]
    assert (lo < hi).all()
    assert (hi[:-1] <= lo[1:]).all()
    assert (bandit.arms[SQUARES] >= 0).all()
    np.testing.assert_allclose((hi - lo).sum() + gone, config.high - config.low, atol=1e-9)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(CONFIGS), st.lists(ROUND, max_size=30))
def test_invariants(config: BanditConfig, rounds: list[Any]):
    bandit = pucbv(config)
    expected_arms, pulls, gone = config.num_arms, 0, 0.0
    for cap, draws, earned, accuracy in rounds:
        before, arms, previous = bits(bandit), bandit.arms, bandit.previous
        pull = bandit.choose(cap, draws)
        assert bits(bandit) == before, "choose changed something"
        assert 0 < pull.ratio <= cap
        assert pull.ratio <= 1
        bandit.observe(pull, earned, accuracy)
        if pull.arm < 0 or math.isnan(accuracy):
            assert bits(bandit) == before
            continue
        lo, hi = float(arms[LO, pull.arm]), float(arms[HI, pull.arm])
        narrow = config.profile == "sweep" and hi - lo < config.min_width - 1e-9
        split = not (pull.sweep or narrow or pull.point == lo)
        removed = previous is not None and accuracy < previous - config.drop - 1e-9 and arms.shape[1] + split > 1
        expected_arms += split - removed
        gone += removed * (hi - (pull.point if split else lo))
        pulls += not pull.sweep
        assert bandit.arms.shape[1] == expected_arms
        assert (bandit.pulls, bandit.epsilon) == (pulls, 2.0**-pulls)
        check_arms(bandit, config, gone)


@pytest.mark.parametrize("cap", ["clip", "relative"])
@pytest.mark.parametrize("name", BANDITS)
def test_no_draw_leaves_the_allowed_part(name: str, cap: Any):
    bandit = BANDITS[name](BanditConfig(cap=cap), 20)
    for omega in (0.0, 0.3, LAST):
        for z in (0.01, 0.5, 0.6, 0.7, 0.77, 1.0):
            for _ in range(7):
                pull = step(bandit, (LAST, LAST, omega), 0.1, cap=z)
                assert 0 < pull.ratio <= z
                assert pull.arm < 0 or name == "fixed" or 0.5 <= pull.point < 1


@pytest.mark.parametrize("name", sorted(set(BANDITS) - {"fixed"}))
def test_bypass_below_the_arms(name: str):
    bandit = BANDITS[name](BanditConfig(), 20)
    for z in (0.25, 0.5):
        assert step(bandit, (0.5, 0.5, 0.5), 0.4, cap=z) == Pull(z, z, -1)
    assert (bandit.best, bandit.previous, bandit.pulls) == (None, None, 0)
    assert bandit.choose(math.nextafter(0.5, 1), (0.5, 0.5, 0.5)).arm == 0


def test_first_edges_are_not_a_hair_below_their_decimals():
    """linspace(0.05, 0.15, 11)[5] is 0.09999999999999999: a device of cap 0.1 would be earned a sliver of that arm."""
    bandit = pucbv(BanditConfig(profile="aligned", low=0.05, high=0.15, num_arms=10))
    assert bandit.arms[LO, 5] == 0.1
    assert bandit.choose(0.1, (0.0, LAST, 0.5)).arm == 4


@pytest.mark.parametrize("name", BANDITS)
def test_relative_is_the_same_choice_scaled_by_the_cap(name: str):
    relative, whole = (BANDITS[name](BanditConfig(cap=cap), 20) for cap in ("relative", "clip"))
    rng = np.random.default_rng(5)
    for cap in np.tile((1 / 16, 1 / 8, 1 / 4, 1 / 2, 1), 8):
        draws = tuple(rng.random(3).tolist())
        pull, other = relative.choose(cap, draws), whole.choose(1.0, draws)
        assert pull == replace(other, ratio=cap * other.point)
        earned = float(rng.normal())
        relative.observe(pull, earned, 0.5)
        whole.observe(other, earned, 0.5)
    assert bits(relative) == bits(whole)


@pytest.mark.parametrize("name", BANDITS)
def test_nothing_is_credited_for_what_is_not_finite(name: str):
    bandit = BANDITS[name](BanditConfig(), 20)
    for _ in range(8):
        step(bandit, (0.3, 0.4, 0.6), 0.2)
    before, pull = bits(bandit), bandit.choose(1.0, (0.1, 0.2, 0.3))
    for earned, accuracy in ((math.nan, 0.5), (math.inf, 0.5), (0.1, math.nan), (0.1, -math.inf)):
        bandit.observe(pull, earned, accuracy)
        assert bits(bandit) == before
    bandit.observe(pull, 0.1, 0.5)
    assert bits(bandit) != before


def test_best_and_previous_accuracy():
    bandit = pucbv()
    seen = []
    for accuracy in (0.3, 0.5, 0.47, 0.49):
        step(bandit, (0.5, 0.5, 0.5), 0.1, accuracy=accuracy)
        seen.append((bandit.best, bandit.previous))
    assert seen == [(0.3, 0.3), (0.5, 0.5), (0.5, 0.47), (0.5, 0.49)]


# Going on.


def run_on(bandit: Bandit, rng: np.random.Generator, rounds: int) -> list[Pull]:
    pulls = []
    for _ in range(rounds):
        pull = bandit.choose(float(rng.choice((0.25, 0.62, 1.0))), tuple(rng.random(3).tolist()))  # type: ignore[arg-type]
        bandit.observe(pull, float(rng.normal()), float(rng.random()))
        pulls.append(pull)
    return pulls


@pytest.mark.parametrize("profile", ["sweep", "aligned"])
@pytest.mark.parametrize("name", BANDITS)
def test_goes_on_from_its_state_bit_for_bit(name: str, profile: Any):
    config = BanditConfig(profile=profile, low=0.3, drop=0.4)
    for rounds in (0, 1, 3, 25):
        whole, restored = BANDITS[name](config, 40), BANDITS[name](config, 40)
        run_on(whole, np.random.default_rng(1), rounds)
        restored.restore(whole.state())
        assert bits(restored) == bits(whole)
        assert run_on(restored, np.random.default_rng(2), 25) == run_on(whole, np.random.default_rng(2), 25)
        assert bits(restored) == bits(whole)


def fleet_of(name: str, config: BanditConfig) -> dict[int, Bandit]:
    """Bandits of many ages, in no order."""
    found = {partition: BANDITS[name](config, 40) for partition in (7, 2, 30, 0)}
    for partition, bandit in found.items():
        run_on(bandit, np.random.default_rng(partition), partition)
    return found


@pytest.mark.parametrize("name", BANDITS)
def test_packed_in_a_checkpoint(name: str, tmp_path: Any):
    config = BanditConfig(low=0.3, drop=0.4)
    fleet = fleet_of(name, config)
    save_checkpoint(tmp_path, Checkpoint(1, {}, state=pack_bandits(fleet)))
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert len(found.state) == 10
    again = unpack_bandits(name, config, 40, found.state)
    assert list(again) == [0, 2, 7, 30]
    for partition, bandit in fleet.items():
        assert bits(again[partition]) == bits(bandit)
        assert run_on(again[partition], np.random.default_rng(9), 9) == run_on(bandit, np.random.default_rng(9), 9)


def test_no_bandit_packs_too(tmp_path: Any):
    save_checkpoint(tmp_path, Checkpoint(1, {}, state=pack_bandits({})))
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert unpack_bandits("p-ucbv", BanditConfig(), 40, found.state) == {}


def test_a_state_is_not_changed_by_what_comes_after():
    bandit = pucbv()
    run_on(bandit, np.random.default_rng(0), 5)
    state = bandit.state()
    kept = {key: array.copy() for key, array in state.items()}
    run_on(bandit, np.random.default_rng(1), 5)
    for key, array in kept.items():
        assert array.tobytes() == state[key].tobytes()


# Learning.

PEAKS = (0.55, 0.65, 0.75, 0.85, 0.95)


def expected_reward(ratio: float | np.ndarray, peak: float) -> Any:
    return np.exp(-(((ratio - peak) / 0.15) ** 2))


def ratios_of(name: str, config: BanditConfig, peak: float, seed: int, pulls: int = 200) -> np.ndarray:
    """What a bandit chooses on a noisy bump."""
    rng = np.random.default_rng([seed, round(100 * peak)])
    draws, noise = rng.random((pulls, 3)).tolist(), 0.1 * rng.standard_normal(pulls)
    bandit, chosen = BANDITS[name](config, pulls), []
    for draw, error in zip(draws, noise.tolist(), strict=True):
        pull = bandit.choose(1.0, draw)
        bandit.observe(pull, math.exp(-(((pull.ratio - peak) / 0.15) ** 2)) + error, 0.5)
        chosen.append(pull.ratio)
    return np.array(chosen)


def near_and_ratio(config: BanditConfig, runs: int, within: float) -> tuple[float, float]:
    """Share of the last 50 pulls near the peak, and regret of the second half over that of the first."""
    chosen = np.array([ratios_of("p-ucbv", config, PEAKS[i % 5], i) for i in range(runs)])
    peaks = np.resize(PEAKS, runs)[:, None]
    regret = 1 - expected_reward(chosen, peaks)
    near = float((np.abs(chosen[:, -50:] - peaks) < within).mean())
    return near, float(regret[:, 100:].sum() / regret[:, :100].sum())


def test_sweep_finds_the_peak():
    near, ratio = near_and_ratio(BanditConfig(), 20, within=0.06)
    assert near >= 0.9
    assert ratio < 0.5


def test_aligned_finds_the_peak():
    near, ratio = near_and_ratio(ALIGNED, 100, within=0.1)
    assert near >= 0.6
    assert ratio < 1


def close_to_peak(name: str, runs: Iterable[int]) -> float:
    found = [np.abs(ratios_of(name, BanditConfig(), PEAKS[i % 5], i) - PEAKS[i % 5]) < 0.06 for i in runs]
    return float(np.mean(found))


@pytest.mark.parametrize("name", LEARNERS)
def test_learners_find_the_peak_more_often_than_chance(name: str):
    assert close_to_peak(name, range(10)) > 1.2 * close_to_peak("uniform", range(10))


@pytest.mark.parametrize("name", LEARNERS)
def test_each_arm_is_tried_before_one_is_repeated(name: str):
    bandit = BANDITS[name](BanditConfig(), 20)
    weak = [step(bandit, (0.0, 0.9, 0.5), 1.0, cap=0.75).arm for _ in range(4)]
    assert weak[:3] == [0, 1, 2]
    assert weak[3] < 3
    counts = bandit.arms[COUNT].copy()
    strong = [step(bandit, (0.0, 0.9, 0.5), 1.0) for _ in range(2)]
    untried = np.flatnonzero(counts == 0).tolist()
    assert [pull.arm for pull in strong] == untried
    assert all(pull.sweep for pull in strong)
    assert bandit.pulls == 1


def trained(name: str, rewards: Sequence[Sequence[float]], **knobs: Any) -> Any:
    """A bandit whose arms have these rewards."""
    bandit = BANDITS[name](BanditConfig(num_arms=len(rewards), **knobs), 20)
    arms = bandit.arms.copy()
    arms[COUNT] = [len(r) for r in rewards]
    arms[MEAN] = [np.mean(r) for r in rewards]
    arms[SQUARES] = [np.var(r) * len(r) for r in rewards]
    bandit.restore({**bandit.state(), "arms": arms})
    return bandit


REWARDS = ([0.5, 0.1, 0.5, 0.9], [0.5, 0.6, 0.4], [0.2, 0.3], [0.55, 0.45, 0.5, 0.5, 0.5])


def slow_ucb1(rewards: Sequence[float], t: int) -> float:
    return sum(rewards) / len(rewards) + math.sqrt(2 * math.log(t) / len(rewards))


def slow_ucbv(rewards: Sequence[float], t: int) -> float:
    n, mean = len(rewards), sum(rewards) / len(rewards)
    variance = sum((r - mean) ** 2 for r in rewards) / n
    return mean + math.sqrt(2 * variance * 1.2 * math.log(t) / n) + 3 * 1.2 * math.log(t) / n


@pytest.mark.parametrize(("name", "slow"), [("ucb1", slow_ucb1), ("ucb-v", slow_ucbv)])
def test_indices_of_rivals(name: str, slow: Any):
    """Over many tables of rewards; a cap leaves out arms, not their pulls."""
    rng = np.random.default_rng(3)
    chosen = set()
    for _ in range(60):
        table = [rng.normal(rng.random(), rng.random(), rng.integers(1, 30)).tolist() for _ in range(5)]
        t = sum(map(len, table))
        for cap, allowed in ((1.0, 5), (0.75, 3)):
            found = trained(name, table).choose(cap, (0.5, 0.5, 0.5)).arm
            assert found == int(np.argmax([slow(rewards, t) for rewards in table[:allowed]]))
            chosen.add(found)
    assert chosen == {0, 1, 2, 3, 4}


def test_epsilon_greedy_explores_as_often_as_it_says():
    bandit = trained("epsilon-greedy", REWARDS, epsilon=0.25)
    assert [bandit.choose(1.0, (0.24, v, 0.5)).arm for v in (0, 0.3, 0.6, LAST)] == [0, 1, 2, 3]
    assert {bandit.choose(1.0, (0.25, v, 0.5)).arm for v in (0, 0.3, 0.6, LAST)} == {0}  # of equal means the lowest


def test_thompson_draws_from_its_posterior():
    """How often each arm is the largest, against draws by numpy in one go."""
    table = ([0.5] * 8, [0.2] * 3, [0.9, -0.4], [0.4] * 20)
    bandit = trained("thompson", table)
    rng = np.random.default_rng(0)
    picks = [bandit.choose(1.0, draws).arm for draws in rng.random((4000, 3)).tolist()]
    means, deviations = zip(*((sum(r) / (len(r) + 1), (len(r) + 1) ** -0.5) for r in table), strict=True)
    largest = rng.normal(means, deviations, size=(100_000, 4)).argmax(axis=1)
    np.testing.assert_allclose(np.bincount(picks) / 4000, np.bincount(largest) / 100_000, atol=0.025)
    assert len({bandit.choose(1.0, (0.1, 0.2, omega)).arm for omega in np.linspace(0, LAST, 20).tolist()}) == 1
    assert len({bandit.choose(1.0, (0.1, v, 0.3)).arm for v in np.linspace(0, LAST, 20).tolist()}) > 1
    assert len({bandit.choose(1.0, (u, 0.2, 0.3)).arm for u in np.linspace(0, LAST, 20).tolist()}) > 1


def test_policies_that_do_not_learn():
    uniform, fixed = (BANDITS[name](BanditConfig(ratio=0.6, low=0.4), 20) for name in ("uniform", "fixed"))
    np.testing.assert_allclose([uniform.choose(z, (0, 0, 0.25)).ratio for z in (1, 0.8)], (0.55, 0.5), atol=1e-12)
    assert [fixed.choose(z, (0, 0, 0.25)).ratio for z in (1, 0.6, 0.1)] == [0.6, 0.6, 0.1]
    for bandit in (uniform, fixed):
        before = bandit.choose(1.0, (0.1, 0.2, 0.3))
        step(bandit, (0.1, 0.2, 0.3), 5.0, accuracy=0.4)
        assert bandit.choose(1.0, (0.1, 0.2, 0.3)) == before
        assert bandit.best == 0.4  # rewards can still be reported


# Configuration and errors.


def test_configuration_is_read():
    values = {"bandit.profile": "aligned", "bandit.num-arms": 3, "bandit.low": 0.25, "bandit.upload-mb-s": 1}
    assert read(BanditConfig, values, "bandit.") == BanditConfig("aligned", low=0.25, num_arms=3, upload_mb_s=1.0)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"profile": "both"}, "bandit.profile must be one of sweep, aligned, got 'both'"),
        ({"cap": "cut"}, "bandit.cap must be one of clip, relative"),
        ({"baseline": "last"}, "bandit.baseline must be one of first, zero"),
        ({"low": 0.0}, "bandit.low must be above 0"),
        ({"low": 0.8, "high": 0.7}, "below bandit.high=0.7, got 0.8"),
        ({"low": math.nan}, "bandit.low"),
        ({"high": 1.5}, "bandit.high must be at most 1"),
        ({"num_arms": 0}, "bandit.num-arms must be at least 1"),
        ({"min_width": -0.1}, "bandit.min-width"),
        ({"drop": 5.0}, "bandit.drop must be a fraction"),
        ({"ratio": 0.0}, r"bandit.ratio must be in \(0, 1\]"),
        ({"epsilon": 1.1}, "bandit.epsilon"),
        ({"reference_mflops": math.inf}, "bandit.reference-mflops"),
        ({"upload_mb_s": 0.0}, "bandit.upload-mb-s must be > 0"),
    ],
)
def test_impossible_knobs(knobs: Any, message: str):
    with pytest.raises(ValueError, match=message):
        BanditConfig(**knobs)


def test_a_pull_is_observed_once():
    bandit = pucbv()
    pull = bandit.choose(1.0, (0.3, 0.5, 0.5))
    bandit.observe(pull, 0.1, 0.5)
    before = bits(bandit)
    with pytest.raises(ValueError, match=r"not one of this bandit as it stands.*observe each pull once"):
        bandit.observe(pull, 0.1, 0.5)  # would go to the left child now
    assert bits(bandit) == before


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize(
    "pull", [Pull(0.75, 0.75, 9), Pull(0.75, 0.75, 4, True), Pull(0.6, 0.6, 0, True), Pull(0.55, 0.55, 0)]
)
def test_a_pull_of_another_state(name: str, pull: Pull):
    """No such arm, a point outside it, at its open end, and an arm without rewards that was not swept."""
    bandit = BANDITS[name](BanditConfig(), 20)
    with pytest.raises(ValueError, match="not one of this bandit"):
        bandit.observe(pull, 0.1, 0.5)
    assert bits(bandit) == bits(BANDITS[name](BanditConfig(), 20))


@pytest.mark.parametrize("cap", [0.0, -1.0, math.nan])
def test_impossible_caps(cap: float):
    with pytest.raises(ValueError, match="cap must be above 0"):
        pucbv().choose(cap, (0.5, 0.5, 0.5))


@pytest.mark.parametrize("draws", [(1.0, 0.5, 0.5), (0.5, -0.1, 0.5), (0.5, 0.5, math.nan)])
def test_impossible_draws(draws: Any):
    with pytest.raises(ValueError, match=r"draws must be three numbers in \[0, 1\)"):
        pucbv().choose(1.0, draws)


@pytest.mark.parametrize("horizon", [0.0, -1.0, math.inf, math.nan])
def test_impossible_horizons(horizon: float):
    with pytest.raises(ValueError, match="horizon must be a positive number"):
        pucbv(horizon=horizon)


def test_impossible_rewards():
    with pytest.raises(ValueError, match=r"fraction in \[0, 1\], got 60; divide percentages"):
        mnist_reward(60, 0.5, 1.0, 1.0)
    with pytest.raises(ValueError, match="cost of a round must be positive"):
        mnist_reward(0.6, 0.5, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"cost of a round must be positive.*capability=0"):
        mnist_reward(0.6, 0.5, 1.0, 0)
    with pytest.raises(ValueError, match="reference_mflops=0"):
        reward(0.6, 0.5, 1.0, 1.0, 1.0, 0, 1.0)


def test_arrays_that_do_not_fit():
    packed = pack_bandits(fleet_of("p-ucbv", BanditConfig()))
    with pytest.raises(ValueError, match=r"unknown bandit 'ucb2'; known: .*ucb1"):
        unpack_bandits("ucb2", BanditConfig(), 40, packed)
    for key in packed:
        for wrong in ({}, {key: packed[key][:-1]}):
            left = {other: array for other, array in packed.items() if other != key}
            with pytest.raises(ValueError, match="bandits in a checkpoint: 'bandit/"):
                unpack_bandits("p-ucbv", BanditConfig(), 40, {**left, **wrong})


def test_needs_no_torch():
    subprocess.run([sys.executable, "-c", "import sys, flexfed.rivals; sys.exit('torch' in sys.modules)"], check=True)
