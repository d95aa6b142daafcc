"""AutoFLIP's mathematics: the paper page's worked examples (section 6) and invariants (section 5)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toy import Ties, random_arrays

from flexfed.methods.autoflip import AutoFLIPConfig, Patience, momentum_step
from flexfed.methods.autoflip_masks import (
    Deviations,
    agreed_scores,
    guidance,
    keep_above,
    mean_deviations,
    num_pruned,
    random_scores,
    squared_deviations,
)
from flexfed.methods.autoflip_units import (
    close,
    covered,
    masked_part,
    producers,
    unit_means,
    without_least_units,
)
from flexfed.models import model_factory
from flexfed.narrowing import narrow
from flexfed.networks import build_on_meta
from flexfed.submodel import Submodel, extract, full
from flexfed.units import Arrays, Layout, trace_layout

NAMES = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
MOVED = {
    1: ([[-0.3, 0.3, 0.7], [0.5, -0.5, 0.2]], [-0.4, -0.2], [[0, 0.3], [-0.5, -0.4]], [-0.2, 0.5]),
    2: ([[0.4, 0.4, 0.4], [-0.4, 0, -0.1]], [-0.5, -0.6], [[-0.4, 0.5], [0.7, 0.4]], [-0.2, -0.4]),
    3: ([[-0.6, -0.1, -0.7], [0, 0.3, -0.7]], [0.3, 0], [[-0.6, -0.1], [0.1, 0.6]], [-0.2, -0.1]),
}
W0 = ([[0.5, -0.4, 0.3], [-0.2, 0.1, 0.6]], [0.1, -0.1], [[0.7, -0.5], [0.2, 0.4]], [0, 0.05])


def named(values: Any, dtype: Any = np.float64) -> Arrays:
    return {name: np.array(value, dtype=dtype) for name, value in zip(NAMES, values, strict=True)}


def explorer(client: int, weight: float = 1.0) -> Deviations:
    zeros = {name: np.zeros_like(array) for name, array in named(MOVED[client]).items()}
    return Deviations(weight, squared_deviations(zeros, named(MOVED[client])))


def explorers(*clients: int) -> list[Deviations]:
    return [explorer(client) for client in clients]


def assert_near(got: Mapping[str, np.ndarray], expected: Any, tolerance: float = 1e-6) -> None:
    assert list(got) == list(NAMES)
    for name, array in named(expected).items():
        np.testing.assert_allclose(got[name], array, atol=tolerance, rtol=0, err_msg=name)


def assert_masks(got: Mapping[str, np.ndarray], expected: Any) -> None:
    for name, array in named(expected, bool).items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


# --- 6.1: guidance, threshold, mask -----------------------------------------------------------------------------


def test_deviations_of_the_worked_example_are_averaged() -> None:
    mean = mean_deviations(explorers(1, 2, 3))
    expected = ([[0.61, 0.26, 1.14], [0.41, 0.34, 0.54]], [0.5, 0.4], [[0.52, 0.35], [0.75, 0.68]], [0.12, 0.42])
    assert_near({name: 3 * array for name, array in mean.items()}, expected)
    assert all(array.dtype == np.float64 for array in mean.values())


def test_guidance_of_the_worked_example() -> None:
    expected = (
        [[0.397727, 0, 1], [0.170455, 0.090909, 0.318182]],
        [1, 0],
        [[0.425, 0], [1, 0.825]],
        [0, 1],
    )
    assert_near(guidance(mean_deviations(explorers(1, 2, 3))), expected)


def test_robust_guidance_of_the_worked_example() -> None:
    found = guidance(mean_deviations(explorers(1, 2, 3)), "robust")
    expected = [[0.851064, -0.638298, 3.106383], [0, -0.297872, 0.553191]]
    np.testing.assert_allclose(found["fc1.weight"], expected, atol=1e-6)
    assert all((array == 0).any() for array in found.values())  # each lower median


ALL = ([[1, 0, 1], [1, 1, 1]], [1, 0], [[1, 0], [1, 1]], [0, 1])
CASES: dict[str, tuple[float, tuple[int, ...], Any, float, int, Any]] = {
    "all, 0.3": (0.3, (1, 2, 3), "minmax", 0.08181818, 4, ALL),
    "all, 0.5": (0.5, (1, 2, 3), "minmax", 0.35795455, 7, ([[1, 0, 1], [0, 0, 0]], [1, 0], [[1, 0], [1, 1]], [0, 1])),
    "1 and 2": (0.3, (1, 2), "minmax", 0.24827586, 4, ([[1, 1, 1], [1, 1, 0]], [1, 0], [[0, 1], [1, 1]], [0, 1])),
    "1 and 3": (0.3, (1, 3), "minmax", 0.15340909, 4, ([[1, 0, 1], [1, 1, 1]], [1, 0], [[1, 0], [1, 1]], [0, 1])),
    "2 and 3": (0.3, (2, 3), "minmax", 0.1125, 4, ([[1, 1, 1], [1, 0, 1]], [0, 1], [[1, 0], [1, 1]], [0, 1])),
    "robust": (0.3, (1, 2, 3), "robust", 0.0, 7, ([[1, 0, 1], [0, 0, 1]], [1, 0], [[0, 0], [1, 1]], [0, 1])),
}


@pytest.mark.parametrize("case", list(CASES))
def test_masks_of_the_worked_example(case: str) -> None:
    quantile, clients, normalise, threshold, pruned, masks = CASES[case]
    cut = keep_above(guidance(mean_deviations(explorers(*clients)), normalise), quantile)
    assert cut.threshold == pytest.approx(threshold, abs=1e-8)
    assert num_pruned(cut.masks) == pruned
    assert_masks(cut.masks, masks)


def test_mask_of_the_worked_example_weighted_by_samples() -> None:
    weighted = [explorer(client, weight) for client, weight in ((1, 50.0), (2, 30.0), (3, 20.0))]
    cut = keep_above(guidance(mean_deviations(weighted)), 0.3)
    assert cut.threshold == pytest.approx(0.01168831, abs=1e-8)
    assert num_pruned(cut.masks) == 4
    assert_masks(cut.masks, ([[1, 0, 1], [1, 1, 1]], [1, 0], [[0, 1], [1, 1]], [0, 1]))


def test_a_weighted_mean_is_a_mean() -> None:
    arrays = {"a": np.array([1.0, 3.0])}, {"a": np.array([5.0, 3.0])}
    found = mean_deviations([Deviations(30.0, arrays[0]), Deviations(10.0, arrays[1])])
    np.testing.assert_allclose(found["a"], [2, 3])


# --- 6.2: edges -------------------------------------------------------------------------------------------------


def test_a_tensor_of_one_value_is_kept() -> None:
    scores = guidance({"a": np.array([[0, 0.2], [0.4, 0.8]]), "b": np.array([0.09])})
    np.testing.assert_allclose(scores["a"], [[0, 0.25], [0.5, 1]])
    assert scores["b"] == [1]
    cut = keep_above(scores, 0.4)
    assert cut.threshold == pytest.approx(0.4)
    np.testing.assert_array_equal(cut.masks["a"], [[False, False], [True, True]])
    np.testing.assert_array_equal(cut.masks["b"], [True])


def test_ties_at_the_threshold_are_all_pruned() -> None:
    cut = keep_above(guidance({"a": np.array([0, 0, 0, 0.5, 1])}), 0.2)
    assert cut.threshold == 0
    np.testing.assert_array_equal(cut.masks["a"], [False, False, False, True, True])


def test_where_the_threshold_is_the_highest_score_the_highest_are_kept() -> None:
    scores = guidance(mean_deviations(explorers(1, 2, 3)))
    cut = keep_above(scores, 0.8)
    assert cut.threshold == 1
    assert num_pruned(cut.masks) == 10
    assert all(np.array_equal(cut.masks[name], scores[name] == 1) for name in NAMES)


def test_robust_falls_back_to_minmax_where_the_quartiles_are_equal() -> None:
    array = np.array([0.0, 3, 3, 3, 3, 3, 3, 4])
    np.testing.assert_allclose(guidance({"a": array}, "robust")["a"], array / 4)
    np.testing.assert_array_equal(guidance({"a": np.full(3, 0.2)}, "robust")["a"], np.ones(3))


@pytest.mark.parametrize(
    ("losses", "epochs"), [((1, 0.9, 0.95, 0.93, 0.92, 0.91), 5), ((1, 0.9, 0.95, 0.85, 0.9, 0.9), 6)]
)
def test_early_stopping_of_the_worked_example(losses: tuple[float, ...], epochs: int) -> None:
    patience = Patience(3)
    for loss in losses:
        if not patience(loss):
            break
    assert patience.epochs == epochs


def test_an_equal_loss_is_no_better() -> None:
    patience = Patience(2)
    assert [patience(1.0) for _ in range(3)] == [True, True, False]


# --- invariants -------------------------------------------------------------------------------------------------


def random_deviations(rng: np.random.Generator, num: int) -> list[Deviations]:
    shapes = {"a": (7, 5), "b": (5,), "c": (3, 4, 2), "one": (1,)}
    return [Deviations(1.0, {n: rng.standard_normal(s) ** 2 for n, s in shapes.items()}) for _ in range(num)]


def test_i1_deviations_are_squares_of_what_moved() -> None:
    rng = np.random.default_rng(0)
    start, end = ({"w": rng.standard_normal((4, 3)).astype(np.float32)} for _ in range(2))
    assert not squared_deviations(start, start)["w"].any()
    assert (squared_deviations(start, end)["w"] >= 0).all()
    np.testing.assert_allclose(squared_deviations(start, end)["w"], (end["w"] - start["w"]) ** 2)
    assert list(squared_deviations(start, {**end, "other": np.zeros(1)})) == ["w"]


def test_i2_the_mean_forgets_the_order_and_is_linear() -> None:
    found = random_deviations(np.random.default_rng(0), 5)
    mean, again = mean_deviations(found), mean_deviations(found[::-1])
    doubled = mean_deviations([Deviations(1.0, {n: 2 * a for n, a in d.arrays.items()}) for d in found])
    for name in mean:
        oracle = np.mean([d.arrays[name] for d in found], axis=0)
        np.testing.assert_allclose(mean[name], oracle)
        np.testing.assert_allclose(again[name], oracle)
        np.testing.assert_allclose(doubled[name], 2 * oracle)


def test_i2_minmax_attains_0_and_1_in_each_tensor_that_is_not_constant() -> None:
    for name, array in guidance(mean_deviations(random_deviations(np.random.default_rng(1), 3))).items():
        assert array.max() == 1, name
        assert array.min() == (1 if name == "one" else 0), name


@pytest.mark.parametrize("normalise", ["minmax", "robust"])
def test_i3_scale_does_not_matter_even_tensor_by_tensor(normalise: Any) -> None:
    found = random_deviations(np.random.default_rng(2), 4)
    scales = {"a": 1e-9, "b": 3.0, "c": 70.0, "one": 2.0}
    scaled = [Deviations(1.0, {n: scales[n] * a for n, a in d.arrays.items()}) for d in found]
    one, other = guidance(mean_deviations(found), normalise), guidance(mean_deviations(scaled), normalise)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-9)
    cuts = [keep_above(scores, 0.45).masks for scores in (one, other)]
    assert all(np.array_equal(cuts[0][name], cuts[1][name]) for name in one)


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.9, 0.999999])
def test_i4_every_tensor_keeps_an_entry(quantile: float) -> None:
    scores = guidance(mean_deviations(random_deviations(np.random.default_rng(3), 2)))
    assert all(mask.any() for mask in keep_above(scores, quantile).masks.values())


@pytest.mark.parametrize("quantile", [0.01, 0.3, 0.5, 0.77])
def test_i5_as_many_are_pruned_as_the_quantile_says(quantile: float) -> None:
    scores = random_scores({"a": (40, 5), "b": (33,)}, np.random.default_rng(4))
    assert num_pruned(keep_above(scores, quantile).masks) == int(quantile * (233 - 1)) + 1


def test_i5_masks_are_nested() -> None:
    scores = guidance(mean_deviations(random_deviations(np.random.default_rng(5), 3)))
    cuts = [keep_above(scores, quantile).masks for quantile in np.linspace(0, 0.99, 40)]
    for larger, smaller in itertools.pairwise(cuts):
        assert all((smaller[name] <= larger[name]).all() for name in scores)


def test_i8_a_quantile_of_0_keeps_everything_whatever_the_scores() -> None:
    masks = keep_above(guidance(mean_deviations(explorers(2))), 0.0).masks
    assert all(mask.all() for mask in masks.values())


def test_no_explorer_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one explorer"):
        mean_deviations([])


@pytest.mark.parametrize("quantile", [-0.1, 1.0, float("nan")])
def test_an_impossible_quantile_is_an_error(quantile: float) -> None:
    with pytest.raises(ValueError, match=r"the quantile must be in \[0, 1\)"):
        keep_above({"a": np.arange(3.0)}, quantile)


def test_agreement_multiplies_by_the_share_of_masks_that_keep_an_entry() -> None:
    def once() -> Iterator[Deviations]:
        yield from explorers(1, 2, 3)

    found = agreed_scores(once(), 0.3, "minmax")
    votes = [keep_above(guidance(explorer(k).arrays), 0.3).masks for k in (1, 2, 3)]
    plain = guidance(mean_deviations(explorers(1, 2, 3)))
    for name in NAMES:
        share = np.mean([vote[name] for vote in votes], axis=0)
        np.testing.assert_allclose(found[name], plain[name] * share)
    assert any((found[name] < plain[name]).any() for name in NAMES)


def test_agreement_of_one_client_cuts_where_its_own_mask_does() -> None:
    alone = keep_above(guidance(explorer(2).arrays), 0.3).masks
    agreed = keep_above(agreed_scores(explorers(2), 0.3, "minmax"), 0.3).masks
    assert_masks(agreed, [alone[name] for name in NAMES])


def test_random_scores_are_the_generators_own() -> None:
    one, again, other = (random_scores({"a": (5, 5)}, np.random.default_rng(s))["a"] for s in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


# --- 6.3 and 6.4: the server's step -----------------------------------------------------------------------------

MASK = {name: array.astype(bool) for name, array in named(ALL).items()}


def server_round(
    arrays: Arrays, velocity: Arrays, masks: Mapping[str, np.ndarray], replies: Any, beta: float
) -> tuple[Arrays, Arrays]:
    """Slow and obvious: clients return what they were sent plus a number for each tensor."""
    total = sum(weight for weight, _ in replies)
    averaged = {}
    for i, name in enumerate(NAMES):
        moved = sum(weight * changes[i] for weight, changes in replies) / total
        averaged[name] = arrays[name] + np.float32(moved) * masks[name].astype(np.float32)
    return momentum_step(arrays, averaged, velocity, masks, beta)


def test_two_static_rounds_of_the_worked_example() -> None:
    arrays: Arrays = {n: np.where(MASK[n], a, 0).astype(np.float32) for n, a in named(W0, np.float32).items()}
    replies = [(30, [-0.1, -0.2, -0.3, -0.4]), (10, [0.2] * 4)]
    arrays, velocity = server_round(arrays, {}, MASK, replies, 0.9)
    assert_near(
        arrays,
        ([[0.4975, 0, 0.2975], [-0.2025, 0.0975, 0.5975]], [0.09, 0], [[0.6825, 0], [0.1825, 0.3825]], [0, 0.025]),
    )
    arrays, _ = server_round(arrays, velocity, MASK, replies, 0.9)
    assert_near(
        arrays,
        (
            [[0.49275, 0, 0.29275], [-0.20725, 0.09275, 0.59275]],
            [0.071, 0],
            [[0.64925, 0], [0.14925, 0.34925]],
            [0, -0.0225],
        ),
    )


def test_two_rounds_of_the_worked_example_with_a_mask_each_and_a_dense_server() -> None:
    arrays, velocity = named(W0, np.float32), {}
    replies = [(40, [0.1] * 4), (60, [-0.2] * 4)]
    expected = (
        ([[0.42, -0.48, 0.22], [-0.28, 0.02, 0.6]], [0.02, -0.1], [[0.7, -0.58], [0.12, 0.32]], [0, -0.03]),
        ([[0.34, -0.56, 0.14], [-0.36, 0.02, 0.52]], [0.02, -0.18], [[0.62, -0.58], [0.04, 0.24]], [0, -0.11]),
    )
    for cohort, after in zip(((1, 2), (2, 3)), expected, strict=True):
        masks = keep_above(guidance(mean_deviations(explorers(*cohort))), 0.3).masks
        before = arrays
        arrays, velocity = server_round(arrays, velocity, masks, replies, 0.0)
        assert_near(arrays, after)
        for name in NAMES:
            assert arrays[name][~masks[name]].tobytes() == before[name][~masks[name]].tobytes()
    published = {name: np.where(masks[name], arrays[name], 0) for name in NAMES}
    assert_near(published, ([[0.34, -0.56, 0.14], [-0.36, 0, 0.52]], [0, -0.18], [[0.62, 0], [0.04, 0.24]], [0, -0.11]))


def test_without_momentum_the_step_is_the_mean_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    previous, averaged = ({n: rng.standard_normal(a.shape).astype(np.float32) for n, a in MASK.items()} for _ in "ab")
    new, velocity = momentum_step(previous, averaged, {}, MASK, 0.0)
    assert new is averaged
    assert velocity == {}


def test_momentum_forgets_what_is_masked_now_and_moves_nothing_there() -> None:
    """Where this method's momentum meets law 4: entries that are masked keep their bytes."""
    rng = np.random.default_rng(0)
    previous = {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in MASK.items()}
    velocity = {n: np.ones(a.shape, dtype=np.float32) for n, a in MASK.items()}
    new, v = momentum_step(previous, previous, velocity, MASK, 0.9)
    for name, mask in MASK.items():
        assert new[name][~mask].tobytes() == previous[name][~mask].tobytes()
        assert not v[name][~mask].any()
        np.testing.assert_allclose(v[name][mask], 0.9)
        np.testing.assert_allclose(new[name][mask], previous[name][mask] - np.float32(0.9), atol=1e-6)
        assert v[name].dtype == new[name].dtype == np.float32


