"""docs/methods: a page for every strategy, nothing stale, every number from results, commands of its own method.

Links, files and keys are looked at in test_docs.py, with those of all pages.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from pages import blocks_of, by_hand, commands_of, links_in
from toy import ROOT

from docs import build
from flexfed.bandits import BanditConfig
from flexfed.config import Experiment, keys_of
from flexfed.methods import METHODS
from flexfed.overrides import defaults, parse_overrides
from flexfed.suites import load_suite
from strategies import STRATEGIES

ALL = sorted((ROOT / "docs" / "methods").glob("*.md"))
pages = pytest.mark.parametrize("page", ALL, ids=lambda page: page.stem)
of_methods = pytest.mark.parametrize("page", build.method_pages(), ids=lambda page: page.stem)

BESIDE = {"fedlps": keys_of(BanditConfig, "bandit.")}
"""Tables of knobs that stand on a page beside those of its strategies."""
MEASURED = re.compile(r"\d+\.\d+|\d+(?= (?:%|points|times|MB|G |seconds))")
"""Numbers of prose that must come from a file of results."""


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def commands(page: Path) -> list[list[str]]:
    """The words of each command of a page."""
    shells = [block for block in blocks_of(page) if block.language == "bash"]
    return [command.words for block in shells for command in commands_of(block)]


def is_told(number: str, told: str) -> bool:
    """Whether a number stands in a text by itself, not as a part of a longer one."""
    return re.search(rf"(?<![\d.]){re.escape(number)}(?![\d]|\.\d)", told) is not None


# --- pages ------------------------------------------------------------------------------------------------------


def test_every_strategy_has_one_page() -> None:
    described = [name for page in build.method_pages() for name in build.strategies_of(page)]
    assert sorted(described) == sorted(STRATEGIES)


@of_methods
def test_a_page_has_all_its_parts(page: Path) -> None:
    parts = re.findall(r"<!-- begin (\w+)", text_of(page))
    assert {"citation", "results", "files", "differences"} <= set(parts)
    assert re.findall(r"^## (.*)$", text_of(page), re.MULTILINE)[0] == "When"
    assert any(words[:2] == ["flexfed", "run"] for words in commands(page))


@pages
def test_nothing_is_stale(page: Path) -> None:
    assert build.built(page) == text_of(page), "run python -m docs.build"


@of_methods
def test_every_knob_has_a_meaning_and_its_default_a_source(page: Path) -> None:
    known = {key for name in build.strategies_of(page) for key in keys_of(METHODS[name].config, METHODS[name].prefix)}
    known |= BESIDE.get(page.stem, {}).keys()
    written = build.sources(text_of(page))
    assert written.keys() == known
    for key, (_, source) in written.items():
        assert build.SOURCE.fullmatch(source), f"{page.name}: {key} has the source {source!r}"
    for table in sorted({key.split(".")[0] for key in known}):
        assert all(meaning for _, meaning in build.knobs(table).values()), f"a knob of {table} without a comment"


@pages
def test_every_number_stands_in_the_results_that_its_paragraph_links_to(page: Path) -> None:
    for paragraph in re.split(r"\n\n|\n(?=- )", by_hand(page)):
        files = [page.parent / target for target in links_in(paragraph) if "benchmarks/results/" in target]
        told = " ".join(map(text_of, files))
        without_links = re.sub(r"\]\([^)]+\)", "]", paragraph)
        for number in MEASURED.findall(without_links):
            where = [file.name for file in files]
            assert is_told(number, told), f"{page.name}: {number} is in none of {where}: {paragraph}"


def test_every_number_of_the_page_of_results_stands_in_a_file_that_its_row_links_to() -> None:
    page = ROOT / "docs" / "results.md"
    rows = [line.split("|")[1:-1] for line in text_of(page).splitlines() if re.match(r"\|.*benchmarks/results/", line)]
    assert len(rows) > 8
    for _, _, *measured in rows:  # the first two say what a paper claims
        told = " ".join(text_of(page.parent / target) for target in links_in(measured[-1]))
        for number in re.findall(r"\d+\.\d+", measured[0]):
            assert is_told(number, told), f"{number}: {measured}"


@pages
def test_commands_are_read(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        assert words[0] == "flexfed", words
        if words[1] == "compare":
            assert load_suite(ROOT / words[2], defaults(ROOT)).rows
            continue
        assert words[1] == "run", words
        assert words[2::2] == ["-c"] * len(words[2::2]), words
        values = {**defaults(ROOT), **parse_overrides(words[3::2], defaults(ROOT))}
        assert Experiment.read(values).settings.strategy in build.strategies_of(page)


# --- the tool ---------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small checkout of which the tool writes: HeteroFL and its page, and one file of results."""
    for name in ("flexfed", "strategies"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "docs/methods/heterofl.md", "tests/test_heterofl.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    shutil.copytree(ROOT / "benchmarks" / "suites", tmp_path / "benchmarks" / "suites")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "PAGES", tmp_path / "docs" / "methods")
    return tmp_path


def edit(path: Path, before: str, after: str) -> None:
    text = text_of(path)
    assert text.count(before) == 1
    path.write_text(text.replace(before, after), encoding="utf-8")


def test_check_tells_what_is_stale_and_writes_nothing(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = copy / "docs/methods/heterofl.md"
    assert build.main(["--check"]) == 0
    edit(copy / "flexfed/methods/heterofl.py", "however little is free now", "however much is free now")
    before = text_of(page)
    assert build.main(["--check"]) == 1
    assert capsys.readouterr().out == "docs/methods/heterofl.md is stale\n"
    assert text_of(page) == before
    assert build.main([]) == 0
    assert "however much is free now" in text_of(page)
    assert build.main(["--check"]) == 0


def test_a_source_goes_with_the_default_that_it_was_said_of(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, project = copy / "docs/methods/heterofl.md", copy / "pyproject.toml"
    heterofl = text_of(project).index("[tool.flwr.app.config.heterofl]")
    start, rest = text_of(project)[:heterofl], text_of(project)[heterofl:]
    project.write_text(start + rest.replace('weights = "uniform"', 'weights = "examples"', 1), encoding="utf-8")
    build.main([])
    assert 'where does the default "examples" of heterofl.weights come from?' in capsys.readouterr().out
    assert build.sources(text_of(page))["heterofl.weights"] == ('"examples"', "")
    assert build.sources(text_of(page))["heterofl.scaler"] == ("true", "paper")


def test_a_new_knob_has_no_source(copy: Path) -> None:
    edit(
        copy / "pyproject.toml",
        "[tool.flwr.app.config.heterofl]\n",
        "[tool.flwr.app.config.heterofl]\nnew = 1  # a | b\n",
    )
    build.main([])
    page = text_of(copy / "docs/methods/heterofl.md")
    assert "| `heterofl.new` | `1` | a \\| b |  |" in page
    assert build.sources(page)["heterofl.new"] == ("1", "")


@pytest.mark.parametrize(
    ("file", "before", "after", "told"),
    [
        ("docs/methods/heterofl.md", "<!-- begin citation -->", "<!-- begin quotation -->", "unknown part 'quotation'"),
        ("docs/methods/heterofl.md", "begin files: flexfed/scaler.py", "begin files: flexfed/x.py", "flexfed/x.py"),
        ("flexfed/methods/heterofl.py", "Differences from", "Not as in", "begins with 'Differences from'"),
        ("flexfed/methods/heterofl.py", '"HeteroFL: Computation', "HeteroFL: Computation", "<title>"),
        (
            "flexfed/methods/heterofl.py",
            "`flexfed.scaler`)",
            "`flexfed.scalar`)",
            "`flexfed.scalar`, which does not exist",
        ),
        ("flexfed/methods/heterofl.py", "`flexfed.select.kept_units`", "`flexfed.select.kept`", "select.kept`, which"),
        (
            "pyproject.toml",
            "scaler = true  # divide hidden",
            "'scaler' = true  # divide hidden",
            "`key = value  # meaning`",
        ),
    ],
)
def test_what_it_cannot_write_is_an_error(copy: Path, file: str, before: str, after: str, told: str) -> None:
    path = copy / file
    assert before in text_of(path)
    path.write_text(text_of(path).replace(before, after), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(told)):
        build.main([])


def test_results_are_found_by_the_suites_that_they_name(tmp_path: Path) -> None:
    both = tmp_path / "both.md"
    both.write_text("`benchmarks/suites/main-job.toml` and benchmarks/suites/fedlps.toml", encoding="utf-8")
    assert {"flexfl", "fedlps"} <= build.strategies_in(both)
    results = ROOT / "benchmarks" / "results"
    assert build.strategies_in(results / "main-job.md") == {"exclusive", "small", "heterofl", "fedrolex", "flexfl"}
    assert {"compressed", "heterofl", "fedavg"} <= build.strategies_in(results / "compressed-claim.md")
    assert build.strategies_in(results / "memory.md") == set()


def test_a_page_without_results_says_so(copy: Path) -> None:
    (copy / "benchmarks" / "results" / "memory.md").write_text("benchmarks/suites/missing.toml", encoding="utf-8")
    for file in (copy / "benchmarks" / "results").glob("*.md"):
        if "heterofl" in build.strategies_in(file):
            file.unlink()
    build.main([])
    assert "Nothing in benchmarks/results has a row of it yet" in text_of(copy / "docs/methods/heterofl.md")
