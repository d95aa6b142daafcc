from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from toy import LAYOUTS, as_message, random_arrays, random_units

from flexfed.batchnorm import Statistics
from flexfed.devices import Device
from flexfed.flower import messages
from flexfed.flower.messages import (
    check_code,
    code_fingerprint,
    from_array,
    from_record_of_arrays,
    job_content,
    num_bytes,
    profile_content,
    read_job,
    read_profile,
    read_statistics,
    read_update,
    statistics_content,
    to_array,
    to_record_of_arrays,
    update_content,
)
from flexfed.jobs import Assignment, Part, Update
from flexfed.submodel import Submodel, extract, flatten, full, narrow_shapes
from flexfed.units import Layout

LAYOUT = LAYOUTS["ties"]()


def part() -> Submodel:
    return Submodel(random_units(LAYOUT, np.random.default_rng(0)))


def update(**changes: Any) -> Update:
    flat = np.arange(sum(math.prod(s) for s in narrow_shapes(LAYOUT, part()).values()), dtype=np.float32)
    values = {"submodel": part(), "difference": flat, "weight": 12.0, "metrics": {"train-loss": 0.5, "macs": 1e9}}
    return Update(**{**values, **changes})


# --- arrays -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 1)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_arrays_survive_the_trip(shape: tuple[int, ...], dtype: str) -> None:
    values = np.asarray(np.random.default_rng(0).standard_normal(shape), dtype=dtype)
    sent = to_array(values)
    back = from_array(sent)
    assert len(sent.data) == values.nbytes  # no file header
    assert back.dtype == values.dtype
    assert back.shape == values.shape
    assert back.tobytes() == values.tobytes()
    assert not back.flags.writeable


def test_a_transposed_array_survives_the_trip() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert np.array_equal(from_array(to_array(values)), values)


def test_received_arrays_are_views() -> None:
    sent = to_array(np.zeros(1000, dtype=np.float32))
    assert np.shares_memory(from_array(sent), np.frombuffer(sent.data, dtype=np.uint8))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dtype": "int64"}, "arrays must be float32 or float64 or int8 or uint8 as 'flexfed.raw', got 'int64'"),
        ({"dtype": "object"}, "got 'object'"),
        ({"stype": "numpy.ndarray"}, "got 'float32' as 'numpy.ndarray'"),
        ({"shape": (3,)}, r"an array of shape \(3,\) should have 12 bytes, got 16"),
        ({"shape": (-4,)}, "should have"),
        ({"shape": (-2, -2)}, "should have"),
        ({"data": b""}, "should have 16 bytes, got 0"),
    ],
)
def test_arrays_that_are_not_what_they_say_are_refused(changes: dict[str, Any], match: str) -> None:
    good = {"dtype": "float32", "shape": (4,), "stype": "flexfed.raw", "data": bytes(16)}
    with pytest.raises(ValueError, match=match):
        from_array(Array(**{**good, **changes}))


def test_records_of_arrays_keep_names_and_order() -> None:
    arrays = random_arrays(LAYOUT, np.random.default_rng(0))
    back = from_record_of_arrays(to_record_of_arrays(arrays))
    assert list(back) == list(arrays)
    assert all(np.array_equal(back[name], arrays[name]) for name in arrays)


# --- jobs and updates -------------------------------------------------------------------------------------------


def test_a_job_survives_the_trip() -> None:
    arrays = extract(LAYOUT, part(), random_arrays(LAYOUT, np.random.default_rng(0)))
    config = {"ratio": 0.5, "levels": [b"\0", b"\1"]}
    flat = to_array(flatten(LAYOUT, part(), arrays))
    content = job_content({"part": flat}, Assignment(part(), "b", config), 2**32 - 1, 3, {"num-classes": 3})
    device = Device(4, capacity=0.5)
    job = read_job(content, LAYOUT, device)
    assert np.array_equal(job.submodel.units, part().units)
    assert list(job.arrays) == list(arrays)
    assert all(np.array_equal(job.arrays[name], arrays[name]) for name in arrays)
    assert (job.seed, job.server_round, job.device, job.config) == (2**32 - 1, 3, device, config)
    assert content.config_records["config"]["num-classes"] == 3


def test_messages_of_one_round_share_the_numbers_but_no_record() -> None:
    flat = to_array(np.zeros(3, dtype=np.float32))
    one, other = (job_content({"part": flat}, Assignment(full(LAYOUT), "full"), seed, 1, {}) for seed in (1, 2))
    assert one.array_records["arrays"]["part"].data is other.array_records["arrays"]["part"].data
    assert one.config_records["config"] is not other.config_records["config"]
    assert one.config_records["config"]["seed"] == 1


def test_an_update_survives_the_trip() -> None:
    sent = update()
    back = read_update(update_content(sent, LAYOUT), LAYOUT)
    assert np.array_equal(back.submodel.units, sent.submodel.units)
    assert back.difference.tobytes() == sent.difference.tobytes()
    assert (back.weight, back.metrics) == (sent.weight, sent.metrics)
    assert back.told == {}


