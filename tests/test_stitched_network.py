"""The stitched network as a module: equal to the path it was made from, in a file, by its name, and cut narrower."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path as FilePath

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flexfed.models import build_model, check_model, input_convention, load_weights, model_factory
from flexfed.networks import travelling
from flexfed.soundness import check_parts
from flexfed.stitching import shelf, zoos
from flexfed.stitching.blocks import Pool, make_pool
from flexfed.stitching.network import (
    Stitched,
    bridge_positions,
    build_stitched,
    check_ids,
    fill,
    parse_name,
    stitched_arrays,
    stitched_name,
    stitched_on_meta,
)
from flexfed.stitching.path import Bridge, Path, features, pooled
from flexfed.stitching.saved import load_stitched, read_recipe, save_stitched
from flexfed.stitching.shapes import Pretraining, shapes_network
from flexfed.stitching.sources import Source
from flexfed.units import trace_layout

RGB, GREY = (3, 24, 24), (1, 28, 28)
CLASSES = ("a", "b", "c", "d", "e")
NORMALISATION = ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
MIXED = ((0, 5, 10, 11), (4, 1, 6, 11), (8, 9, 2, 7), (0, 6), (8,), (0, 1, 7), (4, 5, 6, 3))
WHOLE = ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11))


@pytest.fixture(scope="session")
def zoo_home(tmp_path_factory: pytest.TempPathFactory) -> FilePath:
    return tmp_path_factory.mktemp("zoos")


@pytest.fixture(autouse=True)
def quick(zoo_home: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zoo that is trained in a second."""
    monkeypatch.setattr(zoos, "Pretraining", lambda: Pretraining(per_class=8, epochs=1))
    monkeypatch.setenv(shelf.FOLDER_VARIABLE, str(zoo_home))


def some_path(pool: Pool, ids: Sequence[int], num_classes: int = len(CLASSES)) -> tuple[Path, np.ndarray]:
    """A path with random bridges where it needs them, and a random head."""
    rng = np.random.default_rng(0)
    path = Path()
    for position, block in enumerate(ids):
        bridge = None
        if path.needs_bridge(pool, block):
            shape = pool.blocks[block].shape_in[0], pool.blocks[ids[position - 1]].shape_out[0]
            bridge = Bridge(*(rng.normal(0, 0.3, s).astype(np.float32) for s in (shape, shape[:1])))
        path = path.then(block, bridge)
    return path, rng.normal(size=(pool.blocks[ids[-1]].shape_out[0] + 1, num_classes))


def by_hand(pool: Pool, path: Path, head: np.ndarray, inputs: Tensor) -> Tensor:
    last = pooled(features(pool, path, inputs)).double()
    return last @ torch.from_numpy(head[:-1]) + torch.from_numpy(head[-1])


def stitched(pool: Pool, path: Path, head: np.ndarray) -> Stitched:
    return fill(stitched_on_meta(pool, path.ids, head.shape[1]), stitched_arrays(pool, path, head)).eval()


# --- Equal to the path (invariants 3, 4 and 14) ---


@pytest.mark.parametrize("shape", [RGB, GREY])
@pytest.mark.parametrize("ids", [*MIXED, *WHOLE])
def test_the_network_computes_what_the_path_does(ids: tuple[int, ...], shape: tuple[int, ...]) -> None:
    pool = zoos.open_pool("shapes", shape)
    path, head = some_path(pool, ids)
    inputs = torch.randn(6, *shape)
    with torch.inference_mode():
        got = stitched(pool, path, head)(inputs).double()
    expected = by_hand(pool, path, head, inputs)
    assert float((got - expected).abs().max()) <= 1e-6 * float(expected.abs().max().clamp(min=1))


@pytest.mark.parametrize(("name", "ids"), [("residual", WHOLE[0]), ("plain", WHOLE[1]), ("separable", WHOLE[2])])
def test_one_source_whole_is_its_feature_extractor_bit_for_bit(name: str, ids: tuple[int, ...]) -> None:
    pool = zoos.open_pool("shapes", RGB)
    network = shapes_network(name).eval()
    network.load_state_dict(load_file(pool.files[name]))
    path, head = some_path(pool, ids)
    model = stitched(pool, path, head)
    assert not path.bridges
    inputs = torch.randn(6, *RGB)
    with torch.inference_mode():
        for length in range(1, 5):
            seen = inputs
            for layer in list(model.children())[:length]:
                seen = layer(seen)
            assert torch.equal(seen, network[:length](inputs))
            assert torch.equal(seen, features(pool, Path(ids[:length]), inputs))
        weight = torch.from_numpy(head[:-1].T.astype(np.float32)), torch.from_numpy(head[-1].astype(np.float32))
        assert torch.equal(model(inputs), nn.functional.linear(network[:4](inputs).mean((2, 3)), *weight))


