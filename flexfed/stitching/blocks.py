"""Pre-trained networks cut into blocks: what each block is, where its tensors are, and one block at a time in memory.

FedStitch (Zhan, Wu, Tian, Zhao, Li, IWQoS 2024, https://arxiv.org/abs/2409.07202) stitches blocks of pre-trained
networks; how they are cut is disclosed nowhere that we could read. Ours: whole residual, dense or inverted residual
units stay together, as in "Deep Model Reassembly" (Yang et al., NeurIPS 2022), and each source is cut into contiguous
blocks as equal in multiply-accumulates as possible. The classifier, the pooling before it and whatever follows belong
to no block.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flexfed.networks import Convention, build_on_meta
from flexfed.stitching.weightfiles import read_some

NUM_BLOCKS = 4
"""Of each source, as in "Deep Model Reassembly"."""

Unit = tuple[str, ...]
"""Module paths that stay together, run one after another."""


@dataclass(frozen=True)
class Source:
    """A pre-trained network as a row of units.

    Attributes:
        name: of the source.
        build: builds the network, on `meta` too.
        units: in the order in which data pass through them; no classifier, no global pooling.
        native_shape: of the images it was trained on; says where it is cut, whatever the data.
        cuts: numbers of units in front of which it is cut first; other cuts only where these are too few.
        last_relu: a ReLU that is no module of the network follows the last unit.
        file_name: what a tensor of the network is called in a weight file that does not call it by its own name.
        convention: how its images were normalised; None = as the zoo's.
        intake: in front of the first unit: fits data to what the source was trained on; None = nothing to do.
    """

    name: str
    build: Callable[[], nn.Module]
    units: tuple[Unit, ...]
    native_shape: tuple[int, ...]
    cuts: tuple[int, ...] = ()
    last_relu: bool = False
    file_name: Callable[[str], str] = str
    convention: Convention | None = None
    intake: Intake | None = None


@dataclass(frozen=True)
class Intake:
    """What is done to a batch of data in front of a source's first unit, in this order.

    Attributes:
        channels: of the data; one is repeated to three.
        size: (height, width) to resize to, bilinear; None = as they are.
        scale: each channel times this, where not empty; the three that go in are normalised as the zoo says.
        shift: and plus this.
    """

    channels: int
    size: tuple[int, int] | None = None
    scale: tuple[float, ...] = ()
    shift: tuple[float, ...] = ()


class IntakeLayer(nn.Module):
    """An `Intake` as a layer; its numbers are no tensors: they come with the zoo, not with the weights."""

    def __init__(self, intake: Intake) -> None:
        super().__init__()
        self.intake = intake

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, 1 or 3, h, w) to (n, 3, h', w')."""
        if self.intake.channels == 1:
            x = torch.cat([x, x, x], dim=1)
        if self.intake.size is not None:
            x = nn.functional.interpolate(x, self.intake.size, mode="bilinear", align_corners=False)
        if self.intake.scale:
            x = x * _per_channel(self.intake.scale, x) + _per_channel(self.intake.shift, x)
        return x


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)


@dataclass(frozen=True)
class Block:
    """A block's record.

    Attributes:
        id: its number in the pool, in the order of sources and of blocks within each; the smaller one wins a tie.
        source: name of the network it is from.
        index: of the block in its source, from 1.
        depth_in: share of the source's blocks in front of it.
        depth_out: the same, itself counted.
        shape_in: native input, without the batch: (channels, height, width) or (channels,).
        shape_out: of the output.
        param_bytes: of parameters and buffers.
        macs: multiply-accumulates of one sample.
    """

    id: int
    source: str
    index: int
    depth_in: float
    depth_out: float
    shape_in: tuple[int, ...]
    shape_out: tuple[int, ...]
    param_bytes: int
    macs: int

    @property
    def is_start(self) -> bool:
        """Does it take data?"""
        return self.index == 1

    @property
    def is_end(self) -> bool:
        """Is it the last of its source?"""
        return self.depth_out == 1


