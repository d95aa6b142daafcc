"""How much a network's units do, measured on its ReLUs: the average percentage of zeros (APoZ).

"Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep Architectures" (Hu, Peng,
Tai, Tang, 2016, https://arxiv.org/abs/1607.03250); FlexFL (`flexfed.methods.flexfl`) turns it into widths.
Measured per ReLU *call*: one module may run several times in a forward pass, and a ReLU need not be a module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from flexfed.compute import place_of
from flexfed.narrowing import narrow
from flexfed.networks import Factory
from flexfed.select import RatioGroup
from flexfed.units import Layout

_RELUS = frozenset({F.relu, F.relu6, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_})
_HARDTANHS = frozenset({F.hardtanh, F.hardtanh_})  # a ReLU6 module calls hardtanh(0, 6)
_OUTPUTS_FIRST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # by the weight's axes: a bias may be added


@dataclass(frozen=True, eq=False)
class ReluStatistics:
    """What one ReLU call of a forward pass did on a data set.

    Attributes:
        module: dotted name of the ReLU module, or of the module that called the function ('' = the network).
        apoz: float64, (channels,), in [0, 1]; 1 = never fires. Channels are axis 1 of the output.
    """

    module: str
    apoz: np.ndarray


class ReluCalls(TorchFunctionMode):
    """Sees every ReLU, ReLU6 or hardtanh-from-0 of a forward pass, module or function, in call order.

    A context manager. Blind to code that torch does not dispatch: scripted modules, `clamp` used as a ReLU,
    and modules run by `module.forward(...)` keep the name of their caller.

    Args:
        model: the network; its modules carry hooks until the context ends.
        observe: called with (module name, output) at once, before an in-place operation can change it.
    """

    def __init__(self, model: nn.Module, observe: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._model = model
        self._observe = observe
        self._running: list[str] = []
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> ReluCalls:
        for name, module in self._model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(self._entering(name)))
            self._hooks.append(module.register_forward_hook(self._leaving, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self._running and _is_relu(func, args, kwargs):
            self._observe(self._running[-1], output)
        return output

    def _entering(self, name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, inputs: self._running.append(name)

    def _leaving(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._running.pop()


def _is_relu(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if func not in _HARDTANHS:
        return func in _RELUS
    lower = kwargs.get("min_val", args[1] if len(args) > 1 else -1.0)
    return bool(lower == 0)


def apoz(model: nn.Module, batches: Iterable[Tensor]) -> list[ReluStatistics]:
    """Average percentage of zero activations of every ReLU call, per channel.

    Only exact zeros count; a ReLU6 that saturates at 6 fires. Every sample weighs the same, however it is
    batched. The mean over a call's channels is FlexFL's APoZ of that ReLU. Batch norm without running
    statistics (`track_running_stats=False`) uses those of the batch here too, so then the batch size matters.

    Args:
        model: in eval mode for the call, every module's mode restored after.
        batches: inputs, each (n, ...), moved to the model's device.

    Returns:
        One entry for each ReLU call of a forward pass, in call order.

    Raises:
        ValueError: no data; other ReLUs on another batch; or an output without channels.
    """
    num, names, totals = 0, list[str](), list[np.ndarray]()
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for inputs in batches:
            called, counts = _zeros(model, inputs)
            if num and called != names:
                raise ValueError(f"expected the same ReLU calls on every batch ({names}), got {called}")
            names, totals = called, [a + b for a, b in zip(totals, counts, strict=True)] if num else counts
            num += len(inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if num == 0:
        raise ValueError("APoZ needs data: expected at least one batch of inputs, got none")
    return [ReluStatistics(name, total / num) for name, total in zip(names, totals, strict=True)]


def _zeros(model: nn.Module, inputs: Tensor) -> tuple[list[str], list[np.ndarray]]:
    """Name of each ReLU call, and its channels' fractions of zeros summed over the samples of one batch."""
    names: list[str] = []
    counts: list[np.ndarray] = []

    def observe(name: str, output: Tensor) -> None:
        zeros = (_by_channel(output, name, len(inputs)) == 0).sum(dim=(0, 2))
        names.append(name)
        counts.append(zeros.double().cpu().numpy() / max(output[0, 0].numel(), 1))

    with torch.no_grad(), ReluCalls(model, observe):
        model(inputs.to(place_of(model)))
    return names, counts


