"""Models of the clients' own: what is tested is what was trained last, by everybody, and within what a device holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import Tensor, nn
from torch.nn import functional
from toy import (
    AVERAGING,
    DIGITS,
    QUICK,
    as_message,
    by_hand,
    failure,
    lines,
    place,
    random_arrays,
    random_units,
    run_toy,
    same_bits,
    toy_task,
    with_difference,
)

import client_app
from flexfed.checkpoint import Checkpoint, load_checkpoint, read_checkpoint
from flexfed.client_state import load_state
from flexfed.config import Experiment
from flexfed.cost import message_bytes, num_parameters
from flexfed.data import ClientData, load_client, load_server
from flexfed.devices import Device, load_fleet
from flexfed.flower.grid import InProcessGrid
from flexfed.flower.messages import evaluation_content, from_array
from flexfed.jobs import Part, Task, Update
from flexfed.narrowing import narrow
from flexfed.personal import evaluate_personal, model_state, stored_model
from flexfed.ratios import unpack_bandits
from flexfed.select import prefix_ratio
from flexfed.submodel import Submodel, extract, full, unflatten, unpack
from flexfed.training import Evaluation, Samples
from flexfed.units import Arrays, Layout
from strategies import STRATEGIES
from strategies.record import RoundRecord

METHODS = tuple(AVERAGING)
SMALL: dict[str, Any] = {
    "partition": "shards",
    "shard-size": 20,
    "test-per-label": 8,
    "batch-size": 8,
    "flexfl.scores": "0.4, 0.5, 0.6, 0.7",
    "fraction-evaluate": 0.0,
    "personal": "stored-local",
}
"""Clients of 36 training and about 16 test samples, in one batch each when they are tested."""
SWINGS = '[[class]]\nkind = "swings"\nshare = 1.0\ncapacity = 1.0\ncapacity-spread = 0.9\n'
Shown = tuple[int, float, int]
"""Right, sum of losses, samples."""


# --- what a run did, as its messages and files show it ----------------------------------------------------------------


@dataclass
class Job:
    """An answered job: what was sent, what came back."""

    server_round: int
    sent: Part
    reply: Submodel
    difference: np.ndarray
    counted: bool = True


@dataclass
class Answered:
    """An answered test of a client's own model; `part` is what it was sent, or what lay on its disk."""

    server_round: int
    partition: int
    part: Part
    sent: bool
    request: Message
    shown: Shown


@dataclass
class Spy:
    """Follows a run's messages; `spoil` may replace what a client answers."""

    root: Path
    task: Task
    spoil: Callable[[Message, Message, int], Message | None] = lambda request, reply, partition: reply
    trained: dict[int, list[Job]] = field(default_factory=dict)
    tested: list[Answered] = field(default_factory=list)

    def __call__(self, request: Message, reply: Message, partition: int) -> Message | None:
        kind = request.metadata.message_type
        answer = self.spoil(request, reply, partition)
        if kind == "train" and reply.has_content():
            self._job(request, reply, partition, answer is reply)
        elif kind == "evaluate" and request.content["config"].get("personal") and reply.has_content():
            self._test(request, reply, partition)
        return answer

    def _job(self, request: Message, reply: Message, partition: int, counted: bool) -> None:
        submodel = unpack(self.task.layout, reply.content["submodel"])  # type: ignore[arg-type]
        flat = from_array(reply.content.array_records["arrays"]["part"])
        job = Job(int(request.metadata.group_id), self._part(request), submodel, flat, counted)
        self.trained.setdefault(partition, []).append(job)

    def _part(self, message: Message) -> Part:
        submodel = unpack(self.task.layout, message.content["submodel"])  # type: ignore[arg-type]
        flat = from_array(message.content.array_records["arrays"]["part"])
        return Part(submodel, unflatten(self.task.layout, submodel, flat))

    def _test(self, request: Message, reply: Message, partition: int) -> None:
        sent = "arrays" in request.content
        if sent:
            part = self._part(request)
        else:
            (run,) = self.root.iterdir()
            folder = run / "clients" / f"{partition:06d}"
            part = stored_model(self.task, load_state(folder, int(request.content["config"]["private-round"])))  # type: ignore[arg-type]
        found: Any = reply.content["metrics"]
        shown = found["correct"], found["loss-sum"], found["num-samples"]
        self.tested.append(Answered(int(request.metadata.group_id), partition, part, sent, request, shown))

    def last(self, partition: int, before: int) -> Job:
        """The client's last counted job of a round up to `before`."""
        return [job for job in self.trained[partition] if job.server_round <= before and job.counted][-1]


