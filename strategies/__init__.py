"""One Flower Strategy a method; STRATEGIES names them as the configuration does."""

from __future__ import annotations

from strategies.autoflip import AutoFLIP
from strategies.compressed import Compressed
from strategies.depthfl import DepthFL
from strategies.fedavg import Exclusive, FedAvg, Small
from strategies.federated import FederatedStrategy
from strategies.fedlps import FedLPS
from strategies.fedrolex import FedRolex
from strategies.fedstitch import FedStitch
from strategies.fiarse import FIARSE
from strategies.fjord import FjORD
from strategies.flexfl import FlexFL
from strategies.heterofl import HeteroFL
from strategies.scalefl import ScaleFL

STRATEGIES: dict[str, type[FederatedStrategy]] = {
    "autoflip": AutoFLIP,
    "compressed": Compressed,
    "depthfl": DepthFL,
    "exclusive": Exclusive,
    "fedavg": FedAvg,
    "fedlps": FedLPS,
    "fedrolex": FedRolex,
    "fedstitch": FedStitch,
    "fiarse": FIARSE,
    "fjord": FjORD,
    "flexfl": FlexFL,
    "heterofl": HeteroFL,
    "scalefl": ScaleFL,
    "small": Small,
}
