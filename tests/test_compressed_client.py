"""The client of compressed local models: what stays compressed while it trains, and what it sends back."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy import Ties, random_arrays

from flexfed import jobs
from flexfed.codecs import largest_code, quantise, scale_of
from flexfed.config import Experiment
from flexfed.data import ClientData
from flexfed.devices import Device
from flexfed.jobs import Job, Task, Update
from flexfed.methods import fedavg
from flexfed.methods.compressed import CompressedConfig, local_update, memory_to_train
from flexfed.methods.compressed_tiers import compress, parse_tier
from flexfed.select import prefix_ratio
from flexfed.submodel import flatten, full, unflatten
from flexfed.training import Samples, Training, samples_trained
from flexfed.units import Layout, trace_layout

TIERS = ["full", "w50", "p50", "q8", "p50q8", "w50q4", "q4", "p90"]
tiers = pytest.mark.parametrize("name", TIERS)
PLAIN = Training(learning_rate=0.05, momentum=0.0, weight_decay=0.0, local_epochs=2, batch_size=8)
HARD = replace(PLAIN, momentum=0.9, weight_decay=0.02)
ADAM = replace(PLAIN, optimizer="adam", weight_decay=0.02, learning_rate=0.01)


SEEN: list[dict[str, np.ndarray]] = []


class Watched(Ties):
    """`Ties` that keeps in SEEN the weights that its forward passes see."""

    def forward(self, x: Tensor) -> Tensor:
        weights = {f"{n}.weight": m.weight for n, m in self.named_children() if hasattr(m, "weight")}
        if x.device.type == "cpu":
            SEEN.append({n: w.detach().numpy().copy() for n, w in weights.items()})
        return super().forward(x)


@cache
def traced() -> Layout:
    return trace_layout(Ties, (1, 4, 4))


def task_of(training: Training = PLAIN, factory: Any = Ties, **values: Any) -> Task:
    return Task(factory, traced(), (1, 4, 4), 3, training, CompressedConfig(**values))


def samples(num: int = 40, seed: int = 0) -> Samples:
    rng = np.random.default_rng(seed)
    inputs = torch.tensor(rng.standard_normal((num, 1, 4, 4)), dtype=torch.float32)
    return Samples(inputs, torch.tensor(rng.integers(0, 3, num)))


def data_of(train: Samples) -> ClientData:
    return ClientData(train, train, train, (0, 1, 2), None)  # type: ignore[arg-type]


def job_of(name: str, **values: Any) -> Job:
    layout, tier = traced(), parse_tier(name)
    arrays = random_arrays(layout, np.random.default_rng(1))
    for values_of_norm in ("norm.weight", "joined.weight"):
        arrays[values_of_norm] = np.ones_like(arrays[values_of_norm])
    part = compress(layout, prefix_ratio(layout, tier.ratio), tier, arrays)
    return Job(part.submodel, part.arrays, Device(0), {"tier": name}, seed=5, server_round=1, **values)


def trained(name: str, training: Training = PLAIN, num: int = 40, **values: Any) -> Update:
    return local_update(job_of(name), task_of(training, **values), data_of(samples(num)))


def after(update: Update) -> dict[str, np.ndarray]:
    assert update.trained is not None
    return dict(update.trained.arrays)


# --- what stays compressed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "training", [PLAIN, HARD, ADAM, replace(HARD, clip_norm=0.5)], ids=["plain", "hard", "adam", "clip"]
)
@pytest.mark.parametrize("name", ["p50", "p50q8", "p90"])
def test_pruned_weights_stay_exactly_zero(name: str, training: Training) -> None:
    update, sent = trained(name, training), job_of(name)
    assert update.submodel == sent.submodel
    for tensor, mask in sent.submodel.masks.items():
        weights = after(update)[tensor]
        assert not weights[~mask].any()
        assert (weights[mask] != sent.arrays[tensor][mask]).any()


@pytest.mark.parametrize("name", ["q8", "q4", "p50q8", "w50q4"])
def test_every_forward_pass_sees_the_levels_of_one_scale(name: str) -> None:
    job, task, bits = job_of(name), task_of(HARD, factory=Watched), parse_tier(name).bits
    SEEN.clear()
    update = local_update(job, task, data_of(samples()))
    assert len(SEEN) == update.metrics["steps"] == 10
    for i, weights in enumerate(SEEN):
        for tensor, levels in weights.items():
            if levels.ndim < 2:
                continue  # norms
            scale = scale_of(job.arrays[tensor], bits)
            codes = np.rint(levels / scale)
            assert np.array_equal(levels, codes * scale)
            assert np.abs(codes).max() <= largest_code(bits)
            assert i or np.array_equal(levels, job.arrays[tensor])
    assert any((after(update)[n] != w).any() for n, w in SEEN[-1].items() if w.ndim > 1)


@pytest.mark.parametrize("name", ["q8", "q4", "p50q8", "w50q4"])
def test_a_model_of_the_clients_own_stands_on_levels_and_its_gradient_on_latents(name: str) -> None:
    job, bits = job_of(name), parse_tier(name).bits
    update = trained(name, mode="delta")
    latents = unflatten(traced(), job.submodel, update.difference)
    for tensor, found in after(update).items():
        latent = job.arrays[tensor] + latents[tensor]
        if found.ndim > 1:
            scale = scale_of(job.arrays[tensor], bits)
            assert np.abs(found - latent).max() > 1e-4 * scale
            latent = quantise(latent, bits, scale)
        np.testing.assert_allclose(found, latent, atol=1e-6)


def test_weights_that_are_not_quantised_are_trained_as_they_are() -> None:
    job = replace(job_of("full"), config={"tier": "full"})
    for training in (PLAIN, HARD):
        ours = local_update(job, task_of(training, mode="delta"), data_of(samples()))
        theirs = fedavg.local_update(job, task_of(training), data_of(samples()))
        assert ours.difference.tobytes() == theirs.difference.tobytes()
        assert {k: ours.metrics[k] for k in theirs.metrics} == dict(theirs.metrics)


def test_gradients_are_clipped_by_what_is_kept() -> None:
    training = replace(PLAIN, clip_norm=0.01, local_epochs=1, batch_size=40)
    update = trained("p90", training, mode="delta")
    assert update.metrics["steps"] == 1
    assert np.linalg.norm(update.difference) == pytest.approx(0.05 * 0.01, rel=1e-3)


def test_frozen_tensors_stay_and_are_part_of_the_reply() -> None:
    class Frozen(Ties):
        def __init__(self) -> None:
            super().__init__()
            self.inner.weight.requires_grad_(False)

    for mode in ("delta", "grad"):
        for name in ("p50q8", "q4"):
            job = job_of(name)
            update = local_update(job, task_of(HARD, factory=Frozen, mode=mode), data_of(samples()))
            assert np.array_equal(after(update)["inner.weight"], job.arrays["inner.weight"])
            assert len(update.difference) == len(flatten(traced(), job.submodel, job.arrays))


# --- what comes back ------------------------------------------------------------------------------------------------


@tiers
def test_a_reply_holds_every_number_that_was_sent_and_no_other(name: str) -> None:
    job, update = job_of(name), trained(name, HARD)
    assert update.submodel == job.submodel
    assert len(update.difference) == len(flatten(traced(), job.submodel, job.arrays))
    assert update.weight == 40
    assert update.metrics["steps"] == 10
    if parse_tier(name).bits == 32:  # of others the difference is that of latents
        expected = flatten(traced(), job.submodel, after(update)) - flatten(traced(), job.submodel, job.arrays)
        np.testing.assert_allclose(update.difference, expected, atol=1e-6)


@tiers
def test_one_full_step_of_plain_sgd_is_the_gradient(name: str) -> None:
    once = replace(PLAIN, local_epochs=1, batch_size=40)
    pseudo, gradient = trained(name, once, mode="pseudo"), trained(name, once, mode="grad")
    np.testing.assert_allclose(pseudo.difference, gradient.difference, atol=2e-5)
    assert np.abs(gradient.difference).max() > 0.01
    assert pseudo.metrics["steps"] == gradient.metrics["steps"] == 1


@tiers
def test_a_pseudo_gradient_is_the_difference_by_rate_and_steps(name: str) -> None:
    later = replace(PLAIN, learning_rate_decay=0.5)
    job = replace(job_of(name), server_round=3)
    pseudo, delta = (local_update(job, task_of(later, mode=mode), data_of(samples())) for mode in ("pseudo", "delta"))
    np.testing.assert_allclose(pseudo.difference * 0.05 * 0.25 * 10, delta.difference, rtol=1e-4, atol=1e-7)


def test_a_gradient_is_of_all_samples_whatever_the_optimiser() -> None:
    found = [
        trained("p50", replace(training, batch_size=size), 41, mode="grad")
        for training, size in ((PLAIN, 41), (ADAM, 41), (replace(HARD, clip_norm=1e-3, local_epochs=7), 41))
    ]
    for update in found[1:]:
        assert np.array_equal(update.difference, found[0].difference)
    assert found[0].metrics["macs"] == 3 * 41 * task_of().macs(full(traced()))
    job = job_of("p50")
    assert all(np.array_equal(after(found[0])[name], array) for name, array in job.arrays.items())
    seen = trained("p50", replace(PLAIN, batch_size=16), 41, mode="grad")
    assert seen.metrics["macs"] == found[0].metrics["macs"]  # the last batch of nine counts, too


@tiers
def test_a_client_gives_the_same_whatever_happened_before(name: str) -> None:
    first = trained(name, HARD)
    trained("full", ADAM)
    torch.manual_seed(99)
    again = trained(name, HARD)
    assert first.difference.tobytes() == again.difference.tobytes()


def test_macs_are_those_of_the_dense_network_but_for_widths() -> None:
    macs = {name: trained(name).metrics["macs"] for name in TIERS}
    whole = 3 * samples_trained(40, PLAIN) * task_of().macs(full(traced()))
    assert {name for name, count in macs.items() if count != whole} == {"w50", "w50q4"}
    assert macs["w50"] == macs["w50q4"] < whole


# --- memory ---------------------------------------------------------------------------------------------------------


def test_masks_and_levels_take_memory_and_a_width_saves_it() -> None:
    task, layout = task_of(), traced()
    need = {
        name: memory_to_train(task, prefix_ratio(layout, parse_tier(name).ratio), parse_tier(name)) for name in TIERS
    }
    assert need["full"] == task.memory_to_train(full(layout))
    assert need["w50"] < need["full"] < need["p50"] == need["p90"]
    assert need["full"] < need["q8"] == need["q4"] < need["p50q8"]
    assert memory_to_train(task_of(mode="grad"), full(layout), parse_tier("full")) > need["full"]


def test_a_real_device_refuses_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    task, layout = task_of(), traced()
    job = replace(job_of("q8"), device=Device(0, measure_memory=True))
    need = memory_to_train(task, full(layout), parse_tier("q8"))
    monkeypatch.setattr(jobs, "free_memory", lambda: need)
    local_update(job, task, data_of(samples()))
    monkeypatch.setattr(jobs, "free_memory", lambda: need - 1)
    with pytest.raises(RuntimeError, match="out of memory: the part needs"):
        local_update(job, task, data_of(samples()))


# --- the configuration of a run -------------------------------------------------------------------------------------


def test_keys_of_the_configuration() -> None:
    values = {"compressed.ladder": "q8, p50", "compressed.server-momentum": 0.5, "compressed.width-selection": "l1"}
    method = Experiment.read({"strategy": "compressed", **values}).method
    assert list(method.tiers) == ["q8", "p50"]
    assert (method.server_momentum, method.width_selection) == (0.5, "l1")


class Grouped(nn.Module):
    """A network with a group norm, whose result depends on which units are there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.norm(self.conv(x)).flatten(1))
        return out


def test_group_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="GroupNorm"):
        trace_layout(Grouped, (1, 4, 4))
