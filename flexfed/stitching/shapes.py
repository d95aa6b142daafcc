"""The self-made zoo: three small networks of four stages, and how they are pre-trained on procedural images.

Ours, for trials and tests without a model hub. Where the trained networks are kept: `flexfed.stitching.shelf`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from flexfed.data.shapes import PRETRAINING_IDS, SHAPE, balanced_images
from flexfed.stitching.sources import Source
from flexfed.training import Samples, batches

NUM_STAGES = 4


@dataclass(frozen=True)
class Pretraining:
    """How the zoo is pre-trained: SGD with a cosine schedule. Another recipe is another zoo.

    Attributes:
        ids: classes of the images.
        per_class: images of each.
        epochs: over all of them.
        seed: of images, initial weights and their order.
    """

    ids: tuple[int, ...] = PRETRAINING_IDS
    per_class: int = 220
    epochs: int = 6
    batch_size: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions with norms, plus a 1x1 projection of the input."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(before, width, 1, stride, bias=False)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, before, h, w) to (n, width, h / stride, w / stride), rounded up."""
        out: Tensor = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(out + self.shortcut(x))  # type: ignore[no-any-return]


def _conv(before: int, width: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(before, width, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(width), nn.ReLU()]


def _residual_stage(before: int, width: int, number: int) -> list[nn.Module]:
    stem = _conv(before, width) if number == 1 else []
    return [*stem, ResidualUnit(width if stem else before, width, stride=1 if stem else 2)]


def _plain_stage(before: int, width: int, number: int) -> list[nn.Module]:
    pool = [] if number == NUM_STAGES else [nn.MaxPool2d(2)]
    return [*_conv(before, width), *_conv(width, width), *pool]


def _separable_stage(before: int, width: int, number: int) -> list[nn.Module]:
    if number == 1:
        return [*_conv(before, width), *_conv(width, width, groups=width), *_conv(width, width, 1)]
    halved = [*_conv(before, before, stride=2, groups=before), *_conv(before, width, 1)]
    return [*halved, *_conv(width, width, groups=width), *_conv(width, width, 1)]


Stage = Callable[[int, int, int], list[nn.Module]]
"""(channels before, channels, number of the stage from 1) -> its layers."""

NETWORKS: dict[str, tuple[Stage, tuple[int, ...]]] = {
    "residual": (_residual_stage, (16, 32, 48, 64)),
    "plain": (_plain_stage, (12, 24, 48, 96)),
    "separable": (_separable_stage, (16, 24, 40, 80)),
}
"""Name -> its stages and their widths."""


def shapes_network(name: str, num_classes: int = len(PRETRAINING_IDS)) -> nn.Sequential:
    """One network of the zoo, untrained: stage1 to stage4, pooling, classifier."""
    make, widths = NETWORKS[name]
    befores = (SHAPE[0], *widths)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (before, width) in enumerate(zip(befores, widths, strict=False), start=1):
        layers[f"stage{number}"] = nn.Sequential(*make(before, width, number))
    head = OrderedDict(
        pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(1), classifier=nn.Linear(widths[-1], num_classes)
    )
    return nn.Sequential(layers | head)


def shapes_source(name: str) -> Source:
    """One of the three networks as a source: four units, none of which can be cut."""
    units = tuple((f"stage{number}",) for number in range(1, NUM_STAGES + 1))
    return Source(name, partial(shapes_network, name), units, SHAPE)


def pretrain(name: str, samples: Samples, recipe: Pretraining) -> dict[str, Tensor]:
    """Train one network from scratch, and give all its tensors; the same bits for the same recipe on one thread."""
    seed = np.random.default_rng([recipe.seed, list(NETWORKS).index(name)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed.integers(2**32)))
        model = shapes_network(name, len(recipe.ids))
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
    )
    steps = recipe.epochs * (len(samples.labels) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(recipe.epochs):
        for batch in batches(samples, recipe.batch_size, seed, drop_last=True):
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(model(batch.inputs), batch.labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return dict(model.state_dict())


def pretraining_samples(recipe: Pretraining) -> Samples:
    """The images that the zoo is trained on, normalised by their own mean and deviation per channel."""
    images, labels = balanced_images(recipe.ids, recipe.per_class, np.random.default_rng([recipe.seed, 1]))
    mean, deviation = (np.asarray(f(images, axis=(0, 2, 3), keepdims=True)) for f in (np.mean, np.std))
    return Samples(torch.from_numpy((images - mean) / deviation), torch.from_numpy(labels))