# --- 6.6: the structured level ----------------------------------------------------------------------------------


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def small(*widths: int) -> tuple[Layout, Any]:
    factory = partial(mlp, *widths)
    layout = trace_layout(factory, (widths[0],))
    return layout, producers(layout, build_on_meta(factory))


def all_kept(layout: Layout) -> Arrays:
    return {name: np.ones(shape, dtype=bool) for name, shape in layout.shapes.items()}


def test_closure_of_the_worked_example() -> None:
    layout, made = small(3, 3, 2)
    masks = {
        "0.weight": np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], dtype=bool),
        "0.bias": np.array([1, 1, 0], dtype=bool),
        "2.weight": np.array([[1, 1, 0], [0, 1, 1]], dtype=bool),
        "2.bias": np.array([1, 1], dtype=bool),
    }
    closed, alive = close(layout, made, masks)
    np.testing.assert_array_equal(closed["0.weight"], masks["0.weight"])
    np.testing.assert_array_equal(closed["0.bias"], [True, False, False])
    np.testing.assert_array_equal(closed["2.weight"], [[True, False, False], [False, False, True]])
    np.testing.assert_array_equal(closed["2.bias"], [True, True])
    assert num_pruned(closed) == 12
    assert sum(mask.size for mask in closed.values()) == 20
    assert np.flatnonzero(~alive).tolist() == [1]
    again, still = close(layout, made, closed)
    assert all(np.array_equal(again[name], closed[name]) for name in closed)
    np.testing.assert_array_equal(still, alive)


