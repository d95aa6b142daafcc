"""FIARSE's mathematics: what a size keeps, the gradient through its threshold, the mean, and units (ours)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toy import Decoder, Ties, random_arrays

from flexfed.averaging import Averager
from flexfed.cost import num_parameters
from flexfed.jobs import Update
from flexfed.methods.fedlps_scores import Rows
from flexfed.methods.fiarse import EntryMasks, FIARSEConfig, changed_entries
from flexfed.methods.fiarse_masks import (
    entry_size,
    gradient_factor,
    keep_largest,
    keep_with,
    least_entries,
    maskable_tensors,
    num_kept,
    output_axes,
    unit_scores,
    unit_size,
)
from flexfed.submodel import Submodel, full, narrow_shapes, within
from flexfed.units import Arrays, Layout, build_on_meta, trace_layout

W = np.array([0.5, -0.2, 0.1, -0.8, 0.3, -0.6], dtype=np.float32)
SLOPES = torch.tensor([1.0, 1.0, 1.0, 1.0, -2.0, 0.5])  # dL/dw_eff of the worked example
LAYOUT = trace_layout(Ties, (1, 4, 4))
ARRAYS = random_arrays(LAYOUT, np.random.default_rng(3))
NORMS = {"norm.weight", "norm.bias", "joined.weight", "joined.bias"}


# --- the configuration ------------------------------------------------------------------------------------------


def test_defaults_are_the_papers() -> None:
    assert FIARSEConfig().sizes == (1, 1 / 4, 1 / 16, 1 / 64)
    assert (FIARSEConfig().mode, FIARSEConfig().scope) == ("unstructured", "global")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"sizes": ()}, "fiarse.sizes must fall from at most 1 to above 0, largest first, got"),
        ({"sizes": (0.25, 1.0)}, "fiarse.sizes must fall"),
        ({"sizes": (1.0, 1.0)}, "fiarse.sizes must fall"),
        ({"sizes": (1.5,)}, "fiarse.sizes must fall"),
        ({"sizes": (1.0, 0.0)}, "fiarse.sizes must fall"),
        ({"sizes": (math.nan,)}, "fiarse.sizes must fall"),
        ({"mode": "structured"}, "fiarse.mode must be one of unstructured, units, got 'structured'"),
        ({"scope": "local"}, "fiarse.scope must be one of global, layerwise, got 'local'"),
        ({"coverage": "all"}, "fiarse.coverage must be one of mask, sent, nonzero, got 'all'"),
        ({"min_per_tensor": "two"}, "fiarse.min-per-tensor must be one of none, one, row, got 'two'"),
        ({"min_per_tensor": "row", "mode": "units"}, "fiarse.min-per-tensor is about single entries"),
    ],
)
def test_config_refuses_impossible_values(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FIARSEConfig(**values)


# --- masks ------------------------------------------------------------------------------------------------------


def test_the_mask_oracle_of_the_page() -> None:
    w = np.array([[0.5, -0.1, 0.3], [-0.7, 0.05, 0.2]])
    threshold, mask = keep_largest(np.abs(w), 3)
    assert threshold == 0.3
    assert mask.tolist() == [[True, False, True], [True, False, False]]


def by_sorting(scores: np.ndarray, k: int) -> list[int]:
    """The places of the k largest, of equal ones the first: one sort."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


@pytest.mark.parametrize("distinct", [1, 2, 5, 1000])
def test_ties_keep_exactly_k_the_first_of_them(distinct: int) -> None:
    rng = np.random.default_rng(distinct)
    for num in (1, 2, 17, 60):
        scores = rng.integers(0, distinct, num).astype(np.float32)
        for k in range(1, num + 1):
            threshold, mask = keep_largest(scores, k)
            assert np.flatnonzero(mask).tolist() == by_sorting(scores, k)
            assert threshold == np.sort(scores)[num - k]
            assert threshold == scores[mask].min()


