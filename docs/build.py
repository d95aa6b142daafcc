"""Writes the parts of docs/methods that repeat the code, so that no fact is kept twice by hand.

    python -m docs.build            # after a change of knobs, of a method's docstring, or of the tables of results
    python -m docs.build --check    # only tells what is stale

A part stands between `<!-- begin NAME -->` and `<!-- end -->`; NAME is a key of `PARTS`, followed by what it needs,
such as `files: flexfed/scaler.py`. One thing in them is written by hand: the last column of a table of knobs, where a
default comes from. It is kept as long as the default stays what it is; after that it is empty, until somebody looks.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterable
from os.path import relpath
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "methods"
CONTROLS = ("fedavg", "exclusive", "small")
SOURCE = re.compile(r"(paper|code|ours)( \(.+\))?")
"""What the last column may say: whose a default is, and in brackets what others have there."""

_PART = re.compile(r"(<!-- begin (\w+)(?:: ([^\n]*?))? -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_ROW = re.compile(r"^\| `([^`]+)` \| `([^`]*)` \|.*\| ([^|]*?) ?\|$", re.MULTILINE)


def strategies_of(page: Path) -> tuple[str, ...]:
    """The strategies that a page is about, as the configuration names them."""
    return CONTROLS if page.stem == "controls" else (page.stem,)


def method_pages() -> list[Path]:
    """The pages of methods in alphabetical order, that of the controls last."""
    return sorted((p for p in PAGES.glob("*.md") if p.stem != "README"), key=lambda p: (p.stem == "controls", p.stem))


def built(page: Path) -> str:
    """A page's text with all its parts written anew.

    Raises:
        ValueError: it asks for a part that nobody knows.
    """

    def write(match: re.Match[str]) -> str:
        begin, name, needs, old, end = match.groups()
        if name not in PARTS:
            raise ValueError(f"{page.name}: unknown part {name!r}; known: {', '.join(sorted(PARTS))}")
        return f"{begin}{PARTS[name](page, needs or '', old)}\n{end}"

    return _PART.sub(write, page.read_text(encoding="utf-8"))


# Knobs --------------------------------------------------------------------------------------------------------------


def knobs(table: str) -> dict[str, tuple[str, str]]:
    """Key -> default as written, and what its comment says: of [tool.flwr.app.config.<table>] in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = re.search(rf"^\[tool\.flwr\.app\.config\.{table}\]\n(.*?)(?=^\[|\Z)", text, re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^([\w-]+) = (.*?)(?:  # (.*))?$", section[1], re.MULTILINE) if section else []
    found = {f"{table}.{key}": (default, comment) for key, default, comment in lines}
    written = tomllib.loads(text)["tool"]["flwr"]["app"]["config"].get(table, {})
    expected = {f"{table}.{key}": value for key, value in written.items()}
    if {key: tomllib.loads(f"x = {default}")["x"] for key, (default, _) in found.items()} != expected:
        raise ValueError(f"[tool.flwr.app.config.{table}] of pyproject.toml is not one `key = value  # meaning` a line")
    return found


def sources(page: str) -> dict[str, tuple[str, str]]:
    """Key -> the default beside which it stands, and the source of that, in a page's tables of knobs."""
    return {key: (default, source) for key, default, source in _ROW.findall(page)}


def _knob_table(page: Path, table: str, old: str) -> str:
    kept = sources(old)
    lines = ["| key | default | meaning | source |", "|---|---|---|---|"]
    for key, (default, meaning) in knobs(table).items():
        before, source = kept.get(key, ("", ""))
        said = source if before == default else ""
        lines.append(f"| `{key}` | `{default}` | {meaning.replace('|', chr(92) + '|')} | {said} |")
    return "\n".join(lines)


# Docstrings ---------------------------------------------------------------------------------------------------------


def docstring(path: Path) -> str:
    """A module's docstring, '' where it has none."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def _method_module(page: Path) -> Path:
    return ROOT / "flexfed" / "methods" / f"{strategies_of(page)[0]}.py"


def _differences(page: Path, needs: str, old: str) -> str:
    module = _method_module(page)
    found = re.search(r"^Differences from .*", docstring(module), re.DOTALL | re.MULTILINE)
    if not found:
        raise ValueError(f"{module}: its docstring has no paragraph that begins with 'Differences from'")
    return re.sub(r"`([a-z_.]+)`", lambda match: _linked(match[1], page), found[0])


def _linked(name: str, page: Path) -> str:
    """A dotted name of ours as a link to its file; anything else as it is."""
    parts = name.split(".")
    if parts[0] not in ("flexfed", "strategies"):
        return f"`{name}`"
    for end in range(len(parts), 0, -1):
        path, inside = ROOT.joinpath(*parts[:end]), parts[end:]
        file = path.with_suffix(".py")
        if file.exists() and (not inside or re.search(rf"^(def |class |){inside[0]}\b", _text(file), re.MULTILINE)):
            return f"[`{name}`]({_to(file, page)})"
        if path.is_dir() and not inside:
            return f"[`{name}`]({_to(path, page)})"
    raise ValueError(f"{_method_module(page)}: its docstring names `{name}`, which does not exist")


def _citation(page: Path, needs: str, old: str) -> str:
    module = _method_module(page)
    found = re.search(r'^"([^"]+)"\s+\(((?:[^()]|\([^()]*\))+)\)', docstring(module), re.MULTILINE)
    if not found:
        raise ValueError(f'{module}: its docstring has no line that begins with "<title>" (<authors, venue, link>)')
    title, rest = (" ".join(text.split()) for text in found.groups())
    rest = re.sub(r"(https://\S+)", r"<\1>", rest)
    rest = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", rest)
    return f'"{title}": {rest}.'


def _index(page: Path, needs: str, old: str) -> str:
    lines = []
    for each in method_pages():
        name, _, what = docstring(_method_module(each)).split("\n")[0].partition(": ")
        names = ", ".join(f"`{strategy}`" for strategy in strategies_of(each))
        lines.append(f"- {names}: [{name.rstrip('.')}]({each.name}){f', {what}' if what else '.'}")
    return "\n".join(lines)


# Files --------------------------------------------------------------------------------------------------------------


def _files(page: Path, needs: str, old: str) -> str:
    """Files that have a strategy in their names, and those that the page names."""
    patterns = ["flexfed/methods/{}.py", "flexfed/methods/{}_*.py", "strategies/{}.py", "tests/test_{}*.py"]
    globs = [pattern.format(name) for pattern in patterns for name in strategies_of(page)]
    found = [path for pattern in [*globs, *needs.split()] for path in _matching(pattern, pattern in globs)]
    lines = []
    for path in dict.fromkeys(found):
        first = docstring(path).split("\n")[0]
        lines.append(f"- [{path.relative_to(ROOT)}]({_to(path, page)})" + (f": {first}" if first else ""))
    return "\n".join(lines)


def _matching(pattern: str, may_miss: bool) -> list[Path]:
    found = sorted(ROOT.glob(pattern))
    if not found and not may_miss:
        raise ValueError(f"no such file: {pattern}")
    return found


def _to(path: Path, page: Path) -> str:
    return Path(relpath(path, page.parent)).as_posix()


def _results(page: Path, needs: str, old: str) -> str:
    """The files of benchmarks/results whose suites have a row of one of the page's strategies."""
    wanted = set(strategies_of(page))
    files = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
    found = [path for path in files if wanted & strategies_in(path)]
    if not found:
        return "Nothing in benchmarks/results has a row of it yet: what it gains here is not known."
    return "Results with rows of it: " + ", ".join(f"[{path.stem}]({_to(path, page)})" for path in found) + "."


def strategies_in(result: Path) -> set[str]:
    """The strategies that have rows in the suites that a file of results names."""
    suites = (ROOT / suite for suite in re.findall(r"benchmarks/suites/[\w-]+\.toml", _text(result)))
    return {name for suite in suites if suite.exists() for name in _rows(suite)}


def _rows(suite: Path) -> Iterable[str]:
    table = tomllib.loads(_text(suite))
    base = table.get("base", {}).get("strategy", "flexfl")
    return (row.get("strategy", base) for row in table["row"])


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


PARTS: dict[str, Callable[[Path, str, str], str]] = {
    "citation": _citation,
    "differences": _differences,
    "files": _files,
    "index": _index,
    "knobs": _knob_table,
    "results": _results,
}
"""Part -> its text, from the page, what the page says that it needs, and what stands there now."""


def main(arguments: list[str]) -> int:
    """Write all pages, or with --check only tell which are stale: 1 if there are any."""
    stale = [(page, new) for page in sorted(PAGES.glob("*.md")) if (new := built(page)) != _text(page)]
    for page, new in stale:
        if "--check" not in arguments:
            page.write_text(new, encoding="utf-8")
        print(f"{page.relative_to(ROOT)} {'is stale' if '--check' in arguments else 'written anew'}")
    for page in method_pages():
        for key, (default, source) in sources(_text(page)).items():
            if not SOURCE.fullmatch(source):
                print(f"{page.relative_to(ROOT)}: where does the default {default} of {key} come from?")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
