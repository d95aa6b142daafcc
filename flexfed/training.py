"""Train and evaluate a network on samples in memory; what a device does with the part it received."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from flexfed.compute import FLOAT32, PRECISIONS, computing, numbers, place_of
from flexfed.networks import outputs, predicted

OPTIMIZERS = ("sgd", "adam")


class Samples(NamedTuple):
    """Inputs, float32 (n, ...), and labels, int64 (n,)."""

    inputs: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Samples:
        """The same on a device; tensors that are there stay."""
        return Samples(self.inputs.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Training:
    """How a device trains; the shared knobs of every method.

    Attributes:
        learning_rate: of round 1; multiplied by `learning_rate_decay` after every round.
        clip_norm: gradients are scaled down to this norm; 0 = they are not.
        drop_last: leave out a last batch that is not full, where another remains.
        precision: in which clients multiply while they train, and everybody while networks are tested: "float32" or
            "bfloat16" (`flexfed.compute.computing`). What travels and what is averaged is float32 in any case.
    """

    learning_rate: float = 0.1
    learning_rate_decay: float = 0.998
    momentum: float = 0.5
    weight_decay: float = 1e-4
    optimizer: str = "sgd"
    local_epochs: int = 2
    batch_size: int = 16
    clip_norm: float = 0.0
    drop_last: bool = True
    precision: str = FLOAT32

    def __post_init__(self) -> None:
        for key, low in (("learning_rate", 0.0), ("learning_rate_decay", 0.0)):
            if not (math.isfinite(getattr(self, key)) and getattr(self, key) > low):
                raise ValueError(f"{key.replace('_', '-')} must be > 0, got {getattr(self, key)}")
        for key in ("momentum", "weight_decay", "clip_norm"):
            if not (math.isfinite(getattr(self, key)) and getattr(self, key) >= 0):
                raise ValueError(f"{key.replace('_', '-')} must be >= 0, got {getattr(self, key)}")
        for key, least in (("local_epochs", 1), ("batch_size", 2)):
            if getattr(self, key) < least:
                raise ValueError(f"{key.replace('_', '-')} must be at least {least}, got {getattr(self, key)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}; known: {', '.join(OPTIMIZERS)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; known: {', '.join(PRECISIONS)}")

    def rate_at(self, server_round: int) -> float:
        """Learning rate of a round, counted from 1."""
        return float(self.learning_rate * self.learning_rate_decay ** (server_round - 1))


@dataclass(frozen=True)
class FitResult:
    """What training showed of itself.

    Attributes:
        loss: mean over the samples seen in the last epoch.
        num_samples: trained on in all.
        accuracy: share of samples that were right just before they were learned from; mean over the epochs.
    """

    loss: float
    num_samples: int
    accuracy: float


@dataclass(frozen=True)
class Evaluation:
    """Sums over samples, so that evaluations add up."""

    correct: int
    loss_sum: float
    num_samples: int

    @property
    def accuracy(self) -> float:
        """Share of samples whose highest logit is their label."""
        return self.correct / self.num_samples if self.num_samples else math.nan

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return self.loss_sum / self.num_samples if self.num_samples else math.nan

    def __add__(self, other: Evaluation) -> Evaluation:
        """Of the samples of both."""
        return Evaluation(
            self.correct + other.correct, self.loss_sum + other.loss_sum, self.num_samples + other.num_samples
        )


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(network, inputs, labels) -> scalar loss of one batch."""

Step = Callable[[torch.optim.Optimizer], None]
"""What follows a batch's backward pass: an update of the weights, and of whatever a method learns beside them."""

GoOn = Callable[[float], bool]
"""Mean loss of an epoch -> whether another may follow."""


