"""AutoFLIP's server, and whole runs of four clients."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from toy import (
    DIGITS,
    QUICK,
    ROOT,
    as_message,
    failure,
    final_model,
    initial_model,
    lines,
    run_toy,
    same_bits,
    toy_task,
    with_difference,
)

from flexfed.config import Experiment
from flexfed.cost import num_parameters
from flexfed.data import load_server
from flexfed.devices import Device
from flexfed.flower.grid import StreamingGrid
from flexfed.flower.messages import encoded, job_content, num_bytes, read_update, update_content
from flexfed.jobs import Assignment, Job, Update
from flexfed.methods.autoflip import guidance_bytes, prunable_tensors, read_deviations
from flexfed.methods.autoflip_masks import Deviations, guidance, keep_above, mean_deviations, num_pruned, random_scores
from flexfed.methods.autoflip_store import DeviationStore
from flexfed.methods.autoflip_units import covered, masked_part
from flexfed.models import model_factory
from flexfed.overrides import flatten, read_toml
from flexfed.submodel import Submodel, full, narrow_sizes, unpack
from flexfed.submodel import flatten as flat_part
from flexfed.tensorfile import open_tensors
from flexfed.units import Arrays, trace_layout
from strategies import STRATEGIES
from strategies.autoflip import AutoFLIP, nonzero_macs

TASK = toy_task("autoflip")
LAYOUT = TASK.layout
PRUNABLE = prunable_tensors(TASK)
NUM = sum(int(np.prod(LAYOUT.shapes[name])) for name in PRUNABLE)
STATIC = {"autoflip.mask-mode": "static"}
PLAIN = {"autoflip.server-momentum": 0.0}
JOB = Job(full(LAYOUT), {}, Device(0), {}, 1, 1)
FOUND = Submodel(full(LAYOUT).units, PRUNABLE)


def server(folder: Path | None = None, **values: Any) -> Any:
    """A strategy whose devices are four, none of them asked yet."""
    given = {f"autoflip.{k.replace('_', '-')}": v for k, v in values.items()}
    experiment = Experiment.read({**QUICK, "strategy": "autoflip", **given})
    made: Any = STRATEGIES["autoflip"](experiment, experiment.task(10, DIGITS), load_server(experiment.data))
    made.folder = folder
    made.federation.devices = made.devices = {p: Device(p, num_examples=10 * (p + 1)) for p in range(4)}
    rng = np.random.default_rng(0)
    made._arrays = {n: np.asarray(rng.standard_normal(s), dtype=np.float32) for n, s in LAYOUT.shapes.items()}
    return made


def deviations(partition: int) -> Arrays:
    rng = np.random.default_rng([3, partition])
    return {
        n: np.square(rng.standard_normal(LAYOUT.shapes[n], dtype=np.float32)) for n in LAYOUT.shapes if n in PRUNABLE
    }


def explored(partition: int) -> Update:
    return Update(FOUND, flat_part(LAYOUT, FOUND, deviations(partition)), 10.0 * (partition + 1), {"epochs": 1.0})


def cohort_mask(made: Any, *cohort: int) -> Submodel:
    made._cut(list(cohort))
    part: Submodel = made.levels()["full"]
    return part


def mask_of(*explorers: int, weights: bool = False) -> dict[str, np.ndarray]:
    found = [Deviations(10.0 * (p + 1) if weights else 1.0, deviations(p)) for p in explorers]
    return keep_above(guidance(mean_deviations(found)), 0.3).masks


def same_masks(part: Submodel, masks: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(part.masks.get(name, np.ones_like(mask)), mask) for name, mask in masks.items())


# --- the server, without a federation ---------------------------------------------------------------------------


@pytest.fixture(params=["memory", "folder"])
def ready(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Partitions 0, 1 and 3 have explored."""
    made = server(tmp_path if request.param == "folder" else None)
    for partition in (3, 0, 1):
        made._receive(partition, explored(partition))
    return made


