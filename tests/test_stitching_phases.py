"""What a client does: forward passes, one block at a time, as much as planned and no more, the same for every batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product, takewhile

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flexfed.stitching.bridges import affine, ridge, solve_bridge, sums_of, valid_sums
from flexfed.stitching.head import class_sums, solve_head
from flexfed.stitching.path import Path, apply_bridge, features, pooled, resize
from flexfed.stitching.phases import (
    GROUP,
    balanced_subset,
    bridge_sums,
    count_correct,
    head_sums,
    modelled_peak_bytes,
    plan_bridge,
    plan_count,
    plan_head,
    whole_groups,
)
from flexfed.stitching.scoring import ScoreRule, Scores, Scoring, score_blocks
from flexfed.stitching.similarity import cka, target_score
from tests.fakepool import FakePool, conv, small_pool

NUM, CLASSES = 21, 4
PRODUCT, LOOKAHEAD = ScoreRule(), ScoreRule(mode="lookahead", rows_max=200)
RULES = {
    "product": PRODUCT,
    "lookahead": LOOKAHEAD,
    "compat": ScoreRule(beta=0),
    "target": ScoreRule(alpha=0),
    "lookahead-only": replace(LOOKAHEAD, alpha=0),
    "squares": ScoreRule(alpha=0.5, beta=2),
}


class Recorder:
    """A pacer that remembers."""

    def __init__(self) -> None:
        self.plans: list[tuple[int, int, int]] = []
        self.batches = 0
        self.open = False

    def plan(self, num_batches: int, images: int, macs: int) -> None:
        assert not self.batches, "the plan comes first"
        self.plans.append((num_batches, images, macs))

    @contextmanager
    def batch(self) -> Iterator[None]:
        assert not self.open
        self.open, self.batches = True, self.batches + 1
        yield
        self.open = False


def data(num: int = NUM, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(num) % CLASSES)[torch.randperm(num, generator=generator)]
    inputs = torch.rand(num, 3, 12, 12, generator=generator) + 0.3 * labels[:, None, None, None]
    return inputs, labels


def bridged(pool: FakePool, path: Path, block: int, seed: int = 0) -> Path:
    """The path with a block more, behind a random bridge."""
    rng = np.random.default_rng(seed)
    size_in, size_out = pool.blocks[path.ids[-1]].shape_out[0], pool.blocks[block].shape_in[0]
    return path.then(block, affine(rng.standard_normal((size_in + 1, size_out)) / size_in))


def paths(pool: FakePool) -> dict[str, Path]:
    return {
        "empty": Path(),
        "native": Path((0, 1)),
        "mixed": bridged(pool, Path((0, 1)), 5),
        "vectors": bridged(pool, Path((4,)), 8),
    }


CANDIDATES = {"empty": (0, 4, 7), "native": (2, 3, 5, 6, 8), "mixed": (2, 3, 6, 8, 9), "vectors": (9,)}


def score(
    pool: FakePool, path: Path, candidates: tuple[int, ...], rule: ScoreRule = PRODUCT, **knobs: object
) -> Scores:
    arguments = {"seed": 3, "targets": {}, **knobs}
    return score_blocks(pool, path, candidates, *data(), CLASSES, rule, **arguments)  # type: ignore[arg-type]


def native(pool: FakePool, block: int, inputs: Tensor, count: bool = True) -> Tensor:
    """Native input of a block, or its output."""
    own = pool.of(pool.blocks[block].source)
    with torch.inference_mode():
        for b in own[: pool.blocks[block].index - (0 if count else 1)]:
            inputs = pool.modules[b.id](inputs)
    return inputs


def columns(maps: Tensor) -> np.ndarray:
    """All rows of maps; the tests' own spelling."""
    return np.asarray(maps.numpy().transpose(0, 2, 3, 1).reshape(-1, maps.shape[1]))


# Subsets.


@pytest.mark.parametrize("num", [1, 5, 8, 12, 30, 47, 60, 200])
def test_subsets_hold_as_equal_numbers_of_each_class_as_there_are(num: int):
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 5], [30, 2, 10, 5]))
    rows = balanced_subset(labels, num, np.random.default_rng(1))
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert len(rows) == min(num, 47)
    counts = np.array([(labels[rows] == label).sum() for label in (0, 1, 2, 5)])
    short = counts < [30, 2, 10, 5]
    if short.any():  # no class that has more to give is behind another by more than one
        assert counts[short].min() >= counts.max() - 1


