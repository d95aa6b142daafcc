"""Measured devices: memory limits in made-up and real ones, and the node-config that Flower and the app read."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from flwr.common.config import parse_config_args
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

with warnings.catch_warnings():  # typer imports names that newer versions of click deprecate
    warnings.simplefilter("ignore", DeprecationWarning)
    from typer.testing import CliRunner

from flexfed import measure
from flexfed.cgroups import cgroup_headrooms
from flexfed.cli import app
from flexfed.cost import forward_macs, num_parameters, training_macs
from flexfed.devices import Device, declared
from flexfed.measure import (
    Limit,
    Measurement,
    free_memory,
    hardware_name,
    measure_device,
    memory_limits,
    process_limits,
    three_digits,
    training_speed,
)
from flexfed.models import model_factory
from flexfed.profile import RATIOS, fitting_widths, parse_shape
from flexfed.select import prefix_ratio
from flexfed.submodel import full
from flexfed.units import trace_layout

UNLIMITED_V1 = 9223372036854771712
V1 = "31 30 0:29 / /sys/fs/cgroup/memory rw shared:7 - cgroup cgroup rw,memory"
V2 = "31 30 0:29 / /sys/fs/cgroup rw,nosuid shared:7 master:1 - cgroup2 cgroup2 rw,nsdelegate"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def kernel(root, membership, *mounts):
    """/proc/self of a machine, between mounts that hold no cgroups."""
    write(root / "proc/self/cgroup", membership)
    write(root / "sys/fs/cgroup/cpu/memory.limit_in_bytes", 1)  # not where memory is counted
    other = "22 1 8:1 / / rw - ext4 /dev/sda1 rw"
    write(
        root / "proc/self/mountinfo",
        "\n".join((other, *mounts, "garbage", "45 2 0:9 / /sys/fs/cgroup/cpu rw - cgroup c rw,cpu")),
    )


def v2(root, place, current, inactive=0, **limits):
    folder = root / "sys/fs/cgroup" / place
    for name, value in {"max": "max", "high": "max", **limits, "current": current}.items():
        write(folder / f"memory.{name}", value)
    write(folder / "memory.stat", f"anon 7\nfile 9999\ninactive_file {inactive}\nactive_file 5555")


def v1(root, place, limit, usage, inactive=0, below=0):
    folder = root / "sys/fs/cgroup/memory" / place
    write(folder / "memory.limit_in_bytes", limit)
    write(folder / "memory.usage_in_bytes", usage)
    write(folder / "memory.stat", f"inactive_file {inactive}\ntotal_inactive_file {inactive + below}")


def headrooms(root):
    return {"/" + str(path.relative_to(root)): free for path, free in cgroup_headrooms(root).items()}


# --- cgroups ------------------------------------------------------------------------------------------------


def test_version_2_counts_file_pages_as_free(tmp_path):
    kernel(tmp_path, "0::/user/app", V2)
    v2(tmp_path, "user/app", current=700, inactive=100, max=1000)
    assert headrooms(tmp_path) == {"/sys/fs/cgroup/user/app": 1000 - 700 + 100}


def test_the_cgroups_above_count_and_only_they(tmp_path):
    kernel(tmp_path, "0::/user/app", V2)
    v2(tmp_path, "user/app", current=100)
    v2(tmp_path, "user", current=300, max=500)
    v2(tmp_path, "user/other", current=1, max=2)
    v2(tmp_path, ".", current=5, max=90)
    write(tmp_path / "sys/fs/memory.max", 1)  # above the mount point there is no cgroup
    assert headrooms(tmp_path) == {"/sys/fs/cgroup/user": 200, "/sys/fs/cgroup": 85}


@pytest.mark.parametrize(
    ("limits", "free"), [({"max": 900, "high": 600}, 500), ({"high": 600}, 500), ({"max": 50}, -50)]
)
def test_the_lower_of_max_and_high_counts(tmp_path, limits, free):
    kernel(tmp_path, "0::/a", V2)
    v2(tmp_path, "a", current=100, **limits)
    assert headrooms(tmp_path) == {"/sys/fs/cgroup/a": free}


def test_file_pages_never_lift_what_is_free_above_the_limit(tmp_path):
    kernel(tmp_path, "0::/a", V2)
    v2(tmp_path, "a", current=100, inactive=300, max=1000)
    assert headrooms(tmp_path) == {"/sys/fs/cgroup/a": 1000}


def test_a_container_sees_its_own_cgroup_at_the_mount_point(tmp_path):
    """With a namespace of its own the path is /; without, it is the host's, and not to be found below the mount."""
    for number, (path, mounted) in enumerate(
        [("/", "/"), ("/docker/abc", "/docker/abc"), ("/docker/abc", "/"), ("/../x", "/")]
    ):
        root = tmp_path / str(number)
        kernel(root, f"0::{path}", V2.replace(" / ", f" {mounted} ", 1))
        v2(root, ".", current=100, max=400)
        write(root / "sys/fs/x/memory.max", 1)  # beside the mount point, not below
        assert headrooms(root) == {"/sys/fs/cgroup": 300}, (path, mounted)
        inside = f"0::{path.rstrip('/')}/job"
        kernel(root, inside, V2.replace(" / ", f" {mounted} ", 1))
        if mounted == path:
            v2(root, "job", current=10, max=20)
            assert headrooms(root) == {"/sys/fs/cgroup/job": 10, "/sys/fs/cgroup": 300}


