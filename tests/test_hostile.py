"""Five thousand replies that lie, to real rounds of every strategy: refused, told, and without any trace."""

from __future__ import annotations

import copy
import functools
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from hostile import CHANGES, Victim, pick
from toy import AVERAGING, ScriptedGrid, same_bits, toy_config

import client_app
import server_app
import strategies.base
from flexfed.averaging import Averager
from flexfed.config import Experiment
from flexfed.data import load_server
from flexfed.flower.grid import StreamingGrid
from flexfed.flower.messages import to_record_of_arrays
from flexfed.units import Arrays
from strategies import STRATEGIES
from strategies.base import SubmodelStrategy

CASES = 400  # of each setup
AT_ONCE = 25  # to one round
CLIENTS = 4
MODEL = {"model": "hostile:Tiny", "round-timeout": 600.0}

SETUPS: dict[str, tuple[str, dict[str, Any]]] = {
    **{strategy: (strategy, {}) for strategy in AVERAGING},
    "fiarse": ("fiarse", {"fiarse.sizes": "0.25, 0.0625"}),  # masks for everybody
    "units of the moment": ("fiarse", {"fiarse.mode": "units", "fiarse.sizes": "1.0, 0.5, 0.25"}),
    "int8": ("fedavg", {"codec": "int8"}),
    "int4": ("heterofl", {"codec": "int4"}),
    "rankings of masks": ("fedlps", {"fedlps.mask-update": "batch", "ratio-policy": "fixed"}),
    "levels of any width": ("flexfl", {"ratio-policy": "p-ucbv"}),
    "masked for good": ("autoflip", {"autoflip.mask-mode": "static", "personal": "stored-local"}),
    "clipped": ("fedavg", {"max-update-norm": 0.5}),
}
assert len(SETUPS) * CASES >= 5_000


# --- a round that is open ---------------------------------------------------------------------------------------


@dataclass
class Opened:
    """A strategy whose jobs of round 1 are out, and what honest clients reply."""

    strategy: SubmodelStrategy
    replies: dict[int, Message]
    grid: StreamingGrid
    results: dict[int, tuple[Arrays, Any]] = field(default_factory=dict)  # without whom -> model, state

    def victim(self, partition: int) -> Victim:
        """Whose reply is to be changed."""
        strategy = self.strategy
        others = tuple(reply.content for p, reply in self.replies.items() if p != partition)
        pools = (getattr(strategy, "_pool", {}), getattr(strategy, "_parts", {}))
        parts = [part for pool in pools if isinstance(pool, dict) for part in pool.values()]
        return Victim(
            strategy.task.layout,
            strategy._assigned[partition],
            self.replies[partition].content,
            others,
            strategy.devices[partition].num_examples,
            strategy.may_choose_units,
            frozenset(part.key for part in parts),
        )

    def again(self) -> SubmodelStrategy:
        """The same round once more: nothing of what happens to it is seen by another."""
        known = self.strategy
        shared = (known.task, known.server, known.experiment, known.federation, known.budget, known.grid_of_test)
        memo = {id(thing): thing for thing in shared}
        found: SubmodelStrategy = copy.deepcopy(known, memo)
        return found

    def without(self, partition: int) -> tuple[Arrays, Any]:
        """The model, and the state, after the round in which a client was never sampled."""
        if partition not in self.results:
            strategy = self.again()
            strategy.aggregate_train(1, [reply for p, reply in self.replies.items() if p != partition])
            self.results[partition] = strategy.arrays, state_of(strategy)
        return self.results[partition]


