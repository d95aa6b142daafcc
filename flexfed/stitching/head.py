"""The classifier behind a stitched network: ridge regression on pooled features, from sums that add up over clients.

As in Fed3R, "Resource-Efficient Federated Learning with Closed-form Ridge Classifiers" (ICML 2024,
https://arxiv.org/abs/2406.01116): the result does not depend on how data are divided. FedStitch's own head could not
be read.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flexfed.stitching.bridges import Sums, affine, ridge, sums_of, valid_sums
from flexfed.stitching.path import apply_bridge


def class_sums(features: np.ndarray, labels: np.ndarray, num_classes: int) -> Sums:
    """Sums of pooled features and one-hot labels.

    Args:
        features: (n, c).
        labels: (n,), below `num_classes`.
        num_classes: of the task.
    """
    return sums_of(features, np.eye(num_classes)[labels])


def valid_class_sums(sums: Sums, channels: int, num_classes: int) -> str | None:
    """Why a client's sums cannot be those of labels; None = they can. So no client counts for more than its rows."""
    if wrong := valid_sums(sums, channels, num_classes):
        return wrong
    counts = sums.cross[-1]
    if (counts < 0).any() or not np.isclose(counts.sum(), sums.num_rows):
        return f"sums count {counts.tolist()} rows of the classes, which are not {sums.num_rows} rows"
    most = np.sqrt(np.outer(np.diag(sums.gram), counts))
    if (np.abs(sums.cross) > most + 1e-6 * (1 + most)).any():
        return "sums are not those of any rows: features of a class are larger than features are"
    return None


def solve_head(sums: Sums, strength: float) -> np.ndarray:
    """The head, float64 (c + 1, classes): `weight = head[:-1].T`, `bias = head[-1]`.

    Args:
        sums: of all clients.
        strength: of the penalty, for each row.
    """
    return ridge(sums, strength * sums.num_rows)


def predict(head: np.ndarray, features: Tensor) -> Tensor:
    """The class of each row of pooled features, (n,); float32 throughout, as in the network that is saved."""
    return torch.argmax(apply_bridge(affine(head), features), dim=1)
