from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
from torch import nn

from flexfed.select import (
    RatioGroup,
    kept_units,
    prefix,
    prefix_ratio,
    ratio_groups,
    ratio_widths,
    top,
    window,
)
from flexfed.submodel import Submodel, extract
from flexfed.units import Layout

WIDTHS = [64, 128, 256, 512]


def chain(*widths: int, classes: int = 3) -> Layout:
    """Linear layers fc0, fc1, ... behind one input, and `head` with a fixed group of classes."""
    names = [f"fc{i}" for i in range(len(widths))] + ["head"]
    groups: dict[str, range] = {}
    axes: dict[str, tuple[np.ndarray | None, ...]] = {}
    before: np.ndarray | None = None
    start = 0
    for name, width in zip(names, [*widths, classes], strict=True):
        groups[name] = range(start, start + width)
        units = np.arange(start, start + width)
        axes[f"{name}.weight"], axes[f"{name}.bias"] = (units, before), (units,)
        before, start = units, start + width
    shapes = {n: tuple(1 if u is None else len(u) for u in a) for n, a in axes.items()}
    return Layout(groups, axes, shapes, frozenset({"head"}))


def kept(layout: Layout, submodel: Submodel) -> dict[str, list[int]]:
    """Positions kept in each group."""
    return {g: np.flatnonzero(submodel.units[s.start : s.stop]).tolist() for g, s in layout.groups.items()}


@pytest.mark.parametrize(
    ("ratio", "size", "rounding", "expected"),
    [
        (0.07, 100, "ceil", 7),  # in binary 7.000000000000001; the released HeteroFL code gets 8
        (0.14, 50, "ceil", 7),
        (0.55, 100, "ceil", 55),
        (0.57, 100, "floor", 57),  # in binary 56.99999999999999
        (0.29, 100, "floor", 29),
        (0.4, 6, "ceil", 3),
        (0.4, 6, "floor", 2),
        (1e-6, 4, "floor", 1),
        (1.0, 7, "ceil", 7),
    ],
)
def test_kept_units_survives_binary_fractions(ratio: float, size: int, rounding: str, expected: int) -> None:
    assert kept_units(ratio, size, rounding) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (1 / 2, [32, 64, 128, 256]),
        (1 / 4, [16, 32, 64, 128]),
        (1 / 8, [8, 16, 32, 64]),
        (1 / 16, [4, 8, 16, 32]),
        (0.2, [13, 26, 52, 103]),  # FjORD's
        (0.4, [26, 52, 103, 205]),
        (0.6, [39, 77, 154, 308]),
        (0.8, [52, 103, 205, 410]),
    ],
)
def test_widths_of_the_papers(ratio: float, expected: list[int]) -> None:
    assert [kept_units(ratio, width) for width in WIDTHS] == expected


def test_kept_units_is_monotone_and_in_range() -> None:
    ratios = np.linspace(0.01, 1, 100)
    for size in (1, 2, 6, 100, 513):
        counts = [kept_units(float(r), size) for r in ratios]
        assert counts == sorted(counts)
        assert counts[0] >= 1
        assert counts[-1] == size
        assert all(kept_units(float(r), size, "floor") <= c for r, c in zip(ratios, counts, strict=True))


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.01, float("nan")])
def test_kept_units_refuses_ratios_outside_zero_one(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\]"):
        kept_units(ratio, 8)


def test_prefix_keeps_the_first_units_and_leaves_the_rest_whole() -> None:
    layout = chain(4, 5, 6)
    assert kept(layout, prefix(layout, {"fc0": 2, "fc2": 1, "head": 1})) == {
        "fc0": [0, 1],
        "fc1": [0, 1, 2, 3, 4],
        "fc2": [0],
        "head": [0, 1, 2],
    }


@pytest.mark.parametrize("size", [0, 5, -1])
def test_prefix_refuses_impossible_sizes(size: int) -> None:
    with pytest.raises(ValueError, match=rf"group 'fc0' has 4 units; expected to keep 1..4, got {size}"):
        prefix(chain(4), {"fc0": size})


def test_prefixes_are_nested() -> None:
    layout = chain(7, 12)
    submodels = [prefix_ratio(layout, r).units for r in (1, 0.5, 0.25, 0.125, 0.0625)]
    assert submodels[0].all()
    for larger, smaller in itertools.pairwise(submodels):
        assert (smaller <= larger).all()
        assert smaller.sum() < larger.sum()


def test_prefix_is_the_leading_block_of_every_tensor() -> None:
    layout = chain(4, 6)
    rng = np.random.default_rng(0)
    arrays = {n: rng.normal(size=s).astype(np.float32) for n, s in layout.shapes.items()}
    part = extract(layout, prefix_ratio(layout, 0.5), arrays)
    np.testing.assert_array_equal(part["fc1.weight"], arrays["fc1.weight"][:3, :2])
    np.testing.assert_array_equal(part["head.weight"], arrays["head.weight"][:, :3])


