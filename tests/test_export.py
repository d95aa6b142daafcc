"""An exported level stands alone, and gives the accuracy that the run reported for it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from toy import lines, run_toy

with warnings.catch_warnings():  # typer imports names that newer versions of click deprecate
    warnings.simplefilter("ignore", DeprecationWarning)
    from typer.testing import CliRunner, Result

import flexfed.export
from flexfed import cli
from flexfed.batchnorm import norm_widths
from flexfed.checkpoint import load_checkpoint, save_checkpoint
from flexfed.codecs import quantise
from flexfed.data import DataConfig, load_server, normalise
from flexfed.evaluation import with_statistics
from flexfed.exits import depth_keys, exit_factory
from flexfed.export import export_level, exported_facts, file_stem, load_exported, plain_network, to_onnx
from flexfed.levels import overview_of_run, read_levels
from flexfed.models import model_factory
from flexfed.narrowing import narrow
from flexfed.networks import travelling
from flexfed.select import prefix_ratio
from flexfed.submodel import extract
from flexfed.training import Samples
from flexfed.units import trace_layout

needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(package) for package in ("onnx", "onnxscript")),
    reason="needs onnx and onnxscript: pip install -e '.[onnx]'",
)


def tracked(num_classes: int, width: int = 8) -> nn.Sequential:
    """A network whose norms keep running statistics, as torchvision's do."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(1),
        nn.Linear(width * 16, num_classes),
    )


def without_norm(num_classes: int) -> nn.Sequential:
    """Nothing to have statistics of."""
    return nn.Sequential(nn.Flatten(1), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, num_classes))


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "flexfl": ("flexfl", {}),
    "heterofl": ("heterofl", {}),
    "fedavg": ("fedavg", {}),
    "compressed": ("compressed", {"compressed.ladder": "full, p50, p50q8, q4"}),
    "tracked": ("fedavg", {"model": "test_export:tracked"}),
    "small-tracked": ("small", {"model": "test_export:tracked", "small.ratio": 0.5}),
    "batch": ("fedavg", {"batch-norm": "batch"}),
    "heterofl-batch": ("heterofl", {"heterofl.batch-norm": "batch"}),
    "without-norm": ("fedavg", {"model": "test_export:without_norm", "batch-norm": "batch"}),
    "seldom-evaluated": ("fedavg", {"num-server-rounds": 4, "evaluate-every": 2}),
}
MADE: dict[str, Path] = {}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    MADE.clear()
    return tmp_path_factory.mktemp("runs")


def run(runs: Path, name: str) -> Path:
    """A run of the table, made when it is first asked for."""
    if name not in MADE:
        MADE[name] = run_toy(runs / name, *RUNS[name])
    return MADE[name]


def copied(source: Path, target: Path) -> Path:
    """A run that may be harmed."""
    shutil.copytree(source, target)
    return target


def test_split(facts: Mapping[str, str]) -> Samples:
    """The server's, normalised as a file says."""
    mean, std = (tuple(json.loads(facts[key])) for key in ("input-mean", "input-std"))
    return normalise(load_server(DataConfig()).test, mean, std)


test_split.__test__ = False  # type: ignore[attr-defined]


def test_a_quantised_level_is_exported_on_its_levels(runs: Path, tmp_path: Path) -> None:
    folder = run(runs, "compressed")
    for level, is_quantised in (("p50q8", True), ("p50", False)):
        model = load_exported(export_level(folder, level, tmp_path, with_onnx=False).network)
        weights = [p.detach().numpy() for p in model.parameters() if p.ndim > 1]
        assert all(np.array_equal(weight, quantise(weight, 8)) == is_quantised for weight in weights)
        assert all(0.4 < np.mean(weight == 0) < 0.6 or is_quantised for weight in weights)
    costs = {cost.level: cost.message_bytes for cost in overview_of_run(folder).costs}
    assert costs["p50q8"] < 0.5 * costs["p50"] < 0.5 * costs["full"]


@torch.no_grad()
def accuracy(model: nn.Module, samples: Samples) -> float:
    """Sample by sample in one batch of another size than the run's, so that statistics of a batch would show."""
    logits = torch.cat([model(inputs[None]) for inputs in samples.inputs])
    return int((logits.argmax(1) == samples.labels).sum()) / len(samples.labels)


