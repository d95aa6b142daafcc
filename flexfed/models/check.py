"""Find out before training whether a network takes the data: run it on the meta device."""

from __future__ import annotations

from functools import partial

import torch

from flexfed.models.registry import build_model, check_request, find_builder
from flexfed.networks import build_on_meta

# What building or running a network that does not fit is seen to raise.
_FAILURES = (RuntimeError, ValueError, TypeError, AssertionError, IndexError, ArithmeticError)
_LARGEST = 1024
_SMALL = ("cnn", "heterofl-resnet18", "cnn1d")


def check_model(name: str, num_classes: int, input_shape: tuple[int, ...]) -> None:
    """Run a batch of two through the network, on meta (nothing is allocated), and check the output.

    Args:
        name: a name `build_model` knows.
        num_classes: outputs that the classifier must have.
        input_shape: one sample's shape, without the batch.

    Raises:
        ValueError: unknown name, wrong rank, inputs too small (with the smallest that fit), a network
            that cannot be built or run on meta, or an output other than (2, num_classes).
    """
    find_builder(name)
    check_request(name, num_classes, input_shape)
    try:
        output = _run(name, num_classes, input_shape)
    except _FAILURES as error:
        raise ValueError(_advice(name, num_classes, input_shape, error)) from error
    if not isinstance(output, torch.Tensor):
        raise ValueError(f"model {name!r} returned {type(output).__name__}; expected one tensor of logits")
    if output.shape != (2, num_classes):
        raise ValueError(
            f"model {name!r} returned shape {tuple(output.shape)} for 2 inputs of shape {input_shape}; "
            f"expected (2, {num_classes}), one logit for each class"
        )


def _run(name: str, num_classes: int, input_shape: tuple[int, ...]) -> object:
    model = build_on_meta(partial(build_model, name, num_classes, input_shape))
    # In training mode: that is what comes next, and batch norm refuses there what it takes in eval mode.
    with torch.device("meta"), torch.no_grad():
        return model(torch.zeros(2, *input_shape))


def _fits(name: str, num_classes: int, input_shape: tuple[int, ...]) -> bool:
    try:
        _run(name, num_classes, input_shape)
    except _FAILURES:
        return False
    return True


def _advice(name: str, num_classes: int, input_shape: tuple[int, ...], error: Exception) -> str:
    rank = len(input_shape) - 1
    smallest = _smallest_size(name, num_classes, input_shape)
    if smallest is None:
        return f"model {name!r} cannot take inputs of shape {input_shape}: {error}; choose another model"
    others = (m for m in _SMALL if m != name and _fits(m, num_classes, input_shape))
    choice = next((f"a model that takes them, such as {other!r}" for other in others), "another model")
    need, got = "x".join([str(smallest)] * rank), "x".join(map(str, input_shape[1:]))
    what = "time steps" if rank == 1 else "pixels"
    return f"model {name!r} needs at least {need} {what}; got {got}, choose larger inputs or {choice}"


def _smallest_size(name: str, num_classes: int, input_shape: tuple[int, ...]) -> int | None:
    """The smallest side that runs, by doubling and halving; None if size is not what is wrong."""
    channels, *sides = input_shape

    def fits(side: int) -> bool:
        return _fits(name, num_classes, (channels, *[side] * len(sides)))

    if not sides or fits(min(sides)):
        return None
    low, high = min(sides), 2 * min(sides)
    while not fits(high):
        low, high = high, 2 * high
        if high > _LARGEST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
