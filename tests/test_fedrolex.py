from __future__ import annotations

import numpy as np
import pytest

from flexfed.averaging import Averager
from flexfed.methods.fedrolex import Direction, FedRolexConfig, rolling
from flexfed.methods.heterofl import HeteroFLConfig
from flexfed.submodel import Submodel, extract, flatten, full
from flexfed.units import Layout


def one_layer(size: int) -> Layout:
    """One hidden group of `size` units and two classes."""
    hidden, classes = np.arange(size), np.arange(size, size + 2)
    return Layout(
        groups={"hidden": range(size), "classes": range(size, size + 2)},
        axes={"W": (hidden, None), "head": (classes, hidden)},
        shapes={"W": (size, 3), "head": (2, size)},
        fixed=frozenset({"classes"}),
    )


def hidden_units(size: int, ratio: float, server_round: int, direction: Direction = "forward") -> set[int]:
    units = rolling(one_layer(size), ratio, server_round, direction).units
    assert units[size:].all()  # classes are never cut
    return set(np.flatnonzero(units[:size]).tolist())


def test_knobs_are_heterofls_and_the_direction() -> None:
    config = FedRolexConfig(ratios=(0.5, 0.25), direction="backward")
    assert isinstance(config, HeteroFLConfig)
    assert (config.ratios, config.masked_loss, config.weights) == ((0.5, 0.25), "zero", "uniform")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"direction": "left"}, "fedrolex.direction must be one of forward, backward, got 'left'"),
        ({"weights": "updates"}, "fedrolex.weights must be one of uniform, examples, got 'updates'"),
        ({"ratios": (0.5, 2.0)}, "fedrolex.ratios must fall"),
        ({"assign": "dynamic", "shares": "x"}, "fedrolex.shares: expected levels a to e"),
    ],
)
def test_config_refuses_impossible_values(values: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FedRolexConfig(**values)  # type: ignore[arg-type]


# Worked example R1 of the paper page, whose rounds j count from 0; ours count from 1.
@pytest.mark.parametrize(
    ("j", "expected"),
    [
        (0, {0, 1, 2, 3}),
        (1, {1, 2, 3, 4}),
        (4, {4, 5, 6, 7}),
        (5, {5, 6, 7, 0}),
        (6, {6, 7, 0, 1}),
        (7, {7, 0, 1, 2}),
        (8, {0, 1, 2, 3}),
    ],
)
def test_rolling_window_of_the_worked_example(j: int, expected: set[int]) -> None:
    assert hidden_units(8, 0.5, j + 1) == expected


@pytest.mark.parametrize(("j", "expected"), [(1, {7, 0, 1, 2}), (5, {3, 4, 5, 6}), (7, {1, 2, 3, 4})])
def test_backward_is_the_released_code(j: int, expected: set[int]) -> None:
    assert hidden_units(8, 0.5, j + 1, "backward") == expected


@pytest.mark.parametrize(("j", "expected"), [(4, {4, 5, 0}), (5, {5, 0, 1}), (6, {0, 1, 2})])
def test_widths_that_do_not_divide(j: int, expected: set[int]) -> None:
    assert hidden_units(6, 0.4, j + 1) == expected


@pytest.mark.parametrize("first", [1, 4, 77])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_unit_is_used_equally_often(first: int, direction: Direction) -> None:
    uses = [unit for r in range(first, first + 8) for unit in hidden_units(8, 0.5, r, direction)]
    assert np.bincount(uses).tolist() == [4] * 8


def test_submodels_of_one_round_are_nested() -> None:
    for server_round in range(1, 20):
        assert hidden_units(16, 0.25, server_round) < hidden_units(16, 0.5, server_round)


def test_smallest_ratio_covers_the_whole_network_in_time() -> None:
    seen = set().union(*(hidden_units(16, 0.0625, r) for r in range(1, 17)))
    assert seen == set(range(16))


def test_aggregation_of_the_worked_example() -> None:
    """R2: client 1 holds outputs {3, 0} and inputs {2, 3} of a 4 x 4 matrix; client 2 holds all of it.

    The page lists client 1's rows in window order (3, then 0): [[1, 2], [3, 4]]; ours are ascending.
    """
    outputs, inputs = np.arange(4), np.arange(4, 8)
    layout = Layout({"out": range(4), "in": range(4, 8)}, {"G": (outputs, inputs)}, {"G": (4, 4)})
    previous = {"G": np.zeros((4, 4), dtype=np.float32)}
    submodel = Submodel(np.array([True, False, False, True, False, False, True, True]))
    averager = Averager(layout, previous)
    averager.add(submodel, np.array([3, 4, 1, 2], dtype=np.float32), 1.0)
    averager.add(full(layout), np.full(16, 10, dtype=np.float32), 1.0)
    expected = np.full((4, 4), 10.0)
    expected[3, 2], expected[3, 3], expected[0, 2], expected[0, 3] = 5.5, 6, 6.5, 7
    np.testing.assert_array_equal(averager.result()["G"], expected)


def test_clients_that_change_nothing_leave_the_network_bit_for_bit() -> None:
    layout = one_layer(8)
    rng = np.random.default_rng(0)
    previous = {n: rng.normal(size=s).astype(np.float32) for n, s in layout.shapes.items()}
    averager = Averager(layout, previous)
    for ratio in (1.0, 0.5, 0.25):
        submodel = rolling(layout, ratio, 7)
        nothing = {n: a - a for n, a in extract(layout, submodel, previous).items()}
        averager.add(submodel, flatten(layout, submodel, nothing), 3.0)
    for name, array in averager.result().items():
        assert array.tobytes() == previous[name].tobytes()
