from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from toy import Decoder, Ties, random_arrays, random_units

from flexfed.narrowing import narrow
from flexfed.select import prefix_ratio
from flexfed.submodel import (
    Submodel,
    as_slice,
    compose,
    extract,
    flatten,
    full,
    narrow_shapes,
    pack,
    positions,
    take,
    unflatten,
    unpack,
    within,
)
from flexfed.units import Arrays, Layout, trace_layout, travelling


@pytest.fixture(scope="module")
def layout() -> Layout:
    return trace_layout(Ties, (1, 4, 4))


@pytest.fixture
def arrays(layout: Layout) -> Arrays:
    return random_arrays(layout, np.random.default_rng(0))


def part_of_ties(layout: Layout) -> Submodel:
    """stem 0, 2, 5; inner 1; side 0, 1; fc 2, 3, 4."""
    units = layout.fixed_units
    units[[0, 2, 5, 7, 11, 12, 17, 18, 19]] = True
    return Submodel(units)


# --- submodels --------------------------------------------------------------------------------------------------


def test_remembered_shapes_hold_no_masks(layout: Layout) -> None:
    """They are as large as the network."""
    units = full(layout).units
    name, shape = next(iter(layout.shapes.items()))
    masked = Submodel(units, masks={name: np.ones(shape, dtype=bool)})
    assert narrow_shapes(layout, masked) == dict(layout.shapes)
    gone = weakref.ref(masked)
    del masked
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("units", [np.ones(3), np.ones((2, 2), dtype=bool), np.ones(3, dtype=np.uint8)])
def test_units_are_a_bool_vector(units: np.ndarray) -> None:
    with pytest.raises(ValueError, match="units must be a bool vector, got"):
        Submodel(units)


def test_units_cannot_be_changed_afterwards(layout: Layout) -> None:
    with pytest.raises(ValueError, match="read-only"):
        full(layout).units[0] = False


def test_keys_of_equal_submodels_are_equal_and_others_differ(layout: Layout) -> None:
    a = part_of_ties(layout)
    assert a.key == Submodel(np.array(a.units)).key
    others = [full(layout), Submodel(a.units, frozenset()), Submodel(a.units, frozenset({"fc.bias"}))]
    assert len({a.key, *(other.key for other in others)}) == 4
    assert Submodel(a.units, frozenset("ab")).key == Submodel(a.units, frozenset("ba")).key


def test_within(layout: Layout) -> None:
    part, whole = part_of_ties(layout), full(layout)
    some = Submodel(whole.units, frozenset({"fc.bias"}))
    assert within(part, whole)
    assert within(part, part)
    assert not within(whole, part)
    assert within(some, whole)
    assert not within(whole, some)
    assert within(Submodel(part.units, frozenset()), some)


# --- parts ------------------------------------------------------------------------------------------------------


def test_rows_keep_every_column_and_weight_rows_every_vector(layout: Layout, arrays: Arrays) -> None:
    units = part_of_ties(layout).units
    rows, weights = Submodel(units, cut="rows"), Submodel(units, cut="weight-rows")
    kept = units[layout.axes["inner.weight"][0]]
    for submodel, bias in ((rows, arrays["inner.bias"][kept]), (weights, arrays["inner.bias"])):
        part = extract(layout, submodel, arrays)
        assert np.array_equal(part["inner.weight"], arrays["inner.weight"][kept])
        assert np.array_equal(part["inner.bias"], bias)
        assert unpack(layout, pack(submodel)) == submodel != Submodel(units)
    assert within(Submodel(units), rows)
    assert within(rows, weights)
    assert within(rows, full(layout))
    assert not within(rows, Submodel(units))
    assert not within(weights, rows)
    with pytest.raises(ValueError, match="cut of a submodel must be one of all, rows, weight-rows, got 'columns'"):
        unpack(layout, {**pack(rows), "cut": b"columns"})


