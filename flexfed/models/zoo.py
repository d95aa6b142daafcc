"""torchvision's classification networks by their own names, untrained."""

from __future__ import annotations

from typing import Any

from torch import nn

# Where load_weights finds the name again, to know which pretrained file belongs to the network.
NAME_ATTRIBUTE = "torchvision_name"

# These two return a tuple in training unless their auxiliary classifiers are left out.
_SINGLE_OUTPUT = {"aux_logits": False, "init_weights": True}
OPTIONS: dict[str, dict[str, Any]] = {"googlenet": _SINGLE_OUTPUT, "inception_v3": _SINGLE_OUTPUT}


def torchvision_names() -> list[str]:
    """Names of torchvision's classification networks, sorted."""
    from torchvision import models

    names: list[str] = models.list_models(module=models)
    return names


def torchvision_model(name: str, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """The torchvision network `name`, its first convolution replaced unless images have 3 channels.

    The new convolution differs in its input channels only, and starts as PyTorch initialises one.
    GoogLeNet and Inception v3 are built without their auxiliary classifiers.

    Args:
        name: one of `torchvision_names()`.
        num_classes: outputs of the classifier.
        input_shape: (channels, height, width).
    """
    from torchvision import models

    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **OPTIONS.get(name, {}))
    if input_shape[0] != 3:
        _replace_first_convolution(model, input_shape[0])
    setattr(model, NAME_ATTRIBUTE, name)
    return model


def _replace_first_convolution(model: nn.Module, channels: int) -> None:
    path, old = next((p, m) for p, m in model.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        channels,
        old.out_channels,
        kernel_size=(old.kernel_size[0], old.kernel_size[1]),
        stride=(old.stride[0], old.stride[1]),
        padding=old.padding if isinstance(old.padding, str) else (old.padding[0], old.padding[1]),
        bias=old.bias is not None,
    )
    model.set_submodule(path, new)
