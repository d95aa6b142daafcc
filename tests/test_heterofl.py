from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from toy import lines, run_toy

from flexfed.averaging import Averager
from flexfed.cost import num_parameters
from flexfed.methods.heterofl import (
    Fill,
    HeteroFLConfig,
    capacity_level,
    dynamic_levels,
    fixed_levels,
    limit_classes,
    masked_cross_entropy,
    parse_shares,
)
from flexfed.models.heterofl import heterofl_conv, heterofl_resnet18
from flexfed.select import prefix_ratio
from flexfed.submodel import extract, flatten
from flexfed.units import Arrays, Layout, trace_layout

RATIOS = HeteroFLConfig().ratios


def test_defaults() -> None:
    config = HeteroFLConfig()
    assert config.ratios == (1, 0.5, 0.25, 0.125, 0.0625)
    assert (config.weights, config.masked_loss, config.statistics) == ("uniform", "zero", "batches")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"ratios": ()}, "heterofl.ratios must fall from at most 1 to above 0, largest first, got"),
        ({"ratios": (0.5, 1.0)}, "heterofl.ratios must fall"),
        ({"ratios": (1.0, 1.0)}, "heterofl.ratios must fall"),
        ({"ratios": (1.5, 1.0)}, "heterofl.ratios must fall"),
        ({"ratios": (1.0, 0.0)}, "heterofl.ratios must fall"),
        ({"ratios": (math.nan,)}, "heterofl.ratios must fall"),
        ({"assign": "random"}, "heterofl.assign must be one of capacity, fix, dynamic, got 'random'"),
        ({"weights": "equal"}, "heterofl.weights must be one of uniform, examples, got 'equal'"),
        ({"masked_loss": "inf"}, "heterofl.masked-loss must be one of zero, -inf, off, got 'inf'"),
        ({"batch_norm": "global"}, "heterofl.batch-norm must be one of federated, proxy, batch"),
        ({"statistics": "exact"}, "heterofl.statistics must be one of batches, pooled"),
        ({"assign": "fix", "shares": "a1-f1"}, "heterofl.shares: expected levels a to e, .* got 'f1'"),
    ],
)
def test_config_refuses_impossible_values(values: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        HeteroFLConfig(**values)  # type: ignore[arg-type]


def test_shares_are_not_looked_at_when_capacity_decides() -> None:
    assert HeteroFLConfig(ratios=(1.0, 0.5)).shares == "a1-b1-c1-d1-e1"


@pytest.mark.parametrize(
    ("text", "parts"),
    [("a2-b8", (2, 8, 0)), ("b8-a2", (2, 8, 0)), ("c1", (0, 0, 1)), ("a1 - b0 - c10", (1, 0, 10))],
)
def test_parse_shares(text: str, parts: tuple[int, ...]) -> None:
    assert parse_shares(text, 3) == parts


@pytest.mark.parametrize("text", ["", "a", "2", "a-1", "a2-", "a2b8", "d1", "a1-a2", "a0-a0", "A1", "a1.5"])
def test_parse_shares_refuses_what_is_no_share(text: str) -> None:
    with pytest.raises(ValueError, match="expected levels a to c, each once, like 'a2-b8', got"):
        parse_shares(text, 3)


def test_parse_shares_wants_a_part() -> None:
    with pytest.raises(ValueError, match="at least one level with a part above 0, got 'a0-b0'"):
        parse_shares("a0-b0", 3)


@pytest.mark.parametrize(
    ("num", "shares", "counts"),
    [
        (100, (2, 8, 0), [20, 80, 0]),
        (100, (1, 1, 1, 1, 1), [20] * 5),
        (12, (1, 1, 1, 1, 1), [2, 2, 2, 2, 4]),
        (5, (2, 8), [1, 4]),
        (11, (1, 2, 0), [3, 8, 0]),
        (0, (1, 1), [0, 0]),
    ],
)
def test_fixed_levels_round_down_and_give_the_rest_to_the_last(
    num: int, shares: Sequence[int], counts: list[int]
) -> None:
    levels = fixed_levels(num, shares)
    assert np.bincount(levels, minlength=len(shares)).tolist() == counts
    assert (np.diff(levels) >= 0).all()


def test_dynamic_levels_follow_the_shares_and_the_generator() -> None:
    levels = dynamic_levels(10_000, (2, 0, 8), np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(levels) / 10_000, [0.2, 0, 0.8], atol=0.02)
    assert np.array_equal(levels, dynamic_levels(10_000, (2, 0, 8), np.random.default_rng(0)))


@pytest.mark.parametrize(
    ("capacity", "level"),
    [(2.0, 0), (1.0, 0), (0.99, 1), (0.26, 1), (0.25, 2), (0.0625, 3), (0.001, 4), (0.0, 4)],
)
def test_capacity_level_is_the_largest_that_fits(capacity: float, level: int) -> None:
    assert capacity_level(capacity, [1.0, 0.2503, 0.0627, 0.0158, 0.004]) == level


# Worked example H2 of the paper page.
LOGITS, TARGET, PRESENT = [[2.0, 1.0, 0.0, -1.0]], torch.tensor([1]), torch.tensor([False, True, False, True])


@pytest.mark.parametrize(
    ("fill", "loss", "gradient"),
    [
        ("off", 1.440190, None),
        ("zero", 0.626523, [0, -0.4656, 0, 0.0723]),
        ("-inf", 0.126928, [0, -0.1192, 0, 0.1192]),
    ],
)
def test_masked_cross_entropy_of_the_worked_example(fill: Fill, loss: float, gradient: list[float] | None) -> None:
    logits = torch.tensor(LOGITS, requires_grad=True)
    value = masked_cross_entropy(logits, TARGET, PRESENT, fill)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-6)
    assert logits.grad is not None
    if gradient is not None:
        np.testing.assert_allclose(logits.grad[0], gradient, atol=1e-4)


