"""Bridges in closed form: sums over the clients' features, and the least squares that follow from them.

FedStitch (Zhan, Wu, Tian, Zhao, Li, IWQoS 2024, https://arxiv.org/abs/2409.07202) fits feature maps to the next block
in a way that could not be read, but without training. Ours: ridge regression on sums that add up over clients, so
that the result is that of all data in one place. StitchNet finds its channel map by least squares, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexfed.stitching.path import Bridge

LARGEST = 1e20
"""What a client's sums may hold: features of 1e8 in a thousand rows, and still nothing overflows that follows."""


@dataclass(frozen=True, eq=False)
class Sums:
    """What a regression needs to know of its rows; sums of two sets of rows add up.

    Attributes:
        gram: float64, (c + 1, c + 1): sum of a a', where a is a row of features with a 1 behind it.
        cross: float64, (c + 1, c'): sum of a z', where z is what the row should become.
        num_rows: how many rows.
    """

    gram: np.ndarray
    cross: np.ndarray
    num_rows: int

    def __add__(self, other: Sums) -> Sums:
        if self.gram.shape != other.gram.shape or self.cross.shape != other.cross.shape:
            raise ValueError(
                f"sums of {self.cross.shape} cannot be added to sums of {other.cross.shape}: other channels"
            )
        return Sums(self.gram + other.gram, self.cross + other.cross, self.num_rows + other.num_rows)


def no_rows(channels_in: int, channels_out: int) -> Sums:
    """Sums of nothing."""
    return Sums(np.zeros((channels_in + 1,) * 2), np.zeros((channels_in + 1, channels_out)), 0)


def sums_of(inputs: np.ndarray, outputs: np.ndarray) -> Sums:
    """Sums of rows, in float64.

    Args:
        inputs: (rows, c).
        outputs: (rows, c').
    """
    rows = np.ones((len(inputs), inputs.shape[1] + 1))
    rows[:, :-1] = inputs
    return Sums(rows.T @ rows, rows.T @ outputs.astype(np.float64), len(rows))


def valid_sums(sums: Sums, channels_in: int, channels_out: int) -> str | None:
    """Why a client's sums cannot be used; None = they can."""
    shapes = (channels_in + 1, channels_in + 1), (channels_in + 1, channels_out)
    if (sums.gram.shape, sums.cross.shape) != shapes:
        return f"sums have shapes {sums.gram.shape} and {sums.cross.shape}, expected {shapes[0]} and {shapes[1]}"
    if not all((np.abs(array) <= LARGEST).all() for array in (sums.gram, sums.cross)):
        return f"sums are not finite, or beyond {LARGEST:.0e}"
    if sums.num_rows < 0 or not np.isclose(sums.gram[-1, -1], sums.num_rows):
        return f"sums say {sums.num_rows} rows, but their last entry counts {sums.gram[-1, -1]}"
    return None if _of_rows(sums.gram) else "sums are not those of any rows: their squares and products do not agree"


def _of_rows(gram: np.ndarray) -> bool:
    """Whether a gram matrix can be one, as far as pairs of columns tell."""
    lengths = np.sqrt(np.maximum(np.diag(gram), 0.0))
    hair = 1e-6 * (1 + np.outer(lengths, lengths))
    return bool((np.diag(gram) >= 0).all() and (np.abs(gram - gram.T) <= hair).all()) and bool(
        (np.abs(gram) <= np.outer(lengths, lengths) + hair).all()
    )


def ridge(sums: Sums, penalty: float) -> np.ndarray:
    """Theta, float64 (c + 1, c'), that minimises the squared error plus penalty ||Theta||^2.

    The bias is penalised, too. Without a penalty, features that depend on each other leave many solutions; this is
    the smallest.

    Raises:
        ValueError: no rows, sums that are not finite, or a negative penalty.
    """
    if sums.num_rows < 1 or not (np.isfinite(sums.gram).all() and np.isfinite(sums.cross).all()):
        raise ValueError(f"a regression needs finite sums of at least one row, got {sums.num_rows} rows")
    if not penalty >= 0:
        raise ValueError(f"a penalty must be >= 0, got {penalty}")
    if penalty == 0:
        return np.asarray(np.linalg.lstsq(sums.gram, sums.cross)[0])
    return np.asarray(np.linalg.solve(sums.gram + penalty * np.eye(len(sums.gram)), sums.cross))


def affine(theta: np.ndarray) -> Bridge:
    """A solution, (c + 1, c'), as a bridge in float32: the last row is the bias."""
    return Bridge(np.ascontiguousarray(theta[:-1].T, np.float32), theta[-1].astype(np.float32))


def solve_bridge(sums: Sums, strength: float) -> Bridge:
    """The bridge that the sums ask for.

    Args:
        sums: of all clients.
        strength: of the penalty, relative to the mean square of the features: times trace(gram) / (c + 1).
    """
    return affine(ridge(sums, strength * np.trace(sums.gram) / len(sums.gram)))
