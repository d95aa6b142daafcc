"""What `flexfed profile` shows of a measured device: a table, its SuperNode's node-config, and which widths fit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from flexfed.budget import Budget
from flexfed.cost import num_parameters
from flexfed.devices import Device
from flexfed.jobs import Task
from flexfed.measure import Measurement
from flexfed.models import model_factory
from flexfed.report import aligned, duration, scaled
from flexfed.select import prefix_ratio
from flexfed.training import Training
from flexfed.units import trace_layout

RATIOS = (1.0, 0.5, 0.25, 0.125, 0.0625)

NO_LINK = (
    "link-bytes-s is left out, and the run's fleet says it: no device can measure its link to the server alone; "
    "give --link-bytes-s if you know it."
)


@dataclass(frozen=True)
class Width:
    """A network at one width: the ratio of the channels kept, and what training it takes.

    Attributes:
        ratio: of every group's units.
        parameters: numbers in its tensors.
        memory_bytes: to receive and train it.
        fits: whether the device has that much.
    """

    ratio: float
    parameters: int
    memory_bytes: int
    fits: bool


@dataclass(frozen=True)
class Fitting:
    """Which widths of a network a device can train; `largest` is the widest ratio, None if none fits."""

    title: str
    widths: tuple[Width, ...]
    largest: float | None

    def to_text(self) -> str:
        """A table of widths, and the largest that fits."""
        head = ("width", "parameters", "memory", "fits")
        cells = [
            (f"{w.ratio:g}", scaled(w.parameters), scaled(w.memory_bytes, "B"), "yes" if w.fits else "no")
            for w in self.widths
        ]
        largest = "no width fits" if self.largest is None else f"largest width that fits: {self.largest:g}"
        return "\n".join([self.title, *aligned([head, *cells]), largest])

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        widths = [{key.replace("_", "-"): value for key, value in asdict(w).items()} for w in self.widths]
        return {"network": self.title, "widths": widths, "largest": self.largest}


def fitting_widths(
    model: str, num_classes: int, input_shape: tuple[int, ...], batch_size: int, memory_bytes: int
) -> Fitting:
    """See which widths of a network can be trained in `memory_bytes`, by the rule that runs follow.

    Args:
        model: a name `flexfed.models.build_model` knows.
        num_classes: of the classifier.
        input_shape: one sample's, without the batch.
        batch_size: of training, with the other settings at their defaults (SGD with momentum).
        memory_bytes: free beyond the base.

    Raises:
        ValueError: the network is unknown, or cannot be cut.
    """
    factory = model_factory(model, num_classes, input_shape)
    layout = trace_layout(factory, input_shape)
    task = Task(factory, layout, input_shape, num_classes, Training(batch_size=batch_size), method=None)
    budget, device = Budget(task), Device(0, memory_bytes=memory_bytes)

    def width(ratio: float) -> Width:
        part = prefix_ratio(layout, ratio)
        return Width(ratio, num_parameters(layout, part), budget.memory(part), budget.bears(device, part))

    size = "x".join(map(str, input_shape))
    return Fitting(
        f"{model}, {num_classes} classes, inputs {size}, batch {batch_size}",
        tuple(map(width, RATIOS)),
        budget.largest(device, lambda ratio: prefix_ratio(layout, ratio)),
    )


def parse_shape(text: str) -> tuple[int, ...]:
    """Sizes of one sample: "3x32x32" -> (3, 32, 32).

    Raises:
        ValueError: it is not written so.
    """
    sizes = text.split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"an input's sizes are written 3x32x32 (channels, height, width), got {text!r}")
    return tuple(map(int, sizes))


def to_text(measured: Measurement, node_config: str, link_known: bool, fitting: Fitting | None = None) -> str:
    """The table of a measurement, the widths of a network, then the words to start a SuperNode with."""
    limit = measured.binding
    where = limit.kind if limit.kind == "machine" else f"{limit.kind} {limit.name}"
    threads = "1 thread" if measured.threads == 1 else f"{measured.threads} threads"
    rows = [
        ("memory free for training", scaled(measured.memory_bytes, "B"), f"limited by the {where}"),
        ("base", scaled(measured.base_bytes, "B"), "Python, torch and the app, already loaded; no data, no network"),
        ("speed", scaled(measured.speed_macs_s, "MAC/s"), f"{threads}; {measured.hardware}, {measured.cores} cores"),
        ("time of the measurement", duration(measured.seconds), ""),
    ]
    command = f"flower-supernode --node-config '{node_config}'"
    parts = ["\n".join(aligned(rows)), fitting.to_text() if fitting else "", command, "" if link_known else NO_LINK]
    return "\n\n".join(part for part in parts if part)


def to_json(measured: Measurement, node_config: str, fitting: Fitting | None = None) -> dict[str, Any]:
    """The same as plain values, with every limit on the memory."""
    values = {key.replace("_", "-"): value for key, value in asdict(measured).items() if key != "limits"}
    limits = [{"kind": kind, "name": name, "free-bytes": free} for kind, name, free in measured.limits]
    fits = {"fitting": fitting.to_json()} if fitting else {}
    return {"memory-bytes": measured.memory_bytes, "limits": limits, **values, **fits, "node-config": node_config}
