"""FlexFL: five nested networks, each group as narrow as it is silent and large.

"FlexFL: Heterogeneous Federated Learning via APoZ-Guided Flexible Pruning in Uncertain Scenarios" (Chen, Jia,
Hu, Xie, Li, Chen, IEEE TCAD 43(11), 2024, https://arxiv.org/abs/2407.12729). The server pre-trains on proxy
data, measures how silent each group is (`flexfed.importance`) and derives levels S, M-, M, L-, L, each a
prefix of the next. It dispatches S, M or L; a device short of resources trains the largest level it can hold
now, and its student also learns from the smaller networks inside it.

Differences from the released code (mastlab-T3S/FlexFL, cec0e6c), which the formulas follow: of the paper only abstract,
overview figure and two tables could be read. The option in brackets undoes one:
- Levels go to devices nominally able to hold them; there to ids from 0 / 4 / 14 on [eligibility]. They are
  drawn from those left, largest level first; there all is redrawn until none repeats, which in small fleets
  hardly ends and starves L [dispatch]. The device shrinks the model; there the server decides.
- Proxy data are kept apart from evaluation; there they are 80 % of the test set [proxy-source]. One Adam, 60
  epochs; there a new Adam every epoch, 100 epochs by default and 200 on its command lines.
- A device that tells its memory also shrinks to what is free of that; the paper counts parameters alone.
- Strict sizes exist, and stand in where no whole strength hits a target; there an assertion fails.
- Groups keep a unit, shortcuts are the full network's, submodels are slices from the first round on; there
  groups vanish, shortcuts come and go, and the first pool is random.
- The divergence is written out, not left to `kl_div`'s mean; there a weight below 1 becomes 0, and teachers
  get gradients, and in the first round dropout.
- A device with less than a batch trains on it; there it trains nothing and votes.
- Tests normalise by statistics of each level on the proxy data; there by those of the test batch [batch-norm].
- Last round, last ten and best are told; there the round that is best on the test set alone.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexfed.inner import InnerNetwork
from flexfed.jobs import Job, Task, Update, free_memory_of, make_update, shrink, train_network
from flexfed.select import RatioGroup
from flexfed.submodel import Submodel, unpack

if TYPE_CHECKING:
    from flexfed.data import ClientData

LEVELS = ("S", "M-", "M", "L-", "L")
MAIN_LEVELS = (0, 2, 4)
LITERAL_IDS = {0: 0, 2: 4, 4: 14}  # level -> first device of the released code: a test-bed of 4 + 10 + 3
Size = Callable[[np.ndarray], float]
"""Ratios -> parameters as a share of the full network's, output layer in neither; rises with the ratios."""
_log = logging.getLogger("flwr")


@dataclass(frozen=True)
class FlexFLConfig:
    """FlexFL's knobs, `flexfl.<name>` in the configuration."""

    targets: tuple[float, ...] = (0.25, 0.5)  # sizes of S and M, as shares of the full network
    shortage: float = 0.10  # how much smaller M- and L- are than M and L (Gamma)
    window: float = 0.05  # how far from its target a size on the grid may be (tau)
    sizes: Literal["grid", "strict"] = "grid"  # first whole strength in the window; or never over the target
    scores: tuple[float, ...] = ()  # APoZ of each group; empty = measure
    kd_weight: float = -1.0  # lambda; 0 = off; -1 = 10, with "batchmean" 10 / classes, which is the same loss
    kd_temperature: float = 3.0
    kd_reduction: Literal["literal", "batchmean"] = "literal"  # over batch * classes as released; or batch
    kd_teachers: Literal["all", "main"] = "all"  # smaller levels, as released; or as in the figure
    dispatch: Literal["largest-first", "redraw"] = "largest-first"
    eligibility: Literal["class", "literal"] = "class"  # by nominal capacity; or the released constants
    drop_below: float = 0.0  # a device with less percent free refuses; 0 = never
    proxy_source: Literal["proxy", "test"] = "proxy"  # "test" only to reproduce the released code
    pretrain_epochs: int = 60
    pretrain_learning_rate: float = 1e-3
    pretrain_batch_size: int = 50

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(FlexFLConfig).items():
            if known := [value for value in get_args(hint) if isinstance(value, str)]:
                self._require(name, getattr(self, name) in known, f"one of {', '.join(known)}")
        rising = len(self.targets) == 2 and 0 < self.targets[0] <= self.targets[1] < 1
        self._require("targets", rising, "two rising sizes between 0 and 1, of S and M")
        small, lower, medium, large, _ = self.level_targets
        self._require("shortage", small <= lower <= medium <= large <= 1, "such that S <= M- <= M <= L- <= L")
        self._require("window", 0 <= self.window < 1, "in [0, 1)")
        self._require("scores", all(0 <= a <= 1 for a in self.scores), "APoZ values in [0, 1]")
        self._require("kd_weight", self.kd_weight >= 0 or self.kd_weight == -1, ">= 0, or -1 for its default")
        self._require("drop_below", 0 <= self.drop_below <= 100, "a percentage, 0 to 100")
        self._require("pretrain_epochs", self.pretrain_epochs >= 0, ">= 0")
        self._require("pretrain_batch_size", self.pretrain_batch_size >= 2, "at least 2")
        for name in ("kd_temperature", "pretrain_learning_rate"):
            self._require(name, getattr(self, name) > 0, "> 0")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"flexfl.{name.replace('_', '-')} must be {rule}, got {getattr(self, name)!r}")

    @property
    def level_targets(self) -> tuple[float, ...]:
        """Nominal size of each level, as a share of the full network."""
        small, medium = self.targets
        return small, round(medium - self.shortage, 12), medium, round(1 - self.shortage, 12), 1.0


