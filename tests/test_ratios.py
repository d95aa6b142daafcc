"""How much a device gets: never above its cap, credited once and for what it brought, the same from the same seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from toy import DIGITS, QUICK, failure, final_model, lines, random_arrays, run_toy, same_bits, toy_task

import client_app
from flexfed.bandits import BanditConfig
from flexfed.checkpoint import load_checkpoint
from flexfed.config import Experiment
from flexfed.cost import num_parameters
from flexfed.data import load_server
from flexfed.devices import Device
from flexfed.flower.grid import InProcessGrid
from flexfed.jobs import Assignment, Task, Update
from flexfed.methods import METHODS
from flexfed.ratios import AllOfIt, OneBanditEach, Outcome, ratio_policy
from flexfed.rivals import BANDITS
from flexfed.select import prefix_ratio
from flexfed.submodel import Submodel, full, unpack
from strategies import STRATEGIES
from strategies.widths import WidthStrategy

WIDTH_METHODS = tuple(sorted(name for name, strategy in STRATEGIES.items() if issubclass(strategy, WidthStrategy)))
SMALL: dict[str, Any] = {
    "partition": "shards",
    "shard-size": 20,
    "test-per-label": 4,
    "batch-size": 8,
    "flexfl.scores": "0.4, 0.5, 0.6, 0.7",
    "fraction-evaluate": 0.0,
    "evaluate-every": 9,
    "batch-norm": "batch",
    "personal": "none",
}
SAMPLES = 32  # of 36 in whole batches of 8
GOOD = Outcome(accuracy=0.5, macs=1_000_000, full_macs=4_000_000, bytes_up=100_000)
ARRAYS = random_arrays(toy_task().layout, np.random.default_rng(0))


@cache
def task_of(strategy: str) -> Task:
    return Experiment.read({**QUICK, **SMALL, "strategy": strategy}).task(10, DIGITS)


def server(strategy: str, devices: Mapping[int, Device], **values: Any) -> Any:
    """A server that knows its devices and has a model, and no grid."""
    given = {**QUICK, **SMALL, "strategy": strategy, **values}
    experiment = Experiment.read({key.replace("_", "-"): value for key, value in given.items()})
    made = STRATEGIES[strategy](experiment, task_of(strategy), load_server(experiment.data))
    made.federation.devices = dict(devices)
    made.begin(ARRAYS, InProcessGrid(client_app.app, 1))
    return made


def bits(policy: Any) -> dict[str, bytes]:
    return {key: array.tobytes() for key, array in policy.state_dict().items()}


# --- policies ---------------------------------------------------------------------------------------------------------


def test_the_policy_of_a_name() -> None:
    config = BanditConfig()
    assert ratio_policy("level", config, 1, 10.0) is None
    assert isinstance(ratio_policy("budget", config, 1, 10.0), AllOfIt)
    assert all(isinstance(ratio_policy(name, config, 1, 10.0), OneBanditEach) for name in BANDITS)
    with pytest.raises(KeyError):
        ratio_policy("p-ucb", config, 1, 10.0).choose(0, 1.0, 1)  # type: ignore[union-attr]


def test_all_of_it_is_the_cap_and_learns_nothing() -> None:
    policy = AllOfIt()
    assert [policy.choose(3, cap, 1) for cap in (0.125, 0.5, 1.0)] == [0.125, 0.5, 1.0]
    policy.observe(3, GOOD)
    assert policy.state_dict() == {}
    policy.load_state_dict({})


@pytest.mark.parametrize("name", BANDITS)
def test_draws_follow_from_seed_round_and_client_alone(name: str) -> None:
    """Whoever was asked before, however often, and whatever the process has drawn."""

    def ratios(seed: int, partitions: list[int], rounds: list[int]) -> dict[tuple[int, int], float]:
        found = {}
        for server_round in rounds:
            for partition in partitions:
                fresh = OneBanditEach(name, BanditConfig(), seed, 20.0)
                fresh.choose(99, 1.0, server_round)
                np.random.rand(3)
                found[partition, server_round] = fresh.choose(partition, 1.0, server_round)
        return found

    one, other = ratios(1, [0, 1, 2], [1, 2]), ratios(1, [2, 0, 1], [2, 1])
    assert one == other
    if name == "fixed":
        assert set(one.values()) == {0.5}
    else:
        assert len(set(one.values())) == 6
        assert not set(one.values()) & set(ratios(2, [0, 1, 2], [1, 2]).values())


def play(policy: OneBanditEach, rounds: range, credit: Callable[[int, int], bool] = lambda r, p: True) -> list[float]:
    """Three clients of unequal caps, whose accuracy comes from their ratio."""
    chosen = []
    for server_round in rounds:
        for partition, cap in ((4, 1.0), (0, 0.7), (9, 0.55)):
            ratio = policy.choose(partition, cap, server_round)
            chosen.append(ratio)
            assert 0 < ratio <= cap
            if credit(server_round, partition):
                cost = int(1e6 * ratio)
                policy.observe(partition, Outcome(0.2 + 0.01 * server_round + ratio / 4, cost, 1_000_000, 4 * cost))
    return chosen


@pytest.mark.parametrize("name", BANDITS)
@pytest.mark.parametrize("cap", ["clip", "relative"])
def test_a_policy_goes_on_from_its_state_as_if_nothing_had_been(name: str, cap: Any) -> None:
    config = BanditConfig(cap=cap)
    whole, left = (OneBanditEach(name, config, 7, 25.0) for _ in range(2))
    ratios = play(whole, range(1, 26))
    assert play(left, range(1, 12)) == ratios[:33]
    again = OneBanditEach(name, config, 7, 25.0)
    again.load_state_dict({key: array.copy() for key, array in left.state_dict().items()})
    assert play(again, range(12, 26)) == ratios[33:]
    assert bits(again) == bits(whole)


@pytest.mark.parametrize("name", BANDITS)
def test_i10_a_job_that_brought_nothing_leaves_no_trace(name: str) -> None:
    """Lost or refused: another round later, all is as if it had never been asked."""
    lost = {(3, 4), (3, 0), (5, 9), (6, 4)}
    policy = OneBanditEach(name, BanditConfig(), 7, 25.0)
    play(policy, range(1, 3))
    before = bits(policy)
    play(policy, range(3, 4), lambda *_: False)
    assert bits(policy) == before
    with_losses, without = (OneBanditEach(name, BanditConfig(), 7, 25.0) for _ in range(2))
    play(with_losses, range(1, 9), lambda r, p: (r, p) not in lost)
    for server_round in range(1, 9):
        for partition, cap in ((4, 1.0), (0, 0.7), (9, 0.55)):
            if (server_round, partition) not in lost:
                ratio = without.choose(partition, cap, server_round)
                cost = int(1e6 * ratio)
                without.observe(partition, Outcome(0.2 + 0.01 * server_round + ratio / 4, cost, 1_000_000, 4 * cost))
    assert bits(with_losses) == bits(without)


@pytest.mark.parametrize("name", [name for name in BANDITS if name not in ("fixed",)])
def test_i10_a_device_below_all_arms_gets_its_cap_and_changes_nothing(name: str) -> None:
    policy = OneBanditEach(name, BanditConfig(), 7, 25.0)
    play(policy, range(1, 4))
    before = bits(policy)
    assert [policy.choose(4, cap, 4) for cap in (0.5, 0.25, 1 / 64)] == [0.5, 0.25, 1 / 64]
    policy.observe(4, GOOD)
    assert bits(policy) == before
    policy.choose(4, 1.0, 5)
    policy.observe(4, GOOD)
    assert bits(policy) != before


def test_two_replies_are_never_credited_to_one_pull() -> None:
    policy = OneBanditEach("p-ucbv", BanditConfig(), 7, 25.0)
    policy.choose(0, 1.0, 1)
    policy.choose(1, 1.0, 1)
    policy.observe(0, GOOD)
    before = bits(policy)
    for partition in (0, 5):  # answered already; never asked
        with pytest.raises(KeyError):
            policy.observe(partition, GOOD)
    assert bits(policy) == before
    policy.observe(1, GOOD)
    policy.choose(0, 1.0, 2)  # lost
    policy.choose(0, 1.0, 3)
    policy.observe(0, GOOD)
    with pytest.raises(KeyError):
        policy.observe(0, GOOD)
    assert policy.state_dict()["bandit/count"].tolist() == [1, 1, 0, 0, 0, 1, 0, 0, 0, 0]


def test_a_client_is_compared_with_its_own_best() -> None:
    policy = OneBanditEach("p-ucbv", BanditConfig(num_arms=2, drop=1.0), 7, 25.0)
    for accuracy in (0.8, 0.6):
        for partition in (0, 1):
            policy.choose(partition, 1.0, 1)
            policy.observe(partition, replace(GOOD, accuracy=accuracy if partition == 0 else 1 - accuracy))
    state = policy.state_dict()
    assert state["bandit/best"].tolist() == pytest.approx([0.8, 0.4])
    down, up = state["bandit/mean"][1], state["bandit/mean"][3]
    assert state["bandit/mean"][[0, 2]].tolist() == [0, 0]
    assert down < 0 < up


@pytest.mark.parametrize(("rounds", "fraction", "horizon"), [(40, 0.25, 10.0), (8, 0.5, 4.0), (2, 0.1, 1.0)])
def test_the_horizon_is_how_often_a_client_will_be_asked(rounds: int, fraction: float, horizon: float) -> None:
    made = server("heterofl", {0: Device(0)}, ratio_policy="p-ucbv", num_server_rounds=rounds, fraction_train=fraction)
    made.policy.choose(0, 1.0, 1)
    assert made.policy._bandits[0].horizon == pytest.approx(horizon)


# --- methods and policies ---------------------------------------------------------------------------------------------


def fleet_of(rng: np.random.Generator) -> dict[int, Device]:
    told = {p: (float(rng.uniform(0.02, 1.4)), float(rng.choice([math.inf, rng.uniform(0.02, 1)]))) for p in range(5)}
    devices = {p: Device(p, capacity=c, width=w, num_examples=36) for p, (c, w) in told.items()}
    return {**devices, 5: Device(5, num_examples=36), 6: Device(6, capacity=0.004, num_examples=36)}


@pytest.mark.parametrize("cap", ["clip", "relative"])
@pytest.mark.parametrize("policy", ["budget", *BANDITS])
@pytest.mark.parametrize("strategy", WIDTH_METHODS)
def test_no_job_is_larger_than_its_devices_cap(strategy: str, policy: str, cap: str) -> None:
    """Over rounds in which every client learns; a ratio is a multiple of 1/64, but FedLPS's."""
    rng = np.random.default_rng(4)
    devices = fleet_of(rng)
    made = server(strategy, devices, ratio_policy=policy, **{"bandit.cap": cap})
    layout, below = made.task.layout, 0
    whole = num_parameters(layout, full(layout))
    made.devices = devices
    for server_round in range(1, 5):
        for partition, job in made.assign(server_round, devices, rng).items():
            device = devices[partition]
            most = made.cap_of(device)
            ratio = ratio_of(job, made)
            assert 0 < ratio <= most <= 1
            assert num_parameters(layout, job.submodel) <= num_parameters(layout, made.part_at(most, server_round))
            assert num_parameters(layout, job.submodel) <= device.capacity * whole + 1e-6
            assert strategy == "fedlps" or ratio * 64 == int(ratio * 64)
            below += ratio < most
            metrics = {"train-accuracy": float(rng.random()), "macs": 1e6 * ratio}
            update = Update(job.submodel, np.zeros(0, dtype=np.float32), 1.0, metrics)
            WidthStrategy.check(made, job, update)
            WidthStrategy.observe(made, server_round, partition, update)
    assert (below > 0) == (policy != "budget")


