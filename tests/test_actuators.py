"""Clock frequencies and joules on made-up machines: what is written, what is put back, what happens without rights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from flexfed.devices import Device
from flexfed.stitching.actuators import STEPS, Cpufreq, Rapl, Recorder, open_actuator
from flexfed.stitching.dvfs import Level, dvfs_of
from flexfed.stitching.energy import Controller, Instruments

SLOW, FAST = Level(1.0, 0.4), Level(2.0, 1.3)


def clock(folder: Path, low: int, high: int | str, listed: str | None) -> None:
    folder.mkdir(parents=True)
    (folder / "scaling_min_freq").write_text(f"{low}\n")
    (folder / "scaling_max_freq").write_text(f"{high}\n")
    if listed is not None:
        (folder / "scaling_available_frequencies").write_text(f"{listed}\n")


@pytest.fixture
def cpus(tmp_path: Path) -> Path:
    """Four cores, two clocks: the first two share a small one."""
    little, big = tmp_path / "cpufreq/policy0", tmp_path / "cpufreq/policy2"
    clock(little, 300000, 1500000, "300000 900000 1200000 1500000 ")
    clock(big, 600000, 2400000, "2400000 1800000 600000 300000 3000000")
    for number, target in enumerate((little, little, big, big)):
        (tmp_path / f"cpu{number}").mkdir()
        (tmp_path / f"cpu{number}/cpufreq").symlink_to(target)
    (tmp_path / "cpuidle").mkdir()
    return tmp_path


def caps(root: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(root.glob("cpufreq/*/scaling_max_freq"))]


def test_a_recorder_writes_nothing_down_but_what_it_is_asked_for() -> None:
    with open_actuator("record") as actuator:
        actuator.apply(FAST)
        actuator.apply(SLOW)
    assert actuator.applied == [FAST, SLOW]
    assert actuator.clock_ghz == ()


def test_every_clock_is_capped_at_the_slowest_frequency_that_is_fast_enough(cpus: Path) -> None:
    with Cpufreq(cpus) as actuator:
        assert caps(cpus) == [1500000, 2400000]
        actuator.apply(SLOW)
        assert caps(cpus) == [1200000, 1800000]
        actuator.apply(FAST)
        assert caps(cpus) == [1500000, 2400000]  # the small one cannot
        actuator.apply(Level(0.9, 1.0))
        assert caps(cpus) == [900000, 1800000]
        actuator.apply(Level(9.0, 1.0))
        assert caps(cpus) == [1500000, 2400000]  # never above what stood there, though 3 GHz are listed
        actuator.apply(Level(0.1, 1.0))
        assert caps(cpus) == [300000, 600000]  # nor below the least that is set
        assert len(actuator.applied) == 5
    assert caps(cpus) == [1500000, 2400000]


def test_the_fastest_clock_tells_what_can_be_set(cpus: Path) -> None:
    with Cpufreq(cpus) as actuator:
        assert actuator.clock_ghz == (0.6, 1.8, 2.4)
        assert dvfs_of(Device(0), actuator.clock_ghz).levels == ((0.6, 0.6), (1.8, 1.8), (2.4, 2.4))
        for ghz, khz in zip(actuator.clock_ghz, (600000, 1800000, 2400000), strict=True):
            actuator.apply(Level(ghz, ghz))
            assert caps(cpus)[1] == khz


def test_caps_are_put_back_after_an_error_and_only_once(cpus: Path) -> None:
    def fails() -> None:
        with actuator:
            actuator.apply(SLOW)
            raise KeyError

    actuator = Cpufreq(cpus)
    with pytest.raises(KeyError):
        fails()
    assert caps(cpus) == [1500000, 2400000]
    (cpus / "cpu2/cpufreq/scaling_max_freq").write_text("1800000")  # somebody else's
    actuator.close()
    actuator.apply(SLOW)
    assert caps(cpus) == [1500000, 1800000]


def test_clocks_of_which_only_the_ends_are_known_have_equal_steps(tmp_path: Path) -> None:
    clock(tmp_path / "cpu0/cpufreq", 800000, 2200000, None)
    with Cpufreq(tmp_path) as actuator:
        assert actuator.clock_ghz == pytest.approx([0.8 + 0.2 * step for step in range(STEPS)])
        actuator.apply(SLOW)
        assert int((tmp_path / "cpu0/cpufreq/scaling_max_freq").read_text()) == 1000000
    assert int((tmp_path / "cpu0/cpufreq/scaling_max_freq").read_text()) == 2200000


def test_a_clock_whose_list_does_not_hold_its_limits_is_left_at_its_cap(tmp_path: Path) -> None:
    clock(tmp_path / "cpu0/cpufreq", 1000000, 1100000, "900000 1500000")
    with Cpufreq(tmp_path) as actuator:
        actuator.apply(SLOW)
        assert actuator.clock_ghz == (1.1,)
        assert int((tmp_path / "cpu0/cpufreq/scaling_max_freq").read_text()) == 1100000


def records(actuator: Recorder) -> bool:
    actuator.apply(SLOW)
    return actuator.clock_ghz == () and actuator.applied == [SLOW]


def refusing(monkeypatch: pytest.MonkeyPatch, refused: Path, after: int = 0) -> None:
    """Writing to a file fails, root or not, after so many times."""
    write, seen = Path.write_text, []

    def write_text(path: Path, *args: object, **kwargs: object) -> int:
        if path == refused:
            seen.append(path)
            if len(seen) > after:
                raise PermissionError(13, "Permission denied", str(path))
        return write(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", write_text)


def test_without_the_right_to_write_nothing_is_set(
    cpus: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "flwr"):
        refusing(patch, cpus / "cpufreq/policy2/scaling_max_freq")
        assert records(Cpufreq(cpus))
    assert caps(cpus) == [1500000, 2400000]
    assert len(caplog.records) == 1
    assert "recorded, not set: [Errno 13] Permission denied" in caplog.text
    assert "policy2/scaling_max_freq" in caplog.text


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda root: None, "has no cpu*/cpufreq"),
        (lambda root: (root / "cpu0/cpufreq").mkdir(parents=True), "No such file or directory"),
        (lambda root: clock(root / "cpu0/cpufreq", 1, 2, "fast slow"), "invalid literal"),
        (lambda root: clock(root / "cpu0/cpufreq", 1, "x", ""), "scaling_max_freq should hold a number, got 'x'"),
    ],
)
def test_machines_without_such_files_are_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None], why: str
) -> None:
    spoil(tmp_path)
    with caplog.at_level(logging.WARNING, "flwr"):
        assert records(Cpufreq(tmp_path))
    assert len(caplog.records) == 1
    assert why in caplog.text


def test_a_right_that_is_lost_on_the_way_stops_nothing(
    cpus: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusing(monkeypatch, cpus / "cpufreq/policy2/scaling_max_freq", after=2)
    with caplog.at_level(logging.WARNING, "flwr"), Cpufreq(cpus) as actuator:
        actuator.apply(SLOW)
        assert caps(cpus) == [1200000, 1800000]
        actuator.apply(FAST)
        actuator.apply(SLOW)
    assert actuator.applied == [SLOW, FAST, SLOW]
    assert caps(cpus) == [1500000, 1800000]  # what can be put back is
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [
        f"{cpus}/cpufreq/policy2/scaling_max_freq could not be put back to 2400000",
        "frequencies are recorded, not set",
    ]


def test_unknown_actuators_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown actuator 'rapl'; known: record, cpufreq"):
        open_actuator("rapl")


def test_a_controller_sets_the_clocks_of_a_machine(cpus: Path) -> None:
    with Cpufreq(cpus) as actuator:
        dvfs = dvfs_of(Device(0, speed_macs_s=2.4e9), actuator.clock_ghz)
        controller = Controller(dvfs, 1.5, instruments=Instruments(actuator=actuator))
        controller.plan(2, 0, 2_400_000_000)
        with controller.batch():
            assert caps(cpus) == [1500000, 1800000]  # 4/3 s; at 0.6 GHz it would take 4 s
        with controller.batch():
            pass
    assert controller.spent().seconds == pytest.approx(4 / 3)
    assert caps(cpus) == [1500000, 2400000]


# --- RAPL -----------------------------------------------------------------------------------------------------------


def counter(root: Path, folder: str, name: str, microjoules: int, span: int = 1_000_000) -> Path:
    place = root / folder
    place.mkdir(parents=True)
    for file, value in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", span)):
        (place / file).write_text(f"{value}\n")
    return place / "energy_uj"


def test_packages_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    first = counter(tmp_path, "intel-rapl:0", "package-0", 900_000)
    second = counter(tmp_path, "intel-rapl:1", "package-1", 100)
    others = [("intel-rapl:0:0", "core"), ("intel-rapl-mmio:0", "package-0"), ("intel-rapl:2", "psys")]
    rest = [counter(tmp_path, folder, name, 0) for folder, name in others]
    (tmp_path / "intel-rapl").mkdir()
    meter = Rapl(tmp_path)
    for path in (first, second, *rest):
        path.write_text(f"{int(path.read_text()) + 50_000}\n")
    assert meter.joules() == pytest.approx(0.1)
    assert meter.joules() == 0.0  # since the last call


def test_a_counter_that_starts_anew_is_followed(tmp_path: Path) -> None:
    energy = counter(tmp_path, "intel-rapl:0", "package-0", 900_000)
    meter = Rapl(tmp_path)
    energy.write_text("150000")
    assert meter.joules() == pytest.approx(0.25)
    energy.write_text("150001")
    assert meter.joules() == pytest.approx(1e-6)


def test_counters_that_are_absent_or_unreadable_tell_nothing(tmp_path: Path) -> None:
    assert Rapl(tmp_path / "nowhere").joules() is None
    energy = counter(tmp_path, "intel-rapl:0", "package-0", 5)
    meter = Rapl(tmp_path)
    assert meter.joules() == 0.0
    energy.unlink()
    assert meter.joules() is None
    energy.write_text("9")
    assert meter.joules() is None  # since when?
    energy.write_text("11")
    assert meter.joules() == pytest.approx(2e-6)
    energy.write_text("?")
    assert meter.joules() is None
