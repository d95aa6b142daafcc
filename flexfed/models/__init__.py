"""Networks: the papers' own, small ones, torchvision's by name, and a user's own factory."""

from flexfed.models.check import check_model
from flexfed.models.registry import MODELS, Builder, build_model, input_convention, model_factory
from flexfed.models.weights import load_weights

__all__ = [
    "MODELS",
    "Builder",
    "build_model",
    "check_model",
    "input_convention",
    "load_weights",
    "model_factory",
]
