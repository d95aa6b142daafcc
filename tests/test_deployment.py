"""A real fleet on loopback: TLS, SuperNodes known by their keys, and what each of them trains."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from fleet import Fleet, Submitted, a_fleet, write_digits

import server_app
from flexfed.config import Experiment
from flexfed.cost import message_bytes, part_bytes, round_macs
from flexfed.data import load_server
from flexfed.launch import free_ports
from flexfed.methods.flexfl import LEVELS, MAIN_LEVELS, largest_first
from flexfed.overrides import defaults
from flexfed.training import samples_trained
from strategies.flexfl import FlexFL

pytestmark = pytest.mark.slow

SIZES = tuple(LEVELS[level] for level in MAIN_LEVELS)
ROUNDS = 2
SPEED, WATTS = 1e9, (1.0, 10.0, 100.0)


def seed_that_draws_every_size(rounds: int) -> int:
    """The first seed with which FlexFL draws S, M and L once each, in every round: one for each device."""
    able = {0: [0, 1, 2], 2: [1, 2], 4: [2]}
    wanted = {0: 0, 1: 2, 2: 4}

    def draws(seed: int) -> bool:
        return all(largest_first(able, 3, np.random.default_rng([seed, r])) == wanted for r in range(1, rounds + 1))

    return next(seed for seed in range(10_000) if draws(seed))


CONFIG: Mapping[str, Any] = {
    "strategy": "flexfl",
    "dataset": "~/server-data",  # of the SuperLink's home: no SuperNode has such a folder
    "proxy-fraction": 0.9,
    "num-server-rounds": ROUNDS,
    "seed": seed_that_draws_every_size(ROUNDS),
    "fraction-train": 1.0,
    "fraction-evaluate": 0.0,
    "evaluate-every": 100,
    "local-epochs": 1,
    "flexfl.pretrain-epochs": 2,
    "round-timeout": 240.0,
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Three SuperNodes with data and keys of their own, which hold S, M and L by their memory."""
    with a_fleet(tmp_path_factory.mktemp("fleet")) as fleet:
        write_digits(fleet.server.home / "server-data", range(200))
        write_digits(fleet.server.home / "server-data", range(200, 400), "test")
        fleet.start_superlink()
        for number in range(len(SIZES)):
            name = f"node{number}"
            write_digits(fleet.add(name).home / "data", range(400 + 100 * number, 500 + 100 * number))
            fleet.register(name)
            start(fleet, number)
        with fleet.logs_if_it_fails():
            fleet.wait(lambda: fleet.online() == 3, 90, "three SuperNodes")
        yield fleet


def start(fleet: Fleet, number: int) -> None:
    """Start one of the three."""
    fleet.start_node(f"node{number}", f"{node_config(number)} {memory_of(fleet, SIZES[number])}")


def node_config(partition: int) -> str:
    place = f'partition-id={partition} num-partitions={len(SIZES)} data-path="~/data" state-dir="~/state"'
    return f"{place} speed-macs-s={SPEED} compute-watts={WATTS[partition]} radio-watts=0.0"


def memory_of(fleet: Fleet, size: str) -> str:
    """The memory that holds a size and no larger one; the largest measures on the spot what it really has."""
    strategy = server_of(fleet)
    needed = strategy.budget.memory(strategy.levels()[size])
    return f"memory-bytes={needed}" if size != "L" else "memory-bytes=4e9 measure-memory=true"


@cache
def server_of(fleet: Fleet) -> FlexFL:
    """The server that the run will have, made here: it pre-trains, and its levels follow."""
    config = {**defaults(Path(server_app.__file__).parent), **CONFIG}
    config["dataset"] = str(fleet.server.home / "server-data")
    experiment = Experiment.read(config)
    server, _ = server_app._normalised(load_server(experiment.data))
    task, _ = FlexFL.set_up(experiment, server.info, None)
    strategy = FlexFL(experiment, task, server)
    strategy.prepare(cast(Any, None))
    return strategy


def test_three_supernodes_train_what_fits_them_over_tls(fleet: Fleet) -> None:
    """Each device gets another size of FlexFL's, from the memory that it declares, and only that travels."""
    with fleet.logs_if_it_fails():
        run = fleet.start_run(CONFIG).finish()
        strategy = server_of(fleet)
        layout, levels = strategy.task.layout, strategy.levels()
        assert run.summary is not None
        assert run.summary["level-parameters"] == strategy.facts()["level-parameters"]
        assert len(run.rounds) == ROUNDS
        least = sum(part_bytes(layout, levels[size]) for size in SIZES)
        most = sum(message_bytes(layout, levels[size]) for size in SIZES)
        assert most < 3 * part_bytes(layout, levels["L"])
        for line in run.rounds:
            assert line["refused"] == line["failed"] == []
            assert line["dispatched"] == line["trained"] == dict.fromkeys(SIZES, 1)
            assert least < line["bytes-up"] <= most
            assert least < line["bytes-down"] <= most
            assert line["joules"] == pytest.approx(sum(map(joules, repeat(strategy), range(len(SIZES)), SIZES)))


