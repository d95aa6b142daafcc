"""What the server makes of the clients' scores: which block comes next, and whose word counts how much.

FedStitch (Zhan, Wu, Tian, Zhao, Li, IWQoS 2024, https://arxiv.org/abs/2409.07202) sets the clients' weights by
reinforcement learning; state, action, reward and learner could not be read. Ours: one preference a client, weights by
softmax, the block as the action, the gain in accuracy as the reward, and REINFORCE with a running baseline. That
policy gradients can set aggregation weights is known from PG-FFL (https://arxiv.org/abs/2205.13415).

Everything is keyed by partition id and computed in that order, so the order of replies does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, get_args, get_type_hints

import numpy as np

Arrays = dict[str, np.ndarray]
FEATURES = ("one", "log-share", "label-entropy", "agreement", "margin")
"""What the linear policy knows of a client."""


@dataclass(frozen=True)
class VoteConfig:
    """How scores become a choice, and how the weights learn; all of it ours.

    Attributes:
        mode: blocks collect weighted 'score's, or clients 'vote' for one each.
        weights: learned ('rl'), in proportion to 'samples', or 'uniform'.
        policy: what is learned: a preference for each client, or a 'linear' function of what is known of it.
        tau: temperature of the weights.
        tau_b: temperature of the blocks; mode 'score' only.
        eta: step of the preferences.
        baseline_rate: how fast the baseline follows the rewards.
        clip: preferences stay this near their mean over the clients known; policy 'preferences' only.
        reward: 'difference' of accuracies, or 'favor': base^(accuracy - target) - 1, as in FAVOR (INFOCOM 2020).
        favor_base: of that.
        accuracy_target: of that.
    """

    mode: Literal["score", "vote"] = "score"
    weights: Literal["rl", "samples", "uniform"] = "rl"
    policy: Literal["preferences", "linear"] = "preferences"
    tau: float = 1.0
    tau_b: float = 0.05
    eta: float = 0.5
    baseline_rate: float = 0.2
    clip: float = 5.0
    reward: Literal["difference", "favor"] = "difference"
    favor_base: float = 64.0
    accuracy_target: float = 0.9

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(VoteConfig).items():
            if known := get_args(hint):
                self._require(name, getattr(self, name) in known, f"one of {', '.join(known)}")
        for name in ("tau", "tau_b", "clip", "favor_base"):
            self._require(name, 0 < getattr(self, name) < math.inf, "> 0")
        self._require("eta", 0 <= self.eta < math.inf, ">= 0")
        self._require("baseline_rate", 0 <= self.baseline_rate <= 1, "in [0, 1]")
        self._require("accuracy_target", 0 <= self.accuracy_target <= 1, "a fraction, in [0, 1]")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{name.replace('_', '-')} of the votes must be {rule}, got {getattr(self, name)!r}")


@dataclass(frozen=True, eq=False)
class Ballot:
    """What a client says in a round.

    Attributes:
        scores: float64 (candidates,), in the order of the candidates.
        num_examples: of the client, at least 1.
        label_entropy: of its labels, as a share of the highest; 0 where it is not told, since it leaks.
    """

    scores: np.ndarray
    num_examples: int
    label_entropy: float = 0.0


@dataclass(frozen=True, eq=False)
class Decision:
    """What the server chose, and what it needs to learn from that.

    Attributes:
        block: id of the block chosen.
        candidates: ids, rising.
        totals: S, (candidates,), of the mode; empty where nobody was asked.
        scored: block -> its weighted score, in whichever mode: what the search space shrinks by.
        probabilities: pi, (candidates,).
        partitions: the clients heard, rising.
        weights: w, of each of them.
        gradient: rho, of each of them: d ln pi(block) / dH.
        features: (clients, 5), of the linear policy; None under preferences.
    """

    block: int
    candidates: tuple[int, ...]
    totals: np.ndarray
    scored: Mapping[int, float]
    probabilities: np.ndarray
    partitions: tuple[int, ...]
    weights: np.ndarray
    gradient: np.ndarray
    features: np.ndarray | None = None


def valid_scores(scores: np.ndarray, num_candidates: int) -> str | None:
    """Why a client's scores cannot be used; None = they can."""
    if scores.shape != (num_candidates,):
        return f"scores have shape {scores.shape}, expected ({num_candidates},): one for each candidate"
    if not np.isfinite(scores).all():
        return f"scores of candidates {np.flatnonzero(~np.isfinite(scores)).tolist()} are not finite"
    outside = np.flatnonzero((scores < 0) | (scores > 1))
    if len(outside):
        return f"scores of candidates {outside.tolist()} are outside [0, 1]: {scores[outside].tolist()}"
    return None


def softmax(values: np.ndarray, temperature: float) -> np.ndarray:
    """Softmax of values / temperature, in the shape of `values`, a vector; sums up to 1. The temperature is > 0."""
    powers = np.exp((values - values.max()) / temperature)
    return np.asarray(powers / powers.sum())


