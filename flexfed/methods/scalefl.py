"""ScaleFL: narrow and short networks that end at early exits, which learn from the last one.

"ScaleFL: Resource-Adaptive Federated Learning with Heterogeneous Clients" (Fatih Ilhan, Gong Su, Ling Liu, CVPR 2023,
https://openaccess.thecvf.com/content/CVPR2023/html/Ilhan_ScaleFL_Resource-Adaptive_Federated_Learning_With_Heterogeneous_Clients_CVPR_2023_paper.html).
A level keeps the first share of every layer's channels, and everything up to one of the network's exits. Its loss
weighs deeper exits more; after a quarter of the rounds the earlier ones also learn from the level's last.

Differences from the released code (ours; the option in brackets undoes one):
- Tensors and classifiers behind a level's last exit do not travel and are never built. There all layers travel, cut in
  width, and those beyond the exit get no gradients. So a mean is over the clients that trained a tensor, in both.
- The divergence is a mean over the batch, and its teacher a constant; there it is divided by the classes, too, and the
  teacher learns from its students [distillation]. Its weight is 0.05; there 0 unless set [gamma].
- Widths are prefixes, rounded down, once 1e-9 was added, and never below 1; there masks found by tracing gradients.
- Which level a device trains follows from its capacity; there equal shares of the clients [assign].
- The scaler divides the outputs of all convolutions but those that give classes, by the level's width, while training
  and after. It is part of the network that a device uses: evaluation, export and the clients' own models divide, too,
  by weights that are divided (`as_used`), so batch-norm statistics are those of divided activations.
- Evaluation uses static batch norm of each level; there the statistics of the test batch [batch-norm].
- Every exit's accuracy is its own; there all exits share a meter.
- Levels are named largest first. Their widths are the paper's for ResNet-110; exits are the network's, evenly down.
- The search for widths and depths under budgets is ours (`flexfed.methods.scalefl_levels`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from flexfed.cost import num_parameters
from flexfed.exits import Exits, depth_keys
from flexfed.jobs import Job, Part, Task, Update, make_update, require_memory, train_network
from flexfed.methods.heterofl import LEVELS, parse_shares
from flexfed.methods.scalefl_levels import Level, evenly_deep, grid, part_of_level, search
from flexfed.models.heads import HEADS
from flexfed.networks import Factory, build_on_meta
from flexfed.scaler import divide_outputs, divide_weights
from flexfed.select import prefix_ratio
from flexfed.submodel import Submodel, full, narrow_shapes
from flexfed.units import Arrays, out_axis

if TYPE_CHECKING:
    from flexfed.data import ClientData

Measure = Literal["macs", "parameters", "both"]
Search = Literal["nested", "free"]
Distillation = Literal["batch-mean", "released"]
Assign = Literal["capacity", "fix"]
Weights = Literal["uniform", "examples"]


@dataclass(frozen=True)
class ScaleFLConfig:
    """What a run may set of ScaleFL.

    Attributes:
        widths: kept share of every layer's channels at levels a, b, c, ..., largest first.
        depths: exits that each level keeps, largest first. Empty = all of the network's, and from there evenly down to
            the first; of a network with fewer exits than levels the smallest levels are left out.
        budgets: cost of each level as a share of the full network's, largest first: widths and depths are then searched
            for. Empty = as written.
        measure: what a budget bounds: "macs", "parameters", or "both" of them, each as its own share.
        search: "nested" levels, or each by itself ("free"); see `flexfed.methods.scalefl_levels.search`.
        grid: widths that are tried are multiples of 1 / `grid`.
        heads: design of the early classifiers, a key of `flexfed.models.heads.HEADS`.
        gamma: weight of the distillation; 0 = off.
        temperature: of the distillation.
        distill_after: it begins after this share of the run's rounds, in [0, 1].
        distillation: see `exit_loss`.
        scaler: divide what convolutions give by the level's width.
        weights: of a client in the mean; "uniform" is the released code.
        assign: "capacity" (ours): the largest level that the device holds; "fix": `shares` of the clients keep a level.
        shares: levels and their parts, "a2-b8" = 20 % a, 80 % b. Not used with `assign` "capacity".
    """

    widths: tuple[float, ...] = (1.0, 0.75, 0.7, 0.7)
    depths: tuple[int, ...] = ()
    budgets: tuple[float, ...] = ()
    measure: Measure = "macs"
    search: Search = "nested"
    grid: int = 16
    heads: str = "scalefl"
    gamma: float = 0.05
    temperature: float = 3.0
    distill_after: float = 0.25
    distillation: Distillation = "batch-mean"
    scaler: bool = True
    weights: Weights = "uniform"
    assign: Assign = "capacity"
    shares: str = "a1-b1-c1-d1"

    def __post_init__(self) -> None:
        self._check_levels()
        choices = {"measure": Measure, "search": Search, "distillation": Distillation}
        choices |= {"weights": Weights, "assign": Assign}
        known = {name: get_args(choice) for name, choice in choices.items()} | {"heads": tuple(HEADS)}
        for name, values in known.items():
            self._require(name, getattr(self, name) in values, f"one of {', '.join(values)}")
        self._require("grid", 1 <= self.grid <= 64, "in 1..64")
        self._require("gamma", 0 <= self.gamma < np.inf, ">= 0")
        self._require("temperature", 0 < self.temperature < np.inf, "> 0")
        self._require("distill_after", 0 <= self.distill_after <= 1, "a share of the rounds, in [0, 1]")
        if self.assign == "fix":
            self.parts_of_shares(len(self.budgets or self.widths))

    def _check_levels(self) -> None:
        w, b = self.widths, self.budgets
        falls = all(x >= y for x, y in pairwise(w)) and all(0 < x <= 1 for x in w)
        self._require(
            "widths", 1 <= len(w) <= len(LEVELS) and falls, "at most 1 and above 0, and none above the one before"
        )
        cheaper = all(x > y for x, y in pairwise(b)) and all(0 < x <= 1 for x in b)
        self._require("budgets", len(b) <= len(LEVELS) and cheaper, "falling shares of the network's cost, in (0, 1]")
        if self.depths:
            self._require("depths", len(self.depths) == len(w), f"one number of exits for each of {len(w)} widths")
            levels = [Level(width, exits) for width, exits in zip(w, self.depths, strict=True)]
            inside = self.depths[-1] >= 1 and all(x.holds(y) for x, y in pairwise(levels))
            self._require(
                "depths", inside, "at least 1, none above the one before, and each with its width another level"
            )

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"scalefl.{name.replace('_', '-')} must be {rule}, got {getattr(self, name)!r}")

    def parts_of_shares(self, num_levels: int) -> tuple[int, ...]:
        """What `shares` says of each level.

        Raises:
            ValueError: it is of other levels, or in another form.
        """
        try:
            return parse_shares(self.shares, num_levels)
        except ValueError as error:
            raise ValueError(f"scalefl.shares: {error}") from error

    @property
    def possible_widths(self) -> tuple[float, ...]:
        """Those that a level can have, largest first."""
        tried = tuple(level.width for level in grid(self.grid, 1))
        return tried if self.budgets else tuple(dict.fromkeys(self.widths))


def exits_of(config: ScaleFLConfig, stages: tuple[str, ...]) -> Exits:
    """The classifiers that the network gets."""
    return Exits(stages, config.heads)


# --- levels -------------------------------------------------------------------------------------------------------


def levels_of(task: Task) -> tuple[Level, ...]:
    """Width and depth of each level, largest first: as written, or found for the budgets.

    Raises:
        ValueError: a depth that the network does not have, or budgets below its smallest part.
    """
    config: ScaleFLConfig = task.method
    num_exits = len(depth_keys(task.factory))
    if config.budgets:
        try:
            return search(_grid_costs(task, grid(config.grid, num_exits)), config.budgets, config.search == "nested")
        except ValueError as error:
            way_out = "allow more, fewer levels, or smaller widths (scalefl.grid)"
            raise ValueError(f"scalefl.budgets, of the network's {config.measure}: {error}; {way_out}") from error
    depths = config.depths or evenly_deep(len(config.widths), num_exits)
    if depths[0] > num_exits:
        raise ValueError(
            f"scalefl.depths asks for {depths[0]} exits, the network has {num_exits}: lower it, or name more stages "
            "(the key stages)"
        )
    return tuple(map(Level, config.widths, depths))


def _grid_costs(task: Task, levels: Sequence[Level]) -> dict[Level, float]:
    """Cost of each level as a share of the full network's, all exits of either counted; of equal parts the widest."""
    made = {level: part_of_level(task.factory, task.layout, level) for level in levels}
    shapes = {level: tuple(narrow_shapes(task.layout, part).items()) for level, part in made.items()}
    widest = {shapes[level]: level for level in reversed(levels)}  # as `width_of` finds it
    parts = {level: made[level] for level in widest.values()}
    measures: dict[str, Callable[[Submodel], int]] = {
        "macs": task.macs,
        "parameters": lambda part: num_parameters(task.layout, part),
    }
    used = [of for name, of in measures.items() if task.method.measure in (name, "both")]
    whole = full(task.layout)
    return {level: max(of(part) / of(whole) for of in used) for level, part in parts.items()}


