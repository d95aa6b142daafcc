"""The picture of a run: accuracy of every level over rounds and over the bytes it took."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexfed.runs import Metrics, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _GREY = "#222222", "#8a8a8a"
_DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.6)),
    (0, (1.2, 1.3)),
    (0, (7, 1.5, 1.2, 1.5)),
    (0, (3, 1, 1, 1, 1, 1)),
)
_MARKERS = "os^DvPX"


@dataclass(frozen=True)
class Curve:
    """Accuracy of one model over a run.

    Attributes:
        label: name of the model.
        rounds: where it was measured.
        sent: bytes sent until then, both ways together.
        values: accuracy in percent.
    """

    label: str
    rounds: tuple[int, ...]
    sent: tuple[float, ...]
    values: tuple[float, ...]


def curves(rounds: Sequence[Metrics]) -> list[Curve]:
    """One curve per level, smallest first, then one for the full-size model.

    The last is left out where a level is the full-size model and has the same numbers.
    """
    from flexfed.report import level_names

    names = level_names(key for line in rounds for key in line)
    found = [_measured(rounds, f"accuracy-{name}", f"level {name}") for name in names]
    whole = _measured(rounds, "accuracy", "full model")
    found += [whole] * all(whole.values != curve.values for curve in found)
    return [curve for curve in found if curve.values]


def _measured(rounds: Sequence[Metrics], key: str, label: str) -> Curve:
    """The rounds in which a metric was measured; bytes count in all of them."""
    sent = accumulate((line.get("bytes-down") or 0) + (line.get("bytes-up") or 0) for line in rounds)
    points = [
        (line["round"], total, 100 * line[key]) for line, total in zip(rounds, sent, strict=True) if _has(line, key)
    ]
    columns = tuple(zip(*points, strict=True)) or ((), (), ())
    return Curve(label, *columns)


def _has(line: Metrics, key: str) -> bool:
    return line.get(key) is not None


def draw(rounds: Sequence[Metrics], path: Path, title: str) -> None:
    """Write the picture as PNG, also for a run that measured nothing.

    Curves differ in lightness, dash and marker, so they stay apart in grey and for colour-blind readers,
    and the legend names them with their last value, best first. Larger models are darker, the largest is solid.

    Args:
        rounds: lines of metrics.jsonl.
        path: written whole or not at all.
        title: over both panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    lines = curves(rounds)
    engine = ConstrainedLayoutEngine(w_pad=0.12, wspace=0.04)
    figure = Figure(figsize=(10.5, 4.3), dpi=150, layout=engine, facecolor="white")
    canvas = FigureCanvasAgg(figure)  # no pyplot: its global state is not ours to change
    left, right = figure.subplots(1, 2, sharey=True)
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, weight="bold", color=_INK)
    unit, size = _byte_unit(max((curve.sent[-1] for curve in lines), default=0.0))
    low, high = _limits([value for curve in lines for value in curve.values])
    left.set_ylim(low, high)
    _panel(left, lines, [curve.rounds for curve in lines], "round")
    _panel(
        right,
        lines,
        [[b / size for b in curve.sent] for curve in lines],
        f"{unit} sent to and from all devices",
    )
    left.set_ylabel("test accuracy, %", color=_INK)
    _legend(right, lines)
    buffer = io.BytesIO()
    canvas.print_figure(buffer, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def _byte_unit(largest: float) -> tuple[str, float]:
    return ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits of the accuracy axis: the measured range with a little air, inside 0 to 100."""
    low, high = min(values, default=0.0), max(values, default=100.0)
    air = max(0.06 * (high - low), 1.0)
    return max(low - air, 0.0 if low > 0 else -air), high + air


def _panel(axes: Axes, lines: Sequence[Curve], places: Sequence[Sequence[float]], name: str) -> None:
    """Draw all curves over one measure of effort."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    shades = colormaps["viridis"]
    for curve, xs, rank in zip(lines, places, range(len(lines) - 1, -1, -1), strict=True):
        axes.plot(
            xs,
            curve.values,
            color=shades(0.78 * rank / max(len(lines) - 1, 1)),
            linestyle=_DASHES[rank % len(_DASHES)],
            linewidth=1.5 if rank else 2.2,
            marker=_MARKERS[rank % len(_MARKERS)],
            markersize=4.5,
            markevery=_sparse(len(xs), rank / len(lines)),
            clip_on=False,
            label=f"{curve.label}   {curve.values[-1]:.1f}",
            zorder=3 - 0.1 * rank,
        )
    axes.set_xlim(0, max((xs[-1] for xs in places), default=0) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=name == "round"))
    axes.set_xlabel(name, color=_INK)
    _tidy(axes)


def _sparse(count: int, shift: float) -> list[int]:
    """Where markers stand: at the end and about eight before, shifted so that curves share no places."""
    step = max(count // 8, 1)
    return [*range(int(shift * step), count - 1, step), count - 1]


def _tidy(axes: Axes) -> None:
    """A light grid behind the data, no frame."""
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=0, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_GREY)


def _legend(axes: Axes, lines: Sequence[Curve]) -> None:
    """Name, sample and last value of each curve right of the panel, in the order in which they end."""
    if lines:
        handles = sorted(axes.get_lines(), key=lambda line: -float(str(line.get_label()).split()[-1]))
        found = axes.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(1.03, 1.0), borderaxespad=0.0, frameon=False,
            handlelength=4.0, labelspacing=0.9, fontsize=9, labelcolor=_INK, title="after the last round, %",
        )  # fmt: skip
        found.get_title().set(fontsize=9, color=_INK)
