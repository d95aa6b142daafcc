"""What a person sees of a run: one line per round, the table at its end, its curves."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexfed.runs import (
    EXIT_PREFIX,
    KIND_PREFIX,
    Metrics,
    Run,
    in_percent,
    leaves_devices_out,
    quality_metrics,
    title_of,
)

if TYPE_CHECKING:
    from rich.table import Table

# `accuracy-<name>` with these names is no level of the method.
_NO_LEVELS = frozenset({"levels", "clients", "worst-tenth", "personal"})
PERSONAL = "personal-"  # before a capability
_MANY_LEVELS = 5
_SIZES = ("XS", "S", "M-", "M", "L-", "L", "XL")
_NAMES = {
    "accuracy": "largest model reported",
    "accuracy-levels": "mean over the levels",
    "accuracy-clients": "mean over the clients",
    "accuracy-worst-tenth": "worst tenth of clients",
    "accuracy-personal": "personal models",
    "accuracy-personal-worst-tenth": "worst tenth of them",
}
_COSTS = {
    "bytes-down": "sent to devices",
    "bytes-up": "sent back",
    "bytes-evaluation": "for evaluation, both ways",
    "macs": "multiply-adds",
    "macs-evaluation": "for evaluation, as well",
    "modelled-seconds": "modelled time",
    "modelled-seconds-training": "of it, training",
    "joules": "modelled energy",
    "wall-seconds": "measured time",
    "client-seconds": "measured client time",
    "refused": "refused replies",
    "failed": "failed clients",
}


# --- numbers as people read them ----------------------------------------------------------------------------


def percent(fraction: float | None) -> str:
    """0.9125 -> "91.2 %"; a missing number is "-"."""
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def points(difference: float | None) -> str:
    """A difference of two fractions in percentage points, with its sign: -0.021 -> "-2.1"."""
    return "-" if difference is None else f"{100 * difference:+.1f}"


def scaled(number: float | None, unit: str = "") -> str:
    """Three digits and a prefix: 12345678, "B" -> "12.3 MB"."""
    if number is None:
        return "-"
    value, prefixes = float(number), iter(("", "k", "M", "G", "T", "P"))
    prefix = next(prefixes)
    while abs(value) >= 999.5 and prefix != "P":
        value, prefix = value / 1000, next(prefixes)
    digits = 0 if abs(value) >= 99.95 or value == int(value) else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {prefix}{unit}".rstrip()


def duration(seconds: float | None) -> str:
    """Seconds in the unit that suits them: "302 ms", "4.2 s", "12 min", "3.5 h"."""
    if seconds is None:
        return "-"
    if 0 < seconds < 0.995:
        return f"{scaled(1000 * seconds)} ms"
    if seconds < 99.5:
        return f"{seconds:.{1 if seconds < 9.95 else 0}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


def cost(key: str, value: float | None) -> str:
    """One of the totals of a summary with its unit."""
    if value is None:
        return "-"
    if "seconds" in key:
        return duration(value)
    return scaled(value, "B" if key.startswith("bytes") else "J" if key == "joules" else "")


def quality(metric: str, value: float | None, sign: str = "") -> str:
    """One of the qualities of a summary: in percent with one digit, others with three; of a diverged run three in all.

    Args:
        metric: its name.
        value: as it stands in the summary.
        sign: "+" for a difference, which shows its sign always.
    """
    if value is None:
        return "-"
    if in_percent(metric):
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.3f}" if abs(value) < 1e4 else f"{value:{sign}.2e}"


def level_names(metrics: Iterable[str]) -> list[str]:
    """The method's levels among metric names, smallest first: S, M, L, or letters with a as the largest."""
    names = {name.removeprefix("accuracy-") for name in metrics if name.startswith("accuracy-")} - _NO_LEVELS
    names = {name for name in names if not name.startswith(PERSONAL)}
    if names <= set(_SIZES):
        return sorted(names, key=_SIZES.index)
    return sorted(names, reverse=True)


# --- lines and tables ---------------------------------------------------------------------------------------


def round_line(metrics: Metrics, num_rounds: int, seconds: float, eta: float | None = None) -> str:
    """The log line of a round: cohort, levels trained, accuracy, loss, worst clients, seconds, time left."""
    number = f"{metrics['round']:>{len(str(num_rounds))}}/{num_rounds}"
    levels = metrics.get("trained") or {}
    words = [f"round {number}", f"cohort {len(metrics.get('cohort') or ()):>2}"]
    words += [_levels_trained(levels)] if levels else []
    words += [f"accuracy {percent(metrics.get('accuracy')):>6}", f"loss {_loss(metrics)}"]
    if "accuracy-worst-tenth" in metrics:
        words.append(f"worst tenth {percent(metrics['accuracy-worst-tenth']):>6}")
    words += [f"{key} {len(metrics[key])}" for key in ("refused", "failed") if metrics.get(key)]
    words.append(duration(seconds))
    words += [f"{duration(eta)} left"] if eta is not None else []
    return "  ".join(words)


def _levels_trained(levels: Mapping[str, int]) -> str:
    """How often each level was trained; of many (a ratio for each device) the smallest and the largest."""
    order = level_names(f"accuracy-{name}" for name in levels)
    if len(order) > _MANY_LEVELS:
        return f"{order[-1]}..{order[0]}"
    return " ".join(f"{name}:{levels[name]}" for name in order)


def _loss(metrics: Metrics) -> str:
    """The evaluation's loss, else the clients' own training loss."""
    value = metrics.get("loss", metrics.get("train-loss"))
    return "-" if value is None else f"{value:.3f}"


