"""What a submodel costs: parameters, bytes, multiply-accumulates, training memory, modelled seconds and joules."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flexfed.codecs import CODECS, PLAIN, pieces
from flexfed.devices import Device
from flexfed.narrowing import resize
from flexfed.networks import Factory, build_on_meta, holding, outputs
from flexfed.submodel import Submodel, narrow_shapes, narrow_sizes
from flexfed.training import Training, build_optimizer, samples_trained, use_batch_statistics
from flexfed.units import Layout

BYTES_PER_NUMBER = 4
BACKWARD_FACTOR = 2  # a backward pass multiplies twice as much as the forward pass: by weights and by activations

# They cover the growth of a fresh process in the 17 cases of benchmarks/results/memory.md and of tests/test_memory.py.
# The constant is what the smallest parts take, mostly kernels loaded at the first batch; the factor is freed memory
# that the C library keeps: growth beyond the constant was up to 1.44 x the training memory in the last run, more in
# some before it. `python -m benchmarks.memory` measures again.
BUDGET_FACTOR = 1.65
BUDGET_BYTES = 28_000_000

_Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def num_parameters(layout: Layout, submodel: Submodel) -> int:
    """Numbers in the tensors of a part, masked entries not counted: what travels, and what is trained."""
    return sum(narrow_sizes(layout, submodel).values())


def part_bytes(layout: Layout, submodel: Submodel) -> int:
    """Bytes of a part's numbers."""
    return BYTES_PER_NUMBER * num_parameters(layout, submodel)


