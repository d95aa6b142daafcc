from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import DIGITS

from flexfed.budget import Budget
from flexfed.config import Experiment
from flexfed.data import load_server
from flexfed.devices import FLEETS, Device, DeviceClass, Fleet, declared, from_record, load_fleet, to_record
from flexfed.select import prefix_ratio
from flexfed.submodel import Submodel, full
from strategies import STRATEGIES

NAMES = sorted(path.stem for path in FLEETS.glob("*.toml"))


def fleet(*shares: float) -> Fleet:
    return Fleet(tuple(DeviceClass(f"kind{i}", share, 1.0 + i) for i, share in enumerate(shares)))


# --- devices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"capacity": 0.0}, "device 7: capacity must be > 0, got 0.0"),
        ({"capacity": float("nan")}, "capacity must be > 0"),
        ({"speed_macs_s": -1.0}, "speed-macs-s must be > 0, got -1.0"),
        ({"link_bytes_s": 0.0}, "link-bytes-s must be > 0"),
        ({"download_bytes_s": -1.0}, "download-bytes-s must be >= 0, got -1.0"),
        ({"capacity_spread": -0.1}, "capacity-spread must be >= 0"),
        ({"compute_watts": float("inf")}, "compute-watts must be >= 0"),
        ({"memory_bytes": 0.0}, "memory-bytes must be > 0, got 0.0"),
        ({"memory_bytes": float("nan")}, "memory-bytes must be > 0"),
        ({"width": 0.0}, "device 7: width must be > 0, got 0.0"),
        ({"width": float("nan")}, "width must be > 0"),
        ({"memory_spread_bytes": -1.0}, "memory-spread-bytes must be >= 0"),
        ({"availability": (0.5, 0.0)}, r"availability must lie in \(0, 1\], got \(0.5, 0.0\)"),
        ({"num_examples": -1}, "num-examples must be >= 0, got -1"),
    ],
)
def test_impossible_devices_are_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Device(7, **values)


def test_capacity_falls_below_nominal_by_half_a_normal() -> None:
    rng = np.random.default_rng(0)
    device = Device(0, capacity=0.6, capacity_spread=0.1)
    drawn = np.array([device.capacity_now(rng) for _ in range(4000)])
    assert (drawn <= 0.6).all()
    assert drawn.mean() == pytest.approx(0.6 - 0.1 * np.sqrt(2 / np.pi), abs=0.003)
    assert replace(device, capacity_spread=0.0).capacity_now(rng) == 0.6


def test_memory_falls_below_nominal_as_capacity_does() -> None:
    rng = np.random.default_rng(0)
    device = Device(0, memory_bytes=1e9, memory_spread_bytes=1e8)
    drawn = np.array([device.memory_now(rng) for _ in range(4000)])
    assert (drawn <= 1e9).all()
    assert drawn.mean() == pytest.approx(1e9 - 1e8 * np.sqrt(2 / np.pi), rel=0.005)
    assert Device(0).memory_now(rng) == np.inf


def test_availability_is_drawn_anew_every_round_and_alike_everywhere() -> None:
    device = Device(3, capacity=0.8, memory_bytes=1e9, speed_macs_s=4e9, availability=(0.25, 0.5, 1.0))
    rounds = [device.in_round(r, seed=7) for r in range(1, 301)]
    assert rounds == [device.in_round(r, seed=7) for r in range(1, 301)]
    assert rounds != [device.in_round(r, seed=8) for r in range(1, 301)]
    counts = {share: sum(d.capacity == 0.8 * share for d in rounds) for share in device.availability}
    assert all(70 < count < 130 for count in counts.values())
    for d in rounds:
        assert d.memory_bytes / 1e9 == d.speed_macs_s / 4e9 == d.capacity / 0.8
        assert d.in_round(9, seed=1) == d  # drawn once
    assert Device(0).in_round(1, seed=7) == Device(0)


def test_a_record_holds_all_of_a_device() -> None:
    device = Device(3, "weak", 0.35, 0.5, 0.05, 4e8, 1e7, True, (0.5, 1.0), 2e9, 1e5, 2e5, 3.0, 0.5, 120, (0, 4, 9))
    assert from_record(to_record(device)) == device
    assert from_record(to_record(Device(0))) == Device(0)
    assert "capacity-spread" in to_record(device)