def test_version_1_counts_the_cgroups_below_and_knows_its_word_for_unlimited(tmp_path):
    kernel(tmp_path, "9:cpu,cpuacct:/elsewhere\n4:memory:/a/b\n0::/", V1)
    v1(tmp_path, "a/b", limit=UNLIMITED_V1, usage=300)
    v1(tmp_path, "a", limit=1000, usage=700, inactive=10, below=40)
    v1(tmp_path, "elsewhere", limit=5, usage=1)
    assert headrooms(tmp_path) == {"/sys/fs/cgroup/memory/a": 1000 - 700 + 50}


def test_both_versions_at_once(tmp_path):
    unified = V2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")
    kernel(
        tmp_path, "4:memory,hugetlb:/a\n1:name=systemd:/a\n0::/b", V1.replace("rw,memory", "rw,hugetlb,memory"), unified
    )
    v1(tmp_path, "a", limit=100, usage=40)
    v2(tmp_path, "unified/b", current=5, max=50)
    assert headrooms(tmp_path) == {"/sys/fs/cgroup/memory/a": 60, "/sys/fs/cgroup/unified/b": 45}


def test_a_mount_point_with_a_blank(tmp_path):
    kernel(tmp_path, "0::/", V2.replace("/sys/fs/cgroup", "/sys/fs/my\\040cgroup"))
    v2(tmp_path, "../my cgroup", current=1, max=3)
    assert list(headrooms(tmp_path).values()) == [2]


def test_systems_without_cgroups_have_no_limits(tmp_path):
    assert headrooms(tmp_path) == {}
    write(tmp_path / "proc/self/cgroup", "0::/a")
    assert headrooms(tmp_path) == {}
    kernel(tmp_path, "nonsense", V1, V2)
    assert headrooms(tmp_path) == {}
    kernel(tmp_path, "0::/a", V1, V2)
    assert headrooms(tmp_path) == {}


def test_a_limit_that_is_no_number_is_refused(tmp_path):
    kernel(tmp_path, "0::/a", V2)
    v2(tmp_path, "a", current=1, max="lots")
    with pytest.raises(ValueError, match=r"a/memory\.max should hold a number of bytes or 'max', got 'lots\\n'"):
        cgroup_headrooms(tmp_path)


def test_a_broken_statistic_frees_nothing(tmp_path):
    kernel(tmp_path, "0::/a", V2)
    v2(tmp_path, "a", current=10, inactive="x", max=100)
    assert headrooms(tmp_path) == {"/sys/fs/cgroup/a": 90}


# --- free memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cgroup", "process", "free"), [(50, 70, 50), (500, 70, 70), (500, 700, 100), (-5, 70, 0)])
def test_free_memory_is_what_the_tightest_limit_leaves(monkeypatch, cgroup, process, free):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    monkeypatch.setattr(measure, "cgroup_headrooms", lambda: {Path("/a"): cgroup})
    monkeypatch.setattr(measure, "process_limits", lambda: (Limit("process limit", "RLIMIT_AS", process),))
    assert free_memory() == free
    assert memory_limits()[1] == ("cgroup", "/a", cgroup)


