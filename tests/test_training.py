from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flexfed.training import (
    Evaluation,
    Samples,
    Training,
    batches,
    cross_entropy,
    evaluate,
    fit,
    proximal,
    use_batch_statistics,
)

PLAIN = Training(
    learning_rate=0.5, learning_rate_decay=1.0, momentum=0.0, weight_decay=0.0, local_epochs=1, batch_size=4
)


def samples(num: int, classes: int = 3, seed: int = 0) -> Samples:
    """Points whose class is the largest of their coordinates."""
    inputs = torch.from_numpy(np.random.default_rng(seed).standard_normal((num, classes))).float()
    return Samples(inputs, inputs.argmax(1))


def linear(classes: int = 3) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(classes, classes)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# --- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"learning_rate": 0.0}, "learning-rate must be > 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning-rate must be > 0, got nan"),
        ({"learning_rate_decay": 0.0}, "learning-rate-decay must be > 0"),
        ({"momentum": -0.1}, "momentum must be >= 0, got -0.1"),
        ({"weight_decay": float("inf")}, "weight-decay must be >= 0, got inf"),
        ({"clip_norm": -1.0}, "clip-norm must be >= 0"),
        ({"local_epochs": 0}, "local-epochs must be at least 1, got 0"),
        ({"batch_size": 1}, "batch-size must be at least 2, got 1"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion'; known: sgd, adam"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Training(**values)


@pytest.mark.parametrize(("server_round", "rate"), [(1, 0.01), (2, 0.00998), (101, 0.00818567), (1000, 0.00135335)])
def test_learning_rates_of_the_page(server_round: int, rate: float) -> None:
    """FlexFL's page counts rounds from 0; here they are counted from 1."""
    assert Training(learning_rate=0.01).rate_at(server_round) == pytest.approx(rate, rel=1e-5)


# --- batches ----------------------------------------------------------------------------------------------------


def sizes(num: int, size: int, shuffled: bool, drop_last: bool) -> list[int]:
    rng = np.random.default_rng(0) if shuffled else None
    return [len(batch.labels) for batch in batches(samples(num), size, rng, drop_last)]


@pytest.mark.parametrize(
    ("num", "shuffled", "drop_last", "expected"),
    [
        (8, True, True, [4, 4]),
        (10, True, True, [4, 4]),
        (10, True, False, [4, 4, 2]),
        (9, True, False, [4, 4]),  # batch norm has no variance of one sample
        (9, False, False, [4, 4, 1]),  # in eval mode it needs none
        (3, True, True, [3]),  # a device with less than a batch trains on it
        (1, True, True, [1]),
        (0, True, True, []),
    ],
)
def test_batch_sizes(num: int, shuffled: bool, drop_last: bool, expected: list[int]) -> None:
    assert sizes(num, 4, shuffled, drop_last) == expected


def test_batches_hold_every_sample_once_in_an_order_of_the_generator() -> None:
    data = samples(10)
    in_order = torch.cat([batch.inputs for batch in batches(data, 4)])
    assert torch.equal(in_order, data.inputs)
    shuffled = [torch.cat([b.inputs for b in batches(data, 4, np.random.default_rng(seed))]) for seed in (1, 1, 2)]
    assert torch.equal(shuffled[0], shuffled[1])
    assert not torch.equal(shuffled[0], shuffled[2])
    assert torch.equal(shuffled[0].sort(0).values, data.inputs.sort(0).values)


# --- fit --------------------------------------------------------------------------------------------------------


def test_one_batch_is_one_gradient_step() -> None:
    model, data = linear(), samples(4)
    before = weights(model)
    loss = cross_entropy(model, *data)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    result = fit(model, data, PLAIN, 0.5, np.random.default_rng(0))
    for new, old, gradient in zip(weights(model), before, gradients, strict=True):
        torch.testing.assert_close(new, old - 0.5 * gradient)
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert result.num_samples == 4


def test_accuracy_is_that_of_each_batch_before_its_step_and_the_mean_over_epochs() -> None:
    data, training = samples(10), replace(PLAIN, local_epochs=3, drop_last=False)
    model, seen = linear(), []

    def loss(network: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        logits = network(inputs)
        seen.append((int((logits.argmax(1) == labels).sum()), len(labels)))
        return nn.functional.cross_entropy(logits, labels)

    result = fit(model, data, training, 0.5, np.random.default_rng(0), loss)
    epochs = [seen[i : i + 3] for i in (0, 3, 6)]
    assert len(seen) == 9
    assert result.accuracy == pytest.approx(np.mean([sum(r for r, _ in e) / sum(n for _, n in e) for e in epochs]))
    assert 0 < result.accuracy < 1
    assert not model._forward_hooks


def test_a_methods_own_step_takes_the_place_of_the_optimisers() -> None:
    model, gradients = linear(), []

    def step(optimizer: torch.optim.Optimizer) -> None:
        gradients.append(float(torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))))

    before = weights(model)
    fit(model, samples(16), replace(PLAIN, clip_norm=0.01), 0.5, np.random.default_rng(0), step=step)
    assert all(torch.equal(old, new) for old, new in zip(before, weights(model), strict=True))
    assert gradients == pytest.approx([0.01] * 4, rel=1e-4)  # clipped before it sees them