def opened(folder: Path, name: str, values: Mapping[str, Any]) -> Opened:
    """Meet four clients, prepare, send the jobs of round 1, and have them answered."""
    config = toy_config(folder, name, {**MODEL, **values})
    experiment = Experiment.read(config)
    kind = STRATEGIES[name]
    raw = load_server(experiment.data)
    server, transform = server_app._normalised(raw, kind.convention(experiment, raw.info.input_shape[0]))
    task, initial = kind.set_up(experiment, server.info, None)
    strategy: Any = kind(experiment, task, server, {**transform, "run": "hostile"}, None, None, None)
    clients = ScriptedGrid(client_app.app, CLIENTS, config)
    grid = strategy.grid_of_test = StreamingGrid(clients)
    strategy.meet(grid)
    strategy.begin(initial, grid)
    replies = {}
    for message in strategy.configure_train(1, to_record_of_arrays(initial), ConfigRecord(), grid):
        (message_id,) = clients.push_messages([message])
        (reply,) = clients.pull_messages([message_id])
        assert reply.has_content(), reply.error
        replies[strategy.federation.partition_of(reply)] = reply
    return Opened(strategy, replies, grid)


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Opened]:
    """The open round of a setup."""
    known: dict[str, Opened] = {}

    def find(setup: str) -> Opened:
        if setup not in known:
            name, values = SETUPS[setup]
            known[setup] = opened(tmp_path_factory.mktemp("runs"), name, values)
        return known[setup]

    return find


SCRATCH = {"_error", "_most_bytes"}  # of the reply at hand


def state_of(strategy: SubmodelStrategy) -> Any:
    """All that a strategy knows, but for who was left out and why."""
    own = {k: v for k, v in vars(strategy).items() if k not in {"task", "server", "experiment", "budget", *SCRATCH}}
    return digest(own, {id(strategy.federation), id(strategy)})


