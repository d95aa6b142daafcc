"""Where a run stands after a round, on disk: one safetensors file a round, with JSON in its header, never a pickle."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flexfed.batchnorm import Statistics
from flexfed.runs import replacing
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
    """Write `round-<number>.safetensors`, whole or not at all, and delete all but the newest `KEPT`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"round-{checkpoint.server_round:08d}.safetensors"
    text, tensors = _to_parts(checkpoint)
    with replacing(path) as beside:
        save_file(tensors, beside, {"format": FORMAT, "checkpoint": text, "digest": _digest(text, tensors)})
    for old in _found(folder)[KEPT:]:
        old.unlink()
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
    plain = {key: value for key, value in checkpoint.state.items() if not isinstance(value, np.ndarray)}
    tensors |= {f"state/{key}": value for key, value in checkpoint.state.items() if isinstance(value, np.ndarray)}
    tensors = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    text = json.dumps(
        {
            "round": checkpoint.server_round,
            "run": checkpoint.run,
            "metrics-bytes": checkpoint.metrics_bytes,
            "levels": {name: _as_text(packed) for name, packed in checkpoint.levels.items()},
            "statistics": {level: found is not None for level, found in checkpoint.statistics.items()},
            "state": plain,
            "facts": dict(checkpoint.facts),
        }
    )
    return text, tensors


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint; its digest tells damage that leaves the file readable.

    Raises:
        ValueError: no such file, truncated, changed, or something else; names the file.
    """
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read, it may be truncated: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint: expected format {FORMAT!r}, got {metadata.get('format')!r}")
    if metadata.get("digest") != _digest(metadata["checkpoint"], tensors):
        raise ValueError(f"{path} is damaged: its digest is not that of its content")
    return _from_parts(json.loads(metadata["checkpoint"]), tensors)


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


def _digest(text: str, tensors: Arrays) -> str:
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(tensors.items()):
        digest.update(f"\0{name}\0{array.dtype}{array.shape}\0".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


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
