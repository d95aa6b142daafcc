"""FedLPS's mathematics and its server: the worked examples of its specification, torch's optimisers, plain numpy."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from toy import DIGITS, Decoder, Ties, random_arrays, same_bits, toy_task

from flexfed.averaging import Averager
from flexfed.config import Experiment
from flexfed.devices import Device
from flexfed.jobs import Assignment, Task, Update
from flexfed.methods.fedlps import FedLPSConfig, add_noise, model_norms, ranked_scores, ranking_of, scores_from
from flexfed.methods.fedlps_scores import (
    Rows,
    ScoreLearner,
    Scores,
    adam_step,
    group_sizes,
    initial_scores,
    kept_scores,
    regulariser_gradient,
    score_targets,
    sgd_step,
    straight_through,
    unit_norms,
)
from flexfed.networks import build_on_meta
from flexfed.select import prefix_ratio, top
from flexfed.submodel import Submodel, extract, flatten, full
from flexfed.training import Training
from flexfed.units import Layout, trace_layout
from strategies.fedlps import FedLPS
from strategies.record import RoundRecord


def columns(*sizes: int, outputs: int = 0) -> Layout:
    """A linear layer of two inputs for each size, none behind another; the last is the output where asked."""
    starts = np.cumsum([0, *sizes, outputs])
    spans = {f"{i}": range(a, b) for i, (a, b) in enumerate(pairwise(starts)) if a < b}
    axes: Any = {f"{name}.weight": (np.asarray(span), None) for name, span in spans.items()}
    shapes = {f"{name}.weight": (len(span), 2) for name, span in spans.items()}
    return Layout(spans, axes, shapes, frozenset({f"{len(sizes)}"} if outputs else ()))


def scores_of(values: Any) -> Scores:
    tensor = torch.as_tensor(values, dtype=torch.float32)
    return Scores(tensor, *[torch.zeros_like(tensor) for _ in range(3)])


@cache
def traced(name: str) -> Layout:
    return {"ties": lambda: trace_layout(Ties, (1, 4, 4)), "decoder": lambda: trace_layout(Decoder, (2, 3, 3))}[name]()


@cache
def task() -> Task:
    return toy_task("fedlps")


def server(**values: Any) -> FedLPS:
    """A server before its first round; keys as in the configuration, with _ for -, without the method's prefix."""
    own = {f.name for f in fields(FedLPSConfig)}
    given = {f"fedlps.{k}" if k in own else k: v for k, v in values.items()}
    experiment = Experiment.read({"strategy": "fedlps", **{k.replace("_", "-"): v for k, v in given.items()}})
    made = FedLPS(experiment, replace(task(), method=experiment.method), None)  # type: ignore[arg-type]
    made._arrays = random_arrays(task().layout, np.random.default_rng(9))
    made.devices = {p: Device(p, num_examples=20) for p in range(8)}
    return made


# --- masks, 6.1 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "ratio", "mask"),
    [
        ((0.3, -0.1, 0.8, 0.2), 0.5, (1, 0, 1, 0)),
        ((0.5, 0.5, 0.5, 0.1), 0.5, (1, 1, 0, 0)),
        ((1, 2, 3), 0.1, (0, 0, 1)),
        (range(1, 11), 0.7, (0, 0, 0, 1, 1, 1, 1, 1, 1, 1)),
        ((0.3, -0.1, 0.8, 0.2), 1.0, (1, 1, 1, 1)),
        ((-7.0,), 0.01, (1,)),
        ((18.0, 17.0, 19.0), 0.34, (0, 0, 1)),  # a sigmoid in float32 would tie them
    ],
)
def test_the_mask_keeps_the_highest_scores(scores: Any, ratio: float, mask: tuple[int, ...]) -> None:
    values = np.asarray(scores, dtype=np.float32)
    assert top(columns(len(values)), values, ratio, "floor").units.astype(int).tolist() == list(mask)


def test_0_29_of_100_units_are_29() -> None:
    assert top(columns(100), np.arange(100), 0.29, "floor").units.sum() == 29