def test_this_machine_has_memory_and_says_so_quickly():
    assert 0 < free_memory() <= psutil.virtual_memory().total
    begin = time.process_time()
    for _ in range(10):
        free_memory()
    assert (time.process_time() - begin) / 10 < 0.01


def test_no_own_limits_where_the_system_has_none(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert process_limits() == ()


LIMITED = """
import mmap, resource, sys
from flexfed.measure import RESERVED, free_memory, memory_limits
import psutil
name, room, step = sys.argv[1], 400 << 20, 64 << 20
ends = RESERVED[name]
limit = getattr(resource, name)
before = free_memory()
taken = psutil.Process().memory_info().vms if name == "RLIMIT_AS" else psutil.Process().memory_info().data
resource.setrlimit(limit, (taken + room, resource.RLIM_INFINITY))
figures = [free_memory()]
block = mmap.mmap(-1, step, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
figures.append(free_memory())
assert min(memory_limits(), key=lambda limit: limit.free_bytes).name == name
def fits(size):
    try:
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return False
    return True
print([before, *[f + ends for f in figures], fits(figures[1] + ends - (4 << 20)), fits(figures[1] + ends + (4 << 20))])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not enforce these limits")
@pytest.mark.parametrize("name", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_real_limit_of_the_process_is_followed_and_is_where_memory_ends(name):
    out = subprocess.check_output([sys.executable, "-c", LIMITED, name], text=True, cwd=Path(__file__).parent.parent)
    before, limited, less, below, above = json.loads(out.replace("True", "true").replace("False", "false"))
    assert before > 400 << 20
    assert limited == pytest.approx(400 << 20, abs=4 << 20)
    assert limited - less == pytest.approx(64 << 20, abs=2 << 20)
    assert (below, above) == (True, False)


# --- speed --------------------------------------------------------------------------------------------------


def test_speed_is_macs_over_the_median_second(monkeypatch):
    monkeypatch.setattr(measure, "_batch_seconds", lambda factory, seconds: [9.0, 0.5, 0.1])
    factory = model_factory("cnn", 10, (3, 32, 32))
    layout = trace_layout(factory, (3, 32, 32))
    macs = training_macs(forward_macs(factory, layout, full(layout), (3, 32, 32)), 16)
    assert training_speed() == macs / 0.5


def test_a_real_measurement_leaves_torch_as_it_was(monkeypatch):
    threads = torch.get_num_threads()
    state = torch.random.get_rng_state()
    seen = []
    original = measure._batch_seconds
    monkeypatch.setattr(measure, "_batch_seconds", lambda *a: seen.append(torch.get_num_threads()) or original(*a))
    assert 1e6 < training_speed(0.01, threads=2) < 1e14
    assert (seen, torch.get_num_threads()) == ([2], threads)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_impossible_measurements_are_refused():
    with pytest.raises(ValueError, match="seconds of the speed measurement must be > 0"):
        training_speed(0)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        training_speed(threads=0)


# --- the device ---------------------------------------------------------------------------------------------

MEASURED = Measurement(
    limits=(Limit("machine", "available memory", 4_000_000_000), Limit("cgroup", "/sys/fs/cgroup/a", 1_239_999_999)),
    base_bytes=900_000_000,
    speed_macs_s=20_765_432_109.8,
    threads=1,
    hardware="Board 4 'B'",
    cores=4,
    seconds=7.25,
)


def supernode_reads(text):
    """What `flower-supernode --node-config TEXT` makes of it, by its own code."""
    arguments = _parse_args_run_supernode().parse_args(["--insecure", "--node-config", text])
    return parse_config_args([arguments.node_config])


def test_flower_and_the_app_read_the_node_config():
    read = supernode_reads(MEASURED.node_config(2, 3, "a b=c", 1.5e6))
    assert read == {
        "partition-id": 2,
        "num-partitions": 3,
        "memory-bytes": 1.23e9,
        "measure-memory": True,
        "speed-macs-s": 2.08e10,
        "link-bytes-s": 1.5e6,
        "kind": "a b=c",
    }
    assert isinstance(read["partition-id"], int)
    device = declared(Device(2, memory_spread_bytes=1e9), read)
    assert device == Device(
        2, "a b=c", memory_bytes=1.23e9, measure_memory=True, speed_macs_s=2.08e10, link_bytes_s=1.5e6
    )


def test_an_unknown_link_is_left_to_the_fleet():
    read = supernode_reads(MEASURED.node_config())
    assert "link-bytes-s" not in read
    assert (read["partition-id"], read["num-partitions"], read["kind"]) == (0, 1, "Board 4 B")
    assert declared(Device(0, link_bytes_s=123.0), read).link_bytes_s == 123.0


@pytest.mark.parametrize("value", [1, 9, 12, 999.4, 999.6, 1000, 123456, 9_999_999, 23_612_345_678, 0.00123456])
def test_three_digits_are_close_and_rounding_down_is_never_above(value):
    assert float(three_digits(value)) == pytest.approx(value, rel=0.005)
    assert value * 0.99 < float(three_digits(value, "ROUND_DOWN")) <= value
    assert parse_config_args([f"x={three_digits(value)}"]) == {"x": float(three_digits(value))}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"partition": 3, "num_partitions": 3}, r"partition-id must be in 0..num-partitions - 1, got 3 of 3"),
        ({"kind": "it's"}, r"kind may hold no quote.* got \"it's\""),
        ({"kind": "a\nb"}, r"kind may hold no quote, backslash or control character"),
        ({"link_bytes_s": 0.0}, r"link-bytes-s must be > 0, got 0"),
        ({"link_bytes_s": math.nan}, r"link-bytes-s must be > 0, got nan"),
    ],
)
def test_impossible_node_configs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MEASURED.node_config(**arguments)


def test_a_device_without_free_memory_is_refused():
    full_up = Measurement((Limit("cgroup", "/a", -5),), 1, 1e9, 1, "x", 1, 1.0)
    with pytest.raises(ValueError, match="no memory is free for training: /a leaves none"):
        full_up.node_config()


def test_measuring_loads_modules_first_and_the_speed_last(monkeypatch):
    order = []
    monkeypatch.setattr(measure, "MODULES", ("json",))
    monkeypatch.setattr(measure, "importlib", SimpleNamespace(import_module=order.append))
    monkeypatch.setattr(measure, "memory_limits", lambda: order.append("memory") or (Limit("machine", "m", 5),))
    monkeypatch.setattr(measure, "training_speed", lambda *arguments: order.append(arguments) or 1e9)
    measured = measure_device(0.5, 2)
    assert order == ["json", "memory", (0.5, 2)]
    assert measured.memory_bytes == 5
    assert measured.base_bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    assert measured.cores == len(psutil.Process().cpu_affinity())


@pytest.mark.parametrize("name", measure.MODULES)
def test_what_a_client_loads_exists(name):
    assert find_spec(name)


def test_the_board_is_named_before_the_cpu(tmp_path):
    assert hardware_name(tmp_path)
    write(tmp_path / "proc/cpuinfo", "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t: a\nmodel name\t: two")
    assert hardware_name(tmp_path) == "Some CPU @ 2 GHz"
    write(tmp_path / "proc/device-tree/model", "Raspberry Pi 4 Model B Rev 1.4\0")
    assert hardware_name(tmp_path) == "Raspberry Pi 4 Model B Rev 1.4"


# --- flexfed profile ----------------------------------------------------------------------------------------


@pytest.fixture
def profile(monkeypatch):
    """`flexfed profile` on a device that was measured before."""
    seen = []
    monkeypatch.setattr(measure, "measure_device", lambda **asked: seen.append(asked) or MEASURED)
    return lambda *options: (CliRunner().invoke(app, ["profile", *options]), seen)


def test_profile_shows_a_table_and_the_line_to_paste(profile):
    result, _ = profile("--num-partitions", "3", "--partition-id", "1")
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert lines[0] == "memory free for training 1.24 GB limited by the cgroup /sys/fs/cgroup/a"
    assert lines[2] == "speed 20.8 GMAC/s 1 thread; Board 4 'B', 4 cores"
    assert lines[3] == "time of the measurement 7.2 s"
    assert f"flower-supernode --node-config '{MEASURED.node_config(1, 3)}'" in lines
    assert lines[-1].startswith("link-bytes-s is left out, and the run's fleet says it")


def test_profile_says_nothing_of_a_link_that_was_given(profile):
    result, seen = profile("--link-bytes-s", "2e6", "--kind", "pi", "--threads", "2")
    assert result.output.splitlines()[-1] == f"flower-supernode --node-config '{MEASURED.node_config(0, 1, 'pi', 2e6)}'"
    assert seen == [{"threads": 2}]


def test_profile_as_json(profile):
    told = json.loads(profile("--json")[0].output)
    assert told["node-config"] == MEASURED.node_config()
    assert (told["memory-bytes"], told["base-bytes"], told["cores"]) == (1_239_999_999, 900_000_000, 4)
    assert told["limits"][0] == {"kind": "machine", "name": "available memory", "free-bytes": 4_000_000_000}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--partition-id", "1"), "partition-id must be in 0..num-partitions - 1, got 1 of 1"),
        (("--input", "3x"), "an input's sizes are written 3x32x32 (channels, height, width), got '3x'"),
        (("-m", "nothing"), "unknown model 'nothing'"),
    ],
)
def test_profile_refuses_what_is_wrong_before_it_measures(profile, options, message):
    result, seen = profile(*options)
    assert result.exit_code == 1
    assert result.output.startswith(f"error: {message}")
    assert seen == []


def test_profile_says_which_widths_of_a_network_fit(profile):
    options = ("-m", "cnn", "--input", "1x8x8", "--classes", "7", "--batch-size", "4")
    fitting = fitting_widths("cnn", 7, (1, 8, 8), 4, MEASURED.memory_bytes)
    assert fitting.to_text() in profile(*options)[0].output
    assert json.loads(profile(*options, "--json")[0].output)["fitting"] == fitting.to_json()


# --- the widths that fit ------------------------------------------------------------------------------------


def fitting(memory_bytes):
    return fitting_widths("cnn", 10, (3, 32, 32), 64, memory_bytes)


def test_widths_fit_up_to_what_they_take():
    """The memory of one width, to the byte, lets it and all narrower ones fit, and one byte less does not."""
    everything = fitting(1 << 40)
    assert [w.ratio for w in everything.widths if w.fits] == list(RATIOS)
    assert everything.largest == 1
    half = everything.widths[1]
    enough, short = fitting(half.memory_bytes), fitting(half.memory_bytes - 1)
    assert [w.fits for w in enough.widths] == [False, True, True, True, True]
    assert [w.fits for w in short.widths] == [False, False, True, True, True]
    assert 0.25 <= short.largest < 0.5 <= enough.largest < 1
    assert fitting(1000).largest is None
    assert fitting(1000).to_text().endswith("no width fits")


def test_widths_are_those_of_a_prefix_of_each_group():
    layout = trace_layout(model_factory("cnn", 10, (3, 32, 32)), (3, 32, 32))
    parameters = [num_parameters(layout, prefix_ratio(layout, ratio)) for ratio in RATIOS]
    assert [w.parameters for w in fitting(1 << 30).widths] == parameters


def test_the_table_of_widths():
    lines = [" ".join(line.split()) for line in fitting(1 << 40).to_text().splitlines()]
    assert lines[:2] == ["cnn, 10 classes, inputs 3x32x32, batch 64", "width parameters memory fits"]
    assert lines[2].startswith("1 58.0 k ")
    assert lines[2].endswith(" yes")
    assert lines[-1] == "largest width that fits: 1"


def test_shapes_are_written_with_an_x():
    assert parse_shape("3x32x32") == (3, 32, 32)
    assert parse_shape("7") == (7,)
    for wrong in ("", "3,32,32", "3x0x4", "-3x4", "3x 4"):
        with pytest.raises(ValueError, match="an input's sizes are written 3x32x32"):
            parse_shape(wrong)