# --- the network --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("flexfl", ["S", "M-", "M", "L-", "L"]),
        ("heterofl", ["b", "a"]),
        ("fedavg", ["full"]),
        ("compressed", ["p50q8", "p50", "full"]),
        ("tracked", ["full"]),
        ("small-tracked", ["small"]),
        ("without-norm", ["full"]),
    ],
)
def test_every_level_gives_the_accuracy_the_run_reported(
    runs: Path, tmp_path: Path, name: str, levels: list[str]
) -> None:
    folder = run(runs, name)
    (line,) = lines(folder)
    assert list(read_levels(folder).parts) == levels
    for level in levels:
        written = export_level(folder, level, tmp_path, with_onnx=False)
        model = load_exported(written.network)
        assert not model.training
        assert accuracy(model, test_split(written.facts)) == line[f"accuracy-{level}"]
        assert float(written.facts["accuracy"]) == line[f"accuracy-{level}"]


def test_norms_that_kept_no_statistics_stand_alone(runs: Path, tmp_path: Path) -> None:
    """Those of its own level: a smaller one's differ."""
    networks = [load_exported(export_level(run(runs, "heterofl"), n, tmp_path, False).network) for n in ("b", "a")]
    for model in networks:
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        assert len(norms) == 3
        assert all(norm.track_running_stats and norm.running_mean is not None for norm in norms)
    small, large = (network.state_dict()["norm2.running_mean"] for network in networks)
    assert not torch.allclose(small, large[: len(small)], rtol=1e-3)


@pytest.mark.parametrize(("name", "width"), [("tracked", 8), ("small-tracked", 4)])
def test_the_file_is_the_state_dict_of_a_network_built_narrow_by_hand(
    runs: Path, tmp_path: Path, name: str, width: int
) -> None:
    path = export_level(run(runs, name), out=tmp_path, with_onnx=False).network
    by_hand = tracked(10, width)
    by_hand.load_state_dict(load_file(path), strict=True)
    inputs = torch.rand(5, 1, 8, 8)
    assert torch.equal(by_hand.eval()(inputs), load_exported(path)(inputs))


def test_the_file_says_what_it_is(runs: Path) -> None:
    folder = run(runs, "flexfl")
    written = export_level(folder, "M-", with_onnx=False)
    facts = exported_facts(written.network)
    checkpoint = load_checkpoint(folder / "checkpoint")
    assert checkpoint is not None
    assert written.network == folder.resolve() / "export" / "M-.safetensors"
    assert {key: facts[key] for key in ("format", "model", "level", "strategy", "run")} == {
        "format": "flexfed network 1",
        "model": "cnn",
        "level": "M-",
        "strategy": "flexfl",
        "run": folder.name,
    }
    numbers = {key: json.loads(facts[key]) for key in ("num-classes", "input-shape", "round", "parameters")}
    parameters = json.loads((folder / "summary.json").read_text())["level-parameters"]["M-"]
    assert numbers == {"num-classes": 10, "input-shape": [1, 8, 8], "round": 1, "parameters": parameters}
    for key in ("input-mean", "input-std"):  # bit for bit
        assert json.loads(facts[key]) == checkpoint.facts[key]


def test_the_default_is_the_level_that_the_run_reports(runs: Path, tmp_path: Path) -> None:
    written = export_level(run(runs, "heterofl"), out=tmp_path / "a" / "b", with_onnx=False)
    assert written.network == tmp_path / "a" / "b" / "a.safetensors"
    assert float(written.facts["accuracy"]) == lines(run(runs, "heterofl"))[0]["accuracy"]