def spied(folder: Path, strategy: str, values: Mapping[str, Any], clients: int = 5, **more: Any) -> tuple[Path, Spy]:
    spy = Spy(folder, task_of(strategy, **values), **more)
    given = {**SMALL, "seed": 3, "num-server-rounds": 2, "fraction-train": 0.4, **values}
    return run_toy(folder, strategy, given, clients, alter=spy), spy


def task_of(strategy: str, **values: Any) -> Task:
    return Experiment.read({**QUICK, **SMALL, "strategy": strategy, **values}).task(10, DIGITS)


def samples_of(tested: Answered) -> ClientData:
    """The client's samples, normalised as its request says, by plain arithmetic."""
    data = load_client(Experiment.read({**SMALL, "seed": 3}).data, tested.partition, 5)
    config: Any = tested.request.content["config"]
    (mean,), (std,) = config["input-mean"], config["input-std"]
    train, test = (Samples((s.inputs - mean) / std, s.labels) for s in (data.train, data.test))
    return replace(data, train=train, test=test)


def shown_by_hand(task: Task, part: Part, data: ClientData, static: bool = True) -> Shown:
    """A part on a client's test samples, in one batch: hooks and plain formulas, none of the library's own tests."""
    model = narrow(task.factory, part.arrays).train()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        if static:
            moments: dict[nn.Module, tuple[Tensor, Tensor]] = {}

            def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                moments[module] = inputs[0].mean((0, 2, 3)), inputs[0].var((0, 2, 3), correction=1)

            hooks = [norm.register_forward_pre_hook(note) for norm in norms]
            model(data.train.inputs)
            for hook in hooks:
                hook.remove()
            for norm in norms:
                norm.register_forward_hook(lambda m, x, _: normalised(m, x[0], *moments[m]))
        logits = model(data.test.inputs)
    loss = functional.cross_entropy(logits, data.test.labels, reduction="sum")
    return int((logits.argmax(1) == data.test.labels).sum()), float(loss), len(data.test.labels)


def normalised(norm: Any, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    def wide(vector: Tensor) -> Tensor:
        return vector[None, :, None, None]

    scaled = (x - wide(mean)) / torch.sqrt(wide(variance) + norm.eps)
    return scaled * wide(norm.weight) + wide(norm.bias)


def close(shown: Shown, expected: Shown) -> bool:
    same_loss = math.isclose(shown[1], expected[1], rel_tol=1e-4, abs_tol=1e-4)
    return shown[0] == expected[0] and shown[2] == expected[2] and same_loss


def by_indexing(task: Task, submodel: Submodel, arrays: Arrays) -> Arrays:
    """A part of the global model, cut by numpy's own indexing."""
    return {name: arrays[name][place(task.layout, submodel, name)] for name in task.layout.shapes}


def checkpoint_of(run: Path) -> Checkpoint:
    found = load_checkpoint(run / "checkpoint")
    assert found is not None
    return found


# --- stored-local: what each trained last -----------------------------------------------------------------------------

STORED: dict[str, tuple[str, dict[str, Any]]] = {
    "fedavg": ("fedavg", {}),
    "heterofl": ("heterofl", {}),
    "heterofl of any width": ("heterofl", {"ratio-policy": "p-ucbv"}),
    "fedrolex": ("fedrolex", {}),
    "flexfl": ("flexfl", {"fleet": "swings"}),
    "fedlps": ("fedlps", {}),
    "fedlps, untold": ("fedlps", {"fedlps.share-ranking": False}),
    "fedlps, masked": ("fedlps", {"fedlps.mask-update": "batch"}),
    "fedlps, biases left": ("fedlps", {"fedlps.mask-bias": False}),
    "no norms": ("fedlps", {"model": "test_personal:plain"}),
    "norms of the batch": ("heterofl", {"batch-norm": "batch"}),
}


def plain(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """A network without norms."""
    conv, fc = nn.Conv2d(input_shape[0], 6, 3, stride=2, padding=1), nn.Linear(6 * 16, 9)
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(1), fc, nn.ReLU(), nn.Linear(9, num_classes))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Spy]]:
    """Two rounds of five clients, two of which train in each."""

    @cache
    def get(case: str) -> tuple[Path, Spy]:
        folder = tmp_path_factory.mktemp("stored")
        strategy, values = STORED[case]
        if values.get("fleet") == "swings":
            values = {**values, "fleet": str(folder.with_suffix(".toml"))}
            folder.with_suffix(".toml").write_text(SWINGS)
        return spied(folder, strategy, values)

    return get


