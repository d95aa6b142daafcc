"""Votes: the worked example, the invariants of the policy gradient, and clients that lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexfed.stitching.votes import (
    Aggregator,
    Ballot,
    Decision,
    VoteConfig,
    choices,
    client_features,
    reward_of,
    softmax,
    stepped,
    valid_scores,
    weighted_scores,
)

SCORES = np.array([[0.62, 0.55, 0.40], [0.30, 0.70, 0.52], [0.45, 0.48, 0.80]])
COUNTS = (500, 300, 200)
CANDIDATES = (10, 11, 12)
MODES = ("score", "vote")


class Fixed(np.random.Generator):
    """Explores with one number."""

    def __init__(self, value: float):
        super().__init__(np.random.PCG64(0))
        self.value = value

    def random(self, *args: object, **kwargs: object) -> float:  # type: ignore[override]
        return self.value


def ballots(scores: np.ndarray = SCORES, counts: tuple[int, ...] = COUNTS) -> dict[int, Ballot]:
    return {k: Ballot(row, n) for k, (row, n) in enumerate(zip(scores, counts, strict=True))}


def example(mode: str = "score", baseline: float = 0.05, **knobs: object) -> Aggregator:
    return Aggregator(VoteConfig(mode=mode, **knobs), baseline=baseline)  # type: ignore[arg-type]


def forced(aggregator: Aggregator, given: Mapping[int, Ballot], block: int) -> Decision:
    """The decision in which exploring drew this candidate."""
    num = len(next(iter(given.values())).scores)
    pi = aggregator.choose(tuple(range(num)), given).probabilities
    decision = aggregator.choose(tuple(range(num)), given, Fixed((pi[:block].sum() + pi[block] / 2) / pi.sum()))
    assert decision.block == block
    return decision


def random_case(seed: int, clients: int = 0, candidates: int = 0) -> tuple[dict[int, Ballot], np.random.Generator]:
    rng = np.random.default_rng(seed)
    clients = clients or int(rng.integers(1, 8))
    candidates = candidates or int(rng.integers(2, 7))
    partitions = rng.choice(50, clients, replace=False)
    return {int(k): Ballot(rng.random(candidates), int(rng.integers(1, 500))) for k in partitions}, rng


# The worked example.


def test_scores_of_the_worked_example():
    aggregator = example()
    decision = aggregator.choose(CANDIDATES, ballots())
    np.testing.assert_allclose(decision.weights, [0.5, 0.3, 0.2], atol=1e-12)
    assert aggregator.preferences == {k: math.log(n) for k, n in enumerate(COUNTS)}
    np.testing.assert_allclose(decision.totals, [0.49, 0.581, 0.516], atol=1e-12)
    np.testing.assert_allclose(decision.probabilities, [0.11294476, 0.69707904, 0.18997620], atol=1e-8)
    assert decision.block == 11
    np.testing.assert_allclose(decision.gradient, [-0.02036128, 0.34048316, -0.32012187], atol=1e-8)
    aggregator.learn(decision, 0.12)
    np.testing.assert_allclose(list(aggregator.preferences.values()), [6.21389545, 5.71569939, 5.28711310], atol=1e-8)
    np.testing.assert_allclose(aggregator.weigh(ballots()), [0.49913872, 0.30328956, 0.19757173], atol=1e-8)
    assert aggregator.baseline == pytest.approx(0.064)


def test_exploring_in_the_worked_example():
    aggregator = example()
    decision = forced(aggregator, ballots(), 2)
    np.testing.assert_allclose(decision.gradient, [-0.87036128, -0.34951684, 1.21987813], atol=1e-8)
    aggregator.learn(decision, 0.12)
    np.testing.assert_allclose(aggregator.weigh(ballots()), [0.48986028, 0.29932327, 0.21081645], atol=1e-8)


def test_a_bad_reward_in_the_worked_example():
    aggregator = example(baseline=0.064)
    aggregator.learn(aggregator.choose(CANDIDATES, ballots()), -0.03)
    np.testing.assert_allclose(aggregator.weigh(ballots()), [0.50110610, 0.29560749, 0.20328641], atol=1e-8)
    assert aggregator.baseline == pytest.approx(0.0452)


def test_votes_of_the_worked_example():
    aggregator = example("vote")
    decision = aggregator.choose(CANDIDATES, ballots())
    assert decision.block == 10
    np.testing.assert_allclose(decision.totals, [0.5, 0.3, 0.2], atol=1e-12)
    np.testing.assert_allclose(decision.probabilities, [0.5, 0.3, 0.2], atol=1e-12)
    np.testing.assert_allclose([decision.scored[b] for b in CANDIDATES], [0.49, 0.581, 0.516], atol=1e-12)
    np.testing.assert_allclose(decision.gradient, [0.5, -0.3, -0.2], atol=1e-12)
    aggregator.learn(decision, 0.12)
    np.testing.assert_allclose(aggregator.weigh(ballots()), [0.50664924, 0.29559590, 0.19775486], atol=1e-8)

    aggregator = example("vote")
    decision = forced(aggregator, ballots(), 2)
    np.testing.assert_allclose(decision.gradient, [-0.5, -0.3, 0.8], atol=1e-12)
    aggregator.learn(decision, 0.12)
    np.testing.assert_allclose(aggregator.weigh(ballots()), [0.49435566, 0.29869697, 0.20694737], atol=1e-8)


# Invariants.


@pytest.mark.parametrize("policy", ["preferences", "linear"])
@pytest.mark.parametrize("tau", [1.0, 0.7])
@given(seed=st.integers(0, 10**6))
def test_weights_sum_to_one_and_begin_as_shares(policy: str, tau: float, seed: int):
    given_, _ = random_case(seed)
    weights = example(policy=policy, tau=tau).weigh(given_)
    shares = np.array([given_[k].num_examples for k in sorted(given_)]) ** (1 / tau)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(weights, shares / shares.sum(), rtol=1e-9)


def test_frozen_weights():
    for weights, expected in (("uniform", [1 / 3] * 3), ("samples", [0.5, 0.3, 0.2])):
        aggregator = example(weights=weights, tau=0.3)
        for reward in (0.5, -0.2):
            decision = aggregator.choose(CANDIDATES, ballots())
            np.testing.assert_allclose(decision.weights, expected, atol=1e-15)
            aggregator.learn(decision, reward)


@pytest.mark.parametrize("mode", MODES)
@given(seed=st.integers(0, 10**6))
def test_gradients_sum_to_zero_and_no_advantage_changes_nothing(mode: str, seed: int):
    given_, rng = random_case(seed)
    aggregator = example(mode, baseline=float(rng.normal()))
    decision = aggregator.choose(tuple(range(len(next(iter(given_.values())).scores))), given_, rng)
    assert decision.gradient.sum() == pytest.approx(0, abs=1e-10)
    before = dict(aggregator.preferences)
    aggregator.learn(decision, aggregator.baseline)
    assert aggregator.preferences == before


@pytest.mark.parametrize("mode", MODES)
@given(seed=st.integers(0, 10**6), constant=st.floats(-3, 3))
def test_a_constant_added_to_all_preferences_changes_nothing(mode: str, seed: int, constant: float):
    given_, _ = random_case(seed, candidates=4)
    plain, moved = example(mode), example(mode)
    moved.preferences = {k: math.log(b.num_examples) + constant for k, b in given_.items()}
    a, b = (x.choose(range(4), given_) for x in (plain, moved))
    np.testing.assert_allclose(a.probabilities, b.probabilities, rtol=1e-8)
    np.testing.assert_allclose(a.gradient, b.gradient, atol=1e-8)
    for x, decision in ((plain, a), (moved, b)):
        x.learn(decision, 0.3)
    np.testing.assert_allclose(plain.weigh(given_), moved.weigh(given_), rtol=1e-7)


def test_absent_clients_keep_their_preferences():
    aggregator = example()
    aggregator.preferences = {1: 100.0, 7: -100.0}  # far outside of the clip
    here = {k: v for k, v in ballots().items() if k != 1}
    aggregator.learn(aggregator.choose(CANDIDATES, here), 5.0)
    assert (aggregator.preferences[1], aggregator.preferences[7]) == (100.0, -100.0)
    assert aggregator.preferences[0] != math.log(500)


@given(st.integers(0, 10**6))
def test_the_order_of_replies_does_not_matter(seed: int):
    given_, rng = random_case(seed, candidates=5)
    keys = list(given_)
    rng.shuffle(keys)
    a, b = (example().choose(range(5), x) for x in (given_, {k: given_[k] for k in keys}))
    assert a.partitions == tuple(sorted(given_))
    for name in ("totals", "probabilities", "weights", "gradient"):
        assert getattr(a, name).tobytes() == getattr(b, name).tobytes()


def test_permuted_clients_have_permuted_results():
    order = [2, 0, 1]
    plain = example().choose(CANDIDATES, ballots())
    moved = example().choose(CANDIDATES, ballots(SCORES[order], tuple(COUNTS[i] for i in order)))
    np.testing.assert_allclose(moved.weights, plain.weights[order], atol=1e-12)
    np.testing.assert_allclose(moved.gradient, plain.gradient[order], atol=1e-12)
    np.testing.assert_allclose(moved.totals, plain.totals, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@given(seed=st.integers(0, 10**6), tau=st.sampled_from([1.0, 0.6, 2.0]))
def test_the_gradient_is_that_of_the_log_probability(mode: str, seed: int, tau: float):
    given_, rng = random_case(seed, candidates=3)
    aggregator = example(mode, tau=tau, tau_b=0.2)
    decision = aggregator.choose(range(3), given_, rng)
    at, step = dict(aggregator.preferences), 1e-5

    def log_probability(partition: int, change: float) -> float:
        aggregator.preferences = {**at, partition: at[partition] + change}
        return math.log(aggregator.choose(range(3), given_).probabilities[decision.block])

    slow = [(log_probability(k, step) - log_probability(k, -step)) / (2 * step) for k in decision.partitions]
    np.testing.assert_allclose(decision.gradient, slow, atol=1e-6)


@given(st.integers(0, 10**6))
def test_the_gradient_of_the_linear_policy(seed: int):
    given_, _ = random_case(seed, candidates=3)
    aggregator = example(policy="linear", tau_b=0.2)
    decision = aggregator.choose(range(3), given_)
    assert decision.features is not None
    at, step = aggregator.theta, 1e-5

    def log_probability(change: np.ndarray) -> float:
        aggregator.theta = at + change
        return math.log(aggregator.choose(range(3), given_).probabilities[decision.block])

    slow = [(log_probability(step * e) - log_probability(-step * e)) / (2 * step) for e in np.eye(5)]
    np.testing.assert_allclose(decision.gradient @ decision.features, slow, atol=1e-6)
    aggregator.theta = at
    aggregator.learn(decision, 0.25)
    np.testing.assert_allclose(aggregator.theta, at + 0.5 * 0.2 * decision.gradient @ decision.features, atol=1e-12)


@pytest.mark.parametrize("reward", [0.3, -0.3])
@given(seed=st.integers(0, 10**6))
def test_clients_that_were_right_gain(reward: float, seed: int):
    given_, rng = random_case(seed, clients=4, candidates=4)
    aggregator = example(baseline=0.0, eta=1e-3, tau_b=0.1)
    decision = aggregator.choose(range(4), given_, rng)
    scores = np.stack([given_[k].scores for k in decision.partitions])
    gain = (scores[:, decision.block] - scores @ decision.probabilities) / 0.1
    before = dict(aggregator.preferences)
    aggregator.learn(decision, reward)
    for k, ahead in zip(decision.partitions, gain - decision.weights @ gain, strict=True):
        if abs(ahead) > 1e-6:
            assert np.sign(aggregator.preferences[k] - before[k]) == np.sign(reward * ahead)
    again = aggregator.choose(range(4), given_).probabilities[decision.block]
    if np.abs(decision.gradient).max() > 1e-6:
        assert np.sign(again - decision.probabilities[decision.block]) == np.sign(reward)


# Choosing.


def test_ties_go_to_the_smallest_id():
    same = np.random.default_rng(0).random((7, 1)) * np.ones((1, 9))
    decision = example().choose(tuple(range(3, 12)), ballots(same, (7, 11, 13, 17, 19, 23, 29)))
    assert decision.block == 3
    assert len(set(decision.totals.tolist())) == 1
    assert choices(same).tolist() == [0] * 7
    tied = ballots(np.array([[0.2, 0.9, 0.9], [0.9, 0.2, 0.9]]), (50, 50))
    assert example("vote").choose(CANDIDATES, tied).block == 10


def test_equal_columns_have_equal_scores_whatever_their_number():
    rng = np.random.default_rng(1)
    scores, weights = rng.random((13, 1)).repeat(37, 1), softmax(rng.random(13), 1.0)
    assert len(set(weighted_scores(weights, scores).tolist())) == 1


def test_exploring_draws_by_probability():
    aggregator, rng = example(tau_b=0.3), np.random.default_rng(0)
    drawn = [aggregator.choose(CANDIDATES, ballots(), rng).block for _ in range(4000)]
    expected = aggregator.choose(CANDIDATES, ballots()).probabilities
    np.testing.assert_allclose([drawn.count(b) / 4000 for b in CANDIDATES], expected, atol=0.03)


@pytest.mark.parametrize("mode", MODES)
def test_a_block_without_votes_is_never_drawn(mode: str):
    scores = np.array([[0.9, 0.1, 0.0], [0.8, 0.2, 0.1]])
    rng = np.random.default_rng(0)
    drawn = {example(mode, tau_b=0.01).choose(CANDIDATES, ballots(scores, (5, 5)), rng).block for _ in range(200)}
    assert drawn == {10}
    nobody_first = ballots(scores[:, ::-1], (5, 5))
    assert example("vote").choose(CANDIDATES, nobody_first, Fixed(0.0)).block == 12


@pytest.mark.parametrize("mode", MODES)
def test_one_candidate_teaches_nothing(mode: str):
    crowd = {k: Ballot(np.array([0.1 * k]), 7 * k + 3) for k in range(10)}
    for given_ in ({}, ballots(np.array([[0.3], [0.9], [0.0]])), crowd):
        aggregator = example(mode)
        decision = aggregator.choose((4,), given_)
        assert (decision.block, decision.probabilities.tolist()) == (4, [1.0])
        assert decision.gradient.tolist() == [0.0] * len(given_)
        assert set(decision.scored) == ({4} if given_ else set())
        before = dict(aggregator.preferences)
        aggregator.learn(decision, 0.9)
        assert aggregator.preferences == before
        assert aggregator.baseline == pytest.approx(0.05 + 0.2 * 0.85)


@pytest.mark.parametrize("policy", ["preferences", "linear"])
@pytest.mark.parametrize("mode", MODES)
def test_clients_of_one_class_are_harmless(mode: str, policy: str):
    scores = np.array([[0.62, 0.55, 0.40], [0.0, 0.0, 0.0]])
    aggregator = example(mode, policy=policy)
    decision = aggregator.choose(CANDIDATES, ballots(scores, (50, 500)))
    assert np.isfinite(decision.gradient).all()
    assert choices(scores)[1] == 0
    aggregator.learn(decision, 0.3)
    assert np.isfinite(aggregator.weigh(ballots(scores, (50, 500)))).all()
    alone = aggregator.choose(CANDIDATES, ballots(scores[1:], (5,)))
    assert np.isfinite(alone.gradient).all()
    assert alone.block == 10


def test_what_the_linear_policy_knows():
    heard = [Ballot(row, n, 0.5 * n / 500) for row, n in zip(SCORES, COUNTS, strict=True)]
    features = client_features(heard)
    np.testing.assert_allclose(
        features[:, :3], [[1, math.log(0.5), 0.5], [1, math.log(0.3), 0.3], [1, math.log(0.2), 0.2]]
    )

    def cosine(i: int, j: int) -> float:
        return float(SCORES[i] @ SCORES[j] / np.linalg.norm(SCORES[i]) / np.linalg.norm(SCORES[j]))

    agreement = [
        (cosine(0, 1) + cosine(0, 2)) / 2,
        (cosine(0, 1) + cosine(1, 2)) / 2,
        (cosine(0, 2) + cosine(1, 2)) / 2,
    ]
    np.testing.assert_allclose(features[:, 3], agreement)
    np.testing.assert_allclose(features[:, 4], [0.07, 0.18, 0.32], atol=1e-12)
    one = client_features([Ballot(np.array([0.4]), 9)])
    assert one.tolist() == [[1, 0, 0, 0, 0]]


def test_preferences_stay_near_their_mean():
    at = np.array([0.0, 0.9, 3.0, -2.0])  # the last two are further than 1 from 0
    plus, minus = stepped(at, np.full(4, 5.0), 0.0, 1.0), stepped(at, np.full(4, -5.0), 0.0, 1.0)
    assert plus.tolist() == [1.0, 1.0, 3.0, 1.0]
    assert minus.tolist() == [-1.0, -1.0, -1.0, -2.0]
    assert stepped(at, np.zeros(4), 0.0, 1.0).tolist() == at.tolist()
    assert stepped(at, np.array([0.1, 0.05, -0.5, 0.5]), 0.0, 1.0).tolist() == pytest.approx([0.1, 0.95, 2.5, -1.5])


def test_great_rewards_cannot_silence_a_client():
    aggregator = example(clip=0.5, eta=50.0)
    for _ in range(20):
        aggregator.learn(forced(aggregator, ballots(counts=(10, 10, 10)), 2), 5.0)
    values = np.array(list(aggregator.preferences.values()))
    assert values[2] > values[0]
    assert np.ptp(values) < 2


def test_rewards():
    assert reward_of(0.5, 0.3, VoteConfig()) == pytest.approx(0.2)
    favor = VoteConfig(reward="favor", accuracy_target=0.8)
    assert reward_of(0.8, 0.3, favor) == 0
    assert reward_of(0.3, 0.9, favor) == pytest.approx(64**-0.5 - 1)


def test_state_goes_on_where_it_was():
    for policy in ("preferences", "linear"):
        aggregator = example(policy=policy)
        for reward in (0.3, -0.1):
            aggregator.learn(aggregator.choose(CANDIDATES, ballots()), reward)
        other = Aggregator(aggregator.config)
        other.load_state_dict({name: array.copy() for name, array in aggregator.state_dict().items()})
        assert other.preferences == aggregator.preferences
        assert other.baseline == aggregator.baseline
        for x in (aggregator, other):
            x.learn(x.choose(CANDIDATES, ballots()), 0.2)
        for name, array in aggregator.state_dict().items():
            assert array.tobytes() == other.state_dict()[name].tobytes()


def test_a_second_client_keeps_the_preference_it_began_with():
    aggregator = example()
    aggregator.choose(CANDIDATES, ballots())
    aggregator.choose(CANDIDATES, ballots(counts=(5, 5, 5)))
    assert aggregator.preferences[0] == math.log(500)


# Bad input.


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        (np.zeros(2), r"have shape \(2,\), expected \(3,\)"),
        (np.zeros((1, 3)), r"have shape \(1, 3\)"),
        (np.array([0.1, np.nan, 0.2]), r"candidates \[1\] are not finite"),
        (np.array([np.inf, 0.1, -np.inf]), r"candidates \[0, 2\] are not finite"),
        (np.array([0.1, 0.2, 1.0000001]), r"candidates \[2\] are outside \[0, 1\]"),
        (np.array([-1e-9, 0.2, 1.0]), r"candidates \[0\] are outside \[0, 1\]"),
    ],
)
def test_bad_scores_are_told_and_refused(scores: np.ndarray, reason: str):
    with pytest.raises(ValueError, match="client 1: scores.*" + reason):
        example().choose(CANDIDATES, {0: Ballot(SCORES[0], 5), 1: Ballot(scores, 5)})


def test_good_scores_are_valid():
    assert valid_scores(np.array([0.0, 1.0, 0.5]), 3) is None


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: example().choose((), ballots()), "at least one"),
        (lambda: example().choose((3, 1, 2), ballots()), "rising"),
        (lambda: example().choose((1, 1, 2), ballots()), "rising"),
        (lambda: example().choose(CANDIDATES, {}), "3 candidates and no ballots"),
        (lambda: example().choose(CANDIDATES, ballots(counts=(5, 0, 5))), "client 1 has no samples"),
        (lambda: example().learn(example().choose(CANDIDATES, ballots()), math.nan), "must be finite"),
        (lambda: VoteConfig(mode="votes"), "mode of the votes must be one of score, vote, got 'votes'"),  # type: ignore[arg-type]
        (lambda: VoteConfig(weights="equal"), "one of rl, samples, uniform"),  # type: ignore[arg-type]
        (lambda: VoteConfig(tau_b=0), "tau-b of the votes must be > 0"),
        (lambda: VoteConfig(tau=math.inf), "tau of the votes must be > 0"),
        (lambda: VoteConfig(eta=-1), "eta of the votes must be >= 0"),
        (lambda: VoteConfig(baseline_rate=1.5), "baseline-rate"),
        (lambda: VoteConfig(accuracy_target=80), "a fraction"),
    ],
)
def test_errors(call: Callable[[], object], match: str):
    with pytest.raises(ValueError, match=match):
        call()


# Clients that lie.


@pytest.mark.parametrize("policy", ["preferences", "linear"])
@pytest.mark.parametrize("mode", MODES)
def test_clients_that_reverse_their_ranking_lose_weight(mode: str, policy: str):
    """40 exploratory episodes of 3 blocks; a block's reward is its quality. Mean of 10 seeds and its error."""
    liars, honest = (0, 1), (2, 3, 4, 5, 6)
    shares = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        aggregator = Aggregator(VoteConfig(mode=mode, policy=policy))  # type: ignore[arg-type]
        for _ in range(40 * 3):
            quality = rng.random(5) * 0.5
            told = {k: np.clip(quality + 0.05 * rng.standard_normal(5), 0, 1) for k in honest}
            told |= {k: np.clip(0.5 - quality + 0.05 * rng.standard_normal(5), 0, 1) for k in liars}
            decision = aggregator.choose(range(5), {k: Ballot(s, 100) for k, s in told.items()}, rng)
            aggregator.learn(decision, float(quality[decision.block]))
        shares.append(aggregator.weigh({k: Ballot(s, 100) for k, s in told.items()})[list(liars)].sum())
    assert np.mean(shares) + 3 * np.std(shares) / np.sqrt(10) < 2 / 7
