"""What a client does in each phase of a stitching round: forward passes only, batch by batch, one block at a time.

Every phase tells in advance what it will do (`Work`), and runs exactly that. Multiply-accumulates are those of forward
passes, as FedStitch's energy model bills them; CKA and the sums of a regression are not among them. Blocks run on
`GROUP` images at once whatever the batch, so that results do not depend on it, to the last bit.

Scoring stands in `flexfed.stitching.scoring`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexfed.compute import numbers
from flexfed.stitching.bridges import Sums, no_rows, sums_of
from flexfed.stitching.energy import NO_PACE, Pacer
from flexfed.stitching.head import class_sums, predict
from flexfed.stitching.path import Path, Walk, path_macs, pooled
from flexfed.stitching.similarity import View

if TYPE_CHECKING:
    from flexfed.stitching.blocks import Block, Pool

GROUP = 8
"""Images that go through a block together; a batch is a number of whole groups."""
BYTES_PER_NUMBER = 4


@dataclass(frozen=True)
class Work:
    """What a phase will do, known before it begins.

    Attributes:
        num_batches: mini-batches.
        images: that go through them; those that go twice count twice.
        macs: multiply-accumulates of all forward passes.
        blocks: ids of those that run, each once.
        kept_bytes: what is held from batch to batch until the end.
    """

    num_batches: int
    images: int
    macs: int
    blocks: tuple[int, ...]
    kept_bytes: int


class Summed(NamedTuple):
    """A client's sums, and the multiply-accumulates of the forward passes behind them."""

    sums: Sums
    macs: int


class Counted(NamedTuple):
    """How many of a client's images the network got right, of how many, and its multiply-accumulates."""

    correct: int
    num_images: int
    macs: int


