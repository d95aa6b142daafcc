"""Networks: sizes and groups as the papers have them, clear refusals, nothing shared between builds."""

from __future__ import annotations

import importlib
import math
import pickle
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flexfed.cost import num_parameters
from flexfed.models import MODELS, build_model, check_model, load_weights, model_factory
from flexfed.models.heterofl import WIDTHS, heterofl_conv, heterofl_resnet18
from flexfed.narrowing import narrow
from flexfed.select import prefix, prefix_ratio, ratio_widths
from flexfed.submodel import narrow_shapes
from flexfed.units import Layout, trace_layout

IMAGE = (3, 32, 32)
UNCUT = tuple(f"cifar-resnet{depth}" for depth in (20, 32, 44, 56))  # their shortcuts pad channels with zeros
CUT = tuple(name for name in MODELS if name not in UNCUT)
GROUPED = ("flexfl-vgg16", "flexfl-vgg16-textbook", "flexfl-resnet34", "flexfl-mobilenetv2")
SHAPES = {"cnn": (1, 8, 8), "cnn1d": (3, 200), "heterofl-conv": (1, 28, 28), "fedlps-cnn": (1, 28, 28)}
SHAPES["fedlps-vgg16"] = (3, 64, 64)

VGG_P = [1920, 37056, 74112, 147840, 295680, 590592, 590592, 1181184, *[2360832] * 5, 2101248, 16781312]
RESNET_P = [1856, 477504, 1157376, 6822400, 13114368]
MOBILENET_P = [960, 2064, 14496, 40848, 186816, 306528, 800736, 476160, 413440]
P = {
    "flexfl-vgg16": VGG_P,
    "flexfl-vgg16-textbook": VGG_P,
    "flexfl-resnet34": RESNET_P,
    "flexfl-mobilenetv2": MOBILENET_P,
}


def on_meta(name: str, num_classes: int = 10, input_shape: tuple[int, ...] | None = None) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, num_classes, input_shape or SHAPES.get(name, IMAGE))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def group_sizes(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> list[int]:
    """P_i of each ratio group, with the tensors in the given (full or narrow) shapes."""
    return [
        sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(tuple(f"{m}." for m in g.modules)))
        for g in model.ratio_groups
    ]


def full_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


# --- Sizes ---


@pytest.mark.parametrize(
    ("name", "groups", "classifier"),
    [
        ("flexfl-vgg16", 33_605_696, 40_970),
        ("flexfl-vgg16-textbook", 33_605_696, 40_970),
        ("flexfl-resnet34", 21_573_504, 5_130),
        ("flexfl-mobilenetv2", 2_242_048, 12_810),
    ],
)
def test_flexfl_sizes(name: str, groups: int, classifier: int) -> None:
    model = on_meta(name)
    assert group_sizes(model, full_shapes(model)) == P[name]
    assert sum(P[name]) == groups
    assert count(model.get_submodule("classifier")) == classifier
    assert count(model) == groups + classifier


@pytest.mark.parametrize(
    ("name", "input_shape", "size"),
    [
        ("cnn", (1, 8, 8), 57_706),
        ("cnn", (1, 28, 28), 57_706),
        ("cnn1d", (3, 200), 47_562),
        ("heterofl-conv", (1, 28, 28), 1_556_874),
        ("heterofl-conv-quarter", (1, 28, 28), 98_922),
        ("heterofl-resnet18", IMAGE, 11_172_170),
        ("fedlps-cnn", (1, 28, 28), 21_840),
    ],
)
def test_sizes(name: str, input_shape: tuple[int, ...], size: int) -> None:
    assert count(on_meta(name, 10, input_shape)) == size


@pytest.mark.parametrize(
    ("name", "num_classes", "side", "size"),
    [
        ("fedlps-vgg11", 10, 32, 9_231_114),
        ("fedlps-vgg13", 100, 32, 9_462_180),
        ("fedlps-vgg16", 200, 64, 15_132_936),
    ],
)
def test_fedlps_vgg_sizes(name: str, num_classes: int, side: int, size: int) -> None:
    assert count(on_meta(name, num_classes, (3, side, side))) == size


def test_the_map_that_fedlps_vgg_flattens_grows_with_the_image() -> None:
    check_model("fedlps-vgg11", 10, (1, 100, 64))
    assert on_meta("fedlps-vgg11", 10, (1, 100, 64)).get_submodule("classifier").weight.shape == (10, 512 * 3 * 2)


