from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy import Decoder, Ties, by_hand

from flexfed.models import model_factory
from flexfed.units import Layout, trace_layout, travelling


@pytest.fixture(scope="module")
def layout() -> Layout:
    return trace_layout(Ties, (1, 4, 4))


# --- the numbering ----------------------------------------------------------------------------------------------


def test_groups_are_the_tied_channels_in_state_dict_order(layout: Layout) -> None:
    assert dict(layout.groups) == {
        "stem": range(0, 6),  # with norm, back and depthwise: the residual sum ties them
        "inner": range(6, 11),
        "side": range(11, 15),
        "fc": range(15, 22),
        "classifier": range(22, 25),
    }
    assert layout.num_units == 25
    assert layout.fixed == {"classifier"}
    assert np.flatnonzero(layout.fixed_units).tolist() == [22, 23, 24]


def test_tensors_are_those_that_travel_in_wire_order(layout: Layout) -> None:
    assert list(layout.shapes) == list(travelling(Ties()))
    assert "norm.running_mean" not in layout.shapes
    assert "norm.num_batches_tracked" not in layout.shapes
    assert all(tuple(t.shape) == layout.shapes[name] for name, t in travelling(Ties()).items())


def expect(layout: Layout, tensor: str, *axes: Any) -> None:
    got = [None if units is None else units.tolist() for units in layout.axes[tensor]]
    assert got == [None if units is None else list(units) for units in axes]


def test_axes_say_which_unit_stands_where(layout: Layout) -> None:
    stem, inner, side, fc = range(0, 6), range(6, 11), range(11, 15), range(15, 22)
    expect(layout, "stem.weight", stem, None, None, None)  # image channels are no units
    expect(layout, "norm.bias", stem)
    expect(layout, "back.weight", stem, inner, None, None)
    expect(layout, "depthwise.weight", stem, None, None, None)
    expect(layout, "side.weight", side, stem, None, None)
    expect(layout, "joined.weight", [*stem, *side])  # behind the concatenation
    expect(layout, "fc.weight", fc, np.repeat([*stem, *side], 4))  # behind the flatten
    expect(layout, "classifier.weight", range(22, 25), fc)


def test_transposed_convolutions_have_their_outputs_on_the_second_axis() -> None:
    layout = trace_layout(Decoder, (2, 3, 3))
    assert list(layout.groups) == ["encode", "up", "out"]
    assert layout.fixed == {"out"}
    expect(layout, "up.weight", range(0, 8), range(8, 14), None, None)
    expect(layout, "up.bias", range(8, 14))


def test_groups_of_an_axis(layout: Layout) -> None:
    assert layout.groups_of("joined.weight") == ("stem", "side")
    assert layout.groups_of("fc.weight", 1) == ("stem", "side")
    assert layout.group_of("fc.weight") == "fc"
    assert layout.group_of("stem.weight", 1) == layout.group_of("stem.bias", 1) == ""
    with pytest.raises(ValueError, match=r"axis 0 of 'joined.weight' holds several groups: stem, side"):
        layout.group_of("joined.weight")
    with pytest.raises(ValueError, match=r"no tensor 'stem' in this layout; it has stem.weight"):
        layout.group_of("stem")


def test_tracing_is_repeatable() -> None:
    one, other = (trace_layout(model_factory("mobilenet_v3_small", 10, (3, 32, 32)), (3, 32, 32)) for _ in range(2))
    assert one.groups == other.groups
    for name, axes in one.axes.items():
        for a, b in zip(axes, other.axes[name], strict=True):
            assert (a is None and b is None) or np.array_equal(a, b)


def test_tracing_draws_nothing() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    trace_layout(Ties, (1, 4, 4))
    assert torch.equal(before, torch.get_rng_state())


def test_a_network_larger_than_memory_is_traced() -> None:
    def huge() -> nn.Module:
        return nn.Sequential(
            nn.Linear(4, 60_000), nn.ReLU(), nn.Linear(60_000, 60_000), nn.ReLU(), nn.Linear(60_000, 2)
        )

    layout = trace_layout(huge, (4,))
    assert layout.shapes["2.weight"] == (60_000, 60_000)
    assert layout.num_units == 120_002


