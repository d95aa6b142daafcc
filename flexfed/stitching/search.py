"""Which blocks may come next, and how the pool shrinks while stitching goes on.

FedStitch (Zhan, Wu, Tian, Zhao, Li, IWQoS 2024, https://arxiv.org/abs/2409.07202) keeps shrinking its search space;
the rules could not be read. Ours: depths rise along the path, as in "Deep Model Reassembly" (Yang et al., NeurIPS
2022); low scores go, as in StitchNet; and sources drop out by successive halving.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from flexfed.stitching.path import shapes_fit

if TYPE_CHECKING:
    from flexfed.stitching.blocks import Block

HAIR = 1e-9  # thirds do not add up to 1
SMOOTHING = 0.5  # of a source's value, against its value before

NativePolicy = Literal["allow", "exclude"]


@dataclass(frozen=True)
class SearchConfig:
    """The search space; all of it ours.

    Attributes:
        delta: how far behind the depth reached a block may begin.
        t_max: rounds at most; the last one takes blocks that end a source only.
        r3: blocks below this share of the round's best score are removed.
        r4: share of the sources that stays after each round.
        min_sources: at least so many.
        enabled: off, only what could never come again goes: the block chosen (R1), and blocks that begin in front of
            where it ends (R2).
        native_policy: 'exclude' never lets the native successor of the last block come next.
    """

    delta: float = 0.25
    t_max: int = 8
    r3: float = 0.5
    r4: float = 0.75
    min_sources: int = 2
    enabled: bool = True
    native_policy: NativePolicy = "allow"

    def __post_init__(self) -> None:
        self._require("delta", self.delta >= 0, ">= 0")
        self._require("t_max", self.t_max >= 1, "at least 1")
        self._require("r3", 0 <= self.r3 <= 1, "a share, in [0, 1]")
        self._require("r4", 0 < self.r4 <= 1, "a share, in (0, 1]")
        self._require("min_sources", self.min_sources >= 1, "at least 1")
        self._require("native_policy", self.native_policy in get_args(NativePolicy), "allow or exclude")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{name.replace('_', '-')} of the search must be {rule}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Shrunk:
    """What a round left of the pool.

    Attributes:
        alive: ids of the blocks that stay, rising.
        removed: rule ("R1" to "R4") -> ids that it removed, rising.
        values: source -> its smoothed best score, for the next round.
        guarded: R3 and R4 were undone: without what they removed, no way led to the end.
    """

    alive: tuple[int, ...]
    removed: Mapping[str, tuple[int, ...]]
    values: Mapping[str, float] = field(default_factory=dict)
    guarded: bool = False


def eligible(
    blocks: Sequence[Block], alive: Collection[int], last: int | None, server_round: int, config: SearchConfig
) -> tuple[int, ...]:
    """Ids of the blocks that are scored in a round, rising; none = stop.

    First the start blocks; later those that begin between the depth reached and `delta` behind it, or, where there
    are none, anywhere behind it; in round `t_max` those that end a source, wherever they begin behind it.

    Args:
        blocks: of the pool; blocks[i].id == i.
        alive: ids that are left.
        last: the last block of the path; None = the path is empty.
        server_round: of stitching, from 1.
        config: the rules.
    """
    left = [blocks[b] for b in sorted(alive) if server_round < config.t_max or blocks[b].is_end]
    if last is None:
        return tuple(block.id for block in left if block.is_start)
    delta = math.inf if server_round >= config.t_max else config.delta
    near = [b.id for b in left if _may_follow(blocks[last], b, delta, config)]
    return tuple(near or [b.id for b in left if _may_follow(blocks[last], b, math.inf, config)])


def _may_follow(last: Block, block: Block, delta: float, config: SearchConfig) -> bool:
    reached = last.depth_out
    native = block.source == last.source and block.index == last.index + 1
    return (
        reached - HAIR <= block.depth_in <= reached + delta + HAIR
        and shapes_fit(last.shape_out, block.shape_in)
        and not (native and config.native_policy == "exclude")
    )


def is_over(block: Block, server_round: int, config: SearchConfig) -> bool:
    """Is the network complete with this block, or the last round over?"""
    return block.is_end or server_round >= config.t_max


def shrink(
    blocks: Sequence[Block],
    alive: Collection[int],
    chosen: int,
    scored: Mapping[int, float],
    values: Mapping[str, float],
    config: SearchConfig,
) -> Shrunk:
    """Remove what is out of reach or without prospect.

    In this order: R1 the block chosen; R2 what begins in front of its end; R3 scored blocks below `r3` of the best;
    R4 all blocks of the sources with the lowest values, but `r4` of the sources stay, and the chosen block's own does
    on top of them. If no chain of blocks leads from the chosen one to the end then, R3 and R4 are undone.

    Args:
        blocks: of the pool; blocks[i].id == i.
        alive: ids that are left.
        chosen: the block.
        scored: block -> weighted score, of all that were scored this round; empty = nobody was asked (there was one
            candidate), and R3 and R4 rest.
        values: source -> smoothed best score so far.
        config: the rules.

    Raises:
        ValueError: the chosen block is not alive.
    """
    if chosen not in alive:
        raise ValueError(f"block {chosen} was chosen but is not in the pool any more: {sorted(alive)}")
    gone = {"R1": (chosen,), "R2": tuple(sorted(b for b in alive if b != chosen and _behind(blocks, b, chosen)))}
    values = smoothed(blocks, scored, values)
    reachable = _without(alive, gone)
    if not (config.enabled and scored):
        return Shrunk(reachable, gone | {"R3": (), "R4": ()}, values)
    best = max(scored.values())
    gone["R3"] = tuple(b for b in reachable if b in scored and scored[b] < config.r3 * best)
    left = _without(alive, gone)
    sources = kept_sources({blocks[b].source for b in left}, blocks[chosen].source, values, config)
    gone["R4"] = tuple(b for b in left if blocks[b].source not in sources)
    left = _without(alive, gone)
    if not reaches_end(blocks, left, chosen, config):
        return Shrunk(reachable, gone | {"R3": (), "R4": ()}, values, guarded=True)
    return Shrunk(left, gone, values)


def _behind(blocks: Sequence[Block], block: int, chosen: int) -> bool:
    return blocks[block].depth_in < blocks[chosen].depth_out - HAIR


def _without(alive: Iterable[int], gone: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    removed = {block for ids in gone.values() for block in ids}
    return tuple(sorted(block for block in alive if block not in removed))


def smoothed(blocks: Sequence[Block], scored: Mapping[int, float], values: Mapping[str, float]) -> dict[str, float]:
    """Each source's value: half its value before, half its best score now; its first as it is.

    Args:
        blocks: of the pool.
        scored: block -> weighted score.
        values: source -> value before; sources that have no scored block keep it.
    """
    best: dict[str, float] = {}
    for block, score in scored.items():
        source = blocks[block].source
        best[source] = max(score, best.get(source, score))
    now = {s: new if s not in values else (1 - SMOOTHING) * values[s] + SMOOTHING * new for s, new in best.items()}
    return {**values, **now}


def kept_sources(left: Collection[str], own: str, values: Mapping[str, float], config: SearchConfig) -> frozenset[str]:
    """The sources that stay: those of the highest values, by name where equal, and the chosen block's own on top.

    Args:
        left: sources that still have blocks.
        own: source of the chosen block.
        values: source -> value; a source that was never scored has 0.
        config: how many stay.
    """
    ranked = sorted({*left, own}, key=lambda source: (-values.get(source, 0.0), source))
    num = max(config.min_sources, math.ceil(config.r4 * len(ranked) - HAIR))
    return frozenset([*ranked[:num], own])


def reaches_end(blocks: Sequence[Block], alive: Collection[int], last: int, config: SearchConfig) -> bool:
    """Does a chain of blocks, each at most `delta` behind the one before, lead from `last` to the end of a source?"""
    reached = [last]
    seen = set(reached)
    while reached:
        block = blocks[reached.pop()]
        if block.is_end:
            return True
        after = [b for b in alive if b not in seen and _may_follow(block, blocks[b], config.delta, config)]
        reached += after
        seen.update(after)
    return False
