"""What deploy/ holds, without a fleet: keys and certificates, what the scripts start, units and the compose file."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from flexfed.processes import marked_processes, stop_processes

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
needs_tools = pytest.mark.skipif(
    not (shutil.which("openssl") and shutil.which("ssh-keygen")), reason="openssl or ssh-keygen is not installed"
)
needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **env})


def certificates(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return run(DEPLOY / "certificates.sh", *args)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def trust(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What certificates.sh makes for a server and three SuperNodes."""
    if not (shutil.which("openssl") and shutil.which("ssh-keygen")):
        pytest.skip("openssl or ssh-keygen is not installed")
    folder = tmp_path_factory.mktemp("deploy") / "trust"
    done = certificates("-o", folder, "-n", "2", "-k", "attic", "fleet.example.org", "192.0.2.7", "2001:db8::7")
    assert done.returncode == 0, done.stderr
    return folder


# --- certificates.sh ----------------------------------------------------------------------------------------


def test_all_that_a_fleet_needs_is_made_and_only_public_files_can_be_read_by_others(trust: Path) -> None:
    keys = {f"keys/{name}{end}" for name in ("node0", "node1", "attic") for end in ("", ".pub")}
    assert set(contents(trust)) == {"ca.key", "ca.crt", "server.key", "server.pem", *keys}
    for name in contents(trust):
        public = name.endswith((".pub", ".crt", ".pem"))
        assert stat.S_IMODE((trust / name).stat().st_mode) == (0o644 if public else 0o600), name
    assert stat.S_IMODE(trust.stat().st_mode) == 0o700


def test_the_certificate_names_the_hosts_and_is_the_authority_s(trust: Path) -> None:
    assert (
        run("openssl", "verify", "-purpose", "sslserver", "-CAfile", trust / "ca.crt", trust / "server.pem").returncode
        == 0
    )
    for host, kind in (("fleet.example.org", "host"), ("localhost", "host"), ("192.0.2.7", "ip"), ("127.0.0.1", "ip")):
        done = run("openssl", "x509", "-in", trust / "server.pem", "-noout", f"-check{kind}", host)
        assert "does match" in done.stdout, host
    done = run("openssl", "x509", "-in", trust / "server.pem", "-noout", "-checkip", "2001:db8::7")
    assert "does match" in done.stdout
    other = run("openssl", "x509", "-in", trust / "server.pem", "-noout", "-checkhost", "example.org")
    assert "does NOT match" in other.stdout


def test_a_server_cannot_sign_certificates(trust: Path) -> None:
    text = run("openssl", "x509", "-in", trust / "server.pem", "-noout", "-text").stdout
    assert "CA:FALSE" in text
    assert "TLS Web Server Authentication" in text
    authority = run("openssl", "x509", "-in", trust / "ca.crt", "-noout", "-text").stdout
    assert "CA:TRUE" in authority
    assert "Certificate Sign" in authority


def test_keys_are_the_kind_that_flower_takes(trust: Path) -> None:
    """The SuperLink and SuperNodes take keys on the curve P-384."""
    for name in ("node0", "node1", "attic"):
        assert (trust / "keys" / f"{name}.pub").read_text().startswith("ecdsa-sha2-nistp384 ")
    assert len({(trust / "keys" / name).read_bytes() for name in ("node0", "node1", "attic")}) == 3


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["-n", "2"], "keys/node0 is there already"),
        (["-k", "new", "-k", "attic"], "keys/attic is there already"),
        (["other.example.org"], "server.key is there already"),
        (["-k", "../out"], "a SuperNode's name"),
        (["-k", "a", "-k", "a"], "given twice"),
        (["-k", "a.pub"], "a SuperNode's name"),
        (["-n", "two"], "-n needs a number"),
        (["-k", "new", "-d", "0", "host"], "-d needs a number of days"),
        (["https://host"], "a HOST is a name or an address"),
        (["host,DNS:evil"], "a HOST is a name or an address"),
        ([], "nothing to make"),
    ],
)
def test_nothing_is_overwritten_and_nothing_half_made(trust: Path, args: list[str], reason: str) -> None:
    before = contents(trust)
    done = certificates("-o", trust, *args)
    assert done.returncode == 1
    assert reason in done.stderr
    assert contents(trust) == before


