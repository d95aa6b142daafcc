"""The three networks of FlexFL, each with its table of ratio groups.

"FlexFL: Heterogeneous Federated Learning via APoZ-Guided Flexible Pruning in Uncertain Scenarios"
(Chen, Jia, Hu, Xie, Li, Chen, IEEE TCAD 43(11), 2024, https://arxiv.org/abs/2407.12729), as in the
released code: a ResNet34 whose first stage is 96 wide, a MobileNetV2 with a bias in every convolution,
an expansion layer even where the expansion is 1, and a global max-pool.

Differences from the released code: identity shortcuts are decided from the full widths (there a
pruned network can gain or lose one, and its tensors no longer match the global model's); nothing
shared is mutated while building; the VGG16 pools to 1x1 before flattening for any image size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn

from flexfed.select import RatioGroup

VGG_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
VGG_POOLS = {"released": (3, 5, 8, 11), "textbook": (2, 4, 7, 10)}
# Blocks, width, stride of the first block.
RESNET_STAGES = ((3, 96, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2))
# Blocks, expansion, width, stride of the first block.
MOBILENET_STAGES = (
    (1, 1, 16, 1),
    (2, 6, 24, 2),
    (3, 6, 32, 2),
    (4, 6, 64, 2),
    (3, 6, 96, 1),
    (3, 6, 160, 2),
    (1, 6, 320, 1),
)

_BatchNorm = partial(nn.BatchNorm2d, track_running_stats=False)


class GroupedNetwork(nn.Sequential):
    """A sequence of layers with a table of those that share one width ratio."""

    ratio_groups: tuple[RatioGroup, ...] = ()


def flexfl_vgg16(
    num_classes: int,
    input_shape: tuple[int, ...],
    pools: Literal["released", "textbook"] = "released",
    divisor: int = 1,
) -> GroupedNetwork:
    """VGG16 with batch norm; 15 ratio groups, one for each layer but the classifier.

    Args:
        num_classes: outputs of the classifier.
        input_shape: (channels, height, width). Three channels have a fifth pool and 4096-wide linear
            layers (32x32 or larger); any other number has four pools and 256-wide ones (16x16 or larger).
        pools: "released" pools after convolutions 3, 5, 8, 11, as the published tables have it;
            "textbook" after 2, 4, 7, 10, with 0.61 of the convolutions' work. The parameters are the same.
        divisor: of every width; 8 makes a network of the same depth for experiments on a processor (ours).
    """
    colour = input_shape[0] == 3
    pooled = VGG_POOLS[pools] + ((len(VGG_WIDTHS),) if colour else ())
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    before = input_shape[0]
    for number, width in enumerate((w // divisor for w in VGG_WIDTHS), start=1):
        layers[f"conv{number}"] = _convolution(before, width, 3, nn.ReLU())
        if number in pooled:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
        before = width
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten(1)
    hidden = (4096 if colour else 256) // divisor
    layers["fc1"] = _linear(before, hidden)
    layers["fc2"] = _linear(hidden, hidden)
    layers["classifier"] = nn.Linear(hidden, num_classes)
    network = GroupedNetwork(layers)
    network.ratio_groups = _vgg_groups()
    return network


def flexfl_resnet34(num_classes: int, input_shape: tuple[int, ...]) -> GroupedNetwork:
    """ResNet34 with a 3x3 stem and a first stage 96 wide; 5 ratio groups: the stem and the stages.

    Args:
        num_classes: outputs of the classifier.
        input_shape: (channels, height, width).
    """
    before = 64
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=_convolution(input_shape[0], before, 3, nn.ReLU(), bias=False)
    )
    for number, (blocks, width, stride) in enumerate(RESNET_STAGES, start=1):
        rest = (BasicBlock(width, width, stride=1) for _ in range(blocks - 1))
        layers[f"stage{number}"] = nn.Sequential(BasicBlock(before, width, stride), *rest)
        before = width
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten(1)
    layers["classifier"] = nn.Linear(before, num_classes)
    network = GroupedNetwork(layers)
    network.ratio_groups = tuple(
        RatioGroup(name, (name,), dict.fromkeys(_convolutions(layers[name], name), 1))
        for name in ("stem", *(f"stage{number}" for number in range(1, len(RESNET_STAGES) + 1)))
    )
    return network


def flexfl_mobilenetv2(num_classes: int, input_shape: tuple[int, ...]) -> GroupedNetwork:
    """MobileNetV2 with a stride-1 stem; 9 ratio groups: the stem, seven stages, the last convolution.

    Args:
        num_classes: outputs of the classifier, a 1x1 convolution.
        input_shape: (channels, height, width).
    """
    before = 32
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=_convolution(input_shape[0], before, 3, nn.ReLU6()))
    for number, (blocks, expansion, width, stride) in enumerate(MOBILENET_STAGES, start=1):
        rest = (InvertedResidual(width, width, expansion, stride=1) for _ in range(blocks - 1))
        layers[f"stage{number}"] = nn.Sequential(InvertedResidual(before, width, expansion, stride), *rest)
        before = width
    layers["head"] = _convolution(before, 1280, 1, nn.ReLU6())
    layers["pool"] = nn.AdaptiveMaxPool2d(1)
    layers["classifier"] = nn.Conv2d(1280, num_classes, 1)
    layers["flatten"] = nn.Flatten(1)
    network = GroupedNetwork(layers)
    network.ratio_groups = _mobilenet_groups()
    return network


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, plus the input or a projection of it, then ReLU."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.norm1 = _BatchNorm(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = _BatchNorm(width)
        # Decided from the full widths: a narrowed block keeps the kind of shortcut it was built with.
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != width:
            projection = nn.Conv2d(before, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(OrderedDict(conv=projection, norm=_BatchNorm(width)))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, before, h, w) to (n, width, h / stride, w / stride)."""
        branch = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        out: Tensor = self.relu2(branch + self.shortcut(x))
        return out


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; plus the input where the shapes allow it."""

    def __init__(self, before: int, width: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = expansion * before
        self.expand = nn.Conv2d(before, hidden, 1)
        self.norm1 = _BatchNorm(hidden)
        self.relu1 = nn.ReLU6()
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden)
        self.norm2 = _BatchNorm(hidden)
        self.relu2 = nn.ReLU6()
        self.project = nn.Conv2d(hidden, width, 1)
        self.norm3 = _BatchNorm(width)
        # Decided from the full widths: a narrowed block keeps the kind of shortcut it was built with.
        self.adds_input = stride == 1 and before == width

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, before, h, w) to (n, width, h / stride, w / stride)."""
        hidden = self.relu1(self.norm1(self.expand(x)))
        hidden = self.relu2(self.norm2(self.depthwise(hidden)))
        out: Tensor = self.norm3(self.project(hidden))
        return x + out if self.adds_input else out


