from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from toy import LAYOUTS, dense_mean, place, random_arrays, random_difference, random_units, same_bits

from flexfed.averaging import Averager, add_at, refuse_non_finite
from flexfed.select import prefix
from flexfed.submodel import Submodel, extract, flatten, full
from flexfed.units import Arrays, Layout, trace_layout


@pytest.fixture(scope="module")
def layout() -> Layout:
    return LAYOUTS["ties"]()


@pytest.fixture
def previous(layout: Layout) -> Arrays:
    return random_arrays(layout, np.random.default_rng(0))


def zeros(layout: Layout, submodel: Submodel) -> np.ndarray:
    return np.zeros_like(random_difference(layout, submodel, np.random.default_rng(0)))


# --- the worked example of FlexFL's page, 6.5 -------------------------------------------------------------------

GLOBAL = {
    "fc1.weight": [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]],
    "fc1.bias": [0.1, 0.2, 0.3, 0.4],
    "fc2.weight": [[1, 0, -1, 2], [0, 1, 2, -1]],
    "fc2.bias": [0.5, -0.5],
}
REPLIES = {  # hidden units -> (examples, values)
    2: (10, [[[2] * 3, [6] * 3], [1, 2], [[3, 3], [1, 1]], [1, 0]]),
    3: (30, [[[5] * 3, [9] * 3, [1] * 3], [4, 5, 6], [[0, 6, 9], [4, 4, 4]], [-1, 3]]),
}
MEAN = {
    "fc1.weight": [[4.25] * 3, [8.25] * 3, [1] * 3, [10, 11, 12]],
    "fc1.bias": [3.25, 4.25, 6, 0.4],
    "fc2.weight": [[0.75, 5.25, 9, 2], [3.25, 3.25, 4, -1]],
    "fc2.bias": [-0.5, 2.25],
}


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x).relu())


def arrays(values: dict[str, list]) -> Arrays:
    return {name: np.array(value, dtype=np.float32) for name, value in values.items()}


@pytest.mark.parametrize("order", [(2, 3), (3, 2)])
def test_sample_weighted_mean_of_the_worked_example(order: tuple[int, int]) -> None:
    layout, old = trace_layout(TwoLayers, (3,)), arrays(GLOBAL)
    averager = Averager(layout, old)
    for hidden in order:
        examples, values = REPLIES[hidden]
        part = prefix(layout, {"fc1": hidden})
        trained = flatten(layout, part, arrays(dict(zip(GLOBAL, values, strict=True))))
        averager.add(part, trained - flatten(layout, part, extract(layout, part, old)), examples)
    new = averager.result()
    for name, expected in MEAN.items():
        np.testing.assert_allclose(new[name], expected, rtol=1e-6, atol=1e-6)
    assert new["fc1.weight"][3].tobytes() == old["fc1.weight"][3].tobytes()


# --- what comes in ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_weights_are_positive_and_finite(layout: Layout, previous: Arrays, weight: float) -> None:
    with pytest.raises(ValueError, match="weight of a reply must be positive and finite, got"):
        Averager(layout, previous).add(full(layout), zeros(layout, full(layout)), weight)


def test_differences_that_do_not_fit_are_refused(layout: Layout, previous: Arrays) -> None:
    whole = full(layout)
    good = zeros(layout, whole)
    averager = Averager(layout, previous)
    for wrong in (good[:-1], np.append(good, good[:1]), good.reshape(1, -1), good[:1], good[:0]):
        with pytest.raises(ValueError, match=f"a difference of {len(good)} numbers is expected, got shape"):
            averager.add(whole, wrong)
    for dtype in (np.float64, np.float16, np.int32):
        with pytest.raises(ValueError, match=f"must be float32, got {np.dtype(dtype)}"):
            averager.add(whole, good.astype(dtype))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, -1])