@pytest.mark.parametrize("k", [0, -1, 7])
def test_a_number_that_cannot_be_kept_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"expected to keep 1..6 of 6 entries, got {k}"):
        keep_largest(np.abs(W), k)


def test_the_number_kept_is_rounded_down_and_binary_fractions_do_not_count() -> None:
    assert num_kept(0.5, 7) == 3
    assert num_kept(0.29, 100) == 29  # 28.999999999999996
    assert num_kept(1 / 64, 63) == 0


def test_a_size_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"size 0.1 keeps floor\(0.1 \* 6\) = 0 entries; expected at least 1"):
        entry_size({"w": W}, 0.1)


def maskable_arrays() -> Arrays:
    return {name: ARRAYS[name] for name in maskable_tensors(LAYOUT, Ties)}


def test_norms_are_never_masked() -> None:
    assert set(maskable_tensors(LAYOUT, Ties)) == LAYOUT.shapes.keys() - NORMS
    layout = trace_layout(Decoder, (2, 3, 3))
    assert set(maskable_tensors(layout, Decoder)) == layout.shapes.keys() - {"norm.weight", "norm.bias"}


def test_one_threshold_is_that_of_all_tensors_together() -> None:
    arrays = maskable_arrays()
    everything = np.concatenate([np.abs(a).ravel() for a in arrays.values()])
    for size in (0.9, 0.25, 0.03):
        masks, thresholds = entry_size(arrays, size)
        k = math.floor(size * len(everything))
        assert set(thresholds.values()) == {float(np.sort(everything)[-k])}
        assert np.flatnonzero(np.concatenate([m.ravel() for m in masks.values()])).tolist() == by_sorting(everything, k)
        assert {name: mask.shape for name, mask in masks.items()} == {n: a.shape for n, a in arrays.items()}


def test_layer_by_layer_each_tensor_keeps_its_share_and_one_at_least() -> None:
    arrays = maskable_arrays()
    masks, thresholds = entry_size(arrays, 0.05, "layerwise")
    for name, array in arrays.items():
        kept = max(1, math.floor(0.05 * array.size))
        assert int(masks[name].sum()) == kept
        assert thresholds[name] == np.sort(np.abs(array), axis=None)[-kept] == np.abs(array[masks[name]]).min()


@pytest.mark.parametrize("scope", ["global", "layerwise"])
@pytest.mark.parametrize("least", ["none", "one", "row"])
def test_sizes_are_nested(scope: Any, least: Any) -> None:
    arrays = maskable_arrays()
    wanted = least_entries(arrays, least, output_axes(tuple(arrays), Ties))
    before = {name: np.ones(a.shape, dtype=bool) for name, a in arrays.items()}
    for size in (0.9, 0.5, 0.25, 0.1, 0.08):
        masks, _ = entry_size(arrays, size, scope, wanted)
        for name, mask in masks.items():
            assert not (mask & ~before[name]).any(), name
            assert not (wanted[name] & ~mask).any(), name
        before = masks


def tilted() -> Arrays:
    """Weights of which one is so small that small sizes empty it, and another's second row is."""
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in (("a", (4, 5)), ("b", (3, 6)), ("c", (6,)))}
    arrays["b"] *= np.float32(1e-3)
    arrays["a"][1] *= np.float32(1e-3)
    return arrays


def test_a_small_size_may_empty_a_weight_as_published() -> None:
    masks, _ = entry_size(tilted(), 0.2)
    assert not masks["b"].any()


