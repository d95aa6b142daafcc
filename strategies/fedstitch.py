"""FedStitch's server: a round appends one block, in four phases (`flexfed.methods.fedstitch` says what is whose)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sized
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from flexfed.jobs import Scalar
from flexfed.questions import Answer
from flexfed.stitching.bridges import solve_bridge
from flexfed.stitching.construction import RANDOM_PATH, Construction
from flexfed.stitching.head import solve_head, valid_class_sums
from flexfed.stitching.path import Path
from flexfed.stitching.phases import (
    Work,
    bridge_view,
    plan_bridge,
    plan_count,
    plan_head,
)
from flexfed.stitching.scoring import Scoring
from flexfed.stitching.search import Shrunk, shrink
from flexfed.stitching.votes import Ballot, Decision, reward_of, valid_scores
from strategies.federated import RunOver
from strategies.phases import Phase
from strategies.record import RoundRecord
from strategies.stitch_clients import Total
from strategies.stitch_run import StitchRun

log = logging.getLogger("flwr")
T = TypeVar("T")


class FedStitch(StitchRun):
    """Clients score blocks of pre-trained networks and sum what bridges and a head follow from; nothing is trained.

    A round: the cohort scores the candidates (`train.score`); the server weighs the scores, chooses a block and
    shrinks the pool; a bridge is fitted from the cohort's sums (`train.stitch`) where the block does not simply go on
    as its source did, and a head (`train.head`); the cohort tests both on its validation samples
    (`evaluate.stitched`), and what the block brought teaches the server whose scores to trust.

    Ours: clients do not report how fast they could be, the server computes that from the device's profile, the work
    of the phase, and the correction that the client reported last; a deadline is for the work of one phase, without
    the link; a client's favourite block is read off its scores.
    """

    # Phases A and B: score, choose, stitch ------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Have the cohort score, choose a block, have it stitched; then ask for the sums of the head."""
        server_round += self._offset
        self._grid = grid
        if not self._begun:
            self.meet(grid)
            self.begin({}, grid)
        self.record = RoundRecord(server_round)
        rng = self.open_round(server_round)
        self.cohort = self._draw_cohort(rng)
        self.record.dispatched = dict.fromkeys(self.cohort, "stitched")
        self.asked += len(self.cohort)
        self.clients.missed = 0
        self._facts: dict[str, Any] = {"episode": self.now.episode}
        self._next: Path | None = None
        if not self.cohort:  # nobody has the memory in this round; somebody will in another
            return []
        if self._choose(grid, rng) and self._stitch(grid):
            self._phase = self._head_phase()
            self.asked += len(set(self._summing) - set(self.cohort))
            return self.clients.phases.messages(self._phase, self._summing)
        self._over = True
        return []

    def _able_now(self) -> list[int]:
        return sorted(partition for partition, device in self.devices.items() if self.can_stitch(device))

    def _draw_cohort(self, rng: np.random.Generator) -> list[int]:
        return sorted(rng.permutation(self._able_now())[: self.cohort_size(len(self.devices))].tolist())

    def _choose(self, grid: Grid, rng: np.random.Generator) -> bool:
        """Whether a block could be chosen."""
        candidates = self._offered(rng)
        ballots: dict[int, Ballot] = {}
        if len(candidates) > 1:
            self._carry_out(grid, lambda: self._score_phase(candidates, ballots), ballots)
        if not candidates or (len(candidates) > 1 and not self._enough(ballots)):
            log.warning("round %s: no scores; the network stays as it is", self.record.server_round)
            return False
        explores = self.now.episode < self.config.episodes
        self.decision: Decision = self.aggregator.choose(candidates, ballots, rng if explores else None)
        chosen, scored = self.decision.block, self.decision.scored
        blocks, alive = self.task.blocks, self.now.alive
        self.left: Shrunk = shrink(blocks, alive, chosen, scored, self.now.values, self.config.search)
        self._facts |= {"candidates": len(candidates), "pool": len(alive), **facts_of(self.decision, self.left)}
        return True

    def _offered(self, rng: np.random.Generator) -> tuple[int, ...]:
        """The candidates; one of them, drawn, where paths are random."""
        candidates = self.now.candidates
        return (int(rng.choice(candidates)),) if candidates and self.config.path == RANDOM_PATH else candidates

    def _score_phase(self, candidates: tuple[int, ...], ballots: dict[int, Ballot]) -> Phase:
        rule, size = self.config.score_rule, self.config.batch_size

        def scoring(partition: int) -> Scoring:
            known = dict.fromkeys(self.clients.known_to(partition), 0.0)
            return Scoring(self.task, self.now.path, candidates, rule, known)

        def work(partition: int) -> Work:
            return scoring(partition).work(min(self.config.score_images, self._examples(partition)), size)

        def receive(partition: int, answer: Answer) -> None:
            scores = np.array(answer.arrays["scores"])  # what is kept must not hold the message
            if wrong := valid_scores(scores, len(candidates)):
                raise ValueError(wrong)
            ballots[partition] = Ballot(scores, self._examples(partition))
            self.clients.scored(partition, scoring(partition).targets)

        asked: dict[str, Scalar] = {"candidates": list(candidates), "subset-seed": self.settings.seed}
        works = {p: work(p) for p in self.cohort}
        shapes = {"scores": (len(candidates),)}
        return self.clients.phase("train.score", self.now.path, receive, works, asked, shapes)

    def _stitch(self, grid: Grid) -> bool:
        """Whether the block that was chosen stands in the path."""
        path, block, size = self.now.path, self.decision.block, self.config.batch_size
        if not path.needs_bridge(self.task, block):
            self._next = path.then(block)
            return True
        view = bridge_view(self.task.blocks[path.ids[-1]], self.task.blocks[block], self.config.bridge_rows)
        total = Total(
            self._channels(path), self.task.blocks[block].shape_in[0], lambda p: view.num_rows(self._examples(p))
        )

        def work(partition: int) -> Work:
            return plan_bridge(self.task, path, block, self._examples(partition), size)

        def make() -> Phase:
            total.clear()
            works = {p: work(p) for p in self.cohort}
            return self.clients.phase("train.stitch", path, total.receive, works, {"block": block}, total.shapes)

        self._carry_out(grid, make, total)
        bridge = solved(lambda: solve_bridge(total.sums, self.config.bridge_ridge)) if self._enough(total) else None
        if bridge is None:
            log.warning("round %s: nobody stitched; the network stays as it is", self.record.server_round)
            return False
        self._next = path.then(block, bridge)
        return True

    # Phase C: the head ------------------------------------------------------------------------------------------

    def _head_phase(self) -> Phase:
        assert self._next is not None
        path, classes, size = self._next, self.server.info.num_classes, self.config.batch_size
        self._total = Total(self._channels(path), classes, self._examples, valid_class_sums)
        self._summing = self._able_now() if self.config.last_head == "all" and self._is_last(path) else self.cohort

        def work(partition: int) -> Work:
            return plan_head(self.task, path, classes, self._examples(partition), size)

        works = {p: work(p) for p in self._summing}
        return self.clients.phase("train.head", path, self._total.receive, works, {}, self._total.shapes)

    def _is_last(self, path: Path) -> bool:
        """Whether the network is whole with this path, and stays."""
        done = self.now.grown(path, np.zeros(0), 0.0, self.left)
        return done.is_over and done.episode == self.config.episodes

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the sums of the head as they arrive, and solve it; where nobody answers, ask once more."""
        if self._next is None:  # nothing was sent
            return None, None
        phases = self.clients.phases
        phases.take(self._phase, replies)
        phases.ask_again(self._grid, self._phase)
        if not self._enough(self._total):
            self._phase = self._head_phase()
            phases.carry_out(self._grid, self._phase, self._summing)
        head = (
            solved(lambda: solve_head(self._total.sums, self.config.head_ridge)) if self._enough(self._total) else None
        )
        if head is None:
            log.warning("round %s: no head; the network stays as it is", self.record.server_round)
            self._next, self._over = None, True
            return None, None
        self.accepted += len(self._phase.answered)
        self.record.trained["stitched"] = len(self._phase.answered)
        self._grown = self.now.grown(self._next, head, self.now.accuracy, self.left)
        return None, None

    # Phase D: the test ------------------------------------------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Test the network on the server's samples, then ask the cohort to."""
        self._correct = self._tested = 0
        after = self.now if self._next is None else self._grown
        if self._is_tested(server_round + self._offset, after):
            self.record.quality = self._measured(self._left_by(after))
        if self._next is None:
            return []
        path, head, classes = self._grown.path, self._grown.head, self.server.info.num_classes

        def work(partition: int) -> Work:
            return plan_count(self.task, path, classes, self._most_validation(partition), self.config.batch_size)

        works = {p: work(p) for p in self.cohort}
        self._phase = self.clients.phase("evaluate.stitched", path, self._count, works, {}, {}, head)
        return self.clients.phases.messages(self._phase, self.cohort)

    def _is_tested(self, server_round: int, after: Construction) -> bool:
        """Whether the server tests in this round: as often as asked for, and whatever is whole or the last."""
        due = server_round % self.settings.evaluate_every == 0 or server_round == self.settings.num_server_rounds
        return self._left_by(after).head is not None and (due or after.is_over or self._over)

    def _count(self, partition: int, answer: Answer) -> None:
        correct, num = int(answer.metrics.get("correct", -1)), int(answer.metrics.get("num-samples", 0))
        if not 0 <= correct <= num:
            raise ValueError(f"{correct} of {num} validation samples cannot be right")
        if num > (most := self._most_validation(partition)):
            raise ValueError(f"it tested {num} validation samples and has told of samples for at most {most}")
        self._correct += correct
        self._tested += num

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Learn from what the block brought, and close the round.

        Raises:
            RunOver: the last network is complete, or nothing can be added to it.
        """
        if self._next is not None:
            self.clients.phases.take(self._phase, replies)
            self.clients.phases.ask_again(self._grid, self._phase)
            self._learn()
        if self.now.is_over:
            self.whole = self.now
            if self.now.episode < self.config.episodes:
                self.now = self._fresh(self.now.episode + 1)
        self.close_round({"stitching": {**self._facts, "missed": self.clients.missed}})
        if self.is_over:
            raise RunOver
        return None

    def _learn(self) -> None:
        """From the reward of the block; nothing, told in the log, where no client has validation samples."""
        accuracy = self._correct / self._tested if self._tested else self.now.accuracy
        reward = reward_of(accuracy, self.now.accuracy, self.config.votes) if self._tested else 0.0
        if not self._tested:
            log.warning("round %s: no validation samples; nothing is learned of the weights", self.record.server_round)
        else:
            self.aggregator.learn(self.decision, reward)
            self.record.quality["validation-accuracy"] = accuracy
        self.now = replace(self._grown, accuracy=accuracy)
        ids = self.now.path.ids
        self._facts |= {"path": list(ids), "depth": self.task.blocks[ids[-1]].depth_out, "reward": reward}

    # What the phases share --------------------------------------------------------------------------------------

    def _enough(self, found: Sized) -> bool:
        """Whether as many have answered as a phase needs."""
        return len(found) >= self.settings.min_replies

    def _carry_out(self, grid: Grid, make: Callable[[], Phase], found: Sized) -> None:
        """A phase, and once more where too few gave a valid answer."""
        for _ in range(2):
            if not self._enough(found):
                self.clients.phases.carry_out(grid, make(), self.cohort)

    def _examples(self, partition: int) -> int:
        return self.devices[partition].num_examples

    def _most_validation(self, partition: int) -> int:
        """Validation samples of a client at most, from what it trains on."""
        return self.experiment.data.most_validation(self._examples(partition))

    def _channels(self, path: Path) -> int:
        return self.task.blocks[path.ids[-1]].shape_out[0]


def facts_of(decision: Decision, left: Shrunk) -> dict[str, Any]:
    """What a choice was, for the record of the round."""
    weights = zip(decision.partitions, decision.weights.tolist(), strict=True)
    return {
        "block": decision.block,
        "scores": {str(block): score for block, score in decision.scored.items()},
        "weights": {str(partition): weight for partition, weight in weights},
        **{f"removed-{rule.lower()}": len(ids) for rule, ids in left.removed.items()},
        "guarded": int(left.guarded),
    }


def solved(solve: Callable[[], T]) -> T | None:
    """The solution of a regression; None, told in the log, where valid sums have none that is a number."""
    try:
        with np.errstate(over="raise", invalid="raise"):
            return solve()
    except (ValueError, FloatingPointError) as error:  # numpy's LinAlgError is a ValueError
        log.warning("the clients' sums cannot be solved: %s", error)
        return None
