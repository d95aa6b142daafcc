"""HeteroFL: every client trains the first share of each layer's channels that its device can hold.

"HeteroFL: Computation and Communication Efficient Federated Learning for Heterogeneous Clients"
(Enmao Diao, Jie Ding, Vahid Tarokh, ICLR 2021, arXiv 2010.01264). Submodels are nested prefixes
(`flexfed.select.prefix_ratio`); entries are averaged over the clients that hold them; classifier rows only
over those that also hold examples of the class.

Differences from the released code:
- Who trains which level follows the device's capacity; the paper's fixed and dynamic shares are options.
- Fixed shares are floor(clients * share / total), not floor(clients / total) * share, which fails when there
  are fewer clients than parts ("a2-b8" with 5 clients).
- 1e-9 is taken off before a width is rounded up (`flexfed.select.kept_units`).
- Static batch norm is asked of the clients as sums (`flexfed.batchnorm`), with the scaler off.
- A client's own test keeps all logits; there absent classes are masked in it as in training.
- Devices train at their nominal capacity, however little is free now; FlexFL's shrink.
- The scaler is hooks on any network (`flexfed.scaler`), not a layer written into each model.
- Its Transformer is not here: layer norm cannot be cut without changing what it computes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from flexfed.batchnorm import Definition
from flexfed.compute import numbers
from flexfed.jobs import Job, Task, Update, make_update, require_memory, train_network
from flexfed.scaler import scale_outputs
from flexfed.submodel import Submodel
from flexfed.units import Layout

if TYPE_CHECKING:
    from flexfed.data import ClientData

LEVELS = "abcdefghijklmnopqrstuvwxyz"
"""Names of the levels, largest first."""

Assign = Literal["capacity", "fix", "dynamic"]
Fill = Literal["zero", "-inf", "off"]
Weights = Literal["uniform", "examples"]
BatchNormMode = Literal["federated", "proxy", "batch"]


@dataclass(frozen=True)
class LevelsConfig:
    """What a run may set of a method whose clients train nested levels of the network.

    Attributes:
        ratios: kept fraction of each layer's channels at levels a, b, c, ..., largest first.
        assign: "capacity" (ours): the largest level that the device holds; "fix": `shares` of the
            clients keep a level for good; "dynamic": every client draws one each round.
        shares: levels and their parts, "a2-b8" = 20 % a, 80 % b. Not used with `assign` "capacity".
        weights: of a client in the mean.
        batch_norm: statistics for evaluation from sums over all clients ("federated"), from examples on the
            server ("proxy"), or from the evaluated batch itself ("batch").
        statistics: how the federated ones are defined, see `flexfed.batchnorm.BatchNormSums`.
    """

    method: ClassVar[str]

    ratios: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125, 0.0625)
    assign: Assign = "capacity"
    shares: str = "a1-b1-c1-d1-e1"
    weights: Weights = "uniform"
    batch_norm: BatchNormMode = "federated"
    statistics: Definition = "batches"

    def __post_init__(self) -> None:
        self._check_ratios()
        self._check_choice("assign", self.assign, get_args(Assign))
        self._check_choice("weights", self.weights, get_args(Weights))
        self._check_choice("batch-norm", self.batch_norm, get_args(BatchNormMode))
        self._check_choice("statistics", self.statistics, get_args(Definition))
        if self.assign != "capacity":
            try:
                parse_shares(self.shares, len(self.ratios))
            except ValueError as error:
                raise ValueError(f"{self.method}.shares: {error}") from error

    def _check_ratios(self) -> None:
        r = self.ratios
        falling = all(a > b for a, b in pairwise(r))
        if not 1 <= len(r) <= len(LEVELS) or not falling or not (r[-1] > 0 and r[0] <= 1):
            raise ValueError(f"{self.method}.ratios must fall from at most 1 to above 0, largest first, got {r}")

    def _check_choice(self, key: str, value: str, known: tuple[str, ...]) -> None:
        if value not in known:
            raise ValueError(f"{self.method}.{key} must be one of {', '.join(known)}, got {value!r}")


@dataclass(frozen=True)
class HeteroFLConfig(LevelsConfig):
    """What a run may set of HeteroFL; uniform weights are the released code's.

    Attributes:
        scaler: divide hidden activations by the ratio while training (`flexfed.scaler.scale_outputs`).
        masked_loss: what absent classes' logits become (`masked_cross_entropy`); "zero" is the released code.
        limit_rows: average classifier rows only over clients that hold the class.
    """

    method: ClassVar[str] = "heterofl"

    scaler: bool = True
    masked_loss: Fill = "zero"
    limit_rows: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("masked-loss", self.masked_loss, get_args(Fill))


def parse_shares(text: str, num_levels: int) -> tuple[int, ...]:
    """The parts of each level, (num_levels,): "a2-b8" of three levels is (2, 8, 0), in any order.

    Raises:
        ValueError: not of that form, a level twice, one that does not exist, or no parts at all.
    """
    parts: dict[int, int] = {}
    for item in text.split("-"):
        found = re.fullmatch(r"([a-z])([0-9]+)", item.strip())
        level = LEVELS.index(found[1]) if found else num_levels
        if found is None or level >= num_levels or level in parts:
            expected = f"levels a to {LEVELS[num_levels - 1]}, each once, like 'a2-b8'"
            raise ValueError(f"expected {expected}, got {item!r} in {text!r}")
        parts[level] = int(found[2])
    if not sum(parts.values()):
        raise ValueError(f"expected at least one level with a part above 0, got {text!r}")
    return tuple(parts.get(level, 0) for level in range(num_levels))


def fixed_levels(num_clients: int, shares: Sequence[int]) -> np.ndarray:
    """The level that each client keeps: int64 (num_clients,), larger levels first.

    Counts are rounded down, and the clients left over get the smallest level that has a part.
    """
    counts = [num_clients * part // sum(shares) for part in shares]
    last = max(level for level, part in enumerate(shares) if part)
    counts[last] += num_clients - sum(counts)
    return np.repeat(np.arange(len(shares)), counts)


def dynamic_levels(num_clients: int, shares: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """The level that each client has this round, drawn by the shares: int64 (num_clients,)."""
    return rng.choice(len(shares), size=num_clients, p=np.asarray(shares) / sum(shares))


def capacity_level(capacity: float, sizes: Sequence[float]) -> int:
    """The largest level that a device holds, the smallest one if it holds none (ours).

    Args:
        capacity: what the device can hold, in the unit of `sizes`: a share of the full network.
        sizes: size of each level, largest first.
    """
    return next((level for level, size in enumerate(sizes) if size <= capacity), len(sizes) - 1)


def limit_classes(layout: Layout, submodel: Submodel, present: np.ndarray) -> Submodel:
    """The submodel without the class outputs of labels that a client does not hold: what its reply covers.

    Args:
        layout: the network's numbering; its fixed groups are class outputs.
        submodel: what the client trained.
        present: bool (classes,).

    Raises:
        ValueError: a fixed group has another number of outputs than there are classes.
    """
    units = submodel.units.copy()
    for group in layout.fixed:
        span = layout.groups[group]
        if len(span) != len(present):
            raise ValueError(f"group {group!r} has {len(span)} class outputs, but labels of {len(present)} classes")
        units[span.start : span.stop] &= present
    return replace(submodel, units=units)


def masked_cross_entropy(logits: Tensor, targets: Tensor, labels_present: Tensor, fill: Fill = "zero") -> Tensor:
    """Cross-entropy (batch mean) in which classes that the client does not hold get no gradient.

    Args:
        logits: (n, classes).
        targets: int64 (n,), each a class that is present.
        labels_present: bool (classes,), on the logits' device.
        fill: the logits of absent classes: "zero" (the released code) leaves them probability, "-inf" takes
            it away, "off" keeps the logits, which is plain cross-entropy.

    Raises:
        ValueError: `labels_present` is not one bool for each class, or a target is absent.
    """
    if fill == "off":
        return functional.cross_entropy(logits, targets)
    if labels_present.dtype != torch.bool or labels_present.shape != logits.shape[1:]:
        got = f"{labels_present.dtype} of shape {tuple(labels_present.shape)}"
        raise ValueError(f"labels_present must be bool of shape {tuple(logits.shape[1:])}, got {got}")
    if not labels_present[targets].all():
        raise ValueError("a target's class is absent in labels_present; expected every label of the client there")
    value = 0.0 if fill == "zero" else -torch.inf
    return functional.cross_entropy(logits.masked_fill(~labels_present, value), targets)


def local_update(job: Job, task: Task, data: ClientData) -> Update:
    """Train the part with the scaler and the masked loss; send back the classifier rows of classes held."""
    method: HeteroFLConfig = task.method
    require_memory(job.device, job.submodel, task.memory_to_train)
    present = np.zeros(task.num_classes, dtype=bool)
    present[numbers(data.train.labels)] = True
    held = torch.from_numpy(present).to(task.place)

    def loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        return masked_cross_entropy(model(inputs), labels, held, method.masked_loss)

    model = task.network(job.arrays)
    rate = float(str(job.config["ratio"])) if method.scaler else 1.0
    with scale_outputs(model, rate):
        trained = train_network(model, job, task, data.train, loss)
    reported = limit_classes(task.layout, job.submodel, present) if method.limit_rows else job.submodel
    weight = float(len(data.train.labels))
    return make_update(job, task, job.submodel, job.arrays, trained, weight, reported=reported)
