from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from toy import ROOT, ScriptedGrid, final_model, lines, run_toy, toy_config

import client_app
import server_app
from flexfed.bandits import BanditConfig
from flexfed.config import Experiment, Settings, keys_of, read
from flexfed.data import DataConfig
from flexfed.methods import METHODS
from flexfed.methods.flexfl import FlexFLConfig
from flexfed.methods.heterofl import HeteroFLConfig
from flexfed.overrides import defaults
from flexfed.training import Training
from strategies import STRATEGIES

# --- what stands in pyproject.toml ------------------------------------------------------------------------------


def knobs() -> dict[str, Any]:
    """Every knob with its default, as the dataclasses have it; a client's own folder is told by its node-config."""
    found = {**keys_of(Settings), **keys_of(DataConfig), **keys_of(Training), **keys_of(BanditConfig, "bandit.")}
    del found["data-path"]
    for method in METHODS.values():
        found.update(keys_of(method.config, method.prefix))
    return found


def test_pyproject_holds_every_knob_with_its_default_and_no_other() -> None:
    written = defaults(ROOT)
    assert written.keys() == knobs().keys()
    for key, default in knobs().items():
        assert written[key] == default, key
        assert type(written[key]) is type(default), key


def test_settings_and_data_share_the_seed_only() -> None:
    shared = keys_of(Settings).keys() & keys_of(DataConfig).keys() | keys_of(Settings).keys() & keys_of(Training).keys()
    assert shared == {"seed"}
    assert not keys_of(DataConfig).keys() & keys_of(Training).keys()


