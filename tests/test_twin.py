from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flexfed.models import MODELS, build_model
from flexfed.narrowing import narrow
from flexfed.networks import build_on_meta, travelling
from flexfed.twin import has_twins, twin

SHAPES = {"cnn": (1, 8, 8), "cnn1d": (6, 90)}
NAMES = [*MODELS, "resnet18", "googlenet", "mobilenet_v3_small", "densenet121", "efficientnet_b0"]


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, 10, SHAPES.get(name, (3, 32, 32)))


def told(model: nn.Module) -> list[Any]:
    """All that a network is made of, as something to compare."""
    return [
        [(name, type(m), sorted(vars(m)), m.extra_repr(), m.training) for name, m in model.named_modules()],
        [(name, t.shape, t.dtype, t.requires_grad, type(t)) for name, t in model.named_parameters()],
        [(name, t.shape, t.dtype, type(t)) for name, t in model.named_buffers()],
        list(model.state_dict()),
    ]


def mutable(model: nn.Module) -> set[int]:
    """Ids of its modules, tensors and tables."""
    tables = [v for m in model.modules() for v in vars(m).values() if isinstance(v, dict | list | set)]
    return {id(each) for each in [*model.modules(), *model.parameters(), *model.buffers(), *tables]}


@pytest.mark.parametrize("name", NAMES)
def test_a_twin_is_what_another_build_would_be_and_shares_nothing(name: str) -> None:
    model = on_meta(name)
    assert has_twins(model)
    other = twin(model)
    assert told(other) == told(on_meta(name)) == told(copy.deepcopy(model))
    assert not mutable(other) & mutable(model)


class Heads(nn.Module):
    """Says of itself all kinds of things; a hook, a method and a list lead to its own modules."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.frozen = nn.Linear(6, 6)
        self.frozen.weight.requires_grad = False
        self.shared = self.frozen  # one module under two names
        self.heads = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])
        self.register_buffer("scale", torch.ones(6), persistent=False)
        self.choose = self.first
        self.last = partial(self.second, times=2)
        self.used: list[nn.Module] = [self.heads[0], self.body]
        self.seen: list[int] = []
        self.body.register_forward_hook(self.note)

    def note(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.seen.append(len(output))

    def first(self, x: Tensor) -> Tensor:
        return self.heads[0](x)

    def second(self, x: Tensor, times: int) -> Tensor:
        return times * self.heads[1](x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.body(x)) * self.scale
        return self.choose(x) + self.last(x)


def test_what_leads_to_a_networks_own_modules_leads_to_the_twins() -> None:
    with torch.device("meta"):
        model = Heads()
    assert has_twins(model)
    other = twin(model)
    assert other.shared is other.frozen
    assert other.used[0] is other.heads[0]
    assert other.used[1] is other.body
    assert other.choose.__self__ is other
    other(torch.zeros(5, 4, device="meta"))
    assert (other.seen, model.seen) == ([5], [])
    assert [n for n, p in other.named_parameters() if not p.requires_grad] == ["frozen.weight"]
    assert "scale" not in other.state_dict()
    assert other.scale.is_meta


class Remembering(nn.Module):
    """Its function remembers the network for which it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.run: Callable[[Tensor], Tensor] = lambda x: self.layer(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class CopiedItsWay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def __deepcopy__(self, memo: object) -> nn.Module:
        return self


class SavedItsWay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Slotted(nn.Linear):
    __slots__ = ("extra",)

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.extra = 2


class WithGenerator(nn.Linear):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.numbers = (n for n in range(3))


ALONE = (Remembering, CopiedItsWay, SavedItsWay, Slotted, WithGenerator)


@pytest.mark.parametrize("factory", ALONE)
def test_a_network_that_a_copy_would_not_equal_has_no_twins(factory: type[nn.Module]) -> None:
    assert not has_twins(nn.Sequential(factory()))


@pytest.mark.parametrize("factory", ALONE)
def test_it_is_built_anew_instead(factory: type[nn.Module]) -> None:
    one, other = build_on_meta(factory), build_on_meta(factory)
    assert not mutable(one) & mutable(other)


def test_what_remembers_its_own_network_computes_with_the_narrow_one() -> None:
    arrays = {name: np.full(t.shape, 2.0, dtype=np.float32) for name, t in travelling(Remembering()).items()}
    models = [narrow(Remembering, arrays) for _ in range(2)]
    for model in models:
        assert torch.equal(model(torch.ones(1, 4)), torch.full((1, 3), 10.0))


class Counting:
    """A factory that knows how often it was asked."""

    def __init__(self, network: Callable[[], nn.Module]):
        self.network, self.built = network, 0

    def __call__(self) -> nn.Module:
        self.built += 1
        return self.network()


def test_a_network_is_built_once_and_each_caller_gets_his_own() -> None:
    factory = Counting(Heads)
    one = build_on_meta(factory)
    one.body.weight.requires_grad = False
    one.heads.append(nn.Linear(1, 1))
    one.seen.append(1)
    other = build_on_meta(factory)
    assert factory.built == 1
    with torch.device("meta"):
        assert told(other) == told(Heads())
    assert other.seen == []


def test_one_without_twins_is_built_for_every_caller() -> None:
    factory = Counting(Remembering)
    build_on_meta(factory)
    before = factory.built
    build_on_meta(factory)
    assert factory.built == before + 1


class Reading(nn.Linear):
    """Takes rates from a tensor, as networks with stochastic depth do."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]


class Copying(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)
        self.rates = torch.linspace(0, 1, 3).tolist()


@pytest.mark.parametrize("factory", [Reading, Copying])
def test_what_reads_values_while_it_is_built_is_copied_empty(factory: type[nn.Module]) -> None:
    for model in (build_on_meta(factory), build_on_meta(factory)):
        assert all(p.is_meta for p in model.parameters())
        assert model.rates == [0.0, 0.5, 1.0]


def test_an_error_of_the_networks_own_comes_through() -> None:
    def factory() -> nn.Module:
        raise RuntimeError("no such width")

    with pytest.raises(RuntimeError, match="no such width"):
        build_on_meta(factory)