@pytest.mark.parametrize(("least", "num"), [("one", 2), ("row", 7)])
def test_what_stays_in_any_case_is_within_the_size(least: Any, num: int) -> None:
    arrays = tilted()
    wanted = least_entries(arrays, least, {"a": 0, "b": 0, "c": 0})
    assert sum(int(w.sum()) for w in wanted.values()) == num
    assert not wanted["c"].any()
    masks, thresholds = entry_size(arrays, 0.2, "global", wanted)
    assert sum(int(m.sum()) for m in masks.values()) == math.floor(0.2 * 44)
    assert masks["b"].any(axis=1).sum() == (3 if least == "row" else 1)
    assert masks["a"][1].any() == (least == "row")
    for name in ("a", "b"):
        rows = np.abs(arrays[name]) if least == "row" else np.abs(arrays[name]).reshape(1, -1)
        kept = masks[name].reshape(rows.shape)
        assert kept[np.arange(len(rows)), rows.argmax(axis=1)].all()
    others = [np.abs(a[masks[n] & ~wanted[n]]) for n, a in arrays.items()]
    assert set(thresholds.values()) == {float(np.concatenate(others).min())}


def test_rows_are_those_of_the_outputs() -> None:
    layout = trace_layout(Decoder, (2, 3, 3))
    arrays = {n: a for n, a in random_arrays(layout, np.random.default_rng(1)).items() if n == "up.weight"}
    axes = output_axes(tuple(arrays), Decoder)
    assert axes == {"up.weight": 1}
    found = least_entries(arrays, "row", axes)["up.weight"]
    assert found.sum(axis=(0, 2, 3)).tolist() == [1] * 6


def test_where_nothing_would_be_empty_the_least_changes_nothing() -> None:
    scores, wanted = np.abs(W), np.array([True, False, False, True, False, False])
    for k in (3, 4):
        assert keep_with(scores, k, wanted).mask.tolist() == keep_largest(scores, k).mask.tolist()
        assert keep_with(scores, k, wanted).threshold == keep_largest(scores, k).threshold
    least = np.array([False, False, True, False, False, False])
    assert keep_with(scores, 1, least) == (pytest.approx(0.1), pytest.approx(least))
    with pytest.raises(ValueError, match="2 entries must stay, but only 1 may; leave that size out, or let"):
        keep_with(scores, 1, wanted)


# --- the gradient through the threshold -------------------------------------------------------------------------


def test_the_factor_lies_between_1_and_one_and_a_half_and_is_largest_at_the_threshold() -> None:
    scores = torch.linspace(0.3, 30, 500, dtype=torch.float64)
    factor = gradient_factor(scores, 0.3)
    assert factor[0] == 1.5
    assert (factor[1:] < factor[:-1]).all()
    assert (factor > 1).all()
    np.testing.assert_allclose(factor.numpy(), [1 + 0.6 * w / (w + 0.3) ** 2 for w in scores.tolist()])


def test_without_a_threshold_the_gradient_is_plain() -> None:
    assert gradient_factor(torch.tensor([0.0, 0.2, 3.0]), 0.0).tolist() == [1, 1, 1]
    assert gradient_factor(torch.tensor([0.0, 0.5]), torch.tensor([0.0, 0.5])).tolist() == [1, 1.5]


class Six(nn.Module):
    def __init__(self, values: np.ndarray = W):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))


def stepped(
    num: int, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], slopes: torch.Tensor = SLOPES
) -> tuple[Six, EntryMasks]:
    """The worked example's weights after some steps of a loss whose gradient is always the same."""
    model = Six()
    masks, thresholds = entry_size({"w": W}, 0.5)
    assert thresholds == {"w": 0.5}
    assert masks["w"].tolist() == [True, False, False, True, False, True]
    entries, optimizer = EntryMasks(model, masks, thresholds), make(list(model.parameters()))
    for _ in range(num):
        optimizer.zero_grad()
        (model.w * slopes).sum().backward()
        entries.step(optimizer)
    return model, entries


def sgd(**values: float) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=0.1, **values)  # type: ignore[arg-type]


