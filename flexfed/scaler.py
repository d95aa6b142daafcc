"""HeteroFL's scaler: what a narrow network computes while it trains is scaled up to the full network's size.

"HeteroFL: Computation and Communication Efficient Federated Learning for Heterogeneous Clients"
(Diao, Ding, Tarokh, ICLR 2021, arXiv 2010.01264), section 3. In the released code it is a layer written into
each network; here it is hooks on any network. In front of batch norm it changes next to nothing (only its
epsilon is then relatively smaller); without norms it matters.

ScaleFL's scaler divides after training, too (`divide_outputs`): it belongs to the network, and can be put into its
weights (`divide_weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from flexfed.units import Arrays

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
_WEIGHTS = (_ConvNd, nn.Linear)


@contextmanager
def scale_outputs(model: nn.Module, rate: float, uncut: Collection[str] | None = None) -> Iterator[None]:
    """Divide hidden activations by `rate` in training mode, identity in eval mode, while the context is open.

    The rule, in the order of `model.modules()`: **inputs of norms are divided, and so are outputs of those
    convolutions and linear layers that come after the last norm.** It gives what the released networks do:
    after each convolution in the plain one, in front of each norm and nowhere else in the pre-activation
    ResNet. For other networks:

    - without norms, every convolution and linear layer is followed by the scaler;
    - with norms, layers before the last one that feed no norm (squeeze-and-excitation) are not;
    - a norm in front of all layers sees the network's input, which is never cut: left alone.

    Keep it closed while batch norm statistics are collected (`flexfed.batchnorm`): evaluation does not
    divide.

    Args:
        model: gets forward hooks until the context closes.
        rate: kept fraction relative to the global network, in (0, 1]; at 1 nothing is done.
        uncut: names of the layers whose outputs are classes, never divided; by default the last convolution
            or linear layer.

    Raises:
        ValueError: `rate` is not in (0, 1], or a name in `uncut` is no convolution or linear layer.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate must be in (0, 1], got {rate}")
    before, after = _scaled(model, uncut)
    handles = []
    if rate < 1:
        handles += [module.register_forward_pre_hook(_divide_input(rate)) for module in before]
        handles += [module.register_forward_hook(_divide_output(rate)) for module in after]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def divide_outputs(model: nn.Module, rate: float, layers: Collection[str]) -> Iterator[None]:
    """Divide what layers give by `rate`, in training and in eval mode, while the context is open.

    Args:
        model: gets forward hooks until the context closes.
        rate: in (0, 1]; at 1 nothing is done.
        layers: their names; those that the model does not have are left out.
    """
    present = [module for name, module in model.named_modules() if name in layers and rate != 1]
    handles = [module.register_forward_hook(lambda _, __, output: output / rate) for module in present]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def divide_weights(part: Arrays, rate: float, layers: Collection[str]) -> Arrays:
    """Tensors of a network that computes, as it is, what another does inside `divide_outputs`."""
    divided = {f"{layer}.{name}" for layer in layers for name in ("weight", "bias")}
    return {n: (array / rate).astype(array.dtype) if n in divided else array for n, array in part.items()}


def _scaled(model: nn.Module, uncut: Collection[str] | None) -> tuple[list[nn.Module], list[nn.Module]]:
    """Norms whose inputs are scaled, and layers whose outputs are."""
    modules: list[tuple[str, nn.Module]] = [
        (name, m) for name, m in model.named_modules() if isinstance(m, _NORMS + _WEIGHTS)
    ]
    weights = [(i, name) for i, (name, m) in enumerate(modules) if isinstance(m, _WEIGHTS)]
    norms = [i for i, (_, m) in enumerate(modules) if isinstance(m, _NORMS)]
    names = [name for _, name in weights]
    whole = set(names[-1:] if uncut is None else uncut)
    if not whole <= set(names):
        raise ValueError(f"uncut names {sorted(whole - set(names))}; the convolutions and linear layers are {names}")
    first = weights[0][0] if weights else len(modules)
    last = norms[-1] if norms else -1
    before = [modules[i][1] for i in norms if i > first]
    after = [modules[i][1] for i, name in weights if i > last and name not in whole]
    return before, after


def _divide_input(rate: float) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
    return lambda module, args: (args[0] / rate, *args[1:]) if module.training else None


def _divide_output(rate: float) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
    return lambda module, _, output: output / rate if module.training else None
