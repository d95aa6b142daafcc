"""Start from trained weights: torchvision's own, a zoo's, or a safetensors file."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from flexfed.models.cifar import FILE_NAME_ATTRIBUTE
from flexfed.models.zoo import NAME_ATTRIBUTE, OPTIONS
from flexfed.networks import EXITS

_RUNNING = ("running_mean", "running_var", "num_batches_tracked")
_OLD_DENSE = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
_logger = logging.getLogger("flwr")


def load_weights(model: nn.Module, weights: str) -> None:
    """Load trained weights into `model`, in place; names and shapes must match.

    Two exceptions: a classifier (the last layer) whose class count differs keeps its fresh
    initialisation, which is logged; and batch norm's running statistics may be missing on either
    side, because they never travel and are computed anew before evaluation.

    Args:
        model: as `build_model` made it.
        weights: "torchvision" for the default pretrained weights of a torchvision network, taken from
            torch hub's cache and never downloaded; "zoo" for the blocks of a stitched network, whose bridges
            and head stay fresh; or the path of a .safetensors file.

    Raises:
        ValueError: the file is missing (with where it is expected), names or shapes differ, or
            "torchvision" is asked of a network that is not torchvision's, or "zoo" of one that is not stitched.
    """
    if weights == "zoo":
        _load_zoo(model)
        return
    plain = getattr(model, "plain", model)  # a network with exits: a file may be one of the network without them
    state = _torchvision_state(plain) if weights == "torchvision" else _file_state(weights)
    model = model if any(name.startswith(f"{EXITS}.") for name in state) else plain
    own = model.state_dict()
    state = _own_names(model, own, state)
    fresh = _fresh_classifier(own, state, _last_layer(model))
    if fresh:
        _logger.info("weights %s: %s keep their fresh initialisation (another class count)", weights, fresh)
    state = {name: tensor for name, tensor in state.items() if name not in fresh}
    _check_match(weights, {name: tensor for name, tensor in own.items() if name not in fresh}, state)
    model.load_state_dict({name: tensor for name, tensor in state.items() if name in own}, strict=False)


def _load_zoo(model: nn.Module) -> None:
    from flexfed.stitching.network import Stitched, load_zoo_blocks

    if not isinstance(model, Stitched):
        raise ValueError(
            f"weights='zoo' needs a stitched network, got {type(model).__name__}; choose model='stitched:<zoo>:<ids>'"
        )
    load_zoo_blocks(model)


def _own_names(model: nn.Module, own: Mapping[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file by the network's names, where a published file has others (FILE_NAME_ATTRIBUTE)."""
    file_name = getattr(model, FILE_NAME_ATTRIBUTE, None)
    if file_name is None or not any(file_name(name) in state for name in own if name not in state):
        return state
    return {name: state[file_name(name)] for name in own if file_name(name) in state}


def _torchvision_state(model: nn.Module) -> dict[str, Tensor]:
    name = getattr(model, NAME_ATTRIBUTE, None)
    if name is None:
        raise ValueError(
            f"weights='torchvision' needs a torchvision network, got {type(model).__name__}; "
            "choose one by its torchvision name, or give the path of a .safetensors file"
        )
    from torchvision import models

    default = models.get_model_weights(name).DEFAULT
    expected = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(default.url).path).name)
    if not expected.is_file():
        raise ValueError(
            f"pretrained weights of {name!r} are expected in {expected}; they are not there, and nothing "
            f"is downloaded silently: fetch {default.url} to that path"
        )
    try:  # not by torchvision's own way: torch.hub unpickles whatever the file holds
        state = torch.load(expected, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is none fails in many ways
        raise ValueError(f"pretrained weights {expected} cannot be read as tensors alone: {error}") from error
    own = model.state_dict()
    state = {name if name in own else _new_dense_name(name): tensor for name, tensor in state.items()}
    return {n: t for n, t in state.items() if n in own} if name in OPTIONS else state  # those leave outputs out


def _new_dense_name(name: str) -> str:
    """A tensor of a DenseNet by its present name: torchvision's files are older."""
    return _OLD_DENSE.sub(r"\1\2", name)


def _file_state(weights: str) -> dict[str, Tensor]:
    path = Path(weights).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"weights must be 'torchvision', 'zoo' or the path of a .safetensors file, got {weights!r}")
    if not path.is_file():
        raise ValueError(f"weights file {path} does not exist")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"weights file {path} cannot be read: {error}") from error


def _last_layer(model: nn.Module) -> str:
    """Name of the module that holds the last parameter, which is the classifier in every known network."""
    *_, last = (name for name, _ in model.named_parameters())
    return last.rpartition(".")[0]


def _fresh_classifier(own: Mapping[str, Tensor], state: Mapping[str, Tensor], layer: str) -> list[str]:
    """Tensors of the classifier, if the file's have another number of classes and are alike otherwise."""
    names = [name for name in own if name.rpartition(".")[0] == layer]
    pairs = [(own[name].shape, state[name].shape) for name in names if name in state]
    alike = len(pairs) == len(names) and all(a[1:] == b[1:] for a, b in pairs)
    return names if alike and any(a[:1] != b[:1] for a, b in pairs) else []


def _check_match(weights: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    expected, got = ({n for n in names if n.rpartition(".")[2] not in _RUNNING} for names in (own, state))
    if expected != got:
        missing, extra = sorted(expected - got), sorted(got - expected)
        raise ValueError(
            f"weights {weights!r} do not fit the network: missing {_some(missing)}, unexpected {_some(extra)}"
        )
    for name in sorted(set(own) & set(state)):
        if own[name].shape != state[name].shape:
            raise ValueError(
                f"weights {weights!r} do not fit the network: {name!r} has shape {tuple(state[name].shape)}, "
                f"expected {tuple(own[name].shape)}"
            )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "nothing"
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
