"""The image networks of HeteroFL, which FedRolex uses too.

"HeteroFL: Computation and Communication Efficient Federated Learning for Heterogeneous Clients"
(Diao, Ding, Tarokh, ICLR 2021, https://arxiv.org/abs/2010.01264).

Differences from the released code: no scaler inside (in both networks it belongs right before every
batch norm and nowhere else, so a method can hook it there); logits only, loss and label mask are the
method's. As there, convolutions of the ResNet have no bias and the classifier's bias starts at 0.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512)

_BatchNorm = partial(nn.BatchNorm2d, track_running_stats=False)


def heterofl_conv(num_classes: int, input_shape: tuple[int, ...], widths: tuple[int, ...] = WIDTHS) -> nn.Module:
    """Four 3x3 convolutions with a max-pool between them: 1,556,874 parameters on MNIST.

    Args:
        num_classes: outputs of the classifier.
        input_shape: (channels, height, width), 8x8 or larger.
        widths: output channels of each convolution.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    before = input_shape[0]
    for number, width in enumerate(widths, start=1):
        if number > 1:
            layers[f"pool{number - 1}"] = nn.MaxPool2d(2)
        layers[f"conv{number}"] = nn.Conv2d(before, width, 3, padding=1)
        layers[f"norm{number}"] = _BatchNorm(width)
        layers[f"relu{number}"] = nn.ReLU()
        before = width
    return nn.Sequential(layers | _head(before, num_classes))


def heterofl_resnet18(num_classes: int, input_shape: tuple[int, ...], widths: tuple[int, ...] = WIDTHS) -> nn.Module:
    """ResNet-18 with pre-activation and a final norm: 11,172,170 parameters on CIFAR-10.

    Args:
        num_classes: outputs of the classifier.
        input_shape: (channels, height, width).
        widths: output channels of the four stages; the stem has those of the first.
    """
    before = widths[0]
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Conv2d(input_shape[0], before, 3, padding=1, bias=False))
    for number, width in enumerate(widths, start=1):
        first = PreActivationBlock(before, width, stride=1 if number == 1 else 2)
        layers[f"stage{number}"] = nn.Sequential(first, PreActivationBlock(width, width, stride=1))
        before = width
    layers["norm"] = _BatchNorm(before)
    layers["relu"] = nn.ReLU()
    return nn.Sequential(layers | _head(before, num_classes))


class PreActivationBlock(nn.Module):
    """Norm-ReLU-convolution twice, plus the input or a projection of the first ReLU's output."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1 = _BatchNorm(before)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.norm2 = _BatchNorm(width)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        # Decided from the full widths: a narrowed block keeps the kind of shortcut it was built with.
        projected = stride != 1 or before != width
        self.shortcut = nn.Conv2d(before, width, 1, stride, bias=False) if projected else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, before, h, w) to (n, width, h / stride, w / stride)."""
        active = self.relu1(self.norm1(x))
        skipped = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = self.conv2(self.relu2(self.norm2(self.conv1(active))))
        return out + skipped


def _head(width: int, num_classes: int) -> OrderedDict[str, nn.Module]:
    linear = nn.Linear(width, num_classes)
    nn.init.zeros_(linear.bias)
    return OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(1), classifier=linear)
