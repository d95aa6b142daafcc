"""Compressed local models: every device trains the global model as compressed as it needs it.

"Towards a Federated Learning Framework for Heterogeneous Devices of Internet of Things" (Huanle Zhang, Jeonghoon Kim,
arXiv 2105.14675, 2021). Its abstract says: a device's local model is the global model, compressed; the gradients of
the compressed models update the global model, which stays uncompressed.

Differences from the paper: only its abstract could be obtained, and there is no released code. *Nothing else here is
the authors'*: which compressors, who gets which, how a gradient is mapped back, weights, steps and defaults are our
choices, most of them after well-established work:
- Tiers (`flexfed.methods.compressed_tiers`): magnitude pruning (Han et al., NeurIPS 2015), width (HeteroFL, Diao et
  al., ICLR 2021), 8- and 4-bit weights (`flexfed.codecs`; Jacob et al., CVPR 2018), pruned, then quantised. A device
  gets the first tier of the ladder that it can hold, as HeteroFL's discrete levels; see `memory`.
- Compression starts from the dense model in every round. The server never keeps a compressed one, and a device never
  sees the dense one: a quantised tier is sent integers and their scales, a pruned one the weights it keeps.
- Pruned weights stay exactly zero while a device trains. Quantised ones have a float latent that begins at what was
  sent; every forward pass sees its nearest levels, and the gradient passes straight through (Bengio, Leonard,
  Courville, 2013, arXiv 1308.3432). Scales stay for the round. A device needs float memory for the latents: quantising
  saves bytes on the wire and in storage, not training memory in torch. The same goes for pruning; a narrow width saves
  memory and time.
- What comes back is a difference from what was *sent* (`mode`), so that the compression error never enters the global
  model as an update. It counts where the device held the entry; see `aggregate`.
- Quantised tiers reply in 8 bits, too, rounded at random without bias (`reply-codec`): ours.
- Biases and norms are never pruned or quantised, and the class outputs never cut.
- Not here: given clips, scales per channel, low-rank tiers, HeteroFL's scaler and masked loss, and any speed-up of
  sparse or integer arithmetic: MACs are those of the dense network, as on common devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from flexfed.codecs import CODECS, largest_code, quantise, scale_of
from flexfed.compute import numbers
from flexfed.cost import part_bytes
from flexfed.jobs import Job, Part, Task, Update, make_update, require_memory, train_network
from flexfed.methods.compressed_server import pseudo_gradient
from flexfed.methods.compressed_tiers import Scope, Tier, parse_ladder, parse_tier
from flexfed.submodel import Submodel, flatten, narrow_shapes
from flexfed.training import Loss, Samples, Training, cross_entropy, plain_step
from flexfed.units import Arrays

if TYPE_CHECKING:
    from flexfed.data import ClientData

Mode = Literal["delta", "pseudo", "grad"]
Selection = Literal["prefix", "rolling", "l1", "random"]
Aggregate = Literal["coverage", "zero-fill"]
Memory = Literal["training", "model"]

LADDER = ("full", "w50", "p50", "q8", "p50q8", "w25", "q4", "p90")


@dataclass(frozen=True)
class CompressedConfig:
    """What a run may set of compressed local models; all of it is ours.

    Attributes:
        ladder: tiers, the one that a device should rather have first; see `flexfed.methods.compressed_tiers`.
        width_selection: units of a width: the first ("prefix"), a window that rolls on every round ("rolling"), those
            of the largest L1 norm of incoming weights ("l1"; Li et al., ICLR 2017), or drawn for each client and round
            ("random").
        prune_scope: keep the largest weights of each "layer", or of the "global" model.
        memory: what a device that tells its memory must have: what torch needs to train the narrow, but dense network
            ("training"), or the compressed model and a gradient of what it keeps ("model"), for hardware that computes
            on compressed weights. One that tells its capacity only is compared with the bytes of the compressed model,
            as a share of the dense one's.
        mode: what a reply holds: the whole difference ("delta"), the mean gradient of its steps ("pseudo", which needs
            plain SGD), or one gradient of the local loss, over all samples ("grad"). "pseudo" is for clients that take
            equal numbers of steps, where it is the same: the server's step is the mean number of steps long for all
            entries, also for those that only a client of few steps covers. With Dirichlet 0.1 that diverged
            (benchmarks/results/compressed-claim.md), hence the default.
        aggregate: a mean over the replies that "coverage" an entry, or over all, with zeros from the others
            ("zero-fill").
        alpha: replies weigh n (1 - compression error)^alpha.
        server_learning_rate: of the step W - eta V; in mode pseudo, times the local rate and the mean number of steps.
            0 = 1, and in mode grad the round's local learning rate.
        server_momentum: mu of V = mu V + A.
        freeze_uncovered: entries that no reply covers keep W and V; without it, V decays there and still moves W.
        reply_codec: of the replies of quantised tiers; others reply as the run's `codec` says.
    """

    method: ClassVar[str] = "compressed"

    ladder: tuple[str, ...] = LADDER
    width_selection: Selection = "prefix"
    prune_scope: Scope = "layer"
    memory: Memory = "training"
    mode: Mode = "delta"
    aggregate: Aggregate = "coverage"
    alpha: float = 0.0
    server_learning_rate: float = 0.0
    server_momentum: float = 0.0
    freeze_uncovered: bool = False
    reply_codec: str = "int8"

    def __post_init__(self) -> None:
        choices: dict[str, Any] = {
            "width_selection": get_args(Selection),
            "prune_scope": get_args(Scope),
            "memory": get_args(Memory),
            "mode": get_args(Mode),
            "aggregate": get_args(Aggregate),
            "reply_codec": tuple(CODECS),
        }
        for key, known in choices.items():
            if getattr(self, key) not in known:
                listed = ", ".join(known)
                raise ValueError(f"compressed.{_key(key)} must be one of {listed}, got {getattr(self, key)!r}")
        for name in ("alpha", "server_learning_rate"):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"compressed.{_key(name)} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.server_momentum < 1:
            raise ValueError(f"compressed.server-momentum must be in [0, 1), got {self.server_momentum}")
        try:
            parse_ladder(self.ladder)
        except ValueError as error:
            raise ValueError(f"compressed.ladder: {error}") from error

    @cached_property
    def tiers(self) -> dict[str, Tier]:
        """The ladder."""
        return parse_ladder(self.ladder)

    def mode_for(self, training: Training) -> Mode:
        """What replies hold in a run.

        Raises:
            ValueError: "pseudo" with an optimiser whose steps are not learning rate times gradient.
        """
        is_plain = training.optimizer == "sgd" and not training.momentum
        if self.mode == "pseudo" and not is_plain:
            raise ValueError(
                f"compressed.mode='pseudo' divides by learning rate and steps, which needs plain SGD, got optimizer="
                f"{training.optimizer!r} with momentum {training.momentum:g}: set momentum=0.0, or leave mode='delta'"
            )
        return self.mode


def _key(name: str) -> str:
    return name.replace("_", "-")


def memory_to_train(task: Task, part: Submodel, tier: Tier) -> int:
    """Bytes that must be free to train a received part in torch: of the narrow dense network, and what comes on top.

    An upper bound: masks are a byte a weight, and the gradient of one tensor is there twice while it is masked; where
    weights are quantised, the forward pass holds their levels, and of one tensor what it rounds, though not while the
    optimiser steps. Mode "grad" gathers gradients.
    """
    dense = Submodel(part.units)
    sizes = [math.prod(shape) for shape in narrow_shapes(task.layout, dense).values() if len(shape) > 1]
    weights, largest = sum(sizes), max(sizes, default=0)
    masks = weights + 4 * largest if tier.prune else 0
    levels = 4 * (weights + largest) if tier.bits < 32 else 0
    gathered = part_bytes(task.layout, dense) if task.method.mode == "grad" else 0
    return task.memory_to_train(dense) + masks + levels + gathered


def training_in(mode: Mode, training: Training) -> Training:
    """How a device goes through its samples: in mode "grad" once, all of them, and gradients are not clipped."""
    return replace(training, local_epochs=1, drop_last=False, clip_norm=0.0) if mode == "grad" else training


def num_steps(num_examples: int, training: Training) -> int:
    """Steps of local training at most, of so many examples."""
    return training.local_epochs * -(-num_examples // training.batch_size)


# --- the client -----------------------------------------------------------------------------------------------------


def local_update(job: Job, task: Task, data: ClientData) -> Update:
    """Train the compressed model that came, and send back its gradient, negated as differences are."""
    config: CompressedConfig = task.method
    tier, mode = parse_tier(str(job.config["tier"])), config.mode_for(task.training)
    require_memory(job.device, job.submodel, lambda part: memory_to_train(task, part, tier))
    network = CompressedNetwork(task.network(job.arrays), job.submodel.masks, tier.bits)
    if mode == "grad":
        return _gradient_update(job, task, network, data.train)
    trained = train_network(network.model, job, task, data.train, network.loss(), network.step)
    update = make_update(job, task, job.submodel, job.arrays, trained, float(len(data.train.labels)))
    update = replace(update, trained=Part(job.submodel, network.on_levels(trained.arrays)))
    if mode == "pseudo":
        rate = task.training.rate_at(job.server_round)
        update = replace(update, difference=pseudo_gradient(update.difference, rate, network.num_steps))
    return replace(update, metrics={**update.metrics, "steps": float(network.num_steps)})


def _gradient_update(job: Job, task: Task, network: CompressedNetwork, samples: Samples) -> Update:
    """One gradient of the local loss, over all samples in batches; gradients are not clipped."""
    gathered = MeanGradient(network.model)
    once = replace(task, training=training_in("grad", task.training))
    loss = gathered.loss(network.loss())
    found = train_network(network.model, job, once, samples, loss, gathered.step)
    unchanged = found._replace(arrays=job.arrays)
    update = make_update(job, task, job.submodel, job.arrays, unchanged, float(len(samples.labels)))
    gradient = {name: np.zeros_like(array) for name, array in job.arrays.items()} | gathered.result()
    difference = -flatten(task.layout, job.submodel, gradient)
    return replace(update, difference=difference, metrics={**update.metrics, "steps": 1.0})


class CompressedNetwork:
    """A local model that stays as compressed as it came while it trains.

    Args:
        model: with the tensors that came: zero where pruned, on their levels where quantised.
        masks: tensor -> bool, the weights that are kept.
        bits: of a weight; 32 = not quantised.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, np.ndarray], bits: int = 32):
        self.model = model
        self.num_steps = 0
        self._bits = bits
        self._scales: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if bits < 32 and parameter.ndim > 1:  # the very scale that the server decoded with
                self._scales[name] = torch.tensor(scale_of(numbers(parameter), bits))
            if name in masks and parameter.requires_grad:  # before gradients are clipped, and whatever the optimiser
                mask = torch.from_numpy(np.array(masks[name])).to(parameter.device)
                parameter.register_hook(partial(torch.mul, mask))  # type: ignore[no-untyped-call]

    def loss(self, base: Loss = cross_entropy) -> Loss:
        """A loss of the weights' nearest levels; `base` itself where nothing is quantised."""

        def of_levels(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
            tensors = {n: p for n, p in model.named_parameters() if n in self._scales}
            levels = {n: straight_through(p, self._scales[n], self._bits) for n, p in tensors.items()}
            return base(cast(nn.Module, partial(functional_call, model, levels)), inputs, labels)

        return of_levels if self._scales else base

    def on_levels(self, arrays: Arrays) -> Arrays:
        """Trained tensors as the device would use them: quantised ones on their levels, no latents."""
        scales = {name: np.float32(scale) for name, scale in self._scales.items()}
        return {n: quantise(a, self._bits, scales[n]) if n in scales else a for n, a in arrays.items()}

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One step of the weights that are kept: a weight that is zero, and its gradient, too, stays zero."""
        plain_step(optimizer)
        self.num_steps += 1


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, scale: Tensor, most: int, clips: bool) -> Tensor:
        ctx.inside = (latent.abs() <= scale * most) if clips else None
        return torch.round(latent / scale).clamp_(-most, most).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient = gradients[0] if ctx.inside is None else gradients[0] * ctx.inside
        return gradient, None, None, None


def straight_through(latent: Tensor, scale: Tensor, bits: int, clips: bool = False) -> Tensor:
    """The nearest levels, half to even, with the gradient of the identity.

    Args:
        latent: float weights.
        scale: the step between two levels, for all of them.
        bits: of a level.
        clips: the scale is not that of the largest weight: there is no gradient for what lies beyond the last level.
            (With that of the largest weight nothing does, by definition; rounding would find otherwise.)
    """
    levels: Tensor = _StraightThrough.apply(latent, scale, largest_code(bits), clips)
    return levels


class MeanGradient:
    """The gradient of a mean over all samples, gathered batch by batch; its step takes the place of the optimiser's."""

    def __init__(self, model: nn.Module):
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._sums = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        self._seen = self._in_batch = 0

    def loss(self, base: Loss) -> Loss:
        """`base`, and a note of how many samples it was of."""

        def noted(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
            self._in_batch = len(labels)
            return base(model, inputs, labels)

        return noted

    def step(self, _: torch.optim.Optimizer) -> None:
        """Add the batch's gradient; the weights stay."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._sums[name].add_(parameter.grad, alpha=self._in_batch)
        self._seen += self._in_batch

    def result(self) -> Arrays:
        """Tensor -> mean gradient over the samples seen."""
        return {name: numbers(total / self._seen) for name, total in self._sums.items()}
