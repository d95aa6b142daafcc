from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from toy import DIGITS, Ties, place, random_units, toy_task

from flexfed.inner import InnerNetwork
from flexfed.methods.flexfl import Teacher
from flexfed.models import model_factory
from flexfed.narrowing import narrow
from flexfed.networks import travelling
from flexfed.select import prefix_ratio
from flexfed.submodel import Submodel, extract
from flexfed.training import use_batch_statistics
from flexfed.units import Arrays, Layout, trace_layout


class Twice(nn.Module):
    """A layer and a norm that run twice in every pass; digits in."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.stem = nn.Conv2d(1, 10, 3, stride=2, padding=1)
        self.again = nn.Conv2d(10, 10, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.head = nn.Linear(10 * 16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = x + self.norm(self.again(x)).relu()
        return self.head(x.flatten(1))


def twice(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """For runs, by name."""
    return Twice(num_classes)


class Drops(nn.Sequential):
    """With dropout; digits in."""

    def __init__(self) -> None:
        conv = nn.Conv2d(1, 20, 3, stride=2, padding=1)
        super().__init__(conv, nn.ReLU(), nn.Dropout(0.5), nn.Flatten(1), nn.Linear(20 * 16, 10))


OWN: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "drops": (Drops, DIGITS),
    "ties": (Ties, (1, 4, 4)),
    "twice": (Twice, DIGITS),
}
NAMED = {
    "cnn": DIGITS,
    "cnn1d": (3, 64),
    "heterofl-resnet18": (3, 8, 8),
    "flexfl-mobilenetv2": (3, 16, 16),  # depthwise
}


def network(name: str) -> tuple[Callable[[], nn.Module], tuple[int, ...]]:
    return OWN[name] if name in OWN else (model_factory(name, 10, NAMED[name]), NAMED[name])


@cache
def numbered(name: str) -> Layout:
    return trace_layout(*network(name))


@cache
def first_weights(name: str) -> Arrays:
    torch.manual_seed(0)
    return {n: t.detach().numpy() for n, t in travelling(network(name)[0]()).items()}


def check(name: str, outer: Submodel, inner: Submodel) -> None:
    """Outputs and gradients are those of the narrow network; entries outside of it have gradients of zero."""
    (factory, shape), layout = network(name), numbered(name)
    rng = np.random.default_rng(0)
    inputs = torch.from_numpy(rng.standard_normal((6, *shape), dtype=np.float32))
    held, alone = (
        use_batch_statistics(narrow(factory, extract(layout, part, first_weights(name)))).train()
        for part in (outer, inner)
    )
    torch.manual_seed(1)  # dropout
    expected = alone(inputs)
    torch.manual_seed(1)
    got = InnerNetwork(factory, layout, outer, inner)(held, inputs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for logits in (expected, got):
        functional.cross_entropy(logits, torch.arange(len(inputs)) % logits.shape[1]).backward()
    small = {n: parameter.grad for n, parameter in alone.named_parameters()}
    for n, parameter in held.named_parameters():
        padded, outside = np.zeros(layout.shapes[n], dtype=np.float32), np.ones(layout.shapes[n], dtype=bool)
        padded[place(layout, inner, n)], outside[place(layout, inner, n)] = small[n], False
        here = place(layout, outer, n)
        assert parameter.grad is not None
        scale = max(1.0, float(np.abs(padded).max()))
        np.testing.assert_allclose(parameter.grad, padded[here], rtol=1e-3, atol=1e-4 * scale, err_msg=n)
        assert not parameter.grad.numpy()[outside[here]].any()


@pytest.mark.parametrize("name", [*NAMED, *OWN])
@pytest.mark.parametrize("largest", [1.0, 0.6])
def test_a_prefix_computes_and_learns_what_the_narrow_network_of_it_does(name: str, largest: float) -> None:
    """All widths of FjORD inside the two largest prefixes here."""
    layout = numbered(name)
    for ratio in (0.8, 0.6, 0.4, 0.2):
        if ratio < largest:
            check(name, prefix_ratio(layout, largest), prefix_ratio(layout, ratio))


@pytest.mark.parametrize("name", ["cnn", *OWN])
def test_units_may_be_any(name: str) -> None:
    """Runs that begin anywhere, and units with gaps."""
    layout, rng = numbered(name), np.random.default_rng(1)
    outer = Submodel(random_units(layout, rng, 0.8))
    kept = outer.units & random_units(layout, rng, 0.6)
    behind = outer.units.copy()
    for group, span in layout.groups.items():
        held = np.flatnonzero(outer.units[span.start : span.stop]) + span.start
        if group not in layout.fixed:
            behind[held[: len(held) // 2]] = False
            kept[held[-1]] = True
    for units in (kept, behind):
        check(name, outer, Submodel(units))
        assert units.sum() < outer.units.sum()


def test_it_has_no_weights_and_leaves_the_other_network_alone() -> None:
    (factory, _), layout = network("twice"), numbered("twice")
    outer, inner = prefix_ratio(layout, 1.0), prefix_ratio(layout, 0.4)
    held = narrow(factory, extract(layout, outer, first_weights("twice"))).train()
    before = {n: t.clone() for n, t in held.state_dict().items()}
    inside = InnerNetwork(factory, layout, outer, inner)
    inside(held, torch.randn(4, *DIGITS))
    assert all(t.is_meta for t in inside.skeleton.state_dict().values())
    assert all(torch.equal(t, before[n]) for n, t in held.state_dict().items())


def test_flexfls_teachers_do_not_drop_out() -> None:
    layout = numbered("drops")
    whole, half = prefix_ratio(layout, 1.0), prefix_ratio(layout, 0.5)
    student = narrow(Drops, extract(layout, whole, first_weights("drops"))).train()
    teacher = Teacher(replace(toy_task(), factory=Drops, layout=layout), whole, half)
    inputs = torch.randn(4, *DIGITS)
    assert torch.equal(teacher(student, inputs), teacher(student, inputs))
    trained = InnerNetwork(Drops, layout, whole, half)
    assert not torch.equal(trained(student, inputs), trained(student, inputs))
