"""A pool of small blocks in memory, with the interface of `flexfed.stitching.blocks.Pool`, that counts what runs."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flexfed.stitching.blocks import Block, tensors_digest


class FakePool:
    """Hands out copies of blocks, one alive at a time, and counts the images that each was run on."""

    def __init__(self, sources: dict[str, Sequence[nn.Module]], input_shape: tuple[int, ...]):
        self.input_shape = input_shape
        self.modules = [module.eval() for modules in sources.values() for module in modules]
        self.sources = tuple(sources)
        self.ran: Counter[int] = Counter()
        self.calls: list[int] = []
        self._alive: weakref.ref[nn.Module] | None = None
        records: list[Block] = []
        for source, modules in sources.items():
            shape = input_shape
            for number, module in enumerate(modules):
                out, macs = measure(module, shape)
                depths = number / len(modules), (number + 1) / len(modules)
                size = sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
                records.append(Block(len(records), source, number + 1, *depths, shape, out, size, macs))
                shape = out
        self.blocks = tuple(records)

    def of(self, source: str) -> tuple[Block, ...]:
        return tuple(block for block in self.blocks if block.source == source)

    def module(self, block: int) -> nn.Module:
        assert self._alive is None or self._alive() is None, "another block is still in memory"
        module = copy.deepcopy(self.modules[block]).requires_grad_(False)
        self._alive = weakref.ref(module)

        def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert not torch.is_grad_enabled()
            self.ran[block] += len(inputs[0])
            self.calls.append(len(inputs[0]))

        module.register_forward_pre_hook(count)
        return module

    @property
    def block_macs(self) -> int:
        """Of all that ran."""
        return sum(self.blocks[block].macs * images for block, images in self.ran.items())

    def digest(self) -> list[str]:
        return [tensors_digest(module.state_dict()) for module in self.modules]


def measure(module: nn.Module, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = module(torch.zeros(1, *shape))
    return tuple(out.shape[1:]), int(counter.get_total_flops()) // 2


def conv(channels_in: int, channels_out: int, stride: int = 1) -> nn.Module:
    block = nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()
    )
    norm: Any = block[1]
    norm.running_mean.normal_(0, 0.1)
    norm.running_var.uniform_(0.5, 1.5)
    return block


def vectors(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels_in, channels_out), nn.ReLU())


def small_pool(seed: int = 0) -> FakePool:
    """Three sources: a (0-3) and b (4-6) of maps, v (7-9) ends in vectors; their depths and sizes differ."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FakePool(
            {
                "a": [conv(3, 6), conv(6, 8, 2), conv(8, 10), conv(10, 12, 2)],
                "b": [conv(3, 5, 2), conv(5, 9), conv(9, 7, 3)],
                "v": [conv(3, 6, 3), vectors(6, 11), nn.Sequential(nn.Linear(11, 9), nn.ReLU())],
            },
            (3, 12, 12),
        )
