"""The ClientApp: tells who it is, trains the part it is sent, tests it, and sums batch-norm statistics."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from flexfed import compute
from flexfed.batchnorm import collect_sums, pack_sums
from flexfed.client_state import known_masks, load_state, save_state, state_folder, with_masks
from flexfed.config import Experiment
from flexfed.data import ClientData, client_labels, load_client, normalise
from flexfed.devices import Device, declared, load_fleet
from flexfed.flower.messages import (
    CHANGED,
    check_code,
    evaluation_content,
    profile_content,
    read_job,
    read_statistics,
    to_record_of_arrays,
    update_content,
)
from flexfed.flower.questions import answer_content, read_question
from flexfed.jobs import TEST_BATCH, Job, LocalUpdate, Part, Task, Update, evaluate_part, require_memory, shrink
from flexfed.methods import METHODS
from flexfed.personal import evaluate_personal, model_state, stored_model
from flexfed.submodel import unpack
from flexfed.training import batches
from flexfed.units import Arrays


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
    check_code(_config(message))
    _, partitions = _place(context)
    return Message(profile_content(_device(context), partitions), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the part that came, by the run's method; private state is saved before the reply leaves.

    The reply says how many seconds training took: of processor time, summed over the threads of this process; on a
    GPU, by the clock.
    """
    task, data = _work(message, context)
    state = _state(message, context)
    job = replace(_job(message, context, task, state), state=state)
    method = METHODS[_experiment(context).settings.strategy]
    update = _timed(method.local_update, job, task, data)
    if _experiment(context).settings.personal == "stored-local" and update.trained is not None:
        update = replace(update, state={**update.state, **model_state(task, update.trained)})
    if method.masks_recur:
        update = replace(update, state=with_masks(update.state, job))
    if update.state:
        save_state(_state_folder(message, context), job.server_round, update.state, _base(message))
    return Message(update_content(update, task.layout, job), reply_to=message)


def act(message: Message, context: Context) -> Message:
    """Further work of the run's method, which the message names; it keeps no private state."""
    task, data = _work(message, context)
    job = _job(message, context, task, {})
    method, action = _experiment(context).settings.strategy, message.metadata.message_type.partition(".")[2]
    if action not in METHODS[method].actions:
        raise ValueError(f"{method} has no action {action!r}; it has {', '.join(METHODS[method].actions) or 'none'}")
    update = _timed(METHODS[method].actions[action], job, task, data)
    return Message(update_content(update, task.layout, job), reply_to=message)


for _name in sorted({action for method in METHODS.values() for action in method.actions}):
    app.train(_name)(act)


def answer(message: Message, context: Context) -> Message:
    """A phase of the run's method that is no training of a part; the message's type names it."""
    data, experiment = _data_of(message, context), _experiment(context)
    phases, kind = METHODS[experiment.settings.strategy].phases, message.metadata.message_type
    if kind not in phases:
        raise ValueError(f"{experiment.settings.strategy} has no phase {kind!r}; it has {', '.join(phases) or 'none'}")
    device = _device(context).in_round(int(_config(message)["round"]), experiment.settings.seed)
    question = read_question(message.content, device, _state(message, context))
    place = compute.torch_device(_torch_device(context))
    seconds = _clock(place)
    began = seconds()
    found = phases[kind](question, experiment.method, data.to(place))
    if found.state:
        save_state(_state_folder(message, context), int(_config(message)["step"]), found.state, _base(message))
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
    task, data = _work(message, context)
    personal = bool(_config(message).get("personal", False))
    if "arrays" in message.content:
        state = _state(message, context) if "masks" in message.content.config_records["submodel"] else {}
        job = _job(message, context, task, state)
        part = Part(job.submodel, job.arrays)
    else:
        part = stored_model(task, _state(message, context))
    require_memory(_device(context), part.submodel, task.memory_to_test)
    if personal:
        result = evaluate_personal(task, part, data, _experiment(context).settings.batch_norm)
    else:
        record = message.content.array_records.get("statistics")
        found = None if record is None else read_statistics(record)
        result = evaluate_part(task, part.arrays, found, data.test)
    return Message(evaluation_content(result, personal), reply_to=message)