def ratio_of(job: Assignment, made: Any) -> float:
    if "ratio" in job.config:
        return float(str(job.config["ratio"]))
    return min(float(r) for r, part in made._parts.items() if part == job.submodel)  # FlexFL names no ratio


def test_caps_that_are_remembered_are_each_devices_own() -> None:
    """Whatever sets a device apart from one that was asked about before."""
    base = Device(0, speed_macs_s=1e8, link_bytes_s=1e6, download_bytes_s=1e6, num_examples=36)
    others: list[dict[str, Any]] = [
        {"capacity": 0.4},
        {"width": 0.3},
        {"memory_bytes": 28_600_000.0},
        {"speed_macs_s": 1e7},
        {"link_bytes_s": 2e4},
        {"download_bytes_s": 2e4},
        {"num_examples": 3600},
    ]
    made = server("heterofl", {0: base}, ratio_policy="budget", round_deadline=6.0)
    assert made.cap_of(base) == 1
    for other in others:
        device = replace(base, **other)
        fresh = server("heterofl", {0: base}, ratio_policy="budget", round_deadline=6.0)
        assert made.cap_of(device) == fresh.cap_of(device) != 1, other
        assert made.cap_of(replace(device, partition=3)) == fresh.cap_of(device)


def test_ratios_are_rounded_down_to_64ths() -> None:
    made = server("heterofl", {0: Device(0)}, ratio_policy="uniform")
    given = [1.0, 0.999, 0.5, 0.5 - 1e-12, 0.51, 1 / 64, 0.001, 33 / 64 + 1e-4]
    assert [made.rounded(ratio) for ratio in given] == [1.0, 63 / 64, 0.5, 0.5, 0.5, 1 / 64, 1 / 64, 33 / 64]
    assert server("fedlps", {0: Device(0)}).rounded(0.517) == 0.517


