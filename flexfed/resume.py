"""Continue a run: which configuration may, where it stands, and whether it is over."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexfed.checkpoint import Checkpoint, load_checkpoint
from flexfed.overrides import Scalar
from flexfed.runs import Metrics, Run, RunFolder, load_run

# What a continued run may be told anew: when it ends, and where things are. All else would make it another run.
MAY_CHANGE = frozenset({"num-server-rounds", "stop-at-accuracy", "resume", "runs-dir"})


def run_identity(config: Mapping[str, Scalar]) -> str:
    """A short hash of what must not change in a run; 1 and 1.0 are the same."""
    fixed = {key: _plain(value) for key, value in config.items() if key not in MAY_CHANGE}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Scalar) -> Scalar:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@dataclass(frozen=True)
class Resumed:
    """A run to be continued: its folder, and where it stands; None = killed before its first checkpoint."""

    folder: RunFolder
    checkpoint: Checkpoint | None
    run: Run

    def is_finished(self, num_rounds: int, stop_at_accuracy: float) -> bool:
        """Whether nothing is left to do but to show the summary."""
        return self.run.summary is not None and is_over(self.run.rounds, num_rounds, stop_at_accuracy)

    def prepare(self, config: Mapping[str, Scalar], clients: int) -> None:
        """Make the folder fit to go on in: without what was written after the checkpoint."""
        found = self.checkpoint
        self.folder.cut(found.server_round if found else 0, found.metrics_bytes if found else 0)
        self.folder.write_config({**config, "runs-dir": self.run.config.get("runs-dir", "")}, clients)


def open_run(path: str, config: Mapping[str, Scalar]) -> Resumed:
    """The run in a folder, if this configuration may continue it.

    Raises:
        ValueError: no run folder, another configuration (names the keys that differ), or no readable checkpoint.
    """
    folder = Path(path).expanduser()
    run = load_run(folder)
    refuse_other_configuration(folder, run.config, config)
    return Resumed(RunFolder(folder), load_checkpoint(folder / "checkpoint", run_identity(config)), run)


def refuse_other_configuration(folder: Path, own: Mapping[str, Scalar], given: Mapping[str, Scalar]) -> None:
    """Stop where a run would go on under another configuration than its own.

    Raises:
        ValueError: says which keys differ, and how to give the run its own.
    """
    keys = sorted((own.keys() | given.keys()) - MAY_CHANGE)
    differing = [
        f"{k} ({own.get(k, 'absent')!r} there, {given.get(k, 'absent')!r} now)"
        for k in keys
        if own.get(k) != given.get(k)
    ]
    if differing:
        raise ValueError(
            f"the run in {folder} cannot go on with another configuration: {', '.join(differing)}; "
            f"give it its own: `flexfed run -c \"resume='{folder}'\"` or `flwr run . -c {folder}/resume.toml`"
        )
    before, now = own.get("num-server-rounds", 0), given.get("num-server-rounds", 0)
    if now < before:  # type: ignore[operator]
        raise ValueError(
            f"the run in {folder} has num-server-rounds={before}; a continued run needs as many or more, got {now}"
        )


def is_over(rounds: Sequence[Metrics], num_rounds: int, stop_at_accuracy: float) -> bool:
    """Whether a run has had its rounds, or the accuracy at which it stops."""
    return bool(rounds) and (rounds[-1]["round"] >= num_rounds or reached(rounds[-1], stop_at_accuracy))


def reached(line: Metrics, stop_at_accuracy: float) -> bool:
    """Whether a round's global model is as good as asked for; 0 = never."""
    accuracy: Any = line.get("accuracy")
    return bool(stop_at_accuracy) and accuracy is not None and accuracy >= stop_at_accuracy
