"""FedLPS's cost: every figure of the worked example (MNIST, batches of 32), laws, and torch's own count."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy import Decoder, Ties, by_hand, random_units

from flexfed.cost import forward_macs
from flexfed.methods.fedlps_cost import (
    download_bits_dense,
    flops_nnz,
    flops_structural,
    mask_bits,
    round_flops,
    training_flops,
    upload_bits_row_sparse,
    upload_bits_structural,
)
from flexfed.models import model_factory
from flexfed.models.fedlps import fedlps_cnn
from flexfed.networks import Factory
from flexfed.select import prefix_ratio, top
from flexfed.submodel import Submodel, full
from flexfed.units import Layout, trace_layout

MNIST = (1, 28, 28)
CNN: Factory = partial(fedlps_cnn, 10, MNIST)
BATCH = 32


@pytest.fixture(scope="module")
def layout() -> Layout:
    return trace_layout(CNN, MNIST)


def kept(layout: Layout, ratio: float) -> Submodel:
    """Floor of the ratio of every layer's units; which of them, chance says."""
    return top(layout, np.random.default_rng(5).standard_normal(layout.num_units), ratio, "floor")


# --- the worked example of FedLPS's page, 6.9 -------------------------------------------------------------------

DENSE = {"conv1": 9_400_320, "conv2": 20_520_960, "fc1": 1_025_600, "fc2": 32_320}


@pytest.mark.parametrize("count", [flops_nnz, flops_structural])
def test_the_dense_network(count: Callable[..., dict[str, int]], layout: Layout) -> None:
    found = count(CNN, layout, full(layout), MNIST, BATCH)
    assert found == DENSE
    assert list(found) == list(DENSE)
    assert sum(found.values()) == 30_979_200


def test_a_round_of_the_dense_network() -> None:
    assert training_flops(30_979_200) * 30 == 2_788_128_000
    assert round_flops(30_979_200, num_examples=180, batch_size=32, local_epochs=5) == 2_788_128_000
    assert round_flops(1, 192, 32, 5) == round_flops(1, 161, 32, 5) == 90
    assert round_flops(1, 193, 32, 5) == 105


@pytest.mark.parametrize(
    ("ratio", "units", "nnz", "structural", "sent", "sent_with_masked_biases", "sent_structural"),
    [
        (1.0, (10, 20, 50), 30_979_200, 30_979_200, 21_840, 21_840, 21_840),
        (0.5, (5, 10, 25), 15_619_200, 10_113_760, 11_215, 11_175, 5_675),
        (0.25, (2, 5, 12), 7_468_160, 2_984_128, 5_730, 5_669, 1_409),
    ],
)
def test_sparse_networks(
    ratio: float,
    units: tuple[int, ...],
    nnz: int,
    structural: int,
    sent: int,
    sent_with_masked_biases: int,
    sent_structural: int,
    layout: Layout,
) -> None:
    for part in (kept(layout, ratio), prefix_ratio(layout, ratio, "floor")):
        spans = (layout.groups[name] for name in ("conv1", "conv2", "fc1"))
        assert tuple(int(part.units[span.start : span.stop].sum()) for span in spans) == units
        assert sum(flops_nnz(CNN, layout, part, MNIST, BATCH).values()) == nnz
        assert sum(flops_structural(CNN, layout, part, MNIST, BATCH).values()) == structural
        assert upload_bits_row_sparse(layout, part, mask_bias=False, bitmap=False) == 32 * sent
        assert upload_bits_row_sparse(layout, part) == 32 * sent_with_masked_biases + 80
        assert upload_bits_structural(layout, part) == 32 * sent_structural + 80
        assert upload_bits_structural(layout, part, bitmap=False) == 32 * sent_structural


def test_dense_download_and_mask(layout: Layout) -> None:
    assert download_bits_dense(layout) == 32 * 21_840
    assert mask_bits(layout) == 10 + 20 + 50


def test_masks_cost_one_operation_a_unit_and_batch(layout: Layout) -> None:
    part = kept(layout, 0.5)
    for batch in (1, BATCH):
        bare = flops_nnz(CNN, layout, part, MNIST, batch)
        masked = flops_nnz(CNN, layout, part, MNIST, batch, mask_overhead=True)
        assert {name: masked[name] - bare[name] for name in bare} == {"conv1": 10, "conv2": 20, "fc1": 50, "fc2": 0}


# --- any network ------------------------------------------------------------------------------------------------