@app.query("statistics")
def statistics(message: Message, context: Context) -> Message:
    """Sum what batch norm sees of the client's training data, for every level that the part holds."""
    task, data = _work(message, context)
    job = _job(message, context, task, {})
    require_memory(job.device, job.submodel, task.memory_to_test)
    definition = str(message.content.config_records["query"]["definition"])
    sums: dict[str, ArrayRecord] = {}
    for name, bits in message.content.config_records["levels"].items():
        level = unpack(task.layout, {"units": cast(bytes, bits)})
        model = task.network(shrink(task.layout, job.submodel, level, job.arrays))
        inputs = (batch.inputs for batch in batches(data.train, TEST_BATCH))
        sums[name] = to_record_of_arrays(pack_sums(collect_sums(model, inputs, cast(Any, definition))))
    return Message(RecordDict(cast(Any, sums)), reply_to=message)


def _work(message: Message, context: Context) -> tuple[Task, ClientData]:
    """What every job needs: the network as the server has it, and this client's normalised data."""
    data, config = _data_of(message, context), _config(message)
    task = _task(_key(context), int(config["num-classes"]), tuple(config["input-shape"]))
    return replace(task, torch_device=_torch_device(context)), data


def _data_of(message: Message, context: Context) -> ClientData:
    """This client's data, normalised as the server's are, for a message from a server with the same code."""
    config = _config(message)
    check_code(config)
    torch.set_num_threads(_experiment(context).settings.torch_threads)
    compute.use(_torch_device(context))
    mean, std = tuple(config["input-mean"]), tuple(config["input-std"])
    return _data(_key(context), *_place(context), _data_path(context), mean, std)


def _job(message: Message, context: Context, task: Task, state: Arrays) -> Job:
    """The job, for this device as it is in this round; `state` is where it keeps the masks it was sent last."""
    job = read_job(message.content, task.layout, _device(context), known_masks(task.layout, state))
    return replace(job, device=job.device.in_round(job.server_round, _experiment(context).settings.seed))


def _base(message: Message) -> int:
    """The round of the private state that the server counts on; 0 = none."""
    return int(cast(int, _config(message)["private-round"]))


def _state(message: Message, context: Context) -> Arrays:
    return load_state(_state_folder(message, context), _base(message))


def _state_folder(message: Message, context: Context) -> Path:
    settings = _experiment(context).settings
    node_dir = str(context.node_config.get("state-dir", ""))
    run = str(_config(message)["run"])
    partition, _ = _place(context)
    return state_folder(node_dir, settings.state_dir, settings.resume, settings.runs_dir, run, partition)


def _config(message: Message) -> Mapping[str, Any]:
    return message.content.config_records["config"]


_Key = tuple[tuple[str, Any], ...]


def _key(context: Context) -> _Key:
    """The run configuration as something to cache by: actors serve many clients and rounds of a run."""
    return tuple(sorted(context.run_config.items()))


@lru_cache(maxsize=4)
def _read(key: _Key) -> Experiment:
    return Experiment.read(dict(key))


def _experiment(context: Context) -> Experiment:
    return _read(_key(context))


@lru_cache(maxsize=4)
def _task(key: _Key, num_classes: int, input_shape: tuple[int, ...]) -> Task:
    return _read(key).task(num_classes, input_shape)


@lru_cache(maxsize=32)
def _data(
    key: _Key, partition: int, partitions: int, path: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> ClientData:
    raw = load_client(replace(_read(key).data, data_path=path), partition, partitions)
    validation = normalise(raw.validation, mean, std)
    test = validation if raw.test is raw.validation else normalise(raw.test, mean, std)
    return replace(raw, train=normalise(raw.train, mean, std), validation=validation, test=test)


def _place(context: Context) -> tuple[int, int]:
    """(partition id, number of partitions) of this client."""
    try:
        return int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    except KeyError as missing:
        raise ValueError(
            f"the node-config lacks {missing}; start the SuperNode with --node-config 'partition-id=0 num-partitions=3'"
        ) from missing


def _torch_device(context: Context) -> str:
    """Where networks compute on this client: as its node-config says, else as the run does."""
    return str(context.node_config.get("torch-device", _experiment(context).settings.torch_device))


def _data_path(context: Context) -> str:
    return str(context.node_config.get("data-path", ""))


@lru_cache(maxsize=1024)
def _known_device(key: _Key, partition: int, partitions: int, path: str, told: _Key) -> Device:
    experiment = _read(key)
    device = load_fleet(experiment.settings.fleet).device(partition, partitions, experiment.settings.seed)
    num_train, labels = client_labels(replace(experiment.data, data_path=path), partition, partitions)
    device = replace(device, num_examples=num_train, labels=labels)
    return declared(device, dict(told))


def _device(context: Context) -> Device:
    told = tuple(sorted((k, v) for k, v in context.node_config.items()))
    return _known_device(_key(context), *_place(context), _data_path(context), told)
