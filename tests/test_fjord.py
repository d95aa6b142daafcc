from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import Tensor, nn
from torch.nn import functional
from toy import DIGITS, LAYOUTS, QUICK, lines, place, random_arrays, run_toy, same_bits

from benchmarks.memory import allocated_peak
from flexfed import jobs
from flexfed.averaging import Averager
from flexfed.checkpoint import Checkpoint, load_checkpoint
from flexfed.config import Experiment
from flexfed.cost import BUDGET_BYTES, BUDGET_FACTOR, message_bytes
from flexfed.data import ClientData, DataConfig, load_client, load_server
from flexfed.devices import Device
from flexfed.flower.messages import read_update
from flexfed.inner import InnerNetwork
from flexfed.jobs import Assignment, Job, Task, Update, initial_arrays, train_network
from flexfed.methods.fjord import FjORDConfig, OrderedDropout, allowed, local_update, memory_beside, soft_cross_entropy
from flexfed.methods.heterofl import HeteroFLConfig, LevelsConfig
from flexfed.narrowing import narrow
from flexfed.select import kept_units, prefix_ratio
from flexfed.submodel import Submodel, extract, flatten, unpack
from flexfed.training import Samples, batches, use_batch_statistics
from flexfed.units import Arrays, Layout
from strategies import STRATEGIES

P = (1.0, 0.8, 0.6, 0.4, 0.2)


# --- the configuration ------------------------------------------------------------------------------------------


def test_knobs_are_those_of_nested_levels_and_the_distillation() -> None:
    config = FjORDConfig()
    assert (config.ratios, config.weights, config.self_distillation) == (P, "examples", True)
    assert isinstance(config, LevelsConfig)
    assert not isinstance(config, HeteroFLConfig)
    assert not hasattr(config, "scaler")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"ratios": (0.2, 1.0)}, "fjord.ratios must fall from at most 1 to above 0, largest first"),
        ({"assign": "tiers"}, "fjord.assign must be one of capacity, fix, dynamic, got 'tiers'"),
        ({"assign": "fix", "shares": "a1-f1"}, "fjord.shares: expected levels a to e, .* got 'f1'"),
        ({"weights": "equal"}, "fjord.weights must be one of uniform, examples, got 'equal'"),
        ({"batch_norm": "global"}, "fjord.batch-norm must be one of federated, proxy, batch"),
        ({"statistics": "exact"}, "fjord.statistics must be one of batches, pooled"),
    ],
)
def test_config_refuses_impossible_values(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FjORDConfig(**values)


# --- the widths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (1.0, [64, 128, 256, 512]),
        (0.8, [52, 103, 205, 410]),
        (0.6, [39, 77, 154, 308]),
        (0.4, [26, 52, 103, 205]),
        (0.2, [13, 26, 52, 103]),
        (1 / 2, [32, 64, 128, 256]),
        (1 / 16, [4, 8, 16, 32]),
    ],
)
def test_widths_of_the_page(ratio: float, expected: list[int]) -> None:
    assert [kept_units(ratio, size) for size in (64, 128, 256, 512)] == expected


@pytest.mark.parametrize(
    ("ratio", "size", "rounding", "expected"),
    [
        (0.07, 100, "ceil", 7),
        (0.14, 50, "ceil", 7),
        (0.55, 100, "ceil", 55),
        (0.57, 100, "floor", 57),
        (0.29, 100, "floor", 29),
    ],
)
def test_widths_that_floating_point_would_miss(ratio: float, size: int, rounding: Any, expected: int) -> None:
    assert kept_units(ratio, size, rounding) == expected


def test_a_client_may_train_its_own_width_and_the_runs_below() -> None:
    assert allowed(P, 1.0) == P
    assert allowed(P, 0.6) == (0.6, 0.4, 0.2)
    assert allowed(P, 0.2) == (0.2,)
    assert allowed(P, 39 / 64) == (39 / 64, 0.6, 0.4, 0.2)
    assert allowed(P, 1 / 64) == (1 / 64,)


# --- what a batch learns ----------------------------------------------------------------------------------------


