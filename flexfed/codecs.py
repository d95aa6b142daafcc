"""How the numbers of a part travel: as they are, or as integers of 8 or 4 bits with one scale a tensor.

Symmetric uniform quantisation, as compressed local models have it (`flexfed.methods.compressed`; the recipe is that of
"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (Jacob et al., CVPR 2018,
https://arxiv.org/abs/1712.05877), without its zero points): with q = 2^(bits - 1) - 1 and s = max|x| / q, a number x
travels as round(x / s). Biases and norms (tensors of fewer than two axes) stay float32. The bounds, all of them tests:

- to the nearest (half to even): |decoded - x| <= s / 2; encoding what was decoded gives the same codes and scales;
- stochastic (ours, for differences): |decoded - x| < s, the mean over draws is x, and a number that stands on the grid
  stays there. Half of 8 bits' s is 0.4 % of the largest number of the tensor.

Numbers on the wire are codes and nothing else: `num_bytes` is the length of the arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flexfed.submodel import Submodel, flatten, narrow_sizes, unflatten
from flexfed.units import Arrays, Layout

_TINY = np.finfo(np.float32).tiny
_CHUNK = 1 << 16  # numbers handled while they are in the processor's cache
_LENGTHS = "a part of {} numbers is expected, got shape {}"


class Pieces(NamedTuple):
    """How a flat part falls into tensors.

    Attributes:
        sizes: numbers of each tensor, in wire order; of a masked one its kept entries.
        plain: whether each stays float32.
    """

    sizes: tuple[int, ...]
    plain: tuple[bool, ...]

    @property
    def num_plain(self) -> int:
        """Numbers that stay float32."""
        return sum(size for size, plain in zip(self.sizes, self.plain, strict=True) if plain)


def pieces(layout: Layout, submodel: Submodel) -> Pieces:
    """The pieces of a submodel's flat part; tensors of fewer than two axes (biases, norms) are plain."""
    sizes = narrow_sizes(layout, submodel)
    return Pieces(tuple(sizes.values()), tuple(len(layout.shapes[name]) < 2 for name in sizes))


def largest_code(bits: int) -> int:
    """The number q of levels on either side of zero.

    Raises:
        ValueError: fewer than two bits, for which there is no level but zero.
    """
    if bits < 2:
        raise ValueError(f"symmetric quantisation needs at least 2 bits, got {bits}")
    return int(2 ** (bits - 1) - 1)


def scale_of(values: np.ndarray, bits: int) -> np.float32:
    """The step s = max|values| / q between two levels; 1 where all values are zero, or nearer to it than 1e-38.

    In float32, too, (s q) / q is s for every s that is some m / q (tested for all m): whoever holds decoded values
    finds the very scale they were decoded with.

    Raises:
        ValueError: NaN or infinity, or numbers so large that float32 cannot hold s q.
    """
    q, most = np.float32(largest_code(bits)), np.float32(0)
    if values.size:
        most = np.maximum(values.max(), -values.min()).astype(np.float32)
    if not np.isfinite(most) or most > np.finfo(np.float32).max / 2:
        raise ValueError(f"numbers to quantise must be finite and below 1e38, got {most}")
    return np.float32(most / q) if most / q >= _TINY else np.float32(1)


