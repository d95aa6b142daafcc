"""The app in Flower's own processes: the local SuperLink with Ray, and a SuperLink with two SuperNodes on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import server_app
from flexfed.launch import follow, private_flower, run_simulation, submit
from flexfed.launch import wait_until_finished as wait_until_over
from flexfed.overrides import with_resumed
from flexfed.processes import marked_processes
from flexfed.runs import load_run

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


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def running(*command: str, env: Mapping[str, str], cwd: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of ours, with everything that it starts; ended at the end."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=dict(env), cwd=cwd, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    import psutil

    family = []
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(20)
    for child in family:
        with contextlib.suppress(psutil.Error):
            child.kill()


def flwr(*args: str, env: Mapping[str, str], cwd: Path) -> dict[str, object]:
    command = [str(BIN / "flwr"), *args, "--format", "json"]
    done = subprocess.run(command, env=dict(env), cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    answer: dict[str, object] = json.loads(done.stdout[done.stdout.index("{") :])
    return answer


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[tuple[dict[str, str], Path]]:
    """A SuperLink and two SuperNodes, one of small capacity, one that measures its memory; (environment, directory)."""
    home, cwd, port = tmp_path / "home", tmp_path / "cwd", free_port()
    for folder in (home, cwd):
        folder.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "fleet"\n[superlink.fleet]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    env = {
        **os.environ,
        "FLWR_HOME": str(home),
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",  # one program starts the next by its name
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    with contextlib.ExitStack() as stack:
        superlink = [str(BIN / "flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        options = ["--disable-runtime-dependency-installation"]
        stack.enter_context(running(*superlink, *options, env=env, cwd=cwd, log=tmp_path / "superlink.log"))
        wait_for_port(port)
        for partition, device in enumerate(("capacity=0.35", "memory-bytes=4e9 measure-memory=true")):
            told = f'partition-id={partition} num-partitions=2 {device} kind="node{partition}"'
            node = [str(BIN / "flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{port}"]
            place = ["--port", str(free_port()), "--node-config", told]
            stack.enter_context(running(*node, *place, env=env, cwd=cwd, log=tmp_path / f"node{partition}.log"))
        yield env, cwd


def wait_for_port(port: int, seconds: float = 60) -> None:
    end_at = time.monotonic() + seconds
    while time.monotonic() < end_at:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise TimeoutError(f"nothing listens on port {port}")


def test_the_same_app_runs_on_a_superlink_with_two_supernodes(
    fleet: tuple[dict[str, str], Path], tmp_path: Path
) -> None:
    """Two rounds of FlexFL; the weak node never gets more than it declared."""
    env, cwd = fleet
    overrides = f'runs-dir="{tmp_path / "runs"}" num-server-rounds=2 fraction-train=1.0 fraction-evaluate=0.0'
    started = flwr("run", str(APP), "fleet", "-c", overrides, env=env, cwd=cwd)
    status = wait_until_finished(str(started["run-id"]), env, cwd)
    logs = "\n".join(log.read_text(errors="replace")[-3000:] for log in tmp_path.glob("*.log"))
    assert status == "finished:completed", logs
    run = load_run(only_run(tmp_path / "runs"))
    assert run.summary is not None
    assert len(run.rounds) == 2
    assert [line["failed"] + line["refused"] for line in run.rounds] == [[], []], logs
    assert sum(sum(line["trained"].values()) for line in run.rounds) >= 2
    assert run.summary["clients"] == 2


def wait_until_finished(run_id: str, env: Mapping[str, str], cwd: Path, seconds: float = 300) -> str:
    end_at = time.monotonic() + seconds
    status = ""
    while time.monotonic() < end_at:
        runs = flwr("ls", "fleet", "--run-id", run_id, env=env, cwd=cwd)["runs"]
        assert isinstance(runs, list)
        status = str(runs[0]["status"])
        if status.startswith("finished"):
            return status
        time.sleep(2)
    return status