@pytest.mark.parametrize("case", STORED)
def test_what_a_client_reports_is_the_accuracy_of_the_part_it_trained_last(
    case: str, stored: Callable[[str], tuple[Path, Spy]]
) -> None:
    run, spy = stored(case)
    own = [tested for tested in spy.tested if not tested.sent]
    assert len(own) >= 4
    assert any(spy.last(t.partition, t.server_round).server_round < t.server_round for t in own), "it rests, and tests"
    for tested in own:
        data = samples_of(tested)
        expected = shown_by_hand(spy.task, tested.part, data, static=case != "norms of the batch")
        assert close(tested.shown, expected), (tested.partition, tested.shown, expected)
    assert not any(line["failed"] or line["refused"] for line in lines(run))


@pytest.mark.parametrize("case", [c for c in STORED if c not in ("fedlps, masked", "fedlps, biases left")])
def test_what_a_client_keeps_is_what_it_trained_last_and_whole(
    case: str, stored: Callable[[str], tuple[Path, Spy]]
) -> None:
    """Received plus difference, as far as the reply says it; the class outputs it left out are there."""
    _, spy = stored(case)
    layout, shrunk, cut_rows = spy.task.layout, 0, 0
    for tested in spy.tested:
        if tested.sent:
            continue
        job = spy.last(tested.partition, tested.server_round)
        assert tested.request.content["config"]["private-round"] == job.server_round
        kept = tested.part.submodel
        assert np.array_equal(kept.units, job.reply.units | layout.fixed_units)
        cut_rows += not np.array_equal(kept.units, job.reply.units)
        shrunk += not np.array_equal(kept.units, job.sent.submodel.units)
        inner = Submodel(job.reply.units)
        before = scattered(layout, job.sent)
        after = scattered(layout, tested.part)
        for name, moved in unflatten(layout, job.reply, job.difference).items():
            here = place(layout, inner, name)
            np.testing.assert_allclose(before[name][here] + moved, after[name][here], atol=1e-6)
    assert cut_rows > 0 or case not in ("heterofl", "heterofl of any width", "fedrolex")
    assert shrunk > 0 or case not in ("flexfl", "fedlps, untold")


def scattered(layout: Any, part: Part) -> Arrays:
    whole: Arrays = {name: np.zeros(shape, dtype=np.float32) for name, shape in layout.shapes.items()}
    for name, values in part.arrays.items():
        whole[name][place(layout, part.submodel, name)] = values
    return whole


@pytest.mark.parametrize("case", STORED)
def test_nothing_of_a_stored_model_travels(case: str, stored: Callable[[str], tuple[Path, Spy]]) -> None:
    run, spy = stored(case)
    for tested in spy.tested:
        if not tested.sent:
            assert list(tested.request.content) == ["config"]
            assert sum(record.count_bytes() for record in tested.request.content.values()) < 500
    if STORED[case][0] not in ("heterofl", "fedrolex"):  # their clients are asked for their norms' sums, too
        sent = sum(message_bytes(spy.task.layout, t.part.submodel) + 500 for t in spy.tested if t.sent)
        assert sum(line["bytes-evaluation"] for line in lines(run)) < sent + 600 * len(spy.tested)


@pytest.mark.parametrize("case", ["fedavg", "heterofl", "heterofl of any width", "fedrolex", "flexfl", "fedlps"])
def test_a_client_that_never_trained_tests_the_largest_part_its_device_can_train(
    case: str, stored: Callable[[str], tuple[Path, Spy]]
) -> None:
    run, spy = stored(case)
    found = checkpoint_of(run)
    fresh = [t for t in spy.tested if t.sent and t.server_round == 2]
    assert {t.partition for t in fresh} == set(range(5)) - set(spy.trained)
    assert any(t.partition < 4 for t in fresh), "one that cannot hold everything"
    for tested in fresh:
        assert same_bits(tested.part.arrays, by_indexing(spy.task, tested.part.submodel, found.arrays))
        assert close(tested.shown, shown_by_hand(spy.task, tested.part, samples_of(tested)))
        capacity = 1.0 if case == "flexfl" else load_fleet("skewed").device(tested.partition, 5, 1).capacity
        expected = largest_by_hand(case, spy.task.layout, capacity)
        assert widths(spy.task.layout, tested.part.submodel) == widths(spy.task.layout, expected)
        assert case == "fedrolex" or tested.part.submodel == expected