def test_a_device_without_a_cap_is_in_no_cohort() -> None:
    for strategy in WIDTH_METHODS:
        devices = {0: Device(0, memory_bytes=1e6, num_examples=36), 1: Device(1, num_examples=36)}
        made = server(strategy, devices, ratio_policy="p-ucbv")
        assert list(made.assign(1, devices, np.random.default_rng(0))) == [1]
        with pytest.raises(ValueError, match=r"partition 0 \(device\) cannot train even the smallest part"):
            made.part_of(devices[0], 1)


# --- whole runs -------------------------------------------------------------------------------------------------------

RUNS = [(policy, WIDTH_METHODS[i % len(WIDTH_METHODS)]) for i, policy in enumerate(("level", "budget", *BANDITS))]


@pytest.mark.parametrize(("policy", "strategy"), RUNS)
def test_law_8_every_policy_runs_and_the_same_seed_is_the_same_run(policy: str, strategy: str, tmp_path: Path) -> None:
    values = {**SMALL, "num-server-rounds": 2, "ratio-policy": policy}
    runs = []
    for seed, noise in ((1, 0), (1, 5)):
        np.random.seed(noise)
        runs.append(run_toy(tmp_path, strategy, {**values, "seed": seed}, clients=2))
    assert (runs[0] / "metrics.jsonl").read_bytes() == (runs[1] / "metrics.jsonl").read_bytes()
    assert same_bits(final_model(runs[0]), final_model(runs[1]))
    for line in lines(runs[0]):
        assert sum(line["trained"].values()) == 2
        assert not line["refused"] + line["failed"]