@needs_tools
def test_a_device_is_added_and_a_certificate_renewed_with_the_same_authority(tmp_path: Path) -> None:
    assert certificates("-o", tmp_path, "-n", "1", "old.example.org").returncode == 0
    before = contents(tmp_path)
    assert certificates("-o", tmp_path, "-k", "node1").returncode == 0
    assert contents(tmp_path).items() >= before.items()
    for name in ("server.key", "server.pem"):
        (tmp_path / name).rename(tmp_path / f"old-{name}")
    assert certificates("-o", tmp_path, "-d", "30", "new.example.org").returncode == 0
    assert (tmp_path / "ca.crt").read_bytes() == before["ca.crt"]
    assert run("openssl", "verify", "-CAfile", tmp_path / "ca.crt", tmp_path / "server.pem").returncode == 0
    month = run("openssl", "x509", "-in", tmp_path / "server.pem", "-noout", "-checkend", str(31 * 86400))
    assert "will expire" in month.stdout


@needs_tools
@pytest.mark.parametrize("lost", ["ca.key", "ca.crt"])
def test_half_an_authority_is_refused(tmp_path: Path, lost: str) -> None:
    assert certificates("-o", tmp_path, "-n", "1", "host").returncode == 0
    (tmp_path / lost).unlink()
    done = certificates("-o", tmp_path, "-k", "node1")
    assert done.returncode == 1
    assert "only one of ca.key and ca.crt" in done.stderr


@pytest.mark.parametrize("script", ["certificates.sh", "superlink.sh", "supernode.sh"])
def test_scripts_tell_how_they_are_used(script: str) -> None:
    done = run(DEPLOY / script, "-h")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {script} ")
    assert run(DEPLOY / script).returncode == 2
    assert run(DEPLOY / script, "-Z").returncode == 2


# --- superlink.sh and supernode.sh, with a program in Flower's place -------------------------------------------


@pytest.fixture
def flower(tmp_path: Path) -> Callable[[str], Path]:
    """Put a program in the place of Flower's, which writes down how it was called and then does as told."""

    def write(name: str, then: str = "") -> Path:
        program, calls = tmp_path / "bin" / name, tmp_path / "calls"
        for folder in (program.parent, calls):
            folder.mkdir(exist_ok=True)
        quiet = "$FLWR_TELEMETRY_ENABLED$FLWR_DISABLE_UPDATE_CHECK"
        # A file for each call, there at once: bash writes line by line, and two programs may start together.
        note = f'call="{calls}/$EPOCHREALTIME-$$"\nprintf "%s\\n" "$PWD" "{quiet}" "$0" "$@" >"$call.part"\n'
        program.write_text(f'#!/usr/bin/env bash\n{note}mv "$call.part" "$call.call"\n{then}\n')
        program.chmod(0o755)
        return calls

    return write


def with_program(tmp_path: Path) -> dict[str, str]:
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


@contextmanager
def superlink(trust: Path, tmp_path: Path, *args: str) -> Iterator[subprocess.Popen[str]]:
    """superlink.sh with programs of ours; it has ended at the end, and all that it started."""
    command = [str(DEPLOY / "superlink.sh"), "-w", str(tmp_path / "state"), *args]
    env = {**os.environ, **with_program(tmp_path), "FLEXFED_MARK": str(tmp_path)}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as script:
        try:
            yield script
        finally:
            script.terminate()
            try:
                script.wait(20)
            finally:
                stop_processes(f"FLEXFED_MARK={tmp_path}")


def started(calls: Path, program: str) -> list[list[str]]:
    """The words with which a program was started, each time: where, how quiet, and its own."""
    found = [call.read_text().split("\n")[:-1] for call in sorted(calls.glob("*.call"))]
    return [[where, quiet, *words] for where, quiet, name, *words in found if name.endswith(f"/{program}")]


def test_the_superlink_starts_with_tls_keys_and_a_database_and_runs_have_processes_of_their_own(
    trust: Path, tmp_path: Path, flower: Callable[..., Path]
) -> None:
    flower("flower-superexec", "exec sleep 60")
    calls, state = flower("flower-superlink", "exec sleep 60"), tmp_path / "state"
    with superlink(trust, tmp_path, "-H", "0.0.0.0", "-p", "8123", str(trust), "--log-file", "a b"):
        until(lambda: all(started(calls, name) for name in ("flower-superlink", "flower-superexec")))
        (superlink_call,), (superexec_call,) = started(calls, "flower-superlink"), started(calls, "flower-superexec")
    assert superlink_call == [
        *(str(state / "empty"), "01", "--host", "0.0.0.0", "--port", "8123", "--ssl-ca-certfile", f"{trust}/ca.crt"),
        *("--ssl-certfile", f"{trust}/server.pem", "--ssl-keyfile", f"{trust}/server.key", "--enable-supernode-auth"),
        *("--database", f"{state}/state.db", "--isolation", "process", "--disable-runtime-dependency-installation"),
        *("--log-file", "a b"),
    ]
    own = ["--runtime-api-address", "127.0.0.1:8123", "--root-certificates", f"{trust}/ca.crt"]
    assert superexec_call == [str(state / "empty"), "01", *own]


