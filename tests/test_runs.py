"""Run folders: what is written, that it is written whole, and what the summary makes of it."""

import json
import math
import os
import tomllib
from datetime import datetime

import numpy as np
import pytest
from safetensors.numpy import load_file

from flexfed import runs
from flexfed.overrides import flatten, nest
from flexfed.runs import Measured, RunFolder, find_runs, load_run, summarise, write_atomic

CONFIG = {"strategy": "flexfl", "seed": 1, "flexfl.kd-weight": 10.0, "flexfl.sizes": "grid", "drop-last": True}


def make(tmp_path, strategy="flexfl", run_id=7, config=CONFIG, **kwargs):
    folder = RunFolder.named(tmp_path, strategy, run_id, **kwargs)
    folder.begin(config)
    return folder


def lines(path):
    return path.read_text().splitlines()


def test_create_names_the_folder_and_keeps_the_configuration(tmp_path):
    folder = make(tmp_path, now=datetime(2026, 3, 4, 5, 6, 7))
    assert folder.path == tmp_path / "20260304-050607-flexfl-7"
    table = tomllib.loads((folder.path / "config.toml").read_text())
    assert table["flexfl"] == {"kd-weight": 10.0, "sizes": "grid"}
    assert load_run(folder.path).config == CONFIG


def test_create_refuses_relative_runs_dir_and_an_existing_folder(tmp_path):
    with pytest.raises(ValueError, match=r"runs-dir must be an absolute path or begin with '~', got 'runs'"):
        make("runs")
    make(tmp_path, now=datetime(2026, 1, 1))
    with pytest.raises(FileExistsError):
        make(tmp_path, now=datetime(2026, 1, 1))


def test_runs_dir_may_start_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert make("~/deep/runs").path.is_relative_to(tmp_path / "deep" / "runs")


def test_nest_is_the_inverse_of_flatten():
    assert flatten(nest(CONFIG)) == CONFIG
    with pytest.raises(ValueError, match=r"'a\.b' needs 'a' to be a table"):
        nest({"a": 1, "a.b": 2})
    with pytest.raises(ValueError, match=r'a\.b must be text.*"0.25, 0.5"'):
        flatten({"a": {"b": [1, 2]}})


def test_a_round_is_one_sorted_line(tmp_path):
    folder = make(tmp_path)
    folder.append_round({"round": 1, "loss": math.nan, "accuracy": np.float32(0.5), "cohort": (np.int64(3), 5)})
    folder.append_round({"round": 2, "trained": {"S": np.int64(2)}, "joules": math.inf})
    assert lines(folder.path / "metrics.jsonl") == [
        '{"accuracy": 0.5, "cohort": [3, 5], "loss": null, "round": 1}',
        '{"joules": null, "round": 2, "trained": {"S": 2}}',
    ]


def test_equal_rounds_give_equal_bytes(tmp_path):
    one, two = make(tmp_path, run_id=1), make(tmp_path, run_id=2)
    one.append_round({"round": 1, "a": 0.1 + 0.2, "b": 1})
    two.append_round({"b": 1, "a": 0.1 + 0.2, "round": 1})
    assert (one.path / "metrics.jsonl").read_bytes() == (two.path / "metrics.jsonl").read_bytes()


def test_rounds_need_a_number_and_no_clock(tmp_path):
    with pytest.raises(ValueError, match="number of their round"):
        make(tmp_path, run_id=1).append_round({"accuracy": 1.0})
    for number, key in enumerate(("wall-seconds", "client-seconds"), 2):
        with pytest.raises(ValueError, match=rf"must not depend on the clock, got \['{key}'\]"):
            make(tmp_path, run_id=number).append_round({"round": 1, key: 3.0})


def test_finish_writes_everything(tmp_path):
    folder = make(tmp_path)
    folder.append_round({"round": 1, "accuracy": 0.5, "bytes-down": 10, "bytes-up": 5})
    folder.append_timing(1, 1.5, Measured(4.0))
    folder.append_timing(2, 2.25, Measured(0.125))
    transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
    arrays = {"w": transposed, "scalar": np.array(2.0, dtype=np.float32)}
    summary = folder.finish(arrays, {"strategy": "flexfl", "seed": 1, "parameters": np.int64(7)})
    loaded = load_file(folder.path / "model.safetensors")
    np.testing.assert_array_equal(loaded["w"], transposed)
    assert loaded["scalar"].shape == ()
    assert (folder.path / "curves.png").read_bytes().startswith(b"\x89PNG")
    run = load_run(folder.path)
    assert run.summary["wall-seconds"] == 3.75
    assert run.summary["client-seconds"] == 4.125
    assert run.summary["parameters"] == 7
    assert run.summary == json.loads(json.dumps({**summary, "parameters": 7}))
    assert run.timing == {1: 1.5, 2: 2.25}
    assert run.client_timing == {1: 4.0, 2: 0.125}


def test_rounds_whose_clients_were_not_measured_are_read_and_give_no_total(tmp_path):
    folder = make(tmp_path)
    folder.append_round({"round": 1, "accuracy": 0.5})
    (folder.path / "timing.jsonl").write_text('{"round": 1, "seconds": 1.5}\n')
    folder.append_timing(2, 2.25, Measured(4.0))
    summary = folder.finish({"w": np.zeros(1, dtype=np.float32)}, {"strategy": "flexfl"})
    run = load_run(folder.path)
    assert (run.timing, run.client_timing) == ({1: 1.5, 2: 2.25}, {2: 4.0})
    assert summary["wall-seconds"] == 3.75
    assert "client-seconds" not in summary


