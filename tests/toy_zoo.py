"""A zoo of three tiny networks with random weights, whose stitched runs on digits take a second."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flexfed.methods.fedstitch import pool_of
from flexfed.stitching.blocks import Source
from flexfed.stitching.zoos import ZOOS, Zoo

WIDTHS = {"ash": (4, 6, 8, 10), "birch": (5, 6, 7, 12), "cedar": (6, 6, 9, 8)}
"""Blocks 0 to 3, 4 to 7 and 8 to 11."""
SHAPE = (3, 8, 8)
NUM_BLOCKS = 12


class ZeroPadded(nn.Module):
    """A shortcut that fills up channels with zeros, as CIFAR's residual networks have it: cannot be traced."""

    def __init__(self, before: int, width: int):
        super().__init__()
        self.conv = nn.Conv2d(before, width, 3, padding=1)
        self.missing = width - before

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu() + nn.functional.pad(x, (0, 0, 0, 0, 0, self.missing))


def network(name: str, padded: bool = False) -> nn.Sequential:
    """stage1 to stage4, of which the first and third halve the maps."""
    before, layers = SHAPE[0], OrderedDict[str, nn.Module]()
    for number, width in enumerate(WIDTHS[name]):
        own = [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        halved = [nn.MaxPool2d(2)] if number % 2 == 0 else []
        zeros = [ZeroPadded(before, width)] if padded and number == 1 else own
        layers[f"stage{number + 1}"] = nn.Sequential(*zeros, *halved)
        before = width
    layers["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 2))
    return nn.Sequential(layers)


def source(name: str, padded: bool = False) -> Source:
    """One of the networks."""
    units = tuple((f"stage{number}",) for number in range(1, 5))
    return Source(name, partial(network, name, padded), units, SHAPE)


def write_zoo(folder: Path, seed: int = 0, padded: bool = False) -> Path:
    """The weight files, with norms that do something."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in WIDTHS:
            model = network(name, padded)
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    assert module.running_mean is not None
                    assert module.running_var is not None
                    module.running_mean.normal_(0, 0.2)
                    module.running_var.uniform_(0.3, 1)
            save_file(model.state_dict(), folder / f"{name}.safetensors")
    return folder


def _files(names: Sequence[str], folder: str) -> Mapping[str, Path]:
    return {name: Path(folder) / f"{name}.safetensors" for name in names}


@contextmanager
def toy_zoos() -> Iterator[None]:
    """The zoos "toy", and "toy-padded" that cannot be traced, among the others."""
    plain, padded = Zoo(tuple(WIDTHS), source, _files), Zoo(tuple(WIDTHS), partial(source, padded=True), _files)
    with patch.dict(ZOOS, {"toy": plain, "toy-padded": padded}):
        pool_of.cache_clear()
        yield
        pool_of.cache_clear()


def knobs(folder: Path, **values: Any) -> dict[str, Any]:
    """The configuration of a stitched run; the method's own keys as keywords; those in `shared` as they are."""
    shared = {"num-server-rounds": 8, "validation-fraction": 0.2, **values.pop("shared", {})}
    own = {"zoo": "toy", "zoo_folder": str(folder), "score_images": 24, "bridge_rows": 256, **values}
    return {**{f"fedstitch.{key.replace('_', '-')}": value for key, value in own.items()}, **shared}