def test_bridges_stand_where_a_block_does_not_go_on_as_its_source() -> None:
    pool = zoos.plan_pool("shapes", RGB)
    assert bridge_positions(pool, (0, 1, 2, 3)) == frozenset()
    assert bridge_positions(pool, (0, 1, 6, 7)) == {2, 3}  # 7 follows 6, but what 6 reads is no prefix of its source
    assert bridge_positions(pool, (0, 2)) == {1}
    names = [name for name, _ in stitched_on_meta(pool, (0, 1, 6, 7), 5).named_children()]
    assert names == ["block1", "block2", "bridge3", "block3", "bridge4", "block4", "pool", "head"]


def vectors(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(width, width), nn.ReLU()
    )


def maps() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 3))


def test_vectors_have_linear_bridges_and_stand_in_front_of_no_map(tmp_path: FilePath) -> None:
    made = [
        Source("a", partial(vectors, 4), (("0", "1", "2"), ("3", "4")), (3, 8, 8)),
        Source("b", partial(vectors, 6), (("0", "1", "2"), ("3", "4")), (3, 8, 8)),
        Source("c", maps, (("0",), ("1",)), (3, 8, 8)),
    ]
    for source in made:
        save_file(source.build().state_dict(), tmp_path / f"{source.name}.safetensors")
    pool = replace(
        make_pool("own", made, (3, 8, 8), 2)[0], files={s.name: tmp_path / f"{s.name}.safetensors" for s in made}
    )
    inputs = torch.randn(3, 3, 8, 8)
    for ids in ((0, 3), (4, 3)):  # a vector and a map in front of vectors
        path, head = some_path(pool, ids)
        model = stitched(pool, path, head)
        assert isinstance(model.get_submodule("bridge2.map"), nn.Linear)
        with torch.inference_mode():
            assert torch.allclose(model(inputs).double(), by_hand(pool, path, head, inputs), atol=1e-5)
    with pytest.raises(ValueError, match="block 5 reads maps and cannot follow block 0, which gives vectors"):
        stitched_on_meta(pool, (0, 5), 2)


