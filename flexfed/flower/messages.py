"""Jobs and updates as Flower messages, and back; whatever comes in is checked before it is believed."""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from flexfed.batchnorm import Statistics
from flexfed.client_state import is_copy
from flexfed.codecs import CODECS, PLAIN, pieces
from flexfed.devices import Device, from_record, to_record
from flexfed.jobs import Assignment, Job, Update
from flexfed.submodel import Submodel, pack, unflatten, unpack, within
from flexfed.training import Evaluation
from flexfed.units import Arrays, Layout

CHANGED = "changed-config"
"""Key of a message's config: JSON of the run configuration's keys that differ from what its clients were given."""

MOST_PARTITIONS = 1_000_000
"""What a client may say there are."""

R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)

_RAW = "flexfed.raw"  # bytes of a C-ordered array, without numpy's header: read without a copy
_FLOATS = ("float32", "float64")
_DTYPES = (*_FLOATS, "int8", "uint8")
_MOST_AXES = 8
_LONGEST_AXIS = 2**40  # beyond it products overflow somewhere
_LONGEST_REASON = 20_000  # characters of a client's error that are looked at
_REPLY = ("arrays", "submodel", "metrics", "told")  # the records of a reply; the last one need not be there
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"^[\w.]+(?:Error|Exception|Interrupt|Exit)\b", re.MULTILINE)
_WRAPPED = re.compile(r"<class '(?:\w+\.)*(\w+)'>:<(?:'|\")?(.*?)(?:'|\")?>")


def to_array(values: np.ndarray) -> Array:
    """A numpy array as Flower's, without numpy's file header."""
    return Array(dtype=str(values.dtype), shape=values.shape, stype=_RAW, data=np.ascontiguousarray(values).tobytes())


def from_array(array: Array) -> np.ndarray:
    """A read-only view of an array that `to_array` made.

    Raises:
        ValueError: another encoding, a type that never travels, a shape that no array has, or bytes that do not fit
            it. Nothing is allocated by what is claimed.
    """
    if array.stype != _RAW or array.dtype not in _DTYPES:
        got = f"{array.dtype[:40]!r} as {array.stype[:40]!r}"
        raise ValueError(f"arrays must be {' or '.join(_DTYPES)} as {_RAW!r}, got {got}")
    if len(array.shape) > _MOST_AXES or not all(0 <= n <= _LONGEST_AXIS for n in array.shape):
        raise ValueError(f"an array should have at most {_MOST_AXES} axes of 0 to 2^40 numbers each, and has others")
    shape = tuple(int(n) for n in array.shape)
    expected = math.prod(shape) * np.dtype(array.dtype).itemsize
    if len(array.data) != expected:
        raise ValueError(f"an array of shape {shape} should have {expected} bytes, got {len(array.data)}")
    return np.frombuffer(array.data, dtype=array.dtype).reshape(shape)


