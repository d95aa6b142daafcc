"""A part of a network as a set of units: extract it, cut it further, put it on the wire."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Literal, cast, get_args

import numpy as np

from flexfed.units import Arrays, Layout

Cut = Literal["all", "rows", "weight-rows"]
"""Axes that a submodel's units narrow: all; the first (outputs); the first of tensors that have more than one."""
CUTS: tuple[Cut, ...] = get_args(Cut)  # from what keeps least to what keeps most


@dataclass(frozen=True, eq=False)
class Submodel:
    """Which units of a network are present, which tensors, and rarely which single entries.

    Attributes:
        units: bool, (num_units,).
        keys: tensors present (depth, exits, blocks); None = all.
        masks: tensor -> bool of its narrow shape, single entries kept (unstructured pruning only). Of a masked tensor
            only these travel; it computes as a dense one, with zeros.
        cut: see `Cut`. Only what "all" keeps is a network of its own; the others say which rows of a reply travel.
    """

    units: np.ndarray
    keys: frozenset[str] | None = None
    masks: Mapping[str, np.ndarray] = field(default_factory=dict)
    cut: Cut = "all"

    def __post_init__(self) -> None:
        if self.cut not in CUTS:
            raise ValueError(f"cut of a submodel must be one of {', '.join(CUTS)}, got {self.cut!r}")
        if self.units.dtype != np.bool_ or self.units.ndim != 1:
            raise ValueError(f"units must be a bool vector, got {self.units.dtype} of shape {self.units.shape}")
        object.__setattr__(self, "units", self.units.copy())
        self.units.flags.writeable = False
        object.__setattr__(self, "masks", {name: _frozen(mask) for name, mask in self.masks.items()})

    @cached_property
    def key(self) -> bytes:
        """Equal for equal units, tensors and masks: what replies are pooled by."""
        names = "" if self.keys is None else "\n".join(sorted(self.keys)) + "\n"
        return np.packbits(self.units).tobytes() + (names + self.cut).encode() + self.masks_key

    @cached_property
    def masks_key(self) -> bytes:
        """Names masks in a few bytes, so that they need not travel again; empty where there are none."""
        if not self.masks:
            return b""
        digest = hashlib.sha256(np.packbits(self.units).tobytes())
        for name, mask in sorted(self.masks.items()):
            digest.update(name.encode() + b"\0" + np.packbits(mask).tobytes())
        return digest.digest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Submodel) and len(self.units) == len(other.units) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def holds(self, tensor: str) -> bool:
        """Is the tensor present (as a whole or in part)?"""
        return self.keys is None or tensor in self.keys


def _frozen(mask: np.ndarray) -> np.ndarray:
    """A view that cannot be written through: keys are computed once."""
    view = mask.view()
    view.flags.writeable = False
    return view


def full(layout: Layout) -> Submodel:
    """Everything."""
    return Submodel(np.ones(layout.num_units, dtype=bool))


def axes_cut(layout: Layout, submodel: Submodel, tensor: str) -> tuple[np.ndarray | None, ...]:
    """For each axis of a tensor the unit behind each position, None where the submodel cuts nothing."""
    axes = layout.axes[tensor]
    if submodel.cut == "all" or not axes:
        return axes
    first = axes[0] if len(axes) > 1 or submodel.cut == "rows" else None
    return (first, *[None] * (len(axes) - 1))


def positions(
    layout: Layout, submodel: Submodel, tensor: str, found: dict[int, np.ndarray | None] | None = None
) -> tuple[np.ndarray | None, ...]:
    """For each axis of a tensor the positions that are kept, ascending; None = all of them.

    `found` remembers those of one submodel from tensor to tensor: layouts share equal axes.
    """
    axes = axes_cut(layout, submodel, tensor)
    if found is None:
        return tuple(_kept(units, submodel.units) for units in axes)
    for units in axes:
        if id(units) not in found:
            found[id(units)] = _kept(units, submodel.units)
    return tuple(found[id(units)] for units in axes)


def _kept(axis: np.ndarray | None, units: np.ndarray) -> np.ndarray | None:
    if axis is None:
        return None
    kept = units[axis]
    return None if kept.all() else kept.nonzero()[0]


