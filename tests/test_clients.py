"""What FlexFL's and HeteroFL's clients do with a job, and what the server makes of it."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import nn
from toy import AVERAGING, DIGITS, QUICK, ROOT, final_model, initial_model, lines, run_toy

import strategies.flexfl
from flexfed import jobs
from flexfed.config import Experiment
from flexfed.data import ClientData, DataConfig, load_client, load_server
from flexfed.devices import Device, load_fleet
from flexfed.flower.messages import read_update
from flexfed.jobs import Job, Task, Update, free_memory_of, initial_arrays
from flexfed.methods import METHODS, fedavg, flexfl
from flexfed.methods.flexfl import LEVELS, Teacher
from flexfed.narrowing import narrow
from flexfed.submodel import Submodel, extract, flatten, full, pack, unpack, within
from flexfed.training import use_batch_statistics
from strategies import STRATEGIES

SCORES = "0.4, 0.5, 0.6, 0.7"


class Bench:
    """One FlexFL client before a job: the task, the pool, a model and its data."""

    def __init__(self, **knobs: Any):
        values = {**QUICK, "strategy": "flexfl", "flexfl.scores": SCORES, "seed": 3}
        experiment = Experiment.read({**values, **{f"flexfl.{k.replace('_', '-')}": v for k, v in knobs.items()}})
        self.task: Task = experiment.task(10, DIGITS)
        self.server: Any = STRATEGIES["flexfl"](experiment, self.task, load_server(experiment.data))
        self.server.prepare(None)
        self.pool: Mapping[str, Submodel] = self.server.levels()
        self.arrays = initial_arrays(self.task, "", 3)
        self.data: ClientData = load_client(DataConfig(partition="iid"), 0, 8)

    def job(self, level: str, capacity: float = 2.0, spread: float = 0.0, seed: int = 5, **told: Any) -> Job:
        """Train `level` on a device of this capacity."""
        held = LEVELS[: LEVELS.index(level) + 1]
        bits = [pack(self.pool[name])["units"] for name in held]
        sizes = [100 * target for target in self.task.method.level_targets[: len(held)]]
        part = extract(self.task.layout, self.pool[level], self.arrays)
        device = Device(0, capacity=capacity, capacity_spread=spread, **told)
        return Job(self.pool[level], part, device, {"levels": bits, "sizes": sizes, "num-levels": len(held)}, seed, 1)

    def sized_job(self, ratio: float, capacity: float, seed: int = 5) -> Job:
        """Train the server's part of a ratio, as under `ratio-policy = "budget"`."""
        assignment = self.server.sized_part(ratio, Device(0), 1)
        part = extract(self.task.layout, assignment.submodel, self.arrays)
        return Job(assignment.submodel, part, Device(0, capacity=capacity), assignment.config, seed, 1)

    def train(self, *args: Any, **kwargs: Any) -> Update:
        return flexfl.local_update(self.job(*args, **kwargs), self.task, self.data)

    def student(self, level: str) -> nn.Module:
        return self.task.network(extract(self.task.layout, self.pool[level], self.arrays))


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


# --- FlexFL: the teachers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("student", LEVELS[1:])
def test_a_teacher_is_the_smaller_network_itself(bench: Bench, student: str) -> None:
    inputs = bench.data.train.inputs[:20]
    model = bench.student(student)
    for level in LEVELS[: LEVELS.index(student)]:
        teacher = Teacher(bench.task, bench.pool[student], bench.pool[level])
        small = narrow(bench.task.factory, extract(bench.task.layout, bench.pool[level], bench.arrays))
        with torch.no_grad():
            expected = use_batch_statistics(small).eval()(inputs)
        torch.testing.assert_close(teacher(model, inputs), expected, rtol=1e-5, atol=1e-6)