def test_vgg_of_femnist_has_narrow_linear_layers_and_four_pools() -> None:
    grey, colour = on_meta("flexfl-vgg16", 62, (1, 28, 28)), on_meta("flexfl-vgg16", 62)
    assert grey.get_submodule("fc1.linear").out_features == 256
    assert colour.get_submodule("fc1.linear").out_features == 4096
    assert [n for n, _ in grey.named_children() if n.startswith("pool")] == [
        "pool3",
        "pool5",
        "pool8",
        "pool11",
        "pool",
    ]
    assert on_meta("flexfl-vgg16", 22, (22, 20, 20)).get_submodule("fc2.linear").out_features == 256


@pytest.mark.parametrize(("name", "after"), [("flexfl-vgg16", 3), ("flexfl-vgg16-textbook", 2)])
def test_vgg_pool_placement(name: str, after: int) -> None:
    names = [n for n, _ in on_meta(name).named_children()]
    assert names.index(f"pool{after}") == names.index(f"conv{after}") + 1
    assert names.count("pool13") == 1


@pytest.mark.parametrize(
    ("builder", "shape", "sizes"),
    [
        (heterofl_conv, (1, 28, 28), [1_556_874, 391_370, 98_922, 25_274, 6_594]),
        (heterofl_resnet18, IMAGE, [11_172_170, 2_796_714, 701_018, 176_178, 44_510]),
    ],
)
def test_heterofl_levels_built_narrow(
    builder: Callable[..., nn.Module], shape: tuple[int, ...], sizes: list[int]
) -> None:
    with torch.device("meta"):
        models = [builder(10, shape, widths=tuple(w // rate for w in WIDTHS)) for rate in (1, 2, 4, 8, 16)]
    assert [count(model) for model in models] == sizes


# --- Structure ---


@pytest.mark.parametrize("name", [*MODELS, "resnet18", "googlenet"])
def test_known_networks_take_their_data(name: str) -> None:
    check_model(name, 10, SHAPES.get(name, IMAGE))


@pytest.mark.parametrize("name", MODELS)
def test_no_running_statistics(name: str) -> None:
    model = on_meta(name)
    assert not list(model.buffers())
    assert [n for n, _ in model.named_parameters()] == list(model.state_dict())


@pytest.mark.parametrize(("name", "shape"), [("cnn", (3, 32, 32)), ("cnn", (1, 28, 28)), ("cnn1d", (6, 90))])
def test_small_networks_run_and_learn(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = build_model(name, 4, shape)
    logits = model(torch.randn(5, *shape))
    assert logits.shape == (5, 4)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "relus"),
    [
        ("flexfl-vgg16", [1] * 15),
        ("flexfl-resnet34", [1, 6, 8, 12, 6]),
        ("flexfl-mobilenetv2", [1, 2, 4, 6, 8, 6, 6, 2, 1]),
    ],
)
def test_every_relu_is_its_own_module_and_runs_once(name: str, relus: list[int]) -> None:
    model = on_meta(name)
    runs: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.ReLU | nn.ReLU6):
            module.register_forward_hook(lambda *_, path=path: runs.append(path))
    model(torch.zeros(2, *IMAGE, device="meta"))
    assert len(runs) == len(set(runs))
    prefixes = [tuple(f"{m}." for m in g.modules) for g in model.ratio_groups]
    assert [sum(path.startswith(prefix) for path in runs) for prefix in prefixes] == relus


def test_resnet_first_stage_is_96_wide_with_a_projection() -> None:
    block = on_meta("flexfl-resnet34").get_submodule("stage1.0")
    assert block.get_submodule("shortcut.conv").weight.shape == (96, 64, 1, 1)


def test_mobilenet_shortcuts_and_hidden_widths() -> None:
    model = on_meta("flexfl-mobilenetv2")
    adds = {n: m.adds_input for n, m in model.named_modules() if hasattr(m, "adds_input")}
    assert [n for n, added in adds.items() if not added] == [f"stage{i}.0" for i in range(1, 8)]
    by_name = {g.name: g.widths for g in model.ratio_groups}
    assert by_name["stem"] == {"stem.conv": 1, "stage1.0.expand": 1, "stage1.0.depthwise": 1}
    assert by_name["stage1"] == {"stage1.0.project": 1, "stage2.0.expand": 6, "stage2.0.depthwise": 6}
    assert by_name["stage2"]["stage2.1.expand"] == by_name["stage2"]["stage3.0.expand"] == 6
    assert by_name["head"] == {"head.conv": 1}


@pytest.mark.parametrize("name", GROUPED)
def test_width_tables_name_every_layer_but_the_classifier(name: str) -> None:
    model = on_meta(name)
    layers = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)} - {"classifier"}
    named = [module for group in model.ratio_groups for module in group.widths]
    assert len(named) == len(set(named))
    assert set(named) == layers


