"""The methods' mathematics, one file a paper; METHODS says what a strategy's client does and its knobs."""

from __future__ import annotations

from dataclasses import dataclass

from flexfed.jobs import LocalUpdate
from flexfed.methods import fedavg, fedrolex, flexfl, heterofl


@dataclass(frozen=True)
class Method:
    """A method's knobs, the prefix of their keys in the configuration, and its work on the client."""

    config: type
    prefix: str
    local_update: LocalUpdate


METHODS: dict[str, Method] = {
    "exclusive": Method(fedavg.ExclusiveConfig, "exclusive.", fedavg.local_update),
    "fedavg": Method(fedavg.FedAvgConfig, "fedavg.", fedavg.local_update),
    "fedrolex": Method(fedrolex.FedRolexConfig, "fedrolex.", heterofl.local_update),
    "flexfl": Method(flexfl.FlexFLConfig, "flexfl.", flexfl.local_update),
    "heterofl": Method(heterofl.HeteroFLConfig, "heterofl.", heterofl.local_update),
    "small": Method(fedavg.SmallConfig, "small.", fedavg.local_update),
}
