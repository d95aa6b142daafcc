"""A stitched network as one ordinary module: blocks, bridges and head; it can be built by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from flexfed.models.registry import STITCHED
from flexfed.stitching.blocks import NUM_BLOCKS, Block, Pool
from flexfed.stitching.path import Path, align, pooled
from flexfed.stitching.zoos import open_pool, plan_pool
from flexfed.units import Arrays


@dataclass(frozen=True)
class Origin:
    """Which blocks a network is stitched from; enough to build it again without the weights of the zoo.

    Attributes:
        zoo: its name.
        num_blocks: of each source.
        sources: all of the pool's, not only those used: blocks are numbered through them.
        ids: of the blocks, in order.
        input_shape: of one sample.
    """

    zoo: str
    num_blocks: int
    sources: tuple[str, ...]
    ids: tuple[int, ...]
    input_shape: tuple[int, ...]

    def plan(self) -> Pool:
        """The pool without weights.

        Raises:
            ValueError: as `plan_pool`.
        """
        return plan_pool(self.zoo, self.input_shape, ",".join(self.sources), self.num_blocks)

    def open(self, folder: str = "") -> Pool:
        """The pool with weights.

        Raises:
            ValueError: as `open_pool`.
        """
        return open_pool(self.zoo, self.input_shape, ",".join(self.sources), folder, self.num_blocks)


class BridgeLayer(nn.Module):
    """Fits features to what a block reads: resized or pooled, then a map of the channels with bias.

    Args:
        shape_in: of the features, without the batch.
        native: what the block reads.
    """

    def __init__(self, shape_in: tuple[int, ...], native: tuple[int, ...]) -> None:
        super().__init__()
        self.native = native
        vectors = len(native) == 1
        self.map = nn.Linear(shape_in[0], native[0]) if vectors else nn.Conv2d(shape_in[0], native[0], 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map features to (n, *native)."""
        return self.map(align(x, self.native))  # type: ignore[no-any-return]


class PooledFeatures(nn.Module):
    """Mean over the positions of a map; vectors as they are."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, c, h, w) or (n, c) to (n, c)."""
        return pooled(x)


class Stitched(nn.Module):
    """Blocks with bridges between them, pooling and a linear head: block1, bridge2, block2, ..., pool, head.

    Attributes:
        origin: which blocks they are.
    """

    def __init__(self, layers: Mapping[str, nn.Module], origin: Origin) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.origin = origin

    def forward(self, x: Tensor) -> Tensor:
        """Map data (n, *input_shape) to logits (n, classes)."""
        for layer in self.children():
            x = layer(x)
        return x


def build_stitched(pool: Pool, ids: Sequence[int], num_classes: int) -> Stitched:
    """A stitched network on torch's default device, drawn at random: layers as PyTorch initialises each.

    Args:
        pool: with weights or without; they play no part.
        ids: of the blocks, in order.
        num_classes: outputs of the head.

    Raises:
        ValueError: blocks that cannot follow each other; see `check_ids`.
    """
    model = stitched_on_meta(pool, ids, num_classes)
    device = torch.get_default_device()
    if device.type == "meta":
        return model
    model.to_empty(device=device)
    for module in model.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return model


def stitched_on_meta(pool: Pool, ids: Sequence[int], num_classes: int) -> Stitched:
    """The same without memory.

    Raises:
        ValueError: as `build_stitched`.
    """
    blocks = check_ids(pool, ids)
    bridged = bridge_positions(pool, ids)
    layers: dict[str, nn.Module] = {}
    with torch.device("meta"):
        for position, block in enumerate(blocks):
            if position in bridged:
                layers[f"bridge{position + 1}"] = BridgeLayer(blocks[position - 1].shape_out, block.shape_in)
            layers[f"block{position + 1}"] = pool.skeleton(block.id)
        layers["pool"] = PooledFeatures()
        layers["head"] = nn.Linear(blocks[-1].shape_out[0], num_classes)
    num_blocks = len(pool.of(pool.sources[0]))
    return Stitched(layers, Origin(pool.zoo, num_blocks, pool.sources, tuple(ids), pool.input_shape))


def bridge_positions(pool: Pool, ids: Sequence[int]) -> frozenset[int]:
    """Positions in a path that have a bridge in front."""
    return frozenset(n for n, block in enumerate(ids) if Path(tuple(ids[:n])).needs_bridge(pool, block))


def check_ids(pool: Pool, ids: Sequence[int]) -> list[Block]:
    """The blocks of a path.

    Raises:
        ValueError: none, one that does not exist, a first one that takes no data, one that does not lie deeper than
            the one before it, or one for maps behind one that gives vectors.
    """
    if not ids:
        raise ValueError("a stitched network needs at least one block, got none")
    blocks = [pool.blocks[pool.check(block)] for block in ids]
    if not blocks[0].is_start:
        starts = ", ".join(str(block.id) for block in pool.blocks if block.is_start)
        raise ValueError(f"block {ids[0]} takes no data; a stitched network of zoo {pool.zoo!r} begins with {starts}")
    for last, block in pairwise(blocks):
        if block.depth_in < last.depth_out - 1e-9:
            raise ValueError(
                f"block {block.id} begins at depth {block.depth_in:g} and cannot follow block {last.id}, "
                f"which ends at {last.depth_out:g}"
            )
        if len(last.shape_out) < len(block.shape_in):
            raise ValueError(f"block {block.id} reads maps and cannot follow block {last.id}, which gives vectors")
    return blocks


