"""FedLPS's client: masked and narrow training, what travels, what scores learn; and whole runs of four clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message
from test_fedlps import TIES
from torch import Tensor, nn
from torch.func import functional_call
from toy import (
    Decoder,
    Ties,
    failure,
    final_model,
    initial_model,
    lines,
    random_arrays,
    run_toy,
    same_bits,
    scatter,
    toy_task,
)

from flexfed.averaging import Averager
from flexfed.client_state import load_state
from flexfed.data import ClientData
from flexfed.devices import Device
from flexfed.jobs import Job, Task, Trained, train_network
from flexfed.methods import fedlps
from flexfed.methods.fedlps import FedLPSConfig, local_update
from flexfed.methods.fedlps_masked import MaskedNetwork
from flexfed.methods.fedlps_scores import ScoreLearner, Scores, kept_scores
from flexfed.models.fedlps import fedlps_cnn
from flexfed.select import prefix_ratio, top
from flexfed.submodel import Submodel, extract, full, unflatten, unpack
from flexfed.training import Samples, Training
from flexfed.units import Arrays, Layout, trace_layout
from strategies.fedavg import FedAvg


class Vgg(nn.Module):
    """Two convolutions with batch norm, a hidden linear layer; (2, 8, 8) in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.fc, self.classifier = nn.Linear(12 * 4, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.norm1(self.conv1(x)).relu(), 2)
        x = nn.functional.max_pool2d(self.norm2(self.conv2(x)).relu(), 2)
        return self.classifier(self.fc(x.flatten(1)).relu())


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ties": (Ties, (1, 4, 4)),
    "vgg": (Vgg, (2, 8, 8)),
    "fedlps-cnn": (partial(fedlps_cnn, 10, (1, 28, 28)), (1, 28, 28)),
}
networks = pytest.mark.parametrize("network", list(NETWORKS))
HARD = Training(learning_rate=0.05, momentum=0.9, weight_decay=0.02, local_epochs=2, batch_size=8)


@cache
def traced(network: str) -> Layout:
    return trace_layout(*NETWORKS[network])


class Bench(NamedTuple):
    """A client, and the global model before its job."""

    task: Task
    arrays: Arrays
    data: ClientData

    def job(self, ratio: float, state: Arrays | None = None, submodel: Submodel | None = None, **values: Any) -> Job:
        part = submodel or full(self.task.layout)
        arrays = extract(self.task.layout, part, self.arrays)
        job = Job(part, arrays, Device(0), {"ratio": ratio}, 5, 1, state or {})
        return replace(job, **values)


def bench(network: str, training: Training = HARD, num: int = 32, labels: int = 3, **knobs: Any) -> Bench:
    factory, shape = NETWORKS[network]
    layout, rng = traced(network), np.random.default_rng(1)
    arrays = {n: np.asarray(0.3 * a, dtype=np.float32) for n, a in random_arrays(layout, rng).items()}
    inputs = torch.from_numpy(rng.standard_normal((num, *shape), dtype=np.float32))
    samples = Samples(inputs, torch.from_numpy(rng.integers(0, labels, num)))
    data = ClientData(samples, samples, samples, (0, 1, 2), None)  # type: ignore[arg-type]
    return Bench(Task(factory, layout, shape, 10, training, FedLPSConfig(**knobs)), arrays, data)


def shuffled_scores(layout: Layout, seed: int = 2) -> Scores:
    """Scores whose mask is no prefix."""
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal(layout.num_units, dtype=np.float32))
    return Scores(values, *[torch.zeros(layout.num_units) for _ in range(3)])


def best(layout: Layout, scores: Scores, ratio: float) -> Submodel:
    return top(layout, scores.values.numpy(), ratio, "floor")


class Spied(MaskedNetwork):
    """Remembers the mask of every batch, and the last network made."""

    last: Spied

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.masks: list[np.ndarray] = []
        self.remembered = 0.0  # what the optimiser remembers of masked rows
        Spied.last = self

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.masks.append(self.units.copy())
        super().step(optimizer)
        for name, parameter in self.model.named_parameters():
            hidden = torch.from_numpy(rows_of(self._task.layout, name, ~self.units))
            kinds = [m for m in optimizer.state[parameter].values() if m.shape == parameter.shape]
            if parameter.ndim > 1 or self._task.method.mask_bias:
                self.remembered += sum(float(m[hidden].abs().sum()) for m in kinds)


