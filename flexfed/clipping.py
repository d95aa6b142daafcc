"""Bound what one reply can do to the global model: scale it down to a largest norm.

"Can You Really Backdoor Federated Learning?" (Sun, Kairouz, Suresh, McMahan, 2019, https://arxiv.org/abs/1911.07963)
thresholds the norm of updates: the server takes

    difference / max(1, ||difference||_2 / M)

of each client. It is the flat clipping of DP-FedAvg ("Learning Differentially Private Recurrent Language Models",
McMahan et al., ICLR 2018, https://arxiv.org/abs/1710.06963), but nothing here is private: no noise is added. Ours: a
client that trains a part is clipped by the norm of what it sends, so a narrow part, whose norm is smaller as it has
fewer entries, is clipped less; and numbers that are not finite are refused before, never rescued.
"""

from __future__ import annotations

import math

import numpy as np

_CHUNK = 1 << 16  # numbers in float64 at a time


def norm_of(flat: np.ndarray) -> float:
    """The L2 norm of a float32 vector, summed in float64: nothing overflows, whatever is finite."""
    total = 0.0
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK].astype(np.float64)
        total += float(np.sum(part * part))
    return math.sqrt(total)


def clipped(flat: np.ndarray, most: float) -> np.ndarray:
    """A difference whose norm is at most `most`, to rounding: itself, or a copy that is scaled down.

    Args:
        flat: float32, finite.
        most: > 0.
    """
    norm = norm_of(flat)
    if norm <= most:
        return flat
    scaled = np.empty_like(flat)
    for start in range(0, len(flat), _CHUNK):
        # in float64: the factor alone may be smaller than float32 can say
        scaled[start : start + _CHUNK] = flat[start : start + _CHUNK].astype(np.float64) * (most / norm)
    return scaled
