"""FlexFL's mathematics: the worked examples of its released code, and what must hold beyond them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flexfed.devices import Device
from flexfed.methods.flexfl import (
    LEVELS,
    MAIN_LEVELS,
    FlexFLConfig,
    build_pool,
    capable_level,
    distillation_loss,
    eligible,
    grid_ratios,
    kd_loss,
    keep_scores,
    largest_first,
    ratios,
    redraw,
    sized_ratios,
    strict_ratios,
    teacher_levels,
    trained_level,
)
from flexfed.models import model_factory
from flexfed.select import RatioGroup, prefix, ratio_groups, ratio_widths
from flexfed.submodel import narrow_shapes
from flexfed.units import build_on_meta, trace_layout

DEFAULT = FlexFLConfig()
SIZES = [100 * target for target in DEFAULT.level_targets]
Params = Callable[[Sequence[int]], list[int]]
"""Widths -> number of parameters of each group, the classifier in none."""


# --- Networks as closed forms ---


def toy_cnn(w: Sequence[int]) -> list[int]:
    """conv3x3 from 1 channel, conv3x3, global pool, linear; all with a bias."""
    return [9 * w[0] + w[0], 9 * w[0] * w[1] + w[1], w[1] * w[2] + w[2]]


def toy_mlp(w: Sequence[int]) -> list[int]:
    return [before * width + width for before, width in zip([20, *w], w, strict=False)]


def vgg(w: Sequence[int]) -> list[int]:
    convs = [9 * a * b + 3 * b for a, b in zip([3, *w], w[:13], strict=False)]
    return [*convs, w[12] * w[13] + w[13], w[13] * w[14] + w[14]]


def resnet(w: Sequence[int]) -> list[int]:
    def stage(before: int, width: int, blocks: int) -> int:
        first = 9 * before * width + before * width + 9 * width**2 + 6 * width
        return first + (blocks - 1) * (18 * width**2 + 4 * width)

    return [29 * w[0], *(stage(a, b, n) for (a, b), n in zip(pairwise(w), (3, 4, 6, 3), strict=True))]


def mobilenet(w: Sequence[int]) -> list[int]:
    def block(before: int, width: int, expansion: int) -> int:
        hidden = expansion * before
        return (before + 3) * hidden + 12 * hidden + (hidden + 3) * width

    def stage(before: int, width: int, blocks: int, expansion: int) -> int:
        return block(before, width, expansion) + (blocks - 1) * block(width, width, expansion)

    shape = zip(pairwise(w[:8]), (1, 2, 3, 4, 3, 3, 1), (1, 6, 6, 6, 6, 6, 6), strict=True)
    return [30 * w[0], *(stage(a, b, n, t) for (a, b), n, t in shape), (w[7] + 3) * w[8]]


VGG = [64, 64, 128, 128, 256, 256, 256, *[512] * 6, 4096, 4096]
RESNET = [64, 96, 128, 256, 512]
MOBILENET = [32, 16, 24, 32, 64, 96, 160, 320, 1280]
NETS: dict[str, tuple[Params, list[int]]] = {
    "toy-cnn": (toy_cnn, [8, 16, 32]),
    "toy-mlp": (toy_mlp, [64, 64, 32]),
    "flexfl-vgg16": (vgg, VGG),
    "flexfl-resnet34": (resnet, RESNET),
    "flexfl-mobilenetv2": (mobilenet, MOBILENET),
}


def scores_in(text: str) -> list[float]:
    return [float(f"0.{digits}") for digits in text.split(".")[1:]]


# Measured by the released code (after pre-training on CIFAR-10 and CIFAR-100).
VGG_10 = scores_in(
    ".506486.513375.650306.617753.634784.594907.564836.606517.603570.588370.589039.810356.963604.994022.805089"
)
VGG_100 = scores_in(
    ".499528.517142.601209.579011.653108.634584.597631.609692.595757.608269.699663.780443.985472.974234.884701"
)
RESNET_10 = scores_in(".568683.652521.601708.760380.906074")
RESNET_100 = scores_in(".497636.527974.518450.590471.659431")
MOBILENET_10 = scores_in(".524102.543859.587157.583756.626427.669004.667179.670586.994986")
MOBILENET_100 = scores_in(".498971.493300.500852.500632.522359.535203.558608.618086.898470")


def floor_widths(full: Sequence[int], found: np.ndarray) -> list[int]:
    return [max(1, math.floor(width * ratio)) for width, ratio in zip(full, found, strict=True)]


def size_of(params: Params, full: Sequence[int], found: np.ndarray) -> float:
    return sum(params(floor_widths(full, found))) / sum(params(full))


def problem(net: str, apoz: Sequence[float]) -> tuple[np.ndarray, Callable[[np.ndarray], float], list[int]]:
    """Keep-scores, size function and full widths."""
    params, full = NETS[net]
    return keep_scores(apoz, params(full)), partial(size_of, params, full), full


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split()]


# --- Scores and widths ---


@pytest.mark.parametrize(
    ("net", "apoz", "expected"),
    [
        ("toy-cnn", (0.40, 0.55, 0.80), (0.751834, 0.450000, 0.286546)),
        ("toy-cnn", (0.625, 0.5625, 0.90), (0.612240, 0.437500, 0.197364)),
        ("toy-mlp", (0.5, 0.7, 0.9), (0.567792, 0.300000, 0.174860)),
    ],
)
def test_keep_scores(net: str, apoz: Sequence[float], expected: Sequence[float]) -> None:
    scores, _, _ = problem(net, apoz)
    np.testing.assert_allclose(scores, expected, atol=5e-7)


TOYS = [
    ("toy-cnn", (0.40, 0.55, 0.80), "grid", ["6 7 10", "7 9 12", "8 10 13", "8 16 26"],
     [0.292969, 0.427455, 0.531808, 0.943080]),
    ("toy-cnn", (0.40, 0.55, 0.80), "strict", ["5 7 9", "7 8 11", "8 9 12", "8 16 21"],
     [0.247768, 0.380022, 0.478237, 0.895647]),
    ("toy-cnn", (0.625, 0.5625, 0.90), "grid", ["5 8 7", "6 10 9", "7 11 10", "8 16 26"],
     [0.268415, 0.395647, 0.498884, 0.943080]),
    ("toy-mlp", (0.5, 0.7, 0.9), "grid", ["46 24 7", "59 31 9", "64 37 10", "64 64 26"],
     [0.299182, 0.446598, 0.544436, 0.948576]),
    ("toy-mlp", (0.5, 0.7, 0.9), "strict", ["41 21 6", "55 29 8", "63 33 9", "64 64 20"],
     [0.247231, 0.398075, 0.493275, 0.897152]),
]  # fmt: skip


@pytest.mark.parametrize(("net", "apoz", "sizes", "widths", "shares"), TOYS)
def test_pool_of_toy_networks(
    net: str, apoz: Sequence[float], sizes: Any, widths: Sequence[str], shares: Sequence[float]
) -> None:
    scores, size, full = problem(net, apoz)
    pool = build_pool(scores, size, FlexFLConfig(sizes=sizes))
    assert [floor_widths(full, found) for found in pool] == [*map(numbers, widths), full]
    np.testing.assert_allclose([size(found) for found in pool], [*shares, 1.0], atol=5e-7)


def test_strength_is_the_released_one() -> None:
    scores, size, _ = problem("toy-cnn", (0.40, 0.55, 0.80))
    for target, strength in ((0.25, 90), (0.40, 76), (0.50, 66), (0.90, 34)):
        np.testing.assert_array_equal(grid_ratios(scores, target, 0.05, size), ratios(scores, strength))
    np.testing.assert_allclose(ratios(scores, 90), [0.835371, 0.5, 0.318385], atol=5e-7)


SAME = {"vgg": "64 64 128 128 256 256 256 512 512 512 512", "mobile": "32 16 24 32 64 96 160 320"}
REAL = [
    ("flexfl-vgg16", VGG_10, [
        (58, 9863336, "64 64 123 123 229 231 242 432 412 424 424 251 132 918 1376"),
        (41, 15018009, SAME["vgg"] + " 356 187 1299 1947"),
        (31, 18076339, SAME["vgg"] + " 471 247 1719 2575"),
        (15, 31094845, SAME["vgg"] + " 512 511 3553 4096"),
    ]),
    ("flexfl-resnet34", RESNET_10, [
        (37, 6295247, "64 96 128 186 129"),
        (28, 9687995, "64 96 128 246 171"),
        (20, 11668896, "64 96 128 256 240"),
        (10, 20062656, "64 96 128 256 480"),
    ]),
    ("flexfl-mobilenetv2", MOBILENET_10, [
        (63, 661980, "32 16 22 27 44 57 84 180 108"),
        (51, 987075, "32 16 24 32 55 71 104 222 134"),
        (45, 1232847, "32 16 24 32 62 80 118 252 151"),
        (8, 2104450, SAME["mobile"] + " 854"),
    ]),
    ("flexfl-vgg16", VGG_100, [
        (54, 10066487, "295 123 1118 874"),
        (37, 15066673, "431 180 1632 1276"),
        (26, 18364975, "512 257 2322 1816"),
        (13, 31704688, "512 512 4096 3632"),
    ]),
    ("flexfl-resnet34", RESNET_100, [
        (73, 6299100, "64 76 97 151 238"),
        (59, 9664221, "64 94 121 187 295"),
        (53, 11797170, "64 96 128 209 329"),
        (36, 20246472, "64 96 128 256 484"),
    ]),
    ("flexfl-mobilenetv2", MOBILENET_100, [(82, 657565, "29 14 18 23 41 58 86 158 226")]),
]  # fmt: skip
SHARES_10 = {
    "flexfl-vgg16": (0.2935, 0.4469, 0.5379, 0.9253),
    "flexfl-resnet34": (0.2918, 0.4491, 0.5409, 0.9300),
    "flexfl-mobilenetv2": (0.2953, 0.4403, 0.5499, 0.9386),
}


@pytest.mark.parametrize(("net", "apoz", "expected"), REAL)
def test_pool_of_the_papers_networks(net: str, apoz: Sequence[float], expected: Sequence[tuple[int, int, str]]) -> None:
    scores, size, full = problem(net, apoz)
    pool = build_pool(scores, size, DEFAULT)
    params = NETS[net][0]
    for found, (strength, count, last_widths) in zip(pool, expected, strict=False):
        np.testing.assert_array_equal(found, ratios(scores, strength))
        widths = floor_widths(full, found)
        assert sum(params(widths)) == count
        assert widths[-len(numbers(last_widths)) :] == numbers(last_widths)
    if apoz in (VGG_10, RESNET_10, MOBILENET_10):
        np.testing.assert_allclose([size(found) for found in pool[:-1]], SHARES_10[net], atol=5e-5)


def measured_size(net: str) -> tuple[list[int], Callable[[np.ndarray], float], tuple[RatioGroup, ...]]:
    """Parameters of each group and the size function, counted on the network itself."""
    factory = model_factory(net, 10, (3, 32, 32))
    layout = trace_layout(factory, (3, 32, 32))
    groups = ratio_groups(layout, build_on_meta(factory))

    def parameters(found: np.ndarray) -> list[int]:
        shapes = narrow_shapes(layout, prefix(layout, ratio_widths(layout, groups, found.tolist())))
        owners = [tuple(f"{module}." for module in group.modules) for group in groups]
        return [sum(math.prod(s) for n, s in shapes.items() if n.startswith(owner)) for owner in owners]

    whole = parameters(np.ones(len(groups)))
    return whole, lambda found: sum(parameters(found)) / sum(whole), groups


@pytest.mark.parametrize(("net", "apoz"), [(net, apoz) for net, apoz, _ in REAL[:3]])
def test_networks_give_the_same_pool_as_their_closed_forms(net: str, apoz: Sequence[float]) -> None:
    scores, size, full = problem(net, apoz)
    whole, counted, groups = measured_size(net)
    assert whole == NETS[net][0](full)
    pool = build_pool(keep_scores(apoz, whole), counted, DEFAULT, [group.name for group in groups])
    for ours, closed in zip(pool, build_pool(scores, size, DEFAULT), strict=True):
        np.testing.assert_array_equal(ours, closed)
        assert counted(ours) == size(closed)


# --- What must hold for any scores ---


def random_problems() -> list[tuple[np.ndarray, Callable[[np.ndarray], float], list[int]]]:
    rng = np.random.default_rng(0)
    return [
        problem(net, rng.uniform(0.2, 0.95, len(NETS[net][1])).tolist())
        for net in ("toy-mlp", "flexfl-resnet34", "flexfl-mobilenetv2", "flexfl-vgg16")
        for _ in range(3)
    ]


@pytest.mark.parametrize("sizes", ["grid", "strict"])
def test_levels_are_nested_and_not_uniform(sizes: Any) -> None:
    for scores, size, full in random_problems():
        pool = build_pool(scores, size, FlexFLConfig(sizes=sizes))
        assert len(pool) == len(LEVELS)
        assert all((small <= large).all() for small, large in pairwise(pool))
        widths = [floor_widths(full, found) for found in pool]
        assert all(a <= b for small, large in pairwise(widths) for a, b in zip(small, large, strict=True))
        assert pool[0].max() / pool[0].min() > 1
        np.testing.assert_array_equal(pool[-1], 1)


def test_grid_takes_the_first_strength_in_the_window() -> None:
    for scores, size, _ in random_problems():
        for target in DEFAULT.level_targets[:-1]:
            hits = (ratios(scores, g) for g in range(1, 200))
            first = next((r for r in hits if target - 0.05 <= size(r) <= target + 0.05), None)
            found = grid_ratios(scores, target, 0.05, size)
            np.testing.assert_array_equal(found, first)
            assert found is None or abs(size(found) - target) <= 0.05


def test_strict_stays_within_the_target_and_one_step_more_exceeds_it() -> None:
    for scores, size, _ in random_problems():
        for target in DEFAULT.level_targets[:-1]:
            found = strict_ratios(scores, target, size, ())
            assert size(found) <= target
            free = np.flatnonzero((found < 1) & (found > 0.01))[0]
            strength = 100 * scores[free] / found[free]
            assert size(ratios(scores, strength * (1 - 1e-9))) > target


def test_silence_never_raises_a_score_and_strength_never_raises_a_ratio() -> None:
    apoz = np.array([0.3, 0.5, 0.7])
    before = keep_scores(apoz, [100, 1000, 500])
    for group in range(3):
        louder = apoz + 0.1 * np.eye(3)[group]
        change = keep_scores(louder, [100, 1000, 500]) - before
        assert change[group] < 0
        assert (np.delete(change, group) == 0).all()
    steps = np.array([ratios(before, g) for g in range(1, 200)])
    assert (np.diff(steps, axis=0) <= 0).all()
    assert steps.min() >= 0.01
    assert steps.max() == 1


def test_equal_scores_cut_nearly_uniformly_and_a_loud_group_not_at_all() -> None:
    scores, _, _ = problem("toy-cnn", [0.5] * 3)
    assert scores.max() - scores.min() < 0.25
    assert keep_scores([0.0, 0.5], [10, 10])[0] == 1
    assert keep_scores([0.0], [1]) == 1


def test_one_group() -> None:
    size = partial(size_of, lambda w: [10 * w[0]], [100])
    pool = build_pool(keep_scores([0.5], [1000]), size, DEFAULT)
    assert [floor_widths([100], found)[0] for found in pool] == [30, 45, 55, 94, 100]


def test_two_units_fall_back_to_strict_sizes(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr("flexfed.methods.flexfl._log", logging.getLogger("test"))
    size = partial(size_of, lambda w: [1, 6 * w[0] + 10 * w[1]], [2, 2])
    scores = keep_scores([0.5, 0.5], [12, 20])
    with caplog.at_level(logging.WARNING):
        pool = build_pool(scores, size, FlexFLConfig(targets=(0.52, 0.65), window=0.01))
    assert "no strength hits 0.55, strict sizes give 0.515" in caplog.text
    assert all(size(found) <= target for found, target in zip(pool, (0.52, 0.55, 0.65), strict=False))
    assert all((small <= large).all() for small, large in pairwise(pool))


def test_silent_largest_group_stays_at_one_percent() -> None:
    scores, size, _ = problem("toy-cnn", (0.4, 1.0, 0.8))
    assert scores[1] == 0
    assert ratios(scores, 1e-9)[1] == 0.01
    with pytest.raises(ValueError, match=r"no widths reach 0\.25 .* group 'conv2' keeps 1 %"):
        build_pool(scores, size, DEFAULT, ["conv1", "conv2", "fc"])
    with pytest.raises(ValueError, match="group 1 keeps"):
        build_pool(scores, size, DEFAULT)


def test_target_below_one_unit_of_each_group() -> None:
    scores, size, _ = problem("toy-cnn", (0.4, 0.5, 0.8))
    with pytest.raises(ValueError, match=r"flexfl\.targets: 0\.01 of the network"):
        build_pool(scores, size, FlexFLConfig(targets=(0.01, 0.5), sizes="strict"))


@pytest.mark.parametrize("apoz", [[0.5], [0.5, 1.2], [0.5, math.nan]])
def test_scores_must_fit_the_groups(apoz: list[float]) -> None:
    with pytest.raises(ValueError, match=r"flexfl\.scores: expected one APoZ in \[0, 1\] for 2 groups"):
        keep_scores(apoz, [100, 200])


# --- Capacity and the level that is trained ---

SPREADS = (5.0, 8.0, 10.0)
HIGH = (10.0, 20.0, 30.0)
CLASSES = {35.0: 40, 60.0: 30, 110.0: 30}  # nominal percent -> devices of a hundred, weak first
NOMINAL = dict(enumerate(percent for percent, count in CLASSES.items() for _ in range(count)))


def free_percent(mean: float, spread: float, rng: np.random.Generator) -> float:
    return 100 * Device(0, capacity=mean / 100, capacity_spread=spread / 100).capacity_now(rng)


def test_level_boundaries_belong_to_the_level_above() -> None:
    below = [capable_level(percent - 1e-6, DEFAULT) for percent in (40, 50, 90, 100)]
    exact = [capable_level(percent, DEFAULT) for percent in (40, 50, 90, 100)]
    assert (below, exact) == ([0, 1, 2, 3], [1, 2, 3, 4])
    assert [capable_level(percent, DEFAULT) for percent in (-20.0, 0.0, 25.0, 500.0)] == [0, 0, 0, 4]
    assert capable_level(100 * 0.57, FlexFLConfig(targets=(0.4, 0.57), shortage=0.1)) == 2  # 56.99999999999999


def test_thresholds_follow_the_targets() -> None:
    config = FlexFLConfig(targets=(0.1, 0.3), shortage=0.05)
    assert config.level_targets == (0.1, 0.25, 0.3, 0.95, 1.0)
    assert [capable_level(percent, config) for percent in (24.9, 25, 30, 95, 100)] == [0, 1, 2, 3, 4]


def test_trained_is_never_more_than_dispatched_and_a_device_may_refuse() -> None:
    for level in range(5):
        for percent in (-5.0, 30.0, 45.0, 60.0, 95.0, 110.0):
            trained = trained_level(SIZES[: level + 1], percent, DEFAULT)
            assert trained == min(level, capable_level(percent, DEFAULT))
    assert trained_level(SIZES[:3], -5.0, DEFAULT) == 0
    refusing = FlexFLConfig(drop_below=25)
    assert (trained_level(SIZES, 24.9, refusing), trained_level(SIZES, 25.0, refusing)) == (None, 0)


def test_a_part_of_any_size_is_trained_where_it_fits() -> None:
    sizes = [*SIZES[:3], 71.5]  # the levels inside it, and itself
    assert [trained_level(sizes, percent, DEFAULT) for percent in (20, 45, 71.4, 71.5, 100)] == [0, 1, 2, 3, 3]


def test_sized_ratios_are_as_wide_as_a_size_allows() -> None:
    scores = np.array([1.0, 0.5, 0.0])

    def size(found: np.ndarray) -> float:
        return float(np.floor(100 * found).mean() / 100)

    sizes = [size(sized_ratios(scores, target, size, "abc")) for target in (0.05, 0.3, 0.5, 0.66)]
    assert sizes == sorted(sizes)
    assert all(found <= target for found, target in zip(sizes, (0.05, 0.3, 0.5, 0.66), strict=True))
    assert sizes[1] > 0.28
    assert size(sized_ratios(scores, 0.9, size, "abc")) == pytest.approx(2.01 / 3)  # the silent group stays at 1 %
    assert (sized_ratios(scores, 1.0, size, "abc") == 1).all()


def test_without_uncertainty_each_class_trains_its_nominal_level() -> None:
    for mean, level in ((35.0, 0), (60.0, 2), (110.0, 4)):
        assert trained_level(SIZES, free_percent(mean, 0.0, np.random.default_rng(0)), DEFAULT) == level


def trained_table(dispatched: int, mean: float, spreads: Sequence[float]) -> np.ndarray:
    """Exact probability of each trained level."""
    at_least = np.zeros(6)
    for spread in spreads:
        for level, percent in enumerate((-math.inf, 40, 50, 90, 100)):
            room = max(mean - percent, 0)
            inside = 1.0 if room == math.inf else math.erf(room / spread / math.sqrt(2))
            at_least[level] += inside / len(spreads) if level <= dispatched else 0
    return at_least[:5] - at_least[1:]


@pytest.mark.parametrize(
    ("dispatched", "mean", "spreads", "expected"),
    [
        (2, 60.0, SPREADS, (0.0193, 0.1720, 0.8086, 0, 0)),
        (4, 110.0, SPREADS, (0, 0, 0.0193, 0.1720, 0.8086)),
        (2, 60.0, HIGH, (0.2893, 0.2685, 0.4422, 0, 0)),
        (4, 110.0, HIGH, (0.0067, 0.0094, 0.2732, 0.2685, 0.4422)),
        (4, 35.0, SPREADS, (1, 0, 0, 0, 0)),
    ],
)
def test_statistics_of_trained_levels(
    dispatched: int, mean: float, spreads: Sequence[float], expected: Sequence[float]
) -> None:
    np.testing.assert_allclose(trained_table(dispatched, mean, spreads), expected, atol=6e-5)
    rng = np.random.default_rng(1)
    draws = [free_percent(mean, spread, rng) for spread in spreads for _ in range(8000)]
    assert max(draws) <= mean + 1e-9
    levels = [trained_level(SIZES[: dispatched + 1], draw, DEFAULT) for draw in draws]
    shares = [levels.count(level) / len(levels) for level in range(5)]
    np.testing.assert_allclose(shares, list(expected), atol=0.013)  # 4 sigma


# --- Dispatch ---


def test_eligibility() -> None:
    by_class = eligible(NOMINAL, DEFAULT)
    assert by_class == {0: list(range(100)), 2: list(range(40, 100)), 4: list(range(70, 100))}
    literal = eligible(NOMINAL, FlexFLConfig(eligibility="literal"))
    assert literal == {0: list(range(100)), 2: list(range(4, 100)), 4: list(range(14, 100))}
    assert eligible(dict(reversed(NOMINAL.items())), DEFAULT) == by_class
    assert eligible({7: 20.0, 3: 50.0}, DEFAULT) == {0: [3, 7], 2: [3], 4: []}


def class_shares(partitions: Sequence[int]) -> dict[float, float]:
    return {c: sum(NOMINAL[p] == c for p in partitions) / len(partitions) for c in CLASSES}


def trained_by(level: int, shares: Mapping[float, float]) -> np.ndarray:
    return sum((share * trained_table(level, mean, SPREADS) for mean, share in shares.items()), start=np.zeros(5))


def redraw_table(able: Mapping[int, Sequence[int]], num: int) -> np.ndarray:
    """Exact share of trained levels when everything is redrawn until the devices differ (sets are nested)."""
    sizes = {level: len(partitions) for level, partitions in able.items()}
    middle = [p for p in able[2] if p not in set(able[4])]
    table, total = np.zeros(5), 0.0
    for large in range(num + 1):
        for medium in range(num + 1 - large):
            small = num - large - medium
            ways = math.comb(num, large) * math.comb(num - large, medium) * math.perm(sizes[4], large)
            ways *= math.perm(sizes[2] - large, medium) * math.perm(sizes[0] - large - medium, small)
            weight = ways / (sizes[4] ** large * sizes[2] ** medium * sizes[0] ** small)
            inner, outer = class_shares(able[4]), class_shares(middle) if middle else {}
            part = len(middle) / max(sizes[2] - large, 1)
            row = large * trained_by(4, inner) + medium * (1 - part) * trained_by(2, inner)
            row += medium * part * trained_by(2, outer) + small * np.eye(5)[0]
            table, total = table + weight * row, total + weight * num
    return table / total


SLOTS = {
    "literal": ((0.5634, 0.0379, 0.2847, 0.0200, 0.0940), (0.5649, 0.0378, 0.2837, 0.0199, 0.0937)),
    "class": ((0.3366, 0.0287, 0.3079, 0.0573, 0.2695), (0.3521, 0.0302, 0.3067, 0.0546, 0.2565)),
}


@pytest.mark.parametrize("eligibility", ["literal", "class"])
def test_redraw_trains_the_published_mix_of_levels(eligibility: Any) -> None:
    able = eligible(NOMINAL, FlexFLConfig(eligibility=eligibility))
    independent = sum(trained_by(level, class_shares(able[level])) for level in MAIN_LEVELS) / 3
    np.testing.assert_allclose(independent, SLOTS[eligibility][0], atol=6e-5)
    np.testing.assert_allclose(redraw_table(able, 10), SLOTS[eligibility][1], atol=6e-5)

    rng, table, num = np.random.default_rng(2), np.zeros(5), 0
    mix = {(level, mean): trained_table(level, mean, SPREADS) for level in MAIN_LEVELS for mean in CLASSES}
    for _ in range(2500):
        chosen = redraw(able, 10, rng)
        assert len(chosen) == 10
        num += len(chosen)
        table += sum(mix[level, NOMINAL[partition]] for partition, level in chosen.items())
    np.testing.assert_allclose(table / num, SLOTS[eligibility][1], atol=0.01)  # 3 sigma


@pytest.mark.parametrize("dispatch", [largest_first, redraw])
def test_dispatch_is_sound_and_repeatable(dispatch: Callable[..., dict[int, int]]) -> None:
    able = eligible(NOMINAL, DEFAULT)
    for seed in range(50):
        chosen = dispatch(able, 10, np.random.default_rng([seed, 1]))
        assert len(chosen) == 10
        assert list(chosen) == sorted(chosen)
        assert set(chosen.values()) <= set(MAIN_LEVELS)
        assert all(partition in able[level] for partition, level in chosen.items())
        assert dispatch(able, 10, np.random.default_rng([seed, 1])) == chosen


def test_largest_first_keeps_the_drawn_levels_while_devices_last() -> None:
    able = eligible(NOMINAL, DEFAULT)
    levels = [level for s in range(600) for level in largest_first(able, 10, np.random.default_rng(s)).values()]
    np.testing.assert_allclose(np.bincount(levels, minlength=5) / len(levels), [1 / 3, 0, 1 / 3, 0, 1 / 3], atol=0.025)


def test_largest_first_drops_levels_nobody_is_left_for() -> None:
    small_fleet = {p: 35.0 if p < 12 else 60.0 if p < 18 else 110.0 for p in range(20)}
    able = eligible(small_fleet, DEFAULT)
    rounds = [largest_first(able, 10, np.random.default_rng(seed)) for seed in range(200)]
    large = [sum(level == 4 for level in chosen.values()) for chosen in rounds]
    assert max(large) == 2
    assert np.mean(large) > 1.8
    assert min(len(chosen) for chosen in rounds) < 10
    assert largest_first({0: [5], 2: [], 4: []}, 30, np.random.default_rng(0)) == {5: 0}


@pytest.mark.parametrize("num", [1, 10, 60])
def test_largest_first_draws_as_if_it_looked_for_free_devices_anew_each_time(num: int) -> None:
    """And looks once a level: with 10,000 devices anew each time is 100 million comparisons."""
    for seed in range(50):
        sizes = np.random.default_rng(seed).integers(0, 25, size=3)
        able = {level: list(range(3, 3 + int(size))) for level, size in zip((0, 2, 4), sizes, strict=True)}
        looked = {level: Looked(devices) for level, devices in able.items()}
        rng = np.random.default_rng([seed, 1])
        expected: dict[int, int] = {}
        for level in sorted(rng.choice([0, 2, 4], size=num).tolist(), reverse=True):
            if free := [p for p in able[level] if p not in expected]:
                expected[free[int(rng.integers(len(free)))]] = level
        assert largest_first(looked, num, np.random.default_rng([seed, 1])) == dict(sorted(expected.items()))
        assert max(devices.times for devices in looked.values()) <= 1


class Looked(list[int]):
    """Counts how often it is looked through."""

    times = 0

    def __iter__(self) -> Iterator[int]:
        self.times += 1
        return super().__iter__()


def test_redraw_gives_up_where_devices_cannot_differ() -> None:
    assert redraw({0: [1, 2], 2: [2], 4: []}, 9, np.random.default_rng(0)).keys() == {1, 2}
    chosen = redraw({0: list(range(5)), 2: [], 4: []}, 5, np.random.default_rng(0), attempts=3)
    assert 0 < len(chosen) < 5


# --- Distillation ---


def logits(*rows: Sequence[float], grad: bool = False) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, requires_grad=grad)


STUDENT = ((2.0, 1.0, 0.0), (0.0, 1.0, 3.0))
TEACHERS = (logits((1, 1, 1), (0, 2, 1)), logits((3, 0, 0), (1, 0, 2)))
LABELS = torch.tensor([0, 2])


def test_distillation_loss_and_gradient() -> None:
    student = logits(*STUDENT, grad=True)
    assert distillation_loss(student, LABELS, (), DEFAULT).item() == pytest.approx(0.288726, abs=5e-7)
    parts = [kd_loss(student, [t], 3, 1, "literal").item() for t in TEACHERS]
    assert parts == pytest.approx([0.202922, 0.124184], abs=5e-7)
    loss = distillation_loss(student, LABELS, TEACHERS, DEFAULT)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(1.924257, abs=5e-7)
    expected = logits((-0.198801, 0.365787, -0.166986), (-0.380164, -0.275068, 0.655232))
    torch.testing.assert_close(student.grad, expected, atol=1e-6, rtol=0)


def test_batchmean_and_its_own_weight() -> None:
    student = logits(*STUDENT)
    parts = [kd_loss(student, [t], 3, 1, "batchmean").item() for t in TEACHERS]
    assert parts == pytest.approx([0.608766, 0.372553], abs=2e-6)
    batchmean = FlexFLConfig(kd_reduction="batchmean", kd_weight=10)
    assert distillation_loss(student, LABELS, TEACHERS, batchmean).item() == pytest.approx(5.195319, abs=5e-7)
    own = distillation_loss(student, LABELS, TEACHERS, FlexFLConfig(kd_reduction="batchmean"))
    torch.testing.assert_close(own, distillation_loss(student, LABELS, TEACHERS, DEFAULT))


@pytest.mark.parametrize(("reduction", "divisor"), [("literal", 6), ("batchmean", 2)])
def test_kd_agrees_with_torch(reduction: str, divisor: int) -> None:
    student, teacher = logits(*STUDENT), TEACHERS[0]
    softened = torch.log_softmax(student / 2, 1), torch.softmax(teacher / 2, 1)
    oracle = 4 * torch.nn.functional.kl_div(*softened, reduction="sum") / divisor
    torch.testing.assert_close(kd_loss(student, [teacher], 2, 1, reduction), oracle)


def test_kd_is_zero_for_equal_logits_no_teachers_or_no_weight() -> None:
    student = logits(*STUDENT, grad=True)
    assert kd_loss(student, [logits(*STUDENT)], 3, 10, "literal").item() == 0
    assert kd_loss(student, [], 3, 10, "literal").item() == 0
    plain = torch.nn.functional.cross_entropy(student, LABELS)
    assert distillation_loss(student, LABELS, TEACHERS, FlexFLConfig(kd_weight=0)).item() == plain.item()


def test_a_fractional_weight_counts() -> None:
    student = logits(*STUDENT)
    half = kd_loss(student, TEACHERS, 3, 0.5, "literal")
    torch.testing.assert_close(half, kd_loss(student, TEACHERS, 3, 10, "literal") / 20)


def test_no_gradient_reaches_a_teacher() -> None:
    weight = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    kd_loss(logits(*STUDENT, grad=True), [TEACHERS[0] * weight], 3, 10, "literal").backward()  # type: ignore[no-untyped-call]
    assert weight.grad is None


def test_teachers_are_the_smaller_levels() -> None:
    assert [teacher_levels(level, DEFAULT) for level in range(5)] == [
        (),
        (0,),
        (0, 1),
        (0, 1, 2),
        (0, 1, 2, 3),
    ]
    main = FlexFLConfig(kd_teachers="main")
    assert [teacher_levels(level, main) for level in range(5)] == [(), (0,), (0,), (0, 2), (0, 2)]


# --- Configuration ---


def test_default_targets() -> None:
    assert DEFAULT.level_targets == (0.25, 0.4, 0.5, 0.9, 1.0)


@pytest.mark.parametrize(
    ("knob", "message"),
    [
        ({"targets": (0.25,)}, r"flexfl\.targets must be two rising sizes .*, got \(0\.25,\)"),
        ({"targets": (0.5, 0.25)}, r"flexfl\.targets must be two rising sizes"),
        ({"targets": (0.0, 0.25)}, r"flexfl\.targets must be two rising sizes"),
        ({"shortage": 0.3}, r"flexfl\.shortage must be such that S <= M- .*, got 0\.3"),
        ({"shortage": -0.1}, r"flexfl\.shortage must be"),
        ({"window": -0.1}, r"flexfl\.window must be in \[0, 1\), got -0\.1"),
        ({"scores": (0.5, 1.5)}, r"flexfl\.scores must be APoZ values in \[0, 1\]"),
        ({"kd_weight": -2}, r"flexfl\.kd-weight must be >= 0, or -1 for its default, got -2"),
        ({"kd_temperature": 0}, r"flexfl\.kd-temperature must be > 0, got 0"),
        ({"drop_below": 120}, r"flexfl\.drop-below must be a percentage"),
        ({"pretrain_epochs": -1}, r"flexfl\.pretrain-epochs must be >= 0"),
        ({"sizes": "exact"}, r"flexfl\.sizes must be one of grid, strict, got 'exact'"),
        ({"kd_reduction": "mean"}, r"flexfl\.kd-reduction must be one of literal, batchmean"),
        ({"kd_teachers": "none"}, r"flexfl\.kd-teachers must be one of all, main"),
        ({"dispatch": "random"}, r"flexfl\.dispatch must be one of largest-first, redraw"),
        ({"eligibility": "all"}, r"flexfl\.eligibility must be one of class, literal"),
        ({"proxy_source": "train"}, r"flexfl\.proxy-source must be one of proxy, test"),
    ],
)
def test_impossible_configurations(knob: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlexFLConfig(**knob)


def test_a_shortage_may_use_up_the_whole_distance() -> None:
    assert FlexFLConfig(targets=(0.4, 0.5)).level_targets[:2] == (0.4, 0.4)
