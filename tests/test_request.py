from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from toy import ROOT, as_message

import client_app
from flexfed.flower.messages import code_fingerprint
from flexfed.flower.request import Request
from flexfed.overrides import defaults

Handler = Callable[[Message, Context], Message]
HANDLERS: tuple[Handler, ...] = (
    client_app.profile,
    client_app.train,
    client_app.act,
    client_app.answer,
    client_app.evaluate,
    client_app.statistics,
)


def context(state_dir: Path | str = "", **node: int) -> Context:
    config = {**defaults(ROOT), "state-dir": str(state_dir)}
    return Context(run_id=1, node_id=1, node_config=dict(node), state=RecordDict(), run_config=config)


def message(**config: str | int) -> Message:
    return as_message(RecordDict({"config": ConfigRecord(dict(config))}))


@pytest.mark.parametrize("handler", HANDLERS)
def test_nothing_else_is_read_of_a_server_with_other_code(handler: Handler) -> None:
    nothing = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    with pytest.raises(RuntimeError, match="other code"):
        handler(message(code="0123456789ab"), nothing)


def test_a_node_that_does_not_say_which_client_it_is_is_told_how() -> None:
    asked = Request(message(code=code_fingerprint()), context())
    with pytest.raises(ValueError, match="the node-config lacks 'partition-id'; start the SuperNode with"):
        _ = asked.place


def test_a_state_is_found_again_by_the_round_that_the_server_names(tmp_path: Path) -> None:
    here = context(tmp_path, **{"partition-id": 0, "num-partitions": 3})
    first = Request(message(code=code_fingerprint(), run="a", **{"private-round": 0}), here)
    assert first.state == {}
    first.save(4, {"kept": np.arange(3, dtype=np.float32)})
    later = Request(message(code=code_fingerprint(), run="a", **{"private-round": 4}), here)
    assert later.state["kept"].tolist() == [0, 1, 2]
    other = Request(message(code=code_fingerprint(), run="b", **{"private-round": 4}), here)
    with pytest.raises(ValueError, match="private state of round 4 is missing"):
        _ = other.state
