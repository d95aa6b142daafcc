"""FedStitch's energy: the page's worked examples, invariant 13 over random tables, tiers, and the feedback."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexfed.cost import modelled_joules, modelled_seconds
from flexfed.devices import FLEETS, Device, load_fleet
from flexfed.stitching.actuators import Recorder
from flexfed.stitching.clocks import ModelledClock, WallClock
from flexfed.stitching.dvfs import (
    ORIN_CPU_MHZ,
    ORIN_GPU_MHZ,
    TIERS,
    Bill,
    Dvfs,
    Level,
    Work,
    bill,
    dvfs_of,
    grid,
    tier_of,
)
from flexfed.stitching.energy import (
    DEFAULTS,
    NO_PACE,
    Controller,
    EnergyConfig,
    Instruments,
    Spent,
    best_frequency,
    cheapest,
    choose,
    deadline,
    fastest_seconds,
    work_of,
)

WAITING = EnergyConfig(window="deadline", idle_watts=0.5)
FREE = EnergyConfig(cycles_per_image=0.0)


# --- the page's worked examples (6.5) -------------------------------------------------------------------------------


def clock_table(frequencies: Sequence[float]) -> Bill:
    """One clock: W = 1.5, k = 2, P_s = 1."""
    dvfs = Dvfs(tuple(Level(f, f) for f in frequencies), 1.0, 2.0, 2.0, 1.0)
    return bill(dvfs, Work(0.0, 1.5))


@pytest.mark.parametrize(
    ("limit", "frequency", "seconds", "joules"),
    [
        (4.0, 0.6299605249, 2.3811015780, 3.5716523669),
        (2.0, 0.75, 2.0, 3.6875),
        (0.5, 2.0, 0.75, 12.75),
    ],
)
def test_one_continuous_clock(limit: float, frequency: float, seconds: float, joules: float) -> None:
    best = best_frequency(1.5, 2.0, 1.0, limit, (0.3, 2.0))
    assert best == pytest.approx(frequency, abs=1e-10)
    found = clock_table([best])
    assert (found.seconds[0], found.joules[0]) == pytest.approx((seconds, joules), abs=1e-9)
    fine = np.linspace(0.3, 2.0, 17_001)
    searched = choose(clock_table(fine), limit)
    assert fine[searched.level] == pytest.approx(frequency, abs=1e-4)
    assert searched.feasible == (limit > 0.75)
    assert best_frequency(1.5, 2.0, 1.0, 100.0, (0.8, 2.0)) == 0.8


PAGE = Dvfs(grid((0.8, 1.2, 2.0), (0.4, 0.8, 1.3)), 1.0, 0.35, 2.2, 1.0)
PAGE_WORK = Work(0.6, 1.2, 0.05)
PAGE_TABLE = {
    (0.8, 0.4): (3.8, 4.3568),
    (0.8, 0.8): (2.3, 4.124),
    (0.8, 1.3): (1.723077, 6.319077),
    (1.2, 0.4): (3.55, 4.2748),
    (1.2, 0.8): (2.05, 4.042),
    (1.2, 1.3): (1.473077, 6.237077),
    (2.0, 0.4): (3.35, 4.6124),
    (2.0, 0.8): (1.85, 4.3796),
    (2.0, 1.3): (1.273077, 6.574677),
}


def test_the_pages_table() -> None:
    found = bill(PAGE, PAGE_WORK)
    assert PAGE.levels == tuple(PAGE_TABLE)
    np.testing.assert_allclose(np.transpose(found), list(PAGE_TABLE.values()), atol=1e-6)


@pytest.mark.parametrize(
    ("config", "limit", "level", "joules", "feasible"),
    [
        (DEFAULTS, 5.0, (1.2, 0.8), 4.042, True),
        (DEFAULTS, 2.5, (1.2, 0.8), 4.042, True),
        (DEFAULTS, math.inf, (1.2, 0.8), 4.042, True),
        (DEFAULTS, 1.8, (1.2, 1.3), 6.237077, True),
        (DEFAULTS, 1.2, (2.0, 1.3), 6.574677, False),
        (WAITING, 2.5, (0.8, 0.8), 4.224, True),
        (WAITING, 5.0, (0.8, 0.4), 4.9568, True),
        (WAITING, math.inf, (1.2, 0.8), 4.042, True),
        (replace(DEFAULTS, policy="max"), 5.0, (2.0, 1.3), 6.574677, True),
    ],
)
def test_the_pages_choices(
    config: EnergyConfig, limit: float, level: tuple[float, float], joules: float, feasible: bool
) -> None:
    found = choose(bill(PAGE, PAGE_WORK), limit, config)
    assert PAGE.levels[found.level] == level
    assert found.joules == pytest.approx(joules, abs=1e-6)
    assert found.seconds == pytest.approx(PAGE_TABLE[level][0], abs=1e-6)
    assert found.feasible == feasible


def test_a_margin_is_kept_free() -> None:
    table = bill(PAGE, PAGE_WORK)
    assert PAGE.levels[choose(table, 2.5, margin=0.1).level] == (1.2, 0.8)
    assert PAGE.levels[choose(table, 2.5, margin=0.2).level] == (2.0, 0.8)  # 1.85 <= 2 < 2.05
    assert not choose(table, 2.5, margin=0.6).feasible


def test_ties_go_to_the_shorter_and_then_to_the_first() -> None:
    table = Bill(np.array([3.0, 2.0, 2.0, 1.0]), np.array([1.0, 1.0, 1.0, 2.0]))
    assert cheapest(table, 5.0) == 1
    assert cheapest(table, 0.5) == 3
    assert cheapest(Bill(np.array([1.0, 1.0]), np.array([2.0, 1.0])), 0.5) == 1  # both fastest: the cheaper


@pytest.mark.parametrize(("q", "expected"), [(1.0, 3.1), (0.8, 2.5), (0.6, 1.2), (0.61, 2.5), (0.01, 0.8)])
def test_the_pages_deadlines(q: float, expected: float) -> None:
    times = [1.2, 0.8, 2.5, 1.0, 3.1]
    assert deadline(times, q) == expected
    assert deadline(times, q, slack=0.5) == pytest.approx(1.5 * expected)


def test_a_share_of_the_clients_is_not_one_more_by_rounding() -> None:
    times = [float(i) for i in range(1, 26)]
    assert 0.28 * 25 > 7  # by rounding
    assert [deadline(times, i / 25) for i in range(1, 26)] == times


# --- feedback -------------------------------------------------------------------------------------------------------

# Three levels that cost a batch [0.5, 0.3, 0.2] s and [1.0, 1.3, 1.9] J: a phase of 6 of them.
THREE = Bill(6 * np.array([0.5, 0.3, 0.2]), 6 * np.array([1.0, 1.3, 1.9]))


class Slowed:
    """A clock that slows batches down by factors."""

    def __init__(self, factors: Sequence[float]):
        self._factors = iter(factors)

    def begin(self) -> None:
        pass

    def observe(self, planned_seconds: float) -> float:
        return next(self._factors) * planned_seconds


@pytest.fixture
def three_levels(monkeypatch: pytest.MonkeyPatch) -> Dvfs:
    monkeypatch.setattr("flexfed.stitching.energy.bill", lambda dvfs, work: THREE)
    return Dvfs((Level(1.0, 1.0), Level(2.0, 2.0), Level(3.0, 3.0)), 0.0, 0.0, 0.0, 1.0)


def paced(controller: Controller, num_batches: int, images: int = 0, macs: int = 1) -> tuple[Spent, list[float]]:
    """A phase, and the correction after each of its batches."""
    controller.plan(num_batches, images, macs)
    corrections = []
    for _ in range(num_batches):
        with controller.batch():
            pass
        corrections.append(controller.spent().correction)
    return controller.spent(), corrections


@pytest.mark.parametrize(
    ("factors", "levels", "corrections", "seconds", "joules"),
    [
        ((1,) * 6, (1, 1, 1, 0, 0, 0), (1,) * 6, 2.4, 6.9),
        ((1, 1.5, 1.5, 1.5, 1, 1), (1, 1, 1, 2, 1, 1), (1, 1.25, 1.375, 1.4375, 1.21875, 1.109375), 2.1, 10.65),
    ],
)
def test_the_pages_feedback(
    three_levels: Dvfs,
    factors: Sequence[float],
    levels: tuple[int, ...],
    corrections: Sequence[float],
    seconds: float,
    joules: float,
) -> None:
    actuator = Recorder()
    instruments = Instruments(clock=Slowed(factors), actuator=actuator)
    spent, seen = paced(Controller(three_levels, 2.4, instruments=instruments), 6)
    assert spent.levels == levels
    assert seen == pytest.approx(corrections, abs=1e-12)
    assert (spent.seconds, spent.joules) == pytest.approx((seconds, joules), abs=1e-12)
    assert (spent.missed, spent.measured_joules) == (False, None)
    asked = [level for level, _ in itertools.groupby(levels)]  # only when it changes
    assert actuator.applied == [three_levels.levels[level] for level in asked]


def test_the_correction_survives_and_the_fastest_is_all_that_is_left(three_levels: Dvfs) -> None:
    spent, corrections = paced(Controller(three_levels, 2.4, correction=1.5), 6)
    assert spent.levels[0] == 2  # 6 * 0.3 * 1.5 > 2.4
    assert corrections[:2] == [1.25, 1.125]
    late, _ = paced(Controller(three_levels, 1.1), 6)
    assert (late.levels, late.missed) == ((2,) * 6, True)
    assert late.seconds == pytest.approx(1.2)
    just, _ = paced(Controller(three_levels, 1.2), 6)
    assert (just.levels, just.missed) == ((2,) * 6, False)  # 6 * 0.2 is a hair more than 1.2


def test_the_ablation_always_runs_at_the_fastest_level(three_levels: Dvfs) -> None:
    spent, _ = paced(Controller(three_levels, 100.0, config=replace(DEFAULTS, policy="max")), 6)
    assert spent.levels == (2,) * 6
    assert spent.joules == pytest.approx(6 * 1.9)


def test_idling_until_the_deadline_counts_where_the_window_says_so(three_levels: Dvfs) -> None:
    waiting, _ = paced(Controller(three_levels, 10.0, config=WAITING), 6)
    assert waiting.levels == (0,) * 6  # busy and waiting, 3 s are cheaper than 1.8 s
    assert waiting.joules == pytest.approx(6 * 1.0 + 0.5 * 7.0)
    dear, _ = paced(Controller(three_levels, 10.0, config=replace(WAITING, idle_watts=0.0)), 6)
    assert dear.joules == pytest.approx(6.0)


def test_phases_of_one_message_share_its_deadline(three_levels: Dvfs) -> None:
    controller = Controller(three_levels, 4.8)
    first, _ = paced(controller, 6)
    second, _ = paced(controller, 6)
    assert first.levels == (0,) * 6  # 3 s of 4.8
    assert second.levels[:6] == first.levels
    assert second.levels[6] == 1  # 1.8 s are left
    assert second.seconds == pytest.approx(4.8)
    assert not second.missed


def test_a_batch_that_raises_is_not_counted(three_levels: Dvfs) -> None:
    controller = Controller(three_levels, 2.4)
    controller.plan(6, 0, 1)
    with pytest.raises(KeyError), controller.batch():
        raise KeyError
    assert controller.spent() == Spent(0.0, 0.0, (), False, 1.0, None)


# --- clocks and meters ----------------------------------------------------------------------------------------------


def test_a_modelled_clock_is_exact_or_repeats_with_its_seed() -> None:
    assert [ModelledClock().observe(x) for x in (0.5, 2.0)] == [0.5, 2.0]
    seen = [ModelledClock(np.random.default_rng(seed), 0.3).observe(1.0) for seed in (1, 1, 2)]
    assert seen[0] == seen[1] != seen[2]
    clock = ModelledClock(np.random.default_rng(0), 0.3)
    logs = np.log([clock.observe(2.0) / 2.0 for _ in range(4000)])
    assert logs.mean() == pytest.approx(0.0, abs=0.02)
    assert logs.std() == pytest.approx(0.3, abs=0.02)


class Meter:
    """Joules that a machine tells, call by call."""

    def __init__(self, *readings: float | None):
        self._readings = iter(readings)

    def joules(self) -> float | None:
        return next(self._readings)


def test_a_wall_clock_counts_what_passes_between_batches() -> None:
    moments = iter([0.0, 10.0, 10.5, 12.0, 20.0, 21.0])
    controller = Controller(PAGE, config=FREE, instruments=Instruments(WallClock(lambda: next(moments))))
    assert paced(controller, 2)[0].seconds == 2.0  # from 10 to 12, with what passed before each
    assert paced(controller, 1)[0].seconds == 3.0  # what passes between phases does not count


def test_measured_joules_stand_beside_the_modelled_ones() -> None:
    def measured(*readings: float | None) -> float | None:
        instruments = Instruments(meter=Meter(*readings))  # type: ignore[arg-type]
        return paced(Controller(PAGE, instruments=instruments), 2)[0].measured_joules

    assert measured(7.0, 1.0, 2.5) == 3.5  # the first reading is from before the phase
    assert measured(None, None, None) is None
    assert measured(1.0, None, 2.0) is None


# --- invariant 13, over random tables -------------------------------------------------------------------------------

POSITIVE = st.floats(0.01, 100.0)
TABLES = st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=12).map(lambda rows: Bill(*np.array(rows).T))
LIMITS = st.floats(0.001, 300.0)


@given(TABLES, LIMITS, st.sampled_from([DEFAULTS, WAITING]))
@settings(max_examples=200, deadline=None)
def test_the_choice_is_the_cheapest_feasible_one(table: Bill, limit: float, config: EnergyConfig) -> None:
    found = choose(table, limit, config)
    idle = [0.5 * max(limit - t, 0) if config is WAITING else 0.0 for t in table.seconds]
    totals = [e + i for e, i in zip(table.joules, idle, strict=True)]
    feasible = [(e, t) for e, t in zip(totals, table.seconds, strict=True) if t <= limit]
    if feasible:
        assert (found.joules, found.seconds) == min(feasible)
        assert found.feasible
    else:
        assert found.seconds == min(table.seconds)
        assert not found.feasible
    most = choose(table, limit, replace(config, policy="max"))
    assert most.seconds == min(table.seconds)
    assert most.joules >= found.joules


@given(TABLES, LIMITS, LIMITS)
@settings(max_examples=200, deadline=None)
def test_more_time_never_costs_more(table: Bill, one: float, other: float) -> None:
    short, long = sorted((one, other))
    if (table.seconds <= short).any():
        assert choose(table, long).joules <= choose(table, short).joules
    assert choose(table, math.inf).joules == table.joules.min()


@contextmanager
def table_of(table: Bill) -> Iterator[Dvfs]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexfed.stitching.energy.bill", lambda dvfs, work: table)
        yield Dvfs((Level(1.0, 1.0),) * len(table.seconds), 0.0, 0.0, 0.0, 1.0)


@given(TABLES, LIMITS, st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_undisturbed_feedback_is_in_time_and_never_dearer_than_one_level(table: Bill, limit: float, num: int) -> None:
    planned = choose(table, limit)
    with table_of(table) as dvfs:
        spent, corrections = paced(Controller(dvfs, limit), num)
    assert corrections == [1.0] * num
    assert spent.missed == (limit < table.seconds.min() - 1e-9)
    assert spent.joules <= planned.joules * (1 + 1e-9)


@pytest.mark.parametrize("limit", [0.3, 0.7, 1.1])
def test_a_deadline_that_a_level_just_meets_is_met_however_batches_are_rounded(limit: float) -> None:
    for num in range(1, 40):
        with table_of(Bill(np.array([limit, limit / 2]), np.array([1.0, 2.0]))) as dvfs:
            assert paced(Controller(dvfs, limit), num)[0].levels == (0,) * num


def test_feedback_without_disturbance_chooses_what_the_pages_table_says() -> None:
    with table_of(bill(PAGE, PAGE_WORK)) as dvfs:
        busy, _ = paced(Controller(dvfs, 5.0), 4)
        waiting, _ = paced(Controller(dvfs, 5.0, config=WAITING), 4)
    assert [PAGE.levels[level] for level in busy.levels] == [(1.2, 0.8)] * 4
    assert busy.joules == pytest.approx(4.042, abs=1e-6)
    assert [PAGE.levels[level] for level in waiting.levels] == [(0.8, 0.4)] * 4
    assert waiting.joules == pytest.approx(4.9568, abs=1e-6)


def test_the_slowest_level_is_not_always_the_cheapest() -> None:
    found = bill(PAGE, PAGE_WORK)
    assert choose(found, math.inf).level not in (int(found.seconds.argmax()), int(found.seconds.argmin()))


# --- tables of devices ----------------------------------------------------------------------------------------------


def test_the_tiers_are_the_pages() -> None:
    assert (len(ORIN_GPU_MHZ), len(ORIN_CPU_MHZ)) == (13, 14)
    kept = {"high": ORIN_GPU_MHZ[::2], "mid": ORIN_GPU_MHZ[::3], "low": ORIN_GPU_MHZ[:7]}
    cpus = {"high": ORIN_CPU_MHZ[::2], "mid": ORIN_CPU_MHZ[::3], "low": ORIN_CPU_MHZ[:7]}
    facts = {"high": (1.5, 0.35, 2.2, 256), "mid": (1.0, 0.35, 2.2, 128), "low": (0.7, 0.35, 2.2, 64)}
    assert list(TIERS) == list(kept)
    for name, tier in TIERS.items():
        assert len(tier.levels) < 200
        assert {level.gpu_ghz for level in tier.levels} == {mhz / 1e3 for mhz in kept[name]}
        assert {level.cpu_ghz for level in tier.levels} == {mhz / 1e3 for mhz in cpus[name]}
        assert len(set(tier.levels)) == len(kept[name]) * len(cpus[name])
        assert (tier.static_watts, tier.cpu_watts, tier.gpu_watts, tier.macs_per_cycle) == facts[name]
        assert tier.fastest == (max(cpus[name]) / 1e3, max(kept[name]) / 1e3)


def test_the_fleet_of_tiers_is_billed_as_its_tables_say() -> None:
    fleet = load_fleet("tiers")
    assert fleet.counts(30) == [10, 10, 10]
    devices = [fleet.device(p, 3, 0) for p in range(3)]
    assert [d.kind for d in devices] == ["low", "mid", "high"]
    for device in devices:
        assert dvfs_of(device) == TIERS[device.kind]
        assert tier_of(replace(device, kind="device")) == device.kind  # by its capacity, too
        assert device.speed_macs_s == pytest.approx(TIERS[device.kind].speed_macs_s, rel=1e-14)
        assert device.compute_watts == pytest.approx(TIERS[device.kind].compute_watts, rel=1e-14)


@pytest.mark.parametrize("name", sorted(path.stem for path in FLEETS.glob("*.toml")))
def test_training_and_stitching_are_billed_by_one_model(name: str) -> None:
    """At the fastest level, so many MACs take what `flexfed.cost` says that they take."""
    macs = 10**12
    for partition in range(10):
        device = load_fleet(name).device(partition, 10, 0)
        for state in (*device.states(), replace(device, kind="own", capacity=0.5, compute_watts=0.0)):
            dvfs = dvfs_of(state)
            fastest = choose(bill(dvfs, work_of(dvfs, 5, macs, FREE)), math.inf, replace(FREE, policy="max"))
            assert fastest.seconds == pytest.approx(modelled_seconds(state, macs, 0, 0), rel=1e-12)
            assert fastest.joules == pytest.approx(modelled_joules(state, macs, 0, 0), rel=1e-12)
            assert fastest_seconds(dvfs, 5, macs, 2.0, FREE) == pytest.approx(2 * fastest.seconds)


@pytest.mark.parametrize(
    ("capacity", "tier"), [(1.1, "high"), (2 / 3, "high"), (0.66, "mid"), (1 / 3, "mid"), (0.33, "low")]
)
def test_tiers_by_capacity(capacity: float, tier: str) -> None:
    assert tier_of(Device(0, capacity=capacity)) == tier
    assert dvfs_of(Device(0, capacity=capacity)).levels == TIERS[tier].levels
    assert tier_of(Device(0, kind="mid", capacity=capacity)) == "mid"


def test_a_device_that_computes_on_its_cpu_has_one_clock() -> None:
    device = Device(0, speed_macs_s=8e9, compute_watts=12.0)
    dvfs = dvfs_of(device, clock_ghz=(0.8, 1.6, 3.2))
    assert dvfs.levels == ((0.8, 0.8), (1.6, 1.6), (3.2, 3.2))
    assert (dvfs.speed_macs_s, dvfs.compute_watts) == pytest.approx((8e9, 12.0))
    assert dvfs.cpu_watts == dvfs.gpu_watts
    share = TIERS["high"].static_watts / TIERS["high"].compute_watts
    assert dvfs.static_watts == pytest.approx(12.0 * share)
    slow, _, fast = bill(dvfs, work_of(dvfs, 10**6, 10**9)).seconds
    assert slow == pytest.approx(4 * fast)  # all work follows the one clock


def test_work_counts_images_and_macs() -> None:
    config = EnergyConfig(cycles_per_image=2e6, overhead_s=0.25)
    assert work_of(TIERS["high"], 500, 256 * 10**9, config) == pytest.approx((1.0, 1.0, 0.25))


# --- what is refused ------------------------------------------------------------------------------------------------


def test_impossible_tables_deadlines_and_phases_are_refused() -> None:
    table = bill(PAGE, PAGE_WORK)
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"deadline must be above 0 seconds, got"):
            choose(table, limit)
        with pytest.raises(ValueError, match=r"deadline must be above 0 seconds, got"):
            Controller(PAGE, limit)
    with pytest.raises(ValueError, match=r"margin of a deadline must lie in \[0, 1\), got 1"):
        choose(table, 1.0, margin=1.0)
    for correction in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="correction must be above 0 and finite"):
            Controller(PAGE, correction=correction)
    with pytest.raises(ValueError, match="needs levels of frequencies above 0 GHz"):
        replace(PAGE, levels=())
    with pytest.raises(ValueError, match="needs levels of frequencies above 0 GHz"):
        replace(PAGE, levels=(Level(1.0, 0.0),))
    with pytest.raises(ValueError, match="static_watts of a DVFS table must be >= 0, got -1"):
        replace(PAGE, static_watts=-1.0)
    with pytest.raises(ValueError, match="macs_per_cycle of a DVFS table must be > 0, got 0"):
        replace(PAGE, macs_per_cycle=0.0)


def test_a_phase_is_planned_and_then_run_as_planned() -> None:
    controller = Controller(PAGE)
    with pytest.raises(ValueError, match="beyond those that were planned"), controller.batch():
        pass
    paced(controller, 2)
    with pytest.raises(ValueError, match="beyond those that were planned"), controller.batch():
        pass
    for impossible in ((0, 5, 0), (0, 0, 5), (-1, 0, 0), (2, -1, 0)):
        with pytest.raises(ValueError, match="needs batches for its work, got"):
            controller.plan(*impossible)
    before = controller.spent()
    assert paced(controller, 0, 0, 0)[0] == before
    idle, _ = paced(Controller(PAGE, config=FREE, correction=1.25), 2, 0, 0)  # nothing to do, batch by batch
    assert (idle.seconds, idle.joules, idle.correction) == (0.0, 0.0, 1.25)


def test_no_pace_lets_everything_pass() -> None:
    NO_PACE.plan(1, 2, 3)
    for _ in range(5):
        with NO_PACE.batch():
            pass


def test_the_servers_deadline_refuses_nonsense() -> None:
    for times in ([], [1.0, math.nan], [1.0, 0.0], [math.inf]):
        with pytest.raises(ValueError, match="needs the clients' shortest times, above 0 and finite"):
            deadline(times)
    for q in (0.0, 1.1):
        with pytest.raises(ValueError, match=r"q must lie in \(0, 1\], got"):
            deadline([1.0], q)
    with pytest.raises(ValueError, match="slack must be >= 0, got -0"):
        deadline([1.0], 1.0, -0.1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"policy": "off"}, "energy policy must be one of on, max, got 'off'"),
        ({"window": "idle"}, "energy window must be one of busy, deadline, got 'idle'"),
        ({"gain": 0.0}, r"energy gain must lie in \(0, 1\], got 0"),
        ({"idle_watts": -1.0}, "energy idle-watts must be >= 0, got -1"),
        ({"cycles_per_image": math.nan}, "energy cycles-per-image must be >= 0, got nan"),
    ],
)
def test_impossible_knobs_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnergyConfig(**wrong)  # type: ignore[arg-type]


def test_impossible_clocks_are_refused() -> None:
    with pytest.raises(ValueError, match="spread of a batch's time must be >= 0, got -0"):
        ModelledClock(np.random.default_rng(0), -0.1)
    with pytest.raises(ValueError, match="needs a generator"):
        ModelledClock(spread=0.1)
