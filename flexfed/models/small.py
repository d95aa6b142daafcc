"""Two small networks for first trials and weak devices: one for images, one for sensor windows."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import nn

from flexfed.networks import STAGES_ATTRIBUTE

_BatchNorm1d = partial(nn.BatchNorm1d, track_running_stats=False)
_BatchNorm2d = partial(nn.BatchNorm2d, track_running_stats=False)

_STAGES = ("relu1", "relu2", "relu3", "relu4")
"""Behind each layer but the classifier: resolutions are too few here to tell stages by."""


def cnn(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Three 3x3 convolutions and two linear layers: 57,706 parameters for (1, 8, 8) and 10 classes.

    All layers have a bias; batch norm follows the convolutions only. The map before flattening is
    2x2 whatever the image size, so the parameter count depends on the image channels alone.

    Args:
        num_classes: outputs of the classifier.
        input_shape: (channels, height, width), 4x4 or larger.
    """
    model = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(input_shape[0], 16, 3, padding=1),
            norm1=_BatchNorm2d(16),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(16, 32, 3, padding=1),
            norm2=_BatchNorm2d(32),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            conv3=nn.Conv2d(32, 64, 3, padding=1),
            norm3=_BatchNorm2d(64),
            relu3=nn.ReLU(),
            pool3=nn.MaxPool2d(2),
            pool=nn.AdaptiveAvgPool2d(2),
            flatten=nn.Flatten(1),
            fc=nn.Linear(64 * 2 * 2, 128),
            relu4=nn.ReLU(),
            classifier=nn.Linear(128, num_classes),
        )
    )
    setattr(model, STAGES_ATTRIBUTE, _STAGES)
    return model


def cnn1d(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """The same network for sensor windows: convolutions of five steps, pools of four.

    The map before flattening is four steps long whatever the window, so a (3, 200) accelerometer
    window (200 steps -> 50 -> 12 -> 4) and a longer one have the same number of parameters.

    Args:
        num_classes: outputs of the classifier.
        input_shape: (channels, time), 16 steps or longer.
    """
    model = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv1d(input_shape[0], 16, 5, padding=2),
            norm1=_BatchNorm1d(16),
            relu1=nn.ReLU(),
            conv2=nn.Conv1d(16, 32, 5, padding=2),
            norm2=_BatchNorm1d(32),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool1d(4),
            conv3=nn.Conv1d(32, 64, 5, padding=2),
            norm3=_BatchNorm1d(64),
            relu3=nn.ReLU(),
            pool3=nn.MaxPool1d(4),
            pool=nn.AdaptiveAvgPool1d(4),
            flatten=nn.Flatten(1),
            fc=nn.Linear(64 * 4, 128),
            relu4=nn.ReLU(),
            classifier=nn.Linear(128, num_classes),
        )
    )
    setattr(model, STAGES_ATTRIBUTE, _STAGES)
    return model
