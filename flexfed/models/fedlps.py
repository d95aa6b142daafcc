"""The MNIST network of FedLPS.

"Learnable Sparse Customization in Heterogeneous Edge Computing" (Xue, Sun, Liu, Wang, Liu, Wang,
ICDE 2025, https://arxiv.org/abs/2412.07216).
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def fedlps_cnn(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Two 5x5 convolutions without padding, two linear layers: 21,840 parameters on MNIST.

    Differences from the released network: it returns logits instead of log-probabilities
    (cross-entropy instead of negative log-likelihood), and each ReLU comes before its max-pool
    instead of after it, which is the same function and lets the ReLU's output be measured unpooled.

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
