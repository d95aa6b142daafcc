"""CKA: the worked examples, its invariants, and the rows that are compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexfed.stitching.path import resize
from flexfed.stitching.similarity import View, cka, compat_view, target_score

X = np.array([[1.0, 2], [3, 4], [5, 7], [2, 0]])
Y = np.array([[1.0, 0, 2], [0, 1, 1], [4, 2, 3], [1, 1, 0]])
FEATURES = np.array([[2.0, 0], [1, 1], [0, 3], [1, 4], [5, 5], [4, 6]])


def gram_cka(x: np.ndarray, y: np.ndarray, centre: bool = True) -> float:
    """By the definition: H K H with H = I - 1/m, from Gram matrices."""
    m = len(x)
    middle = np.eye(m) - (np.ones((m, m)) / m if centre else 0)
    k, l = (middle @ (z @ z.T) @ middle for z in (x, y))  # noqa: E741
    return float((k * l).sum() / (np.linalg.norm(k) * np.linalg.norm(l)))


def random_pair(seed: int, m: int, p: int, q: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, p))
    return x, x @ rng.standard_normal((p, q)) + rng.standard_normal((m, q))


def orthogonal(size: int, rng: np.random.Generator) -> np.ndarray:
    return np.asarray(np.linalg.qr(rng.standard_normal((size, size)))[0])


def test_worked_example():
    assert cka(X, Y) == pytest.approx(0.6525065168, abs=1e-9)
    centred = X - X.mean(0), Y - Y.mean(0)
    assert np.square(centred[0].T @ centred[1]).sum() == pytest.approx(296)
    rotated = 2.5 * X @ np.array([[0.6, -0.8], [0.8, 0.6]]) + [3, -1]
    assert cka(rotated, Y) == pytest.approx(0.6525065168, abs=1e-9)
    assert gram_cka(X, Y, centre=False) == pytest.approx(0.8797094373, abs=1e-9)


def test_worked_example_of_targets():
    labels = np.array([0, 0, 1, 1, 2, 2])
    assert target_score(FEATURES, labels, 3) == pytest.approx(0.8051429214, abs=1e-9)
    assert cka(FEATURES, labels[:, None]) == pytest.approx(0.9073569686, abs=1e-9)
    assert target_score(FEATURES, np.full(6, 2), 3) == 0


@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 15), st.integers(1, 15))
def test_invariants(seed: int, m: int, p: int, q: int):
    x, y = random_pair(seed, m, p, q)
    rng = np.random.default_rng(seed)
    value = cka(x, y)
    assert 0 <= value <= 1
    assert cka(y, x) == pytest.approx(value, abs=1e-10)
    assert cka(x, x) == pytest.approx(1, abs=1e-10)
    assert value == pytest.approx(gram_cka(x, y), abs=1e-10)  # whichever form was taken
    turned = -3.7 * x @ orthogonal(p, rng) + rng.standard_normal(p)
    assert cka(turned, y) == pytest.approx(value, abs=1e-10)


def test_an_invertible_map_that_does_not_preserve_angles_changes_it():
    x, y = random_pair(1, 20, 3, 4)
    assert abs(cka(x * [1, 5, 0.2], y) - cka(x, y)) > 0.05


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e5])
def test_constant_features_give_zero_and_no_warning(value: float):
    assert cka(np.full((6, 2), value), X[:1].repeat(6, 0) + np.arange(6)[:, None]) == 0
    assert target_score(np.full((6, 2), value), np.array([0, 0, 1, 1, 2, 2]), 3) == 0


def test_float32_features_are_compared_in_float64():
    x, y = random_pair(2, 50, 4, 4)
    assert cka((x + 1e3).astype(np.float32), y) == cka((x + 1e3).astype(np.float32).astype(np.float64), y)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_visible(bad: float):
    x = X.copy()
    x[1, 1] = bad
    assert np.isnan(cka(x, Y))


@pytest.mark.parametrize("shapes", [((4, 2), (3, 2)), ((0, 2), (0, 2)), ((4,), (4,))])
def test_rows_must_match(shapes: tuple[tuple[int, ...], tuple[int, ...]]):
    with pytest.raises(ValueError, match="same rows, at least one"):
        cka(np.zeros(shapes[0]), np.zeros(shapes[1]))


def test_the_larger_map_comes_to_the_smaller_one():
    assert compat_view((8, 12, 12), (6, 6, 6)) == View((6, 6), 60)
    assert compat_view((3, 6, 6), (6, 12, 12)) == View((6, 6), 30)
    assert compat_view((3, 4, 9), (6, 6, 5)) == View((4, 5), 30)
    assert compat_view((8, 12, 12), (6,)) == compat_view((8,), (6,)) == View(None)


def test_rows_are_images_and_positions_in_this_order():
    maps = torch.arange(2 * 3 * 2 * 2, dtype=torch.float32).reshape(2, 3, 2, 2)
    view = View((2, 2))
    rows = view.rows(maps, view.draw(2, np.random.default_rng(0)))
    slow = [maps[n, :, y, x].tolist() for n in range(2) for y in range(2) for x in range(2)]
    assert rows.tolist() == slow


@pytest.mark.parametrize("split", [1, 3, 5, 7])
def test_drawn_rows_are_the_same_of_every_batch_and_of_both_sides(split: int):
    here, native = torch.rand(7, 4, 6, 6), torch.rand(7, 5, 3, 3)
    view = compat_view((4, 6, 6), (5, 3, 3))
    assert view == View((3, 3), 40)
    drawn = view.draw(7, np.random.default_rng(3))
    assert len(drawn) == view.num_rows(7) == 40
    assert len(set(drawn.tolist())) == 40
    for features in (here, native):
        whole = resize(features, (3, 3)).permute(0, 2, 3, 1).reshape(63, -1)[drawn]
        parts = [view.rows(features[i : i + split], drawn, i) for i in range(0, 7, split)]
        assert torch.equal(torch.cat(parts), whole)


def test_fewer_rows_than_the_limit_are_all_taken():
    assert View((2, 2), 100).draw(3, np.random.default_rng(0)).tolist() == list(range(12))
    assert View(None, 2).num_rows(5) == 2
    assert View((3, 3)).num_rows(5) == 45


def test_vectors_against_maps_are_pooled():
    maps = torch.rand(5, 4, 3, 3)
    assert torch.equal(View(None).rows(maps, np.arange(5)), maps.mean((2, 3)))
    assert torch.equal(View(None).rows(maps.mean((2, 3)), np.arange(5)), maps.mean((2, 3)))
