"""A method that remembers on both sides, and a process that runs it again and again, to be killed.

As a program: runs the values in its first line of input itself, so that all is imported and traced, then for each
further line forks a child that runs the app with those values, says the child's id, and says how it ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
from flwr.serverapp import Grid

import server_app
from flexfed.checkpoint import State
from flexfed.data import ClientData
from flexfed.jobs import Job, Task, Update
from flexfed.methods import METHODS, Method, heterofl
from flexfed.units import Arrays
from strategies import STRATEGIES
from strategies.heterofl import HeteroFL

NAME = "remembering"
CLIENTS = 4


class RememberingConfig(heterofl.HeteroFLConfig):
    method = NAME


def local_update(job: Job, task: Task, data: ClientData) -> Update:
    """HeteroFL's, plus a push that grows with all that this client has seen."""
    update = heterofl.local_update(job, task, data)
    seen = job.state.get("seen", np.zeros(2)) + [1.0, job.server_round / 7]
    pushed = update.difference + np.float32(1e-5 * seen.sum())
    return Update(update.submodel, pushed, update.weight, update.metrics, {"seen": seen})


class Remembering(HeteroFL):
    """HeteroFL with server momentum, and the sum of the rounds in which each client took part."""

    momentum: Arrays
    counts: dict[str, int]

    def prepare(self, grid: Grid) -> None:
        self.momentum = {n: np.zeros(shape, dtype=np.float32) for n, shape in self.task.layout.shapes.items()}
        self.counts = {}

    def observe(self, server_round: int, partition: int, update: Update) -> None:
        self.counts[str(partition)] = self.counts.get(str(partition), 0) + server_round

    def finish(self, previous: Arrays, averaged: Arrays) -> Arrays:
        self.momentum = {n: 0.5 * m + averaged[n] - previous[n] for n, m in self.momentum.items()}
        pull = np.float32(1 + 1e-4 * sum(self.counts.values()))
        return {name: previous[name] + pull * m for name, m in self.momentum.items()}

    def state_dict(self) -> State:
        return {"counts": self.counts, **{f"momentum/{name}": array for name, array in self.momentum.items()}}

    def load_state_dict(self, state: State) -> None:
        self.counts = dict(state["counts"])
        self.momentum = {name.removeprefix("momentum/"): state[name] for name in state if name.startswith("momentum/")}


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """The method in both tables."""
    method = Method(RememberingConfig, f"{NAME}.", local_update)
    with patch.dict(METHODS, {NAME: method}), patch.dict(STRATEGIES, {NAME: Remembering}):
        yield


def main() -> None:
    """Fork a run for each line of input but the first."""
    with registered(), patch("flexfed.report.curves_png"):
        server_app.run_in_process(json.loads(sys.stdin.readline()), CLIENTS)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _run(json.loads(line))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(values: dict[str, Any]) -> None:
    code = 1
    try:
        with registered(), patch("flexfed.report.curves_png"):
            server_app.run_in_process(values, CLIENTS)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