def final_table(
    summary: Mapping[str, Any], rounds: Sequence[Metrics], other: Run | None = None, path: Path | None = None
) -> str:
    """The table at the end of a run, as plain text at most 100 columns wide.

    Args:
        summary: what `summarise` returned.
        rounds: lines of metrics.jsonl; they say which accuracies there are.
        other: a run that differs in the method only, to stand beside this one: `exclusive`, which leaves the
            devices out that cannot hold the whole model.
        path: the run folder, named in the last line (which may be longer).
    """
    names = [name for name in quality_metrics(rounds) if name.startswith(("accuracy", EXIT_PREFIX, KIND_PREFIX))]
    size = f" · {summary['parameters']:,} parameters" if "parameters" in summary else ""
    title = f"\n{title_of(summary)} · {summary['rounds']} rounds{size}\n"
    parts = (
        _accuracy_table(summary, _without_doubles(summary, _ordered(names)), other),
        "",
        _cost_table(summary, other),
        "",
    )
    text = plain_text(100, title, *parts)
    return text + (f"\nrun folder: {path}" if path else "")


def plain_text(width: int, *renderables: Any) -> str:
    """What rich makes of these, as text that does not depend on the terminal, without trailing spaces."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    console.print(*renderables, sep="\n", markup=False, highlight=False)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _ordered(names: Sequence[str]) -> list[str]:
    """The largest model first, then the levels from small to large, the exits of the largest, means over devices."""
    own = level_names(names)
    levels = [f"accuracy-{name}" for name in own]
    of_largest = (name for name in names if own and name.startswith(f"{EXIT_PREFIX}{own[-1]}-"))
    exits = sorted(of_largest, key=lambda name: int(name.rpartition("-")[2]))
    known = [name for name in _NAMES if name != "accuracy"]
    by_kind = sorted(name for name in names if name.startswith(KIND_PREFIX))
    by_capability = sorted(n for n in names if n.startswith(f"accuracy-{PERSONAL}") and n not in known)
    wanted = ["accuracy", *levels, *exits, *known, *by_kind, *by_capability]
    return [name for name in wanted if name in names]


def _without_doubles(summary: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The rows, without those of a method's only level that repeat the first one."""
    levels = level_names(names)
    doubles = {"accuracy-levels", f"accuracy-{levels[0]}"} if len(levels) == 1 else set()
    return [name for name in names if name not in doubles or not _same_numbers(summary, name, "accuracy")]


def _same_numbers(summary: Mapping[str, Any], one: str, other: str) -> bool:
    return all(summary[part].get(one) == summary[part].get(other) for part in ("final", "last10", "best"))


def _label(summary: Mapping[str, Any], name: str) -> str:
    """What a row of the accuracies is called."""
    if name == "accuracy-levels" and summary.get("headline-levels"):
        return f"mean of {', '.join(summary['headline-levels'])}"
    if name.startswith(EXIT_PREFIX):
        return "level {}, exit {}".format(*name.removeprefix(EXIT_PREFIX).rsplit("-", 1))
    if name.startswith(KIND_PREFIX):
        return f"clients, {name.removeprefix(KIND_PREFIX)}"
    level = name.removeprefix("accuracy-")
    usual = f"personal, {level.removeprefix(PERSONAL)}" if level.startswith(PERSONAL) else f"level {level}"
    return _NAMES.get(name, usual)


def _new_table(first: str, columns: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(first, no_wrap=True, min_width=24)
    lines = max(column.count("\n") for column in columns)
    table.columns[0].header = "\n" * lines + first
    for column in columns:
        table.add_column("\n" * (lines - column.count("\n")) + column, justify="right", min_width=12)
    return table


def _accuracy_table(summary: Mapping[str, Any], names: Sequence[str], other: Run | None) -> Table:
    which = "last 10" if summary["rounds"] >= 10 else "all"
    columns = ["final", f"mean of\n{which}", "best"]
    columns += [f"{_other_name(other)},\n{which}", "difference,\npoints"] if other else []
    table = _new_table("accuracy", columns)
    for name in names:
        cells = [percent(summary[part].get(name)) for part in ("final", "last10", "best")]
        if other:
            mine, theirs = summary["last10"].get(name), _comparable_value(other, name)
            both = mine is not None and theirs is not None
            cells += [percent(theirs), points(mine - theirs) if both else "-"]
        table.add_row(_label(summary, name), *cells)
    return table


def _comparable_value(other: Run, name: str) -> float | None:
    """The other run's mean of the last ten rounds, where it was measured on the same devices."""
    if leaves_devices_out(other.summary, name):
        return None
    value: float | None = (other.summary or {})["last10"].get(name)
    return value


def _other_name(other: Run) -> str:
    strategy = str(other.config.get("strategy", "other"))
    return "weak devices\nleft out" if strategy == "exclusive" else strategy


def _cost_table(summary: Mapping[str, Any], other: Run | None) -> Table:
    table = _new_table("cost", ["this run", *([_other_name(other)] if other else [])])
    for key, name in _COSTS.items():
        if key in summary:
            cells = [cost(key, summary[key])]
            cells += [cost(key, (other.summary or {}).get(key))] if other else []
            table.add_row(name, *cells)
    return table


# --- curves -------------------------------------------------------------------------------------------------


def curves_png(rounds: Sequence[Metrics], path: Path, title: str) -> None:
    """Draw accuracy of every level over rounds and over bytes sent; `flexfed.curves` says how."""
    from flexfed.curves import draw

    draw(rounds, path, title)


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of cells, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