def train_masked(b: Bench, scores: Scores, ratio: float) -> tuple[Spied, Trained, ScoreLearner]:
    learner = ScoreLearner(scores, b.task, b.task.training.rate_at(1))
    network = Spied(b.task, b.arrays, learner, ratio)
    trained = train_network(network.model, b.job(ratio), b.task, b.data.train, network.loss, network.step)
    return network, trained, learner


# --- one local step, 6.2, through a whole job -----------------------------------------------------------------------

WEIGHT = np.asarray([[0.2, -0.4], [0.1, 0.1], [-0.3, 0.5], [0.05, 0]], dtype=np.float32)
GRADIENT = torch.tensor([[0.1, -0.2], [0.3, 0.3], [0.5, -0.1], [0.2, 0.2]])
ROWS = Layout({"fc": range(4)}, {"fc.weight": (np.arange(4), None)}, {"fc.weight": (4, 2)})


class Row(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@pytest.mark.parametrize("mask_update", ["round", "batch"])
def test_one_local_step(mask_update: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is the sum of logits times numbers, so that its gradient is the one of the example."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        kept = [0, 2] if logits.shape[1] == 2 else [0, 1, 2, 3]
        return (logits * GRADIENT.T[labels][:, kept]).sum()

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", loss)
    samples = Samples(torch.eye(2), torch.arange(2))
    data = ClientData(samples, samples, samples, (0, 1), None)  # type: ignore[arg-type]
    training = Training(0.1, momentum=0.0, weight_decay=0.0, local_epochs=1, batch_size=2)
    config = FedLPSConfig(mask_update=mask_update, score_optimizer="shared-sgd")
    b = Bench(Task(Row, ROWS, (2,), 4, training, config), {"fc.weight": WEIGHT}, data)
    scores = Scores(torch.tensor([0.3, -0.1, 0.8, 0.2]), *[torch.zeros(4) for _ in range(3)])
    kept = Submodel(np.asarray([True, False, True, False]))
    monkeypatch.setattr(Task, "macs", lambda *_: 0)
    monkeypatch.setattr(fedlps, "MaskedNetwork", Spied)
    update = local_update(b.job(0.5, scores.arrays(), kept if mask_update == "round" else None), b.task, data)
    after = WEIGHT + scatter(ROWS, update.submodel, unflatten(ROWS, update.submodel, update.difference))["fc.weight"]
    assert np.allclose(after, [[0.19, -0.38], [0.1, 0.1], [-0.35, 0.51], [0.05, 0]], atol=1e-6)
    assert update.state["scores/values"].tolist() == pytest.approx([0.314838, -0.1, 0.798777, 0.2], abs=1e-6)
    assert best(ROWS, kept_scores(update.state), 0.5) == kept
    if mask_update == "batch":
        assert Spied.last.model.state_dict()["fc.weight"].numpy()[[1, 3]].tolist() == WEIGHT[[1, 3]].tolist()


# --- I2, I3: what moves and what travels ------------------------------------------------------------------------------


def rows_of(layout: Layout, name: str, units: np.ndarray) -> np.ndarray:
    """Positions of a tensor's first axis that belong to units, and to no output of the network."""
    axis = layout.axes[name][0]
    return np.zeros(layout.shapes[name][0], dtype=bool) if axis is None else units[axis] & ~layout.fixed_units[axis]


@pytest.mark.parametrize("mask_bias", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("frozen", [True, False])
def test_units_masked_in_every_batch_keep_their_bits(
    frozen: bool, optimizer: str, mask_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if frozen:
        monkeypatch.setattr(ScoreLearner, "learn", lambda *_: None)
    training = replace(HARD, optimizer=optimizer)
    b = bench("vgg", training, mask_update="batch", mask_bias=mask_bias, score_learning_rate=0.3, prox=0.1)
    layout = b.task.layout
    network, trained, _ = train_masked(b, shuffled_scores(layout), 0.5)
    assert len({mask.tobytes() for mask in network.masks}) == 1 if frozen else len(network.masks) > 1
    never, always = ~np.any(network.masks, axis=0), np.all(network.masks, axis=0)
    assert never.any()
    assert network.remembered == 0
    for name in layout.shapes:
        before, after = b.arrays[name], trained.arrays[name]
        if mask_bias or before.ndim > 1:
            still, moved = rows_of(layout, name, never), rows_of(layout, name, always)
            assert after[still].tobytes() == before[still].tobytes()
            assert (after[moved] != before[moved]).any() or not moved.any() or name in ("conv1.bias", "conv2.bias")
    dense = "fc.bias", "norm1.weight", "norm2.bias"
    assert mask_bias or not any((trained.arrays[n] == b.arrays[n])[rows_of(layout, n, never)].all() for n in dense[1:])


@pytest.mark.parametrize("mask_bias", [True, False])
def test_only_rows_of_the_last_mask_travel_though_others_were_trained(
    mask_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedlps, "MaskedNetwork", Spied)
    b = bench("vgg", mask_update="batch", mask_bias=mask_bias, score_learning_rate=0.5)
    layout = b.task.layout
    high = shuffled_scores(layout)  # so high that the regulariser pulls the active ones below the others
    update = local_update(b.job(0.5, replace(high, values=3 + 0.1 * high.values).arrays()), b.task, b.data)
    masks, local = Spied.last.masks, Spied.last.model.state_dict()
    assert np.array_equal(update.submodel.units, masks[-1])
    dropped = np.any(masks[:-1], axis=0) & ~masks[-1]
    trained = [n for n, a in b.arrays.items() if a.ndim > 1 and rows_of(layout, n, dropped).any()]
    assert trained  # else this test sees nothing
    averager = Averager(layout, b.arrays, "total")
    averager.add(update.submodel, update.difference)
    for name, after in averager.result().items():
        row = rows_of(layout, name, ~masks[-1])
        still = row if mask_bias or after.ndim > 1 else np.zeros_like(row)
        expected = local[name].numpy().copy()
        if name in trained:
            hidden = rows_of(layout, name, dropped)
            assert (expected[hidden] != b.arrays[name][hidden]).any()
        expected[still] = b.arrays[name][still]
        assert np.allclose(after, expected, atol=1e-6)
        assert after[still].tobytes() == b.arrays[name][still].tobytes()


@pytest.mark.parametrize("mask_bias", [True, False])
def test_a_masked_clients_own_model_is_what_its_last_mask_leaves(
    mask_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedlps, "MaskedNetwork", Spied)
    b = bench("vgg", mask_update="batch", mask_bias=mask_bias)
    own = local_update(b.job(0.5, shuffled_scores(b.task.layout).arrays()), b.task, b.data).trained
    assert own is not None
    logits: list[Tensor] = []
    network = Spied.last
    network._task = replace(b.task, method=replace(b.task.method, mask_update="round"))  # the last mask stays
    network.model.register_forward_hook(lambda _, __, output: logits.append(output.detach()))
    network.loss(network.model, *b.data.train)
    found = b.task.network(own.arrays)(b.data.train.inputs)
    assert torch.allclose(found, logits[0], atol=1e-4)
    assert own.submodel == (Submodel(network.units) if mask_bias else full(b.task.layout))


@pytest.mark.parametrize(
    ("ratio", "rows", "weight_rows", "narrow_part"), [(0.5, 11_175, 11_215, 5_675), (0.25, 5_669, 5_730, 1_409)]
)
def test_payload_of_the_mnist_network(ratio: float, rows: int, weight_rows: int, narrow_part: int) -> None:
    training = replace(HARD, local_epochs=1, batch_size=4)
    kinds: list[tuple[int, dict[str, Any]]] = [
        (rows, {"mask_update": "batch"}),
        (weight_rows, {"mask_update": "batch", "mask_bias": False}),
        (weight_rows, {"mask_bias": False}),
        (narrow_part, {"share_ranking": False}),
    ]
    for expected, knobs in kinds:
        b = bench("fedlps-cnn", training, num=4, **knobs)
        assert len(local_update(b.job(ratio), b.task, b.data).difference) == expected
    b = bench("fedlps-cnn", training, num=4)
    part = prefix_ratio(b.task.layout, ratio, "floor")
    assert len(local_update(b.job(ratio, submodel=part), b.task, b.data).difference) == narrow_part


# --- I4: a masked network is a narrow one -----------------------------------------------------------------------------


@networks
def test_masked_forward_is_narrow_forward(network: str) -> None:
    b = bench(network)
    layout, scores = b.task.layout, shuffled_scores(traced(network))
    masked = MaskedNetwork(b.task, b.arrays, ScoreLearner(scores, b.task, 0.1), 0.5)
    logits: list[Tensor] = []
    masked.model.register_forward_hook(lambda _, __, output: logits.append(output.detach()))
    masked.loss(masked.model, *b.data.train)
    part = best(layout, scores, 0.5)
    assert 0 < part.units.sum() < len(part.units)
    small = b.task.network(extract(layout, part, b.arrays))
    assert torch.allclose(logits[0], small(b.data.train.inputs), atol=1e-5)
    assert logits[0].std() > 0.01


@networks
@pytest.mark.parametrize(
    ("training", "prox"), [(HARD, 0.0), (replace(HARD, clip_norm=0.5), 0.0), (replace(HARD, clip_norm=0.5), 0.3)]
)
def test_narrow_training_is_masked_training_with_one_mask(network: str, training: Training, prox: float) -> None:
    b = bench(network, training, importance_weight=0.0, prox=prox)
    layout, scores = b.task.layout, shuffled_scores(traced(network))
    part = best(layout, scores, 0.5)
    update = local_update(b.job(0.5, scores.arrays(), part), b.task, b.data)
    _, trained, learner = train_masked(b, scores, 0.5)
    assert update.trained is not None
    for name, values in extract(layout, part, trained.arrays).items():
        assert np.allclose(update.trained.arrays[name], values, atol=1e-5), name
    back = scatter(layout, part, unflatten(layout, part, update.difference))
    for name, values in trained.arrays.items():
        assert np.allclose(b.arrays[name] + back[name], values, atol=1e-5)
        absent = scatter(layout, part, {name: np.ones_like(update.trained.arrays[name])})[name] == 0
        assert values[absent].tobytes() == b.arrays[name][absent].tobytes()
    moved = np.abs(update.difference).max()
    assert moved > 0.01
    assert np.allclose(update.state["scores/values"], learner.scores.values.numpy(), atol=1e-4)
    assert np.array_equal(update.state["scores/steps"], learner.scores.steps.numpy())


# --- I5: what scores learn ------------------------------------------------------------------------------------------


def gradient_by_autograd(b: Bench, scores: Scores, mask_bias: bool) -> Tensor:
    """Through M + sigma(Q) - sigma(Q), with what belongs to a unit written by hand."""
    layout = b.task.layout
    hard = torch.from_numpy(best(layout, scores, 0.5).units.astype(np.float32))
    q = scores.values.clone().requires_grad_()
    mask = hard + torch.sigmoid(q) - torch.sigmoid(q).detach()
    of_group = {g: mask[span.start : span.stop] for g, span in layout.groups.items()}
    model = b.task.network(b.arrays)
    tensors = dict(model.named_parameters())
    masks = {name: of_group[g] for g, names in TIES.items() for name in names}
    joined = torch.cat([of_group["stem"], of_group["side"]])
    masks |= {"joined.weight": joined, "joined.bias": joined}
    seen = {
        name: tensors[name] * m.view(-1, *[1] * (tensors[name].ndim - 1))
        for name, m in masks.items()
        if mask_bias or tensors[name].ndim > 1
    }
    inputs, labels = b.data.train
    nn.functional.cross_entropy(functional_call(model, seen, (inputs,)), labels).backward()
    assert q.grad is not None
    return q.grad


@pytest.mark.parametrize("mask_bias", [True, False])
@pytest.mark.parametrize("scope", ["active", "all", "narrow"])
def test_scores_learn_by_the_straight_through_gradient(scope: Any, mask_bias: bool) -> None:
    """One step of plain SGD at rate 1, so that scores move by their gradient."""
    if scope == "narrow" and not mask_bias:
        return  # no such mode
    once = Training(1.0, momentum=0.0, weight_decay=0.0, local_epochs=1, batch_size=32)
    knobs: dict[str, Any] = {"importance_weight": 0.0, "score_optimizer": "shared-sgd", "mask_bias": mask_bias}
    if scope != "narrow":
        knobs |= {"mask_update": "batch", "score_scope": scope}
    b = bench("ties", once, **knobs)
    layout, scores = b.task.layout, shuffled_scores(traced("ties"))
    part = best(layout, scores, 0.5)
    update = local_update(b.job(0.5, scores.arrays(), part if scope == "narrow" else None), b.task, b.data)
    moved = scores.values.numpy() - update.state["scores/values"]
    expected = gradient_by_autograd(b, scores, mask_bias).numpy()
    cut, active = ~layout.fixed_units, part.units & ~layout.fixed_units
    learn = cut if scope == "all" else active
    assert np.allclose(moved[learn], expected[learn], rtol=1e-3, atol=1e-6)
    assert not moved[cut & ~learn].any()
    assert np.median(np.abs(expected[learn])) > 1e-4


def test_other_labels_make_other_scores() -> None:
    for knobs in ({}, {"mask_update": "batch"}):
        one, other = bench("vgg", labels=2, **knobs), bench("vgg", labels=3, **knobs)
        part = None if knobs else prefix_ratio(one.task.layout, 0.5, "floor")
        found = [local_update(b.job(0.5, submodel=part), b.task, b.data).state["scores/values"] for b in (one, other)]
        assert not np.allclose(*found, atol=1e-3)


# --- scores from job to job -------------------------------------------------------------------------------------------


def test_scores_go_on_from_job_to_job() -> None:
    b = bench("vgg")  # 4 batches, 2 epochs
    layout = b.task.layout
    part, other = prefix_ratio(layout, 0.5, "floor"), best(layout, shuffled_scores(layout), 0.5)
    first = local_update(b.job(0.5, submodel=part), b.task, b.data).state
    begun = fedlps.initial_scores(layout, np.random.default_rng([5, 3])).values.numpy()
    assert np.array_equal(first["scores/values"][~part.units], begun[~part.units])
    assert (first["scores/values"] != begun)[part.units & ~layout.fixed_units].all()
    second = local_update(b.job(0.5, first, other, seed=6), b.task, b.data).state
    assert np.array_equal(first["scores/steps"], 8 * part.units)
    assert np.array_equal(second["scores/steps"], 8.0 * part.units + 8 * other.units)
    assert np.array_equal(second["scores/values"][~other.units], first["scores/values"][~other.units])


def test_score_reset_draws_anew_for_every_job() -> None:
    b = bench("vgg", score_reset=True)
    layout = b.task.layout
    part = prefix_ratio(layout, 0.5, "floor")
    kept = shuffled_scores(layout).arrays()
    states = [local_update(b.job(0.5, kept, part, seed=seed), b.task, b.data).state for seed in (5, 6, 5)]
    assert same_bits(states[0], states[2])
    hidden = ~part.units
    begun = fedlps.initial_scores(layout, np.random.default_rng([6, 3])).values.numpy()
    assert np.array_equal(states[1]["scores/values"][hidden], begun[hidden])
    assert not (states[0]["scores/values"] == states[1]["scores/values"])[hidden].any()
    assert np.array_equal(states[0]["scores/steps"], 8 * part.units)


def test_shared_sgd_forgets_its_momentum_from_job_to_job() -> None:
    b = bench("vgg", score_optimizer="shared-sgd")
    layout = b.task.layout
    scores = shuffled_scores(layout)
    part = best(layout, scores, 0.5)
    pushed = replace(scores, first=torch.ones_like(scores.first)).arrays()
    states = [local_update(b.job(0.5, state, part), b.task, b.data).state for state in (scores.arrays(), pushed)]
    assert np.array_equal(states[0]["scores/values"], states[1]["scores/values"])
    assert (states[0]["scores/values"] != scores.values.numpy())[part.units & ~layout.fixed_units].all()


@pytest.mark.parametrize("knobs", [{}, {"mask_update": "batch"}, {"mask_bias": False, "score_scope": "all"}], ids=str)
def test_the_same_seed_gives_the_same_bits(knobs: dict[str, Any]) -> None:
    b = bench("vgg", **knobs)
    part = None if knobs else prefix_ratio(b.task.layout, 0.5, "floor")
    one, two, other = (local_update(b.job(0.5, submodel=part, seed=s), b.task, b.data) for s in (5, 5, 6))
    assert one.difference.tobytes() == two.difference.tobytes()
    assert (one.submodel, one.told) == (two.submodel, two.told)
    assert same_bits(one.state, two.state)
    assert not same_bits(one.state, other.state)


def test_a_decoder_has_no_masks_and_a_frozen_layer_does_no_harm() -> None:
    layout = trace_layout(Decoder, (2, 3, 3))
    task = Task(Decoder, layout, (2, 3, 3), 5, HARD, FedLPSConfig(mask_update="batch"))
    arrays = random_arrays(layout, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"'up.weight' has its outputs on axis 1: set fedlps.mask-update='round'"):
        MaskedNetwork(task, arrays, ScoreLearner(shuffled_scores(layout), task, 0.1), 0.5)
    b = bench("vgg", mask_update="batch")

    def half_frozen() -> nn.Module:
        model = Vgg()
        model.conv1.requires_grad_(False)
        return model

    b = b._replace(task=replace(b.task, factory=half_frozen))
    _, trained, _ = train_masked(b, shuffled_scores(layout=b.task.layout), 0.5)
    assert trained.arrays["conv1.weight"].tobytes() == b.arrays["conv1.weight"].tobytes()
    assert not np.array_equal(trained.arrays["conv2.weight"], b.arrays["conv2.weight"])


# --- whole runs -------------------------------------------------------------------------------------------------------

VICTIM = 1


def test_with_everything_kept_it_is_fedavg_of_equal_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FedAvg, "weigh", lambda *_: 1.0)
    shared = {"fleet": "equal", "num-server-rounds": 2}
    uniform = final_model(run_toy(tmp_path, "fedavg", shared))
    for knobs in ({}, {"personal": "none", "fedlps.normalise": "coverage"}):
        dense = {**shared, "ratio-policy": "fixed", "bandit.ratio": 1.0, **knobs}
        assert same_bits(final_model(run_toy(tmp_path, "fedlps", dense)), uniform)


def told_otherwise(change: Callable[[bytes], bytes | None]) -> Any:
    """Alter what the victim tells of its ranking in the first round."""

    def alter(request: Message, reply: Message, partition: int) -> Message:
        first = request.metadata.message_type == "train" and request.metadata.group_id == "1"
        if first and partition == VICTIM:
            ranking = change(reply.content.config_records["told"]["ranking"])  # type: ignore[arg-type]
            del reply.content["told"]
            if ranking is not None:
                reply.content["told"] = ConfigRecord({"ranking": ranking})
        return reply

    return alter


@pytest.fixture(scope="module")
def without_victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def alter(request: Message, reply: Message, partition: int) -> Message:
        first = request.metadata.message_type == "train" and request.metadata.group_id == "1"
        return failure(request) if first and partition == VICTIM else reply

    return run_toy(tmp_path_factory.mktemp("without"), "fedlps", {"num-server-rounds": 2}, alter=alter)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda _: None, "a ranking of 240 units should be 480 bytes, got 0"),
        (lambda ranking: ranking[:-2], "a ranking of 240 units should be 480 bytes, got 478"),
        (lambda ranking: ranking[:2] + ranking[:2] + ranking[4:], "each of the 16 units of group 'conv1' once"),
        (lambda ranking: ranking[32:] + ranking[:32], "should name each of the"),
    ],
    ids=["none", "truncated", "repeated", "other layers"],
)
def test_a_reply_without_a_ranking_is_refused_told_and_never_averaged(
    change: Callable[[bytes], bytes | None], reason: str, tmp_path: Path, without_victim: Path
) -> None:
    run = run_toy(tmp_path, "fedlps", {"num-server-rounds": 2}, alter=told_otherwise(change))
    first, second = lines(run)
    assert [told["partition"] for told in first["refused"]] == [VICTIM]
    assert reason in first["refused"][0]["reason"]
    assert second["refused"] == []
    assert same_bits(final_model(run), final_model(without_victim))


