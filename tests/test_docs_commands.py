"""The commands and the code that README and docs/ show work.

Every command of a `bash` block is accounted for. `flexfed` commands go through the command itself: those that start a
run are run if their data are at hand and a CPU will do, in this process and smaller (`SMALLER`); other runs and suites
are read and checked as the command does before it starts them. What else there is stands in `NO_RUN` or `SCRIPTS`, with
why.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import typer
from fleet import BIN
from pages import PAGES, RUN, Block, Command, blocks_of, commands_of, name_of
from toy import ROOT

import server_app
from flexfed import cli, comparing, launch, measure
from flexfed.config import Experiment
from flexfed.data.sources import BUILT_IN
from flexfed.launch import free_ports
from flexfed.overrides import defaults, parse_overrides, with_resumed
from flexfed.processes import stop_processes
from flexfed.runs import find_runs, load_run
from flexfed.suites import Suite, suite_runs, tuned, tuning_runs

with warnings.catch_warnings():  # typer imports names that newer versions of click deprecate
    warnings.simplefilter("ignore", DeprecationWarning)
    from typer.testing import CliRunner

ADDING = "docs/adding-a-method.md"
"""Its blocks are for a copy of the app: tests/test_docs.py."""
METHODS = "docs/methods/"
"""Commands of these pages are read only: that methods run, and with which knobs, other tests see to."""

SMALLER: Mapping[str, Any] = {
    "num-server-rounds": 1,
    "local-epochs": 1,
    "batch-size": 32,
    "fraction-train": 0.1,
    "fraction-evaluate": 0.1,
    "test-samples": 50,
    "flexfl.pretrain-epochs": 1,
    "heterofl.batch-norm": "proxy",
}
"""What makes a documented run short; it wins over what the command says."""

NO_RUN: Mapping[str, str] = {
    "pip install -e .": ".ci/run installs it so",
    "flwr run . local --stream --federation-config "
    "'num-supernodes=20 client-resources-num-cpus=1 init-args-num-cpus=2'": "tests/test_flower_runs.py submits runs so",
    "tensorboard --logdir '~/.flexfed/runs'": "TensorBoard's own; tests/test_events.py reads what it would",
}
"""Commands that are not tried here -> where they are."""

SCRIPTS: Mapping[tuple[str, str], str] = {
    ("docs/deployment.md", "deploy/certificates.sh"): "test_the_fleet_of_the_page_on_deployment runs it",
    ("docs/scale.md", "ray"): "needs several machines; the page says how it was tried once, and what is untested",
}
"""(page, first word) of blocks that are one script -> where it is run, or why nowhere."""

SHOWN = [block for page in PAGES if name_of(page) != ADDING for block in blocks_of(page)]


def script_of(block: Block) -> tuple[str, str]:
    return (block.page, next(commands_of(block)).words[0]) if block.language == "bash" else ("", "")


COMMANDS = list(
    {
        command.text: command
        for block in reversed(SHOWN)  # of equal ones the first counts
        if block.language == "bash" and script_of(block) not in SCRIPTS
        for command in commands_of(block)
    }.values()
)


def of_flexfed(sub: str) -> list[Command]:
    return [command for command in reversed(COMMANDS) if command.words[:2] == ["flexfed", sub]]


class Stage:
    """A home and a working directory in which the pages' commands find what they speak of.

    Attributes:
        home: with the folders of two finished runs.
        here: the working directory: the files that pages show, and the checkout's own folders.
        runs: the two folders.
    """

    def __init__(self, home: Path):
        self.home, self.here = home, home / "checkout"
        self.here.mkdir(parents=True)
        for name in ("configs", "benchmarks"):
            (self.here / name).symlink_to(ROOT / name)
        for block in SHOWN:
            if block.file:
                (self.here / block.file).write_text(block.text, encoding="utf-8")
        self.runs: list[Path] = []

    def make_runs(self) -> None:
        """Two runs that differ in their seed."""
        for seed in (1, 2):
            server_app.run_in_process({**SMALLER, "num-server-rounds": 2, "fraction-train": 0.5, "seed": seed}, 4)
        self.runs = find_runs(self.home / ".flexfed" / "runs")

    def filled(self, text: str) -> str:
        """A text in which run folders are those of runs: copies, for a command may go on with one."""
        for run in self.runs[: text.count(RUN)]:
            copy = self.home / "copies" / f"{len(list(self.home.glob('copies/*')))}-{run.name}"
            text = text.replace(RUN, str(shutil.copytree(run, copy)), 1)
        return text


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patched, patch("flexfed.report.curves_png"):
        patched.setenv("HOME", str(made.home))
        patched.chdir(made.here)
        patched.syspath_prepend(str(made.here))
        patched.setattr(measure, "measure_device", cache(measure.measure_device))
        runpy.run_path(str(made.here / "make_leaves.py"))
        made.make_runs()
        yield made


def invoke(command: Command, stage: Stage, *more: str) -> str:
    """What a command says; it must exit with 0."""
    result = CliRunner().invoke(cli.app, [*shlex.split(stage.filled(command.text))[1:], *more])
    assert result.exit_code == 0, f"{command.block.place}: {command.text}\n{result.output}\n{result.exception!r}"
    return result.output


def by_place(command: Command) -> str:
    return f"{command.block.place}-{' '.join(command.words[2:])[-50:]}"


# --- commands -----------------------------------------------------------------------------------------------------


def test_every_command_is_one_that_is_tried_or_explained() -> None:
    assert len(COMMANDS) > 30
    for command in COMMANDS:
        known = command.words[0] == "flexfed" and command.words[1] in {"run", "compare", *OTHERS}
        assert known or command.text in NO_RUN, f"{command.block.place}: nobody tries {command.text}"


def test_what_is_explained_is_still_there() -> None:
    assert {command.text for command in COMMANDS} >= set(NO_RUN)
    assert set(map(script_of, SHOWN)) >= set(SCRIPTS)


@pytest.mark.parametrize("command", of_flexfed("run"), ids=by_place)
def test_a_run_that_is_shown(command: Command, stage: Stage) -> None:
    """Read by the command as it stands, and then run, smaller."""
    asked: list[tuple[dict[str, Any], int]] = []

    def in_flower(app_dir: Path, texts: list[str], supernodes: int, *_: Any) -> int:
        asked.append((with_resumed(parse_overrides(texts, defaults(app_dir))), supernodes))
        return 0

    def in_process(app_dir: Path, values: Mapping[str, Any], supernodes: int) -> int:
        asked.append((dict(values), supernodes))
        return 0

    with patch.object(launch, "run_simulation", in_flower), patch.object(cli, "_run_in_process", in_process):
        invoke(command, stage)
    ((values, supernodes),) = asked
    experiment = Experiment.read({**defaults(ROOT), **values})
    data = experiment.data
    at_hand = experiment.settings.torch_device == "cpu" and (data.dataset in BUILT_IN or Path(data.dataset).exists())
    if not command.block.page.startswith(METHODS) and at_hand:
        run_smaller(values, supernodes)


def run_smaller(values: Mapping[str, Any], supernodes: int) -> None:
    """One round, or where a run goes on one more than it had, if any."""
    had = len(load_run(values["resume"]).rounds) if values.get("resume") else 0
    rounds = had + bool(values["num-server-rounds"] > had) if had else 1
    smaller = {"num-server-rounds": rounds} if had else SMALLER
    done = load_run(server_app.run_in_process({**values, **smaller}, supernodes))
    assert done.summary is not None
    assert done.summary["failed"] == done.summary["refused"] == 0
    assert len(done.rounds) == rounds
    assert sum(done.rounds[-1]["trained"].values()) > 0


@pytest.mark.parametrize("command", of_flexfed("compare"), ids=by_place)
def test_a_comparison_that_is_shown(command: Command, stage: Stage) -> None:
    """Given runs are compared; of a suite every run is read, and none started."""
    read: list[str] = []

    def only_read(suite: Suite, workers: int, app_dir: Path) -> None:
        known = defaults(ROOT)
        for run in [*suite_runs(tuned(suite, []), known), *tuning_runs(suite, known)]:
            cli.check_configuration(run.config)
            read.append(run.name)
        assert suite.baseline is None or suite.baseline in suite.rows
        raise typer.Exit(0)

    with patch.object(comparing, "compare_suite", only_read):
        said = invoke(command, stage)
    assert read or "Mean of the last ten rounds" in said


OTHERS: Mapping[str, tuple[str, ...]] = {"profile": (), "levels": (), "runs": (), "export": ("--no-onnx",)}
"""Commands that are tried as they stand -> what is added, because it takes long and other tests try it."""


@pytest.mark.parametrize("sub", list(OTHERS))
def test_what_else_flexfed_is_asked(sub: str, stage: Stage) -> None:
    shown = of_flexfed(sub)
    assert shown
    for command in shown:
        assert invoke(command, stage, *OTHERS[sub]).strip()


def test_what_flwr_run_is_told_can_be() -> None:
    """`-c` of bare `flwr run`, in blocks and between the lines."""
    texts = [
        text for page in PAGES for text in re.findall(r"flwr run \. \w+[^\n`]*? -c \"([^\"]+)\"", page.read_text())
    ]
    assert len(texts) >= 2
    for text in texts:
        values = parse_overrides([text.replace("<run folder>", "/run")], defaults(ROOT))
        cli.check_configuration({**defaults(ROOT), **values})


# --- code ---------------------------------------------------------------------------------------------------------


def test_blocks_are_of_kinds_that_somebody_looks_at() -> None:
    """One without a language is for the eye: output, equations."""
    assert {block.language for block in SHOWN} <= {"", "bash", "python", "toml"}
    for block in SHOWN:
        shows = re.search(r"^(?:flexfed|flwr|pip|python) ", block.text, re.MULTILINE)
        assert block.language or not shows, f"{block.place}: nobody tries {block.text}"
    assert all(block.file for block in SHOWN if block.language == "toml"), "commands use what is shown"


def test_code_that_is_shown_works(stage: Stage) -> None:
    """Files were written, and are used by commands; a snippet is run, of one on a method's page the imports."""
    snippets = [block for block in SHOWN if block.language == "python" and not block.file]
    (export,) = (c for c in of_flexfed("export") if "--level S" in c.text and c.block.page == "README.md")
    for block in snippets:
        if block.page.startswith(METHODS):
            exec("\n".join(re.findall(r"^(?:from|import) .*", block.text, re.MULTILINE)), {})
        else:
            folder = re.search(r"(\S+)/export/S\.safetensors", invoke(export, stage, "--no-onnx"))
            assert folder
            found: dict[str, Any] = {}
            exec(block.text.replace(RUN, folder[1]), found)
            assert found["logits"].shape == (1, 10)
            assert {"level", "accuracy", "input-mean"} <= set(found["facts"])


