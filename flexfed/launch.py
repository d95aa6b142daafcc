"""Run the app under Flower's simulation from start to end, and leave nothing running behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexfed.measure import num_cpus
from flexfed.overrides import Scalar, defaults, parse_overrides, with_resumed
from flexfed.processes import ignore_interrupts, signals_as_interrupt, stop_processes

Echo = Callable[[str], None]

FOLDER_LINE = "run folder: "  # the server app prints it last, and the path behind it
_FOLDER = re.compile(re.escape(FOLDER_LINE) + r"(.+?)\s*$")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Said on every run whatever the settings are, and only misleading here.
_NOISE = (
    "default simulated SuperNodes changed",
    "Starting logstream for run_id",
    "Manually terminating",
    "To change federation size",
    "simulation-config",
    "Successfully installed",
)
_BLANK = re.compile(r"\s*INFO\s*:?\s*$")
_POLL_S = 0.3


class LaunchError(RuntimeError):
    """Flower did not do what was asked; the text holds its own output."""


@dataclass(frozen=True)
class Flower:
    """A private Flower: its home, its ports (in the environment), its program.

    Attributes:
        home: FLWR_HOME; nothing else has it, so a process with it in its environment is ours.
        program: the `flwr` executable.
        env: environment of everything started here.
        connection: name of the SuperLink in its configuration.
    """

    home: Path
    program: Path
    env: Mapping[str, str]
    connection: str = "local"

    def start(self, *args: str, stderr: int = subprocess.STDOUT) -> subprocess.Popen[str]:
        """Start `flwr` with these arguments, in an empty directory, out of reach of the terminal's Ctrl-C."""
        return subprocess.Popen(
            [str(self.program), *args], env=self.env, cwd=self.home / "cwd", stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=stderr, encoding="utf-8", errors="replace", start_new_session=True,
        )  # fmt: skip

    def ask(self, *args: str) -> dict[str, Any]:
        """The answer of `flwr ... --format json`.

        Raises:
            LaunchError: it failed, or answered no JSON.
        """
        process = self.start(*args, "--format", "json", stderr=subprocess.PIPE)
        try:
            output, errors = process.communicate()
        finally:
            _end(process)
        answer = _find_json(output)
        if process.returncode or answer is None or answer.get("success") is False:
            said = str((answer or {}).get("error-message") or output + errors).strip()
            raise LaunchError(f"`flwr {args[0]}` failed (exit code {process.returncode}):\n{said}")
        return answer


def _say(line: str) -> None:
    print(line, flush=True)  # a log that waits in a buffer is no log


def run_simulation(
    app_dir: Path,
    overrides: Sequence[str] = (),
    supernodes: int = 20,
    cpus: int | None = None,
    gpus_per_client: float = 0.0,
    bin_dir: Path | None = None,
    echo: Echo = _say,
) -> int:
    """What `flexfed run` does: start Flower, run the app, show its log, stop Flower.

    Args:
        app_dir: folder of pyproject.toml and server_app.py.
        overrides: as after `flwr run -c`; may mix pairs and files, relative paths are resolved.
        supernodes: simulated clients.
        cpus: clients that work at the same time, each on one CPU; default: all CPUs. Never more than there are clients.
        gpus_per_client: share of a GPU that each of them has: with 0.25 four train on every GPU at a time. 0 = clients
            are not spread over GPUs, and each sees all.
        bin_dir: where `flwr` and `flower-superlink` are; default: beside the Python that runs this.
        echo: takes the lines of the log and our own.

    Returns:
        0: the run completed and left its summary; 1: it did not; 130: stopped by Ctrl-C or a signal.

    Raises:
        ValueError: the configuration cannot be read, or there are no such GPUs.
        LaunchError: there is no `flwr` to run.
    """
    values = with_resumed(parse_overrides(overrides, defaults(app_dir)))
    cpus = min(cpus or num_cpus(), supernodes)
    _resources(cpus, gpus_per_client)  # refuses before Flower starts
    with signals_as_interrupt(), private_flower(bin_dir or Path(sys.executable).parent) as flower:
        run_id = None
        try:
            run_id = submit(flower, app_dir, values, supernodes, cpus, gpus_per_client)
            return _watch(flower, run_id, echo)
        except LaunchError as error:
            echo(f"{error}\n{_superlink_log(flower.home)}".rstrip())
            return 1
        except KeyboardInterrupt:
            _stop_run(flower, run_id, echo)
            return 130


def _watch(flower: Flower, run_id: str, echo: Echo) -> int:
    """Follow a run to its end and judge it."""
    folder = follow(flower, run_id, echo)
    run = wait_until_finished(flower, run_id)
    # A log that broke off early may have missed the folder; by now the log is complete.
    folder = folder or follow(flower, run_id, lambda line: None, "--show")
    return verdict(run, folder, echo)


@contextlib.contextmanager
def private_flower(bin_dir: Path) -> Iterator[Flower]:
    """A Flower of our own on free ports while the block lasts; its processes are gone afterwards.

    Raises:
        LaunchError: `flwr` is not in that folder.
    """
    program = bin_dir / "flwr"
    if not program.exists():
        raise LaunchError(f"no `flwr` in {bin_dir}; install the dependencies into this Python: pip install -e .")
    home = Path(tempfile.mkdtemp(prefix="flexfed-"))
    (home / "cwd").mkdir()  # Ray's workers import from the working directory first, so it must be empty
    try:
        yield Flower(home, program, _environment(home, bin_dir))
    finally:
        with ignore_interrupts():
            stop_processes(f"FLWR_HOME={home}")
            shutil.rmtree(home, ignore_errors=True)