def test_numbers_that_are_not_finite_are_refused(layout: Layout, previous: Arrays, bad: float, where: int) -> None:
    difference = zeros(layout, full(layout))
    difference[where] = bad
    with pytest.raises(ValueError, match=f"1 of {len(difference)} numbers are NaN or infinite"):
        Averager(layout, previous).add(full(layout), difference)


def test_infinities_that_cancel_are_seen_and_large_numbers_pass() -> None:
    with pytest.raises(ValueError, match="2 of 3 numbers"):
        refuse_non_finite(torch.tensor([np.inf, 1.0, -np.inf]))
    refuse_non_finite(torch.full((10**6,), 9e17))
    with pytest.raises(ValueError, match="10 of 10 numbers are NaN or infinite, or above"):
        refuse_non_finite(torch.full((10,), 3e38))  # finite, but a weighted sum of such numbers is not
    refuse_non_finite(torch.zeros(0))


def test_a_refused_reply_leaves_no_trace(layout: Layout, previous: Arrays) -> None:
    rng = np.random.default_rng(0)
    part = Submodel(random_units(layout, rng))
    good = random_difference(layout, part, rng)
    averager = Averager(layout, previous)
    averager.add(part, good, 2.0)
    for difference, weight in ((good * np.nan, 1.0), (good[1:], 1.0), (good, 0.0), (good.astype(np.float64), 1.0)):
        with pytest.raises(ValueError, match=r"."):
            averager.add(part, difference, weight)
        with pytest.raises(ValueError, match=r"."):
            averager.add(full(layout), difference, weight)
    alone = Averager(layout, previous)
    alone.add(part, good, 2.0)
    assert (averager.num_replies, averager.total_weight) == (1, 2.0)
    assert same_bits(averager.result(), alone.result())


def test_per_is_one_of_two(layout: Layout, previous: Arrays) -> None:
    with pytest.raises(ValueError, match="per must be 'coverage' or 'total', got 'mean'"):
        Averager(layout, previous, "mean")  # type: ignore[arg-type]