def test_a_rounds_mask_comes_from_its_cohorts_explorers(ready: Any) -> None:
    assert same_masks(cohort_mask(ready, 0, 1), mask_of(0, 1))
    assert same_masks(cohort_mask(ready, 2, 3), mask_of(3))
    assert not same_masks(cohort_mask(ready, 0, 3), mask_of(0, 1))


def test_a_cohort_without_an_explorer_gets_the_mask_of_all(ready: Any) -> None:
    assert same_masks(cohort_mask(ready, 2), mask_of(0, 1, 3))


def test_a_static_mask_is_that_of_all_explorers_whatever_the_cohort(monkeypatch: pytest.MonkeyPatch) -> None:
    def explore(made: Any, _: None) -> None:
        for partition in (0, 1, 3):
            made._receive(partition, explored(partition))

    monkeypatch.setattr(AutoFLIP, "_explore", explore)
    made = server(mask_mode="static")
    made.prepare(None)
    assert same_masks(made.levels()["full"], mask_of(0, 1, 3))
    made.settings = replace(made.settings, fraction_train=0.25)
    (job,) = made.assign(1, made.devices, np.random.default_rng(0)).values()
    assert same_masks(job.submodel, mask_of(0, 1, 3))
    assert not same_masks(job.submodel, mask_of(0))


def test_the_order_of_replies_does_not_matter(ready: Any) -> None:
    other = server()
    for partition in (0, 1, 3):
        other._receive(partition, explored(partition))
    assert cohort_mask(ready, 3, 1, 0) == cohort_mask(other, 0, 1, 3)
    summed = [found.arrays["conv1.bias"].tolist() for found in ready._deviations([3, 1, 0])]
    assert summed == [deviations(partition)["conv1.bias"].tolist() for partition in (0, 1, 3)]


def test_examples_weigh_on_request() -> None:
    made = server(explore_weights="examples")
    for partition in (0, 3):
        made._receive(partition, explored(partition))
    assert same_masks(cohort_mask(made, 0, 3), mask_of(0, 3, weights=True))
    assert not same_masks(cohort_mask(made, 0, 3), mask_of(0, 3))


def test_deviations_are_kept_in_the_run_folder_and_not_in_memory(tmp_path: Path) -> None:
    made = server(tmp_path)
    for partition in (0, 3):
        made._receive(partition, explored(partition))
    assert sorted(path.name for path in (tmp_path / "exploration").iterdir()) == [
        "000000.safetensors",
        "000003.safetensors",
    ]
    assert made._store._held == {}
    assert same_bits(open_tensors(tmp_path / "exploration" / "000003.safetensors")[1], deviations(3))


def test_a_lost_file_of_deviations_is_named(tmp_path: Path) -> None:
    store = DeviationStore(tmp_path)
    store.put(5, deviations(5))
    (tmp_path / "000005.safetensors").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"000005\.safetensors cannot be read"):
        store.get(5)


def test_state_goes_through_a_checkpoint(ready: Any) -> None:
    cohort_mask(ready, 0, 1)
    ready.finish(ready.arrays, {n: a + 1 for n, a in ready.arrays.items()})
    other = server(ready.folder, structured="off")
    other._store = ready._store
    other.load_state_dict(ready.state_dict())
    assert other.levels() == ready.levels()
    assert same_bits(other._velocity, ready._velocity)
    assert other._explored == ready._explored == {0: (10.0, 1), 1: (20.0, 1), 3: (40.0, 1)}
    assert cohort_mask(other, 3) == cohort_mask(ready, 3)


def test_explorers_are_a_uniform_share_of_the_devices_that_can_explore() -> None:
    made = server(explore_fraction=0.5)
    assert len(made._chosen()) == 2
    others = []
    for seed in range(10):
        made.settings = replace(made.settings, seed=seed)
        others.append(tuple(made._chosen()))
    assert len(set(others)) > 2
    assert {partition for chosen in others for partition in chosen} == set(range(4))
    everybody = server()
    everybody.federation.devices = {p: Device(p, num_examples=20, memory_bytes=1e9 if p else 1e6) for p in range(4)}
    assert everybody._chosen() == [1, 2, 3]
    most = server(explore_fraction=0.75)  # of all four, not of those that can
    most.federation.devices = everybody.federation.devices
    assert most._chosen() == [1, 2, 3]
    assert not everybody.can_train(Device(0, num_examples=20, memory_bytes=1e6))