# --- Numbering and narrow networks ---


@cache
def layout_of(name: str) -> Layout:
    shape = SHAPES.get(name, IMAGE)
    return trace_layout(model_factory(name, 10, shape), shape)


@pytest.mark.parametrize("name", CUT)
def test_half_of_every_network_runs_narrow(name: str) -> None:
    layout, shape = layout_of(name), SHAPES.get(name, IMAGE)
    half = prefix_ratio(layout, 0.5)
    arrays = {n: np.zeros(s, dtype=np.float32) for n, s in narrow_shapes(layout, half).items()}
    small = narrow(model_factory(name, 10, shape), arrays)
    assert count(small) == num_parameters(layout, half) < 0.6 * num_parameters(layout, prefix_ratio(layout, 1.0))
    # Its forward pass is law 6's business; here on meta, where the largest network costs nothing.
    assert small.to("meta")(torch.zeros(2, *shape, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("name", CUT)
def test_only_the_class_outputs_are_fixed(name: str) -> None:
    layout = layout_of(name)
    (fixed,) = layout.fixed
    assert len(layout.groups[fixed]) == 10
    assert list(layout.groups)[-1] == fixed


@pytest.mark.parametrize("name", UNCUT)
def test_a_network_that_pads_channels_is_refused_and_named(name: str) -> None:
    message = r"module 'layer2.0.shortcut' \(PaddedShortcut\) cannot be cut: where zeros are padded between channels"
    with pytest.raises(ValueError, match=message):
        layout_of(name)


@pytest.mark.parametrize("name", ["fedlps-vgg11", "fedlps-vgg13", "fedlps-vgg16"])
def test_each_convolution_of_fedlps_vgg_is_a_group(name: str) -> None:
    layout = layout_of(name)
    widths = [m.out_channels for m in on_meta(name).modules() if isinstance(m, nn.Conv2d)]
    assert len(widths) == int(name[-2:]) - 3
    assert [len(units) for units in layout.groups.values()] == [*widths, 10]
    last, classes = list(layout.groups.values())[-2:]
    rows, columns = layout.axes["classifier.weight"]
    per_channel = {"fedlps-vgg16": 4}.get(name, 1)  # the map is 2x2 for a 64x64 image
    assert np.array_equal(rows, classes)
    assert np.array_equal(columns, np.repeat(last, per_channel))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("heterofl-conv", [1_556_874, 391_370, 98_922, 25_274, 6_594]),
        ("heterofl-resnet18", [11_172_170, 2_796_714, 701_018, 176_178, 44_510]),
    ],
)
def test_heterofl_levels_cut_from_the_full_network(name: str, sizes: list[int]) -> None:
    layout = layout_of(name)
    cut = [num_parameters(layout, prefix_ratio(layout, rate)) for rate in (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)]
    assert cut == sizes


VGG_A = (
    ".506486 .513375 .650306 .617753 .634784 .594907 .564836 .606517 "
    ".603570 .588370 .589039 .810356 .963604 .994022 .805089"
)
RESNET_A = ".568683 .652521 .601708 .760380 .906074"
MOBILENET_A = ".524102 .543859 .587157 .583756 .626427 .669004 .667179 .670586 .994986"


@pytest.mark.parametrize(
    ("name", "scores", "strength", "size"),
    [
        ("flexfl-vgg16", VGG_A, 58, 9_863_336),
        ("flexfl-vgg16", VGG_A, 15, 31_094_845),
        ("flexfl-resnet34", RESNET_A, 37, 6_295_247),
        ("flexfl-resnet34", RESNET_A, 10, 20_062_656),
        ("flexfl-mobilenetv2", MOBILENET_A, 63, 661_980),
        ("flexfl-mobilenetv2", MOBILENET_A, 51, 987_075),
        ("flexfl-mobilenetv2", MOBILENET_A, 8, 2_104_450),
    ],
)
def test_flexfl_pool_sizes_of_the_paper_page(name: str, scores: str, strength: int, size: int) -> None:
    """Released scores and strengths -> group parameters that the released constructors count."""
    layout, model = layout_of(name), on_meta(name)
    apoz, sizes = np.array([float(a) for a in scores.split()]), np.array(P[name])
    keep = 1 - apoz * np.log(sizes) / np.log(sizes.max())
    ratios = np.clip(keep * 100 / strength, 0.01, 1)
    submodel = prefix(layout, ratio_widths(layout, model.ratio_groups, ratios.tolist()))
    assert sum(group_sizes(model, narrow_shapes(layout, submodel))) == size


