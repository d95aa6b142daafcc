"""The README and the pages of docs/: links lead somewhere, lists are complete, and the method of one page works."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from pages import (
    LINKING,
    PAGES,
    blocks_of,
    commands_of,
    edited,
    files_of,
    headings_of,
    links_in,
    name_of,
    prose_of,
    settings_of,
)
from toy import ROOT

from flexfed.data import PARTITIONS
from flexfed.data.sources import BUILT_IN
from flexfed.devices import FLEETS, DeviceClass, declared
from flexfed.models import MODELS
from flexfed.overrides import defaults
from flexfed.rivals import BANDITS
from flexfed.runs import find_runs, load_run
from strategies.federated import FederatedStrategy
from strategies.levels import LevelStrategy
from strategies.widths import WidthStrategy

ADDING = ROOT / "docs" / "adding-a-method.md"
KEYS = frozenset(defaults(ROOT))
pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


# --- words and links ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links_in(prose_of(page)):
        file, _, heading = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{name_of(page)} links to {link}"
        assert not heading or heading in headings_of(target), f"{name_of(page)} links to {link}"


def test_the_index_has_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    expected = {path.name for path in index.parent.glob("*.md")} - {index.name} | {"methods/README.md"}
    assert expected <= set(links_in(prose_of(index)))


def test_the_readme_is_a_screen_and_a_half() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


@pages
def test_files_that_are_named_are_there(page: Path) -> None:
    made = {block.file for block in blocks_of(page)}
    for name in files_of(page):
        assert name in made or list(ROOT.glob(name)), f"{name_of(page)} names {name}"


@pages
def test_keys_that_are_set_between_the_words_exist(page: Path) -> None:
    """Those of the configuration, on a method's page also without its name, and what a node-config may say."""
    own = {f"{page.stem}.", "bandit." if page.stem == "fedlps" else ""} if page.parent.name == "methods" else {""}
    for key in settings_of(page):
        known = key in {"data-path", *keys_of_a_device()} or any(prefix + key in KEYS for prefix in {"", *own})
        assert known, f"{name_of(page)} sets {key}"


def test_a_key_that_does_not_exist_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("`codec='int8'`, `flexfl.kd-weigth = 1`, `a == b` and\n```bash\nx=1\n```\n", encoding="utf-8")
    assert settings_of(page) == ["codec", "flexfl.kd-weigth"]
    assert "flexfl.kd-weigth" not in KEYS


def keys_of_a_device() -> set[str]:
    """What a node-config may say of a device, as `declared` tells."""
    told = re.search(r"The keys: (.*?)\.", str(declared.__doc__), re.DOTALL)
    assert told
    return set(re.split(r",\s+", told[1]))


COMPLETE: Mapping[str, tuple[str, Callable[[], set[str]]]] = {
    "fleets": ("docs/devices.md", lambda: {path.stem for path in FLEETS.glob("*.toml")}),
    "ratio policies": ("docs/devices.md", lambda: {"level", "budget", *BANDITS}),
    "device keys": ("docs/deployment.md", keys_of_a_device),
    "partitions": ("docs/data.md", lambda: set(PARTITIONS)),
    "data sets": ("docs/data.md", lambda: set(BUILT_IN)),
    "networks": ("docs/data.md", lambda: set(MODELS)),
}
"""What a page lists -> the page, and the names that it should have."""


@pytest.mark.parametrize("what", list(COMPLETE))
def test_lists_are_complete(what: str) -> None:
    page, names = COMPLETE[what]
    told = set(re.findall(r"`([^`=]+?)(?:=[^`]*)?`", prose_of(ROOT / page)))
    assert names() - told == set()


def test_the_example_of_a_fleet_has_every_key() -> None:
    (block,) = (block for block in blocks_of(ROOT / "docs" / "devices.md") if block.file == "my-fleet.toml")
    for field in DeviceClass.__dataclass_fields__:
        assert field.replace("_", "-") in block.text


