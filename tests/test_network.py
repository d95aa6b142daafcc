"""Four hosts on one machine, one of them behind 1 Mbit/s, 100 ms and 1 % loss: it is sent less of the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet, a_fleet
from slowlink import HOST, Quality, SlowLink, a_network, ip, why_not

import server_app
from flexfed.config import Experiment
from flexfed.cost import part_bytes
from flexfed.data import load_client, load_server
from flexfed.devices import Device, declared, load_fleet
from flexfed.overrides import defaults
from flexfed.runs import Run
from strategies.heterofl import HeteroFL

pytestmark = pytest.mark.slow

SLOW_RATE = 125_000.0  # bytes a second: 1 Mbit/s
QUALITY = Quality(rate=SLOW_RATE, delay_s=0.1, loss=0.01)
NUM, ROUNDS, DEADLINE = 3, 2, 1.2
SLOW = NUM - 1
HEADERS = 2_000  # of a message, beside its part
CONFIG: Mapping[str, Any] = {
    "strategy": "heterofl",
    "ratio-policy": "budget",
    "round-deadline": DEADLINE,
    "fleet": "equal",
    "partition": "iid",
    "num-server-rounds": ROUNDS,
    "fraction-train": 1.0,
    "fraction-evaluate": 0.0,
    "evaluate-every": 100,
    "local-epochs": 1,
    "heterofl.batch-norm": "proxy",
    "round-timeout": 240.0,
}


def link_of(partition: int) -> float:
    return SLOW_RATE if partition == SLOW else 1.25e7


def node_config(partition: int) -> dict[str, Any]:
    return {
        "partition-id": partition,
        "num-partitions": NUM,
        "speed-macs-s": 1e10,
        "link-bytes-s": link_of(partition),
    }


@cache
def server(deadline: float) -> HeteroFL:
    """The strategy of the run, in this process."""
    experiment = Experiment.read({**defaults(Path(server_app.__file__).parent), **CONFIG, "round-deadline": deadline})
    data = load_server(experiment.data)
    return HeteroFL(experiment, experiment.task(data.info.num_classes, data.info.input_shape), data)


def device(partition: int) -> Device:
    """As it declares itself."""
    samples = load_client(server(DEADLINE).experiment.data, partition, NUM).train
    nominal = load_fleet(str(CONFIG["fleet"])).device(partition, NUM, seed=1)
    return replace(declared(nominal, node_config(partition)), num_examples=len(samples.labels))


def level_of(partition: int, deadline: float) -> str:
    return server(deadline).part_of(device(partition), 1).level


def size_of(partition: int) -> int:
    """Bytes of the part that a device is sent."""
    strategy = server(DEADLINE)
    return part_bytes(strategy.task.layout, strategy.part_of(device(partition), 1).submodel)


def test_only_the_deadline_makes_the_slow_device_get_less() -> None:
    assert {level_of(partition, 0.0) for partition in range(NUM)} == {"1"}
    assert [level_of(partition, DEADLINE) for partition in range(NUM) if partition != SLOW] == ["1", "1"]
    assert 0.2 < float(level_of(SLOW, DEADLINE)) < 0.7
    assert size_of(SLOW) < size_of(0) / 2


def test_a_device_behind_a_slow_and_lossy_link_keeps_up_with_less_of_the_model(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    with a_network() as network:
        middle = ("ip", "netns", "exec", network.middle)
        with a_fleet(tmp_path, [HOST], middle) as fleet:
            spaces = [network.fast(f"node{number}") for number in range(SLOW)]
            space, link = network.slow(f"node{SLOW}", QUALITY, seed=1)
            run = train(fleet, [*spaces, space])
            fast_bytes = received(spaces[0])
    told = level_of(SLOW, DEADLINE)
    assert [line["dispatched"] for line in run.rounds] == [{told: 1, "1": 2}] * ROUNDS
    assert [line["trained"] for line in run.rounds] == [{told: 1, "1": 2}] * ROUNDS
    assert [line["failed"] + line["refused"] for line in run.rounds] == [[], []]
    check_bytes(run, link, fast_bytes)


def train(fleet: Fleet, spaces: list[str]) -> Run:
    """A run on hosts of their own."""
    fleet.start_superlink()
    for partition, space in enumerate(spaces):
        name = f"node{partition}"
        fleet.add(name, ("ip", "netns", "exec", space))
        fleet.register(name)
        fleet.start_node(name, " ".join(f"{key}={value}" for key, value in node_config(partition).items()))
    with fleet.logs_if_it_fails():
        fleet.wait(lambda: fleet.online() == NUM, 90, "three SuperNodes")
        return fleet.start_run(CONFIG).finish(400)


def received(space: str) -> int:
    """Bytes that came into a namespace, but for those that it sent to itself."""
    devices = json.loads(ip("-n", space, "-statistics", "-json", "link"))
    return sum(device["stats64"]["rx"]["bytes"] for device in devices if device["ifname"] != "lo")


def check_bytes(run: Run, link: SlowLink, fast_bytes: int) -> None:
    """The record's bytes are those of the parts, and the link really carried less, and lost some."""
    parts = sum(size_of(partition) for partition in range(NUM))
    for line in run.rounds:
        for way in ("bytes-down", "bytes-up"):
            assert parts < line[way] <= 1.02 * parts + NUM * HEADERS
        assert line["modelled-seconds-training"] <= DEADLINE
    saved = ROUNDS * (size_of(0) - size_of(SLOW))
    assert ROUNDS * size_of(SLOW) < link.there.passed_bytes < fast_bytes - saved / 2
    assert ROUNDS * size_of(SLOW) < link.back.passed_bytes
    assert min(link.there.lost, link.back.lost) > 0