def largest_by_hand(case: str, layout: Layout, capacity: float) -> Submodel:
    """By trying every ratio of the method."""
    steps = case in ("heterofl of any width", "fedlps")
    ratios = [k / 64 for k in range(64, 0, -1)] if steps else [1.0, 0.5, 0.25, 0.125, 0.0625]
    parts = [prefix_ratio(layout, ratio, "floor" if case == "fedlps" else "ceil") for ratio in ratios]
    capacity = math.inf if case == "fedavg" else capacity
    whole = num_parameters(layout, full(layout))
    return next(part for part in parts if num_parameters(layout, part) <= capacity * whole)


def widths(layout: Layout, submodel: Submodel) -> dict[str, int]:
    return {group: int(submodel.units[span.start : span.stop].sum()) for group, span in layout.groups.items()}


def test_every_client_counts_once_and_groups_are_the_kinds(stored: Callable[[str], tuple[Path, Spy]]) -> None:
    run, spy = stored("fedlps")
    kinds = {0: "weak", 1: "weak", 2: "weak", 3: "medium", 4: "strong"}
    for line in lines(run):
        shown = {t.partition: t.shown[0] / t.shown[2] for t in spy.tested if t.server_round == line["round"]}
        assert sorted(shown) == [0, 1, 2, 3, 4]
        assert line["clients-personal"] == 5
        assert line["accuracy-personal"] == pytest.approx(np.mean(list(shown.values())))
        assert line["accuracy-personal-worst-tenth"] == pytest.approx(min(shown.values()))
        for kind in ("weak", "medium", "strong"):
            mean = np.mean([accuracy for p, accuracy in shown.items() if kinds[p] == kind])
            assert line[f"accuracy-personal-{kind}"] == pytest.approx(mean)


def test_what_tests_cost_is_counted(stored: Callable[[str], tuple[Path, Spy]]) -> None:
    """Test samples, and the training samples that the norms' statistics come from, if there are any."""
    for case, statistics in (("fedlps", 36), ("fedlps, biases left", 36), ("no norms", 0), ("norms of the batch", 0)):
        run, spy = stored(case)
        for line in lines(run):
            now = [t for t in spy.tested if t.server_round == line["round"]]
            macs = [(t.shown[2] + statistics) * spy.task.macs(t.part.submodel) for t in now]
            assert line["macs-evaluation"] == sum(macs), case
            assert line["modelled-seconds"] > line["modelled-seconds-training"] > 0


# --- global-masked, none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fedlps", "heterofl"])
def test_global_masked_tests_the_same_units_of_the_new_global_model(strategy: str, tmp_path: Path) -> None:
    run, spy = spied(tmp_path, strategy, {"personal": "global-masked", "ratio-policy": "p-ucbv"})
    found = checkpoint_of(run)
    last = {t.partition: t for t in spy.tested if t.server_round == 2}
    assert sorted(last) == [0, 1, 2, 3, 4]
    own = 0
    for partition, tested in last.items():
        assert tested.sent
        if partition in spy.trained:
            kept = spy.last(partition, 2).reply.units | spy.task.layout.fixed_units
            assert np.array_equal(tested.part.submodel.units, kept)
            own += 1
        assert same_bits(tested.part.arrays, by_indexing(spy.task, tested.part.submodel, found.arrays))
        assert close(tested.shown, shown_by_hand(spy.task, tested.part, samples_of(tested)))
    assert own >= 2
    assert not list(run.rglob("clients/*/*")) or strategy == "fedlps", "nobody need keep what it trained"


def test_none_asks_nobody_and_keeps_nothing(tmp_path: Path) -> None:
    for strategy in ("fedlps", "heterofl"):
        run, spy = spied(tmp_path / strategy, strategy, {"personal": "none"})
        assert spy.trained
        assert not spy.tested
        assert not any("personal" in key for line in lines(run) for key in line)
        assert not any("personal" in key for key in checkpoint_of(run).state)
        states = [load_state(path.parent, int(path.stem[-8:])) for path in run.rglob("clients/*/*")]
        assert bool(states) == (strategy == "fedlps")
        assert not any(key.startswith("model/") for state in states for key in state)


# --- law 11, and everybody is in the mean -----------------------------------------------------------------------------


@cache
def task_for(strategy: str, batch_size: int = 8) -> Task:
    return task_of(strategy, **{"batch-size": batch_size})


