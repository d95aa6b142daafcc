"""The methods' mathematics, one file a paper; METHODS says what a strategy's client does and its knobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flexfed.data import ClientData
from flexfed.exits import Exits
from flexfed.jobs import Job, LocalUpdate, Task, Update
from flexfed.methods import (
    autoflip,
    compressed,
    depthfl,
    fedavg,
    fedlps,
    fedrolex,
    fedstitch,
    fedstitch_client,
    fiarse,
    fjord,
    flexfl,
    heterofl,
    scalefl,
)
from flexfed.questions import Phase
from flexfed.submodel import Submodel
from flexfed.units import Arrays


def no_training(job: Job, task: Task, data: ClientData) -> Update:
    """Of methods that train no parts.

    Raises:
        ValueError: always.
    """
    raise ValueError("clients of this method train no parts, they answer questions; who sent a job?")


def as_trained(task: Task, submodel: Submodel, part: Arrays) -> Arrays:
    """Of methods whose parts compute the same when they are used as when they are trained."""
    return part


@dataclass(frozen=True)
class Method:
    """A method as the configuration and the client know it.

    Attributes:
        config: its knobs.
        prefix: of their keys in the configuration.
        local_update: its work on the client; by default it has none: its clients only answer questions.
        actions: further work of its client, by name: asked for in messages `train.<name>`.
        as_used: a part's tensors, from those that are trained: of a plain network that computes what the part does.
        exits: the classifiers that it attaches to the network, given its knobs and the stages that the run names.
        phases: what its client is asked beside the training of parts: message type -> the answer.
        cuts: it gives devices parts of the network, which therefore must be one that can be traced.
        any_width: it can give each device a width of its own, so that any `ratio-policy` works.
        ratio_policy: its default.
        personal: by default, which models of their own its clients test.
        masks_recur: its masks can be those of the round before: clients keep them, so that they need not travel again.
    """

    config: type
    prefix: str
    local_update: LocalUpdate = no_training
    cuts: bool = True
    any_width: bool = False
    ratio_policy: str = "level"
    personal: str = "none"
    masks_recur: bool = False
    actions: Mapping[str, LocalUpdate] = field(default_factory=dict)
    phases: Mapping[str, Phase] = field(default_factory=dict)
    exits: Callable[[Any, tuple[str, ...]], Exits] | None = None
    as_used: Callable[[Task, Submodel, Arrays], Arrays] = as_trained


METHODS: dict[str, Method] = {
    "autoflip": Method(
        autoflip.AutoFLIPConfig,
        "autoflip.",
        autoflip.local_update,
        masks_recur=True,
        actions={"explore": autoflip.explore},
    ),
    "compressed": Method(compressed.CompressedConfig, "compressed.", compressed.local_update),
    "depthfl": Method(depthfl.DepthFLConfig, "depthfl.", depthfl.local_update, exits=depthfl.exits),
    "exclusive": Method(fedavg.ExclusiveConfig, "exclusive.", fedavg.local_update, cuts=False),
    "fedavg": Method(fedavg.FedAvgConfig, "fedavg.", fedavg.local_update, cuts=False),
    "fedlps": Method(
        fedlps.FedLPSConfig,
        "fedlps.",
        fedlps.local_update,
        any_width=True,
        ratio_policy="p-ucbv",
        personal="stored-local",
    ),
    "fedrolex": Method(fedrolex.FedRolexConfig, "fedrolex.", heterofl.local_update, any_width=True),
    "fedstitch": Method(
        fedstitch.FedStitchConfig,
        "fedstitch.",
        phases={
            "train.score": fedstitch_client.score,
            "train.stitch": fedstitch_client.stitch,
            "train.head": fedstitch_client.head,
            "evaluate.stitched": fedstitch_client.test,
        },
    ),
    "fiarse": Method(fiarse.FIARSEConfig, "fiarse.", fiarse.local_update),
    "fjord": Method(fjord.FjORDConfig, "fjord.", fjord.local_update, any_width=True),
    "flexfl": Method(flexfl.FlexFLConfig, "flexfl.", flexfl.local_update, any_width=True),
    "heterofl": Method(heterofl.HeteroFLConfig, "heterofl.", heterofl.local_update, any_width=True),
    "scalefl": Method(
        scalefl.ScaleFLConfig, "scalefl.", scalefl.local_update, exits=scalefl.exits_of, as_used=scalefl.as_used
    ),
    "small": Method(fedavg.SmallConfig, "small.", fedavg.local_update),
}
