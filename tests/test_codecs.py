"""Codecs: the quantiser's worked examples, bounds of its error, and what a decoder does not believe."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from toy import LAYOUTS, random_arrays, random_units

from flexfed.codecs import CODECS, Codec, Pieces, codes_of, largest_code, pieces, quantise, scale_of
from flexfed.submodel import Submodel, extract, flatten, full, narrow_shapes

W = np.array([0.62, -0.31, 0.12, 0, -0.93, 0.20], dtype=np.float32)
PARTS = Pieces((5, 3000, 2, 1, 70001, 0, 4), (True, False, True, False, False, False, False))
codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))
integers = pytest.mark.parametrize("codec", [CODECS["int8"], CODECS["int4"]], ids=["int8", "int4"])


def numbers(seed: int = 0, parts: Pieces = PARTS) -> np.ndarray:
    """A flat part of these pieces; its tensors differ in size by powers of ten."""
    rng = np.random.default_rng(seed)
    scales = np.repeat(10.0 ** rng.integers(-6, 7, len(parts.sizes)), parts.sizes)
    return np.asarray(rng.standard_normal(sum(parts.sizes)) * scales, dtype=np.float32)


def each_scale(codec: Codec, encoded: dict[str, np.ndarray], parts: Pieces) -> np.ndarray:
    """The scale of every number, 0 where it stays float32."""
    scales = iter(encoded["scales"].tolist())
    return np.repeat([0.0 if plain else next(scales) for plain in parts.plain], parts.sizes)


# --- the quantiser, 6.2 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "scale", "levels", "error"),
    [
        (2, 0.93, [0.93, 0, 0, 0, -0.93, 0], 0.17616802),
        (3, 0.31, [0.62, -0.31, 0, 0, -0.93, 0.31], 0.01893128),
        (4, 0.13285714, [0.66428571, -0.26571429, 0.13285714, 0, -0.93, 0.26571429], 0.00600523),
        (8, 0.00732283, [0.62244094, -0.30755906, 0.11716535, 0, -0.93, 0.19771654], 1.798e-5),
    ],
)
def test_the_nearest_levels(bits: int, scale: float, levels: list[float], error: float) -> None:
    assert scale_of(W, bits) == pytest.approx(scale, abs=1e-6)
    found = quantise(W, bits)
    np.testing.assert_allclose(found, levels, atol=1e-6)
    assert float(((W - found) ** 2).sum() / (W**2).sum()) == pytest.approx(error, abs=1e-6)


def test_a_given_scale_clips() -> None:
    np.testing.assert_allclose(quantise(W, 3, np.float32(0.2)), [0.6, -0.4, 0.2, 0, -0.6, 0.2], atol=1e-6)


def test_half_way_goes_to_the_even_level() -> None:
    halves = np.array([0.25, 0.75, 1.25, -0.25, -0.75], dtype=np.float32)
    assert codes_of(halves, np.float32(0.5), 4).tolist() == [0, 2, 2, 0, -2]


def test_zeros_have_scale_one_and_stay() -> None:
    for zeros in (np.zeros((2, 3), dtype=np.float32), np.full((2, 3), 1e-39, dtype=np.float32)):
        assert scale_of(zeros, 8) == 1
        assert not quantise(zeros, 8).any()


def test_one_bit_has_no_levels() -> None:
    with pytest.raises(ValueError, match="at least 2 bits, got 1"):
        largest_code(1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels_are_near_few_and_symmetric(bits: int) -> None:
    values = np.random.default_rng(bits).standard_normal(5000).astype(np.float32)
    scale, found = scale_of(values, bits), quantise(values, bits)
    assert np.abs(found - values).max() <= scale / 2 * (1 + 1e-5)
    assert len(np.unique(found)) <= 2 * largest_code(bits) + 1
    assert np.array_equal(quantise(-values, bits), -found)
    assert not np.signbit(found[found == 0]).any()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_decoded_values_have_the_scale_they_were_decoded_with(bits: int) -> None:
    largest = (np.arange(0, 2**23, 7, dtype=np.uint32) | 0x3F800000).view(np.float32)  # of float32 in [1, 2)
    q = np.float32(largest_code(bits))
    scales = largest / q
    assert np.array_equal(scales * q / q, scales)
    for most in [*largest[:5], *map(np.float32, (1e-30, 3e-36, 1e37))]:
        found = quantise(np.array([most, -most / 3], dtype=np.float32), bits)
        assert scale_of(found, bits) == scale_of(np.array([most]), bits)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_not_finite_cannot_be_quantised(bad: float) -> None:
    with pytest.raises(ValueError, match="must be finite and below 1e38"):
        CODECS["int8"].encode(np.array([1, bad, 0], dtype=np.float32), Pieces((3,), (False,)))


# --- round trips ----------------------------------------------------------------------------------------------------


@codecs
@pytest.mark.parametrize("seed", range(3))
def test_a_round_trip_is_near_and_the_second_is_the_same(codec: Codec, seed: int) -> None:
    flat = numbers(seed)
    encoded = codec.encode(flat, PARTS)
    decoded = codec.decode(encoded, PARTS)
    assert decoded.dtype == np.float32
    if codec.bits == 32:
        assert decoded is flat
        return
    scale = each_scale(codec, encoded, PARTS)
    assert (np.abs(decoded - flat) <= scale / 2 * (1 + 1e-4)).all()
    assert np.array_equal(decoded[scale == 0], flat[scale == 0])
    again = codec.encode(decoded, PARTS)
    assert all(np.array_equal(again[key], encoded[key]) for key in encoded)


@integers
def test_a_small_oracle(codec: Codec) -> None:
    parts = Pieces((1, 3, 2), (True, False, False))
    flat = np.array([9, 0.7, -0.34, 0.0, 2.0, -2.0], dtype=np.float32)
    encoded = codec.encode(flat, parts)
    q = largest_code(codec.bits)
    codes = [q, round(-0.34 / 0.7 * q), 0, q, -q]
    np.testing.assert_allclose(encoded["scales"], [0.7 / q, 2 / q], rtol=1e-6)
    assert encoded["floats"].tolist() == [9]
    if codec.bits == 8:
        assert encoded["codes"].tolist() == codes
    else:
        low = [code & 15 for code in [*codes, 0]]
        assert encoded["codes"].tolist() == [low[0] | low[1] << 4, low[2] | low[3] << 4, low[4]]
    expected = [9, 0.7, codes[1] * 0.7 / q, 0, 2, -2]
    np.testing.assert_allclose(codec.decode(encoded, parts), expected, rtol=1e-6)


@integers
def test_stochastic_rounding_is_within_a_step_and_unbiased(codec: Codec) -> None:
    parts, draws = Pieces((7,), (False,)), 4000
    flat = np.array([1.0, -0.333, 0.0101, 0.5004, -0.77, 0.0, 0.25], dtype=np.float32)
    rng = np.random.default_rng(0)
    found = np.stack([codec.decode(codec.encode(flat, parts, rng), parts) for _ in range(draws)])
    scale = 1 / largest_code(codec.bits)
    assert np.abs(found - flat).max() < scale
    assert len(np.unique(found[:, 1])) == 2
    np.testing.assert_allclose(found.mean(axis=0), flat, atol=4 * scale / 2 / np.sqrt(draws))


@integers
def test_what_is_on_the_grid_stays_there_whatever_the_draw(codec: Codec) -> None:
    decoded = codec.decode(codec.encode(numbers(1), PARTS), PARTS)
    encoded = codec.encode(decoded, PARTS)
    for seed in range(5):
        drawn = codec.encode(decoded, PARTS, np.random.default_rng(seed))
        assert all(np.array_equal(drawn[key], encoded[key]) for key in encoded)


class Draws:
    """A generator that draws always the same number."""

    def __init__(self, value: float):
        self.value = np.float32(value)

    def random(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.full(shape, self.value, dtype=dtype)


@pytest.mark.parametrize("draw", [0.0, 0.5, float(np.nextafter(np.float32(1), np.float32(0)))])
def test_on_the_grid_not_even_the_least_likely_draw_moves_a_number(draw: float) -> None:
    levels, missed = np.arange(-127, 128, dtype=np.float32), 0
    for scale in np.linspace(0.01, 0.02, 50, dtype=np.float32):
        values = levels * scale
        missed += int((values / scale != levels).sum())
        assert np.array_equal(codes_of(values, scale, 8, Draws(draw)), levels)  # type: ignore[arg-type]
    assert missed > 0  # dividing alone does not find the levels


@integers
def test_the_same_generator_gives_the_same_codes(codec: Codec) -> None:
    one, same, other = (codec.encode(numbers(), PARTS, np.random.default_rng(s))["codes"] for s in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


@codecs
def test_bytes_are_those_of_the_arrays(codec: Codec) -> None:
    encoded = codec.encode(numbers(), PARTS)
    assert codec.num_bytes(PARTS) == sum(array.nbytes for array in encoded.values())
    weights, plain = 3000 + 1 + 70001 + 4, 7
    expected = {32: 4 * (weights + plain), 8: weights + 4 * 5 + 4 * plain, 4: -(-weights // 2) + 4 * 5 + 4 * plain}
    assert codec.num_bytes(PARTS) == expected[codec.bits]


@codecs
@pytest.mark.parametrize("parts", [Pieces((), ()), Pieces((3,), (True,)), Pieces((0,), (False,))])
def test_parts_without_weights(codec: Codec, parts: Pieces) -> None:
    flat = np.arange(sum(parts.sizes), dtype=np.float32)
    assert np.array_equal(codec.decode(codec.encode(flat, parts), parts), flat)


def test_encoding_does_not_write_its_input() -> None:
    flat = numbers()
    flat.flags.writeable = False
    for codec in CODECS.values():
        codec.encode(flat, PARTS, np.random.default_rng(0))


# --- the pieces of a part -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_pieces_are_tensors_in_wire_order_masked_ones_by_what_they_keep(name: str) -> None:
    layout, rng = LAYOUTS[name](), np.random.default_rng(0)
    units = Submodel(random_units(layout, rng))
    shapes = narrow_shapes(layout, units)
    masks = {n: rng.uniform(size=shape) < 0.3 for n, shape in shapes.items() if len(shape) > 1}
    submodel = Submodel(units.units, masks=masks)
    found = pieces(layout, submodel)
    assert found.sizes == tuple(int(masks[n].sum()) if n in masks else int(np.prod(s)) for n, s in shapes.items())
    assert found.plain == tuple(len(shape) < 2 for shape in shapes.values())
    flat = flatten(layout, submodel, extract(layout, submodel, random_arrays(layout, rng)))
    assert sum(found.sizes) == len(flat)
    decoded = CODECS["int8"].decode(CODECS["int8"].encode(flat, found), found)
    assert np.abs(decoded - flat).max() <= 4 / 127  # normal numbers: half of a scale of at most 5 / 127


def test_a_part_as_integers_is_a_quarter_or_an_eighth() -> None:
    layout = LAYOUTS["ties"]()
    here = pieces(layout, full(layout))
    whole = CODECS["float32"].num_bytes(here)
    assert CODECS["int8"].num_bytes(here) < 0.5 * whole
    large = Pieces((1000, 10**6), (True, False))
    assert CODECS["int8"].num_bytes(large) / CODECS["float32"].num_bytes(large) == pytest.approx(0.25, abs=0.001)
    assert CODECS["int4"].num_bytes(large) / CODECS["float32"].num_bytes(large) == pytest.approx(0.125, abs=0.001)


# --- what is not believed -------------------------------------------------------------------------------------------


def altered(codec: Codec, **change: Any) -> dict[str, np.ndarray]:
    """An encoded part of one bias and five weights, some arrays replaced."""
    parts = Pieces((1, 5), (True, False))
    return {**codec.encode(np.arange(6, dtype=np.float32), parts), **change}


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("int8", {"part": np.zeros(6, np.float32)}, "a part as int8 has the arrays codes, floats, scales; got"),
        ("float32", {"codes": np.zeros(6, np.int8)}, "a part as float32 has the arrays part; got codes, part"),
        ("float32", {"part": np.zeros(5, np.float32)}, "part should be 6 numbers of float32"),
        (
            "float32",
            {"part": np.zeros(6, np.float64)},
            "should be 6 numbers of float32 .*, got shape .* of float64",
        ),
        ("int8", {"codes": np.zeros(4, np.int8)}, r"codes should be 5 numbers of int8 .codec int8., got"),
        ("int8", {"codes": np.zeros(5, np.uint8)}, "should be 5 numbers of int8 .*, got shape .* of uint8"),
        ("int4", {"codes": np.zeros(5, np.uint8)}, "should be 3 numbers of uint8 .codec int4., got shape"),
        ("int8", {"scales": np.zeros(0, np.float32)}, "scales should be 1 numbers of float32"),
        ("int8", {"floats": np.zeros((1, 1), np.float32)}, r"floats should be 1 numbers of float32 .*, got shape"),
        ("int8", {"codes": np.full(5, -128, np.int8)}, r"codes of int8 must lie in \+-127, got -128"),
        ("int4", {"codes": np.array([0, 8, 0], np.uint8)}, r"codes of int4 must lie in \+-7, got -8"),
        ("int4", {"codes": np.array([0, 0, 16], np.uint8)}, "codes of four bits have bits set behind the last one"),
        ("int8", {"scales": np.array([0], np.float32)}, "scales must be positive and finite, got 0"),
        ("int8", {"scales": np.array([-1], np.float32)}, "scales must be positive and finite, got -1"),
        ("int8", {"scales": np.array([np.nan], np.float32)}, "scales must be positive and finite, got nan"),
        ("int8", {"scales": np.array([np.inf], np.float32)}, "scales must be positive and finite, got inf"),
        ("int4", {"scales": np.array([3e38], np.float32)}, "scales must be positive and finite, got 3"),
    ],
)
def test_a_decoder_believes_nothing(name: str, change: dict[str, np.ndarray], match: str) -> None:
    codec, parts = CODECS[name], Pieces((1, 5), (True, False))
    codec.decode(altered(codec), parts)
    with pytest.raises(ValueError, match=match):
        codec.decode(altered(codec, **change), parts)


@codecs
def test_an_encoder_wants_its_length_and_type(codec: Codec) -> None:
    with pytest.raises(ValueError, match="a part of 6 numbers is expected, got shape"):
        codec.encode(np.zeros(5, np.float32), Pieces((1, 5), (True, False)))
    with pytest.raises(ValueError, match="float64"):
        codec.encode(np.zeros(6), Pieces((1, 5), (True, False)))