def balanced_subset(labels: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of a subset with as equal numbers of each class as there are, rising, (min(num, n),).

    Args:
        labels: (n,).
        num: how many rows.
        rng: draws them, and which classes get one row more.
    """
    order = rng.permutation(len(labels))
    classes, own = np.unique(labels[order], return_inverse=True)
    turn = rng.permutation(len(classes))[own]
    nth = np.zeros(len(labels), dtype=np.int64)  # of its class
    for label in range(len(classes)):
        nth[own == label] = np.arange((own == label).sum())
    return np.asarray(np.sort(order[np.lexsort((turn, nth))][:num]))


def plan_bridge(pool: Pool, path: Path, block: int, num_images: int, batch_size: int) -> Work:
    """What `bridge_sums` will do."""
    shared, native = _together(pool, path, block)
    each = sum(pool.blocks[b].macs for b in native) + path_macs(pool, path, shared)
    blocks = tuple(dict.fromkeys([*native, *path.ids]))
    size_in, size_out = pool.blocks[path.ids[-1]].shape_out[0] + 1, pool.blocks[block].shape_in[0]
    return _work(num_images, batch_size, each, blocks, 8 * size_in * (size_in + size_out))


def bridge_sums(
    pool: Pool,
    path: Path,
    block: int,
    inputs: Tensor,
    rows_max: int,
    rng: np.random.Generator,
    pacer: Pacer = NO_PACE,
    batch_size: int = 32,
) -> Summed:
    """Sums for the bridge in front of a block: features of the path against what the block's own source feeds it.

    Args:
        pool: the blocks.
        path: the network so far, not empty.
        block: the next one.
        inputs: (n, ...), the fitting data.
        rows_max: rows at most, a row being a position of an image; 0 = all.
        rng: draws them.
        pacer: told of the work, and of each batch.
        batch_size: images at a time, rounded up to whole groups.

    Raises:
        ValueError: the block cannot follow the path.
    """
    view = bridge_view(pool.blocks[path.ids[-1]], pool.blocks[block], rows_max)
    drawn = view.draw(len(inputs), rng)
    shared, native = _together(pool, path, block)
    walk = Walk(pool, GROUP)
    sums = no_rows(pool.blocks[path.ids[-1]].shape_out[0], pool.blocks[block].shape_in[0])
    with torch.inference_mode():
        for first, batch in paced(inputs, plan_bridge(pool, path, block, len(inputs), batch_size), pacer, batch_size):
            common = batch
            for own in native[:shared]:
                common = walk.block(own, common)
            here = view.rows(walk.along(path, common, shared), drawn, first)
            for own in native[shared:]:
                common = walk.block(own, common)
            sums += sums_of(numbers(here), numbers(view.rows(common, drawn, first)))
    return Summed(sums, walk.macs)


def bridge_view(last: Block, block: Block, rows_max: int) -> View:
    """Which rows a bridge is fitted on: positions of the block's native input, or images if that is of vectors.

    Raises:
        ValueError: maps cannot be made of vectors.
    """
    if len(last.shape_out) < len(block.shape_in):
        raise ValueError(
            f"block {block.id} reads maps {block.shape_in}, which cannot be made of the vectors {last.shape_out} "
            f"of block {last.id}; choose among the blocks that `can_follow` allows"
        )
    return View((block.shape_in[1], block.shape_in[2]) if len(block.shape_in) == 3 else None, rows_max)


def _together(pool: Pool, path: Path, block: int) -> tuple[int, list[int]]:
    """How many blocks the path begins with that the block's source runs, too; and those in front of the block there."""
    native = [b.id for b in pool.of(pool.blocks[block].source)[: pool.blocks[block].index - 1]]
    shared = min(path.native_blocks(pool), len(native))
    return (shared if native[:shared] == list(path.ids[:shared]) else 0), native


def plan_head(pool: Pool, path: Path, num_classes: int, num_images: int, batch_size: int) -> Work:
    """What `head_sums` will do."""
    size = pool.blocks[path.ids[-1]].shape_out[0] + 1
    kept = 8 * size * (size + num_classes)
    return _work(num_images, batch_size, path_macs(pool, path), path.ids, kept)


def head_sums(
    pool: Pool,
    path: Path,
    inputs: Tensor,
    labels: Tensor,
    num_classes: int,
    pacer: Pacer = NO_PACE,
    batch_size: int = 32,
) -> Summed:
    """Sums for the head behind a path.

    Args:
        pool: the blocks.
        path: the network so far.
        inputs: (n, ...).
        labels: (n,), below `num_classes`.
        num_classes: of the task.
        pacer: told of the work, and of each batch.
        batch_size: images at a time, rounded up to whole groups.
    """
    walk = Walk(pool, GROUP)
    sums = no_rows(pool.blocks[path.ids[-1]].shape_out[0], num_classes)
    with torch.inference_mode():
        for first, batch in paced(
            inputs, plan_head(pool, path, num_classes, len(inputs), batch_size), pacer, batch_size
        ):
            features = numbers(pooled(walk.along(path, batch)))
            sums += class_sums(features, numbers(labels[first : first + len(batch)]), num_classes)
    return Summed(sums, walk.macs)


def plan_count(pool: Pool, path: Path, num_classes: int, num_images: int, batch_size: int) -> Work:
    """What `count_correct` will do."""
    each = path_macs(pool, path) + pool.blocks[path.ids[-1]].shape_out[0] * num_classes
    return _work(num_images, batch_size, each, path.ids, 0)


def count_correct(
    pool: Pool,
    path: Path,
    head: np.ndarray,
    inputs: Tensor,
    labels: Tensor,
    pacer: Pacer = NO_PACE,
    batch_size: int = 32,
) -> Counted:
    """Test a path and its head.

    Args:
        pool: the blocks.
        path: the network.
        head: (channels + 1, classes), from `flexfed.stitching.head.solve_head`.
        inputs: (n, ...); none are none right.
        labels: (n,).
        pacer: told of the work, and of each batch.
        batch_size: images at a time, rounded up to whole groups.
    """
    walk, correct = Walk(pool, GROUP), 0
    plan = plan_count(pool, path, head.shape[1], len(inputs), batch_size)
    with torch.inference_mode():
        for first, batch in paced(inputs, plan, pacer, batch_size):
            found = predict(head, pooled(walk.along(path, batch)))
            correct += int((found == labels[first : first + len(batch)]).sum())
    return Counted(correct, len(inputs), walk.macs + len(inputs) * (len(head) - 1) * head.shape[1])


def modelled_peak_bytes(pool: Pool, work: Work, batch_size: int) -> int:
    """Most bytes at any moment of a phase, as modelled: the largest block with its input and output, and what is kept.

    A model, no measurement: what a block holds inside itself is not in it, nor what waits while another source's
    blocks run, nor the float64 copies that CKA and sums are computed from.
    """
    images = whole_groups(batch_size)
    largest = max((_block_bytes(pool.blocks[b], images) for b in work.blocks), default=0)
    return largest + work.kept_bytes


def _block_bytes(block: Block, images: int) -> int:
    numbers = int(np.prod(block.shape_in)) + int(np.prod(block.shape_out))
    return block.param_bytes + BYTES_PER_NUMBER * images * numbers


def whole_groups(batch_size: int) -> int:
    """A batch size, rounded up.

    Raises:
        ValueError: less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"a batch needs at least 1 image, got batch_size={batch_size}")
    return -(-batch_size // GROUP) * GROUP


def num_batches(num_images: int, batch_size: int) -> int:
    """Of so many images."""
    return -(-num_images // whole_groups(batch_size))


def paced(inputs: Tensor, work: Work, pacer: Pacer, batch_size: int) -> Iterator[tuple[int, Tensor]]:
    """Plan a phase with the pacer; then the batches, each with the number of its first image."""
    pacer.plan(work.num_batches, work.images, work.macs)
    yield from batches(inputs, pacer, batch_size)


def batches(inputs: Tensor, pacer: Pacer, batch_size: int) -> Iterator[tuple[int, Tensor]]:
    """The batches, each with the number of its first image, each inside the pacer's context."""
    size = whole_groups(batch_size)
    for first in range(0, len(inputs), size):
        with pacer.batch():
            yield first, inputs[first : first + size]


def _work(num_images: int, batch_size: int, each: int, blocks: tuple[int, ...], kept_bytes: int) -> Work:
    return Work(
        num_batches(num_images, batch_size), num_images, each * num_images, tuple(dict.fromkeys(blocks)), kept_bytes
    )
