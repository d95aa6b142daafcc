"""What a server holds for each further device: little, and of each part one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toy import AVERAGING

from benchmarks.scale import IN_FLIGHT, Server, traced

OWN_PARTS = {"fedlps"}
"""Strategies whose devices each have a part of their own."""
SMALLER = {"fleet": "fifths", "flexfl.scores": "0.5", "autoflip.score": "random", "autoflip.mask-mode": "static"}


@pytest.mark.parametrize("strategy", AVERAGING)
def test_devices_that_train_the_same_share_one_part(strategy: str, tmp_path: Path) -> None:
    server = Server(strategy, 60, tmp_path, SMALLER)
    rng = server.strategy.open_round(1)
    jobs = server.strategy.assign(1, server.strategy.devices, rng)
    objects, parts = {id(job.submodel) for job in jobs.values()}, {job.submodel.key for job in jobs.values()}
    assert len(jobs) > 8
    assert len(objects) == len(parts)
    assert strategy in OWN_PARTS or len(parts) <= 8


@pytest.mark.parametrize(("strategy", "limit"), [("heterofl", 1_200), ("flexfl", 1_200), ("fedlps", 3_000)])
def test_a_round_keeps_little_of_each_further_device(strategy: str, limit: int) -> None:
    """Names and numbers; a reply has 20,000 bytes and more. As many replies are alive as may be, and no more."""
    few, many = (traced(strategy, num) for num in (80, 240))
    assert (few.alive, many.alive) == (IN_FLIGHT, IN_FLIGHT)
    assert many.kept - few.kept < limit * 160


def test_a_rounds_line_has_a_number_for_each_further_device(tmp_path: Path) -> None:
    lines = []
    for num in (100, 500):
        server = Server("heterofl", num, tmp_path / str(num))
        (tmp_path / str(num)).mkdir()
        server.train()
        server.close()
        lines.append(json.loads((tmp_path / str(num) / "metrics.jsonl").read_text()))
    few, many = lines
    assert many["cohort"] == list(range(500))
    assert len(json.dumps({**many, "cohort": []})) < len(json.dumps({**few, "cohort": []})) + 100


def test_a_device_that_fails_in_a_large_fleet_is_one_of_many(tmp_path: Path) -> None:
    server = Server("heterofl", 200, tmp_path, failing=4)
    server.train()
    server.close()
    record: Any = server.strategy.record
    assert [entry["partition"] for entry in record.failed] == list(range(0, 200, 4))
    assert record.trained.total() == 150
    assert not record.refused
