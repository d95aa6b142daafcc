"""A FlexFL client with little memory, as a program: `limited_client.py MEGABYTES MEASURE`; says what it did as JSON.

It is sent a whole ResNet-18, then may take so many more megabytes and no more: the system refuses what is beyond.
"""

from __future__ import annotations

import json
import resource
import sys

import psutil
from flwr.app import Context, RecordDict
from toy import DIGITS, ROOT, as_message

import client_app
from flexfed.config import Experiment
from flexfed.data import load_server
from flexfed.flower.messages import job_content, read_update, to_array
from flexfed.flower.request import Request
from flexfed.jobs import initial_arrays
from flexfed.overrides import defaults
from flexfed.submodel import extract, flatten
from strategies import STRATEGIES

CONFIG = {"strategy": "flexfl", "model": "resnet18", "flexfl.scores": "0.5", "local-epochs": 1, "batch-size": 32}
TRANSFORM = {
    "num-classes": 10,
    "input-shape": list(DIGITS),
    "input-mean": [0.3],
    "input-std": [0.4],
    "run": "limited",
    "private-round": 0,
}


def main(megabytes: int, measure: bool) -> dict[str, object]:
    """Train what was sent under the limit; what was trained, or what went wrong."""
    config = {**defaults(ROOT), **CONFIG}
    experiment = Experiment.read(config)
    task = experiment.task(10, DIGITS)
    server = STRATEGIES["flexfl"](experiment, task, load_server(experiment.data))
    server.prepare(None)
    assignment = server._assignment(4)
    part = extract(task.layout, assignment.submodel, initial_arrays(task, "", 1))
    flat = to_array(flatten(task.layout, assignment.submodel, part))
    del part
    message = as_message(job_content({"part": flat}, assignment, 7, 1, TRANSFORM))
    node = {"partition-id": 0, "num-partitions": 4, "memory-bytes": 8e9, "measure-memory": measure}
    context = Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=config)
    (
        Request(message, context).data,
        Request(message, context).task,
    )  # the base: everything is imported, the network traced, the data loaded
    limit(megabytes * 1_000_000)
    reply = client_app.app(message, context)
    update = read_update(reply.content, task.layout)
    trained = next(name for name, level in server.levels().items() if level == update.submodel)
    needs = {name: task.memory_to_train(level) // 1_000_000 for name, level in server.levels().items()}
    return {"trained": trained, "loss": update.metrics["train-loss"], "needs": needs}


def limit(more: int) -> None:
    """Let this process take so many more bytes of private memory."""
    held = psutil.Process().memory_info().data
    resource.setrlimit(resource.RLIMIT_DATA, (held + more, held + more))


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2] == "measure")))
