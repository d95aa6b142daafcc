from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from toy import same_bits

from flexfed.client_state import load_state, save_state, state_folder


def state(value: float) -> dict[str, np.ndarray]:
    return {"scores": np.full((2, 3), value), "step": np.array(value, dtype=np.float32)}


def kept(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("round-")) for path in folder.iterdir())


def test_a_client_reads_the_newest_version_below_its_round(tmp_path: Path) -> None:
    assert load_state(tmp_path / "none", 5) == {}
    for server_round in (2, 5, 9):
        save_state(tmp_path, server_round, state(server_round))
    for asked, found in ((2, None), (3, 2), (5, 2), (6, 5), (9, 5), (10, 9), (99, 9)):
        assert same_bits(load_state(tmp_path, asked), {} if found is None else state(found)), asked


def test_three_versions_are_kept(tmp_path: Path) -> None:
    for server_round in (1, 2, 4, 8, 16):
        save_state(tmp_path, server_round, state(server_round))
    assert kept(tmp_path) == [4, 8, 16]


def test_a_server_that_fell_back_finds_the_client_where_it_was_then(tmp_path: Path) -> None:
    for server_round in (7, 8, 9):
        save_state(tmp_path, server_round, state(server_round))
    assert same_bits(load_state(tmp_path, 8), state(7))  # the server had only round 7 on disk
    save_state(tmp_path, 8, state(80))
    assert kept(tmp_path) == [7, 8]  # round 9 has not happened yet
    assert same_bits(load_state(tmp_path, 9), state(80))


def test_a_damaged_version_is_named(tmp_path: Path) -> None:
    save_state(tmp_path, 3, state(3))
    save_state(tmp_path, 4, state(4))
    os.truncate(tmp_path / "round-00000004.safetensors", 20)
    with pytest.raises(ValueError, match=r"round-00000004.safetensors cannot be read .*; delete it to go on"):
        load_state(tmp_path, 5)
    assert same_bits(load_state(tmp_path, 4), state(3))


def test_a_write_that_is_cut_short_leaves_the_old_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path, 3, state(3))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_state(tmp_path, 4, state(4))
    assert same_bits(load_state(tmp_path, 5), state(3))


def test_where_the_state_lies(tmp_path: Path) -> None:
    runs, old = str(tmp_path / "runs"), str(tmp_path / "old" / "day1")
    for places, expected in (
        (("", "", "", runs), tmp_path / "runs/day1/clients"),
        (("", "", old, runs), tmp_path / "runs/day1/clients"),  # a device: the server's folder is not there
        (("", "/shared", old, runs), Path("/shared/day1")),
        (("/mnt/card", "/shared", "", runs), Path("/mnt/card/day1")),
    ):
        assert state_folder(*places, run="day1", partition=7) == expected / "000007"
    (tmp_path / "old" / "day1" / "clients").mkdir(parents=True)  # in simulation, and moved
    assert state_folder("", "", old, runs, "day1", 7) == tmp_path / "old/day1/clients/000007"
    assert state_folder("", "/shared", old, runs, "day1", 7) == Path("/shared/day1/000007")


def test_a_tilde_is_the_devices_own_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/board")
    assert state_folder("~/state", "", "", "", "day1", 0) == Path("/home/board/state/day1/000000")
