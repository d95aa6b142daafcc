"""Compressed local models: the worked examples and invariants of their specification, against plain numpy and torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from test_codecs import W as SIX
from torch import Tensor, nn
from toy import LAYOUTS, random_arrays, random_units, same_bits, scatter

from flexfed.averaging import Averager
from flexfed.codecs import CODECS, pieces, quantise
from flexfed.cost import decoded_bytes
from flexfed.jobs import Part
from flexfed.methods.compressed import (
    CompressedConfig,
    CompressedNetwork,
    MeanGradient,
    num_steps,
    straight_through,
    training_in,
)
from flexfed.methods.compressed_server import Coverage, fidelity_weight, pseudo_gradient, server_step
from flexfed.methods.compressed_tiers import (
    Tier,
    compress,
    compression_error,
    magnitude_mask,
    magnitude_masks,
    num_kept,
    parse_ladder,
    parse_tier,
    pruned,
    tier_cost,
)
from flexfed.methods.fedlps import model_norms
from flexfed.narrowing import narrow
from flexfed.networks import build_on_meta
from flexfed.select import prefix_ratio, top, window
from flexfed.submodel import Submodel, extract, flatten, full, pack, unflatten
from flexfed.training import Loss, Samples, Training, fit
from flexfed.units import Arrays, Layout, trace_layout

FULL = Tier("full")
P50, Q8, Q4, P50Q8, W50, W50Q4 = map(parse_tier, ("p50", "q8", "q4", "p50q8", "w50", "w50q4"))
tiers = pytest.mark.parametrize("tier", [P50, Q8, Q4, P50Q8, W50, W50Q4, parse_tier("p90q4")], ids=lambda t: t.name)
layouts = pytest.mark.parametrize("layout", [make() for make in LAYOUTS.values()], ids=list(LAYOUTS))


def squares(inputs: Any, targets: Any) -> tuple[Samples, Loss]:
    """Samples whose labels are their numbers, and the mean of 0.5 ||o - y||^2."""
    x, y = torch.tensor(inputs, dtype=torch.float32), torch.tensor(targets, dtype=torch.float32)

    def loss(model: nn.Module, batch: Tensor, labels: Tensor) -> Tensor:
        return 0.5 * ((model(batch) - y[labels]) ** 2).sum(1).mean()

    return Samples(x, torch.arange(len(x))), loss


def gradient_of(
    factory: Callable[[], nn.Module], part: Part, tier: Tier, samples: Samples, loss: Loss, batch_size: int = 8
) -> tuple[Arrays, float]:
    """A compressed client's one gradient, narrow, and its loss."""
    network = CompressedNetwork(narrow(factory, part.arrays), part.submodel.masks, tier.bits)
    gathered = MeanGradient(network.model)
    training = training_in("grad", Training(batch_size=batch_size))
    rng = np.random.default_rng(0)
    found = fit(network.model, samples, training, 0.1, rng, gathered.loss(network.loss(loss)), gathered.step)
    return gathered.result(), found.loss


# --- tiers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tier"),
    [
        ("full", (1, 0, "", 32)),
        ("w50", (0.5, 0, "", 32)),
        ("w6.25", (0.0625, 0, "", 32)),
        ("p50", (1, 0.5, "", 32)),
        ("q8", (1, 0, "int8", 8)),
        ("q4", (1, 0, "int4", 4)),
        ("p50q8", (1, 0.5, "int8", 8)),
        ("w25q4", (0.25, 0, "int4", 4)),
        ("p0", (1, 0, "", 32)),
        ("p100", (1, 1, "", 32)),
        ("w100", (1, 0, "", 32)),
    ],
)
def test_a_tier_by_its_name(name: str, tier: tuple[Any, ...]) -> None:
    found = parse_tier(name)
    assert (found.ratio, found.prune, found.codec, found.bits) == tier
    assert found.name == name


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("", "expected tiers like full, w50"),
        ("half", "expected tiers like full, w50 .width., p50 .pruned., q8 or q4 .bits., .* got 'half'"),
        ("q8p50", "expected tiers like .* got 'q8p50'"),
        ("w50p50", "expected tiers like .* got 'w50p50'"),
        ("fullq8", "expected tiers like .* got 'fullq8'"),
        ("w0", "width of a tier must be above 0 and at most 100 percent, got 'w0'"),
        ("w101", "width of a tier must be above 0 and at most 100 percent, got 'w101'"),
        ("p101", "a tier can prune at most 100 percent, got 'p101'"),
        ("q1", "a tier can be quantised as q8, q4, got 'q1'"),
        ("q32", "a tier can be quantised as q8, q4, got 'q32'"),
    ],
)
def test_what_is_no_tier_is_refused(name: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        parse_tier(name)


def test_a_ladder_keeps_its_order_and_has_every_tier_once() -> None:
    assert list(parse_ladder(("q8", "full", "p50"))) == ["q8", "full", "p50"]
    with pytest.raises(ValueError, match="expected tiers, each once, got none"):
        parse_ladder(())
    with pytest.raises(ValueError, match="expected tiers, each once, got p50 twice"):
        parse_ladder(("p50", "full", "p50"))


# --- 6.1 magnitude masks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "prune", "keep"),
    [
        (5, 0.5, 3),
        (6, 0.5, 3),
        (6, 0.34, 4),
        (3, 0.99, 1),
        (10, 0.9, 1),
        (100, 0.95, 5),
        (7, 1.0, 1),
        (7, 0.0, 7),
        (100, 0.29, 71),
    ],
)
def test_how_many_weights_remain(size: int, prune: float, keep: int) -> None:
    assert num_kept(size, prune) == keep
    assert magnitude_mask(np.random.default_rng(0).standard_normal(size), prune).sum() == keep