def test_width_is_a_devices_own_measure() -> None:
    """It swings with the device's power, it travels, and a node may tell it; one that was never told does not bind."""
    device = Device(3, width=0.5, availability=(0.25, 1.0))
    assert {d.width for d in device.states()} == {0.125, 0.5}
    assert {device.in_round(r, 7).width for r in range(1, 30)} == {0.125, 0.5}
    for server_round in range(1, 9):
        now = device.in_round(server_round, 7)
        assert now.width == 0.5 * now.capacity
    assert Device(0, availability=(0.5,)).in_round(1, 7).width == np.inf
    for width in (0.3, np.inf):
        assert from_record(to_record(Device(1, width=width))).width == width
    assert declared(device, {"width": 1}) == Device(3, width=1.0)
    assert declared(device, {"capacity": 0.5}).width == 0.5
    assert declared(device, {"kind": "pi"}).width == 0.5
    assert declared(device, {"memory-bytes": 1e9}).width == np.inf
    assert declared(device, {"memory-bytes": 1e9, "width": 0.25}).width == 0.25
    for wrong, match in (({"width": "half"}, "width must be a number"), ({"width": -1.0}, "width must be > 0")):
        with pytest.raises(ValueError, match=match):
            declared(device, wrong)


def test_a_narrow_device_gets_a_narrow_part() -> None:
    """HeteroFL's level, and the budget's own question against counting units by hand."""
    experiment = Experiment.read({"strategy": "heterofl"})
    task = experiment.task(10, DIGITS)
    made: Any = STRATEGIES["heterofl"](experiment, task, load_server(experiment.data))
    ratios = (1, 0.5, 0.25, 0.125, 0.0625)
    for width in (0.01, 0.0625, 0.1, 0.125, 0.25, 0.49, 0.5, 0.99, 1.0, 2.0, np.inf):
        level = next((i for i, ratio in enumerate(ratios) if ratio <= width), 4)
        assert made.level_of(Device(0, width=width)) == level
        assert made.level_of(Device(0, capacity=0.02, width=width)) == max(level, 3)
    budget, rng = Budget(task), np.random.default_rng(0)
    answers = []
    for _ in range(300):
        width, ratio = float(rng.choice([0.07, 0.3, *rng.uniform(0.01, 1, 3)])), float(rng.uniform(0.01, 1))
        units = prefix_ratio(task.layout, float(rng.choice([ratio, width]))).units.copy()
        sizes = {"conv1": 16, "conv2": 32, "conv3": 64, "fc": 128}
        if rng.random() < 0.3:
            (span,) = [s for g, s in task.layout.groups.items() if len(s) == 32]
            units[span.start : span.stop] = rng.random(32) < width
        kept = [int(units[s.start : s.stop].sum()) for s in task.layout.groups.values() if len(s) in sizes.values()]
        most = [max(1, int(np.ceil(size * width - 1e-9))) for size in sizes.values()]
        answers.append(budget.is_narrow(Submodel(units), width))
        assert answers[-1] == all(k <= m for k, m in zip(kept, most, strict=True))
    assert 50 < sum(answers) < 250
    assert budget.is_narrow(prefix_ratio(task.layout, 0.001), 1e-6), "one unit of each group is for everybody"
    assert all(budget.is_narrow(full(task.layout), width) for width in (1.0, 3.0, np.inf))


def test_records_that_are_no_device_are_refused() -> None:
    record = to_record(Device(0))
    missing = {key: value for key, value in record.items() if key != "capacity"}
    for wrong in (missing, {**record, "colour": "red"}, {}):
        with pytest.raises(ValueError, match=r"a device's profile should have availability, capacity, .*; got"):
            from_record(wrong)
    with pytest.raises(ValueError, match="capacity of a device's profile should be a number from 1e-06 to"):
        from_record({**record, "capacity": -1.0})


def test_what_a_node_declares_wins_over_its_fleet() -> None:
    device = Device(2, "weak", 0.35, num_examples=50, labels=(1,))
    told = declared(device, {"capacity": 1, "kind": "jetson", "partition-id": 9, "num-examples": 7, "data-path": "x"})
    assert told == replace(device, capacity=1.0, kind="jetson")
    assert isinstance(told.capacity, float)
    assert declared(device, {}) == device
    with pytest.raises(ValueError, match="device 2: capacity must be > 0, got -1"):
        declared(device, {"capacity": -1})


