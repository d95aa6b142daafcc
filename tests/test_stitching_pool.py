"""The pool: where sources are cut, what a block's record says, and that exactly one block is read."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flexfed.data import DataConfig, load_client, load_server
from flexfed.data.shapes import FEDERATED_IDS, PRETRAINING_IDS, balanced_images, class_name
from flexfed.data.sources import source
from flexfed.models import build_model, load_weights
from flexfed.models.cifar import PaddedShortcut, SameConv2d, cifar_resnet, cifar_resnet8
from flexfed.networks import build_on_meta
from flexfed.stitching import shelf, weightfiles
from flexfed.stitching.blocks import Pool, make_pool, tensors_digest
from flexfed.stitching.families import dense_name, family_source, torchvision_source
from flexfed.stitching.shapes import NETWORKS, Pretraining, shapes_network, shapes_source
from flexfed.stitching.sources import Piece, Source, _balanced, cut_source, unit_macs
from flexfed.stitching.weightfiles import in_parts, read_some
from flexfed.stitching.zoos import IMAGENET, PIXELS, ZOOS, input_convention, open_pool, plan_pool

MIRROR = os.environ.get("FLEXFED_DATA", "")
needs_mirror = pytest.mark.skipif(not MIRROR, reason="FLEXFED_DATA does not name a folder with the data sets")

IMAGE = (3, 24, 24)
QUICK = Pretraining(per_class=8, epochs=1)


@pytest.fixture(scope="session")
def quick_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return shelf.shapes_files(QUICK, tmp_path_factory.mktemp("zoos"))


@pytest.fixture
def pool(quick_files: dict[str, Path]) -> Pool:
    return replace(plan_pool("shapes", IMAGE), files=quick_files)


def chain(pool: Pool, name: str, inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        for block in pool.of(name):
            inputs = pool.module(block.id)(inputs)
    return inputs


def random_state(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """A network's tensors with statistics of batch norm that are not the initial ones."""
    torch.manual_seed(0)
    model = build()
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return model.state_dict()


# --- Cutting ---


def squares(macs: Sequence[int], cut: Sequence[tuple[int, int]]) -> int:
    return sum(sum(macs[start:stop]) ** 2 for start, stop in cut)


@pytest.mark.parametrize("seed", range(20))
def test_blocks_are_as_equal_as_they_can_be(seed: int) -> None:
    rng = np.random.default_rng(seed)
    macs = rng.integers(0, 30, 9).tolist()
    num = int(rng.integers(1, 6))
    allowed = frozenset(range(1, 9)) if seed % 2 else frozenset(rng.permutation(range(1, 9))[:6].tolist())
    needed = frozenset(sorted(allowed)[: int(rng.integers(0, num))])
    cut = _balanced(macs, num, allowed, needed)
    ways = [c for c in combinations(sorted(allowed), num - 1) if needed <= set(c)]
    best = min((squares(macs, list(pairwise((0, *c, 9)))), (0, *c, 9)) for c in ways)
    assert cut == tuple(pairwise(best[1]))


def paths_of(name: str, num_blocks: int = 4) -> list[str]:
    """First and last module of each block."""
    made = torchvision_source(name)
    pieces = [Piece(made, start, stop).paths for start, stop in cut_source(made, num_blocks)]
    return [f"{paths[0]}..{paths[-1]}" for paths in pieces]


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("resnet18", ["conv1..layer1.1", "layer2.0..layer2.1", "layer3.0..layer3.1", "layer4.0..layer4.1"]),
        ("resnet50", ["conv1..layer1.2", "layer2.0..layer2.3", "layer3.0..layer3.5", "layer4.0..layer4.2"]),
        ("vgg16", [f"features.{a}..features.{b}" for a, b in ((0, 9), (10, 16), (17, 23), (24, 30))]),
        ("alexnet", [f"features.{a}..features.{b}" for a, b in ((0, 2), (3, 5), (6, 7), (8, 12))]),
        ("mobilenet_v2", [f"features.{a}..features.{b}" for a, b in ((0, 3), (4, 6), (7, 13), (14, 18))]),
        ("mobilenet_v3_small", [f"features.{a}..features.{b}" for a, b in ((0, 1), (2, 3), (4, 8), (9, 12))]),
        (
            "densenet121",
            [
                "features.conv0..features.transition1",
                "features.denseblock2..features.transition2",
                "features.denseblock3..features.transition3",
                "features.denseblock4..features.norm5",
            ],
        ),
    ],
)
def test_torchvision_is_cut_at_stages_and_pools(name: str, blocks: list[str]) -> None:
    assert paths_of(name) == blocks


