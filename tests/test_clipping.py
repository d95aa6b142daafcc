"""`max-update-norm`: off it changes no bit, on it bounds the norm of every reply before it is folded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from toy import (
    AVERAGING,
    LAYOUTS,
    dense_mean,
    final_model,
    initial_model,
    lines,
    random_arrays,
    random_difference,
    random_units,
    run_toy,
    same_bits,
    with_difference,
)

from flexfed.averaging import Averager
from flexfed.clipping import clipped, norm_of
from flexfed.config import Experiment
from flexfed.submodel import Submodel, full

LAYOUT = LAYOUTS["ties"]()


def draw(seed: int, size: int = 1000) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


@pytest.mark.parametrize("most", [1e-30, 1e-3, 0.5, 31.0, 32.0, 1e3, 1e30])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-3, 1.0, 1e6, 1e17])
def test_the_norm_afterwards_is_the_smaller_of_the_two(most: float, scale: float) -> None:
    flat = draw(0) * np.float32(scale)
    norm = float(np.linalg.norm(flat.astype(np.float64)))
    found = clipped(flat, most)
    assert found.dtype == np.float32
    assert np.linalg.norm(found.astype(np.float64)) == pytest.approx(min(norm, most), rel=1e-6)
    assert (found is flat) == (norm <= most)
    if norm > most:
        np.testing.assert_allclose(found, flat.astype(np.float64) * (most / norm), rtol=1e-6)


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 200_000])
def test_the_norm_is_that_of_all_numbers_and_never_overflows(size: int) -> None:
    flat = draw(1, size)
    assert norm_of(flat) == pytest.approx(float(np.linalg.norm(flat.astype(np.float64))), rel=1e-12)
    huge = np.full(size, 1e18, np.float32)  # its sum of squares is beyond float32
    assert norm_of(huge) == pytest.approx(1e18 * np.sqrt(size), rel=1e-6)
    if size:
        assert np.linalg.norm(clipped(huge, 2.0).astype(np.float64)) == pytest.approx(2.0, rel=1e-6)


def test_what_is_within_the_norm_is_not_even_copied_and_nothing_is_written() -> None:
    flat = draw(2)
    flat.flags.writeable = False
    assert clipped(flat, norm_of(flat)) is flat
    assert clipped(flat, norm_of(flat) * (1 - 1e-6)) is not flat


def replies(num: int) -> list[tuple[Submodel, np.ndarray, float]]:
    """Whole and narrow parts, a masked one too, of norms far apart."""
    rng, found = np.random.default_rng(3), []
    for i in range(num):
        part = full(LAYOUT) if i % 3 == 0 else Submodel(random_units(LAYOUT, rng, 0.5 if i % 3 == 1 else None))
        if i == 5:
            shape = LAYOUT.shapes["fc.bias"]
            part = Submodel(full(LAYOUT).units, masks={"fc.bias": rng.random(shape) < 0.5})
        flat = random_difference(LAYOUT, part, rng) * np.float32(10.0 ** rng.integers(-2, 3))
        found.append((part, flat, float(rng.integers(1, 20))))
    return found


@pytest.mark.parametrize("per", ["coverage", "total"])
@pytest.mark.parametrize("most", [0.3, 10.0])
def test_folding_clipped_is_folding_what_was_scaled_by_hand(per: Any, most: float) -> None:
    previous = random_arrays(LAYOUT, np.random.default_rng(4))
    averager, by_hand, told = Averager(LAYOUT, previous, per, most), [], 0
    for part, flat, weight in replies(9):
        averager.add(part, flat, weight)
        norm = np.linalg.norm(flat.astype(np.float64))
        told += norm > most
        by_hand.append((part, flat * min(1.0, most / norm), weight))
    assert 0 < averager.num_clipped == told
    expected, _ = dense_mean(LAYOUT, previous, by_hand, per)
    for name, array in averager.result().items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-5)


def test_off_and_out_of_reach_are_the_same_bits() -> None:
    previous = random_arrays(LAYOUT, np.random.default_rng(5))
    results = []
    for most in ((), (0.0,), (1e30,)):
        averager = Averager(LAYOUT, previous, "coverage", *most)
        for reply in replies(6):
            averager.add(*reply)
        assert averager.num_clipped == 0
        results.append(averager.result())
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e25])
def test_what_is_refused_is_never_rescued(bad: float) -> None:
    whole = full(LAYOUT)
    averager = Averager(LAYOUT, random_arrays(LAYOUT, np.random.default_rng(6)), "coverage", 1.0)
    flat = random_difference(LAYOUT, whole, np.random.default_rng(7))
    flat[3] = bad
    with pytest.raises(ValueError, match="NaN or infinite, or above"):
        averager.add(whole, flat)
    assert averager.num_replies == averager.num_clipped == 0


@pytest.mark.parametrize("strategy", AVERAGING)
def test_a_run_tells_how_many_were_clipped_only_where_it_clips(strategy: str, tmp_path: Path) -> None:
    plain = run_toy(tmp_path / "off", strategy)
    assert "clipped" not in lines(plain)[0]
    reachless = run_toy(tmp_path / "far", strategy, {"max-update-norm": 1e9})
    (line,) = lines(reachless)
    assert line.pop("clipped") == 0
    assert line == lines(plain)[0]
    assert same_bits(final_model(reachless), final_model(plain))
    close = run_toy(tmp_path / "near", strategy, {"max-update-norm": 1e-3})
    (line,) = lines(close)
    assert line["clipped"] == sum(line["trained"].values()) > 0
    assert line["refused"] == []


def test_a_diverged_reply_moves_the_model_no_further_than_the_norm(tmp_path: Path) -> None:
    def diverged(request: Message, reply: Message, partition: int) -> Message:
        first = request.metadata.group_id == "1"
        if first and request.metadata.message_type == "train" and partition == 2:
            return with_difference(reply, lambda values: np.full_like(values, 1e15))
        return reply

    most = 0.25
    values = {"batch-norm": "batch", "num-server-rounds": 2}
    far = run_toy(tmp_path / "off", "fedavg", values, alter=diverged)
    near = run_toy(tmp_path / "on", "fedavg", {**values, "max-update-norm": most}, alter=diverged)

    def moved(run: Path) -> float:
        initial = initial_model(run)
        changes = [final_model(run)[name].astype(np.float64) - initial[name] for name in initial]
        return float(np.sqrt(sum((change**2).sum() for change in changes)))

    assert moved(far) > 1e14
    assert len(lines(far)[1]["refused"]) == 4  # nobody can train what it left
    assert moved(near) <= 2 * most * (1 + 1e-5)  # weighted means of differences, none longer than that
    assert lines(near)[0]["clipped"] >= 1
    assert lines(near)[1]["refused"] == []


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_impossible_norms_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="max-update-norm must be >= 0, 0 = off, got"):
        Experiment.read({"max-update-norm": value})