@pytest.mark.parametrize(
    ("host", "own"),
    [("", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("192.0.2.7", "192.0.2.7"), ("localhost", "localhost")],
)
def test_the_superexec_finds_its_superlink(
    trust: Path, tmp_path: Path, flower: Callable[..., Path], host: str, own: str
) -> None:
    """And a SuperLink listens to its own machine unless told otherwise."""
    flower("flower-superexec", "exec sleep 60")
    calls = flower("flower-superlink", "exec sleep 60")
    with superlink(trust, tmp_path, *(["-H", host] if host else []), str(trust)):
        until(lambda: all(started(calls, name) for name in ("flower-superlink", "flower-superexec")))
    assert started(calls, "flower-superlink")[0][2:6] == ["--host", host or "127.0.0.1", "--port", "8000"]
    assert started(calls, "flower-superexec")[0][2:4] == ["--runtime-api-address", f"{own}:8000"]


def test_a_superlink_that_ends_or_is_asked_to_start_anew_leaves_the_runs_alone(
    trust: Path, tmp_path: Path, flower: Callable[..., Path]
) -> None:
    """One that does not heed TERM, as Flower's does not while somebody follows a log, is hurried."""
    flower("flower-superexec", "exec sleep 60")
    calls = flower(
        "flower-superlink", "trap '' TERM; trap 'exit 0' INT; echo $$ >>\"$0.pid\"; while sleep 0.1; do :; done"
    )
    pids = tmp_path / "bin" / "flower-superlink.pid"
    with superlink(trust, tmp_path, str(trust)) as script:
        for starts, signalled in ((1, False), (2, True)):
            until(lambda n=starts: pids.exists() and len(pids.read_text().split()) == n)  # type: ignore[misc]
            if signalled:
                script.send_signal(signal.SIGUSR1)
            else:
                os.kill(int(pids.read_text().split()[-1]), signal.SIGKILL)
        until(lambda: len(started(calls, "flower-superlink")) == 3)
        assert len(started(calls, "flower-superexec")) == 1
        assert len(marked_processes(f"FLEXFED_MARK={tmp_path}")) > 3
        script.send_signal(signal.SIGTERM)
        assert script.wait(20) == 0
        assert not marked_processes(f"FLEXFED_MARK={tmp_path}")


def test_a_supernode_has_its_key_and_its_words(trust: Path, tmp_path: Path, flower: Callable[..., Path]) -> None:
    calls = flower("flower-supernode", "exit 7")
    words = 'partition-id=0 num-partitions=3 data-path="/home/me/my data"'
    place = ["-s", "server:8123", "-p", "9100", "-r", "0"]
    done = run(DEPLOY / "supernode.sh", *place, trust, "node0", words, "--max-retries", "3", **with_program(tmp_path))
    assert done.returncode == 7
    assert started(calls, "flower-supernode")[0][1:] == [
        *("01", "--superlink", "server:8123", "--root-certificates", f"{trust}/ca.crt"),
        *("--auth-supernode-private-key", f"{trust}/keys/node0", "--port", "9100"),
        *("--node-config", words, "--max-retries", "3"),
    ]


def test_a_supernode_that_ends_is_started_again_until_it_is_told_to_stop(
    trust: Path, tmp_path: Path, flower: Callable[..., Path]
) -> None:
    """What it had started ends with it, and a signal reaches it."""
    starts = tmp_path / "starts"
    flower(
        "flower-supernode",
        f"""echo start >>"{starts}"
        if (($(wc -l <"{starts}") == 1)); then sleep 60 & fi
        (($(wc -l <"{starts}") >= 3)) || exit 1
        trap 'echo stopped >>"{starts}"; exit 0' TERM
        echo ready >>"{starts}"
        sleep 60 &
        wait""",
    )
    command = [str(DEPLOY / "supernode.sh"), "-r", "1", str(trust), "node0", "partition-id=0"]
    env = {**os.environ, **with_program(tmp_path), "FLEXFED_MARK": str(tmp_path)}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as script:
        until(lambda: starts.exists() and "ready" in starts.read_text())
        script.send_signal(signal.SIGTERM)
        _, said = script.communicate(timeout=20)
    assert script.returncode == 0
    assert said.count("node0 ended with code 1; again in 1 s") == 2
    assert starts.read_text().split() == ["start"] * 3 + ["ready", "stopped"]
    assert not marked_processes(f"FLEXFED_MARK={tmp_path}")


def until(done: Callable[[], bool], seconds: float = 30) -> None:
    end_at = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end_at
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("script", "args", "lost", "named"),
    [
        ("superlink.sh", [], "server.key", "lacks server.key"),
        ("superlink.sh", [], "ca.crt", "lacks ca.crt"),
        ("supernode.sh", ["node0", "partition-id=0"], "keys/node0", "lacks keys/node0"),
        ("supernode.sh", ["node0", "partition-id=0"], "ca.crt", "lacks ca.crt"),
    ],
)
def test_what_is_missing_is_named(
    trust: Path, tmp_path: Path, script: str, args: list[str], lost: str, named: str
) -> None:
    copy = Path(shutil.copytree(trust, tmp_path / "trust"))
    (copy / lost).unlink()
    done = run(DEPLOY / script, copy, *args)
    assert done.returncode == 1
    assert named in done.stderr
    assert "certificates.sh makes it" in done.stderr