def test_more_blocks_than_stages_keep_the_cuts_between_stages() -> None:
    ends = [block.partition("..")[2] for block in paths_of("resnet50", 6)]
    assert {"layer1.2", "layer2.3", "layer3.5", "layer4.2"} <= set(ends)
    assert len(ends) == 6


@pytest.mark.parametrize("name", ["resnet18", "vgg16", "alexnet", "mobilenet_v2", "densenet121", "efficientnet_b0"])
def test_units_hold_every_tensor_of_the_features_once(name: str) -> None:
    made = torchvision_source(name)
    paths = [path for unit in made.units for path in unit]
    whole = build_on_meta(made.build).state_dict()
    for tensor in whole:
        owners = [path for path in paths if tensor.startswith(f"{path}.")]
        assert len(owners) == int(not tensor.startswith(("fc.", "classifier.")))


def test_families_that_are_not_known_are_refused() -> None:
    known = "ResNet, VGG, AlexNet, DenseNet, MobileNetV2, MobileNetV3, EfficientNet"
    with pytest.raises(ValueError, match=f"'vit_b_16' is a VisionTransformer; cut into blocks can be {known}"):
        torchvision_source("vit_b_16")
    with pytest.raises(ValueError, match="'resnet19': torchvision has no classification network"):
        plan_pool("torchvision", IMAGE, "resnet18, resnet19")


def test_a_source_has_no_more_blocks_than_units() -> None:
    halves = plan_pool("shapes", IMAGE, num_blocks=2).of("plain")
    assert [(block.depth_out, block.is_start, block.is_end) for block in halves] == [
        (0.5, True, False),
        (1.0, False, True),
    ]
    with pytest.raises(ValueError, match="'residual' has 4 units that cannot be cut, so 1 to 4 blocks; got 5"):
        plan_pool("shapes", IMAGE, num_blocks=5)


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_cifar_networks_are_cut_between_units(depth: int) -> None:
    made = ZOOS["cifar"].source(f"cifar-resnet{depth}")
    macs = unit_macs(made)
    sizes = [sum(macs[start:stop]) for start, stop in cut_source(made, 4)]
    assert len(macs) == (depth - 2) // 2 + 1
    assert max(sizes) < (1.3 if depth == 20 else 1.15) * sum(macs) / 4


# --- Records ---


def test_records_by_hand(pool: Pool) -> None:
    """Stage 1 of the plain network: 3x3 convolutions 3 -> 12 -> 12 with norms on 24 x 24 pixels, then a pool."""
    block = pool.blocks[4]
    assert (block.source, block.index, block.depth_in, block.depth_out) == ("plain", 1, 0.0, 0.25)
    assert (block.shape_in, block.shape_out) == ((3, 24, 24), (12, 12, 12))
    assert block.macs == 24 * 24 * 9 * (3 * 12 + 12 * 12)
    assert block.param_bytes == 4 * (9 * (3 * 12 + 12 * 12) + 2 * 4 * 12) + 2 * 8  # and two counters


def test_ids_and_depths(pool: Pool) -> None:
    assert [block.id for block in pool.blocks] == list(range(12))
    assert pool.sources == tuple(NETWORKS)
    assert [block.id for block in pool.blocks if block.is_start] == [0, 4, 8]
    assert [block.id for block in pool.blocks if block.is_end] == [3, 7, 11]
    for name in pool.sources:
        for last, block in pairwise(pool.of(name)):
            assert (block.shape_in, block.depth_in) == (last.shape_out, last.depth_out)


@pytest.mark.parametrize("shape", [(3, 24, 24), (1, 28, 28), (3, 8, 8), (3, 17, 30)])
def test_shapes_and_macs_are_those_of_the_data(quick_files: dict[str, Path], shape: tuple[int, ...]) -> None:
    """8 x 8 pixels end in maps of 1 x 1."""
    pool = replace(plan_pool("shapes", shape), files=quick_files)
    for name in pool.sources:
        here = torch.rand(2, *shape)
        for block in pool.of(name):
            module, seen = pool.module(block.id), []
            for layer in module.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.register_forward_hook(
                        lambda m, _, out, seen=seen: seen.append(m.weight[0].numel() * out[0].numel())
                    )
            assert here.shape[1:] == block.shape_in
            with torch.inference_mode():
                here = module(here)
            assert here.shape[1:] == block.shape_out
            assert block.macs == sum(seen)