def test_f2_the_soft_loss_of_the_worked_example() -> None:
    teacher, student = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.5, 0.0]])
    assert float(functional.cross_entropy(teacher, torch.tensor([0]))) == pytest.approx(0.169846, abs=1e-6)
    soft = float(soft_cross_entropy(student, teacher))
    entropy = float(soft_cross_entropy(teacher, teacher))
    assert soft == pytest.approx(0.779377, abs=1e-6)
    assert soft - entropy == pytest.approx(0.255111, abs=1e-6)  # KL(teacher || student)
    assert entropy == pytest.approx(0.524267, abs=1e-6)


def test_the_soft_loss_is_a_mean_and_teaches_nobody_else() -> None:
    rng = torch.Generator().manual_seed(0)
    teacher = torch.randn(4, 3, generator=rng, requires_grad=True)
    student = torch.randn(4, 3, generator=rng, requires_grad=True)
    loss = soft_cross_entropy(student, teacher)
    by_row = [-(t.softmax(0) * s.log_softmax(0)).sum() for t, s in zip(teacher, student, strict=True)]
    torch.testing.assert_close(loss, torch.stack(by_row).mean())
    loss.backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, (student.softmax(1) - teacher.softmax(1)).detach() / 4)


@cache
def task_of(model: str = "cnn", **knobs: Any) -> Task:
    given = {f"fjord.{k.replace('_', '-')}": v for k, v in knobs.items() if k not in TRAINING}
    given |= {k.replace("_", "-"): v for k, v in knobs.items() if k in TRAINING}
    values = {"strategy": "fjord", "model": model, "batch-size": 16, "local-epochs": 2} | given
    return Experiment.read(values).task(10, DIGITS)


TRAINING = ("batch_size", "momentum", "weight_decay", "clip_norm", "learning_rate")


def client(partition: int = 0) -> ClientData:
    return load_client(DataConfig(partition="iid"), partition, 20)


def job_of(task: Task, ratio: float, seed: int = 5) -> Job:
    part = prefix_ratio(task.layout, ratio)
    arrays = extract(task.layout, part, initial_arrays(task, "", 3))
    return Job(part, arrays, Device(0), {"ratio": ratio}, seed, 1)


def widths_drawn(task: Task, ratio: float, num: int, seed: int) -> list[float]:
    dropout = OrderedDropout(task, prefix_ratio(task.layout, ratio), ratio, seed)
    return [dropout.draw() for _ in range(num)]


def test_draws_follow_from_the_jobs_seed_alone() -> None:
    task = task_of()
    first = widths_drawn(task, 1.0, 40, 5)
    np.random.seed(0)
    torch.manual_seed(0)
    assert widths_drawn(task, 1.0, 40, 5) == first
    assert widths_drawn(task, 1.0, 40, 6) != first
    assert set(widths_drawn(task, 0.6, 40, 5)) == {0.6, 0.4, 0.2}
    assert set(widths_drawn(task, 0.2, 40, 5)) == {0.2}


def test_every_width_is_drawn_equally_often() -> None:
    counts = Counter(widths_drawn(task_of(), 1.0, 5000, 1))
    assert set(counts) == set(P)
    assert all(abs(num - 1000) < 120 for num in counts.values())  # 4 deviations


SEED = 6  # of a job whose twelve batches draw every width there is