def relative_positions(layout: Layout, outer: Submodel, inner: Submodel, tensor: str) -> tuple[np.ndarray | None, ...]:
    """Where `inner` stands inside the part that `outer` extracts; both in the full numbering, `outer` cut "all".

    Returns:
        For each axis of the tensor ascending positions in the part of `outer`; None = all of them.
    """
    return tuple(
        None if units is None else _kept(units[outer.units[units]], inner.units)
        for units in axes_cut(layout, inner, tensor)
    )


def narrow_shapes(layout: Layout, submodel: Submodel) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the part, in wire order."""
    without_masks = Submodel(submodel.units, submodel.keys, cut=submodel.cut) if submodel.masks else submodel
    return dict(_narrow_shapes(layout, without_masks))


@lru_cache(maxsize=64)  # asked for half a dozen times a client; without masks, which are as large as the network
def _narrow_shapes(layout: Layout, submodel: Submodel) -> dict[str, tuple[int, ...]]:
    counted: dict[int, int] = {}  # layouts share equal axes: each is counted once
    return {name: _narrow_shape(layout, submodel, name, counted) for name in layout.shapes if submodel.holds(name)}


def narrow_shape(layout: Layout, submodel: Submodel, tensor: str) -> tuple[int, ...]:
    """Shape of one tensor of the part."""
    return _narrow_shape(layout, submodel, tensor, {})


def _narrow_shape(layout: Layout, submodel: Submodel, tensor: str, counted: dict[int, int]) -> tuple[int, ...]:
    shape = []
    for size, units in zip(layout.shapes[tensor], axes_cut(layout, submodel, tensor), strict=True):
        if units is not None and id(units) not in counted:
            counted[id(units)] = int(np.count_nonzero(submodel.units[units]))
        shape.append(size if units is None else counted[id(units)])
    return tuple(shape)


def narrow_sizes(layout: Layout, submodel: Submodel) -> dict[str, int]:
    """How many numbers of every tensor travel, in wire order."""
    return sizes_of(submodel, narrow_shapes(layout, submodel))


def sizes_of(submodel: Submodel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The same, given the narrow shapes: all numbers of a tensor, of a masked one the entries kept."""
    masks = submodel.masks
    return {n: int(np.count_nonzero(masks[n])) if n in masks else math.prod(shape) for n, shape in shapes.items()}


def take(array: np.ndarray, kept: tuple[np.ndarray | None, ...]) -> np.ndarray:
    """The part of one tensor: a view where an axis is kept as one run, a copy where it is not."""
    for axis, index in enumerate(kept):
        if index is not None:
            run = as_slice(index)
            selector = (slice(None),) * axis
            array = array[(*selector, run)] if run is not None else np.take(array, index, axis=axis)
    return array


def as_slice(index: np.ndarray) -> slice | None:
    """The slice that equals an ascending index, or None where it has gaps."""
    if len(index) and int(index[-1]) - int(index[0]) + 1 == len(index):
        return slice(int(index[0]), int(index[-1]) + 1)
    return None if len(index) else slice(0, 0)


def extract(layout: Layout, submodel: Submodel, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """The part of a network that a submodel names; each tensor keeps its number of axes.

    Args:
        layout: the network's numbering.
        submodel: what to take.
        arrays: the full network's tensors; those the layout does not know are left out.

    Returns:
        Tensor name -> narrow array, in wire order. May share memory with `arrays`.
    """
    part = {n: take(arrays[n], positions(layout, submodel, n)) for n in layout.shapes if submodel.holds(n)}
    for name, mask in submodel.masks.items():
        part[name] = np.where(mask, part[name], 0).astype(part[name].dtype)
    return part


def flatten(layout: Layout, submodel: Submodel, part: Mapping[str, np.ndarray]) -> np.ndarray:
    """All tensors of a part as one float32 vector in wire order, of masked ones the kept entries.

    Raises:
        ValueError: a tensor of the submodel is missing, or has another shape than its narrow one.
    """
    shapes = narrow_shapes(layout, submodel)
    for name, shape in shapes.items():
        if name not in part or part[name].shape != shape:
            got = part[name].shape if name in part else "nothing"
            raise ValueError(f"tensor {name!r} of the part should have shape {shape}, got {got}")
    pieces = [np.asarray(travelling_numbers(submodel, name, part[name]), dtype=np.float32) for name in shapes]
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.float32)