def test_the_closed_network_is_narrow_where_units_died() -> None:
    layout, made = small(3, 3, 2)
    masks = {**all_kept(layout), "0.weight": np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], dtype=bool)}
    part = masked_part(layout, *close(layout, made, masks))
    assert part.units.tolist() == [True, False, True, True, True]
    assert list(part.masks) == ["0.weight"]
    np.testing.assert_array_equal(part.masks["0.weight"], [[True, False, True], [False, True, False]])
    held = covered(layout, part)
    np.testing.assert_array_equal(held["2.weight"], [[True, False, True]] * 2)
    np.testing.assert_array_equal(held["0.bias"], [True, False, True])


def test_dead_units_kill_those_that_hear_only_them() -> None:
    layout, made = small(2, 3, 3, 2)
    masks = all_kept(layout)
    masks["0.weight"][1:] = False
    masks["2.weight"][2, 0] = False  # unit 2 of the second layer hears 1 and 2 of the first only
    closed, alive = close(layout, made, masks)
    assert np.flatnonzero(~alive).tolist() == [1, 2, 5]
    assert not closed["4.weight"][:, 2].any()
    assert not closed["2.bias"][2]


def test_a_layer_never_dies_as_a_whole_even_in_steps() -> None:
    layout, made = small(2, 3, 3, 2)
    masks = all_kept(layout)
    masks["0.weight"][:2] = False  # first units 0 and 1 die; then all that hear nothing but them
    masks["2.weight"][:, 2] = False
    masks["2.weight"][0] = False  # and this one at once
    _, alive = close(layout, made, masks)
    assert np.flatnonzero(alive[:3]).tolist() == [2]
    assert np.flatnonzero(alive[3:6]).tolist() == [1]
    masks["0.weight"][:] = False
    _, alive = close(layout, made, masks)
    assert np.flatnonzero(alive).tolist() == [0, 4, 5, 6, 7]  # 3 was masked itself; 4 and 5 still hear unit 0


