"""How well each candidate block would go on from the network so far, as one client sees it: forward passes only.

FedStitch (Zhan, Wu, Tian, Zhao, Li, IWQoS 2024, https://arxiv.org/abs/2409.07202) scores blocks by CKA on local
data; the formula could not be read. Ours: compat^alpha * target^beta, where compat is the CKA of the features so far
with the block's native input (StitchNet's score) and target that of the block's native output with the labels.
"lookahead" puts in target's place what the block gives behind a bridge fitted on the spot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from flexfed.compute import numbers
from flexfed.stitching.bridges import solve_bridge, sums_of
from flexfed.stitching.energy import NO_PACE, Pacer
from flexfed.stitching.path import Bridge, Path, Walk, bridge_macs, can_follow, path_macs, pooled
from flexfed.stitching.phases import BYTES_PER_NUMBER, GROUP, Work, batches, bridge_view, num_batches
from flexfed.stitching.similarity import View, cka, compat_view, target_score

if TYPE_CHECKING:
    from flexfed.stitching.blocks import Pool

Mode = Literal["product", "lookahead"]


@dataclass(frozen=True)
class ScoreRule:
    """How a block's score is made; all of it ours.

    Attributes:
        alpha: exponent of compat.
        beta: exponent of target; 0 = StitchNet's rule, except that start blocks still go by target.
        mode: what target is: of the native output, or 'lookahead': of the output behind a bridge.
        rows_max: rows that such a bridge is fitted on; 0 = all.
        ridge: strength of its penalty.
    """

    alpha: float = 1.0
    beta: float = 1.0
    mode: Mode = "product"
    rows_max: int = 4096
    ridge: float = 1e-4

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"unknown score mode {self.mode!r}; known: {', '.join(get_args(Mode))}")
        for name in ("alpha", "beta", "rows_max", "ridge"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name} of a score rule must be >= 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Scores:
    """What a client found.

    Attributes:
        values: float64 (candidates,), in [0, 1].
        targets: block -> target, of those known before and those found now; they never change during a run.
        macs: multiply-accumulates of the forward passes.
        cached_bytes: rows and pooled outputs held until the end.
    """

    values: np.ndarray
    targets: Mapping[int, float]
    macs: int
    cached_bytes: int


@dataclass(frozen=True, eq=False)
class Scoring:
    """What has to be found out to score candidates, and what runs for that.

    Args:
        pool: the blocks.
        path: the network so far.
        candidates: ids.
        rule: what a score is.
        known: block -> target, found before.
    """

    pool: Pool
    path: Path
    candidates: tuple[int, ...]
    rule: ScoreRule
    known: Mapping[int, float] = field(default_factory=dict)

    @cached_property
    def bridged(self) -> tuple[int, ...]:
        """Candidates that are tried behind a bridge; the others give what they give in their source."""
        wanted = self.rule.mode == "lookahead" and self.rule.beta != 0
        return tuple(b for b in self.candidates if wanted and self.path.needs_bridge(self.pool, b))

    @cached_property
    def targets(self) -> tuple[int, ...]:
        """Candidates whose native output is compared with the labels now."""
        own = [b for b in self.candidates if self._uses_target(b) and b not in self.bridged]
        return tuple(b for b in own if b not in self.known)

    def _uses_target(self, block: int) -> bool:
        return self.rule.beta != 0 or self.pool.blocks[block].is_start

    @cached_property
    def compats(self) -> dict[int, View]:
        """Candidates whose native input is compared with the features so far, and how."""
        later = [b for b in self.candidates if self.rule.alpha != 0 and not self.pool.blocks[b].is_start]
        return {b: compat_view(self._here, self.pool.blocks[b].shape_in) for b in later}

    @cached_property
    def fits(self) -> dict[int, View]:
        """The rows that bridges are fitted on."""
        last = self.pool.blocks[self.path.ids[-1]] if self.bridged else None
        return {b: bridge_view(last, self.pool.blocks[b], self.rule.rows_max) for b in self.bridged if last}

    @property
    def _here(self) -> tuple[int, ...]:
        return self.pool.blocks[self.path.ids[-1]].shape_out

    @cached_property
    def views(self) -> tuple[View, ...]:
        """How the features so far are looked at."""
        return tuple(dict.fromkeys([*self.compats.values(), *self.fits.values()]))

    @cached_property
    def inputs(self) -> dict[int, tuple[View, ...]]:
        """Block -> how its native input is looked at."""
        found: dict[int, tuple[View, ...]] = {}
        for block, view in [*self.compats.items(), *self.fits.items()]:
            found[block] = tuple(dict.fromkeys([*found.get(block, ()), view]))
        return found

    @cached_property
    def native(self) -> int:
        """How many blocks of the path run anyway, with its own source."""
        return self.path.native_blocks(self.pool) if self.views else 0

    @cached_property
    def sweeps(self) -> dict[str, tuple[int, ...]]:
        """Source -> its blocks that run natively, from the first."""
        depth: dict[str, int] = {}
        if self.native:
            depth[self.pool.blocks[self.path.ids[0]].source] = self.native
        for block in self.candidates:
            record = self.pool.blocks[block]
            needed = record.index if block in self.targets else record.index - 1 if block in self.inputs else 0
            depth[record.source] = max(depth.get(record.source, 0), needed)
        return {source: tuple(b.id for b in self.pool.of(source)[:num]) for source, num in depth.items() if num}

    def work(self, num_images: int, batch_size: int) -> Work:
        """What `score_blocks` will do."""
        blocks = self.pool.blocks
        swept = [b for ids in self.sweeps.values() for b in ids]
        each = sum(blocks[b].macs for b in swept)
        each += path_macs(self.pool, self.path, self.native) if self.views else 0
        if self.bridged:
            each += path_macs(self.pool, self.path)
            each += sum(bridge_macs(self._here[0], blocks[b].shape_in) + blocks[b].macs for b in self.bridged)
        passes = bool(swept) + bool(self.bridged)
        runs = dict.fromkeys([*swept, *(self.path.ids if self.views else ()), *self.bridged])
        batches = passes * num_batches(num_images, batch_size)
        return Work(batches, passes * num_images, each * num_images, tuple(runs), self._kept_bytes(num_images))

    def _kept_bytes(self, num_images: int) -> int:
        blocks = self.pool.blocks
        numbers = sum(view.num_rows(num_images) * self._here[0] for view in self.views)
        for block, views in self.inputs.items():
            numbers += sum(view.num_rows(num_images) * blocks[block].shape_in[0] for view in views)
        outputs = sum(blocks[b].shape_out[0] for b in [*self.targets, *self.bridged])
        return BYTES_PER_NUMBER * (numbers + num_images * outputs)


class _Cache:
    """Rows of features, gathered batch by batch under a name."""

    def __init__(self) -> None:
        self._parts: dict[object, list[Tensor]] = {}

    def add(self, name: object, rows: Tensor) -> None:
        self._parts.setdefault(name, []).append(rows)

    def get(self, name: object) -> np.ndarray:
        return np.concatenate([numbers(part) for part in self._parts[name]])

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for parts in self._parts.values() for part in parts)


def score_blocks(
    pool: Pool,
    path: Path,
    candidates: Sequence[int],
    inputs: Tensor,
    labels: Tensor,
    num_classes: int,
    rule: ScoreRule,
    seed: int,
    targets: Mapping[int, float],
    pacer: Pacer = NO_PACE,
    batch_size: int = 32,
) -> Scores:
    """Score candidates on a client's scoring data; the same to the last bit for every batch size.

    Args:
        pool: the blocks.
        path: the network so far; empty in the first round, in which candidates are start blocks.
        candidates: ids of blocks that can follow the path.
        inputs: (n, ...).
        labels: (n,), below `num_classes`.
        num_classes: of the task.
        rule: what a score is.
        seed: draws the rows that are compared.
        targets: block -> target, from `Scores.targets` of rounds before.
        pacer: told of the work, and of each batch.
        batch_size: images at a time, rounded up to whole groups.

    Raises:
        ValueError: no images, or candidates that cannot follow the path.
    """
    _require_candidates(pool, path, candidates)
    if not len(inputs):
        raise ValueError("scoring needs at least one image; clients without data are not asked")
    scoring = Scoring(pool, path, tuple(candidates), rule, targets)
    work = scoring.work(len(inputs), batch_size)
    pacer.plan(work.num_batches, work.images, work.macs)
    walk, cache = Walk(pool, GROUP), _Cache()
    classes = numbers(labels)
    with torch.inference_mode():
        drawn = {view: view.draw(len(inputs), np.random.default_rng(seed)) for view in scoring.views}
        if scoring.sweeps:
            for first, batch in batches(inputs, pacer, batch_size):
                _native_pass(scoring, walk, cache, drawn, first, batch)
        bridges = _fit_bridges(scoring, cache)
        if bridges:
            for _, batch in batches(inputs, pacer, batch_size):
                _bridged_pass(scoring, walk, cache, bridges, batch)
    found = {b: target_score(cache.get(("output", b)), classes, num_classes) for b in scoring.targets}
    known = {**targets, **found}
    ahead = {b: target_score(cache.get(("bridged", b)), classes, num_classes) for b in scoring.bridged}
    compat = {b: cka(cache.get(view), cache.get((b, view))) for b, view in scoring.compats.items()}
    target = {**known, **ahead}
    values = [_score(rule, compat.get(b, 1.0), target.get(b, 1.0), pool.blocks[b].is_start) for b in candidates]
    return Scores(np.array(values, dtype=np.float64), known, walk.macs, cache.num_bytes)


def _require_candidates(pool: Pool, path: Path, candidates: Sequence[int]) -> None:
    if not candidates:
        raise ValueError("scoring needs at least one candidate, got none")
    wrong = [b for b in candidates if not can_follow(pool, path, b)]
    if wrong:
        raise ValueError(
            f"blocks {wrong} cannot follow path {path.ids}: a path begins with the first block of a source, and no "
            "block that reads maps comes behind vectors"
        )


def _native_pass(
    scoring: Scoring, walk: Walk, cache: _Cache, drawn: Mapping[View, np.ndarray], first: int, batch: Tensor
) -> None:
    """Run sources as they are, and the path from where it leaves its source; keep what will be compared."""
    pool, path = scoring.pool, scoring.path
    for source, ids in scoring.sweeps.items():
        features = batch
        for done, block in enumerate(b.id for b in pool.of(source)):
            for view in scoring.inputs.get(block, ()):
                cache.add((block, view), view.rows(features, drawn[view], first))
            if done == len(ids):
                break
            features = walk.block(block, features)
            if block in scoring.targets:
                cache.add(("output", block), pooled(features))
            if path.ids[done : done + 1] == (block,) and done + 1 == scoring.native:
                here = walk.along(path, features, scoring.native)
                for view in scoring.views:
                    cache.add(view, view.rows(here, drawn[view], first))


def _fit_bridges(scoring: Scoring, cache: _Cache) -> dict[int, Bridge]:
    """The bridges that this client's own data ask for."""
    pairs = {b: sums_of(cache.get(view), cache.get((b, view))) for b, view in scoring.fits.items()}
    return {b: solve_bridge(sums, scoring.rule.ridge) for b, sums in pairs.items()}


def _bridged_pass(scoring: Scoring, walk: Walk, cache: _Cache, bridges: Mapping[int, Bridge], batch: Tensor) -> None:
    here = walk.along(scoring.path, batch)
    for block, bridge in bridges.items():
        cache.add(("bridged", block), pooled(walk.block(block, walk.bridge(bridge, here, block))))


def _score(rule: ScoreRule, compat: float, target: float, start: bool) -> float:
    """Start blocks have nothing to be compatible with, so they go by target alone, even where beta is 0."""
    if start:
        return float(target ** (rule.beta or 1.0))
    return float(compat**rule.alpha * target**rule.beta)