@pytest.mark.parametrize("name", GROUPED)
def test_width_tables_reach_every_group_of_the_layout(name: str) -> None:
    layout, groups = layout_of(name), on_meta(name).ratio_groups
    sizes = ratio_widths(layout, groups, [0.5] * len(groups))
    assert sizes.keys() == layout.groups.keys() - layout.fixed


def test_equal_widths_do_not_grow_a_shortcut() -> None:
    """64 of 64 and 64 of 96 channels: the projection between them stays."""
    layout, groups = layout_of("flexfl-resnet34"), on_meta("flexfl-resnet34").ratio_groups
    shapes = narrow_shapes(layout, prefix(layout, ratio_widths(layout, groups, [1, 2 / 3 + 1e-9, 1, 1, 1])))
    assert shapes["stage1.0.shortcut.conv.weight"] == (64, 64, 1, 1)
    assert shapes.keys() == layout.shapes.keys()


# --- By name ---


@pytest.mark.parametrize("name", ["cnn", "flexfl-vgg16", "heterofl-resnet18", "resnet18", "tests_own:Net"])
def test_factory_pickles_and_builds_on_meta(name: str, own_module: None) -> None:
    factory = pickle.loads(pickle.dumps(model_factory(name, 7, IMAGE)))
    assert isinstance(factory, partial)
    with torch.device("meta"):
        model = factory()
    assert all(p.is_meta for p in model.parameters())


def test_builds_share_nothing() -> None:
    """A 3-channel VGG16 leaves no pool behind for the next one (the released code's does)."""
    before = [type(m) for m in on_meta("flexfl-vgg16", 10, (1, 20, 20)).modules()]
    on_meta("flexfl-vgg16", 10, IMAGE)
    after = on_meta("flexfl-vgg16", 10, (1, 20, 20))
    assert [type(m) for m in after.modules()] == before
    check_model("flexfl-vgg16", 10, (1, 20, 20))
    factory = model_factory("cnn", 10, (1, 8, 8))
    one, two = factory(), factory()
    assert not {id(m) for m in one.modules()} & {id(m) for m in two.modules()}
    assert not {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in two.parameters()}


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "mobilenet_v3_small", "densenet121"])
def test_torchvision_takes_other_channels(name: str) -> None:
    grey, colour = on_meta(name, 10, (1, 32, 32)), on_meta(name, 10, IMAGE)
    first, other = (next(m for m in n.modules() if isinstance(m, nn.Conv2d)) for n in (grey, colour))
    assert first.weight.shape == (other.weight.shape[0], 1, *other.weight.shape[2:])
    assert (first.stride, first.padding, first.bias is None) == (
        other.stride,
        other.padding,
        other.bias is None,
    )
    check_model(name, 10, (1, 32, 32))


