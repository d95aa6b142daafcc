from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flexfed.batchnorm import (
    BatchNormSums,
    Definition,
    add_sums,
    apply_statistics,
    collect_sums,
    norm_widths,
    pack_sums,
    static_batch_norm,
    statistics,
    unpack_sums,
)

DEFINITIONS: tuple[Definition, ...] = ("batches", "pooled")


def column(*values: float) -> Tensor:
    """A batch of one-channel inputs, (n, 1)."""
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1)


def network(track: bool = False, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4, track_running_stats=track),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.BatchNorm2d(6, track_running_stats=track),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 9, 3),
    )


def images(num: int = 24, seed: int = 0) -> Tensor:
    return torch.rand(num, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 3


def assert_sums_equal(a: BatchNormSums, b: BatchNormSums, rtol: float = 1e-12) -> None:
    assert a.definition == b.definition
    assert a.counts == b.counts
    for name in a.counts:
        np.testing.assert_allclose(a.first[name], b.first[name], rtol=rtol)
        np.testing.assert_allclose(a.second[name], b.second[name], rtol=rtol)


# Worked example H3 of the paper page.
@pytest.mark.parametrize(
    ("batches", "definition", "mean", "variance"),
    [
        ([column(1, 3), column(2, 6)], "batches", 3, 5),
        ([column(1, 3, 2, 6), column(10, 12)], "batches", 7, 10 / 3),
        ([column(1, 3, 2, 6), column(10, 12)], "pooled", 17 / 3, 20.26667),  # unbiased; 16.88889 biased
    ],
)
def test_statistics_of_the_worked_example(
    batches: list[Tensor], definition: Definition, mean: float, variance: float
) -> None:
    found = statistics(collect_sums(nn.BatchNorm1d(1), batches, definition))
    np.testing.assert_allclose(found[""], [[mean], [variance]], rtol=1e-6)


def test_batches_equals_the_cumulative_average_of_the_released_code() -> None:
    oracle = network(track=True)
    for layer in oracle.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    batches = images(26).split(8)  # the last one has 2
    with torch.no_grad():
        for batch in batches:
            oracle(batch)
    found = statistics(collect_sums(network(), batches))
    for name in ("1", "5"):
        layer = oracle.get_submodule(name)
        np.testing.assert_allclose(found[name][0], layer.running_mean, rtol=1e-4)
        np.testing.assert_allclose(found[name][1], layer.running_var, rtol=1e-4)


def test_pooled_moments_of_the_first_layer_do_not_depend_on_the_batches() -> None:
    model = network()
    with torch.no_grad():
        seen = model[0](images()).double()  # type: ignore[index]
    for size in (3, 8, 24):
        mean, variance = statistics(collect_sums(model, images().split(size), "pooled"))["1"]
        np.testing.assert_allclose(mean, seen.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(variance, seen.var((0, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_sums_of_clients_reproduce_the_run_over_all_their_batches(definition: Definition) -> None:
    model = network()
    batches = images().split(8)
    clients = [collect_sums(model, [batch], definition) for batch in batches]
    together = add_sums(add_sums(clients[2], clients[0]), clients[1])
    assert_sums_equal(together, collect_sums(model, batches, definition))


@pytest.mark.parametrize("track", [False, True])
def test_collecting_leaves_the_network_as_it_was(track: bool) -> None:
    model = network(track).train()
    model[3].eval()  # type: ignore[index]
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    collect_sums(model, images().split(8))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert model[1].track_running_stats is track  # type: ignore[index]


def test_collecting_restores_the_network_when_it_fails() -> None:
    model = network(track=True).train()
    with pytest.raises(RuntimeError):
        collect_sums(model, [torch.zeros(4, 2, 8, 8)])
    assert all(m.training and not m._forward_pre_hooks for m in model.modules())
    assert model[1].track_running_stats  # type: ignore[index]


def test_dropout_is_off() -> None:
    assert_sums_equal(collect_sums(network(dropout=0.9).train(), [images()]), collect_sums(network(), [images()]))


def test_batches_with_one_value_per_channel_are_skipped_as_a_whole() -> None:
    torch.manual_seed(0)
    # One image leaves many values to the first norm but only one to the second.
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    whole, single = images(8), images(1, seed=5)
    assert_sums_equal(collect_sums(model, [whole, single]), collect_sums(model, [whole]))
    assert collect_sums(model, [single]).counts == {"0": 0, "3": 0}


def test_no_usable_batch_is_an_error_but_a_client_without_one_is_not() -> None:
    model = nn.BatchNorm1d(2)
    nothing = collect_sums(model, [torch.ones(1, 2)])
    with pytest.raises(ValueError, match="expected a batch with two values per channel or more"):
        statistics(nothing)
    something = collect_sums(model, [images(4).reshape(-1, 2)])
    assert_sums_equal(add_sums(nothing, something), something)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d, (6, 3)),
        (nn.BatchNorm1d, (6, 3, 5)),
        (nn.BatchNorm2d, (6, 3, 4, 4)),
        (nn.BatchNorm3d, (6, 3, 2, 2, 2)),
    ],
)
@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("definition", DEFINITIONS)
def test_eval_mode_uses_the_statistics(
    layer: type[nn.BatchNorm2d], shape: tuple[int, ...], track: bool, definition: Definition
) -> None:
    torch.manual_seed(0)
    model = layer(3, track_running_stats=track).eval()
    inputs = torch.randn(shape) * 2 + 5
    static_batch_norm(model, [inputs], definition)
    axes = [a for a in range(inputs.dim()) if a != 1]
    variance, mean = torch.var_mean(inputs, axes, keepdim=True)
    expected = (inputs - mean) / (variance + model.eps).sqrt()
    torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(inputs[:1]), expected[:1], rtol=1e-4, atol=1e-5)  # not the batch's own
    assert model.running_mean is not None
    assert model.running_mean.dtype == torch.float32


def test_statistics_are_saved_with_the_network() -> None:
    model = network()
    static_batch_norm(model, [images()])
    assert {"1.running_mean", "1.running_var", "5.running_mean", "5.running_var"} <= model.state_dict().keys()


def test_layers_that_did_not_run_keep_what_they_had() -> None:
    class Training(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.auxiliary = nn.BatchNorm1d(1), nn.BatchNorm1d(1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.auxiliary(self.used(x)) if self.training else self.used(x)
            return out

    assert statistics(collect_sums(Training().train(), [column(1, 3)])).keys() == {"used"}


def test_networks_without_batch_norm_are_left_alone() -> None:
    model = nn.Linear(2, 2)
    sums = collect_sums(model, [torch.zeros(1, 2)])
    assert sums.counts == {}
    assert pack_sums(sums) == {}
    assert statistics(sums) == {}
    static_batch_norm(model, [torch.zeros(1, 2)])
    assert unpack_sums({}, norm_widths(model), "batches").counts == {}


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_unpack_undoes_pack(definition: Definition) -> None:
    model = network()
    sums = collect_sums(model, images().split(8), definition)
    packed = pack_sums(sums)
    assert {name: array.shape for name, array in packed.items()} == {"1": (9,), "5": (13,)}
    assert_sums_equal(unpack_sums(packed, norm_widths(model), definition), sums, rtol=0)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({}, r"expected batch norm sums of \['bn'\], got \[\]"),
        ({"other": np.ones(5)}, r"expected batch norm sums of \['bn'\], got \['other'\]"),
        (
            {"bn": np.ones(3)},
            r"expected float64 of shape \(5,\), for 2 channels, got float64 of shape \(3,\)",
        ),
        ({"bn": np.ones((5, 1))}, r"got float64 of shape \(5, 1\)"),
        ({"bn": np.ones(5, dtype=np.float32)}, "got float32"),
        ({"bn": np.array([1, np.nan, 0, 0, 0])}, "'bn' must be finite"),
        ({"bn": np.array([1, 0, 0, np.inf, 0])}, "'bn' must be finite"),
        ({"bn": np.array([-1.0, 0, 0, 0, 0])}, "count must be 0, 1, 2, ..., got -1.0"),
        ({"bn": np.array([0.5, 0, 0, 0, 0])}, "count must be 0, 1, 2, ..., got 0.5"),
        ({"bn": np.array([1.0, 0, 0, 0, -2])}, "variances and squares must be >= 0"),
    ],
)
def test_unpack_refuses_what_does_not_fit(arrays: dict[str, np.ndarray], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        unpack_sums(arrays, {"bn": 2}, "batches")


def test_sums_of_different_kinds_are_not_added() -> None:
    one, two = nn.BatchNorm1d(1), nn.BatchNorm1d(2)
    with pytest.raises(ValueError, match="cannot add sums of 'batches' and of 'pooled'"):
        add_sums(collect_sums(one, [], "batches"), collect_sums(one, [], "pooled"))
    with pytest.raises(ValueError, match="cannot add sums of different networks"):
        add_sums(collect_sums(one, []), collect_sums(two, []))
    with pytest.raises(ValueError, match="definition must be one of batches, pooled, got 'mean'"):
        collect_sums(one, [], "mean")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "channels", "match"),
    [("x", 4, "'x': expected no such layer"), ("1", 3, "'1': expected 4 channels")],
)
def test_apply_refuses_what_does_not_fit(name: str, channels: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        apply_statistics(network(), {name: (np.zeros(channels), np.ones(channels))})