def travelling_numbers(submodel: Submodel, tensor: str, values: np.ndarray) -> np.ndarray:
    """One tensor of a part as it travels: flat, where it is masked the kept entries only."""
    return values[submodel.masks[tensor]] if tensor in submodel.masks else values.reshape(-1)


def split_flat(layout: Layout, submodel: Submodel, flat: np.ndarray) -> Arrays:
    """A flat part by tensor: views, one axis each.

    Raises:
        ValueError: the vector has not the length that the submodel asks for.
    """
    sizes = narrow_sizes(layout, submodel)
    ends = [0, *accumulate(sizes.values())]
    if flat.shape != (ends[-1],):
        raise ValueError(f"a flat part of {ends[-1]} numbers is expected for this submodel, got shape {flat.shape}")
    return {name: flat[start:end] for name, (start, end) in zip(sizes, pairwise(ends), strict=True)}


def unflatten(layout: Layout, submodel: Submodel, flat: np.ndarray) -> Arrays:
    """The tensors of a part: views into its flat vector, but masked ones, which are zero where nothing travelled.

    Raises:
        ValueError: the vector has not the length that the submodel asks for.
    """
    pieces = split_flat(layout, submodel, flat)
    shapes = narrow_shapes(layout, submodel)
    return {
        n: dense(submodel, n, piece) if n in submodel.masks else piece.reshape(shapes[n]) for n, piece in pieces.items()
    }


def dense(submodel: Submodel, tensor: str, kept: np.ndarray) -> np.ndarray:
    """A masked tensor of a part, in its narrow shape, from its kept entries, a vector; zero elsewhere."""
    mask = submodel.masks[tensor]
    values = np.zeros(mask.shape, dtype=kept.dtype)
    values[mask] = kept
    return values


def compose(outer: Submodel, inner: Submodel) -> Submodel:
    """Cut a submodel further: `inner` counts the units (and tensors) of `outer` only.

    `extract(compose(a, b))` equals taking `b` from what `a` extracted.

    Args:
        outer: what was received.
        inner: bool over the kept units of `outer`; its `keys` must be among `outer`'s.

    Raises:
        ValueError: `inner` speaks of another number of units, or of tensors that `outer` lacks; or either has masks,
            or is cut to rows.
    """
    if outer.masks or inner.masks or (outer.cut, inner.cut) != ("all", "all"):
        raise ValueError(
            "submodels of rows or with masks of single entries cannot be composed; expected units and keys only"
        )
    kept = np.flatnonzero(outer.units)
    if len(inner.units) != len(kept):
        raise ValueError(f"inner submodel should speak of the {len(kept)} units of outer, got {len(inner.units)}")
    units = np.zeros_like(outer.units)
    units[kept[inner.units]] = True
    if inner.keys is None:
        return Submodel(units, outer.keys)
    if outer.keys is not None and not inner.keys <= outer.keys:
        raise ValueError(f"inner submodel names tensors outer lacks: {sorted(inner.keys - outer.keys)[:3]}")
    return Submodel(units, inner.keys)


def within(inner: Submodel, outer: Submodel) -> bool:
    """Does `outer` hold all units, tensors and axes that `inner` holds? Masks are not compared."""
    keys = outer.keys is None or (inner.keys is not None and inner.keys <= outer.keys)
    axes = CUTS.index(inner.cut) <= CUTS.index(outer.cut) or bool(outer.units.all())
    return keys and axes and not bool((inner.units & ~outer.units).any())


def masks_within(inner: Submodel, outer: Submodel) -> bool:
    """Do two submodels of the same units mask the same tensors, `inner` keeping no entry that `outer` leaves out?"""
    same = inner.masks.keys() == outer.masks.keys() and bool(np.array_equal(inner.units, outer.units))
    return same and not any((mask & ~outer.masks[name]).any() for name, mask in inner.masks.items())


_PACKED = ("units", "keys", "cut", "masks")


