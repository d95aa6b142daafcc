"""DepthFL: a device trains as many of the network's stages as it can, and all of its classifiers teach one another.

"DepthFL: Depthwise Federated Learning for Heterogeneous Clients" (Minjae Kim, Sangyoon Yu, Suhyun Kim, Soo-Mook Moon,
ICLR 2023, https://openreview.net/forum?id=pf8RIZTMU58). A level is a depth: the stem, the first d stages, and the
classifier behind each of them (`flexfed.exits`); widths are never cut. Clients minimise the sum of their classifiers'
losses and of the divergences between them, the server averages each tensor over the clients that hold it, and FedDyn
("Federated Learning Based on Dynamic Regularization", Acar et al., ICLR 2021) corrects both for what clients are not
alike. The prediction is the mean of the logits of a model's classifiers.

Variants, as configurations:
- DepthFL (FedAvg): `depthfl.feddyn-alpha=0 depthfl.distillation=false`;
- InclusiveFL-like: these, and `depthfl.train='deepest'` (without that paper's distillation of momentum);
- exclusive learning: `depthfl.assign='fix' depthfl.shares='b1'`: all clients one level, read its `accuracy-b`.

Differences from the paper and its released code:
- Who trains which depth follows the device's capacity; the paper's equal shares are `assign = "fix"`.
- A message holds the tensors of its level only; the code sends everybody the full model.
- Tensors are known by name; a port relies on the tensors of shallow models being the first ones of deep models.
- The divergence is the clean one; the code adds 1e-7 to a teacher's probabilities (the sixth digit of a loss).
- g_m, FedDyn's state of a client, stays on the client (a port keeps it in the server's working directory), a version
  for each round, and the server names the one to go on from: of a reply that was refused, lost or late, and of a round
  with too few replies, neither h nor g_m keeps anything.
- FedDyn's linear term is of w - w_0, not of w: the same gradient, and a loss that rounds can be compared by.
- A client whose depth changes keeps g_m of the tensors that it does not train now.
- g_m follows what a client trained, h what the server averaged: with uniform weights h is the mean of g_m over all
  clients; clipped replies, weights by examples and codecs make them differ.
- Batch norm's running statistics are neither averaged nor sent: whoever evaluates computes them.
- With `train = "deepest"` the other classifiers are frozen, and replies leave them out of the mean. They are computed
  all the same, and counted as trained.
- The heads' design fits any staged network, images and windows alike (`flexfed.models.heads`).
- Weight decay, momentum and the learning rate are the run's; the paper's stand in configs/depthfl-cifar100.toml.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from flexfed.compute import place_of, tensors_on
from flexfed.cost import part_bytes
from flexfed.exits import Exits, depth_keys
from flexfed.jobs import Job, Task, Update, make_update, require_memory, train_network
from flexfed.models.heads import HEADS
from flexfed.networks import EXITS
from flexfed.submodel import Submodel, full
from flexfed.training import proximal
from flexfed.units import Arrays

if TYPE_CHECKING:
    from flexfed.data import ClientData

Assign = Literal["capacity", "fix"]
Train = Literal["all", "deepest"]
Weights = Literal["uniform", "examples"]

STATE = "feddyn/"
"""What the names of FedDyn's tensors begin with, in a client's private state and in the server's."""


