"""A pre-trained network as a row of units, and consecutive units of it as a module of their own.

FedStitch (Zhan, Wu, Tian, Zhao, Li, IWQoS 2024, https://arxiv.org/abs/2409.07202) stitches blocks of pre-trained
networks; how they are cut is disclosed nowhere that we could read. Ours: whole residual, dense or inverted residual
units stay together, as in "Deep Model Reassembly" (Yang et al., NeurIPS 2022), and each source is cut into contiguous
blocks as equal in multiply-accumulates as possible. The classifier, the pooling before it and whatever follows belong
to no block.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flexfed.networks import Convention, build_on_meta

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


def child(path: str) -> str:
    """What a module of a source is called in its block."""
    return path.replace(".", "_")


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
