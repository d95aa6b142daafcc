"""The torch device and the precision: what can be said, what is done on which, and what the record tells of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn
from toy import ROOT, InProcessGrid, final_model, lines, run_toy, same_bits, toy_config

import client_app
import server_app
from flexfed import jobs
from flexfed.checkpoint import load_checkpoint
from flexfed.compute import (
    check_device_name,
    computing,
    described,
    free_gpu_memory,
    numbers,
    place_of,
    seed_draws,
    state_numbers,
    tensors_on,
    torch_device,
    use,
)
from flexfed.devices import Device
from flexfed.jobs import free_memory_of, require_memory
from flexfed.resume import refuse_other_data
from flexfed.runs import load_run
from flexfed.submodel import Submodel
from flexfed.training import Samples, Training, evaluate, fit
from strategies.federated import FederatedStrategy

CPU = torch.device("cpu")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.fixture(autouse=True)
def _as_on_this_machine() -> Iterator[None]:
    torch_device.cache_clear()
    yield
    torch_device.cache_clear()


def gpus(monkeypatch: pytest.MonkeyPatch, num: int) -> None:
    """Have torch say that it sees so many."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num)


# --- which device -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "mps", "meta", "cpu:0", "CUDA"])
def test_other_names_are_refused_before_anything_runs(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown torch-device .* known: auto, cpu, cuda"):
        check_device_name(name)
    with pytest.raises(ValueError, match="unknown torch-device"):
        run_toy(tmp_path, values={"torch-device": name})


@pytest.mark.parametrize(
    ("num", "name", "found"),
    [(0, "cpu", "cpu"), (0, "auto", "cpu"), (2, "auto", "cuda:0"), (2, "cuda", "cuda:0"), (2, "cuda:1", "cuda:1"),
     (2, "cpu", "cpu")],
)  # fmt: skip
def test_a_name_stands_for_a_device(num: int, name: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, num)
    assert torch_device(name) == torch.device(found)


@pytest.mark.parametrize(("num", "name"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2")])
def test_a_gpu_that_is_not_there_is_refused(num: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, num)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,8")
    with pytest.raises(ValueError, match=rf"'{name}', but torch .* sees {num} GPUs here \(CUDA_VISIBLE_DEVICES='7,8'"):
        torch_device(name)


@no_gpu
def test_a_run_on_a_gpu_that_is_not_there_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torch-device='cuda', but"):
        run_toy(tmp_path, values={"torch-device": "cuda"})
    assert not list(tmp_path.iterdir())


def test_on_the_cpu_nothing_is_asked_of_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_toy(tmp_path / "before")  # torch loads a part of itself late, and looks through torch.cuda while it does
    for name in ("init", "set_device", "mem_get_info", "get_device_name"):
        monkeypatch.delattr(torch.cuda, name)
    folder = run_toy(tmp_path)
    assert load_run(folder).config["torch-device"] == "cpu", "the default"
    summary = load_run(folder).summary
    assert summary is not None
    assert summary["torch-device"] == "cpu"
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_gpu_is_used_such_that_bits_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    gpus(monkeypatch, 2)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(torch.cuda, "init", lambda: asked.append("init"))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    deterministic: Any = torch.utils.deterministic
    before = torch.backends.cudnn.allow_tf32, deterministic.fill_uninitialized_memory
    try:
        assert use("cuda:1") == torch.device("cuda:1")
        assert asked == [torch.device("cuda:1"), "init"]
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.allow_tf32, deterministic.fill_uninitialized_memory = before


def test_a_node_config_has_its_own_word(tmp_path: Path) -> None:
    """One client is told to compute on a GPU that nobody has, and fails; the run is the others'."""
    config = toy_config(tmp_path, "fedavg", {})
    grid = InProcessGrid(client_app.app, 4, config)
    grid._contexts[1002].node_config["torch-device"] = "cuda:99"
    with patch("flexfed.report.curves_png"):
        (line,) = lines(server_app.run(grid, config, "own"))
    assert [(each["partition"], "torch-device='cuda:99', but" in each["reason"]) for each in line["failed"]] == [
        (2, True)
    ]
    assert line["trained"] == {"full": 3}


# --- the record ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "told"),
    [(None, "cpu"), ({}, "cpu"), ({"torch-device": "cpu"}, "cpu"),
     ({"torch-device": "cuda (X)"}, "cuda (X), then cpu"),
     ({"torch-device": "cpu, then cuda (X)"}, "cpu, then cuda (X), then cpu")],
)  # fmt: skip
def test_a_run_tells_all_devices_that_it_was_on(before: dict[str, str] | None, told: str) -> None:
    run: Any = SimpleNamespace(place=CPU, _resumed=before if before is None else SimpleNamespace(facts=before))
    assert FederatedStrategy._torch_devices(run) == told


def test_a_checkpoint_tells_it_too(tmp_path: Path) -> None:
    found = load_checkpoint(run_toy(tmp_path) / "checkpoint")
    assert found is not None
    assert found.facts["torch-device"] == "cpu"


def test_who_goes_on_elsewhere_is_told(caplog: pytest.LogCaptureFixture) -> None:
    same = {"clients": 4, "num-classes": 2, "input-shape": [1], "input-mean": [0.0], "input-std": [1.0], "code": "x"}
    refuse_other_data({**same, "torch-device": "cpu"}, {**same, "torch-device": "cpu"})
    refuse_other_data(same, {**same, "torch-device": "cpu"})  # begun by older code
    assert not caplog.records
    refuse_other_data({**same, "torch-device": "cuda (X)"}, {**same, "torch-device": "cuda (X), then cpu"})
    assert "the run has computed on cuda (X) so far: on another device its bits differ" in caplog.text


def test_a_gpu_is_described_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    assert described(torch.device("cuda:3")) == "cuda (NVIDIA X)"
    assert described(CPU) == "cpu"


# --- tensors ------------------------------------------------------------------------------------------------------


def test_on_the_cpu_arrays_and_tensors_are_the_same_memory() -> None:
    model = nn.Linear(3, 2)
    found = state_numbers(model)
    with torch.no_grad():
        model.weight.fill_(7)
    assert (found["weight"] == 7).all()
    array = np.zeros(3, dtype=np.float32)
    tensors_on(CPU, {"a": array})["a"].fill_(2)
    assert (array == 2).all()
    assert (numbers(model.bias * 2) == 2 * found["bias"]).all()


def test_the_place_of_a_network() -> None:
    with torch.device("meta"):
        assert place_of(nn.Linear(2, 2)) == CPU, "its tensors are nowhere"
    assert place_of(nn.ReLU()) == CPU
    assert place_of(nn.BatchNorm1d(2, affine=False)) == CPU


def test_a_gpu_has_its_own_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_gpu_memory() is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 8000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 600)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 500)
    assert free_gpu_memory() == 1100
    monkeypatch.setattr(jobs, "free_memory", lambda: 5000)
    real, part = Device(0, measure_memory=True), Submodel(np.ones(1, dtype=bool))
    assert free_memory_of(real, 1) == 1100
    require_memory(real, part, lambda _: 1100)
    with pytest.raises(RuntimeError, match="out of memory"):
        require_memory(real, part, lambda _: 1101)
    monkeypatch.setattr(jobs, "free_memory", lambda: 800)
    assert free_memory_of(real, 1) == 800, "what came is in the machine's memory"


