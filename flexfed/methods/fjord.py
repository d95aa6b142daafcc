"""FjORD: every client trains the first share of each layer's channels, and in each batch a share of that share.

"FjORD: Fair and Accurate Federated Learning under heterogeneous targets with Ordered Dropout" (Samuel Horvath,
Stefanos Laskaridis, Mario Almeida, Ilias Leontiadis, Stylianos Venieris, Nicholas Lane, NeurIPS 2021, arXiv
2102.13451). A client gets the prefix of its largest width p_max. In every batch it draws a width p of `ratios` up to
p_max, evenly, one for all layers. Without distillation it learns from the labels at p; with it, from the labels at
p_max and at p from what p_max says. Entries are averaged over the clients that hold them, by examples, which is what
overwriting prefixes from the largest to the smallest gives; classifier rows are not limited to a client's labels.

Differences from the released code, the authors' baseline in Flower; where brackets name an option, it undoes one:
- Distillation is on: the paper's framework is ordered dropout with it. There it is the second of two examples, off
  unless asked for [self-distillation]. Both losses make one step, as there.
- Only the prefix of p_max travels; there the full network does, both ways, and once more inside the metrics.
- Draws follow from the job's seed, which stands for seed, round and client, one after the other, batch by batch;
  there they come from numpy's global generator, so that they depend on who else runs in the process.
- A width is one of the whole forward pass, so a layer may run several times in it; there each layer takes the next
  one of a sequence.
- Training normalises by the batch, at each width by its own. For evaluation every level has its own statistics,
  asked anew of the clients whose p_max is at least p (`flexfed.batchnorm`); there running ones are averaged. They
  are kept by level, so that two levels of the same rounded widths do not share them.
- Who has which p_max follows the device's capacity; the code's even tiers are an option [assign].
- 1e-9 is taken off before a width is rounded up (`flexfed.select.kept_units`).
- Where p_max is no level's (`ratio-policy`), the widths to draw are p_max and the levels below it.
- A width that rounds to p_max's in every layer is p_max: it teaches itself nothing, and takes no second pass.
- The loss in the record is the sum of both; there it is the student's alone.

As there, one optimiser holds all of the p_max network: in a batch of a narrower p the entries outside have zero
gradients, and momentum and weight decay move them all the same. With distillation every entry has a gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import Tensor, nn
from torch.nn import functional

from flexfed.cost import BYTES_PER_NUMBER, memory_budget, part_bytes, training_macs, training_memory
from flexfed.inner import InnerNetwork
from flexfed.jobs import Job, Task, Update, make_update, require_memory, train_network
from flexfed.methods.heterofl import LevelsConfig, Weights
from flexfed.select import prefix_ratio
from flexfed.submodel import Submodel, narrow_sizes, within

if TYPE_CHECKING:
    from flexfed.data import ClientData

_DRAWS = 5  # stream of a job's seed; others draw the order of samples, dropout, what is free, and rounding


@dataclass(frozen=True)
class FjORDConfig(LevelsConfig):
    """What a run may set of FjORD: its widths are the levels.

    Attributes:
        self_distillation: the network of p_max learns from the labels in every batch, and teaches the one drawn.
            Off: the one drawn learns from the labels, which is less work.
    """

    method: ClassVar[str] = "fjord"

    ratios: tuple[float, ...] = (1.0, 0.8, 0.6, 0.4, 0.2)
    weights: Weights = "examples"
    self_distillation: bool = True


def allowed(ratios: Sequence[float], largest: float) -> tuple[float, ...]:
    """The widths that a client may train: its own largest, and those of the run below that; falling."""
    return (largest, *(ratio for ratio in ratios if ratio < largest))


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """-sum_c q_c ln p_c (batch mean): KL(q || p), and the teacher's entropy, which no student changes.

    Args:
        student: logits (n, classes) of p.
        teacher: those of q, taken as constants.
    """
    return functional.cross_entropy(student, teacher.detach().softmax(1))


class OrderedDropout:
    """The widths that one client trains in one job: draws one for each batch, and counts what it takes.

    Args:
        task: the network and how it is trained.
        submodel: the prefix that the client holds.
        ratio: its width, p_max.
        seed: of the job.

    Attributes:
        inner: width -> the network of it inside the one that the client holds; that one itself is not among them.
    """

    def __init__(self, task: Task, submodel: Submodel, ratio: float, seed: int):
        self._task = task
        self._parts = {p: prefix_ratio(task.layout, p) for p in allowed(task.method.ratios, ratio)[1:]}
        self._parts = {ratio: submodel, **self._parts}
        self._largest = ratio
        self._rng = np.random.default_rng([seed, _DRAWS])
        self._samples: Counter[float] = Counter()
        self.inner = {
            p: InnerNetwork(task.factory, task.layout, submodel, part)
            for p, part in self._parts.items()
            if part != submodel
        }

    def draw(self) -> float:
        """The next batch's width, each as likely."""
        widths = tuple(self._parts)
        return widths[int(self._rng.integers(len(widths)))]

    def loss(self, network: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy at the width drawn."""
        return functional.cross_entropy(self._output(self.draw(), network, inputs), labels)

    def distilling_loss(self, network: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the network itself, and what it teaches the width drawn; that alone is left to learn.

        The first has gone backward before the second begins: the two forward passes are never in memory at once.
        """
        teacher = self._output(self._largest, network, inputs)
        hard, width = functional.cross_entropy(teacher, labels), self.draw()
        if width not in self.inner:
            return hard
        hard.backward()  # type: ignore[no-untyped-call]
        return hard.detach() + soft_cross_entropy(self._output(width, network, inputs), teacher)

    def _output(self, width: float, network: nn.Module, inputs: Tensor) -> Tensor:
        self._samples[width] += len(inputs)
        logits: Tensor = self.inner[width](network, inputs) if width in self.inner else network(inputs)
        return logits

    def macs(self) -> int:
        """Multiply-accumulates so far: every width's passes, forward and backward."""
        return sum(training_macs(self._task.macs(self._parts[p]), num) for p, num in self._samples.items())


def widest_student(task: Task, submodel: Submodel) -> Submodel | None:
    """The largest part that a client's own may teach; None: nothing is inside it, or there is no distillation."""
    if not task.method.self_distillation:
        return None
    parts = (prefix_ratio(task.layout, ratio) for ratio in task.method.ratios)
    return next((part for part in parts if part != submodel and within(part, submodel)), None)


def memory_beside(task: Task, submodel: Submodel) -> int:
    """Bytes that must be free for distillation, beside those for plain training of the part; at most.

    In the student's pass all that its own training would hold is there, but its weights and what the optimiser
    remembers are those of the whole part, of which gradients are there as well; and where a slice's gradient goes
    back, one tensor's, as large as the part's, once an axis.
    """
    student, training = widest_student(task, submodel), task.training
    if student is None:
        return 0
    remembered = 2 if training.optimizer == "adam" else int(training.momentum > 0)
    plain, alone = (
        training_memory(task.factory, task.layout, part, task.input_shape, training) for part in (submodel, student)
    )
    more = (2 + remembered) * part_bytes(task.layout, submodel) - (1 + remembered) * part_bytes(task.layout, student)
    largest = BYTES_PER_NUMBER * max(narrow_sizes(task.layout, submodel).values())
    return max(0, memory_budget(alone + more + 2 * largest) - memory_budget(plain))


def local_update(job: Job, task: Task, data: ClientData) -> Update:
    """Train the part, a width a batch."""
    method: FjORDConfig = task.method
    require_memory(job.device, job.submodel, lambda part: task.memory_to_train(part) + memory_beside(task, part))
    network = task.network(job.arrays)
    widths = OrderedDropout(task, job.submodel, float(str(job.config["ratio"])), job.seed)
    if method.self_distillation:  # accuracy is then that of p_max, the one that every batch trains
        trained = train_network(network, job, task, data.train, widths.distilling_loss)
    else:
        answering = [network, *(inner.skeleton for inner in widths.inner.values())]
        trained = train_network(network, job, task, data.train, widths.loss, answering=answering)
    update = make_update(job, task, job.submodel, job.arrays, trained, float(len(data.train.labels)))
    return replace(update, metrics={**update.metrics, "macs": float(widths.macs())})
