"""A knob that each row of a suite chooses for itself, on a seed that is not reported.

One common value favours the methods that it happens to suit; the best of a few on a reported seed favours those that
vary most. So every row tries the same few values on a seed of its own, and is then run with its best one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexfed.compare import PLACE_KEYS
from flexfed.overrides import Scalar, check_known, resolve_paths
from flexfed.runs import Run, lower_is_better

_KEYS = ("key", "values", "seed", "metric")


@dataclass(frozen=True)
class Tuning:
    """What the rows of a suite choose.

    Attributes:
        key: of the configuration; rows that set it themselves do not choose.
        values: to choose from.
        seed: of the runs that decide.
        metric: whose mean of the last ten rounds decides: the highest one, of losses the lowest; of equal ones the
            first value's.
    """

    key: str
    values: tuple[Scalar, ...]
    seed: int
    metric: str = "accuracy"

    def best(self, tried: Mapping[Scalar, Run]) -> Scalar | None:
        """The value whose run was best; None where no run has a number: they diverged, or did not finish."""
        scores = {value: self._score(tried[value]) for value in self.values if value in tried}
        able = [value for value, score in scores.items() if math.isfinite(score)]
        better = min if lower_is_better(self.metric) else max
        return better(able, key=scores.__getitem__, default=None)

    def _score(self, run: Run) -> float:
        score = (run.summary or {}).get("last10", {}).get(self.metric)
        return math.nan if score is None else float(score)

    def note(self, chosen: Mapping[str, Scalar | None], tried: Mapping[str, Collection[Scalar]]) -> str:
        """What the reader of a table has to know.

        Args:
            chosen: row -> its value; None = all of its runs diverged or failed, so that it kept the suite's.
            tried: row -> the values whose runs finished.
        """
        lost = [f"{row} {value}" for row in chosen for value in self.values if value not in tried[row]]
        without = f"; without a finished run: {', '.join(lost)}" if lost else ""
        told = ", ".join(f"{row} {'none' if value is None else value}" for row, value in chosen.items())
        return (
            f"{self.key}: each row's best of {', '.join(map(str, self.values))} by {self.metric} (mean of the last ten "
            f"rounds) with seed {self.seed}, which is not reported: {told}{without}."
        )


def read_tuning(
    path: Path, table: Mapping[str, Any] | None, seeds: Iterable[int], known: Mapping[str, Scalar]
) -> Tuning | None:
    """The [tune] table of a suite; None where it has none.

    Args:
        path: of the suite; relative paths among the values start at its folder.
        table: as it stands there.
        seeds: that the suite reports.
        known: every configuration key with its default.

    Raises:
        ValueError: a key is missing or unknown, or one that no run's result depends on, there are not two values, or
            the seed is one that is reported.
    """
    if table is None:
        return None
    where = path.name
    missing = [key for key in ("key", "values", "seed") if key not in table]
    if missing or (unknown := table.keys() - set(_KEYS)):
        wrong = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(sorted(unknown))}"
        raise ValueError(f"{where}: [tune] {wrong}; it takes {', '.join(_KEYS)}")
    key, values = str(table["key"]), table["values"]
    if key in {"seed", *PLACE_KEYS}:
        raise ValueError(f"{where}: [tune] has the key {key!r}: seeds and places are nothing to choose")
    if not isinstance(values, list) or len(values) < 2 or any(value in values[:i] for i, value in enumerate(values)):
        raise ValueError(f"{where}: values of [tune] must be a list of two or more different ones, got {values!r}")
    if type(table["seed"]) is not int or table["seed"] in seeds:
        raise ValueError(
            f"{where}: seed of [tune] must be a whole number that `seeds` does not hold, got {table['seed']!r}"
        )
    for value in values:
        try:
            check_known({key: value}, known)
        except ValueError as error:
            raise ValueError(f"{where}, [tune]: {error}") from error
    resolved = tuple(resolve_paths({key: value}, path.parent)[key] for value in values)
    return Tuning(key, resolved, table["seed"], str(table.get("metric", "accuracy")))