def digest(value: Any, seen: set[int]) -> Any:
    """Something that is equal for equal states; what was only looked up in between does not count."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, str | bytes | int | float | bool | type(None)):
        return value
    if id(value) in seen:
        return "seen"
    seen = seen | {id(value)}
    if isinstance(value, Mapping):
        return [(digest(k, seen), digest(v, seen)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return [digest(item, seen) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if type(value).__module__.split(".")[0] in ("flexfed", "strategies"):
        cached = {n for n in dir(type(value)) if isinstance(getattr(type(value), n, None), functools.cached_property)}
        left_out = {"refused", "failed", *cached}
        return [(k, digest(v, seen)) for k, v in sorted(vars(value).items()) if k not in left_out]
    if isinstance(value, MethodType | StreamingGrid):
        return "of the strategy"
    return repr(type(value))


# --- the property -----------------------------------------------------------------------------------------------


@dataclass
class Lie:
    """One case."""

    kind: str
    partition: int
    reply: Message
    is_error: bool = False


def message_of(like: Message, records: Mapping[str, Any], node: int | None = None) -> Message:
    """A reply from the client of another one, or from any node."""
    reply = Message(RecordDict(), reply_to=like)
    reply.metadata.__dict__.update(like.metadata.__dict__)
    if node is not None:
        reply.metadata.__dict__.update(_src_node_id=node, _reply_to_message_id="nobody asked")
    for name, record in records.items():
        reply.content[name] = record
    return reply


def failed_reply(like: Message, rng: np.random.Generator) -> Message:
    """An error of a client, with a reason that nobody can read."""
    reasons = [
        "x" * 1_000_000, "\x1b[2J\x1b[H", "", "\ud800", "\n" * 5000, "the private state of round 7 is missing",
        "Traceback (most recent call last)\n" * 3000, "<class 'E'>:<'" + "a" * 30_000, "a.b" * 30_000 + "Error",
    ]  # fmt: skip
    reply = Message(Error(int(rng.integers(0, 99)), pick(rng, reasons)), reply_to=like)
    reply.metadata.__dict__.update(like.metadata.__dict__)
    return reply


def lies(opened: Opened, partition: int, rng: np.random.Generator) -> Iterator[Lie]:
    """Hostile replies without end, every kind as often as any other."""
    victim, like = opened.victim(partition), opened.replies[partition]
    while True:
        for kind in rng.permutation([*CHANGES, "unknown node", "an error", "one that was not asked"]).tolist():
            if kind == "an error":
                yield Lie(kind, partition, failed_reply(like, rng), True)
            elif kind == "unknown node":
                yield Lie(kind, -1, message_of(like, victim.fresh(), int(rng.integers(5, 900))))
            elif kind == "one that was not asked":
                idle = sorted(set(opened.strategy.federation.nodes) - set(opened.replies))
                if idle:
                    node = opened.strategy.federation.nodes[idle[0]]
                    yield Lie(kind, idle[0], message_of(like, victim.fresh(), node))
            elif (records := CHANGES[kind](victim, rng)) is not None:
                yield Lie(kind, partition, message_of(like, records))


@pytest.mark.parametrize("setup", list(SETUPS))
def test_no_lie_leaves_a_trace(setup: str, rounds: Callable[[str], Opened]) -> None:
    open_round, rng = rounds(setup), np.random.default_rng([7, zlib.crc32(setup.encode())])  # whatever others there are
    partitions = sorted(open_round.replies)
    kinds: Counter[str] = Counter()
    endless = {partition: lies(open_round, partition, rng) for partition in partitions}
    for number in range(CASES // AT_ONCE):
        partition = partitions[number % len(partitions)]
        told = [next(endless[partition]) for _ in range(AT_ONCE)]
        kinds.update(lie.kind for lie in told)
        survive(open_round, partition, told, rng)
    assert sum(kinds.values()) == CASES
    assert len(kinds) >= 30, kinds
    assert min(kinds.values()) >= 4, kinds


def survive(open_round: Opened, partition: int, told: list[Lie], rng: np.random.Generator) -> None:
    """One round, with lies between the other clients' replies; it must be as if the liar was never there."""
    strategy = open_round.again()
    honest = [(p, reply) for p, reply in open_round.replies.items() if p != partition]
    places = sorted(rng.integers(0, len(honest) + 1, len(told)).tolist())
    averagers: list[Averager] = []

    def remembered(*args: Any) -> Averager:
        averagers.append(Averager(*args))
        return averagers[-1]

    def replies() -> Iterator[Message]:
        left = list(zip(places, told, strict=True))
        for index in range(len(honest) + 1):
            while left and left[0][0] == index:
                yield from checked(left.pop(0)[1])
            if index < len(honest):
                other, reply = honest[index]
                yield reply
                again = Lie("twice", other, message_of(reply, dict(reply.content)))
                yield from checked(again)  # who has replied replies once more

    def checked(lie: Lie) -> Iterator[Message]:
        before, record = state_of(strategy), strategy.record
        counted, noted = averagers[0].num_replies, len(record.refused) + len(record.failed)
        yield lie.reply
        assert len(record.refused) + len(record.failed) == noted + 1, f"{lie.kind} was believed: {shown(lie)}"
        note = (record.failed if lie.is_error else record.refused)[-1]
        assert note["partition"] == lie.partition, lie.kind
        assert_plain(lie, note["reason"])
        assert averagers[0].num_replies == counted
        assert state_of(strategy) == before, f"{lie.kind} left a trace: {shown(lie)}"

    with patch.object(strategies.base, "Averager", remembered):
        strategy.aggregate_train(1, replies())
    arrays, state = open_round.without(partition)
    kinds = Counter(lie.kind for lie in told)
    assert same_bits(strategy.arrays, arrays), f"the model is another one after {kinds}"
    assert state_of(strategy) == state, f"the state is another one after {kinds}"


def shown(lie: Lie) -> str:
    return repr(lie.reply.content)[:2000] if lie.reply.has_content() else "error"


def assert_plain(lie: Lie, reason: str) -> None:
    """A reason is one printable sentence that a person can act on, and no traceback."""
    assert 1 <= len(reason) <= 300, (lie.kind, reason)
    assert reason.isprintable(), (lie.kind, reason)
    if not lie.is_error:  # what a client says of its own failure is its own
        assert len(reason.split()) >= 4, (lie.kind, reason)
        assert not re.match(r"^\w*(Error|Exception)\b", reason), (lie.kind, reason)