def message_bytes(layout: Layout, submodel: Submodel, codec: str = PLAIN) -> int:
    """What a job or a reply weighs at most: a part's numbers, 2 % more, masks, and 256 bytes for each tensor."""
    numbers = CODECS[codec].num_bytes(pieces(layout, submodel))
    masks = sum(-(-mask.size // 8) for mask in submodel.masks.values())
    return math.ceil(1.02 * numbers) + masks + 256 * len(layout.shapes)


def decoded_bytes(layout: Layout, submodel: Submodel, codec: str = PLAIN) -> int:
    """What a device holds beside a message that it has read: dense float32 numbers are used where they stand in it.

    Numbers that came as integers are decoded, masked tensors made dense, and masks are a byte an entry.
    """
    numbers = 0 if codec == PLAIN else part_bytes(layout, submodel)
    entries = sum(mask.size for mask in submodel.masks.values())
    return numbers + (BYTES_PER_NUMBER + 1) * entries


def forward_macs(factory: Factory, layout: Layout, submodel: Submodel, input_shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of one sample's forward pass, counted by torch on `meta` (it counts two FLOPs for each).

    Convolutions and matrix products count; norms, activations and pooling do not, as is usual. Where all of the full
    network's products are those of its layers, a part's follow from how often each weight is used: a network that ends
    earlier uses those that it has as often.
    """
    shapes = narrow_shapes(layout, submodel)
    uses = _weight_uses(factory, tuple(layout.shapes.items()), input_shape)
    if uses is None:
        return _forward_macs(factory, tuple(shapes.items()), input_shape)
    return sum(n * math.prod(shapes[name]) for name, n in uses.items() if name in shapes)


class LayerUse(NamedTuple):
    """How one sample's forward pass uses a convolution or linear layer.

    Attributes:
        weight_uses: how often each of its weights is used.
        bias_uses: and each of its biases.
        axis: of the weight, on which the outputs stand.
    """

    weight_uses: int
    bias_uses: int
    axis: int


@lru_cache(maxsize=16)
def layer_uses(factory: Factory, shapes: _Shapes, input_shape: tuple[int, ...]) -> dict[str, LayerUse]:
    """The uses of every such layer, by its name; the same for all widths of a network. Found on `meta`."""
    model = network_on_meta(factory, shapes)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, _ConvNd | torch.nn.Linear)}
    numbers_in: Counter[str] = Counter()
    numbers_out: Counter[str] = Counter()

    def watch(name: str) -> Callable[..., None]:
        def note(_: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            numbers_in[name] += inputs[0].numel()
            numbers_out[name] += output.numel()

        return note

    for name, module in layers.items():
        module.register_forward_hook(watch(name))
    samples = 2  # batch norm needs more than one
    with torch.no_grad():
        model(torch.zeros(samples, *input_shape, device="meta"))
    numbers = {name: (numbers_in[name] // samples, numbers_out[name] // samples) for name in layers}
    return {name: _layer_use(module, *numbers[name]) for name, module in layers.items()}


def _layer_use(module: torch.nn.Module, num_in: int, num_out: int) -> LayerUse:
    """From the numbers that go in and come out for one sample, in all of its calls."""
    shape: torch.Size = module.weight.shape  # type: ignore[assignment]
    axis = int(isinstance(module, _ConvTransposeNd))
    places = num_out // shape[axis]
    return LayerUse(num_in // shape[0] if axis else places, places, axis)


@lru_cache(maxsize=16)
def _weight_uses(factory: Factory, shapes: _Shapes, input_shape: tuple[int, ...]) -> dict[str, int] | None:
    """How often each weight is used; None where the network multiplies outside of such layers, too."""
    weights = {f"{n}.weight" if n else "weight": u for n, u in layer_uses(factory, shapes, input_shape).items()}
    known = dict(shapes)
    total = sum(use.weight_uses * math.prod(known[name]) for name, use in weights.items() if name in known)
    whole = _forward_macs(factory, shapes, input_shape)
    all_known = weights.keys() <= known.keys() and total == whole
    return {name: use.weight_uses for name, use in weights.items()} if all_known else None


@lru_cache(maxsize=256)
def _forward_macs(factory: Factory, shapes: _Shapes, input_shape: tuple[int, ...]) -> int:
    model = network_on_meta(factory, shapes)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, *input_shape, device="meta"))
    return int(counter.get_total_flops()) // 4  # two samples, two FLOPs a MAC


def network_on_meta(factory: Factory, shapes: _Shapes) -> torch.nn.Module:
    """A network with tensors of these shapes, without memory, ready to train."""
    known = dict(shapes)
    return use_batch_statistics(resize(holding(build_on_meta(factory), known), known)).train()


def training_macs(forward: int, num_samples: int) -> int:
    """Multiply-accumulates of training on `num_samples`: forward and backward."""
    return (1 + BACKWARD_FACTOR) * forward * num_samples


def round_macs(forward: int, num_examples: int, training: Training) -> int:
    """Multiply-accumulates of a device's local training: all the batches that `fit` runs, forward and backward."""
    return training_macs(forward, samples_trained(num_examples, training))


def training_memory(
    factory: Factory, layout: Layout, submodel: Submodel, input_shape: tuple[int, ...], training: Training
) -> int:
    """Bytes of all tensors alive at the worst moment of training a part, all of its exits at once.

    A training step is replayed on `meta`, where tensors have sizes but no memory, and every storage is followed
    from the operation that makes it to its end. Counted, each storage once: weights, gradients and the optimiser's
    state (frozen parameters have neither), one batch, what the forward pass keeps for the backward pass, and
    the temporary results of either and of the optimiser. Not counted: what a kernel uses inside itself (oneDNN pads
    layers of few channels to 8 or 16), what the allocator wastes, and kernels loaded at the first batch, all of which
    `memory_budget` covers; Python and torch themselves, the data, the part as it was received, and whatever a method
    adds to plain cross-entropy.

    Args:
        factory: builds the full network.
        layout: the network's numbering.
        submodel: the part.
        input_shape: of one sample.
        training: its batch size and optimiser count.
    """
    return _training_memory(factory, tuple(narrow_shapes(layout, submodel).items()), input_shape, training)


@lru_cache(maxsize=256)
def _training_memory(factory: Factory, shapes: _Shapes, input_shape: tuple[int, ...], training: Training) -> int:
    model = network_on_meta(factory, shapes)
    optimizer = build_optimizer(model, training, training.learning_rate)
    with _Storages() as storages:
        for tensor in [*model.parameters(), *model.buffers()]:
            storages.follow(tensor)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        optimizer.step()  # makes its state, which later steps find there
        optimizer.zero_grad(set_to_none=True)
        inputs = torch.empty(training.batch_size, *input_shape, device="meta")
        labels = torch.empty(training.batch_size, dtype=torch.int64, device="meta")
        loss = torch.stack([functional.cross_entropy(logits, labels) for logits in outputs(model, inputs)]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    peak: int = storages.peak_bytes
    return peak


def testing_memory(
    factory: Factory, layout: Layout, submodel: Submodel, input_shape: tuple[int, ...], batch_size: int
) -> int:
    """Bytes of all tensors alive at the worst moment of testing a part on a batch; counted as `training_memory` is."""
    return _testing_memory(factory, tuple(narrow_shapes(layout, submodel).items()), input_shape, batch_size)


@lru_cache(maxsize=256)
def _testing_memory(factory: Factory, shapes: _Shapes, input_shape: tuple[int, ...], batch_size: int) -> int:
    model = network_on_meta(factory, shapes).eval()
    with torch.no_grad(), _Storages() as storages:
        for tensor in [*model.parameters(), *model.buffers()]:
            storages.follow(tensor)
        model(torch.empty(batch_size, *input_shape, device="meta"))
    peak: int = storages.peak_bytes
    return peak


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages alive, and their highest sum so far: of the tensors shown to it, and of all results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.peak_bytes = 0
        self._alive: set[int] = set()

    def follow(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage from now until it is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._alive:
            self._alive.add(storage._cdata)
            self.bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.bytes)
            weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes()).atexit = False

    def _freed(self, key: int, num_bytes: int) -> None:
        self._alive.remove(key)
        self.bytes -= num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                self.follow(result)
        return results


def memory_budget(training_memory: int) -> int:
    """Bytes that must be free on a device to train a part it has received, over what its process holds already.

    Args:
        training_memory: of the part, from the function of that name.
    """
    return math.ceil(BUDGET_FACTOR * training_memory) + BUDGET_BYTES


def modelled_seconds(device: Device, macs: int, bytes_down: int, bytes_up: int) -> float:
    """Time to receive, compute and send on a device, from its declared speed and link."""
    return macs / device.speed_macs_s + _radio_seconds(device, bytes_down, bytes_up)


def modelled_joules(device: Device, macs: int, bytes_down: int, bytes_up: int) -> float:
    """Energy of receiving, computing and sending on a device, from its declared watts."""
    radio = device.radio_watts * _radio_seconds(device, bytes_down, bytes_up)
    return device.compute_watts * macs / device.speed_macs_s + radio


def _radio_seconds(device: Device, bytes_down: int, bytes_up: int) -> float:
    return bytes_down / (device.download_bytes_s or device.link_bytes_s) + bytes_up / device.link_bytes_s


def shares(layout: Layout, submodels: Mapping[str, Submodel]) -> dict[str, float]:
    """Each submodel's parameters as a share of the full network's."""
    whole = sum(math.prod(shape) for shape in layout.shapes.values())
    return {name: num_parameters(layout, submodel) / whole for name, submodel in submodels.items()}