def test_configuration_holds_no_list() -> None:
    """Flower's configuration takes text, numbers and true or false."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    for value in table.values():
        assert isinstance(value, str | int | float | dict)


def test_defaults_are_those_of_an_empty_configuration() -> None:
    assert Experiment.read({}) == Experiment.read(defaults(ROOT))
    assert Experiment.read({}).settings.strategy == "flexfl"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_settings_of_the_papers_are_read(path: Path) -> None:
    from flexfed.overrides import check_known, flatten, read_toml

    values = flatten(read_toml(path))
    check_known(values, defaults(ROOT))
    assert Experiment.read({**defaults(ROOT), **values})


# --- reading ----------------------------------------------------------------------------------------------------


def test_values_are_read_by_their_kind() -> None:
    experiment = Experiment.read(
        {
            "strategy": "heterofl",
            "seed": 7,
            "alpha": 1,
            "batch-size": 32,
            "drop-last": False,
            "heterofl.ratios": "1, 0.5 0.25",
            "heterofl.scaler": False,
            "flexfl.targets": "nonsense of another method",
        }
    )
    assert experiment.settings.seed == experiment.data.seed == 7
    assert experiment.data.alpha == 1.0
    assert isinstance(experiment.data.alpha, float)
    assert experiment.training == Training(batch_size=32, drop_last=False)
    assert experiment.method == HeteroFLConfig(ratios=(1.0, 0.5, 0.25), scaler=False)


def test_lists_are_one_string() -> None:
    assert read(FlexFLConfig, {"flexfl.scores": ""}, "flexfl.").scores == ()
    assert read(FlexFLConfig, {"flexfl.scores": ".5"}, "flexfl.").scores == (0.5,)
    assert read(FlexFLConfig, {"flexfl.scores": 0.5}, "flexfl.").scores == (0.5,)
    assert keys_of(FlexFLConfig, "flexfl.")["flexfl.targets"] == "0.25, 0.5"


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"batch-size": "many"}, "batch-size must be a whole number, got 'many'"),
        ({"batch-size": 16.5}, "batch-size must be a whole number, got 16.5"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"alpha": "0.3"}, "alpha must be a number, got '0.3'"),
        ({"alpha": False}, "alpha must be a number, got False"),
        ({"drop-last": 1}, "drop-last must be true or false, got 1"),
        ({"model": 3}, "model must be a string, got 3"),
        (
            {"strategy": "heterofl", "heterofl.ratios": "1.0; 0.5"},
            "heterofl.ratios must be numbers in one string, like",
        ),
        ({"strategy": "heterofl", "heterofl.weights": 1}, "heterofl.weights must be a string, got 1"),
    ],
)
def test_wrong_types_are_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Experiment.read(values)


# --- one clear error before round 1 -----------------------------------------------------------------------------

EVERYBODY = ", ".join(sorted(METHODS))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"strategy": "hetrofl"}, f"unknown strategy 'hetrofl'; known: {EVERYBODY}"),
        ({"model": "lenet"}, "unknown model 'lenet'; known: .*cnn, cnn1d.*torchvision.*package.module:factory"),
        ({"model": "no_such_package:net"}, "model 'no_such_package:net' cannot be imported"),
        ({"dataset": "digitz"}, "dataset 'digitz' could not be loaded; tried .*\"digits\""),
        ({"dataset": ""}, 'dataset must be "digits"'),
        (
            {"fleet": "skewd"},
            "unknown fleet 'skewd'; known: boards, equal, even, fedlps, fedlps-fixed, fifths, flexfl, pyramid",
        ),
        ({"partition": "dirichelt"}, "unknown partition 'dirichelt'; known: dirichlet, iid, natural, pathological"),
        ({"partition": "natural"}, "needs id-column"),
        ({"batch-norm": "frozen"}, "unknown batch-norm 'frozen'; known: batch, static"),
        ({"reply-order": "any"}, "unknown reply-order 'any'; known: arrival, auto, cohort"),
        ({"ratio-policy": "p-ucb"}, "unknown ratio-policy 'p-ucb'; known: budget, epsilon-greedy, fixed, level"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion'; known: sgd, adam"),
        ({"strategy": "small", "small.ratio": 0.0}, r"small.ratio must be in \(0, 1\], got 0"),
        ({"strategy": "small", "small.ratio": 1.5}, r"small.ratio must be in \(0, 1\], got 1.5"),
        ({"strategy": "heterofl", "heterofl.ratios": "1.0, 0"}, "heterofl.ratios must fall from at most 1 to above 0"),
        ({"strategy": "fedrolex", "fedrolex.ratios": ""}, "fedrolex.ratios must fall"),
        ({"strategy": "flexfl", "flexfl.targets": "0, 0.5"}, "flexfl.targets must be two rising sizes"),
        ({"strategy": "flexfl", "flexfl.scores": "0.5, 0.5"}, "one for each of 4 groups"),
        ({"alpha": -1.0}, "alpha must be a number > 0, got -1"),
        ({"alpha": float("nan")}, "alpha must be a number > 0, got nan"),
        ({"fraction-train": 1.5}, r"fraction-train must be in \(0, 1\], got 1.5"),
        ({"fraction-train": 0.0}, r"fraction-train must be in \(0, 1\], got 0"),
        ({"fraction-evaluate": -0.1}, r"fraction-evaluate must be in \[0, 1\]"),
        ({"num-server-rounds": 0}, "num-server-rounds must be at least 1, got 0"),
        ({"evaluate-every": 0}, "evaluate-every must be at least 1"),
        ({"replies-in-flight": -1}, "replies-in-flight must be >= 0, 0 = as it suits, got -1"),
        ({"min-replies": 0}, "min-replies must be at least 1"),
        ({"torch-threads": 0}, "torch-threads must be at least 1"),
        ({"round-timeout": 0.0}, "round-timeout must be > 0 seconds, got 0"),
        ({"seed": -1}, r"seed must be in 0\.\."),
        ({"validation-fraction": 1.0}, r"validation-fraction must be in \[0, 1\)"),
        ({"classes-per-client": 0}, "classes-per-client must be a whole number >= 1"),
        ({"learning-rate": -0.1}, "learning-rate must be > 0, got -0.1"),
        ({"batch-size": 1}, "batch-size must be at least 2"),
        ({"model": "flexfl-vgg16"}, r"model 'flexfl-vgg16' needs at least \d+x\d+ pixels; got 8x8, .*'cnn'"),
        ({"model": "cnn1d"}, r"model 'cnn1d' takes windows .*; got input shape \(1, 8, 8\), choose 'cnn'"),
        ({"model": "vit_b_16"}, "model 'vit_b_16'"),
        (
            {"runs-dir": "some/runs"},
            "runs-dir must be an absolute path or begin with '~', got 'some/runs'.*flexfed run",
        ),
        ({"runs-dir": "runs"}, "runs-dir must be an absolute path or begin with '~', got 'runs'"),
        ({"weights": "some/model.safetensors"}, "weights must be an absolute path or begin with '~'"),
        ({"weights": "/no/model.safetensors"}, "weights"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_impossible_runs_stop_before_round_1(
    values: dict[str, Any], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    grid = ScriptedGrid(client_app.app, 4, {})
    with pytest.raises(ValueError, match=match):
        server_app.run(grid, toy_config(tmp_path, "fedavg", values), "toy")
    trained = [m for m in grid.requests.values() if m.metadata.message_type == "train"]
    assert not trained
    assert not list(tmp_path.rglob("summary.json"))


def test_keys_that_do_not_exist_are_refused_in_process_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown configuration key 'learning_rate'; did you mean learning-rate"):
        server_app.run_in_process(
            {"runs-dir": str(tmp_path), "strategy": "small", "num-server-rounds": 1, "learning_rate": 1}, 4
        )


def permuted(num_classes: int, input_shape: tuple[int, ...]) -> Any:
    """Flattens with the channels last, which the tracer takes for channels first: half of it is another network."""
    from torch import Tensor, nn

    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(input_shape[0], 8, 3, padding=1)
            self.fc = nn.Linear(8 * input_shape[1] * input_shape[2], num_classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).permute(0, 2, 3, 1).flatten(1))

    return Permuted()


def test_a_network_whose_parts_are_not_its_parts_stops_before_round_1(tmp_path: Path) -> None:
    """Law 6, asked of a user's own network: no error here would be a silently wrong model."""
    with pytest.raises(ValueError, match=r"permuted|fc|layout"):
        run_toy(tmp_path, "heterofl", {"model": "test_config:permuted"})


