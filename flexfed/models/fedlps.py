"""The image networks of FedLPS: a small one for MNIST, and VGGs with batch norm.

"Learnable Sparse Customization in Heterogeneous Edge Computing" (Xue, Sun, Liu, Wang, Liu, Wang,
ICDE 2025, https://arxiv.org/abs/2412.07216).

Difference from the released networks: they return logits instead of log-probabilities (cross-entropy
instead of negative log-likelihood).
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Literal

from torch import nn

VGG_WIDTHS = (64, 128, 256, 512, 512)
# Depth (convolutions and three linear layers in the first VGGs) -> convolutions of each width.
VGG_BLOCKS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3)}

_BatchNorm = partial(nn.BatchNorm2d, track_running_stats=False)


def fedlps_cnn(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Two 5x5 convolutions without padding, two linear layers: 21,840 parameters on MNIST.

    Another difference from the released network: each ReLU comes before its max-pool instead of after
    it, which is the same function and lets the ReLU's output be measured unpooled.

    Args:
        num_classes: outputs of the classifier.
        input_shape: (channels, height, width), 16x16 or larger.

    Raises:
        ValueError: the image is too small for two convolutions and two pools.
    """
    channels, *image = input_shape
    height, width = (((side - 4) // 2 - 4) // 2 for side in image)
    if min(height, width) < 1:
        raise ValueError(f"fedlps-cnn needs images of at least 16x16, got {'x'.join(map(str, image))}")
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 10, 5),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(10, 20, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(1),
            fc1=nn.Linear(20 * height * width, 50),
            relu3=nn.ReLU(),
            fc2=nn.Linear(50, num_classes),
        )
    )


def fedlps_vgg(num_classes: int, input_shape: tuple[int, ...], depth: Literal[11, 13, 16] = 11) -> nn.Module:
    """VGG with batch norm and one linear layer, behind a flatten: the size of the map counts.

    VGG11 has 9,231,114 parameters on CIFAR-10, VGG13 9,462,180 on CIFAR-100, and VGG16 15,132,936 on
    Tiny-ImageNet (64x64, 200 classes). All layers have a bias. As released, batch norm keeps no running
    statistics.

    Args:
        num_classes: outputs of the classifier.
        input_shape: (channels, height, width), 32x32 or larger.
        depth: 11, 13 or 16.

    Raises:
        ValueError: the image is too small for five pools.
    """
    before, *image = input_shape
    height, width = (side // 2 ** len(VGG_WIDTHS) for side in image)
    if min(height, width) < 1:
        raise ValueError(f"fedlps-vgg{depth} needs images of at least 32x32, got {'x'.join(map(str, image))}")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for block, (repeats, channels) in enumerate(zip(VGG_BLOCKS[depth], VGG_WIDTHS, strict=True), start=1):
        for number in range(1, repeats + 1):
            layers[f"conv{block}_{number}"] = nn.Conv2d(before, channels, 3, padding=1)
            layers[f"norm{block}_{number}"] = _BatchNorm(channels)
            layers[f"relu{block}_{number}"] = nn.ReLU()
            before = channels
        layers[f"pool{block}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten(1)
    layers["classifier"] = nn.Linear(before * height * width, num_classes)
    return nn.Sequential(layers)