def test_subsets_are_drawn():
    labels = np.repeat([0, 1, 2], 20)
    draws = [balanced_subset(labels, 7, np.random.default_rng(seed)).tolist() for seed in (0, 0, 1, 2, 3, 4, 5)]
    assert draws[0] == draws[1] != draws[2]
    more = {int(np.bincount(labels[rows]).argmax()) for rows in draws}
    assert len(more) > 1  # which class has one row more
    assert balanced_subset(labels[:0], 5, np.random.default_rng(0)).tolist() == []
    assert len(balanced_subset(labels[:20], 5, np.random.default_rng(0))) == 5


# Scores.


def slow_target(pool: FakePool, block: int) -> float:
    inputs, labels = data()
    out = native(pool, block, inputs)
    return target_score(pooled(out).numpy(), labels.numpy(), CLASSES)


def slow_compat(pool: FakePool, path: Path, block: int) -> float:
    """With all features at hand at once."""
    inputs, _ = data()
    here, there = features(pool, path, inputs), native(pool, block, inputs, count=False)
    if here.ndim == there.ndim == 4:
        size = min(here.shape[2], there.shape[2])
        rows = [columns(resize(maps, (size, size))) for maps in (here, there)]
        limit = 10 * min(here.shape[1], there.shape[1])
        drawn = np.sort(np.random.default_rng(3).choice(len(rows[0]), min(limit, len(rows[0])), replace=False))
        return cka(rows[0][drawn], rows[1][drawn])
    return cka(pooled(here).numpy(), pooled(there).numpy())


@pytest.mark.parametrize("name", CANDIDATES)
def test_scores_are_the_products_of_two_ckas(name: str):
    pool = small_pool()
    path, candidates = paths(pool)[name], CANDIDATES[name]
    found = score(pool, path, candidates)
    assert found.values.dtype == np.float64
    assert ((found.values >= 0) & (found.values <= 1)).all()
    for block, value in zip(candidates, found.values, strict=True):
        target = slow_target(pool, block)
        assert found.targets[block] == pytest.approx(target, abs=1e-6)
        compat = 1.0 if pool.blocks[block].is_start else slow_compat(pool, path, block)
        assert value == pytest.approx(compat * target, abs=1e-6)


def test_the_native_successor_of_a_native_prefix_is_wholly_compatible():
    pool = small_pool()
    for path, block in ((Path((0,)), 1), (Path((0, 1)), 2), (Path((4, 5)), 6), (Path((7, 8)), 9)):
        assert score(pool, path, (block,), RULES["compat"]).values[0] == pytest.approx(1, abs=1e-6)
    mixed = bridged(pool, Path((0, 1)), 5)
    assert score(pool, mixed, (6,), RULES["compat"]).values[0] < 0.999


def test_without_targets_start_blocks_still_go_by_them():
    pool = small_pool()
    assert score(pool, Path(), (0, 4, 7), RULES["compat"]).values.tolist() == [
        score(pool, Path(), (b,)).values[0] for b in (0, 4, 7)
    ]


def test_exponents():
    pool = small_pool()
    path, candidates = paths(pool)["native"], CANDIDATES["native"]
    compat, target, both = (
        score(pool, path, candidates, RULES[name]).values for name in ("compat", "target", "squares")
    )
    np.testing.assert_allclose(both, np.sqrt(compat) * target**2, rtol=1e-12)
    np.testing.assert_allclose(score(pool, path, candidates).values, compat * target, rtol=1e-12)
    start = score(pool, Path(), (0,), RULES["squares"]).values[0]
    assert start == pytest.approx(score(pool, Path(), (0,)).values[0] ** 2)