def server(strategy: str, devices: Mapping[int, Device], batch_size: int = 8, **values: Any) -> Any:
    """A server that knows its devices and has a model, and no grid."""
    InProcessGrid(client_app.app, 1)  # Flower's messages want to know their task
    given = {**QUICK, **SMALL, "batch-size": batch_size, "strategy": strategy, "autoflip.score": "random"}
    experiment = Experiment.read({**given, **{k.replace("_", "-"): v for k, v in values.items()}})
    task = replace(task_for(strategy, batch_size), method=experiment.method)
    made = STRATEGIES[strategy](experiment, task, load_server(experiment.data))
    made.federation.devices, made.federation.nodes = dict(devices), {p: 100 + p for p in devices}
    made.begin(random_arrays(task.layout, np.random.default_rng(0)), InProcessGrid(client_app.app, 1))
    return made


def ask(strategy: Any, server_round: int) -> dict[int, Submodel | None]:
    """Who is asked to test which part; None = the one it keeps."""
    strategy.devices = {
        p: d.in_round(server_round, strategy.settings.seed) for p, d in strategy.federation.devices.items()
    }
    partitions = {node: p for p, node in strategy.federation.nodes.items()}
    asked: dict[int, Submodel | None] = {}
    for message in strategy.tests.messages(server_round, dict.fromkeys(strategy.levels())):
        config: Any = message.content["config"]
        assert config["personal"] is True
        sent = "arrays" in message.content
        partition = partitions[message.metadata.dst_node_id]
        assert partition not in asked
        asked[partition] = unpack(strategy.task.layout, message.content["submodel"]) if sent else None
    return asked


def reply_of(submodel: Submodel) -> Update:
    return Update(submodel, np.zeros(0, dtype=np.float32), 1.0, {"train-accuracy": 0.5, "macs": 1.0})


def exceeds(strategy: Any, device: Device, part: Submodel) -> list[str]:
    """What testing a part asks for beyond a device, by plain formulas."""
    layout = strategy.task.layout
    numbers, found = num_parameters(layout, part), []
    if numbers / num_parameters(layout, full(layout)) > device.capacity + 1e-9:
        found.append("capacity")
    for group, span in layout.groups.items():
        most = max(1, math.ceil(min(device.width, 1.0) * len(span) - 1e-9))
        if group not in layout.fixed and part.units[span.start : span.stop].sum() > most:
            found.append("width")
            break
    if strategy.task.memory_to_test(part) + 4 * numbers > device.memory_bytes:
        found.append("memory")
    return found


def allowed(strategy: Any, device: Device, part: Submodel, over: list[str]) -> bool:
    """The level policy's own measures: the smallest level for everybody, FlexFL's targets, FedAvg's indifference.

    Masked networks are as large as any; of DepthFL's parts a device's `width` says nothing.
    """
    name, layout, policy = strategy.settings.strategy, strategy.task.layout, strategy.settings.ratio_policy
    if name == "depthfl":
        smallest = policy == "level" and part == strategy.part_of(Device(0, capacity=1e-9), 1).submodel
        return over == ["width"] or (smallest and "memory" not in over)
    if "memory" in over or policy != "level":
        return name in ("fedavg", "autoflip", "fiarse") and "memory" not in over
    if name in ("heterofl", "fedrolex", "fjord"):
        return widths(layout, part) == widths(layout, prefix_ratio(layout, strategy.task.method.ratios[-1]))
    if name == "scalefl":
        return part == strategy.parts[-1]
    if name == "flexfl":
        (level,) = [i for i, pool in enumerate(strategy.levels().values()) if pool == part]
        return level == 0 or bool(strategy.task.method.level_targets[level] <= device.capacity + 1e-9)
    return name in ("fedavg", "autoflip", "fiarse", "small")


PRODUCT = [
    (s, p)
    for s in METHODS
    for p in ("level", "budget", *(("p-ucbv",) if s in ("fedlps", "fedrolex", "fjord", "flexfl", "heterofl") else ()))
]


def devices_of(fleet: str) -> dict[int, Device]:
    devices = {p: replace(load_fleet(fleet).device(p, 10, 1), num_examples=36) for p in range(10)}
    if fleet == "fedlps":
        devices[9] = Device(9, kind="still", width=0.25, num_examples=36)
    return devices