def to_record_of_arrays(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Named arrays as one record."""
    return ArrayRecord({name: to_array(values) for name, values in arrays.items()})


def from_record_of_arrays(record: ArrayRecord) -> Arrays:
    """Undo `to_record_of_arrays`; views.

    Raises:
        ValueError: one is not floating-point.
    """
    arrays = {name: from_array(array) for name, array in record.items()}
    for name, values in arrays.items():
        if str(values.dtype) not in _FLOATS:
            raise ValueError(f"array {name!r} should be {' or '.join(_FLOATS)}, got {values.dtype}")
    return arrays


def encoded(
    codec: str, layout: Layout, submodel: Submodel, flat: np.ndarray, rng: np.random.Generator | None = None
) -> dict[str, Array]:
    """A flat part for the wire; see `flexfed.codecs`.

    Args:
        codec: by name.
        layout: the network's numbering.
        submodel: what the part holds.
        flat: its numbers.
        rng: rounds at random, unbiased; None = to the nearest.
    """
    arrays = CODECS[codec].encode(flat, pieces(layout, submodel), rng)
    return {name: to_array(values) for name, values in arrays.items()}


def decoded(codec: str, layout: Layout, submodel: Submodel, record: ArrayRecord) -> np.ndarray:
    """Undo `encoded`: float32, believing nothing.

    Plain numbers are not counted here: whoever puts them into tensors does.

    Raises:
        ValueError: it is not such a part as that codec writes it.
    """
    if codec == PLAIN and set(record) == {"part"} and record["part"].dtype == PLAIN:
        return from_array(record["part"])
    return CODECS[codec].decode({n: from_array(array) for n, array in record.items()}, pieces(layout, submodel))


@lru_cache(maxsize=1)
def code_fingerprint() -> str:
    """A short hash of the app's own source: jobs carry it, and a client with other code refuses them."""
    root = Path(__file__).resolve().parent.parent.parent
    files = [root / "client_app.py", root / "server_app.py"]
    files += [*(root / "flexfed").rglob("*.py"), *(root / "strategies").rglob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(f for f in files if f.is_file()):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def check_code(config: Mapping[str, Any]) -> None:
    """Refuse a job from a server with other code.

    Raises:
        RuntimeError: names both fingerprints.
    """
    theirs, ours = config.get("code", ""), code_fingerprint()
    if theirs != ours:
        raise RuntimeError(
            f"this client runs other code ({ours}) than the server ({theirs}): another checkout answers here, or an "
            "old SuperNode; start the SuperLink from an empty directory, or update this device"
        )


def job_content(
    part: Mapping[str, Array],
    assignment: Assignment,
    seed: int,
    server_round: int,
    extra: Mapping[str, Any],
    known: bytes = b"",
) -> RecordDict:
    """A job's records.

    Args:
        part: encoded as the assignment says; may be shared between messages, the records may not.
        assignment: what it is.
        seed: of this client and round.
        server_round: counted from 1.
        extra: what the job carries besides.
        known: `masks_key` of the submodel whose masks this client holds: the same ones do not travel again.
    """
    config = {"code": code_fingerprint(), "seed": seed, "round": server_round, **extra}
    codecs = {"codec": assignment.codec, "reply-codec": assignment.reply_codec}
    config |= {key: name for key, name in codecs.items() if name not in ("", PLAIN)}
    return RecordDict(
        {
            "arrays": ArrayRecord(dict(part)),
            "submodel": ConfigRecord(cast(Any, pack(assignment.submodel, known))),
            "config": ConfigRecord({**config, **{f"method.{k}": v for k, v in assignment.config.items()}}),
        }
    )


def read_job(content: RecordDict, layout: Layout, device: Device, known: Submodel | None = None) -> Job:
    """A job as its client sees it.

    Args:
        content: of the message.
        layout: the network's numbering.
        device: who is asked.
        known: whose masks this client holds.
    """
    config = record_of(content, "config", ConfigRecord)
    submodel = unpack(layout, cast(Any, record_of(content, "submodel", ConfigRecord)), known)
    codec, reply_codec = (str(config.get(key, PLAIN)) for key in ("codec", "reply-codec"))
    part = unflatten(layout, submodel, decoded(codec, layout, submodel, record_of(content, "arrays", ArrayRecord)))
    own = {k.removeprefix("method."): v for k, v in config.items() if k.startswith("method.")}
    return Job(
        submodel,
        part,
        device,
        cast(Any, own),
        int(cast(int, config["seed"])),
        int(cast(int, config["round"])),
        codec=codec,
        reply_codec=reply_codec,
    )


def update_content(update: Update, layout: Layout, job: Job | None = None) -> RecordDict:
    """A reply's records; of the private state only that there is one, or one of masks alone.

    Args:
        update: what was learned.
        layout: the network's numbering.
        job: what was asked: it says how the reply is to be encoded, and of its masks only what changed travels back.
    """
    codec = PLAIN if job is None else job.reply_codec
    rng = None if job is None else np.random.default_rng([job.seed, 7])  # rounding at random: the mean is unbiased
    metrics = {"weight": float(update.weight), **{k: float(v) for k, v in update.metrics.items()}}
    if update.state:
        metrics["kept-masks" if is_copy(update.state) else "kept-state"] = 1.0
    sent = None if job is None else job.submodel
    packed = pack(update.submodel, sent.masks_key if sent else b"", sent)
    content = RecordDict(
        {
            "arrays": ArrayRecord(encoded(codec, layout, update.submodel, update.difference, rng)),
            "submodel": ConfigRecord(cast(Any, packed)),
            "metrics": MetricRecord(cast(Any, metrics)),
        }
    )
    if update.told:
        content["told"] = ConfigRecord(cast(Any, dict(update.told)))
    return content


def record_of(content: RecordDict, name: str, kind: type[R]) -> R:
    """One record of a message; Flower's views by kind copy all records of that kind at every look."""
    record = content.get(name)
    if not isinstance(record, kind):
        raise KeyError(name)
    return record


def read_update(content: RecordDict, layout: Layout, asked: Assignment | None = None) -> Update:
    """A reply, checked as far as it can be without asking the method.

    Args:
        content: of the message.
        layout: the network's numbering.
        asked: what was sent, and how the reply is to be encoded.

    Raises:
        ValueError: records are missing, or nobody asked for them, or do not hold what a reply holds; or it claims
            more than was sent.
    """
    if unknown := sorted(content.keys() - set(_REPLY)):
        raise ValueError(f"reply holds {', '.join(unknown[:3])[:99]!r}; expected {', '.join(_REPLY)} and nothing else")
    try:
        arrays = record_of(content, "arrays", ArrayRecord)
        packed = record_of(content, "submodel", ConfigRecord)
        metrics = dict(record_of(content, "metrics", MetricRecord))
        told = dict(record_of(content, "told", ConfigRecord)) if "told" in content else {}
    except KeyError as missing:
        raise ValueError(f"reply lacks {missing}; expected arrays/part, submodel and metrics/weight") from missing
    weight = metrics.pop("weight", math.nan)
    told_numbers = {"weight": weight, **metrics}
    if wrong := not_finite(told_numbers):  # the others may depend on the clock, and this reason stands in the record
        raise ValueError(f"weight and metrics of a reply must be finite numbers, got {wrong}")
    if weight <= 0:  # type: ignore[operator]
        raise ValueError(f"weight of a reply must be > 0, got {weight}")
    if not all(isinstance(value, bytes) for value in [*packed.values(), *told.values()]):
        raise ValueError("the submodel of a reply, and what it tells besides, must be bytes")
    submodel = unpack(layout, cast(Any, packed), asked.submodel if asked else None)
    if asked is not None and not within(submodel, asked.submodel):
        raise ValueError("it claims units or tensors that it was never sent")
    flat = decoded((asked.reply_codec if asked else "") or PLAIN, layout, submodel, arrays)
    return Update(submodel, flat, float(cast(float, weight)), cast(Any, metrics), told=cast(Any, told))


def not_finite(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics that are no finite numbers, as they may stand in a sentence."""
    most = sys.float_info.max  # an integer beyond it is no float, and breaks whatever computes with it
    wrong = {k: v for k, v in metrics.items() if not (isinstance(v, int | float) and abs(v) <= most)}
    # integers of thousands of digits cannot be written out
    return {k: f"{v.bit_length()} bits" if isinstance(v, int) else v for k, v in list(wrong.items())[:3]}


def stored_model_content(server_round: int, extra: Mapping[str, Any]) -> RecordDict:
    """A request to test the model that the client itself keeps: nothing of it travels."""
    config = {"code": code_fingerprint(), "round": server_round, "personal": True, **extra}
    return RecordDict({"config": ConfigRecord(config)})


def evaluation_content(result: Evaluation, personal: bool) -> RecordDict:
    """A client's test of its own, for the wire."""
    metrics = {"correct": result.correct, "loss-sum": result.loss_sum, "num-samples": result.num_samples}
    return RecordDict({"metrics": MetricRecord(cast(Any, {**metrics, "personal": int(personal)}))})


def is_personal(reply: Message) -> bool:
    """Whether a client tested a model of its own, and no evaluated level."""
    return bool(reply.content.metric_records["metrics"].get("personal", 0))


def read_evaluation(reply: Message) -> Evaluation:
    """A client's test of its own, checked.

    Raises:
        ValueError: it failed, lacks a number, or is impossible.
    """
    if reply.has_error():
        raise ValueError(f"evaluation failed: {cause_of(reply.error)}")
    if unknown := sorted(reply.content.keys() - {"metrics"}):
        raise ValueError(f"evaluation reply should hold metrics and nothing else, got {unknown[0][:40]!r}")
    try:
        metrics: Any = record_of(reply.content, "metrics", MetricRecord)
        wrong = not_finite(metrics)
        if not wrong:
            result = Evaluation(int(metrics["correct"]), float(metrics["loss-sum"]), int(metrics["num-samples"]))
    except KeyError as missing:
        raise ValueError(f"evaluation reply lacks {missing}; expected correct, loss-sum and num-samples") from missing
    if wrong:
        raise ValueError(f"evaluation reply should hold finite numbers, got {wrong}")
    if not 0 <= result.correct <= result.num_samples:
        raise ValueError(f"evaluation reply is impossible: {result}")
    return result


def statistics_content(statistics: Statistics) -> ArrayRecord:
    """Batch-norm statistics for the wire: layer -> float32 (2, channels), means above variances."""
    return to_record_of_arrays({name: np.stack(pair).astype(np.float32) for name, pair in statistics.items()})


def read_statistics(record: ArrayRecord) -> Statistics:
    """Undo `statistics_content`."""
    return {name: (pair[0], pair[1]) for name, pair in from_record_of_arrays(record).items()}


def profile_content(device: Device, num_partitions: int) -> RecordDict:
    """A client's answer to the profile query."""
    return RecordDict(
        {
            "device": ConfigRecord(to_record(device)),
            "config": ConfigRecord({"code": code_fingerprint(), "num-partitions": num_partitions}),
        }
    )


def read_profile(content: RecordDict) -> tuple[Device, int]:
    """The device of a client, and how many partitions it believes there are.

    Raises:
        ValueError: it is no profile, or tells of a device or of numbers that cannot be.
    """
    if set(content) != {"device", "config"}:
        raise ValueError(f"a profile should hold device and config, got {', '.join(sorted(content)[:3])[:99]!r}")
    try:
        device = from_record(dict(record_of(content, "device", ConfigRecord)))
        partitions = record_of(content, "config", ConfigRecord)["num-partitions"]
    except KeyError as missing:
        raise ValueError(f"a profile lacks {missing}") from missing
    if not (isinstance(partitions, int) and not isinstance(partitions, bool) and 1 <= partitions <= MOST_PARTITIONS):
        raise ValueError(f"num-partitions of a profile should be a whole number from 1 to {MOST_PARTITIONS:,}")
    if device.partition >= partitions:
        raise ValueError(f"a profile of partition {device.partition} should be one of 0..{partitions - 1}")
    return device, partitions


def cause_of(error: Error) -> str:
    """What a client's failure was, in one line: "ValueError: ...".

    Flower's runtimes word it differently (a coloured traceback under Ray, `<class 'ValueError'>:<'...'>` from a
    SuperNode), and the record of a run should not depend on which one it was.
    """
    text = error.reason or ""
    if len(text) > _LONGEST_REASON:  # what was raised stands at its end
        text = text[: _LONGEST_REASON // 2] + " ... " + text[-_LONGEST_REASON // 2 :]
    text = _COLOUR.sub("", text).strip() or f"error code {error.code}"
    if "Traceback (most recent call last)" in text:
        text = text[max((m.start() for m in _RAISED.finditer(text)), default=0) :]
    text = " ".join(text.split())
    wrapped = _WRAPPED.fullmatch(text)
    return f"{wrapped[1]}: {wrapped[2]}" if wrapped else text


def in_one_line(reason: str) -> str:
    """A reason for the log and the record: what clients say may hold anything, terminal commands too."""
    line = " ".join(reason[:_LONGEST_REASON].split())[:300]
    return "".join(c if c.isprintable() else "?" for c in line)


def num_bytes(message: Message) -> int:
    """Bytes of a message's content: arrays, keys and values.

    As Flower counts them, but for empty values: there its counting raises, and whoever sends one must not gain by it.
    """
    return sum(_record_bytes(record) for record in message.content.values())


def _record_bytes(record: ArrayRecord | ConfigRecord | MetricRecord) -> int:
    if isinstance(record, ArrayRecord):
        return sum(len(name) + len(array.data) for name, array in record.items())
    return sum(len(key) + _value_bytes(value) for key, value in record.items())


def _value_bytes(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(_value_bytes, value))
    if isinstance(value, str | bytes):
        return len(value)
    return 1 if isinstance(value, bool) else 8