def test_exploration_needs_the_memory_of_its_own_optimiser() -> None:
    made = server()
    lean, rich = (made.budget.memory(full(LAYOUT)) + more for more in (0, 10_000_000))
    made.federation.devices = {p: Device(p, num_examples=20, memory_bytes=float(b)) for p, b in enumerate((lean, rich))}
    assert [made.can_train(device) for device in made.federation.devices.values()] == [True, True]
    assert made._chosen() == [1]


@pytest.mark.parametrize("claims", [{"weight": 11.0}, {"metrics": {}}, {"metrics": {"epochs": 2.0}}])
def test_an_explorer_that_claims_what_cannot_be_is_refused(claims: dict[str, Any]) -> None:
    made = server()
    with pytest.raises(ValueError, match="expected at most 10 examples, as it told, and 1 to 1 epochs"):
        made._receive(0, replace(explored(0), **claims))
    assert made._explored == {}


def test_an_empty_cohort_keeps_the_mask(ready: Any) -> None:
    before = cohort_mask(ready, 0)
    assert ready.assign(1, {}, np.random.default_rng(0)) == {}
    assert ready.levels()["full"] == before


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_baselines_cut_as_many_entries_without_exploring(score: str) -> None:
    made = server(score=score)
    made.prepare(None)
    assert num_pruned(covered(LAYOUT, cohort_mask(made, 0))) == int(0.3 * (NUM - 1)) + 1
    again = cohort_mask(made, 1, 2)
    made.record.server_round = 9
    assert again == cohort_mask(made, 0)
    if score == "magnitude":
        scores = guidance({n: np.abs(made.arrays[n]) for n in PRUNABLE})
        assert same_masks(again, keep_above(scores, 0.3).masks)
        made._arrays = {n: a[..., ::-1].copy() for n, a in made.arrays.items()}
        assert cohort_mask(made, 0) != again
    else:
        other = server(score=score)
        other.settings = Experiment.read({"strategy": "autoflip", "seed": 2}).settings
        other.prepare(None)
        assert cohort_mask(other, 0) != again


def test_agreement_changes_the_mask() -> None:
    masks = []
    for agreement in (False, True):
        made = server(agreement=agreement)
        for partition in (0, 1, 3):
            made._receive(partition, explored(partition))
        masks.append(cohort_mask(made, 0, 1, 3))
    assert masks[0] != masks[1]


@pytest.mark.parametrize("structured", ["closure", "units"])
def test_structured_parts_are_physically_smaller(structured: str) -> None:
    made = server(structured=structured, unit_share=0.25, quantile=0.3)
    wide = server(quantile=0.3)
    for strategy in (made, wide):
        for partition in range(4):
            found = deviations(partition)
            found["conv2.weight"][5] = 0.0  # a unit that nobody moves
            strategy._receive(partition, replace(explored(partition), difference=flat_part(LAYOUT, FOUND, found)))
    part, open_part = cohort_mask(made, 0, 1), cohort_mask(wide, 0, 1)
    assert part.units.sum() < open_part.units.sum() == LAYOUT.num_units
    assert not part.units[LAYOUT.groups["conv2"].start + 5]
    assert TASK.macs(part) < TASK.macs(open_part) == TASK.macs(full(LAYOUT))
    assert TASK.memory_to_train(part) < TASK.memory_to_train(open_part) == TASK.memory_to_train(full(LAYOUT))
    assert sum(narrow_sizes(LAYOUT, part).values()) < sum(narrow_sizes(LAYOUT, open_part).values())
    assert nonzero_macs(TASK, part) < nonzero_macs(TASK, open_part) < TASK.macs(open_part)
    dropped = {g: int((~part.units[s.start : s.stop]).sum()) for g, s in LAYOUT.groups.items()}
    if structured == "units":
        cut = [g for g in LAYOUT.groups if g not in LAYOUT.fixed]
        assert all(dropped[g] == int(0.25 * len(LAYOUT.groups[g]) + 1e-9) for g in cut)
    assert all(dropped[g] == 0 for g in LAYOUT.fixed)


