"""What `flexfed levels` shows, against documented sizes, networks built narrow, and what runs know of themselves."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toy import lines, run_toy

with warnings.catch_warnings():  # typer imports names that newer versions of click deprecate
    warnings.simplefilter("ignore", DeprecationWarning)
    from typer.testing import CliRunner, Result

from flexfed import cli
from flexfed.levels import LISTED, Overview, _listed, natural_input, overview_of_model, overview_of_run
from flexfed.models import MODELS, check_model
from flexfed.narrowing import narrow
from flexfed.select import prefix_ratio
from flexfed.submodel import extract


def levels(*words: str) -> Result:
    return CliRunner().invoke(cli.app, ["levels", *words])


def overview(model: str, **values: Any) -> Overview:
    return overview_of_model(model, 10, None, {key.replace("_", "-"): value for key, value in values.items()})


# --- costs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("cnn", 57_706),
        ("heterofl-conv", 1_556_874),
        ("heterofl-resnet18", 11_172_170),
        ("fedlps-cnn", 21_840),
        ("fedlps-vgg11", 9_231_114),
    ],
)
def test_a_network_has_its_documented_size_at_its_natural_input(model: str, parameters: int) -> None:
    found = overview_of_model(model, 10, None, {"heterofl.ratios": "1"})
    assert [(cost.level, cost.parameters, cost.share) for cost in found.costs] == [("a", parameters, 1)]
    assert f"{parameters:,} parameters" in found.to_text()
    assert "assumed" in found.to_text()


def test_resnet18_costs_what_its_paper_says() -> None:
    """1.8 billion multiply-adds at 224 pixels, (He et al., 2016), table 1."""
    (cost,) = overview_of_model("resnet18", 1000, None, {"heterofl.ratios": "1"}).costs
    assert cost.parameters == 11_689_512
    assert cost.macs == pytest.approx(1.8e9, rel=0.02)


@pytest.mark.parametrize("model", [*MODELS, "inception_v3", "alexnet"])
def test_natural_inputs_are_taken(model: str) -> None:
    shape, why = natural_input(model)
    check_model(model, 10, shape)
    assert why


def macs_by_hooks(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-adds of convolutions and linear layers, from the sizes of what passes through them."""
    counted: list[int] = []

    def count(module: nn.Module, args: Any, result: torch.Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        counted.append(weight.numel() // weight.shape[0] * result[0].numel())

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            module.register_forward_hook(count)
    model(torch.zeros(2, *shape))
    return sum(counted)


def test_each_level_costs_what_its_narrow_network_has() -> None:
    ratios = (1.0, 0.5, 0.3)
    found = overview_of_model("cnn1d", 6, (3, 64), {"heterofl.ratios": "1, 0.5, 0.3"})
    task = found.task
    arrays = {name: np.zeros(shape, dtype=np.float32) for name, shape in task.layout.shapes.items()}
    whole = sum(array.size for array in arrays.values())
    assert [(cost.level, cost.ratio) for cost in found.costs] == list(zip("abc", ratios, strict=True))
    for cost in found.costs:
        assert cost.ratio is not None
        network = narrow(task.factory, extract(task.layout, prefix_ratio(task.layout, cost.ratio), arrays))
        size = sum(parameter.numel() for parameter in network.parameters())
        assert (cost.parameters, cost.share) == (size, size / whole)
        assert 4 * size <= cost.message_bytes <= math.ceil(1.02 * 4 * size) + 256 * len(arrays)
        assert cost.macs == macs_by_hooks(network, (3, 64))
        assert 4 * size < cost.training_bytes < cost.memory_bytes


def test_training_settings_count(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("optimizer = 'adam'\n")
    plain, adam, larger = (
        json.loads(levels("cnn", "--json", *words).output)
        for words in ([], ["-c", str(file)], ["--batch-size", "64", "-c", "batch-size=2"])
    )
    assert (adam["training"]["optimizer"], larger["training"]["batch-size"]) == ("adam", 64)
    for other in (adam, larger):
        assert other["levels"][0]["training-bytes"] > plain["levels"][0]["training-bytes"]
        assert other["levels"][0]["memory-bytes"] > plain["levels"][0]["memory-bytes"]


# --- groups -------------------------------------------------------------------------------------------------------


def tied(model: str, shape: tuple[int, ...], classes: int) -> dict[str, tuple[int, bool, tuple[str, ...]]]:
    found = overview_of_model(model, classes, shape, {"heterofl.ratios": "1"})
    return {group.name: (group.units, group.fixed, group.modules) for group in found.groups}


def test_groups_of_every_kind_of_tie() -> None:
    """A residual sum, a depthwise convolution, a norm behind a concatenation (of two groups), class outputs."""
    assert tied("toy:Ties", (1, 4, 4), 3) == {
        "stem": (6, False, ("stem", "norm", "back", "depthwise", "joined")),
        "inner": (5, False, ("inner",)),
        "side": (4, False, ("side", "joined")),
        "fc": (7, False, ("fc",)),
        "classifier": (3, True, ("classifier",)),
    }


def test_a_listing_keeps_to_its_line_and_counts_the_rest() -> None:
    names = [f"layer{i}.{j}.norm" for i in range(9) for j in range(9)]
    shown, _, rest = _listed(names).partition(" and ")
    assert len(shown) <= LISTED
    assert shown.split(", ") == names[: len(shown.split(", "))]
    assert rest == f"{81 - len(shown.split(', '))} more"
    assert _listed(["stem", "a.0.conv", "a.0.norm", "b.norm"]) == "stem, a.0.{conv, norm}, b.norm"
    assert _listed(["x" * 200, "y"]) == "x" * 200 + " and 1 more"


def test_the_text_has_one_line_a_group_and_marks_the_class_outputs() -> None:
    found = overview("flexfl-resnet34", **{"heterofl.ratios": "1"})
    text = found.to_text().splitlines()
    start = next(number for number, line in enumerate(text) if line.startswith("group"))
    listing = text[start + 1 : text.index("", start)]
    assert [line.split()[:2] for line in listing] == [[group.name, str(group.units)] for group in found.groups]
    assert [line.split()[0] for line in listing if "class outputs" in line] == ["classifier"]
    assert max(map(len, text)) <= 130


# --- the command --------------------------------------------------------------------------------------------------


def test_the_table_shows_the_numbers() -> None:
    said = levels("cnn", "--ratios", "1, 0.5", "--input", "1x8x8")
    assert said.exit_code == 0
    assert "assumed" not in said.output
    rows = [" ".join(line.split()) for line in said.output.splitlines()]
    assert "level ratio parameters share one way MACs training memory must be free" in rows
    (row,) = (row for row in rows if row.startswith("b 0.5 "))
    assert row.startswith("b 0.5 14,906 25.8 % 64.9 kB 161 k ")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["resnet19"], "unknown model 'resnet19'"),
        (["cnn", "--input", "8 by 8"], "written 3x32x32"),
        (["cnn", "--input", "3x2x2"], "needs at least 4x4 pixels"),
        (["cnn", "--ratios", "0.5, 1"], "heterofl.ratios must fall"),
        (["cnn", "--ratios", "half"], "heterofl.ratios must be numbers"),
        (["cnn", "-c", "batch-sise=3"], "did you mean batch-size"),
        (["./nothing"], "is no run folder"),
    ],
)
def test_what_cannot_be_is_one_line(words: list[str], reason: str) -> None:
    said = levels(*words)
    assert said.exit_code == 1
    assert said.output.startswith("error: ")
    assert said.output.count("\n") == 1
    assert reason in said.output