@pytest.mark.parametrize("fleet", ["fedlps", "skewed"])
@pytest.mark.parametrize(("strategy", "policy"), PRODUCT)
def test_law_11_no_test_asks_for_more_than_the_device_has_in_that_round(strategy: str, policy: str, fleet: str) -> None:
    devices = devices_of(fleet)
    chosen = server(strategy, devices, personal="stored-local", ratio_policy=policy, fraction_train=0.4)
    layout, rng = chosen.task.layout, np.random.default_rng(2)
    kept: dict[int, Submodel] = {}
    fallbacks = own = 0
    for server_round in range(1, 9):
        chosen.devices = now = {p: d.in_round(server_round, 1) for p, d in devices.items()}
        for partition, assignment in chosen.assign(server_round, now, rng).items():
            kept[partition] = assignment.submodel
            chosen.tests.keep(partition, reply_of(assignment.submodel))
        asked = ask(chosen, server_round)
        assert sorted(asked) == [p for p in now if chosen.can_train(now[p])], "everybody that can train tests"
        for partition, sent in asked.items():
            part = kept[partition] if sent is None else sent
            over = exceeds(chosen, now[partition], part)
            assert not over or allowed(chosen, now[partition], part, over), (now[partition], over)
            own += sent is None
            if sent is not None and partition in kept:
                assert num_parameters(layout, kept[partition]) > num_parameters(layout, sent)
                fallbacks += 1
    assert own > 0 or strategy == "exclusive"
    never = strategy in ("exclusive", "fedavg", "autoflip", "fiarse", "small") or (strategy, policy) == (
        "scalefl",
        "budget",
    )
    assert fallbacks > 0 or fleet == "skewed" or never  # ScaleFL's devices hold no other level, or none at all


@pytest.mark.parametrize("mode", ["stored-local", "global-masked"])
@pytest.mark.parametrize(
    ("strategy", "policy"), [("fedlps", "p-ucbv"), ("heterofl", "level"), ("flexfl", "budget"), ("small", "level")]
)
def test_memory_to_test_binds_too(strategy: str, policy: str, mode: str) -> None:
    """Batches of 128 need more than training in batches of 2 does."""
    task = task_for(strategy, 2)
    parts = [prefix_ratio(task.layout, r) for r in (0.25, 0.5, 0.75, 1.0)]
    needs = [task.memory_to_test(part) + 5 * num_parameters(task.layout, part) + 8000 for part in parts]
    assert task.memory_to_train(parts[-1]) + 5 * 57_706 < needs[1]
    devices = {p: Device(p, memory_bytes=float(need), num_examples=36) for p, need in enumerate(needs)}
    chosen = server(strategy, devices, 2, personal=mode, ratio_policy=policy)
    fresh = ask(chosen, 1)
    assert 3 in fresh
    for partition, part in fresh.items():
        assert part is not None
        assert not exceeds(chosen, devices[partition], part)
    for partition in devices:
        chosen.tests.keep(partition, reply_of(parts[1]))
    later = ask(chosen, 2)
    assert {1, 2, 3} <= set(later), "what each keeps is small enough for its memory, whatever else it could train"
    if mode == "stored-local":
        assert [later[p] for p in (1, 2, 3)] == [None] * 3
    else:
        assert [later[p] for p in (1, 2, 3)] == [parts[1]] * 3
    assert 0 not in later or later[0] is not None