def test_only_units_of_a_single_layer_may_die() -> None:
    layout = trace_layout(Ties, (1, 4, 4))
    made = producers(layout, build_on_meta(Ties))
    assert {group: producer.tensor for group, producer in made.items()} == {
        "inner": "inner.weight",
        "side": "side.weight",
        "fc": "fc.weight",
    }
    masks = {name: np.zeros(shape, dtype=bool) for name, shape in layout.shapes.items()}
    _, alive = close(layout, made, masks)
    for group, span in layout.groups.items():
        assert alive[span.start : span.stop].sum() == (1 if group in made else len(span)), group


def test_units_of_transposed_convolutions_stand_on_the_second_axis() -> None:
    from toy import Decoder

    layout = trace_layout(Decoder, (2, 3, 3))
    made = producers(layout, build_on_meta(Decoder))
    assert made["up"].axis == 1
    scores = np.broadcast_to(np.arange(6.0).reshape(1, 6, 1, 1), layout.shapes["up.weight"])
    np.testing.assert_allclose(unit_means(layout, "up", made["up"], scores), np.arange(6))
    masks = all_kept(layout)
    masks["up.weight"][:, 2] = False
    closed, alive = close(layout, made, masks)
    assert np.flatnonzero(~alive).tolist() == [layout.groups["up"].start + 2]
    assert not closed["out.weight"][2].any()
    assert not closed["norm.weight"][2]