class Positions(nn.Module):
    """A linear layer that is used at every position, and twice; a strided convolution; (5, 8) in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 6, 3, stride=2, bias=False)
        self.mix = nn.Linear(3, 3)
        self.out = nn.Linear(18, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(self.mix(self.conv(x))).flatten(1))


NETWORKS: dict[str, tuple[Factory, tuple[int, ...]]] = {
    "fedlps-cnn": (CNN, MNIST),
    "fedlps-vgg11": (model_factory("fedlps-vgg11", 10, (3, 32, 32)), (3, 32, 32)),
    "ties": (Ties, (1, 4, 4)),
    "decoder": (Decoder, (2, 3, 3)),
}


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.3])
def test_without_biases_it_is_twice_the_multiply_accumulates(name: str, ratio: float) -> None:
    factory, shape = NETWORKS[name]
    layout, bare = trace_layout(factory, shape), trace_layout(_without_biases(factory), shape)
    part = kept(layout, ratio)
    found = sum(flops_structural(_without_biases(factory), bare, part, shape, 7).values())
    assert found == 2 * 7 * forward_macs(factory, layout, part, shape)
    assert found < sum(flops_structural(factory, layout, part, shape, 7).values())


def _without_biases(factory: Factory) -> Factory:
    """The same network, its convolutions and linear layers without a bias."""

    def build() -> nn.Module:
        model = factory()
        for module in model.modules():
            if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
                module.bias = None
        return model

    return build


def test_layers_that_are_used_at_many_places_count_there() -> None:
    """By hand: 3 outputs a row from 8 inputs; `mix` works on 6 rows of 3, twice; nothing is cut."""
    units = {"conv": range(0, 6), "mix": range(6, 9), "out": range(9, 13)}
    layout = Layout(
        groups=units,
        axes={
            "conv.weight": (np.arange(6), None, None),
            "mix.weight": (np.arange(6, 9), None),
            "mix.bias": (np.arange(6, 9),),
            "out.weight": (np.arange(9, 13), np.repeat(np.arange(6), 3)),
            "out.bias": (np.arange(9, 13),),
        },
        shapes={
            "conv.weight": (6, 5, 3),
            "mix.weight": (3, 3),
            "mix.bias": (3,),
            "out.weight": (4, 18),
            "out.bias": (4,),
        },
        fixed=frozenset({"mix", "out"}),
    )
    expected = {"conv": 2 * (2 * 90 * 3), "mix": 2 * 12 * (2 * 9 + 3), "out": 2 * (2 * 72 + 4)}
    assert flops_nnz(Positions, layout, full(layout), (5, 8), 2) == expected
    half = Submodel(np.array([True, False] * 3 + [True] * 7))
    assert flops_nnz(Positions, layout, half, (5, 8), 2) == {**expected, "conv": expected["conv"] // 2}


def test_a_transposed_convolution_uses_its_weight_once_an_input_place_and_its_bias_once_an_output_place() -> None:
    layout = trace_layout(Decoder, (2, 3, 3))
    units = np.ones(layout.num_units, dtype=bool)
    units[layout.groups["up"].start] = False  # 5 of 6 rows; rows are on the second axis
    found = flops_nnz(Decoder, layout, Submodel(units), (2, 3, 3), 1)
    assert found == {
        "encode": 9 * (2 * 8 * 2 * 9 + 8),
        "up": 9 * 2 * 8 * 5 * 4 + 36 * 6,
        "out": 36 * 2 * 6 * 5 * 4 + 144 * 5,
    }


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_costs_do_not_fall_as_units_are_added(name: str) -> None:
    factory, shape = NETWORKS[name]
    layout = trace_layout(factory, shape)
    rng = np.random.default_rng(1)
    for _ in range(5):
        units = random_units(layout, rng)
        less, more = Submodel(units), Submodel(units | (rng.random(layout.num_units) < 0.3))
        for count in (flops_nnz, flops_structural):
            one, other = (count(factory, layout, part, shape, 3) for part in (less, more))
            assert all(one[layer] <= other[layer] for layer in one)
        assert upload_bits_structural(layout, less) <= upload_bits_row_sparse(layout, less)
        assert upload_bits_row_sparse(layout, less) <= upload_bits_row_sparse(layout, less, mask_bias=False)
        assert upload_bits_row_sparse(layout, more, False, False) <= download_bits_dense(layout)
        assert sum(flops_structural(factory, layout, less, shape, 3).values()) <= sum(
            flops_nnz(factory, layout, less, shape, 3).values()
        )


def test_how_a_submodel_travels_does_not_matter(layout: Layout) -> None:
    part = kept(layout, 0.5)
    rows = Submodel(part.units, cut="rows")
    assert flops_structural(CNN, layout, rows, MNIST, 8) == flops_structural(CNN, layout, part, MNIST, 8)
    assert upload_bits_structural(layout, rows) == upload_bits_structural(layout, part)


def test_submodels_of_more_than_units_are_refused(layout: Layout) -> None:
    part = kept(layout, 0.5)
    masks = {"fc1.weight": np.ones((25, 160), dtype=bool)}
    for wrong in (Submodel(part.units, frozenset({"conv1.weight"})), Submodel(part.units, masks=masks)):
        for count in (flops_nnz, flops_structural):
            with pytest.raises(ValueError, match="expected one without keys and masks"):
                count(CNN, layout, wrong, MNIST, 8)
        with pytest.raises(ValueError, match="expected one without keys and masks"):
            upload_bits_structural(layout, wrong)


class Recurrent(nn.Module):
    """Words, looked up, through an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.lstm(self.words(x.long()))[0])


def test_layers_that_would_be_missing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"module 'lstm' \(LSTM\) is not counted.*knows convolutions, linear"):
        flops_nnz(Recurrent, Layout({}, {}, {}), Submodel(np.zeros(0, dtype=bool)), (3,), 2)


def test_a_layout_by_hand_has_bits_too() -> None:
    layout = by_hand()
    units = np.ones(layout.num_units, dtype=bool)
    units[:2] = False  # of a, which is no first axis
    units[5] = False  # of b
    assert download_bits_dense(layout) == 32 * (1 + 6 + 35 + 60 + 4 + 27)
    assert upload_bits_row_sparse(layout, Submodel(units)) == 32 * (1 + 6 + 35 + 45 + 3 + 27) + 9
    assert upload_bits_row_sparse(layout, Submodel(units), mask_bias=False) == 32 * (1 + 6 + 35 + 45 + 4 + 27) + 9
    assert upload_bits_structural(layout, Submodel(units)) == 32 * (1 + 6 + 21 + 27 + 3 + 18) + 9
