"""A comparison as files: its tables as Markdown, its picture, its page."""

from __future__ import annotations

from pathlib import Path

from flexfed.charts import draw
from flexfed.compare import Comparison
from flexfed.page import to_html
from flexfed.runs import write_atomic
from flexfed.tables import to_markdown


def write_comparison(comparison: Comparison, command: str, path: Path) -> list[Path]:
    """Write `<path>.md`, `<path>.png` and `<path>.html`, each whole or not at all; the written paths.

    Args:
        comparison: of finished runs.
        command: that made it, without machine paths; stands in the text and on the page.
        path: whose suffix, if it has one, is replaced.
    """
    text, picture, page = (path.with_suffix(suffix) for suffix in (".md", ".png", ".html"))
    draw(comparison, picture)
    write_atomic(page, to_html(comparison, command).encode())
    write_atomic(text, to_markdown(comparison, command, picture.name).encode())
    return [text, picture, page]