def given_scores(scores: Sequence[float], groups: Sequence[RatioGroup]) -> tuple[float, ...]:
    """APoZ of each group as the user gave them; one number stands for all of them, none for none.

    Raises:
        ValueError: neither one nor one for each group; lists the groups.
    """
    if len(scores) == 1:
        return tuple(scores) * len(groups)
    if scores and len(scores) != len(groups):
        names = ", ".join(group.name for group in groups)
        raise ValueError(
            f"flexfl.scores needs one number, or one for each of {len(groups)} groups ({names}), got {len(scores)}"
        )
    return tuple(scores)


def keep_scores(apoz: Sequence[float] | np.ndarray, num_parameters: Sequence[int] | np.ndarray) -> np.ndarray:
    """How much of each group to keep: s_i = 1 - A_i ln(P_i) / ln(max P). Silent, large groups lose most.

    Args:
        apoz: A, (groups,), in [0, 1].
        num_parameters: P, (groups,), at least 1.

    Returns:
        float64, (groups,), in [0, 1].

    Raises:
        ValueError: not one score in [0, 1] for each group.
    """
    silence, size = np.asarray(apoz, dtype=np.float64), np.asarray(num_parameters, dtype=np.float64)
    if silence.shape != size.shape or not ((silence >= 0) & (silence <= 1)).all() or size.min() < 1:
        raise ValueError(f"flexfl.scores: expected one APoZ in [0, 1] for {size.size} groups, got {silence}")
    return np.asarray(1 - silence * np.log(size) / np.log(max(size.max(), 2)))


def ratios(scores: np.ndarray, strength: float) -> np.ndarray:
    """Kept fraction of each group, (groups,), not rounded: r_i = clip(100 s_i / strength, 0.01, 1)."""
    return np.clip(scores * 100 / strength, 0.01, 1.0)


def grid_ratios(scores: np.ndarray, target: float, window: float, size: Size) -> np.ndarray | None:
    """Ratios at the first strength of 1, 2, ..., 199 whose size is within `window` of `target`, or None.

    Sizes fall as strength grows: it is the first one under the window's top, unless that misses its bottom.
    """
    first = 1 + bisect_left(range(1, 200), True, key=lambda g: size(ratios(scores, g)) <= target + window)
    found = ratios(scores, first)
    return found if first < 200 and size(found) >= target - window else None


def strict_ratios(scores: np.ndarray, target: float, size: Size, names: Sequence[str]) -> np.ndarray:
    """Ratios at the smallest strength, any positive number, whose size is at most `target` (ours).

    Raises:
        ValueError: 1 % of every group is more already, or groups of score 0 keep every size below `target`.
    """
    low, high = 0.01 / max(scores.max(), 0.01), 2 / min(scores[scores > 0], default=1.0)
    least, most = (size(ratios(scores, 100 / c)) for c in (low, high))
    if least > target:
        raise ValueError(f"flexfl.targets: {target} of the network is below 1 % of each group, {least:.3f}")
    if most < target:
        stuck = ", ".join(repr(names[i]) if names else str(i) for i, s in enumerate(scores) if s <= 0)
        raise ValueError(
            f"flexfl.targets: no widths reach {target} of the network, only {most:.3f}: group {stuck} keeps "
            f"1 % at any strength (largest group, APoZ 1); pass flexfl.scores below 1"
        )
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if size(ratios(scores, 100 / middle)) <= target else (low, middle)
    return ratios(scores, 100 / low)


