"""The classifier behind a stitched network: ridge regression on pooled features, from sums that add up over clients.

As in Fed3R, "Resource-Efficient Federated Learning with Closed-form Ridge Classifiers" (ICML 2024,
https://arxiv.org/abs/2406.01116): the result does not depend on how data are divided. FedStitch's own head could not
be read.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flexfed.stitching.bridges import Sums, affine, ridge, sums_of
from flexfed.stitching.path import apply_bridge


def class_sums(features: np.ndarray, labels: np.ndarray, num_classes: int) -> Sums:
    """Sums of pooled features and one-hot labels.

    Args:
        features: (n, c).
        labels: (n,), below `num_classes`.
        num_classes: of the task.
    """
    return sums_of(features, np.eye(num_classes)[labels])


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