def test_summary_comes_last(tmp_path, monkeypatch):
    folder = make(tmp_path)

    def fail(*args):
        raise RuntimeError("disk full")

    monkeypatch.setattr("flexfed.report.curves_png", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        folder.finish({}, {})
    assert load_run(folder.path).summary is None


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    write_atomic(file, b"old")

    def fail(descriptor):
        raise OSError("no space")

    monkeypatch.setattr(runs.os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomic(file, b"new and longer")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["summary.json"]


def test_readers_never_see_half_a_file(tmp_path, monkeypatch):
    file, seen = tmp_path / "summary.json", []
    write_atomic(file, b"old")
    replace = os.replace

    def look_then_replace(source, target):
        seen.append(file.read_bytes())
        replace(source, target)

    monkeypatch.setattr(runs.os, "replace", look_then_replace)
    write_atomic(file, b"new")
    assert (seen, file.read_bytes()) == ([b"old"], b"new")


def test_a_torn_last_line_is_left_out_and_damage_is_named(tmp_path):
    folder = make(tmp_path)
    folder.append_round({"round": 1})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "accu')
    assert [line["round"] for line in load_run(folder.path).rounds] == [1]
    (folder.path / "metrics.jsonl").write_text('{"round": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not valid JSON"):
        load_run(folder.path)
    (folder.path / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        load_run(folder.path)


def test_no_run_folder(tmp_path):
    with pytest.raises(ValueError, match=r"is no run folder: it has no config\.toml"):
        load_run(tmp_path)


def test_find_runs_is_in_order_of_time(tmp_path):
    late = make(tmp_path, now=datetime(2026, 2, 1))
    early = make(tmp_path, now=datetime(2025, 2, 1))
    (tmp_path / "notes").mkdir()
    assert find_runs(tmp_path) == [early.path, late.path]


# --- summary ------------------------------------------------------------------------------------------------


def test_summary_of_a_worked_example():
    rounds = [
        {"round": k, "accuracy": k / 100, "loss": 2.0 - k / 10, "bytes-down": 100, "bytes-up": 10, "macs": 5}
        for k in range(1, 13)
    ]
    summary = summarise(rounds, {"strategy": "x"})
    assert summary["rounds"] == 12
    assert summary["final"] == {"accuracy": 0.12, "loss": pytest.approx(0.8)}
    assert summary["last10"] == {"accuracy": pytest.approx(0.075), "loss": pytest.approx(1.25)}
    assert summary["best"] == {"accuracy": 0.12, "loss": pytest.approx(0.8)}
    assert (summary["bytes-down"], summary["bytes-up"], summary["macs"]) == (1200, 120, 60)
    assert summary["strategy"] == "x"


def test_best_is_highest_accuracy_and_lowest_loss():
    rounds = [{"round": 1, "accuracy": 0.9, "loss": 0.1}, {"round": 2, "accuracy": 0.2, "loss": 3.0}]
    assert summarise(rounds, {})["best"] == {"accuracy": 0.9, "loss": 0.1}
    assert summarise(rounds, {})["final"] == {"accuracy": 0.2, "loss": 3.0}


def test_last10_of_fewer_than_ten_rounds_is_the_mean_of_all():
    rounds = [{"round": k, "accuracy": value} for k, value in enumerate((0.2, 0.4, 0.9), 1)]
    assert summarise(rounds, {})["last10"] == {"accuracy": pytest.approx(0.5)}


def test_absent_metrics_do_not_count():
    rounds = [{"round": 1, "accuracy": 0.4}, {"round": 2}, {"round": 3, "accuracy": 0.8}, {"round": 4, "macs": 3}]
    summary = summarise(rounds, {})
    assert summary["last10"] == {"accuracy": pytest.approx(0.6)}
    assert summary["final"] == {"accuracy": 0.8}
    assert summary["macs"] == 3


def test_last10_has_no_entry_where_the_last_ten_rounds_measured_nothing():
    rounds = [{"round": 1, "accuracy": 0.4}, *({"round": k} for k in range(2, 13))]
    summary = summarise(rounds, {})
    assert summary["last10"] == {}
    assert summary["final"] == {"accuracy": 0.4}


def test_a_run_that_diverged_shows_no_earlier_number():
    rounds = [{"round": 1, "loss": 0.5}, {"round": 2, "loss": None}]
    summary = summarise(rounds, {})
    assert summary["final"] == {"loss": None}
    assert summary["last10"] == {"loss": None}
    assert summary["best"] == {"loss": 0.5}


def test_refused_and_failed_are_counted_and_no_round_is_a_summary_too():
    rounds = [{"round": 1, "refused": [{"partition": 3, "reason": "NaN"}]}, {"round": 2, "failed": [{}, {}]}]
    assert (summarise(rounds, {})["refused"], summarise(rounds, {})["failed"]) == (1, 2)
    empty = summarise([], {"seed": 1})
    assert (empty["rounds"], empty["final"], empty["bytes-up"]) == (0, {}, 0)


def test_facts_win():
    assert summarise([], {"rounds": 5})["rounds"] == 5


def test_a_summary_without_its_parts_is_refused(tmp_path):
    folder = make(tmp_path)
    (folder.path / "summary.json").write_text('{"final": {}}')
    with pytest.raises(ValueError, match="is no summary of a run: last10 missing"):
        load_run(folder.path)