@pytest.mark.parametrize("fill", ["zero", "-inf", "off"])
def test_masked_cross_entropy_with_every_label_is_plain(fill: Fill) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 5), torch.randint(5, (6,))
    plain = functional.cross_entropy(logits, targets)
    assert torch.equal(masked_cross_entropy(logits, targets, torch.ones(5, dtype=torch.bool), fill), plain)


@pytest.mark.parametrize(
    ("present", "match"),
    [
        (
            torch.ones(3, dtype=torch.bool),
            r"labels_present must be bool of shape \(4,\), got torch.bool of shape \(3,\)",
        ),
        (torch.ones(4), "labels_present must be bool of shape .* got torch.float32"),
        (torch.tensor([True, False, True, True]), "a target's class is absent in labels_present"),
    ],
)
def test_masked_cross_entropy_refuses_wrong_labels(present: torch.Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        masked_cross_entropy(torch.tensor(LOGITS), TARGET, present)


def two_layers() -> Layout:
    """W1 (4, 2), b1 (4), W2 (3, 4), b2 (3) of worked example H1."""
    hidden, classes = np.arange(4), np.arange(4, 7)
    return Layout(
        groups={"hidden": range(4), "classes": range(4, 7)},
        axes={"W1": (hidden, None), "b1": (hidden,), "W2": (classes, hidden), "b2": (classes,)},
        shapes={"W1": (4, 2), "b1": (4,), "W2": (3, 4), "b2": (3,)},
        fixed=frozenset({"classes"}),
    )


CLIENTS = {
    "A": (1.0, {0, 1, 2}, 1.0),
    "B": (0.5, {0, 2}, 2.0),
    "C": (0.25, {1}, 4.0),
}  # ratio, labels, returns


def combine(who: str, weights: Sequence[float]) -> Arrays:
    layout = two_layers()
    previous = {n: np.full(s, 9, dtype=np.float32) for n, s in layout.shapes.items()}
    averager = Averager(layout, previous)
    for name, weight in zip(who, weights, strict=True):
        ratio, labels, value = CLIENTS[name]
        present = np.isin(np.arange(3), list(labels))
        submodel = limit_classes(layout, prefix_ratio(layout, ratio), present)
        part = {n: value - a for n, a in extract(layout, submodel, previous).items()}
        averager.add(submodel, flatten(layout, submodel, part), weight)
    return averager.result()


# Worked example H1, reproduced with the authors' own class: W1 by rows, b1, W2, b2.
@pytest.mark.parametrize(
    ("who", "weights", "rows", "bias", "head", "head_bias"),
    [
        (
            "ABC",
            (1, 1, 1),
            [7 / 3, 1.5, 1, 1],
            [7 / 3, 1.5, 1, 1],
            [[1.5, 1.5, 1, 1], [2.5, 1, 1, 1], [1.5, 1.5, 1, 1]],
            [1.5, 2.5, 1.5],
        ),
        ("BC", (1, 1), [3, 2, 9, 9], [3, 2, 9, 9], [[2, 2, 9, 9], [4, 9, 9, 9], [2, 2, 9, 9]], [2, 4, 2]),
        (
            "ABC",
            (10, 30, 60),
            [3.1, 1.75, 1, 1],
            [3.1, 1.75, 1, 1],
            [[1.75, 1.75, 1, 1], [3.571429, 1, 1, 1], [1.75, 1.75, 1, 1]],
            [1.75, 3.571429, 1.75],
        ),
    ],
)
def test_aggregation_of_the_worked_example(
    who: str,
    weights: Sequence[float],
    rows: list[float],
    bias: list[float],
    head: list[list[float]],
    head_bias: list[float],
) -> None:
    new = combine(who, weights)
    expected = {"W1": np.repeat(rows, 2).reshape(4, 2), "b1": bias, "W2": head, "b2": head_bias}
    for name, values in expected.items():
        np.testing.assert_allclose(new[name], values, rtol=1e-6, err_msg=name)


def test_entries_that_nobody_holds_keep_their_bytes() -> None:
    new = combine("C", (1,))
    assert (new["W2"][[0, 2]] == 9).all()
    assert (new["b2"][[0, 2]] == 9).all()
    assert (new["W1"][1:] == 9).all()
    assert (new["W2"][1] == [4, 9, 9, 9]).all()


def test_limit_classes_takes_away_absent_classes_only() -> None:
    layout = two_layers()
    submodel = prefix_ratio(layout, 0.5)
    limited = limit_classes(layout, submodel, np.array([True, False, True]))
    assert limited.units.tolist() == [True, True, False, False, True, False, True]
    assert submodel.units[4:].all()  # the argument is not changed
    with pytest.raises(ValueError, match="group 'classes' has 3 class outputs, but labels of 2 classes"):
        limit_classes(layout, submodel, np.array([True, False]))


# Parameter counts of the released networks, five levels.
@pytest.mark.parametrize(
    ("build", "shape", "expected"),
    [
        (heterofl_resnet18, (3, 32, 32), [11_172_170, 2_796_714, 701_018, 176_178, 44_510]),
        (heterofl_conv, (1, 28, 28), [1_556_874, 391_370, 98_922, 25_274, 6_594]),
    ],
)
def test_parameter_counts_of_the_released_networks(
    build: Callable[..., nn.Module], shape: tuple[int, ...], expected: list[int]
) -> None:
    layout = trace_layout(partial(build, 10, shape), shape)
    assert [num_parameters(layout, prefix_ratio(layout, r)) for r in RATIOS] == expected


def test_nobody_is_asked_for_statistics_where_there_are_no_norms(tmp_path: Path) -> None:
    values = {"fraction-evaluate": 0.0}
    without = run_toy(tmp_path, "heterofl", {**values, "model": "toy:Plain"})
    assert lines(without)[0]["bytes-evaluation"] == 0
    assert lines(run_toy(tmp_path, "heterofl", values))[0]["bytes-evaluation"] > 0