def test_positions_and_shapes_of_a_part(layout: Layout) -> None:
    part = part_of_ties(layout)
    shapes = narrow_shapes(layout, part)
    assert shapes["stem.weight"] == (3, 1, 3, 3)
    assert shapes["back.weight"] == (3, 1, 1, 1)
    assert shapes["joined.weight"] == (5,)
    assert shapes["fc.weight"] == (3, 20)
    assert shapes["classifier.weight"] == (3, 3)
    rows, columns = positions(layout, part, "fc.weight")
    assert rows is not None
    assert columns is not None
    assert rows.tolist() == [2, 3, 4]
    assert columns[:8].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert positions(layout, part, "classifier.bias") == (None,)


def test_extract_is_indexing(layout: Layout, arrays: Arrays) -> None:
    part = extract(layout, part_of_ties(layout), {**arrays, "not.in.layout": np.zeros(3)})
    assert list(part) == list(layout.shapes)
    np.testing.assert_array_equal(part["back.weight"], arrays["back.weight"][[0, 2, 5]][:, [1]])
    np.testing.assert_array_equal(part["joined.bias"], arrays["joined.bias"][[0, 2, 5, 6, 7]])


def test_extract_keeps_named_tensors_and_masks_entries(layout: Layout, arrays: Arrays) -> None:
    keys = frozenset({"fc.bias", "classifier.bias"})
    mask = np.array([True, False, True])
    part = extract(layout, Submodel(full(layout).units, keys, {"classifier.bias": mask}), arrays)
    assert list(part) == ["fc.bias", "classifier.bias"]
    np.testing.assert_array_equal(part["classifier.bias"], arrays["classifier.bias"] * mask)
    assert part["classifier.bias"].dtype == np.float32


def test_runs_are_views_and_gaps_are_copies(layout: Layout, arrays: Arrays) -> None:
    run = extract(layout, prefix_ratio(layout, 0.5), arrays)
    assert np.shares_memory(run["side.weight"], arrays["side.weight"])
    gaps = extract(layout, part_of_ties(layout), arrays)
    assert not np.shares_memory(gaps["back.weight"], arrays["back.weight"])


@pytest.mark.parametrize(
    ("index", "expected"),
    [([2, 3, 4], slice(2, 5)), ([0], slice(0, 1)), ([], slice(0, 0)), ([1, 3], None), ([0, 1, 3], None)],
)
def test_as_slice(index: list[int], expected: slice | None) -> None:
    assert as_slice(np.array(index, dtype=np.int64)) == expected


def test_take_keeps_the_number_of_axes() -> None:
    array = np.arange(24).reshape(2, 3, 4)
    assert take(array, (None, None, None)) is array
    np.testing.assert_array_equal(take(array, (np.array([1]), np.array([0, 2]), None)), array[1:, [0, 2]])
    assert take(array, (np.array([], dtype=np.int64), None, None)).shape == (0, 3, 4)


def test_flatten_and_unflatten_undo_each_other(layout: Layout, arrays: Arrays) -> None:
    part = extract(layout, part_of_ties(layout), arrays)
    flat = flatten(layout, part_of_ties(layout), part)
    assert flat.dtype == np.float32
    assert flat.shape == (sum(array.size for array in part.values()),)
    back = unflatten(layout, part_of_ties(layout), flat)
    assert list(back) == list(part)
    assert all(np.array_equal(back[name], part[name]) for name in part)
    nothing = Submodel(full(layout).units, frozenset())
    assert unflatten(layout, nothing, flatten(layout, nothing, {})) == {}


def test_flat_parts_of_another_size_are_refused(layout: Layout, arrays: Arrays) -> None:
    part = part_of_ties(layout)
    with pytest.raises(ValueError, match=r"'stem.weight' of the part should have shape \(3, 1, 3, 3\), got \(6,"):
        flatten(layout, part, arrays)
    with pytest.raises(ValueError, match=r"'stem.weight' of the part should have shape .* got nothing"):
        flatten(layout, part, {})
    flat = flatten(layout, part, extract(layout, part, arrays))
    for wrong in (flat[:-1], np.append(flat, flat[:1]), flat.reshape(1, -1)):
        with pytest.raises(ValueError, match=f"a flat part of {len(flat)} numbers is expected"):
            unflatten(layout, part, wrong)