def test_law_2_late_replies_give_the_same_bits_and_the_same_bandits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = {**SMALL, "num-server-rounds": 3, "replies-in-flight": 3, "personal": "own", "fleet": "equal"}
    prompt = run_toy(tmp_path, "fedlps", values)
    late = run_toy(tmp_path, "fedlps", values, delay=lambda: int(rng.integers(3)))
    assert (late / "metrics.jsonl").read_bytes() == (prompt / "metrics.jsonl").read_bytes()
    assert same_bits(final_model(late), final_model(prompt))
    states = [bandit_state(run) for run in (prompt, late)]
    assert same_bits(*states)
    assert states[0]["bandit/count"].sum() == 12


def bandit_state(run: Path) -> dict[str, np.ndarray]:
    found = load_checkpoint(run / "checkpoint")
    assert found is not None
    return {key: value for key, value in found.state.items() if key.startswith("bandit/")}


def utility(accuracy: float) -> float:
    return 10 - 20 / (1 + math.exp(0.35 * accuracy))


@pytest.mark.parametrize(("strategy", "reference"), [("heterofl", 0.0), ("flexfl", 0.0), ("fedlps", 3.5)])
def test_the_reward_is_that_of_the_replies(strategy: str, reference: float, tmp_path: Path) -> None:
    """From accuracy, work and bytes of each reply, by hand; the arms of the first two pulls are the first two."""
    task = task_of(strategy)
    layout = task.layout
    seen: dict[int, list[tuple[float, float, float]]] = {}

    def listen(request: Message, reply: Message, partition: int) -> Message:
        if request.metadata.message_type == "train":
            part = unpack(layout, reply.content["submodel"])  # type: ignore[arg-type]
            trained = Submodel(part.units | layout.fixed_units)
            told: Any = reply.content["metrics"]
            if strategy != "flexfl":  # whose teachers work beside
                assert told["macs"] == 3 * task.macs(trained) * SAMPLES
            megabytes = 4 * num_parameters(layout, part) / 2**20
            seen.setdefault(partition, []).append((told["train-accuracy"], 2e-6 * told["macs"], megabytes))
        return reply

    knobs = {
        "bandit.cap": "relative",
        "bandit.baseline": "zero",
        "bandit.drop": 1.0,
        "bandit.reference-mflops": reference,
    }
    values = {**SMALL, **knobs, "num-server-rounds": 2, "ratio-policy": "p-ucbv", "fleet": "flexfl"}
    state = bandit_state(run_toy(tmp_path, strategy, values, clients=4, alter=listen))
    assert state["bandit/partition"].tolist() == [0, 1, 2, 3]
    caps = [cap_by_hand(task, capacity, strategy) for capacity in (0.35, 0.6, 1.1, 1.1)]
    assert caps[0] < caps[1] < 1 == caps[2] == caps[3]
    full_mflops = 2e-6 * 3 * task.macs(full(layout)) * SAMPLES
    for partition, replies in seen.items():
        best, arms = 0.0, state["bandit/offset"][partition]
        for k, (accuracy, mflops, megabytes) in enumerate(replies):
            price = 3 * mflops / ((reference or full_mflops) * caps[partition]) + megabytes / 14.9
            expected = (utility(accuracy) - utility(best)) / price
            assert state["bandit/mean"][arms + k] == pytest.approx(expected, rel=1e-9)
            best = max(best, accuracy)
        assert len(replies) == 2
        assert state["bandit/count"][arms : arms + 5].tolist() == [1, 1, 0, 0, 0]
        assert state["bandit/best"][partition] == best