def test_static_masks_are_what_a_device_must_hold_others_the_whole() -> None:
    for mode in ("static", "per-round"):
        made = server(mask_mode=mode, structured="units", unit_share=0.5)
        made._receive(0, explored(0))
        part = cohort_mask(made, 0)
        device = Device(0, num_examples=20, memory_bytes=float(made.budget.memory(part)))
        assert made.can_train(device) is (mode == "static")


def test_nonzero_macs_count_weights_that_are_not_masked() -> None:
    assert nonzero_macs(TASK, full(LAYOUT)) == TASK.macs(full(LAYOUT))
    mask = np.ones(LAYOUT.shapes["conv1.weight"], dtype=bool)
    mask[0] = False
    less = TASK.macs(full(LAYOUT)) - nonzero_macs(TASK, Submodel(full(LAYOUT).units, masks={"conv1.weight": mask}))
    assert less == mask[0].size * 64  # an 8x8 map


@pytest.mark.parametrize("memory", [{"server_memory": "hard"}, {"mask_mode": "static"}])
def test_hard_memory_zeroes_what_this_rounds_mask_leaves_out_of_prunable_tensors(memory: dict[str, str]) -> None:
    made = server(server_momentum=0.0, **memory)
    for partition in (0, 3):
        made._receive(partition, explored(partition))
    for partition in (0, 3):
        held = covered(LAYOUT, cohort_mask(made, partition))
        new = made.finish(made.arrays, made.arrays)
        assert all(np.array_equal(new[n], np.where(mask, made.arrays[n], 0)) for n, mask in held.items())
        assert any(not mask.all() for mask in held.values())


def test_norms_keep_their_values_where_units_have_left() -> None:
    made = server(server_memory="hard", server_momentum=0.0, structured="units", unit_share=0.5)
    made._receive(0, explored(0))
    part = cohort_mask(made, 0)
    new = made.finish(made.arrays, made.arrays)
    norms = LAYOUT.shapes.keys() - PRUNABLE
    assert any(not covered(LAYOUT, part)[name].all() for name in norms)
    assert all(np.array_equal(new[name], made.arrays[name]) for name in norms)


@pytest.mark.parametrize(("devices", "fraction", "size"), [(20, 0.25, 5), (20, 0.05, 1), (10, 0.33, 3)])
def test_cohorts_of_the_worked_example(devices: int, fraction: float, size: int) -> None:
    experiment = Experiment.read({**QUICK, "strategy": "autoflip", "fraction-train": fraction})
    made = STRATEGIES["autoflip"](experiment, TASK, load_server(experiment.data))
    assert made.cohort_size(devices) == size


@pytest.mark.parametrize(
    ("server_round", "rate"), [(1, 3e-4), (2, 2.97e-4), (100, 1.10918891e-4), (200, 4.05999015e-5)]
)
def test_learning_rates_of_the_worked_example(server_round: int, rate: float) -> None:
    values = flatten(read_toml(ROOT / "configs" / "autoflip-mnist.toml"))
    assert Experiment.read(values).training.rate_at(server_round) == pytest.approx(rate, rel=1e-8)


@pytest.mark.parametrize(
    ("name", "classes", "image", "cohort"),
    [("mnist", 10, (1, 28, 28), 5), ("cifar10", 10, (3, 32, 32), 5), ("cifar100", 100, (3, 32, 32), 1)],
)
def test_the_papers_settings_are_the_published_ones(name: str, classes: int, image: Any, cohort: int) -> None:
    path = ROOT / "configs" / f"autoflip-{name}.toml"
    tomllib.loads(path.read_text())
    experiment = Experiment.read(flatten(read_toml(path)))
    task, training, method = experiment.task(classes, image), experiment.training, experiment.method
    assert prunable_tensors(task) == task.layout.shapes.keys()  # no norms
    assert (training.local_epochs, training.batch_size, training.optimizer) == (5, 350, "adam")
    assert (method.quantile, method.server_momentum, method.explore_epochs, method.explore_patience) == (
        0.3,
        0.9,
        150,
        40,
    )
    assert experiment.settings.num_server_rounds == 200
    assert experiment.settings.round_timeout >= 24 * 3600  # 150 epochs of all clients are one exchange
    assert max(1, int(experiment.settings.fraction_train * 20 + 1e-9)) == cohort
    assert len(task.layout.groups["conv1"]) == (128 if name == "cifar100" else 32)


