"""Where a run stands after a round, on disk: one safetensors file a round, with JSON in its header, never a pickle."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flexfed.batchnorm import Statistics
from flexfed.tensorfile import read_tensors, write_tensors
from flexfed.units import Arrays, Layout

log = logging.getLogger("flwr")

State = Mapping[str, Any]
"""A method's state: name -> array, or a value that JSON holds exactly (numbers, strings, lists, mappings of them)."""

FORMAT = "flexfed checkpoint 1"
KEPT = 2  # the newest, and the one before it in case the newest cannot be read


@dataclass(frozen=True)
class Checkpoint:
    """All that a server knows after a round. What it draws follows from (seed, round), so no generator is kept.

    Attributes:
        server_round: the last finished round; 0 = none yet.
        arrays: the global model.
        levels: evaluated submodels by name, packed as `flexfed.submodel.pack` does, smallest first.
        statistics: batch-norm statistics of each level at its last evaluation; None = those of the test batch.
        state: the strategy's own.
        facts: what describes the run besides: network, input, normalisation, number of clients.
        run: identifies the run by what must not change in it; see `run_identity`.
        metrics_bytes: length of metrics.jsonl.
    """

    server_round: int
    arrays: Arrays
    levels: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)
    statistics: Mapping[str, Statistics | None] = field(default_factory=dict)
    state: State = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    run: str = ""
    metrics_bytes: int = 0


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `round-<number>.safetensors`, and delete all but it and the newest before it.

    Raises:
        ValueError: a value of the strategy's state that JSON would give back changed; names it.
    """
    path = folder / f"round-{checkpoint.server_round:08d}.safetensors"
    write_tensors(path, FORMAT, *_to_parts(checkpoint))
    others = [other for other in _found(folder) if other != path]
    before = [other for other in others if other < path]
    for other in others:
        if other not in before[: KEPT - 1]:
            other.unlink()
    return path


def load_checkpoint(folder: Path, run: str | None = None) -> Checkpoint | None:
    """The newest checkpoint that can be read; None where there is none. Damaged ones are named in the log.

    Args:
        folder: of the checkpoints.
        run: whose they must be; None = anybody's.

    Raises:
        ValueError: there are some, and none can be read; says what is wrong with each.
    """
    wrong: list[str] = []
    for path in _found(folder):
        try:
            found = read_checkpoint(path)
            if run is not None and found.run != run:
                raise ValueError(f"{path} belongs to another run")
        except ValueError as cause:
            wrong.append(str(cause))
            log.warning("%s; trying the one before it", cause)
        else:
            return found
    if wrong:
        raise ValueError(f"no checkpoint in {folder} can be used: {'; '.join(wrong)}; start the run anew")
    return None


def _found(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest first."""
    return sorted(folder.glob("round-*.safetensors"), reverse=True)


def _to_parts(checkpoint: Checkpoint) -> tuple[str, Arrays]:
    """What becomes JSON, and what becomes tensors."""
    tensors = {f"model/{name}": array for name, array in checkpoint.arrays.items()}
    for level, found in checkpoint.statistics.items():
        for layer, (mean, variance) in (found or {}).items():
            tensors[f"mean/{level}/{layer}"] = mean
            tensors[f"variance/{level}/{layer}"] = variance
    tensors |= {f"state/{key}": value for key, value in checkpoint.state.items() if isinstance(value, np.ndarray)}
    text = json.dumps(
        {
            "round": checkpoint.server_round,
            "run": checkpoint.run,
            "metrics-bytes": checkpoint.metrics_bytes,
            "levels": {name: _as_text(packed) for name, packed in checkpoint.levels.items()},
            "statistics": {level: found is not None for level, found in checkpoint.statistics.items()},
            "state": _plain_state(checkpoint.state),
            "facts": dict(checkpoint.facts),
        }
    )
    return text, tensors


def _plain_state(state: State) -> dict[str, Any]:
    """The part of a state that is no array, if JSON gives it back as it is."""
    plain = {key: value for key, value in state.items() if not isinstance(value, np.ndarray)}
    for key, value in plain.items():
        try:
            same = json.loads(json.dumps(value)) == value
        except TypeError:
            same = False
        if not same:
            raise ValueError(
                f"state {key!r} must be an array, or numbers, strings, lists and mappings with string keys that JSON "
                f"gives back as they are; got {value!r}"
            )
    return plain


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint.

    Raises:
        ValueError: no such file, truncated, changed, or something else; names the file.
    """
    text, tensors = read_tensors(path, FORMAT)
    return _from_parts(json.loads(text), tensors)


def _from_parts(told: Mapping[str, Any], tensors: Arrays) -> Checkpoint:
    statistics: dict[str, Statistics | None] = {}
    for level, has_any in told["statistics"].items():
        means = _under(tensors, f"mean/{level}/")
        variances = _under(tensors, f"variance/{level}/")
        statistics[level] = {layer: (mean, variances[layer]) for layer, mean in means.items()} if has_any else None
    return Checkpoint(
        server_round=told["round"],
        arrays=_under(tensors, "model/"),
        levels={name: _as_bytes(packed) for name, packed in told["levels"].items()},
        statistics=statistics,
        state={**told["state"], **_under(tensors, "state/")},
        facts=told["facts"],
        run=told["run"],
        metrics_bytes=told["metrics-bytes"],
    )


def _under(tensors: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}


def _as_text(packed: Mapping[str, bytes]) -> dict[str, str]:
    return {name: base64.b64encode(data).decode() for name, data in packed.items()}


def _as_bytes(packed: Mapping[str, str]) -> dict[str, bytes]:
    return {name: base64.b64decode(text) for name, text in packed.items()}


def refuse_other_network(checkpoint: Checkpoint, layout: Layout) -> None:
    """Stop where a checkpoint's tensors are not the network's.

    Raises:
        ValueError: names the first tensor that differs.
    """
    theirs = {name: array.shape for name, array in checkpoint.arrays.items() if name in layout.shapes}
    for name, shape in layout.shapes.items():
        if theirs.get(name) != shape:
            raise ValueError(f"the checkpoint's tensor {name!r} should have shape {shape}, got {theirs.get(name)}")