def test_loading_needs_neither_flower_nor_a_method(runs: Path, tmp_path: Path) -> None:
    path = export_level(run(runs, "heterofl"), out=tmp_path, with_onnx=False).network
    code = (
        "import sys; from flexfed.export import load_exported; "
        f"assert not load_exported({str(path)!r}).training; "
        "loaded = {name.split('.')[0] for name in sys.modules}; "
        "print(sorted(loaded & {'flwr', 'strategies', 'ray', 'torch_pruning', 'datasets', 'matplotlib', 'onnx'}))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=cli.APP_DIR)
    assert (told.stdout, told.stderr) == ("[]\n", "")


# --- what a run may lack ------------------------------------------------------------------------------------------


def unfinished(source: Path, target: Path) -> Path:
    """The run as it was a round before its end, with a line more than its checkpoint knows of."""
    folder = copied(source, target)
    *_, newest = sorted((folder / "checkpoint").iterdir())
    newest.unlink()
    for name in ("summary.json", "model.safetensors"):
        (folder / name).unlink()
    return folder


def test_an_unfinished_run_is_as_its_newest_checkpoint_has_it(runs: Path, tmp_path: Path) -> None:
    """Its last round was not evaluated: the statistics are older than the weights, and it says so."""
    folder = unfinished(run(runs, "seldom-evaluated"), tmp_path / "run")
    written = export_level(folder, with_onnx=False)
    assert (written.facts["round"], written.facts["statistics-round"]) == ("3", "2")
    assert "accuracy" not in written.facts
    (note,) = written.notes
    assert "weights are of round 3, the batch-norm statistics of round 2" in note
    assert "accuracy" not in written.to_text()
    whole = load_exported(export_level(run(runs, "seldom-evaluated"), None, tmp_path, False).network)
    assert not torch.equal(
        load_exported(written.network).state_dict()["conv1.weight"], whole.state_dict()["conv1.weight"]
    )


def test_a_run_that_was_never_evaluated_has_no_statistics_yet(runs: Path, tmp_path: Path) -> None:
    folder = copied(run(runs, "fedavg"), tmp_path / "run")
    checkpoint = load_checkpoint(folder / "checkpoint")
    assert checkpoint is not None
    save_checkpoint(folder / "checkpoint", replace(checkpoint, statistics={}))
    with pytest.raises(ValueError, match=r"none of its 1 rounds was evaluated; .* evaluate-every=1"):
        export_level(folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("batch", r"those of each test batch \(batch-norm = 'batch'\).* start the run anew with batch-norm='static'"),
        ("heterofl-batch", r"\(heterofl.batch-norm = 'batch'\).* heterofl.batch-norm='federated' or 'proxy'"),
    ],
)
def test_a_run_tested_with_statistics_of_the_batch_is_refused(
    runs: Path, tmp_path: Path, name: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        export_level(run(runs, name), out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_level_and_no_folder_for_the_files(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no level 'XL'; it has S, M-, M, L-, L"):
        export_level(run(runs, "flexfl"), "XL")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="expected a folder for the files"):
        export_level(run(runs, "flexfl"), out=tmp_path / "file")


def test_a_run_without_a_checkpoint(runs: Path, tmp_path: Path) -> None:
    folder = copied(run(runs, "fedavg"), tmp_path / "run")
    shutil.rmtree(folder / "checkpoint")
    with pytest.raises(ValueError, match="has no checkpoint: the first is written"):
        export_level(folder)
    with pytest.raises(ValueError, match="is no run folder"):
        export_level(tmp_path)


def test_what_is_no_exported_network_is_refused(runs: Path, tmp_path: Path) -> None:
    folder = run(runs, "fedavg")
    with pytest.raises(ValueError, match="is no exported network: expected format 'flexfed network 1', got None"):
        load_exported(folder / "model.safetensors")
    path = export_level(folder, out=tmp_path, with_onnx=False).network
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read, it may be truncated"):
        load_exported(path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_exported(tmp_path / "none")


def test_a_kill_while_it_is_written_leaves_the_file_before(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export_level(run(runs, "fedavg"), out=tmp_path, with_onnx=False).network
    before = path.read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        export_level(run(runs, "tracked"), out=tmp_path, with_onnx=False)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_file_names_are_safe_and_tell_levels_apart() -> None:
    names = ["S", "M-", "M", "a", "0.5", "a/b", "a%2Fb", "../up", "..", "né e"]
    files = [f"{file_stem(name)}.safetensors" for name in names]
    assert files[:5] == ["S.safetensors", "M-.safetensors", "M.safetensors", "a.safetensors", "0.5.safetensors"]
    assert len(set(files)) == len(names)
    assert all(Path(file).name == file and file.isascii() and " " not in file for file in files)


# --- ONNX ---------------------------------------------------------------------------------------------------------


def onnx_differs_by(data: bytes, model: nn.Module, shape: Sequence[int]) -> float:
    """The largest difference between the outputs of a network and of its ONNX, over several batch sizes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="onnx")
        import onnx
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(onnx.load_model_from_string(data))
    worst = 0.0
    for num in (1, 2, 7):
        inputs = torch.randn(num, *shape, generator=torch.Generator().manual_seed(num))
        with torch.no_grad():
            expected: Tensor = model(inputs)
        (got,) = evaluator.run(["logits"], {"inputs": inputs.numpy()})
        assert got.shape == expected.shape
        worst = max(worst, float((torch.from_numpy(got) - expected).abs().max()))
    return worst


@needs_onnx
def test_onnx_gives_the_same_outputs_for_any_batch(
    runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    written = export_level(run(runs, "flexfl"), "M-", tmp_path)
    assert written.onnx == tmp_path / "M-.onnx"
    assert written.notes == ()
    assert capfd.readouterr() == ("", "")  # the exporter talks much
    assert onnx_differs_by(written.onnx.read_bytes(), load_exported(written.network), (1, 8, 8)) < 1e-4


@needs_onnx
def test_onnx_says_what_it_is(runs: Path, tmp_path: Path) -> None:
    import onnx

    written = export_level(run(runs, "tracked"), out=tmp_path)
    assert written.onnx is not None
    model = onnx.load(written.onnx)
    assert {entry.key: entry.value for entry in model.metadata_props} == written.facts
    (dims,) = [value.type.tensor_type.shape.dim for value in model.graph.input]
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 1, 8, 8]


@needs_onnx
@pytest.mark.parametrize(
    ("name", "shape"), [("heterofl-resnet18", (3, 8, 8)), ("cnn1d", (3, 64)), ("toy:Ties", (1, 4, 4))]
)
def test_other_networks_can_be_onnx_too(name: str, shape: tuple[int, ...]) -> None:
    """Residual sums, one dimension, depthwise convolutions and concatenations; each cut to a quarter."""
    factory = model_factory(name, 10, shape)
    layout = trace_layout(factory, shape)
    torch.manual_seed(0)
    arrays = {key: tensor.detach().numpy() for key, tensor in travelling(factory()).items()}
    part = extract(layout, prefix_ratio(layout, 0.25), arrays)
    found = {
        layer: (torch.rand(n).numpy(), torch.rand(n).numpy() + 0.5)
        for layer, n in norm_widths(narrow(factory, part)).items()
    }
    assert found
    network = plain_network(factory, with_statistics(part, found))
    assert onnx_differs_by(to_onnx(network, shape, {}), network, shape) < 1e-4


@needs_onnx
@pytest.mark.parametrize("ensemble", [True, False])
def test_networks_that_end_at_an_exit_can_be_onnx_too(ensemble: bool) -> None:
    """Of those whose classifiers predict together, the file has the mean."""
    shape = (1, 8, 8)
    factory = exit_factory(model_factory("cnn", 10, shape), ("relu1", "relu2", "relu3"), "depthfl", shape, 10, ensemble)
    torch.manual_seed(0)
    arrays = {key: tensor.detach().numpy() for key, tensor in travelling(factory()).items()}
    part = {name: arrays[name] for name in depth_keys(factory)[1]}
    found = {
        n: (np.zeros(k, np.float32), np.ones(k, np.float32)) for n, k in norm_widths(narrow(factory, part)).items()
    }
    network = plain_network(factory, with_statistics(part, found))
    assert onnx_differs_by(to_onnx(network, shape, {}), network, shape) < 1e-4


class OfTwo(nn.Linear):
    """Adds 1, unless there are two samples."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[0] == 2 else super().forward(x) + 1


@needs_onnx
def test_a_network_for_one_batch_size_is_no_onnx() -> None:
    """The exporter alone fixes the batch of its example, without a word."""
    with pytest.raises(ValueError, match="reads the size of its batch"):
        to_onnx(OfTwo(3, 3).eval(), (3,), {})


def test_without_the_packages_it_says_how_to_get_them(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flexfed.export, "find_spec", lambda package: None)
    written = export_level(run(runs, "fedavg"), out=tmp_path)
    assert written.onnx is None
    assert written.notes[0].startswith("no .onnx file: onnx and onnxscript not installed")
    assert "pip install -e '.[onnx]'" in written.notes[0]


def test_a_failing_exporter_is_a_note_and_leaves_no_older_file(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> bytes:
        try:
            raise KeyError("aten.strange\nand a page of advice")
        except KeyError as error:
            raise RuntimeError("Failed to export the model. This is step 1/3\n...") from error

    monkeypatch.setattr(flexfed.export, "find_spec", lambda package: object())
    monkeypatch.setattr(flexfed.export, "to_onnx", fails)
    (tmp_path / "full.onnx").write_bytes(b"of an earlier export")
    written = export_level(run(runs, "fedavg"), out=tmp_path)
    assert written.onnx is None
    assert "could not export this network: KeyError: " in written.notes[0]
    assert "aten.strange" in written.notes[0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["full.safetensors"]


# --- the command --------------------------------------------------------------------------------------------------


def export(*words: str) -> Result:
    return CliRunner().invoke(cli.app, ["export", *words])


def test_the_command_says_what_it_wrote_and_how_to_load_it(runs: Path, tmp_path: Path) -> None:
    said = export(str(run(runs, "flexfl")), "--level", "S", "--out", str(tmp_path), "--no-onnx")
    path = tmp_path / "S.safetensors"
    facts = exported_facts(path)
    assert said.exit_code == 0
    head, file, inputs, _, load = said.output.splitlines()
    assert head.startswith(f"level S of cnn, round 1: {int(facts['parameters']):,} parameters, accuracy ")
    assert file.startswith(f"{path}  ")
    assert inputs.startswith("inputs: n x 1x8x8, normalised by channel with mean 0.3")
    scope: dict[str, Any] = {}
    exec(load, scope)
    assert scope["model"](torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_the_command_fails_in_one_line(runs: Path) -> None:
    said = export(str(run(runs, "fedavg")), "--level", "M")
    assert (said.exit_code, said.output) == (1, "error: the run has no level 'M'; it has full\n")
