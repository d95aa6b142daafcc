"""A network's own stages, and what attaching exits to them leaves as it was: weights, files, tests of each exit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from toy import DIGITS, same_bits, toy_task

from flexfed.evaluation import measure_levels
from flexfed.exits import ExitNetwork, Exits, depth_keys
from flexfed.jobs import Part, Task, initial_arrays
from flexfed.models import model_factory
from flexfed.networks import Factory, travelling
from flexfed.personal import model_state, stored_model
from flexfed.report import _ordered, level_names
from flexfed.select import prefix_ratio
from flexfed.stages import own_stages
from flexfed.submodel import Submodel, extract, full
from flexfed.training import Evaluation, Samples, Training, evaluate, evaluate_exits, fit
from flexfed.units import trace_layout

IMAGE, IMAGENET, WINDOW = (3, 32, 32), (3, 224, 224), (3, 200)

OWN: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "cnn": (DIGITS, ("relu1", "relu2", "relu3", "relu4")),
    "cnn1d": (WINDOW, ("relu1", "relu2", "relu3", "relu4")),
    "flexfl-vgg16": (IMAGE, ("conv5", "conv8", "conv11", "conv13")),
    "flexfl-resnet34": (IMAGE, ("stage1", "stage2", "stage3", "stage4")),
    "flexfl-mobilenetv2": (IMAGE, ("stage2", "stage3", "stage5", "head")),
    "heterofl-conv": ((1, 28, 28), ("relu1", "relu2", "relu3", "relu4")),
    "heterofl-resnet18": (IMAGE, ("stage1", "stage2", "stage3", "relu")),
    "fedlps-vgg16": ((3, 64, 64), ("relu2_2", "relu3_3", "relu4_3", "relu5_3")),
    "cifar-resnet8": (IMAGE, ("stack1", "stack2", "stack3")),
    "resnet18": (IMAGENET, ("layer1", "layer2", "layer3", "layer4")),
    "vgg11": (IMAGENET, ("features.4", "features.9", "features.14", "features.19")),
    "mobilenet_v2": (IMAGENET, ("features.3", "features.6", "features.13", "features.18")),
    "densenet121": (
        IMAGENET,
        ("features.transition1.conv", "features.transition2.conv", "features.transition3.conv", "features.norm5"),
    ),
    "squeezenet1_1": (IMAGENET, ("features.1", "features.4", "features.7", "classifier.0")),
}


def test_a_stage_may_end_in_one_place() -> None:
    assert own_stages(model_factory("resnet18", 10, IMAGE), IMAGE) == ("layer1", "layer2", "layer3", "avgpool")


@pytest.mark.parametrize("name", list(OWN))
def test_own_stages(name: str) -> None:
    shape, stages = OWN[name]
    assert own_stages(model_factory(name, 10, shape), shape) == stages


@pytest.mark.parametrize("name", ["cnn1d", "flexfl-vgg16", "cifar-resnet8", "mobilenet_v2"])
@pytest.mark.parametrize("design", ["linear", "scalefl", "depthfl"])
def test_exits_stand_behind_own_stages_and_cost_more_the_deeper_they_are(name: str, design: str) -> None:
    shape, stages = OWN[name]
    factory = Exits((), design).of(model_factory(name, 10, shape), shape, 10)
    sizes = {n: math.prod(tensor) for n, tensor in trace_layout(factory, shape).shapes.items()}
    depths = depth_keys(factory)
    costs = [sum(sizes[name] for name in keys) for keys in depths]
    assert len(depths) == len(stages)
    assert costs == sorted(set(costs))
    assert depths[-1] == sizes.keys()
    assert all(a < b for a, b in pairwise(depths))


class Named(nn.Sequential):
    """Says itself where it may end."""

    stages = ("first", "second")

    def __init__(self) -> None:
        super().__init__()
        for name, size in (("first", 4), ("second", 5), ("classifier", 3)):
            self.add_module(name, nn.LazyLinear(size))


class Flat(nn.Sequential):
    """No places at all."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))


