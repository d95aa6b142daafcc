"""What `flexfed levels` shows: a network's unit groups, and what each level of it costs to send, run and train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from flexfed.budget import Budget
from flexfed.checkpoint import Checkpoint, load_checkpoint, refuse_other_network
from flexfed.codecs import PLAIN
from flexfed.config import Experiment, read
from flexfed.cost import message_bytes, num_parameters, training_memory
from flexfed.jobs import Task
from flexfed.methods.heterofl import LEVELS, HeteroFLConfig
from flexfed.models import MODELS
from flexfed.networks import build_on_meta
from flexfed.overrides import Scalar
from flexfed.report import aligned, percent, scaled
from flexfed.runs import Run, load_run
from flexfed.select import prefix_ratio
from flexfed.submodel import Submodel, full, unpack
from flexfed.training import Training
from flexfed.units import out_axis

_DIGITS, _MNIST, _CIFAR = ((1, 8, 8), "as in digits"), ((1, 28, 28), "as in MNIST"), ((3, 32, 32), "as in CIFAR")
_WINDOWS, _IMAGENET = ((3, 200), "windows of an accelerometer"), ((3, 224, 224), "as in ImageNet")
NATURAL_INPUTS: Mapping[str, tuple[tuple[int, ...], str]] = {
    **{name: _CIFAR for name in MODELS if name.startswith(("flexfl-", "cifar-"))},
    "heterofl-conv": _MNIST,
    "heterofl-conv-quarter": _MNIST,
    "heterofl-resnet18": _CIFAR,
    "fedlps-cnn": _MNIST,
    "fedlps-vgg11": _CIFAR,
    "fedlps-vgg13": _CIFAR,
    "fedlps-vgg16": ((3, 64, 64), "as in Tiny-ImageNet"),
    "cnn": _DIGITS,
    "cnn1d": _WINDOWS,
    "inception_v3": ((3, 299, 299), "as in its paper"),
}
"""Network -> one sample's shape where nobody says another, and why this one."""

LISTED = 80  # characters of a group's modules on its line

LEGEND = (
    "one way: bytes of a message with it, at most; MACs: of one sample's forward pass;\n"
    "training memory: of tensors at the worst moment; must be free: on a device, to receive and train it."
)


@dataclass(frozen=True)
class Group:
    """Tied units of a network: a submodel has the same ones of them in each of `modules`.

    Attributes:
        name: of the group.
        units: how many.
        fixed: class outputs, which every level keeps.
        modules: whose outputs these units are.
    """

    name: str
    units: int
    fixed: bool
    modules: tuple[str, ...]


