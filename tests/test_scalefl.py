"""ScaleFL: its loss and its worked example, levels as written and searched for, the scaler wherever a part is used."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from toy import DIGITS, QUICK, lines, run_toy, sent_part, toy_task

from flexfed.batchnorm import collect_sums, statistics
from flexfed.checkpoint import load_checkpoint
from flexfed.client_state import load_state
from flexfed.config import Experiment
from flexfed.cost import num_parameters
from flexfed.data import ClientData, DataConfig, load_client, load_server, normalise
from flexfed.devices import Device, load_fleet
from flexfed.evaluation import measure_levels
from flexfed.exits import ExitNetwork, depth_keys
from flexfed.export import export_level, load_exported
from flexfed.flower.messages import from_record_of_arrays, num_bytes
from flexfed.jobs import Job, Task, Update, initial_arrays
from flexfed.methods.scalefl import (
    ScaleFLConfig,
    as_used,
    exit_loss,
    gamma_in,
    levels_of,
    local_update,
    scaled_layers,
    width_of,
)
from flexfed.methods.scalefl_levels import Level, evenly_deep, grid, part_of_level, search
from flexfed.personal import stored_model
from flexfed.scaler import divide_outputs, divide_weights
from flexfed.submodel import Submodel, extract, flatten, full, narrow_shapes, within
from flexfed.training import Samples, batches
from flexfed.units import Arrays
from strategies.scalefl import ScaleFL

PAPER = (Level(1.0, 4), Level(0.75, 3), Level(0.7, 2), Level(0.7, 1))


@cache
def task(**values: Any) -> Task:
    return toy_task("scalefl", **{f"scalefl.{key}": value for key, value in values.items()})


@cache
def arrays() -> Arrays:
    return initial_arrays(task(), "", 1)


@cache
def data() -> ClientData:
    return load_client(DataConfig(), 0, 4)


def parts_of(made: Task) -> tuple[Submodel, ...]:
    return tuple(part_of_level(made.factory, made.layout, level) for level in levels_of(made))


def job_of(made: Task, part: Submodel, given: Arrays, gamma: float = 0.05, server_round: int = 1) -> Job:
    return Job(part, extract(made.layout, part, given), Device(0), {"gamma": gamma}, 5, server_round)


def images(num: int = 32) -> Tensor:
    return torch.rand(num, *DIGITS, generator=torch.Generator().manual_seed(2))


class Bare(nn.Sequential):
    """No norms: what the scaler does shows."""

    def __init__(self, num_classes: int) -> None:
        one, two = nn.Conv2d(1, 10, 3, padding=1), nn.Conv2d(10, 20, 3, padding=1)
        tail = [nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten(1), nn.Linear(80, num_classes)]
        super().__init__(one, nn.ReLU(), two, nn.ReLU(), *tail)


BARE = {"model": "test_scalefl:Bare", "stages": "1, 3", "scalefl.heads": "linear"}


@cache
def bare(**values: Any) -> Task:
    given = {f"scalefl.{key}": value for key, value in values.items()}
    return Experiment.read({"strategy": "scalefl", **BARE, **given}).task(10, DIGITS)


# --- the loss -----------------------------------------------------------------------------------------------------

# Worked example S1 of the paper page; "released" is the authors' own.
EXITS = torch.tensor([[[1.0, 0, 0]], [[1.5, 0.5, 0]], [[2.0, 0, -1]]])
LABEL = torch.tensor([0])


@pytest.mark.parametrize(
    ("gamma", "distillation", "loss"),
    [
        (0.0, "batch-mean", 0.331620),
        (0.0, "released", 0.331620),
        (0.05, "batch-mean", 0.337637),
        (0.05, "released", 0.333626),
    ],
)
def test_the_loss_of_the_worked_example(gamma: float, distillation: Any, loss: float) -> None:
    assert exit_loss(tuple(EXITS), LABEL, gamma, 3.0, distillation).item() == pytest.approx(loss, abs=5e-7)


@pytest.mark.parametrize(
    ("distillation", "terms"), [("batch-mean", [0.016136, 0.009983]), ("released", [0.005379, 0.003328])]
)
def test_the_terms_of_the_worked_example(distillation: Any, terms: Sequence[float]) -> None:
    """Of two exits the first weighs 1 of 3, the last 2 of 3."""
    entropies = [functional.cross_entropy(z, LABEL).item() for z in EXITS]
    assert entropies == pytest.approx([0.551445, 0.464369, 0.169846], abs=5e-7)
    for student, entropy, term in zip(EXITS[:2], entropies, terms, strict=False):
        loss = exit_loss((student, EXITS[2]), LABEL, 0.05, 3.0, distillation).item()
        assert loss == pytest.approx((entropy + term + 2 * entropies[2]) / 3, abs=5e-7)


@pytest.mark.parametrize("distillation", ["batch-mean", "released"])
def test_the_divergence_is_a_mean_over_the_batch(distillation: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 6, 5, generator=rng), torch.randint(5, (6,), generator=rng)
    whole = exit_loss(tuple(logits), labels, 0.4, 2.0, distillation)
    each = [exit_loss(tuple(logits[:, i : i + 1]), labels[i : i + 1], 0.4, 2.0, distillation) for i in range(6)]
    torch.testing.assert_close(whole, torch.stack(each).mean())


def test_the_last_exit_teaches_as_a_constant_and_learns_only_in_the_released_form() -> None:
    gradients = {}
    for gamma, distillation in ((0.0, "batch-mean"), (0.5, "batch-mean"), (0.5, "released")):
        logits = EXITS.clone().requires_grad_()
        exit_loss(tuple(logits), LABEL, gamma, 3.0, distillation).backward()  # type: ignore[arg-type]
        assert logits.grad is not None
        gradients[gamma, distillation] = logits.grad
    plain, ours, released = gradients.values()
    assert torch.equal(ours[2], plain[2])
    assert not torch.allclose(released[2], plain[2])
    for j in (0, 1):
        assert not torch.allclose(ours[j], plain[j])
        torch.testing.assert_close(ours[j] - plain[j], 3 * (released[j] - plain[j]))  # three classes


def test_one_exit_has_plain_cross_entropy() -> None:
    expected = functional.cross_entropy(EXITS[1], LABEL)
    assert torch.equal(exit_loss((EXITS[1],), LABEL, 0.05, 3.0, "batch-mean"), expected)


@pytest.mark.parametrize(
    ("after", "num_rounds", "first"),
    [(0.25, 8, 3), (0.25, 10, 3), (0.25, 1, 1), (0.0, 5, 1), (0.5, 4, 3), (1.0, 6, 7), (0.58, 50, 30)],
)
def test_distillation_begins_after_a_share_of_the_rounds(after: float, num_rounds: int, first: int) -> None:
    config = ScaleFLConfig(distill_after=after, gamma=0.3)
    found = [gamma_in(config, server_round, num_rounds) for server_round in range(1, 31)]
    assert found == [0.3 if server_round >= first else 0.0 for server_round in range(1, 31)]


# --- configuration ------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers() -> None:
    config = ScaleFLConfig()
    assert (config.temperature, config.distill_after, config.weights, config.scaler) == (3, 0.25, "uniform", True)
    assert levels_of(task()) == PAPER


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"widths": ()}, "scalefl.widths must be at most 1 and above 0, and none above the one before, got"),
        ({"widths": (0.5, 1.0)}, "scalefl.widths must"),
        ({"widths": (1.5,)}, "scalefl.widths must"),
        ({"widths": (1.0, 0.0)}, "scalefl.widths must"),
        ({"widths": (float("nan"),)}, "scalefl.widths must"),
        ({"depths": (4, 3)}, "scalefl.depths must be one number of exits for each of 4 widths"),
        ({"depths": (4, 3, 2, 0)}, "scalefl.depths must be at least 1, none above the one before"),
        ({"depths": (1, 2, 3, 4)}, "scalefl.depths must be at least 1, none above the one before"),
        ({"depths": (4, 3, 1, 1)}, "scalefl.depths must .* each with its width another level"),
        ({"budgets": (0.5, 1.0)}, "scalefl.budgets must be falling shares of the network's cost"),
        ({"budgets": (0.5, 0.5)}, "scalefl.budgets must be falling"),
        ({"budgets": (1.0, 0.0)}, "scalefl.budgets must be falling"),
        ({"measure": "flops"}, "scalefl.measure must be one of macs, parameters, both, got 'flops'"),
        ({"search": "best"}, "scalefl.search must be one of nested, free, got 'best'"),
        ({"grid": 0}, r"scalefl.grid must be in 1\.\.64, got 0"),
        ({"heads": "large"}, "scalefl.heads must be one of linear, scalefl, depthfl, got 'large'"),
        ({"gamma": -1.0}, "scalefl.gamma must be >= 0"),
        ({"gamma": float("nan")}, "scalefl.gamma must be >= 0"),
        ({"temperature": 0.0}, "scalefl.temperature must be > 0"),
        ({"distill_after": 1.5}, r"scalefl.distill-after must be a share of the rounds, in \[0, 1\]"),
        ({"distillation": "mean"}, "scalefl.distillation must be one of batch-mean, released"),
        ({"weights": "equal"}, "scalefl.weights must be one of uniform, examples"),
        ({"assign": "dynamic"}, "scalefl.assign must be one of capacity, fix"),
        ({"assign": "fix", "shares": "a1-e1"}, "scalefl.shares: expected levels a to d, .* got 'e1'"),
    ],
)
def test_config_refuses_impossible_values(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ScaleFLConfig(**values)


# --- levels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("levels", "exits", "depths"),
    [
        (4, 4, (4, 3, 2, 1)),
        (4, 2, (2, 1)),
        (4, 6, (6, 5, 3, 2)),
        (4, 8, (8, 6, 4, 2)),
        (1, 3, (3,)),
        (3, 3, (3, 2, 1)),
    ],
)
def test_levels_are_evenly_deep(levels: int, exits: int, depths: tuple[int, ...]) -> None:
    assert evenly_deep(levels, exits) == depths


def test_a_network_of_fewer_exits_has_fewer_levels() -> None:
    made = bare()
    assert levels_of(made) == (Level(1.0, 2), Level(0.75, 1))
    whole = Experiment.read({"strategy": "scalefl", "model": "autoflip-cnn"}).task(10, (1, 28, 28))
    assert levels_of(whole) == (Level(1.0, 2), Level(0.75, 1))


def test_depths_that_the_network_lacks_are_refused_before_a_round(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scalefl.depths asks for 4 exits, the network has 2: .*\(the key stages\)"):
        run_toy(tmp_path, "scalefl", {**BARE, "scalefl.depths": "4, 3, 2, 1"})
    with pytest.raises(ValueError, match=r"scalefl\.shares: expected levels a to b, .* got 'c1'"):
        run_toy(tmp_path, "scalefl", {**BARE, "scalefl.assign": "fix"})


def test_parts_keep_prefixes_rounded_down_and_nothing_behind_their_last_exit() -> None:
    made, depths = task(), depth_keys(task().factory)
    parts = parts_of(made)
    assert parts[0] == full(made.layout)
    assert [part.keys for part in parts] == [None, depths[2], depths[1], depths[0]]
    assert all(within(small, large) for large, small in itertools.pairwise(parts))
    shapes = narrow_shapes(made.layout, parts[2])
    assert shapes["conv1.weight"][0] == 11  # 0.7 * 16 = 11.2
    assert shapes["conv2.weight"][:2] == (22, 11)  # 0.7 * 32 = 22.4
    assert shapes["exits.relu2.0.weight"][:2] == (22, 22)
    (last,) = (name for name in shapes if name.startswith("exits.relu1.") and len(shapes[name]) == 2)
    assert shapes[last] == (10, 11)
    assert not any(name.startswith(("conv3", "fc", "classifier", "exits.relu3")) for name in shapes)
    units = part_of_level(made.factory, made.layout, Level(1e-6, 4)).units
    assert all(units[span.start] for span in made.layout.groups.values()), "never less than one unit"


def table(num_exits: int = 3) -> dict[Level, float]:
    """Costs that grow with the square of the width, and with depth."""
    return {level: level.width**2 * level.exits / num_exits for level in grid(8, num_exits)}


def test_the_grid_has_every_pair_once() -> None:
    pairs = grid(8, 3)
    assert len(set(pairs)) == len(pairs) == 24
    assert {(round(8 * p.width), p.exits) for p in pairs} == set(itertools.product(range(1, 9), (1, 2, 3)))


@pytest.mark.parametrize("budget", [1.0, 0.7, 0.5, 0.3, 0.1, 0.02])
def test_one_budget_is_met_as_closely_as_it_can_be(budget: float) -> None:
    costs = table()
    for nested in (True, False):
        (level,) = search(costs, [budget], nested)
        assert costs[level] == max(cost for cost in costs.values() if cost <= budget + 1e-9)


def test_of_equal_costs_the_deeper_is_taken() -> None:
    costs = {Level(1.0, 1): 0.5, Level(0.5, 2): 0.5, Level(0.25, 2): 0.25, Level(0.5, 1): 0.25}
    assert search(costs, [0.5], nested=False) == (Level(0.5, 2),)
    assert search(costs, [0.5, 0.3], nested=True) == (Level(0.5, 2), Level(0.25, 2))


def test_a_budget_that_is_a_cost_is_met_by_it() -> None:
    costs = {Level(0.1, 1): 0.1 + 0.2, Level(0.05, 1): 0.1}
    assert search(costs, [0.3], nested=False) == (Level(0.1, 1),), "0.1 + 0.2 is a hair above 0.3"


@pytest.mark.parametrize("budgets", [(1.0, 0.5, 0.25, 0.125), (0.9, 0.35, 0.3), (0.6, 0.59), (0.4, 0.39, 0.38, 0.1)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nested_levels_leave_the_least_unused_of_all_chains(budgets: Sequence[float], seed: int) -> None:
    """Against every chain there is."""
    rng = np.random.default_rng(seed)
    pairs = list(grid(4, 3))
    costs = {level: level.width * level.exits / 3 * float(rng.uniform(0.8, 1.0)) for level in pairs}

    def chains(rest: Sequence[float], above: Level | None) -> Iterator[tuple[Level, ...]]:
        if not rest:
            yield ()
            return
        for level in pairs:
            if costs[level] <= rest[0] and (above is None or above.holds(level)):
                yield from ((level, *chain) for chain in chains(rest[1:], level))

    def unused(chain: Sequence[Level]) -> float:
        return sum((b - costs[level]) / b for b, level in zip(budgets, chain, strict=True))

    found = search(costs, budgets, nested=True)
    assert all(large.holds(small) for large, small in itertools.pairwise(found))
    assert all(costs[level] <= budget + 1e-9 for level, budget in zip(found, budgets, strict=True))
    assert unused(found) == pytest.approx(min(map(unused, chains(budgets, None))))
    free = search(costs, budgets, nested=False)
    assert unused(free) <= unused(found) + 1e-9


def test_budgets_that_nothing_meets_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"no width and number of exits costs at most 0.005; the least of the grid, 0.01"
    ):
        search({Level(1.0, 1): 0.01}, [0.5, 0.005], nested=False)
    with pytest.raises(ValueError, match="no levels of the grid, each inside the one before, cost at most"):
        search({Level(1.0, 1): 0.3, Level(0.5, 2): 0.35}, [0.5, 0.4], nested=True)
    made = task(budgets="0.5, 0.000001", grid=2)
    with pytest.raises(ValueError, match=r"scalefl.budgets, of the network's macs: no width .*\(scalefl.grid\)"):
        levels_of(made)


@pytest.mark.parametrize("measure", ["macs", "parameters", "both"])
@pytest.mark.parametrize("how", ["nested", "free"])
def test_levels_of_a_real_network_meet_their_budgets(measure: str, how: str) -> None:
    budgets = (1.0, 0.5, 0.2, 0.05)
    made = task(budgets=", ".join(map(str, budgets)), measure=measure, search=how, grid=8)
    levels, whole = levels_of(made), full(made.layout)
    assert levels[0] == Level(1.0, 4)
    costs = {}
    for level in grid(8, 4):
        part = part_of_level(made.factory, made.layout, level)
        macs = made.macs(part) / made.macs(whole)
        parameters = num_parameters(made.layout, part) / num_parameters(made.layout, whole)
        costs[level] = {"macs": macs, "parameters": parameters, "both": max(macs, parameters)}[measure]
    for level, budget in zip(levels, budgets, strict=True):
        assert costs[level] <= budget + 1e-9
        if how == "free":
            assert costs[level] == max(cost for cost in costs.values() if cost <= budget + 1e-9)
    if how == "nested":
        assert all(large.holds(small) for large, small in itertools.pairwise(levels))


def test_costs_count_what_the_narrow_network_really_does_all_its_exits() -> None:
    made = task()
    for part in parts_of(made):
        model = made.network(extract(made.layout, part, arrays()))
        assert num_parameters(made.layout, part) == sum(p.numel() for p in model.parameters())
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            assert isinstance(model, ExitNetwork)
            model.logits(images(2))
        assert made.macs(part) == counter.get_total_flops() // 2 // 2  # two operations each, two samples
    linear = toy_task("scalefl", **{"scalefl.heads": "linear"})
    assert linear.macs(full(linear.layout)) < made.macs(full(made.layout)) / 1.5, "heads cost"


# --- the scaler ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_divided_weights_compute_what_divided_outputs_do_in_both_modes(training: bool) -> None:
    made = bare(widths="0.7, 0.3")
    given = initial_arrays(made, "", 1)
    for part, width in zip(parts_of(made), (0.7, 0.3), strict=True):
        assert width_of(made, part) == width
        own = extract(made.layout, part, given)
        model, used = made.network(own), made.network(as_used(made, part, own))
        assert isinstance(model, ExitNetwork)
        assert isinstance(used, ExitNetwork)
        plain = model.train(training).logits(images())
        with divide_outputs(model, width, scaled_layers(made)):
            expected = model.logits(images())
        for z, w, p in zip(expected, used.train(training).logits(images()), plain, strict=True):
            torch.testing.assert_close(z, w)
            assert not torch.allclose(z, p, rtol=1e-2)
        assert torch.equal(model.logits(images())[0], plain[0]), "hooks go"


def test_the_whole_width_and_no_scaler_leave_a_part_as_it_is() -> None:
    given = extract(task().layout, parts_of(task())[0], arrays())
    assert as_used(task(), parts_of(task())[0], given) is given
    narrow = parts_of(task())[2]
    given = extract(task().layout, narrow, arrays())
    assert as_used(task(scaler=False), narrow, given) is given
    assert as_used(task(), narrow, given) is not given


def test_the_scaler_follows_every_convolution_but_one_that_gives_classes() -> None:
    expected = {"conv1", "conv2", "conv3", *(f"exits.relu{i}.{j}" for i in (1, 2, 3) for j in (0, 3, 6))}
    assert set(scaled_layers(task())) == expected
    squeezed = Experiment.read({"strategy": "scalefl", "model": "squeezenet1_1", "scalefl.heads": "linear"})
    layers = scaled_layers(squeezed.task(10, (3, 64, 64)))
    assert "features.0" in layers
    assert "classifier.1" not in layers


def test_dividing_weights_divides_biases_and_nothing_else() -> None:
    given = {n: np.full(2, 3, dtype=np.float32) for n in ("a.weight", "a.bias", "a.other", "b.weight")}
    found = divide_weights(given, 0.5, ["a", "absent"])
    assert {n: v[0] for n, v in found.items()} == {"a.weight": 6, "a.bias": 6, "a.other": 3, "b.weight": 3}
    assert all(v.dtype == np.float32 for v in found.values())
    assert given["a.weight"][0] == 3


def test_units_of_no_level_are_refused() -> None:
    with pytest.raises(ValueError, match="the units of this part are those of no width"):
        width_of(task(), part_of_level(task().factory, task().layout, Level(0.5, 1)))
    searched = task(budgets="1.0, 0.1")
    assert width_of(searched, part_of_level(task().factory, task().layout, Level(0.5, 1))) == 0.5


@pytest.mark.parametrize("how", ["nested", "free"])
def test_widths_that_keep_the_same_units_are_one(how: str) -> None:
    made = bare(budgets="0.9, 0.6, 0.3", grid=64, search=how)
    for level in levels_of(made):
        part = part_of_level(made.factory, made.layout, level)
        assert width_of(made, part) == level.width, "what it is divided by is what the run tells of it"
    with pytest.raises(ValueError, match="no levels of the grid, each inside the one before"):
        levels_of(bare(budgets="0.006, 0.0059, 0.0058", grid=64))  # three widths, of one unit a layer each


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("level", [0, 1])
def test_training_is_the_loss_of_all_exits_of_a_network_whose_convolutions_are_divided(
    level: int, gamma: float
) -> None:
    """Against gradient descent written out, on a network without norms, where every division shows."""
    made = Experiment.read(
        {"strategy": "scalefl", **QUICK, **BARE, "scalefl.widths": "0.75, 0.3", "momentum": 0.0, "weight-decay": 0.0}
    ).task(10, DIGITS)
    given = initial_arrays(made, "", 1)
    part, width = parts_of(made)[level], (0.75, 0.3)[level]
    job = job_of(made, part, given, gamma, server_round=3)
    update = local_update(job, made, data())
    weights = {n: torch.tensor(array, requires_grad=True) for n, array in job.arrays.items()}
    model = made.network(job.arrays)
    rate, rng = made.training.rate_at(3), np.random.default_rng(job.seed)
    for batch in batches(data().train, made.training.batch_size, rng, made.training.drop_last):
        used = {n: w / width if n in _conv_tensors(model) else w for n, w in weights.items()}
        logits = functional_call(model, used, (batch.inputs,), {"every": True})
        losses = [functional.cross_entropy(z, batch.labels) for z in logits]
        if gamma and len(logits) == 2:
            teacher = functional.softmax(logits[1].detach() / 3, 1)
            student = functional.log_softmax(logits[0] / 3, 1)
            losses[0] = losses[0] + gamma * 9 * functional.kl_div(student, teacher, reduction="batchmean")
        total = losses[0] if len(losses) == 1 else (losses[0] + 2 * losses[1]) / 3
        gradients = torch.autograd.grad(total, list(weights.values()))
        with torch.no_grad():
            for weight, gradient in zip(weights.values(), gradients, strict=True):
                weight -= rate * gradient
    moved = np.concatenate(
        [(weights[n].detach().numpy() - job.arrays[n]).reshape(-1) for n in made.layout.shapes if n in weights]
    )
    np.testing.assert_allclose(update.difference, moved, rtol=1e-3, atol=2e-6)
    assert np.abs(moved).max() > 1e-3


def _conv_tensors(model: nn.Module) -> set[str]:
    convs = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    return {f"{name}.{leaf}" for name in convs for leaf in ("weight", "bias")}


@pytest.mark.parametrize("level", range(4))
def test_a_reply_holds_what_was_sent_and_all_of_it_was_trained(level: int) -> None:
    made = task()
    part = parts_of(made)[level]
    job = job_of(made, part, arrays())
    update = local_update(job, made, data())
    assert update.submodel.key == part.key
    assert update.trained is not None
    assert update.trained.arrays.keys() == job.arrays.keys() == narrow_shapes(made.layout, part).keys()
    model = made.network(job.arrays)
    loss = exit_loss(model(images(8), every=True), torch.arange(8), 0.05, 3.0, "batch-mean")
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_the_clients_own_model_is_the_one_that_it_uses() -> None:
    made = bare(widths="0.75, 0.3")
    part = parts_of(made)[1]
    job = job_of(made, part, initial_arrays(made, "", 1))
    update = local_update(job, made, data())
    assert update.trained is not None
    flat = np.concatenate([job.arrays[n].reshape(-1) for n in narrow_shapes(made.layout, part)])
    shapes, trained, at = narrow_shapes(made.layout, part), {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        trained[name] = (flat + update.difference)[at : at + size].reshape(shape)
        at += size
    for name, array in update.trained.arrays.items():
        np.testing.assert_allclose(array, trained[name] / (0.3 if name.startswith("0.") else 1), rtol=1e-4, atol=1e-6)


def test_what_a_device_builds_ends_at_its_last_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    made, built = task(), []
    original = Task.network
    monkeypatch.setattr(Task, "network", lambda self, given: built.append(original(self, given)) or built[-1])
    local_update(job_of(made, parts_of(made)[3], arrays()), made, data())
    (model,) = built
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"conv1", "norm1", "exits"}
    assert all(name.startswith("exits.relu1.") for name, _ in model.named_parameters() if name.startswith("exits"))


# --- who trains what ----------------------------------------------------------------------------------------------


def server(devices: Mapping[int, Device] | None = None, **values: Any) -> ScaleFL:
    given = {key.replace("_", "-"): value for key, value in values.items()}
    given = {key if key == "ratio-policy" else f"scalefl.{key}": value for key, value in given.items()}
    experiment = Experiment.read({**QUICK, "strategy": "scalefl", **given})
    made = ScaleFL(experiment, experiment.task(10, DIGITS), load_server(experiment.data))
    made.federation.devices = dict(devices or {0: Device(0)})
    return made


def test_a_device_gets_the_largest_level_that_it_holds() -> None:
    made = server()
    sizes = [num_parameters(made.task.layout, part) for part in made.parts]
    assert sizes == sorted(sizes, reverse=True)
    for capacity in np.linspace(0.001, 1.3, 40):
        held = [i for i, size in enumerate(sizes) if size / sizes[0] <= capacity]
        assert made.level_of(Device(0, capacity=float(capacity))) == (held[0] if held else 3)
    assert [made.level_of(Device(0, width=width)) for width in (1.0, 0.8, 0.75, 0.72, 0.5)] == [0, 1, 1, 2, 3]


def test_memory_and_deadline_bind_too() -> None:
    made = server()
    needs = [made.budget.memory(part) for part in made.parts]
    assert needs == sorted(needs, reverse=True)
    assert [made.level_of(Device(0, memory_bytes=need)) for need in needs] == [0, 1, 2, 3]
    assert [made.level_of(Device(0, memory_bytes=need - 1)) for need in needs] == [1, 2, 3, 3]
    assert [made.can_train(Device(0, memory_bytes=needs[3] - less)) for less in (0, 1)] == [True, False]
    assert made.level_for_evaluation(Device(0, memory_bytes=needs[3] - 1)) is None


def test_under_a_budget_nobody_gets_more_than_it_holds() -> None:
    weak, slim = Device(0, capacity=0.001), Device(0, width=0.5)
    assert [server().can_train(device) for device in (weak, slim)] == [True, True]
    assert [server(ratio_policy="budget").can_train(device) for device in (weak, slim)] == [False, False]


def test_fixed_shares_name_the_levels() -> None:
    devices = {p: Device(p, capacity=0.01) for p in range(10)}
    made = server(devices, assign="fix", shares="a2-c3-d5")
    made.federation.num_partitions = 10
    assert [made.level_of(device) for device in devices.values()] == [0, 0, 2, 2, 2, 3, 3, 3, 3, 3]
    assert list(made.levels()) == ["d", "c", "a"]


def test_levels_are_those_that_somebody_trains_and_the_largest() -> None:
    made = server({0: Device(0, capacity=0.5), 1: Device(1, capacity=0.05)})
    assert list(made.levels()) == ["d", "b", "a"]
    assert made.level_for_evaluation(Device(0, capacity=0.5)) == "b"


def test_a_job_says_how_much_its_exits_learn_from_the_last_in_this_round() -> None:
    experiment = Experiment.read({**QUICK, "strategy": "scalefl", "num-server-rounds": 8, "scalefl.gamma": 0.4})
    made = ScaleFL(experiment, experiment.task(10, DIGITS), load_server(experiment.data))
    jobs = [made.part_of(Device(0, capacity=0.5), server_round) for server_round in (2, 3)]
    assert [job.config for job in jobs] == [{"gamma": 0.0}, {"gamma": 0.4}]
    assert {(job.level, job.submodel) for job in jobs} == {("b", parts_of(task())[1])}


@pytest.mark.parametrize(("weights", "expected"), [("uniform", 1.0), ("examples", 30.0)])
def test_what_a_reply_weighs(weights: str, expected: float) -> None:
    assert (
        server(weights=weights).weigh(Update(full(task().layout), np.zeros(0, dtype=np.float32), 30.0, {})) == expected
    )


# --- rounds -------------------------------------------------------------------------------------------------------

WEAK = """
[[class]]
kind = "weak"
share = 1.0
capacity = 0.1
"""


@pytest.fixture
def weak_fleet(tmp_path: Path) -> str:
    path = tmp_path / "weak.toml"
    path.write_text(WEAK)
    assert load_fleet(str(path)).device(0, 4, 1).capacity == 0.1
    return str(path)


def test_messages_hold_no_absent_layer_and_no_more_bytes_than_their_part(tmp_path: Path) -> None:
    heard: list[tuple[Submodel, Submodel, int, int]] = []
    layout = task().layout

    def listen(request: Message, reply: Message, _: int) -> Message:
        if request.metadata.message_type == "train":
            sent = sent_part(request, layout=layout)
            heard.append((sent, sent_part(request, reply, layout), num_bytes(request), num_bytes(reply)))
        return reply

    run = run_toy(tmp_path, "scalefl", alter=listen)
    assert lines(run)[0]["dispatched"] == {"a": 1, "b": 1, "c": 2}
    expected = dict(zip("abcd", parts_of(task()), strict=True))
    assert sorted(sent.key for sent, *_ in heard) == sorted(expected[name].key for name in "abcc")
    for sent, back, down, up in heard:
        assert back.key == sent.key
        shapes = narrow_shapes(layout, sent)
        told = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
        for size in (down, up):
            assert told < size <= 1.02 * told + 256 * len(layout.shapes)
    smallest = min(heard, key=lambda found: found[2])
    assert smallest[2] < 0.2 * max(down for *_, down, _ in heard)


def test_what_nobody_holds_keeps_its_bytes(weak_fleet: str, tmp_path: Path) -> None:
    run = run_toy(tmp_path, "scalefl", {"fleet": weak_fleet, "num-server-rounds": 2})
    assert lines(run)[0]["dispatched"] == {"c": 4}
    stood = load_checkpoint(run / "checkpoint")
    assert stood is not None
    part, before = parts_of(task())[2], arrays()
    for name, array in stood.arrays.items():
        if not part.holds(name):
            assert array.tobytes() == before[name].tobytes(), name
            continue
        corner = tuple(slice(n) for n in narrow_shapes(task().layout, part)[name])
        assert not np.array_equal(array[corner], before[name][corner]), name
        rest = np.ones(array.shape, dtype=bool)
        rest[corner] = False
        assert np.array_equal(array[rest], before[name][rest]), name


def test_every_exit_of_every_level_is_tested_as_itself(tmp_path: Path) -> None:
    """Each classifier answers one class: its accuracy is that class's share."""
    made, planted = task(), {name: array.copy() for name, array in arrays().items()}
    heads = [f"exits.relu{i}." for i in (1, 2, 3)] + ["classifier."]
    for answer, head in enumerate(heads):
        last = max(
            name
            for name in planted
            if name.startswith(head) and planted[name].shape[:1] == (10,) and planted[name].ndim == 2
        )
        planted[last][:] = 0
        planted[last.replace("weight", "bias")][:] = np.eye(10)[answer]
    labels = torch.tensor([0] * 1 + [1] * 2 + [2] * 3 + [3] * 4 + [9] * 10)
    levels = dict(zip("abcd", parts_of(made), strict=True))
    found = measure_levels(
        made,
        dict.fromkeys(reversed(levels)),
        tuple(levels),
        lambda name: as_used(made, levels[name], extract(made.layout, levels[name], planted)),
        Samples(images(20), labels),
    )
    shares = [0.05, 0.1, 0.15, 0.2]
    for name, depth in zip("abcd", (4, 3, 2, 1), strict=True):
        assert found[f"accuracy-{name}"] == pytest.approx(shares[depth - 1])
        exits = {key: value for key, value in found.items() if key.startswith(f"exit-accuracy-{name}-")}
        assert exits == (
            {f"exit-accuracy-{name}-{e}": pytest.approx(shares[e - 1]) for e in range(1, depth + 1)}
            if depth > 1
            else {}
        )
    assert found["accuracy"] == found["accuracy-a"]
    assert found["accuracy-levels"] == pytest.approx(0.125)