def test_the_worked_example_to_the_last_digit() -> None:
    model = Six()
    masks, thresholds = entry_size({"w": W}, 0.5)
    EntryMasks(model, masks, thresholds)
    (model.w * SLOPES).sum().backward()
    np.testing.assert_allclose(model.w.grad, [1.5, 0, 0, 1.473373, 0, 0.747934], atol=5e-7)
    for num, kept, values in (
        (1, [0, 0, 0, 1, 0, 1], [0.35, 0, 0, -0.947337, 0, -0.674793]),
        (2, [0, 0, 0, 1, 0, 1], [0.35, 0, 0, -1.092561, 0, -0.74924]),
    ):
        model, entries = stepped(num, sgd())
        np.testing.assert_allclose(entries.values()["w"], values, atol=5e-7)
        assert entries.masks()["w"].tolist() == kept
        np.testing.assert_array_equal(model.w.detach(), np.where(kept, entries.values()["w"], 0))
    left_out = ~masks["w"]
    np.testing.assert_allclose(
        np.where(left_out, W, stepped(2, sgd())[1].values()["w"]) - W, [-0.15, 0, 0, -0.292561, 0, -0.14924], atol=5e-7
    )


@pytest.mark.parametrize(
    "make",
    [
        sgd(momentum=0.9, weight_decay=0.05),
        sgd(momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.05),
        lambda p: torch.optim.AdamW(p, lr=0.1),
    ],
    ids=["momentum and decay", "nesterov", "adam", "adamw"],
)
def test_whatever_the_optimiser_remembers_nothing_moves_that_has_dropped_out(make: Any) -> None:
    early, _ = stepped(1, make)
    late, entries = stepped(9, make)
    assert early.w[0] == late.w[0] == 0
    assert entries.values()["w"][0] == stepped(1, make)[1].values()["w"][0] != 0
    assert not late.w.detach()[[1, 2, 4]].any()
    assert (entries.values()["w"][[1, 2, 4]] == 0).all()
    assert late.w[3] != early.w[3]


def test_an_entry_that_was_sent_below_the_threshold_stays_in() -> None:
    model = Six()
    mask = np.array([True, True, False, True, False, True])
    entries = EntryMasks(model, {"w": mask}, {"w": 0.5})
    optimizer = sgd()(list(model.parameters()))
    (model.w * SLOPES).sum().backward()
    np.testing.assert_allclose(model.w.grad[1], 1 + 2 * 0.5 * 0.2 / 0.7**2)
    entries.step(optimizer)
    assert entries.masks()["w"].tolist() == [False, True, False, True, False, True]


class _Through(torch.autograd.Function):
    """w times the step function of |w| - theta, whose derivative is replaced: the paper's formula, by autograd."""

    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, sent: torch.Tensor, theta: float) -> torch.Tensor:
        mask = sent * (w.abs() >= theta)
        ctx.save_for_backward(w, mask)
        ctx.theta = theta
        return w * mask

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        w, mask = ctx.saved_tensors
        slope_of_mask = 2 * ctx.theta / (w.abs() + ctx.theta) ** 2 * mask
        return gradients[0] * mask + gradients[0] * w * slope_of_mask * w.sign(), None, None


def test_training_is_that_of_the_formula_by_autograd() -> None:
    """Dense weights and a mask in the forward pass, against zeros that are held in the network."""
    rng = np.random.default_rng(1)
    arrays = {n: np.float32(0.3) * a for n, a in ARRAYS.items()}
    masks, thresholds = entry_size({n: arrays[n] for n in maskable_tensors(LAYOUT, Ties)}, 0.6)
    torch.manual_seed(0)
    ours, theirs = Ties(), Ties()
    for model in (ours, theirs):
        model.load_state_dict({n: torch.tensor(a) for n, a in arrays.items()}, strict=False)
    entries = EntryMasks(ours, masks, thresholds)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (ours, theirs)]
    sent = {name: torch.from_numpy(mask) for name, mask in masks.items()}
    for _ in range(12):
        x = torch.from_numpy(rng.standard_normal((8, 1, 4, 4), dtype=np.float32))
        y = torch.from_numpy(rng.integers(0, 3, 8))
        for optimizer in optimizers:
            optimizer.zero_grad()
        nn.functional.cross_entropy(ours(x), y).backward()
        entries.step(optimizers[0])
        effective = {
            n: _Through.apply(p, sent[n], thresholds[n]) if n in sent else p for n, p in theirs.named_parameters()
        }
        nn.functional.cross_entropy(torch.func.functional_call(theirs, effective, (x,)), y).backward()
        optimizers[1].step()
    expected = dict(theirs.named_parameters())
    dropped = 0
    for name, values in entries.values().items():
        kept = expected[name].detach().abs().numpy() >= thresholds[name]
        np.testing.assert_array_equal(entries.masks()[name], kept & masks[name], err_msg=name)
        np.testing.assert_allclose(values[masks[name]], expected[name].detach().numpy()[masks[name]], atol=2e-6)
        dropped += int((masks[name] & ~kept).sum())
    assert dropped > 5
    for name in NORMS:
        np.testing.assert_allclose(dict(ours.named_parameters())[name].detach(), expected[name].detach(), atol=2e-6)