class ByHand:
    """Local training written out: a narrow network is built anew for each pass, its gradients put where they stand."""

    def __init__(self, job: Job, task: Task, data: ClientData):
        self.job, self.task, self.layout = job, task, task.layout
        self.arrays: Arrays = {n: np.array(a) for n, a in job.arrays.items()}
        self.speed: Arrays = {n: np.zeros_like(a) for n, a in job.arrays.items()}
        self.passes: Counter[float] = Counter()
        self.right: list[float] = []
        self.losses: list[float] = []
        ratio = float(str(job.config["ratio"]))
        self.parts = {p: job.submodel if p == ratio else prefix_ratio(self.layout, p) for p in allowed(P, ratio)}
        order, draws = np.random.default_rng(job.seed), np.random.default_rng([job.seed, 5])
        for _ in range(task.training.local_epochs):
            seen, right, losses = 0, 0, 0.0
            for batch in batches(data.train, task.training.batch_size, order, drop_last=True):
                p = allowed(P, ratio)[draws.integers(len(self.parts))]
                loss, correct = self.batch(batch, p, ratio)
                seen, right = seen + len(batch.labels), right + correct
                losses += loss * len(batch.labels)
            self.right.append(right / seen)
            self.losses.append(losses / seen)

    def batch(self, batch: Samples, p: float, largest: float) -> tuple[float, int]:
        if not self.task.method.self_distillation:
            gradients, logits, loss = self.learn(p, batch.inputs, lambda z: functional.cross_entropy(z, batch.labels))
        else:
            gradients, logits, loss = self.learn(
                largest, batch.inputs, lambda z: functional.cross_entropy(z, batch.labels)
            )
            if p != largest:
                taught, _, soft = self.learn(
                    p, batch.inputs, lambda z: -(logits.softmax(1) * z.log_softmax(1)).sum(1).mean()
                )
                gradients = {n: g + taught[n] for n, g in gradients.items()}
                loss += soft
        self.step(gradients)
        return loss, int((logits.argmax(1) == batch.labels).sum())

    def learn(self, p: float, inputs: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Arrays, Tensor, float]:
        self.passes[p] += len(inputs)
        part = self.parts[p]
        cut = {n: a[self.inside(part, n)] for n, a in self.arrays.items()}
        small = use_batch_statistics(narrow(self.task.factory, cut)).train()
        logits = small(inputs)
        value = loss(logits)
        value.backward()  # type: ignore[no-untyped-call]
        found = {n: np.zeros_like(a) for n, a in self.arrays.items()}
        for n, parameter in small.named_parameters():
            found[n][self.inside(part, n)] = parameter.grad
        return found, logits.detach(), float(value.detach())

    def inside(self, part: Submodel, name: str) -> tuple[np.ndarray, ...]:
        """Where an inner prefix stands in this client's own."""
        outer, inner = place(self.layout, self.job.submodel, name), place(self.layout, part, name)
        kept = [np.searchsorted(a.ravel(), b.ravel()) for a, b in zip(outer, inner, strict=True)]
        return np.ix_(*kept)

    def step(self, gradients: Arrays) -> None:
        training = self.task.training
        for n, g in gradients.items():
            self.speed[n] = training.momentum * self.speed[n] + g + np.float32(training.weight_decay) * self.arrays[n]
            self.arrays[n] = self.arrays[n] - np.float32(training.rate_at(1)) * self.speed[n]


@pytest.mark.parametrize("distillation", [True, False])
@pytest.mark.parametrize("ratio", [1.0, 0.6, 0.5, 0.2])
def test_local_training_is_that_written_out(ratio: float, distillation: bool) -> None:
    """Weights, loss, accuracy and work; momentum and weight decay move entries that a batch did not use, too."""
    task = task_of(self_distillation=distillation, weight_decay=0.01, learning_rate=0.05, batch_size=8)
    job, data = job_of(task, ratio, seed=SEED), client()
    expected = ByHand(job, task, data)
    update = local_update(job, task, data)
    trained = {n: a - job.arrays[n] for n, a in expected.arrays.items()}
    np.testing.assert_allclose(update.difference, flatten(task.layout, job.submodel, trained), rtol=1e-3, atol=2e-5)
    assert update.metrics["train-accuracy"] == pytest.approx(np.mean(expected.right))
    assert update.metrics["train-loss"] == pytest.approx(expected.losses[-1], rel=1e-4)
    macs = {p: task.macs(part) for p, part in expected.parts.items()}
    assert update.metrics["macs"] == 3 * sum(macs[p] * num for p, num in expected.passes.items())
    assert len(expected.passes) == len(expected.parts), "every width was drawn"
    assert update.submodel == job.submodel
    assert update.weight == len(data.train.labels)


