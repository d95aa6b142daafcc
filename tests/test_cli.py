"""The `flexfed` command, with stand-ins for what it starts."""

import json
import sys
import types
import warnings
from datetime import datetime

import pytest

with warnings.catch_warnings():  # typer imports names that newer versions of click deprecate
    warnings.simplefilter("ignore", DeprecationWarning)
    from typer.testing import CliRunner

from flexfed import cli, launch, workers
from flexfed.cli import app, load_runner, require_app
from flexfed.overrides import defaults
from flexfed.runs import RunFolder

PROJECT = """
[tool.flwr.app.config]
strategy = "flexfl"
dataset = "digits"
fleet = "skewed"
seed = 1
num-server-rounds = 5
fraction-train = 0.5
min-replies = 1
local-epochs = 2
resume = ""
runs-dir = "RUNS"
[tool.flwr.app.config.flexfl]
kd-weight = -1.0
"""
SERVER = """
from pathlib import Path
def run_in_process(values, supernodes):
    if values.get("seed") == 13:
        raise ValueError("seed 13 brings bad luck")
    if values.get("seed") == 14:
        int("no number")
    if values.get("seed") == 15:
        raise KeyboardInterrupt
    if values.get("seed") == 17:
        raise RuntimeError("nobody answered")
    if values.get("seed") == 18:
        (_ for _ in ()).throw(RuntimeError("a bug"))
    folder = Path(values["runs-dir"])
    folder.mkdir()
    (folder / "said.txt").write_text(repr((dict(values), supernodes)))
    if values.get("seed") != 16:
        (folder / "summary.json").write_text("{}")
    return folder
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An app folder whose server_app does nothing, in place of ours."""
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PROJECT.replace("RUNS", str(tmp_path / "runs")))
    (folder / "server_app.py").write_text(SERVER)
    monkeypatch.setattr(cli, "APP_DIR", folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "server_app", raising=False)
    yield folder
    sys.modules.pop("server_app", None)


def flexfed(*args):
    return CliRunner().invoke(app, list(args))


def in_process(tmp_path, *config):
    options = [word for text in (f"runs-dir='{tmp_path / 'run'}'", *config) for word in ("-c", text)]
    return flexfed("run", "--in-process", "--supernodes", "3", *options)


# --- run ----------------------------------------------------------------------------------------------------


def test_in_process_gets_the_overrides(project, tmp_path):
    result = in_process(tmp_path, "seed=2 flexfl.kd-weight=0")
    assert (result.exit_code, result.output) == (0, "")
    expected = {"runs-dir": str(tmp_path / "run"), "seed": 2, "flexfl.kd-weight": 0}
    assert (tmp_path / "run" / "said.txt").read_text() == repr((expected, 3))


def test_a_run_without_summary_has_failed(project, tmp_path):
    result = in_process(tmp_path, "seed=16")
    assert result.exit_code == 1
    assert "without a summary.json" in result.output


def test_an_error_of_ours_is_one_line(project, tmp_path):
    result = in_process(tmp_path, "seed=13")
    assert (result.exit_code, result.output) == (1, "error: seed 13 brings bad luck\n")
    result = flexfed("run", "--in-process", "-c", "kd-weight=1")
    assert result.output == "error: unknown configuration key 'kd-weight'; did you mean flexfl.kd-weight?\n"


def test_a_runtime_error_of_ours_is_one_line_too(project, tmp_path):
    result = in_process(tmp_path, "seed=17")
    assert (result.exit_code, result.output) == (1, "error: nobody answered\n")
    assert str(in_process(tmp_path, "seed=18").exception) == "a bug"


def test_a_bug_keeps_its_traceback(project, tmp_path):
    result = in_process(tmp_path, "seed=14")
    assert isinstance(result.exception, ValueError)
    assert "invalid literal" in str(result.exception)


def test_ctrl_c_ends_with_130(project, tmp_path):
    assert in_process(tmp_path, "seed=15").exit_code == 130


def test_cpus_are_for_the_simulation(project, tmp_path):
    result = flexfed("run", "--in-process", "--cpus", "2")
    assert result.exit_code == 1
    assert "--cpus has no effect with --in-process" in result.output


def test_run_hands_over_to_flower(project, monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "run_simulation", lambda *args: seen.append(args) or 1)
    file = project / "x.toml"
    file.write_text("seed = 3\n")
    result = flexfed("run", "-c", "seed=2", "-c", str(file), "--cpus", "2")
    assert result.exit_code == 1
    file.write_text("# supernodes = 100\nseed = 3\n")
    flexfed("run", "-c", str(file))
    flexfed("run", "-c", str(file), "--supernodes", "5")
    assert seen == [
        (project, ["seed=2", str(file)], 20, 2, 0.0),
        (project, [str(file)], 100, None, 0.0),
        (project, [str(file)], 5, None, 0.0),
    ]