class Overheard:
    """Remembers what clients sent back."""

    def __init__(self) -> None:
        self.submodels: list[tuple[int, int, Submodel]] = []  # round, partition, what the reply holds
        self.records: set[str] = set()
        self.names: set[str] = set()

    def __call__(self, request: Message, reply: Message, partition: int) -> Message:
        for name, record in reply.content.items():
            self.names |= {name, *map(str, record)}
        if request.metadata.message_type == "train":
            bits = dict(reply.content.config_records["submodel"])
            held = unpack(run_layout(), bits)  # type: ignore[arg-type]
            self.submodels.append((int(request.metadata.group_id), partition, held))
        return reply


@cache
def run_layout() -> Layout:
    return toy_task("fedlps").layout


def private_state(run: Path, partition: int, server_round: int) -> Arrays:
    return load_state(run / "clients" / f"{partition:06d}", server_round)


def test_a_ranking_that_nobody_asked_for_is_refused(tmp_path: Path) -> None:
    def tell(request: Message, reply: Message, partition: int) -> Message:
        if request.metadata.message_type == "train" and partition == 1:
            reply.content["told"] = ConfigRecord({"ranking": b"xyz"})
        return reply

    run = run_toy(tmp_path, "fedlps", {"fedlps.share-ranking": False, "num-server-rounds": 2}, alter=tell)
    for line in lines(run):
        assert line["refused"] == [{"partition": 1, "reason": "it tells ranking, which it was not asked for"}]