def _convolution(before: int, width: int, size: int, relu: nn.Module, bias: bool = True) -> nn.Module:
    conv = nn.Conv2d(before, width, size, padding=size // 2, bias=bias)
    return nn.Sequential(OrderedDict(conv=conv, norm=_BatchNorm(width), relu=relu))


def _linear(before: int, width: int) -> nn.Module:
    return nn.Sequential(OrderedDict(linear=nn.Linear(before, width), relu=nn.ReLU(), dropout=nn.Dropout(0.5)))


def _convolutions(module: nn.Module, prefix: str) -> list[str]:
    """Full names of the convolutions below a module."""
    return [name for name, part in module.named_modules(prefix=prefix) if isinstance(part, nn.Conv2d)]


def _vgg_groups() -> tuple[RatioGroup, ...]:
    layers = [(f"conv{number}", "conv") for number in range(1, len(VGG_WIDTHS) + 1)]
    layers += [("fc1", "linear"), ("fc2", "linear")]
    return tuple(RatioGroup(name, (name,), {f"{name}.{part}": 1}) for name, part in layers)


def _mobilenet_groups() -> tuple[RatioGroup, ...]:
    """A block's hidden width follows the group of its input: the stage before, for a stage's first."""
    names: Sequence[str] = ["stem", *(f"stage{n}" for n in range(1, len(MOBILENET_STAGES) + 1)), "head"]
    widths: dict[str, dict[str, int]] = {name: {} for name in names}
    widths["stem"]["stem.conv"] = widths["head"]["head.conv"] = 1
    source = "stem"
    for stage, (blocks, expansion, _, _) in zip(names[1:], MOBILENET_STAGES, strict=False):
        for block in range(blocks):
            widths[source][f"{stage}.{block}.expand"] = expansion
            widths[source][f"{stage}.{block}.depthwise"] = expansion
            widths[stage][f"{stage}.{block}.project"] = 1
            source = stage
    return tuple(RatioGroup(name, (name,), widths[name]) for name in names)
