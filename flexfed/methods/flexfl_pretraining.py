"""FlexFL before round 1: pre-train the full network on the server's proxy data and measure how silent it is.

Section 2.2 of the paper's method, see `flexfed.methods.flexfl`. The trained weights are used for the scores
only and then thrown away. 80 % of the proxy split trains, 20 % measures.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch

from flexfed.importance import apoz, group_scores, relu_units
from flexfed.jobs import Task
from flexfed.select import ratio_groups
from flexfed.training import Samples, Training, batches, fit, use_batch_statistics

if TYPE_CHECKING:
    from flexfed.data import ServerData

log = logging.getLogger("flwr")
_TRAIN_SHARE = 0.8
_MEASURE_BATCH = 128


def measure_scores(task: Task, server: ServerData, seed: int) -> tuple[float, ...]:
    """APoZ of every ratio group, after pre-training with Adam.

    Args:
        task: the network; its method's settings say how long to train, and on which split.
        server: proxy and test splits.
        seed: of the initial weights and of every draw.

    Raises:
        ValueError: the split is too small to train and measure on.
    """
    method = task.method
    samples = server.test if method.proxy_source == "test" else server.proxy
    groups = ratio_groups(task.layout, task.factory())
    units = relu_units(task.factory, task.layout, task.input_shape)  # before training: networks without ReLU end here
    if not any((u >= 0).any() for u in units):
        raise ValueError("no ReLU of this network measures any group's APoZ; pass flexfl.scores (one number will do)")
    rng = np.random.default_rng([seed, 0])
    train, held_out = split(samples, rng)
    torch.manual_seed(seed)
    model = use_batch_statistics(task.factory()).to(task.place)
    if method.pretrain_epochs:
        log.info("pre-training for %s epochs on %s samples", method.pretrain_epochs, len(train.labels))
        settings = Training(
            optimizer="adam", weight_decay=0.0, drop_last=False,
            batch_size=method.pretrain_batch_size, local_epochs=method.pretrain_epochs,
        )  # fmt: skip
        fit(model, train, settings, method.pretrain_learning_rate, rng)
    measured = apoz(model, [batch.inputs for batch in batches(held_out, _MEASURE_BATCH)])
    return tuple(float(a) for a in group_scores(measured, units, task.layout, groups))


def split(samples: Samples, rng: np.random.Generator) -> tuple[Samples, Samples]:
    """Shuffle and divide: 80 % to train on, 20 % to measure on.

    Raises:
        ValueError: there are fewer than ten samples.
    """
    num = len(samples.labels)
    if num < 10:
        raise ValueError(
            f"FlexFL needs at least 10 proxy samples to pre-train and measure APoZ, got {num}; "
            "raise proxy-fraction, or pass flexfl.scores"
        )
    order = torch.from_numpy(rng.permutation(num))
    cut = int(_TRAIN_SHARE * num)
    train, held_out = order[:cut], order[cut:]
    return Samples(samples.inputs[train], samples.labels[train]), Samples(
        samples.inputs[held_out], samples.labels[held_out]
    )
