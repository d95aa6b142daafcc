from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from toy import LAYOUTS, random_arrays, random_units, same_bits

from flexfed.checkpoint import Checkpoint, load_checkpoint, refuse_other_network, save_checkpoint
from flexfed.submodel import Submodel, full, pack, unpack

LAYOUT = LAYOUTS["ties"]()


def checkpoint(server_round: int = 3, seed: int = 0) -> Checkpoint:
    rng = np.random.default_rng(seed)
    small = Submodel(random_units(LAYOUT, rng))
    return Checkpoint(
        server_round,
        random_arrays(LAYOUT, rng),
        {"S": pack(small), "L": pack(full(LAYOUT))},
        {"S": {"norm": (rng.normal(size=6), rng.normal(size=6).astype(np.float32))}, "L": None},
        {"arms": rng.normal(size=(4, 3)), "count": 7, "best": 0.1 + 0.2, "splits": [[0.0, 0.5], [0.5, 1.0]]},
        {"model": "cnn", "input-mean": [0.25, 1 / 3], "clients": 4},
        "run",
        1234,
    )


def test_what_is_saved_is_read_bit_for_bit(tmp_path: Path) -> None:
    saved = checkpoint()
    path = save_checkpoint(tmp_path, saved)
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert path.name == "round-00000003.safetensors"
    assert same_bits(found.arrays, saved.arrays)
    assert (found.server_round, found.run, found.metrics_bytes) == (3, "run", 1234)
    assert dict(found.facts) == saved.facts
    assert list(found.levels) == ["S", "L"]  # smallest first: the last one is the model that is reported
    assert unpack(LAYOUT, found.levels["S"]) == unpack(LAYOUT, saved.levels["S"])
    assert found.statistics["L"] is None
    (mean, variance), (mean_before, variance_before) = found.statistics["S"]["norm"], saved.statistics["S"]["norm"]  # type: ignore[index]
    assert same_bits({"m": mean, "v": variance}, {"m": mean_before, "v": variance_before})
    assert found.state["splits"] == [[0.0, 0.5], [0.5, 1.0]]
    assert (found.state["count"], found.state["best"]) == (7, 0.1 + 0.2)
    assert same_bits({"arms": found.state["arms"]}, {"arms": saved.state["arms"]})


def test_a_level_without_any_norm_is_not_one_without_statistics(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, replace(checkpoint(), statistics={"S": {}, "L": None}))
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.statistics == {"S": {}, "L": None}


def test_two_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    for server_round in (1, 2, 3, 9, 10):
        save_checkpoint(tmp_path, checkpoint(server_round))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "round-00000009.safetensors",
        "round-00000010.safetensors",
    ]
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.server_round == 10


def test_what_lies_above_the_round_saved_is_of_a_run_that_was_taken_back(tmp_path: Path) -> None:
    for server_round in (4, 98, 99):
        save_checkpoint(tmp_path, checkpoint(server_round))
    (tmp_path / "round-00000004.safetensors").unlink(missing_ok=True)
    save_checkpoint(tmp_path, checkpoint(5))
    assert [path.name for path in tmp_path.iterdir()] == ["round-00000005.safetensors"]


def test_a_state_that_json_would_change_is_refused(tmp_path: Path) -> None:
    for value in ((1, 2), {1: 2}, np.float32(0.5), [np.zeros(2)], {"a": {3}}, float("nan")):
        with pytest.raises(ValueError, match="state 'arms' must be an array, or numbers, strings, lists and mappings"):
            save_checkpoint(tmp_path, replace(checkpoint(), state={"arms": value}))
    assert not list(tmp_path.iterdir())


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def change_a_number(path: Path) -> None:
    """In the header: the file stays readable."""
    data = path.read_bytes()
    before, after = (b'\\\\\\"count\\\\\\": %d' % count for count in (7, 8))  # JSON in JSON in JSON
    assert data.count(before) == 1
    path.write_bytes(data.replace(before, after))


def be_a_model(path: Path) -> None:
    save_file({"weight": np.zeros(3, dtype=np.float32)}, path)


def be_text(path: Path) -> None:
    path.write_text("round 4 went well\n")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (truncate, "cannot be read, it may be truncated"),
        (flip_a_bit, "is damaged"),
        (change_a_number, "is damaged"),
        (be_a_model, "is no flexfed checkpoint 1: its format is None"),
        (be_text, "cannot be read"),
    ],
)
def test_a_bad_checkpoint_is_named_and_the_one_before_is_used(
    harm: object, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(harm)
    save_checkpoint(tmp_path, checkpoint(4))
    harm(save_checkpoint(tmp_path, checkpoint(5)))
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.server_round == 4
    assert reason in caplog.text
    assert "round-00000005" in caplog.text
    harm(tmp_path / "round-00000004.safetensors")
    with pytest.raises(
        ValueError, match=r"no checkpoint in .* can be used: .*00000005.*00000004.*; start the run anew"
    ):
        load_checkpoint(tmp_path)


def test_another_runs_checkpoint_is_foreign(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(4))
    save_checkpoint(tmp_path, replace(checkpoint(5), run="other"))
    found = load_checkpoint(tmp_path, "run")
    assert found is not None
    assert found.server_round == 4
    with pytest.raises(ValueError, match="belongs to another run"):
        load_checkpoint(tmp_path, "third")


def test_a_kill_while_it_is_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, checkpoint(4))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, checkpoint(5))
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.server_round == 4
    (tmp_path / ".round-00000005.safetensors.77.tmp").write_bytes(b"half")  # a real kill sweeps nothing
    monkeypatch.undo()
    save_checkpoint(tmp_path, checkpoint(6))
    assert sorted(path.name[:14] for path in tmp_path.iterdir()) == ["round-00000004", "round-00000006"]


def test_a_network_of_another_shape_is_refused() -> None:
    refuse_other_network(checkpoint(), LAYOUT)
    arrays = {**checkpoint().arrays, "fc.bias": np.zeros(9, dtype=np.float32)}
    with pytest.raises(ValueError, match=r"tensor 'fc.bias' should have shape \(7,\), got \(9,\)"):
        refuse_other_network(replace(checkpoint(), arrays=arrays), LAYOUT)
    del arrays["fc.bias"]
    with pytest.raises(ValueError, match="got None"):
        refuse_other_network(replace(checkpoint(), arrays=arrays), LAYOUT)