def test_compose_refuses_what_does_not_fit(layout: Layout) -> None:
    outer = part_of_ties(layout)
    kept = int(outer.units.sum())
    with pytest.raises(ValueError, match=f"speak of the {kept} units of outer, got 25"):
        compose(outer, full(layout))
    everything = np.ones(kept, dtype=bool)
    few = Submodel(outer.units, frozenset({"fc.bias"}))
    with pytest.raises(ValueError, match=r"names tensors outer lacks: \['fc.weight'\]"):
        compose(few, Submodel(everything, frozenset({"fc.weight"})))
    assert compose(few, Submodel(everything)).keys == few.keys
    masked = Submodel(everything, masks={"fc.bias": np.ones(3, dtype=bool)})
    with pytest.raises(ValueError, match="masks of single entries cannot be composed"):
        compose(outer, masked)


# --- bits -------------------------------------------------------------------------------------------------------


def test_packed_units_are_one_bit_each(layout: Layout) -> None:
    packed = pack(part_of_ties(layout))
    assert packed.keys() == {"units"}
    assert len(packed["units"]) == 4  # 25 bits


def test_unpack_refuses_what_is_no_submodel(layout: Layout) -> None:
    good = pack(full(layout))["units"]
    cases: list[tuple[dict[str, bytes], str]] = [
        ({}, r"units of a submodel should be 4 bytes \(25 bits\), got 0"),
        ({"units": good[:-1]}, "should be 4 bytes .* got 3"),
        ({"units": good + b"\0"}, "should be 4 bytes .* got 5"),
        ({"units": good[:-1] + b"\xff"}, r"bits set behind its last one \(25\)"),
        ({"units": good, "keys": b"fc.bias\nfc.mean"}, r"unknown tensors: \['fc.mean'\]"),
        ({"units": good, "keys": b"\xff\xfe"}, "unknown tensors"),
        ({"units": good, "mask:fc.mean": b""}, "masks an unknown tensor: 'fc.mean'"),
        ({"units": good, "keys": b"fc.bias", "mask:fc.weight": b""}, "masks an unknown tensor: 'fc.weight'"),
        ({"units": good, "mask:fc.bias": b"\0\0"}, r"mask:fc.bias of a submodel should be 1 bytes \(7 bits\)"),
        ({"units": good, "mask:fc.bias": b"\xff"}, "bits set behind its last one"),
    ]
    for packed, message in cases:
        with pytest.raises(ValueError, match=message):
            unpack(layout, packed)


# --- narrow -----------------------------------------------------------------------------------------------------


def state(model: nn.Module) -> Arrays:
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def test_narrow_of_everything_is_the_network_itself() -> None:
    for factory, shape in ((Ties, (1, 4, 4)), (Decoder, (2, 3, 3))):
        torch.manual_seed(0)
        model = factory()
        with torch.no_grad():
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.uniform_(0.5, 2)
        again = narrow(factory, state(model))
        again.load_state_dict(model.state_dict(), strict=True)
        inputs = torch.randn(3, *shape)
        assert torch.equal(again.eval()(inputs), model.eval()(inputs))


def test_narrow_sets_every_count(layout: Layout, arrays: Arrays) -> None:
    model = narrow(Ties, extract(layout, part_of_ties(layout), arrays))
    assert isinstance(model, Ties)
    assert (model.back.in_channels, model.back.out_channels) == (1, 3)
    assert (model.depthwise.groups, model.depthwise.in_channels, model.depthwise.out_channels) == (3, 3, 3)
    assert (model.fc.in_features, model.fc.out_features) == (20, 3)
    assert model.joined.num_features == 5
    assert repr(model.side) == "Conv2d(3, 2, kernel_size=(1, 1), stride=(1, 1))"
    assert model(torch.randn(2, 1, 4, 4)).shape == (2, 3)


def test_a_narrow_depthwise_layer_of_one_channel() -> None:
    layout = trace_layout(Ties, (1, 4, 4))
    units = layout.fixed_units
    units[[3, 6, 11, 15]] = True
    model = narrow(Ties, extract(layout, Submodel(units), random_arrays(layout, np.random.default_rng(0))))
    assert model(torch.randn(2, 1, 4, 4)).shape == (2, 3)
    assert model.depthwise.groups == 1


