"""What the server of every method does: it knows who is there, keeps each round's record, and can go on from one."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from flexfed.checkpoint import Checkpoint
from flexfed.compute import described, torch_device
from flexfed.config import Experiment
from flexfed.data import DatasetInfo, ServerData
from flexfed.devices import Device
from flexfed.flower.federation import Federation
from flexfed.flower.messages import code_fingerprint, in_one_line
from flexfed.jobs import Scalar
from flexfed.models import input_convention
from flexfed.networks import Convention
from flexfed.resume import reached, refuse_other_data
from flexfed.runs import Measured
from flexfed.units import Arrays
from strategies.record import RoundRecord

log = logging.getLogger("flwr")

OnRound = Callable[[dict[str, Any], Checkpoint, Measured], None]
"""Called after every round with its line, with all that is needed to go on from there, and with what was measured."""


class RunOver(Exception):
    """The rounds end early: nothing is left to do, or the accuracy asked for is reached."""


class FederatedStrategy(Strategy):
    """A federated run, whatever its clients are asked.

    Flower's own `start` drives the rounds. Give it a `StreamingGrid`: replies are then taken one at a time as they
    arrive. A plain grid works too.

    Args:
        experiment: the run's configuration.
        task: what `set_up` gave.
        server: the proxy and test splits, normalised.
        transform: values every message carries: how to normalise as the server does, and the name of the run.
        on_round: see `OnRound`.
        resumed: where the run stood when it was left; its next round is the first one here.
        folder: of the run, for what is too large for memory; None = there is none.

    Attributes:
        settings: the knobs that all methods share.
        federation: who is out there; its devices are nominal.
        devices: those that are there in this round, as they are in it.
        record: of this round.
        place: where the server's networks compute.
        asked: jobs of the whole run; `accepted` are valid replies.
    """

    def __init__(
        self,
        experiment: Experiment,
        task: Any,
        server: ServerData,
        transform: Mapping[str, Scalar] | None = None,
        on_round: OnRound | None = None,
        resumed: Checkpoint | None = None,
        folder: Path | None = None,
    ):
        self.experiment = experiment
        self.settings = experiment.settings
        self.task = task
        self.server = server
        self.transform = dict(transform or {})
        self.on_round = on_round
        self.folder = folder
        self.federation = Federation()
        self.devices: Mapping[int, Device] = {}
        self.asked = self.accepted = 0
        self._arrays: Arrays = {}
        self._resumed = resumed
        self._begun = False
        self._offset = resumed.server_round if resumed else 0  # Flower's `start` counts from 1 again
        self.record = RoundRecord(self._offset)
        self.place = torch_device(self.settings.torch_device)
        if resumed is not None:
            self.asked, self.accepted = resumed.facts["asked"], resumed.facts["accepted"]

    # Setting up -----------------------------------------------------------------------------------------------

    @classmethod
    def convention(cls, experiment: Experiment, channels: int) -> Convention | None:
        """How inputs of so many channels are to be normalised; None = by their own mean and deviation."""
        return input_convention(experiment.settings.model, channels)

    @classmethod
    @abstractmethod
    def set_up(cls, experiment: Experiment, info: DatasetInfo, stood: Checkpoint | None) -> tuple[Any, Arrays]:
        """What the run works on, and the global model that it begins with.

        Args:
            experiment: the run's configuration.
            info: of its data.
            stood: where the run stood that goes on.

        Raises:
            ValueError: no such network, or one that does not fit the data or the method.
        """

    def meet(self, grid: Grid) -> None:
        """Get to know the devices.

        Raises:
            ValueError: the run that goes on had other clients or other data when it was left; or there are fewer
                clients than a round needs.
        """
        self.federation.meet(grid, self.settings.round_timeout)
        if (there := self.federation.num_partitions) < self.settings.min_replies:
            raise ValueError(f"min-replies={self.settings.min_replies}, but there are only {there} clients; lower it")
        if self._resumed is not None:
            refuse_other_data(self._resumed.facts, self.run_facts())

    @abstractmethod
    def begin(self, arrays: Arrays, grid: Grid) -> None:
        """Prepare, once the devices are known; or take up what a run that goes on had prepared."""

    # The rounds -----------------------------------------------------------------------------------------------

    def open_round(self, server_round: int) -> np.random.Generator:
        """The devices that are there in a round, as they are in it; its generator of random numbers."""
        federation, settings = self.federation, self.settings
        federation.look_around(settings.min_replies, settings.round_timeout)
        there = ((p, d) for p, d in federation.devices.items() if p in federation.present)
        self.devices = {partition: device.in_round(server_round, settings.seed) for partition, device in there}
        return np.random.default_rng([self.settings.seed, server_round])

    def cohort_size(self, num_devices: int) -> int:
        """Devices a round: the fraction rounded down, and at least as many as have to reply."""
        return max(self.settings.min_replies, int(self.settings.fraction_train * num_devices + 1e-9))

    def seed_of(self, server_round: int, partition: int) -> int:
        """The seed of one client and round."""
        return int(np.random.SeedSequence([self.settings.seed, server_round, partition]).generate_state(1)[0])

    def note(self, where: list[dict[str, Any]], partition: int, reason: str) -> None:
        """Write down, and log, why a client's reply does not count."""
        reason = in_one_line(reason)
        where.append({"partition": partition, "reason": reason})
        log.warning("round %s: client %s left out: %s", self.record.server_round, partition, reason)

    def close_round(self, facts: Mapping[str, Any]) -> None:
        """Hand the round's line over.

        Raises:
            RunOver: the model is as good as `stop-at-accuracy` asks for.
        """
        line = {**self.record.line(), **facts}
        if self.on_round is not None:
            self.on_round(line, self.checkpoint(), self.record.measured)
        if reached(line, self.settings.stop_at_accuracy):
            raise RunOver

    @abstractmethod
    def checkpoint(self) -> Checkpoint:
        """All that is needed to go on after the last finished round."""

    def run_facts(self) -> dict[str, Any]:
        """What describes the run in its checkpoint."""
        return {
            "strategy": self.settings.strategy,
            "model": self.settings.model,
            "clients": self.federation.num_partitions,
            "code": code_fingerprint(),
            "torch-device": self._torch_devices(),
            "asked": self.asked,
            "accepted": self.accepted,
            **self.transform,
        }

    def _torch_devices(self) -> str:
        """What the run has computed on so far, the device of now last: a run may go on elsewhere."""
        before = self._resumed.facts.get("torch-device", "") if self._resumed else ""
        known, now = before.split(", then ") if before else [], described(self.place)
        return ", then ".join([*known, now] if known[-1:] != [now] else known)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do, however many rounds there may still be."""
        return False

    # The end --------------------------------------------------------------------------------------------------

    @property
    def arrays(self) -> Arrays:
        """The global model."""
        return self._arrays

    @abstractmethod
    def final_model(self) -> Arrays:
        """The model that the run reports, with the batch-norm statistics it was last evaluated with."""

    def model_metadata(self, model: Arrays) -> Mapping[str, str]:
        """What stands in the file of the final model besides."""
        return {}

    def summary_facts(self) -> dict[str, Any]:
        """What stands in summary.json beside what the rounds say."""
        return {
            "strategy": self.settings.strategy,
            "model": self.settings.model,
            "dataset": self.experiment.data.dataset,
            "seed": self.settings.seed,
            "torch-device": self._torch_devices(),
            "clients": len(self.federation.devices),
        }

    def next_run(self, folder: Path) -> Mapping[str, Any]:
        """Keys of the configuration that another run has, which is to follow this one; none = nothing follows."""
        return {}