def cap_by_hand(task: Task, capacity: float, strategy: str) -> float:
    if strategy == "flexfl":  # tests/test_budget.py has its oracle
        return float(server("flexfl", {0: Device(0)}, ratio_policy="budget").cap_of(Device(0, capacity=capacity)))
    rounding: Any = "floor" if strategy == "fedlps" else "ceil"
    numbers = {k: num_parameters(task.layout, prefix_ratio(task.layout, k / 64, rounding)) for k in range(1, 65)}
    return max(k for k, num in numbers.items() if num <= capacity * numbers[64]) / 64


IMPOSSIBLE: list[dict[str, Any]] = [
    {"train-accuracy": float("nan")},
    {"train-accuracy": 2.0},
    {"train-accuracy": -1.0},
    {"train-accuracy": None},
    {"macs": float("nan")},
    {"macs": -1.0},
    {"macs": None},
]


def test_impossible_replies_are_refused_told_and_neither_averaged_nor_credited(tmp_path: Path) -> None:
    """As if those clients had failed; the last one is as it should be."""

    def lie(request: Message, reply: Message, partition: int) -> Message:
        if request.metadata.message_type == "train" and partition < len(IMPOSSIBLE):
            told: Any = reply.content["metrics"]
            for key, value in IMPOSSIBLE[partition].items():
                if value is None:
                    del told[key]
                else:
                    told[key] = value
        return reply

    def fail(request: Message, reply: Message, partition: int) -> Message:
        return failure(request) if request.metadata.message_type == "train" and partition < len(IMPOSSIBLE) else reply

    values = {**SMALL, "fleet": "equal", "ratio-policy": "p-ucbv", "num-server-rounds": 1}
    refused, failed = (run_toy(tmp_path, "heterofl", values, 8, alter=alter) for alter in (lie, fail))
    (line,) = lines(refused)
    reasons = {found["partition"]: found["reason"] for found in line["refused"]}
    assert sorted(reasons) == list(range(len(IMPOSSIBLE)))
    for partition, change in enumerate(IMPOSSIBLE):
        (value,) = change.values()
        finite = value is None or math.isfinite(value)
        told = "a reply should tell train-accuracy, a fraction in [0, 1], and macs; got"
        expected = (told, "macs of a reply must lie in [0, 1e+18]") if finite else ("finite",)
        assert any(reason in reasons[partition] for reason in expected), reasons[partition]
    assert sum(line["trained"].values()) == 1
    assert same_bits(final_model(refused), final_model(failed))
    state = bandit_state(refused)
    assert same_bits(state, bandit_state(failed))
    counts = np.add.reduceat(state["bandit/count"], state["bandit/offset"][:-1])
    assert counts.tolist() == [0] * 7 + [1]