def test_units_that_score_least_are_masked() -> None:
    layout, made = small(2, 5, 2)
    scores = {name: np.zeros(shape) for name, shape in layout.shapes.items()}
    scores["0.weight"] = np.array([[5.0, 5], [1, 1], [4, 0], [0, 2], [9, 9]])  # means 5, 1, 2, 1, 9
    for share, least in ((0.0, []), (0.2, [1]), (0.4, [1, 3]), (0.6 - 1e-12, [1, 3, 2]), (0.99, [1, 3, 2, 0])):
        masks = without_least_units(layout, made, all_kept(layout), scores, share)
        assert np.flatnonzero(~masks["0.weight"].any(axis=1)).tolist() == sorted(least)
        assert masks["2.weight"].all()


def test_one_unit_stays_whatever_share_is_asked_for() -> None:
    layout, made = small(2, 1, 2)
    scores = {name: np.ones(shape) for name, shape in layout.shapes.items()}
    masks = without_least_units(layout, made, all_kept(layout), scores, 0.999999999999)
    assert masks["0.weight"].all()


@pytest.mark.parametrize(
    ("name", "shape"), [("cnn", (1, 8, 8)), ("autoflip-cnn", (1, 8, 8)), ("heterofl-conv", (1, 8, 8))]
)
def test_the_narrow_network_computes_what_the_masked_one_does(name: str, shape: tuple[int, ...]) -> None:
    """Up to the constants that dead units passed on: here they have none, their biases and norms' shifts are 0."""
    factory = model_factory(name, 10, shape)
    layout = trace_layout(factory, shape)
    made = producers(layout, build_on_meta(factory))
    rng = np.random.default_rng(0)
    arrays = {n: (a if a.ndim > 1 or "norm" in n else 0 * a) for n, a in random_arrays(layout, rng).items()}
    arrays = {n: (0 * a if n.startswith("norm") and n.endswith("bias") else 0.1 * a) for n, a in arrays.items()}
    masks = keep_above(random_scores({n: s for n, s in layout.shapes.items() if "norm" not in n}, rng), 0.3).masks
    scores = random_scores(layout.shapes, rng)
    masks = without_least_units(layout, made, masks, scores, 0.25)
    part = masked_part(layout, *close(layout, made, masks))
    assert part.units.sum() < layout.num_units
    open_part = masked_part(layout, masks)
    inputs = torch.from_numpy(rng.standard_normal((4, *shape), dtype=np.float32))
    with torch.no_grad():
        dense, small_one = (narrow(factory, extract(layout, p, arrays)).eval()(inputs) for p in (open_part, part))
    assert float(dense.std()) > 1e-4
    torch.testing.assert_close(dense, small_one, rtol=1e-4, atol=1e-5)


