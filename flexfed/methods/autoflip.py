"""AutoFLIP: clients explore how far each parameter has to move, and what nobody moves far is pruned.

"Pruning Federated Models through Loss Landscape Analysis and Client Agreement Scoring" (Christian Internò, Elena
Raponi, Niki van Stein, Thomas Bäck, Markus Olhofer, Yaochu Jin, Barbara Hammer, Ali Raza, IEEE IoT-J 2026, arXiv
2405.10271; first version 2024 as "Automated Federated Learning via Informed Pruning").

Before round 1 clients train copies of the initial network by themselves and reply with the squared deviation of each
entry, nothing else. The mean over clients, made comparable within each tensor, is the guidance: high = important. A
quantile of it is pruned (`flexfed.methods.autoflip_masks`); in the rounds clients train under that mask, and the server
steps with momentum. The mask is the server's, so it travels down only, and only when it has changed.

A masked network computes densely: only `structured` makes it smaller, faster and lighter to train; what is reported as
`macs-forward` counts what is really computed. Exploration counts in round 1, and so in every total.

`fedlex` is the sibling method, "Federated Loss Exploration for Improved Convergence on Non-IID Data" (arXiv 2506.18640,
IJCNN 2024): no mask; from round 2 on clients multiply their gradients by the guidance before they are clipped. The
guidance travels as float32 with every job, which doubles the download.

Differences from the paper and its released code: the paper's text could not be obtained, what follows its abstracts and
its code. The code's exploration runs all clients one after the other on one network and keeps the last one's weights
only, and its clients never prune in the published setting; these defaults are the described algorithm, not the code's.
Ours, and not known to be the authors':
- The base of the deviations is the initial network for everybody, and clients reply with deviations, not weights.
- Early stopping looks at an epoch's mean loss; the code's looks at its last batch.
- Guards where a tensor has one value only, where the quantile is 0, and where all would be pruned.
- Normalisation's affine parameters are never pruned; the code prunes every named parameter, which is the same in
  its networks.
- Masks follow the round's cohort (`mask_mode`), and the server keeps what is masked now (`server_memory`): it may
  come back. What is published, evaluated and exported is always the masked network.
- The whole structured level (`flexfed.methods.autoflip_units`) and what travels.
- Baselines (`score`): magnitude and random masks of the same quantile, each through the same normalisation and
  threshold. The code's random baseline draws a new mask at every step.
- Client agreement (`agreement`): see `flexfed.methods.autoflip_masks.agreed_scores`.
- Batch norm's running statistics never travel in this project: whoever evaluates computes them.
- 10 epochs of exploration with a patience of 3 by default, because the published 150 and 40 would be most of a short
  run's work; configs/autoflip-*.toml have the published ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import nn

from flexfed.compute import place_of, seed_draws, state_numbers
from flexfed.cost import training_macs
from flexfed.jobs import Job, Task, Update, make_update, require_memory, train_network
from flexfed.methods.autoflip_masks import Normalise, squared_deviations
from flexfed.networks import build_on_meta
from flexfed.submodel import Submodel, flatten, unflatten
from flexfed.training import OPTIMIZERS, Step, Training, fit
from flexfed.units import Arrays, Layout

if TYPE_CHECKING:
    from flexfed.data import ClientData

Score = Literal["guidance", "magnitude", "random"]
MaskMode = Literal["per-round", "static"]
ServerMemory = Literal["dense", "hard"]
Structured = Literal["off", "closure", "units"]
Prunable = Literal["parameters", "matrices"]
ExploreWeights = Literal["uniform", "examples"]

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class AutoFLIPConfig:
    """What a run may set of AutoFLIP.

    Attributes:
        quantile: T_p, the share of the prunable entries that is pruned, in [0, 1).
        score: what is cut at the quantile: the "guidance", or as baselines without exploration the "magnitude" of the
            global model's entries, or "random" numbers drawn once for the run (ours).
        normalise: of each tensor's scores; see `flexfed.methods.autoflip_masks.guidance`.
        prunable: "parameters": all but normalisation's (ours), or only "matrices", which have two axes or more.
        mask_mode: a mask for each round from the deviations of its cohort ("per-round"), or one for all ("static").
        server_memory: masked entries keep their values on the server ("dense", ours), or become zero in every round
            ("hard"). With "static" masks the two are the same, and masked entries become zero.
        server_momentum: beta of v = beta v + (1 - beta) Delta, W = W - v; 0 = the masked mean.
        structured: "off", or units without a weight leave the network ("closure"), after those of the least mean
            score of each layer were masked ("units"); both ours.
        unit_share: T_s, the share of each layer's units that "units" masks, in [0, 1).
        agreement: scores count by how many explorers would keep an entry (ours).
        fedlex: no masks; clients multiply their gradients by the guidance.
        explore_fraction: share of the devices that explore, in (0, 1].
        explore_epochs: at most; 150 in the published commands.
        explore_patience: epochs without a better mean loss after which a client stops; 40 in the published commands.
        explore_optimizer: "adam" or "sgd", without momentum and weight decay.
        explore_learning_rate: its.
        explore_weights: of a client in the mean of the deviations; "uniform" is the released code.
    """

    quantile: float = 0.3
    score: Score = "guidance"
    normalise: Normalise = "minmax"
    prunable: Prunable = "parameters"
    mask_mode: MaskMode = "per-round"
    server_memory: ServerMemory = "dense"
    server_momentum: float = 0.9
    structured: Structured = "off"
    unit_share: float = 0.1
    agreement: bool = False
    fedlex: bool = False
    explore_fraction: float = 1.0
    explore_epochs: int = 10
    explore_patience: int = 3
    explore_optimizer: str = "adam"
    explore_learning_rate: float = 3e-4
    explore_weights: ExploreWeights = "uniform"

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str, ...]] = {
            "score": get_args(Score),
            "normalise": get_args(Normalise),
            "prunable": get_args(Prunable),
            "mask_mode": get_args(MaskMode),
            "server_memory": get_args(ServerMemory),
            "structured": get_args(Structured),
            "explore_optimizer": OPTIMIZERS,
            "explore_weights": get_args(ExploreWeights),
        }
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise ValueError(f"autoflip.{_key(key)} must be one of {', '.join(known)}, got {getattr(self, key)!r}")
        for key in ("quantile", "server_momentum", "unit_share"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"autoflip.{_key(key)} must be in [0, 1), got {getattr(self, key)}")
        if not 0 < self.explore_fraction <= 1:
            raise ValueError(f"autoflip.explore-fraction must be in (0, 1], got {self.explore_fraction}")
        for key in ("explore_epochs", "explore_patience"):
            if getattr(self, key) < 1:
                raise ValueError(f"autoflip.{_key(key)} must be at least 1, got {getattr(self, key)}")
        if not (math.isfinite(self.explore_learning_rate) and self.explore_learning_rate > 0):
            raise ValueError(f"autoflip.explore-learning-rate must be > 0, got {self.explore_learning_rate}")
        self._check_together()

    def _check_together(self) -> None:
        for key in ("agreement", "fedlex"):
            if getattr(self, key) and self.score != "guidance":
                raise ValueError(
                    f"autoflip.{key}=true needs deviations, autoflip.score={self.score!r} has none: leave the score at "
                    "'guidance'"
                )
        if self.fedlex and (self.structured != "off" or self.agreement):
            raise ValueError(
                "autoflip.fedlex=true prunes nothing: leave autoflip.structured='off' and autoflip.agreement=false"
            )

    @property
    def is_hard(self) -> bool:
        """Whether masked entries become zero on the server, too."""
        return self.server_memory == "hard" or self.mask_mode == "static"


def _key(name: str) -> str:
    return name.replace("_", "-")


def prunable_tensors(task: Task) -> frozenset[str]:
    """The parameters that may be masked: never buffers, never a normalisation's, by request only matrices."""
    model = build_on_meta(task.factory)
    norms = {name for name, module in model.named_modules() if isinstance(module, _NORMS)}
    names = (n for n, _ in model.named_parameters() if n in task.layout.shapes and n.rpartition(".")[0] not in norms)
    matrices_only = task.method.prunable == "matrices"
    return frozenset(n for n in names if not matrices_only or len(task.layout.shapes[n]) > 1)


