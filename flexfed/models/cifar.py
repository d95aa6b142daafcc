"""Small residual networks of which trained weights for CIFAR-10 are around: ResNet-20 to 56, and one of 8 layers.

"Deep Residual Learning for Image Recognition" (He, Zhang, Ren, Sun, CVPR 2016, https://arxiv.org/abs/1512.03385),
section 4.2, as in github.com/akamaster/pytorch_resnet_cifar10; and the ResNet of "MLPerf Tiny Benchmark" (Banbury et
al., NeurIPS 2021, https://arxiv.org/abs/2106.07597), as in github.com/mlcommons/tiny. Tensors are called as in the
files that both publish, but for the stages of the second (`keras_name`).
"""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional

# Where load_weights finds what tensors are called in a published file that does not call them by the network's names.
FILE_NAME_ATTRIBUTE = "file_name"

WIDTHS = (16, 32, 64)
DEPTHS = {20: 3, 32: 5, 44: 7, 56: 9}
"""Layers -> residual units in each stage."""


def cifar_resnet(
    num_classes: int, input_shape: tuple[int, ...], units: int = 3, running_statistics: bool = False
) -> nn.Module:
    """ResNet-20 (3 units a stage), 32 (5), 44 (7) or 56 (9): 269,722 to 853,018 parameters.

    Where a stage changes the width, the shortcut has no weights (`PaddedShortcut`), so no part of this network can
    be cut out. The published weights expect images in 0..1, normalised by the mean and deviation of ImageNet.

    Args:
        num_classes: outputs of the classifier.
        input_shape: (channels, height, width).
        units: residual units in each of the three stages.
        running_statistics: batch norm keeps them, as the files do; else it takes those of the batch.
    """
    before = WIDTHS[0]
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(input_shape[0], before, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(before, track_running_stats=running_statistics),
        relu=nn.ReLU(),
    )
    for number, width in enumerate(WIDTHS, start=1):
        stage = []
        for _ in range(units):
            stage.append(CifarBlock(before, width, running_statistics))
            before = width
        layers[f"layer{number}"] = nn.Sequential(*stage)
    layers |= OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(1), linear=nn.Linear(before, num_classes))
    return nn.Sequential(layers)


class PaddedShortcut(nn.Module):
    """Every second pixel, between as many new channels of zeros on either side; it has no weights."""

    uncuttable = "where zeros are padded between channels, outputs have no layer whose units they could be"

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.padding = (width - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, before, h, w) to (n, width, h / 2, w / 2), rounded up."""
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class CifarBlock(nn.Module):
    """Two 3x3 convolutions with norms, plus the input; a block that widens halves the map."""

    def __init__(self, before: int, width: int, running_statistics: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, 1 if before == width else 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width, track_running_stats=running_statistics)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, track_running_stats=running_statistics)
        self.shortcut = nn.Identity() if before == width else PaddedShortcut(before, width)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, before, h, w) to (n, width, h / stride, w / stride)."""
        out: Tensor = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(out + self.shortcut(x))  # type: ignore[no-any-return]


def cifar_resnet8(num_classes: int, input_shape: tuple[int, ...], running_statistics: bool = False) -> nn.Module:
    """The residual network of MLPerf Tiny: a convolution and three residual units, 78,186 parameters.

    Layers have the names that Keras gave them, its padding and its epsilon of batch norm. The published weights
    expect pixels in 0..255.

    Args:
        num_classes: outputs of the classifier.
        input_shape: (channels, height, width).
        running_statistics: as of `cifar_resnet`.
    """
    narrow, middle, wide = WIDTHS
    stem = OrderedDict(
        conv2d=SameConv2d(input_shape[0], narrow, 3),
        batch_normalization=_keras_norm(narrow, running_statistics),
        activation=nn.ReLU(),
    )
    model = nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(stem),
            stack1=KerasBlock(narrow, narrow, 1, 1, running_statistics),
            stack2=KerasBlock(narrow, middle, 3, 3, running_statistics),
            stack3=KerasBlock(middle, wide, 6, 5, running_statistics),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(1),
            dense=nn.Linear(wide, num_classes),
        )
    )
    setattr(model, FILE_NAME_ATTRIBUTE, keras_name)
    return model


def keras_name(name: str) -> str:
    """What a tensor of this network is called in the published file, which has no stages."""
    head, _, rest = name.partition(".")
    return name if head == "dense" else rest


class KerasBlock(nn.Module):
    """Two 3x3 convolutions with norms, plus the input; where the width changes, a 1x1 convolution of it.

    Args:
        before: input channels.
        width: output channels.
        conv: Keras's number of the first convolution.
        norm: Keras's number of the first norm.
        running_statistics: batch norm keeps them.
    """

    def __init__(self, before: int, width: int, conv: int, norm: int, running_statistics: bool) -> None:
        super().__init__()
        stride = 1 if before == width else 2
        self._names = [f"conv2d_{conv}", f"batch_normalization_{norm}"]
        self._names += [f"conv2d_{conv + 1}", f"batch_normalization_{norm + 1}"]
        self.add_module(self._names[0], SameConv2d(before, width, 3, stride))
        self.add_module(self._names[1], _keras_norm(width, running_statistics))
        self.relu1 = nn.ReLU()
        self.add_module(self._names[2], SameConv2d(width, width, 3))
        self.add_module(self._names[3], _keras_norm(width, running_statistics))
        self._shortcut = f"conv2d_{conv + 2}" if before != width else ""
        if self._shortcut:
            self.add_module(self._shortcut, SameConv2d(before, width, 1, stride))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, before, h, w) to (n, width, h / stride, w / stride), rounded up."""
        conv1, norm1, conv2, norm2 = (self.get_submodule(name) for name in self._names)
        skipped = self.get_submodule(self._shortcut)(x) if self._shortcut else x
        return self.relu2(skipped + norm2(conv2(self.relu1(norm1(conv1(x))))))  # type: ignore[no-any-return]


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow does: where the padding is odd, one pixel more at the bottom and right."""

    def __init__(self, before: int, width: int, kernel: int, stride: int = 1) -> None:
        super().__init__(before, width, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, before, h, w) to (n, width, h / stride, w / stride), rounded up."""
        (top, bottom), (left, right) = (
            _same_padding(size, self.kernel_size[0], self.stride[0]) for size in x.shape[2:]
        )
        return super().forward(functional.pad(x, (left, right, top, bottom)))


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _keras_norm(width: int, running_statistics: bool) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3, track_running_stats=running_statistics)
