"""Classifiers for early exits, one design a paper; any number of spatial axes, images and windows alike."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

Shape = tuple[int, ...]
"""Channels and spatial sizes of a stage's output."""

HeadDesign = Callable[[Sequence[Shape], int, int], nn.Module]
"""(shapes of all stages, the last one's included, index of the one that gets it, classes) -> its classifier."""

_CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_POOL: dict[int, type[nn.Module]] = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


def linear_head(shapes: Sequence[Shape], stage: int, num_classes: int) -> nn.Module:
    """Global average pool and one linear layer; of flat features the layer alone."""
    return nn.Sequential(*_classifier(shapes[stage], num_classes))


def scalefl_head(shapes: Sequence[Shape], stage: int, num_classes: int) -> nn.Module:
    """ScaleFL's: three 3x3 convolutions with norm and ReLU of the stage's own channels, pool, linear layer."""
    channels, axes = shapes[stage][0], len(shapes[stage]) - 1
    blocks = [layer for _ in range(3) for layer in _conv(axes, channels, channels)] if axes else []
    return nn.Sequential(*blocks, *_classifier(shapes[stage], num_classes))


def depthfl_head(shapes: Sequence[Shape], stage: int, num_classes: int) -> nn.Module:
    """DepthFL's: a gate of attention, then separable convolutions down to the last stage's features, pool, linear.

    One separable convolution of stride 2 for each stage that is left out, each to that stage's channels, so that every
    classifier sees as many features as the last.
    """
    axes = len(shapes[stage]) - 1
    if not axes:
        return linear_head(shapes, stage, num_classes)
    channels = [shape[0] for shape in shapes[stage:]]
    down = [layer for a, b in itertools.pairwise(channels) for layer in _separable(axes, a, b)]
    last = (channels[-1], *shapes[stage][1:])  # the last stage itself may have no places: it is flat
    return nn.Sequential(Attention(axes, channels[0]), *down, *_classifier(last, num_classes))


HEADS: dict[str, HeadDesign] = {"linear": linear_head, "scalefl": scalefl_head, "depthfl": depthfl_head}


class Attention(nn.Module):
    """Features times a gate in (0, 1) that a separable convolution of stride 2 computes, upsampled linearly."""

    def __init__(self, axes: int, channels: int):
        super().__init__()
        self.gate = nn.Sequential(*_separable(axes, channels, channels))
        self._mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[axes]

    def forward(self, features: Tensor) -> Tensor:
        """As large as the features."""
        gate = functional.interpolate(self.gate(features), size=features.shape[2:], mode=self._mode)
        return features * torch.sigmoid(gate)


def _separable(axes: int, channels_in: int, channels_out: int) -> list[nn.Module]:
    """A depthwise and a pointwise convolution with norm and ReLU, of stride 2."""
    conv, norm = _CONV[axes], _NORM[axes]
    return [
        conv(channels_in, channels_in, 3, stride=2, padding=1, groups=channels_in, bias=False),
        conv(channels_in, channels_out, 1, bias=False),
        norm(channels_out),
        nn.ReLU(),
    ]


def _conv(axes: int, channels_in: int, channels_out: int) -> list[nn.Module]:
    return [_CONV[axes](channels_in, channels_out, 3, padding=1, bias=False), _NORM[axes](channels_out), nn.ReLU()]


def _classifier(shape: Shape, num_classes: int) -> list[nn.Module]:
    pool = [_POOL[len(shape) - 1](1), nn.Flatten()] if len(shape) > 1 else []
    return [*pool, nn.Linear(shape[0], num_classes)]