def stitched_arrays(pool: Pool, path: Path, head: np.ndarray) -> Arrays:
    """All tensors of the stitched network, by their names in it: of the pool, the path and the head.

    Args:
        pool: with weights; one block is loaded at a time.
        path: with the bridges that it needs.
        head: ridge head, (channels + 1, classes); the last row is the bias.

    Raises:
        ValueError: a bridge is missing or too many, or a shape does not fit.
    """
    model = stitched_on_meta(pool, path.ids, head.shape[1])
    if bridge_positions(pool, path.ids) != frozenset(path.bridges):
        raise ValueError(
            f"path {path.ids} needs bridges at positions {sorted(bridge_positions(pool, path.ids))}, "
            f"it has them at {sorted(path.bridges)}"
        )
    arrays = {"head.weight": head[:-1].T, "head.bias": head[-1]}
    for position, bridge in path.bridges.items():
        arrays |= {f"bridge{position + 1}.map.weight": bridge.weight, f"bridge{position + 1}.map.bias": bridge.bias}
    arrays |= block_arrays(pool, path.ids)
    return {name: _shaped(name, arrays[name], tensor) for name, tensor in model.state_dict().items()}


def block_arrays(pool: Pool, ids: Sequence[int]) -> Arrays:
    """The tensors of a stitched network's blocks, by their names in it; loaded one block at a time."""
    return {
        f"block{position}.{name}": tensor.numpy()
        for position, block in enumerate(ids, start=1)
        for name, tensor in pool.module(block).state_dict().items()
    }


def _shaped(name: str, array: np.ndarray, like: Tensor) -> np.ndarray:
    """An array in a tensor's shape and type; a matrix may stand for a 1x1 convolution."""
    shape = tuple(like.shape)
    if array.shape != shape and array.shape + (1,) * (len(shape) - array.ndim) != shape:
        raise ValueError(f"tensor {name!r} of the stitched network has shape {shape}, got {array.shape}")
    kind = torch.empty(0, dtype=like.dtype).numpy().dtype
    return np.array(array, dtype=kind, order="C").reshape(shape)


def fill(model: Stitched, arrays: Mapping[str, np.ndarray]) -> Stitched:
    """Put all tensors into a network, which may be on `meta`; in place."""
    model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, assign=True)
    return model


def stitched_model(name: str, num_classes: int, input_shape: tuple[int, ...]) -> Stitched:
    """The stitched network "stitched:<zoo>:<ids>", drawn at random.

    Args:
        name: such as "stitched:shapes:0-5-10"; a zoo's own choice of sources stands behind it in brackets:
            "stitched:torchvision(resnet18,vgg11):0-5".
        num_classes: outputs of the head.
        input_shape: of one sample; sources that cannot run it have no numbers.

    Raises:
        ValueError: the name is not of this form, no such zoo, source or block, or data that none can run.
    """
    zoo, sources, ids = parse_name(name)
    return build_stitched(plan_pool(zoo, input_shape, sources), ids, num_classes)


def parse_name(name: str) -> tuple[str, str, tuple[int, ...]]:
    """Zoo, sources and ids in the name of a stitched network.

    Raises:
        ValueError: it is not of the form "stitched:<zoo>:<ids joined by ->".
    """
    zoo, _, numbers = name.removeprefix(STITCHED).rpartition(":")
    zoo, opened, sources = zoo.partition("(")
    parts = numbers.split("-")
    if not zoo or not all(part.isascii() and part.isdigit() for part in parts) or bool(opened) != sources.endswith(")"):
        raise ValueError(
            f"model {name!r}: expected {STITCHED}<zoo>:<ids joined by ->, such as {STITCHED}shapes:0-5-10-11"
        )
    return zoo, sources.removesuffix(")"), tuple(int(part) for part in parts)


def stitched_name(pool: Pool, ids: Sequence[int]) -> str:
    """What `stitched_model` calls the network.

    Raises:
        ValueError: the sources are not cut into the usual number of blocks, which a name cannot tell.
    """
    if any(len(pool.of(source)) != NUM_BLOCKS for source in pool.sources):
        raise ValueError(f"only networks of sources cut into {NUM_BLOCKS} blocks have a name; save it as a file")
    zoo = (
        pool.zoo
        if pool.sources == plan_pool(pool.zoo, pool.input_shape).sources
        else f"{pool.zoo}({','.join(pool.sources)})"
    )
    return f"{STITCHED}{zoo}:{'-'.join(map(str, ids))}"


def load_zoo_blocks(model: Stitched, folder: str = "") -> None:
    """Put the zoo's weights into the blocks, in place; bridges and head keep what they have.

    Raises:
        ValueError: the weights are not at hand.
    """
    arrays = block_arrays(model.origin.open(folder), model.origin.ids)
    own = model.state_dict()
    model.load_state_dict(
        {name: torch.from_numpy(array) for name, array in arrays.items() if name in own}, strict=False
    )