def test_clients_are_spread_over_gpus_that_they_are_to_use(project, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "run_simulation", lambda *args: seen.append(args[-1]) or 0)
    result = flexfed("run", "--in-process", "--gpus-per-client", "0.5")
    assert (result.exit_code, "--gpus-per-client has no effect with --in-process" in result.output) == (1, True)
    result = flexfed("run", "--gpus-per-client", "0.5")
    assert result.exit_code == 1
    assert "torch-device is 'cpu'; set torch-device='cuda' or 'auto'" in result.output
    toml = project / "pyproject.toml"
    toml.write_text(toml.read_text().replace("seed = 1", 'seed = 1\ntorch-device = "cpu"'))
    assert "torch-device is 'cuda:1'" in flexfed("run", "-c", "torch-device='cuda:1'", "--gpus-per-client", "1").output
    assert flexfed("run", "-c", "torch-device='cuda'", "--gpus-per-client", "0.5").exit_code == 0
    assert seen == [0.5]


@pytest.fixture
def left_run(project, tmp_path):
    """A run folder with seven clients that was left before its first checkpoint."""
    folder = RunFolder.named(tmp_path / "left", "flexfl", 1)
    folder.begin({**defaults(project), "seed": 3}, clients=7)
    return folder.path


def test_a_resumed_run_has_its_own_devices_and_is_checked_before_flower_starts(project, left_run, monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "run_simulation", lambda *args: seen.append(args) or 0)
    pair = f"resume='{left_run}'"
    assert flexfed("run", "-c", pair).exit_code == 0
    assert seen == [(project, [pair], 7, None, 0.0)]
    result = flexfed("run", "-c", f"{pair} seed=4")
    assert result.exit_code == 1
    assert result.output.startswith(
        f"error: the run in {left_run} cannot go on with another configuration: seed (3 there"
    )
    assert len(seen) == 1


def test_a_finished_run_starts_no_flower(project, left_run, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "run_simulation", lambda *args: pytest.fail("Flower started"))
    RunFolder(left_run).append_round({"round": 5, "accuracy": 0.5})
    (left_run / "summary.json").write_text('{"final": {}, "last10": {}}')
    flexfed("run", "-c", f"resume='{left_run}'")
    assert "'resume'" in (tmp_path / "runs" / "said.txt").read_text()


@pytest.mark.parametrize("pair", ["strategy='nope'", "fleet='nope'"])
def test_an_impossible_configuration_is_the_same_line_in_both_modes(project, monkeypatch, pair):
    monkeypatch.setattr(launch, "run_simulation", lambda *args: pytest.fail("Flower started"))
    one, other = flexfed("run", "-c", pair), flexfed("run", "--in-process", "-c", pair)
    assert one.exit_code == other.exit_code == 1
    assert one.output == other.output
    assert one.output.startswith("error: ")
    assert "'nope'" in one.output
    assert one.output.count("\n") == 1


def test_flower_missing_is_one_line(project, monkeypatch):
    def missing(*args):
        raise launch.LaunchError("no `flwr` in x")

    monkeypatch.setattr(launch, "run_simulation", missing)
    assert flexfed("run").output == "error: no `flwr` in x\n"


def test_without_the_app_folder_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "APP_DIR", tmp_path)
    for command in (["run"], ["run", "--in-process"]):
        result = flexfed(*command)
        assert result.exit_code == 1
        assert "pyproject.toml, server_app.py missing" in result.output
        assert "pip install -e ." in result.output
    with pytest.raises(ValueError, match="clone the repository"):
        require_app(tmp_path)


def test_another_server_app_is_refused(project, monkeypatch):
    other = types.ModuleType("server_app")
    other.__file__ = "/elsewhere/server_app.py"
    monkeypatch.setitem(sys.modules, "server_app", other)
    with pytest.raises(ValueError, match="got the one in /elsewhere"):
        load_runner(project)


# --- compare ------------------------------------------------------------------------------------------------


def finished_run(root, strategy, seed, accuracy, day=1):
    config = {"strategy": strategy, "dataset": "digits", "seed": seed}
    folder = RunFolder.named(root, strategy, seed, now=datetime(2026, 1, day, 12, 30))
    folder.begin(config)
    folder.append_round({"round": 1, "accuracy": accuracy})
    (folder.path / "summary.json").write_text(
        json.dumps({"seed": seed, "final": {"accuracy": accuracy}, "last10": {"accuracy": accuracy}, "best": {}})
    )
    return folder.path


def test_compare_runs(tmp_path):
    paths = [finished_run(tmp_path, "exclusive", 1, 0.5), finished_run(tmp_path, "small", 1, 0.75)]
    result = flexfed("compare", *map(str, paths), "--out", str(tmp_path / "out.md"))
    assert result.exit_code == 0
    assert "+25.0 (+)" in result.output
    text = (tmp_path / "out.md").read_text()
    assert f"flexfed compare {paths[0].name} {paths[1].name}\n" in text
    assert str(tmp_path) not in text
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out.html").read_text()
    assert str(tmp_path) not in page
    assert "+25.0 (+)" in page


