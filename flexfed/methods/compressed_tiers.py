"""Compressors of the global model, what each costs, and how far each leads away from it.

A *tier* is a width ratio, or a share of single weights pruned, and a codec; a *ladder* is tiers, the highest fidelity
first. See `flexfed.methods.compressed` for whose method this is, and what of it is not its authors'.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from flexfed.codecs import CODECS, PLAIN, Pieces, pieces, through
from flexfed.cost import BYTES_PER_NUMBER
from flexfed.jobs import Part
from flexfed.select import prefix_ratio
from flexfed.submodel import Submodel, extract, narrow_shapes, positions, take
from flexfed.units import Arrays, Layout

Scope = Literal["layer", "global"]

_NAME = re.compile(r"(?:full|(?:w(?P<width>\d+(?:\.\d+)?)|p(?P<prune>\d+(?:\.\d+)?))?(?:q(?P<bits>\d+))?)")
_FORMS = "full, w50 (width), p50 (pruned), q8 or q4 (bits), or w50q8, p50q8, ... of them, in percent"


@dataclass(frozen=True)
class Tier:
    """One compressor.

    Attributes:
        name: in the ladder.
        ratio: kept fraction of every layer's units, in (0, 1].
        prune: share of single weights pruned, in [0, 1].
        codec: "" = numbers are float32.
    """

    name: str
    ratio: float = 1.0
    prune: float = 0.0
    codec: str = ""

    @property
    def bits(self) -> int:
        """Of a weight; 32 = float32."""
        return CODECS[self.codec or PLAIN].bits


def parse_tier(name: str) -> Tier:
    """A tier from its name: "full", "w50", "p50", "q8", "p50q8", ...; the numbers are percent, and bits.

    Raises:
        ValueError: not of that form, a width that is none, more than all pruned, or bits that no codec has.
    """
    found = _NAME.fullmatch(name)
    if found is None or not name:
        raise ValueError(f"expected tiers like {_FORMS}; got {name!r}")
    width, prune = (float(found[key] or default) / 100 for key, default in (("width", 100), ("prune", 0)))
    codec = f"int{found['bits']}" if found["bits"] else ""
    if not 0 < width <= 1:
        raise ValueError(f"the width of a tier must be above 0 and at most 100 percent, got {name!r}")
    if prune > 1:
        raise ValueError(f"a tier can prune at most 100 percent, got {name!r}")
    if codec and codec not in CODECS:
        known = ", ".join(f"q{c.bits}" for c in CODECS.values() if c.bits < 32)
        raise ValueError(f"a tier can be quantised as {known}, got {name!r}")
    return Tier(name, width, prune, codec)


def parse_ladder(names: tuple[str, ...]) -> dict[str, Tier]:
    """Tiers by name, in the order given.

    Raises:
        ValueError: no tier, one twice, or one that is none.
    """
    twice = [name for name, count in Counter(names).items() if count > 1]
    if not names or twice:
        raise ValueError(f"expected tiers, each once, got {', '.join(twice) + ' twice' if twice else 'none'}")
    return {name: parse_tier(name) for name in names}


# --- magnitude pruning ----------------------------------------------------------------------------------------------


def num_kept(size: int, prune: float) -> int:
    """Weights of a tensor that remain: size - floor(prune * size + 1e-9), at least one."""
    return max(1, size - math.floor(prune * size + 1e-9))


def magnitude_mask(values: np.ndarray, prune: float) -> np.ndarray:
    """Bool of the same shape: the largest weights by absolute value; of equal ones the lower flat index remains.

    "Learning both Weights and Connections for Efficient Neural Networks" (Han, Pool, Tran, Dally, NeurIPS 2015,
    https://arxiv.org/abs/1506.02626), once and without training in between.
    """
    sizes = np.abs(values).reshape(-1)
    keep = num_kept(len(sizes), prune) if len(sizes) else 0
    if keep == len(sizes):
        return np.ones(values.shape, dtype=bool)
    least = np.partition(sizes, len(sizes) - keep)[len(sizes) - keep]
    mask: np.ndarray = sizes > least
    mask[np.flatnonzero(sizes == least)[: keep - int(mask.sum())]] = True
    return mask.reshape(values.shape)


def magnitude_masks(part: Mapping[str, np.ndarray], prune: float, scope: Scope = "layer") -> dict[str, np.ndarray]:
    """Masks of all tensors with two axes or more; biases and norms are never pruned.

    Args:
        part: narrow tensors.
        prune: share of weights that go.
        scope: of each tensor ("layer"), or of all weights together ("global"; each tensor then keeps its largest
            weight, which is ours: no layer may be cut off whole).
    """
    weights = {name: array for name, array in part.items() if array.ndim > 1}
    if scope == "layer" or not weights:
        return {name: magnitude_mask(array, prune) for name, array in weights.items()}
    whole = magnitude_mask(np.concatenate([array.reshape(-1) for array in weights.values()]), prune)
    masks, start = {}, 0
    for name, array in weights.items():
        mask = whole[start : start + array.size]
        start += array.size
        if array.size:
            mask[np.abs(array).argmax()] = True
        masks[name] = mask.reshape(array.shape)
    return masks


# --- compressing ----------------------------------------------------------------------------------------------------


def pruned(layout: Layout, part: Submodel, tier: Tier, arrays: Arrays, scope: Scope = "layer") -> Submodel:
    """A width's units with the masks of a tier, from the weights of a full model; as it is where nothing is pruned."""
    if not tier.prune:
        return part
    return replace(part, masks=magnitude_masks(extract(layout, part, arrays), tier.prune, scope))


def compress(layout: Layout, part: Submodel, tier: Tier, arrays: Arrays, scope: Scope = "layer") -> Part:
    """The model that a device of a tier gets: cut, then pruned, then quantised; scales are of what is left.

    Args:
        layout: the network's numbering.
        part: units of the tier's width.
        tier: the compressor.
        arrays: the full model; read, never written.
        scope: of pruning.

    Returns:
        The submodel with its masks, and its tensors: narrow, zero where masked, on their levels where quantised.
    """
    submodel = pruned(layout, part, tier, arrays, scope)
    return Part(submodel, through(tier.codec or PLAIN, layout, submodel, extract(layout, submodel, arrays)))


def compression_error(layout: Layout, arrays: Arrays, part: Part) -> float:
    """||W - What||^2 / ||W||^2 over all tensors; what a part does not hold counts as zero in What.

    Args:
        layout: the network's numbering.
        arrays: W, the full model.
        part: What.
    """
    whole = left_out = missed = 0.0
    for name in layout.shapes:
        norm = _square(arrays[name])
        whole += norm
        if name not in part.arrays:
            left_out += norm
            continue
        kept = take(arrays[name], positions(layout, part.submodel, name))
        left_out += norm - _square(kept) if kept.size < arrays[name].size else 0.0
        missed += _square(kept - part.arrays[name])
    return (left_out + missed) / whole if whole else 0.0


def _square(array: np.ndarray) -> float:
    flat = np.asarray(array).reshape(-1)
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64))