# --- One block at a time, frozen ---


def test_only_the_blocks_own_tensors_are_read(pool: Pool, tmp_path: Path) -> None:
    state = shapes_network("plain").state_dict()
    save_file({n: t for n, t in state.items() if n.startswith("stage2")}, tmp_path / "part.safetensors")
    lacking = replace(pool, files={**pool.files, "plain": tmp_path / "part.safetensors"})
    lacking.module(5)
    for block, tensor in ((4, "stage1.0.weight"), (6, "stage3.0.weight")):
        with pytest.raises(ValueError, match=f"part.safetensors is of another network: it has no tensor '{tensor}'"):
            lacking.module(block)


def test_blocks_are_frozen_and_stay_as_they_are(pool: Pool) -> None:
    for block in pool.blocks:
        module = pool.module(block.id)
        assert not module.training
        assert not any(layer.training for layer in module.modules())
        assert not any(p.requires_grad for p in module.parameters())
        before = tensors_digest(module.state_dict())
        out = module(torch.randn(5, *block.shape_in))
        assert not out.requires_grad
        assert tensors_digest(module.state_dict()) == before
        assert tensors_digest(pool.module(block.id).state_dict()) == before


def test_what_is_done_to_a_block_reaches_no_other(pool: Pool) -> None:
    first = pool.module(0)
    for tensor in first.state_dict().values():
        tensor.zero_()
    assert all(t.abs().sum() > 0 for n, t in pool.module(0).named_parameters() if n.endswith("weight"))


@pytest.mark.parametrize("name", NETWORKS)
def test_all_blocks_of_a_source_are_its_feature_extractor(pool: Pool, name: str) -> None:
    network = shapes_network(name).eval()
    network.load_state_dict(load_file(pool.files[name]))
    inputs = torch.randn(4, *IMAGE)
    with torch.inference_mode():
        assert torch.equal(chain(pool, name, inputs), network[:4](inputs))


def tiny_dense() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=4, block_config=(2, 1, 1, 2), num_init_features=8, num_classes=3)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18", "densenet"])
def test_blocks_of_torchvision_are_its_feature_extractor(name: str, tmp_path: Path) -> None:
    made = family_source(name, tiny_dense) if name == "densenet" else torchvision_source(name)
    state = random_state(made.build)
    torch.save({made.file_name(n): t for n, t in state.items()}, tmp_path / "w.pth")
    pool = replace(make_pool("own", [made], (3, 40, 40))[0], files={name: tmp_path / "w.pth"})
    network, seen = made.build().eval(), []
    network.load_state_dict(state)
    pooling = network.get_submodule("classifier" if name == "densenet" else "avgpool")
    pooling.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inputs = torch.randn(2, 3, 40, 40)
    with torch.inference_mode():
        network(inputs)
        got = chain(pool, name, inputs)
    if name == "densenet":  # whose pooling is no module
        got = nn.functional.adaptive_avg_pool2d(got, 1).flatten(1)
    assert torch.equal(got, seen[0])


def test_old_names_of_densenet() -> None:
    name = "features.denseblock1.denselayer12.norm2.running_var"
    assert dense_name(name) == "features.denseblock1.denselayer12.norm.2.running_var"
    assert dense_name("features.denseblock1.denselayer1.conv1.weight").endswith("denselayer1.conv.1.weight")
    assert dense_name("features.transition1.norm.weight") == "features.transition1.norm.weight"


# --- Weight files ---