@pytest.mark.parametrize(
    ("image", "up", "mask", "down"),
    [((1, 28, 28), 4_657_436, 207_922, 4_865_358), ((3, 32, 32), 4_661_916, 208_122, 4_870_038)],
)
def test_bytes_of_the_worked_example_on_messages(image: tuple[int, ...], up: int, mask: int, down: int) -> None:
    layout = trace_layout(model_factory("autoflip-cnn", 10, image), image)
    part = masked_part(layout, keep_above(random_scores(layout.shapes, np.random.default_rng(0)), 0.3).masks)
    flat = np.zeros(num_parameters(layout, part), dtype=np.float32)
    encoded_part = encoded("float32", layout, part, flat)
    first, later = (
        job_content(encoded_part, Assignment(part, "full"), 1, 1, {}, known) for known in (b"", part.masks_key)
    )
    job = replace(JOB, submodel=part)
    reply = update_content(Update(part, flat, 1.0, {}), layout, job)
    sizes = [num_bytes(as_message(content)) for content in (first, later, reply)]
    for size, expected in zip(sizes, (down, up, up), strict=True):
        assert expected < size < expected + 600  # names, units and numbers of the job
    assert sizes[0] - sizes[1] == pytest.approx(mask, abs=200)


# --- whole runs -------------------------------------------------------------------------------------------------


class Listener:
    """Every message of a run's training and exploration, and what came back."""

    def __init__(self, change: Callable[[Message, Message, int], Message | None] | None = None) -> None:
        self.seen: list[tuple[str, int, Message, Message]] = []
        self.change = change or (lambda request, reply, partition: reply)

    def __call__(self, request: Message, reply: Message, partition: int) -> Message | None:
        changed = self.change(request, reply, partition)
        kind = request.metadata.message_type
        if kind.startswith("train") and changed is not None:
            self.seen.append((kind, partition, request, changed))
        return changed

    def of(self, kind: str) -> list[tuple[int, Message, Message]]:
        return [(partition, request, reply) for k, partition, request, reply in self.seen if k == kind]


def masks_of(message: Message) -> dict[str, Any]:
    record = message.content.config_records["submodel"]
    return {key: value for key, value in record.items() if key.startswith("mask")}


def test_exploration_is_a_message_of_its_own_and_counts_in_every_total(tmp_path: Path) -> None:
    listener = Listener()
    run = run_toy(tmp_path, "autoflip", {"num-server-rounds": 2, "autoflip.explore-epochs": 2}, alter=listener)
    asked, trained = listener.of("train.explore"), listener.of("train")
    assert sorted(partition for partition, *_ in asked) == [0, 1, 2, 3]
    assert len(trained) == 8
    summary, (first, second) = json.loads((run / "summary.json").read_text()), lines(run)
    for key, index in (("bytes-down", 1), ("bytes-up", 2)):
        total = sum(num_bytes(found[index]) for found in [*asked, *trained])
        assert first[key] + second[key] == summary[key] == total
    macs = sum(float(reply.content.metric_records["metrics"]["macs"]) for *_, reply in [*asked, *trained])
    assert first["macs"] + second["macs"] == summary["macs"] == macs
    assert first["modelled-seconds"] > second["modelled-seconds"]
    assert (first["explorers"], first["explored-epochs"]) == (4, 8)
    assert "explorers" not in second
    assert (summary["explorers"], summary["explored-epochs"]) == (4, 8)