def sized_ratios(scores: np.ndarray, target: float, size: Size, names: Sequence[str] = ()) -> np.ndarray:
    """Ratios of the largest network of at most `target`, any size in (0, 1]; where widths end below it, the widest."""
    if target >= 1:
        return np.ones(len(scores))
    widest = ratios(scores, 50 * min(scores[scores > 0], default=1.0))
    return strict_ratios(scores, min(target, size(widest)), size, names)


def build_pool(scores: np.ndarray, size: Size, config: FlexFLConfig, names: Sequence[str] = ()) -> list[np.ndarray]:
    """Ratios of each level, smallest first, nested; L's are all 1.

    `scores` are keep-scores, `size` takes widths as `flexfed.select.ratio_widths`, `names` are for errors.
    """
    pool = []
    for target in config.level_targets[:-1]:
        found = grid_ratios(scores, target, config.window, size) if config.sizes == "grid" else None
        if found is None:
            found = strict_ratios(scores, target, size, names)
            if config.sizes == "grid":
                _log.warning("FlexFL: no strength hits %s, strict sizes give %.3f", target, size(found))
        pool.append(found)
    return [*pool, np.ones(len(scores))]


def capable_level(percent: float, config: FlexFLConfig) -> int:
    """The largest level whose target is at most `percent` of the full network; level 0 is the floor."""
    return sum(round(percent, 9) >= round(100 * target, 9) for target in config.level_targets[1:])


def trained_level(sizes: Sequence[float], percent: float, config: FlexFLConfig) -> int | None:
    """The largest of rising `sizes` that `percent` free allows, the first one always. None: the device refuses."""
    if config.drop_below > 0 and percent < config.drop_below:
        return None
    return sum(round(percent, 9) >= round(size, 9) for size in sizes[1:])


def eligible(capacities: Mapping[int, float], config: FlexFLConfig) -> dict[int, list[int]]:
    """Main level -> partitions that may be sent it, ascending, from nominal percentages; S suits everyone."""
    if config.eligibility == "literal":
        return {level: sorted(p for p in capacities if p >= first) for level, first in LITERAL_IDS.items()}
    largest = {partition: capable_level(percent, config) for partition, percent in capacities.items()}
    return {level: sorted(p for p, most in largest.items() if most >= level) for level in MAIN_LEVELS}


def largest_first(able: Mapping[int, Sequence[int]], num: int, rng: np.random.Generator) -> dict[int, int]:
    """Partition -> level: draw `num` levels, largest first to a free able device, or dropped (ours)."""
    chosen: dict[int, int] = {}
    levels = rng.choice(sorted(able), size=num).tolist()
    for level in sorted(set(levels), reverse=True):
        free = [partition for partition in able[level] if partition not in chosen]  # once a level: fleets are large
        for _ in range(min(levels.count(level), len(free))):
            chosen[free.pop(int(rng.integers(len(free))))] = level
    return dict(sorted(chosen.items()))


def redraw(
    able: Mapping[int, Sequence[int]], num: int, rng: np.random.Generator, attempts: int = 10_000
) -> dict[int, int]:
    """Partition -> level as released: all anew until no device repeats; where hopeless, `largest_first`."""
    possible = num <= len(set().union(*able.values()))
    for _ in range(attempts if possible else 0):
        levels = [level for level in rng.choice(sorted(able), size=num).tolist() if able[level]]
        chosen = {able[level][int(rng.integers(len(able[level])))]: level for level in levels}
        if len(chosen) == num:
            return dict(sorted(chosen.items()))
    return largest_first(able, num, rng)


def teacher_levels(level: int, config: FlexFLConfig) -> tuple[int, ...]:
    """Levels that a student of `level` learns from: all smaller ones, or the main ones among them."""
    return tuple(j for j in range(level) if config.kd_teachers == "all" or j in MAIN_LEVELS)


