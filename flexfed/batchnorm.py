"""Static batch norm: batch statistics while training, statistics of all the data for evaluation.

"HeteroFL: Computation and Communication Efficient Federated Learning for Heterogeneous Clients"
(Diao, Ding, Tarokh, ICLR 2021, arXiv 2010.01264), section 3. Running statistics never travel. Before an
evaluation every client sends the sums of its own batches, the server adds them up and puts the quotient
into the network it evaluates. The released code runs all the data through the network on the server; with
definition "batches" the sums give the same numbers when the batches are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flexfed.compute import place_of
from flexfed.units import Arrays

Definition = Literal["batches", "pooled"]
Statistics = dict[str, tuple[np.ndarray, np.ndarray]]
"""Batch norm layer -> (mean, unbiased variance), each float64 (channels,)."""
MOST_COUNT = 2.0**53
"""Of batches or values; beyond it float64 does not count."""
LARGEST = 1e30
"""Of a sum that a client sends: those of many clients, and their squares, still are numbers."""


@dataclass(frozen=True)
class BatchNormSums:
    """What one client knows of the statistics; sums of several clients add up (`add_sums`).

    Attributes:
        definition: "batches" (the released code): each batch counts the same; sums of batch means and of
            unbiased batch variances. "pooled": each value counts the same; sums of values and of squares.
        counts: layer -> number of batches ("batches") or of values per channel ("pooled").
        first: layer -> float64 (channels,), sum of batch means, or of values.
        second: layer -> float64 (channels,), sum of batch variances, or of squares.
    """

    definition: Definition
    counts: Mapping[str, int]
    first: Mapping[str, np.ndarray]
    second: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        if self.definition not in get_args(Definition):
            raise ValueError(f"definition must be one of {', '.join(get_args(Definition))}, got {self.definition!r}")


class _TooFewValuesError(Exception):
    """A batch leaves a layer with a single value per channel: no variance, so the batch is skipped."""


def norm_widths(model: nn.Module) -> dict[str, int]:
    """Number of channels of every batch norm layer, in module order."""
    return {name: layer.num_features for name, layer in _norms(model).items()}


def collect_sums(model: nn.Module, batches: Iterable[Tensor], definition: Definition = "batches") -> BatchNormSums:
    """Run data through the network and sum what its batch norm layers see.

    Layers normalise by the statistics of the batch, so deeper layers see what they saw in training. Dropout
    is off, the network's running buffers stay as they are, and its modes are restored. Leave HeteroFL's
    scaler off (`flexfed.scaler`): evaluation does not divide, so statistics of
    divided activations would be wrong.

    Args:
        model: the network of the size that is to be evaluated.
        batches: inputs, each (n, ...), moved to the network's device. One that leaves a layer fewer than two values
            per channel is skipped.
        definition: see `BatchNormSums`.
    """
    sums = _nothing(model, definition)
    if not sums.counts:
        return sums
    with _batch_statistics(model), torch.no_grad():
        for batch in batches:
            sums = add_sums(sums, _sums_of_batch(model, batch, definition))
    return sums


def add_sums(a: BatchNormSums, b: BatchNormSums) -> BatchNormSums:
    """The sums of two clients together.

    Raises:
        ValueError: the two differ in definition, layers or channels.
    """
    if a.definition != b.definition:
        raise ValueError(f"cannot add sums of {a.definition!r} and of {b.definition!r}; ask all clients for the same")
    widths = [{name: v.shape for name, v in s.first.items()} for s in (a, b)]
    if widths[0] != widths[1]:
        raise ValueError(f"cannot add sums of different networks: channels are {widths[0]} and {widths[1]}")
    return BatchNormSums(
        a.definition,
        {name: n + b.counts[name] for name, n in a.counts.items()},
        {name: v + b.first[name] for name, v in a.first.items()},
        {name: v + b.second[name] for name, v in a.second.items()},
    )


def statistics(sums: BatchNormSums) -> Statistics:
    """Mean and variance of every layer that ran; variances are unbiased, like batch norm's own running ones.

    Raises:
        ValueError: no layer saw a usable batch.
    """
    ran = {name: n for name, n in sums.counts.items() if n > (1 if sums.definition == "pooled" else 0)}
    if sums.counts and not ran:
        raise ValueError("no batch norm statistics: expected a batch with two values per channel or more, got none")
    return {name: _moments(sums, name, n) for name, n in ran.items()}


def apply_statistics(model: nn.Module, found: Statistics) -> None:
    """Put statistics into a network, which uses them in eval mode from then on.

    Also for layers built with `track_running_stats=False`. Changes `model`: give it a copy if it goes on
    training without running statistics. Layers that are not named stay as they are.

    Raises:
        ValueError: a name or a number of channels is not the network's.
    """
    layers = _norms(model)
    for name, moments in found.items():
        if name not in layers or any(m.shape != (layers[name].num_features,) for m in moments):
            expected = f"{layers[name].num_features} channels" if name in layers else "no such layer"
            raise ValueError(f"statistics for batch norm {name!r}: expected {expected}, got {moments[0].shape}")
    device = place_of(model)
    for name, (mean, variance) in found.items():
        layer = layers[name]
        layer.running_mean = torch.tensor(mean, dtype=torch.float32, device=device)
        layer.running_var = torch.tensor(variance, dtype=torch.float32, device=device)
        layer.track_running_stats = True


def static_batch_norm(model: nn.Module, batches: Iterable[Tensor], definition: Definition = "batches") -> None:
    """Give a network the statistics of data at hand; one without batch norm stays as it is."""
    apply_statistics(model, statistics(collect_sums(model, batches, definition)))


def pack_sums(sums: BatchNormSums) -> Arrays:
    """The sums for the wire: layer -> float64 (1 + 2 * channels,), the count, then `first`, then `second`."""
    return {name: np.concatenate([[float(n)], sums.first[name], sums.second[name]]) for name, n in sums.counts.items()}


def unpack_sums(
    arrays: Arrays, widths: Mapping[str, int], definition: Definition, most: float = MOST_COUNT
) -> BatchNormSums:
    """The sums that a client sent.

    Args:
        arrays: what `pack_sums` made.
        widths: the channels to expect, `norm_widths` of the network that the client was asked about.
        definition: the one that the client was asked for.
        most: that a count can be.

    Raises:
        ValueError: names, shapes or types differ, a number is not finite or so large that sums of many overflow, or a
            count is not 0, 1, 2, ... or beyond `most`.
    """
    if set(arrays) != set(widths):
        raise ValueError(f"expected batch norm sums of {sorted(widths)}, got {sorted(arrays)}")
    for name, width in widths.items():
        _check_packed(name, arrays[name], width, most)
    return BatchNormSums(
        definition,
        {name: int(arrays[name][0]) for name in widths},
        {name: arrays[name][1 : 1 + width] for name, width in widths.items()},
        {name: arrays[name][1 + width :] for name, width in widths.items()},
    )


def _check_packed(name: str, array: np.ndarray, width: int, most: float) -> None:
    if array.dtype != np.float64 or array.shape != (1 + 2 * width,):
        raise ValueError(
            f"batch norm sums of {name!r}: expected float64 of shape {(1 + 2 * width,)}, for {width} "
            f"channels, got {array.dtype} of shape {array.shape}"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"batch norm sums of {name!r} must be finite, got NaN or infinity")
    if array[0] < 0 or array[0] != np.floor(array[0]):
        raise ValueError(f"batch norm sums of {name!r}: count must be 0, 1, 2, ..., got {array[0]}")
    if array[0] > most or np.abs(array[1:]).max(initial=0.0) > LARGEST:
        raise ValueError(
            f"batch norm sums of {name!r}: expected a count of {most:g} at most and sums within +-{LARGEST:.0e}, "
            f"got {array[0]:g} and {np.abs(array[1:]).max(initial=0.0):g}"
        )
    if (array[1 + width :] < 0).any():
        raise ValueError(f"batch norm sums of {name!r}: variances and squares must be >= 0, got {array.min()}")


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def _nothing(model: nn.Module, definition: Definition) -> BatchNormSums:
    widths = norm_widths(model)
    return BatchNormSums(
        definition,
        dict.fromkeys(widths, 0),
        {name: np.zeros(width) for name, width in widths.items()},
        {name: np.zeros(width) for name, width in widths.items()},
    )


@contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """Eval mode, except that batch norm layers normalise by the batch and remember nothing."""
    modes = [(module, module.training) for module in model.modules()]
    tracked = [(layer, layer.track_running_stats) for layer in _norms(model).values()]
    model.eval()
    for layer, _ in tracked:
        layer.training, layer.track_running_stats = True, False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, track in tracked:
            layer.track_running_stats = track


def _sums_of_batch(model: nn.Module, batch: Tensor, definition: Definition) -> BatchNormSums:
    """What the layers see of one batch; nothing at all if it is too small for one of them."""
    seen: list[tuple[str, int, np.ndarray, np.ndarray]] = []

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _, args: seen.append((name, *_sums_of_values(args[0], definition)))

    handles = [layer.register_forward_pre_hook(look(name)) for name, layer in _norms(model).items()]
    try:
        model(batch.to(place_of(model)))
    except _TooFewValuesError:
        return _nothing(model, definition)
    finally:
        for handle in handles:
            handle.remove()
    nothing = _nothing(model, definition)
    counts, first, second = dict(nothing.counts), dict(nothing.first), dict(nothing.second)
    for name, count, one, two in seen:  # a layer that is called twice counts twice
        counts[name], first[name], second[name] = counts[name] + count, first[name] + one, second[name] + two
    return BatchNormSums(definition, counts, first, second)


def _sums_of_values(values: Tensor, definition: Definition) -> tuple[int, np.ndarray, np.ndarray]:
    """Count and sums of one layer's input (n, channels, ...)."""
    count = values.numel() // values.shape[1]
    if count < 2:
        raise _TooFewValuesError
    moments = torch.var_mean(values, [axis for axis in range(values.dim()) if axis != 1])
    variance, mean = (m.double().cpu().numpy() for m in moments)
    if definition == "batches":
        return 1, mean, variance
    return count, count * mean, (count - 1) * variance + count * mean**2


def _moments(sums: BatchNormSums, name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    mean = sums.first[name] / count
    if sums.definition == "batches":
        return mean, sums.second[name] / count
    return mean, np.maximum(sums.second[name] - count * mean**2, 0) / (count - 1)