def test_lookahead_runs_the_block_behind_a_bridge():
    pool = small_pool()
    path = paths(pool)["native"]
    inputs, labels = data()
    here = features(pool, path, inputs)
    everything = replace(RULES["lookahead-only"], rows_max=0)
    for block in (3, 5, 6, 8):
        shape = pool.blocks[block].shape_in
        there = native(pool, block, inputs, count=False)
        bridge = solve_bridge(sums_of(columns(resize(here, shape[1:])), columns(there)), 1e-4)
        with torch.inference_mode():
            out = pool.modules[block](apply_bridge(bridge, resize(here, shape[1:])))
        expected = target_score(pooled(out).numpy(), labels.numpy(), CLASSES)
        assert score(pool, path, (block,), everything).values[0] == pytest.approx(expected, abs=1e-5)
    successor = score(pool, path, (2,), everything)  # needs no bridge
    assert successor.values[0] == pytest.approx(slow_target(pool, 2), abs=1e-6)
    assert set(successor.targets) == {2}
    plain = score(pool, path, (5,), LOOKAHEAD)
    assert plain.targets == {}
    assert score(pool, path, (5,), LOOKAHEAD, targets={5: 0.0}).values == plain.values  # not what is looked at


@pytest.mark.parametrize(("name", "rule"), product(CANDIDATES, RULES))
def test_scores_do_not_depend_on_the_batch_to_the_last_bit(name: str, rule: str):
    pool = small_pool()
    path, candidates = paths(pool)[name], CANDIDATES[name]
    found = [score(pool, path, candidates, RULES[rule], batch_size=size) for size in (1, 8, 13, 64)]
    for other in found[1:]:
        assert other.values.tobytes() == found[0].values.tobytes()
        assert (other.targets, other.macs, other.cached_bytes) == (
            found[0].targets,
            found[0].macs,
            found[0].cached_bytes,
        )


def test_the_seed_draws_the_rows():
    pool = small_pool()
    path, candidates = paths(pool)["mixed"], CANDIDATES["mixed"]
    a, b, c = (score(pool, path, candidates, seed=seed).values.tolist() for seed in (0, 0, 1))
    assert a == b != c


def test_targets_that_are_known_are_not_measured_again():
    pool = small_pool()
    path, candidates = paths(pool)["native"], CANDIDATES["native"]
    first = score(pool, path, candidates)
    again = score(pool, path, candidates, targets=first.targets)
    assert again.values.tolist() == first.values.tolist()
    assert again.targets == first.targets
    assert again.macs < first.macs
    made_up = score(pool, path, candidates, targets={**first.targets, 5: 0.0})
    assert made_up.values[candidates.index(5)] == 0
    pool.ran.clear()
    assert score(pool, Path(), (0, 4), targets={0: 0.5, 4: 0.25}).values.tolist() == [0.5, 0.25]
    assert not pool.ran  # nothing to find out


@pytest.mark.parametrize("rule", RULES)
def test_a_client_of_one_class_scores_zero_where_targets_count(rule: str):
    pool = small_pool()
    inputs, _ = data()
    for name in CANDIDATES:
        labels = torch.full((NUM,), 2)
        found = score_blocks(pool, paths(pool)[name], CANDIDATES[name], inputs, labels, CLASSES, RULES[rule], 0, {})
        assert np.isfinite(found.values).all()
        if rule != "compat" or name == "empty":
            assert found.values.tolist() == [0.0] * len(CANDIDATES[name])


def test_dead_features_score_zero():
    pool = small_pool()
    dead: nn.Conv2d = pool.modules[5][0]  # type: ignore[index, assignment]
    nn.init.zeros_(dead.weight)
    pool.modules[5][1].running_mean.fill_(5)  # type: ignore[index, union-attr, operator]
    found = score(pool, paths(pool)["native"], (2, 6))
    assert found.values[0] > 0
    assert found.values[1] == 0


def test_features_that_are_not_finite_are_seen():
    pool = small_pool()
    pool.modules[5][1].running_mean.fill_(np.nan)  # type: ignore[index, union-attr, operator]
    assert np.isnan(score(pool, paths(pool)["native"], (2, 6)).values).tolist() == [False, True]


def test_identical_blocks_have_identical_scores():
    first = small_pool()
    twins = FakePool({"a": first.modules[:4], "b": first.modules[4:7], "c": first.modules[4:7]}, (3, 12, 12))
    for rule in RULES.values():
        found = score(twins, Path((0, 1)), (5, 6, 8, 9), rule).values
        assert found[:2].tolist() == found[2:].tolist()