def by_hand(num_classes: int, input_shape: tuple[int, ...]) -> Any:
    """The same network with the layout that is right for it."""
    import numpy as np

    from flexfed.units import Layout

    model, pixels = permuted(num_classes, input_shape), input_shape[1] * input_shape[2]
    channels, classes = np.arange(8), 8 + np.arange(num_classes)
    model.layout = Layout(
        groups={"conv": range(0, 8), "fc": range(8, 8 + num_classes)},
        axes={
            "conv.weight": (channels, None, None, None),
            "conv.bias": (channels,),
            "fc.weight": (classes, np.tile(channels, pixels)),
            "fc.bias": (classes,),
        },
        shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        fixed=frozenset({"fc"}),
    )
    return model


@pytest.mark.parametrize("strategy", ["heterofl", "flexfl"])
def test_a_layout_written_by_hand_carries_a_run(strategy: str, tmp_path: Path) -> None:
    sent: dict[int, int] = {}

    def listen(request: Message, reply: Message, partition: int) -> Message:
        if request.metadata.message_type == "train":
            sent[partition] = request.content.array_records["arrays"]["part"].shape[0]
        return reply

    values = {"model": "test_config:by_hand", "flexfl.scores": "0.5", "flexfl.window": 0.2}
    run = run_toy(tmp_path, strategy, values, alter=listen)
    assert lines(run)[0]["failed"] == lines(run)[0]["refused"] == []
    assert len(set(sent.values())) > 1
    assert final_model(run)["fc.weight"].shape == (10, 512)


def test_methods_and_strategies_have_the_same_names_and_their_own_prefix() -> None:
    assert METHODS.keys() == STRATEGIES.keys()
    assert all(method.prefix == f"{name}." for name, method in METHODS.items())
