"""FedAvg and the two controls every table needs.

"Communication-Efficient Learning of Deep Networks from Decentralized Data" (McMahan, Moore, Ramage, Hampson,
Agueera y Arcas, AISTATS 2017, https://arxiv.org/abs/1602.05629).

`exclusive` is FedAvg among the devices whose nominal capacity holds the whole model, the others left out; `small`
is FedAvg of one small model on every device. A method for unequal devices that beats neither does not pay.

Differences from the paper:
- `exclusive` and `small` are not in it.
- With `fedavg` a device trains everything whatever its capacity; only its memory and the round's deadline leave it out.
- Batch norm's running statistics never travel in this project: whoever evaluates computes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexfed.jobs import Job, Task, Update, make_update, require_memory, train_network

if TYPE_CHECKING:
    from flexfed.data import ClientData


@dataclass(frozen=True)
class FedAvgConfig:
    """FedAvg has no knobs of its own."""


@dataclass(frozen=True)
class ExclusiveConfig:
    """`exclusive` has no knobs of its own."""


@dataclass(frozen=True)
class SmallConfig:
    """Attributes: ratio: kept fraction of every group's units; 0.5 keeps about a quarter of the parameters."""

    ratio: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"small.ratio must be in (0, 1], got {self.ratio}")


def local_update(job: Job, task: Task, data: ClientData) -> Update:
    """Train what was sent and send back all of it, weighted by the number of examples."""
    require_memory(job.device, job.submodel, task.memory_to_train)
    trained = train_network(task.network(job.arrays), job, task, data.train)
    return make_update(job, task, job.submodel, job.arrays, trained, float(len(data.train.labels)))
