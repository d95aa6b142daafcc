"""A client's own model: the part that it trained last, kept on its disk, and tested on its own samples."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flexfed.data import ClientData
from flexfed.evaluation import part_statistics
from flexfed.jobs import Part, Task, evaluate_part
from flexfed.submodel import Submodel, flatten, pack, unflatten, unpack
from flexfed.training import Evaluation
from flexfed.units import Arrays


def model_state(task: Task, part: Part) -> Arrays:
    """A client's own model for its private state."""
    whole = Submodel(part.submodel.units, part.submodel.keys)  # masked entries are zeros in it
    described = {f"model/{name}": np.frombuffer(data, dtype=np.uint8) for name, data in pack(whole).items()}
    return {**described, "model/part": flatten(task.layout, whole, part.arrays)}


def stored_model(task: Task, state: Mapping[str, np.ndarray]) -> Part:
    """Undo `model_state`.

    Raises:
        ValueError: the client keeps no model.
    """
    if "model/units" not in state:
        raise ValueError("this client keeps no model of its own: it has trained none in this run")
    packed = {name: state[f"model/{name}"].tobytes() for name in ("units", "keys") if f"model/{name}" in state}
    submodel = unpack(task.layout, packed)
    return Part(submodel, unflatten(task.layout, submodel, state["model/part"]))


def evaluate_personal(task: Task, part: Part, data: ClientData, batch_norm: str) -> Evaluation:
    """Test a part on a client's test samples.

    Args:
        task: the network.
        part: the client's own.
        data: of the client.
        batch_norm: "static" = with statistics of its own training samples, "batch" = with those of each batch.
    """
    found = part_statistics(task, part.arrays, data.train) if batch_norm == "static" else None
    return evaluate_part(task, part.arrays, found, data.test)