def test_maps_of_one_pixel():
    torch.manual_seed(0)
    pool = FakePool({"a": [conv(3, 4, 12), conv(4, 5)], "b": [conv(3, 6, 4), conv(6, 5, 3)]}, (3, 12, 12))
    assert pool.blocks[0].shape_out == (4, 1, 1)
    for rule in (PRODUCT, LOOKAHEAD):
        assert np.isfinite(score(pool, Path((0,)), (1, 3), rule).values).all()
    sums = bridge_sums(pool, Path((0,)), 3, data()[0], 0, np.random.default_rng(0)).sums
    assert sums.num_rows == 9 * NUM


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda pool: score(pool, Path(), ()), "at least one candidate"),
        (lambda pool: score(pool, Path(), (0, 5)), r"blocks \[5\] cannot follow path \(\)"),
        (lambda pool: score(pool, paths(pool)["vectors"], (6, 9)), r"blocks \[6\] cannot follow path \(4, 8\)"),
        (
            lambda pool: score_blocks(pool, Path(), (0,), *data(0), CLASSES, PRODUCT, 0, {}),
            "at least one image",
        ),
        (lambda pool: score(pool, Path(), (0,), batch_size=0), "at least 1 image, got batch_size=0"),
        (
            lambda pool: bridge_sums(pool, paths(pool)["vectors"], 6, data()[0], 0, np.random.default_rng(0)),
            r"block 6 reads maps \(9, 6, 6\), which cannot be made of the vectors \(11,\) of block 8",
        ),
        (lambda _: ScoreRule(mode="sum"), "unknown score mode 'sum'; known: product, lookahead"),  # type: ignore[arg-type]
        (lambda _: ScoreRule(alpha=-1), "alpha of a score rule must be >= 0"),
    ],
)
def test_errors(call: Callable[[FakePool], object], match: str):
    with pytest.raises(ValueError, match=match):
        call(small_pool())


# Work.


@pytest.mark.parametrize(("name", "rule"), product(CANDIDATES, RULES))
@pytest.mark.parametrize("size", [8, 16, 64])
def test_scoring_does_what_was_planned(name: str, rule: str, size: int):
    pool, pacer = small_pool(), Recorder()
    path, candidates = paths(pool)[name], CANDIDATES[name]
    work = Scoring(pool, path, candidates, RULES[rule]).work(NUM, size)
    found = score(pool, path, candidates, RULES[rule], pacer=pacer, batch_size=size)
    assert pacer.plans == [(work.num_batches, work.images, work.macs)]
    assert pacer.batches == work.num_batches
    assert found.macs == work.macs
    assert found.cached_bytes == work.kept_bytes
    assert set(pool.ran) == set(work.blocks)
    assert len(work.blocks) == len(set(work.blocks))
    assert found.macs - pool.block_macs == bridge_work(pool, path, candidates, RULES[rule])
    assert max(pool.calls, default=0) <= GROUP


def bridge_work(pool: FakePool, path: Path, candidates: tuple[int, ...], rule: ScoreRule) -> int:
    """What bridges multiply: in the path, once in each pass that runs it; and in front of candidates."""

    def in_front(before: int, block: int) -> int:
        return NUM * pool.blocks[before].shape_out[0] * int(np.prod(pool.blocks[block].shape_in))

    tried = [b for b in candidates if rule.mode == "lookahead" and path.ids and path.needs_bridge(pool, b)]
    passes = bool(path.ids and (tried or rule.alpha)) + bool(tried)
    own = sum(in_front(path.ids[p - 1], path.ids[p]) for p in path.bridges)
    return passes * own + sum(in_front(path.ids[-1], b) for b in tried)


def test_each_source_is_swept_once_and_no_further_than_needed():
    pool = small_pool()
    score(pool, Path((0, 1)), (2, 5))
    assert pool.ran == {0: NUM, 1: NUM, 2: NUM, 4: NUM, 5: NUM}  # the path itself runs with its source
    pool.ran.clear()
    score(pool, Path((0, 1)), (2, 5), RULES["compat"])
    assert pool.ran == {0: NUM, 1: NUM, 4: NUM}
    pool.ran.clear()
    score(pool, Path((0, 1)), (5,), RULES["target"])
    assert pool.ran == {4: NUM, 5: NUM}
    pool.ran.clear()
    score(pool, bridged(pool, Path((0, 1)), 5), (3,), RULES["compat"])
    assert pool.ran == {0: NUM, 1: NUM, 2: NUM, 5: NUM}


