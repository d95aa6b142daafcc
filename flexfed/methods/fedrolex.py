"""FedRolex: HeteroFL whose submodels roll over the channels, so that a small device sees them all in time.

"FedRolex: Model-Heterogeneous Federated Learning with Rolling Sub-Model Extraction" (Samiul Alam, Luyang
Liu, Ming Yan, Mi Zhang, NeurIPS 2022, arXiv 2212.01548). Levels, scaler, loss, classifier rows and batch norm
are HeteroFL's (`flexfed.methods.heterofl`); only the units differ, and the largest level may be below 1: no
client need hold the whole network.

Differences from the released code:
- The window rolls forwards, as in the paper; the code's rolls backwards (option `direction`).
- Its kept width is HeteroFL's, rounded up, as in the code; the paper rounds down.
- Units of a window that wraps around keep their order in the network, which changes no result.
- The code's overlap option, which shuffles the channels, is left out.
- An entry's mean is over the clients that cover it. In the code an update counter is aliased while it
  changes, so in norms, biases and classifier the m-th covering client gets weight m.
- The mean is uniform by default, as in the code; the paper weights by examples (option `weights`).
- Evaluation uses static batch norm; the code uses the statistics of the test batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from flexfed.methods.heterofl import HeteroFLConfig
from flexfed.select import window
from flexfed.submodel import Submodel
from flexfed.units import Layout

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class FedRolexConfig(HeteroFLConfig):
    """What a run may set of FedRolex: all that HeteroFL has, and the direction.

    Attributes:
        direction: "forward" as in the paper, "backward" as in the released code.
    """

    method: ClassVar[str] = "fedrolex"

    direction: Direction = "forward"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("direction", self.direction, get_args(Direction))


def rolling(layout: Layout, ratio: float, server_round: int, direction: Direction = "forward") -> Submodel:
    """The submodel of one ratio in one round.

    Round 1 begins at unit 0 of every group and each further round one unit later, modulo the group's width:
    over as many rounds as a group has units, each is used equally often. All clients of a round share the
    start, so smaller submodels lie inside larger ones.

    Args:
        layout: the network's numbering.
        ratio: kept fraction of each group, in (0, 1].
        server_round: 1, 2, 3, ...
        direction: see `FedRolexConfig`.
    """
    return window(layout, ratio, server_round - 1, 1 if direction == "forward" else -1)
