"""Whether one method is better than another: paired tests over seeds, corrected for how many were made."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.05  # of error, over all tests of one column together
_ROUNDING = 1e-9  # spread beside the differences: less is that of 0.85 - 0.80 and 0.82 - 0.77 in binary


@dataclass(frozen=True)
class Paired:
    """Differences of two methods, one for each seed, and what Student's t-test says of them.

    Attributes:
        mean: of the differences.
        half_width: of the 95 % confidence interval around it; None where `p` is.
        p: two-sided probability of a mean as far from 0 where there is no difference; None = fewer than two seeds, or
            differences without any spread but rounding's, of which the test can say nothing.
    """

    mean: float
    half_width: float | None
    p: float | None


def paired_test(differences: Sequence[float]) -> Paired | None:
    """Student's t-test of paired differences; None where there are none.

    It takes them as drawn from one normal distribution. Of three seeds it can show only what is large beside their
    spread; a permutation test of the signs could show nothing at all below six (2 / 2^5 > 0.05).

    Args:
        differences: one for each seed, finite.
    """
    from scipy import stats

    if not differences:
        return None
    mean, free = statistics.fmean(differences), len(differences) - 1
    if not free:
        return Paired(mean, None, None)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    if error <= _ROUNDING * max(map(abs, differences)):
        return Paired(mean, None, None)
    half_width = float(stats.t.ppf(1 - LEVEL / 2, free)) * error
    return Paired(mean, half_width, float(2 * stats.t.sf(abs(mean) / error, free)))


def holm(probabilities: Sequence[float]) -> list[float]:
    """The probabilities, raised so that `LEVEL` bounds the chance of even one error among them all.

    "A simple sequentially rejective multiple test procedure" (Holm, Scandinavian Journal of Statistics 1979): the
    smallest of m is multiplied by m, the next by m - 1, and so on; none ends below one before it, none above 1.
    """
    order = sorted(range(len(probabilities)), key=probabilities.__getitem__)
    raised, floor = [1.0] * len(order), 0.0
    for rank, place in enumerate(order):
        floor = max(floor, min(1.0, (len(order) - rank) * probabilities[place]))
        raised[place] = floor
    return raised


def verdict(mean: float, probability: float | None, lower_is_better: bool = False) -> str:
    """'better', 'worse' or 'not shown' for a difference, by its corrected probability; '' where there is no test."""
    if probability is None:
        return ""
    if probability >= LEVEL:
        return "not shown"
    return "better" if (mean < 0) == lower_is_better else "worse"