@pytest.mark.parametrize(
    ("start", "forward", "backward"),
    [
        (0, [0, 1, 2, 3], [0, 1, 2, 3]),
        (1, [1, 2, 3, 4], [0, 1, 2, 7]),
        (4, [4, 5, 6, 7], [4, 5, 6, 7]),
        (5, [0, 5, 6, 7], [3, 4, 5, 6]),
        (6, [0, 1, 6, 7], [2, 3, 4, 5]),
        (7, [0, 1, 2, 7], [1, 2, 3, 4]),
        (8, [0, 1, 2, 3], [0, 1, 2, 3]),
    ],
)
def test_window_of_the_worked_example(start: int, forward: list[int], backward: list[int]) -> None:
    layout = chain(8)
    assert kept(layout, window(layout, 0.5, start))["fc0"] == forward
    assert kept(layout, window(layout, 0.5, start, step=-1))["fc0"] == backward


@pytest.mark.parametrize(("start", "expected"), [(4, [0, 4, 5]), (5, [0, 1, 5]), (6, [0, 1, 2])])
def test_window_rounds_its_width_up(start: int, expected: list[int]) -> None:
    layout = chain(6)
    assert kept(layout, window(layout, 0.4, start))["fc0"] == expected


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("first", [0, 3, 1000])
def test_window_uses_every_unit_equally_often(first: int, step: int) -> None:
    layout = chain(8)
    uses = sum(window(layout, 0.5, first + j, step).units[:8].astype(int) for j in range(8))
    assert np.array_equal(uses, np.full(8, 4))


def test_window_has_each_group_start_modulo_its_own_width_and_keeps_classes() -> None:
    layout = chain(4, 6)
    assert kept(layout, window(layout, 0.5, 5)) == {"fc0": [1, 2], "fc1": [0, 1, 5], "head": [0, 1, 2]}


def test_windows_of_one_round_are_nested_and_a_whole_one_is_everything() -> None:
    layout = chain(7, 16)
    for start in range(20):
        larger, smaller = (window(layout, r, start).units for r in (0.5, 0.25))
        assert (smaller <= larger).all()
        assert window(layout, 1.0, start).units.all()


def test_top_keeps_the_best_and_the_lower_number_of_equals() -> None:
    layout = chain(4, 2)
    scores = np.array([1.0, 3, 3, 2, 5, 5, 0, 0, 0])
    assert kept(layout, top(layout, scores, 0.5)) == {"fc0": [1, 2], "fc1": [0], "head": [0, 1, 2]}


def test_top_of_falling_scores_is_the_prefix() -> None:
    layout = chain(6, 5)
    scores = -np.arange(layout.num_units, dtype=np.float64)
    assert np.array_equal(top(layout, scores, 0.5).units, prefix_ratio(layout, 0.5).units)


def test_ratio_groups_default_to_the_layouts_groups_that_may_be_cut() -> None:
    layout = chain(4, 6)
    groups = ratio_groups(layout, nn.Identity())
    assert groups == (RatioGroup("fc0", ("fc0",), {"fc0": 1}), RatioGroup("fc1", ("fc1",), {"fc1": 1}))
    assert ratio_widths(layout, groups, (0.5, 0.4)) == {"fc0": 2, "fc1": 2}


def test_ratio_groups_prefers_the_networks_own_table() -> None:
    network = nn.Identity()
    network.ratio_groups = (RatioGroup("both", ("fc0", "fc1"), {"fc0": 1, "fc1": 1}),)  # type: ignore[assignment]
    assert [g.name for g in ratio_groups(chain(4, 6), network)] == ["both"]


@pytest.mark.parametrize(
    ("widths", "ratio", "expected"),
    [
        ({"fc0": 1, "fc1": 6}, 0.5, {"fc0": 8, "fc1": 48}),
        ({"fc0": 1, "fc1": 6}, 0.4, {"fc0": 6, "fc1": 36}),
        ({"fc0": 1, "fc1": 6}, 0.01, {"fc0": 1, "fc1": 6}),
    ],
)
def test_ratio_widths_keep_multiples(widths: Mapping[str, int], ratio: float, expected: dict[str, int]) -> None:
    groups = (RatioGroup("block", ("fc0", "fc1"), widths),)
    assert ratio_widths(chain(16, 96), groups, (ratio,)) == expected


def test_ratio_widths_wants_one_ratio_a_group() -> None:
    layout = chain(4, 6)
    with pytest.raises(ValueError, match="expected one ratio for each of 2 ratio groups, got 1"):
        ratio_widths(layout, ratio_groups(layout, nn.Identity()), (0.5,))
