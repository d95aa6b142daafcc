"""A client's private state on its own disk: a version for each round it took part in, three of them kept.

A client asked for round k reads the newest version below k, whatever it saved later: a server that was killed and
fell back to an earlier round finds its clients where they were then.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from flexfed.runs import write_atomic
from flexfed.units import Arrays

KEPT = 3  # the round in progress, its base, and one more for a server that fell back one checkpoint


def state_folder(node_dir: str, state_dir: str, resume: str, runs_dir: str, run: str, partition: int) -> Path:
    """Where a client keeps its state of a run: the node's own place, else the run's, else the run folder.

    On a real device the last one is a folder of its own with the same name; the server's is not there.

    Args:
        node_dir: `state-dir` of the node-config; "" = none.
        state_dir: `state-dir` of the run configuration; "" = none.
        resume: the run folder that is continued, which may have been moved; "" = none.
        runs_dir: where run folders are.
        run: name of the run.
        partition: the client.
    """
    if chosen := node_dir or state_dir:
        root = Path(chosen).expanduser() / run
    else:
        moved = Path(resume).expanduser() / "clients"
        root = moved if resume and moved.is_dir() else Path(runs_dir).expanduser() / run / "clients"
    return root / f"{partition:06d}"


def load_state(folder: Path, server_round: int) -> Arrays:
    """The newest version from before a round; nothing if there is none.

    Raises:
        ValueError: it cannot be read; names the file.
    """
    for path in reversed(_versions(folder)):
        if _round_of(path) < server_round:
            try:
                return load_file(path)
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"the private state {path} cannot be read ({error}); delete it to go on from the version before"
                ) from error
    return {}


def save_state(folder: Path, server_round: int, state: Arrays) -> None:
    """Write the version of a round; later ones, of rounds that are run again, and all but `KEPT` are deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in _versions(folder):
        if _round_of(path) > server_round:
            path.unlink()
    dense = {name: np.asarray(array, order="C") for name, array in state.items()}
    write_atomic(folder / f"round-{server_round:08d}.safetensors", save(dense))
    for path in _versions(folder)[:-KEPT]:
        path.unlink()


def _versions(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("round-*.safetensors"))


def _round_of(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))