# --- the mean ---------------------------------------------------------------------------------------------------

FLAT = Layout({"network": range(1)}, {"w": (None,)}, {"w": (6,)}, frozenset({"network"}))
A = np.array([-0.15, 0, 0, -0.292561, 0, -0.14924], dtype=np.float32)  # trained minus sent
B = np.array([-0.1, -0.1, 0, 0.2, 0, 0], dtype=np.float32)


def reply(difference: np.ndarray, mask: list[int] | None = None) -> Update:
    masks = {} if mask is None else {"w": np.array(mask, dtype=bool)}
    held = Submodel(np.ones(1, dtype=bool), masks=masks)
    return Update(held, difference if mask is None else difference[masks["w"]], 7.0, {})


def averaged(*replies: tuple[Submodel, np.ndarray]) -> np.ndarray:
    averager = Averager(FLAT, {"w": W})
    for held, difference in replies:
        averager.add(held, difference, 1.0)
    return averager.result()["w"]


def test_the_worked_mean_counts_those_that_changed_an_entry() -> None:
    for a in (reply(A), reply(A, [1, 0, 0, 1, 0, 1])):
        found = averaged(changed_entries(FLAT, a), changed_entries(FLAT, reply(B)))
        np.testing.assert_allclose(found, [0.375, -0.3, 0.1, -0.84628, 0.3, -0.74924], atol=5e-7)
        assert found[[2, 4]].tobytes() == W[[2, 4]].tobytes()


def test_by_the_mask_a_kept_entry_that_did_not_move_is_a_vote() -> None:
    a, b = reply(A, [0, 0, 0, 1, 0, 1]), reply(B, [1, 1, 1, 1, 1, 1])
    found = averaged(*((u.submodel, u.difference) for u in (a, b)))
    np.testing.assert_allclose(found, [0.4, -0.3, 0.1, -0.84628, 0.3, -0.67462], atol=5e-7)


def test_a_reply_that_changed_nothing_covers_nothing() -> None:
    held, difference = changed_entries(FLAT, reply(np.zeros(6, dtype=np.float32)))
    assert len(difference) == 0
    assert averaged((held, difference)).tobytes() == W.tobytes()


# --- units (ours) -----------------------------------------------------------------------------------------------


def rows_of(layout: Layout, factory: Callable[[], nn.Module]) -> Rows:
    return Rows(layout, full(layout), build_on_meta(factory), vectors=True)


def scores_of(layout: Layout, factory: Callable[[], nn.Module], arrays: Arrays) -> np.ndarray:
    tensors = {n: torch.from_numpy(arrays[n]) for n in maskable_tensors(layout, factory)}
    return unit_scores(rows_of(layout, factory), tensors).numpy()