def test_what_an_update_tells_travels_and_what_its_client_keeps_does_not() -> None:
    part = Part(update().submodel, {})
    sent = replace(update(), told={"ranking": b"\1\0"}, state={"scores": np.ones(3)}, trained=part)
    content = update_content(sent, LAYOUT)
    back = read_update(content, LAYOUT)
    assert back.told == {"ranking": b"\1\0"}
    assert (back.state, back.trained) == ({}, None)
    assert back.metrics == {**sent.metrics, "kept-state": 1.0}
    assert set(content) == {"arrays", "submodel", "metrics", "told"}


def without(record: str) -> RecordDict:
    content = update_content(update(), LAYOUT)
    del content[record]
    return content


def replaced(record: str, value: Any) -> RecordDict:
    content = update_content(update(), LAYOUT)
    content[record] = value
    return content


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (RecordDict(), "reply lacks .*; expected arrays/part, submodel and metrics/weight"),
        (without("arrays"), "reply lacks 'arrays'"),
        (without("submodel"), "reply lacks 'submodel'"),
        (without("metrics"), "reply lacks 'metrics'"),
        (replaced("arrays", ArrayRecord()), "a part as float32 has the arrays part; got"),
        (replaced("metrics", MetricRecord({"macs": 1})), "must be finite numbers, got {'weight': nan}"),
        (replaced("metrics", MetricRecord({"weight": math.nan})), "must be finite numbers"),
        (replaced("metrics", MetricRecord({"weight": 1.0, "macs": math.inf})), "must be finite numbers"),
        (replaced("metrics", MetricRecord({"weight": [1.0, 2.0]})), "must be finite numbers"),
        (replaced("metrics", MetricRecord({"weight": 1.0, "loss": [0.5]})), "must be finite numbers"),
        (replaced("metrics", MetricRecord({"weight": 0.0})), "weight"),
        (replaced("metrics", MetricRecord({"weight": -3.0})), "weight"),
        (replaced("submodel", ConfigRecord()), "units of a submodel should be 4 bytes"),
        (replaced("submodel", ConfigRecord({"units": "text"})), "what it tells besides, must be bytes"),
        (replaced("submodel", ConfigRecord({"units": [1, 2]})), "what it tells besides, must be bytes"),
        (replaced("told", ConfigRecord({"ranking": "text"})), "what it tells besides, must be bytes"),
        (replaced("told", MetricRecord({"ranking": 1})), "reply lacks 'told'"),
        (replaced("submodel", ConfigRecord({"units": b"\xff"})), "units of a submodel should be 4 bytes"),
        (replaced("submodel", ConfigRecord({"units": bytes(4), "keys": b"no.such"})), "unknown tensors"),
    ],
)
def test_replies_that_are_no_update_are_refused(content: RecordDict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_update(content, LAYOUT)


def test_bytes_are_those_of_numbers_names_and_bits() -> None:
    content = update_content(update(), LAYOUT)
    numbers = update().difference.nbytes
    assert numbers < num_bytes(as_message(content)) < numbers + 100


def test_statistics_and_profiles_survive_the_trip() -> None:
    found: Statistics = {"norm": (np.array([1.0, -2.0]), np.array([3.0, 0.5]))}
    back = read_statistics(statistics_content(found))
    assert [pair.tolist() for pair in back["norm"]] == [[1, -2], [3, 0.5]]
    device = Device(3, "weak", 0.35, labels=(1, 5))
    assert read_profile(profile_content(device, 20)) == (device, 20)
    assert read_profile(profile_content(Device(0), 1)) == (Device(0), 1)


# --- whose code -------------------------------------------------------------------------------------------------


def test_other_code_is_refused_with_both_fingerprints() -> None:
    check_code({"code": code_fingerprint()})
    with pytest.raises(RuntimeError, match=f"other code \\({code_fingerprint()}\\) than the server \\(0123456789ab\\)"):
        check_code({"code": "0123456789ab"})
    with pytest.raises(RuntimeError, match="other code"):
        check_code({})


def test_the_fingerprint_is_of_every_source_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint() -> str:
        code_fingerprint.cache_clear()
        return code_fingerprint()

    for name in ("client_app.py", "flexfed/flower/messages.py", "flexfed/units.py", "strategies/base.py", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(messages, "__file__", str(tmp_path / "flexfed/flower/messages.py"))
    try:
        seen = [fingerprint(), fingerprint()]
        (tmp_path / "README.md").write_text("2")
        seen.append(fingerprint())
        assert len(set(seen)) == 1
        for name in ("client_app.py", "flexfed/units.py", "strategies/base.py"):
            (tmp_path / name).write_text("2")
            seen.append(fingerprint())
        (tmp_path / "flexfed/units.py").rename(tmp_path / "flexfed/unit.py")
        assert len({*seen, fingerprint()}) == 5
    finally:
        monkeypatch.undo()
        code_fingerprint.cache_clear()


def test_layouts_of_two_processes_agree_on_the_wire_order() -> None:
    again: Layout = LAYOUTS["ties"]()
    assert list(again.shapes) == list(LAYOUT.shapes)
    assert again.groups == LAYOUT.groups
