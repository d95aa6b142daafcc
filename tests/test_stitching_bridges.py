"""Bridges and heads: the worked examples, sums that add up, and how features are fitted to a block."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from flexfed.stitching.bridges import Sums, affine, no_rows, ridge, solve_bridge, sums_of, valid_sums
from flexfed.stitching.head import class_sums, predict, solve_head
from flexfed.stitching.path import Bridge, Path, Walk, align, apply_bridge, bridge_macs, features, path_macs, resize
from tests.fakepool import small_pool

A = np.array([[1.0, 0], [0, 1], [1, 1], [2, 1], [0, 2]])
Z = np.array([[2.0, 1], [1, 3], [3, 5], [5, 4], [1, 5]])
PLAIN = [[2.1304347826, 0.6956521739], [0.5652173913, 2.3478260870], [0.1304347826, 0.6956521739]]
PENALISED = [[2.0445967937, 0.6627194349], [0.5093313943, 2.2582320557], [0.2499913438, 0.7956788200]]


def with_ones(x: np.ndarray) -> np.ndarray:
    return np.column_stack([x, np.ones(len(x))])


@pytest.mark.parametrize(("penalty", "expected"), [(0.0, PLAIN), (0.1, PENALISED)])
def test_worked_example_and_its_split_over_two_clients(penalty: float, expected: list[list[float]]):
    np.testing.assert_allclose(ridge(sums_of(A, Z), penalty), expected, atol=1e-9)
    np.testing.assert_allclose(ridge(sums_of(A[:2], Z[:2]) + sums_of(A[2:], Z[2:]), penalty), expected, atol=1e-9)


def test_residual_of_the_worked_example():
    residual = with_ones(A) @ ridge(sums_of(A, Z), 0) - Z
    assert np.square(residual).sum() == pytest.approx(2.3478260870, abs=1e-9)


def test_without_a_penalty_no_other_affine_map_fits_better():
    rng = np.random.default_rng(0)
    a, z = rng.standard_normal((40, 5)), rng.standard_normal((40, 3))
    theta = ridge(sums_of(a, z), 0)
    np.testing.assert_allclose(with_ones(a).T @ (with_ones(a) @ theta - z), 0, atol=1e-10)
    best = np.square(with_ones(a) @ theta - z).sum()
    for _ in range(20):
        other = theta + 0.01 * rng.standard_normal(theta.shape)
        assert np.square(with_ones(a) @ other - z).sum() > best


def test_solutions_depend_on_no_division_and_no_order():
    rng = np.random.default_rng(1)
    a, z = rng.standard_normal((60, 6)), rng.standard_normal((60, 4))
    labels = rng.integers(0, 4, 60)
    order = rng.permutation(60)
    parts = np.split(order, [3, 10, 11, 40])
    whole, pieces = sums_of(a, z), sum((sums_of(a[p], z[p]) for p in parts), no_rows(6, 4))
    assert (pieces.num_rows, whole.num_rows) == (60, 60)
    np.testing.assert_allclose(ridge(pieces, 0.3), ridge(whole, 0.3), rtol=1e-8)
    heads = [class_sums(a, labels, 4), sum((class_sums(a[p], labels[p], 4) for p in parts), no_rows(6, 4))]
    np.testing.assert_allclose(solve_head(heads[0], 0.01), solve_head(heads[1], 0.01), rtol=1e-8)
    one = sum([whole], no_rows(6, 4))
    assert one.gram.tobytes() == whole.gram.tobytes()


def test_the_penalty_is_relative_to_the_features():
    sums = sums_of(A, Z)
    bridge = solve_bridge(sums, 1e-2)
    theta = ridge(sums, 1e-2 * np.trace(sums.gram) / 3)
    assert bridge.weight.dtype == bridge.bias.dtype == np.float32
    np.testing.assert_allclose(bridge.weight, theta[:2].T, rtol=1e-6)
    np.testing.assert_allclose(bridge.bias, theta[2], rtol=1e-6)


def test_dependent_features_without_a_penalty_give_the_smallest_solution():
    twice = np.column_stack([A[:, :1], A[:, :1]])
    theta = ridge(sums_of(twice, Z), 0)
    np.testing.assert_allclose(theta[0], theta[1], atol=1e-9)
    np.testing.assert_allclose(theta, np.linalg.lstsq(with_ones(twice), Z)[0], atol=1e-9)


def test_sums_of_float32_are_float64():
    sums = sums_of(A.astype(np.float32), Z.astype(np.float32))
    assert sums.gram.dtype == sums.cross.dtype == np.float64


def test_worked_example_of_the_head():
    first = class_sums(np.array([[1.0, 0], [2, 1]]), np.array([0, 0]), 2)
    second = class_sums(np.array([[0.0, 2], [1, 3], [3, 3]]), np.array([1, 1, 0]), 2)
    sums = first + second
    assert sums.gram.tolist() == [[15, 14, 7], [14, 23, 9], [7, 9, 5]]
    assert sums.cross.tolist() == [[6, 1], [4, 5], [3, 2]]
    head = solve_head(sums, 0.02)
    expected = [[0.42563359, -0.40667760], [-0.27642820, 0.29655235], [0.49184680, 0.42701414]]
    np.testing.assert_allclose(head, expected, atol=1e-8)
    rows = torch.tensor([[1.0, 0], [2, 1], [0, 2], [1, 3], [3, 3]])
    assert predict(head, rows).tolist() == [0, 0, 1, 1, 0]


def test_of_equal_classes_the_first_is_predicted():
    assert predict(np.zeros((3, 4)), torch.rand(2, 2)).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("sums", "reason"),
    [
        (Sums(np.eye(2), np.zeros((3, 2)), 1), "have shapes"),
        (Sums(np.eye(3), np.full((3, 2), np.nan), 1), "not finite"),
        (Sums(np.diag([1, np.inf, 1]), np.zeros((3, 2)), 1), "not finite"),
        (Sums(np.eye(3), np.zeros((3, 2)), 5), "say 5 rows"),
        (Sums(-np.eye(3), np.zeros((3, 2)), -1), "say -1 rows"),
    ],
)
def test_bad_sums_are_told(sums: Sums, reason: str):
    assert reason in (valid_sums(sums, 2, 2) or "")


def test_good_sums_are_valid():
    assert valid_sums(sums_of(A, Z), 2, 2) is None
    assert valid_sums(no_rows(2, 2), 2, 2) is None


def test_errors_of_the_solution():
    with pytest.raises(ValueError, match="at least one row, got 0"):
        ridge(no_rows(2, 2), 0.1)
    with pytest.raises(ValueError, match="finite sums"):
        ridge(Sums(np.full((3, 3), np.nan), np.zeros((3, 2)), 3), 0.1)
    with pytest.raises(ValueError, match="penalty must be >= 0"):
        ridge(sums_of(A, Z), -1)
    with pytest.raises(ValueError, match="other channels"):
        sums_of(A, Z) + sums_of(Z[:, :1], A)


def test_an_exact_map_is_found_and_applied_to_maps_and_vectors():
    rng = np.random.default_rng(2)
    theta = rng.standard_normal((5, 3))
    a = rng.standard_normal((50, 4))
    bridge = affine(ridge(sums_of(a, with_ones(a) @ theta), 0))
    vectors = torch.randn(6, 4)
    expected = vectors.double().numpy() @ theta[:-1] + theta[-1]
    np.testing.assert_allclose(apply_bridge(bridge, vectors), expected, atol=1e-5)
    maps = vectors[:, :, None, None].expand(6, 4, 3, 2)
    np.testing.assert_allclose(apply_bridge(bridge, maps)[:, :, 2, 1], expected, atol=1e-5)


def test_bridges_that_cannot_be_written_to_are_applied_without_a_warning():
    bridge = Bridge(np.eye(2, dtype=np.float32), np.zeros(2, np.float32))
    bridge.weight.setflags(write=False)
    bridge.bias.setflags(write=False)
    assert apply_bridge(bridge, torch.ones(1, 2)).tolist() == [[1, 1]]


def test_maps_shrink_by_pooling_and_grow_bilinearly():
    maps = torch.rand(2, 3, 6, 4)
    assert resize(maps, (6, 4)) is maps
    assert torch.equal(resize(maps, (3, 2)), functional.avg_pool2d(maps, 2))
    assert torch.equal(resize(maps, (12, 8)), functional.interpolate(maps, (12, 8), mode="bilinear"))
    both = resize(maps, (3, 8))
    np.testing.assert_allclose(
        both, functional.interpolate(functional.avg_pool2d(maps, (2, 1)), (3, 8), mode="bilinear")
    )
    assert resize(maps, (1, 1)).shape == (2, 3, 1, 1)


def test_align():
    maps = torch.rand(2, 3, 6, 6)
    assert torch.equal(align(maps, (7,)), maps.mean((2, 3)))
    assert align(maps, (7, 3, 3)).shape == (2, 3, 3, 3)
    assert torch.equal(align(maps[:, :, 0, 0], (7,)), maps[:, :, 0, 0])
    with pytest.raises(ValueError, match=r"reads maps \(7, 3, 3\) cannot follow vectors \(3,\)"):
        align(maps.mean((2, 3)), (7, 3, 3))


def bridge_into(pool, last: int, block: int) -> Bridge:
    rng = np.random.default_rng(7)
    size_in, size_out = pool.blocks[last].shape_out[0], pool.blocks[block].shape_in[0]
    return affine(rng.standard_normal((size_in + 1, size_out)))


def test_a_native_path_is_its_source_bit_for_bit():
    pool = small_pool()
    x = torch.rand(5, 3, 12, 12)
    for source in pool.sources:
        ids = tuple(block.id for block in pool.of(source))
        for num in range(len(ids) + 1):
            with torch.inference_mode():
                expected = nn.Sequential(*(pool.modules[b] for b in ids[:num]))(x)
            assert torch.equal(features(pool, Path(ids[:num]), x), expected)
            assert Path(ids[:num]).native_blocks(pool) == num


def test_a_path_with_bridges_is_what_it_says():
    pool = small_pool()
    path = (
        Path((0, 1)).then(5, bridge_into(pool, 1, 5)).then(6, bridge_into(pool, 5, 6)).then(8, bridge_into(pool, 6, 8))
    )
    x = torch.rand(4, 3, 12, 12)
    slow = x
    for position, block in enumerate(path.ids):
        with torch.inference_mode():
            if position in path.bridges:
                slow = apply_bridge(path.bridges[position], align(slow, pool.blocks[block].shape_in))
            slow = pool.modules[block](slow)
    assert torch.equal(features(pool, path, x), slow)


def test_where_a_bridge_is_needed():
    pool = small_pool()
    assert not Path().needs_bridge(pool, 0)
    assert not Path((0,)).needs_bridge(pool, 1)
    assert not Path((0, 1)).needs_bridge(pool, 2)
    assert Path((0, 1)).needs_bridge(pool, 3)  # its own source, but not the next block
    assert Path((0,)).needs_bridge(pool, 5)
    mixed = Path((4,)).then(1, bridge_into(pool, 4, 1))
    assert mixed.needs_bridge(pool, 2)  # native successor of the last block, but the path is not its source's
    own = Path((0, 1)).then(2, bridge_into(pool, 1, 2))
    assert own.native_blocks(pool) == 2
    assert own.needs_bridge(pool, 3)


def test_errors_of_a_path():
    pool = small_pool()
    x = torch.rand(2, 3, 12, 12)
    with pytest.raises(ValueError, match=r"no bridge in front of block 5 \(position 1\)"):
        features(pool, Path((0, 5)), x)
    with pytest.raises(ValueError, match="begins with block 1, which is not the first"):
        features(pool, Path((1, 2)), x)


def test_multiply_accumulates_of_a_walk_are_those_planned():
    pool = small_pool()
    path = Path((0, 1)).then(5, bridge_into(pool, 1, 5)).then(8, bridge_into(pool, 5, 8))
    walk = Walk(pool, group=3)
    with torch.inference_mode():
        walk.along(path, torch.rand(7, 3, 12, 12))
    bridges = bridge_macs(8, (5, 6, 6)) + bridge_macs(9, pool.blocks[8].shape_in)
    assert bridge_macs(8, (5, 6, 6)) == 8 * 5 * 36
    assert walk.macs == pool.block_macs + 7 * bridges == 7 * path_macs(pool, path)
    assert pool.ran == {0: 7, 1: 7, 5: 7, 8: 7}
    assert set(pool.calls) == {3, 1}


def test_adding_a_block_leaves_the_path_as_it_was():
    path = Path((0,))
    longer = path.then(1)
    assert (path.ids, longer.ids, longer.bridges) == ((0,), (0, 1), {})
