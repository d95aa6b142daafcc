"""How our pictures look: panels, grid, legend, and lines that stay apart in grey and for colour-blind readers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexfed.runs import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

INK, GREY = "#222222", "#8a8a8a"
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.6)),
    (0, (1.2, 1.3)),
    (0, (7, 1.5, 1.2, 1.5)),
    (0, (3, 1, 1, 1, 1, 1)),
)
MARKERS = "os^DvPX"


def two_panels(title: str) -> tuple[Figure, tuple[Axes, Axes]]:
    """A white figure with two panels side by side, that share the vertical axis."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(w_pad=0.12, wspace=0.04)
    figure = Figure(figsize=(10.5, 4.3), dpi=150, layout=engine, facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, weight="bold", color=INK)
    return figure, (left, right)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all; the same figure gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    # No pyplot: its global state is not ours to change.
    FigureCanvasAgg(figure).print_figure(buffer, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def byte_unit(largest: float) -> tuple[str, float]:
    """The unit in which so many bytes are read best, and how many bytes it has."""
    return ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)


def sparse(count: int, shift: float) -> list[int]:
    """Where markers stand: at the end and about eight before, shifted so that curves share no places."""
    step = max(count // 8, 1)
    return [*range(int(shift * step), count - 1, step), count - 1]


def tidy(axes: Axes) -> None:
    """A light grid behind the data, no frame."""
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GREY)


def legend(axes: Axes, handles: Sequence[Line2D], title: str) -> None:
    """Samples and labels of curves right of a panel, in the order given."""
    found = axes.legend(
        handles=list(handles), loc="upper left", bbox_to_anchor=(1.03, 1.0), borderaxespad=0.0, frameon=False,
        handlelength=4.0, labelspacing=0.9, fontsize=9, labelcolor=INK, title=title,
    )  # fmt: skip
    found.get_title().set(fontsize=9, color=INK)
