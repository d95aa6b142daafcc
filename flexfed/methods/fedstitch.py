"""FedStitch: clients score blocks of pre-trained networks, and the server stitches one for their task from them.

"Heterogeneity-Aware Coordination for Federated Learning via Stitching Pre-trained blocks" (Zhan, Wu, Tian, Zhao, Li,
IWQoS 2024, https://arxiv.org/abs/2409.07202). Pre-trained networks are cut into blocks; each round the clients score
candidates by CKA on their own data, without training; weights that reinforcement learning sets combine their choices;
the server keeps shrinking the pool; and each client sets its frequencies for the least energy within the server's
deadline.

Differences from the paper: no released code is known, and of the paper only the abstract and summaries by others could
be read. All that is more definite than what they say is a choice of ours, from StitchNet
(https://arxiv.org/abs/2301.01947), "Deep Model Reassembly" (NeurIPS 2022) and others; the files of `flexfed.stitching`
say which. No table of the paper is reproduced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from flexfed.stitching.blocks import Pool
from flexfed.stitching.energy import EnergyConfig
from flexfed.stitching.scoring import ScoreRule
from flexfed.stitching.search import SearchConfig
from flexfed.stitching.votes import VoteConfig
from flexfed.stitching.zoos import open_pool

NO_FINETUNING = "none"
CLOCKS = ("modelled", "measured")
ACTUATORS = ("record", "cpufreq")
HEADS = ("cohort", "all")


@dataclass(frozen=True)
class FedStitchConfig:
    """FedStitch's knobs; every default is our choice.

    Attributes:
        zoo: where blocks come from: a key of `flexfed.stitching.zoos.ZOOS`.
        sources: of zoo 'torchvision': names of its networks, one string; '' = the zoo's own.
        zoo_folder: where its weight files are; '' = the zoo's own place. Every device needs the same ones.
        path: '' = blocks are chosen; 'random' = drawn among the candidates; or a path fixed by the ids of its blocks,
            '0-1-6': baselines, for which nothing is scored.
        score: how well a block's output tells classes is that of its native output ('product'), or of what it makes
            of the features here ('lookahead').
        score_images: of a client's training samples, balanced over its classes, on which it scores candidates.
        alpha: exponent of the compatibility of a block's native input and the features here.
        beta: exponent of what the block tells of the classes; 0 = StitchNet's rule.
        native_policy: a block may follow the one that preceded it in its source ('allow') or not ('exclude').
        bridge_ridge: lambda_st, penalty of bridges, relative to the mean square of the features.
        bridge_rows: of one client, at most, that a bridge is fitted to; 0 = all.
        head_ridge: lambda_h, penalty of the head, for each sample.
        last_head: whose sums the finished network's head follows from: the round's 'cohort', as for those before, or
            'all' clients, so that no class is missing that only others hold.
        batch_size: of forward passes; a device whose memory is short takes fewer at a time.
        aggregate: combine the clients' 'score' vectors or their 'vote's.
        weights: of clients: 'rl', or as ablations by 'samples' or 'uniform'.
        policy: rl's weights follow 'preferences' of each client or are 'linear' in what is known of it.
        temperature: tau, of the weights.
        block_temperature: tau_b, of the choice among blocks.
        weight_step: eta.
        baseline_rate: of the mean reward.
        reward: 'difference' of accuracies, or 'favor' (FAVOR, INFOCOM 2020): 64^(accuracy - target) - 1.
        target_accuracy: of favor.
        episodes: constructions from the start; all but the last explore.
        max_blocks: T_max.
        reach: delta, how far beyond the depth reached a block may begin.
        search_space: shrink the pool (rules R3 and R4); what was used or passed is never offered again.
        keep_score: R3: blocks below this share of the best score leave.
        keep_sources: R4: share of the sources that stay.
        min_sources: R4: at least so many.
        energy: choose frequencies ('on') or take the fastest ('max').
        energy_window: energy counts while a device is 'busy', or up to the 'deadline'.
        idle_watts: while waiting for the deadline.
        deadline_share: q, of the cohort, whose fastest times set a phase's deadline.
        deadline_slack: added share.
        drop_late: refuse answers later than the deadline; their work is in no total.
        feedback: a, weight of the last batch in a device's correction.
        overhead_s: T_0, seconds of a phase that no frequency shortens.
        cycles_per_image: of the CPU, to prepare an image.
        slowdown: spread of the time that batches take on simulated devices; 0 = as modelled.
        clock: time batches by a model of the device ('modelled') or measure it ('measured': what is called modelled
            then follows the clock, and RAPL counters are read where they are; they tell of the whole machine).
        actuator: 'record' frequencies, or set them through Linux 'cpufreq' where its files are writable.
        finetune: 'none', or the strategy that trains the whole stitched network afterwards, in a run of its own. The
            page's two other kinds, training the head alone or with the bridges, are not here.
        finetune_rounds: of that run.
    """

    zoo: str = "shapes"
    sources: str = ""
    zoo_folder: str = ""
    path: str = ""
    score: str = "product"
    score_images: int = 64
    alpha: float = 1.0
    beta: float = 1.0
    native_policy: str = "allow"
    bridge_ridge: float = 1e-4
    bridge_rows: int = 4096
    head_ridge: float = 0.01
    last_head: str = "cohort"
    batch_size: int = 64
    aggregate: str = "score"
    weights: str = "rl"
    policy: str = "preferences"
    temperature: float = 1.0
    block_temperature: float = 0.05
    weight_step: float = 0.5
    baseline_rate: float = 0.2
    reward: str = "difference"
    target_accuracy: float = 0.9
    episodes: int = 1
    max_blocks: int = 8
    reach: float = 0.25
    search_space: bool = True
    keep_score: float = 0.5
    keep_sources: float = 0.75
    min_sources: int = 2
    energy: str = "on"
    energy_window: str = "busy"
    idle_watts: float = 0.5
    deadline_share: float = 1.0
    deadline_slack: float = 0.0
    drop_late: bool = False
    feedback: float = 0.5
    overhead_s: float = 0.0
    cycles_per_image: float = 1e4
    slowdown: float = 0.0
    clock: str = "modelled"
    actuator: str = "record"
    finetune: str = NO_FINETUNING
    finetune_rounds: int = 10

    def __post_init__(self) -> None:
        for name, known in (("clock", CLOCKS), ("actuator", ACTUATORS), ("last_head", HEADS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"fedstitch.{name.replace('_', '-')} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        for name, least in (("score_images", 1), ("batch_size", 1), ("episodes", 1), ("finetune_rounds", 1)):
            self._require(name, getattr(self, name) >= least, f"at least {least}")
        for name in ("bridge_ridge", "bridge_rows", "head_ridge", "deadline_slack", "slowdown"):
            self._require(name, 0 <= getattr(self, name) < math.inf, ">= 0")
        self._require("deadline_share", 0 < self.deadline_share <= 1, "in (0, 1]")
        for rules in (self.score_rule, self.votes, self.search, self.energy_config):
            assert rules  # made once here, so that wrong values are told before round 1

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"fedstitch.{name.replace('_', '-')} must be {rule}, got {getattr(self, name)!r}")

    @property
    def score_rule(self) -> ScoreRule:
        """How blocks are scored."""
        mode: Any = self.score
        return ScoreRule(self.alpha, self.beta, mode, self.bridge_rows, self.bridge_ridge)

    @property
    def votes(self) -> VoteConfig:
        """How scores become a choice."""
        return VoteConfig(
            mode=cast(Any, self.aggregate),
            weights=cast(Any, self.weights),
            policy=cast(Any, self.policy),
            tau=self.temperature,
            tau_b=self.block_temperature,
            eta=self.weight_step,
            baseline_rate=self.baseline_rate,
            reward=cast(Any, self.reward),
            accuracy_target=self.target_accuracy,
        )

    @property
    def search(self) -> SearchConfig:
        """How the pool shrinks."""
        return SearchConfig(
            delta=self.reach,
            t_max=self.max_blocks,
            r3=self.keep_score,
            r4=self.keep_sources,
            min_sources=self.min_sources,
            enabled=self.search_space,
            native_policy=cast(Any, self.native_policy),
        )

    @property
    def energy_config(self) -> EnergyConfig:
        """How frequencies are chosen."""
        return EnergyConfig(
            policy=cast(Any, self.energy),
            window=cast(Any, self.energy_window),
            idle_watts=self.idle_watts,
            gain=self.feedback,
            overhead_s=self.overhead_s,
            cycles_per_image=self.cycles_per_image,
        )


@lru_cache(maxsize=4)
def pool_of(config: FedStitchConfig, input_shape: tuple[int, ...]) -> Pool:
    """The blocks of a run's zoo, opened once in a process.

    Raises:
        ValueError: no such zoo, or weights that are missing.
    """
    return open_pool(config.zoo, input_shape, config.sources, config.zoo_folder)