def test_of_equal_weights_the_first_remain() -> None:
    assert magnitude_mask(np.array([0.5, -0.5, 0.5, 0.1]), 0.5).tolist() == [True, True, False, False]


@pytest.mark.parametrize("seed", range(20))
def test_a_mask_is_that_of_a_stable_sort(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.round(rng.standard_normal((int(rng.integers(1, 9)), 7)), int(rng.integers(0, 3))).astype(np.float32)
    prune = float(rng.uniform())
    best = np.argsort(-np.abs(values).reshape(-1), kind="stable")[: num_kept(values.size, prune)]
    expected = np.zeros(values.size, dtype=bool)
    expected[best] = True
    assert np.array_equal(magnitude_mask(values, prune), expected.reshape(values.shape))


def test_more_pruning_keeps_a_part_of_what_less_keeps() -> None:
    values = np.round(np.random.default_rng(0).standard_normal((30, 20)), 1)
    masks = [magnitude_mask(values, prune) for prune in (0, 0.1, 0.5, 0.9, 1)]
    for more, less in zip(masks[1:], masks, strict=False):
        assert not (more & ~less).any()
        assert more.sum() < less.sum()


def test_biases_and_norms_are_never_pruned_and_a_global_scope_looks_at_all_weights() -> None:
    part = {"a": np.full((4, 5), 1.0), "bias": np.zeros(4), "b": np.full((2, 10), 0.1), "t": np.zeros(())}
    part["b"][1, 3] = 0.2
    by_layer = magnitude_masks(part, 0.5)
    assert {name: int(mask.sum()) for name, mask in by_layer.items()} == {"a": 10, "b": 10}
    everywhere = magnitude_masks(part, 0.5, "global")
    assert everywhere["a"].all()
    assert np.argwhere(everywhere["b"]).tolist() == [[1, 3]]  # its largest, so that the layer is not cut off


def test_a_global_scope_keeps_the_largest_of_all() -> None:
    rng = np.random.default_rng(1)
    part = {"a": rng.standard_normal((9, 8)), "b": rng.standard_normal((5, 6))}
    both = magnitude_mask(np.concatenate([part["a"].reshape(-1), part["b"].reshape(-1)]), 0.7)
    masks = magnitude_masks(part, 0.7, "global")
    assert np.array_equal(np.concatenate([masks["a"].reshape(-1), masks["b"].reshape(-1)]), both)


# --- 6.2 order, and the straight-through gradient -------------------------------------------------------------------


def test_pruning_comes_before_quantising() -> None:
    row = np.array([0.30, 0.34, 0.90, 0.05], dtype=np.float32)
    mask = magnitude_mask(row, 0.5)
    np.testing.assert_allclose(quantise(row * mask, 3), [0, 0.3, 0.9, 0], atol=1e-6)
    wrong = quantise(row, 3)
    np.testing.assert_allclose(wrong * magnitude_mask(wrong, 0.5), [0.3, 0, 0.9, 0], atol=1e-6)


def test_the_scale_is_of_what_pruning_leaves_and_zeros_stay() -> None:
    layout, arrays = flat_layout((4, 6)), {"weight": np.random.default_rng(0).standard_normal((4, 6), np.float32)}
    part = compress(layout, full(layout), P50Q8, arrays)
    mask = part.submodel.masks["weight"]
    np.testing.assert_allclose(part.arrays["weight"], quantise(arrays["weight"] * mask, 8), atol=1e-7)
    assert not part.arrays["weight"][~mask].any()


def test_the_gradient_passes_straight_through_but_for_what_a_given_scale_clips() -> None:
    weights = torch.tensor(SIX)
    upstream = torch.arange(1.0, 7.0)
    for clips, scale, inside in ((True, 0.2, [0, 1, 1, 1, 0, 1]), (False, 0.2, [1] * 6), (False, 0.31, [1] * 6)):
        latent = weights.clone().requires_grad_()
        levels = straight_through(latent, torch.tensor(scale), 3, clips)
        (levels * upstream).sum().backward()
        np.testing.assert_allclose(levels.detach(), quantise(SIX, 3, np.float32(scale)), atol=1e-6)
        assert latent.grad is not None
        assert latent.grad.tolist() == (torch.tensor(inside) * upstream).tolist()


# --- 6.3 end to end, one round --------------------------------------------------------------------------------------


def flat_layout(shape: tuple[int, int]) -> Layout:
    """One linear layer without a bias, whose outputs are classes."""
    rows = np.arange(shape[0])
    return Layout({"out": range(shape[0])}, {"weight": (rows, None)}, {"weight": shape}, frozenset({"out"}))


LINEAR = flat_layout((2, 3))
BEFORE = {"weight": np.array([[0.9, -0.15, 0.4], [-0.6, 0.05, 0.2]], dtype=np.float32)}
CLIENTS = [
    (FULL, 20, [(1, 0, 1), (0, 1, 1)], [(1, 0), (0, 1)]),
    (P50, 30, [(1, 2, -1), (2, 0, 1), (0, -1, 1)], [(0.5, -1), (1, 0), (0, 0.5)]),
    (Q4, 50, [(0.5, 1, 0), (1, 1, 1)], [(0, 0), (1, 1)]),
]
SENT = [
    [[0.9, -0.15, 0.4], [-0.6, 0.05, 0.2]],
    [[0.9, 0, 0.4], [-0.6, 0, 0]],
    [[0.9, -0.12857143, 0.38571429], [-0.64285714, 0, 0.25714286]],
]
GRADIENTS = [
    [[0.15, 0.125, 0.275], [-0.2, -0.375, -0.575]],
    [[0.8, 0, 0.53333333], [-0.66666667, 0, 0]],
    [[0.15892857, 0.23928571, 0.07857143], [-0.77321429, -0.85357143, -0.69285714]],
]
LOSSES, ERRORS = [0.21875, 0.575, 0.53788265], [0, 0.04659498, 0.00592495]


def linear() -> nn.Module:
    return nn.Linear(3, 2, bias=False)


def averaged(per: Any, alpha: float = 0.0) -> Arrays:
    """The server's mean of the three clients' negated gradients."""
    averager = Averager(LINEAR, BEFORE, per)
    for (tier, n, inputs, targets), error in zip(CLIENTS, ERRORS, strict=True):
        part = compress(LINEAR, full(LINEAR), tier, BEFORE)
        gradient, _ = gradient_of(linear, part, tier, *squares(inputs, targets))
        averager.add(part.submodel, -flatten(LINEAR, part.submodel, gradient), fidelity_weight(n, error, alpha))
    return averager.result()


@pytest.mark.parametrize("client", range(3))
def test_one_round_what_is_sent_and_what_comes_back(client: int) -> None:
    tier, _, inputs, targets = CLIENTS[client]
    part = compress(LINEAR, full(LINEAR), tier, BEFORE)
    np.testing.assert_allclose(part.arrays["weight"], SENT[client], atol=1e-6)
    assert compression_error(LINEAR, BEFORE, part) == pytest.approx(ERRORS[client], abs=1e-6)
    gradient, loss = gradient_of(linear, part, tier, *squares(inputs, targets))
    np.testing.assert_allclose(gradient["weight"], GRADIENTS[client], atol=1e-6)
    assert loss == pytest.approx(LOSSES[client], abs=1e-6)


@pytest.mark.parametrize(
    ("per", "alpha", "mean", "after"),
    [
        (
            "coverage",
            0.0,
            [[0.34946429, 0.20663265, 0.25428571], [-0.62660714, -0.71683673, -0.65918367]],
            [[0.72526786, -0.25331633, 0.27285714], [-0.28669643, 0.40841837, 0.52959184]],
        ),
        (
            "total",
            0.0,
            [[0.34946429, 0.14464286, 0.25428571], [-0.62660714, -0.50178571, -0.46142857]],
            [[0.72526786, -0.22232143, 0.27285714], [-0.28669643, 0.30089286, 0.43071429]],
        ),
        (
            "coverage",
            1.0,
            [[0.34363213, 0.20649387, 0.25084735], [-0.62559572, -0.7162556, -0.65904056]],
            None,
        ),
    ],
    ids=["coverage", "zero-fill", "fidelity"],
)
def test_one_round_of_the_server(per: str, alpha: float, mean: Any, after: Any) -> None:
    found = averaged(per, alpha)
    np.testing.assert_allclose(BEFORE["weight"] - found["weight"], mean, atol=1e-6)
    new, velocity = server_step(BEFORE, found, {}, 0.5, 0.0)
    np.testing.assert_allclose(new["weight"], BEFORE["weight"] - 0.5 * np.array(mean), atol=1e-6)
    if after is not None:
        np.testing.assert_allclose(new["weight"], after, atol=1e-6)
    assert velocity == {}
    assert new["weight"].dtype == np.float32


def test_fidelity_weights() -> None:
    weights = [fidelity_weight(n, error, 1.0) for (_, n, *_), error in zip(CLIENTS, ERRORS, strict=True)]
    assert weights == pytest.approx([20, 28.60215054, 49.70375247], abs=1e-5)
    assert fidelity_weight(20, 0.5, 0.0) == 20
    assert fidelity_weight(20, 1.0, 1.0) > 0  # an averager takes no weight of zero


def test_gradients_of_batches_add_up_to_that_of_all_samples() -> None:
    rng = np.random.default_rng(0)
    samples, loss = squares(rng.standard_normal((7, 3)), rng.standard_normal((7, 2)))
    part = compress(LINEAR, full(LINEAR), Q4, BEFORE)
    whole, _ = gradient_of(linear, part, Q4, samples, loss)
    batched, _ = gradient_of(linear, part, Q4, samples, loss, batch_size=5)
    np.testing.assert_allclose(batched["weight"], whole["weight"], atol=1e-6)


# --- 6.4 width 0.5 --------------------------------------------------------------------------------------------------

WIDE: Arrays = {
    "hidden.weight": np.array([[0.2, -0.1, 0.3], [0.5, 0.4, -0.6], [-0.1, 0.05, 0.1], [0.7, 0, 0.2]], np.float32),
    "hidden.bias": np.array([0.1, 0, -0.2, 0.3], np.float32),
    "out.weight": np.array([[0.3, -0.2, 0.6, 0.1], [-0.4, 0.5, 0.2, 0.8]], np.float32),
    "out.bias": np.array([0, 0.1], np.float32),
}


def two_layers() -> nn.Module:
    return nn.Sequential(OrderedDict(hidden=nn.Linear(3, 4), relu=nn.ReLU(), out=nn.Linear(4, 2)))


@cache
def two_layers_layout() -> Layout:
    return trace_layout(two_layers, (3,))


def by_norm(layout: Layout) -> Submodel:
    return top(layout, model_norms(layout, build_on_meta(two_layers), WIDE), 0.5)


@pytest.mark.parametrize(
    ("select", "units", "output", "loss", "expected"),
    [
        (
            lambda layout: prefix_ratio(layout, 0.5),
            [0, 1],
            (0.3, -0.3),
            0.29,
            {
                "hidden.weight": {0: (-0.09, 0.09, -0.18)},
                "hidden.bias": (-0.09, 0, 0, 0),
                "out.weight": [[-0.7, 0, 0, 0], [-0.3, 0, 0, 0]],
                "out.bias": (-0.7, -0.3),
            },
        ),
        (
            by_norm,
            [1, 3],
            (0.14, 1.22),
            1.114,
            {
                "hidden.weight": {3: (0.89, -0.89, 1.78)},
                "hidden.bias": (0, 0, 0, 0.89),
                "out.weight": [[0, 0, 0, -1.204], [0, 0, 0, 1.708]],
                "out.bias": (-0.86, 1.22),
            },
        ),
    ],
    ids=["prefix", "l1"],
)
def test_width_one_half(select: Any, units: list[int], output: Any, loss: float, expected: Any) -> None:
    layout = two_layers_layout()
    submodel = select(layout)
    assert np.flatnonzero(submodel.units[:4]).tolist() == units
    part = compress(layout, submodel, W50, WIDE)
    samples, squared = squares([(1, -1, 2)] * 2, [(1, 0)] * 2)  # twice the same: a mean is of two samples or more
    gradient, found = gradient_of(two_layers, part, W50, samples, squared)
    assert found == pytest.approx(loss, abs=1e-6)
    with torch.no_grad():
        np.testing.assert_allclose(narrow(two_layers, part.arrays)(samples.inputs)[0], output, atol=1e-6)
    rows = expected.pop("hidden.weight")
    wide = scatter(layout, submodel, gradient)
    for name, values in expected.items():
        np.testing.assert_allclose(wide[name], values, atol=1e-6, err_msg=name)
    hidden = np.zeros((4, 3))
    for row, values in rows.items():
        hidden[row] = values
    np.testing.assert_allclose(wide["hidden.weight"], hidden, atol=1e-6)
    for name, values in silenced_gradient(layout, submodel, samples, squared).items():
        np.testing.assert_allclose(gradient[name], values, atol=1e-6, err_msg=name)


def silenced_gradient(layout: Layout, submodel: Submodel, samples: Samples, loss: Loss) -> Arrays:
    """The full network's gradient, its other hidden units forced to zero, on the block of a part."""
    model = narrow(two_layers, WIDE)
    kept = torch.from_numpy(submodel.units[:4].copy())
    model.get_submodule("relu").register_forward_hook(lambda _, __, output: output * kept)
    loss(model, samples.inputs, samples.labels).backward()  # type: ignore[no-untyped-call]
    found = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    return extract(layout, submodel, found)


def test_a_covered_unit_whose_gradient_is_zero_counts_in_the_denominator() -> None:
    layout, submodel = two_layers_layout(), by_norm(two_layers_layout())
    part = compress(layout, submodel, W50, WIDE)
    gradient, _ = gradient_of(two_layers, part, W50, *squares([(1, -1, 2)] * 2, [(1, 0)] * 2))
    averager = Averager(layout, WIDE)
    averager.add(submodel, -flatten(layout, submodel, gradient), 1.0)
    ones = {name: np.ones_like(array) for name, array in WIDE.items()}
    averager.add(full(layout), -flatten(layout, full(layout), ones), 1.0)
    mean = WIDE["hidden.bias"] - averager.result()["hidden.bias"]
    np.testing.assert_allclose(mean, [1, 0.5, 1, (0.89 + 1) / 2], atol=1e-6)  # unit 1: covered twice, 0 and 1


def test_a_rolling_window_begins_at_the_first_unit_in_round_one() -> None:
    layout = two_layers_layout()
    found = [np.flatnonzero(window(layout, 0.5, t - 1).units[:4]).tolist() for t in (1, 2, 4, 5)]
    assert found == [[0, 1], [1, 2], [0, 3], [0, 1]]


# --- 6.5 coverage, 6.6 pseudo-gradients -----------------------------------------------------------------------------

FIVE = flat_layout((1, 5))
MASKS = np.array([(1, 1, 1, 0, 0), (1, 1, 0, 0, 0), (1, 0, 1, 0, 0)], dtype=bool)
G = np.array([(1, 2, 3, 0, 0), (-1, 4, 0, 0, 0), (2, 0, -3, 0, 0)], dtype=np.float32)
N = (10, 30, 60)


def masked(mask: np.ndarray) -> Submodel:
    return Submodel(np.ones(1, dtype=bool), masks={"weight": mask.reshape(1, -1)})


def mean_of(per: Any, order: Sequence[int] = (0, 1, 2), times: float = 1.0) -> np.ndarray:
    ones = {"weight": np.ones((1, 5), dtype=np.float32)}
    averager = Averager(FIVE, ones, per)
    for k in order:
        averager.add(masked(MASKS[k]), -G[k][MASKS[k]], times * N[k])
    return np.asarray(1 - averager.result()["weight"][0])


@pytest.mark.parametrize(
    ("per", "mean", "after"),
    [
        ("coverage", (1, 3.5, -2.14285714, 0, 0), (0.5, -0.75, 2.07142857, 1, 1)),
        ("total", (1, 1.4, -1.5, 0, 0), (0.5, 0.3, 1.75, 1, 1)),
    ],
)
def test_coverage_counts(per: str, mean: Any, after: Any) -> None:
    found = mean_of(per)
    np.testing.assert_allclose(found, mean, atol=1e-6)
    ones = np.ones(5, dtype=np.float32)
    new, _ = server_step({"weight": ones}, {"weight": ones - found}, {}, 0.5, 0.0)
    np.testing.assert_allclose(new["weight"], after, atol=1e-6)


@pytest.mark.parametrize("per", ["coverage", "total"])
def test_the_mean_does_not_depend_on_order_or_on_the_unit_of_weights(per: str) -> None:
    for order, times in (((2, 0, 1), 1.0), ((0, 1, 2), 7.5)):
        np.testing.assert_allclose(mean_of(per, order, times), mean_of(per), atol=1e-6)


def test_zero_fill_is_coverage_times_the_covering_share() -> None:
    share = (MASKS * np.array(N)[:, None]).sum(0) / sum(N)
    np.testing.assert_allclose(mean_of("total"), mean_of("coverage") * share, atol=1e-6)
    everybody = MASKS.all(axis=0)
    np.testing.assert_allclose(mean_of("total")[everybody], mean_of("coverage")[everybody], atol=1e-6)


class Point(nn.Module):
    """A parameter vector that goes to (0, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.tensor([1.0, -1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.u.expand(len(x), 2)


@pytest.mark.parametrize(
    ("steps", "end", "delta", "pseudo"),
    [
        (1, (0.9, -0.8), (0.1, -0.2), (1, -2)),
        (4, (0.6561, -0.3122), (0.3439, -0.6878), (0.85975, -1.7195)),
    ],
)
def test_pseudo_gradients(steps: int, end: Any, delta: Any, pseudo: Any) -> None:
    samples, loss = squares([(0.0, 0.0)] * 2 * steps, [(0.0, 1.0)] * 2 * steps)
    network = CompressedNetwork(Point(), {})
    training = Training(momentum=0.0, weight_decay=0.0, local_epochs=1, batch_size=2)
    fit(network.model, samples, training, 0.1, np.random.default_rng(0), network.loss(loss), network.step)
    assert network.num_steps == steps == num_steps(2 * steps, training)
    u: Any = network.model.u.detach().numpy()  # type: ignore[operator, union-attr]
    np.testing.assert_allclose(u, end, atol=1e-6)
    difference = u - np.array([1, -1], dtype=np.float32)
    np.testing.assert_allclose(-difference, delta, atol=1e-6)
    np.testing.assert_allclose(-pseudo_gradient(difference, 0.1, steps), pseudo, atol=1e-6)


# --- 6.7 bytes, and J10 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [("full", 400_000), ("p50", 212_500), ("p90", 52_500), ("q8", 100_032), ("p50q8", 62_532), ("q4", 50_032)],
)
def test_bytes_of_a_hundred_thousand_weights(name: str, size: int) -> None:
    shapes = {f"w{i}": (100, 120) for i in range(7)} | {"w7": (80, 200)}  # multiples of eight: masks fill their bytes
    layout = Layout({}, dict.fromkeys(shapes, (None, None)), shapes)
    assert sum(int(np.prod(s)) for s in shapes.values()) == 100_000
    cost = tier_cost(layout, parse_tier(name))
    assert cost.model_bytes == size
    assert cost.train_bytes == size + 4 * cost.numbers


@layouts
@tiers
def test_bytes_are_the_length_of_the_arrays(layout: Layout, tier: Tier) -> None:
    arrays = random_arrays(layout, np.random.default_rng(0))
    part = compress(layout, prefix_ratio(layout, tier.ratio), tier, arrays)
    here = pieces(layout, part.submodel)
    encoded = CODECS[tier.codec or "float32"].encode(flatten(layout, part.submodel, part.arrays), here)
    masks = sum(len(data) for name, data in pack(part.submodel).items() if name.startswith("mask:"))
    cost = tier_cost(layout, tier, reply_codec="int8")
    assert cost.model_bytes == cost.down_bytes == sum(array.nbytes for array in encoded.values()) + masks
    reply = CODECS["int8" if tier.codec else "float32"]
    flat = flatten(layout, part.submodel, part.arrays)
    assert cost.up_bytes == sum(array.nbytes for array in reply.encode(flat, here).values())
    assert cost.numbers == len(flat)
    for codec in ("float32", "int8"):
        told = tier_cost(layout, tier, codec).decoded_bytes
        assert told == decoded_bytes(layout, part.submodel, tier.codec or codec)


# --- invariants -----------------------------------------------------------------------------------------------------


@layouts
def test_the_identity_changes_no_bit(layout: Layout) -> None:
    arrays = random_arrays(layout, np.random.default_rng(0))
    for name in ("full", "p0", "w100"):
        part = compress(layout, prefix_ratio(layout, parse_tier(name).ratio), parse_tier(name), arrays)
        assert part.submodel == full(layout)
        assert same_bits(part.arrays, arrays)
        assert compression_error(layout, arrays, part) == 0


@layouts
@tiers
def test_compressing_twice_is_compressing_once(layout: Layout, tier: Tier) -> None:
    arrays = random_arrays(layout, np.random.default_rng(0))
    units = prefix_ratio(layout, tier.ratio)
    once = compress(layout, units, tier, arrays)
    twice = compress(layout, units, tier, scatter(layout, once.submodel, once.arrays))
    if tier.codec:  # a small weight that was kept may have become zero, and equal ones change places with it
        assert all(np.array_equal(twice.arrays[n], once.arrays[n]) for n in once.arrays)
    else:
        assert twice.submodel == once.submodel
        assert same_bits(twice.arrays, once.arrays)


@layouts
@tiers
def test_the_global_model_is_only_read(layout: Layout, tier: Tier) -> None:
    arrays = random_arrays(layout, np.random.default_rng(0))
    before = {name: array.copy() for name, array in arrays.items()}
    compress(layout, prefix_ratio(layout, tier.ratio), tier, arrays, "global")
    assert same_bits(arrays, before)


@layouts
@tiers
def test_the_compression_error_is_that_of_the_scattered_part(layout: Layout, tier: Tier) -> None:
    rng = np.random.default_rng(0)
    arrays, units = random_arrays(layout, rng), Submodel(random_units(layout, rng, tier.ratio))
    part = compress(layout, units, tier, arrays)
    wide = scatter(layout, part.submodel, part.arrays)
    missed = sum(float(((arrays[n].astype(np.float64) - wide[n]) ** 2).sum()) for n in arrays)
    whole = sum(float((arrays[n].astype(np.float64) ** 2).sum()) for n in arrays)
    assert compression_error(layout, arrays, part) == pytest.approx(missed / whole, rel=1e-6, abs=1e-12)


def test_a_model_of_zeros_has_no_error() -> None:
    assert compression_error(LINEAR, {"weight": np.zeros((2, 3), np.float32)}, Part(full(LINEAR), BEFORE)) == 0


@tiers
def test_a_compressed_clients_gradient_of_a_model_that_is_compressed_already_is_the_full_clients(tier: Tier) -> None:
    layout, rng = two_layers_layout(), np.random.default_rng(0)
    units = prefix_ratio(layout, tier.ratio)
    first = compress(layout, units, tier, random_arrays(layout, rng))
    arrays = scatter(layout, first.submodel, first.arrays)
    samples, loss = squares(rng.standard_normal((8, 3)), rng.standard_normal((8, 2)))
    part = compress(layout, units, tier, arrays)
    own, _ = gradient_of(two_layers, part, tier, samples, loss)
    whole, _ = gradient_of(two_layers, Part(full(layout), arrays), FULL, samples, loss)
    for name, values in extract(layout, part.submodel, whole).items():
        np.testing.assert_allclose(own[name], values, atol=1e-6, err_msg=name)


@tiers
def test_gradients_are_zero_where_the_part_holds_nothing(tier: Tier) -> None:
    layout, rng = two_layers_layout(), np.random.default_rng(0)
    part = compress(layout, prefix_ratio(layout, tier.ratio), tier, random_arrays(layout, rng))
    samples, loss = squares(rng.standard_normal((8, 3)), rng.standard_normal((8, 2)))
    gradient, _ = gradient_of(two_layers, part, tier, samples, loss)
    for name, mask in part.submodel.masks.items():
        assert not gradient[name][~mask].any()
    flat = flatten(layout, part.submodel, gradient)
    assert same_bits(unflatten(layout, part.submodel, flat), gradient)


def test_all_full_is_fedavg_or_one_step_of_gradient_descent() -> None:
    rng = np.random.default_rng(3)
    data = [squares(rng.standard_normal((n, 3)), rng.standard_normal((n, 2))) for n in (4, 6, 10)]
    averager = Averager(LINEAR, BEFORE)
    for samples, loss in data:
        gradient, _ = gradient_of(linear, Part(full(LINEAR), BEFORE), FULL, samples, loss)
        averager.add(full(LINEAR), -gradient["weight"].reshape(-1), float(len(samples.labels)))
    new, _ = server_step(BEFORE, averager.result(), {}, 0.3, 0.0)
    weight = torch.tensor(BEFORE["weight"], requires_grad=True)
    total = torch.zeros(())
    for samples, loss in data:
        total = total + len(samples.labels) * loss(lambda x: x @ weight.T, *samples)  # type: ignore[arg-type]
    (total / 20).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    np.testing.assert_allclose(new["weight"], BEFORE["weight"] - 0.3 * weight.grad.numpy(), atol=1e-6)


# --- the server's step ----------------------------------------------------------------------------------------------


def test_without_momentum_and_at_rate_one_the_step_is_the_mean_itself() -> None:
    old, mean = {"w": np.ones(3, np.float32)}, {"w": np.array([0.1, 1.0, 3.0], np.float32)}
    new, velocity = server_step(old, mean, {}, 1.0, 0.0)
    assert same_bits(new, mean)
    assert velocity == {}


def test_momentum_is_torchs() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3, 4)).astype(np.float32)
    parameter = torch.tensor(weight, requires_grad=True)
    theirs, velocity = torch.optim.SGD([parameter], lr=0.3, momentum=0.8), {}
    for _ in range(6):
        gradient = rng.standard_normal((3, 4)).astype(np.float32)
        new, velocity = server_step({"w": weight}, {"w": weight - gradient}, velocity, 0.3, 0.8)
        weight, parameter.grad = new["w"], torch.tensor(gradient)
        theirs.step()
        np.testing.assert_allclose(weight, parameter.detach(), atol=1e-5)


def test_what_nobody_covers_goes_on_moving_unless_it_is_frozen() -> None:
    old, velocity = {"w": np.zeros(2, np.float32)}, {"w": np.array([2.0, 2.0], np.float32)}
    mean, counts = {"w": np.array([-1.0, 0.0], np.float32)}, {"w": np.array([3, 0])}
    moved, speed = server_step(old, mean, velocity, 0.5, 0.5)
    assert moved["w"].tolist() == [-1.0, -0.5]
    assert speed["w"].tolist() == [2.0, 1.0]
    frozen, speed = server_step(old, mean, velocity, 0.5, 0.5, counts)
    assert frozen["w"].tolist() == [-1.0, 0.0]
    assert speed["w"].tolist() == [2.0, 2.0]


def test_a_round_in_which_nothing_changes_leaves_every_bit() -> None:
    arrays = {"w": np.random.default_rng(0).standard_normal(50).astype(np.float32)}
    for rate, momentum in ((1.0, 0.0), (0.37, 0.0), (2.0, 0.9)):
        new, _ = server_step(arrays, arrays, {}, rate, momentum)
        assert same_bits(new, arrays)


@layouts
def test_coverage_is_counted_entry_by_entry(layout: Layout) -> None:
    rng = np.random.default_rng(0)
    coverage, expected = Coverage(layout), {n: np.zeros(shape, int) for n, shape in layout.shapes.items()}
    for i in range(25):
        tier = (FULL, P50, W50)[i % 3] if i < 12 else parse_tier("p70")
        units = Submodel(random_units(layout, rng, tier.ratio)) if tier is W50 else full(layout)
        submodel = pruned(layout, units, tier, random_arrays(layout, rng))
        coverage.add(submodel)
        ones = {n: np.ones(shape, np.float32) for n, shape in layout.shapes.items()}
        for name, held in scatter(layout, submodel, extract(layout, submodel, ones)).items():
            expected[name] += held.astype(int)
    counts = coverage.counts()
    assert all(np.array_equal(counts[name], expected[name]) for name in layout.shapes)
    every = np.concatenate([array.reshape(-1) for array in expected.values()])
    facts = coverage.facts()
    assert facts["gamma-min"] == every.min()
    assert facts["coverage-mean"] == pytest.approx(every.mean())
    shares = {f"covered-by-{n}": (every == n).mean() for n in range(26) if (every == n).any()}
    assert {k: v for k, v in facts.items() if k.startswith("covered")} == pytest.approx(shares)


def test_coverage_of_no_reply() -> None:
    assert Coverage(LINEAR).facts() == {"gamma-min": 0, "coverage-mean": 0.0, "covered-by-0": 1.0}


# --- the configuration ----------------------------------------------------------------------------------------------


def test_defaults() -> None:
    config = CompressedConfig()
    assert list(config.tiers) == ["full", "w50", "p50", "q8", "p50q8", "w25", "q4", "p90"]
    assert (config.mode, config.aggregate, config.alpha, config.server_momentum) == ("delta", "coverage", 0, 0)
    assert config.reply_codec == "int8"


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"ladder": ("full", "p5O")}, "compressed.ladder: expected tiers like full, w50 .* got 'p5O'"),
        ({"ladder": ()}, "compressed.ladder: expected tiers, each once, got none"),
        ({"mode": "sgd"}, "compressed.mode must be one of delta, pseudo, grad, got 'sgd'"),
        ({"width_selection": "best"}, "compressed.width-selection must be one of prefix, rolling, l1, random"),
        ({"prune_scope": "model"}, "compressed.prune-scope must be one of layer, global, got 'model'"),
        ({"memory": "all"}, "compressed.memory must be one of training, model, got 'all'"),
        ({"aggregate": "total"}, "compressed.aggregate must be one of coverage, zero-fill, got 'total'"),
        ({"reply_codec": "int2"}, "compressed.reply-codec must be one of float32, int8, int4, got 'int2'"),
        ({"alpha": -1.0}, "compressed.alpha must be >= 0, got -1"),
        ({"alpha": float("nan")}, "compressed.alpha must be >= 0, got nan"),
        ({"server_learning_rate": -0.1}, "compressed.server-learning-rate must be >= 0, got -0.1"),
        ({"server_momentum": 1.0}, r"compressed.server-momentum must be in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        CompressedConfig(**values)


def test_pseudo_gradients_need_plain_sgd() -> None:
    plain = Training(momentum=0.0)
    assert CompressedConfig(mode="pseudo").mode_for(plain) == "pseudo"
    assert CompressedConfig().mode_for(plain) == "delta"
    for training in (Training(momentum=0.5), Training(momentum=0.0, optimizer="adam")):
        assert CompressedConfig().mode_for(training) == "delta"
        assert CompressedConfig(mode="grad").mode_for(training) == "grad"
        with pytest.raises(ValueError, match="mode='pseudo' divides by learning rate and steps, which needs plain SGD"):
            CompressedConfig(mode="pseudo").mode_for(training)
