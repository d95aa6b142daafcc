"""The app in Flower's own processes: the local SuperLink with Ray."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

import pytest

import server_app
from flexfed.launch import follow, private_flower, run_simulation, submit
from flexfed.launch import wait_until_finished as wait_until_over
from flexfed.overrides import with_resumed
from flexfed.processes import marked_processes

APP = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
pytestmark = pytest.mark.slow


def only_run(folder: Path) -> Path:
    runs = list(folder.iterdir())
    assert len(runs) == 1, runs
    return runs[0]


def test_simulation_gives_the_numbers_of_the_in_process_run_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """Law 8, and the promise of `flexfed run`: same seed, same metrics.jsonl, same model, byte for byte."""
    said: list[str] = []
    overrides = {"num-server-rounds": 2, "seed": 3}
    text = " ".join(f"{k}={v}" for k, v in overrides.items())
    code = run_simulation(APP, [f'runs-dir="{tmp_path / "ray"}" {text}'], supernodes=6, cpus=2, echo=said.append)
    assert code == 0, "\n".join(said)
    simulated = only_run(tmp_path / "ray")
    local = server_app.run_in_process({**overrides, "runs-dir": str(tmp_path / "local")}, 6)
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (simulated / name).read_bytes() == (local / name).read_bytes(), name
    assert any(str(simulated) in line for line in said)
    assert not our_superlinks()


def test_methods_with_parts_and_states_of_their_own_are_the_same_on_both_grids(tmp_path: Path) -> None:
    """Law 8 again: depth, private state, masks that shrink, and draws in every batch."""
    base = {"num-server-rounds": 2, "seed": 3, "autoflip.explore-epochs": 1, "personal": "stored-local"}
    strategies = ("autoflip", "depthfl", "fiarse", "fjord", "scalefl")
    with private_flower(BIN) as flower:
        for strategy in strategies:
            said: list[str] = []
            values = {**base, "strategy": strategy, "runs-dir": str(tmp_path / f"ray-{strategy}")}
            run_id = submit(flower, APP, values, supernodes=4, cpus=2)
            follow(flower, run_id, said.append)
            assert wait_until_over(flower, run_id)["status"] == "finished:completed", "\n".join(said)
    for strategy in strategies:
        values = {**base, "strategy": strategy, "runs-dir": str(tmp_path / f"local-{strategy}")}
        simulated, local = only_run(tmp_path / f"ray-{strategy}"), server_app.run_in_process(values, 4)
        for name in ("metrics.jsonl", "model.safetensors"):
            assert (simulated / name).read_bytes() == (local / name).read_bytes(), (strategy, name)


def test_a_run_that_fails_exits_with_1_and_says_why(tmp_path: Path) -> None:
    said: list[str] = []
    overrides = [f'runs-dir="{tmp_path}" model="flexfl-vgg16" num-server-rounds=1']
    assert run_simulation(APP, overrides, supernodes=2, cpus=2, echo=said.append) == 1
    assert "flexfl-vgg16" in "\n".join(said)
    assert not our_superlinks()


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """Law 9 under Flower: kill -9 its server process after a round, resume, and nothing differs from a whole run."""
    values = {"num-server-rounds": 5, "seed": 4, "runs-dir": str(tmp_path / "killed"), "flexfl.pretrain-epochs": 5}
    said: list[str] = []
    with private_flower(BIN) as flower:
        submit(flower, APP, values, supernodes=4, cpus=2)
        folder = wait_for_checkpoint(tmp_path / "killed", 2)
        kill_server(flower.home)
        assert not (folder / "summary.json").exists()
        run_id = submit(flower, APP, with_resumed({"resume": str(folder)}), supernodes=4, cpus=2)
        follow(flower, run_id, said.append)
        run = wait_until_over(flower, run_id)
        assert run["status"] == "finished:completed", "\n".join(said)
    assert not any(f"round {r}/5" in line for r in (1, 2) for line in said), "it began anew"
    whole = server_app.run_in_process({**values, "runs-dir": str(tmp_path / "whole")}, 4)
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def wait_for_checkpoint(runs: Path, server_round: int, seconds: float = 180) -> Path:
    """The run folder, once the checkpoint of a round is there."""
    end_at = time.monotonic() + seconds
    while time.monotonic() < end_at:
        for path in runs.glob(f"*/checkpoint/round-{server_round:08d}.safetensors"):
            return path.parent.parent
        time.sleep(0.02)
    raise TimeoutError(f"no checkpoint of round {server_round} in {seconds} s")


def kill_server(home: Path) -> None:
    """kill -9 the process in which the ServerApp runs."""
    import psutil

    ours = [psutil.Process(pid) for pid in marked_processes(f"FLWR_HOME={home}")]
    servers = [p for p in ours if any("flwr-simulation" in word for word in p.cmdline()[:2])]
    assert servers, [p.cmdline()[:3] for p in ours]
    for process in servers:
        process.kill()


def our_superlinks() -> list[int]:
    """SuperLinks started by a child of this process and still alive."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        with contextlib.suppress(psutil.Error):
            command, home = process.info["cmdline"] or [], (process.info["environ"] or {}).get("FLWR_HOME", "")
            if any("flower-superlink" in word for word in command) and "/flexfed-" in home:
                found.append(process.pid)
    return found