def _environment(home: Path, bin_dir: Path) -> dict[str, str]:
    control, http = free_ports(2)
    ours = {
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_CONTROL_API_PORT": str(control),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(http),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # else every run builds a fresh environment
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning
        "PYTHONUNBUFFERED": "1",  # lines of the log when they are written, not when a buffer is full
        "OMP_NUM_THREADS": "1",  # another number of threads changes the bits, and busy cores make it slow
        "PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}",  # flwr starts flower-superlink by name
    }
    return {**os.environ, **ours}


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on; all are held until all are known, so they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


# --- the steps of a run -------------------------------------------------------------------------------------


def _resources(cpus: int, gpus_per_client: float) -> str:
    """What Ray is told of the machine and of a client, as Flower's federation configuration says it.

    Raises:
        ValueError: GPUs are asked for that are not here, or a share that is none.
    """
    told = f"client-resources-num-cpus=1 init-args-num-cpus={cpus}"
    if not gpus_per_client:
        return told
    if not (0 < gpus_per_client <= 1 or gpus_per_client in range(2, 65)):
        raise ValueError(f"gpus-per-client must be a share, 0.25, or whole GPUs, got {gpus_per_client}")
    import torch

    if torch.cuda.device_count() < gpus_per_client:
        raise ValueError(f"gpus-per-client={gpus_per_client:g}, but torch sees {torch.cuda.device_count()} GPUs here")
    return f"{told} client-resources-num-gpus={gpus_per_client} init-args-num-gpus={torch.cuda.device_count()}"


def submit(
    flower: Flower,
    app_dir: Path,
    values: Mapping[str, Scalar],
    supernodes: int,
    cpus: int,
    gpus_per_client: float = 0.0,
) -> str:
    """Start the SuperLink and the run; return the run's id.

    Args:
        flower: ours.
        app_dir: folder of the app.
        values: overrides.
        supernodes: simulated clients.
        cpus: clients that work at the same time.
        gpus_per_client: share of a GPU for each of them; 0 = Ray is told of none.

    Raises:
        LaunchError: the run was not accepted.
        ValueError: there are not so many GPUs.
    """
    import tomli_w

    file = flower.home / "overrides.toml"
    file.write_text(tomli_w.dumps(dict(values)), encoding="utf-8")
    nodes = f"num-supernodes={supernodes} {_resources(cpus, gpus_per_client)}"
    config = ["-c", str(file)] if values else []
    answer = flower.ask("run", str(app_dir.resolve()), "local", *config, "--federation-config", nodes)
    if not answer.get("run-id"):
        raise LaunchError(f"`flwr run` gave no run id, but: {json.dumps(answer)}")
    return str(answer["run-id"])


def follow(flower: Flower, run_id: str, echo: Echo, how: str = "--stream") -> Path | None:
    """Show the run's log until it ends; return the folder that the server app named in it."""
    folder = None
    process = flower.start("log", run_id, flower.connection, how)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            plain = _COLOUR.sub("", line)
            if not (_BLANK.match(plain) or any(noise in plain for noise in _NOISE)):
                echo(line.rstrip("\n"))
            if found := _FOLDER.search(plain):
                folder = Path(found[1])
    finally:
        _end(process)
    return folder


def wait_until_finished(flower: Flower, run_id: str) -> Mapping[str, Any]:
    """Ask for the run until Flower says that it is over; the log may end a moment before that."""
    while True:
        run: Mapping[str, Any] = (flower.ask("ls", flower.connection, "--run-id", run_id).get("runs") or [{}])[0]
        if str(run.get("status", "")).startswith("finished"):
            return run
        time.sleep(_POLL_S)


def verdict(run: Mapping[str, Any], folder: Path | None, echo: Echo) -> int:
    """0 when the run completed and its summary is on disk, else 1 with the reason said.

    Flower calls some runs completed that are not, such as a server that exits early. The summary comes last.
    """
    if run["status"] != "finished:completed":
        echo(f"the run failed ({run['status']}): {run.get('status-details') or 'no details'}")
        return 1
    if folder is None or not (folder / "summary.json").is_file():
        place = f"in {folder}" if folder else "(and named no run folder)"
        echo(f"the run ended without a summary.json {place}; its log above should say why")
        return 1
    return 0


def _stop_run(flower: Flower, run_id: str | None, echo: Echo) -> None:
    """Tell Flower to stop the run; whatever does not listen is ended with Flower itself."""
    with ignore_interrupts():
        echo("stopping the run ...")
        if run_id is not None:
            try:
                flower.ask("stop", run_id, "local")
            except LaunchError as error:
                echo(str(error))


def _end(process: subprocess.Popen[str]) -> None:
    """End a child that may still run, and collect it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _find_json(output: str) -> dict[str, Any] | None:
    """The JSON object in a program's output, warnings around it or not."""
    start, end = output.find("{"), output.rfind("}")
    with contextlib.suppress(json.JSONDecodeError):
        found = json.loads(output[start : end + 1])
        return found if isinstance(found, dict) else None
    return None


def _superlink_log(home: Path, lines: int = 20) -> str:
    """The end of the SuperLink's own log, which is about to be deleted."""
    file = home / "local-superlink" / "superlink.log"
    if not file.is_file():
        return ""
    tail = file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    return "\n".join(["the SuperLink's log ends with:", *tail]) if tail else ""
