"""A second torch device for machines without one: tensors there are CPU tensors in disguise that mix with no others.

Whoever forgets to move a tensor, or asks for its numpy array without bringing it back, gets the error that a GPU would
give. Its kernels are the CPU's.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map

DEVICE = torch.device("lazy", 0)
"""Its name: a device type that torch knows, that nobody has, and whose backward passes run in this thread."""

_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class Elsewhere(torch.Tensor):
    """A tensor on the device; `here` is what it hides."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> Elsewhere:
        found = torch.Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            layout=here.layout,
            device=DEVICE,
            requires_grad=here.requires_grad,
        )
        found.here = here
        return found

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.here})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """While it is open, tensors can be made on the device; counts what computes there, and what on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: Counter[str] = Counter()
        self.on_cpu: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)]
        if any(isinstance(each, Elsewhere) for each in tensors):
            self.computed[str(func)] += 1
        elif any(each.device.type == "cpu" for each in tensors):
            self.on_cpu[str(func)] += 1
        return compute(func, args, kwargs)


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: there if its tensors are there or it is told to make some there, else as always."""
    tensors = [each for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)]
    there = [each for each in tensors if isinstance(each, Elsewhere)]
    to = kwargs.get("device")
    if func in _MOVES:
        goes = isinstance(args[0], Elsewhere) if to is None else torch.device(to).type == DEVICE.type
    else:
        goes = bool(there) or (to is not None and torch.device(to).type == DEVICE.type)
        if there and any(each.ndim for each in tensors if not isinstance(each, Elsewhere)):
            raise RuntimeError(f"expected all tensors to be on the same device, but found two: {func}")
    if not there and not goes:
        return func(*args, **kwargs)
    here_args, here_kwargs = tree_map(lambda x: x.here if isinstance(x, Elsewhere) else x, (args, kwargs))
    if to is not None:
        here_kwargs["device"] = torch.device("cpu")
    found = func(*here_args, **here_kwargs)
    if func is torch.ops.aten._to_copy.default and found is here_args[0]:
        found = found.clone()
    if not goes:
        return found
    wrapped = tree_map(lambda x: Elsewhere(x) if isinstance(x, torch.Tensor) else x, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if there else wrapped
