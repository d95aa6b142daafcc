"""What every strategy in the table promises: it runs on the default task with nothing but its name changed."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from toy import AVERAGING, ROOT, final_model, published

import server_app
from flexfed.methods import METHODS
from flexfed.networks import EXITS
from flexfed.overrides import defaults, flatten
from flexfed.runs import CLOCK_KEYS
from strategies import STRATEGIES
from strategies.federated import FederatedStrategy

strategies = pytest.mark.parametrize("strategy", sorted(STRATEGIES))
averaging = pytest.mark.parametrize("strategy", AVERAGING)
ROUNDS = 2
SUMMARY = {
    "strategy",
    "model",
    "dataset",
    "seed",
    "rounds",
    "parameters",
    "final",
    "last10",
    "best",
    "bytes-down",
    "bytes-up",
    "macs",
    "modelled-seconds",
    "wall-seconds",
    "client-seconds",
    "refused",
    "failed",
}
LEVELS = {
    "autoflip": {"full"},
    "compressed": {"w50", "full"},  # the first of the ladder that fits weak and medium devices, and strong ones
    "depthfl": {"a", "c"},  # weak and medium devices hold c, strong ones a
    "exclusive": {"full"},
    "fedavg": {"full"},
    "fedlps": {"full"},
    "fedrolex": {"full"},
    "fedstitch": {"stitched"},
    "fiarse": {"a", "b", "c", "d"},
    "fjord": {"a", "b", "c", "d", "e"},  # whoever holds a trains all the others inside it
    "flexfl": {"S", "M-", "M", "L-", "L"},
    "heterofl": {"a", "b"},  # weak and medium devices hold b, strong ones a
    "scalefl": {"a", "b", "c"},  # strong, medium and weak devices
    "small": {"small"},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run folder of a strategy: two rounds, four clients, the defaults, and its name."""
    runs: dict[str, Path] = {}

    def run(strategy: str) -> Path:
        if strategy not in runs:
            values = {
                "strategy": strategy,
                "num-server-rounds": ROUNDS,
                "runs-dir": str(tmp_path_factory.mktemp("runs")),
            }
            runs[strategy] = server_app.run_in_process(values, 4)
        return runs[strategy]

    return run


def read(folder: Path, name: str = "summary.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    return [value] if isinstance(value, int | float) else []


@strategies
def test_it_finishes_and_leaves_a_whole_run_folder(strategy: str, finished: Callable[[str], Path]) -> None:
    folder = finished(strategy)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.toml", "metrics.jsonl", "timing.jsonl", "summary.json", "model.safetensors", "curves.png"}
    assert (folder / "curves.png").stat().st_size > 10_000
    assert folder.name.split("-")[2] == strategy


@strategies
def test_the_summary_has_its_keys_and_is_finite(strategy: str, finished: Callable[[str], Path]) -> None:
    summary = read(finished(strategy))
    assert summary.keys() >= SUMMARY
    assert (summary["strategy"], summary["dataset"]) == (strategy, "digits")
    assert summary["model"] == ("cnn" if strategy in AVERAGING else f"stitched:shapes:{path_of(finished(strategy))}")
    assert (summary["rounds"], summary["seed"]) == (ROUNDS, 1)
    assert summary["failed"] == summary["refused"] == 0
    assert all(math.isfinite(number) for number in numbers(summary))
    assert summary["bytes-down"] > 0
    assert summary["macs"] > 0
    assert summary["modelled-seconds"] > 0


@strategies
def test_the_summary_reports_every_level_by_its_own_name(strategy: str, finished: Callable[[str], Path]) -> None:
    summary = read(finished(strategy))
    for part in ("final", "last10", "best"):
        metrics = summary[part]
        levels = {key.removeprefix("accuracy-") for key in metrics if key.startswith("accuracy-")}
        levels = {name for name in levels if not name.startswith("personal")}
        assert levels - {"levels", "clients", "worst-tenth"} == LEVELS[strategy]
        assert 0 <= metrics["accuracy"] <= 1
        assert 0 <= metrics["accuracy-levels"] <= 1
    assert list(summary).index("final") < list(summary).index("last10") < list(summary).index("best")


@strategies
def test_every_round_has_its_line_without_a_clock(strategy: str, finished: Callable[[str], Path]) -> None:
    text = (finished(strategy) / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in text]
    assert [line["round"] for line in lines] == list(range(1, ROUNDS + 1))
    for line in lines:
        assert not CLOCK_KEYS & line.keys()
        assert all(math.isfinite(number) for number in numbers(line))
        assert sum(line["dispatched"].values()) == len(line["cohort"]) > 0
        assert sum(line["trained"].values()) == len(line["cohort"])


def path_of(folder: Path) -> str:
    return "-".join(map(str, json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["stitching"]["path"]))


@averaging
def test_the_model_is_finite_and_as_large_as_the_summary_says(strategy: str, finished: Callable[[str], Path]) -> None:
    folder = finished(strategy)
    model = load_file(folder / "model.safetensors")
    trained = {name: array for name, array in model.items() if "running" not in name}
    kept = published(folder, {name: np.ones_like(array) for name, array in trained.items()})
    assert sum(int(array.sum()) for array in kept.values()) == read(folder)["parameters"]
    assert len(model) > len(trained)  # batch norm's statistics, without which the accuracy is not the one reported
    assert all(math.isfinite(float(array.sum())) for array in model.values())


@strategies
def test_the_configuration_is_kept_whole(strategy: str, finished: Callable[[str], Path]) -> None:
    kept = flatten(tomllib.loads((finished(strategy) / "config.toml").read_text()))
    expected = {**defaults(ROOT), "strategy": strategy, "num-server-rounds": ROUNDS}
    assert {**kept, "runs-dir": ""} == {**expected, "runs-dir": ""}


@averaging
def test_all_train_the_same_network(strategy: str, finished: Callable[[str], Path]) -> None:
    """Some with early exits besides."""
    plain = {name for name in final_model(finished(strategy)) if not name.startswith(f"{EXITS}.")}
    assert plain == final_model(finished("fedavg")).keys()


@strategies
def test_the_readme_lists_it(strategy: str) -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md yet")
    assert f"`{strategy}`" in readme.read_text()


@strategies
def test_it_says_what_it_is(strategy: str) -> None:
    assert issubclass(STRATEGIES[strategy], FederatedStrategy)
    assert METHODS[strategy].prefix == f"{strategy}."
    assert STRATEGIES[strategy].__doc__
    assert METHODS[strategy].config.__doc__


def test_the_two_tables_have_the_same_names() -> None:
    assert set(STRATEGIES) == set(METHODS)
    assert set(LEVELS) == set(STRATEGIES)