def test_what_no_batch_used_is_moved_by_weight_decay_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OrderedDropout, "draw", lambda self: 0.2)
    task = task_of(self_distillation=False, weight_decay=0.1, momentum=0.0, learning_rate=0.1)
    job, data = job_of(task, 1.0), client()
    update = local_update(job, task, data)
    steps = task.training.local_epochs * (len(data.train.labels) // 16)
    before = flatten(task.layout, job.submodel, job.arrays)
    shrunk = ((1 - 0.1 * 0.1) ** steps - 1) * before
    inner = {n: np.zeros(s) for n, s in task.layout.shapes.items()}
    for n in inner:
        inner[n][place(task.layout, prefix_ratio(task.layout, 0.2), n)] = 1
    outside = flatten(task.layout, job.submodel, inner) == 0
    np.testing.assert_allclose(update.difference[outside], shrunk[outside], rtol=1e-3, atol=1e-6)
    assert (np.abs(update.difference - shrunk)[~outside] > 1e-5).mean() > 0.5


def test_the_largest_width_is_trained_plainly_where_it_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """With distillation or without: the same bits, and no second pass."""
    monkeypatch.setattr(OrderedDropout, "draw", lambda self: 1.0)
    found = [
        local_update(job_of(task_of(self_distillation=on), 1.0), task_of(self_distillation=on), client())
        for on in (True, False)
    ]
    assert np.array_equal(found[0].difference, found[1].difference)
    assert found[0].metrics == found[1].metrics


def test_gradients_of_both_losses_are_clipped_together() -> None:
    task = task_of(clip_norm=1e-3, momentum=0.0, weight_decay=0.0, learning_rate=0.1)
    update = local_update(job_of(task, 1.0), task, client())
    steps = task.training.local_epochs * (len(client().train.labels) // 16)
    assert 0 < float(np.linalg.norm(update.difference)) <= steps * 0.1 * 1e-3 * 1.001


def test_distillation_brings_the_narrow_networks_closer_to_the_widest() -> None:
    """KL to p_max's outputs on the client's samples, against training that never ran a narrower width."""
    taught, alone = (divergences(self_distillation=True), divergences(self_distillation=True, ratios="1.0"))
    assert all(a < 0.7 * b for a, b in zip(taught, alone, strict=True)), (taught, alone)


def divergences(**knobs: Any) -> list[float]:
    task = task_of(**knobs)
    arrays: Arrays = {n: np.array(a) for n, a in job_of(task, 1.0).arrays.items()}
    data = client()
    for server_round in range(4):
        job = replace(job_of(task, 1.0, seed=server_round), arrays=arrays)
        update = local_update(job, task, data)
        assert update.trained is not None
        arrays = {n: update.trained.arrays[n] for n in arrays}
    network = task.network(arrays)
    whole = prefix_ratio(task.layout, 1.0)
    with torch.no_grad():
        teacher = network(data.train.inputs)
        entropy = soft_cross_entropy(teacher, teacher)
        inner = [InnerNetwork(task.factory, task.layout, whole, prefix_ratio(task.layout, p)) for p in P[1:]]
        return [float(soft_cross_entropy(width(network, data.train.inputs), teacher) - entropy) for width in inner]


# --- the mean ---------------------------------------------------------------------------------------------------


def one_axis(size: int) -> Layout:
    return Layout({"units": range(size)}, {"t": (np.arange(size),)}, {"t": (size,)})


def test_f1_the_mean_of_the_worked_example() -> None:
    layout, start = one_axis(5), {"t": np.full(5, 7, dtype=np.float32)}
    small, large = prefix_ratio(layout, 0.4), prefix_ratio(layout, 1.0)
    replies = [(small, np.full(2, 1 - 7), 10), (large, np.full(5, 3 - 7), 30)]
    both, one = Averager(layout, start), Averager(layout, start)
    for part, difference, examples in replies:
        both.add(part, difference.astype(np.float32), float(examples))
    one.add(*replies[0][:1], replies[0][1].astype(np.float32), 10.0)
    assert both.result()["t"].tolist() == [2.5, 2.5, 3, 3, 3]
    assert one.result()["t"].tolist() == [1, 1, 7, 7, 7]


def overwritten(layout: Layout, start: Arrays, replies: Sequence[tuple[float, Arrays, int]]) -> Arrays:
    """As published: for each width from large to small, its block becomes the mean over clients that reach it.

    Args:
        layout: the network's numbering.
        start: the global model.
        replies: (p_max, full-shaped arrays of which its block counts, number of examples).
    """
    new = {n: np.array(a, dtype=np.float64) for n, a in start.items()}
    for p in P:
        reach = [(arrays, num) for largest, arrays, num in replies if largest >= p]
        for n in new if reach else ():
            here = place(layout, prefix_ratio(layout, p), n)
            total = sum(num for _, num in reach)
            new[n][here] = sum(num / total * arrays[n][here].astype(np.float64) for arrays, num in reach)
    return new


@pytest.mark.parametrize("name", sorted(LAYOUTS))
@pytest.mark.parametrize("largest", [(1.0, 0.6, 0.6, 0.2), (0.8, 0.4, 0.2), (0.2, 0.2), (1.0,)])
def test_the_covered_mean_is_overwriting_from_large_to_small(name: str, largest: tuple[float, ...]) -> None:
    layout = LAYOUTS[name]()
    rng = np.random.default_rng(len(largest))
    start = random_arrays(layout, rng)
    replies = [(p, random_arrays(layout, rng), int(rng.integers(1, 50))) for p in largest]
    averager = Averager(layout, start)
    for p, arrays, num in replies:
        moved = {n: a - start[n] for n, a in arrays.items()}
        part = prefix_ratio(layout, p)
        averager.add(part, flatten(layout, part, extract(layout, part, moved)), float(num))
    result = averager.result()
    for n, expected in overwritten(layout, start, replies).items():
        np.testing.assert_allclose(result[n], expected, rtol=1e-5, atol=1e-5, err_msg=n)


# --- the server -------------------------------------------------------------------------------------------------


def server(devices: Mapping[int, Device], **knobs: Any) -> Any:
    values = {k.replace("_", "-"): v for k, v in knobs.items()}
    experiment = Experiment.read({**QUICK, "strategy": "fjord", **values})
    made: Any = STRATEGIES["fjord"](experiment, experiment.task(10, DIGITS), load_server(experiment.data))
    made.federation.devices = made.devices = dict(devices)
    return made


def test_all_widths_inside_the_largest_that_somebody_holds_are_reported() -> None:
    """Trained they are, too; the full network is always the last."""
    assert list(server({0: Device(0)}).levels()) == ["e", "d", "c", "b", "a"]
    assert list(server({0: Device(0, capacity=0.5), 1: Device(1, capacity=0.05)}).levels()) == ["e", "d", "c", "a"]
    dealt = {"fjord.assign": "dynamic"}
    assert list(server({0: Device(0)}, **dealt).levels()) == ["e", "d", "c", "b", "a"]
    made = server({0: Device(0)})
    for name, ratio in zip("abcde", P, strict=True):
        assert made.levels()[name] == prefix_ratio(made.task.layout, ratio)


@pytest.mark.parametrize("distillation", [True, False])
@pytest.mark.parametrize("ratio", [1.0, 0.6, 0.5, 0.2, 0.1])
def test_no_client_works_more_than_the_deadline_was_told(ratio: float, distillation: bool) -> None:
    made = server({0: Device(0)}, **{"fjord.self-distillation": distillation, "batch-size": 16})
    part = made.part_at(ratio, 1)
    whole, data = initial_arrays(made.task, "", 1), client()
    job = Job(part, extract(made.task.layout, part, whole), Device(0), {"ratio": ratio}, 3, 1)
    update = local_update(job, made.task, data)
    samples = len(data.train.labels) // 16 * 16
    bound = samples * (3 * made.task.macs(part) + made.macs_beside(part))
    assert 0 < update.metrics["macs"] <= bound
    inside = [made.task.macs(made.part_at(p, 1)) for p in P if p < ratio]
    assert made.macs_beside(part) == (3 * max(inside, default=0) if distillation else 0)


@pytest.mark.parametrize("ratio", [1.0, 0.6])
@pytest.mark.parametrize(
    ("model", "shape", "batch", "knobs"),
    [
        ("cnn", DIGITS, 16, {"momentum": 0.5}),  # activations weigh most
        ("heterofl-conv", (1, 28, 28), 4, {"momentum": 0.0}),  # weights do
        ("heterofl-resnet18", (3, 8, 8), 4, {"optimizer": "adam"}),
    ],
)
def test_memory_is_told_for_both_passes(
    model: str,
    shape: tuple[int, ...],
    batch: int,
    knobs: dict[str, Any],
    ratio: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against the profiler, where every batch draws the widest student: never less, and not much more."""
    widest = {1.0: 0.8, 0.6: 0.4}[ratio]
    monkeypatch.setattr(OrderedDropout, "draw", lambda self: widest)
    values = {"strategy": "fjord", "model": model, "batch-size": batch, "local-epochs": 1, **knobs}
    task = Experiment.read(values).task(10, shape)
    samples = Samples(torch.randn(3 * batch, *shape), torch.arange(3 * batch) % 10)
    part, job = prefix_ratio(task.layout, ratio), job_of(task, ratio)
    dropout, network = OrderedDropout(task, part, ratio, 0), task.network(job.arrays)
    peak = allocated_peak(  # narrow's tensors are numpy's, which torch does not see
        lambda: train_network(copy.deepcopy(network), job, task, samples, dropout.distilling_loss)
    )
    told = (task.memory_to_train(part) + memory_beside(task, part) - BUDGET_BYTES) / BUDGET_FACTOR
    assert 0.99 * peak - 60_000 <= told <= 1.35 * peak, told / peak


def test_the_server_counts_both_passes() -> None:
    made = server({0: Device(0)}, **{"batch-size": 16})
    assert memory_beside(made.task, made.levels()["a"]) > 0
    for part in made.levels().values():
        message = message_bytes(made.task.layout, part)
        training = made.task.memory_to_train(part) + memory_beside(made.task, part)
        assert made.budget.memory(part) == message + training


def test_without_a_student_nothing_is_beside() -> None:
    task = task_of()
    assert memory_beside(task, prefix_ratio(task.layout, 1.0)) > 0
    assert memory_beside(task, prefix_ratio(task.layout, 0.2)) == 0
    off = task_of(self_distillation=False)
    assert memory_beside(off, prefix_ratio(task.layout, 1.0)) == 0


def test_a_device_without_room_for_both_passes_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    for on, refuses in ((True, True), (False, False)):
        task = task_of(self_distillation=on)
        job = replace(job_of(task, 1.0), device=Device(0, memory_bytes=1e12, measure_memory=True))
        free = task.memory_to_train(job.submodel)
        monkeypatch.setattr(jobs, "free_memory", lambda free=free: free)
        if refuses:
            with pytest.raises(RuntimeError, match="out of memory: the part needs"):
                local_update(job, task, client())
        else:
            local_update(job, task, client())


def spied(folder: Path, values: Mapping[str, Any], kind: str, clients: int = 4) -> tuple[Path, list[Any]]:
    """A run, and every (request, reply, partition) of a kind."""
    found: list[Any] = []

    def listen(request: Message, reply: Message, partition: int) -> Message:
        if request.metadata.message_type == kind:
            found.append((request, reply, partition))
        return reply

    return run_toy(folder, "fjord", values, clients, alter=listen), found


def test_classifier_rows_are_everybodys(tmp_path: Path) -> None:
    """Clients send back all that they were sent, whichever labels they hold."""
    values = {"partition": "pathological", "classes-per-client": 2}
    run, jobs = spied(tmp_path, values, "train")
    layout = task_of().layout
    for request, reply, _ in jobs:
        sent = unpack(layout, dict(request.content.config_records["submodel"]))
        update = read_update(reply.content, layout, Assignment(sent, ""))
        assert update.submodel == sent
        rows = flatten(layout, sent, {n: np.full(a.shape, n == "classifier.bias") for n, a in zeros(sent).items()})
        assert (update.difference[rows == 1] != 0).all()
    assert len(jobs) == sum(len(line["cohort"]) for line in lines(run)) > 0


def zeros(part: Submodel) -> Arrays:
    layout = task_of().layout
    return extract(layout, part, {n: np.zeros(s, dtype=np.float32) for n, s in layout.shapes.items()})


def test_statistics_of_a_width_are_asked_of_clients_that_reach_it(tmp_path: Path) -> None:
    values = {"fjord.assign": "fix", "fjord.shares": "a1-c1-d1-e1"}
    run, asked = spied(tmp_path, values, "query.statistics")
    told = {partition: set(reply.content) for _, reply, partition in asked}
    assert told == {0: set("abcde"), 1: set("cde"), 2: set("de"), 3: set("e")}
    assert all(set(request.content["levels"]) == told[partition] for request, _, partition in asked)
    assert lines(run)[0]["trained"] == {"a": 1, "c": 1, "d": 1, "e": 1}


def few(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """So narrow that 1, 0.8 and 0.6 are all of its two channels, 0.4 and 0.2 one of them."""
    conv = nn.Conv2d(1, 2, 3, stride=2, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(1), nn.Linear(2 * 16, num_classes))


def checkpoint_of(run: Path) -> Checkpoint:
    found = load_checkpoint(run / "checkpoint")
    assert found is not None
    return found


def test_widths_that_round_to_the_same_have_statistics_of_their_own(tmp_path: Path) -> None:
    """Those of level b are of two clients more than those of level a, though the network is the same."""
    values = {"model": "test_fjord:few", "fjord.assign": "fix", "fjord.shares": "a1-b1-d1-e1", "partition": "dirichlet"}
    run = run_toy(tmp_path, "fjord", values)
    found = checkpoint_of(run)
    assert found.levels["a"] == found.levels["b"] == found.levels["c"] != found.levels["d"]
    means = {name: statistics["1"][0] for name, statistics in found.statistics.items() if statistics is not None}
    assert set(means) == set("abcde")
    assert not np.allclose(means["a"], means["b"], rtol=1e-6)
    assert not np.allclose(means["d"], means["e"], rtol=1e-6)
    assert np.array_equal(means["b"], means["c"])  # of the same two clients


def test_widths_that_round_to_the_largest_take_no_second_pass() -> None:
    task = task_of("test_fjord:few")
    data = client()
    update = local_update(job_of(task, 1.0), task, data)
    drawn = widths_drawn(task, 1.0, 2 * (len(data.train.labels) // 16), 5)
    narrower = sum(p < 0.6 for p in drawn)
    assert 0 < narrower < len(drawn)
    whole, half = (task.macs(prefix_ratio(task.layout, p)) for p in (1.0, 0.4))
    assert update.metrics["macs"] == 3 * 16 * (len(drawn) * whole + narrower * half)


def test_a_layer_that_runs_twice_is_one_width(tmp_path: Path) -> None:
    run = run_toy(tmp_path, "fjord", {"model": "test_inner:twice"})
    (line,) = lines(run)
    assert not line["failed"]
    assert not line["refused"]
    assert set(checkpoint_of(run).levels) == set("abcde")


def test_any_width_draws_from_itself_and_the_levels_below(tmp_path: Path) -> None:
    """Under a budget a client's largest width is a multiple of 1/64, and its job says which."""
    run, jobs = spied(tmp_path, {"ratio-policy": "budget", "num-server-rounds": 1}, "train")
    task = task_of()
    ratios = [float(request.content["config"]["method.ratio"]) for request, _, _ in jobs]
    assert any(ratio not in P for ratio in ratios)
    for ratio in ratios:
        assert ratio * 64 == int(ratio * 64)
        assert set(widths_drawn(task, ratio, 60, 1)) == {ratio, *(p for p in P if p < ratio)}
    assert not lines(run)[0]["failed"]


def test_distillation_is_more_work_and_another_model(tmp_path: Path) -> None:
    on, off = (run_toy(tmp_path / str(d), "fjord", {"fjord.self-distillation": d}) for d in (True, False))
    assert lines(on)[0]["macs"] > 1.2 * lines(off)[0]["macs"] > 0
    assert not same_bits(checkpoint_of(on).arrays, checkpoint_of(off).arrays)


def test_a_reply_weighs_its_examples() -> None:
    made = server({0: Device(0)})
    update = Update(prefix_ratio(made.task.layout, 1.0), np.zeros(1, dtype=np.float32), 30.0, {})
    assert made.weigh(update) == 30.0