def _by_channel(output: Tensor, name: str, num_samples: int) -> Tensor:
    """(n, channels, ...) as (n, channels, positions)."""
    if output.ndim < 2 or len(output) != num_samples:
        shape = tuple(output.shape)
        raise ValueError(f"ReLU in {name!r} gives shape {shape}; expected ({num_samples}, channels, ...)")
    return output.reshape(num_samples, output.shape[1], -1)


def relu_units(factory: Factory, layout: Layout, example_shape: tuple[int, ...]) -> list[np.ndarray]:
    """Which unit each channel of each ReLU call is, found by watching which channels fall silent.

    A copy of the network in which every tensor is positive fires everywhere. Each run zeroes the entries of
    half of the units; the runs in which a channel is silent spell its unit's number. Nothing need be known of
    how the channels got there: residual sums, concatenation, gates, depthwise layers, flattening and pools
    keep silence.

    Args:
        factory: builds the network, as for `narrow`.
        layout: its numbering.
        example_shape: one input without the batch axis.

    Returns:
        For each ReLU call, in call order, int64 (channels,): unit numbers, -1 where there is no single unit.
    """
    words = _codewords(layout.num_units)
    probe, axes = _probe(factory, layout)
    runs = []
    for alive in words:
        _set_alive(probe, axes, alive)
        runs.append(_alive_channels(probe, example_shape))
    units = {word.tobytes(): unit for unit, word in enumerate(words.T)}
    return [
        np.array([units.get(word.tobytes(), -1) for word in np.stack(call, axis=1)], dtype=np.int64)
        for call in zip(*runs, strict=True)
    ]


def _codewords(num_units: int) -> np.ndarray:
    """A binary word for each unit, bool (bits, num_units): its number, then the count of zeros in it.

    This is Berger's code ("A note on error detection codes for asymmetric channels", Information and Control
    4, 1961): no word turns into another when bits are only lost (a channel starved of inputs) or only gained
    (one fed by several units), so such channels read as no unit instead of as a wrong one.
    """
    bits = max(1, (num_units - 1).bit_length())
    number = np.arange(num_units) >> np.arange(bits)[:, None] & 1
    zeros = bits - number.sum(axis=0)
    return np.concatenate([number, zeros >> np.arange(bits.bit_length())[:, None] & 1]).astype(bool)


_Axes = dict[str, tuple[np.ndarray | None, ...]]


def _probe(factory: Factory, layout: Layout) -> tuple[nn.Module, _Axes]:
    """The network in eval mode, fresh batch norm, and a bias wherever one fits: then it fires by itself."""
    probe = narrow(factory, {name: np.ones(shape, dtype=np.float32) for name, shape in layout.shapes.items()})
    axes = dict(layout.axes)
    for name, module in probe.named_modules():
        if isinstance(module, _OUTPUTS_FIRST) and module.bias is None:
            module.bias = nn.Parameter(torch.ones(len(module.weight)))
            axes[f"{name}.bias"] = axes[f"{name}.weight"][:1]
    return probe.eval(), axes


def _set_alive(probe: nn.Module, axes: _Axes, alive: np.ndarray) -> None:
    """Make every tensor positive, then zero what belongs to a silenced unit.

    Weights take means of their inputs and norms hardly count beside their bias: nothing overflows.
    """
    tensors = probe.state_dict()
    for name, units in axes.items():
        tensor = tensors[name]
        tensor.fill_(1 / tensor[0].numel() if tensor.ndim > 1 else 1.0 if name.endswith("bias") else 1e-3)
        for axis, numbers in enumerate(units):
            if numbers is not None:
                tensor.index_fill_(axis, torch.from_numpy(np.flatnonzero(~alive[numbers])), 0.0)


