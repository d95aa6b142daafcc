"""The ClientApp: tells who it is, trains the part it is sent, tests it, and sums batch-norm statistics."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from flexfed import compute
from flexfed.batchnorm import collect_sums, pack_sums
from flexfed.client_state import with_masks
from flexfed.data import ClientData
from flexfed.flower.messages import (
    CHANGED,
    evaluation_content,
    profile_content,
    read_statistics,
    to_record_of_arrays,
    update_content,
)
from flexfed.flower.questions import answer_content, read_question
from flexfed.flower.request import Request
from flexfed.jobs import TEST_BATCH, Job, LocalUpdate, Part, Task, Update, evaluate_part, require_memory, shrink
from flexfed.methods import METHODS
from flexfed.personal import evaluate_personal, model_state, stored_model
from flexfed.submodel import unpack
from flexfed.training import batches


def with_changes(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Hand on the run configuration as the server has it: a run that follows another has keys of its own.

    What was resumed is then the other run, if any was.
    """
    told = message.content.config_records.get("config")
    changed = json.loads(str(told.get(CHANGED, "{}"))) if told else {}
    if all(context.run_config.get(key) == value for key, value in changed.items()):
        return call_next(message, context)
    config = {**context.run_config, "resume": "", **changed}
    own = Context(context.run_id, context.node_id, context.node_config, context.state, config, context.series_id)
    return call_next(message, own)


app = ClientApp(mods=[with_changes])


@app.query("profile")
def profile(message: Message, context: Context) -> Message:
    """Who this client is: its partition, its device, how much data it has."""
    asked = Request(message, context)
    _, partitions = asked.place
    return Message(profile_content(asked.device, partitions), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the part that came, by the run's method; private state is saved before the reply leaves.

    The reply says how many seconds training took: of processor time, summed over the threads of this process; on a
    GPU, by the clock.
    """
    asked = Request(message, context)
    data, settings = asked.data, asked.experiment.settings
    job = replace(asked.job(asked.state), state=asked.state)
    method = METHODS[settings.strategy]
    update = _timed(method.local_update, job, asked.task, data)
    if settings.personal == "stored-local" and update.trained is not None:
        update = replace(update, state={**update.state, **model_state(asked.task, update.trained)})
    if method.masks_recur:
        update = replace(update, state=with_masks(update.state, job))
    if update.state:
        asked.save(job.server_round, update.state)
    return Message(update_content(update, asked.task.layout, job), reply_to=message)


def act(message: Message, context: Context) -> Message:
    """Further work of the run's method, which the message names; it keeps no private state."""
    asked = Request(message, context)
    data, job = asked.data, asked.job({})
    method, action = asked.experiment.settings.strategy, message.metadata.message_type.partition(".")[2]
    if action not in METHODS[method].actions:
        raise ValueError(f"{method} has no action {action!r}; it has {', '.join(METHODS[method].actions) or 'none'}")
    update = _timed(METHODS[method].actions[action], job, asked.task, data)
    return Message(update_content(update, asked.task.layout, job), reply_to=message)


for _name in sorted({action for method in METHODS.values() for action in method.actions}):
    app.train(_name)(act)


def answer(message: Message, context: Context) -> Message:
    """A phase of the run's method that is no training of a part; the message's type names it."""
    asked = Request(message, context)
    data, experiment = asked.data, asked.experiment
    phases, kind = METHODS[experiment.settings.strategy].phases, message.metadata.message_type
    if kind not in phases:
        raise ValueError(f"{experiment.settings.strategy} has no phase {kind!r}; it has {', '.join(phases) or 'none'}")
    device = asked.device.in_round(int(asked.config["round"]), experiment.settings.seed)
    question = read_question(message.content, device, asked.state)
    place = compute.torch_device(asked.torch_device)
    seconds = _clock(place)
    began = seconds()
    found = phases[kind](question, experiment.method, data.to(place))
    if found.state:
        asked.save(int(asked.config["step"]), found.state)
    metrics = {**found.metrics, "seconds": seconds() - began}
    return Message(answer_content(replace(found, metrics=metrics)), reply_to=message)


for _kind in sorted({kind for method in METHODS.values() for kind in method.phases}):
    _category, _, _name = _kind.partition(".")
    {"train": app.train, "evaluate": app.evaluate}[_category](_name)(answer)


def _timed(work: LocalUpdate, job: Job, task: Task, data: ClientData) -> Update:
    """The update, and the seconds that it took."""
    seconds = _clock(task.place)
    began = seconds()
    update = work(job, task, data)
    return replace(update, metrics={**update.metrics, "seconds": seconds() - began})


def _clock(place: torch.device) -> Callable[[], float]:
    """What measures work: on the CPU processor time, which neighbours do not change; on a GPU no such thing exists."""
    return time.process_time if place.type == "cpu" else time.perf_counter


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test the part that came, or the model that this client keeps, on the client's test samples."""
    asked = Request(message, context)
    data, task, content = asked.data, asked.task, message.content
    personal = bool(asked.config.get("personal", False))
    if "arrays" in content:
        job = asked.job(asked.state if "masks" in content.config_records["submodel"] else {})
        part = Part(job.submodel, job.arrays)
    else:
        part = stored_model(task, asked.state)
    require_memory(asked.device, part.submodel, task.memory_to_test)
    if personal:
        result = evaluate_personal(task, part, data, asked.experiment.settings.batch_norm)
    else:
        record = content.array_records.get("statistics")
        found = None if record is None else read_statistics(record)
        result = evaluate_part(task, part.arrays, found, data.test)
    return Message(evaluation_content(result, personal), reply_to=message)


@app.query("statistics")
def statistics(message: Message, context: Context) -> Message:
    """Sum what batch norm sees of the client's training data, for every level that the part holds."""
    asked = Request(message, context)
    data, task, job = asked.data, asked.task, asked.job({})
    require_memory(job.device, job.submodel, task.memory_to_test)
    definition = str(message.content.config_records["query"]["definition"])
    sums: dict[str, ArrayRecord] = {}
    for name, bits in message.content.config_records["levels"].items():
        level = unpack(task.layout, {"units": cast(bytes, bits)})
        model = task.network(shrink(task.layout, job.submodel, level, job.arrays))
        inputs = (batch.inputs for batch in batches(data.train, TEST_BATCH))
        sums[name] = to_record_of_arrays(pack_sums(collect_sums(model, inputs, cast(Any, definition))))
    return Message(RecordDict(cast(Any, sums)), reply_to=message)