class ReadsValues(nn.Module):
    """Cannot be built on meta, like networks with a schedule of drop rates."""

    def __init__(self) -> None:
        super().__init__()
        widths = [int(width) for width in torch.linspace(4, 6, 2).tolist()]
        self.first, self.second = nn.Linear(3, widths[0]), nn.Linear(widths[0], widths[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_a_network_that_reads_values_while_it_is_built() -> None:
    assert trace_layout(ReadsValues, (3,)).groups == {"first": range(0, 4), "second": range(4, 10)}


# --- by hand ----------------------------------------------------------------------------------------------------


class ByHand(nn.Module):
    """Groups of channels that no tracer follows; the layout says that only the last layer's input may be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.norm = nn.GroupNorm(2, 8)
        self.fc = nn.Linear(8, 3)
        self.layout = Layout(
            groups={"fc": range(0, 3)},
            axes={
                "grouped.weight": (None,) * 4,
                "grouped.bias": (None,),
                "norm.weight": (None,),
                "norm.bias": (None,),
                "fc.weight": (np.arange(3), None),
                "fc.bias": (np.arange(3),),
            },
            shapes={name: tuple(t.shape) for name, t in self.state_dict().items()},
            fixed=frozenset({"fc"}),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.grouped(x)).relu().mean((2, 3)))


def test_a_layout_written_by_hand_is_used() -> None:
    layout = trace_layout(ByHand, (4, 6, 6))
    assert layout.groups == {"fc": range(0, 3)}
    assert list(layout.shapes) == list(ByHand().state_dict())


def test_a_layout_refuses_what_does_not_fit_together() -> None:
    with pytest.raises(ValueError, match=r"groups must number their units 0, 1, 2, \.\.\. without gaps"):
        Layout({"a": range(0, 3), "b": range(4, 5)}, {}, {})
    with pytest.raises(ValueError, match="without gaps"):
        Layout({"a": range(1, 3)}, {}, {})
    for axes in ((), (None,), (np.arange(3), None), (np.arange(2), np.arange(2))):
        with pytest.raises(ValueError, match=r"axes of 'w' do not fit its shape \(2, 3\)"):
            Layout({"a": range(0, 3)}, {"w": axes}, {"w": (2, 3)})
    with pytest.raises(ValueError, match="axes of 'w' do not fit"):
        Layout({"a": range(0, 3)}, {}, {"w": (2, 3)})
    assert by_hand().num_units == 12


# --- what cannot be cut -----------------------------------------------------------------------------------------


class Body(nn.Module):
    """A convolution, something in the middle, a classifier; (1, 8, 8) in."""

    def __init__(self, *middle: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *middle)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


class Gain(nn.Module):
    """Multiplies by a buffer."""

    def __init__(self, value: Tensor, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("gain", value, persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Scale(nn.Module):
    """Multiplies by a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class WrittenView(nn.Module):
    """A size written into the code: half as many channels make half as many samples."""

    def __init__(self, reshape: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.fc = nn.Linear(512, 3)
        self.reshape = reshape

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.reshape(self.conv(x)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(self.one(x)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(4, 8, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.cells(x)[0][:, -1])


UNCUTTABLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "regnet": (model_factory("regnet_y_400mf", 10, (3, 64, 64)), (3, 64, 64), r"trunk_output\.block1\.\S+ \(Conv2d"),
    "shufflenet": (model_factory("shufflenet_v2_x0_5", 10, (3, 64, 64)), (3, 64, 64), r"'stage2"),
    "group norm": (lambda: Body(nn.GroupNorm(2, 8)), (1, 8, 8), r"'body\.1' \(GroupNorm\).*use batch norm"),
    "layer norm": (lambda: Body(nn.LayerNorm([8, 8])), (1, 8, 8), r"'body\.1' \(LayerNorm\)"),
    "grouped convolution": (lambda: Body(nn.Conv2d(8, 8, 1, groups=2)), (1, 8, 8), r"'body\.1' .*groups=2"),
    "depthwise with a multiple": (
        lambda: Body(nn.Conv2d(8, 16, 1, groups=8), nn.Conv2d(16, 8, 1)),
        (1, 8, 8),
        r"'body\.1' .*groups=8",
    ),
    "shared parameters": (Tied, (6,), r"'two\.weight' and 'one\.weight' are one shared parameter"),
    "recurrent": (Recurrent, (5, 4), r"'cells'"),
    "size in view": (
        lambda: WrittenView(lambda x: x.view(-1, 512)),
        (1, 8, 8),
        r"'fc' cannot be cut: at half width it fails",
    ),
    "channels in view": (lambda: WrittenView(lambda x: x.view(-1, 8, 64).flatten(1)), (1, 8, 8), r"'(fc|conv)"),
    "a parameter of its own": (lambda: Body(Scale()), (1, 8, 8), r"body\.1"),
    "a buffer of channels": (lambda: Body(Gain(torch.ones(8, 1, 1))), (1, 8, 8), r"body\.1"),
    "a buffer that is not saved": (lambda: Body(Gain(torch.ones(()), persistent=False)), (1, 8, 8), r"body\.1\.gain"),
    "a buffer of integers": (lambda: Body(Gain(torch.tensor(2))), (1, 8, 8), r"body\.1\.gain"),
}


MIXING: dict[str, Callable[[], nn.Module]] = {
    "channel shuffle": lambda: nn.ChannelShuffle(2),
    "gated halves": lambda: nn.Sequential(nn.Conv2d(8, 16, 1), nn.GLU(1)),
    "pixel shuffle": lambda: nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(2, 8, 1)),
    "response norm": lambda: nn.LocalResponseNorm(3),
    "softmax of channels": lambda: nn.Softmax2d(),
}


class StillTracingError(BaseException):
    """No Exception, so that the tracer does not take it for its own failure."""


@pytest.fixture
def impatient() -> Iterator[None]:
    """An error after three seconds: a tracer that hangs must not hang the tests."""

    def give_up(*_: Any) -> None:
        raise StillTracingError("still tracing after three seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 3)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kind", list(MIXING))
def test_layers_that_mix_channels_are_refused_and_named(kind: str) -> None:
    with pytest.raises(ValueError, match=r"body\.1"):
        trace_layout(lambda: Body(MIXING[kind]()), (1, 8, 8))


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
@pytest.mark.parametrize("kind", list(UNCUTTABLE))
def test_what_cannot_be_cut_is_refused_before_training_and_named(kind: str) -> None:
    factory, shape, named = UNCUTTABLE[kind]
    with pytest.raises(ValueError, match=named) as caught:
        trace_layout(factory, shape)
    assert "layout" in str(caught.value)  # the way out


@pytest.mark.filterwarnings("ignore:input's size at dim=1")
@pytest.mark.parametrize(
    "middle",
    [
        lambda: nn.PReLU(8),
        lambda: nn.PReLU(),
        lambda: nn.InstanceNorm2d(8),
        lambda: nn.InstanceNorm2d(8, affine=True),
        lambda: nn.BatchNorm2d(8, affine=False),
        lambda: Gain(torch.ones(1)),
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Hardswish(), nn.Dropout()),
    ],
    ids=[
        "prelu of channels",
        "prelu",
        "instance norm",
        "affine instance norm",
        "norm without affine",
        "gain",
        "depthwise",
    ],
)
def test_less_common_layers_are_traced_or_named(middle: Callable[[], nn.Module]) -> None:
    message = "'body.1"
    try:
        trace_layout(lambda: Body(middle()), (1, 8, 8))
    except ValueError as error:
        message = str(error)
    assert "'body.1" in message


def test_a_scalar_buffer_travels_whole() -> None:
    layout = trace_layout(lambda: Body(Gain(torch.tensor(2.0))), (1, 8, 8))
    assert layout.shapes["body.1.gain"] == ()
    assert layout.axes["body.1.gain"] == ()
