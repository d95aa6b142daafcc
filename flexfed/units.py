"""The numbering of a network's units (channels, neurons): which of them tie together, and where each stands.

Everything else in flexfed rests on this one object. A submodel is a set of unit numbers; extracting it is
indexing, averaging it is indexed adding, its cost is counting.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from flexfed.narrowing import resize
from flexfed.networks import (
    WAY_OUT,
    Factory,
    build_on_meta,
    is_depthwise,
    outputs,
    refuse_lost_buffers,
    refuse_uncuttable,
    travelling,
)

Arrays = dict[str, np.ndarray]
"""A state dict as numpy arrays."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where every unit of a network stands.

    Running statistics of batch norm are no part of it: they never travel, whoever evaluates computes them
    (`flexfed.batchnorm`). Compared by identity, for what is found of a layout is remembered by it.

    Attributes:
        groups: group name -> its unit numbers. Units of one group are tied channels: residual sums, depthwise
            convolutions and norms share them. A group is called after its first module.
        axes: tensor name -> for each axis the unit number of every position, or None where positions are no
            units (kernel axes, image channels). One unit may own many positions (flatten) and an axis may hold
            several groups (concatenation).
        shapes: tensor name -> full shape, in state-dict order: the order on the wire.
        fixed: groups that every dispatched submodel keeps whole: the network's outputs.
    """

    groups: Mapping[str, range]
    axes: Mapping[str, tuple[np.ndarray | None, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    fixed: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        spans = list(self.groups.values())
        if any(a.stop != b.start for a, b in pairwise(spans)) or (spans and spans[0].start != 0):
            raise ValueError(f"groups must number their units 0, 1, 2, ... without gaps, got {dict(self.groups)}")
        for name, shape in self.shapes.items():
            axes = self.axes.get(name, ())
            if len(axes) != len(shape) or any(a is not None and len(a) != n for a, n in zip(axes, shape, strict=True)):
                raise ValueError(f"axes of {name!r} do not fit its shape {shape}")
        object.__setattr__(self, "axes", _shared_axes(self.axes))

    @property
    def num_units(self) -> int:
        """Number of units in all groups."""
        return sum(len(span) for span in self.groups.values())

    @property
    def fixed_units(self) -> np.ndarray:
        """Bool, (num_units,): True for the units of fixed groups."""
        units = np.zeros(self.num_units, dtype=bool)
        for group in self.fixed:
            units[self.groups[group].start : self.groups[group].stop] = True
        return units

    def groups_of(self, tensor: str, axis: int = 0) -> tuple[str, ...]:
        """The groups that an axis of a tensor belongs to, none where its positions are no units.

        Raises:
            ValueError: unknown tensor.
        """
        if tensor not in self.axes:
            raise ValueError(f"no tensor {tensor!r} in this layout; it has {', '.join(list(self.axes)[:5])}, ...")
        units = self.axes[tensor][axis] if len(self.axes[tensor]) > axis else None
        if units is None:
            return ()
        present = np.zeros(self.num_units, dtype=bool)
        present[units] = True
        return tuple(g for g, span in self.groups.items() if present[span.start : span.stop].any())

    def group_of(self, tensor: str, axis: int = 0) -> str:
        """The one group that an axis of a tensor belongs to ('' where its positions are no units).

        Raises:
            ValueError: unknown tensor, or an axis that holds several groups (a norm behind a concatenation).
        """
        found = self.groups_of(tensor, axis)
        if len(found) > 1:
            raise ValueError(f"axis {axis} of {tensor!r} holds several groups: {', '.join(found)}")
        return found[0] if found else ""


def _shared_axes(
    axes: Mapping[str, tuple[np.ndarray | None, ...]],
) -> dict[str, tuple[np.ndarray | None, ...]]:
    """Equal axes as one object: what is found for one of them holds for all."""
    known: dict[bytes, np.ndarray] = {}
    return {n: tuple(u if u is None else known.setdefault(u.tobytes(), u) for u in own) for n, own in axes.items()}


def trace_layout(factory: Factory, example_shape: tuple[int, ...]) -> Layout:
    """Number the units of any network that Torch-Pruning's dependency graph can trace.

    Runs on the `meta` device: nothing is allocated, so a weak device can do it too. A network that carries a
    hand-written one as its attribute `layout` is not traced.

    Args:
        factory: builds the network.
        example_shape: one input without the batch axis.

    Raises:
        ValueError: names the module that cannot be cut (grouped convolution, layer norm, group norm, shared
            parameters, shapes written into the code), and the way out.
    """
    model = build_on_meta(factory).train(False)
    by_hand = getattr(model, "layout", None)
    if isinstance(by_hand, Layout):
        expected = {name: tuple(tensor.shape) for name, tensor in travelling(model).items()}
        if dict(by_hand.shapes) != expected:
            differ = sorted(set(by_hand.shapes.items()) ^ set(expected.items()))[:3]
            raise ValueError(f"the hand-written layout does not fit the network's tensors; they differ in {differ}")
        _check_narrow(factory, by_hand, example_shape)
        return by_hand
    refuse_uncuttable(model)
    refuse_lost_buffers(model)
    tensors = {name: tuple(t.shape) for name, t in travelling(model).items()}
    groups, axes, fixed = _numbered(model, tensors, example_shape)
    layout = Layout(groups, {n: tuple(a) for n, a in axes.items()}, tensors, fixed)
    _check_narrow(factory, layout, example_shape)
    return layout


def whole_layout(factory: Factory) -> Layout:
    """The layout of a network that nobody cuts: it has tensors, and one unit that stands for all of them.

    For methods that send the whole network (FedAvg), where `trace_layout` refuses it.
    """
    tensors = {name: tuple(t.shape) for name, t in travelling(build_on_meta(factory)).items()}
    axes: dict[str, tuple[np.ndarray | None, ...]] = {n: (None,) * len(shape) for n, shape in tensors.items()}
    return Layout({"network": range(1)}, axes, tensors, frozenset({"network"}))


def _numbered(
    model: nn.Module, tensors: Mapping[str, tuple[int, ...]], example_shape: tuple[int, ...]
) -> tuple[dict[str, range], dict[str, list[np.ndarray | None]], frozenset[str]]:
    """Walk the traced groups in state-dict order and give their channels consecutive numbers."""
    traced = _traced_groups(model, tensors, torch.zeros(2, *example_shape, device="meta"))
    position = {name: i for i, name in enumerate(tensors)}
    traced.sort(key=lambda group: min(position[name] for name, axis, _, _ in group if axis == out_axis(model, name)))
    axes: dict[str, list[np.ndarray | None]] = {name: [None] * len(shape) for name, shape in tensors.items()}
    groups: dict[str, range] = {}
    fixed: set[str] = set()
    start = 0
    for group in traced:
        outputs = [name for name, axis, _, _ in group if axis == out_axis(model, name)]
        title = min(outputs, key=position.__getitem__).rpartition(".")[0]
        stop = start + 1 + max(int(roots.max()) for _, _, _, roots in group)
        groups[title] = range(start, stop)
        if all(axis == out_axis(model, name) for name, axis, _, _ in group):
            fixed.add(title)  # units that feed no layer are the network's outputs
        for name, axis, places, roots in group:
            units = axes[name][axis]
            if tensors[name][axis] <= places.max():
                raise ValueError(
                    f"module {name.rpartition('.')[0]!r} cannot be traced: more channels reach {name!r} than "
                    f"the {tensors[name][axis]} it has{WAY_OUT}"
                )
            if units is None:
                units = axes[name][axis] = np.full(tensors[name][axis], -1, dtype=np.int64)
            units[places] = start + roots
        start = stop
    _refuse_untraced({name: units for name, units in axes.items() if not _is_one_slope(model, name)})
    return groups, axes, frozenset(fixed)


def _is_one_slope(model: nn.Module, tensor: str) -> bool:
    """One number for all channels alike: no axis to cut."""
    module = model.get_submodule(tensor.rpartition(".")[0])
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


def _refuse_untraced(axes: Mapping[str, list[np.ndarray | None]]) -> None:
    for name, units in axes.items():
        if any(u is not None and (u < 0).any() for u in units) or (units and units[0] is None):
            module = name.rpartition(".")[0]
            raise ValueError(f"module {module!r} cannot be traced: positions of {name!r} belong to no group{WAY_OUT}")


_Entry = tuple[str, int, np.ndarray, np.ndarray]  # tensor, axis, positions, unit of each within its group


def _traced_groups(
    model: nn.Module, tensors: Mapping[str, tuple[int, ...]], example: torch.Tensor
) -> list[list[_Entry]]:
    names = {id(module): name for name, module in model.named_modules()}
    try:
        graph, found = _dependency_groups(model, example)
    except Exception as error:  # the tracer fails in many ways; all of them end here, with the module's name
        where = _smallest_untraceable(model, example)
        raise ValueError(f"module {where!r} cannot be traced ({type(error).__name__}: {error}){WAY_OUT}") from error
    traced = [list(_entries(graph, group, names, tensors)) for group in found]
    return [group for group in traced if group]


def _dependency_groups(model: nn.Module, example: torch.Tensor) -> tuple[Any, list[Any]]:
    import torch_pruning as tp

    graph = tp.DependencyGraph().build_dependency(model, example, forward_fn=outputs)
    return graph, list(graph.get_all_groups(root_module_types=[nn.modules.conv._ConvNd, nn.Linear]))


def _smallest_untraceable(model: nn.Module, example: torch.Tensor) -> str:
    """The innermost module that cannot be traced by itself either; '' when only the whole cannot."""
    inputs: dict[str, torch.Tensor] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: inputs.update({name: args[0].detach()})

    handles = [m.register_forward_pre_hook(remember(name)) for name, m in model.named_modules() if name]
    with contextlib.suppress(Exception):
        model(example)
    for handle in handles:
        handle.remove()
    for name in sorted(inputs, key=lambda name: -name.count(".")):
        module = model.get_submodule(name)
        if list(module.children()):
            try:
                _dependency_groups(module, inputs[name])
            except Exception:  # this is the question asked
                return name
    return type(model).__name__


def _entries(
    graph: Any, group: Any, names: Mapping[int, str], tensors: Mapping[str, tuple[int, ...]]
) -> Iterator[_Entry]:
    """(tensor, axis, positions, units) of every tensor that a group's channels touch."""
    for item in group:
        module = item.dep.target.module
        if id(module) not in names or not list(module.parameters(recurse=False)):
            continue  # operations without parameters: sums, activations, flatten
        name = names[id(module)]
        if _is_one_slope(module, "weight"):
            continue
        places, roots = np.asarray(item.idxs), np.asarray(item.root_idxs)
        outgoing = graph.is_out_channel_pruning_fn(item.dep.handler) or not isinstance(
            module, nn.modules.conv._ConvNd | nn.Linear
        )
        if isinstance(module, nn.modules.conv._ConvNd) and is_depthwise(module):
            outgoing = True
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        for parameter in ("weight", "bias") if outgoing else ("weight",):
            tensor = f"{name}.{parameter}" if name else parameter
            if tensor in tensors:
                axis = int(outgoing == transposed) if parameter == "weight" else 0
                yield tensor, axis, places, roots


def out_axis(model: nn.Module, tensor: str) -> int:
    """The axis of a tensor that its module's outputs stand on."""
    module = model.get_submodule(tensor.rpartition(".")[0])
    return int(isinstance(module, nn.modules.conv._ConvTransposeNd) and tensor.endswith("weight"))


def _check_narrow(factory: Factory, layout: Layout, example_shape: tuple[int, ...]) -> None:
    """Run a half-width network on `meta`: a channel that the trace missed shows as a shape error there."""
    from flexfed.select import prefix_ratio
    from flexfed.submodel import narrow_shapes

    model = resize(build_on_meta(factory), narrow_shapes(layout, prefix_ratio(layout, 0.5)))
    running: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: running.append(name))
    try:
        model(torch.zeros(2, *example_shape, device="meta"))
    except Exception as error:
        last = running[-1] if running else ""
        raise ValueError(f"module {last!r} cannot be cut: at half width it fails with '{error}'{WAY_OUT}") from error
