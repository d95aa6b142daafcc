"""FIARSE's client and server, what travels between them, and whole runs."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from flwr.app import Message
from test_resume import go_on, killed_run, run, same_run
from toy import (
    DIGITS,
    QUICK,
    Ties,
    as_message,
    dense_mean,
    final_model,
    initial_model,
    lines,
    random_arrays,
    run_toy,
    same_bits,
    sent_part,
    toy_task,
    with_difference,
)

from benchmarks.measuring import in_child
from benchmarks.memory import can_measure_growth, growth_of
from benchmarks.speed import ONE_THREAD
from flexfed import jobs
from flexfed.config import Experiment
from flexfed.cost import decoded_bytes, message_bytes, num_parameters
from flexfed.data import ClientData, load_server
from flexfed.devices import Device
from flexfed.flower.messages import encoded, job_content, num_bytes, read_job, read_update, update_content
from flexfed.jobs import Assignment, Job, Task, Update, initial_arrays
from flexfed.methods import fedavg, fiarse
from flexfed.methods.fiarse import FIARSEConfig, memory_beside, thresholds_of
from flexfed.methods.fiarse_masks import entry_size, maskable_tensors, unit_size
from flexfed.submodel import Submodel, extract, flatten, full, masks_within, narrow_shapes, pack, unflatten, unpack
from flexfed.training import Samples, Training, fit
from flexfed.units import Arrays, trace_layout
from strategies import STRATEGIES
from strategies.fiarse import FIARSE

LAYOUT = trace_layout(Ties, (1, 4, 4))
HARD = Training(learning_rate=0.05, momentum=0.9, weight_decay=0.02, local_epochs=3, batch_size=8)


class Bench(NamedTuple):
    task: Task
    arrays: Arrays
    data: ClientData

    def masked(self, size: float) -> tuple[Submodel, dict[str, float]]:
        names = maskable_tensors(LAYOUT, Ties)
        masks, thresholds = entry_size({name: self.arrays[name] for name in names}, size)
        return Submodel(full(LAYOUT).units, masks=masks), thresholds

    def job(self, part: Submodel, thresholds: dict[str, float] | None = None, **values: Any) -> Job:
        told: Any = {"thresholds": list(thresholds.values())} if thresholds else {}
        return replace(Job(part, extract(LAYOUT, part, self.arrays), Device(0), told, 5, 1), **values)

    def train(self, job: Job) -> Update:
        return fiarse.local_update(job, self.task, self.data)


def bench(training: Training = HARD, **knobs: Any) -> Bench:
    arrays = {n: np.float32(0.3) * a for n, a in random_arrays(LAYOUT, np.random.default_rng(1)).items()}
    rng = np.random.default_rng(1)
    inputs = torch.from_numpy(rng.standard_normal((32, 1, 4, 4), dtype=np.float32))
    samples = Samples(inputs, torch.from_numpy(rng.integers(0, 3, 32)))
    data = ClientData(samples, samples, samples, (0, 1, 2), None)  # type: ignore[arg-type]
    return Bench(Task(Ties, LAYOUT, (1, 4, 4), 3, training, FIARSEConfig(**knobs)), arrays, data)


# --- the client -------------------------------------------------------------------------------------------------


def test_the_whole_network_trains_as_fedavg_has_it() -> None:
    b = bench()
    found, expected = b.train(b.job(full(LAYOUT))), fedavg.local_update(b.job(full(LAYOUT)), b.task, b.data)
    assert found.difference.tobytes() == expected.difference.tobytes()
    assert found.submodel == expected.submodel
    assert found.weight == 32


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_reply_holds_what_was_kept_to_the_end(optimizer: str) -> None:
    b = bench(replace(HARD, optimizer=optimizer, learning_rate=0.05 if optimizer == "sgd" else 0.01))
    part, thresholds = b.masked(0.5)
    update = b.train(b.job(part, thresholds))
    assert masks_within(update.submodel, part)
    assert not masks_within(part, update.submodel)
    assert update.trained is not None
    assert update.trained.submodel == part
    differences = unflatten(LAYOUT, update.submodel, update.difference)
    for name, mask in update.submodel.masks.items():
        after = update.trained.arrays[name]
        np.testing.assert_array_equal(mask, after != 0, err_msg=name)
        assert (np.abs(after[mask]) >= thresholds[name]).all()
        np.testing.assert_array_equal(differences[name][mask], (after - b.arrays[name])[mask])
    assert update.metrics["macs"] == 3 * b.task.macs(full(LAYOUT)) * 3 * 32, "masked networks compute densely"


def test_replies_of_all_that_was_sent_tell_where_an_entry_dropped_out() -> None:
    short, whole = (bench(coverage=coverage) for coverage in ("mask", "sent"))
    part, thresholds = short.masked(0.5)
    one, other = (b.train(b.job(part, thresholds)) for b in (short, whole))
    assert other.submodel == part
    assert bench(coverage="nonzero").train(short.job(part, thresholds)).submodel == part
    assert one.trained is not None
    assert other.trained is not None
    assert same_bits(one.trained.arrays, other.trained.arrays)
    few, all_of_it = (unflatten(LAYOUT, u.submodel, u.difference) for u in (one, other))
    dropped = 0
    for name, mask in part.masks.items():
        kept = one.submodel.masks[name]
        np.testing.assert_array_equal(few[name][kept], all_of_it[name][kept])
        out = mask & ~kept
        where = (short.arrays[name] + all_of_it[name])[out]
        assert (np.abs(where) < thresholds[name]).all()
        assert (np.abs(where) > 1e-5).all(), "as it was then, not the zero that the network has"
        assert (all_of_it[name][out] != 0).all()
        dropped += int(out.sum())
    assert dropped > 10


def test_what_a_codec_rounds_below_the_threshold_is_not_lost_on_the_way() -> None:
    b = bench(replace(HARD, learning_rate=1e-9, momentum=0.0, weight_decay=0.0))
    part, thresholds = b.masked(0.5)
    assignment = Assignment(part, "b", {"thresholds": list(thresholds.values())}, codec="int4")
    flat = flatten(LAYOUT, part, extract(LAYOUT, part, b.arrays))
    content = job_content(encoded("int4", LAYOUT, part, flat), assignment, 5, 1, {})
    job = read_job(content, LAYOUT, Device(0))
    theta = next(iter(thresholds.values()))
    sent = [job.arrays[name][mask] for name, mask in part.masks.items()]
    below = sum(int((np.abs(values) < theta).sum()) for values in sent)
    assert below > 10
    assert b.train(job).submodel == part


def test_units_train_with_the_factor_of_their_score() -> None:
    """Against a loop that multiplies every row by the formula, with the scores of the moment."""
    b = bench(replace(HARD, learning_rate=0.3, momentum=0.0, weight_decay=0.0, local_epochs=2), mode="units")
    names = maskable_tensors(LAYOUT, Ties)
    rng = np.random.default_rng(2)
    size = unit_size(LAYOUT, rng.uniform(0.1, 0.9, LAYOUT.num_units).astype(np.float32), 0.5)
    job = b.job(size.submodel, dict(size.thresholds))
    groups = [group for group in LAYOUT.groups if group not in LAYOUT.fixed]
    model, kept = b.task.network(job.arrays), size.submodel.units
    owner = {unit: group for group in groups for unit in LAYOUT.groups[group]}

    def rows() -> dict[int, list[tuple[str, int]]]:
        found: dict[int, list[tuple[str, int]]] = {}
        for name in names:
            axis = LAYOUT.axes[name][0]
            assert axis is not None
            for place, unit in enumerate(axis[kept[axis]].tolist()):
                if unit in owner:
                    found.setdefault(unit, []).append((name, place))
        return found

    def step(optimizer: torch.optim.Optimizer) -> None:
        tensors = dict(model.named_parameters())
        for unit, places in rows().items():
            entries = torch.cat([tensors[n].detach()[p].reshape(-1) for n, p in places])
            score, theta = float(entries.square().mean().sqrt()), size.thresholds[owner[unit]]
            for name, place in places:
                tensors[name].grad[place] *= 1 + 2 * theta * score / (score + theta) ** 2  # type: ignore[index]
        optimizer.step()

    torch.manual_seed(job.seed)
    fit(model, b.data.train, b.task.training, b.task.training.rate_at(1), np.random.default_rng(job.seed), step=step)
    update = b.train(job)
    assert update.submodel == size.submodel
    assert update.trained is not None
    for name, tensor in model.state_dict().items():
        np.testing.assert_allclose(update.trained.arrays[name], tensor.numpy(), atol=1e-5, err_msg=name)
    plain = fedavg.local_update(job, b.task, b.data)
    assert np.abs(plain.difference - update.difference).max() > 1e-3
    assert update.metrics["macs"] < 3 * b.task.macs(full(LAYOUT)) * 2 * 32, "narrow networks compute less"


def test_masks_take_memory_and_a_device_without_room_for_them_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    b = bench()
    part, thresholds = b.masked(0.9)
    plain, beside = b.task.memory_to_train(part), memory_beside(b.task, part)
    assert 0 < memory_beside(b.task, b.masked(0.2)[0]) < beside
    assert memory_beside(b.task, full(LAYOUT)) == 0
    for size, (free, refuses) in (
        (0.9, (plain + beside - 1, True)),
        (0.9, (plain + beside, False)),
        (1, (plain, False)),
    ):
        monkeypatch.setattr(jobs, "free_memory", lambda free=free: free)
        told = b.job(part, thresholds) if size < 1 else b.job(full(LAYOUT))
        job = replace(told, device=Device(0, memory_bytes=1e12, measure_memory=True))
        if refuses:
            with pytest.raises(RuntimeError, match="out of memory: the part needs"):
                b.train(job)
        else:
            b.train(job)


def growth_of_masked_training(size: float, coverage: str) -> tuple[int, int]:
    """How much memory a client takes with the part in hand, and what it was told; call it in a fresh process."""
    values = {"strategy": "fiarse", "model": "resnet18", "momentum": 0.0, "weight-decay": 0.0, "local-epochs": 1}
    task = Experiment.read({**values, "fiarse.coverage": coverage}).task(10, (3, 32, 32))
    arrays = initial_arrays(task, "", 1)
    masks, thresholds = entry_size({n: arrays[n] for n in maskable_tensors(task.layout, task.factory)}, size)
    part = Submodel(full(task.layout).units, masks=masks)
    told: Any = {"thresholds": list(thresholds.values())}
    job = Job(part, extract(task.layout, part, arrays), Device(0), told, 5, 1)
    samples = Samples(torch.randn(48, 3, 32, 32), torch.arange(48) % 10)
    data = ClientData(samples, samples, samples, tuple(range(10)), None)  # type: ignore[arg-type]
    need = task.memory_to_train(part) + memory_beside(task, part)
    task.macs(part)
    return growth_of(lambda: fiarse.local_update(job, task, data)), need


@pytest.mark.skipif(not can_measure_growth(), reason="only Linux tells the highest resident memory of a process")
@pytest.mark.parametrize(("size", "coverage"), [(0.9, "mask"), (0.9, "sent"), (0.25, "mask")])
@pytest.mark.slow
def test_the_budget_covers_masked_training(size: float, coverage: str) -> None:
    with patch.dict(os.environ, ONE_THREAD):
        growth, need = in_child(growth_of_masked_training, size, coverage)
    assert need / 3 < growth <= need


def test_a_job_tells_a_threshold_for_each_tensor() -> None:
    b = bench()
    part, thresholds = b.masked(0.5)
    assert thresholds_of(b.job(part, thresholds), tuple(thresholds)) == thresholds
    with pytest.raises(ValueError, match="a job of fiarse should tell 2 thresholds, got"):
        thresholds_of(b.job(part, thresholds), ("a", "b"))


# --- what travels -----------------------------------------------------------------------------------------------


def without(part: Submodel, name: str, num: int) -> Submodel:
    """A part that keeps some entries of one tensor less."""
    mask = part.masks[name].copy()
    mask[tuple(np.argwhere(mask)[:num].T)] = False
    return replace(part, masks={**part.masks, name: mask})


def test_of_masks_only_what_changed_travels_back() -> None:
    part, _ = bench().masked(0.25)
    less = without(part, "fc.weight", 3)
    same, packed = pack(part, part.masks_key, part), pack(less, part.masks_key, part)
    assert same.keys() == {"units", "masks"}
    assert packed.keys() == {"units", "masks", "kept:fc.weight"}
    assert len(packed["kept:fc.weight"]) == math.ceil(part.masks["fc.weight"].sum() / 8)
    assert unpack(LAYOUT, packed, part) == less
    assert unpack(LAYOUT, same, part) == part
    more = pack(part, less.masks_key, less)
    assert {key.partition(":")[0] for key in more} == {"units", "mask"}, "no part of the other: in full"
    assert unpack(LAYOUT, more, less) == part


def test_a_mask_that_is_not_of_what_was_sent_is_refused() -> None:
    part, _ = bench().masked(0.25)
    packed = pack(without(part, "fc.weight", 3), part.masks_key, part)
    kept, other = packed["kept:fc.weight"], without(part, "fc.bias", 1)
    cases: list[tuple[dict[str, bytes], Submodel | None, str]] = [
        (packed, None, "names masks that are not known here"),
        (packed, other, "names masks that are not known here"),
        ({**packed, "kept:fc.weight": kept[:-1]}, part, r"kept:fc.weight of a submodel should be \d+ bytes"),
        ({**packed, "kept:fc.weight": kept + b"\0"}, part, r"kept:fc.weight of a submodel should be \d+ bytes"),
        ({**packed, "kept:norm.weight": b""}, part, "keeps less of a mask that is not known here: 'norm.weight'"),
        ({k: v for k, v in packed.items() if k != "masks"}, part, "tells what it keeps of masks, but not of which"),
        ({**packed, "mask:fc.bias": b"\0"}, part, "masks or their key, not both"),
    ]
    for case, known, message in cases:
        with pytest.raises(ValueError, match=message):
            unpack(LAYOUT, case, known)
    assert int(part.masks["fc.weight"].sum()) % 8, "else no bit is behind the last one"
    with pytest.raises(ValueError, match="bits set behind its last one"):
        unpack(LAYOUT, {**packed, "kept:fc.weight": b"\xff" * len(kept)}, part)


def test_a_mask_of_other_units_is_not_within() -> None:
    part = bench().masked(0.5)[0]
    units = part.units.copy()
    units[0] = False
    assert masks_within(part, part)
    assert not masks_within(replace(part, units=units), part)


@pytest.mark.parametrize("size", [0.5, 1 / 16])
def test_law_7_with_bits_of_what_is_kept_only(size: float) -> None:
    b = bench()
    part, thresholds = b.masked(size)
    job = b.job(part, thresholds)
    update = b.train(job)
    reply = update_content(update, LAYOUT, job)
    read = read_update(reply, LAYOUT, Assignment(part, "b"))
    assert read.submodel == update.submodel != part
    assert read.difference.tobytes() == update.difference.tobytes()
    bits = sum(math.ceil(mask.sum() / 8) for mask in part.masks.values())
    assert bits < sum(mask.size / 8 for mask in part.masks.values())
    limit = 1.02 * 4 * num_parameters(LAYOUT, update.submodel) + bits + 256
    assert num_bytes(as_message(reply)) <= limit + 32 * len(part.masks)  # names


# --- the server -------------------------------------------------------------------------------------------------

TASK = toy_task("fiarse")
NUM_MASKABLE = sum(math.prod(TASK.layout.shapes[n]) for n in maskable_tensors(TASK.layout, TASK.factory))


def server(settings: dict[str, Any] | None = None, **knobs: Any) -> FIARSE:
    """A server with a model, and no grid."""
    given = {f"fiarse.{k.replace('_', '-')}": v for k, v in knobs.items()}
    experiment = Experiment.read({**QUICK, "strategy": "fiarse", **given, **(settings or {})})
    made: Any = STRATEGIES["fiarse"](experiment, experiment.task(10, DIGITS), load_server(experiment.data))
    made._arrays = random_arrays(TASK.layout, np.random.default_rng(0))
    return made  # type: ignore[no-any-return]


def test_levels_are_the_sizes_of_the_model_of_the_moment() -> None:
    made = server()
    levels = made.levels()
    assert list(levels) == ["d", "c", "b", "a"]
    assert levels["a"] == full(TASK.layout)
    for name, size in zip("bcd", (1 / 4, 1 / 16, 1 / 64), strict=True):
        assert sum(int(m.sum()) for m in levels[name].masks.values()) == math.floor(size * NUM_MASKABLE)
    assert made.levels()["b"] is levels["b"], "of one model they are found once"
    made._arrays = random_arrays(TASK.layout, np.random.default_rng(1))
    assert made.levels()["b"] != levels["b"]


@pytest.mark.parametrize("mode", ["unstructured", "units"])
def test_a_device_gets_the_largest_size_that_its_capacity_holds(mode: str) -> None:
    made = server(mode=mode, sizes="1.0, 0.25, 0.0625")
    for capacity, level in ((1.1, "a"), (1.0, "a"), (0.99, "b"), (0.25, "b"), (0.2, "c"), (0.0625, "c"), (0.01, "c")):
        found = made.part_of(Device(0, capacity=capacity), 1)
        assert found.level == level
        assert found.submodel == made.levels()[level]
        assert ("thresholds" in found.config) == (level != "a")


def test_memory_and_deadline_are_those_of_what_computes() -> None:
    made = server(sizes="1.0, 0.25")
    need = {name: made.budget.memory(part) for name, part in made.levels().items()}
    assert made.level_of(Device(0, capacity=1.0, memory_bytes=need["a"])) == "a"
    assert not made.can_train(Device(0, capacity=0.25, memory_bytes=0.5 * need["a"])), "a mask narrows nothing"
    narrow = server(mode="units", sizes="1.0, 0.25")
    need = {name: narrow.budget.memory(part) for name, part in narrow.levels().items()}
    assert need["b"] < need["a"]
    assert narrow.level_of(Device(0, memory_bytes=need["a"] - 1)) == "b"
    assert not narrow.can_train(Device(0, memory_bytes=need["b"] - 1))


def test_memory_is_that_of_the_job_of_its_thresholds_and_of_its_masks() -> None:
    made = server()
    for part in made.levels().values():
        received = message_bytes(TASK.layout, part) + decoded_bytes(TASK.layout, part)
        thresholds = 2 * 8 * len(made.levels()["b"].masks)
        training = made.task.memory_to_train(part) + memory_beside(made.task, part)
        assert made.budget.memory(part) == received + thresholds + training


def test_a_device_tests_no_larger_size_than_it_trains() -> None:
    made = server()
    for capacity, level in ((1.0, "a"), (0.25, "b"), (0.1, "c"), (0.001, "d")):
        assert made.level_for_evaluation(Device(0, capacity=capacity)) == level


def test_a_device_that_has_no_memory_for_masks_may_train_everything() -> None:
    made = server({"batch-size": 2, "momentum": 0.0, "weight-decay": 0.0}, sizes="1.0, 0.95")
    need = {name: made.budget.memory(part) for name, part in made.levels().items()}
    assert need["b"] > need["a"]
    for capacity, level in ((1.0, "a"), (0.95, None)):
        device = Device(0, capacity=capacity, memory_bytes=need["a"])
        assert made.can_train(device) == (level is not None)
        assert level is None or made.part_of(device, 1).level == level


def test_units_respect_a_width_and_masks_have_none() -> None:
    device = Device(0, capacity=1.0, width=0.5)
    assert server(sizes="1.0, 0.05").level_of(device) == "a"
    assert server(sizes="1.0, 0.05", mode="units").level_of(device) == "b"


def test_a_budget_is_strict() -> None:
    made = server({"ratio-policy": "budget"}, sizes="1.0, 0.25")
    share = made.budget.share(made.levels()["b"])
    assert share > 0.25, "norms come on top"
    assert made.can_train(Device(0, capacity=share))
    assert not made.can_train(Device(0, capacity=0.25))


def test_a_size_of_no_entry_stops_the_run_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"size 1e-06 keeps floor\(1e-06 \* \d+\) = 0 entries"):
        run_toy(tmp_path, "fiarse", {"fiarse.sizes": "1.0, 0.000001"})
    with pytest.raises(ValueError, match=r"size 0\.0001 cannot be met by whole units"):
        run_toy(tmp_path, "fiarse", {"fiarse.sizes": "0.0001", "fiarse.mode": "units"})


def answer(submodel: Submodel) -> Update:
    return Update(submodel, np.zeros(0, dtype=np.float32), 1.0, {})


@pytest.mark.parametrize("coverage", ["mask", "sent", "nonzero"])
def test_a_reply_may_hold_less_only_where_it_counts_by_its_mask(coverage: str) -> None:
    made = server(coverage=coverage)
    asked = made.part_of(Device(0, capacity=0.3), 1)
    sent = asked.submodel
    made.check(asked, answer(sent))
    less = without(sent, "fc.weight", 2)
    if coverage == "mask":
        made.check(asked, answer(less))
    else:
        with pytest.raises(ValueError, match="it leaves out whole tensors, or single entries"):
            made.check(asked, answer(less))
    name = next(n for n, mask in sent.masks.items() if not mask.all())
    more = replace(sent, masks={**sent.masks, name: np.ones_like(sent.masks[name])})
    others = (
        more,
        replace(sent, masks={}),
        replace(sent, masks={n: m for n, m in less.masks.items() if n != name}),
        replace(sent, masks={**sent.masks, "norm1.weight": np.zeros(TASK.layout.shapes["norm1.weight"], dtype=bool)}),
        replace(sent, keys=frozenset(TASK.layout.shapes) - {"norm1.weight"}),
    )
    for other in others:
        with pytest.raises(ValueError, match="it leaves out whole tensors, or single entries"):
            made.check(asked, answer(other))
    whole = made.part_of(Device(0), 1)
    with pytest.raises(ValueError, match="it leaves out whole tensors, or single entries"):
        made.check(whole, answer(sent))


# --- whole runs -------------------------------------------------------------------------------------------------

SIZES = {"fiarse.sizes": "1.0, 0.5, 0.1", "fraction-train": 1.0}


def test_replies_are_smaller_than_jobs_and_the_mean_counts_their_masks(tmp_path: Path) -> None:
    updates: list[Update] = []
    dropped = 0

    def listen(request: Message, reply: Message, _: int) -> Message:
        nonlocal dropped
        if request.metadata.message_type == "train":
            sent = sent_part(request)
            updates.append(read_update(reply.content, TASK.layout, Assignment(sent, "")))
            dropped += num_parameters(TASK.layout, sent) - num_parameters(TASK.layout, updates[-1].submodel)
        return reply

    folder = run_toy(tmp_path, "fiarse", SIZES, alter=listen)
    assert dropped > 100
    assert lines(folder)[0]["refused"] == []
    expected, covered = dense_mean(
        TASK.layout, initial_model(folder), [(u.submodel, u.difference, 1.0) for u in updates]
    )
    for name, array in final_model(folder).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert all(mask.all() for mask in covered.values()), "somebody holds everything"


def test_with_nonzero_only_changes_count(tmp_path: Path) -> None:
    differences: list[Arrays] = []
    rng = np.random.default_rng(0)

    def listen(request: Message, reply: Message, _: int) -> Message:
        if request.metadata.message_type == "train":
            reply = with_difference(reply, lambda flat: np.where(rng.random(flat.shape) < 0.5, flat, np.float32(0)))
            update = read_update(reply.content, TASK.layout, Assignment(sent_part(request), ""))
            differences.append(unflatten(TASK.layout, update.submodel, update.difference))
        return reply

    folder = run_toy(tmp_path, "fiarse", {**SIZES, "fiarse.coverage": "nonzero"}, alter=listen)
    before = initial_model(folder)
    for name, array in final_model(folder).items():
        changes = np.stack([d[name] for d in differences]).astype(np.float64)
        num = (changes != 0).sum(axis=0)
        mean = changes.sum(axis=0) / np.maximum(num, 1)
        np.testing.assert_allclose(array, before[name] + mean, rtol=1e-5, atol=1e-6, err_msg=name)


def test_masks_save_bytes_and_no_work_and_units_save_both(tmp_path: Path) -> None:
    weak = {"fleet": "skewed", "fraction-train": 1.0}
    whole = lines(run_toy(tmp_path / "whole", "fiarse", {**weak, "fiarse.sizes": "1.0"}))[0]
    sizes = {"fiarse.sizes": "0.25", **weak}
    masked = lines(run_toy(tmp_path / "masked", "fiarse", sizes))[0]
    narrow = lines(run_toy(tmp_path / "narrow", "fiarse", {**sizes, "fiarse.mode": "units"}))[0]
    assert masked["macs"] == whole["macs"] > 1.5 * narrow["macs"]
    assert masked["bytes-up"] < 0.3 * whole["bytes-up"]
    assert narrow["bytes-up"] < 0.3 * whole["bytes-up"]
    numbers = 4 * NUM_MASKABLE / 4
    assert masked["bytes-down"] > whole["bytes-down"] * (0.25 + 1 / 32) > 4 * numbers, "and a bit for each entry"


CASES: dict[str, dict[str, Any]] = {
    "units": {"fiarse.mode": "units", "fiarse.sizes": "1.0, 0.5, 0.25"},
    "units, layer by layer": {"fiarse.mode": "units", "fiarse.scope": "layerwise", "fiarse.sizes": "1.0, 0.5, 0.25"},
    "layer by layer": {"fiarse.scope": "layerwise", "fiarse.coverage": "sent"},
    "rows": {"fiarse.min-per-tensor": "row", "fiarse.coverage": "nonzero", "fiarse.sizes": "0.5, 0.1"},
    "bytes": {"codec": "int8", "fiarse.sizes": "0.5, 0.1"},
    "own models": {"personal": "stored-local"},
    "of the global model": {"personal": "global-masked", "fiarse.sizes": "1.0, 0.25"},
}


@pytest.mark.parametrize("case", CASES)
def test_law_9_with_every_knob(case: str, tmp_path: Path) -> None:
    values = {"strategy": "fiarse", "fraction-train": 0.75, **CASES[case]}
    never = run(tmp_path / "never", values)
    for line in lines(never):
        assert line["refused"] == line["failed"] == []
        assert math.isfinite(line["loss"])
        if values.get("personal", "none") != "none":
            assert line["clients-personal"] == len(lines(never)[0]["cohort"]) + 1
    left = killed_run(tmp_path / "killed", values, "after it", 2)
    go_on(left)
    assert same_run(left, never)


def test_a_client_tests_its_sizes_entries_of_the_moment(tmp_path: Path) -> None:
    """With models of the global one's, everybody tests the part that it would train now."""
    asked: list[int] = []

    def listen(request: Message, reply: Message, _: int) -> Message:
        if request.content.config_records["config"].get("personal"):
            asked.append(num_parameters(TASK.layout, sent_part(request)))
        return reply

    values = {"personal": "global-masked", "fiarse.sizes": "1.0, 0.25", "num-server-rounds": 2, "fraction-train": 1.0}
    run_toy(tmp_path, "fiarse", values, alter=listen)
    norms = num_parameters(TASK.layout, full(TASK.layout)) - NUM_MASKABLE
    assert set(asked) == {norms + NUM_MASKABLE // 4, norms + NUM_MASKABLE}
    assert len(asked) == 8


def test_the_record_tells_of_layers_without_a_weight(tmp_path: Path) -> None:
    model = {"model": "test_fiarse_rounds:tilted", "fraction-train": 1.0, "fiarse.sizes": "1.0, 0.02"}
    empty, kept = (
        lines(run_toy(tmp_path / least, "fiarse", {**model, "fiarse.min-per-tensor": least}))[0]["emptied-layers"]
        for least in ("none", "one")
    )
    assert empty > kept == 0


def tilted(num_classes: int) -> torch.nn.Module:
    """A network of which one layer's weights are far smaller than the others'."""
    from toy import Plain

    model = Plain(num_classes)
    middle = torch.nn.Conv2d(8, 8, 3, padding=1)
    with torch.no_grad():
        middle.weight.mul_(1e-4)
    return torch.nn.Sequential(model[0], torch.nn.ReLU(), middle, torch.nn.BatchNorm2d(8), *list(model)[1:])


def test_a_mask_is_never_larger_than_its_tensor_says() -> None:
    """Masks of a size are of whole tensors: no unit leaves."""
    for part in server().levels().values():
        assert part.units.all()
        shapes = narrow_shapes(TASK.layout, part)
        assert all(mask.shape == shapes[name] for name, mask in part.masks.items())