def _alive_channels(probe: nn.Module, example_shape: tuple[int, ...]) -> list[np.ndarray]:
    """For each ReLU call, bool (channels,): does the channel fire anywhere?"""
    calls: list[np.ndarray] = []

    def observe(name: str, output: Tensor) -> None:
        calls.append((_by_channel(output, name, 2) > 0).any(dim=2).any(dim=0).numpy())

    with torch.no_grad(), ReluCalls(probe, observe):
        probe(torch.ones(2, *example_shape))  # two samples, because batch statistics need more than one value
    return calls


def group_scores(
    statistics: Sequence[ReluStatistics],
    units: Sequence[np.ndarray],
    layout: Layout,
    ratio_groups: Sequence[RatioGroup],
) -> np.ndarray:
    """APoZ of each ratio group (A in FlexFL), float64 (groups,), in [0, 1].

    A group's ReLUs are those that run inside its modules, every call weighing the same. Where none does (a
    network without a table of its own: its groups hold convolutions and norms only), they are the calls whose
    channels are the group's units: mean over a unit's calls, then over units. A group that no ReLU measures
    takes the mean of the measured ones (ours: the released networks have a ReLU in every group).

    Args:
        statistics: what `apoz` measured.
        units: what `relu_units` found for the same network.
        layout: the network's numbering.
        ratio_groups: from `flexfed.select.ratio_groups`.

    Raises:
        ValueError: the two lists are not of the same calls, or no group is measured at all.
    """
    if [len(call.apoz) for call in statistics] != [len(call) for call in units]:
        raise ValueError(
            f"units and statistics must be of the same ReLU calls, got {len(units)} and {len(statistics)} "
            f"calls or other channel counts; measure both on the full network"
        )
    by_unit = _unit_means(statistics, units, layout.num_units)
    scores = np.array([_group_score(group, statistics, by_unit, layout) for group in ratio_groups])
    measured = ~np.isnan(scores)
    if not measured.any():
        raise ValueError("no ReLU of this network measures any group's APoZ; pass it as flexfl.scores")
    return np.where(measured, scores, scores[measured].mean())


def _unit_means(statistics: Sequence[ReluStatistics], units: Sequence[np.ndarray], num_units: int) -> np.ndarray:
    """Each unit's APoZ, the mean over the calls it takes part in; nan for a unit of no call."""
    total, calls = np.zeros(num_units), np.zeros(num_units)
    for call, numbers in zip(statistics, units, strict=True):
        known = numbers >= 0
        places = np.bincount(numbers[known], minlength=num_units)  # more than one after flattening
        zeros = np.bincount(numbers[known], weights=call.apoz[known], minlength=num_units)
        total += zeros / np.maximum(places, 1)
        calls += places > 0
    return np.where(calls > 0, total / np.maximum(calls, 1), np.nan)


def _group_score(group: RatioGroup, statistics: Sequence[ReluStatistics], by_unit: np.ndarray, layout: Layout) -> float:
    inside = [call.apoz.mean() for call in statistics if runs_inside(call.module, group.modules)]
    if inside:
        return float(np.mean(inside))
    names = {layout.group_of(f"{module}.weight") for module in group.widths}
    spans = [by_unit[span.start : span.stop] for name, span in layout.groups.items() if name in names]
    known = [score for span in spans for score in span[~np.isnan(span)]]
    return float(np.mean(known)) if known else float("nan")


def runs_inside(module: str, owners: Sequence[str]) -> bool:
    """Is a module, or a tensor of it, one of `owners` or below one of them (dotted names)?"""
    return any(owner and (module == owner or module.startswith(f"{owner}.")) for owner in owners)
