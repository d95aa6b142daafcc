"""Questions and answers as Flower messages, and back; whatever comes in is checked before it is believed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from flexfed.devices import Device
from flexfed.flower.messages import code_fingerprint, from_array, not_finite, to_record_of_arrays
from flexfed.jobs import Scalar
from flexfed.questions import Answer, Question
from flexfed.units import Arrays

_OWN = "method."  # before the keys that a method gave itself


def question_content(
    config: Mapping[str, Scalar], arrays: Arrays, seed: int, server_round: int, extra: Mapping[str, Any]
) -> RecordDict:
    """A question's records.

    Args:
        config: what the method asks.
        arrays: what goes with it.
        seed: of this client, round and phase.
        server_round: counted from 1.
        extra: what every message of the run carries besides.
    """
    shared = {"code": code_fingerprint(), "seed": seed, "round": server_round, **extra}
    own = {f"{_OWN}{key}": value for key, value in config.items()}
    return RecordDict({"config": ConfigRecord({**shared, **own}), "arrays": to_record_of_arrays(arrays)})


def read_question(content: RecordDict, device: Device, state: Arrays) -> Question:
    """A question as its client sees it."""
    config = content.config_records["config"]
    return Question(
        config=cast(Any, {k.removeprefix(_OWN): v for k, v in config.items() if k.startswith(_OWN)}),
        arrays={name: from_array(array) for name, array in content.array_records["arrays"].items()},
        device=device,
        seed=int(cast(int, config["seed"])),
        server_round=int(cast(int, config["round"])),
        input_shape=tuple(cast(list[int], config["input-shape"])),
        num_classes=int(cast(int, config["num-classes"])),
        state=state,
    )


def answer_content(answer: Answer) -> RecordDict:
    """An answer's records; of the private state only that there is one."""
    metrics = {**answer.metrics, "kept-state": int(bool(answer.state))}
    return RecordDict({"metrics": MetricRecord(cast(Any, metrics)), "arrays": to_record_of_arrays(answer.arrays)})


def read_answer(content: RecordDict, arrays: Mapping[str, str] | None = None) -> Answer:
    """An answer, checked as far as it can be without asking the method.

    Args:
        content: of the message.
        arrays: name -> dtype of those it should hold; None = any.

    Raises:
        ValueError: records are missing, or nobody asked for them, or hold no finite numbers or other arrays.
    """
    if unknown := sorted(content.keys() - {"metrics", "arrays"}):
        raise ValueError(f"answer should hold metrics and arrays and nothing else, got {unknown[0][:40]!r}")
    metrics, record = content.get("metrics"), content.get("arrays")
    if not (isinstance(metrics, MetricRecord) and isinstance(record, ArrayRecord)):
        lacks = "arrays" if isinstance(metrics, MetricRecord) else "metrics"
        raise ValueError(f"answer lacks {lacks!r}; expected metrics and arrays")
    if wrong := not_finite(metrics):
        raise ValueError(f"metrics of an answer must be finite numbers, got {wrong}")
    found = {name: from_array(array) for name, array in record.items()}
    told = {name: str(values.dtype) for name, values in found.items()}
    if arrays is not None and told != arrays:
        differ = sorted(name[:40] for name in told.keys() | arrays.keys() if told.get(name) != arrays.get(name))
        raise ValueError(f"arrays of an answer should be {dict(arrays)}; they differ in {', '.join(differ[:3])}")
    return Answer(cast(Any, dict(metrics)), found)
