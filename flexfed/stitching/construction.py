"""A stitched network under construction: how far it is, what is left to choose from, and how to keep that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from flexfed.stitching.blocks import Pool
from flexfed.stitching.path import Path, ids_of, packed, shapes_fit, unpacked
from flexfed.stitching.search import HAIR, SearchConfig, Shrunk, eligible, is_over

RANDOM_PATH = "random"


@dataclass(frozen=True)
class Construction:
    """One episode, from the first block to the stop; nothing in it changes, each round makes a new one.

    Attributes:
        pool: the blocks.
        rules: of the search.
        episode: counted from 1.
        accuracy: of the path and its head on the clients' validation samples; before the first block that of a guess.
        alive: ids that may still be chosen.
        length: rounds of this episode that are done.
        path: the blocks so far, with their bridges.
        values: source -> its smoothed best score.
        head: (channels + 1, classes); None before the first block.
        fixed: the path, where nothing is to be chosen.
    """

    pool: Pool
    rules: SearchConfig
    episode: int
    accuracy: float
    alive: tuple[int, ...]
    length: int = 0
    path: Path = field(default_factory=Path)
    values: Mapping[str, float] = field(default_factory=dict)
    head: np.ndarray | None = None
    fixed: tuple[int, ...] = ()

    @classmethod
    def first(
        cls, pool: Pool, rules: SearchConfig, episode: int, num_classes: int, fixed: tuple[int, ...] = ()
    ) -> Construction:
        """Nothing chosen yet."""
        alive = tuple(block.id for block in pool.blocks)
        return cls(pool, rules, episode, 1 / num_classes, alive, fixed=fixed)

    @property
    def candidates(self) -> tuple[int, ...]:
        """Ids of the blocks that may come next; none = nothing fits, the path stays as it is."""
        if self.fixed:
            return self.fixed[self.length : self.length + 1]
        last = self.path.ids[-1] if self.path.ids else None
        return eligible(self.pool.blocks, self.alive, last, self.length + 1, self.rules)

    @property
    def is_over(self) -> bool:
        """A whole network, as many rounds as there may be, or nothing left that fits."""
        if not self.path.ids:
            return False
        if self.fixed:
            return self.length == len(self.fixed)
        return is_over(self.pool.blocks[self.path.ids[-1]], self.length, self.rules) or not self.candidates

    def grown(self, path: Path, head: np.ndarray, accuracy: float, left: Shrunk) -> Construction:
        """With one block more."""
        done, alive = self.length + 1, left.alive
        return replace(self, accuracy=accuracy, alive=alive, length=done, path=path, values=left.values, head=head)

    def to_state(self) -> dict[str, Any]:
        """For a checkpoint: arrays, and what JSON holds."""
        told = {
            "episode": self.episode,
            "length": self.length,
            "path": list(self.path.ids),
            "alive": list(self.alive),
            "values": dict(self.values),
            "accuracy": self.accuracy,
        }
        return {"construction": told, **packed(self.path.bridges), **({} if self.head is None else {"head": self.head})}

    @staticmethod
    def read(state: Mapping[str, Any]) -> dict[str, Any]:
        """Undo `to_state`: what differs from a construction of the same run."""
        told = state["construction"]
        return {
            **told,
            "alive": tuple(told["alive"]),
            "path": Path(tuple(told["path"]), unpacked(state)),
            "head": state.get("head"),
        }


def fixed_path(text: str, pool: Pool) -> tuple[int, ...]:
    """The blocks that a configuration fixes, "0-1-6"; empty where it fixes none.

    Raises:
        ValueError: no ids, blocks that are not there, no start, or depths that do not rise.
    """
    if text in ("", RANDOM_PATH):
        return ()
    blocks = [pool.blocks[pool.check(block)] for block in ids_of(text)]
    rise = all(a.depth_out <= b.depth_in + HAIR for a, b in pairwise(blocks))
    fit = all(shapes_fit(a.shape_out, b.shape_in) for a, b in pairwise(blocks))
    if not (blocks[0].is_start and rise and fit):
        names = ", ".join(f"{b.id} ({b.source}.{b.index}, depth {b.depth_in:.2f} to {b.depth_out:.2f})" for b in blocks)
        raise ValueError(f"a path begins with a start block, its depths rise, and no map follows vectors; got {names}")
    return tuple(block.id for block in blocks)
