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


def of_layers(**values: Any) -> nn.Module:
    """A network of torch's layers, to which somebody has attached values."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    for name, value in values.items():
        setattr(model, name, value)
    return model


def with_frozen_and_shared() -> nn.Module:
    """One module under two names, a parameter that is not trained, a buffer that is not saved, a list of modules."""
    model = of_layers()
    model.add_module("again", model[0])
    model[2].weight.requires_grad = False
    model.register_buffer("scale", torch.ones(6), persistent=False)
    model.ends = [model[0], {"last": model[2]}]
    model.names = {model[0]: "first"}
    return model


def test_what_belongs_to_a_network_belongs_to_its_twin() -> None:
    with torch.device("meta"):
        model = with_frozen_and_shared()
    assert has_twins(model)
    other = twin(model)
    assert other.again is other[0]
    assert other.ends[0] is other[0]
    assert other.ends[1]["last"] is other[2]
    assert other.names == {other[0]: "first"}
    assert [n for n, p in other.named_parameters() if not p.requires_grad] == ["2.weight"]
    assert "scale" not in other.state_dict()
    assert other.scale.is_meta
    assert not mutable(other) & mutable(model)
    assert not {id(model.ends), id(model.ends[1])} & {id(other.ends), id(other.ends[1])}


class Remembering(nn.Module):
    """Its function remembers the network for which it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.run: Callable[[Tensor], Tensor] = lambda x: self.layer(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class Noisy(nn.Linear):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.rng = np.random.default_rng()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.rng.random()


def hooked() -> nn.Module:
    model = of_layers()
    model[0].register_forward_hook(lambda *_: model.train())
    return model


def with_own_parameters() -> nn.Module:
    model = of_layers()
    model[0].weight.told = "something"
    return model


def parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))


MARK = object()
SEEN: list[int] = []
ALONE: dict[str, Callable[[], nn.Module]] = {
    "somebody's module": Remembering,
    "its own numbers": Noisy,
    "a generator": partial(of_layers, rng=np.random.default_rng(1)),
    "an object that is compared by identity": partial(of_layers, act=MARK),
    "a method of a list": partial(of_layers, note=SEEN.append),
    "a function that remembers": partial(of_layers, run=lambda: MARK),
    "a hook": hooked,
    "a tensor of no table": partial(of_layers, table=torch.ones(3)),
    "numbers of numpy": partial(of_layers, table=np.ones(3)),
    "a module that it does not show": partial(of_layers, hidden=(nn.ReLU(),)),
    "a parameter that says more": with_own_parameters,
    "parametrized": parametrized,
}


@pytest.mark.parametrize("kind", ALONE)
def test_a_network_that_a_copy_may_not_equal_has_no_twins_and_is_built_for_every_caller(kind: str) -> None:
    factory = Counting(ALONE[kind])
    assert not has_twins(ALONE[kind]())
    build_on_meta(factory)
    before = factory.built
    build_on_meta(factory)
    assert factory.built == before + 1


def test_what_remembers_its_own_network_computes_with_the_narrow_one() -> None:
    arrays = {name: np.full(t.shape, 2.0, dtype=np.float32) for name, t in travelling(Remembering()).items()}
    for model in (narrow(Remembering, arrays), narrow(Remembering, arrays)):
        assert torch.equal(model(torch.ones(1, 4)), torch.full((1, 3), 10.0))


class Counting:
    """A factory that knows how often it was asked."""

    def __init__(self, network: Callable[[], nn.Module]):
        self.network, self.built = network, 0

    def __call__(self) -> nn.Module:
        self.built += 1
        return self.network()


def test_a_network_is_built_once_and_each_caller_gets_his_own() -> None:
    factory = Counting(with_frozen_and_shared)
    one = build_on_meta(factory)
    one[0].weight.requires_grad = False
    one.append(nn.Linear(1, 1))
    one.ends.clear()
    other = build_on_meta(factory)
    assert factory.built == 1
    with torch.device("meta"):
        assert told(other) == told(with_frozen_and_shared())
    assert len(other.ends) == 2


def test_a_first_call_in_inference_mode_does_not_spoil_the_later_ones() -> None:
    factory = partial(of_layers)
    with torch.inference_mode():
        build_on_meta(factory)
    assert all(p.requires_grad and not p.is_inference() for p in build_on_meta(factory).parameters())


def test_networks_follow_the_default_type_of_numbers() -> None:
    factory = partial(of_layers)
    assert build_on_meta(factory)[0].weight.dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert build_on_meta(factory)[0].weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


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
