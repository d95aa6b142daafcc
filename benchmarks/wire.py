"""Bytes of real messages in each direction, over what the parameters alone would take."""

from __future__ import annotations

import numpy as np
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects  # what Flower puts on the wire

import client_app
from benchmarks.folding import NUM_CLASSES, RATES, draw_model, resnet_layout
from benchmarks.measuring import Row
from flexfed.cost import num_parameters
from flexfed.flower.grid import InProcessGrid
from flexfed.flower.messages import job_content, num_bytes, to_array, update_content
from flexfed.jobs import Assignment, Update
from flexfed.select import prefix_ratio
from flexfed.submodel import extract, flatten

# What jobs carry besides, so that clients normalise as the server does; one entry for each input channel.
TRANSFORM = {"num-classes": NUM_CLASSES, "input-shape": [3, 32, 32], "input-mean": [0.5] * 3, "input-std": [0.25] * 3}


def job(rate: float) -> Message:
    """A job as the strategies send it."""
    layout = resnet_layout()
    submodel = prefix_ratio(layout, rate)
    part = to_array(flatten(layout, submodel, extract(layout, submodel, draw_model(layout))))
    content = job_content({"part": part}, Assignment(submodel, "a", {"ratio": rate}), 2**32 - 1, 1000, TRANSFORM)
    return Message(content, dst_node_id=2**63, message_type="train", group_id="1000")


def update(rate: float) -> Message:
    """A client's reply to it."""
    submodel = prefix_ratio(resnet_layout(), rate)
    size = num_parameters(resnet_layout(), submodel)
    difference = np.random.default_rng(1).standard_normal(size, dtype=np.float32)
    content = update_content(Update(submodel, difference, 500.0, {"train-loss": 1.0, "macs": 1e12}), resnet_layout())
    return Message(content, reply_to=job(rate))


def serialised_bytes(message: Message) -> int:
    """Bytes of the objects that Flower sends for a message, its own framing included."""
    return sum(len(inflatable.deflate()) for inflatable in get_all_nested_objects(message).values())


def row(direction: str, rate: float) -> Row:
    """One message; the bound is 1.02 times four bytes a parameter and 256 bytes a tensor."""
    layout, message = resnet_layout(), {"job": job, "update": update}[direction](rate)
    parameters = num_parameters(layout, prefix_ratio(layout, rate))
    allowed = 1.02 * 4 * parameters + 256 * len(layout.shapes)
    counted, sent = num_bytes(message), serialised_bytes(message)
    detail = (
        f"{counted:,} bytes (Flower sends {sent:,}), {parameters:,} parameters, {counted - 4 * parameters:,} besides"
    )
    return Row(f"{direction}, rate {rate:g}: bytes / allowed", sent / allowed, "x", 1.0, detail)


def rows() -> list[Row]:
    """Both directions, every rate."""
    InProcessGrid(client_app.app, num_supernodes=1)  # Flower makes messages within a run only
    return [row(direction, rate) for direction in ("job", "update") for rate in RATES]