def test_questions_that_the_page_on_methods_names_are_asked() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+)(?:, \.\.\.)? \|", prose_of(ADDING), re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"\w+", row)}
    parents = re.findall(r"^\| `(\w+Strategy)` \|.*\| (.*) \|$", prose_of(ADDING), re.MULTILINE)
    known = {kind.__name__: kind for kind in (*WidthStrategy.__mro__, *LevelStrategy.__mro__, FederatedStrategy)}
    assert {"levels", "assign", "part_of", "finish", "observe"} <= names
    for name in names - {parent for parent, _ in parents} - {"Layout", "Submodel", "Job", "Task", "Update"}:
        assert hasattr(WidthStrategy, name), name
    assert len(parents) == 4
    for parent, asked in parents:
        for name in re.findall(r"`(\w+)`", asked):
            assert hasattr(known[parent], name), (parent, name)


# --- the method of the page on adding one --------------------------------------------------------------------------

TESTED = [f"tests/test_{name}.py" for name in ("feddropout", "contract", "config", "ratios", "suites")]
CHOSEN = "feddropout or same_names or pyproject_holds or any_width or smoke_suite"
DRIVER = """
import json, sys
from typer.testing import CliRunner
from flexfed import cli
from flexfed.methods import METHODS
from strategies import STRATEGIES
here, commands = sys.argv[1], json.loads(sys.argv[2])
assert cli.__file__.startswith(here), cli.__file__
assert "feddropout" in METHODS and "feddropout" in STRATEGIES
refused = CliRunner().invoke(cli.app, ["run", "-c", "strategy='nobody'"])
assert "feddropout" in refused.output, refused.output
for command in commands:
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, (command, done.output, done.exception)
"""
SMALLER = "num-server-rounds=2 local-epochs=1 batch-size=32 test-samples=50 fraction-train=0.2 fraction-evaluate=0.0"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The app with what the page adds: its files written, its edits made, in the order of the page."""
    root = tmp_path_factory.mktemp("app")
    for name in ("flexfed", "strategies", "configs", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("client_app.py", "server_app.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, root / name)
    for block in blocks_of(ADDING):
        file = root / block.file
        if block.language == "python":
            assert not file.exists(), block.place
            file.write_text(block.text, encoding="utf-8")
        elif block.language == "diff":
            file.write_text(edited(file.read_text(encoding="utf-8"), block.text), encoding="utf-8")
    return root


def python(root: Path, *words: str) -> str:
    """What Python says in the copy; it must exit with 0."""
    env = {**os.environ, "PYTHONPATH": str(root), "HOME": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=env, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def test_the_method_of_the_page_keeps_what_every_method_promises(copy: Path) -> None:
    """Two rounds of it and their record (`test_contract.py`), what it says of its own widths, and its own tests."""
    said = python(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTED, "-k", CHOSEN)
    passed = re.search(r"^(\d+) passed, \d+ deselected", said, re.MULTILINE)
    assert passed, said
    assert int(passed[1]) >= 30, said


def test_the_method_of_the_page_is_listed_and_its_commands_run(copy: Path) -> None:
    shown = [command.words for block in blocks_of(ADDING) if block.language == "bash" for command in commands_of(block)]
    assert [words[:3] for words in shown] == [["flexfed", "run", "--in-process"]] * 2
    python(copy, "-c", DRIVER, str(copy), json.dumps([[*words[1:], "-c", SMALLER] for words in shown]))
    runs = [load_run(folder) for folder in find_runs(copy / ".flexfed" / "runs")]
    assert [run.config["strategy"] for run in runs] == ["feddropout"] * 2
    assert {run.config["ratio-policy"] for run in runs} == {"own", "budget"}
    for run in runs:
        assert run.summary is not None
        assert [sum(line["trained"].values()) for line in run.rounds] == [4, 4]


def test_the_code_of_the_page_is_in_order(copy: Path) -> None:
    """As the linter has it for all that is here."""
    made = [block.file for block in blocks_of(ADDING) if block.language == "python"]
    for order in (["check"], ["format", "--check"]):
        python(copy, "-m", "ruff", *order, "--no-cache", *made)
