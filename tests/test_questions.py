"""Questions and answers on the wire: what goes in comes out, and what is no answer is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from toy import as_message, same_bits

from flexfed.devices import Device
from flexfed.flower.messages import code_fingerprint, to_record_of_arrays
from flexfed.flower.questions import answer_content, question_content, read_answer, read_question
from flexfed.jobs import Scalar
from flexfed.questions import Answer, Question
from strategies.phases import refuse_impossible

EXTRA = {"input-shape": [1, 8, 8], "num-classes": 10, "run": "some run", "step": 9}
CONFIG: dict[str, Scalar] = {"block": 3, "deadline": float("inf"), "path": "0-5", "candidates": [1, 6]}
ARRAYS = {"bridge/1/weight": np.arange(6, dtype=np.float32).reshape(2, 3), "head": np.eye(3)}


def asked(**changes: Any) -> Question:
    """As its client sees it."""
    given: dict[str, Any] = {
        "config": CONFIG,
        "arrays": ARRAYS,
        "seed": 5,
        "server_round": 2,
        "extra": EXTRA,
        **changes,
    }
    content = as_message(question_content(**given)).content
    return read_question(content, Device(7), {"kept": np.ones(2)})


def test_a_question_comes_out_as_it_went_in() -> None:
    question = asked()
    assert dict(question.config) == CONFIG
    assert same_bits(question.arrays, ARRAYS)
    assert (question.seed, question.server_round, question.num_classes) == (5, 2, 10)
    assert question.input_shape == (1, 8, 8)
    assert question.device == Device(7)
    assert question.state["kept"].tolist() == [1, 1]


def test_a_question_without_arrays() -> None:
    assert asked(arrays={}).arrays == {}


def test_what_a_method_asks_cannot_be_taken_for_what_every_message_carries() -> None:
    question = asked(config={"seed": 99, "round": 98})
    assert (question.seed, question.server_round) == (5, 2)
    assert dict(question.config) == {"seed": 99, "round": 98}


def test_every_question_carries_the_code() -> None:
    content = question_content({}, {}, 1, 1, EXTRA)
    assert content.config_records["config"]["code"] == code_fingerprint()
    assert content.config_records["config"]["run"] == "some run"


def test_an_answer_comes_out_as_it_went_in_but_for_what_is_private() -> None:
    arrays = {"scores": np.array([0.25, 0.5]), "levels": np.array([3, 1], dtype=np.uint8), "gram": np.zeros((2, 2))}
    answer = Answer({"macs": 12.0, "correct": 3}, arrays, {"secret": np.full(4, 0.125)})
    content = as_message(answer_content(answer)).content
    found = read_answer(content)
    assert dict(found.metrics) == {"macs": 12.0, "correct": 3, "kept-state": 1}
    assert same_bits(found.arrays, arrays)
    assert found.state == {}
    assert not [name for record in content.values() for name in record if "secret" in name]


def test_an_answer_that_keeps_nothing_says_so() -> None:
    assert read_answer(answer_content(Answer({}))).metrics == {"kept-state": 0}


def without(record: str) -> Callable[[RecordDict], None]:
    return lambda content: content.pop(record) and None


def with_metrics(**values: Any) -> Callable[[RecordDict], None]:
    return lambda content: content.__setitem__("metrics", MetricRecord(values))


def with_array(**values: Any) -> Callable[[RecordDict], None]:
    given = {"dtype": "float64", "shape": (2,), "stype": "flexfed.raw", "data": bytes(16), **values}
    return lambda content: content.__setitem__("arrays", ArrayRecord({"scores": Array(**given)}))


WRONG: dict[str, tuple[Callable[[RecordDict], None], str]] = {
    "no metrics": (without("metrics"), "answer lacks 'metrics'; expected metrics and arrays"),
    "no arrays": (without("arrays"), "answer lacks 'arrays'; expected metrics and arrays"),
    "another record": (
        lambda content: content.__setitem__("metrics", to_record_of_arrays({"a": np.zeros(1)})),
        "answer lacks 'metrics'",
    ),
    "nan": (with_metrics(macs=float("nan")), "metrics of an answer must be finite numbers, got {'macs': nan}"),
    "infinity": (with_metrics(correct=float("inf")), "must be finite numbers, got {'correct': inf}"),
    "list": (with_metrics(rows=[1, 2]), "must be finite numbers, got {'rows'"),
    "type": (with_array(dtype="object"), "arrays must be .* got 'object' as 'flexfed.raw'"),
    "encoding": (with_array(stype="pickle"), "got 'float64' as 'pickle'"),
    "bytes": (with_array(data=bytes(15)), r"shape \(2,\) should have 16 bytes, got 15"),
    "shape": (with_array(shape=(-1, -2)), "should have at most 8 axes of 0 to 2"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_what_is_no_answer_is_refused(case: str) -> None:
    change, reason = WRONG[case]
    content = answer_content(Answer({"macs": 1.0}, {"scores": np.zeros(2)}))
    assert read_answer(content).arrays["scores"].shape == (2,)
    change(content)
    with pytest.raises(ValueError, match=reason):
        read_answer(content)


@pytest.mark.parametrize("key", ["macs", "seconds", "modelled-seconds", "modelled-joules", "measured-joules"])
def test_costs_that_cannot_be_are_refused(key: str) -> None:
    refuse_impossible({})
    refuse_impossible({key: 0.0})
    for value in (-1e-9, 1e19):
        with pytest.raises(ValueError, match=rf"^{key} of an answer must lie in \[0, 1e\+\d+\], got "):
            refuse_impossible({key: value})
