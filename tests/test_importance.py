"""APoZ by ReLU call, which unit each channel is, and the score of each ratio group."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexfed.importance import ReluCalls, ReluStatistics, apoz, group_scores, relu_units
from flexfed.models import model_factory
from flexfed.narrowing import narrow
from flexfed.select import RatioGroup, ratio_groups
from flexfed.units import Layout, build_on_meta, trace_layout

# --- Seeing ReLUs ---


class Kinds(nn.Module):
    """Every spelling of a ReLU, and what looks like one."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.ReLU()
        self.six = nn.ReLU6(inplace=True)
        self.block = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))
        self.others = nn.Sequential(nn.Hardtanh(-1, 1), nn.Hardswish(), nn.LeakyReLU(), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.others(x)
        x = self.plain(x - 1)
        x = self.six(x - 1)
        x = self.block(x - 1)
        x = F.relu(x - 1)
        x = F.relu6(x - 1)
        x = F.hardtanh(x - 1, 0.0, 2.0)
        x = F.hardtanh(x - 1, max_val=2.0, min_val=0.0)
        x = torch.relu_(x - 1).relu()
        return self.plain(x)  # type: ignore[no-any-return]


def test_sees_every_kind_of_relu_in_order_with_the_module_executing() -> None:
    calls: list[str] = []
    model = Kinds()
    x = torch.zeros(2, 3)
    F.relu(x)
    with ReluCalls(model, lambda name, output: calls.append(name)):
        F.relu(x)  # outside of the network
        model(x)
    model(x)
    assert calls == ["plain", "six", "block.1", "", "", "", "", "", "", "plain"]


def test_output_is_seen_before_it_is_changed_in_place() -> None:
    class Changes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out = F.relu(x)
            out += 1
            return out

    (call,) = apoz(Changes(), [torch.tensor([[-1.0, 1.0]])])
    np.testing.assert_array_equal(call.apoz, [1, 0])


def test_hooks_are_gone_after_an_error_inside_the_network() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(3, 1))
    with pytest.raises(RuntimeError), ReluCalls(model, lambda name, output: None):
        model(torch.zeros(2, 5))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- APoZ ---