def test_proximal_term_and_its_gradient() -> None:
    model = linear()
    start = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    value = proximal(model, start, 0.3)
    squares = sum((p**2).sum().item() for p in model.parameters())
    assert value.item() == pytest.approx(0.15 * squares, rel=1e-6)
    value.backward()
    for parameter in model.parameters():
        torch.testing.assert_close(parameter.grad, 0.3 * parameter.detach())
    assert proximal(model, start, 0.0).item() == 0


def test_fit_learns_and_reports_the_last_epoch() -> None:
    model, data = linear(), samples(64)
    first = evaluate(model, data)
    result = fit(model, data, replace(PLAIN, local_epochs=30), 0.5, np.random.default_rng(0))
    last = evaluate(model, data)
    assert last.accuracy > 0.95 > first.accuracy
    assert last.loss < result.loss * 1.1 < first.loss
    assert result.num_samples == 30 * 64
    assert model.training


def test_samples_of_a_batch_left_out_do_not_count() -> None:
    result = fit(linear(), samples(10), replace(PLAIN, local_epochs=2), 0.1, np.random.default_rng(0))
    assert result.num_samples == 16


def test_equal_generators_give_equal_bits_and_others_do_not() -> None:
    trained = []
    for seed in (1, 1, 2):
        model = linear()
        fit(model, samples(20), replace(PLAIN, momentum=0.9), 0.1, np.random.default_rng(seed))
        trained.append(weights(model))
    assert all(torch.equal(a, b) for a, b in zip(trained[0], trained[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(trained[0], trained[2], strict=True))


def test_the_optimiser_is_fresh_every_time() -> None:
    data, settings = samples(8), replace(PLAIN, momentum=0.9)
    twice, fresh = linear(), linear()
    fit(twice, data, settings, 0.1, np.random.default_rng(0))
    fresh.load_state_dict(twice.state_dict())
    for model in (twice, fresh):
        fit(model, data, settings, 0.1, np.random.default_rng(1))
    assert all(torch.equal(a, b) for a, b in zip(weights(twice), weights(fresh), strict=True))


def test_weight_decay_momentum_and_adam_reach_the_optimiser() -> None:
    ends = []
    for changes in ({}, {"weight_decay": 0.1}, {"momentum": 0.9}, {"optimizer": "adam"}):
        model = linear()
        fit(model, samples(16), replace(PLAIN, **changes), 0.1, np.random.default_rng(0))  # type: ignore[arg-type]
        ends.append(torch.cat([w.flatten() for w in weights(model)]).numpy().tobytes())
    assert len(set(ends)) == len(ends)


def test_gradients_are_clipped_to_the_norm() -> None:
    model, data = linear(), samples(4)
    before = weights(model)
    fit(model, data, replace(PLAIN, clip_norm=0.01), 1.0, np.random.default_rng(0))
    moved = torch.cat([(new - old).flatten() for new, old in zip(weights(model), before, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


def test_frozen_parameters_do_not_move() -> None:
    model = linear()
    model.weight.requires_grad_(False)
    before = model.weight.clone()
    fit(model, samples(8), replace(PLAIN, weight_decay=0.1), 0.1, np.random.default_rng(0))
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("num", [0, 1])
def test_training_on_less_than_two_samples_is_refused(num: int) -> None:
    with pytest.raises(ValueError, match=f"training needs at least 2 samples, got {num}"):
        fit(linear(), samples(num), PLAIN, 0.1, np.random.default_rng(0))


# --- evaluate ---------------------------------------------------------------------------------------------------


def test_evaluation_counts_over_batches_of_any_size() -> None:
    model, data = linear(), samples(11)
    results = [evaluate(model, data, size) for size in (1, 4, 100)]
    with torch.no_grad():
        logits = model(data.inputs)
    correct = int((logits.argmax(1) == data.labels).sum())
    loss = float(nn.functional.cross_entropy(logits, data.labels))
    for result in results:
        assert (result.correct, result.num_samples) == (correct, 11)
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert result.accuracy == correct / 11


@pytest.mark.parametrize("mode", [True, False])
def test_evaluation_runs_in_eval_mode_and_restores_the_mode(mode: bool) -> None:
    model = nn.Sequential(nn.Dropout(0.99), linear()).train(mode)
    data = samples(20)
    assert evaluate(model, data) == evaluate(model, data)
    assert model.training is mode


def test_evaluation_of_nothing_is_no_number() -> None:
    result = evaluate(linear(), samples(0))
    assert result == Evaluation(0, 0.0, 0)
    assert np.isnan(result.accuracy)
    assert np.isnan(result.loss)


def test_batch_statistics_in_both_modes() -> None:
    model = use_batch_statistics(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)))
    inputs = samples(5).inputs
    assert torch.equal(model.train()(inputs), model.eval()(inputs))
    assert not [name for name in model.state_dict() if "running" in name or "num_batches" in name]


def test_training_ends_when_it_is_told_to_and_hears_every_epochs_mean_loss() -> None:
    heard: list[float] = []

    def go_on(loss: float) -> bool:
        heard.append(loss)
        return len(heard) < 2

    samples = Samples(torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 2)
    model = nn.Linear(3, 2)
    training = Training(local_epochs=9, batch_size=5, learning_rate=0.1)
    result = fit(model, samples, training, 0.1, np.random.default_rng(0), go_on=go_on)
    assert len(heard) == 2
    assert result.num_samples == 20
    assert heard[-1] == result.loss
