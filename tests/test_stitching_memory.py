"""A client that stitches holds one block at a time: seen by torch's profiler, and far less than training takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.memory import allocated_peak, profiled_peak
from benchmarks.stitching_memory import Bytes, Case, draw_weights, report, saved, steps
from flexfed.stitching.phases import modelled_peak_bytes
from flexfed.submodel import full
from flexfed.units import whole_layout

# Blocks of 0.7, 2.1, 8.4 and 33.6 MB: more than half of the network is in the last one.
RESNET = Case("torchvision", "resnet18", 32, (0, 1, 2, 3), "resnet18")


def test_loading_a_block_takes_what_the_block_holds(tmp_path: Path) -> None:
    draw_weights(str(tmp_path), [RESNET])
    pool = RESNET.pool(str(tmp_path))
    for block in pool.blocks[2:]:
        peak = allocated_peak(lambda block=block: pool.module(block.id))
        assert block.param_bytes <= peak <= 1.02 * block.param_bytes


def test_stitching_takes_one_block_at_a_time_and_training_all(tmp_path: Path) -> None:
    draw_weights(str(tmp_path), [RESNET])
    pool = RESNET.pool(str(tmp_path))
    for step in list(steps(RESNET, pool))[-3:]:  # with the largest block
        peak = allocated_peak(step.run)
        assert peak < 1.45 * modelled_peak_bytes(pool, step.work, RESNET.batch_size)
        assert peak > pool.blocks[3].param_bytes
    task = RESNET.task(pool)
    assert profiled_peak(task, full(task.layout)) > 2.5 * peak


def test_a_network_that_cannot_be_cut_has_a_layout_of_one_unit() -> None:
    layout = whole_layout(lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)))
    assert layout.num_units == 1
    assert layout.fixed == {"network"}  # which no method may cut off
    assert dict(layout.shapes) == {"0.weight": (4, 3, 1, 1), "0.bias": (4,), "1.weight": (4,), "1.bias": (4,)}


def test_the_page_says_what_was_measured() -> None:
    cases = [Case("shapes", "", 24, (0, 1), name) for name in ("good", "bad")]
    small, large = Bytes(10_000_000, 5_000_000, 4_000_000), Bytes(100_000_000, 10_000_000, 20_000_000)
    page = report({cases[0]: (small, large), cases[1]: (large, large)})
    assert "| shapes, good | 16    | 10.0              | 100.0            | 90.0%        |" in page
    assert "- growth: 0.0% to 90.0% less, median 45.0%; 79.5% or more in 1 of 2 cases." in page
    assert "- modelled: 0.0% to 80.0% less" in page
    assert saved(205, 1000) == pytest.approx(0.795)
