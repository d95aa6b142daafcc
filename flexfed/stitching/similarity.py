"""How alike two sets of features are: linear CKA, between the network so far and what a block was trained to read.

Linear CKA is that of "Similarity of Neural Network Representations Revisited" (Kornblith, Norouzi, Lee, Hinton, ICML
2019, https://arxiv.org/abs/1905.00414). FedStitch (Zhan, Wu, Tian, Zhao, Li, IWQoS 2024,
https://arxiv.org/abs/2409.07202) scores blocks by CKA on local data; which two matrices it compares could not be
read. `compat_view` follows StitchNet (Teerapittayanon, Comiter, McDanel, Kung, https://arxiv.org/abs/2301.01947),
except that maps shrink by pooling there where it resizes them; `target_score` is ours (kernel-target alignment).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flexfed.stitching.path import pooled, resize

DEGENERATE = 1e-12
ROWS_PER_CHANNEL = 10


def cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear CKA of two matrices with matching rows, in [0, 1]; 0 where either is constant, NaN where either has one.

    ||X'Y||^2 / (||X'X|| ||Y'Y||), columns centred first; by products of columns (p, q) or of rows (m, m), whichever
    are smaller.

    Args:
        x: (m, p).
        y: (m, q).

    Raises:
        ValueError: no rows, or not as many in both.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or not len(x):
        raise ValueError(f"CKA compares matrices with the same rows, at least one, got shapes {x.shape} and {y.shape}")
    with np.errstate(invalid="ignore", over="ignore"):
        x, y = _centred(x), _centred(y)
        if max(x.shape[1], y.shape[1]) < len(x):
            shared = np.square(x.T @ y).sum()
            scale = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
        else:
            gram_x, gram_y = x @ x.T, y @ y.T
            shared = (gram_x * gram_y).sum()
            scale = np.linalg.norm(gram_x) * np.linalg.norm(gram_y)
        return 0.0 if scale <= DEGENERATE else float(np.clip(shared / scale, 0, 1))


def _centred(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    return np.asarray(x - x.mean(axis=0))


def target_score(features: np.ndarray, labels: np.ndarray, num_classes: int) -> float:
    """CKA of pooled features with one-hot labels; 0 where all labels are the same.

    Args:
        features: (n, channels).
        labels: (n,), below `num_classes`.
        num_classes: of the task.
    """
    return cka(features, np.eye(num_classes)[labels])


@dataclass(frozen=True)
class View:
    """Which rows of feature maps are looked at: the same of whatever is compared.

    Attributes:
        size: (height, width) that maps are resized to, each position a row; None = maps are pooled, each image a row.
        limit: rows at most, drawn without repetition; 0 = all.
    """

    size: tuple[int, int] | None
    limit: int = 0

    @property
    def positions(self) -> int:
        """Rows of one image."""
        return self.size[0] * self.size[1] if self.size else 1

    def num_rows(self, num_images: int) -> int:
        """How many rows so many images give."""
        total = num_images * self.positions
        return min(total, self.limit) if self.limit else total

    def draw(self, num_images: int, rng: np.random.Generator) -> np.ndarray:
        """Numbers of the rows looked at, rising: (image, position) in this order."""
        total, kept = num_images * self.positions, self.num_rows(num_images)
        return np.arange(total) if kept == total else np.sort(rng.choice(total, kept, replace=False))

    def rows(self, features: Tensor, drawn: np.ndarray, first: int = 0) -> Tensor:
        """The drawn rows of a batch, (rows, channels).

        Args:
            features: of the batch, (n, c, h, w) or (n, c).
            drawn: from `draw`, of all images.
            first: number of the batch's first image.
        """
        begin, end = np.searchsorted(drawn, [first * self.positions, (first + len(features)) * self.positions])
        image, position = np.divmod(drawn[begin:end] - first * self.positions, self.positions)
        images, positions = (torch.from_numpy(own).to(features.device) for own in (image, position))
        if self.size is None:
            return pooled(features)[images]
        maps = resize(features, self.size).flatten(2)
        return maps[images, :, positions]


def compat_view(here: Sequence[int], native: Sequence[int]) -> View:
    """How features of the network so far and a block's native input are compared.

    Two maps: the larger is brought to the size of the smaller, and of more than 10 min(channels) rows as many are
    drawn. A map and vectors: the map is pooled. Each axis goes by itself where one map is wider and the other higher.

    Args:
        here: shape of the features, without the batch.
        native: shape of the block's native input.
    """
    if len(here) < 3 or len(native) < 3:
        return View(None)
    return View((min(here[1], native[1]), min(here[2], native[2])), ROWS_PER_CHANNEL * min(here[0], native[0]))