# The server's step ------------------------------------------------------------------------------------------


def momentum_step(
    previous: Arrays, averaged: Arrays, velocity: Arrays, covered: Mapping[str, np.ndarray], beta: float
) -> tuple[Arrays, Arrays]:
    """Delta = previous - averaged; v = M (beta v + (1 - beta) Delta); W = previous - M v.

    No bias correction: the first step with beta = 0.9 is a tenth of FedAvg's, as in the released code. Masking v, so
    that it forgets entries that are pruned now, is ours.

    Args:
        previous: the global model before the round.
        averaged: the mean of what came back; equal to `previous` where nothing was sent.
        velocity: v of the round before; empty = 0.
        covered: tensor -> bool of its full shape, M.
        beta: 0 gives `averaged` itself.

    Returns:
        The new model and the new v.
    """
    if not beta:
        return averaged, {}
    new, moving = dict(averaged), {}
    for name, mask in covered.items():
        delta = np.subtract(previous[name], averaged[name])
        v = beta * velocity.get(name, np.zeros_like(delta)) + (1 - beta) * delta
        moving[name] = np.where(mask, v, 0).astype(np.float32)
        new[name] = previous[name] - moving[name]
    return new, moving


# The client -------------------------------------------------------------------------------------------------


class Patience:
    """Early stopping: go on until so many epochs in a row were no better than the best before.

    Args:
        limit: epochs.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._best = math.inf
        self._bad = 0
        self.epochs = 0

    def __call__(self, loss: float) -> bool:
        """Whether another epoch may follow one of this mean loss."""
        self.epochs += 1
        self._bad = 0 if loss < self._best else self._bad + 1
        self._best = min(loss, self._best)
        return self._bad < self._limit


def exploration(training: Training, config: AutoFLIPConfig) -> Training:
    """How clients explore: batches as in the rounds, an optimiser of its own."""
    return replace(
        training,
        optimizer=config.explore_optimizer,
        learning_rate=config.explore_learning_rate,
        momentum=0.0,
        weight_decay=0.0,
        local_epochs=config.explore_epochs,
        clip_norm=0.0,
    )


def explore(job: Job, task: Task, data: ClientData) -> Update:
    """Train a copy of the network, throw it away, and tell how far its prunable entries moved, squared."""
    config: AutoFLIPConfig = task.method
    task = replace(task, training=exploration(task.training, config))
    require_memory(job.device, job.submodel, task.memory_to_train)
    model, patience = task.network(job.arrays), Patience(config.explore_patience)
    seed_draws(job.seed, place_of(model))
    rng = np.random.default_rng(job.seed)
    result = fit(model, data.train, task.training, task.training.learning_rate, rng, go_on=patience)
    found = Submodel(job.submodel.units, prunable_tensors(task))
    moved = squared_deviations({n: a for n, a in job.arrays.items() if found.holds(n)}, state_numbers(model))
    macs = training_macs(task.macs(job.submodel), result.num_samples)
    metrics = {"macs": float(macs), "epochs": float(patience.epochs), "train-loss": result.loss}
    return Update(found, flatten(task.layout, found, moved), float(len(data.train.labels)), metrics)


MOST_DEVIATION = 1e18
"""Of an entry: a weight that moved by 1e9 learned nothing, and one such entry would decide the whole mask."""


def read_deviations(layout: Layout, expected: Submodel, update: Update) -> Arrays:
    """What an explorer found, tensor by tensor.

    Raises:
        ValueError: it speaks of other tensors, or of numbers that are no squares.
    """
    if update.submodel != expected:
        raise ValueError("it tells deviations of other tensors or units than it was asked to explore")
    if not ((update.difference >= 0) & (update.difference <= MOST_DEVIATION)).all():
        raise ValueError(
            f"its deviations should be squares, finite and >= 0, and at most {MOST_DEVIATION:.0e}; its exploration may "
            "have diverged"
        )
    return unflatten(layout, expected, update.difference)


def local_update(job: Job, task: Task, data: ClientData) -> Update:
    """Train under the mask that came with the part; masked entries are exactly zero after every step."""
    require_memory(job.device, job.submodel, task.memory_to_train)
    model = task.network(job.arrays)
    if "guidance" in job.config:
        scale_gradients(model, guidance_from(task, job.config["guidance"]))
    trained = train_network(model, job, task, data.train, step=masked_step(model, job.submodel.masks))
    return make_update(job, task, job.submodel, job.arrays, trained, float(len(data.train.labels)))


def masked_step(model: nn.Module, masks: Mapping[str, np.ndarray]) -> Step:
    """Mask the gradients, step, mask the weights: whatever the optimiser remembers, nothing leaks."""
    left_out = [
        (p, torch.from_numpy(~masks[name]).to(p.device)) for name, p in model.named_parameters() if name in masks
    ]

    def step(optimizer: torch.optim.Optimizer) -> None:
        for parameter, away in left_out:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(away, 0.0)
        optimizer.step()
        with torch.no_grad():
            for parameter, away in left_out:
                parameter.masked_fill_(away, 0.0)

    return step


def guidance_bytes(layout: Layout, prunable: frozenset[str], guidance: Mapping[str, np.ndarray]) -> bytes:
    """The guidance for the wire: float32, flat in wire order."""
    whole = Submodel(np.ones(layout.num_units, dtype=bool), prunable)
    return flatten(layout, whole, guidance).tobytes()


def guidance_from(task: Task, told: object) -> Arrays:
    """Undo `guidance_bytes`.

    Raises:
        ValueError: it does not fit the network.
    """
    whole = Submodel(np.ones(task.layout.num_units, dtype=bool), prunable_tensors(task))
    if not isinstance(told, bytes) or len(told) % 4:
        raise ValueError(f"the guidance of a job should be float32 numbers as bytes, got {type(told).__name__}")
    return unflatten(task.layout, whole, np.frombuffer(told, dtype="<f4"))


def scale_gradients(model: nn.Module, guidance: Mapping[str, np.ndarray]) -> None:
    """Multiply every gradient by the guidance as soon as it is computed: before it is clipped."""
    for name, parameter in model.named_parameters():
        if name in guidance:
            factor = torch.from_numpy(guidance[name].copy()).to(parameter.device)
            parameter.register_hook(factor.mul)  # type: ignore[no-untyped-call]