def kd_loss(student: Tensor, teachers: Sequence[Tensor], temperature: float, weight: float, reduction: str) -> Tensor:
    """Divergence from l teachers: weight / l * sum_j T^2 / D * sum_bc q_j (ln q_j - ln p); 0 without any.

    Logits are (batch, classes), teachers' taken as constants; D = batch * classes ("literal") or batch.
    """
    log_p = F.log_softmax(student / temperature, dim=1)
    total = student.new_zeros(())
    for teacher in teachers:
        log_q = F.log_softmax(teacher.detach() / temperature, dim=1)
        total = total + (log_q.exp() * (log_q - log_p)).sum()
    divisor = student.numel() if reduction == "literal" else len(student)
    return weight * temperature**2 / (divisor * max(len(teachers), 1)) * total


def distillation_loss(student: Tensor, labels: Tensor, teachers: Sequence[Tensor], config: FlexFLConfig) -> Tensor:
    """Cross-entropy, always of weight 1, plus `kd_loss`; without teachers cross-entropy alone."""
    hard = F.cross_entropy(student, labels)
    if not teachers or config.kd_weight == 0:
        return hard
    own = 10.0 if config.kd_reduction == "literal" else 10.0 / student.shape[1]
    weight = own if config.kd_weight == -1 else config.kd_weight
    return hard + kd_loss(student, teachers, config.kd_temperature, weight, config.kd_reduction)


def local_update(job: Job, task: Task, data: ClientData) -> Update:
    """Shrink the part to the capacity and memory free now, then train it with cross-entropy and self-distillation."""
    config: FlexFLConfig = task.method
    levels = [unpack(task.layout, {"units": bits}) for bits in cast(list[bytes], job.config["levels"])]
    level = _affordable(job, task, levels)
    trains = levels[level]
    arrays = job.arrays if level == len(levels) - 1 else shrink(task.layout, job.submodel, trains, job.arrays)
    num_levels = int(cast(int, job.config["num-levels"]))  # of the pool; what follows them teaches nobody
    teachers = [levels[j] for j in teacher_levels(min(level, num_levels), config)] if config.kd_weight else []
    views = [Teacher(task, trains, teacher) for teacher in teachers]

    def loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        opinions = [teacher(model, inputs) for teacher in views]
        return distillation_loss(model(inputs), labels, opinions, config)

    trained = train_network(task.network(arrays), job, task, data.train, loss)
    macs = trained.num_samples * sum(task.macs(teacher) for teacher in teachers)
    return make_update(job, task, trains, arrays, trained, float(len(data.train.labels)), macs)


def _affordable(job: Job, task: Task, levels: Sequence[Submodel]) -> int:
    """The largest level that the device can train at this moment.

    Raises:
        RuntimeError: less than `drop-below` of the network is free, or less memory than the smallest level needs.
    """
    config: FlexFLConfig = task.method
    percent = 100 * job.device.capacity_now(np.random.default_rng([job.seed, 1]))
    level = trained_level(cast(list[float], job.config["sizes"]), percent, config)
    if level is None:
        raise RuntimeError(
            f"{percent:.0f} % of the network free, flexfl.drop-below is {config.drop_below}: not training"
        )
    if job.device.memory_bytes == math.inf and not job.device.measure_memory:
        return level
    needs = [task.memory_to_train(submodel) for submodel in levels[: level + 1]]
    free = free_memory_of(job.device, job.seed)  # after the costs: tracing a network loads some of torch
    fitting = [j for j, needed in enumerate(needs) if needed <= free]
    told = f"level {level} needs {needs[level] / 1e6:.0f} MB to train, {free / 1e6:.0f} MB are free"
    if not fitting:
        raise RuntimeError(f"out of memory: {told}, and the smallest level needs {needs[0] / 1e6:.0f} MB")
    if fitting[-1] < level:
        _log.info("partition %s: %s; training level %s", job.device.partition, told, fitting[-1])
    return fitting[-1]


class Teacher(InnerNetwork):
    """A smaller level inside the student."""

    def __init__(self, task: Task, student: Submodel, level: Submodel):
        super().__init__(task.factory, task.layout, student, level)
        self.skeleton.eval()

    @torch.no_grad()
    def __call__(self, network: nn.Module, inputs: Tensor) -> Tensor:
        """Logits of the smaller network on a batch, without dropout and without gradients."""
        return super().__call__(network, inputs)