OWN = """
import math
import torch
from torch import nn
SCALE = torch.ones(3)
class Net(nn.Sequential):
    def __init__(self, num_classes, input_shape):
        super().__init__(nn.Flatten(), nn.Linear(math.prod(input_shape), num_classes))
def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
def anything(**options):
    return Net(**options)
def pair(num_classes):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x
    return Pair()
def nothing():
    return None
number = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tests_own", raising=False)


@pytest.mark.parametrize("name", ["tests_own:Net", "tests_own:plain", "tests_own:anything"])
def test_own_factory_gets_what_it_takes(name: str, own_module: None) -> None:
    check_model(name, 10, (1, 8, 8))
    assert build_model(name, 10, (1, 8, 8))(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_importing_an_own_module_on_meta_keeps_its_constants(own_module: None) -> None:
    with torch.device("meta"):
        build_model("tests_own:Net", 10, (1, 8, 8))
    assert not importlib.import_module("tests_own").SCALE.is_meta


# --- Refusals ---


def test_unknown_name_lists_the_known_ones_papers_first() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'resnet19'; known: flexfl-vgg16, .*heterofl-conv.* cnn, .*"):
        model_factory("resnet19", 10, IMAGE)
    with pytest.raises(ValueError, match=r"torchvision .*'package\.module:factory'"):
        build_model("resnet19", 10, IMAGE)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("vgg16", (1, 8, 8), "'vgg16' needs at least 32x32 pixels; got 8x8, choose .*'cnn'"),
        ("flexfl-vgg16", (3, 8, 8), "needs at least 32x32 pixels; got 8x8"),
        ("flexfl-vgg16", (1, 8, 8), "needs at least 16x16 pixels; got 8x8"),
        ("fedlps-cnn", (1, 8, 8), "needs at least 16x16 pixels; got 8x8"),
        ("fedlps-vgg11", (3, 32, 31), "'fedlps-vgg11' needs at least 32x32 pixels; got 32x31"),
        ("fedlps-vgg16", (1, 8, 8), "'fedlps-vgg16' needs at least 32x32 pixels; got 8x8"),
        ("heterofl-conv", (1, 5, 9), "needs at least 8x8 pixels; got 5x9"),
        ("cnn", (1, 16, 3), "needs at least 4x4 pixels; got 16x3, choose .*'heterofl-resnet18'"),
        ("cnn1d", (3, 9), "needs at least 16 time steps; got 9"),
        (
            "cnn",
            (3, 200),
            r"takes images \(channels, height, width\); got input shape \(3, 200\), choose 'cnn1d'",
        ),
        ("resnet18", (3, 200), "takes images .*choose 'cnn1d'"),
        ("cnn1d", (1, 8, 8), r"takes windows \(channels, time\).*choose 'cnn'"),
        ("cnn", (91,), "choose a 'package.module:factory' of your own"),
        ("cnn", (0, 8, 8), "positive sizes"),
        ("vit_b_16", (3, 32, 32), "cannot take inputs of shape .*Expected 224 but got 32"),
    ],
)
def test_inputs_that_do_not_fit(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_model(name, 10, shape)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tests_missing:Net", "cannot be imported: No module named 'tests_missing'"),
        ("tests_own:Missing", "cannot be imported: .*no attribute 'Missing'"),
        ("tests_own:number", "is of type int; expected a function or class"),
        ("tests_own:nothing", "returned NoneType; expected a torch.nn.Module"),
        ("tests_own:pair", "returned tuple; expected one tensor"),
        ("tests_own:plain", r"returned shape \(2, 10\) .*expected \(2, 7\)"),
    ],
)
def test_own_factories_that_do_not_fit(name: str, message: str, own_module: None) -> None:
    with pytest.raises(ValueError, match=message):
        check_model(name, 7, (1, 8, 8))


def test_fedlps_vgg_is_not_built_for_small_images() -> None:
    with pytest.raises(ValueError, match="fedlps-vgg13 needs images of at least 32x32, got 28x40"):
        build_model("fedlps-vgg13", 10, (3, 28, 40))


def test_no_classes() -> None:
    with pytest.raises(ValueError, match="at least one class, got 0"):
        build_model("cnn", 0, (1, 8, 8))


# --- Trained weights ---


def saved(model: nn.Module, path: Path, drop: Sequence[str] = ()) -> str:
    save_file({n: t.contiguous() for n, t in model.state_dict().items() if n not in drop}, path)
    return str(path)


def test_weights_from_a_file(tmp_path: Path) -> None:
    donor, model = build_model("cnn", 10, (1, 8, 8)), build_model("cnn", 10, (1, 8, 8))
    load_weights(model, saved(donor, tmp_path / "w.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(donor.parameters(), model.parameters(), strict=True))


def test_another_class_count_keeps_the_fresh_classifier(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    donor, model = build_model("cnn", 10, (1, 8, 8)), build_model("cnn", 4, (1, 8, 8))
    fresh = model.get_submodule("classifier").weight.clone()
    with caplog.at_level("INFO"):
        load_weights(model, saved(donor, tmp_path / "w.safetensors"))
    assert torch.equal(model.get_submodule("classifier").weight, fresh)
    assert torch.equal(model.get_submodule("fc").weight, donor.get_submodule("fc").weight)
    assert "classifier.weight" in caplog.text


def test_running_statistics_may_be_missing(tmp_path: Path) -> None:
    def network(tracked: bool) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=tracked), nn.Linear(4, 2))

    for has, wants in [(True, False), (False, True)]:
        donor, model = network(has), network(wants)
        load_weights(model, saved(donor, tmp_path / "w.safetensors"))
        assert torch.equal(model[0].weight, donor[0].weight)


@pytest.mark.parametrize(
    ("source", "drop", "message"),
    [
        (("cnn", 10, (3, 8, 8)), (), r"'conv1.weight' has shape \(16, 3, 3, 3\), expected \(16, 1, 3, 3\)"),
        (("cnn", 10, (1, 8, 8)), ("fc.bias",), "missing fc.bias, unexpected nothing"),
        (("cnn", 4, (1, 8, 8)), ("classifier.bias",), "missing classifier.bias"),
        (("fedlps-cnn", 10, (1, 28, 28)), (), "missing .*, unexpected fc1.bias"),
    ],
)
def test_weights_that_do_not_fit(
    source: tuple[str, int, tuple[int, ...]], drop: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    path = saved(build_model(*source), tmp_path / "w.safetensors", drop)
    with pytest.raises(ValueError, match=message):
        load_weights(build_model("cnn", 10, (1, 8, 8)), path)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("imagenet", "'torchvision', 'zoo' or the path of a .safetensors file, got 'imagenet'"),
        ("nowhere.safetensors", "nowhere.safetensors does not exist"),
        ("torchvision", "needs a torchvision network, got Sequential"),
    ],
)
def test_weights_that_do_not_exist(weights: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_weights(build_model("cnn", 10, (1, 8, 8)), weights)


def test_unreadable_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"not one")
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(build_model("cnn", 10, (1, 8, 8)), str(path))


def test_torchvision_weights_come_from_the_cache_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = build_model("squeezenet1_1", 10, IMAGE)
    expected = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    with pytest.raises(ValueError, match=r"'squeezenet1_1' are expected in .*squeezenet1_1-b8a52dc0\.pth"):
        load_weights(model, "torchvision")
    assert not expected.exists()
    donor = build_model("squeezenet1_1", 1000, IMAGE)
    expected.parent.mkdir(parents=True)
    torch.save(donor.state_dict(), expected)
    load_weights(model, "torchvision")
    assert torch.equal(model.get_submodule("features.0").weight, donor.get_submodule("features.0").weight)
    assert model.get_submodule("classifier.1").out_channels == 10


@pytest.mark.parametrize("name", ["googlenet", "densenet121"])
def test_torchvisions_files_have_other_names_and_more_outputs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import models

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = build_model(name, 10, IMAGE)
    donor = models.get_model(name, **({"init_weights": False} if name == "googlenet" else {}))
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", n): t for n, t in donor.state_dict().items()}
    assert old.keys() - model.state_dict().keys()  # auxiliary outputs, or names of another age
    file = tmp_path / "hub" / "checkpoints" / models.get_model_weights(name).DEFAULT.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(old, file)
    load_weights(model, "torchvision")
    wanted = {n: t for n, t in donor.state_dict().items() if n in model.state_dict()}
    last = list(model.state_dict())[-2:]  # another number of classes
    assert all(torch.equal(model.state_dict()[n], t) for n, t in wanted.items() if n not in last)


def test_torchvisions_file_is_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    expected = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    expected.parent.mkdir(parents=True)
    trap = tmp_path / "trapped"

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return trap.touch, ()

    torch.save({"features.0.weight": Trap()}, expected)
    with pytest.raises(ValueError, match="cannot be read as tensors alone"):
        load_weights(build_model("squeezenet1_1", 10, IMAGE), "torchvision")
    assert not trap.exists()


# --- AutoFLIP ---


@pytest.mark.parametrize(
    ("name", "num_classes", "input_shape", "size"),
    [
        ("autoflip-cnn", 10, (1, 28, 28), 1_663_370),
        ("autoflip-cnn", 10, IMAGE, 1_664_970),
        ("autoflip-cnn-128", 100, IMAGE, 9_728 + 819_456 + 6_423_040 + 51_300),
    ],
)
def test_autoflip_sizes(name: str, num_classes: int, input_shape: tuple[int, ...], size: int) -> None:
    assert count(on_meta(name, num_classes, input_shape)) == size
    check_model(name, num_classes, input_shape)


def test_autoflip_begins_xavier_normal_without_biases() -> None:
    torch.manual_seed(0)
    model = build_model("autoflip-cnn", 10, (1, 28, 28))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            fan = sum(parameter.shape[:2]) * math.prod(parameter.shape[2:])
            assert float(parameter.detach().std()) == pytest.approx(math.sqrt(2 / fan), rel=0.05)


def test_autoflip_takes_images_of_6x6_and_refuses_smaller_ones() -> None:
    check_model("autoflip-cnn", 10, (1, 6, 6))
    with pytest.raises(ValueError, match="autoflip-cnn needs images of at least 6x6, got 5x8"):
        build_model("autoflip-cnn", 10, (1, 5, 8))
