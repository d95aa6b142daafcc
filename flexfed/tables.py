"""A comparison as tables: for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexfed.compare import Comparison, Row, mean_and_deviation, paired_differences
from flexfed.report import cost, plain_text, quality
from flexfed.runs import EXIT_PREFIX, lower_is_better
from flexfed.significance import LEVEL, Paired, holm, paired_test, verdict

if TYPE_CHECKING:
    from rich.table import Table

COSTS = {
    "bytes-down": "sent to devices",
    "bytes-up": "sent back",
    "bytes-evaluation": "for evaluation",
    "macs": "multiply-adds",
    "macs-evaluation": "for evaluation, as well",
    "modelled-seconds": "modelled time",
    "modelled-seconds-training": "of it, training",
    "joules": "modelled energy",
    "client-seconds": "measured client time",
}


@dataclass(frozen=True)
class TextTable:
    """A table of text with the sentence that explains it; the first column is the row's name."""

    caption: str
    head: Sequence[str]
    body: Sequence[Sequence[str]]


def tables(comparison: Comparison) -> list[TextTable]:
    """Accuracies, differences to the baseline and what they show, and costs."""
    found = [_accuracy_table(comparison), _parts_table(comparison)]
    found += [_exits_table(comparison, exits)] if (exits := _exits(comparison)) else []
    if comparison.baseline is not None and len(comparison.rows) > 1:
        found += [_difference_table(comparison), _verdict_table(comparison)]
    if comparison.megabytes:
        found.append(_bytes_table(comparison))
    return [*found, _cost_table(comparison)]


def _accuracy_table(comparison: Comparison) -> TextTable:
    body = [
        [row.name, str(len(row.runs)), *(_spread_cell(row, metric) for metric in comparison.metrics)]
        for row in comparison.rows
    ]
    starred = any(row.leaves_devices_out(metric) for row in comparison.rows for metric in comparison.metrics)
    caption = (
        "Mean of the last ten rounds: mean over seeds ± standard deviation (n - 1); in brackets the last "
        "round. Accuracies in percent."
    )
    caption += " * Without the devices too weak for the whole network: compare with no other row." * starred
    return TextTable(caption, ["method", "seeds", *comparison.metrics], body)


def _parts_table(comparison: Comparison) -> TextTable:
    metric = comparison.metrics[0]
    heads = {"final": "final", "last10": "mean of the last ten", "best": "best"}
    body = [[row.name, *(_mean_cell(metric, row.values(part, metric).values()) for part in heads)]
            for row in comparison.rows]  # fmt: skip
    caption = (
        f"{metric.capitalize()} after the last round, over the last ten, and at its best (which no run knows while it "
        "runs): mean over seeds ± standard deviation (n - 1)."
    )
    return TextTable(caption, ["method", *heads.values()], body)


def _exits(comparison: Comparison) -> list[str]:
    """The metrics of single exits that some row has: level by level, the shallowest exit first."""
    runs = [run for row in comparison.rows for run in row.runs.values()]
    found = {name for run in runs for name in (run.summary or {})["last10"] if name.startswith(EXIT_PREFIX)}
    return sorted(found, key=lambda name: (name.rpartition("-")[0], int(name.rpartition("-")[2])))


def _exits_table(comparison: Comparison, exits: Sequence[str]) -> TextTable:
    body = [[row.name, *(_mean_cell(name, row.values("last10", name).values()) for name in exits)]
            for row in comparison.rows if any(row.values("last10", name) for name in exits)]  # fmt: skip
    heads = ["{} exit {}".format(*name.removeprefix(EXIT_PREFIX).rsplit("-", 1)) for name in exits]
    caption = (
        "Accuracy of every exit of every level, the shallowest first, of the rows that have exits: mean of the last "
        "ten rounds, over seeds ± standard deviation (n - 1)."
    )
    return TextTable(caption, ["method", *heads], body)


def _spread_cell(row: Row, metric: str) -> str:
    final, _ = mean_and_deviation(row.values("final", metric).values())
    cell = _mean_cell(metric, row.values("last10", metric).values())
    if cell == "-":
        return cell
    return f"{cell} ({quality(metric, final)})" + "*" * row.leaves_devices_out(metric)


def _mean_cell(metric: str, values: Iterable[float], sign: str = "") -> str:
    """Mean ± standard deviation; without the latter of one value, "-" of none."""
    mean, deviation = mean_and_deviation(values)
    if mean is None:
        return "-"
    return quality(metric, mean, sign) + ("" if deviation is None else f" ± {quality(metric, deviation)}")


def _baseline_and_others(comparison: Comparison) -> tuple[Row, list[Row]]:
    (baseline,) = (row for row in comparison.rows if row.name == comparison.baseline)
    return baseline, [row for row in comparison.rows if row is not baseline]