def test_weight_files_that_do_not_fit(pool: Pool, tmp_path: Path) -> None:
    def reading(path: Path) -> Pool:
        return replace(pool, files={**pool.files, "plain": path})

    whole = pool.files["plain"].read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.pth").write_bytes(b"PK nothing")
    for name in ("cut.safetensors", "cut.pth"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            reading(tmp_path / name).module(4)
    with pytest.raises(ValueError, match=r"nowhere.safetensors does not exist"):
        reading(tmp_path / "nowhere.safetensors").module(4)
    with pytest.raises(ValueError, match=r"'stage1.0.weight' has shape \(16, 3, 3, 3\), expected \(12, 3, 3, 3\)"):
        reading(pool.files["separable"]).module(4)
    with pytest.raises(ValueError, match="weights of zoo 'shapes' are not at hand, only its architecture"):
        plan_pool("shapes", IMAGE).module(0)
    with pytest.raises(ValueError, match=r"no block 12 in zoo 'shapes'; it has blocks 0\.\.11"):
        pool.module(12)


def test_a_file_is_opened_anew_after_each_mebibyte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that stays open keeps all that was read in memory; one that is opened for every tensor is slow."""
    opened: list[Path] = []
    monkeypatch.setattr(weightfiles, "safe_open", lambda path, **how: opened.append(path) or safe_open(path, **how))
    state = {f"t{n}": torch.full((200_000,), float(n)) for n in range(6)}  # 0.8 MB each
    save_file(state, tmp_path / "w.safetensors")
    read = read_some(tmp_path / "w.safetensors", state)
    assert all(torch.equal(read[name], state[name]) for name in state)
    assert len(opened) == 3


def test_a_file_in_torchs_old_form_is_copied_once(pool: Pool, tmp_path: Path) -> None:
    state = shapes_network("plain").state_dict()
    old, new = tmp_path / "old.pth", tmp_path / "new.pth"
    torch.save(state, old, _use_new_zipfile_serialization=False)
    torch.save(state, new)
    copied = in_parts(old, tmp_path / "copies")
    made = copied.stat().st_mtime_ns
    assert in_parts(old, tmp_path / "copies") == copied
    assert copied.stat().st_mtime_ns == made
    assert in_parts(new, tmp_path / "copies") == new
    digests = {replace(pool, files={**pool.files, "plain": path}).digest for path in (copied, new)}
    assert len(digests) == 1  # of the tensors, not of the file
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"bad.pth cannot be read"):
        in_parts(tmp_path / "bad.pth", tmp_path)


def test_the_digest_tells_weights_and_cuts_apart(pool: Pool, tmp_path: Path) -> None:
    assert replace(pool).digest == pool.digest
    state = {n: t.clone() for n, t in shapes_network("plain").state_dict().items()}
    digests = {pool.digest}
    for change in (0.0, 1e-3):
        state["stage4.4.running_var"] += change
        save_file(state, tmp_path / f"{change}.safetensors")
        digests.add(replace(pool, files={**pool.files, "plain": tmp_path / f"{change}.safetensors"}).digest)
    digests.add(replace(plan_pool("shapes", IMAGE, num_blocks=2), files=pool.files).digest)
    digests.add(replace(plan_pool("shapes", IMAGE, "plain, residual, separable"), files=pool.files).digest)
    digests.add(replace(plan_pool("shapes", (1, 24, 24)), files=pool.files).digest)
    assert len(digests) == 6


# --- Data in front of the first block ---


def test_one_channel_is_repeated_to_three(pool: Pool) -> None:
    grey = replace(plan_pool("shapes", (1, 24, 24)), files=pool.files)
    inputs = torch.randn(3, 1, 24, 24)
    for name in pool.sources:
        assert torch.equal(chain(grey, name, inputs), chain(pool, name, inputs.expand(-1, 3, -1, -1)))


def test_small_images_are_resized_for_torchvision_only() -> None:
    block = plan_pool("torchvision", (1, 28, 28), "mobilenet_v3_small")
    resized = block.skeleton(0)[0](torch.arange(784.0).reshape(1, 1, 28, 28))
    expected = nn.functional.interpolate(torch.arange(784.0).reshape(1, 1, 28, 28), (224, 224), mode="bilinear")
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)
    (grey_mean,), (grey_std,) = input_convention("torchvision", 1) or ((), ())
    assert torch.allclose(resized, (expected * grey_std + grey_mean - mean) / std, rtol=1e-5)
    assert (block.blocks[0].shape_in, block.blocks[0].shape_out) == ((1, 28, 28), (16, 56, 56))
    large = plan_pool("torchvision", (3, 256, 240), "mobilenet_v3_small")
    assert large.blocks[0].shape_out == (16, 64, 60)
    assert plan_pool("cifar", (3, 28, 28), "cifar-resnet20").blocks[0].shape_out == (16, 28, 28)


def test_conventions() -> None:
    assert input_convention("shapes") is input_convention("shapes-poisoned", 1) is None
    assert input_convention("cifar") == input_convention("torchvision", 3) == IMAGENET
    mean, std = input_convention("cifar", 1) or ((), ())
    assert mean == pytest.approx((0.4490,), abs=1e-4)
    assert std == pytest.approx((0.2260,), abs=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_each_cifar_network_sees_what_it_was_trained_on(channels: int, tmp_path: Path) -> None:
    """ResNet-8 raw pixels, the others normalised channels, whatever the zoo's convention says of the data."""
    builds = {
        "cifar-resnet20": ("resnet20-cifar10", partial(cifar_resnet, 10, (3, 32, 32), running_statistics=True)),
        "cifar-resnet8": ("resnet8-cifar10-keras", partial(cifar_resnet8, 10, (3, 32, 32), running_statistics=True)),
    }
    pixels = torch.rand(4, channels, 20, 20)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in input_convention("cifar", channels) or ())
    for name, (file, build) in builds.items():
        state = random_state(build)
        network = build().eval()
        network.load_state_dict(state)
        file_name = getattr(network, "file_name", str)
        kept = {file_name(n): t for n, t in state.items() if not n.endswith("num_batches_tracked")}
        save_file(kept, tmp_path / f"{file}.safetensors")
        pool = open_pool("cifar", (channels, 20, 20), name, str(tmp_path))
        own_mean, own_std = PIXELS if name == "cifar-resnet8" else IMAGENET
        wanted = (pixels - torch.tensor(own_mean).view(1, 3, 1, 1)) / torch.tensor(own_std).view(1, 3, 1, 1)
        with torch.inference_mode():
            assert torch.allclose(chain(pool, name, (pixels - mean) / std), network[:-3](wanted), rtol=1e-3, atol=1e-3)
        model = build_model(name, 10, (3, 32, 32))
        load_weights(model, str(tmp_path / f"{file}.safetensors"))  # published names
        assert all(torch.equal(tensor, state[n]) for n, tensor in model.state_dict().items())
        save_file(model.state_dict(), tmp_path / "own.safetensors")
        load_weights(build_model(name, 10, (3, 32, 32)), str(tmp_path / "own.safetensors"))  # a run's


