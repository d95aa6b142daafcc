"""On a real GPU: every method gives what it gives on the CPU, near enough, and the same bits again.

Skipped where torch sees none: `tests/test_elsewhere.py` says there what can be said without one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from placing import RUNS, run_named
from torch import nn
from toy import InProcessGrid, final_model, lines, run_toy, same_bits, toy_config
from toy_zoo import toy_zoos

import client_app
import server_app
from flexfed.compute import described, free_gpu_memory, torch_device, use
from flexfed.runs import RunFolder, load_run
from flexfed.training import Samples, Training, evaluate, fit

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
    # What has no deterministic kernel is named by torch, and by us in docs/gpu.md: no failure.
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),
    # A driver's or a library's advice is not ours to mend.
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]
CUDA = {"torch-device": "cuda"}
NEAR = 0.1
"""Of a loss after two rounds, relative: kernels round otherwise, and training carries that on."""


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """The CPU's tests, which may run in this process too, find torch as they would without these."""
    torch_device.cache_clear()
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before
    torch.utils.deterministic.fill_uninitialized_memory = fills


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_the_gpu_is_near_one_on_the_cpu(tmp_path: Path, name: str) -> None:
    with toy_zoos():
        here, there = run_named(tmp_path / "cpu", name), run_named(tmp_path / "gpu", name, torch_device="cuda")
    assert not any(line["failed"] or line["refused"] for line in lines(there))
    model = final_model(there)
    assert all(np.isfinite(array).all() for array in model.values())
    first, same = lines(here)[0], lines(there)[0]
    assert same["cohort"] == first["cohort"], "who is drawn does not depend on where networks compute"
    if "loss" in first:
        assert same["loss"] == pytest.approx(first["loss"], rel=NEAR)
    summary = load_run(there).summary
    assert summary is not None
    assert summary["torch-device"] == described(torch.device("cuda", 0))
    assert summary["torch-device"].startswith("cuda (")


@pytest.mark.parametrize("name", RUNS)
def test_the_same_seed_gives_the_same_bits_on_the_same_gpu(tmp_path: Path, name: str) -> None:
    with toy_zoos():
        one, other = (run_named(tmp_path / each, name, torch_device="cuda") for each in ("one", "other"))
    assert lines(one) == lines(other)
    assert same_bits(final_model(one), final_model(other))


@pytest.mark.parametrize("strategy", ["fedavg", "depthfl", "fedlps", "fiarse", "flexfl"])
def test_bfloat16(tmp_path: Path, strategy: str) -> None:
    values = {**CUDA, "num-server-rounds": 2}
    exact = run_toy(tmp_path / "float32", strategy, values)
    near, again = (run_toy(tmp_path / each, strategy, {**values, "precision": "bfloat16"}) for each in ("a", "b"))
    assert not any(line["failed"] or line["refused"] for line in lines(near))
    assert same_bits(final_model(near), final_model(again))
    assert not same_bits(final_model(near), final_model(exact))
    assert lines(near)[-1]["loss"] == pytest.approx(lines(exact)[-1]["loss"], rel=0.25)


class Killed(BaseException):
    """What stands for a kill."""


@pytest.mark.parametrize("strategy", ["fedavg", "fedlps", "fiarse", "depthfl"])
def test_killed_and_resumed_is_never_killed(tmp_path: Path, strategy: str) -> None:
    def run(folder: Path, **more: str) -> Path:
        config = toy_config(folder, strategy, {**CUDA, "num-server-rounds": 3, **more})
        with patch("flexfed.report.curves_png"):
            return server_app.run(InProcessGrid(client_app.app, 4, config), config, "00000001")

    def at_the_third(self: RunFolder, metrics: dict[str, int]) -> None:
        if metrics["round"] == 3:
            raise Killed
        append(self, metrics)

    whole, append = run(tmp_path / "whole"), RunFolder.append_round
    with patch.object(RunFolder, "append_round", at_the_third), pytest.raises(Killed):
        run(tmp_path / "left")
    (left,) = (tmp_path / "left").iterdir()
    assert len(lines(left)) == 2
    assert run(tmp_path / "left", resume=str(left)) == left
    assert lines(left) == lines(whole)
    assert same_bits(final_model(left), final_model(whole))


def test_a_run_may_go_on_elsewhere_if_it_was_told_auto(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As on a machine with a GPU, and then on one without."""
    auto = {"torch-device": "auto"}
    left = run_toy(tmp_path, values={**auto, "num-server-rounds": 1})
    torch_device.cache_clear()
    with patch.object(torch.cuda, "is_available", lambda: False):
        again = run_toy(tmp_path, values={**auto, "num-server-rounds": 2, "resume": str(left)})
    assert again == left
    summary = load_run(left).summary
    assert summary is not None
    assert summary["torch-device"].endswith(", then cpu")
    assert "on another device its bits differ" in caplog.text


# --- what each device does ------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))


def images() -> Samples:
    rng = np.random.default_rng(0)
    return Samples(torch.from_numpy(rng.standard_normal((24, 1, 8, 8), dtype=np.float32)), torch.arange(24) % 10)


def test_training_and_tests_follow_the_network() -> None:
    found = []
    for device in (torch.device("cpu"), use("cuda")):
        model = network().to(device)
        result = fit(model, images(), Training(local_epochs=2, batch_size=8), 0.05, np.random.default_rng(0))
        tested = evaluate(model, images(), 8)
        assert {tensor.device.type for tensor in model.state_dict().values()} == {device.type}
        found.append((result.loss, tested.loss, result.num_samples, tested.num_samples))
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_what_was_used_is_really_used() -> None:
    assert use("cuda") == torch.device("cuda", 0)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.allow_tf32
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
    before = free_gpu_memory()
    assert before is not None
    held = torch.empty(2**26, dtype=torch.uint8, device="cuda")
    after = free_gpu_memory()
    assert after is not None
    assert before - after == pytest.approx(held.nbytes, rel=0.5)


def test_convolutions_are_float32_not_tf32() -> None:
    """TF32 keeps 10 bits of each factor: errors of about 4e-4 here, where those of float32 are below 3e-5."""
    device = use("cuda")
    rng = np.random.default_rng(0)
    inputs, weight = (torch.from_numpy(rng.standard_normal(s)) for s in ((4, 64, 16, 16), (64, 64, 3, 3)))
    exact = nn.functional.conv2d(inputs, weight)
    found = nn.functional.conv2d(inputs.float().to(device), weight.float().to(device)).double().cpu()
    assert float((found - exact).abs().max() / exact.abs().max()) < 1e-4
