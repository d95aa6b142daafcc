"""The network of AutoFLIP's published commands for MNIST, CIFAR-10 and CIFAR-100.

"Pruning Federated Models through Loss Landscape Analysis and Client Agreement Scoring" (Internò, Raponi, van Stein,
Bäck, Olhofer, Jin, Hammer, Raza, IEEE IoT-J 2026, https://arxiv.org/abs/2405.10271); sizes are those of its code.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def autoflip_cnn(num_classes: int, input_shape: tuple[int, ...], width: int = 32) -> nn.Module:
    """Two 5x5 convolutions, two linear layers behind a 7x7 pool: 1,663,370 parameters on MNIST, 1,664,970 on CIFAR-10.

    Weights begin Xavier-normal with gain 1, biases at 0.

    Args:
        num_classes: outputs of the classifier.
        input_shape: (channels, height, width), 6x6 or larger.
        width: channels of the first convolution; the second has twice as many. CIFAR-100's commands have 128.

    Raises:
        ValueError: the image is too small for two convolutions.
    """
    channels, *image = input_shape
    if min(image) < 6:
        raise ValueError(f"autoflip-cnn needs images of at least 6x6, got {'x'.join(map(str, image))}")
    model = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, width, 5, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2, padding=1),
            conv2=nn.Conv2d(width, 2 * width, 5, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2, padding=1),
            pool=nn.AdaptiveAvgPool2d(7),
            flatten=nn.Flatten(1),
            fc1=nn.Linear(2 * width * 49, 512),
            relu3=nn.ReLU(),
            fc2=nn.Linear(512, num_classes),
        )
    )
    for name, parameter in model.named_parameters():
        (nn.init.xavier_normal_ if name.endswith("weight") else nn.init.zeros_)(parameter)
    return model
