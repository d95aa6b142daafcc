"""Procedural images: five silhouettes filled with stripes of four orientations, so twenty classes.

Made so that a zoo can be pre-trained on some classes and federated on others without any data at hand: each
silhouette and each orientation is on both sides, their combinations are not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SILHOUETTES = ("disc", "square", "triangle", "plus", "ring")
ORIENTATIONS = (0, 45, 90, 135)
"""Degrees. A class is called by its number: silhouette + 5 * orientation."""

PRETRAINING_IDS = (0, 2, 4, 6, 8, 11, 14, 15, 17, 18)
FEDERATED_IDS = (1, 3, 5, 7, 9, 10, 12, 13, 16, 19)
SHAPE = (3, 24, 24)
NOISE = 0.12
"""Standard deviation of the noise of every pixel."""


def class_name(class_id: int) -> str:
    """Such as 'square 45'."""
    return f"{SILHOUETTES[class_id % 5]} {ORIENTATIONS[class_id // 5]}"


def balanced_images(ids: Sequence[int], per_class: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Images of some classes in a shuffled order, and the place in `ids` of the class of each.

    Returns:
        float32 (n, 3, 24, 24) in [0, 1], and int64 (n,).
    """
    labels = rng.permutation(np.repeat(np.arange(len(ids)), per_class))
    return draw(np.asarray(ids)[labels], rng), labels.astype(np.int64)


def draw(class_ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One image for each class id, with random place, size, colours, stripes and noise.

    Returns:
        float32 (n, 3, 24, 24) in [0, 1].
    """
    num = len(class_ids)
    rows, columns = np.mgrid[-1 : 1 : SHAPE[1] * 1j, -1 : 1 : SHAPE[2] * 1j].astype(np.float32)

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (num, *shape)).astype(np.float32).reshape(num, *(shape or (1, 1)))

    scale = uniform(0.45, 0.8)
    x, y = (columns - uniform(-0.3, 0.3)) / scale, (rows - uniform(-0.3, 0.3)) / scale
    inside = _silhouettes(x, y)[class_ids % 5, np.arange(num)]
    angle = np.deg2rad(np.asarray(ORIENTATIONS, dtype=np.float32))[class_ids // 5].reshape(num, 1, 1)
    wave = np.sin(uniform(8, 13) * (np.cos(angle) * columns + np.sin(angle) * rows) + uniform(0, 2 * np.pi))
    spans = ((0, 1), (0.5, 1), (0, 0.5))
    ground, light, dark = (uniform(low, high, 3)[:, :, None, None] for low, high in spans)
    striped = np.where((wave > 0)[:, None], light, dark)
    images = rng.standard_normal((num, *SHAPE), dtype=np.float32)
    images *= NOISE
    images += np.where(inside[:, None], striped, ground)
    return np.clip(images, 0, 1, out=images)


def _silhouettes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bool (5, n, height, width): which pixels each silhouette covers, in its own coordinates."""
    radius = np.hypot(x, y)
    wide, high = np.abs(x), np.abs(y)
    return np.stack(
        [
            radius < 0.9,
            np.maximum(wide, high) < 0.8,
            (y < 0.8) & (wide < (y + 0.9) * 0.6),
            (np.minimum(wide, high) < 0.32) & (np.maximum(wide, high) < 0.95),
            (radius < 1.0) & (radius > 0.55),
        ]
    )