def test_a_device_that_can_train_nothing_tests_nothing_and_is_not_counted(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.toml"
    rows = [("tiny", 1e6), ("large", 1e9)]
    fleet.write_text("".join(f'[[class]]\nkind = "{k}"\nshare = 0.5\nmemory-bytes = {m}\n' for k, m in rows))
    run, spy = spied(tmp_path / "runs", "heterofl", {"fleet": str(fleet), "num-server-rounds": 1}, clients=4)
    assert sorted(t.partition for t in spy.tested) == [2, 3]
    (line,) = lines(run)
    assert line["clients-personal"] == 2
    assert {key for key in line if key.startswith("accuracy-personal")} == {
        "accuracy-personal",
        "accuracy-personal-worst-tenth",
        "accuracy-personal-large",
    }
    assert not line["failed"]


def test_capabilities_of_a_fleet_that_swings_are_those_of_the_round(tmp_path: Path) -> None:
    run, spy = spied(tmp_path, "heterofl", {"fleet": "fedlps", "ratio-policy": "p-ucbv"}, clients=6)
    fleet = load_fleet("fedlps")
    for line in lines(run):
        by_group: dict[str, list[float]] = {}
        for tested in spy.tested:
            if tested.server_round == line["round"]:
                power = fleet.device(tested.partition, 6, 3).in_round(line["round"], 3).capacity
                by_group.setdefault(str(power).removesuffix(".0"), []).append(tested.shown[0] / tested.shown[2])
        told = {key.removeprefix("accuracy-personal-"): value for key, value in line.items() if key.startswith("acc")}
        groups = {k: v for k, v in told.items() if k[0] in "01"}
        assert len(by_group) > 1
        assert groups == {group: pytest.approx(np.mean(found)) for group, found in by_group.items()}
        assert line["clients-personal"] == 6


def test_the_worst_tenth_and_clients_without_samples() -> None:
    record = RoundRecord(1)
    rights = [5, 9, 1, 8, 7, 3] + [10] * 17
    record.personal = [("a" if i < 3 else "b", Evaluation(right, 1.0, 10)) for i, right in enumerate(rights)]
    record.personal += [("c", Evaluation(0, 0.0, 0))]
    line = record.line()
    assert line["clients-personal"] == 23
    assert line["accuracy-personal"] == pytest.approx(np.mean(rights) / 10)
    assert line["accuracy-personal-worst-tenth"] == pytest.approx((0.1 + 0.3) / 2)
    assert line["accuracy-personal-a"] == pytest.approx(0.5)
    assert "accuracy-personal-c" not in line
    assert "accuracy-clients" not in line
    assert not any("personal" in key for key in RoundRecord(1).line())


# --- replies that never counted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["failed", "refused"])
def test_a_reply_that_never_counted_leaves_model_and_bandit_of_the_last_accepted_round(
    kind: str, tmp_path: Path
) -> None:
    """The client has trained again and has written a newer model; what is tested is the older one."""

    def spoil(request: Message, reply: Message, partition: int) -> Message:
        if request.metadata.message_type != "train" or (request.metadata.group_id, partition) != ("2", 1):
            return reply
        if kind == "failed":
            return failure(request)
        return Message(with_difference(reply, lambda flat: flat * np.nan).content, reply_to=request)

    values = {"fraction-train": 1.0, "fleet": "equal"}
    run, spy = spied(tmp_path, "fedlps", values, clients=3, spoil=spoil)
    (tested,) = [t for t in spy.tested if t.partition == 1 and t.server_round == 2]
    assert tested.request.content["config"]["private-round"] == 1
    first = next(t for t in spy.tested if t.partition == 1 and t.server_round == 1)
    assert same_bits(tested.part.arrays, first.part.arrays)
    assert tested.shown == first.shown
    newer = stored_model(spy.task, load_state(run / "clients" / "000001", 2))
    assert not same_bits(newer.arrays, first.part.arrays)
    states = [read_checkpoint(run / "checkpoint" / f"round-{k:08d}.safetensors").state for k in (1, 2)]
    bandits = [unpack_bandits("p-ucbv", Experiment.read({}).bandit, 2.0, dict(state)) for state in states]
    for partition in range(3):
        before, after = (found[partition].state() for found in bandits)
        assert same_bits(before, after) == (partition == 1)
    places = [dict(zip(s["ranking/partitions"].tolist(), s["ranking/orders"], strict=True)) for s in states]
    assert np.array_equal(places[0][1], places[1][1])
    kept = [dict(zip(s["personal/partitions"].tolist(), s["personal/units"], strict=True)) for s in states]
    assert np.array_equal(kept[0][1], kept[1][1])


def test_a_model_that_is_gone_fails_its_test_and_nothing_else(tmp_path: Path) -> None:
    def lose(request: Message, reply: Message, partition: int) -> Message:
        if request.metadata.message_type == "train" and partition == 1:
            for path in tmp_path.rglob("clients/000001/*"):
                path.unlink()
        return reply

    values = {**SMALL, "num-server-rounds": 1}
    run = run_toy(tmp_path, "heterofl", values, clients=3, alter=lose)
    (line,) = lines(run)
    assert [found["partition"] for found in line["failed"]] == [1]
    assert "the private state of round 1 is missing: expected" in line["failed"][0]["reason"]
    assert line["clients-personal"] == 2
    assert not line["refused"]


@pytest.mark.parametrize("change", [{"correct": 99}, {"personal": 0}, {"loss-sum": float("nan")}])
def test_an_impossible_test_is_left_out_and_told(change: dict[str, Any], tmp_path: Path) -> None:
    def lie(request: Message, reply: Message, partition: int) -> Message:
        if request.metadata.message_type == "evaluate" and partition == 1:
            found: Any = reply.content["metrics"]
            found.update(change)
        return reply

    values = {**SMALL, "num-server-rounds": 1, "batch-norm": "batch"}
    run = run_toy(tmp_path, "fedavg", values, clients=3, alter=lie)
    (line,) = lines(run)
    assert [found["partition"] for found in line["failed"]] == [1]
    assert line["clients-personal"] == 2


def test_a_test_counts_once_and_only_where_it_was_asked_for() -> None:
    devices = {0: Device(0, num_examples=36), 1: Device(1, memory_bytes=1e6, num_examples=36)}
    chosen = server("heterofl", devices, personal="stored-local")
    assert list(ask(chosen, 1)) == [0]
    reply = as_message(evaluation_content(Evaluation(3, 1.0, 4), True))
    chosen.tests.read(0, reply)
    for partition in (0, 1, -1):
        with pytest.raises(ValueError, match="it was not asked to test that"):
            chosen.tests.read(partition, reply)
    assert chosen.record.line()["clients-personal"] == 1
    assert chosen.record.line()["accuracy-personal"] == 0.75
    ask(chosen, 2)
    chosen.tests.read(0, reply)


# --- the pieces -------------------------------------------------------------------------------------------------------


def test_a_model_comes_back_from_the_private_state_whatever_its_units() -> None:
    layout = by_hand()
    task = replace(toy_task(), layout=layout)
    rng = np.random.default_rng(3)
    arrays = random_arrays(layout, rng)
    for _ in range(5):
        kept = Submodel(random_units(layout, rng))
        state = model_state(task, Part(kept, extract(layout, kept, arrays)))
        assert set(state) == {"model/units", "model/part"}
        back = stored_model(task, {**state, "scores/values": np.zeros(3)})
        assert back.submodel == kept
        assert same_bits(back.arrays, {n: np.ascontiguousarray(a) for n, a in extract(layout, kept, arrays).items()})
    with pytest.raises(ValueError, match="keeps no model of its own: it has trained none in this run"):
        stored_model(task, {"scores/values": np.zeros(3)})


def test_statistics_are_those_of_the_training_samples_or_of_the_test_batch() -> None:
    task = toy_task()
    rng = np.random.default_rng(4)
    whole = full(task.layout)
    arrays = random_arrays(task.layout, np.random.default_rng(0))
    part = Part(whole, extract(task.layout, whole, arrays))

    def samples(num: int, shift: float) -> Samples:
        inputs = torch.tensor(rng.standard_normal((num, *DIGITS)) + shift, dtype=torch.float32)
        return Samples(inputs, torch.tensor(rng.integers(0, 10, num)))

    data: Any = ClientData(samples(50, 0.0), samples(3, 9.0), samples(40, 2.0), (), None)  # type: ignore[arg-type]
    shown = {}
    for mode in ("static", "batch"):
        found = evaluate_personal(task, part, data, mode)
        shown[mode] = found.correct, found.loss_sum, found.num_samples
        assert close(shown[mode], shown_by_hand(task, part, data, mode == "static"))
    assert not close(shown["static"], shown["batch"])


def test_what_clients_keep_comes_back_from_the_checkpoint() -> None:
    rng = np.random.default_rng(5)
    devices = {p: Device(p, num_examples=36) for p in range(12)}
    chosen = server("heterofl", devices, personal="global-masked")
    layout = chosen.task.layout
    assert chosen.tests.state_dict() == {}
    kept = {p: Submodel(random_units(layout, rng)) for p in (11, 2, 7)}
    for partition, submodel in kept.items():
        chosen.tests.keep(partition, reply_of(submodel))
    state = chosen.tests.state_dict()
    assert all(isinstance(value, np.ndarray) for value in state.values())
    again = server("heterofl", devices, personal="global-masked")
    again.tests.load_state_dict(state)
    asked = ask(again, 3)
    assert {p: asked[p] for p in kept} == kept
    assert all(asked[p] == full(layout) for p in set(devices) - set(kept))


def test_class_outputs_that_a_reply_left_out_are_part_of_the_model() -> None:
    chosen = server("heterofl", {0: Device(0, num_examples=36)}, personal="global-masked")
    layout = chosen.task.layout
    units = prefix_ratio(layout, 0.5).units.copy()
    units[np.flatnonzero(layout.fixed_units)[2:]] = False
    chosen.tests.keep(0, reply_of(Submodel(units)))
    assert ask(chosen, 1) == {0: prefix_ratio(layout, 0.5)}
