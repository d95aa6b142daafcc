"""A comparison as lines: how good each row was by what training had taken until then; and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexfed.compare import Comparison, Row
from flexfed.drawing import DASHES, INK, MARKERS, legend, save, sparse, tidy, two_panels
from flexfed.report import quality
from flexfed.runs import Run, in_percent, lower_is_better

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Dark and far apart in hue and lightness; Okabe and Ito's colours without their yellow, which no white page shows.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444")
_WIDE = 4.0  # rows whose totals differ by more are drawn over a logarithmic axis


@dataclass(frozen=True)
class Effort:
    """What training took, summed over the rounds.

    Attributes:
        label: with its unit.
        keys: of metrics.jsonl, added.
        unit: by which the sum is divided.
    """

    label: str
    keys: tuple[str, ...]
    unit: float = 1.0


EFFORTS = (
    Effort("MB sent and received in training", ("bytes-down", "bytes-up"), 1e6),
    Effort("modelled seconds of training", ("modelled-seconds-training",)),
)


@dataclass(frozen=True)
class Line:
    """A metric of one row by effort, over the rounds in which every seed measured it.

    Attributes:
        label: the row's name.
        rounds: where it was measured.
        spent: effort until then, mean over seeds.
        mean: of the metric over seeds; low, high: its range over them.
    """

    label: str
    rounds: tuple[int, ...]
    spent: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def lines(comparison: Comparison, metric: str, effort: Effort) -> list[Line]:
    """One line for each row that has the metric, in the order of the rows."""
    found = [_line(row, metric, effort) for row in comparison.rows]
    return [line for line in found if line is not None]


def _line(row: Row, metric: str, effort: Effort) -> Line | None:
    by_seed = [_points(run, metric, effort) for run in row.runs.values()]
    rounds = sorted(set.intersection(*map(set, by_seed))) if by_seed else []
    if not rounds:
        return None
    values = [[points[number][1] for points in by_seed] for number in rounds]
    spent = [statistics.fmean(points[number][0] for points in by_seed) for number in rounds]
    mean, low, high = ([of(at) for at in values] for of in (statistics.fmean, min, max))
    return Line(row.name, tuple(rounds), tuple(spent), tuple(mean), tuple(low), tuple(high))


def _points(run: Run, metric: str, effort: Effort) -> dict[int, tuple[float, float]]:
    """Round -> effort until then and the metric, where it was measured and is a number."""
    spent = accumulate(sum(line.get(key) or 0 for key in effort.keys) / effort.unit for line in run.rounds)
    told = zip(run.rounds, spent, strict=True)
    return {line["round"]: (total, line[metric]) for line, total in told if line.get(metric) is not None}


def is_wide(drawn: Sequence[Line]) -> bool:
    """Whether the rows' totals differ so much that a linear axis would press the cheap ones to its edge."""
    totals = [line.spent[-1] for line in drawn if line.spent[-1] > 0]
    return bool(totals) and max(totals) > _WIDE * min(totals)


# --- the picture --------------------------------------------------------------------------------------------


def draw(comparison: Comparison, path: Path) -> None:
    """Write the comparison's first metric against the data and against the modelled time of training, as PNG.

    Lines are means over seeds, bands (of seven rows at most) their range; the legend names the rows by their last
    value, best first. A line ends where one of its seeds stops or has no number any more.

    Args:
        comparison: of finished runs.
        path: written whole or not at all.
    """
    metric = comparison.metrics[0]
    figure, panels = two_panels(comparison.title)
    for axes, effort in zip(panels, EFFORTS, strict=True):
        _panel(axes, lines(comparison, metric, effort), effort, metric)
    panels[0].set_ylabel(name_of(metric), color=INK)
    if handles := panels[1].get_lines():
        rising = lower_is_better(metric)
        order = sorted(handles, key=lambda line: float(line.get_ydata()[-1]), reverse=not rising)  # type: ignore[index,arg-type]
        legend(panels[1], order, "where its line ends, mean over seeds")
    save(figure, path)


def scale_of(metric: str) -> float:
    """By what a metric is multiplied to be read: accuracies in percent."""
    return 100.0 if in_percent(metric) else 1.0


def name_of(metric: str) -> str:
    """A metric and its unit, for an axis."""
    return f"{metric}, %" if in_percent(metric) else metric


def _panel(axes: Axes, drawn: Sequence[Line], effort: Effort, metric: str) -> None:
    scale = scale_of(metric)
    for place, line in enumerate(drawn):
        mean, low, high = ([scale * value for value in part] for part in (line.mean, line.low, line.high))
        if len(drawn) <= len(COLOURS):  # more bands hide one another
            axes.fill_between(line.spent, low, high, color=COLOURS[place % len(COLOURS)], alpha=0.1, linewidth=0)
        axes.plot(
            line.spent,
            mean,
            label=f"{line.label}   {quality(metric, line.mean[-1])}",
            **_style(place, len(drawn), len(mean)),
        )
    if is_wide(drawn):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    elif drawn:
        axes.set_xlim(left=0)
    axes.set_xlabel(effort.label, color=INK)
    tidy(axes)


def _style(place: int, count: int, points: int) -> dict[str, Any]:
    """Colour, dash and marker of a row; after seven rows colours come again with another dash and marker."""
    again = place // len(COLOURS)
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": DASHES[again % len(DASHES)],
        "linewidth": 1.6,
        "marker": MARKERS[(place + 3 * again) % len(MARKERS)],
        "markersize": 4.0,
        "markevery": sparse(points, place / count),
    }