def test_nothing_masked_is_the_full_submodel() -> None:
    layout, _ = small(3, 3, 2)
    part = masked_part(layout, all_kept(layout))
    assert part == full(layout)
    assert part.masks == {}
    assert all(mask.all() for mask in covered(layout, Submodel(full(layout).units)).values())


def test_what_is_covered_is_what_extracting_keeps() -> None:
    layout = trace_layout(Ties, (1, 4, 4))
    rng = np.random.default_rng(0)
    made = producers(layout, build_on_meta(Ties))
    masks = keep_above(random_scores(layout.shapes, rng), 0.5).masks
    masks = without_least_units(layout, made, masks, random_scores(layout.shapes, rng), 0.4)
    part = masked_part(layout, *close(layout, made, masks))
    ones = extract(layout, part, {n: np.ones(s, dtype=np.float32) for n, s in layout.shapes.items()})
    for name, mask in covered(layout, part).items():
        assert mask.sum() == ones[name].sum(), name
        assert (mask <= masks[name]).all()


# --- knobs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"quantile": 1.0}, r"autoflip.quantile must be in \[0, 1\), got 1.0"),
        ({"quantile": float("nan")}, "autoflip.quantile"),
        ({"server_momentum": -0.1}, "autoflip.server-momentum must be in"),
        ({"unit_share": 1.0}, "autoflip.unit-share must be in"),
        ({"score": "taylor"}, "autoflip.score must be one of guidance, magnitude, random, got 'taylor'"),
        ({"normalise": "z"}, "autoflip.normalise must be one of minmax, robust"),
        ({"prunable": "all"}, "autoflip.prunable must be one of parameters, matrices"),
        ({"mask_mode": "always"}, "autoflip.mask-mode must be one of per-round, static"),
        ({"server_memory": "soft"}, "autoflip.server-memory must be one of dense, hard"),
        ({"structured": "on"}, "autoflip.structured must be one of off, closure, units"),
        ({"explore_optimizer": "lbfgs"}, "autoflip.explore-optimizer must be one of sgd, adam"),
        ({"explore_weights": "labels"}, "autoflip.explore-weights must be one of uniform, examples"),
        ({"explore_fraction": 0.0}, r"autoflip.explore-fraction must be in \(0, 1\]"),
        ({"explore_epochs": 0}, "autoflip.explore-epochs must be at least 1"),
        ({"explore_patience": 0}, "autoflip.explore-patience must be at least 1"),
        ({"explore_learning_rate": 0.0}, "autoflip.explore-learning-rate must be > 0"),
        ({"agreement": True, "score": "random"}, "autoflip.agreement=true needs deviations"),
        ({"fedlex": True, "score": "magnitude"}, "autoflip.fedlex=true needs deviations"),
        ({"fedlex": True, "structured": "units"}, "autoflip.fedlex=true prunes nothing"),
    ],
)
def test_config_refuses_impossible_values(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AutoFLIPConfig(**values)


# --- 6.7: sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "size", "pruned", "up", "mask"),
    [
        ((1, 28, 28), 1_663_370, 499_011, 4_657_436, 207_922),
        ((3, 32, 32), 1_664_970, 499_491, 4_661_916, 208_122),
    ],
)
def test_sizes_of_the_published_network(image: tuple[int, ...], size: int, pruned: int, up: int, mask: int) -> None:
    layout = trace_layout(model_factory("autoflip-cnn", 10, image), image)
    assert sum(int(np.prod(shape)) for shape in layout.shapes.values()) == size
    cut = keep_above(random_scores(layout.shapes, np.random.default_rng(0)), 0.3)
    assert num_pruned(cut.masks) == pruned == int(0.3 * (size - 1)) + 1
    assert 4 * (size - pruned) == up
    assert sum(len(np.packbits(m)) for m in cut.masks.values()) == mask == -(-size // 8)