def test_without_a_shared_ranking_clients_choose_as_the_server_would_have(tmp_path: Path) -> None:
    shared = {"num-server-rounds": 3, "fedlps.score-learning-rate": 0.5, "ratio-policy": "fixed"}
    ears = Overheard(), Overheard()
    told, alone = (
        run_toy(tmp_path, "fedlps", {**shared, "fedlps.share-ranking": share}, alter=ear)
        for share, ear in zip((True, False), ears, strict=True)
    )
    assert same_bits(final_model(told), final_model(alone))
    assert ears[0].submodels == ears[1].submodels
    prefix = prefix_ratio(run_layout(), 0.5, "floor")
    assert any(held != prefix for *_, held in ears[0].submodels)  # else nothing was learned
    for one, other in zip(lines(told), lines(alone), strict=True):
        assert one.keys() == other.keys()
        assert {k: v for k, v in one.items() if "accuracy" in k} == {k: v for k, v in other.items() if "accuracy" in k}
        assert "accuracy-personal" in one
        assert one["bytes-down"] < 0.5 * other["bytes-down"]
    assert {"told", "ranking"} <= ears[0].names
    assert not [name for name in ears[1].names if "rank" in name or "score" in name or name == "told"]
    for partition in range(4):
        assert same_bits(private_state(told, partition, 3), private_state(alone, partition, 3))