def test_only_policies_that_learn_ask_what_a_job_brought() -> None:
    update = Update(full(toy_task().layout), np.zeros(0, dtype=np.float32), 1.0, {})
    job = Assignment(full(toy_task().layout), "1", {"ratio": 1.0})
    server("heterofl", {0: Device(0)}, ratio_policy="level").check(job, update)
    for metrics in ({"train-accuracy": 0.0, "macs": 0.0}, {"train-accuracy": 1.0, "macs": 1.0}):
        server("heterofl", {0: Device(0)}, ratio_policy="p-ucbv").check(job, replace(update, metrics=metrics))
    with pytest.raises(ValueError, match=r"got -1\.0 and -1\.0"):
        server("heterofl", {0: Device(0)}, ratio_policy="p-ucbv").check(job, update)


# --- configuration ----------------------------------------------------------------------------------------------------


def read(strategy: str, **values: Any) -> Any:
    return Experiment.read({"strategy": strategy, **{k.replace("_", "-"): v for k, v in values.items()}}).settings


def test_what_is_left_to_the_method_is_its_papers() -> None:
    for strategy in STRATEGIES:
        expected = ("p-ucbv", "stored-local") if strategy == "fedlps" else ("level", "none")
        settings = read(strategy)
        assert (settings.ratio_policy, settings.personal) == expected
        assert (METHODS[strategy].ratio_policy, METHODS[strategy].personal) == expected
    given = read("fedlps", ratio_policy="level", personal="none")
    assert (given.ratio_policy, given.personal) == ("level", "none")
    given = read("heterofl", ratio_policy="thompson", personal="global-masked")
    assert (given.ratio_policy, given.personal) == ("thompson", "global-masked")


def test_methods_of_any_width_are_those_with_a_width_strategy() -> None:
    assert tuple(name for name, method in sorted(METHODS.items()) if method.any_width) == WIDTH_METHODS
    assert len(WIDTH_METHODS) >= 5


@pytest.mark.parametrize("strategy", ["exclusive", "fedavg", "small"])
def test_a_bandit_needs_widths_to_choose_from(strategy: str) -> None:
    for policy in BANDITS:
        able = f"ratio-policy='{policy}' needs a method that gives each device a width of its own: fedlps, fedrolex, f"
        with pytest.raises(ValueError, match=able + f".*heterofl; {strategy} does not"):
            read(strategy, ratio_policy=policy)
    assert read(strategy, ratio_policy="budget").ratio_policy == "budget"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match="unknown ratio-policy 'ucb'; known: budget, epsilon-greedy, fixed, level, own, p-"
    ):
        read("heterofl", ratio_policy="ucb")
    with pytest.raises(ValueError, match="unknown personal 'local'; known: global-masked, none, own, stored-local"):
        read("heterofl", personal="local")