def test_narrow_transposed_convolutions() -> None:
    layout = trace_layout(Decoder, (2, 3, 3))
    part = Submodel(random_units(layout, np.random.default_rng(0), 0.5))
    model = narrow(Decoder, extract(layout, part, random_arrays(layout, np.random.default_rng(0))))
    assert isinstance(model, Decoder)
    assert (model.up.in_channels, model.up.out_channels) == (4, 3)
    assert model(torch.randn(2, 2, 3, 3)).shape == (2, 5, 12, 12)


def test_narrow_networks_train(layout: Layout, arrays: Arrays) -> None:
    model = narrow(Ties, extract(layout, part_of_ties(layout), arrays))
    model(torch.randn(4, 1, 4, 4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_narrow_copies(layout: Layout, arrays: Arrays) -> None:
    before = {name: array.copy() for name, array in arrays.items()}
    model = narrow(Ties, extract(layout, prefix_ratio(layout, 0.5), arrays))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9)
    assert all(np.array_equal(arrays[name], before[name]) for name in arrays)


def test_narrow_takes_arrays_that_cannot_be_written(layout: Layout, arrays: Arrays) -> None:
    for array in arrays.values():
        array.flags.writeable = False
    narrow(Ties, arrays)  # no warning


def test_narrow_networks_begin_with_fresh_statistics_or_those_given(layout: Layout, arrays: Arrays) -> None:
    part = extract(layout, part_of_ties(layout), arrays)
    fresh = narrow(Ties, part)
    assert all(
        torch.equal(norm.running_mean, torch.zeros(norm.num_features))
        and torch.equal(norm.running_var, torch.ones(norm.num_features))
        and norm.num_batches_tracked == 0
        for norm in fresh.modules()
        if isinstance(norm, _BatchNorm)
    )
    mean = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    given = narrow(Ties, {**part, "norm.running_mean": mean})
    assert isinstance(given, Ties)
    assert given.norm.running_mean is not None
    assert given.norm.running_mean.tolist() == [1, 2, 3]
    assert given.norm.running_var is not None
    assert given.norm.running_var.tolist() == [1, 1, 1]


def test_frozen_parameters_stay_frozen(layout: Layout, arrays: Arrays) -> None:
    def frozen() -> nn.Module:
        model = Ties()
        model.stem.requires_grad_(False)
        return model

    model = narrow(frozen, extract(layout, part_of_ties(layout), arrays))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(travelling(Ties())) - {"stem.weight", "stem.bias"}


def test_narrow_names_tensors_that_do_not_fit(layout: Layout, arrays: Arrays) -> None:
    with pytest.raises(ValueError, match=r"do not fit the network Ties: unknown \['fc.mean'\], missing \[\]"):
        narrow(Ties, {**arrays, "fc.mean": np.zeros(3, dtype=np.float32)})
    with pytest.raises(ValueError, match=r"missing \['fc.bias'\]"):
        narrow(Ties, {name: array for name, array in arrays.items() if name != "fc.bias"})


class Unsaved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.register_buffer("gain", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.gain


def test_narrow_names_buffers_whose_values_would_be_lost() -> None:
    with pytest.raises(ValueError, match="buffer 'gain' is not part of the state dict"):
        narrow(Unsaved, state(Unsaved()))


def test_a_weak_device_never_holds_the_full_network() -> None:
    def huge() -> nn.Module:  # 160 GB
        return nn.Sequential(nn.Linear(4, 200_000), nn.ReLU(), nn.Linear(200_000, 200_000), nn.Linear(200_000, 2))

    widths = {
        "0.weight": (3, 4),
        "0.bias": (3,),
        "2.weight": (5, 3),
        "2.bias": (5,),
        "3.weight": (2, 5),
        "3.bias": (2,),
    }
    model = narrow(huge, {name: np.ones(shape, dtype=np.float32) for name, shape in widths.items()})
    assert model(torch.randn(2, 4)).shape == (2, 2)
