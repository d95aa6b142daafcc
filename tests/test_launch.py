"""Starting and stopping Flower, with a stand-in for its programs."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from flexfed.launch import LaunchError, private_flower, run_simulation
from flexfed.processes import marked_processes, stop_processes

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the stand-in is a shell script")

# `flwr run` starts a detached "SuperLink", as the real one does; each command leaves a line in calls.txt.
FLWR = """#!/bin/sh
here={here}
echo "$@" >> "$here/calls.txt"
env > "$here/env.txt"
pwd > "$here/cwd.txt"
case "$1" in
run)
  [ "$4" = -c ] && cp "$5" "$here/overrides.toml"
  mkdir -p "$FLWR_HOME/local-superlink"; echo "port taken" > "$FLWR_HOME/local-superlink/superlink.log"
  {detach} sleep 300 > /dev/null 2>&1 &
  echo $! > "$here/superlink.pid"
  {run} ;;
log) {log} ;;
ls) {ls} ;;
stop) {stop} ;;
esac
"""
TEXT = {"capture_output": True, "text": True, "check": False}
STARTED = """echo '{ "success": true, "run-id": "42" }'"""
FINISHED = """echo '{ "success": true, "runs": [{"status": "finished:completed", "status-details": ""}] }'"""
FAILED = (
    """echo '{ "success": true, "runs": [{"status": "finished:failed", "status-details": "unknown dataset x"}] }'"""
)
STOPPED = """echo '{ "success": true, "run-id": "42" }'"""


@pytest.fixture
def app(tmp_path):
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "pyproject.toml").write_text('[tool.flwr.app.config]\nseed = 1\nruns-dir = "~/runs"\nstrategy = "x"\n')
    return folder


@pytest.fixture
def finished(tmp_path):
    folder = tmp_path / "run folder"
    folder.mkdir()
    (folder / "summary.json").write_text("{}")
    return folder


def fake(tmp_path, run=STARTED, log="true", ls=FINISHED, stop=STOPPED):
    """A folder with a `flwr` that does these shell commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "flwr"
    program.write_text(FLWR.format(here=folder, detach="nohup", run=run, log=log, ls=ls, stop=stop))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


def calls(bin_dir):
    return (bin_dir / "calls.txt").read_text().splitlines()


def environment(bin_dir):
    return dict(line.split("=", 1) for line in (bin_dir / "env.txt").read_text().splitlines() if "=" in line)


def assert_gone(bin_dir):
    """The stand-in's SuperLink ended, and the private home is deleted."""
    home = environment(bin_dir)["FLWR_HOME"]
    assert not Path(home).exists()
    assert not marked_processes(f"FLWR_HOME={home}")
    listing = subprocess.run(["ps", "-o", "stat=", "-p", (bin_dir / "superlink.pid").read_text().strip()], **TEXT)
    assert listing.stdout.strip()[:1] in ("", "Z")  # ended; its new parent may not have noticed yet


def launch(app, bin_dir, overrides=(), **kwargs):
    said = []
    code = run_simulation(app, list(overrides), supernodes=6, cpus=2, bin_dir=bin_dir, echo=said.append, **kwargs)
    return code, "\n".join(said)


def test_a_good_run(app, tmp_path, finished):
    log = "echo 'INFO: round 1'; echo 'Starting logstream for run_id 42'; "
    log += f"printf '\\033[92mrun folder: {finished}\\033[0m\\n'"
    bin_dir = fake(tmp_path, log=log)
    code, said = launch(app, bin_dir)
    assert code == 0
    assert said.splitlines()[0] == "INFO: round 1"
    assert "Starting logstream" not in said
    nodes = "num-supernodes=6 client-resources-num-cpus=1 init-args-num-cpus=2"
    assert calls(bin_dir) == [
        f"run {app} local --federation-config {nodes} --format json",
        "log 42 local --stream",
        "ls local --run-id 42 --format json",
    ]
    assert_gone(bin_dir)


def test_the_run_folder_is_the_last_line(app, tmp_path, finished):
    noise = ["Manually terminating", "To change federation size", "simulation-config", "Successfully installed"]
    after = "; ".join(f"echo 'INFO :      {text} x'" for text in noise)
    log = f"echo 'run folder: {finished}'; {after}; printf '\\033[92mINFO \\033[0m:      \\n'"
    assert launch(app, fake(tmp_path, log=log)) == (0, f"run folder: {finished}")