def choices(scores: np.ndarray) -> np.ndarray:
    """Each client's favourite, (clients,): the first of the highest, which is the smallest id.

    Args:
        scores: (clients, candidates).
    """
    return np.asarray(np.argmax(scores, axis=1))


def weighted_scores(weights: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Score of each candidate, (candidates,); equal columns give equal bits, so that ties are ties."""
    return np.asarray((weights[:, None] * scores).sum(axis=0))


def weighted_votes(weights: np.ndarray, chosen: np.ndarray, num_candidates: int) -> np.ndarray:
    """Weight of the clients that chose each candidate, (candidates,)."""
    return np.bincount(chosen, weights=weights, minlength=num_candidates)


def score_gradient(
    scores: np.ndarray, weights: np.ndarray, probabilities: np.ndarray, block: int, tau: float, tau_b: float
) -> np.ndarray:
    """Rho of mode 'score', (clients,): d ln pi(block) / dH = (w / tau) (g - sum w g), g = (s_b - sum pi s) / tau_b.

    Args:
        scores: (clients, candidates).
        weights: w, (clients,).
        probabilities: pi, (candidates,).
        block: position of the chosen one among the candidates.
        tau: temperature of the weights.
        tau_b: temperature of the blocks.
    """
    gain = (scores[:, block] - scores @ probabilities) / tau_b
    return np.asarray(weights / tau * (gain - weights @ gain))


def vote_gradient(chosen: np.ndarray, weights: np.ndarray, block: int, tau: float) -> np.ndarray:
    """Rho of mode 'vote', (clients,): d ln pi(block) / dH = (w / tau) (1[chose it] / pi(block) - 1).

    Raises:
        ValueError: nobody chose the block.
    """
    agree = chosen == block
    if not agree.any():
        raise ValueError(f"no client voted for candidate {block}, so its probability 0 has no gradient")
    return np.asarray(weights / tau * (agree / weights[agree].sum() - 1))


def reward_of(accuracy: float, previous: float, config: VoteConfig) -> float:
    """What a block brought.

    Args:
        accuracy: with it.
        previous: without it; 1 / classes before the first.
        config: which reward.
    """
    if config.reward == "favor":
        return float(config.favor_base ** (accuracy - config.accuracy_target) - 1)
    return accuracy - previous


def client_features(ballots: Sequence[Ballot]) -> np.ndarray:
    """What the linear policy knows of each client, (clients, 5), as `FEATURES` names it.

    Agreement is the mean cosine with the other clients' scores, margin the lead of the favourite; 0 where there is
    none to compare with.
    """
    scores = np.stack([ballot.scores for ballot in ballots])
    counts = np.array([ballot.num_examples for ballot in ballots], dtype=np.float64)
    lengths = np.linalg.norm(scores, axis=1, keepdims=True)
    units = scores / np.where(lengths > 0, lengths, 1)
    cosines = units @ units.T
    agreement = (cosines.sum(axis=1) - np.diag(cosines)) / max(1, len(ballots) - 1)
    best = np.sort(scores, axis=1)
    margin = best[:, -1] - best[:, -2] if scores.shape[1] > 1 else np.zeros(len(scores))
    entropy = np.array([ballot.label_entropy for ballot in ballots])
    log_shares = np.log(counts / counts.sum())
    return np.stack([np.ones(len(scores)), log_shares, entropy, agreement, margin], axis=1)


def stepped(preferences: np.ndarray, step: np.ndarray, mean: float, clip: float) -> np.ndarray:
    """Preferences after a step that takes none of them further than `clip` from the mean than it was.

    What lies outside already may stay, so that no step changes nothing.
    """
    low, high = np.minimum(preferences, mean - clip), np.maximum(preferences, mean + clip)
    return np.asarray(np.clip(preferences + step, low, high))


@dataclass
class Aggregator:
    """Weighs clients, chooses blocks, and learns from what they brought.

    Attributes:
        config: how.
        preferences: partition -> H; a client that is heard for the first time gets the log of its samples.
        theta: of the linear policy; at the start, the log of a client's share, which gives the same weights.
        baseline: running mean of the rewards.
    """

    config: VoteConfig
    preferences: dict[int, float] = field(default_factory=dict)
    theta: np.ndarray = field(default_factory=lambda: np.array([0.0, 1, 0, 0, 0]))
    baseline: float = 0.0

    def weigh(self, ballots: Mapping[int, Ballot]) -> np.ndarray:
        """The clients' weights by rising partition, (clients,); they sum to 1."""
        heard = [ballots[partition] for partition in sorted(ballots)]
        counts = np.array([ballot.num_examples for ballot in heard], dtype=np.float64)
        if self.config.weights == "uniform":
            return np.full(len(heard), 1 / len(heard))
        if self.config.weights == "samples":
            return np.asarray(counts / counts.sum())
        if self.config.policy == "linear":
            return softmax(client_features(heard) @ self.theta, self.config.tau)
        preferences = [self._preference(partition, ballots[partition]) for partition in sorted(ballots)]
        return softmax(np.array(preferences), self.config.tau)

    def _preference(self, partition: int, ballot: Ballot) -> float:
        return self.preferences.get(partition, math.log(ballot.num_examples))

    def choose(
        self, candidates: Sequence[int], ballots: Mapping[int, Ballot], explore: np.random.Generator | None = None
    ) -> Decision:
        """The next block.

        Args:
            candidates: ids, rising.
            ballots: partition -> what it says, valid; may be empty where there is one candidate.
            explore: draws the block by its probability; None = the best, and of equal ones the smallest id.

        Raises:
            ValueError: no candidates, ids that do not rise, no ballots, clients without samples, or scores that
                `valid_scores` would refuse.
        """
        _require_ballots(candidates, ballots)
        if not ballots:
            return Decision(candidates[0], tuple(candidates), np.zeros(0), {}, np.ones(1), (), np.zeros(0), np.zeros(0))
        partitions = tuple(sorted(ballots))
        for partition in partitions:
            self.preferences.setdefault(partition, self._preference(partition, ballots[partition]))
        scores = np.stack([ballots[partition].scores for partition in partitions]).astype(np.float64)
        weights = self.weigh(ballots)
        scored = weighted_scores(weights, scores)
        by_vote = self.config.mode == "vote"
        totals = weighted_votes(weights, choices(scores), len(candidates)) if by_vote else scored
        probabilities = totals / totals.sum() if by_vote else softmax(totals, self.config.tau_b)
        block = int(np.argmax(totals)) if explore is None else _draw(probabilities, explore)
        return Decision(
            block=candidates[block],
            candidates=tuple(candidates),
            totals=totals,
            scored=dict(zip(candidates, scored.tolist(), strict=True)),
            probabilities=probabilities,
            partitions=partitions,
            weights=weights,
            gradient=self._gradient(scores, weights, probabilities, block),
            features=client_features([ballots[p] for p in partitions]) if self.config.policy == "linear" else None,
        )

    def _gradient(self, scores: np.ndarray, weights: np.ndarray, probabilities: np.ndarray, block: int) -> np.ndarray:
        if len(probabilities) == 1:
            return np.zeros(len(weights))
        if self.config.mode == "vote":
            return vote_gradient(choices(scores), weights, block, self.config.tau)
        return score_gradient(scores, weights, probabilities, block, self.config.tau, self.config.tau_b)

    def learn(self, decision: Decision, reward: float) -> None:
        """Give clients whose word led to a better reward than usual more weight, others less; frozen weights stay.

        Raises:
            ValueError: a reward that is not finite.
        """
        if not math.isfinite(reward):
            raise ValueError(f"a reward must be finite, got {reward}")
        advantage = reward - self.baseline
        step = self.config.eta * advantage * decision.gradient
        if self.config.weights == "rl" and decision.partitions:
            if decision.features is not None:
                self.theta = self.theta + step @ decision.features
            else:
                self._step(decision.partitions, step)
        self.baseline += self.config.baseline_rate * advantage

    def _step(self, partitions: Sequence[int], step: np.ndarray) -> None:
        mean = float(np.mean(list(self.preferences.values())))
        before = np.array([self.preferences[partition] for partition in partitions])
        after = stepped(before, step, mean, self.config.clip)
        self.preferences.update(zip(partitions, after.tolist(), strict=True))

    def state_dict(self) -> Arrays:
        """What was learned, as a few arrays."""
        known = sorted(self.preferences)
        return {
            "votes/partition": np.array(known, dtype=np.int64),
            "votes/preference": np.array([self.preferences[partition] for partition in known], dtype=np.float64),
            "votes/theta": self.theta,
            "votes/baseline": np.array([self.baseline]),
        }

    def load_state_dict(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Put it back."""
        known = zip(arrays["votes/partition"].tolist(), arrays["votes/preference"].tolist(), strict=True)
        self.preferences = dict(known)
        self.theta = arrays["votes/theta"].copy()
        self.baseline = float(arrays["votes/baseline"][0])


def _draw(probabilities: np.ndarray, rng: np.random.Generator) -> int:
    """A position, drawn by its probability."""
    sums = np.cumsum(probabilities)
    return int(np.searchsorted(sums, rng.random() * sums[-1], side="right"))


def _require_ballots(candidates: Sequence[int], ballots: Mapping[int, Ballot]) -> None:
    if not candidates or any(a >= b for a, b in pairwise(candidates)):
        raise ValueError(f"candidates must be block ids, rising, at least one, got {list(candidates)}")
    if not ballots and len(candidates) > 1:
        raise ValueError(f"{len(candidates)} candidates and no ballots: ask the clients again, or stop")
    for partition in sorted(ballots):
        if ballots[partition].num_examples < 1:
            raise ValueError(f"client {partition} has no samples and so no say; ask none that has none")
        if wrong := valid_scores(ballots[partition].scores, len(candidates)):
            raise ValueError(f"client {partition}: {wrong}; leave it out of the round")
