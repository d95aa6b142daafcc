"""The README and the pages of docs/ as tests see them: fenced blocks, commands, links, files and keys they name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from toy import ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
LINKING = (*PAGES, ROOT / "CHANGELOG.md", ROOT / "deploy" / "README.md", *sorted((ROOT / "benchmarks").rglob("*.md")))
"""All that people read here, results included."""
RUN = "~/.flexfed/runs/..."
"""Stands in the pages for the folder of some run."""

_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_BUILT = re.compile(r"<!-- begin .*?<!-- end -->", re.DOTALL)
_FILE = re.compile(r"(?<![\w/.-])(?:flexfed|strategies|configs|tests|benchmarks|docs|deploy)/[\w./*-]*[\w*]")
_SETTING = re.compile(r"(?<![\w.-])([a-z][\w-]*(?:\.[a-z][\w-]*)*) ?=(?!=)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: from the root of the repository on.
        line: of its first fence.
        language: the first word behind the fence.
        file: the second one: the block is this file, or edits it; empty = neither.
        text: what it holds.
    """

    page: str
    line: int
    language: str
    file: str
    text: str

    @property
    def place(self) -> str:
        """For people."""
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a `bash` block, without what is set for it and without its comment."""

    block: Block
    text: str

    @property
    def words(self) -> list[str]:
        """As the shell hands them over; `~` is left to the program."""
        return shlex.split(self.text)


def name_of(path: Path) -> str:
    """A page, from the root of the repository on."""
    return path.relative_to(ROOT).as_posix()


def blocks_of(path: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text, found = path.read_text(encoding="utf-8"), []
    for match in _FENCE.finditer(text):
        language, file = (*match["info"].split(), "", "")[:2]
        found.append(Block(name_of(path), text.count("\n", 0, match.start()) + 1, language, file, match["text"]))
    return found


def commands_of(block: Block) -> Iterator[Command]:
    """The commands of a `bash` block, each once: continued lines are one, `a && b` is two."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            own = words[:end]
            while own and re.fullmatch(r"[A-Z_]+=\S*", own[0]):
                own = own[1:]
            yield Command(block, shlex.join(own))
            words = words[end + 1 :]


def prose_of(path: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", path.read_text(encoding="utf-8"))


def by_hand(path: Path) -> str:
    """A page's prose without the parts that `docs.build` writes, and without code between the words."""
    return re.sub(r"`[^`\n]*`", "", _BUILT.sub("", prose_of(path)))


def links_in(text: str) -> list[str]:
    """Where links lead that stay in the repository: `file`, `file#heading` or `#heading`."""
    return [link for link in _LINK.findall(text) if not re.match(r"[a-z]+:", link)]


def files_of(path: Path) -> list[str]:
    """Files and folders of the repository that a page's prose names, from the root on; `*` stands for many."""
    return _FILE.findall(prose_of(path))


def settings_of(path: Path) -> list[str]:
    """The keys that a page's prose sets: the words before `=` in its code."""
    return [key for code in re.findall(r"`([^`\n]+)`", prose_of(path)) for key in _SETTING.findall(code)]


def headings_of(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def edited(text: str, diff: str) -> str:
    """A text with the edit of a `diff` block, whose lines begin with a space, `+` or `-`.

    Raises:
        ValueError: the lines that it keeps or takes away do not stand there, one after the other, exactly once.
    """
    lines = diff.splitlines()
    before = "\n".join(line[1:] for line in lines if not line.startswith("+")) + "\n"
    after = "\n".join(line[1:] for line in lines if not line.startswith("-")) + "\n"
    if (count := ("\n" + text).count("\n" + before)) != 1:
        raise ValueError(f"expected these lines once, found them {count} times:\n{before}")
    return ("\n" + text).replace("\n" + before, "\n" + after)[1:]