def joules(strategy: FlexFL, partition: int, size: str) -> float:
    """Of a device that trains a level: its watts tell in the record who trained which."""
    task, part, num_examples = strategy.task, strategy.levels()[size], 90  # a tenth of its samples is for validation
    macs = round_macs(task.macs(part), num_examples, task.training)
    macs += strategy.macs_beside(part) * samples_trained(num_examples, task.training)
    return WATTS[partition] * macs / SPEED


def test_no_device_has_the_data_of_another_or_of_the_server(fleet: Fleet) -> None:
    """Their folders are all that they have; the environment names no others."""
    for machine in fleet.nodes.values():
        assert [p.name for p in (machine.home / "data").iterdir()] == ["train-0.parquet"]
        assert not (machine.home / "server-data").exists()
        assert "FLEXFED_DATA" not in machine.env


def test_a_key_that_is_not_registered_is_refused(fleet: Fleet) -> None:
    fleet.add("stranger")
    with fleet.logs_if_it_fails():
        script = fleet.start_node("stranger", node_config(0), pause=0)
        assert script.wait(60) != 0
    assert "Failed to activate SuperNode" in fleet.nodes["stranger"].log
    assert fleet.online() == 3


def test_who_speaks_without_tls_is_refused(fleet: Fleet) -> None:
    """A SuperNode, and whoever would submit a run."""
    place = ["--superlink", fleet.address, "--port", str(free_ports(1)[0]), "--max-retries", "1"]
    program = fleet.add("plain").start("flower-supernode", "--insecure", *place)
    with fleet.logs_if_it_fails():
        assert program.wait(90) != 0
        assert fleet.flower_answers("ls")
        assert not fleet.flower_answers("ls", connection="insecure")


# --- faults -----------------------------------------------------------------------------------------------------

FAULTS: Mapping[str, Any] = {
    "strategy": "heterofl",  # asks every device that is there; FlexFL draws sizes first, and none may be left for one
    "heterofl.batch-norm": "proxy",
    "num-server-rounds": 3,
    "round-timeout": 50.0,
    "min-replies": 2,
}
GONE = ("no reply before round-timeout", "The destination node failed to report a heartbeat")
"""Whichever comes first: the deadline, or the minute after which the SuperLink takes a SuperNode for dead."""


def test_a_run_outlives_its_devices_and_its_superlink(fleet: Fleet) -> None:
    """One SuperNode is killed in round 1, another in round 2, the SuperLink in round 3, by when devices are back."""
    with fleet.logs_if_it_fails():
        run = fleet.start_run({**CONFIG, **FAULTS})
        lose(run, "node2", 1)
        fleet.wait(lambda: len(run.lines) == 1, 120, "the end of round 1")
        lose(run, "node1", 2)
        start(fleet, 2)
        start(fleet, 1)
        fleet.wait(lambda: len(run.lines) == 2, 120, "the end of round 2")
        wait_for_job(run, "node0", 3)
        fleet.restart_superlink(killed=True)
        lines = run.finish(followed=False).rounds
    without_one, without_two, again = lines
    check_left_out(without_one, [0, 1, 2], gone=2)
    assert "void" not in without_one
    check_left_out(without_two, [0, 1], gone=1)
    assert without_two["void"], "one reply is fewer than min-replies"
    assert {0} < set(again["cohort"]) <= {0, 1, 2}
    assert sum(again["trained"].values()) >= 2  # on busy cores the third may be late
    assert "void" not in again
    assert again["refused"] == []
    for partition in set(again["cohort"]) - {0}:
        assert_same_node_twice(fleet.nodes[f"node{partition}"].log)


def wait_for_job(run: Submitted, name: str, server_round: int) -> None:
    """Wait until a SuperNode has its job of a round."""
    said = f"[RUN {run.id}, ROUND {server_round}]"
    run.fleet.wait(lambda: said in run.fleet.nodes[name].log, 150, f"{name} to work in round {server_round}")


def lose(run: Submitted, name: str, server_round: int) -> None:
    """Pull the plug of a device in the middle of a round."""
    wait_for_job(run, name, server_round)
    run.fleet.nodes[name].kill()


def check_left_out(line: Mapping[str, Any], cohort: list[int], gone: int) -> None:
    assert line["cohort"] == cohort
    assert sum(line["trained"].values()) == len(cohort) - 1
    assert [failed["partition"] for failed in line["failed"]] == [gone]
    assert any(reason in line["failed"][0]["reason"] for reason in GONE)
    assert line["refused"] == []


def assert_same_node_twice(log: str) -> None:
    """It came back as the node that it was; until that one counted as dead it was refused, and started again."""
    ids = re.findall(r"SuperNode ID: (\d+)", log)
    assert len(ids) == 2
    assert len(set(ids)) == 1
