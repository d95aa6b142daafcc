"""Nothing assumes a CPU: every method on a second device gives the bits that it gives here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from elsewhere import DEVICE, Elsewhere, SecondDevice
from placing import RUNS, run_named
from toy import final_model, lines, same_bits
from toy_zoo import toy_zoos

from flexfed import compute, jobs
from strategies import federated

NO_TRAINING = {"fedstitch"}


@contextmanager
def computing_elsewhere() -> Iterator[SecondDevice]:
    """Every run computes on the second device, whatever it asks for."""
    with ExitStack() as stack:
        for room in (compute, jobs, federated):
            stack.enter_context(patch.object(room, "torch_device", lambda _: DEVICE))
        stack.enter_context(patch.object(torch, "inference_mode", torch.no_grad))  # has no place for disguises
        yield stack.enter_context(SecondDevice())


@pytest.mark.parametrize("name", RUNS)
def test_a_run_computes_where_it_is_told_to(tmp_path: Path, name: str) -> None:
    with toy_zoos():
        here = run_named(tmp_path / "here", name)
        with computing_elsewhere() as device:
            there = run_named(tmp_path / "there", name)
    assert not any(line["failed"] or line["refused"] for line in lines(there))
    assert lines(there) == lines(here)
    assert same_bits(final_model(there), final_model(here))
    assert device.computed["aten.convolution.default"] > 0
    assert (device.computed["aten.convolution_backward.default"] > 0) != (name in NO_TRAINING)
    assert device.on_cpu["aten.convolution_backward.default"] == 0
    if name in NO_TRAINING:  # others look at a random network before they begin, on the CPU
        assert device.on_cpu["aten.convolution.default"] == 0


def test_the_second_device_is_one() -> None:
    with SecondDevice():
        there = torch.zeros(3, device=DEVICE)
        assert isinstance(there + 1, Elsewhere)
        assert np.array_equal(compute.numbers(there + 1), np.ones(3))
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="not supported"):
            there.numpy()