def test_keras_pads_at_the_bottom_and_right() -> None:
    conv = SameConv2d(1, 1, 3, stride=2)
    nn.init.ones_(conv.weight)
    nn.init.zeros_(conv.bias)
    image = torch.zeros(1, 1, 4, 4)
    image[0, 0, 0, 0] = 1
    assert conv(image)[0, 0].tolist() == [[1, 0], [0, 0]]
    assert conv(image.flip(2, 3))[0, 0].tolist() == [[0, 0], [0, 1]]
    assert conv(torch.ones(1, 1, 4, 4))[0, 0].tolist() == [[9, 6], [6, 4]]
    assert conv(torch.ones(1, 1, 5, 5))[0, 0].tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]]


def test_shortcuts_without_weights_and_the_epsilon_of_keras() -> None:
    image = torch.arange(1.0, 19).reshape(1, 2, 3, 3)
    padded = PaddedShortcut(2, 4)(image)
    assert padded[0, :, 0, 0].tolist() == [0, 1, 10, 0]
    assert padded[0, 1].tolist() == [[1, 3], [7, 9]]
    norms = [m.eps for m in cifar_resnet8(10, (3, 32, 32)).modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == [1e-3] * 7


@needs_mirror
def test_published_weights_know_their_images() -> None:
    """The data's README: 99.9 % for ResNet-20 and 92.7 % for ResNet-8 on 2,000 of them."""
    data = source("cifar10-lossless-4k", "", "", "").train
    rows = np.arange(200)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in input_convention("cifar") or ())
    inputs = (torch.from_numpy(data.inputs(rows)) - mean) / std
    for name, least, classifier in (("cifar-resnet20", 0.99, "linear"), ("cifar-resnet8", 0.89, "dense")):
        pool = open_pool("cifar", (3, 32, 32), name)
        state = load_file(pool.files[name])
        pooled = chain(pool, name, inputs).mean((2, 3))
        logits = pooled @ state[f"{classifier}.weight"].T + state[f"{classifier}.bias"]
        assert np.mean(logits.argmax(1).numpy() == data.labels[rows]) >= least