def test_what_a_node_says_of_its_memory_is_not_blurred_by_its_fleet() -> None:
    device = Device(2, "weak", 0.35, 0.5, 0.1, 1e9, 1e8, availability=(0.5, 1.0))
    told = declared(device, {"memory-bytes": 500_000_000, "measure-memory": True})
    assert told == Device(2, "weak", 1.0, math.inf, 0.0, 5e8, 0.0, measure_memory=True)
    assert declared(device, {"memory-bytes": 5e8, "capacity": 0.5}) == Device(2, "weak", 0.5, math.inf, 0.0, 5e8, 0.0)
    assert declared(device, {"memory-bytes": 5e8, "memory-spread-bytes": 2e7}).memory_spread_bytes == 2e7
    for told in ({"speed-macs-s": 4e9}, {"capacity": 0.5}, {"measure-memory": True}):
        assert declared(device, told).availability == ()
    assert declared(device, {"link-bytes-s": 1e6, "download-bytes-s": 2e6, "kind": "pi"}).availability == (0.5, 1.0)
    for wrong, meant in (
        ("memory_bytes", "memory-bytes"),
        ("memory-byte", "memory-bytes"),
        ("speed-mac-s", "speed-macs-s"),
    ):
        with pytest.raises(ValueError, match=f"partition 2: unknown key '{wrong}'; did you mean {meant}"):
            declared(device, {wrong: 1e9})
    for key, value, kind in (("measure-memory", 1, "true or false"), ("memory-bytes", "1 GB", "a number")):
        with pytest.raises(ValueError, match=f"node-config of partition 2: {key} must be {kind}, got"):
            declared(device, {key: value})


def test_a_node_that_tells_of_its_link_alone_has_that_speed_both_ways() -> None:
    device = Device(2, link_bytes_s=1e6, download_bytes_s=8e6)
    assert declared(device, {"link-bytes-s": 5e5}) == Device(2, link_bytes_s=5e5)
    assert declared(device, {"download-bytes-s": 4e6}) == Device(2, link_bytes_s=1e6, download_bytes_s=4e6)
    both = {"link-bytes-s": 5e5, "download-bytes-s": 4e6}
    assert declared(device, both) == Device(2, link_bytes_s=5e5, download_bytes_s=4e6)


# --- fleets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "num", "counts"),
    [
        ((0.6, 0.3, 0.1), 20, [12, 6, 2]),
        ((0.6, 0.3, 0.1), 4, [2, 1, 1]),
        ((0.4, 0.3, 0.3), 100, [40, 30, 30]),
        ((0.6, 0.3, 0.1), 1, [0, 0, 1]),
        ((0.125, 0.875), 8, [1, 7]),
        ((0.005, 0.995), 1000, [5, 995]),
        ((1.0,), 3, [3]),
        ((0.0, 1.0), 3, [0, 3]),
    ],
)
def test_counts_are_rounded_down_and_the_last_class_gets_the_rest(
    shares: tuple[float, ...], num: int, counts: list[int]
) -> None:
    assert fleet(*shares).counts(num) == counts


def test_counts_always_sum_to_the_number_of_devices() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        shares = rng.dirichlet(np.full(int(rng.integers(1, 30)), 0.5))
        num = int(rng.integers(1, 500))
        counts = fleet(*shares).counts(num)
        assert sum(counts) == num
        assert min(counts) >= 0