def _difference_table(comparison: Comparison) -> TextTable:
    baseline, others = _baseline_and_others(comparison)
    body = [[row.name, *(_difference_cell(row, baseline, m) for m in comparison.metrics)] for row in others]
    caption = (
        f"Difference to {baseline.name}, paired by seed: mean ± standard deviation (n - 1); in brackets the "
        "sign for each seed. Accuracies in percentage points."
    )
    return TextTable(caption, ["method", *comparison.metrics], body)


def _difference_cell(row: Row, baseline: Row, metric: str) -> str:
    differences = paired_differences(row, baseline, metric).values()
    if not differences:
        return "-"
    signs = "".join("+" if value > 0 else "-" if value < 0 else "0" for value in differences)
    return f"{_mean_cell(metric, differences, '+')} ({signs})"


def _verdict_table(comparison: Comparison) -> TextTable:
    """What the differences of the first metric show."""
    (baseline, others), metric = _baseline_and_others(comparison), comparison.metrics[0]
    tests = {row.name: paired_test(list(paired_differences(row, baseline, metric).values())) for row in others}
    asked = {name: test.p for name, test in tests.items() if test is not None and test.p is not None}
    corrected = dict(zip(asked, holm(list(asked.values())), strict=True))
    body = [[name, *_verdict_cells(metric, test, corrected.get(name))] for name, test in tests.items()]
    rows = "one row" if len(asked) == 1 else f"{len(asked)} rows"
    caption = (
        f"Is {metric} better than {baseline.name}'s? Student's t-test of the differences paired by seed, with their "
        f"95 % interval; p, and p corrected for the {rows} (Holm), by which the verdict goes ({LEVEL:g}). "
        "Few seeds show large differences only: not shown is not the same as equal."
    )
    return TextTable(caption, ["method", "difference", "from", "to", "p", "corrected", "verdict"], body)


def _verdict_cells(metric: str, test: Paired | None, corrected: float | None) -> list[str]:
    if test is None:
        return ["-"] * 6
    mean = quality(metric, test.mean, "+")
    if test.p is None or test.half_width is None:
        return [mean, *["-"] * 5]
    ends = [quality(metric, test.mean + side * test.half_width, "+") for side in (-1, 1)]
    ps = [f"{p:.3f}" if p >= 0.0005 else "< 0.001" for p in (test.p, corrected or 0.0)]
    return [mean, *ends, *ps, verdict(test.mean, corrected, lower_is_better(metric))]


def _bytes_table(comparison: Comparison) -> TextTable:
    metric = comparison.metrics[0]
    body = [
        [row.name, *(_mean_cell(metric, row.values_within(1e6 * mb, metric).values()) for mb in comparison.megabytes)]
        for row in comparison.rows
    ]
    caption = (
        f"{metric.capitalize()} by data: mean of the ten rounds before so much had travelled for training, both ways, "
        "what came before round 1 included; mean over seeds ± standard deviation (n - 1)."
    )
    return TextTable(caption, ["method", *(f"{mb:g} MB" for mb in comparison.megabytes)], body)


def _cost_table(comparison: Comparison) -> TextTable:
    body = [[row.name, *(cost(key, row.mean_total(key)) for key in COSTS)] for row in comparison.rows]
    return TextTable("Cost of a run, mean over seeds.", ["method", *COSTS.values()], body)


def to_text(comparison: Comparison, width: int = 120) -> str:
    """The tables for a terminal."""
    parts = [part for table in tables(comparison) for part in (table.caption, _drawn(table))]
    notes = [f"Note: {note}" for note in comparison.notes]
    return plain_text(width, *parts, *notes)


def _drawn(table: TextTable) -> Table:
    from rich import box
    from rich.table import Table

    drawn = Table(*table.head, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in drawn.columns[1:]:
        column.justify, column.overflow = "right", "fold"
    for cells in table.body:
        drawn.add_row(*cells)
    return drawn


def to_markdown(comparison: Comparison, command: str, picture: str = "") -> str:
    """The same tables as Markdown.

    Args:
        comparison: of finished runs.
        command: that made it, without machine paths; it stands on top.
        picture: path of its picture, as the text's reader finds it; "" = none.
    """
    parts = [f"# {comparison.title}", f"```\n{command}\n```"]
    parts += [f"![{comparison.metrics[0]} by data and by modelled time]({picture})"] if picture else []
    for table in tables(comparison):
        rule = ["---", *("---:" for _ in table.head[1:])]
        lines = [table.head, rule, *table.body]
        parts += [table.caption, "\n".join("| " + " | ".join(_escape(c) for c in line) + " |" for line in lines)]
    return "\n\n".join([*parts, *comparison.notes]) + "\n"


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")