def test_a_seed_draws_what_torch_draws_from_it() -> None:
    torch.manual_seed(7)
    expected = torch.rand(5)
    seed_draws(7, CPU)
    assert torch.equal(torch.rand(5), expected)


def test_the_device_of_the_network_is_seeded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    seed_draws(7, CPU)
    seed_draws(8, torch.device("cuda", 0))
    assert seeded == [8]


# --- precision ----------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))


def images(num: int = 24) -> Samples:
    rng = np.random.default_rng(0)
    inputs = torch.from_numpy(rng.standard_normal((num, 1, 8, 8), dtype=np.float32))
    return Samples(inputs, torch.arange(num) % 10)


def test_other_precisions_are_refused() -> None:
    for name in ("float16", "fp32", ""):
        with pytest.raises(ValueError, match=f"unknown precision {name!r}; known: float32, bfloat16"):
            Training(precision=name)


def test_bfloat16_multiplies_so_and_keeps_all_else_in_float32() -> None:
    model, samples, seen = network(), images(), []
    model[4].register_forward_hook(lambda _, args, output: seen.append((args[0].dtype, output.dtype)))
    gradients = []
    model[0].weight.register_hook(lambda gradient: gradients.append(gradient.dtype))
    fit(model, samples, Training(precision="bfloat16", local_epochs=1), 0.1, np.random.default_rng(0))
    assert {dtype for pair in seen for dtype in pair} == {torch.bfloat16}
    assert set(gradients) == {torch.float32}
    assert {array.dtype for array in state_numbers(model).values()} == {np.dtype("float32"), np.dtype("int64")}


def test_bfloat16_is_near_float32_and_not_the_same() -> None:
    found = {}
    for precision in ("float32", "bfloat16", "bfloat16"):
        model = network()
        result = fit(model, images(), Training(precision=precision), 0.05, np.random.default_rng(0))
        tested = evaluate(model, images(), 8, precision)
        if precision in found:
            assert found[precision] == (result, tested), "the same seed, the same bits"
        found[precision] = result, tested
    (exact, exact_test), (near, near_test) = found["float32"], found["bfloat16"]
    assert near.loss != exact.loss
    assert near.loss == pytest.approx(exact.loss, rel=0.05)
    assert near_test.loss != exact_test.loss
    assert near_test.loss == pytest.approx(exact_test.loss, rel=0.05)


def test_a_context_is_open_no_longer_than_it_is_asked_for() -> None:
    with computing(CPU, "float32"):
        assert not torch.is_autocast_enabled("cpu")
    with computing(CPU, "bfloat16"):
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


def test_weights_that_change_inside_a_context_are_read_anew() -> None:
    layer, one = nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    with computing(CPU, "bfloat16"):
        layer(one)
        with torch.no_grad():
            layer.weight.fill_(3)
        assert layer(one).item() == 3


@pytest.mark.parametrize("strategy", ["fedlps", "fjord"])
def test_runs_in_bfloat16_learn_and_repeat(strategy: str, tmp_path: Path) -> None:
    values = {"precision": "bfloat16", "num-server-rounds": 2}
    one, other = (run_toy(tmp_path / name, strategy, values) for name in "ab")
    assert same_bits(final_model(one), final_model(other))
    assert lines(one) == lines(other)
    assert not any(line["failed"] or line["refused"] for line in lines(one))
    assert not same_bits(final_model(one), final_model(run_toy(tmp_path / "c", strategy, {"num-server-rounds": 2})))
    assert all(np.isfinite(array).all() for array in final_model(one).values())


def test_both_words_stand_in_the_configuration() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'torch-device = "cpu"' in text
    assert 'precision = "float32"' in text
