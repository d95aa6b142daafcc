"""The pool: records of all blocks of all sources, and one block at a time in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from flexfed.stitching.sources import Piece, Source, cut_source, measure_block
from flexfed.stitching.weightfiles import read_some

NUM_BLOCKS = 4
"""Of each source, as in "Deep Model Reassembly"."""


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