@pytest.mark.parametrize("shares", [(), (0.5,), (0.7, 0.7), (-0.5, 1.5)])
def test_shares_sum_to_one(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must be >= 0 and sum to 1, got"):
        fleet(*shares)


def test_partitions_are_dealt_in_order_and_each_device_is_its_own() -> None:
    skewed = load_fleet("skewed")
    devices = [skewed.device(p, 20, 1) for p in range(20)]
    assert [d.kind for d in devices] == ["weak"] * 12 + ["medium"] * 6 + ["strong"] * 2
    assert [d.partition for d in devices] == list(range(20))
    assert devices == [skewed.device(p, 20, 1) for p in range(20)]
    assert {d.capacity_spread for d in devices} == {0.05, 0.08, 0.10}
    assert devices != [skewed.device(p, 20, 2) for p in range(20)]
    for outside in (-1, 20):
        with pytest.raises(ValueError, match=r"partition must be in 0\.\.19"):
            skewed.device(outside, 20, 1)


@pytest.mark.parametrize("name", NAMES)
def test_fleets_that_come_along(name: str) -> None:
    capacities = [device.capacity for device in (load_fleet(name).device(p, 10, 0) for p in range(10))]
    assert capacities == sorted(capacities)  # weakest first
    assert max(capacities) >= 1  # somebody holds the whole model


def test_the_papers_fleets_are_what_the_papers_say() -> None:
    fixed = [load_fleet("fedlps-fixed").device(p, 50, 1) for p in range(50)]
    levels = [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0]
    assert [d.capacity for d in fixed] == [level for level in levels for _ in range(10)]
    assert [d.width for d in fixed] == [d.capacity for d in fixed]
    assert [2 * d.speed_macs_s / 1e6 for d in fixed[::10]] == [46528, 93056, 186112, 372224, 744448]
    dynamic = load_fleet("fedlps").device(0, 50, 1)
    for device in (dynamic, *fixed):  # megabytes of 2^20
        assert (device.link_bytes_s / 2**20, device.download_bytes_s / 2**20) == pytest.approx((14.0, 110.6))
    assert {dynamic.in_round(r, 1).capacity for r in range(1, 100)} == set(levels)
    assert all(d.width == d.capacity for d in dynamic.states())
    assert dynamic.in_round(1, 1).speed_macs_s == 372.224e9 * dynamic.in_round(1, 1).capacity
    boards = load_fleet("boards")
    assert boards.counts(17) == [4, 10, 3]
    assert np.isfinite([boards.device(p, 17, 1).memory_bytes for p in range(17)]).all()


def test_unknown_fleets_list_the_known_ones() -> None:
    known = "boards, equal, even, fedlps, fedlps-fixed, fifths, flexfl, pyramid, quarters, skewed, tiers"
    with pytest.raises(ValueError, match=f"unknown fleet 'skewd'; known: {known}, or the absolute path"):
        load_fleet("skewd")
    with pytest.raises(ValueError, match=r"unknown fleet '/no/where.toml'"):
        load_fleet("/no/where.toml")


ROW = '[[class]]\nkind = "phone"\nshare = 1.0\ncapacity = 0.5\n'


def test_a_fleet_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(ROW + "width = 0.4\ncapacity-spread = 0.2\nspeed-macs-s = 5e8\n")
    device = load_fleet(str(path)).device(0, 1, 0)
    assert device.width == 0.4
    device = replace(device, width=np.inf)
    assert device == Device(0, "phone", 0.5, capacity_spread=0.2, speed_macs_s=5e8)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "sum to 1"),
        ('[[class]]\nkind = "phone"\n', "needs kind and share and may have .*; got kind"),
        (ROW + "width = 0\n", "width must be > 0, got 0"),
        (ROW + 'width = "half"\n', "class 'phone': width must be a number, got 'half'"),
        (ROW + "colour = 3\n", "mine.toml: a \\[\\[class\\]\\] needs"),
        (ROW.replace("0.5", "0.0"), "capacity must be > 0"),
        (ROW.replace("0.5", '"much"'), "capacity"),
        (ROW + "capacity-spread = -0.1\n", "capacity-spread must be >= 0"),
        (ROW + "capacity-spread = []\n", "capacity-spread"),
        (ROW + "speed-macs-s = 0.0\n", "speed-macs-s must be > 0"),
        (ROW + 'capacity-spread = ["0.1"]\n', "capacity-spread must be a number or a list of them, got"),
        (ROW + 'availability = "all"\n', "availability must be a number or a list of them, got"),
        (ROW + "availability = [true]\n", "availability must be a number or a list of them, got"),
        (ROW.replace('"phone"', "3"), "kind must be a string, got 3"),
        (ROW.replace("[[class]]", "[class]"), r"each class of a fleet is a table \[\[class\]\], got"),
        (ROW + "memory-bytes = 1e9\nmemory_bytes = 2e9\n", "needs kind and share"),
        ("[[class]\n", "mine.toml"),
    ],
)
def test_fleet_files_are_checked_before_anything_runs(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        load_fleet(str(path))