def cross_entropy(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Plain cross-entropy of one batch."""
    return functional.cross_entropy(model(inputs), labels)


def proximal(model: nn.Module, start: Mapping[str, Tensor], weight: float) -> Tensor:
    """(weight / 2) * ||w - w_0||^2 over the parameters; nothing where the weight is 0.

    Args:
        model: whose parameters are w.
        start: parameter name -> w_0.
        weight: mu.
    """
    if not weight:
        return torch.zeros(())
    return weight / 2 * torch.stack([((p - start[n]) ** 2).sum() for n, p in model.named_parameters()]).sum()


def plain_step(optimizer: torch.optim.Optimizer) -> None:
    """One step of the weights alone."""
    optimizer.step()


def always(_: float) -> bool:
    """All epochs."""
    return True


def use_batch_statistics(model: nn.Module) -> nn.Module:
    """Batch norm without running statistics, in training and in evaluation; in place."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model


def fit(
    model: nn.Module,
    samples: Samples,
    training: Training,
    learning_rate: float,
    rng: np.random.Generator,
    loss: Loss = cross_entropy,
    step: Step = plain_step,
    go_on: GoOn = always,
    answering: Sequence[nn.Module] = (),
) -> FitResult:
    """Train a network in place, where it is, with a fresh optimiser.

    Args:
        model: trained in place; put in train mode.
        samples: at least two; moved to the network's device, all at once.
        training: epochs, batch, optimiser, precision.
        learning_rate: of this round.
        rng: draws the order of samples.
        loss: of one batch.
        step: what follows each backward pass, after gradients were clipped.
        go_on: asked after each epoch: early stopping.
        answering: modules that answer for the network; how accurate it was is told by the last output of any of
            them. By default the network itself.

    Raises:
        ValueError: fewer than two samples (batch norm has no statistics then).
    """
    if len(samples.labels) < 2:
        raise ValueError(f"training needs at least 2 samples, got {len(samples.labels)}")
    model.train()
    optimizer = build_optimizer(model, training, learning_rate)
    place = place_of(model)
    samples = samples.to(place)
    seen = 0
    right: list[float] = []
    with _LastOutput(answering or (model,)) as logits:
        for _ in range(training.local_epochs):
            losses: list[tuple[Tensor, int]] = []  # read when the epoch is over: a GPU need not wait at every batch
            answers: list[tuple[Tensor, Tensor]] = []
            in_epoch = 0
            for batch in batches(samples, training.batch_size, rng, training.drop_last):
                optimizer.zero_grad(set_to_none=True)
                with computing(place, training.precision):
                    value = loss(model, batch.inputs, batch.labels)
                value.backward()  # type: ignore[no-untyped-call]
                if training.clip_norm:
                    nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
                step(optimizer)
                losses.append((value.detach(), len(batch.labels)))
                answers.append((logits.value.argmax(1), batch.labels))
                in_epoch += len(batch.labels)
            seen += in_epoch
            right.append(_num_right(answers) / in_epoch)
            mean_loss = _sum(losses) / in_epoch
            if not go_on(mean_loss):
                break
    optimizer.zero_grad(set_to_none=True)  # gradients are as large as the network
    return FitResult(mean_loss, seen, float(np.mean(right)))


def _sum(losses: Sequence[tuple[Tensor, int]]) -> float:
    """Of batches' mean losses, each times its number of samples; in float64, one by one."""
    total = 0.0  # not `sum`, which adds up floats in other ways from Python 3.12 on
    for value, (_, num) in zip(numbers(torch.stack([value for value, _ in losses])).tolist(), losses, strict=True):
        total += value * num
    return total


def _num_right(answers: Sequence[tuple[Tensor, Tensor]]) -> int:
    """Samples that were answered right, in batches of (answers, labels)."""
    given, labels = (torch.cat(each) for each in zip(*answers, strict=True))
    return int(torch.count_nonzero(given == labels))


class _LastOutput:
    """What one of these modules last gave, whichever loss asked for it; a context manager."""

    value: Tensor

    def __init__(self, modules: Sequence[nn.Module]):
        self._modules = modules

    def __enter__(self) -> _LastOutput:
        def remember(model: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            self.value = predicted(model, output).detach()

        self._handles = [module.register_forward_hook(remember) for module in self._modules]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def samples_trained(num_examples: int, training: Training) -> int:
    """Samples that `fit` trains on in all, given so many examples."""
    rest = num_examples % training.batch_size
    left_out = rest if num_examples > rest and (training.drop_last or rest == 1) else 0
    return training.local_epochs * (num_examples - left_out)


def build_optimizer(model: nn.Module, training: Training, learning_rate: float) -> torch.optim.Optimizer:
    """A fresh optimiser over the parameters that are not frozen."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if training.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate, weight_decay=training.weight_decay)
    return torch.optim.SGD(parameters, lr=learning_rate, momentum=training.momentum, weight_decay=training.weight_decay)


def batches(
    samples: Samples, size: int, rng: np.random.Generator | None = None, drop_last: bool = False
) -> Iterator[Samples]:
    """Batches of `size`, in order or shuffled, where the samples are.

    A last batch of one sample is left out where another batch remains: batch norm has no variance there.
    """
    num = len(samples.labels)
    order = torch.from_numpy(np.arange(num) if rng is None else rng.permutation(num)).to(samples.inputs.device)
    for start in range(0, num, size):
        index = order[start : start + size]
        short = len(index) < size
        if start and ((short and drop_last) or (rng is not None and len(index) == 1)):
            return
        yield Samples(samples.inputs[index], samples.labels[index])


@torch.no_grad()
def evaluate(model: nn.Module, samples: Samples, batch_size: int = 128, precision: str = FLOAT32) -> Evaluation:
    """Test a network in eval mode, where it is, in the order given; the mode it was in is restored."""
    return evaluate_exits(model, samples, batch_size, precision)[0]


@torch.no_grad()
def evaluate_exits(
    model: nn.Module, samples: Samples, batch_size: int = 128, precision: str = FLOAT32
) -> list[Evaluation]:
    """The same of the network's prediction, and behind it of each of its exits, the shallowest first, if it has any."""
    training = model.training
    model.eval()
    place = place_of(model)
    found: list[Evaluation] = []
    for batch in batches(samples.to(place), batch_size):
        with computing(place, precision):
            logits = tuple(map(_whole, outputs(model, batch.inputs)))
        tested = [predicted(model, logits), *logits] if len(logits) > 1 else [*logits]
        own = [_tested(each, batch.labels) for each in tested]
        found = [a + b for a, b in zip(found, own, strict=True)] if found else own
    model.train(training)
    return found or [Evaluation(0, 0.0, 0)]


def _whole(logits: Tensor) -> Tensor:
    """Logits in which a loss can be summed up."""
    return logits.float() if logits.dtype == torch.bfloat16 else logits


def _tested(logits: Tensor, labels: Tensor) -> Evaluation:
    loss = float(functional.cross_entropy(logits, labels, reduction="sum"))
    return Evaluation(int((logits.argmax(1) == labels).sum()), loss, len(labels))