@pytest.mark.parametrize(("factory", "shape"), [(Ties, (1, 4, 4)), (Decoder, (2, 3, 3))])
def test_a_units_score_is_the_root_mean_square_of_its_rows(factory: Any, shape: tuple[int, ...]) -> None:
    layout = trace_layout(factory, shape)
    arrays = random_arrays(layout, np.random.default_rng(5))
    found = scores_of(layout, factory, arrays)
    names, axes = maskable_tensors(layout, factory), output_axes(tuple(layout.shapes), factory)
    for unit in range(layout.num_units):
        entries: list[float] = []
        for name in names:
            owners = layout.axes[name][axes[name]]
            assert owners is not None
            for place in np.flatnonzero(owners == unit):
                entries += np.take(arrays[name], place, axis=axes[name]).ravel().tolist()
        expected = 0.0 if layout.fixed_units[unit] else math.sqrt(np.mean(np.square(entries)))
        assert found[unit] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scope", ["global", "layerwise"])
def test_units_meet_their_size_nest_and_leave_no_group_empty(scope: Any) -> None:
    scores = scores_of(LAYOUT, Ties, ARRAYS)
    whole, outer = num_parameters(LAYOUT, full(LAYOUT)), full(LAYOUT)
    for size in (0.95, 0.7, 0.5, 0.3, 0.15):
        found = unit_size(LAYOUT, scores, size, scope)
        assert num_parameters(LAYOUT, found.submodel) <= size * whole
        assert within(found.submodel, outer)
        assert not found.submodel.masks
        assert found.submodel.units[LAYOUT.fixed_units].all()
        for group, span in LAYOUT.groups.items():
            kept = found.submodel.units[span.start : span.stop]
            own = scores[span.start : span.stop]
            assert kept.any(), group
            if group not in LAYOUT.fixed:
                assert own[kept].min() >= max(own[~kept], default=0), "the best stay"
        assert found.thresholds.keys() == LAYOUT.groups.keys() - LAYOUT.fixed
        outer = found.submodel


def test_one_more_unit_would_be_too_much() -> None:
    scores = scores_of(LAYOUT, Ties, ARRAYS)
    whole = num_parameters(LAYOUT, full(LAYOUT))
    found = unit_size(LAYOUT, scores, 0.5)
    left = np.flatnonzero(~found.submodel.units)
    units = found.submodel.units.copy()
    units[left[np.argmax(scores[left])]] = True
    assert num_parameters(LAYOUT, Submodel(units)) > 0.5 * whole


def test_with_one_threshold_all_units_above_it_stay_and_of_a_poorer_group_the_best() -> None:
    scores = scores_of(LAYOUT, Ties, ARRAYS)
    poor = LAYOUT.groups["inner"]
    scores[poor.start : poor.stop] *= np.float32(1e-3)
    found = unit_size(LAYOUT, scores, 0.5)
    kept, theta = found.submodel.units, max(found.thresholds.values())
    assert kept[poor.start : poor.stop].sum() == 1
    assert found.thresholds["inner"] == scores[poor.start : poor.stop].max() < theta
    others = ~LAYOUT.fixed_units
    others[poor.start : poor.stop] = False
    np.testing.assert_array_equal(kept[others], scores[others] >= theta)


def test_layer_by_layer_each_group_keeps_the_same_share() -> None:
    found = unit_size(LAYOUT, scores_of(LAYOUT, Ties, ARRAYS), 0.4, "layerwise")
    steps = {
        step
        for step in range(1, 65)
        if all(
            found.submodel.units[s.start : s.stop].sum() == math.ceil(step / 64 * len(s))
            for g, s in LAYOUT.groups.items()
            if g not in LAYOUT.fixed
        )
    }
    assert steps


def test_a_size_that_whole_units_cannot_meet_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size 0.01 cannot be met by whole units: one of each group takes 0\.\d+ of"):
        unit_size(LAYOUT, scores_of(LAYOUT, Ties, ARRAYS), 0.01)


def test_a_part_of_units_is_narrow() -> None:
    part = unit_size(LAYOUT, scores_of(LAYOUT, Ties, ARRAYS), 0.3).submodel
    shapes = narrow_shapes(LAYOUT, part)
    assert shapes != LAYOUT.shapes
    assert replace(part, masks={}) == part
