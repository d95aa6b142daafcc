"""FedLPS: every client learns which units it needs, and a bandit learns how many it can afford.

"Learnable Sparse Customization in Heterogeneous Edge Computing" (Jingjing Xue, Sheng Sun, Min Liu, Yuwei Wang,
Zhuotao Liu, Jingyuan Wang, ICDE 2025, arXiv 2412.07216). A client keeps a score for each unit
(`flexfed.methods.fedlps_scores`); the units with the highest scores of each layer are its submodel; the server adds
up the differences of all clients' kept units. How many units is P-UCBV's choice (`flexfed.bandits`), and any other
`ratio-policy` works: "fixed" with `bandit.ratio = 0.5` is the ablation FLST (with `bandit.cap = "clip"`: the ratio is
0.5 where a device can hold that), "level" (as many as the device's capability) is RCR.

Differences from the paper and its released code: the paper's text could not be obtained, what follows its abstract and
its code. The code differs from the abstract in several places; these defaults are a corrected algorithm, not the
authors' (the switches that come near the code are named):
- Scores learn from the data, by a straight-through estimator. In the code no gradient of the data reaches them, and
  a broadcast pulls them all to one mean, so its masks stay nearly the first units: `pattern = "ordered"` comes near.
- Scores have an Adam of their own; with the weights' SGD (`score-optimizer = "shared-sgd"`) hardly anything is learned.
- Scores are kept from round to round; the code draws them anew (`score-reset`).
- k = floor(s J + 1e-9), at least 1; the code keeps one unit fewer.
- The mask is fixed for a round, so that a device need only hold and train a physically narrow network; the code takes
  a new mask at every batch, for which the device must hold everything (`mask-update = "batch"`).
- A masked unit is silent: its bias, and its scale and shift in a norm, are masked, too (`mask-bias = false`: not).
- The server knows the units of a client's next submodel because the reply tells their order, never the scores, in
  two bytes a unit. With `share-ranking = false` it does not, and every download is the whole network, as in the code.
- The mean is over the whole cohort, as in the code; it adds noise to every parameter in every round (`noise = 0.001`).
- In a narrow network the norm that the regulariser looks at is over the weights that the device holds, without those
  of inputs that were dropped.
- Where channels are tied (residual sums), they share one score.
- The proximal term, off by default, is a guess: whether the paper has it is not known.
- The bandit's reward counts multiply-accumulates of the network that was trained. Under `mask-update = "batch"` that
  is the whole network whatever the ratio, where the code counts the rows that are not masked.
- Replies tell the accuracy during training, as in the code, and none on validation samples: clients test their own
  models in every evaluation.
- In tests the code normalises by the batch; here a client's own model has the statistics of its training samples, the
  global one those of the proxy data (`batch-norm`).
- A client whose device is too weak for its own model in some round tests a part of the global one that it can hold:
  its best units by the ranking it told, or the first ones where it told none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from flexfed.compute import numbers, place_of
from flexfed.cost import part_bytes
from flexfed.jobs import Job, Part, Task, Trained, Update, make_update, require_memory, shrink, train_network
from flexfed.methods.fedlps_masked import MaskedNetwork
from flexfed.methods.fedlps_scores import Rows, ScoreLearner, Scores, initial_scores, kept_scores, unit_norms
from flexfed.select import top
from flexfed.submodel import Submodel, full
from flexfed.training import proximal
from flexfed.units import Arrays, Layout

if TYPE_CHECKING:
    from flexfed.data import ClientData

Pattern = Literal["learned", "random", "magnitude", "ordered"]
MaskUpdate = Literal["round", "batch"]
ScoreOptimizer = Literal["adam", "shared-sgd"]
ScoreScope = Literal["active", "all"]
Target = Literal["sigmoid-l1", "sigmoid-zscore-l1"]
Weights = Literal["uniform", "examples"]
Normalise = Literal["all", "coverage"]


@dataclass(frozen=True)
class FedLPSConfig:
    """What a run may set of FedLPS; the defaults are the corrected algorithm's.

    Attributes:
        pattern: which units: those of the highest "learned" scores, "random" ones drawn anew for every job, those of
            the largest L1 norm in the global model ("magnitude"), or the first ("ordered").
        mask_update: take the mask once a "round", or at every "batch" (the released code).
        mask_bias: a masked unit's bias and norm are masked, too; the released code leaves them.
        share_ranking: replies tell the order of the client's units, so that the next download can be narrow.
        score_optimizer: "adam", or the weights' own SGD ("shared-sgd", the released code).
        score_learning_rate: of Adam.
        score_scope: learn the scores of "active" units, or of "all", which needs masked training.
        score_reset: draw the scores anew for every job (the released code).
        importance_weight: lambda of the regulariser.
        importance_target: what it draws scores to; see `flexfed.methods.fedlps_scores.score_targets`.
        prox: mu of the proximal term mu / 2 ||w - w_t||^2.
        weights: of a client in the mean; "uniform" is the released code.
        normalise: divide by the weight of "all" of the cohort, as the released code, or by that of the "coverage".
        noise: standard deviation of the noise that the server adds to every parameter in every round.
    """

    method: ClassVar[str] = "fedlps"

    pattern: Pattern = "learned"
    mask_update: MaskUpdate = "round"
    mask_bias: bool = True
    share_ranking: bool = True
    score_optimizer: ScoreOptimizer = "adam"
    score_learning_rate: float = 0.05
    score_scope: ScoreScope = "active"
    score_reset: bool = False
    importance_weight: float = 1.0
    importance_target: Target = "sigmoid-l1"
    prox: float = 0.0
    weights: Weights = "uniform"
    normalise: Normalise = "all"
    noise: float = 0.0

    def __post_init__(self) -> None:
        choices = {
            "pattern": Pattern,
            "mask_update": MaskUpdate,
            "score_optimizer": ScoreOptimizer,
            "score_scope": ScoreScope,
            "importance_target": Target,
            "weights": Weights,
            "normalise": Normalise,
        }
        for key, known in choices.items():
            if getattr(self, key) not in get_args(known):
                listed = ", ".join(get_args(known))
                raise ValueError(f"fedlps.{_key(key)} must be one of {listed}, got {getattr(self, key)!r}")
        if not (np.isfinite(self.score_learning_rate) and self.score_learning_rate > 0):
            raise ValueError(f"fedlps.score-learning-rate must be > 0, got {self.score_learning_rate}")
        for key in ("importance_weight", "prox", "noise"):
            if not (np.isfinite(getattr(self, key)) and getattr(self, key) >= 0):
                raise ValueError(f"fedlps.{_key(key)} must be >= 0, got {getattr(self, key)}")
        if self.score_scope == "all" and not self.is_masked:
            raise ValueError(
                "fedlps.score-scope='all' needs the whole network on the device: set fedlps.mask-update='batch', or "
                "leave it at 'active'"
            )
        if self.pattern != "learned" and self.is_masked:
            raise ValueError(
                f"fedlps.pattern={self.pattern!r} has no masks that change: leave fedlps.mask-update='round' and "
                "fedlps.mask-bias=true"
            )

    @property
    def is_masked(self) -> bool:
        """Whether the device trains the whole network under a mask, not a narrow one."""
        return self.mask_update == "batch" or not self.mask_bias

    @property
    def is_told(self) -> bool:
        """Whether the server chooses the units, by what clients told of their scores or by a rule of its own."""
        return not self.is_masked and (self.share_ranking or self.pattern != "learned")


def _key(name: str) -> str:
    return name.replace("_", "-")


# Which units ------------------------------------------------------------------------------------------------


def ranking_of(layout: Layout, scores: np.ndarray) -> bytes:
    """The units of each group that may be cut from the best to the worst: uint16 places within the group.

    Raises:
        ValueError: a group has more than 65,536 units.
    """
    orders = []
    for group, span in _cut_groups(layout).items():
        if len(span) > 2**16:
            raise ValueError(f"group {group!r} has {len(span)} units; a ranking tells of at most 65536")
        orders.append(np.argsort(-scores[span.start : span.stop], kind="stable").astype("<u2"))
    return np.concatenate(orders).tobytes() if orders else b""


def scores_from(layout: Layout, ranking: bytes) -> np.ndarray:
    """Scores in the order that a ranking tells, float64 (num_units,): 0 for the best unit of a group, -1, ...

    Raises:
        ValueError: it is not a ranking of this network's units.
    """
    groups = _cut_groups(layout)
    expected = sum(len(span) for span in groups.values())
    if len(ranking) != 2 * expected:
        raise ValueError(f"a ranking of {expected} units should be {2 * expected} bytes, got {len(ranking)}")
    order, scores, start = np.frombuffer(ranking, dtype="<u2"), np.zeros(layout.num_units), 0
    for group, span in groups.items():
        places = order[start : start + len(span)].astype(np.int64)
        if not np.array_equal(np.sort(places), np.arange(len(span))):
            raise ValueError(f"a ranking should name each of the {len(span)} units of group {group!r} once")
        scores[span.start + places] = -np.arange(len(span))
        start += len(span)
    return scores


def _cut_groups(layout: Layout) -> dict[str, range]:
    return {group: span for group, span in layout.groups.items() if group not in layout.fixed}


def ranked_scores(config: FedLPSConfig, layout: Layout, ranking: bytes, rng: np.random.Generator) -> np.ndarray:
    """What units are sorted by without looking at the model, (num_units,).

    Args:
        config: its pattern counts.
        layout: the network's numbering.
        ranking: what the client told last; empty = nothing yet, so the first units, as its first scores are sorted.
        rng: of this client and round.
    """
    if config.pattern == "random":
        return rng.random(layout.num_units)
    if config.pattern == "learned" and ranking:
        return scores_from(layout, ranking)
    return np.zeros(layout.num_units)


def model_norms(layout: Layout, model: nn.Module, arrays: Arrays) -> np.ndarray:
    """L1 norms of a full model's units, (num_units,): what the pattern "magnitude" sorts by.

    Args:
        layout: the network's numbering.
        model: the network, on `meta`: its modules tell which axis holds a layer's outputs.
        arrays: the model.
    """
    rows = Rows(layout, full(layout), model, vectors=False)
    return unit_norms(rows, {name: torch.from_numpy(np.asarray(a)) for name, a in arrays.items()}).numpy()


def add_noise(arrays: Arrays, deviation: float, rng: np.random.Generator) -> Arrays:
    """Normal noise on every parameter; not a calibrated privacy mechanism."""
    return {n: a + deviation * rng.standard_normal(a.shape, dtype=np.float32) for n, a in arrays.items()}


# The client -------------------------------------------------------------------------------------------------


def local_update(job: Job, task: Task, data: ClientData) -> Update:
    """Train the kept units, and the scores beside them."""
    config: FedLPSConfig = task.method
    weight = float(len(data.train.labels))
    if config.pattern != "learned":
        require_memory(job.device, job.submodel, task.memory_to_train)
        trained = _train_narrow(job, task, data, job.submodel, job.arrays, None)
        return make_update(job, task, job.submodel, job.arrays, trained, weight)
    learner = ScoreLearner(_scores(job, task).to(task.place), task, task.training.rate_at(job.server_round))
    update = (_masked_update if config.is_masked else _narrow_update)(job, task, data, learner, weight)
    told = {"ranking": ranking_of(task.layout, numbers(learner.scores.values))} if config.is_told else {}
    return replace(update, state=learner.scores.arrays(), told=told)


def _scores(job: Job, task: Task) -> Scores:
    """What the client has learned so far; drawn at its first job."""
    if job.state and not task.method.score_reset:
        scores = kept_scores(job.state)
        shared = task.method.score_optimizer == "shared-sgd"  # a fresh optimiser, as the weights have
        return replace(scores, first=torch.zeros_like(scores.first)) if shared else scores
    return initial_scores(task.layout, np.random.default_rng([job.seed, 3]))


def _narrow_update(job: Job, task: Task, data: ClientData, learner: ScoreLearner, weight: float) -> Update:
    """A physically narrow network: the server's choice of units, or a choice of the device's own out of all."""
    submodel, arrays = job.submodel, job.arrays
    if not task.method.is_told:
        ratio = float(str(job.config["ratio"]))
        submodel = top(task.layout, numbers(learner.scores.values), ratio, "floor")
        arrays = shrink(task.layout, job.submodel, submodel, job.arrays)
    require_memory(job.device, submodel, task.memory_to_train)
    trained = _train_narrow(job, task, data, submodel, arrays, learner)
    return make_update(job, task, submodel, arrays, trained, weight)


def _train_narrow(
    job: Job, task: Task, data: ClientData, submodel: Submodel, arrays: Arrays, learner: ScoreLearner | None
) -> Trained:
    model = task.network(arrays)
    start = {n: p.detach().clone() for n, p in model.named_parameters()} if task.method.prox else {}
    rows = Rows(task.layout, submodel, model, vectors=True)
    active = torch.from_numpy(submodel.units.copy()).to(place_of(model))

    products: dict[str, Tensor] = {}  # tensor -> sums over units; of the loss alone, not clipped, without the term

    def note(name: str, weight: Tensor, gradient: Tensor) -> None:
        products[name] = rows.sums({name: gradient * weight.detach()})

    def loss(network: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        seen = {n: p.view_as(p) for n, p in network.named_parameters() if p.requires_grad}
        for name, parameter in network.named_parameters():
            if learner is not None and name in seen:
                seen[name].register_hook(partial(note, name, parameter))  # type: ignore[no-untyped-call]
        logits: Tensor = functional_call(network, seen, (inputs,))
        return functional.cross_entropy(logits, labels) + proximal(network, start, task.method.prox)

    def step(optimizer: torch.optim.Optimizer) -> None:
        if learner is not None:
            with torch.no_grad():
                tensors = dict(model.named_parameters())
                total = sum(
                    (products[n] for n in tensors if n in products), torch.zeros(rows.num_units, device=active.device)
                )
                learner.learn(total, unit_norms(rows, tensors), active, active)
        optimizer.step()

    return train_network(model, job, task, data.train, loss, step)


def _masked_update(job: Job, task: Task, data: ClientData, learner: ScoreLearner, weight: float) -> Update:
    """The whole network under masks; the rows that the last mask kept are sent."""
    copies = 4 * part_bytes(task.layout, full(task.layout))  # masked weights, their gradients, and what is put back
    require_memory(job.device, full(task.layout), lambda part: task.memory_to_train(part) + copies)
    config: FedLPSConfig = task.method
    network = MaskedNetwork(task, job.arrays, learner, float(str(job.config["ratio"])))
    trained = train_network(network.model, job, task, data.train, network.loss, network.step)
    cut = Submodel(network.units, cut="rows" if config.mask_bias else "weight-rows")
    update = make_update(job, task, full(task.layout), job.arrays, trained, weight, reported=cut)
    return replace(update, trained=_personal(task, trained.arrays, network))


def _personal(task: Task, arrays: Arrays, network: MaskedNetwork) -> Part:
    """The client's own model under its last mask: narrow where masked units are silent, else whole with zero rows."""
    kept = Submodel(network.units)
    if task.method.mask_bias:
        return Part(kept, shrink(task.layout, full(task.layout), kept, arrays))
    return Part(full(task.layout), {n: np.where(network.mask_of(n), a, 0).astype(a.dtype) for n, a in arrays.items()})