def test_teachers_follow_the_students_weights(bench: Bench) -> None:
    inputs = bench.data.train.inputs[:20]
    model = bench.student("L")
    teacher = Teacher(bench.task, bench.pool["L"], bench.pool["S"])
    before = teacher(model, inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    after = teacher(model, inputs)
    assert not torch.allclose(before, after)
    current = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    small = narrow(bench.task.factory, extract(bench.task.layout, bench.pool["S"], current))
    with torch.no_grad():
        torch.testing.assert_close(after, use_batch_statistics(small).eval()(inputs), rtol=1e-5, atol=1e-6)


def test_no_gradient_reaches_the_student_through_its_teachers(bench: Bench) -> None:
    batch = bench.data.train
    model = bench.student("L")
    teachers = [Teacher(bench.task, bench.pool["L"], bench.pool[level]) for level in LEVELS[:-1]]
    opinions = [teacher(model, batch.inputs) for teacher in teachers]
    assert not any(opinion.requires_grad for opinion in opinions)
    constants = [torch.from_numpy(opinion.numpy().copy()) for opinion in opinions]
    gradients = []
    for told in (opinions, constants):
        loss = flexfl.distillation_loss(model(batch.inputs), batch.labels, told, bench.task.method)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_teachers_leave_the_student_alone(bench: Bench) -> None:
    model = bench.student("L").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Teacher(bench.task, bench.pool["L"], bench.pool["M"])(model, bench.data.train.inputs[:4])
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("teachers", "number"), [("all", 4), ("main", 2)])
def test_teachers_are_asked_once_a_batch_and_paid_for(
    teachers: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Counter[int] = Counter()
    ask = Teacher.__call__

    def count(self: Teacher, *args: Any) -> torch.Tensor:
        asked[id(self)] += 1
        return ask(self, *args)

    monkeypatch.setattr(Teacher, "__call__", count)
    bench = Bench(kd_teachers=teachers)
    update = bench.train("L")
    num, size = len(bench.data.train.labels), bench.task.training.batch_size
    assert list(asked.values()) == [num // size] * number
    taught = [bench.pool[level] for level in LEVELS[:-1] if teachers == "all" or level in ("S", "M")]
    samples = num // size * size
    macs = samples * (3 * bench.task.macs(bench.pool["L"]) + sum(bench.task.macs(level) for level in taught))
    assert update.metrics["macs"] == macs


# --- FlexFL: what is trained ------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["S", "M", "L"])
def test_without_distillation_it_is_plain_training(level: str) -> None:
    bench = Bench(kd_weight=0)
    job = bench.job(level)
    ours = flexfl.local_update(job, bench.task, bench.data)
    plain = fedavg.local_update(job, bench.task, bench.data)
    assert ours.difference.tobytes() == plain.difference.tobytes()
    assert ours.metrics == plain.metrics
    assert ours.weight == plain.weight == len(bench.data.train.labels)


def test_the_smallest_level_has_no_teacher(bench: Bench) -> None:
    assert bench.train("S").difference.tobytes() == Bench(kd_weight=0).train("S").difference.tobytes()


def test_distillation_changes_what_larger_levels_learn(bench: Bench) -> None:
    assert bench.train("L").difference.tobytes() != Bench(kd_weight=0).train("L").difference.tobytes()


@pytest.mark.parametrize(
    ("dispatched", "capacity", "trained"),
    [
        ("L", 1.0, "L"),
        ("L", 0.99, "L-"),
        ("L", 0.9, "L-"),
        ("L", 0.89, "M"),
        ("L", 0.5, "M"),
        ("L", 0.45, "M-"),
        ("L", 0.3, "S"),
        ("L", 0.01, "S"),
        ("M", 2.0, "M"),
        ("M", 0.45, "M-"),
        ("S", 2.0, "S"),
        ("S", 0.01, "S"),
    ],
)
def test_a_device_trains_the_smaller_of_sent_and_capable(
    bench: Bench, dispatched: str, capacity: float, trained: str
) -> None:
    update = bench.train(dispatched, capacity)
    assert update.submodel.key == bench.pool[trained].key
    assert np.isfinite(update.difference).all()


def test_a_shrunk_part_trains_as_if_it_had_been_sent(bench: Bench) -> None:
    shrunk, sent = bench.train("L", 0.5), bench.train("M", 0.5)
    assert shrunk.difference.tobytes() == sent.difference.tobytes()
    assert shrunk.metrics == sent.metrics


def test_capacity_is_drawn_from_the_jobs_seed(bench: Bench) -> None:
    trained = {seed: bench.train("L", 1.0, 0.3, seed).submodel.key for seed in range(12)}
    assert len(set(trained.values())) > 1
    assert all(bench.train("L", 1.0, 0.3, seed).submodel.key == key for seed, key in trained.items())


def test_a_device_below_its_limit_refuses() -> None:
    bench = Bench(drop_below=30.0)
    with pytest.raises(RuntimeError, match=r"25 % of the network free, flexfl.drop-below is 30"):
        bench.train("S", 0.25)
    assert bench.train("S", 0.3).submodel.key == bench.pool["S"].key


@pytest.mark.parametrize("method", AVERAGING)
def test_a_job_is_left_as_it_came(method: str) -> None:
    bench = Bench()
    experiment = Experiment.read({**QUICK, "strategy": method})
    task = experiment.task(10, DIGITS)
    config = {**bench.job("L").config, "ratio": 1.0, "tier": "p50q8", "gamma": 0.05}
    job = replace(bench.job("L"), submodel=full(task.layout), arrays=initial_arrays(task, "", 1), config=config)
    for array in job.arrays.values():
        array.flags.writeable = False
    before = flatten(task.layout, job.submodel, job.arrays)
    inputs = bench.data.train.inputs.clone()
    METHODS[method].local_update(job, task, bench.data)
    assert np.array_equal(flatten(task.layout, job.submodel, job.arrays), before)
    assert torch.equal(bench.data.train.inputs, inputs)


# --- FlexFL: a round --------------------------------------------------------------------------------------------

UNCERTAIN = """
[[class]]
kind = "any"
share = 1.0
capacity = 1.0
capacity-spread = [0.5, 0.8]
"""


def test_the_server_counts_what_was_trained_not_what_was_sent(tmp_path: Path) -> None:
    pool = Bench().pool
    names = {submodel.key: name for name, submodel in pool.items()}
    layout = Bench().task.layout
    trained: Counter[str] = Counter()

    def listen(request: Message, reply: Message, _: int) -> Message:
        if request.metadata.message_type == "train":
            trained[names[read_update(reply.content, layout).submodel.key]] += 1
        return reply

    fleet = tmp_path / "uncertain.toml"
    fleet.write_text(UNCERTAIN)
    values = {"fleet": str(fleet), "flexfl.scores": SCORES, "num-server-rounds": 3}
    run = run_toy(tmp_path, "flexfl", values, alter=listen)
    counted = sum((Counter(line["trained"]) for line in lines(run)), Counter())
    sent = sum((Counter(line["dispatched"]) for line in lines(run)), Counter())
    assert counted == trained
    assert counted != sent
    assert set(sent) <= {"S", "M", "L"}


def test_known_scores_skip_pre_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: Any) -> None:
        raise AssertionError("pre-training was asked for")

    monkeypatch.setattr(strategies.flexfl, "measure_scores", measure)
    with pytest.raises(AssertionError, match="pre-training was asked for"):
        run_toy(tmp_path, "flexfl")
    assert lines(run_toy(tmp_path, "flexfl", {"flexfl.scores": SCORES}))[0]["trained"]


def test_pre_training_leaves_the_first_model_alone(tmp_path: Path) -> None:
    sent: dict[int, np.ndarray] = {}

    def listen(request: Message, reply: Message, partition: int) -> Message:
        if request.metadata.message_type == "train":
            data = request.content.array_records["arrays"]["part"].data
            sent[partition] = np.frombuffer(data, dtype=np.float32)
        return reply

    run = run_toy(tmp_path, "flexfl", {"fleet": "equal", "seed": 4}, alter=listen)
    layout = Bench().task.layout
    whole = Submodel(np.ones(layout.num_units, dtype=bool))
    assert lines(run)[0]["dispatched"]["L"]
    assert np.array_equal(max(sent.values(), key=len), flatten(layout, whole, initial_model(run, seed=4)))


# --- HeteroFL: labels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["heterofl", "fedrolex"])
def test_classifier_rows_of_labels_nobody_holds_stay_untouched(strategy: str, tmp_path: Path) -> None:
    values = {"partition": "pathological", "classes-per-client": 2}
    run = run_toy(tmp_path, strategy, values, clients=3)
    data = [load_client(DataConfig(partition="pathological"), partition, 3) for partition in range(3)]
    held = {label for client in data for label in client.train.labels.tolist()}
    absent = sorted(set(range(10)) - held)
    before, after = initial_model(run), final_model(run)
    assert absent
    for name in ("classifier.weight", "classifier.bias"):
        assert after[name][absent].tobytes() == before[name][absent].tobytes()
        assert all(not np.array_equal(after[name][label], before[name][label]) for label in held)
    assert not np.array_equal(after["conv1.weight"], before["conv1.weight"])


def test_without_the_limit_every_row_is_averaged(tmp_path: Path) -> None:
    values = {"partition": "pathological", "heterofl.limit-rows": False, "heterofl.masked-loss": "off"}
    run = run_toy(tmp_path, "heterofl", values, clients=3)
    before, after = initial_model(run), final_model(run)
    assert (before["classifier.bias"] != after["classifier.bias"]).all()


# --- FlexFL: parts of any size ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.75, 0.97])
def test_a_part_of_any_size_is_trained_where_it_fits_and_shrunk_where_not(bench: Bench, ratio: float) -> None:
    """Through the levels inside it and, close to its own size, through parts in between."""
    sent = bench.server.part_at(ratio, 1)
    share = bench.server.budget.share(sent)
    assert flexfl.local_update(bench.sized_job(ratio, share), bench.task, bench.data).submodel == sent
    sent_jobs = [bench.sized_job(ratio, part * share) for part in (0.95, 0.6, 0.01)]
    trained = [flexfl.local_update(job, bench.task, bench.data) for job in sent_jobs]
    sizes = [bench.server.budget.share(update.submodel) for update in trained]
    for size, capacity in zip(sizes[:2], (0.95, 0.6), strict=True):
        known = any(level == trained[sizes.index(size)].submodel for level in bench.pool.values())
        assert known or size <= capacity * share + 1e-9  # a level's own measure is its target
    assert sizes == sorted(sizes, reverse=True)
    smallest = cast(list[bytes], sent_jobs[-1].config["levels"])[0]
    assert trained[-1].submodel == unpack(bench.task.layout, {"units": smallest})
    for update in trained:
        assert within(update.submodel, sent)
        assert bench.server.level_trained(bench.server.sized_part(ratio, Device(0), 1), update) in (
            *LEVELS,
            *(f"{k / 64:g}" for k in range(1, 65)),
            f"{ratio:g}",
            *(f"{ratio - k / 16:g}" for k in range(16)),
        )


def test_a_client_has_the_power_of_the_jobs_round(tmp_path: Path) -> None:
    """Sent what the server thinks it has, it finds the same and does not shrink; in another round it would."""
    fleet = tmp_path / "moody.toml"
    fleet.write_text('[[class]]\nkind = "moody"\nshare = 1.0\navailability = [0.3, 0.6, 1.0]\n')
    seen: list[tuple[int, float]] = []
    real = flexfl.local_update

    def remember(job: Job, task: Task, data: ClientData) -> Update:
        seen.append((job.server_round, job.device.capacity))
        return real(job, task, data)

    values = {"fleet": str(fleet), "num-server-rounds": 5}
    with patch.dict(METHODS, flexfl=replace(METHODS["flexfl"], local_update=remember)):
        run = run_toy(tmp_path / "runs", "flexfl", values, clients=2)
    device = load_fleet(str(fleet))
    for server_round, capacity in seen:
        assert capacity in {device.device(p, 2, 1).in_round(server_round, 1).capacity for p in range(2)}
    assert len({capacity for _, capacity in seen}) > 1
    assert all(line["dispatched"] == line["trained"] for line in lines(run))


def test_shrinking_a_little_costs_little(bench: Bench) -> None:
    """What a device loses is less than the step between two levels."""
    sent = bench.server.budget.share(bench.server.part_at(0.95, 1))
    update = flexfl.local_update(bench.sized_job(0.95, 0.97 * sent), bench.task, bench.data)
    assert bench.server.budget.share(update.submodel) > 0.8 * sent


def test_only_levels_teach(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Submodel] = []
    real = flexfl.Teacher.__init__

    def remember(self: Teacher, task: Task, student: Submodel, level: Submodel) -> None:
        asked.append(level)
        real(self, task, student, level)

    monkeypatch.setattr(flexfl.Teacher, "__init__", remember)
    part = bench.server.part_at(0.9, 1)
    flexfl.local_update(bench.sized_job(0.9, 1.0), bench.task, bench.data)
    assert asked == [level for level in bench.pool.values() if within(level, part)]
    assert len(asked) > 1


# --- FlexFL: memory ---------------------------------------------------------------------------------------------


def needs(bench: Bench) -> list[int]:
    """Bytes that each level asks for."""
    return [bench.task.memory_to_train(bench.pool[level]) for level in LEVELS]


@pytest.mark.parametrize("trained", LEVELS)
def test_a_simulated_device_shrinks_to_the_memory_it_has(bench: Bench, trained: str) -> None:
    memory = float(needs(bench)[LEVELS.index(trained)])
    assert bench.train("L", memory_bytes=memory).submodel == bench.pool[trained]
    if trained == "S":
        with pytest.raises(
            RuntimeError, match=r"out of memory: level 4 needs 3. MB to train, 3. MB are free, and the sm"
        ):
            bench.train("L", memory_bytes=memory - 1)


def test_memory_swings_with_the_jobs_seed(bench: Bench) -> None:
    told = {"memory_bytes": 1.02 * needs(bench)[-1], "memory_spread_bytes": 0.1 * needs(bench)[-1]}
    trained = {bench.train("L", seed=seed, **told).submodel.key for seed in range(1, 9) if survives(bench, seed, told)}
    assert len(trained) > 1


def survives(bench: Bench, seed: int, told: dict[str, float]) -> bool:
    job = bench.job("L", seed=seed, **told)
    return free_memory_of(job.device, job.seed) >= needs(bench)[0]


def test_a_real_device_looks_at_the_memory_free_at_that_moment(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What it declared is what the server went by; it is not asked again."""
    caplog.set_level("INFO", "flwr")
    for level, needed in zip(LEVELS, needs(bench), strict=True):
        monkeypatch.setattr(jobs, "free_memory", lambda needed=needed: needed)
        caplog.clear()
        assert bench.train("L", memory_bytes=1e12, measure_memory=True).submodel == bench.pool[level]
        told = re.search(
            r"partition 0: level 4 needs \d+ MB to train, \d+ MB are free; training level (\d)", caplog.text
        )
        assert (told[1] if told else "4") == str(LEVELS.index(level))


@pytest.mark.parametrize("strategy", ["fedavg", "fjord", "heterofl"])
def test_methods_that_cannot_shrink_refuse_what_would_be_killed(
    strategy: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Experiment.read({**QUICK, "strategy": strategy}).task(10, DIGITS)
    part = bench.pool["L"]
    for told, free, trains in ((False, 1, True), (True, 10**12, True), (True, 33_000_000, False)):
        monkeypatch.setattr(jobs, "free_memory", lambda free=free: free)
        device = Device(0, memory_bytes=1e12, measure_memory=told)
        job = Job(part, extract(task.layout, part, bench.arrays), device, {"ratio": 1.0}, 1, 1)
        if trains:
            METHODS[strategy].local_update(job, task, bench.data)
        else:
            with pytest.raises(RuntimeError, match=r"out of memory: the part needs \d+ MB, 33 MB are free"):
                METHODS[strategy].local_update(job, task, bench.data)


def limited(megabytes: int, measure: str) -> subprocess.CompletedProcess[str]:
    """A client that was sent a ResNet-18 and may take only so much more memory."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "limited_client.py"), str(megabytes), measure]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=120)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not enforce limits of memory")
def test_under_a_real_limit_a_client_shrinks_and_trains_where_the_unshrunk_one_fails() -> None:
    shrunk = limited(230, "measure")
    assert shrunk.returncode == 0, shrunk.stderr
    told = json.loads(shrunk.stdout)
    assert told["trained"] in ("M-", "M")
    assert told["needs"]["L"] > 230
    assert math.isfinite(told["loss"])
    assert re.search(
        r"partition 0: level 4 needs 2\d\d MB to train, 1\d\d MB are free; training level [12]", shrunk.stderr
    )
    unshrunk = limited(230, "no")
    assert unshrunk.returncode != 0
    assert "allocate" in unshrunk.stderr or unshrunk.returncode < 0, unshrunk.stderr