def test_compare_makes_the_folder_of_its_output_first(tmp_path):
    assert flexfed("compare", str(tmp_path / "none"), "--out", str(tmp_path / "a" / "b" / "out.md")).exit_code == 1
    assert (tmp_path / "a" / "b").is_dir()


def test_compare_refuses_what_it_cannot_read(tmp_path):
    result = flexfed("compare", str(tmp_path))
    assert result.exit_code == 1
    assert "is no run folder" in result.output
    assert "not both" in flexfed("compare", "a.toml", "b").output
    assert "none.toml" in flexfed("compare", "none.toml", "b.toml").output


SUITE = 'name = "s"\nseeds = [1]\nbaseline = "a"\n[[row]]\nname = "a"\n[[row]]\nname = "b"\nflexfl.kd-weight = 0\n'
CHILD = """
import json, pathlib, sys, tomllib
config = tomllib.loads(pathlib.Path(sys.argv[1]).read_text())
if "flexfl.kd-weight" in config: sys.exit("it broke")
folder = pathlib.Path(config["runs-dir"]) / "20260101-000000-x-1"
folder.mkdir()
(folder / "config.toml").write_text("seed = 1")
part = {"accuracy": 0.5, "accuracy-levels": 0.5}
(folder / "summary.json").write_text(json.dumps({"seed": 1, "final": part, "last10": part, "best": part}))
"""


def test_compare_runs_what_a_suite_lacks(project, tmp_path, monkeypatch):
    (project / "s.toml").write_text(SUITE)
    command = [sys.executable, "-S", "-c", CHILD]
    monkeypatch.setattr(workers, "child_command", lambda run: [*command, str(run.folder / "overrides.toml")])
    result = flexfed("compare", str(project / "s.toml"), "--workers", "1", "--out", str(tmp_path / "out.md"))
    assert result.exit_code == 1
    assert "b seed 1 failed: exit code 1" in result.output
    assert "it broke" in result.output
    assert "50.0 (50.0)" in result.output
    assert "Runs still missing: 1." in result.output
    assert "suite s: 2 runs; 0 are finished, 2 are left\nat most 10 rounds" in result.output
    assert "flexfed compare s.toml\n" in (tmp_path / "out.md").read_text()
    assert flexfed("compare", str(project / "s.toml"), "--workers", "1").exit_code == 1
    (own,) = tmp_path.glob("**/s/comparison.html")
    assert own.with_suffix(".md").is_file()
    (project / "t.toml").write_text(SUITE.replace('"s"', '"t"'))
    both = [str(project / name) for name in ("s.toml", "t.toml")]
    assert flexfed("compare", *both, "--workers", "1", "--out", str(tmp_path / "both")).exit_code == 1
    assert "flexfed compare t.toml\n" in (tmp_path / "both" / "t.md").read_text()
    assert (tmp_path / "both" / "s.html").is_file()


def test_a_suite_that_cannot_be_run_is_refused_before_anything_starts(project, monkeypatch):
    monkeypatch.setattr(workers, "child_command", lambda run: pytest.fail("a run began"))
    (project / "s.toml").write_text(SUITE)
    result = flexfed("compare", str(project / "s.toml"), "--baseline", "x")
    assert (result.exit_code, result.output) == (1, "error: s.toml: baseline 'x' is no row; rows: a, b\n")
    (project / "s.toml").write_text(SUITE + "strategy = 'nope'\n")
    result = flexfed("compare", str(project / "s.toml"))
    assert result.exit_code == 1
    assert result.output.startswith("error: suite s, b seed 1: unknown strategy 'nope'")


# --- runs ---------------------------------------------------------------------------------------------------


def test_runs_lists_finished_unfinished_damaged_and_suites(project, tmp_path):
    root = tmp_path / "runs"
    finished_run(root, "exclusive", 1, 0.5)
    finished_run(root / "suite" / "row-seed1", "small", 2, 0.75, day=2)
    (finished_run(root, "flexfl", 3, 0.1, day=3) / "summary.json").unlink()
    (finished_run(root, "heterofl", 4, 0.1, day=4) / "summary.json").write_text("{")
    result = flexfed("runs")
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert lines[0] == "time strategy data set seed accuracy path"
    assert f"2026-01-01 12:30 exclusive digits 1 50.0 % {root}/20260101-123000-exclusive-1" in lines
    assert any(line.startswith("2026-01-02 12:30 small digits 2 75.0 %") for line in lines)
    assert any("flexfl digits 3 unfinished, 1 rounds" in line for line in lines)
    assert any("damaged" in line and "summary.json is not valid JSON" in line for line in lines)


def test_runs_of_an_empty_folder(tmp_path):
    result = flexfed("runs", "--runs-dir", str(tmp_path))
    assert (result.exit_code, result.output) == (1, f"error: no runs in {tmp_path}\n")


def test_the_command_starts_without_torch_or_flower():
    import subprocess

    code = "import sys, flexfed.cli; print([m for m in ('torch', 'flwr', 'matplotlib') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=cli.APP_DIR) == "[]\n"