@dataclass(frozen=True)
class DepthFLConfig:
    """What a run may set of DepthFL; the defaults are the paper's, but for `assign`.

    Attributes:
        heads: design of the early classifiers, a key of `flexfed.models.heads.HEADS`.
        distillation: whether classifiers learn from one another.
        ramp_rounds: rounds in which the weight of that rises to 1; 0 = it is 1 from the start.
        feddyn_alpha: of FedDyn's regulariser; 0 = the plain mean.
        weights: of a client in the mean; "uniform" is the released code.
        assign: "capacity" (ours): the deepest level that the device holds; "fix": `shares` of the clients keep a level.
        shares: levels and their parts, a the deepest: "a1-b3" = a quarter a, the rest b. Not used with "capacity".
        train: "all" classifiers of a part, or only its "deepest", which then gives the prediction.
    """

    heads: str = "depthfl"
    distillation: bool = True
    ramp_rounds: int = 300
    feddyn_alpha: float = 0.1
    weights: Weights = "uniform"
    assign: Assign = "capacity"
    shares: str = "a1-b1-c1-d1"
    train: Train = "all"

    def __post_init__(self) -> None:
        choices = {"heads": tuple(HEADS), "weights": get_args(Weights), "assign": get_args(Assign)}
        for key, known in {**choices, "train": get_args(Train)}.items():
            if getattr(self, key) not in known:
                raise ValueError(f"depthfl.{key} must be one of {', '.join(known)}, got {getattr(self, key)!r}")
        if self.ramp_rounds < 0:
            raise ValueError(f"depthfl.ramp-rounds must be >= 0, got {self.ramp_rounds}")
        if not (math.isfinite(self.feddyn_alpha) and self.feddyn_alpha >= 0):
            raise ValueError(f"depthfl.feddyn-alpha must be >= 0, 0 = off, got {self.feddyn_alpha}")


def exits(config: DepthFLConfig, stages: tuple[str, ...]) -> Exits:
    """The classifiers; they predict together where all are trained."""
    return Exits(stages, config.heads, ensemble=config.train == "all")


# Parts --------------------------------------------------------------------------------------------------------------


def depth_part(task: Task, depth: int) -> Submodel:
    """The part that ends at a classifier, 1 = the shallowest; of full depth it is everything, without names."""
    keys, whole = depth_keys(task.factory), full(task.layout)
    return whole if depth == len(keys) else Submodel(whole.units, keys[depth - 1])


def trained_part(task: Task, part: Submodel) -> Submodel:
    """What a reply reports of a part: its tensors but those of classifiers that are not trained."""
    keys = depth_keys(task.factory)
    depth = len(keys) if part.keys is None else keys.index(part.keys) + 1
    if task.method.train == "all" or depth == 1:
        return part
    shallower = {name for name in keys[depth - 2] if name.startswith(f"{EXITS}.")}
    return replace(part, keys=keys[depth - 1] - shallower)


def memory_beside(task: Task, part: Submodel) -> int:
    """Bytes that FedDyn holds while a part trains: g_m, the part as it came, its distance from that, early gradients.

    What g_m holds of tensors that the part does not have comes on top, where a device was stronger once.
    """
    return 4 * part_bytes(task.layout, part) if task.method.feddyn_alpha else 0


# The loss -----------------------------------------------------------------------------------------------------------


def consistency_weight(rounds_before: int, ramp_rounds: int) -> float:
    """w(r) = exp(-5 (1 - min(r, R) / R)^2), with R = `ramp_rounds` and r = the round - 1."""
    missing = 1 - min(rounds_before, ramp_rounds) / ramp_rounds if ramp_rounds else 0.0
    return math.exp(-5 * missing**2)


def divergence(teacher: Tensor, student: Tensor, added: float = 0.0) -> Tensor:
    """KL(softmax(teacher) || softmax(student)), batch mean; no gradient reaches the teacher.

    Args:
        teacher: logits, (n, classes).
        student: likewise.
        added: to the teacher's probabilities; 1e-7 in the released code.
    """
    wanted = functional.softmax(teacher.detach(), dim=1) + added
    return functional.kl_div(functional.log_softmax(student, dim=1), wanted, reduction="batchmean")


def mutual_loss(logits: Sequence[Tensor], labels: Tensor, weight: float, added: float = 0.0) -> Tensor:
    """sum_i [CE(z_i, y) + w / (M - 1) sum_{j != i} KL(softmax(z_j) || softmax(z_i))] of M classifiers.

    Args:
        logits: z_i, of each (n, classes).
        labels: y, int64 (n,).
        weight: w; with 0, or one classifier, nobody is taught.
        added: see `divergence`.
    """
    loss = torch.stack([functional.cross_entropy(z, labels) for z in logits]).sum()
    if not weight or len(logits) == 1:
        return loss
    pairs = [(t, s) for i, s in enumerate(logits) for j, t in enumerate(logits) if i != j]
    taught = torch.stack([divergence(t, s, added) for t, s in pairs]).sum()
    return loss + weight / (len(logits) - 1) * taught


