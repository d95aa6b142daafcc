"""Where networks compute, and in which numbers: torch's device (`torch-device`) and the precision.

The networks decide: `Task.network` puts them on the device, and samples follow the network that they meet
(`flexfed.training.fit`, `evaluate`). What travels and what the server averages stays numpy, in this machine's memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

AUTO = "auto"
FLOAT32, BFLOAT16 = "float32", "bfloat16"
PRECISIONS = (FLOAT32, BFLOAT16)
"""float16 is left out: its gradients underflow without a loss scale, which would reach into every method's loss."""

_NAMES = re.compile(r"auto|cpu|cuda(:\d+)?")


def check_device_name(name: str) -> None:
    """Refuse what is no name of a torch device that runs can use; asks no driver.

    Raises:
        ValueError: lists what can be said.
    """
    if not _NAMES.fullmatch(name):
        raise ValueError(f"unknown torch-device {name!r}; known: auto, cpu, cuda, cuda:0, cuda:1, ...")


@lru_cache(maxsize=16)
def torch_device(name: str) -> torch.device:
    """The torch device that a name stands for on this machine; "auto" = the GPU if there is one, else the CPU.

    Raises:
        ValueError: an unknown name, or a GPU that this process does not see.
    """
    check_device_name(name)
    if name == "cpu" or (name == AUTO and not torch.cuda.is_available()):
        return torch.device("cpu")
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    _, _, number = name.partition(":")
    if int(number or 0) >= seen:
        told = os.environ.get("CUDA_VISIBLE_DEVICES")
        limit = "" if told is None else f" (CUDA_VISIBLE_DEVICES={told!r})"
        raise ValueError(
            f"torch-device={name!r}, but torch {torch.__version__} sees {seen} GPUs here{limit}; "
            "set torch-device to 'auto' or 'cpu'"
        )
    return torch.device("cuda", int(number or 0))


def use(name: str) -> torch.device:
    """Make this process ready to compute on a device, and give it; nothing happens for the CPU.

    For the whole process. On a GPU the same seed has to give the same bits, as on the CPU: kernels are deterministic
    where torch has such (it warns of those that are not), cuDNN chooses none by measuring, and float32 is float32, not
    TF32.

    Args:
        name: as `torch_device`.

    Raises:
        ValueError: as `torch_device`.
    """
    device = torch_device(name)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic: Any = torch.utils.deterministic
        deterministic.fill_uninitialized_memory = False  # costs a kernel a tensor, and nobody reads such memory
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False  # cuBLAS has it off by default
        torch.cuda.set_device(device)
        torch.cuda.init()  # type: ignore[no-untyped-call]
    return device


def described(device: torch.device) -> str:
    """A device for the record of a run: "cpu", or "cuda" with the GPU's name, whatever its number."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def place_of(model: nn.Module) -> torch.device:
    """Where a network computes: the device of its tensors; the CPU for one without, or on `meta`."""
    found = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))
    return torch.device("cpu") if found.type == "meta" else found


def seed_draws(seed: int, place: torch.device) -> None:
    """Seed what torch draws while a network trains (dropout), on the CPU and on the network's device.

    The same numbers as `torch.manual_seed`, which also writes down a stack trace for every kind of accelerator that
    has not begun: a millisecond or more a client, beside a training of thirty.
    """
    torch.default_generator.manual_seed(seed)
    if place.type == "cuda":
        torch.cuda.manual_seed(seed)


def numbers(tensor: Tensor) -> np.ndarray:
    """A tensor as numpy; on the CPU it is the same memory."""
    found: np.ndarray = tensor.detach().cpu().numpy()
    return found


def state_numbers(model: nn.Module) -> dict[str, np.ndarray]:
    """A network's state dict as numpy."""
    return {name: numbers(tensor) for name, tensor in model.state_dict().items()}


def tensors_on(device: torch.device, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Arrays as tensors on a device; on the CPU in the same memory."""
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def computing(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """A context in which networks multiply in a precision; weights, gradients and sums stay float32.

    "float32" changes nothing, to the last bit. "bfloat16" is torch's autocast, without its cache of weights: methods
    write into them.

    Args:
        device: of the network.
        precision: one of `PRECISIONS`.
    """
    if precision == FLOAT32:
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


def free_gpu_memory() -> int | None:
    """Bytes that this process can still take on the GPU that it works on; None where it works on none."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
