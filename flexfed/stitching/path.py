"""The network so far: which blocks, in which order, and the bridges between them; run one block at a time.

A bridge fits the features so far to what the next block was trained to read: resized, then an affine map of the
channels. FedStitch's own bridges could not be read; see `flexfed.stitching.bridges`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from flexfed.stitching.blocks import Pool


@dataclass(frozen=True, eq=False)
class Bridge:
    """An affine map of channels; also a head, from pooled features to classes.

    Attributes:
        weight: float32, (channels out, channels in).
        bias: float32, (channels out,).
    """

    weight: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True, eq=False)
class Path:
    """A stitched network without its head.

    Attributes:
        ids: of its blocks.
        bridges: position in the path -> what stands in front of that block; absent = nothing, which is right only
            as long as the blocks are the first of one source.
    """

    ids: tuple[int, ...] = ()
    bridges: Mapping[int, Bridge] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its ids in one string, "0-1-6"."""
        return "-".join(map(str, self.ids))

    def native_blocks(self, pool: Pool) -> int:
        """How many of its first blocks are the first ones of their source, with no bridge between them."""
        own = pool.of(pool.blocks[self.ids[0]].source) if self.ids else ()
        same = 0
        while same < min(len(self.ids), len(own)) and self.ids[same] == own[same].id and same not in self.bridges:
            same += 1
        return same

    def needs_bridge(self, pool: Pool, block: int) -> bool:
        """Not at the start, and not where the path goes on as the one source it has been of."""
        if not self.ids:
            return False
        last, new = pool.blocks[self.ids[-1]], pool.blocks[block]
        goes_on = last.source == new.source and new.index == last.index + 1
        return not (goes_on and self.native_blocks(pool) == len(self.ids))

    def then(self, block: int, bridge: Bridge | None = None) -> Path:
        """The path with one block more."""
        bridges = dict(self.bridges) if bridge is None else {**self.bridges, len(self.ids): bridge}
        return Path((*self.ids, block), bridges)


def can_follow(pool: Pool, path: Path, block: int) -> bool:
    """Does the block fit at the end: a start block on an empty path, no map behind vectors?"""
    if not path.ids:
        return pool.blocks[block].is_start
    return shapes_fit(pool.blocks[path.ids[-1]].shape_out, pool.blocks[block].shape_in)


def shapes_fit(here: Sequence[int], native: Sequence[int]) -> bool:
    """Everything can be made of a map; of vectors, only vectors."""
    return len(here) >= len(native)


def pooled(features: Tensor) -> Tensor:
    """Mean over the positions of a map, (n, c); vectors as they are."""
    return features.mean((2, 3)) if features.ndim == 4 else features