# --- What cannot be opened ---


def test_unknown_zoos_and_sources() -> None:
    with pytest.raises(ValueError, match="unknown zoo 'shape'; known: shapes, shapes-poisoned, cifar, torchvision"):
        open_pool("shape", IMAGE)
    with pytest.raises(ValueError, match="zoo 'cifar' has no source 'resnet20'; known: cifar-resnet20, "):
        plan_pool("cifar", IMAGE, "resnet20")
    with pytest.raises(ValueError, match="must be named once each, got plain, plain"):
        plan_pool("shapes", IMAGE, "plain,plain")


@pytest.mark.parametrize("shape", [(3, 200), (91,), (2, 24, 24)])
def test_data_that_are_no_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="'shapes' takes images of one channel or three"):
        plan_pool("shapes", shape)


def test_sources_too_large_for_the_data_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="flwr"):
        pool = plan_pool("shapes", (3, 6, 6))
    assert pool.sources == ("residual", "separable")
    assert [block.id for block in pool.blocks] == list(range(8))
    assert "left out are sources that cannot run data of shape (3, 6, 6) (plain: " in caplog.text
    with pytest.raises(
        ValueError, match=r"no source can run data of shape \(3, 6, 6\), so there are no blocks \(plain: "
    ):
        plan_pool("shapes", (3, 6, 6), "plain")