@pytest.mark.parametrize(("name", "block"), [("native", 2), ("native", 6), ("mixed", 3), ("mixed", 6), ("vectors", 9)])
def test_sums_for_a_bridge(name: str, block: int):
    pool, pacer = small_pool(), Recorder()
    path, (inputs, _) = paths(pool)[name], data()
    work = plan_bridge(pool, path, block, NUM, 8)
    found = bridge_sums(pool, path, block, inputs, 0, np.random.default_rng(0), pacer, 8)
    assert pacer.plans == [(work.num_batches, work.images, work.macs)]
    assert (pacer.batches, found.macs, set(pool.ran)) == (3, work.macs, set(work.blocks))
    own = [b.id for b in pool.of(pool.blocks[block].source)][: pool.blocks[block].index - 1]
    runs = Counter([*path.ids, *own])
    runs.subtract(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(path.ids, own, strict=False)))  # once
    assert pool.ran == {b: NUM * times for b, times in runs.items()}
    bridges = sum(
        NUM * path.bridges[p].weight.shape[1] * int(np.prod(pool.blocks[path.ids[p]].shape_in)) for p in path.bridges
    )
    assert found.macs == pool.block_macs + bridges
    assert work.kept_bytes == found.sums.gram.nbytes + found.sums.cross.nbytes
    here, there = features(pool, path, inputs), native(pool, block, inputs, count=False)
    if there.ndim == 4:
        rows = columns(resize(here, tuple(there.shape[2:]))), columns(there)  # type: ignore[arg-type]
    else:
        rows = pooled(here).numpy(), there.numpy()
    slow = sums_of(*rows)
    np.testing.assert_allclose(found.sums.gram, slow.gram, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found.sums.cross, slow.cross, rtol=1e-5, atol=1e-4)
    assert valid_sums(found.sums, rows[0].shape[1], rows[1].shape[1]) is None


def test_a_native_successor_would_get_the_identity():
    pool = small_pool()
    sums = bridge_sums(pool, Path((0,)), 1, data()[0], 0, np.random.default_rng(0)).sums
    theta = ridge(sums, 0.0)
    np.testing.assert_allclose(theta, np.eye(7)[:, :6], atol=1e-6)


def test_rows_for_a_bridge_are_drawn_once_and_the_same_of_both_sides():
    pool = small_pool()
    inputs, _ = data()
    found = [
        bridge_sums(pool, Path((0,)), 1, inputs, 50, np.random.default_rng(seed), batch_size=size).sums
        for seed, size in ((0, 8), (0, 16), (1, 8))
    ]
    assert [sums.num_rows for sums in found] == [50, 50, 50]
    np.testing.assert_allclose(found[0].gram, found[1].gram, rtol=1e-12)
    assert not np.allclose(found[0].gram, found[2].gram)
    for sums in found:  # in front of the native successor both sides are equal
        np.testing.assert_array_equal(sums.gram[:, :-1], sums.cross)


def test_bridges_depend_on_no_division_of_the_data():
    pool = small_pool()
    inputs, _ = data(4 * GROUP)
    path = paths(pool)["mixed"]
    parts = [bridge_sums(pool, path, 3, part, 0, np.random.default_rng(0)).sums for part in inputs.split(GROUP)]
    whole = bridge_sums(pool, path, 3, inputs, 0, np.random.default_rng(0), batch_size=GROUP).sums
    together = parts[3] + parts[0] + parts[2] + parts[1]
    np.testing.assert_allclose(ridge(together, 1e-2), ridge(whole, 1e-2), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["native", "mixed", "vectors"])
