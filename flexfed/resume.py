"""Continue a run: which configuration may, where it stands, and whether it is over."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexfed.checkpoint import Checkpoint, load_checkpoint
from flexfed.config import defaults_of, with_defaults
from flexfed.overrides import Scalar
from flexfed.runs import Metrics, RunFolder, load_run, read_config, read_rounds

log = logging.getLogger("flwr")

# What a continued run may be told anew: when it ends, and where things are. All else would make it another run.
MAY_CHANGE = frozenset({"num-server-rounds", "stop-at-accuracy", "resume", "runs-dir"})


def run_identity(config: Mapping[str, Scalar]) -> str:
    """A short hash of what must not change in a run: of all that is not at its default, so that new keys are none."""
    usual = defaults_of(str(config["strategy"]))
    fixed = {k: _plain(v) for k, v in config.items() if k not in MAY_CHANGE and (k not in usual or v != usual[k])}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Scalar) -> Scalar:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@dataclass(frozen=True)
class Resumed:
    """A run to be continued.

    Attributes:
        folder: of the run.
        config: its own.
        checkpoint: where it stands; None = killed before its first one.
        rounds: its lines up to there; what is behind is run again.
        is_finished: nothing is left but to show the summary.
    """

    folder: RunFolder
    config: Mapping[str, Scalar]
    checkpoint: Checkpoint | None
    rounds: Sequence[Metrics]
    is_finished: bool

    def begin(self, config: Mapping[str, Scalar], clients: int) -> None:
        """Make the folder fit to go on in: without what was written after the checkpoint."""
        found = self.checkpoint
        self.folder.cut(found.server_round if found else 0, found.metrics_bytes if found else 0)
        self.folder.write_config({**config, "runs-dir": self.config.get("runs-dir", "")}, clients)


def open_run(path: str, config: Mapping[str, Scalar]) -> Resumed:
    """The run in a folder, if this configuration may continue it.

    Raises:
        ValueError: no run folder, another configuration (names the keys that differ), no readable checkpoint, or
            rounds that are lost.
    """
    folder = Path(path).expanduser()
    own = read_config(folder)
    refuse_other_configuration(folder, own, config)
    goal: tuple[Any, Any] = (config["num-server-rounds"], config.get("stop-at-accuracy", 0.0))
    is_shown = (folder / "summary.json").exists()
    if is_shown and is_over((run := load_run(folder)).rounds, *goal):
        return Resumed(RunFolder(folder), own, None, run.rounds, True)
    found = load_checkpoint(folder / "checkpoint", run_identity(config))
    if is_shown and found and found.facts.get("over"):  # it ended by itself
        return Resumed(RunFolder(folder), own, found, run.rounds, True)
    rounds = read_rounds(folder, found.metrics_bytes if found else None)
    if found is None and len(rounds) > 1:  # one line may be written before the first checkpoint
        raise ValueError(f"{folder} has {len(rounds)} rounds, but no checkpoint to go on from: start the run anew")
    return Resumed(RunFolder(folder), own, found, rounds if found else (), False)


def refuse_other_configuration(folder: Path, own: Mapping[str, Scalar], given: Mapping[str, Scalar]) -> None:
    """Stop where a run would go on under another configuration than its own.

    Raises:
        ValueError: says which keys differ, and how to give the run its own.
    """
    there, here = with_defaults(own), with_defaults(given)
    keys = sorted((there.keys() | here.keys()) - MAY_CHANGE)
    differing = [
        f"{key} ({there.get(key, 'absent')!r} there, {here.get(key, 'absent')!r} now)"
        for key in keys
        if there.get(key) != here.get(key)
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


def refuse_other_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Stop where a run would go on with other clients or other data; warn where only the code is another.

    Args:
        before: facts of its checkpoint.
        now: the same of the run that goes on.

    Raises:
        ValueError: says what differs.
    """
    if before["clients"] != now["clients"]:
        raise ValueError(
            f"the run had {before['clients']} clients, now there are {now['clients']}, so their data would be others; "
            f"give it {before['clients']}"
        )
    for key in ("num-classes", "input-shape", "input-mean", "input-std"):
        if before[key] != now[key]:
            raise ValueError(f"the run's data have changed: {key} was {before[key]}, is {now[key]}")
    if (there := before.get("torch-device", now["torch-device"])) != now["torch-device"]:
        log.warning("the run has computed on %s so far: on another device its bits differ", there)
    if before["code"] != now["code"]:
        log.warning(
            "the run was begun by other code (%s) than this (%s): its bits may differ", before["code"], now["code"]
        )