def test_no_more_cpus_than_clients(app, tmp_path, finished):
    bin_dir = fake(tmp_path, log=f"echo 'run folder: {finished}'")
    assert run_simulation(app, [], supernodes=3, cpus=8, bin_dir=bin_dir, echo=lambda line: None) == 0
    assert "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=3" in calls(bin_dir)[0]


def test_clients_share_the_gpus_that_there_are(app, tmp_path, finished, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    bin_dir = fake(tmp_path, log=f"echo 'run folder: {finished}'")
    assert launch(app, bin_dir, gpus_per_client=0.25)[0] == 0
    told = "init-args-num-cpus=2 client-resources-num-gpus=0.25 init-args-num-gpus=2"
    assert told in calls(bin_dir)[0]


@pytest.mark.parametrize(("num", "share", "match"), [(0, 0.25, "sees 0 GPUs"), (2, 3.0, "sees 2"), (2, 1.5, "a share")])
def test_gpus_that_are_not_there_start_nothing(app, tmp_path, monkeypatch, num, share, match):
    monkeypatch.setattr("torch.cuda.device_count", lambda: num)
    bin_dir = fake(tmp_path)
    with pytest.raises(ValueError, match=match):
        launch(app, bin_dir, gpus_per_client=share)
    assert not (bin_dir / "calls.txt").exists()


def test_flower_is_private_and_quiet(app, tmp_path, finished):
    bin_dir = fake(tmp_path, log=f"echo 'run folder: {finished}'")
    launch(app, bin_dir)
    env = environment(bin_dir)
    assert not Path(env["FLWR_HOME"]).is_relative_to(app)
    assert (bin_dir / "cwd.txt").read_text().strip() == f"{env['FLWR_HOME']}/cwd"
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert (env["FLWR_TELEMETRY_ENABLED"], env["FLWR_DISABLE_UPDATE_CHECK"]) == ("0", "1")
    assert (env["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"], env["OMP_NUM_THREADS"]) == ("0", "1")
    assert env["PATH"].split(os.pathsep)[0] == str(bin_dir)
    assert env["FLWR_LOCAL_CONTROL_API_PORT"] != env["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"]
    assert "RAY_memory_monitor_refresh_ms" not in env


def test_overrides_reach_flower_as_one_file(app, tmp_path, finished, monkeypatch):
    (app / "more.toml").write_text('strategy = "y"\n')
    monkeypatch.chdir(tmp_path)
    bin_dir = fake(tmp_path, log=f"echo 'run folder: {finished}'")
    code, _ = launch(app, bin_dir, ["seed=3 runs-dir='mine'", "app/more.toml"])
    assert code == 0
    text = (bin_dir / "overrides.toml").read_text()
    assert text.splitlines() == ["seed = 3", f'runs-dir = "{tmp_path}/mine"', 'strategy = "y"']


def test_a_wrong_configuration_starts_nothing(app, tmp_path):
    bin_dir = fake(tmp_path)
    with pytest.raises(ValueError, match="unknown configuration key 'sed'; did you mean seed"):
        launch(app, bin_dir, ["sed=3"])
    assert not (bin_dir / "calls.txt").exists()


def test_a_failed_run_says_why(app, tmp_path, finished):
    bin_dir = fake(tmp_path, log=f"echo 'run folder: {finished}'", ls=FAILED)
    code, said = launch(app, bin_dir)
    assert code == 1
    assert "the run failed (finished:failed): unknown dataset x" in said
    assert_gone(bin_dir)


def test_a_run_that_flower_calls_completed_needs_its_summary(app, tmp_path, finished):
    (finished / "summary.json").unlink()
    code, said = launch(app, fake(tmp_path, log=f"echo 'run folder: {finished}'"))
    assert code == 1
    assert f"without a summary.json in {finished}" in said


def test_a_run_that_names_no_folder_has_failed(app, tmp_path):
    bin_dir = fake(tmp_path, log="echo nothing")
    code, said = launch(app, bin_dir)
    assert code == 1
    assert "named no run folder" in said
    assert "log 42 local --show" in calls(bin_dir)


def test_a_log_that_broke_off_is_read_again(app, tmp_path, finished):
    log = f'[ "$4" = --show ] && echo "run folder: {finished}"'
    code, said = launch(app, fake(tmp_path, log=log))
    assert (code, said) == (0, "")


def test_waits_until_flower_says_it_is_over(app, tmp_path, finished, monkeypatch):
    monkeypatch.setattr("flexfed.launch._POLL_S", 0.0)
    running = """echo '{ "success": true, "runs": [{"status": "running"}] }'"""
    ls = f'if [ -f "$here/asked" ]; then {FINISHED}; else touch "$here/asked"; {running}; fi'
    bin_dir = fake(tmp_path, log=f"echo 'run folder: {finished}'", ls=ls)
    assert launch(app, bin_dir)[0] == 0
    assert sum(call.startswith("ls") for call in calls(bin_dir)) == 2


@pytest.mark.parametrize(
    ("run", "match"),
    [
        ("""echo '{"success": false, "error-message": "bad app"}'""", "`flwr run` failed (exit code 0):\nbad app"),
        ("echo 'no connection' >&2; exit 1", "`flwr run` failed (exit code 1):\nno connection"),
        ("""echo '{"success": true, "run-id": null}'""", "`flwr run` gave no run id"),
        ("echo hello", "hello"),
    ],
    ids=["refused", "crash", "no id", "no JSON"],
)
def test_a_run_that_does_not_start_shows_flowers_own_words(app, tmp_path, run, match):
    bin_dir = fake(tmp_path, run=run)
    code, said = launch(app, bin_dir)
    assert code == 1
    assert match in said
    assert said.endswith("the SuperLink's log ends with:\nport taken")
    assert_gone(bin_dir)


@pytest.fixture
def interruptible():
    """Ctrl-C counts, even where tests run in the background of a shell, which has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_stop_the_run(app, tmp_path, number):
    bin_dir = fake(tmp_path, log="echo 'INFO: round 1'; exec sleep 60")
    said = []

    def echo(line):
        said.append(line)
        if "round 1" in line:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    assert run_simulation(app, [], bin_dir=bin_dir, echo=echo) == 130
    assert signal.getsignal(number) is before
    assert "stop 42 local --format json" in calls(bin_dir)
    assert "stopping the run" in said[1]
    assert_gone(bin_dir)


def test_a_run_that_cannot_be_stopped_is_ended_with_flower(app, tmp_path):
    bin_dir = fake(tmp_path, log="echo x; exec sleep 60", stop="echo 'not found' >&2; exit 1")
    said = []

    def echo(line):
        said.append(line)
        if line == "x":
            raise KeyboardInterrupt

    assert run_simulation(app, [], bin_dir=bin_dir, echo=echo) == 130
    assert "not found" in said[-1]
    assert_gone(bin_dir)


def test_no_flower_beside_python(tmp_path, app):
    with pytest.raises(LaunchError, match=r"no `flwr` in .*pip install -e \."):
        run_simulation(app, [], bin_dir=tmp_path)


def test_homes_and_ports_differ(tmp_path):
    bin_dir = fake(tmp_path)
    with private_flower(bin_dir) as one, private_flower(bin_dir) as two:
        assert one.home != two.home
        assert len({value for each in (one, two) for key, value in each.env.items() if "_API_PORT" in key}) == 4


# --- processes ----------------------------------------------------------------------------------------------


def test_only_marked_processes_are_ended(tmp_path):
    mark = f"FLEXFED_TEST={tmp_path}"
    name, value = mark.split("=", 1)
    ours = subprocess.Popen(["sleep", "60"], env={**os.environ, name: value})
    other = subprocess.Popen(["sleep", "60"], env={**os.environ, name: value + "x"})
    try:
        assert marked_processes(mark) == {ours.pid}
        stop_processes(mark)
        assert ours.wait(5) == -signal.SIGTERM
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_what_ignores_the_request_is_forced(tmp_path):
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    env = {**os.environ, "FLEXFED_TEST": str(tmp_path)}
    child = subprocess.Popen([sys.executable, "-S", "-c", code], env=env, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"on\n"
    stop_processes(f"FLEXFED_TEST={tmp_path}", gentle_s=0.1)
    assert child.wait(5) == -signal.SIGKILL
    child.stdout.close()