# --- the script of the page on deployment -------------------------------------------------------------------------


@pytest.mark.slow
def test_the_fleet_of_the_page_on_deployment(tmp_path: Path) -> None:
    """As it stands, but for the ports, which others may have: three rounds, in which every size is trained."""
    (block,) = (b for b in SHOWN if b.page == "docs/deployment.md" and b.file == "" and "superlink.sh" in b.text)
    port, own = free_ports(2)
    places = {"superlink.sh ~": f"superlink.sh -p {port} ~", "localhost:8000": f"localhost:{port}", "9100": str(own)}
    text = block.text
    for before, after in places.items():
        assert before in text
        text = text.replace(before, after)
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "FLWR_HOME", "FLEXFED_DATA")}
    env |= {"HOME": str(tmp_path), "PATH": f"{BIN}{os.pathsep}{env['PATH']}", "FLEXFED_TEST_PAGE": str(tmp_path)}
    env |= {"FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], env=env, cwd=ROOT, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False, timeout=420,
        )  # fmt: skip
    finally:
        stop_processes(f"FLEXFED_TEST_PAGE={tmp_path}")
    said = done.stdout + done.stderr + "".join(path.read_text()[-3000:] for path in tmp_path.glob("fleet/*.log"))
    assert done.returncode == 0, said
    (folder,) = find_runs(tmp_path / ".flexfed" / "runs")
    run = load_run(folder)
    assert run.summary is not None, said
    assert [line["failed"] + line["refused"] for line in run.rounds] == [[]] * 3
    trained = {level for line in run.rounds for level in line["trained"]}
    assert trained == {"S", "M", "L"}, trained
