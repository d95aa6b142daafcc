"""Test levels of a global model where there is data: their statistics, their accuracies, the model to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from flexfed.batchnorm import Statistics, collect_sums, statistics
from flexfed.jobs import TEST_BATCH, Task, evaluate_part_exits
from flexfed.runs import EXIT_PREFIX
from flexfed.submodel import Submodel, extract
from flexfed.training import Samples, batches
from flexfed.units import Arrays


def level_statistics(task: Task, level: Submodel, arrays: Arrays, samples: Samples) -> Statistics:
    """Batch-norm statistics of a level on samples; a short last batch does not weigh like a full one."""
    return part_statistics(task, extract(task.layout, level, arrays), samples)


def part_statistics(task: Task, part: Arrays, samples: Samples) -> Statistics:
    """The same of a part."""
    model = task.network(part)
    return statistics(collect_sums(model, (batch.inputs for batch in batches(samples, TEST_BATCH)), "pooled"))


def measure_levels(
    task: Task,
    found: Mapping[str, Statistics | None],
    headline: Sequence[str],
    deployed: Callable[[str], Arrays],
    samples: Samples,
) -> dict[str, float]:
    """Accuracy of every level and of each of its exits, the mean over the `headline` levels, and the last one's loss.

    Args:
        task: the network.
        found: batch-norm statistics of each level by name, the one that the run reports last; None = those of the
            test batch.
        headline: names of those whose mean is `accuracy-levels`.
        deployed: name -> the level's tensors.
        samples: the test split.
    """
    tested = {name: evaluate_part_exits(task, deployed(name), own, samples) for name, own in found.items()}
    results = {name: own[0] for name, own in tested.items()}
    top = list(results.values())[-1]
    mean = float(np.mean([results[name].accuracy for name in headline]))
    by_level = {f"accuracy-{name}": result.accuracy for name, result in results.items()}
    by_exit = {
        f"{EXIT_PREFIX}{name}-{exit}": result.accuracy
        for name, (_, *exits) in tested.items()
        for exit, result in enumerate(exits, start=1)
    }
    return {"accuracy": top.accuracy, "loss": top.loss, "accuracy-levels": mean, **by_level, **by_exit}


def with_statistics(arrays: Arrays, found: Statistics | None) -> Arrays:
    """A part with batch-norm statistics beside its tensors, as `<layer>.running_mean` and `running_var`.

    Also for networks whose norms keep none: without them, a loaded model would not give the accuracy reported.
    """
    model = dict(arrays)
    for layer, (mean, variance) in (found or {}).items():
        model[f"{layer}.running_mean"] = mean.astype(np.float32)
        model[f"{layer}.running_var"] = variance.astype(np.float32)
    return model