def test_a_run_tells_of_every_exit_and_of_its_levels(tmp_path: Path) -> None:
    run = run_toy(tmp_path, "scalefl")
    line, summary = lines(run)[0], json.loads((run / "summary.json").read_text())
    exits = {key.removeprefix("exit-accuracy-") for key in line if key.startswith("exit-accuracy-")}
    assert exits == {"c-1", "c-2", "b-1", "b-2", "b-3", "a-1", "a-2", "a-3", "a-4"}
    assert line["accuracy-c"] == line["exit-accuracy-c-2"]
    assert line["accuracy-a"] == line["exit-accuracy-a-4"] == line["accuracy"]
    told = summary["scalefl.levels"]
    assert [(told[n]["width"], told[n]["exits"]) for n in "abcd"] == [tuple(level) for level in PAPER]
    assert [told[n]["macs"] for n in "abcd"] == [task().macs(part) for part in parts_of(task())]


def test_the_level_that_is_tested_and_exported_has_the_scaler(weak_fleet: str, tmp_path: Path) -> None:
    """A network without norms, where a level without its scaler would answer something else."""
    values = {**BARE, "scalefl.widths": "0.75, 0.3", "fleet": weak_fleet, "batch-norm": "batch", "batch-size": 16}
    values |= {"personal": "stored-local", "num-server-rounds": 4, "fraction-evaluate": 1.0, "evaluate-every": 4}
    made = bare(widths="0.75, 0.3")
    tested: list[np.ndarray] = []

    def listen(request: Message, reply: Message, _: int) -> Message:
        if request.metadata.message_type == "evaluate" and "arrays" in request.content:
            tested.append(from_record_of_arrays(request.content.array_records["arrays"])["part"].reshape(-1))
        return reply

    run = run_toy(tmp_path, "scalefl", values, alter=listen)
    line, stood, part = lines(run)[-1], load_checkpoint(run / "checkpoint"), parts_of(made)[1]
    assert stood is not None
    assert line["dispatched"] == {"b": 4}
    exported = export_level(run, "b", tmp_path / "out", with_onnx=False)
    mean, std = (tuple(json.loads(exported.facts[key])) for key in ("input-mean", "input-std"))
    samples = normalise(load_server(DataConfig()).test, mean, std)
    raw = extract(made.layout, part, stood.arrays)
    model = made.network(raw).eval()
    with torch.no_grad():
        with divide_outputs(model, 0.3, scaled_layers(made)):
            expected = model(samples.inputs)
        torch.testing.assert_close(load_exported(exported.network)(samples.inputs), expected, rtol=1e-4, atol=1e-4)
        answers, without = expected.argmax(1), model(samples.inputs).argmax(1)
    assert line["accuracy-b"] == pytest.approx(float((answers == samples.labels).float().mean()))
    assert not torch.equal(answers, without)
    sent = [own for own in tested if np.array_equal(own, flatten(made.layout, part, as_used(made, part, raw)))]
    assert len(sent) == len(tested) == 4, "what clients test"
    own = stored_model(made, load_state(run / "clients" / "000000", 4))
    assert own.submodel == part
    for name, size in (("0", 0.3), ("exits.1", 1.0)):  # of a first layer weights grow by 1 / 0.3
        grown = [np.abs(own.arrays[n] / raw[n]) for n in raw if n.startswith(f"{name}.") and n.endswith("weight")]
        assert np.median(np.concatenate([g.reshape(-1) for g in grown])) == pytest.approx(1 / size, rel=0.2)