@dataclass(frozen=True)
class LevelCost:
    """What one level asks for.

    Attributes:
        level: its name.
        ratio: kept fraction of each group's units; None where a level is no such fraction.
        parameters: numbers in its tensors.
        share: the same as a share of the network's.
        message_bytes: one way, at most.
        macs: multiply-accumulates of one sample's forward pass.
        training_bytes: tensors alive at the worst moment of a training step.
        memory_bytes: what must be free on a device to receive and train it.
    """

    level: str
    ratio: float | None
    parameters: int
    share: float
    message_bytes: int
    macs: int
    training_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class Overview:
    """A network's groups and levels.

    Attributes:
        title: which network.
        inputs: where the shape of its inputs is from; empty = it was given.
        task: the network and how it is trained.
        groups: in the order of their units.
        costs: of each level.
    """

    title: str
    inputs: str
    task: Task
    groups: tuple[Group, ...]
    costs: tuple[LevelCost, ...]

    def to_text(self) -> str:
        """What it is and how it is trained, the groups, one line each, and the table of levels."""
        layout, task = self.task.layout, self.task
        size = "x".join(map(str, task.input_shape)) + (f" ({self.inputs})" if self.inputs else "")
        head = (
            f"{self.title}: {num_parameters(layout, full(layout)):,} parameters, {layout.num_units:,} units in "
            f"{len(self.groups)} groups\n{task.num_classes} classes; inputs {size}; {_training(task.training)}"
        )
        groups = [(g.name, str(g.units), _listed(g.modules) + _remark(g)) for g in self.groups]
        return "\n\n".join(
            [
                head,
                "\n".join(aligned([("group", "units", "tied: outputs of"), *groups])),
                "\n".join(aligned(_rows(self.costs))),
                LEGEND,
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, nothing abbreviated."""
        task = self.task
        return {
            "network": self.title,
            "classes": task.num_classes,
            "input-shape": list(task.input_shape),
            "input-assumed": self.inputs,
            "training": _hyphened(asdict(task.training)),
            "groups": [_hyphened(asdict(group)) for group in self.groups],
            "levels": [_hyphened(asdict(cost)) for cost in self.costs],
        }


def _hyphened(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("_", "-"): value for key, value in values.items()}


def _training(training: Training) -> str:
    momentum = f", momentum {training.momentum:g}" if training.optimizer == "sgd" and training.momentum else ""
    return f"batch {training.batch_size}, {training.optimizer}{momentum}"


def _remark(group: Group) -> str:
    return "  [class outputs: whole in every level]" if group.fixed else ""


def _listed(names: Sequence[str]) -> str:
    """As many names as there is room for, and how many more there are."""
    shown = next((n for n in range(len(names), 1, -1) if len(_folded(names[:n])) <= LISTED), 1)
    return _folded(names[:shown]) + (f" and {len(names) - shown} more" if shown < len(names) else "")


def _folded(names: Sequence[str]) -> str:
    """Neighbours of one parent together: "layer1.0.{conv2, bn2}"."""
    found = [(parent, list(group)) for parent, group in groupby(names, lambda name: name.rpartition(".")[0])]
    return ", ".join(
        f"{parent}.{{{', '.join(name.rpartition('.')[2] for name in group)}}}"
        if parent and len(group) > 1
        else ", ".join(group)
        for parent, group in found
    )


def _rows(costs: Iterable[LevelCost]) -> list[tuple[str, ...]]:
    head = ("level", "ratio", "parameters", "share", "one way", "MACs", "training memory", "must be free")
    rows = [head, *map(_row, costs)]
    return rows if any(c.ratio is not None for c in costs) else [(row[0], *row[2:]) for row in rows]


def _row(cost: LevelCost) -> tuple[str, ...]:
    sizes = (scaled(n, "B") for n in (cost.training_bytes, cost.memory_bytes))
    ratio = "" if cost.ratio is None else f"{cost.ratio:g}"
    sent = scaled(cost.message_bytes, "B")
    return (cost.level, ratio, f"{cost.parameters:,}", percent(cost.share), sent, scaled(cost.macs), *sizes)


# --- of a network by name -----------------------------------------------------------------------------------------


def natural_input(model: str) -> tuple[tuple[int, ...], str]:
    """A shape of inputs that suits a network, and what it is; 3x32x32 for one that nothing is known of."""
    if model in NATURAL_INPUTS:
        return NATURAL_INPUTS[model]
    return ((3, 32, 32), "nothing is known of this network's") if ":" in model else _IMAGENET


def overview_of_model(
    model: str, num_classes: int, input_shape: tuple[int, ...] | None, values: Mapping[str, Scalar]
) -> Overview:
    """The groups of a network, and HeteroFL's levels of it.

    Args:
        model: a name `flexfed.models.build_model` knows.
        num_classes: of the classifier.
        input_shape: one sample's, without the batch; None = the network's natural one.
        values: a run configuration, for how it is trained and for `heterofl.ratios`; absent keys have their defaults.

    Raises:
        ValueError: the network is unknown, does not take the inputs, or cannot be cut; or an impossible value.
    """
    shape, why = (input_shape, "") if input_shape else natural_input(model)
    ratios = read(HeteroFLConfig, values, "heterofl.").ratios
    task = Experiment.read({**values, "model": model}).task(num_classes, shape)
    costs = [cost_of(task, LEVELS[i], prefix_ratio(task.layout, ratio), ratio) for i, ratio in enumerate(ratios)]
    return Overview(model, f"assumed, {why}; --input says another" if why else "", task, groups_of(task), tuple(costs))


def groups_of(task: Task) -> tuple[Group, ...]:
    """A network's unit groups, and the modules whose output channels each ties together."""
    layout, model = task.layout, build_on_meta(task.factory)
    members: dict[str, dict[str, None]] = {name: {} for name in layout.groups}
    for tensor in layout.shapes:
        for group in layout.groups_of(tensor, out_axis(model, tensor)):
            members[group][tensor.rpartition(".")[0] or tensor] = None
    return tuple(
        Group(name, len(span), name in layout.fixed, tuple(members[name]) or (name,))
        for name, span in layout.groups.items()
    )


def cost_of(task: Task, level: str, part: Submodel, ratio: float | None = None, codec: str = PLAIN) -> LevelCost:
    """What a level asks for, by the rules that runs follow.

    Args:
        task: the network and how it is trained.
        level: its name.
        part: its submodel.
        ratio: kept fraction of each group's units; None where it is no such fraction.
        codec: how it travels.
    """
    layout, budget = task.layout, Budget(task, codec=codec)
    return LevelCost(
        level,
        ratio,
        num_parameters(layout, part),
        budget.share(part),
        message_bytes(layout, part, codec),
        task.macs(part),
        training_memory(task.factory, layout, part, task.input_shape, task.training),
        budget.memory(part),
    )


# --- of a run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunLevels:
    """The levels of a run, as its newest checkpoint has them.

    Attributes:
        run: its folder, read.
        checkpoint: the newest.
        task: the run's network, and how it is trained.
        parts: level -> its submodel, smallest first; the last one is what the run reports.
    """

    run: Run
    checkpoint: Checkpoint
    task: Task
    parts: Mapping[str, Submodel]


def read_levels(folder: str | Path) -> RunLevels:
    """The levels of a run, finished or not.

    Raises:
        ValueError: no run folder, no checkpoint that can be read, one of another network, or a run whose method has
            no levels.
    """
    run = load_run(folder)
    checkpoint = load_checkpoint(run.path / "checkpoint")
    if checkpoint is None:
        raise ValueError(
            f"the run in {run.path} has no checkpoint: the first is written before its first round; "
            f"go on with it: flexfed run -c \"resume='{run.path}'\""
        )
    if not checkpoint.levels:
        raise ValueError(
            f"the run in {run.path} is one of {checkpoint.facts['strategy']}, which has no levels; its network: "
            f"flexfed.stitching.saved.load_stitched({str(run.path / 'model.safetensors')!r})"
        )
    shape = tuple(int(size) for size in checkpoint.facts["input-shape"])
    task = Experiment.read(run.config).task(int(checkpoint.facts["num-classes"]), shape)
    refuse_other_network(checkpoint, task.layout)
    parts = {name: unpack(task.layout, packed) for name, packed in checkpoint.levels.items()}
    return RunLevels(run, checkpoint, task, parts)


def overview_of_run(folder: str | Path) -> Overview:
    """The groups of a run's network, and the levels that the run evaluates.

    Raises:
        ValueError: see `read_levels`.
    """
    found = read_levels(folder)
    facts = found.checkpoint.facts
    codecs = found.checkpoint.facts.get("level-codecs", {})
    costs = tuple(cost_of(found.task, n, part, codec=codecs.get(n, PLAIN)) for n, part in found.parts.items())
    title = f"{facts['model']} of {found.run.path.name} ({facts['strategy']}, round {found.checkpoint.server_round})"
    return Overview(title, "", found.task, groups_of(found.task), costs)
