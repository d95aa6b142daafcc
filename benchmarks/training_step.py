"""A training step of a narrow network over the full one's: widths must pay in time, not only in parameters."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import nn

from benchmarks.measuring import Row, interleaved
from flexfed.narrowing import narrow
from flexfed.networks import travelling
from flexfed.select import prefix_ratio
from flexfed.submodel import extract
from flexfed.training import Samples, Training, fit
from flexfed.units import trace_layout

INPUT_SHAPE = (3, 32, 32)
BATCH = 16
BOUNDS = {1 / 2: 0.35, 1 / 4: 0.14}
REPETITIONS = 15


def resnet18() -> nn.Module:
    """The torchvision network with the stem for small images: 3x3, stride 1, no max-pool."""
    from torchvision.models import resnet18

    model: nn.Module = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def rows() -> list[Row]:
    """One SGD step of 16 images at half and quarter width; `fit` does it, optimiser and loss included."""
    torch.manual_seed(0)
    layout = trace_layout(resnet18, INPUT_SHAPE)
    arrays = {name: tensor.detach().numpy() for name, tensor in travelling(resnet18()).items()}
    samples = Samples(torch.randn(BATCH, *INPUT_SHAPE), torch.randint(10, (BATCH,)))
    training = Training(batch_size=BATCH, local_epochs=1)

    def step(model: nn.Module) -> None:
        fit(model, samples, training, 0.01, np.random.default_rng(0))

    networks = {r: narrow(resnet18, extract(layout, prefix_ratio(layout, r), arrays)) for r in (1.0, *BOUNDS)}
    seconds = interleaved({f"{r:g}": partial(step, model) for r, model in networks.items()}, REPETITIONS)
    return [
        Row(
            f"ResNet-18 at 32x32, width {rate:g} / full",
            seconds[f"{rate:g}"] / seconds["1"],
            "x",
            bound,
            f"{1e3 * seconds[f'{rate:g}']:.0f} ms, full {1e3 * seconds['1']:.0f} ms",
        )
        for rate, bound in BOUNDS.items()
    ]
