"""Early exits: attached to any staged network, cut in width and depth, and never built where they are not held."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flexfed.cost import forward_macs, network_on_meta, num_parameters
from flexfed.exits import ExitNetwork, exit_factory, with_exits
from flexfed.models import model_factory
from flexfed.models.heads import HEADS, Attention
from flexfed.narrowing import narrow
from flexfed.networks import Factory, build_on_meta, travelling
from flexfed.select import prefix_ratio
from flexfed.soundness import check_parts
from flexfed.stages import stage_shapes
from flexfed.submodel import Submodel, extract, narrow_shapes
from flexfed.units import trace_layout

IMAGE = (3, 32, 32)
STAGED: dict[str, tuple[str, ...]] = {
    "resnet18": ("layer1", "layer2", "layer3", "layer4"),
    "mobilenet_v2": ("features.3", "features.6", "features.13", "features.18"),
    "vgg11_bn": ("features.7", "features.14", "features.28"),
    "cnn": ("relu1", "relu2", "relu3"),
}
CLASSES = 5


@cache
def plain(name: str) -> Factory:
    return model_factory(name, CLASSES, IMAGE)


@cache
def staged(name: str, design: str = "linear", ensemble: bool = False) -> Factory:
    return exit_factory(plain(name), STAGED[name], design, IMAGE, CLASSES, ensemble)


def built(name: str, design: str = "linear", ensemble: bool = False) -> ExitNetwork:
    torch.manual_seed(0)
    network = staged(name, design, ensemble)()
    assert isinstance(network, ExitNetwork)
    return network.eval()


@cache
def images(num: int = 4) -> Tensor:
    return torch.randn(num, *IMAGE, generator=torch.Generator().manual_seed(1))


def upto(network: ExitNetwork, depth: int) -> frozenset[str]:
    """The tensors of a network that ends at an exit."""
    return frozenset(travelling(network.until(depth)))


# --- the network --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(STAGED))
def test_the_last_exit_is_the_plain_network_under_the_plain_names(name: str) -> None:
    network = built(name)
    torch.manual_seed(0)
    model = plain(name)().eval()
    tensors = network.state_dict()
    assert model.state_dict().keys() == {key for key in tensors if not key.startswith("exits.")}
    model.load_state_dict({key: value for key, value in tensors.items() if not key.startswith("exits.")})
    logits = network.logits(images())
    assert [tuple(z.shape) for z in logits] == [(4, CLASSES)] * len(STAGED[name])
    assert torch.equal(logits[-1], model(images()))
    assert torch.equal(network(images()), logits[-1])


@pytest.mark.parametrize("name", list(STAGED))
def test_a_network_that_ends_early_gives_the_same_logits_and_has_nothing_behind_its_end(name: str) -> None:
    network = built(name)
    logits = network.logits(images())
    sizes = []
    for depth in range(1, network.num_exits + 1):
        short = network.until(depth)
        assert short.num_exits == depth
        assert all(torch.equal(a, b) for a, b in zip(short.logits(images()), logits, strict=False))
        assert torch.equal(short(images()), logits[depth - 1])
        sizes.append(sum(p.numel() for p in short.parameters()))
        last = STAGED[name][depth - 1].replace(".", "_")
        own = [key for key in short.state_dict() if key.startswith("exits.")]
        assert (depth == network.num_exits) or any(key.startswith(f"exits.{last}.") for key in own)
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    with pytest.raises(ValueError, match=f"1 to {network.num_exits} exits can be asked for, got 0"):
        network.until(0)


def test_the_prediction_of_an_ensemble_is_the_mean_of_the_logits() -> None:
    network = built("cnn", ensemble=True)
    logits = network.logits(images())
    assert torch.allclose(network(images()), sum(logits) / 3, atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(network.until(2)(images()), (logits[0] + logits[1]) / 2, atol=1e-6)


def test_a_copy_is_a_network_of_its_own() -> None:
    network = built("cnn")
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(twin(images()), torch.zeros(4, CLASSES))
    assert not torch.equal(network(images()), torch.zeros(4, CLASSES))
    assert pickle.loads(pickle.dumps(staged("cnn")))().num_exits == 3


def test_gradients_reach_every_exit() -> None:
    network = built("resnet18", "depthfl").train()
    sum(z.sum() for z in network.logits(images())).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in network.parameters())


# --- parts of it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", list(HEADS))
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "cnn"])
def test_width_and_depth_are_cut_together(name: str, design: str) -> None:
    """Law 6 for the whole network; the narrow and short one runs, and has the shapes that the numbering says."""
    factory, network = staged(name, design), built(name, design)
    layout = trace_layout(factory, IMAGE)
    arrays = {key: tensor.detach().numpy() for key, tensor in travelling(network).items()}
    check_parts(factory, layout, arrays, IMAGE)
    assert len(layout.fixed) == network.num_exits, "every classifier keeps all of its outputs"
    half = prefix_ratio(layout, 0.5)
    for depth in (1, 2):
        part = Submodel(half.units, upto(network, depth))
        small = narrow(factory, extract(layout, part, arrays)).eval()
        assert isinstance(small, ExitNetwork)
        assert small.num_exits == depth
        assert {k: tuple(t.shape) for k, t in travelling(small).items()} == narrow_shapes(layout, part)
        assert small(images()).shape == (4, CLASSES)


def test_a_part_of_the_whole_width_gives_the_logits_of_its_exit() -> None:
    factory, network = staged("cnn"), built("cnn")
    layout = trace_layout(factory, IMAGE)
    arrays = {key: tensor.detach().numpy() for key, tensor in travelling(network).items()}
    part = Submodel(np.ones(layout.num_units, dtype=bool), upto(network, 2))
    small = narrow(factory, extract(layout, part, arrays)).eval()
    assert torch.equal(small(images()), network.logits(images())[1])


def test_less_depth_costs_less_and_what_is_absent_is_not_counted() -> None:
    factory, network = staged("resnet18"), built("resnet18")
    layout = trace_layout(factory, IMAGE)
    whole = np.ones(layout.num_units, dtype=bool)
    parts = [Submodel(whole, upto(network, depth)) for depth in range(1, 5)]
    macs = [forward_macs(factory, layout, part, IMAGE) for part in parts]
    assert macs == sorted(macs)
    assert macs[0] < macs[-1] / 2
    assert macs[-1] == forward_macs(factory, layout, Submodel(whole), IMAGE)
    assert num_parameters(layout, parts[0]) == sum(p.numel() for p in network.until(1).parameters())
    on_meta = network_on_meta(factory, tuple(narrow_shapes(layout, parts[0]).items()))
    assert not any(name.startswith("layer2") for name, _ in on_meta.named_modules())


def test_tensors_that_end_nowhere_are_refused() -> None:
    factory, network = staged("cnn"), built("cnn")
    arrays = {key: tensor.detach().numpy() for key, tensor in travelling(network).items()}
    del arrays["conv1.weight"]
    with pytest.raises(ValueError, match=r"arrays do not fit the network ExitNetwork: .* missing \['conv1.weight'\]"):
        narrow(factory, arrays)


# --- heads --------------------------------------------------------------------------------------------------------

SHAPES = {
    "images": [(6, 8, 8), (10, 4, 4), (12, 1, 1)],
    "windows": [(6, 25), (10, 13), (12, 7)],
    "features": [(6,), (10,), (12,)],
}


@pytest.mark.parametrize("design", list(HEADS))
@pytest.mark.parametrize("kind", list(SHAPES))
@pytest.mark.parametrize("stage", [0, 1])
def test_a_head_classifies_what_its_stage_gives(design: str, kind: str, stage: int) -> None:
    head = HEADS[design](SHAPES[kind], stage, CLASSES)
    assert head(torch.randn(3, *SHAPES[kind][stage])).shape == (3, CLASSES)


def test_the_designs_are_those_of_their_papers() -> None:
    """ScaleFL: three convolutions of the stage's channels. DepthFL: every classifier sees the last stage's features."""
    scalefl, depthfl = (HEADS[name](SHAPES["images"], 0, CLASSES) for name in ("scalefl", "depthfl"))
    convolutions = [m for m in scalefl.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.kernel_size) for m in convolutions] == [(6, 6, (3, 3))] * 3
    assert next(m for m in scalefl.modules() if isinstance(m, nn.Linear)).in_features == 6
    assert next(m for m in depthfl.modules() if isinstance(m, nn.Linear)).in_features == 12
    assert sum(isinstance(m, nn.Conv2d) for m in depthfl.modules()) == 2 * (1 + 2)  # the gate, and two stages left out
    last = HEADS["depthfl"](SHAPES["images"], 2, CLASSES)
    assert sum(isinstance(m, nn.Conv2d) for m in last.modules()) == 2


@pytest.mark.parametrize("shape", [(4, 7, 5), (4, 1, 1), (4, 9)])
def test_attention_scales_features_down_and_keeps_their_shape(shape: tuple[int, ...]) -> None:
    features = torch.rand(2, *shape) + 0.1
    scaled = Attention(len(shape) - 1, shape[0]).eval()(features)
    assert scaled.shape == features.shape
    assert bool(((scaled > 0) & (scaled < features)).all())


# --- what cannot be -----------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.body(x)).mean((2, 3)))


class Branching(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


@pytest.mark.parametrize(
    ("factory", "stages", "says"),
    [
        (plain("cnn"), ("relu1", "nothing", "relu3"), "has no stage 'nothing'; its outermost modules are"),
        (plain("cnn"), ("relu2", "relu1", "relu3"), "in the order given: relu2, relu1, relu3; got relu1, relu2, relu3"),
        (plain("cnn"), ("relu3",), "at least two stages, got relu3"),
        (Twice, ("body", "fc"), "stages should run once each, in the order given: body, fc; got body, body, fc"),
        (Branching, ("body", "fc"), "Branching cannot be traced to its stages"),
    ],
)
def test_what_has_no_such_stages_is_refused(factory: Factory, stages: Sequence[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        exit_factory(factory, stages, "linear", IMAGE, CLASSES)


def test_an_unknown_design_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown design of exits 'best'; known: linear, scalefl, depthfl"):
        exit_factory(plain("cnn"), STAGED["cnn"], "best", IMAGE, CLASSES)


def test_stages_have_the_shapes_of_their_outputs() -> None:
    assert stage_shapes(build_on_meta(plain("resnet18")), STAGED["resnet18"], IMAGE) == [
        (64, 8, 8), (128, 4, 4), (256, 2, 2), (512, 1, 1),
    ]  # fmt: skip


def test_heads_of_ones_own_may_be_attached() -> None:
    model = plain("cnn")()
    shape = stage_shapes(build_on_meta(plain("cnn")), ["relu1"], IMAGE)[0]
    head = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(shape[0], CLASSES))
    network = with_exits(model, ["relu1"], [head])
    assert network.num_exits == 2
    assert partial(network.until, 1)()(images()).shape == (4, CLASSES)


class Writing(Twice):
    """Writes into what its stage gave; drops out while it trains, by a module or in its own code."""

    def __init__(self, how: str = "module", own_dropout: bool = False) -> None:
        super().__init__()
        self.how, self.own_dropout = how, own_dropout
        self.relu = nn.Sequential(nn.Sequential(nn.ReLU(inplace=True)), nn.Dropout(0.5))
        self.last = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        writes = {"module": self.relu, "method": Tensor.relu_, "function": partial(functional.relu, inplace=True)}
        x = self.last(x.relu_() if self.how == "method" else writes[self.how](x))
        x = functional.dropout(x, training=self.training) if self.own_dropout else x
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("design", list(HEADS))
@pytest.mark.parametrize("how", ["module", "method", "function"])
def test_a_classifier_sees_what_its_stage_gave_though_the_network_writes_into_it(how: str, design: str) -> None:
    torch.manual_seed(0)
    network = exit_factory(partial(Writing, how), ("body", "last"), design, IMAGE, CLASSES)()
    assert isinstance(network, ExitNetwork)
    first, _ = network(images(), every=True)
    first.sum().backward()
    assert all(p.grad is not None for n, p in network.named_parameters() if n.startswith(("exits", "body")))
    with torch.no_grad():
        torch.testing.assert_close(first, network.get_submodule("exits.body")(network.get_submodule("body")(images())))


def test_nothing_is_copied_where_nobody_writes() -> None:
    for name in STAGED:
        assert "clone" not in str(built(name)._graph), name


def test_a_network_that_asks_itself_whether_it_trains_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Writing reads in its own code whether it trains.*such as nn\.Dropout"):
        exit_factory(partial(Writing, own_dropout=True), ("body", "last"), "linear", IMAGE, CLASSES)
    network = exit_factory(Writing, ("body", "last"), "linear", IMAGE, CLASSES)()
    assert network.training, "in the mode in which it was built"
    assert torch.equal(network.eval()(images()), network(images()))
    assert not torch.equal(network.train()(images()), network(images())), "its module still drops out"


def test_classifiers_of_one_name_are_refused() -> None:
    def two() -> nn.Module:
        layers = OrderedDict(a=nn.Sequential(OrderedDict(b=nn.Conv2d(3, 3, 1))), a_b=nn.Conv2d(3, 3, 1))
        return nn.Sequential(OrderedDict(**layers, last=nn.Conv2d(3, 3, 1), flat=nn.Flatten(), fc=nn.LazyLinear(2)))

    with pytest.raises(ValueError, match=r"two modules that would be 'exits\.a_b'; rename one"):
        with_exits(two(), ["a.b", "a_b"], [nn.Flatten(), nn.Flatten()])