def pack(submodel: Submodel, known: bytes = b"", sent: Submodel | None = None) -> dict[str, bytes]:
    """A submodel as bytes: one bit a unit, tensor names, one bit an entry of each mask.

    Args:
        submodel: what to pack.
        known: `masks_key` of the submodel that the receiver knows: if the masks are the same, only the key travels.
        sent: that submodel itself, if the sender has it: where some of its entries are left out, only the masks that
            changed travel, one bit for each entry that it keeps.
    """
    packed = {"units": np.packbits(submodel.units).tobytes()}
    if submodel.keys is not None:
        packed["keys"] = "\n".join(sorted(submodel.keys)).encode()
    if submodel.cut != "all":
        packed["cut"] = submodel.cut.encode()
    if submodel.masks and submodel.masks_key == known:
        return {**packed, "masks": known}
    if sent is not None and sent.masks and masks_within(submodel, sent):
        kept = {name: mask[sent.masks[name]] for name, mask in submodel.masks.items()}
        changed = {f"kept:{name}": np.packbits(bits).tobytes() for name, bits in kept.items() if not bits.all()}
        return {**packed, "masks": sent.masks_key, **changed}
    for name, mask in submodel.masks.items():
        packed[f"mask:{name}"] = np.packbits(mask).tobytes()
    return packed


def unpack(layout: Layout, packed: Mapping[str, bytes], known: Submodel | None = None) -> Submodel:
    """Undo `pack`, believing nothing.

    Args:
        layout: the network's numbering.
        packed: what came.
        known: whose masks are meant where only their key came, or their key and what of them is kept.

    Raises:
        ValueError: bits of the wrong length, set bits behind the last unit, names the layout does not have,
            masks that are not known, or anything that `pack` does not write.
    """
    masked = {name.removeprefix("mask:"): bits for name, bits in packed.items() if name.startswith("mask:")}
    less = {name.removeprefix("kept:"): bits for name, bits in packed.items() if name.startswith("kept:")}
    if other := [name for name in packed if name not in _PACKED and not name.startswith(("mask:", "kept:"))]:
        raise ValueError(f"a submodel has {', '.join(_PACKED)} or masks, and nothing like {other[0][:40]!r}")
    if masked and "masks" in packed:
        raise ValueError("a submodel has masks or their key, not both")
    if less and "masks" not in packed:
        raise ValueError("a submodel tells what it keeps of masks, but not of which; expected their key")
    units = _bits(packed.get("units", b""), layout.num_units, "units")
    keys = None
    if "keys" in packed:
        keys = frozenset(filter(None, packed["keys"].decode(errors="replace").split("\n")))
        if not keys <= layout.shapes.keys():
            raise ValueError(f"submodel names unknown tensors: {sorted(keys - layout.shapes.keys())[:3]}")
    cut = cast(Cut, packed.get("cut", b"all").decode(errors="replace"))  # Submodel refuses others
    if "masks" in packed:
        if (
            known is None
            or not known.masks
            or known.masks_key != packed["masks"]
            or not np.array_equal(units, known.units)
        ):
            raise ValueError("submodel names masks that are not known here; expected the masks themselves")
        return Submodel(units, keys, _less(known.masks, less), cut)
    shapes = narrow_shapes(layout, Submodel(units, keys, cut=cut)) if masked else {}
    if not masked.keys() <= shapes.keys():
        raise ValueError(f"submodel masks an unknown tensor: {sorted(masked.keys() - shapes.keys())[0]!r}")
    masks = {n: _bits(b, math.prod(shapes[n]), f"mask:{n}").reshape(shapes[n]) for n, b in masked.items()}
    return Submodel(units, keys, masks, cut)


def _less(masks: Mapping[str, np.ndarray], kept: Mapping[str, bytes]) -> Mapping[str, np.ndarray]:
    """Masks without the entries that are kept no more; `kept` has a bit for each entry that a mask keeps."""
    if unknown := sorted(kept.keys() - masks.keys()):
        raise ValueError(f"submodel keeps less of a mask that is not known here: {unknown[0][:40]!r}")
    found = dict(masks)
    for name, bits in kept.items():
        found[name] = np.zeros(masks[name].shape, dtype=bool)
        found[name][masks[name]] = _bits(bits, int(np.count_nonzero(masks[name])), f"kept:{name}")
    return found


def _bits(packed: bytes, num: int, what: str) -> np.ndarray:
    if len(packed) != -(-num // 8):
        raise ValueError(f"{what} of a submodel should be {-(-num // 8)} bytes ({num} bits), got {len(packed)} bytes")
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8)).astype(bool)
    if bits[num:].any():
        raise ValueError(f"{what} of a submodel has bits set behind its last one ({num})")
    return bits[:num]