# --- the scaler ---------------------------------------------------------------------------------------------------


def width_of(task: Task, submodel: Submodel) -> float:
    """The width that a level's part was cut to.

    Raises:
        ValueError: no level has such units.
    """
    for width in task.method.possible_widths:
        if np.array_equal(prefix_ratio(task.layout, width, "floor").units, submodel.units):
            return float(width)
    raise ValueError("the units of this part are those of no width of scalefl.widths, or of the grid of scalefl.grid")


def scaled_layers(task: Task) -> tuple[str, ...]:
    """The convolutions that the scaler follows: all but those whose outputs are classes."""
    fixed, groups_of = task.layout.fixed, task.layout.groups_of
    found = _convolutions(task.factory)
    return tuple(name for name, axis in found if not fixed.intersection(groups_of(f"{name}.weight", axis)))


@lru_cache(maxsize=16)
def _convolutions(factory: Factory) -> tuple[tuple[str, int], ...]:
    """Names of the network's convolutions, and the axis of their outputs."""
    model = build_on_meta(factory)
    names = (name for name, module in model.named_modules() if isinstance(module, _ConvNd))
    return tuple((name, out_axis(model, f"{name}.weight")) for name in names)


def as_used(task: Task, submodel: Submodel, part: Arrays) -> Arrays:
    """A part as a plain network that computes what the part computes with the scaler."""
    if not task.method.scaler or (width := width_of(task, submodel)) == 1:
        return part
    return divide_weights(part, width, scaled_layers(task))


