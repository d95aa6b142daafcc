from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from flexfed.batchnorm import static_batch_norm
from flexfed.models.heterofl import heterofl_conv, heterofl_resnet18
from flexfed.models.small import cnn
from flexfed.scaler import scale_outputs

WIDTHS = (8, 16, 16, 32)


def hooked(model: nn.Module, rate: float = 0.5, uncut: tuple[str, ...] | None = None) -> dict[str, str]:
    """Module -> where the scaler is."""
    with scale_outputs(model, rate, uncut):
        before = {n: "before" for n, m in model.named_modules() if m._forward_pre_hooks}
        return before | {n: "after" for n, m in model.named_modules() if m._forward_hooks}


def test_plain_network_scales_between_convolution_and_norm() -> None:
    model = heterofl_conv(10, (1, 8, 8), WIDTHS)
    assert hooked(model) == {f"norm{i}": "before" for i in (1, 2, 3, 4)}


def test_pre_activation_network_scales_before_each_norm_and_nowhere_else() -> None:
    model = heterofl_resnet18(10, (3, 8, 8), WIDTHS)
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(norms) == 17
    assert hooked(model) == dict.fromkeys(norms, "before")


def test_hidden_linear_layers_behind_the_last_norm_are_scaled() -> None:
    assert hooked(cnn(10, (1, 8, 8))) == {f"norm{i}": "before" for i in (1, 2, 3)} | {"fc": "after"}


def test_networks_without_norms_scale_after_every_layer_but_the_classifier() -> None:
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 2))
    assert hooked(model) == {"0": "after", "3": "after"}
    assert hooked(model, uncut=("3", "4")) == {"0": "after"}


def test_a_norm_of_the_networks_input_is_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    assert hooked(model) == {"2": "before"}


def test_full_rate_changes_nothing() -> None:
    assert hooked(heterofl_conv(10, (1, 8, 8), WIDTHS), rate=1.0) == {}


def test_divides_in_training_mode_only_and_only_while_open() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    inputs = torch.randn(5, 3)
    plain = model(inputs)
    with scale_outputs(model, 0.25):
        torch.testing.assert_close(model.train()(inputs), 4 * plain)
        torch.testing.assert_close(model.eval()(inputs), plain)
    assert torch.equal(model.train()(inputs), plain)


def test_gradients_pass_through_the_division() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    nn.init.ones_(model[0].weight)
    nn.init.ones_(model[1].weight)
    with scale_outputs(model, 0.5):
        model(torch.ones(1, 1)).sum().backward()
    assert [p.grad.item() for p in model.parameters() if p.grad is not None] == [2, 2]


def test_batch_statistics_hide_the_division_but_for_epsilon() -> None:
    torch.manual_seed(0)
    model = heterofl_conv(10, (1, 8, 8), WIDTHS).train()
    inputs = torch.randn(32, 1, 8, 8)
    with scale_outputs(model, 0.25):
        scaled = model(inputs)
    torch.testing.assert_close(scaled, model(inputs), rtol=1e-2, atol=1e-3)


def test_hooks_go_when_the_context_ends_in_an_error() -> None:
    model = heterofl_conv(10, (1, 8, 8), WIDTHS)
    with pytest.raises(KeyError), scale_outputs(model, 0.5):
        raise KeyError
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.5])
def test_refuses_impossible_rates(rate: float) -> None:
    with pytest.raises(ValueError, match=r"rate must be in \(0, 1\]"), scale_outputs(nn.Linear(1, 1), rate):
        pass


def test_refuses_layers_that_are_not_there() -> None:
    with (
        pytest.raises(ValueError, match=r"uncut names \['head'\]"),
        scale_outputs(nn.Sequential(nn.Linear(1, 1)), 0.5, ["head"]),
    ):
        pass


def relative_error(logits: Tensor, reference: Tensor) -> float:
    return float((logits - reference).norm() / reference.norm())


# The paper page (the authors' network): 0.0004 at rate 1, but 0.98 at 1/2 and 1.47 at 1/4 with the scaler on.
@pytest.mark.parametrize("rate", [1.0, 0.5, 0.25])
def test_statistics_collected_with_the_scaler_on_spoil_evaluation(rate: float) -> None:
    torch.manual_seed(0)
    model = heterofl_conv(10, (1, 8, 8), tuple(int(rate * width) for width in (32, 64, 64, 128)))
    inputs = torch.rand(256, 1, 8, 8)
    with torch.no_grad():
        reference = model.train()(inputs)  # batch statistics of all the data
        errors = {}
        for scaler in ("off", "on"):
            evaluated = copy.deepcopy(model)
            with scale_outputs(evaluated, rate if scaler == "on" else 1.0):
                static_batch_norm(evaluated, [inputs])
            errors[scaler] = relative_error(evaluated.eval()(inputs), reference)
    assert errors["off"] < 0.01
    assert errors["on"] == errors["off"] if rate == 1 else errors["on"] > 0.3