class Twice(nn.Module):
    """Runs its body twice, so that nobody can say where that ends."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 3, 3, padding=1)
        self.down = nn.Conv2d(3, 3, 3, stride=2)
        self.fc = nn.Linear(3, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.down(self.body(self.body(x))).mean((2, 3)))


def test_a_network_may_name_its_own() -> None:
    assert own_stages(Named, (4,)) == ("first", "second")


@pytest.mark.parametrize(("factory", "shape", "top"), [(Flat, (4,), "0, 1, 2"), (Twice, (3, 8, 8), "body, down, fc")])
def test_a_network_without_stages_says_how_to_name_them(factory: Factory, shape: tuple[int, ...], top: str) -> None:
    says = f"{factory.__name__} has no stages of its own.*stages='a, b'; its outermost ones are {top}"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=says):
        own_stages(factory, shape)


# --- what exits leave as it was -----------------------------------------------------------------------------------


def exits_task(design: str = "linear", ensemble: bool = False) -> Task:
    """The default network on digits, with exits behind its own stages."""
    task = toy_task()
    exits = Exits((), design, ensemble)
    factory = exits.of(task.factory, DIGITS, 10)
    return Task(factory, trace_layout(factory, DIGITS), DIGITS, 10, Training(), None, exits)


def test_equal_seeds_give_equal_weights_with_and_without_exits() -> None:
    with_them = initial_arrays(exits_task(), "", 3)
    without = initial_arrays(toy_task(), "", 3)
    assert same_bits({name: with_them[name] for name in without}, without)
    assert with_them.keys() - without.keys() == {n for n in with_them if n.startswith("exits.")} != set()


def test_weights_of_the_plain_network_and_of_one_with_exits_both_load(tmp_path: Path) -> None:
    task = exits_task()
    torch.manual_seed(8)
    saved = task.factory()
    assert isinstance(saved, ExitNetwork)
    save_file(travelling(saved.plain), tmp_path / "plain.safetensors")
    save_file(travelling(saved), tmp_path / "exits.safetensors")
    expected = {name: tensor.numpy() for name, tensor in travelling(saved).items()}
    fresh = initial_arrays(task, "", 3)
    from_plain = initial_arrays(task, str(tmp_path / "plain.safetensors"), 3)
    trunk = travelling(saved.plain).keys()
    assert same_bits(from_plain, {n: expected[n] if n in trunk else fresh[n] for n in fresh})
    assert same_bits(initial_arrays(task, str(tmp_path / "exits.safetensors"), 3), expected)


def test_weights_of_exits_elsewhere_are_refused(tmp_path: Path) -> None:
    task = exits_task()
    tensors = {**travelling(task.factory()), "exits.elsewhere.0.weight": torch.zeros(1)}
    save_file({n: t.detach().clone() for n, t in tensors.items()}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"unexpected exits\.elsewhere\.0\.weight"):
        initial_arrays(task, str(tmp_path / "other.safetensors"), 3)


@pytest.mark.parametrize("depth", [1, 3, None])
def test_a_stored_model_keeps_its_depth(depth: int | None) -> None:
    task = exits_task()
    keys = None if depth is None else depth_keys(task.factory)[depth - 1]
    part = Submodel(prefix_ratio(task.layout, 0.5).units, keys)
    arrays = extract(task.layout, part, initial_arrays(task, "", 1))
    stored = stored_model(task, model_state(task, Part(part, arrays)))
    assert stored.submodel == part
    assert same_bits(stored.arrays, arrays)


# --- every exit is tested, as itself ------------------------------------------------------------------------------


class Planted(nn.Module):
    """Exits that answer what they were told to: the share of right answers of each is known."""

    def __init__(self, answers: tuple[int, ...]):
        super().__init__()
        self.answers = answers

    def forward(self, x: torch.Tensor, every: bool = False) -> object:
        rows = [nn.functional.one_hot(torch.full((len(x),), answer), 4).float() for answer in self.answers]
        return tuple(rows) if every else self.predict(rows)

    def predict(self, rows: list[torch.Tensor]) -> torch.Tensor:
        return rows[-1]


def test_every_exit_has_a_meter_of_its_own() -> None:
    labels = torch.tensor([0] * 1 + [1] * 2 + [2] * 3 + [3] * 4)
    samples = Samples(torch.zeros(10, 1), labels)
    found = evaluate_exits(Planted((0, 1, 2, 3)), samples, batch_size=3)
    assert [result.correct for result in found] == [4, 1, 2, 3, 4]
    assert [result.num_samples for result in found] == [10] * 5
    assert evaluate(Planted((0, 1)), samples, 3) == evaluate_exits(Planted((0, 1)), samples, 3)[0]


def test_a_plain_network_has_a_prediction_and_no_exits() -> None:
    samples = Samples(torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64))
    assert len(evaluate_exits(nn.Linear(3, 2), samples)) == 1
    assert evaluate_exits(nn.Linear(3, 2), Samples(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))) == [
        Evaluation(0, 0.0, 0)
    ]


@pytest.mark.parametrize("ensemble", [False, True])
def test_levels_tell_their_prediction_and_each_of_their_exits(ensemble: bool) -> None:
    task = exits_task(ensemble=ensemble)
    arrays = initial_arrays(task, "", 1)
    rng = np.random.default_rng(0)
    samples = Samples(
        torch.tensor(rng.standard_normal((64, *DIGITS)), dtype=torch.float32), torch.from_numpy(rng.integers(0, 10, 64))
    )
    keys = depth_keys(task.factory)
    levels = {"b": Submodel(full(task.layout).units, keys[1]), "a": full(task.layout)}
    found = measure_levels(
        task, dict.fromkeys(levels), ("a", "b"), lambda n: extract(task.layout, levels[n], arrays), samples
    )
    assert {name for name in found if name.startswith("exit-")} == {
        *(f"exit-accuracy-b-{exit}" for exit in (1, 2)),
        *(f"exit-accuracy-a-{exit}" for exit in (1, 2, 3, 4)),
    }
    model = task.network(arrays)
    with torch.no_grad():
        logits = [z.argmax(1) for z in model.eval()(samples.inputs, every=True)]
        mean = torch.stack(model(samples.inputs, every=True)).mean(0).argmax(1)
    right = [float((z == samples.labels).float().mean()) for z in logits]
    assert [found[f"exit-accuracy-a-{exit}"] for exit in (1, 2, 3, 4)] == pytest.approx(right)
    expected = mean if ensemble else logits[-1]
    assert found["accuracy-a"] == pytest.approx(float((expected == samples.labels).float().mean()))
    assert len(set(right)) > 1
    assert level_names(found) == ["b", "a"], "an exit is no level"
    assert [name for name in _ordered(list(found)) if "exit" in name] == [f"exit-accuracy-a-{e}" for e in (1, 2, 3, 4)]


@pytest.mark.parametrize("ensemble", [False, True])
def test_training_accuracy_is_that_of_the_prediction(ensemble: bool) -> None:
    class Echo(Planted):
        def __init__(self) -> None:
            super().__init__((0, 1))
            self.unused = nn.Parameter(torch.zeros(1))

        def predict(self, rows: list[torch.Tensor]) -> torch.Tensor:
            return 3 * rows[0] + rows[1] if ensemble else rows[-1]

    samples = Samples(torch.zeros(8, 1), torch.tensor([0] * 6 + [1] * 2))

    def loss(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(inputs, every=True)[0].sum() + model.unused.sum()
        return found

    result = fit(Echo(), samples, Training(batch_size=8, local_epochs=1), 0.1, np.random.default_rng(0), loss)
    assert result.accuracy == (0.75 if ensemble else 0.25)