@dataclass(frozen=True)
class Piece:
    """How a block is built: consecutive units of a source.

    Attributes:
        source: where they are from.
        start: number of the first unit.
        stop: number of the unit behind the last.
    """

    source: Source
    start: int
    stop: int

    @property
    def paths(self) -> tuple[str, ...]:
        """Modules of the source, in order."""
        return tuple(path for unit in self.source.units[self.start : self.stop] for path in unit)

    def skeleton(self) -> nn.Sequential:
        """The block on `meta`, in eval mode; a module is called after its path in the source, '_' for every dot."""
        whole = _on_meta(self.source)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if self.start == 0 and self.source.intake is not None:
            layers["intake"] = IntakeLayer(self.source.intake)
        for path in self.paths:
            layers[child(path)] = copy.deepcopy(whole.get_submodule(path))
        if self.stop == len(self.source.units) and self.source.last_relu:
            layers["last_relu"] = nn.ReLU()
        return nn.Sequential(layers).eval()

    def names(self) -> dict[str, str]:
        """Tensor of the block -> its name in the source."""
        whole = _on_meta(self.source)
        return {
            f"{child(path)}.{name}": f"{path}.{name}"
            for path in self.paths
            for name in whole.get_submodule(path).state_dict()
        }


@dataclass(frozen=True, eq=False)
class Pool:
    """The blocks of all sources.

    Attributes:
        zoo: its name.
        blocks: in order of their ids.
        input_shape: of one sample of the data.
        pieces: how each block is built.
        files: source -> its weight file; empty where only the architecture is known.
    """

    zoo: str
    blocks: tuple[Block, ...]
    input_shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = field(repr=False)
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, in order."""
        return tuple(dict.fromkeys(block.source for block in self.blocks))

    def of(self, source: str) -> tuple[Block, ...]:
        """The blocks of one source, in order."""
        return tuple(block for block in self.blocks if block.source == source)

    def skeleton(self, block: int) -> nn.Sequential:
        """A block without weights, on `meta`.

        Raises:
            ValueError: there is no such block.
        """
        return self.pieces[self.check(block)].skeleton()

    def module(self, block: int) -> nn.Sequential:
        """Load one block, and no other, from its weight file: in eval mode and frozen. The caller drops it.

        Raises:
            ValueError: there is no such block, or no weights: a file is missing, damaged, or of another network.
        """
        module = self.skeleton(block)
        piece = self.pieces[block]
        if piece.source.name not in self.files:
            raise ValueError(f"the weights of zoo {self.zoo!r} are not at hand, only its architecture; use open_pool")
        names = piece.names()
        like = {names[name]: tensor for name, tensor in module.state_dict().items()}
        found = read_some(self.files[piece.source.name], like, piece.source.file_name)
        module.load_state_dict({name: found[names[name]] for name in names}, assign=True)
        return module.requires_grad_(False)

    def check(self, block: int) -> int:
        """The id itself.

        Raises:
            ValueError: no block has it.
        """
        if not 0 <= block < len(self.blocks):
            raise ValueError(f"no block {block} in zoo {self.zoo!r}; it has blocks 0..{len(self.blocks) - 1}")
        return block

    @cached_property
    def digest(self) -> str:
        """Hash of how the sources are cut and of all weights: equal where blocks are; read block by block."""
        digest = hashlib.sha256()
        for block, piece in zip(self.blocks, self.pieces, strict=True):
            digest.update(f"\0{block}{piece.paths}{piece.source.intake}".encode())
            digest.update(tensors_digest(self.module(block.id).state_dict()).encode())
        return digest.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"\0{name}\0{tensor.dtype}{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def child(path: str) -> str:
    """What a module of a source is called in its block."""
    return path.replace(".", "_")


def make_pool(
    zoo: str, sources: Iterable[Source], input_shape: tuple[int, ...], num_blocks: int = NUM_BLOCKS
) -> tuple[Pool, dict[str, str]]:
    """Cut sources and measure their blocks, on `meta`: no weights are needed.

    Args:
        zoo: its name.
        sources: in the order in which blocks are numbered.
        input_shape: of one sample of the data.
        num_blocks: of each source.

    Returns:
        The pool, and why sources were left out that cannot run data of this shape.

    Raises:
        ValueError: a source has fewer units than blocks.
    """
    blocks: list[Block] = []
    pieces: list[Piece] = []
    left_out: dict[str, str] = {}
    for source in sources:
        cut = [Piece(source, start, stop) for start, stop in cut_source(source, num_blocks)]
        try:
            blocks += list(_records(cut, len(blocks), input_shape))
        except RuntimeError as error:  # what a layer raises that is larger than its input
            left_out[source.name] = str(error).splitlines()[0]
        else:
            pieces += cut
    return Pool(zoo, tuple(blocks), input_shape, tuple(pieces)), left_out


def _records(pieces: Sequence[Piece], first: int, input_shape: tuple[int, ...]) -> Iterator[Block]:
    shape = input_shape
    for number, piece in enumerate(pieces):
        module = piece.skeleton()
        out, macs = measure_block(module, shape)
        num_bytes = sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
        depths = number / len(pieces), (number + 1) / len(pieces)
        yield Block(first + number, piece.source.name, number + 1, *depths, shape, out, num_bytes, macs)
        shape = out


def measure_block(module: nn.Module, shape_in: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Output shape and multiply-accumulates of one sample, found on `meta`.

    Convolutions and matrix products count; norms, activations, pooling and resizing do not, as is usual.

    Raises:
        RuntimeError: the input is too small.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = module(torch.zeros(1, *shape_in, device="meta"))
    return tuple(out.shape[1:]), int(counter.get_total_flops()) // 2


@lru_cache(maxsize=64)
def cut_source(source: Source, num_blocks: int) -> tuple[tuple[int, int], ...]:
    """First unit and unit behind the last of each block: the least sum of squared multiply-accumulates.

    Among equally good cuts, those nearest to the front. At the source's own image size, so that a block is the same
    block whatever the data.

    Raises:
        ValueError: fewer than one block, or more than the source has units.
    """
    num_units = len(source.units)
    if not 1 <= num_blocks <= num_units:
        raise ValueError(
            f"source {source.name!r} has {num_units} units that cannot be cut, so 1 to {num_units} blocks; "
            f"got {num_blocks}"
        )
    macs = unit_macs(source)
    first = [cut for cut in source.cuts if 0 < cut < num_units]
    if len(first) >= num_blocks - 1:  # choose among the favourite cuts; or take them all, and others
        return _balanced(macs, num_blocks, frozenset(first), frozenset())
    return _balanced(macs, num_blocks, frozenset(range(1, num_units)), frozenset(first))


def unit_macs(source: Source) -> list[int]:
    """Multiply-accumulates of every unit at the source's own image size."""
    shape = source.native_shape
    macs = []
    for number in range(len(source.units)):
        module = Piece(source, number, number + 1).skeleton()
        layers = [layer for layer in module if not isinstance(layer, IntakeLayer)]
        shape, count = measure_block(nn.Sequential(*layers), shape)
        macs.append(count)
    return macs


def _balanced(
    macs: Sequence[int], num_blocks: int, allowed: frozenset[int], needed: frozenset[int]
) -> tuple[tuple[int, int], ...]:
    """The contiguous partition with the least sum of squares: cuts are `allowed`, all `needed` ones among them."""
    # best[stop]: least cost of the blocks so far, which end in front of unit `stop`, and where they were cut
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, (0,))}
    for number in range(1, num_blocks + 1):
        stops = [len(macs)] if number == num_blocks else sorted(allowed)
        found: dict[int, tuple[int, tuple[int, ...]]] = {}
        for stop in stops:
            options = [
                (cost + sum(macs[start:stop]) ** 2, (*cuts, stop))
                for start, (cost, cuts) in best.items()
                if start < stop and not any(start < cut < stop for cut in needed)
            ]
            if options:
                found[stop] = min(options)
        best = found
    return tuple(pairwise(best[len(macs)][1]))


@lru_cache(maxsize=64)
def _on_meta(source: Source) -> nn.Module:
    """A source's network without memory; copied from, never changed."""
    return build_on_meta(source.build).eval()