# --- training -----------------------------------------------------------------------------------------------------


def exit_loss(
    logits: Sequence[Tensor], labels: Tensor, gamma: float, temperature: float, distillation: Distillation
) -> Tensor:
    """2 / (M (M + 1)) * sum_j j * (CE(z_j) + [j < M] * gamma * T^2 * KL(softmax(z_M / T) || softmax(z_j / T))).

    Args:
        logits: z_1 to z_M of the exits, each (n, classes), the shallowest first.
        labels: int64 (n,).
        gamma: 0 = without distillation.
        temperature: T.
        distillation: "batch-mean": KL is a mean over the batch, and z_M in it a constant. "released": a mean over
            batch and classes, and z_M learns from it, too.
    """
    last, num = logits[-1], len(logits)
    total = num * functional.cross_entropy(last, labels)
    for j, student in enumerate(logits[:-1], start=1):
        own = functional.cross_entropy(student, labels)
        if gamma:
            own = own + gamma * temperature**2 * _divergence(last, student, temperature, distillation)
        total = total + j * own
    return 2 / (num * (num + 1)) * total


def _divergence(teacher: Tensor, student: Tensor, temperature: float, distillation: Distillation) -> Tensor:
    released = distillation == "released"
    log_q = functional.log_softmax((teacher if released else teacher.detach()) / temperature, dim=1)
    log_p = functional.log_softmax(student / temperature, dim=1)
    return (log_q.exp() * (log_q - log_p)).sum() / (student.numel() if released else len(student))


def gamma_in(config: ScaleFLConfig, server_round: int, num_rounds: int) -> float:
    """Weight of the distillation in a round, counted from 1, of all that the run is to have now."""
    return config.gamma if server_round > config.distill_after * num_rounds + 1e-9 else 0.0


def local_update(job: Job, task: Task, data: ClientData) -> Update:
    """Train the level with the losses of all its exits; the client's own model has the scaler in it."""
    config: ScaleFLConfig = task.method
    require_memory(job.device, job.submodel, task.memory_to_train)
    gamma = float(str(job.config["gamma"]))

    def loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        return exit_loss(model(inputs, every=True), labels, gamma, config.temperature, config.distillation)

    model = task.network(job.arrays)
    width = width_of(task, job.submodel) if config.scaler else 1.0
    with divide_outputs(model, width, scaled_layers(task)):
        trained = train_network(model, job, task, data.train, loss)
    update = make_update(job, task, job.submodel, job.arrays, trained, float(len(data.train.labels)))
    return replace(update, trained=Part(job.submodel, as_used(task, job.submodel, trained.arrays)))