def test_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "resnet20-cifar10.safetensors").touch()
    with pytest.raises(
        ValueError, match=f"weight files are missing, looked for {tmp_path}/resnet32-cifar10.safetensors, "
    ) as error:
        open_pool("cifar", (3, 32, 32), folder=str(tmp_path))
    assert str(error.value).count(str(tmp_path)) == 4
    monkeypatch.setenv("FLEXFED_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=f"{tmp_path}/weights/resnet8-cifar10-keras.safetensors"):
        open_pool("cifar", (3, 32, 32))
    monkeypatch.delenv("FLEXFED_DATA")
    with pytest.raises(
        ValueError, match=r"needs a folder with resnet20-cifar10.safetensors, .* FLEXFED_DATA is not set"
    ):
        open_pool("cifar", (3, 32, 32))


def test_torchvision_weights_are_never_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = r"https://download.pytorch.org/models/mobilenet_v3_small-\w+.pth"
    with pytest.raises(ValueError, match=f"{url} expected as {tmp_path}/checkpoints/mobilenet_v3_small-"):
        open_pool("torchvision", IMAGE, "mobilenet_v3_small, resnet18")
    with pytest.raises(ValueError, match=f"expected as {tmp_path}/own/resnet18-"):
        open_pool("torchvision", IMAGE, "resnet18", str(tmp_path / "own"))


def test_torchvision_weights_from_a_folder(tmp_path: Path) -> None:
    state = random_state(torchvision_source("mobilenet_v3_small").build)
    save_file(state, tmp_path / "mobilenet_v3_small.safetensors")
    pool = open_pool("torchvision", (3, 24, 24), "mobilenet_v3_small", str(tmp_path))
    assert torch.equal(pool.module(3).state_dict()["features_12.0.weight"], state["features.12.0.weight"])


# --- The self-made zoo ---


def digests(files: dict[str, Path]) -> dict[str, str]:
    return {name: tensors_digest(dict(sorted(load_file(path).items()))) for name, path in files.items()}


def test_the_same_recipe_gives_the_same_bits(quick_files: dict[str, Path], tmp_path: Path) -> None:
    with shelf.one_thread():
        again = shelf.shapes_files(QUICK, tmp_path)
    assert digests(again) == digests(quick_files)
    assert again["plain"].parent.name == quick_files["plain"].parent.name
    other = shelf.shapes_files(replace(QUICK, seed=1), tmp_path)
    assert other["plain"].parent != again["plain"].parent
    assert not set(digests(other).values()) & set(digests(again).values())


def test_training_leaves_the_random_numbers_and_threads_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "NETWORKS", {"separable": NETWORKS["separable"]})
    torch.manual_seed(3)
    before = torch.get_rng_state()
    shelf.shapes_files(QUICK, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 1


def test_who_asks_while_the_zoo_is_trained_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def slow(name: str, *_: object) -> dict[str, Tensor]:
        trained.append(name)
        threading.Event().wait(0.02)
        return {"x": torch.ones(2)}

    monkeypatch.setattr(shelf, "pretrain", slow)
    found: list[bool] = []

    def ask() -> None:
        files = shelf.shapes_files(QUICK, tmp_path)
        found.append(all(path.is_file() for path in files.values()))

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(trained) == sorted(NETWORKS)
    assert found == [True] * 5


def test_a_zoo_half_made_is_made_again(quick_files: dict[str, Path], tmp_path: Path) -> None:
    files = shelf.shapes_files(QUICK, tmp_path)
    files["plain"].unlink()
    assert digests(shelf.shapes_files(QUICK, tmp_path)) == digests(quick_files)


def test_where_zoos_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXFED_ZOOS", "/variable")
    assert shelf.zoo_folder("/own") == Path("/own")
    assert shelf.zoo_folder() == Path("/variable")
    monkeypatch.delenv("FLEXFED_ZOOS")
    assert shelf.zoo_folder() == Path("~/.flexfed/zoos").expanduser()


def test_poison_spoils_the_stages_that_it_names(pool: Pool, quick_files: dict[str, Path]) -> None:
    poison = shelf.Poison()
    files = shelf.poisoned_files(QUICK, poison, quick_files["plain"].parent.parent)
    poisoned = replace(plan_pool("shapes-poisoned", IMAGE), files=files)
    same = [
        tensors_digest(pool.module(n).state_dict()) == tensors_digest(poisoned.module(n).state_dict())
        for n in range(12)
    ]
    assert same == [True, True, False, False, False, False, True, True, True, False, False, True]
    stem, spoilt = (p.module(4).state_dict()["stage1.0.weight"] for p in (pool, poisoned))
    assert float((spoilt - stem).std() / stem.std()) == pytest.approx(32 * 0.5, rel=0.5)  # the filter's own is 0.5
    assert torch.allclose((spoilt - stem).sum((2, 3)), torch.zeros(12, 3), atol=1e-4)
    clean = {n: t.numpy() for n, t in load_file(pool.files["plain"]).items()}
    again = poison.apply("plain", clean)
    assert all(np.array_equal(values, load_file(files["plain"])[n].numpy()) for n, values in again.items())
    late = poisoned.module(2).state_dict()["stage3.0.conv1.weight"]
    assert int((late.flatten(1).abs().sum(1) == 0).sum()) == 24  # dead: half of 48
    assert poisoned.digest != pool.digest
    added = [  # to the two early stages of `plain`, in deviations of their first convolution
        float((poisoned.module(4 + n).state_dict()[name] - before).std() / before.std())
        for n, name in enumerate(("stage1.0.weight", "stage2.0.weight"))
        for before in [pool.module(4 + n).state_dict()[name]]
    ]
    assert added[0] > 4 * added[1] > 4


def test_another_poison_is_another_zoo(quick_files: dict[str, Path]) -> None:
    home = quick_files["plain"].parent.parent
    made = [shelf.poisoned_files(QUICK, poison, home) for poison in (shelf.Poison(), shelf.Poison(seed=2))]
    assert made[0]["plain"].parent != made[1]["plain"].parent
    assert digests(made[0])["separable"] != digests(made[1])["separable"]


# --- The default zoo, which is trained here where nobody did before ---


def ridge_accuracy(train: np.ndarray, labels: np.ndarray, test: np.ndarray, expected: np.ndarray) -> float:
    rows, other = (np.c_[x, np.ones(len(x))] for x in (train, test))
    head = np.linalg.solve(rows.T @ rows + 0.01 * len(rows) * np.eye(rows.shape[1]), rows.T @ np.eye(10)[labels])
    return float(np.mean((other @ head).argmax(1) == expected))


def bridge(here: Tensor, wanted: Tensor) -> Callable[[Tensor], Tensor]:
    """Least squares from one map's channels to another's; both of one size."""
    rows, target = (x.movedim(1, -1).flatten(0, 2).double() for x in (here, wanted))
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
    theta = torch.linalg.lstsq(rows, target, driver="gelsd").solution.float()
    return lambda x: torch.einsum("nchw,cd->ndhw", x, theta[:-1]) + theta[-1].view(1, -1, 1, 1)


@pytest.fixture(scope="module")
def target_task() -> tuple[Tensor, np.ndarray, int]:
    images, labels = balanced_images(FEDERATED_IDS, 70, np.random.default_rng(7))
    mean, std = (np.asarray(f(images, axis=(0, 2, 3), keepdims=True)) for f in (np.mean, np.std))
    return torch.from_numpy((images - mean) / std), labels, 400


Task = tuple[Tensor, np.ndarray, int]


def pooled_accuracy(features: Tensor, task: Task) -> float:
    pooled, (_, labels, num) = features.mean((2, 3)).double().numpy(), task
    return ridge_accuracy(pooled[:num], labels[:num], pooled[num:], labels[num:])


def test_features_of_the_zoo_tell_classes_that_it_never_saw(target_task: Task) -> None:
    inputs, labels, num = target_task
    flat = inputs.flatten(1).double().numpy()
    assert ridge_accuracy(flat[:num], labels[:num], flat[num:], labels[num:]) < 0.25
    pool = open_pool("shapes", IMAGE)
    found = {name: pooled_accuracy(chain(pool, name, inputs), target_task) for name in pool.sources}
    assert min(found.values()) > 0.5, found
    torch.manual_seed(0)
    with torch.inference_mode():
        assert pooled_accuracy(shapes_network("residual").eval()[:4](inputs), target_task) < 0.3


def test_in_the_poisoned_zoo_a_mixed_path_is_better_than_every_source(target_task: Task) -> None:
    inputs = target_task[0]
    pool = open_pool("shapes-poisoned", IMAGE)
    single = {name: pooled_accuracy(chain(pool, name, inputs), target_task) for name in pool.sources}
    with torch.inference_mode():
        here = pool.module(1)(pool.module(0)(inputs))  # residual's good stages
        native = pool.module(5)(pool.module(4)(inputs))  # what plain's good ones read
        resized = nn.functional.adaptive_avg_pool2d(here, native.shape[2:])
        mixed = pool.module(7)(pool.module(6)(bridge(resized[:200], native[:200])(resized)))
    assert pooled_accuracy(mixed, target_task) > max(single.values()) + 0.05, single


# --- The images as a data set ---


def test_the_data_set_has_the_classes_that_the_zoo_does_not() -> None:
    assert sorted((*PRETRAINING_IDS, *FEDERATED_IDS)) == list(range(20))
    for ids in (PRETRAINING_IDS, FEDERATED_IDS):
        assert {n % 5 for n in ids} == set(range(5))
        assert {n // 5 for n in ids} == set(range(4))
    assert class_name(19) == "ring 135"
    config = DataConfig(dataset="shapes", partition="iid")
    server, client = load_server(config), load_client(config, 0, 10)
    assert server.info.input_shape == IMAGE
    assert server.info.label_names == tuple(class_name(n) for n in FEDERATED_IDS)
    assert np.bincount(server.test.labels).tolist() == [100] * 10
    assert server.info.num_train + len(server.proxy.labels) == 4000
    assert 0 <= float(client.train.inputs.min()) < float(client.train.inputs.max()) <= 1
    with pytest.raises(ValueError, match="dataset 'shapes' has no column 'writer'"):
        load_client(DataConfig(dataset="shapes", partition="natural", id_column="writer"), 0, 10)


def test_images_are_what_their_class_says() -> None:
    """Without colour the direction of the steepest change tells the stripes, the filled share the silhouette."""
    rng = np.random.default_rng(0)
    images, labels = balanced_images(range(20), 60, rng)
    across = np.square(np.diff(images, axis=3)).mean((1, 2, 3))
    down = np.square(np.diff(images, axis=2)).mean((1, 2, 3))
    vertical, horizontal = ([across[labels // 5 == n].mean() / down[labels // 5 == n].mean()] for n in (0, 2))
    assert vertical[0] > 1.2
    assert horizontal[0] < 1 / 1.2
    again, _ = balanced_images(range(20), 60, np.random.default_rng(0))
    assert np.array_equal(images, again)
    assert np.bincount(labels).tolist() == [60] * 20


def test_sources_of_the_zoo_are_known_by_name() -> None:
    assert [shapes_source(name).name for name in NETWORKS] == ["residual", "plain", "separable"]
    assert isinstance(shapes_source("plain"), Source)
