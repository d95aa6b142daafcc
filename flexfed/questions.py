"""What clients are asked that is not the training of a part of a network, and what they answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flexfed.devices import Device
from flexfed.jobs import Scalar
from flexfed.units import Arrays

if TYPE_CHECKING:
    from flexfed.data import ClientData


@dataclass(frozen=True)
class Question:
    """Work for one client in one phase of a round.

    Attributes:
        config: what the method asks.
        arrays: what came with it.
        device: who is asked.
        seed: of this client, round and phase; every draw on the client comes from it.
        server_round: counted from 1.
        input_shape: of one sample.
        num_classes: of the task.
        state: what this client kept for itself after an earlier answer; it never travels.
    """

    config: Mapping[str, Scalar]
    arrays: Arrays
    device: Device
    seed: int
    server_round: int
    input_shape: tuple[int, ...]
    num_classes: int
    state: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a client found.

    Attributes:
        metrics: finite numbers.
        arrays: sums, scores.
        state: what the client keeps for itself; it never travels. Empty = nothing new.
    """

    metrics: Mapping[str, float]
    arrays: Arrays = field(default_factory=dict)
    state: Arrays = field(default_factory=dict)


Phase = Callable[[Question, Any, "ClientData"], Answer]
"""A client's part in a phase: the question, the method's configuration, the client's data -> the answer."""