# --- systemd and compose ----------------------------------------------------------------------------------------


@needs_systemd
@pytest.mark.parametrize("unit", ["flexfed-superlink.service", "flexfed-supernode@.service"])
def test_systemd_takes_the_units(tmp_path: Path, unit: str) -> None:
    """With the scripts where they are here: it looks whether commands exist."""
    text = (DEPLOY / "systemd" / unit).read_text()
    assert "Restart=always" in text
    (tmp_path / unit).write_text(text.replace("/opt/flexfed/deploy", str(DEPLOY)))
    named = unit.replace("@.", "@node0.")
    done = run("systemd-analyze", "verify", "--man=no", tmp_path / named)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def compose() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return loaded


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Place inside -> place outside."""
    found = {}
    for volume in service.get("volumes", []):
        outside, inside = re.sub(r"\$\{FLEET[^}]*\}", "FLEET", volume).removesuffix(":ro").rsplit(":", 1)
        found[inside] = outside
    return found


def test_the_compose_file_mounts_what_certificates_sh_makes_and_no_more(trust: Path) -> None:
    made = {f"FLEET/{name}" for name in contents(trust)} | {f"FLEET/keys/node{i}" for i in range(3)}
    for name, service in compose()["services"].items():
        files = {outside for outside in mounts(service).values() if outside.startswith("FLEET")}
        assert files <= made, name
        private = {f for f in files if "key" in f}
        assert private == ({"FLEET/server.key"} if name == "superlink" else {f"FLEET/keys/{name}"} & private)


@cache
def options_of(program: str) -> frozenset[str]:
    """The options that one of Flower's programs knows."""
    return frozenset(re.findall(r"--[a-z-]+", run(Path(sys.executable).parent / program, "--help").stdout))


def test_the_compose_file_starts_what_the_scripts_start() -> None:
    """Every option is one that its program knows, and files are mounted where they are looked for."""
    services = compose()["services"]
    programs = {"superlink": "flower-superlink", "node": "flower-supernode"}
    for name, service in services.items():
        command = dict(word.partition("=")[::2] for word in service["command"])
        program = programs.get(name.rstrip("0123456789"), "flower-superexec")
        assert command.keys() <= options_of(program), name
        assert {value for value in command.values() if value.startswith("/trust/")} <= set(mounts(service)), name
        if program == "flower-superexec":
            home = "superlink:8000" if name == "serverapp" else f"node{name[-1]}:9094"
            assert command["--runtime-api-address"] == home
            assert service["networks"] == ["fleet" if name == "serverapp" else f"device{name[-1]}"]
        else:
            assert command["--isolation"] == "process"
            assert "--insecure" not in command
        if name.startswith("node"):
            assert command["--superlink"] == "superlink:8000"
            assert command["--node-config"].startswith(f"partition-id={name[-1]} num-partitions=3 ")
    assert "--enable-supernode-auth" in services["superlink"]["command"]


def test_the_images_are_flowers_and_of_one_version() -> None:
    services = compose()["services"]
    default = "${FLWR_VERSION:-1.41.0}"
    assert {s["image"] for s in services.values()} == {
        f"flwr/superlink:{default}", f"flwr/supernode:{default}", "flexfed-superexec",
    }  # fmt: skip
    assert {s["build"]["dockerfile"] for s in services.values() if "build" in s} == {"deploy/superexec.Dockerfile"}
    text = (DEPLOY / "superexec.Dockerfile").read_text()
    assert "ARG FLWR_VERSION=1.41.0\nFROM flwr/superexec:${FLWR_VERSION}\n" in text
    for source in re.findall(r"^COPY --chown=\S+ (.+) \S+$", text, re.MULTILINE):
        assert all((DEPLOY.parent / word).exists() for word in source.split())