def test_i10_only_kept_values_travel_and_the_mask_only_when_it_changed(tmp_path: Path) -> None:
    listener = Listener()
    values = {**STATIC, "num-server-rounds": 3}
    run = run_toy(tmp_path, "autoflip", values, alter=listener)
    size = sum(int(np.prod(shape)) for shape in LAYOUT.shapes.values())
    kept = size - int(0.3 * (NUM - 1)) - 1
    bits = sum(-(-int(np.prod(LAYOUT.shapes[name])) // 8) for name in PRUNABLE)
    assert lines(run)[0]["sparsity"] == pytest.approx((int(0.3 * (NUM - 1)) + 1) / NUM)
    for partition in range(4):
        mine = [(request, reply) for p, request, reply in listener.of("train") if p == partition]
        assert len(mine) == 3
        for round_, (request, reply) in enumerate(mine):
            for message in (request, reply):
                assert len(message.content.array_records["arrays"]["part"].data) == 4 * kept < 4 * size
            first = round_ == 0
            assert (sum(len(m) for n, m in masks_of(request).items() if n != "masks") == bits) is first
            assert all(len(m) <= 16 for m in masks_of(reply).values())
        sizes = [num_bytes(request) for request, _ in mine]
        assert sizes[1] == sizes[2] < sizes[0] - 0.95 * bits
    for _, request, reply in listener.of("train.explore"):
        assert len(request.content.array_records["arrays"]["part"].data) == 4 * size
        assert len(reply.content.array_records["arrays"]["part"].data) == 4 * NUM


def test_the_published_model_is_zero_where_it_is_masked(tmp_path: Path) -> None:
    run = run_toy(tmp_path, "autoflip", {"num-server-rounds": 2, "fraction-train": 0.5})
    model, line = final_model(run), lines(run)[-1]
    zeros = sum(int((model[name] == 0).sum()) for name in PRUNABLE)
    assert zeros == round(line["sparsity"] * NUM)
    assert line["compression-rate"] == pytest.approx(1 / (1 - line["sparsity"]))
    assert line["macs-forward"] == TASK.macs(full(LAYOUT)) > line["macs-forward-nonzero"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["parameters"] == sum(array.size for array in model.values()) - zeros


def test_i7_and_i8_without_pruning_and_momentum_it_is_fedavg(tmp_path: Path) -> None:
    shared = {"num-server-rounds": 2, "fraction-train": 0.5, "fleet": "equal"}
    fedavg = run_toy(tmp_path, "fedavg", shared)
    for more in ({}, STATIC, {"autoflip.explore-fraction": 0.5}, {"autoflip.explore-optimizer": "sgd"}):
        ours = run_toy(tmp_path, "autoflip", {**shared, **PLAIN, "autoflip.quantile": 0.0, **more})
        assert same_bits(final_model(ours), final_model(fedavg))
        assert [line["cohort"] for line in lines(ours)] == [line["cohort"] for line in lines(fedavg)]
        assert [line["accuracy"] for line in lines(ours)] == [line["accuracy"] for line in lines(fedavg)]


def test_i9_hard_and_dense_memory_are_one_under_a_static_mask(tmp_path: Path) -> None:
    values = {**STATIC, "num-server-rounds": 2, "fraction-train": 0.5}
    dense = run_toy(tmp_path, "autoflip", values)
    hard = run_toy(tmp_path, "autoflip", {**values, "autoflip.server-memory": "hard"})
    assert same_bits(final_model(dense), final_model(hard))
    assert (dense / "metrics.jsonl").read_bytes() == (hard / "metrics.jsonl").read_bytes()
    moving = {"autoflip.mask-mode": "per-round", "autoflip.server-memory": "hard"}
    assert not same_bits(final_model(dense), final_model(run_toy(tmp_path, "autoflip", {**values, **moving})))


def test_momentum_damps_the_first_step_to_a_tenth(tmp_path: Path) -> None:
    runs = [run_toy(tmp_path, "autoflip", more) for more in (PLAIN, {})]
    plain, damped, start = final_model(runs[0]), final_model(runs[1]), initial_model(runs[0])
    for name in PRUNABLE:
        kept = plain[name] != 0
        assert np.array_equal(kept, damped[name] != 0)
        step = plain[name][kept] - start[name][kept]
        np.testing.assert_allclose(damped[name][kept] - start[name][kept], 0.1 * step, atol=1e-6)


@pytest.mark.parametrize("mode", ["per-round", "static"])
def test_law_1_with_no_momentum_yet_nothing_moves(mode: str, tmp_path: Path) -> None:
    """Law 1 for a server step of its own: v = 0 and replies of zero are the fixed point."""

    def nothing(request: Message, reply: Message, _: int) -> Message:
        return with_difference(reply, np.zeros_like) if request.metadata.message_type == "train" else reply

    run = run_toy(tmp_path, "autoflip", {"autoflip.mask-mode": mode, "num-server-rounds": 2}, alter=nothing)
    start = initial_model(run)
    for name, array in final_model(run).items():
        kept = array != 0
        assert array[kept].tobytes() == start[name][kept].tobytes(), name
        assert kept.any() or not start[name].any()


def test_a_diverged_explorer_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def diverge(request: Message, reply: Message, partition: int) -> Message:
        if request.metadata.message_type == "train.explore" and partition in (1, 2):
            if partition == 2:
                return failure(request, "too hot")
            return with_difference(reply, lambda values: np.where(np.arange(len(values)) == 5, np.nan, values))
        return reply

    run = run_toy(tmp_path, "autoflip", alter=diverge)
    assert sorted(path.name for path in (run / "exploration").iterdir()) == ["000000.safetensors", "000003.safetensors"]
    assert lines(run)[0]["explorers"] == 2
    assert sum(lines(run)[0]["trained"].values()) == 4  # they train all the same
    assert "client 1 left out: its deviations should be squares" in caplog.text
    assert "client 2 left out: too hot" in caplog.text


def test_an_explorer_that_replies_twice_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    honest = run_toy(tmp_path, "autoflip")
    once = StreamingGrid.send_and_receive

    def twice(self: StreamingGrid, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        for reply in once(self, messages, timeout=timeout):
            yield from [reply] * (2 if reply.metadata.message_type == "train.explore" else 1)

    monkeypatch.setattr(StreamingGrid, "send_and_receive", twice)
    run = run_toy(tmp_path, "autoflip")
    assert caplog.text.count("it was not asked, or has replied already") == 4
    assert (run / "metrics.jsonl").read_bytes() == (honest / "metrics.jsonl").read_bytes()


def test_a_run_in_which_nobody_explored_ends(tmp_path: Path) -> None:
    def fail(request: Message, reply: Message, partition: int) -> Message:
        return failure(request) if request.metadata.message_type == "train.explore" else reply

    with pytest.raises(ValueError, match="no device has explored"):
        run_toy(tmp_path, "autoflip", alter=fail)


@pytest.mark.parametrize("structured", ["closure", "units"])
@pytest.mark.parametrize("mode", ["per-round", "static"])
def test_narrow_networks_really_cost_less(structured: str, mode: str, tmp_path: Path) -> None:
    values = {"autoflip.mask-mode": mode, "num-server-rounds": 2, "autoflip.quantile": 0.0, "fraction-train": 0.5}
    values = {**values, "autoflip.score": "random", "autoflip.unit-share": 0.25, "fleet": "equal"}
    wide, small = (run_toy(tmp_path, "autoflip", {**values, "autoflip.structured": s}) for s in ("off", structured))
    for before, after in zip(lines(wide), lines(small), strict=True):
        if structured == "units":
            for key in ("bytes-down", "bytes-up", "macs", "macs-forward", "modelled-seconds-training"):
                assert after[key] < 0.8 * before[key], key
            assert after["macs-forward"] == after["macs-forward-nonzero"]
            assert after["sparsity"] > 0.3
        else:
            assert after["macs"] == before["macs"]  # a quantile of 0 leaves no unit without a weight


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_baselines_ask_nobody_to_explore(score: str, tmp_path: Path) -> None:
    listener = Listener()
    run = run_toy(tmp_path, "autoflip", {"autoflip.score": score}, alter=listener)
    assert not listener.of("train.explore")
    assert lines(run)[0]["sparsity"] == pytest.approx((int(0.3 * (NUM - 1)) + 1) / NUM)
    assert "explorers" not in lines(run)[0]


def test_fedlex_scales_gradients_from_round_2_on_and_prunes_nothing(tmp_path: Path) -> None:
    listener = Listener()
    values = {"autoflip.fedlex": True, "num-server-rounds": 2, **PLAIN}
    run = run_toy(tmp_path, "autoflip", values, alter=listener)
    configs = [request.content.config_records["config"] for _, request, _ in listener.of("train")]
    told = [config.get("method.guidance") for config in configs]
    assert told[:4] == [None] * 4
    assert len(set(told[4:])) == 1
    assert len(told[4]) == 4 * NUM  # type: ignore[arg-type]
    numbers = np.frombuffer(told[4], dtype="<f4")  # type: ignore[arg-type]
    assert 0 <= numbers.min() < numbers.max() == 1
    replies = {partition: read_update(reply.content, LAYOUT) for partition, _, reply in listener.of("train.explore")}
    found = [Deviations(1.0, read_deviations(LAYOUT, FOUND, update)) for _, update in sorted(replies.items())]
    assert len(found) == 4
    assert told[4] == guidance_bytes(LAYOUT, PRUNABLE, guidance(mean_deviations(found)))
    assert not any(masks_of(request) for _, request, _ in listener.of("train"))
    assert lines(run)[1]["sparsity"] == 0
    assert not same_bits(final_model(run), final_model(run_toy(tmp_path, "fedavg", {"num-server-rounds": 2})))


def test_a_reply_under_another_mask_is_refused(tmp_path: Path) -> None:
    def other(request: Message, reply: Message, partition: int) -> Message:
        if request.metadata.message_type == "train" and partition == 1:
            record = reply.content.config_records["submodel"]
            sent = unpack(LAYOUT, dict(request.content.config_records["submodel"]))  # type: ignore[arg-type]
            mask = np.packbits(~sent.masks["conv2.weight"]).tobytes()
            for key in list(record):
                if key.startswith("mask"):
                    del record[key]
            record["mask:conv2.weight"] = mask
        return reply

    run = run_toy(tmp_path, "autoflip", alter=other)
    assert [entry["partition"] for entry in lines(run)[0]["refused"]] == [1]
    assert sum(lines(run)[0]["trained"].values()) == 3


def test_exploration_tells_the_truth_whatever_the_runs_codec(tmp_path: Path) -> None:
    listener = Listener()
    run_toy(tmp_path, "autoflip", {"codec": "int8"}, alter=listener)
    for _, _, reply in listener.of("train.explore"):
        assert list(reply.content.array_records["arrays"]) == ["part"]


def test_clients_test_the_masked_network_that_they_trained(tmp_path: Path) -> None:
    run = run_toy(tmp_path, "autoflip", {"personal": "stored-local", "num-server-rounds": 2, "fleet": "equal"})
    assert all(line["clients-personal"] == 4 for line in lines(run))
    small, large = (run_toy(tmp_path, "autoflip", {"personal": p, "fleet": "equal"}) for p in ("stored-local", "none"))
    sent = [lines(folder)[0]["bytes-evaluation"] for folder in (small, large)]
    assert 0 < sent[0] - sent[1] < 20_000  # their own models travel nowhere


def test_a_personal_model_that_is_nobodys_own_is_refused() -> None:
    with pytest.raises(ValueError, match="choose 'stored-local' or 'none'"):
        AutoFLIP(Experiment.read({"strategy": "autoflip", "personal": "global-masked"}), TASK, None)  # type: ignore[arg-type]


def test_fedlex_counts_its_guidance_in_what_a_device_must_hold_and_wait_for() -> None:
    plain, fedlex = server(), server(fedlex=True)
    whole, device = full(LAYOUT), Device(0, link_bytes_s=1e3)
    assert fedlex.budget.memory(whole) - plain.budget.memory(whole) == 2 * 4 * NUM
    waits = fedlex.budget.seconds(device, whole) - plain.budget.seconds(device, whole)
    assert waits == pytest.approx(4 * NUM / 1e3)