class Relus(nn.Module):
    """As many ReLUs as inputs: the outputs of the worked example are their own ReLU's inputs."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.relus = nn.ModuleList(nn.ReLU() for _ in sizes)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(x, self.sizes, dim=1)
        return torch.cat([relu(part) for relu, part in zip(self.relus, parts, strict=True)], dim=1)


def test_worked_example_of_two_groups() -> None:
    model = Relus([4, 4, 2])
    inputs = torch.tensor([[0, 1, 2, 0, 0, 5, 1, 2, 0, 0], [0, 0, 0, 3, 0, 0, 7, 1, 0, 4.0]])
    calls = apoz(model, [inputs])
    assert [call.module for call in calls] == ["relus.0", "relus.1", "relus.2"]
    assert [call.apoz.mean() for call in calls] == [0.625, 0.375, 0.75]
    groups = [RatioGroup("one", ("relus.0",), {}), RatioGroup("two", ("relus.1", "relus.2"), {})]
    units = [np.full(n, -1) for n in (4, 4, 2)]
    scores = group_scores(calls, units, Layout({}, {}, {}), groups)
    np.testing.assert_array_equal(scores, [0.625, 0.5625])  # pooling all entries would give 0.5


def test_every_sample_weighs_the_same_however_it_is_batched() -> None:
    rows = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0.0]])
    for batches in ([rows], [rows[:2], rows[2:]], [rows[:1], rows[1:]]):
        (call,) = apoz(nn.ReLU(), batches)
        assert call.apoz.mean() == pytest.approx(2 / 3, abs=1e-12)  # the mean of batch means would give 0.75
        np.testing.assert_allclose(call.apoz, [1, 2 / 3, 2 / 3, 1 / 3])
        assert call.apoz.dtype == np.float64


def test_positions_are_averaged_and_images_may_differ_in_size() -> None:
    small, large = torch.full((1, 2, 1, 1), -1.0), torch.ones(1, 2, 4, 4)
    (call,) = apoz(nn.ReLU(), [small, large])
    np.testing.assert_array_equal(call.apoz, [0.5, 0.5])


def test_saturation_of_relu6_is_not_silence() -> None:
    (call,) = apoz(nn.ReLU6(), [torch.tensor([[9.0, 6.0, 1.0, -1.0]])])
    np.testing.assert_array_equal(call.apoz, [0, 0, 0, 1])


def test_runs_in_eval_mode_without_gradients_and_restores_every_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.9), nn.ReLU()).train()
    model[0].eval()
    before = [m.training for m in model.modules()]
    first, second = apoz(model, [torch.randn(16, 4, generator=torch.Generator().manual_seed(0))])
    np.testing.assert_array_equal(first.apoz, second.apoz)  # dropout would silence nine in ten
    assert [m.training for m in model.modules()] == before
    with pytest.raises(RuntimeError):
        apoz(model, [torch.zeros(2, 5)])
    assert [m.training for m in model.modules()] == before


def test_batch_norm_without_running_statistics_uses_the_batch() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1, track_running_stats=False), nn.ReLU())
    rows = torch.tensor([[1.0], [2.0], [11.0], [12.0]])
    assert apoz(model, [rows])[0].apoz == 0.5
    assert apoz(model, [rows[:3], rows[1:]])[0].apoz == 0.5  # 2 of 3, then 1 of 3


def test_apoz_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        apoz(nn.ReLU(), [])


def test_relu_without_channels_is_refused() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x.flatten())

    with pytest.raises(ValueError, match=r"ReLU in '' gives shape \(6,\); expected \(2, channels, \.\.\.\)"):
        apoz(Flat(), [torch.ones(2, 3)])


def test_changing_calls_are_refused() -> None:
    class Moody(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x) if len(x) > 1 else x

    with pytest.raises(ValueError, match="same ReLU calls on every batch"):
        apoz(Moody(), [torch.zeros(2, 1), torch.zeros(1, 1)])


# --- Which unit is which channel ---


@cache
def traced(name: str, shape: tuple[int, ...]) -> tuple[Layout, list[np.ndarray]]:
    factory = model_factory(name, 10, shape)
    layout = trace_layout(factory, shape)
    return layout, relu_units(factory, layout, shape)


def group_names(layout: Layout, units: Sequence[np.ndarray]) -> list[str]:
    """The layout group of each call, having checked that it holds all of it, in order."""
    names = {span: name for name, span in layout.groups.items()}
    return [names[range(call[0], call[-1] + 1)] for call in units if (np.diff(call) == 1).all()]


def test_chain_with_flattening() -> None:
    layout, units = traced("cnn", (1, 8, 8))
    assert group_names(layout, units) == ["conv1", "conv2", "conv3", "fc"]


def test_flattened_maps_and_layers_without_bias() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 1, bias=False)
            self.one = nn.Conv2d(3, 1, 1, bias=False)
            self.fc1 = nn.Linear(4, 5, bias=False)
            self.fc2 = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(F.relu(self.conv(x)))
            return self.fc2(F.relu(self.fc1(F.relu(x.flatten(1)))))  # type: ignore[no-any-return]

    layout = trace_layout(Net, (1, 2, 2))
    first, flat, last = relu_units(Net, layout, (1, 2, 2))
    assert first.tolist() == list(layout.groups["conv"])
    assert flat.tolist() == list(layout.groups["one"]) * 4
    assert last.tolist() == list(layout.groups["fc1"])


def test_residual_sums_share_units() -> None:
    layout, units = traced("resnet18", (3, 64, 64))
    names = group_names(layout, units)
    assert len(units) == 17
    assert len(set(names)) == 12  # four streams, eight inner widths
    assert names[0] == names[2] == names[4] == "conv1"
    assert names[1] == "layer1.0.conv1"
    assert names[6] == names[8] != names[10] == names[12]


def test_depthwise_layers_and_relu6() -> None:
    layout, units = traced("mobilenet_v2", (3, 32, 32))
    names = group_names(layout, units)
    assert len(names) == len(units) == 35
    assert names[0] == names[1]  # stem and the depthwise layer behind it
    assert names[2:-1:2] == names[3:-1:2]  # expansion and depthwise of each block
    assert len(set(names)) == 18


def test_concatenation() -> None:
    factory = model_factory("squeezenet1_1", 10, (3, 64, 64))
    layout = trace_layout(factory, (3, 64, 64))
    calls: list[str] = []
    with torch.no_grad(), ReluCalls(model := factory().eval(), lambda name, output: calls.append(name)):
        model(torch.zeros(1, 3, 64, 64))
    for name, units in zip(calls, relu_units(factory, layout, (3, 64, 64)), strict=True):
        conv = {"features.1": "features.0", "classifier.2": "classifier.1"}.get(name)
        conv = conv or name.replace("_activation", "")
        np.testing.assert_array_equal(units, layout.axes[f"{conv}.weight"][0])


class Dense(nn.Module):
    """Norm and ReLU behind a concatenation, a gate with its own ReLU, and two inputs of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(4, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(7, track_running_stats=False)
        self.conv3 = nn.Conv2d(7, 6, 1, bias=False)
        self.squeeze = nn.Conv2d(6, 2, 1)
        self.excite = nn.Conv2d(2, 6, 1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.conv3(F.relu(self.norm(torch.cat([x, self.conv2(x)], dim=1))))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = F.relu6(x * gate)
        return self.head(F.max_pool2d(x, 4).flatten(1))  # type: ignore[no-any-return]


def test_norm_behind_concatenation_and_gates() -> None:
    layout = trace_layout(Dense, (3, 4, 4))
    cat, squeeze, gated = relu_units(Dense, layout, (3, 4, 4))
    np.testing.assert_array_equal(cat, layout.axes["norm.weight"][0])
    np.testing.assert_array_equal(squeeze, layout.axes["squeeze.weight"][0])
    np.testing.assert_array_equal(gated, layout.axes["conv3.weight"][0])


def test_a_channel_that_is_no_single_unit_reads_as_none() -> None:
    class Mixed(nn.Module):
        """Sums channels of one group crosswise, and lets the input through a ReLU."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = F.relu(self.fc(F.relu(x)))
            return F.relu(hidden + hidden.flip(1))

    units = np.arange(4)
    layout = Layout(
        {"fc": range(4)},
        {"fc.weight": (units, None), "fc.bias": (units,)},
        {"fc.weight": (4, 2), "fc.bias": (4,)},
    )
    inputs, hidden, mixed = relu_units(Mixed, layout, (2,))
    assert inputs.tolist() == [-1, -1]
    assert hidden.tolist() == [0, 1, 2, 3]
    assert mixed.tolist() == [-1] * 4


def test_one_unit() -> None:
    factory = lambda: nn.Sequential(nn.Linear(2, 1), nn.ReLU())  # noqa: E731
    assert relu_units(factory, trace_layout(factory, (2,)), (2,))[0].tolist() == [0]


def test_finding_units_draws_nothing_and_spares_the_network() -> None:
    factory = model_factory("cnn", 10, (1, 8, 8))
    layout = trace_layout(factory, (1, 8, 8))
    state = torch.get_rng_state()
    relu_units(factory, layout, (1, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)


def test_agrees_with_silencing_a_unit_in_a_trained_network() -> None:
    """The slow oracle: zero one unit's entries, and see which channels are always silent."""
    factory = model_factory("resnet18", 10, (3, 32, 32))
    layout, units = traced("resnet18", (3, 32, 32))
    torch.manual_seed(0)
    arrays = {name: t.numpy() for name, t in factory().state_dict().items() if name in layout.shapes}
    for unit in (0, 200, 700):
        cut = {name: a.copy() for name, a in arrays.items()}
        for name, axes in layout.axes.items():
            for axis, numbers in enumerate(axes):
                if numbers is not None:
                    np.moveaxis(cut[name], axis, 0)[numbers == unit] = 0
        calls = apoz(narrow(factory, cut), [torch.randn(2, 3, 32, 32)])
        for call, numbers in zip(calls, units, strict=True):
            assert (call.apoz[numbers == unit] == 1).all()


# --- Scores of groups ---


def test_groups_of_a_network_without_a_table_are_measured_by_their_units() -> None:
    factory = model_factory("resnet18", 10, (3, 32, 32))
    layout, units = traced("resnet18", (3, 32, 32))
    groups = ratio_groups(layout, build_on_meta(factory))
    rng = np.random.default_rng(0)
    statistics = [ReluStatistics(f"relu{i}", rng.uniform(size=len(call))) for i, call in enumerate(units)]
    scores = dict(zip((g.name for g in groups), group_scores(statistics, units, layout, groups), strict=True))
    assert scores["conv1"] == pytest.approx(np.mean([statistics[i].apoz.mean() for i in (0, 2, 4)]))
    assert scores["layer1.0.conv1"] == pytest.approx(statistics[1].apoz.mean())


def test_a_units_calls_are_averaged_before_units() -> None:
    layout = Layout({"a": range(3)}, {"a.weight": (np.arange(3),)}, {"a.weight": (3,)})
    statistics = [
        ReluStatistics("x", np.array([0.2, 0.4])),
        ReluStatistics("y", np.array([0.8, 0.0, 1.0, 0.5])),
    ]
    units = [np.array([0, 1]), np.array([0, 2, 2, -1])]
    scores = group_scores(statistics, units, layout, [RatioGroup("a", ("a",), {"a": 1})])
    assert scores[0] == pytest.approx(np.mean([(0.2 + 0.8) / 2, 0.4, (0.0 + 1.0) / 2]))


def test_a_group_without_relu_takes_the_mean_of_the_others() -> None:
    statistics = [ReluStatistics("one.relu", np.array([0.2])), ReluStatistics("two", np.array([0.6, 0.8]))]
    groups = [RatioGroup(n, (n,), {"fc": 1}) for n in ("one", "two", "three", "tw")]
    layout = Layout({"fc": range(1)}, {"fc.weight": (np.arange(1),)}, {"fc.weight": (1,)})
    scores = group_scores(statistics, [np.array([-1]), np.array([-1, -1])], layout, groups)
    np.testing.assert_allclose(scores, [0.2, 0.7, 0.45, 0.45])


def test_no_relu_at_all_asks_for_scores() -> None:
    layout = Layout({"fc": range(1)}, {"fc.weight": (np.arange(1),)}, {"fc.weight": (1,)})
    with pytest.raises(ValueError, match=r"pass it as flexfl\.scores"):
        group_scores([], [], layout, [RatioGroup("fc", ("fc",), {"fc": 1})])


def test_statistics_and_units_of_different_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="of the same ReLU calls, got 0 and 1"):
        group_scores([ReluStatistics("x", np.zeros(2))], [], Layout({}, {}, {}), [])


@pytest.mark.parametrize(
    ("name", "relus"),
    [
        ("flexfl-resnet34", (1, 6, 8, 12, 6)),
        ("flexfl-mobilenetv2", (1, 2, 4, 6, 8, 6, 6, 2, 1)),
    ],
)
def test_the_papers_networks_count_the_relus_of_the_released_code(name: str, relus: tuple[int, ...]) -> None:
    factory = model_factory(name, 10, (3, 16, 16))
    layout = trace_layout(factory, (3, 16, 16))
    groups = ratio_groups(layout, build_on_meta(factory))
    calls: list[str] = []
    model = factory().eval()
    with torch.no_grad(), ReluCalls(model, lambda name, output: calls.append(name)):
        model(torch.zeros(2, 3, 16, 16))
    inside = [sum(call.startswith(f"{group.modules[0]}.") for call in calls) for group in groups]
    assert tuple(inside) == relus
    assert sum(inside) == len(calls)