def resize(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring maps to a size: adaptive average pooling where they shrink, bilinear where they grow.

    StitchNet resizes bilinearly with aligned corners both ways; pooling avoids aliasing. Each axis goes by itself.
    """
    smaller = (min(features.shape[2], size[0]), min(features.shape[3], size[1]))
    if smaller != tuple(features.shape[2:]):
        features = functional.adaptive_avg_pool2d(features, smaller)
    if smaller != tuple(size):
        features = functional.interpolate(features, size, mode="bilinear", align_corners=False)
    return features


def align(features: Tensor, native: Sequence[int]) -> Tensor:
    """Resize or pool features to what a block reads, all but the channels.

    Raises:
        ValueError: vectors in front of a block that reads maps.
    """
    if len(native) == 1:
        return pooled(features)
    if features.ndim != 4:
        raise ValueError(f"a block that reads maps {tuple(native)} cannot follow vectors {tuple(features.shape[1:])}")
    return resize(features, (native[1], native[2]))


def apply_bridge(bridge: Bridge, features: Tensor) -> Tensor:
    """Map the channels of maps or vectors that are aligned already."""
    place = features.device
    weight, bias = (
        torch.tensor(own, device=place) for own in (bridge.weight, bridge.bias)
    )  # copies: messages are read-only
    if features.ndim == 4:
        return functional.conv2d(features, weight[:, :, None, None], bias)
    return functional.linear(features, weight, bias)


class Walk:
    """Runs blocks and bridges on batches, one block in memory at a time.

    Attributes:
        macs: multiply-accumulates of all that ran.

    Args:
        pool: the blocks.
        group: images that go through a block together; 0 = the whole batch. Torch's kernels round otherwise with the
            number of images (1e-6 in features), so what must not depend on the batch goes in groups of one size.
    """

    def __init__(self, pool: Pool, group: int = 0):
        self.pool, self.macs = pool, 0
        self._group = group

    def block(self, block: int, inputs: Tensor) -> Tensor:
        """Load a block to where the inputs are, run it, drop it."""
        module = self.pool.module(block).to(inputs.device)
        self.macs += self.pool.blocks[block].macs * len(inputs)
        return self._in_groups(module, inputs)

    def bridge(self, bridge: Bridge, features: Tensor, block: int) -> Tensor:
        """From features to the input of a block."""
        native = self.pool.blocks[block].shape_in
        self.macs += bridge_macs(bridge.weight.shape[1], native) * len(features)
        return self._in_groups(lambda part: apply_bridge(bridge, align(part, native)), features)

    def along(self, path: Path, features: Tensor, done: int = 0) -> Tensor:
        """The rest of a path.

        Args:
            path: from its start.
            features: what its first `done` blocks gave.
            done: how many blocks need not run.

        Raises:
            ValueError: a bridge is missing, or the first block is none to start with.
        """
        _require_bridges(self.pool, path)
        for position in range(done, len(path.ids)):
            if position in path.bridges:
                features = self.bridge(path.bridges[position], features, path.ids[position])
            features = self.block(path.ids[position], features)
        return features

    def _in_groups(self, function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        if not self._group or len(inputs) <= self._group:
            return function(inputs)
        result: Tensor | None = None
        for first in range(0, len(inputs), self._group):
            part = function(inputs[first : first + self._group])
            if result is None:
                result = part.new_empty((len(inputs), *part.shape[1:]))
            result[first : first + len(part)] = part
        assert result is not None
        return result


def features(pool: Pool, path: Path, inputs: Tensor) -> Tensor:
    """What a path makes of a batch; the batch itself where it is empty."""
    with torch.inference_mode():
        return Walk(pool).along(path, inputs)


def bridge_macs(channels: int, native: Sequence[int]) -> int:
    """Multiply-accumulates of a bridge on one sample.

    Args:
        channels: that come in.
        native: shape of the next block's input.
    """
    return channels * int(np.prod(native))


def path_macs(pool: Pool, path: Path, done: int = 0) -> int:
    """What `Walk.along` multiplies for one sample."""
    total = 0
    for position in range(done, len(path.ids)):
        block = pool.blocks[path.ids[position]]
        total += block.macs
        if position in path.bridges:
            total += bridge_macs(path.bridges[position].weight.shape[1], block.shape_in)
    return total


def _require_bridges(pool: Pool, path: Path) -> None:
    if path.ids and not pool.blocks[path.ids[0]].is_start:
        raise ValueError(f"path {path.ids} begins with block {path.ids[0]}, which is not the first of its source")
    missing = [p for p in range(path.native_blocks(pool), len(path.ids)) if p not in path.bridges]
    if missing:
        raise ValueError(
            f"path {path.ids} has no bridge in front of block {path.ids[missing[0]]} (position {missing[0]}), "
            f"which does not go on as its source did; bridges stand at {sorted(path.bridges)}"
        )


def ids_of(name: str) -> tuple[int, ...]:
    """Undo `Path.name`.

    Raises:
        ValueError: something else.
    """
    pieces = name.split("-") if name else []
    if not all(piece.isdecimal() for piece in pieces):
        raise ValueError(f"a path is block ids like '0-1-6', got {name!r}")
    return tuple(map(int, pieces))


def packed(bridges: Mapping[int, Bridge]) -> dict[str, np.ndarray]:
    """Bridges, by position in the path, as arrays `bridge/<position>/weight` and `.../bias`, for messages and files."""
    names: dict[str, np.ndarray] = {}
    for position, bridge in bridges.items():
        names[f"bridge/{position}/weight"], names[f"bridge/{position}/bias"] = bridge.weight, bridge.bias
    return names


def unpacked(arrays: Mapping[str, np.ndarray]) -> dict[int, Bridge]:
    """Undo `packed`; other arrays may stand among them."""
    positions = sorted(int(name.split("/")[1]) for name in arrays if name.startswith("bridge/") and "weight" in name)
    return {p: Bridge(arrays[f"bridge/{p}/weight"], arrays[f"bridge/{p}/bias"]) for p in positions}