def test_state_goes_on_in_a_run(tmp_path: Path) -> None:
    ear = Overheard()
    run = run_toy(tmp_path, "fedlps", {"num-server-rounds": 2}, alter=ear)
    for partition in range(4):
        trained = [held.units for _, p, held in ear.submodels if p == partition]
        steps = private_state(run, partition, 2)["scores/steps"]
        batches = np.unique(steps[trained[0] & trained[1]])
        assert len(trained) == 2
        assert len(batches) == 1
        assert np.array_equal(steps, (trained[0].astype(int) + trained[1]) * (batches[0] / 2))


@pytest.mark.parametrize("pattern", ["random", "magnitude", "ordered"])
def test_patterns_of_the_server_ask_for_no_scores_and_keep_none(pattern: str, tmp_path: Path) -> None:
    ear, layout = Overheard(), run_layout()
    values = {"fedlps.pattern": pattern, "ratio-policy": "fixed", "num-server-rounds": 1}
    run = run_toy(tmp_path, "fedlps", values, alter=ear)
    parts = [held for *_, held in ear.submodels]
    assert len(parts) == 4
    if pattern == "ordered":
        assert set(parts) == {prefix_ratio(layout, 0.5, "floor")}
    if pattern == "magnitude":
        arrays, (chosen,) = initial_model(run), set(parts)
        for group, span in layout.groups.items():
            if group not in layout.fixed:
                weight = np.abs(arrays[f"{group}.weight"])
                norms = weight.reshape(len(weight), -1).sum(1)
                largest = np.sort(np.argsort(-norms)[: len(norms) // 2])
                assert np.flatnonzero(chosen.units[span.start : span.stop]).tolist() == largest.tolist()
    if pattern == "random":
        assert len(set(parts)) == 4
    assert "told" not in ear.names
    assert set(private_state(run, 0, 1)) == {"model/units", "model/part"}
    silent = run_toy(tmp_path, "fedlps", {**values, "personal": "none"})
    assert not (silent / "clients").exists()
    assert same_bits(final_model(silent), final_model(run))


def test_masked_clients_send_rows_and_keep_their_own_narrow_model(tmp_path: Path) -> None:
    for mask_bias, cut in ((True, "rows"), (False, "weight-rows")):
        ear = Overheard()
        values = {"fedlps.mask-update": "batch", "fedlps.mask-bias": mask_bias, "ratio-policy": "fixed"}
        run = run_toy(tmp_path, "fedlps", values, alter=ear)
        for _, partition, held in ear.submodels:
            assert held.cut == cut
            units = np.unpackbits(private_state(run, partition, 1)["model/units"])[: run_layout().num_units]
            assert np.array_equal(units, held.units if mask_bias else np.ones_like(units))
        assert "accuracy-personal" in lines(run)[0]
        assert "told" not in ear.names