def test_arrays_that_do_not_fit_are_refused() -> None:
    pool = zoos.open_pool("shapes", RGB)
    path, head = some_path(pool, (0, 5))
    with pytest.raises(ValueError, match=r"needs bridges at positions \[1\], it has them at \[\]"):
        stitched_arrays(pool, Path((0, 5)), head)
    with pytest.raises(ValueError, match=r"needs bridges at positions \[\], it has them at \[1\]"):
        stitched_arrays(pool, Path((0, 1), path.bridges), head)
    with pytest.raises(ValueError, match=r"'head.weight' of the stitched network has shape \(5, 24\), got \(5, 23\)"):
        stitched_arrays(pool, path, head[1:])
    wrong = Path((0, 5), {1: Bridge(path.bridges[1].weight[:, 1:], path.bridges[1].bias)})
    with pytest.raises(ValueError, match=r"'bridge2.map.weight' .* has shape \(12, 16, 1, 1\), got \(12, 15\)"):
        stitched_arrays(pool, wrong, head)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((), "at least one block, got none"),
        ((0, 12), r"no block 12 in zoo 'shapes'; it has blocks 0\.\.11"),
        ((-1,), "no block -1 in zoo 'shapes'"),
        ((1, 2), "block 1 takes no data; a stitched network of zoo 'shapes' begins with 0, 4, 8"),
        ((0, 4), r"block 4 begins at depth 0 and cannot follow block 0, which ends at 0\.25"),
        ((0, 5, 5), r"block 5 begins at depth 0\.25 and cannot follow block 5, which ends at 0\.5"),
    ],
)
def test_blocks_that_cannot_follow_each_other(ids: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_ids(zoos.plan_pool("shapes", RGB), ids)


# --- In a file ---


@pytest.mark.parametrize(("ids", "shape", "num_blocks"), [((0, 5, 10, 11), RGB, 4), ((4, 3), GREY, 2)])
def test_a_file_needs_no_zoo(
    ids: tuple[int, ...], shape: tuple[int, ...], num_blocks: int, tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = zoos.open_pool("shapes", shape, "residual, plain, separable", num_blocks=num_blocks)
    path, head = some_path(pool, ids)
    file = tmp_path / "model.safetensors"
    save_stitched(file, pool, path, head, CLASSES, NORMALISATION)

    def unopened(*_: object) -> None:
        raise AssertionError("the zoo's weights are asked for")

    monkeypatch.setattr(zoos, "shapes_files", unopened)
    loaded = load_stitched(str(file))
    inputs = torch.randn(4, *shape)
    with torch.inference_mode():
        assert torch.equal(loaded(inputs), stitched(pool, path, head)(inputs))
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    recipe = read_recipe(file)
    assert recipe.origin == loaded.origin
    assert (recipe.origin.zoo, recipe.origin.ids, recipe.origin.input_shape) == ("shapes", ids, shape)
    assert (recipe.zoo_digest, recipe.classes, recipe.normalisation) == (pool.digest, CLASSES, NORMALISATION)


def test_files_that_are_damaged_or_of_something_else(tmp_path: FilePath) -> None:
    pool = zoos.open_pool("shapes", RGB)
    path, head = some_path(pool, (0, 5))
    file = tmp_path / "model.safetensors"
    save_stitched(file, pool, path, head, CLASSES, NORMALISATION)
    whole = bytearray(file.read_bytes())
    whole[-5] ^= 1
    file.write_bytes(bytes(whole))
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        load_stitched(file)
    with pytest.raises(ValueError, match=r"residual.safetensors is no flexfed stitched network 1"):
        load_stitched(pool.files["residual"])
    with pytest.raises(ValueError, match=r"nowhere.safetensors cannot be read"):
        load_stitched(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="a head of 5 classes needs as many names, got 4"):
        save_stitched(file, pool, path, head, CLASSES[1:], NORMALISATION)


def test_a_zoo_that_is_cut_otherwise_is_noticed(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = zoos.open_pool("shapes", RGB)
    path, head = some_path(pool, (0, 5))
    save_stitched(tmp_path / "model.safetensors", pool, path, head, CLASSES, NORMALISATION)
    other = zoos.plan_pool("shapes", RGB, "plain, residual, separable")
    monkeypatch.setattr("flexfed.stitching.network.plan_pool", lambda *_: other)
    with pytest.raises(ValueError, match="does not fit zoo 'shapes' as it is cut here; they differ in"):
        load_stitched(tmp_path / "model.safetensors")


# --- By its name ---


def test_a_name_builds_the_network() -> None:
    name = "stitched:shapes:0-5-10"
    check_model(name, 7, GREY)
    factory = pickle.loads(pickle.dumps(model_factory(name, 7, GREY)))
    torch.manual_seed(0)
    model = factory()
    assert isinstance(model, Stitched)
    assert model(torch.randn(2, *GREY)).shape == (2, 7)
    assert all(bool(t.isfinite().all()) for t in model.state_dict().values())
    torch.manual_seed(0)
    again = factory()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with torch.device("meta"):
        assert all(t.is_meta for t in factory().state_dict().values())


@pytest.mark.parametrize(
    ("name", "zoo", "sources", "ids"),
    [
        ("stitched:shapes:0-5-10", "shapes", "", (0, 5, 10)),
        ("stitched:cifar:4", "cifar", "", (4,)),
        ("stitched:torchvision(resnet18,vgg11):0-5", "torchvision", "resnet18,vgg11", (0, 5)),
    ],
)
def test_names_are_read(name: str, zoo: str, sources: str, ids: tuple[int, ...]) -> None:
    assert parse_name(name) == (zoo, sources, ids)
    assert stitched_name(zoos.plan_pool(zoo, (3, 32, 32), sources), ids) == name


def test_a_name_says_how_data_must_be_normalised() -> None:
    assert input_convention("stitched:cifar:0-1", 3) == zoos.IMAGENET
    assert input_convention("stitched:torchvision(resnet18):0", 1) == zoos.input_convention("torchvision", 1)
    assert input_convention("stitched:shapes:0", 3) is input_convention("cifar-resnet20", 3) is None


def test_networks_of_fewer_blocks_a_source_have_no_name() -> None:
    with pytest.raises(ValueError, match="only networks of sources cut into 4 blocks have a name; save it as a file"):
        stitched_name(zoos.plan_pool("shapes", RGB, num_blocks=2), (0, 1))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stitched:shapes", "'stitched:shapes': expected stitched:<zoo>:<ids joined by ->"),
        ("stitched:shapes:0-x", "expected stitched:<zoo>:<ids joined by ->, such as stitched:shapes:0-5-10-11"),
        ("stitched:shapes(plain:0", "expected stitched:<zoo>:<ids joined by ->"),
        ("stitched:shape:0", "unknown zoo 'shape'; known: shapes, "),
        ("stitched:cifar(resnet20):0", "zoo 'cifar' has no source 'resnet20'"),
    ],
)
def test_names_that_cannot_be_are_refused_at_once(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_factory(name, 10, RGB)


def test_data_of_another_rank_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"'stitched:shapes:0' takes images .* got input shape \(3, 200\)"):
        model_factory("stitched:shapes:0", 10, (3, 200))


# --- Trained weights ---


def test_weights_from_the_run_folder(tmp_path: FilePath) -> None:
    pool = zoos.open_pool("shapes", RGB)
    path, head = some_path(pool, (0, 5, 10))
    file = tmp_path / "model.safetensors"
    save_stitched(file, pool, path, head, CLASSES, NORMALISATION)
    model = build_model("stitched:shapes:0-5-10", len(CLASSES), RGB)
    load_weights(model, str(file))
    inputs = torch.randn(3, *RGB)
    with torch.inference_mode():
        assert torch.equal(model.eval()(inputs), load_stitched(file)(inputs))
    other = build_model("stitched:shapes:0-5-10", 3, RGB)
    fresh = other.get_submodule("head").weight.clone()
    load_weights(other, str(file))
    assert torch.equal(other.get_submodule("head").weight, fresh)
    assert torch.equal(other.get_submodule("bridge2.map").bias, model.get_submodule("bridge2.map").bias)
    with pytest.raises(ValueError, match="do not fit the network"):
        load_weights(build_model("stitched:shapes:0-5-11", 5, RGB), str(file))


def test_weights_of_the_zoo_fill_the_blocks_alone() -> None:
    model = build_model("stitched:shapes:0-5-10", 4, GREY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_weights(model, "zoo")
    pool = zoos.open_pool("shapes", RGB)
    after = model.state_dict()
    for position, block in enumerate((0, 5, 10), start=1):
        for name, tensor in pool.module(block).state_dict().items():
            assert torch.equal(after[f"block{position}.{name}"], tensor)
    kept = [name for name in after if not name.startswith("block")]
    assert len(kept) == 6
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="weights='zoo' needs a stitched network, got Sequential"):
        load_weights(build_model("cnn", 4, RGB), "zoo")


# --- Cut narrower ---


@pytest.mark.parametrize("shape", [RGB, GREY, (3, 8, 13)])
@pytest.mark.parametrize("ids", ["0-5-10-11", "4-1-6-11", "8-9-2-7", "0-1-2-3", "8-6"])
def test_stitched_networks_of_the_zoo_can_be_cut(ids: str, shape: tuple[int, ...]) -> None:
    factory = model_factory(f"stitched:shapes:{ids}", 5, shape)
    layout = trace_layout(factory, shape)
    torch.manual_seed(0)
    model = factory()
    load_weights(model, "zoo")
    check_parts(factory, layout, {n: t.detach().numpy() for n, t in travelling(model).items()}, shape)
    assert list(layout.fixed) == ["head"]
    for name, _ in model.named_children():
        if name.startswith("bridge"):
            groups = layout.groups_of(f"{name}.map.weight", 0) + layout.groups_of(f"{name}.map.weight", 1)
            assert len(set(groups)) == 2  # a bridge's outputs are a group of its own


@pytest.mark.parametrize(
    ("ids", "block"),
    [("0-1-2-3", "block2.layer2_0"), ("16-17-6", "block3.layer3_0"), ("12-13-18-19", "block2.layer2_0")],
)
def test_networks_that_pad_channels_cannot_be_cut(ids: str, block: str) -> None:
    message = rf"module '{block}\.shortcut' \(PaddedShortcut\) cannot be cut: where zeros are padded between channels"
    with pytest.raises(ValueError, match=message):
        trace_layout(model_factory(f"stitched:cifar:{ids}", 10, (3, 32, 32)), (3, 32, 32))


@pytest.mark.parametrize("ids", ["16-17-18-19", "16-7"])
def test_stitched_cifar_networks_without_padding_can_be_cut(ids: str) -> None:
    factory = model_factory(f"stitched:cifar:{ids}", 10, GREY)
    layout = trace_layout(factory, GREY)
    torch.manual_seed(0)
    check_parts(factory, layout, {n: t.detach().numpy() for n, t in travelling(factory()).items()}, GREY)


def test_a_fresh_network_is_drawn_as_torch_does() -> None:
    torch.manual_seed(0)
    model = build_stitched(zoos.plan_pool("shapes", RGB), (0, 5), 5)
    weight = model.get_submodule("block1.stage1.0").weight.detach()
    bound = 27**-0.5
    assert 0.9 * bound < float(weight.abs().max()) <= bound
    norm = model.get_submodule("block1.stage1.1")
    assert (norm.running_mean.sum(), norm.running_var.mean(), norm.num_batches_tracked) == (0, 1, 0)
