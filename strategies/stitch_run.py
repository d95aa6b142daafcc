"""A stitching run apart from its rounds: what it begins with, how it goes on from a checkpoint, and what it leaves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path as Folder
from typing import Any, cast

from flwr.serverapp import Grid

from flexfed.checkpoint import Checkpoint
from flexfed.config import Experiment
from flexfed.cost import memory_budget
from flexfed.data import DatasetInfo, ServerData
from flexfed.devices import Device
from flexfed.jobs import TEST_BATCH, Scalar
from flexfed.methods.fedstitch import NO_FINETUNING, FedStitchConfig, pool_of
from flexfed.networks import Convention
from flexfed.stitching.blocks import Pool
from flexfed.stitching.construction import Construction, fixed_path
from flexfed.stitching.network import build_stitched, fill, stitched_arrays, stitched_name
from flexfed.stitching.phases import (
    GROUP,
    Work,
    modelled_peak_bytes,
)
from flexfed.stitching.saved import FORMAT, recipe_of
from flexfed.stitching.votes import Aggregator
from flexfed.stitching.zoos import input_convention
from flexfed.tensorfile import metadata_of
from flexfed.training import evaluate
from flexfed.units import Arrays
from strategies.federated import FederatedStrategy, OnRound
from strategies.finetuning import refuse_uncut
from strategies.stitch_clients import StitchClients

log = logging.getLogger("flwr")


class StitchRun(FederatedStrategy):
    """The state of a stitching run; its rounds are FedStitch's (`strategies.fedstitch`).

    Attributes:
        aggregator: whose scores count how much.
        clients: what is known of each of them.
        cohort: of this round.
        now: the network under construction.
        whole: the last one that was finished.
    """

    task: Pool

    def __init__(
        self,
        experiment: Experiment,
        task: Pool,
        server: ServerData,
        transform: Mapping[str, Scalar] | None = None,
        on_round: OnRound | None = None,
        resumed: Checkpoint | None = None,
        folder: Folder | None = None,
    ):
        super().__init__(experiment, task, server, transform, on_round, resumed, folder)
        self.config: FedStitchConfig = experiment.method
        state = resumed.state if resumed else {}
        self.aggregator = Aggregator(self.config.votes)
        self.clients = StitchClients(self, state)
        self.cohort: list[int] = []
        self.now = self._fresh(1)
        self.whole: Construction | None = None  # the last one that was finished
        if resumed is not None:
            self.aggregator.load_state_dict(state)
            self.now = replace(self.now, **Construction.read(under(state, "now")))
            if before := under(state, "whole"):
                self.whole = replace(self.now, **Construction.read(before))
        self._over = bool(resumed and resumed.facts["over"])

    def _fresh(self, episode: int) -> Construction:
        fixed = fixed_path(self.config.path, self.task)
        return Construction.first(self.task, self.config.search, episode, self.server.info.num_classes, fixed)

    @classmethod
    def convention(cls, experiment: Experiment, channels: int) -> Convention | None:
        """As the zoo's networks were trained."""
        return input_convention(experiment.method.zoo, channels)

    @classmethod
    def set_up(cls, experiment: Experiment, info: DatasetInfo, stood: Checkpoint | None) -> tuple[Pool, Arrays]:
        """The blocks; no global model stands before the first one."""
        pool = pool_of(experiment.method, info.input_shape)
        refuse_uncut(pool, info.num_classes, experiment.method.finetune)
        return pool, {}

    def begin(self, arrays: Arrays, grid: Grid) -> None:
        """Leave out devices that could not run a single block.

        Raises:
            ValueError: none could; or the run that goes on had other blocks.
        """
        self._begun = True
        if self._resumed is not None and self._resumed.facts["digest"] != self.task.digest:
            raise ValueError(f"the run had other blocks: its zoo {self.config.zoo!r} has changed; start the run anew")
        able = self._able()
        if not able:
            raise ValueError("no device can run every block; see memory-bytes of the fleet, and fedstitch.zoo")
        if not self.now.path.ids and not self.now.candidates:
            raise ValueError(
                f"no block can come first: with fedstitch.max-blocks={self.config.max_blocks} it would have to begin "
                "and to end a source; raise it"
            )
        left_out = sorted(self.federation.devices.keys() - able)
        if left_out:
            log.info("%s devices cannot run every block: partitions %s", len(left_out), left_out)

    def _able(self) -> set[int]:
        """Who can take part in some round."""
        return {p for p, device in self.federation.devices.items() if any(map(self.can_stitch, device.states()))}

    def can_stitch(self, device: Device) -> bool:
        """Whether every block fits into a device's memory, for the smallest batch, and it has samples."""
        every = Work(1, GROUP, 0, tuple(block.id for block in self.task.blocks), 0)
        need = memory_budget(modelled_peak_bytes(self.task, every, GROUP))
        return need <= device.memory_bytes and device.num_examples > 0

    def summary(self) -> None:
        """Log what is about to run."""
        sources = ", ".join(self.task.sources)
        log.info("fedstitch on zoo %s: %s blocks of %s", self.config.zoo, len(self.task.blocks), sources)

    @property
    def is_over(self) -> bool:
        """Whether the network of the last episode is whole, or nothing could be added to it."""
        return self._over or self.now.is_over

    # What it leaves ---------------------------------------------------------------------------------------------

    @property
    def result(self) -> Construction:
        """The last whole network; where none is whole yet, as far as it came."""
        return self._left_by(self.now)

    def _left_by(self, now: Construction) -> Construction:
        """What the run leaves, and reports, if it ends with that."""
        return now if self.whole is None or now.is_over else self.whole

    @property
    def network_name(self) -> str:
        """What the result is called where a run asks for a network by name."""
        return stitched_name(self.task, self.result.path.ids)

    def _network(self, at: Construction) -> Arrays:
        if at.head is None:
            raise RuntimeError("no round brought a block, so there is no network; see the log")
        return stitched_arrays(self.task, at.path, at.head)

    def _measured(self, at: Construction) -> dict[str, float]:
        """Accuracy of the whole network on the server's test samples."""
        model = fill(build_stitched(self.task, at.path.ids, self.server.info.num_classes), self._network(at))
        result = evaluate(model.eval().to(self.place), self.server.test, TEST_BATCH)
        names = ("accuracy", "accuracy-levels", "accuracy-stitched")
        return {**dict.fromkeys(names, result.accuracy), "loss": result.loss_sum / result.num_samples}

    def final_model(self) -> Arrays:
        """Blocks, bridges and head."""
        return self._network(self.result)

    def model_metadata(self, model: Arrays) -> Mapping[str, str]:
        """The recipe, with which `flexfed.stitching.saved.load_stitched` builds the network again."""
        mean, std = (tuple(cast(list[float], self.transform[key])) for key in ("input-mean", "input-std"))
        recipe = recipe_of(self.task, self.result.path.ids, self.server.info.label_names, (mean, std))
        return metadata_of(FORMAT, recipe.to_json(), model)

    def summary_facts(self) -> dict[str, Any]:
        """What stands in summary.json beside what the rounds say."""
        blocks = [self.task.blocks[block] for block in self.result.path.ids]
        return {
            **super().summary_facts(),
            "model": self.network_name,
            "clients-testing": len(self._able()),
            "parameters": sum(array.size for name, array in self.final_model().items() if "running_" not in name),
            "headline-levels": ["stitched"],
            "path": [f"{block.source}.{block.index}" for block in blocks],
            "pool-bytes": sum(block.param_bytes for block in self.task.blocks),
        }

    def next_run(self, folder: Folder) -> Mapping[str, Any]:
        """Fine-tuning of the whole network."""
        if self.config.finetune == NO_FINETUNING:
            return {}
        return {
            "strategy": self.config.finetune,
            "model": self.network_name,
            "weights": str(folder / "model.safetensors"),
            "num-server-rounds": self.config.finetune_rounds,
        }

    def checkpoint(self) -> Checkpoint:
        """All that is needed to go on after the last finished round."""
        built = {f"now/{key}": value for key, value in self.now.to_state().items()}
        if self.whole is not None:
            built |= {f"whole/{key}": value for key, value in self.whole.to_state().items()}
        state = {**built, **self.aggregator.state_dict(), **self.clients.state_dict()}
        facts = {**self.run_facts(), "digest": self.task.digest, "over": self.is_over}
        return Checkpoint(self.record.server_round, {}, state=state, facts=facts)


def under(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The part of a state whose keys begin with a name, without it."""
    return {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}