def test_it_needs_no_app_but_for_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_app = levels("cnn").output
    monkeypatch.setattr(cli, "APP_DIR", tmp_path)
    assert levels("cnn").output == with_app
    assert "pyproject.toml, server_app.py missing" in levels("cnn", "-c", "batch-size=3").output


# --- of a run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_toy(tmp_path_factory.mktemp("runs"), "flexfl", {"batch-size": 32})


def test_a_run_shows_its_own_levels(run: Path) -> None:
    found = overview_of_run(run)
    summary = json.loads((run / "summary.json").read_text())
    assert {cost.level: cost.parameters for cost in found.costs} == summary["level-parameters"]
    assert [cost.level for cost in found.costs] == ["S", "M-", "M", "L-", "L"]
    assert [f"accuracy-{cost.level}" in lines(run)[-1] for cost in found.costs] == [True] * 5
    assert (found.task.input_shape, found.task.training.batch_size) == ((1, 8, 8), 32)
    text = levels(str(run)).output
    assert "cnn of " in text
    assert "(flexfl, round 1)" in text
    assert "batch 32" in text
    assert "ratio" not in text


def test_a_run_has_its_own_settings(run: Path) -> None:
    said = levels(str(run), "--classes", "3", "-c", "seed=2")
    assert said.exit_code == 1
    assert "--classes, -c: a run has its own" in said.output


def test_a_run_without_a_checkpoint_says_how_to_go_on(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes((run / "config.toml").read_bytes())
    said = levels(str(tmp_path))
    assert said.exit_code == 1
    assert f"the run in {tmp_path} has no checkpoint" in said.output
    assert "resume=" in said.output
