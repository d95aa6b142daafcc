"""The picture of a run: accuracy of every level over rounds and over the bytes it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from flexfed.drawing import DASHES, INK, MARKERS, byte_unit, legend, save, sparse, tidy, two_panels
from flexfed.runs import Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    lines = curves(rounds)
    figure, (left, right) = two_panels(title)
    unit, size = byte_unit(max((curve.sent[-1] for curve in lines), default=0.0))
    low, high = _limits([value for curve in lines for value in curve.values])
    left.set_ylim(low, high)
    _panel(left, lines, [curve.rounds for curve in lines], "round")
    _panel(
        right,
        lines,
        [[b / size for b in curve.sent] for curve in lines],
        f"{unit} sent to and from all devices",
    )
    left.set_ylabel("test accuracy, %", color=INK)
    if lines:
        ended = sorted(right.get_lines(), key=lambda line: -float(str(line.get_label()).split()[-1]))
        legend(right, ended, "after the last round, %")
    save(figure, path)


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
            linestyle=DASHES[rank % len(DASHES)],
            linewidth=1.5 if rank else 2.2,
            marker=MARKERS[rank % len(MARKERS)],
            markersize=4.5,
            markevery=sparse(len(xs), rank / len(lines)),
            clip_on=False,
            label=f"{curve.label}   {curve.values[-1]:.1f}",
            zorder=3 - 0.1 * rank,
        )
    axes.set_xlim(0, max((xs[-1] for xs in places), default=0) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=name == "round"))
    axes.set_xlabel(name, color=INK)
    tidy(axes)
