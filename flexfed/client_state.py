"""A client's private state on its own disk: a version for each round it took part in.

The server remembers the round of each client's last accepted reply and names it in the next job: the client goes on
from exactly that version. A reply that was lost or refused leaves no trace, and a server that fell back to an earlier
checkpoint finds its clients where they were then.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flexfed.jobs import Job
from flexfed.runs import absolute_path
from flexfed.submodel import Submodel, pack, unpack
from flexfed.tensorfile import read_tensors, write_tensors
from flexfed.units import Arrays, Layout

FORMAT = "flexfed client state 1"
LOST = "the private state of round"
"""What the error of a client begins with that has lost its state."""


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

    Raises:
        ValueError: the node's place is a relative path.
    """
    if node_dir:
        absolute_path("state-dir of the node-config", node_dir)
    if chosen := node_dir or state_dir:
        root = Path(chosen).expanduser() / run
    else:
        moved = Path(resume).expanduser()
        is_here = bool(resume) and (moved / "config.toml").is_file()
        root = (moved if is_here else Path(runs_dir).expanduser() / run) / "clients"
    return root / f"{partition:06d}"


def load_state(folder: Path, base: int) -> Arrays:
    """The version of a round; nothing for round 0, when the client starts anew.

    Raises:
        ValueError: it is not there, or cannot be read; names the file.
    """
    if not base:
        return {}
    path = _path(folder, base)
    if not path.is_file():
        raise ValueError(f"{LOST} {base} is missing: expected {path}; did state-dir change, or the device?")
    try:
        return read_tensors(path, FORMAT)[1]
    except ValueError as error:
        raise ValueError(f"{LOST} {base} cannot be read: {error}") from error


def save_state(folder: Path, server_round: int, state: Arrays, base: int) -> None:
    """Write the version of a round, and delete all but it, its base, and the base's own.

    The last is for a server that falls back one checkpoint; between them stand only replies that never counted.
    """
    write_tensors(_path(folder, server_round), FORMAT, "", state)
    older = [number for number in _versions(folder) if number < base]
    for number in set(_versions(folder)) - {server_round, base, *older[-1:]}:
        _path(folder, number).unlink()


def _path(folder: Path, server_round: int) -> Path:
    return folder / f"round-{server_round:08d}.safetensors"


def _versions(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("round-")) for path in folder.glob("round-*.safetensors"))


_SENT = "sent/"  # the submodel that came last, if it had masks


def with_masks(state: Arrays, job: Job) -> Arrays:
    """A client's new private state, with the masks that it was sent: they need not travel again.

    Args:
        state: the method's own; empty = nothing new.
        job: what was sent, and the state before it.
    """
    sent = job.submodel
    known = known_masks_key(job.state)
    if not sent.masks or (not state and known == sent.masks_key):
        return state
    kept = state or {name: array for name, array in job.state.items() if not name.startswith(_SENT)}
    packed = {f"{_SENT}{name}": np.frombuffer(data, dtype=np.uint8) for name, data in pack(sent).items()}
    return {**kept, **packed, f"{_SENT}key": np.frombuffer(sent.masks_key, dtype=np.uint8)}


def is_copy(state: Arrays) -> bool:
    """Whether a state holds nothing but what the server sent, and can send again."""
    return all(name.startswith(_SENT) for name in state)


def known_masks_key(state: Arrays) -> bytes:
    """`masks_key` of what a client was sent last; empty where that had no masks."""
    return state[f"{_SENT}key"].tobytes() if f"{_SENT}key" in state else b""


def known_masks(layout: Layout, state: Arrays) -> Submodel | None:
    """The submodel with masks that a client was sent last, from its private state."""
    if not known_masks_key(state):
        return None
    found = {name.removeprefix(_SENT): a.tobytes() for name, a in state.items() if name.startswith(_SENT)}
    return unpack(layout, {name: data for name, data in found.items() if name != "key"})