def test_every_layer_keeps_exactly_k_units_and_of_equal_scores_the_first() -> None:
    sizes, rng = (1, 7, 10, 64, 100), np.random.default_rng(0)
    layout = columns(*sizes, outputs=5)
    for thousandths in rng.integers(1, 1001, 100).tolist():
        k = [max(1, thousandths * size // 1000) for size in sizes]
        units = top(layout, rng.standard_normal(layout.num_units), thousandths / 1000, "floor").units
        assert [units[span.start : span.stop].sum() for span in layout.groups.values()] == [*k, 5]
        equal = top(layout, np.zeros(layout.num_units), thousandths / 1000, "floor").units
        first = np.concatenate([np.arange(size) < kept for size, kept in zip((*sizes, 5), (*k, 5), strict=True)])
        assert np.array_equal(equal, first)


# --- one step, 6.2 ------------------------------------------------------------------------------------------------


def test_one_local_step_of_the_scores() -> None:
    layout = columns(4)
    weight = torch.tensor([[0.2, -0.4], [0.1, 0.1], [-0.3, 0.5], [0.05, 0]])
    gradient = torch.tensor([[0.1, -0.2], [0.3, 0.3], [0.5, -0.1], [0.2, 0.2]])
    scores = scores_of([0.3, -0.1, 0.8, 0.2])
    active = torch.from_numpy(top(layout, scores.values.numpy(), 0.5, "floor").units.copy())
    targets = score_targets(weight.abs().sum(1), active, layout)
    assert targets.tolist() == pytest.approx([0.645656, 0.5, 0.689974, 0.5], abs=1e-6)
    assert ((scores.values - targets) ** 2).mean().item() == pytest.approx(0.145396, abs=1e-6)
    pull = regulariser_gradient(scores.values, targets, group_sizes(layout))
    assert pull[active].tolist() == pytest.approx([-0.172828, 0.055013], abs=1e-6)
    learned = straight_through(scores.values, (gradient * weight).sum(1))
    assert learned[active].tolist() == pytest.approx([0.024446, -0.042782], abs=1e-6)
    total = torch.where(active, pull + learned, torch.zeros(4))
    assert total.tolist() == pytest.approx([-0.148382, 0, 0.012231, 0], abs=1e-6)
    after = sgd_step(scores, pull + learned, active, 0.1, 0.0, 0.0)
    assert after.values.tolist() == pytest.approx([0.314838, -0.1, 0.798777, 0.2], abs=1e-6)
    assert np.array_equal(top(layout, after.values.numpy(), 0.5, "floor").units, active.numpy())


def test_the_regulariser_is_the_mean_over_a_layers_units() -> None:
    layout = columns(3, 8)
    rng = np.random.default_rng(1)
    values = torch.tensor(rng.standard_normal(11), dtype=torch.float32, requires_grad=True)
    targets = torch.tensor(rng.random(11), dtype=torch.float32)
    (((values[:3] - targets[:3]) ** 2).mean() + ((values[3:] - targets[3:]) ** 2).mean()).backward()
    assert values.grad is not None
    found = regulariser_gradient(values.detach(), targets, group_sizes(layout))
    assert torch.allclose(found, values.grad, atol=1e-6)
    crossed = 2 / 8 * (values.detach()[3:] - targets[3:].mean())  # the released code's
    assert not torch.allclose(found[3:], crossed, atol=0.01)


@pytest.mark.parametrize("optimizer", ["adam", "shared-sgd"])
@pytest.mark.parametrize("target", ["sigmoid-l1", "sigmoid-zscore-l1"])
def test_a_learner_adds_the_weighed_regulariser_and_takes_its_optimisers_rate(optimizer: Any, target: Any) -> None:
    layout, rng = columns(5), np.random.default_rng(15)
    values, products, norms = (torch.tensor(rng.standard_normal(5), dtype=torch.float32) for _ in range(3))
    knobs: dict[str, Any] = {"importance_weight": 3.0, "score_learning_rate": 0.2, "score_optimizer": optimizer}
    config, active = FedLPSConfig(importance_target=target, **knobs), torch.tensor([True] * 4 + [False])
    training = Training(0.9, momentum=0.5, weight_decay=0.1)
    learner = ScoreLearner(scores_of(values), replace(task(), layout=layout, method=config, training=training), 0.3)
    norms = norms.abs()
    targets = score_targets(norms, active, layout, standardised=target == "sigmoid-zscore-l1")
    first, parameter = 2 / 5 * 3 * (values - targets), values[:4].clone().requires_grad_()
    sigmoid = torch.sigmoid(values)
    parameter.grad = (first + sigmoid * (1 - sigmoid) * products)[:4]
    sgd = torch.optim.SGD([parameter], 0.3, momentum=0.5, weight_decay=0.1)
    (torch.optim.Adam([parameter], 0.2) if optimizer == "adam" else sgd).step()
    learner.learn(products, norms, active, active)
    assert torch.allclose(learner.scores.values[:4], parameter.detach(), atol=1e-4)
    assert learner.scores.values[4] == values[4]


# --- optimisers of the scores -------------------------------------------------------------------------------------


def test_adam_is_torchs_where_all_units_are_active() -> None:
    rng = np.random.default_rng(2)
    start = torch.tensor(rng.standard_normal(6), dtype=torch.float32)
    scores, parameter = scores_of(start), start.clone().requires_grad_()
    theirs = torch.optim.Adam([parameter], lr=0.05)
    for _ in range(30):
        parameter.grad = torch.tensor(rng.standard_normal(6) * [1, 1e-3, 10, 1, 0, 1e-7], dtype=torch.float32)
        scores = adam_step(scores, parameter.grad, torch.ones(6, dtype=torch.bool), 0.05)
        theirs.step()
        assert torch.allclose(scores.values, parameter.detach(), atol=1e-5)
    assert scores.steps.tolist() == [30] * 6


def test_a_unit_that_joins_late_begins_like_a_fresh_adam_and_others_keep_their_bits() -> None:
    rng = np.random.default_rng(3)
    gradients = torch.tensor(rng.standard_normal((40, 3)), dtype=torch.float32)
    scores, late = scores_of([0.5, 0.25, 0.125]), torch.tensor([0.25], requires_grad=True)
    theirs = torch.optim.Adam([late], lr=0.1)
    for i, gradient in enumerate(gradients):
        active = torch.tensor([i < 25, i >= 30, False])
        before, scores = scores, adam_step(scores, gradient, active, 0.1)
        for name in ("values", "first", "second", "steps"):
            assert torch.equal(getattr(scores, name)[~active], getattr(before, name)[~active])
        if active[1]:
            late.grad = gradient[1:2]
            theirs.step()
            assert scores.values[1].item() == pytest.approx(late.item(), abs=1e-5)  # float32 steps: 1 - 0.999
    assert scores.steps.tolist() == [25, 10, 0]


def test_sgd_is_torchs_with_momentum_and_decay_and_leaves_inactive_units() -> None:
    rng = np.random.default_rng(4)
    start = torch.tensor(rng.standard_normal(5), dtype=torch.float32)
    scores, parameter = scores_of(start), start[:4].clone().requires_grad_()
    theirs = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, weight_decay=0.05)
    active = torch.tensor([True] * 4 + [False])
    for _ in range(20):
        gradient = torch.tensor(rng.standard_normal(5), dtype=torch.float32)
        parameter.grad = gradient[:4]
        scores = sgd_step(scores, gradient, active, 0.1, 0.9, 0.05)
        theirs.step()
        assert torch.allclose(scores.values[:4], parameter.detach(), atol=1e-6)
    assert (scores.values[4].item(), scores.first[4].item()) == (start[4].item(), 0.0)


# --- targets, norms, first scores ---------------------------------------------------------------------------------


def test_plain_targets_of_wide_layers_are_one() -> None:
    torch.manual_seed(0)
    for inputs, outputs, least in ((64, 128, 0.99999), (512, 512, 1.0)):
        norms = torch.nn.Conv2d(inputs, outputs, 3).weight.detach().abs().sum((1, 2, 3))
        active = torch.ones(outputs, dtype=torch.bool)
        targets = score_targets(norms, active, columns(outputs))
        assert round(targets.min().item(), 5) >= least
        assert targets.max() <= 1
        spread = score_targets(norms, active, columns(outputs), standardised=True)
        assert spread.max() - spread.min() > 0.5


def test_standardised_targets_are_of_each_layers_active_units() -> None:
    norms = torch.tensor([1.0, 2.0, 3.0, 900.0, 5.0, 5.0, 5.0, 7.0])
    active = torch.tensor([True, True, True, False, True, True, True, False])
    found = score_targets(norms, active, columns(4, 3, 1), standardised=True)
    far = 1 / (1 + np.exp(-np.sqrt(1.5)))
    assert found.tolist() == pytest.approx([1 - far, 0.5, far, 0.5, 0.5, 0.5, 0.5, 0.5], abs=1e-6)


# tensor -> groups whose units its first axis holds, by hand
TIES = {
    "stem": ["stem.weight", "stem.bias", "norm.weight", "norm.bias", "back.weight"]
    + ["depthwise.weight", "depthwise.bias"],
    "inner": ["inner.weight", "inner.bias"],
    "side": ["side.weight", "side.bias"],
    "fc": ["fc.weight", "fc.bias"],
}


def norms_by_hand(arrays: Any) -> dict[str, np.ndarray]:
    weights = {group: [name for name in names if arrays[name].ndim > 1] for group, names in TIES.items()}
    return {g: sum(np.abs(arrays[n]).reshape(len(arrays[n]), -1).sum(1) for n in names) for g, names in weights.items()}


def test_a_units_norm_is_over_all_layers_of_its_group_and_no_vectors() -> None:
    layout = traced("ties")
    arrays = random_arrays(layout, np.random.default_rng(5))
    rows = Rows(layout, full(layout), build_on_meta(Ties), vectors=True)
    found = unit_norms(rows, {name: torch.from_numpy(a) for name, a in arrays.items()}).numpy()
    for group, norms in norms_by_hand(arrays).items():
        span = layout.groups[group]
        assert np.allclose(found[span.start : span.stop], norms, rtol=1e-6)
    assert not found[layout.fixed_units].any()


def test_first_scores_are_normals_that_fall_so_that_the_first_mask_is_a_prefix() -> None:
    layout = columns(1, 6, 5000, outputs=3)
    scores = initial_scores(layout, np.random.default_rng(6))
    values = scores.values.numpy()
    assert values.dtype == np.float32
    for ratio in (0.01, 0.3, 0.999, 1.0):
        assert top(layout, values, ratio, "floor") == prefix_ratio(layout, ratio, "floor")
    wide = values[7:5007]
    assert abs(wide.mean()) < 0.05
    assert abs(wide.std() - 1) < 0.05
    assert not any(getattr(scores, name).any() for name in ("first", "second", "steps"))
    again = initial_scores(layout, np.random.default_rng(6))
    assert torch.equal(again.values, scores.values)
    assert not torch.equal(initial_scores(layout, np.random.default_rng(7)).values, scores.values)


def test_scores_come_back_from_the_private_state() -> None:
    scores = Scores(*(torch.arange(3.0) + i for i in range(4)))
    state = scores.arrays()
    assert set(state) == {"scores/values", "scores/first", "scores/second", "scores/steps"}
    back = kept_scores({**state, "model/units": np.zeros(1)})
    assert same_bits(back.arrays(), state)
    back.values.add_(1)
    assert state["scores/values"].tolist() == [0, 1, 2]


# --- rankings -----------------------------------------------------------------------------------------------------


def test_a_ranking_is_two_bytes_a_unit_that_may_be_cut() -> None:
    layout = columns(4, 2, outputs=3)
    scores = np.asarray([0.3, -0.1, 0.8, 0.2, 5, 5, 1, 2, 3])
    assert ranking_of(layout, scores) == bytes([2, 0, 0, 0, 3, 0, 1, 0, 0, 0, 1, 0])
    assert scores_from(layout, ranking_of(layout, scores)).tolist() == [-1, -3, 0, -2, 0, -1, 0, 0, 0]


def test_a_ranking_tells_every_mask_of_its_scores() -> None:
    layout, rng = columns(1, 9, 300, outputs=4), np.random.default_rng(8)
    for scores in (rng.standard_normal(314), rng.integers(0, 3, 314), np.zeros(314)):
        told = scores_from(layout, ranking_of(layout, scores.astype(np.float32)))
        for ratio in (0.01, 0.3, 0.5, 0.77, 1.0):
            assert top(layout, told, ratio, "floor") == top(layout, scores, ratio, "floor")


def as_bytes(*places: int) -> bytes:
    return np.asarray(places, dtype="<u2").tobytes()


RANKINGS = {
    "none": (b"", "should be 12 bytes, got 0"),
    "truncated": (as_bytes(2, 0, 3, 1, 0), "should be 12 bytes, got 10"),
    "half a place": (as_bytes(2, 0, 3, 1, 0, 1)[:-1], "should be 12 bytes, got 11"),
    "too long": (as_bytes(2, 0, 3, 1, 0, 1, 0), "should be 12 bytes, got 14"),
    "repeated": (as_bytes(2, 0, 2, 1, 0, 1), "each of the 4 units of group '0' once"),
    "beyond": (as_bytes(2, 0, 3, 1, 0, 2), "each of the 2 units of group '1' once"),
    "of another network": (as_bytes(1, 0, 0, 1, 2, 3), "each of the 4 units of group '0' once"),
}


@pytest.mark.parametrize("case", list(RANKINGS))
def test_what_is_no_ranking_is_refused(case: str) -> None:
    ranking, reason = RANKINGS[case]
    with pytest.raises(ValueError, match=reason):
        scores_from(columns(4, 2, outputs=3), ranking)


def test_a_group_too_large_for_a_ranking_is_named() -> None:
    ranking_of(columns(2**16), np.zeros(2**16))
    with pytest.raises(ValueError, match="group '0' has 65537 units; a ranking tells of at most 65536"):
        ranking_of(columns(2**16 + 1), np.zeros(2**16 + 1))


# --- patterns -----------------------------------------------------------------------------------------------------


def picked(pattern: Any, network: Any, name: str, arrays: Any, ranking: bytes = b"", seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if pattern == "magnitude":
        return model_norms(traced(name), build_on_meta(network), arrays)
    return ranked_scores(FedLPSConfig(pattern=pattern), traced(name), ranking, rng)


def test_magnitude_picks_the_largest_rows_of_the_global_model() -> None:
    layout = traced("ties")
    arrays = random_arrays(layout, np.random.default_rng(10))
    found = top(layout, picked("magnitude", Ties, "ties", arrays), 0.5, "floor").units
    for group, norms in norms_by_hand(arrays).items():
        span = layout.groups[group]
        best = np.sort(np.argsort(-norms)[: len(norms) // 2])
        assert np.flatnonzero(found[span.start : span.stop]).tolist() == best.tolist()


def test_magnitude_finds_the_outputs_of_transposed_convolutions() -> None:
    layout = traced("decoder")
    arrays = random_arrays(layout, np.random.default_rng(11))
    found, span = picked("magnitude", Decoder, "decoder", arrays), layout.groups["up"]
    assert np.allclose(found[span.start : span.stop], np.abs(arrays["up.weight"]).sum((0, 2, 3)), rtol=1e-6)


def test_ordered_random_and_learned_patterns() -> None:
    layout = traced("ties")
    scores = np.random.default_rng(12).standard_normal(layout.num_units)
    half = {
        seed: [top(layout, picked(p, Ties, "ties", {}, r, seed), 0.5, "floor") for p, r in pairs]
        for seed, pairs in {s: [("ordered", b""), ("learned", b""), ("random", b"")] for s in range(9)}.items()
    }
    assert all(first == second == prefix_ratio(layout, 0.5, "floor") for first, second, _ in half.values())
    assert len({drawn for *_, drawn in half.values()}) > 5
    assert top(layout, picked("random", Ties, "ties", {}, b"", 3), 0.5, "floor") == half[3][2]
    told = picked("learned", Ties, "ties", {}, ranking_of(layout, scores))
    assert top(layout, told, 0.5, "floor") == top(layout, scores, 0.5, "floor")


# --- the server ---------------------------------------------------------------------------------------------------

PREVIOUS = np.asarray([[1, 1], [2, 2], [3, 3]], dtype=np.float32)
TRAINED = [
    ([True, True, False], [[1.2, 1], [1.9, 2.1], [9, 9]], 100.0),
    ([True, False, False], [[0.8, 1.4], [7, 7], [7, 7]], 300.0),
]


@pytest.mark.parametrize("cut", ["all", "rows", "weight-rows"])
@pytest.mark.parametrize(
    ("knobs", "mean"),
    [
        ({}, [[1, 1.2], [1.95, 2.05], [3, 3]]),
        ({"weights": "examples"}, [[0.9, 1.3], [1.975, 2.025], [3, 3]]),
        ({"normalise": "coverage"}, [[1, 1.2], [1.9, 2.1], [3, 3]]),
    ],
)
def test_aggregation(cut: Any, knobs: dict[str, Any], mean: list[list[float]]) -> None:
    layout, strategy = columns(3), server(**knobs)
    averager = Averager(layout, {"0.weight": PREVIOUS}, strategy.per)
    sent = []
    for units, trained, examples in TRAINED:
        submodel = Submodel(np.asarray(units), cut=cut)
        difference = {"0.weight": np.asarray(trained, dtype=np.float32) - PREVIOUS}
        flat = flatten(layout, submodel, extract(layout, submodel, difference))
        sent.append(len(flat))
        averager.add(submodel, flat, strategy.weigh(Update(submodel, flat, examples, {})))
    assert sent == [4, 2]
    found = averager.result()["0.weight"]
    assert np.allclose(found, mean, atol=1e-6)
    assert found[2].tolist() == [3, 3]


def reply(ranking: bytes | None, submodel: Submodel | None = None) -> Update:
    metrics = {"train-accuracy": 0.5, "macs": 1.0}
    told = {} if ranking is None else {"ranking": ranking}
    return Update(submodel or full(task().layout), np.zeros(0, dtype=np.float32), 1.0, metrics, told=told)


def job(ratio: float = 1.0, submodel: Submodel | None = None) -> Assignment:
    return Assignment(submodel or full(task().layout), f"{ratio:.2f}", {"ratio": ratio})


def test_a_reply_must_rank_where_the_server_chooses_by_it() -> None:
    layout = task().layout
    good = ranking_of(layout, np.zeros(layout.num_units))
    server().check(job(), reply(good))
    for bad in (None, b"", good[:-2], good[:2] + good[:-2]):
        with pytest.raises(ValueError, match="a ranking"):
            server().check(job(), reply(bad))
    for knobs in ({"share_ranking": False}, {"pattern": "random"}):
        server(**knobs).check(job(), reply(None))


def test_a_reply_must_hold_what_its_client_was_asked_to_train() -> None:
    layout = task().layout
    ranking, half = ranking_of(layout, np.zeros(layout.num_units)), prefix_ratio(layout, 0.5, "floor")
    other = top(layout, np.arange(layout.num_units, dtype=float), 0.5, "floor")
    fewer = prefix_ratio(layout, 0.25, "floor")
    rows, weights = replace(other, cut="rows"), replace(other, cut="weight-rows")
    without = replace(other, units=other.units & ~layout.fixed_units)
    everything = full(layout)
    for knobs, told, sent, right, wrong in (
        ({}, ranking, half, [half], [other, fewer, rows]),
        ({"share_ranking": False}, None, everything, [half, other], [fewer, rows, without, everything]),
        ({"mask_update": "batch"}, None, everything, [rows], [other, weights, replace(fewer, cut="rows")]),
        ({"mask_bias": False}, None, everything, [weights], [other, rows]),
    ):
        for held in right:
            server(**knobs).check(job(0.5, sent), reply(told, held))
        for held in [*wrong, replace(right[0], keys=frozenset(layout.shapes))]:
            with pytest.raises(ValueError, match=r"other units than it was asked|leaves out whole tensors"):
                server(**knobs).check(job(0.5, sent), reply(told, held))


def test_the_server_keeps_the_last_ranking_of_each_client_for_its_next_part() -> None:
    layout = task().layout
    scores = np.random.default_rng(13).standard_normal((2, layout.num_units))
    first = prefix_ratio(layout, 0.4, "floor")
    for knobs in ({}, {"score_reset": True}):
        strategy = server(ratio_policy="level", **knobs)
        for told in scores:
            strategy.observe(1, 5, reply(ranking_of(layout, told)))
        again = server(ratio_policy="level", **knobs)
        again.load_state_dict(strategy.state_dict())
        expected = first if knobs else top(layout, scores[1], 0.4, "floor")
        for one in (strategy, again):
            assert one.sized_part(0.4, Device(5), 2).submodel == expected
            assert one.sized_part(0.4, Device(6), 2).submodel == first
    assert server().sized_part(0.4, Device(5), 1).config["ratio"] == 0.4
    for knobs in ({"share_ranking": False}, {"mask_update": "batch"}, {"mask_bias": False}):
        assert server(**knobs).sized_part(0.4, Device(5), 1).submodel == full(layout)


def test_random_units_are_drawn_anew_for_every_client_and_round_and_again_the_same() -> None:
    drawn = [server(pattern="random").sized_part(0.5, Device(p), r).submodel for p in range(3) for r in (1, 2)]
    assert len(set(drawn)) == 6
    assert server(pattern="random").sized_part(0.5, Device(2), 2).submodel == drawn[-1]
    assert server(pattern="random", seed=2).sized_part(0.5, Device(2), 2).submodel != drawn[-1]


def test_noise_has_its_deviation_and_its_seed() -> None:
    arrays = {"a": np.ones((300, 200), dtype=np.float32), "b": np.zeros(50_000, dtype=np.float32)}
    noisy = add_noise(arrays, 0.01, np.random.default_rng(14))
    added = np.concatenate([(noisy[name] - arrays[name]).ravel() for name in arrays])
    assert abs(added.mean()) < 2e-4
    assert added.std() == pytest.approx(0.01, rel=0.02)
    assert all(a.dtype == np.float32 for a in noisy.values())
    assert same_bits(add_noise(arrays, 0.01, np.random.default_rng(14)), noisy)
    assert not np.array_equal(noisy["a"][0], noisy["a"][1])


def test_the_server_adds_noise_of_its_seed_and_round_and_none_by_default() -> None:
    arrays = {"a": np.ones(1000, dtype=np.float32)}
    assert server().finish({}, arrays) is arrays
    found = []
    for seed, server_round in ((1, 1), (1, 1), (1, 2), (2, 1)):
        strategy = server(noise=0.5, seed=seed)
        strategy.record = RoundRecord(server_round)
        found.append(strategy.finish({}, arrays)["a"])
    assert np.array_equal(found[0], found[1])
    assert abs(np.corrcoef(found[1:])[np.triu_indices(3, 1)]).max() < 0.2
    assert (found[0] - 1).std() == pytest.approx(0.5, rel=0.1)


# --- configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"pattern": "best"}, "fedlps.pattern must be one of learned, random, magnitude, ordered, got 'best'"),
        ({"mask_update": "epoch"}, "fedlps.mask-update must be one of round, batch, got 'epoch'"),
        ({"score_optimizer": "sgd"}, "fedlps.score-optimizer must be one of adam, shared-sgd, got 'sgd'"),
        ({"score_scope": "none"}, "fedlps.score-scope must be one of active, all, got 'none'"),
        ({"importance_target": "l1"}, "fedlps.importance-target must be one of sigmoid-l1, sigmoid-zscore-l1, got"),
        ({"weights": "equal"}, "fedlps.weights must be one of uniform, examples, got 'equal'"),
        ({"normalise": "total"}, "fedlps.normalise must be one of all, coverage, got 'total'"),
        ({"score_learning_rate": 0.0}, "fedlps.score-learning-rate must be > 0, got 0.0"),
        ({"score_learning_rate": float("nan")}, "fedlps.score-learning-rate must be > 0, got nan"),
        ({"importance_weight": -1.0}, "fedlps.importance-weight must be >= 0, got -1.0"),
        ({"prox": -0.1}, "fedlps.prox must be >= 0, got -0.1"),
        ({"noise": -0.001}, "fedlps.noise must be >= 0, got -0.001"),
        ({"noise": float("inf")}, "fedlps.noise must be >= 0, got inf"),
        ({"score_scope": "all"}, "score-scope='all' needs the whole network on the device: set fedlps.mask-update"),
        ({"pattern": "random", "mask_update": "batch"}, "fedlps.pattern='random' has no masks that change"),
        ({"pattern": "ordered", "mask_bias": False}, "fedlps.pattern='ordered' has no masks that change"),
    ],
)
def test_impossible_settings_are_refused(knobs: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FedLPSConfig(**knobs)


def test_who_trains_a_narrow_network_and_who_chooses_its_units() -> None:
    kinds: list[tuple[dict[str, Any], bool, bool]] = [
        ({}, False, True),
        ({"share_ranking": False}, False, False),
        ({"pattern": "random", "share_ranking": False}, False, True),
        ({"mask_update": "batch"}, True, False),
        ({"mask_bias": False, "score_scope": "all"}, True, False),
    ]
    for knobs, is_masked, is_told in kinds:
        config = FedLPSConfig(**knobs)
        assert (config.is_masked, config.is_told) == (is_masked, is_told)


def test_the_toy_task_is_of_digits() -> None:
    assert task().input_shape == DIGITS