def test_head_and_its_accuracy(name: str):
    pool, pacer = small_pool(), Recorder()
    path, (inputs, labels) = paths(pool)[name], data()
    work = plan_head(pool, path, CLASSES, NUM, 16)
    found = head_sums(pool, path, inputs, labels, CLASSES, pacer, 16)
    assert pacer.plans == [(2, NUM, found.macs)] == [(work.num_batches, work.images, work.macs)]
    assert set(pool.ran) == set(work.blocks) == set(path.ids)
    assert work.kept_bytes == found.sums.gram.nbytes + found.sums.cross.nbytes
    phi = pooled(features(pool, path, inputs))
    np.testing.assert_allclose(found.sums.gram, class_sums(phi.numpy(), labels.numpy(), CLASSES).gram, rtol=1e-5)
    np.testing.assert_allclose(found.sums.cross, class_sums(phi.numpy(), labels.numpy(), CLASSES).cross, rtol=1e-5)

    head, pacer = solve_head(found.sums, 1e-4), Recorder()
    pool.ran.clear()
    work = plan_count(pool, path, CLASSES, NUM, 16)
    counted = count_correct(pool, path, head, inputs, labels, pacer, 16)
    assert pacer.plans == [(2, NUM, counted.macs)] == [(work.num_batches, work.images, work.macs)]
    assert pacer.batches == 2
    assert counted.macs - pool.block_macs - NUM * phi.shape[1] * CLASSES == sum(
        NUM * path.bridges[p].weight.shape[1] * int(np.prod(pool.blocks[path.ids[p]].shape_in)) for p in path.bridges
    )
    logits = phi.double().numpy() @ head[:-1] + head[-1]
    assert counted[:2] == (int((logits.argmax(1) == labels.numpy()).sum()), NUM)
    assert counted.correct > NUM / 2 or name == "mixed"  # random bridges


def test_sums_of_the_head_do_not_depend_on_the_batch():
    pool = small_pool()
    inputs, labels = data()
    path = paths(pool)["mixed"]
    heads = [head_sums(pool, path, inputs, labels, CLASSES, batch_size=size).sums for size in (1, 16, 64)]
    for other in heads[1:]:
        np.testing.assert_allclose(other.gram, heads[0].gram, rtol=1e-12)


def test_no_images_are_no_work():
    pool, pacer = small_pool(), Recorder()
    path, (inputs, labels) = Path((0, 1)), data(0)
    assert count_correct(pool, path, np.zeros((9, CLASSES)), inputs, labels, pacer) == (0, 0, 0)
    assert head_sums(pool, path, inputs, labels, CLASSES).sums.num_rows == 0
    assert bridge_sums(pool, path, 5, inputs, 10, np.random.default_rng(0)).sums.num_rows == 0
    assert (pacer.plans, pacer.batches) == ([(0, 0, 0)], 0)


def test_the_pool_stays_as_it_was():
    pool = small_pool()
    before = pool.digest()
    inputs, labels = data()
    for rule in RULES.values():
        for name, candidates in CANDIDATES.items():
            score(pool, paths(pool)[name], candidates, rule)
    bridge_sums(pool, Path((0,)), 5, inputs, 10, np.random.default_rng(0))
    head_sums(pool, Path((0,)), inputs, labels, CLASSES)
    assert pool.digest() == before


def test_modelled_memory_is_the_largest_block_with_its_features_and_what_is_kept():
    pool = small_pool()
    work = Scoring(pool, Path((0, 1)), (5,), PRODUCT).work(NUM, 16)
    assert work.blocks == (0, 1, 4, 5)
    each = {b: pool.blocks[b].param_bytes + 4 * 16 * numel(pool, b) for b in work.blocks}
    assert modelled_peak_bytes(pool, work, 16) == max(each.values()) + work.kept_bytes
    assert modelled_peak_bytes(pool, work, 9) == modelled_peak_bytes(pool, work, 16)  # whole groups
    assert modelled_peak_bytes(pool, work, 8) < modelled_peak_bytes(pool, work, 16)
    rows = min(50, NUM * 36)  # 10 min(8, 5) of 6 x 6 positions
    assert work.kept_bytes == 4 * (rows * 8 + rows * 5 + NUM * 9)


def numel(pool: FakePool, block: int) -> int:
    return int(np.prod(pool.blocks[block].shape_in) + np.prod(pool.blocks[block].shape_out))


def test_batches_are_whole_groups():
    assert [whole_groups(size) for size in (1, 8, 9, 64)] == [8, 8, 16, 64]