def test_batch_norm_s_statistics_are_those_of_divided_activations(tmp_path: Path) -> None:
    run = run_toy(tmp_path, "scalefl", {"scalefl.assign": "fix"})
    stood, made, folder = load_checkpoint(run / "checkpoint"), task(), tmp_path / "out"
    assert stood is not None
    facts = export_level(run, "c", folder, with_onnx=False).facts
    mean, std = (tuple(json.loads(facts[key])) for key in ("input-mean", "input-std"))
    proxy = normalise(load_server(DataConfig()).proxy, mean, std)
    model = made.network(extract(made.layout, parts_of(made)[2], stood.arrays))
    with divide_outputs(model, 0.7, scaled_layers(made)):
        found = statistics(collect_sums(model, (batch.inputs for batch in batches(proxy, 128)), "pooled"))
    assert found.keys() == stood.statistics["c"].keys()
    for layer, moments in found.items():
        for own, expected in zip(stood.statistics["c"][layer], moments, strict=True):
            np.testing.assert_allclose(own, expected, rtol=1e-3, atol=1e-5, err_msg=layer)


def test_levels_that_were_searched_for_are_trained(tmp_path: Path) -> None:
    run = run_toy(tmp_path, "scalefl", {"scalefl.budgets": "1.0, 0.5, 0.2", "scalefl.measure": "parameters"})
    told = json.loads((run / "summary.json").read_text())["scalefl.levels"]
    assert list(told) == ["a", "b", "c"]
    assert told["b"]["parameters"] <= 0.5 * told["a"]["parameters"]
    assert told["c"]["parameters"] <= 0.2 * told["a"]["parameters"]
    assert lines(run)[0]["dispatched"] == {"a": 1, "b": 1, "c": 2}


def test_it_learns(tmp_path: Path) -> None:
    """Deeper exits weigh more in the loss, and learn faster."""
    values = {"fleet": "equal", "num-server-rounds": 3, "batch-size": 16, "evaluate-every": 3, "fraction-evaluate": 0.0}
    found = lines(run_toy(tmp_path, "scalefl", values))[-1]
    assert [found[f"exit-accuracy-a-{e}"] > least for e, least in enumerate((0.2, 0.4, 0.7, 0.7), start=1)] == [
        True
    ] * 4
