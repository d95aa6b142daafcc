"""A fleet for tests: a SuperLink and SuperNodes, started by the scripts of deploy/, each on a machine of its own.

A machine is here a HOME of its own, in which nothing of the others can be found by accident.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from flexfed.launch import Flower, free_ports, private_flower
from flexfed.processes import marked_processes, stop_processes
from flexfed.runs import Run, load_run, read_rounds

APP = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SCRIPTS = APP / "deploy"
CONNECTION = "fleet"
# What a machine must not know of the one that the tests run on: other code, other data, where Flower keeps its things.
_NOT_THEIRS = ("PYTHONPATH", "FLEXFED_DATA", "FLEXFED_ZOOS", "HF_HOME", "HF_DATASETS_CACHE", "FLWR_HOME")
_MARK = "FLEXFED_TEST_FLEET"


@dataclass(frozen=True)
class Machine:
    """One computer of the fleet.

    Attributes:
        name: of the SuperNode's key, or "superlink".
        home: its HOME; what was started here is known by it.
        env: of everything started here.
        prefix: words before each command, such as ("ip", "netns", "exec", "flexfed-1").
        programs: what was started here, the last one last.
    """

    name: str
    home: Path
    env: Mapping[str, str]
    prefix: tuple[str, ...] = ()
    programs: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def log(self) -> str:
        """What was written here until now."""
        file = self.home.with_suffix(".log")
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a command that writes to this machine's log."""
        with self.home.with_suffix(".log").open("ab") as log:
            program = subprocess.Popen(
                [*self.prefix, *command], env=dict(self.env), cwd=self.home, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.programs.append(program)
        return program

    def processes(self, word: str = "") -> set[int]:
        """Ids of what runs here and has a word in its command line."""
        return {pid for pid in marked_processes(f"HOME={self.home}") if word in command_line(pid)}

    def kill(self, word: str = "") -> None:
        """kill -9 what runs here and has a word in its command line; without one the plug is pulled."""
        found = self.processes(word)
        assert found, f"nothing with {word!r} runs on {self.name}"
        while found:
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
            found &= self.processes(word)


class Fleet:
    """A SuperLink and SuperNodes with their keys.

    Args:
        folder: for everything.
        flower: of whoever submits runs.
        hosts: that the SuperLink listens at and SuperNodes reach it by; the first one is used.
        prefix: of the SuperLink's machine, from which runs are submitted, too.
    """

    def __init__(self, folder: Path, flower: Flower, hosts: Sequence[str], prefix: tuple[str, ...] = ()):
        self._folder, self._host, self._port = folder, hosts[0], free_ports(1)[0]
        self.trust = folder / "trust"
        self.flower = replace(flower, program=_behind(prefix, flower), connection=CONNECTION)
        self.server = self._machine("superlink", prefix)
        self.nodes: dict[str, Machine] = {}
        self.script("certificates.sh", "-o", str(self.trust), *hosts)
        connection = {"address": self.address, "root-certificates": str(self.trust / "ca.crt")}
        insecure = {"address": self.address, "insecure": True}
        known = {"superlink": {"default": CONNECTION, CONNECTION: connection, "insecure": insecure}}
        (flower.home / "config.toml").write_text(tomli_w.dumps(known), encoding="utf-8")

    @property
    def address(self) -> str:
        """Of the SuperLink."""
        return f"{self._host}:{self._port}"

    def script(self, name: str, *args: str) -> str:
        """Run a script of deploy/ to its end; what it said."""
        done = subprocess.run([str(SCRIPTS / name), *args], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _machine(self, name: str, prefix: tuple[str, ...] = ()) -> Machine:
        home = self._folder / name
        home.mkdir()
        env = {key: value for key, value in self.flower.env.items() if key not in _NOT_THEIRS}
        return Machine(name, home, {**env, "HOME": str(home), _MARK: str(self._folder)}, prefix)

    # What runs ------------------------------------------------------------------------------------------------

    def start_superlink(self, *options: str) -> None:
        """Start the SuperLink by its script; returns once it answers."""
        place = ["-H", self._host, "-p", str(self._port), str(self.trust)]
        self.server.start(str(SCRIPTS / "superlink.sh"), *place, *options)
        self.wait(lambda: self.flower_answers("ls"), 90, "the SuperLink to answer")

    def flower_answers(self, *args: str, connection: str = CONNECTION) -> bool:
        """Whether `flwr` gets an answer from the SuperLink."""
        process = self.flower.start(*args, connection, "--format", "json")
        output, _ = process.communicate()
        return process.returncode == 0 and '"success": true' in output

    def restart_superlink(self, killed: bool) -> None:
        """Have the SuperLink start anew by its script: killed (-9), or as it is asked to with USR1."""
        before = self.server.processes("bin/flower-superlink")
        assert before
        if killed:
            self.server.kill("bin/flower-superlink")
        else:
            self.server.programs[-1].send_signal(signal.SIGUSR1)
        self.wait(lambda: not before & self.server.processes("bin/flower-superlink"), 60, "the SuperLink to end")
        self.wait(lambda: self.flower_answers("ls"), 90, "the SuperLink to answer again")

    def add(self, name: str, prefix: tuple[str, ...] = ()) -> Machine:
        """One more machine with a key; its data may be put into its home before it is started."""
        self.script("certificates.sh", "-o", str(self.trust), "-k", name)
        self.nodes[name] = self._machine(name, prefix)
        return self.nodes[name]

    def register(self, name: str) -> None:
        """Let the SuperLink know a key."""
        self.flower.ask("supernode", "register", str(self.trust / "keys" / f"{name}.pub"), CONNECTION)

    def start_node(self, name: str, node_config: str, pause: int = 2) -> subprocess.Popen[bytes]:
        """Start a SuperNode by its script."""
        place = ["-s", self.address, "-p", str(free_ports(1)[0]), "-r", str(pause)]
        script = [str(SCRIPTS / "supernode.sh"), *place, str(self.trust), name, node_config]
        return self.nodes[name].start(*script)

    def online(self) -> int:
        """SuperNodes that the SuperLink takes for being there."""
        nodes = self.flower.ask("supernode", "list", CONNECTION)["nodes"]
        return sum(node["status"] == "online" for node in nodes)

    # Runs -----------------------------------------------------------------------------------------------------

    def start_run(self, config: Mapping[str, Any]) -> Submitted:
        """`flwr run . fleet --stream`, in a process of its own."""
        file = self._folder / f"run{time.monotonic_ns()}.toml"
        runs = self._folder / f"{file.stem}-results"
        file.write_text(tomli_w.dumps({**config, "runs-dir": str(runs)}), encoding="utf-8")
        log = file.with_suffix(".log")
        command = [str(self.flower.program), "run", ".", CONNECTION, "--stream", "-c", str(file)]
        with log.open("wb") as out:
            env = dict(self.flower.env)
            process = subprocess.Popen(command, env=env, cwd=APP, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        run = Submitted(self, process, log, runs)
        self.wait(lambda: bool(run.id) or process.poll() is not None, 60, "the run to be accepted")
        return run

    def wait(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait until something is so.

        Raises:
            TimeoutError: it is not so after that many seconds.
        """
        end_at = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end_at:
                raise TimeoutError(f"waited {seconds} s for {what}")
            time.sleep(0.2)

    @contextlib.contextmanager
    def logs_if_it_fails(self) -> Iterator[None]:
        """Show what every machine wrote, if the block fails."""
        try:
            yield
        except BaseException:
            for machine in (self.server, *self.nodes.values()):
                print(f"--- {machine.name}\n{machine.log[-4000:]}")
            raise


@dataclass(frozen=True)
class Submitted:
    """A run under way, and what it leaves."""

    fleet: Fleet
    process: subprocess.Popen[bytes]
    file: Path
    runs: Path

    @property
    def log(self) -> str:
        """What `flwr run --stream` has shown."""
        return self.file.read_text(encoding="utf-8", errors="replace")

    @property
    def id(self) -> str:
        """Of the run, for Flower; empty while it is not accepted."""
        found = re.search(r"Successfully started run (\d+)", self.log)
        return found[1] if found else ""

    @property
    def folder(self) -> Path:
        """Of the run; fails while there is none."""
        (found,) = self.runs.iterdir()
        return found

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl, until now."""
        return [line for file in self.runs.glob("*/metrics.jsonl") for line in read_rounds(file.parent)]

    def finish(self, seconds: float = 300, followed: bool = True) -> Run:
        """Wait for its end; fails unless it completed.

        Args:
            seconds: to wait at most.
            followed: whether `flwr run --stream` has to last as long; it does not if the SuperLink ends meanwhile.
        """
        try:
            if followed:
                assert self.process.wait(seconds) == 0, self.log
            assert self.id, self.log
            self.fleet.wait(self._is_over, seconds, "the run to end")
            run = self._told()
            assert run["status"] == "finished:completed", f"{run}\n{self.log}"
            record = load_run(self.folder)
            assert record.summary is not None, self.log
            return record
        finally:
            self.process.kill()
            self.process.wait()

    def _told(self) -> Mapping[str, Any]:
        """What Flower says of the run."""
        run: Mapping[str, Any] = self.fleet.flower.ask("ls", CONNECTION, "--run-id", self.id)["runs"][0]
        return run

    def _is_over(self) -> bool:
        return str(self._told()["status"]).startswith("finished")


@contextlib.contextmanager
def a_fleet(folder: Path, hosts: Sequence[str] = ("127.0.0.1",), prefix: tuple[str, ...] = ()) -> Iterator[Fleet]:
    """A fleet whose processes are all gone afterwards; nothing is started yet."""
    with private_flower(BIN) as flower:
        fleet = Fleet(folder, flower, hosts, prefix)
        try:
            yield fleet
        finally:
            stop_processes(f"{_MARK}={folder}")
    for machine in (fleet.server, *fleet.nodes.values()):
        for program in machine.programs:
            program.wait(10)


def _behind(prefix: Sequence[str], flower: Flower) -> Path:
    """`flwr` as a program that has words before it."""
    if not prefix:
        return flower.program
    program = flower.home / "flwr"
    program.write_text(f'#!/bin/sh\nexec {shlex.join([*prefix, str(flower.program)])} "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    return program


def command_line(pid: int) -> str:
    """Of a process that may be gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def write_digits(folder: Path, rows: Sequence[int], split: str = "train") -> None:
    """Some of scikit-learn's handwritten digits as a parquet file of arrays and labels."""
    from datasets import Array3D, ClassLabel, Dataset, Features
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images[list(rows)] / 16).astype(np.float32)[:, None]
    names = [str(name) for name in digits.target_names]
    features = Features({"x": Array3D((1, 8, 8), "float32"), "label": ClassLabel(names=names)})
    table = Dataset.from_dict({"x": images, "label": digits.target[list(rows)]}, features=features)
    folder.mkdir(exist_ok=True)
    table.to_parquet(str(folder / f"{split}-0.parquet"))