def codes_of(values: np.ndarray, scale: np.float32, bits: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """The levels of some values: whole numbers in -q..q, still float32.

    Args:
        values: float32, of any shape.
        scale: the step between two levels.
        bits: of a code.
        rng: None rounds to the nearest, half to even; else up or down at random, so that the mean is the value.
    """
    q = largest_code(bits)
    found = values / scale
    if rng is None:
        np.rint(found, out=found)
    else:
        nearest = np.rint(found)
        found += rng.random(found.shape, dtype=np.float32)
        np.floor(found, out=found)
        np.copyto(found, nearest, where=nearest * scale == values)  # x / s of a level may miss it by a last bit
    return np.clip(found, -q, q, out=found)


def quantise(values: np.ndarray, bits: int, scale: np.float32 | None = None) -> np.ndarray:
    """The nearest levels to some values, as float32: s * clamp(round(x / s), -q, q)."""
    values = np.asarray(values, dtype=np.float32)
    step = scale_of(values, bits) if scale is None else np.float32(scale)
    levels: np.ndarray = codes_of(values, step, bits) * step
    return levels + np.float32(0)  # -0 becomes 0


@dataclass(frozen=True)
class Codec:
    """One way for the numbers of a part to travel.

    Attributes:
        name: in the configuration.
        bits: of a number; 32 = float32, as they are.
    """

    name: str
    bits: int

    def encode(self, flat: np.ndarray, pieces: Pieces, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """The arrays that travel: "part", or "codes", "scales" and "floats".

        Args:
            flat: float32, a part in wire order.
            pieces: its tensors.
            rng: None rounds to the nearest; else at random, unbiased.

        Raises:
            ValueError: another length or dtype, or numbers that cannot be quantised.
        """
        expected = sum(pieces.sizes)
        if flat.dtype != np.float32 or flat.shape != (expected,):
            raise ValueError(_LENGTHS.format(expected, f"{flat.shape} of {flat.dtype}"))
        if self.bits == 32:
            return {"part": flat}
        floats = np.concatenate([np.zeros(0, np.float32), *(flat[piece] for piece in _spans(pieces, plain=True))])
        codes = np.empty(expected - len(floats), dtype=np.int8)
        scales, start = [], 0
        for piece in _spans(pieces, plain=False):
            scales.append(scale_of(flat[piece], self.bits))
            for begin in range(piece.start, piece.stop, _CHUNK):
                values = flat[begin : min(begin + _CHUNK, piece.stop)]
                codes[start : start + len(values)] = codes_of(values, scales[-1], self.bits, rng)
                start += len(values)
        packed = codes if self.bits == 8 else _pack_halves(codes)
        return {"codes": packed, "scales": np.array(scales, dtype=np.float32), "floats": floats}

    def decode(self, arrays: Mapping[str, np.ndarray], pieces: Pieces) -> np.ndarray:
        """The numbers of a part, float32 in wire order, (sum of the pieces' sizes,); believes nothing.

        Raises:
            ValueError: other arrays than `encode` gives for these pieces, codes that no encoder writes, or scales that
                are not positive and finite.
        """
        kinds = self._arrays(pieces)
        _refuse_others(self.name, arrays, kinds)
        if self.bits == 32:
            return arrays["part"]
        num_codes = sum(pieces.sizes) - pieces.num_plain
        codes = arrays["codes"] if self.bits == 8 else _unpack_halves(arrays["codes"], num_codes)
        if num_codes and int(codes.min()) < -largest_code(self.bits):
            raise ValueError(f"codes of {self.name} must lie in +-{largest_code(self.bits)}, got {codes.min()}")
        scales = arrays["scales"]
        most = np.finfo(np.float32).max / (2 * largest_code(self.bits))
        if not ((scales > 0) & (scales <= most)).all():
            raise ValueError(f"scales must be positive and finite, got {scales[~((scales > 0) & (scales <= most))][0]}")
        flat = np.empty(sum(pieces.sizes), dtype=np.float32)
        start = 0
        for piece in _spans(pieces, plain=True):
            flat[piece] = arrays["floats"][start : start + piece.stop - piece.start]
            start += piece.stop - piece.start
        start = 0
        for piece, scale in zip(_spans(pieces, plain=False), scales, strict=True):
            stop = start + piece.stop - piece.start
            np.multiply(codes[start:stop], scale, out=flat[piece], dtype=np.float32)
            start = stop
        return flat

    def num_bytes(self, pieces: Pieces) -> int:
        """Bytes of the arrays."""
        return sum(size * np.dtype(kind).itemsize for kind, size in self._arrays(pieces).values())

    def _arrays(self, pieces: Pieces) -> dict[str, tuple[str, int]]:
        """Name -> dtype and length of the arrays that travel."""
        total, plain = sum(pieces.sizes), pieces.num_plain
        if self.bits == 32:
            return {"part": ("float32", total)}
        codes = ("int8", total - plain) if self.bits == 8 else ("uint8", -(-(total - plain) // 2))
        return {"codes": codes, "scales": ("float32", pieces.plain.count(False)), "floats": ("float32", plain)}


PLAIN = "float32"
CODECS: dict[str, Codec] = {"float32": Codec("float32", 32), "int8": Codec("int8", 8), "int4": Codec("int4", 4)}
"""Name in the configuration -> codec."""


def through(codec: str, layout: Layout, submodel: Submodel, part: Arrays) -> Arrays:
    """The tensors of a part as whoever receives it has them; the very same where numbers travel as they are.

    Args:
        codec: by name.
        layout: the network's numbering.
        submodel: what the part holds.
        part: its tensors.
    """
    if CODECS[codec].bits == 32:
        return part
    tensors = pieces(layout, submodel)
    arrays = CODECS[codec].encode(flatten(layout, submodel, part), tensors)
    return unflatten(layout, submodel, CODECS[codec].decode(arrays, tensors))


def _spans(pieces: Pieces, plain: bool) -> Iterator[slice]:
    """Where the tensors of one kind stand in the flat part."""
    start = 0
    for size, is_plain in zip(pieces.sizes, pieces.plain, strict=True):
        if is_plain == plain:
            yield slice(start, start + size)
        start += size


def _refuse_others(name: str, arrays: Mapping[str, np.ndarray], kinds: Mapping[str, tuple[str, int]]) -> None:
    if arrays.keys() != kinds.keys():
        raise ValueError(f"a part as {name} has the arrays {', '.join(sorted(kinds))}; got {', '.join(sorted(arrays))}")
    for key, (kind, size) in kinds.items():
        if arrays[key].dtype != kind or arrays[key].shape != (size,):
            got = f"shape {arrays[key].shape} of {arrays[key].dtype}"
            raise ValueError(f"{key} should be {size} numbers of {kind} (codec {name}), got {got}")


def _pack_halves(codes: np.ndarray) -> np.ndarray:
    """Two codes of four bits in a byte, the first in the lower half; the last byte may have a half to spare."""
    halves = np.zeros(len(codes) + len(codes) % 2, dtype=np.uint8)
    np.bitwise_and(codes.view(np.uint8), 15, out=halves[: len(codes)])
    return halves[::2] | (halves[1::2] << 4)


def _unpack_halves(packed: np.ndarray, num: int) -> np.ndarray:
    """Undo `_pack_halves`: int8, four bits with their sign.

    Raises:
        ValueError: the half to spare is not zero.
    """
    if num % 2 and packed[-1] >> 4:
        raise ValueError("codes of four bits have bits set behind the last one")
    halves = np.empty(2 * len(packed), dtype=np.uint8)
    halves[::2], halves[1::2] = packed << 4, packed & 240
    return halves[:num].view(np.int8) >> 4