# --- costs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TierCost:
    """What a tier asks for, whichever units and weights it keeps.

    Attributes:
        numbers: kept.
        model_bytes: in storage: numbers, scales, and one bit a weight where it is pruned.
        train_bytes: these and a float32 gradient of every number kept: what a device needs that computes on the
            compressed model itself. Torch needs more: `flexfed.methods.compressed.memory_to_train`.
        down_bytes: of the model's arrays and masks on the wire.
        decoded_bytes: what torch's device holds beside those; see `flexfed.cost.decoded_bytes`.
        up_bytes: of its gradient's, without a mask.
    """

    numbers: int
    model_bytes: int
    train_bytes: int
    down_bytes: int
    decoded_bytes: int
    up_bytes: int


def tier_pieces(layout: Layout, tier: Tier) -> Pieces:
    """The pieces of a tier's part; where pruning is global each tensor keeps more or less, all together the same."""
    whole = pieces(layout, prefix_ratio(layout, tier.ratio))
    if not tier.prune:
        return whole
    kept = (n if plain else num_kept(n, tier.prune) for n, plain in zip(whole.sizes, whole.plain, strict=True))
    return Pieces(tuple(kept), whole.plain)


def tier_cost(layout: Layout, tier: Tier, run_codec: str = PLAIN, reply_codec: str = PLAIN) -> TierCost:
    """What a tier costs: for dense numbers of b bits ceil(kept * b / 8) bytes, and so on.

    Args:
        layout: the network's numbering.
        tier: the compressor.
        run_codec: how tiers that are not quantised travel, both ways.
        reply_codec: how the gradients of quantised ones do.
    """
    here = tier_pieces(layout, tier)
    shapes = narrow_shapes(layout, prefix_ratio(layout, tier.ratio)).values()
    entries = [math.prod(shape) for shape in shapes if len(shape) > 1] if tier.prune else []
    mask_bytes = sum(-(-num // 8) for num in entries)
    model, down, up = (
        CODECS[name].num_bytes(here)
        for name in (tier.codec or PLAIN, tier.codec or run_codec, reply_codec if tier.codec else run_codec)
    )
    numbers, model_bytes = sum(here.sizes), model + mask_bytes
    floats = BYTES_PER_NUMBER * numbers
    decoded = (0 if (tier.codec or run_codec) == PLAIN else floats) + (BYTES_PER_NUMBER + 1) * sum(entries)
    return TierCost(numbers, model_bytes, model_bytes + floats, down + mask_bytes, decoded, up)
