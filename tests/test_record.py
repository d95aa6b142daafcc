"""What a round's record counts: a worked example, and nothing in its line that depends on the clock."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from flwr.app import Message
from toy import lines, run_toy, toy_task

from flexfed.devices import Device
from flexfed.jobs import Update
from flexfed.runs import load_run
from flexfed.submodel import full
from flexfed.training import Evaluation
from strategies.preparation import Preparation
from strategies.record import RoundRecord

ODD = Device(1, speed_macs_s=1e3, link_bytes_s=10.0, download_bytes_s=40.0, compute_watts=3.0, radio_watts=2.0)
EVEN = Device(2, speed_macs_s=1e3, link_bytes_s=20.0)


def update(**metrics: float) -> Update:
    return Update(full(toy_task().layout), np.zeros(0, dtype=np.float32), 5.0, metrics)


def test_each_way_has_its_speed_and_the_slowest_device_ends_a_phase() -> None:
    record = RoundRecord(1, bytes_down={1: 400, 2: 400})
    record.count(ODD, "full", update(macs=2000), 100)  # 10 + 2 + 10 s
    record.count(EVEN, "full", update(macs=1000), 100)  # 20 + 1 + 5 s
    record.count_beside("test", ODD, 500, 80, 30)  # 2 + 0.5 + 3 s
    line = record.line()
    assert line["modelled-seconds"] == pytest.approx(26 + 5.5)
    assert line["joules"] == pytest.approx(3 * 2.5 + 2 * (10 + 10 + 2 + 3) + 1 + 20 + 5)
    assert (line["bytes-down"], line["bytes-up"], line["bytes-evaluation"]) == (800, 200, 110)
    assert (line["macs"], line["macs-evaluation"]) == (3000, 500)


def test_answers_tell_their_own_time_and_energy_and_the_link_comes_on_top() -> None:
    record = RoundRecord(1)
    for kind, down in (("train.score", 400), ("train.head", 80), ("evaluate.stitched", 40)):
        record.count_sent(kind, 1, down)
    told = {"macs": 500.0, "modelled-seconds": 0.5, "modelled-joules": 7.0, "seconds": 0.25}
    record.count_answer("train.score", ODD, told, 400, 100)  # 10 + 0.5 + 10 s
    record.count_answer("train.head", ODD, {**told, "measured-joules": 4.0}, 80, 30)  # 2 + 0.5 + 3 s
    record.count_answer("train.head", EVEN, told, 80, 20)  # 4 + 0.5 + 1 s
    record.count_answer("evaluate.stitched", ODD, {**told, "measured-joules": 1.0}, 40, 10)  # 1 + 0.5 + 1 s
    line = record.line()
    assert line["modelled-seconds-training"] == pytest.approx(20.5 + 5.5)
    assert line["modelled-seconds"] == pytest.approx(20.5 + 5.5 + 2.5)
    assert line["joules"] == pytest.approx(4 * 7 + 2 * (20 + 5 + 2) + 5)
    assert (line["bytes-down"], line["bytes-up"], line["bytes-evaluation"]) == (480, 150, 50)
    assert (line["macs"], line["macs-evaluation"]) == (1500, 500)
    assert record.measured == (0.75, 5.0)


def test_what_came_before_round_1_counts_in_its_line_phase_by_phase() -> None:
    before = Preparation(bytes_down=880)
    before.count("explore", ODD, update(macs=2000), 400, 100)  # 22 s
    before.count("explore", EVEN, update(macs=1000), 400, 100)  # 26 s
    before.count("vote", ODD, update(macs=500), 80, 30)  # 5.5 s
    record, alone = RoundRecord(1, before, bytes_down={1: 400}), RoundRecord(1, bytes_down={1: 400})
    for found in (record, alone):
        found.count(ODD, "full", update(macs=2000), 100)
    line, rest = record.line(), alone.line()
    for key in ("modelled-seconds", "modelled-seconds-training"):
        assert line[key] - rest[key] == pytest.approx(26 + 5.5)
    assert line["modelled-seconds-preparation"] == pytest.approx(26 + 5.5)
    assert line["joules"] - rest["joules"] == pytest.approx(3 * 2.5 + 2 * (10 + 10 + 2 + 3) + 1 + 20 + 5)
    assert (line["bytes-down"], line["bytes-up"], line["bytes-preparation"]) == (400 + 880, 100 + 230, 880 + 230)
    assert (line["macs"], line["macs-preparation"]) == (2000 + 3500, 3500)
    assert line.keys() - rest.keys() == {f"{key}-preparation" for key in ("bytes", "macs", "modelled-seconds")}


def test_seconds_of_accepted_replies_are_summed_beside_the_line() -> None:
    record, quick = RoundRecord(1), RoundRecord(1)
    record.count(ODD, "full", update(macs=10, seconds=1.5), 100)
    record.count(EVEN, "full", update(macs=10, seconds=0.25), 100)
    for device in (ODD, EVEN):
        quick.count(device, "full", update(macs=10), 100)
    assert (record.client_seconds, quick.client_seconds) == (1.75, 0.0)
    assert record.line() == quick.line()


def saying(seconds: float, seen: list[float] | None = None, spoil: int = -1) -> Callable[..., Message]:
    """Every trained client says that it took `seconds`; the one of partition `spoil` is refused."""

    def change(request: Message, reply: Message, partition: int) -> Message:
        if request.metadata.message_type.startswith("train"):
            found: Any = reply.content["metrics"]
            if seen is not None:
                seen.append(found["seconds"])
            found["seconds"] = seconds
            if partition == spoil:
                found["weight"] = -1.0
        return reply

    return change


def test_metrics_have_the_same_bytes_however_long_clients_took(tmp_path: Path) -> None:
    runs = [run_toy(tmp_path / str(s), values={"num-server-rounds": 2}, alter=saying(s)) for s in (0.0, 1.5, 1e9 / 3)]
    assert len({(run / "metrics.jsonl").read_bytes() for run in runs}) == 1
    found = load_run(runs[1])
    cohort = len(found.rounds[0]["cohort"])
    assert found.client_timing == {1: 1.5 * cohort, 2: 1.5 * cohort}
    assert found.summary is not None
    assert found.summary["client-seconds"] == 3.0 * cohort
    assert json.loads((runs[0] / "timing.jsonl").read_text().splitlines()[0])["client-seconds"] == 0.0


def test_refused_replies_do_not_count(tmp_path: Path) -> None:
    run = run_toy(tmp_path, alter=saying(1.5, spoil=2))
    (line,) = lines(run)
    assert [reply["partition"] for reply in line["refused"]] == [2]
    assert load_run(run).client_timing == {1: 1.5 * (len(line["cohort"]) - 1)}


def test_seconds_of_exploration_count_in_round_1(tmp_path: Path) -> None:
    values = {"num-server-rounds": 2, "fraction-train": 0.5}
    found = load_run(run_toy(tmp_path, "autoflip", values, alter=saying(1.5)))
    assert found.client_timing == {1: 1.5 * (4 + 2), 2: 1.5 * 2}
    assert found.summary is not None
    assert found.summary["client-seconds"] == 12.0


def test_a_client_measures_its_training_in_processor_seconds(tmp_path: Path) -> None:
    seen: list[float] = []
    with patch("client_app.time") as clock:
        clock.process_time.side_effect = [10.0, 12.5, 20.0, 21.0, 30.0, 30.0, 40.0, 40.75]
        run_toy(tmp_path, alter=saying(0.0, seen))
    assert seen == [2.5, 1.0, 0.0, 0.75]


def test_clients_tests_are_told_by_kind_where_there_are_several() -> None:
    def tested(*groups: str) -> dict[str, Any]:
        counts = enumerate(groups, 1)
        return RoundRecord(1, clients=[(kind, Evaluation(n, 1.0, 10)) for n, kind in counts]).line()

    line = tested("weak", "strong", "weak")
    assert line["accuracy-clients"] == pytest.approx(0.2)
    assert line["clients-accuracy-weak"] == pytest.approx(0.2)
    assert line["clients-accuracy-strong"] == pytest.approx(0.2)
    assert tested("weak", "weak", "strong")["clients-accuracy-weak"] == pytest.approx(0.15)
    assert not any(key.startswith("clients-accuracy-") for key in tested("weak", "weak"))
