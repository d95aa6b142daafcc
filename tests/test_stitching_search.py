"""The search space: the worked example, and what holds for every pool and every run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexfed.stitching.blocks import Block
from flexfed.stitching.search import SearchConfig, Shrunk, eligible, is_over, kept_sources, reaches_end, shrink

MAP = (4, 6, 6)
NAMES = ("A", "B", "C", "D")


def pool(counts: Sequence[int], vectors: Sequence[int] = ()) -> tuple[Block, ...]:
    """Sources A, B, ... of so many blocks; the last `vectors[j]` blocks of a source give vectors."""
    found: list[Block] = []
    for j, num in enumerate(counts):
        for i in range(num):
            first_flat = num - (vectors[j] if vectors else 0)
            shape_in, shape_out = ((4,) if i > first_flat else MAP), ((4,) if i >= first_flat else MAP)
            name = chr(ord("A") + j)
            found.append(Block(len(found), name, i + 1, i / num, (i + 1) / num, shape_in, shape_out, 8, 8))
    return tuple(found)


FOUR = pool([4, 4, 4, 4])


def ids(*names: str) -> tuple[int, ...]:
    return tuple(sorted(4 * NAMES.index(name[0]) + int(name[1]) - 1 for name in names))


def named(scores: dict[str, float]) -> dict[int, float]:
    return {ids(name)[0]: score for name, score in scores.items()}


# The worked example.

ROUNDS = (  # scores, chosen, what each rule removes, what stays
    (
        {"A1": 0.20, "B1": 0.16, "C1": 0.09, "D1": 0.05},
        "A1",
        (("A1",), ("B1", "C1", "D1"), (), ("D2", "D3", "D4")),
        ("A2", "A3", "A4", "B2", "B3", "B4", "C2", "C3", "C4"),
    ),
    (
        {"A2": 0.30, "B2": 0.34, "C2": 0.12, "A3": 0.22, "B3": 0.15, "C3": 0.10},
        "B2",
        (("B2",), ("A2", "C2"), ("B3", "C3"), ()),
        ("A3", "A4", "B4", "C4"),
    ),
    (
        {"A3": 0.41, "A4": 0.18, "B4": 0.25, "C4": 0.10},
        "A3",
        (("A3",), (), ("A4", "C4"), ()),
        ("B4",),
    ),
    ({"B4": 0.55}, "B4", (("B4",), (), (), ()), ()),
)


def test_worked_example():
    config = SearchConfig()
    alive: tuple[int, ...] = tuple(range(16))
    values: dict[str, float] = {}
    last: int | None = None
    for number, (scores, name, removed, left) in enumerate(ROUNDS, start=1):
        scored = named(scores)
        assert eligible(FOUR, alive, last, number, config) == tuple(sorted(scored))
        (last,) = ids(name)
        result = shrink(FOUR, alive, last, scored, values, config)
        assert [result.removed[rule] for rule in ("R1", "R2", "R3", "R4")] == [ids(*names) for names in removed]
        assert (result.alive, result.guarded) == (ids(*left), False)
        alive, values = result.alive, dict(result.values)
        if number == 2:
            assert values == pytest.approx({"A": 0.25, "B": 0.25, "C": 0.105, "D": 0.05})
        assert is_over(FOUR[last], number, config) == (number == 4)


# What holds in every run.


def play(blocks: Sequence[Block], config: SearchConfig, seed: int, check: bool = True) -> tuple[list[int], str]:
    """A whole run with random scores and random choices: the path, and why it stopped."""
    rng = np.random.default_rng(seed)
    alive, values, path = tuple(range(len(blocks))), {}, []
    for number in range(1, config.t_max + 1):
        last = path[-1] if path else None
        candidates = eligible(blocks, alive, last, number, config)
        if not candidates:
            return path, "empty"
        assert set(candidates) <= set(alive)
        assert list(candidates) == sorted(candidates)
        scored = dict(zip(candidates, rng.random(len(candidates)).tolist(), strict=True))
        chosen = max(scored, key=scored.__getitem__) if rng.random() < 0.5 else int(rng.choice(candidates))
        result = shrink(blocks, alive, chosen, scored if len(scored) > 1 else {}, values, config)
        if check:
            require_invariants(blocks, alive, chosen, result, config)
        alive, values = result.alive, dict(result.values)
        path.append(chosen)
        if is_over(blocks[chosen], number, config):
            return path, "end" if blocks[chosen].is_end else "rounds"
    raise AssertionError("a run that did not stop")


def require_invariants(
    blocks: Sequence[Block], before: Sequence[int], chosen: int, result: Shrunk, config: SearchConfig
) -> None:
    assert set(result.alive) < set(before)
    assert chosen not in result.alive
    removed = [b for gone in result.removed.values() for b in gone]
    assert sorted([*removed, *result.alive]) == sorted(before)  # each block is removed by one rule
    assert all(blocks[b].depth_in >= blocks[chosen].depth_out - 1e-9 for b in result.alive)
    if result.guarded or not config.enabled:
        assert not result.removed["R3"] + result.removed["R4"]


def require_rising(blocks: Sequence[Block], path: Sequence[int]) -> None:
    assert blocks[path[0]].is_start
    for before, after in pairwise(path):
        assert blocks[after].depth_in >= blocks[before].depth_out - 1e-9
        assert blocks[after].depth_out > blocks[before].depth_out


@pytest.mark.parametrize("enabled", [True, False])
@settings(deadline=None)
@given(
    num_blocks=st.integers(1, 9),
    num_sources=st.integers(1, 5),
    delta=st.sampled_from([0.0, 0.1, 0.25, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_sources_of_equal_length_never_end_in_a_dead_end(
    enabled: bool, num_blocks: int, num_sources: int, delta: float, seed: int
):
    blocks = pool([num_blocks] * num_sources)
    config = SearchConfig(enabled=enabled, delta=delta, t_max=20, r3=0.9, r4=0.3, min_sources=1)
    path, why = play(blocks, config, seed)
    require_rising(blocks, path)
    assert why == "end"


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(1, 10), min_size=1, max_size=5),
    seed=st.integers(0, 10**6),
    t_max=st.integers(1, 12),
    policy=st.sampled_from(["allow", "exclude"]),
)
def test_any_pool(counts: list[int], seed: int, t_max: int, policy: str):
    blocks = pool(counts)
    config = SearchConfig(t_max=t_max, native_policy=policy)  # type: ignore[arg-type]
    path, why = play(blocks, config, seed)
    if path:
        require_rising(blocks, path)
        assert why != "end" or blocks[path[-1]].depth_out == 1
    if policy == "exclude":
        assert all(not successor(blocks[a], blocks[b]) for a, b in pairwise(path))


def successor(block: Block, after: Block) -> bool:
    return (block.source, block.index + 1) == (after.source, after.index)


def test_sources_of_unequal_length_may_be_stranded_and_the_run_stops():
    """As the page says of 10, 8 and 9 blocks: a few of 2000 runs."""
    blocks = pool([10, 8, 9])
    ends = [play(blocks, SearchConfig(t_max=20), seed, check=False)[1] for seed in range(2000)]
    assert set(ends) == {"end", "empty"}
    assert ends.count("empty") < 40


@settings(deadline=None)
@given(seed=st.integers(0, 10**6))
def test_maps_never_follow_vectors(seed: int):
    blocks = pool([4, 4, 4], vectors=(3, 1, 2))
    path, _ = play(blocks, SearchConfig(), seed)
    assert all(len(blocks[a].shape_out) >= len(blocks[b].shape_in) for a, b in pairwise(path))


# Eligibility.


def test_first_come_start_blocks():
    assert eligible(FOUR, range(16), None, 1, SearchConfig()) == ids("A1", "B1", "C1", "D1")
    assert eligible(FOUR, ids("A2", "B1"), None, 1, SearchConfig()) == ids("B1")
    assert eligible(FOUR, (), None, 1, SearchConfig()) == ()


def test_later_those_near_the_depth_reached():
    (a1,) = ids("A1")
    near = ("A2", "B2", "C2", "D2")
    assert eligible(FOUR, range(16), a1, 2, SearchConfig(delta=0.0)) == ids(*near)
    assert eligible(FOUR, range(16), a1, 2, SearchConfig(delta=0.24)) == ids(*near)
    assert eligible(FOUR, range(16), a1, 2, SearchConfig()) == ids(*near, "A3", "B3", "C3", "D3")


def test_depths_that_are_equal_but_for_rounding_are_equal():
    blocks = pool([3, 6])
    assert 3 + 4 in eligible(blocks, range(9), 1, 2, SearchConfig(delta=0.0))  # 4/6 behind 2/3
    thirds = pool([3, 9])
    assert 3 + 6 in eligible(thirds, range(12), 1, 2, SearchConfig(delta=0.0))
    almost = [replace(thirds[0], depth_out=0.1 + 0.2), replace(thirds[1], id=1, depth_in=0.3)]
    assert eligible(almost, (1,), 0, 2, SearchConfig()) == (1,)
    assert 3 + 7 in eligible(thirds, range(12), 1, 2, SearchConfig(delta=1 / 9))  # 7/9 - 6/9


def test_where_none_is_near_all_behind_are_eligible():
    (a1,) = ids("A1")
    assert eligible(FOUR, ids("A1", "C3", "D4"), a1, 2, SearchConfig(delta=0.1)) == ids("C3", "D4")
    assert eligible(FOUR, ids("B1"), a1, 2, SearchConfig()) == ()


def test_the_last_round_takes_blocks_that_end_a_source():
    (a1,) = ids("A1")
    assert eligible(FOUR, range(16), a1, 3, SearchConfig(t_max=3)) == ids("A4", "B4", "C4", "D4")
    assert eligible(FOUR, ids("A2", "A3"), a1, 3, SearchConfig(t_max=3)) == ()
    assert eligible(FOUR, range(16), None, 1, SearchConfig(t_max=1)) == ()
    assert eligible(pool([1, 2]), range(3), None, 1, SearchConfig(t_max=1)) == (0,)
    assert eligible(pool([2, 4]), range(6), 2, 2, SearchConfig(t_max=2)) == (1, 5)  # however far behind
    blocks = pool([10, 4])
    assert eligible(blocks, range(14), 9, 3, SearchConfig(t_max=3)) == ()  # nothing is behind an end


def test_native_successors_can_be_excluded():
    a2, others = ids("A2")[0], ids("B3", "C3", "D3")
    strict = SearchConfig(native_policy="exclude", delta=0.0)
    assert eligible(FOUR, range(16), a2, 3, strict) == others
    assert eligible(FOUR, ids("A3", "A4", "B4"), a2, 3, strict) == ids("A4", "B4")
    assert eligible(FOUR, ids("A3"), a2, 3, strict) == ()


def test_maps_are_not_eligible_behind_vectors():
    blocks = pool([4, 4], vectors=(3, 1))
    assert eligible(blocks, range(8), 1, 3, SearchConfig(delta=0.0)) == (2,)
    assert eligible(blocks, (6, 7), 1, 3, SearchConfig(delta=0.0)) == ()


# Shrinking.


def test_off_only_what_can_never_come_goes():
    config = SearchConfig(enabled=False)
    scored = named({"A1": 0.9, "B1": 0.1, "C1": 0.0, "D1": 0.0})
    result = shrink(FOUR, range(16), 0, scored, {}, config)
    assert result.removed == {"R1": ids("A1"), "R2": ids("B1", "C1", "D1"), "R3": (), "R4": ()}
    assert result.alive == tuple(b for b in range(16) if FOUR[b].index > 1)


def test_without_scores_low_ones_cannot_go():
    result = shrink(FOUR, range(16), 0, {}, {"A": 0.1, "B": 0.9}, SearchConfig())
    assert not result.removed["R3"] + result.removed["R4"]
    assert result.values == {"A": 0.1, "B": 0.9}


def test_low_scores_go_below_half_of_the_best_but_not_at_it():
    (a1,) = ids("A1")
    scored = named({"A2": 0.4, "B2": 0.1, "A3": 0.2, "B3": 0.19})
    result = shrink(FOUR, ids("A1", "A2", "B2", "A3", "B3", "A4"), a1, scored, {}, SearchConfig(delta=1.0))
    assert result.removed["R3"] == ids("B2", "B3")


def test_the_guard_brings_back_what_is_needed():
    (a1,) = ids("A1")
    alive = ids("A1", "A3", "B2", "B3", "B4", "C2")
    scored = named({"A3": 1.0, "B2": 0.1, "B3": 0.1, "C2": 0.1})
    config = SearchConfig(min_sources=1, r4=0.1)
    result = shrink(FOUR, alive, a1, scored, {}, config)
    assert result.guarded
    assert (result.removed["R3"], result.removed["R4"]) == ((), ())
    assert result.alive == ids("A3", "B2", "B3", "B4", "C2")
    assert result.values == {"A": 1.0, "B": 0.1, "C": 0.1}
    assert not shrink(FOUR, ids("A1", "A3", "A4", "B2"), a1, scored, {}, config).guarded


def test_an_end_block_needs_no_way_out():
    (a4,) = ids("A4")
    result = shrink(FOUR, ids("A4", "B4"), a4, named({"A4": 0.9, "B4": 0.1}), {}, SearchConfig())
    assert (result.alive, result.guarded) == ((), False)


def test_a_chain_steps_no_further_than_delta():
    config = SearchConfig(delta=0.25)
    assert reaches_end(FOUR, ids("B3", "C4"), 0, config)
    assert not reaches_end(FOUR, ids("C4"), 0, config)
    assert reaches_end(FOUR, ids("C4"), 0, SearchConfig(delta=0.5))
    strict = SearchConfig(native_policy="exclude")
    assert not reaches_end(FOUR, ids("A2", "A4"), ids("A1")[0], SearchConfig(native_policy="exclude", delta=0.25))
    assert reaches_end(FOUR, ids("A3", "B4"), ids("A1")[0], strict)


def test_sources_stay_by_value_then_by_name():
    values = {"A": 0.3, "B": 0.3, "C": 0.5, "D": 0.1}
    assert kept_sources(NAMES, "C", values, SearchConfig(r4=0.5)) == {"C", "A"}
    assert kept_sources(NAMES, "D", values, SearchConfig(r4=0.5)) == {"C", "A", "D"}  # its own comes on top
    assert kept_sources(NAMES, "C", values, SearchConfig(r4=0.1)) == {"C", "A"}
    assert kept_sources(NAMES, "C", values, SearchConfig(r4=0.1, min_sources=1)) == {"C"}
    assert kept_sources(("A", "B"), "C", values, SearchConfig(r4=1.0)) == {"A", "B", "C"}
    assert kept_sources(("A", "B", "E"), "A", values, SearchConfig(r4=0.5)) == {"A", "B"}  # E was never scored


def test_a_share_of_the_sources_is_not_rounded_up_by_a_hair():
    many = [f"s{i:02}" for i in range(30)]
    assert 0.1 * 30 > 3 - 1e-9
    assert len(kept_sources(many, "s00", dict.fromkeys(many, 0.1), SearchConfig(r4=0.1))) == 3


def test_values_are_smoothed():
    result = shrink(
        FOUR, ids("A1", "A2", "B2", "A3"), 0, named({"A2": 0.4, "A3": 0.6, "B2": 0.5}), {"A": 0.2}, SearchConfig()
    )
    assert result.values == pytest.approx({"A": 0.4, "B": 0.5})


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: shrink(FOUR, (1, 2), 0, {}, {}, SearchConfig()), "block 0 was chosen but is not in the pool"),
        (lambda: SearchConfig(delta=-0.1), "delta of the search must be >= 0"),
        (lambda: SearchConfig(delta=math.nan), "delta"),
        (lambda: SearchConfig(t_max=0), "t-max of the search must be at least 1"),
        (lambda: SearchConfig(r3=1.5), "r3"),
        (lambda: SearchConfig(r4=0), "r4"),
        (lambda: SearchConfig(min_sources=0), "min-sources"),
        (lambda: SearchConfig(native_policy="never"), "allow or exclude, got 'never'"),  # type: ignore[arg-type]
    ],
)
def test_errors(call: Callable[[], object], match: str):
    with pytest.raises(ValueError, match=match):
        call()
