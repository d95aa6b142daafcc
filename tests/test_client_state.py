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


def test_a_client_goes_on_from_the_round_that_the_server_names(tmp_path: Path) -> None:
    assert load_state(tmp_path, 0) == {}
    save_state(tmp_path, 2, state(2), base=0)
    save_state(tmp_path, 5, state(5), base=2)
    assert same_bits(load_state(tmp_path, 5), state(5))
    assert same_bits(load_state(tmp_path, 2), state(2))
    assert load_state(tmp_path, 0) == {}


def test_a_round_its_base_and_the_bases_own_are_kept(tmp_path: Path) -> None:
    for base, server_round in ((0, 1), (1, 2), (2, 4), (4, 8), (8, 16)):
        save_state(tmp_path, server_round, state(server_round), base)
    assert kept(tmp_path) == [4, 8, 16]


def test_replies_that_never_counted_leave_no_trace(tmp_path: Path) -> None:
    """However many they are: what counts stays, and so does what a server that falls back needs."""
    save_state(tmp_path, 1, state(1), base=0)
    save_state(tmp_path, 2, state(2), base=1)
    for lost in (3, 4, 5, 6):
        save_state(tmp_path, lost, state(lost), base=2)
        assert same_bits(load_state(tmp_path, 2), state(2))
    save_state(tmp_path, 7, state(7), base=2)
    assert kept(tmp_path) == [1, 2, 7]


def test_a_server_that_fell_back_finds_the_client_where_it_was_then(tmp_path: Path) -> None:
    for base, server_round in ((0, 7), (7, 8), (8, 9)):
        save_state(tmp_path, server_round, state(server_round), base)
    assert same_bits(load_state(tmp_path, 7), state(7))
    save_state(tmp_path, 8, state(80), base=7)
    assert same_bits(load_state(tmp_path, 8), state(80))
    assert kept(tmp_path) == [7, 8]


def test_a_version_that_is_not_there_is_an_error_and_no_new_start(tmp_path: Path) -> None:
    save_state(tmp_path, 3, state(3), base=0)
    with pytest.raises(ValueError, match=r"the private state of round 2 is missing: expected .*round-00000002"):
        load_state(tmp_path, 2)


def test_damage_is_named(tmp_path: Path) -> None:
    save_state(tmp_path, 3, state(3), base=0)
    save_state(tmp_path, 4, state(4), base=3)
    path = tmp_path / "round-00000003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"round-00000003.safetensors is damaged"):
        load_state(tmp_path, 3)
    os.truncate(tmp_path / "round-00000004.safetensors", 20)
    with pytest.raises(ValueError, match=r"round-00000004.safetensors cannot be read, it may be truncated"):
        load_state(tmp_path, 4)


def test_a_write_that_is_cut_short_leaves_the_old_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path, 3, state(3), base=0)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save_state(tmp_path, 4, state(4), base=3)
    assert same_bits(load_state(tmp_path, 3), state(3))
    (tmp_path / ".round-00000004.safetensors.77.tmp").write_bytes(b"half")  # a kill sweeps nothing
    save_state(tmp_path, 4, state(4), base=3)
    assert kept(tmp_path) == [3, 4]


def test_where_the_state_lies(tmp_path: Path) -> None:
    runs, old = str(tmp_path / "runs"), str(tmp_path / "old" / "day1")
    for places, expected in (
        (("", "", "", runs), tmp_path / "runs/day1/clients"),
        (("", "", old, runs), tmp_path / "runs/day1/clients"),  # a device: the server's folder is not there
        (("", "/shared", old, runs), Path("/shared/day1")),
        (("/mnt/card", "/shared", "", runs), Path("/mnt/card/day1")),
    ):
        assert state_folder(*places, run="day1", partition=7) == expected / "000007"
    (tmp_path / "old" / "day1").mkdir(parents=True)
    (tmp_path / "old" / "day1" / "config.toml").touch()  # in simulation, and moved
    assert state_folder("", "", old, runs, "day1", 7) == tmp_path / "old/day1/clients/000007"
    assert state_folder("", "/shared", old, runs, "day1", 7) == Path("/shared/day1/000007")
    with pytest.raises(ValueError, match="state-dir of the node-config must be an absolute path"):
        state_folder("card", "", "", runs, "day1", 7)


def test_a_tilde_is_the_devices_own_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/board")
    assert state_folder("~/state", "", "", "", "day1", 0) == Path("/home/board/state/day1/000000")