def dynamic_term(model: nn.Module, start: Mapping[str, Tensor], own: Mapping[str, Tensor], alpha: float) -> Tensor:
    """FedDyn's part of a client's loss: -<w - w_0, g_m> + alpha / 2 ||w - w_0||^2 over the parameters.

    Args:
        model: whose parameters are w.
        start: parameter name -> w_0, as it came.
        own: parameter name -> g_m; a missing one is 0.
        alpha: 0 = no such part.
    """
    near = proximal(model, start, alpha)
    along = [((w - start[name]) * own[name]).sum() for name, w in model.named_parameters() if name in own]
    return near - torch.stack(along).sum() if alpha and along else near


# FedDyn's two states ------------------------------------------------------------------------------------------------


def client_step(own: Arrays, before: Arrays, after: Arrays, alpha: float) -> Arrays:
    """g_m <- g_m - alpha (w - w_0), for the tensors that were trained; the others stay.

    Args:
        own: tensor -> g_m; a missing one is 0.
        before: tensor -> w_0, of those that were trained.
        after: tensor -> w; may hold more.
        alpha: of FedDyn.
    """
    moved = {name: np.float32(alpha) * (after[name] - array) for name, array in before.items()}
    return {**own, **{name: own.get(name, np.zeros_like(step)) - step for name, step in moved.items()}}


def server_step(
    previous: Arrays, averaged: Arrays, memory: Arrays, holders: Mapping[str, int], num_clients: int, alpha: float
) -> tuple[Arrays, Arrays]:
    """The server: h <- h - alpha (n / N) (mean - theta); theta <- mean - h / alpha. What nobody held keeps both.

    Args:
        previous: tensor -> theta.
        averaged: tensor -> mean.
        memory: tensor -> h; a missing one is 0.
        holders: parameter -> n, the replies that held it; the mean of other tensors is taken as it is.
        num_clients: N, of the whole federation.
        alpha: > 0.

    Returns:
        theta and h.
    """
    model, memory = dict(averaged), dict(memory)
    for name, num in holders.items():
        if num:
            moved = np.float32(alpha * num / num_clients) * (averaged[name] - previous[name])
            memory[name] = memory.get(name, np.zeros_like(moved)) - moved
            model[name] = averaged[name] - memory[name] / np.float32(alpha)
    return model, memory


def named(state: Mapping[str, np.ndarray]) -> Arrays:
    """FedDyn's tensors by their plain names, out of a state that holds other things, too."""
    return {name.removeprefix(STATE): array for name, array in state.items() if name.startswith(STATE)}


def stated(arrays: Arrays) -> Arrays:
    """Undo `named`."""
    return {f"{STATE}{name}": array for name, array in arrays.items()}


# The client ---------------------------------------------------------------------------------------------------------


def local_update(job: Job, task: Task, data: ClientData) -> Update:
    """Train the part with all of its classifiers; keep g_m."""
    config: DepthFLConfig = task.method
    require_memory(job.device, job.submodel, lambda part: task.memory_to_train(part) + memory_beside(task, part))
    reported, alpha = trained_part(task, job.submodel), config.feddyn_alpha
    model = task.network(job.arrays)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and reported.holds(name))
    learned = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    start = {n: p.detach().clone() for n, p in model.named_parameters()} if alpha else {}
    own = named(job.state) if alpha else {}
    # On the same memory: no second g_m, which `memory_beside` does not count.
    pulls = tensors_on(place_of(model), {name: own[name] for name in learned if name in own})
    weight = consistency_weight(job.server_round - 1, config.ramp_rounds) if config.distillation else 0.0

    def loss(network: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        logits = network(inputs, every=True)
        taught = logits if config.train == "all" else logits[-1:]
        return mutual_loss(taught, labels, weight) + dynamic_term(network, start, pulls, alpha)

    trained = train_network(model, job, task, data.train, loss)
    update = make_update(job, task, job.submodel, job.arrays, trained, float(len(data.train.labels)), reported=reported)
    before = {name: job.arrays[name] for name in learned}
    return replace(update, state=stated(client_step(own, before, trained.arrays, alpha))) if alpha else update