def test_replies_that_cannot_be_written_fold_without_a_warning(layout: Layout, previous: Arrays) -> None:
    sent = np.frombuffer(zeros(layout, full(layout)).tobytes(), dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Averager(layout, previous).add(full(layout), sent)


def test_a_folded_reply_is_forgotten(layout: Layout, previous: Arrays) -> None:
    rng = np.random.default_rng(0)
    for part in (full(layout), Submodel(random_units(layout, rng))):
        averager, other = Averager(layout, previous), Averager(layout, previous)
        difference = random_difference(layout, part, rng)
        for a in (averager, other):
            a.add(part, difference)
        difference[:] = np.nan
        assert same_bits(averager.result(), other.result())


# --- what comes out ---------------------------------------------------------------------------------------------


def test_no_reply_no_change(layout: Layout, previous: Arrays) -> None:
    new = Averager(layout, previous).result()
    assert same_bits(new, previous)
    assert not any(np.shares_memory(new[name], previous[name]) for name in new)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_what_nobody_covers_keeps_its_bytes(layout: Layout, previous: Arrays, kind: type) -> None:
    """Also those of -0, to which nothing can be added without a change, and of numbers that are none."""
    odd = {name: np.where(array > 0.5, kind(-0.0), array.astype(kind)) for name, array in previous.items()}
    odd["fc.bias"][3:5] = np.nan, -0.0
    part = prefix(layout, {"stem": 3, "fc": 3, "side": 2})
    averager = Averager(layout, odd)
    averager.add(part, random_difference(layout, part, np.random.default_rng(1)))
    new = averager.result()
    for name in layout.shapes:
        untouched = np.ones(layout.shapes[name], dtype=bool)
        untouched[place(layout, part, name)] = False
        assert new[name][untouched].tobytes() == odd[name][untouched].tobytes()
        assert new[name].dtype == kind
        assert not np.array_equal(new[name], odd[name])


def test_one_client_with_everything_is_the_new_model(layout: Layout, previous: Arrays) -> None:
    trained = random_arrays(layout, np.random.default_rng(1))
    averager = Averager(layout, previous)
    averager.add(full(layout), flatten(layout, full(layout), trained) - flatten(layout, full(layout), previous), 7.0)
    for name, array in averager.result().items():
        np.testing.assert_allclose(array, trained[name], rtol=1e-5, atol=1e-6)


def test_equal_whole_replies_give_their_difference_exactly(layout: Layout, previous: Arrays) -> None:
    difference = random_difference(layout, full(layout), np.random.default_rng(1))
    averager = Averager(layout, {name: np.zeros_like(array) for name, array in previous.items()})
    for _ in range(2):  # doubling does not round
        averager.add(full(layout), difference)
    assert np.array_equal(flatten(layout, full(layout), averager.result()), difference)


def test_total_divides_by_the_weight_of_those_that_hold_nothing_there(layout: Layout) -> None:
    nothing = {name: np.zeros(shape, dtype=np.float32) for name, shape in layout.shapes.items()}
    averager = Averager(layout, nothing, per="total")
    small = prefix(layout, {"fc": 1})
    averager.add(small, zeros(layout, small) + 1, 1.0)
    averager.add(full(layout), zeros(layout, full(layout)) + 4, 3.0)
    bias = averager.result()["fc.bias"]
    np.testing.assert_allclose(bias, [(1 + 12) / 4] + [12 / 4] * 6)


@pytest.mark.parametrize("group", ["inner", "side", "fc", "classifier"])
def test_a_part_without_any_unit_of_a_group_covers_nothing_there(layout: Layout, previous: Arrays, group: str) -> None:
    """A client may claim so little: it is the averager's to survive it, whatever the order of the gaps."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        units = random_units(layout, rng)
        span = layout.groups[group]
        units[span.start : span.stop] = False
        replies = [(part, random_difference(layout, part, rng), 1.0) for part in [Submodel(units)]]
        averager = Averager(layout, previous)
        averager.add(*replies[0])
        expected, _ = dense_mean(layout, previous, replies)
        new = averager.result()
        for name in layout.shapes:
            np.testing.assert_allclose(new[name], expected[name], rtol=1e-5, atol=1e-6)


def test_kinds_that_came_once_and_come_again_are_in_the_mean(layout: Layout, previous: Arrays) -> None:
    """More kinds than may have a pool before one of them recurs: some are scattered first and pooled later."""
    rng = np.random.default_rng(0)
    parts = [Submodel(random_units(layout, rng)) for _ in range(12)]
    replies = [(part, random_difference(layout, part, rng), 2.0) for part in [*parts, *parts, *reversed(parts)]]
    averager = Averager(layout, previous)
    for one in replies:
        averager.add(*one)
    expected, _ = dense_mean(layout, previous, replies)
    new = averager.result()
    for name in layout.shapes:
        np.testing.assert_allclose(new[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 7, 1 << 16])  # numbers in one go: less than a row, a row and more, all
@pytest.mark.parametrize("shape", [(6, 5, 3), (6, 5, 1), (6, 5)])
def test_add_at_agrees_with_an_open_mesh(shape: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexfed.averaging._AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    whole = (None,) * (len(shape) - 2)
    choices = [None, np.array([0, 1, 2]), np.array([0, 2, 4]), np.array([3]), np.array([], dtype=np.int64)]
    for rows in choices:
        for columns in choices:
            mesh = np.ix_(
                *[np.arange(n) if i is None else i for i, n in zip((rows, columns, *whole), shape, strict=True)]
            )
            into = rng.standard_normal(shape).astype(np.float32)
            values = rng.standard_normal([len(axis.ravel()) for axis in mesh]).astype(np.float32)
            expected = into.copy()
            expected[mesh] += np.float32(2.5) * values
            add_at(torch.from_numpy(into), (rows, columns, *whole), torch.from_numpy(values), 2.5)
            np.testing.assert_allclose(into, expected, rtol=1e-6, atol=1e-6)
