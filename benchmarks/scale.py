"""What a server costs with 100, 1,000 and 10,000 devices: `python -m benchmarks.scale`.

Whole rounds of a tiny network go through the real strategies, the streaming grid and messages of their submodels; the
devices are canned (`benchmarks.canned`), and the time they take is not counted. Prints the tables and writes
results/scale.md.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import tempfile
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from flwr.app import ConfigRecord

import server_app
from benchmarks.canned import CannedGrid
from benchmarks.measuring import in_child, memory_peak
from benchmarks.memory import table
from benchmarks.rounds import Clock, run_config
from benchmarks.speed import ONE_THREAD, machine
from flexfed.checkpoint import Checkpoint, save_checkpoint
from flexfed.config import Experiment
from flexfed.cost import num_parameters
from flexfed.data import load_server
from flexfed.flower.grid import StreamingGrid
from flexfed.flower.messages import to_record_of_arrays
from flexfed.runs import RunFolder
from flexfed.submodel import full
from strategies import STRATEGIES
from strategies.base import SubmodelStrategy

NUMS = (100, 1_000, 10_000)
TURNS = 5
IN_FLIGHT = 64
RESULTS = Path(__file__).resolve().parent / "results" / "scale.md"
ALL_TRAIN = {"fraction-train": 1.0, "evaluate-every": 10**6, "num-server-rounds": 10**6, "flexfl.pretrain-epochs": 1}
METHODS: Mapping[str, Mapping[str, object]] = {
    "heterofl": {"heterofl.assign": "dynamic"},  # levels drawn anew, so that every stretch of a round has all of them
    "flexfl": {"fleet": "equal"},  # any device may be drawn for any size
    "fedlps": {"fleet": "fedlps", "ratio-policy": "p-ucbv"},  # units and a bandit of its own for each device
}
MODELS = ("cnn", "mobilenet_v2", "heterofl-resnet18")

TIME_TEXT = """Processor microseconds a device of one round, the devices' own work left out: choosing its part, sending
it and folding its reply, and closing the round (its line and a checkpoint on disk). The quotient is that of the whole
beside 100 devices: of the median turn, the least and the greatest. Then what making a reply took, which is not in the
sum, and getting to know a device."""
MEMORY_TEXT = """What one round takes above the start, the devices met and the caches full, at its peak; each number in
a fresh process. Resident memory includes what the C library keeps; traced is what Python and numpy allocated, to the
byte, and kept is what of that is left when all replies are folded: names and numbers of the devices, the new model;
then bytes for each device more than 100. "Alive at once" are messages sent and not yet folded; the limit is 64."""
WRITTEN_TEXT = "One line of metrics.jsonl, and the checkpoint (two are kept), after the second round."
TEST_TEXT = """Processor microseconds a device that an evaluation takes on the server, its own test left out; every
device is asked as often as the method does."""
MODEL_TEXT = """Training of 100 devices, HeteroFL's five levels in turn: choosing, sending, parsing, checking and
folding, on one core. No network is in between: what one carries is in docs/scale.md."""


class Server:
    """A strategy, its canned devices and the grid between them.

    Args:
        method: a key of `METHODS`.
        num: devices.
        folder: for its run.
        values: of the configuration, besides those of the method.
        failing: every so many-th device fails; 0 = none.

    Attributes:
        meeting: what it cost to get to know the devices; the clients' own work left out, as everywhere.
    """

    def __init__(
        self, method: str, num: int, folder: Path, values: Mapping[str, object] | None = None, failing: int = 0
    ):
        logging.getLogger("flwr").setLevel(logging.ERROR)
        experiment = Experiment.read(run_config(method, {**ALL_TRAIN, **METHODS.get(method, {}), **(values or {})}))
        data, transform = server_app._normalised(load_server(experiment.data))
        task, initial = STRATEGIES[method].set_up(experiment, data.info, None)
        self.run = RunFolder(folder)
        strategy = STRATEGIES[method](experiment, task, data, {**transform, "run": "scale"}, self._write)
        assert isinstance(strategy, SubmodelStrategy)
        self.strategy, self.num, self.round = strategy, num, 0
        self.devices = CannedGrid(task, num, experiment.settings.fleet, IN_FLIGHT, failing)
        self.grid = StreamingGrid(self.devices, in_flight=IN_FLIGHT, poll_s=0.0)
        self.arrays = to_record_of_arrays(initial)
        self.meeting = self.clocked(lambda: strategy.meet(self.grid))
        self.devices.rest()
        strategy.begin(initial, self.grid)
        self.checkpoint_bytes = self.line_bytes = 0

    def clocked(self, work: Callable[[], object]) -> Clock:
        """What the server spends on some work."""
        begin, clients = Clock.now(), self.devices.clients.total
        work()
        return Clock.now() - begin - (self.devices.clients.total - clients)

    def train(self) -> tuple[Clock, Clock]:
        """One round's training: the cost of choosing the parts, and that of sending and folding them."""
        self.round += 1
        jobs: Any = None

        def assign() -> None:
            nonlocal jobs
            jobs = self.strategy.configure_train(self.round, self.arrays, ConfigRecord(), self.grid)

        def fold() -> None:
            replies = self.grid.send_and_receive(jobs)
            averaged, _ = self.strategy.aggregate_train(self.round, self.devices.counted(replies))
            self.arrays = averaged or self.arrays

        return self.clocked(assign), self.clocked(fold)

    def close(self) -> Clock:
        """The end of a round: its line and the checkpoint, on disk."""
        return self.clocked(lambda: self.strategy.aggregate_evaluate(self.round, []))

    def test(self) -> Clock:
        """One round's evaluation: the server's own test, and what the devices are asked."""
        return self.clocked(self._test)

    def _test(self) -> None:
        questions = self.strategy.configure_evaluate(self.round, self.arrays, ConfigRecord(), self.grid)
        self.strategy.aggregate_evaluate(self.round, self.grid.send_and_receive(questions))

    def _write(self, line: dict[str, Any], checkpoint: Checkpoint, _: object) -> None:
        self.line_bytes = -self.run.num_bytes()
        self.run.append_round(line)
        self.line_bytes += self.run.num_bytes()
        self.checkpoint_bytes = save_checkpoint(self.run.path / "checkpoint", checkpoint).stat().st_size


@contextmanager
def serving(method: str, num: int, values: Mapping[str, object] | None = None, failing: int = 0) -> Iterator[Server]:
    """A server whose folder is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield Server(method, num, Path(folder), values, failing)


@contextmanager
def warm(method: str, num: int) -> Iterator[Server]:
    """One that has run a round: its caches are full."""
    with serving(method, num) as server:
        server.train()
        server.close()
        yield server


# Time ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """Processor microseconds a device, of rounds of one size."""

    choose: float
    fold: float
    close: float
    clients: float

    @property
    def server(self) -> float:
        """All that the server does."""
        return self.choose + self.fold + self.close


def take_turns(method: str) -> tuple[dict[int, list[Turn]], dict[int, float]]:
    """Rounds of 100, 1,000 and 10,000 devices in turn, and the meeting of each; called in a fresh process.

    The small ones are repeated until they have seen a thousand devices, so that a turn of theirs is no shorter than
    the clock can tell.
    """
    turns: dict[int, list[Turn]] = {num: [] for num in NUMS}
    with ExitStack() as stack:
        servers = {num: stack.enter_context(warm(method, num)) for num in NUMS}
        for _ in range(TURNS):
            for num, server in servers.items():
                turns[num].append(_turn(server, max(1, 1_000 // num)))
        return turns, {num: 1e6 * server.meeting.processor_s / num for num, server in servers.items()}


def _turn(server: Server, rounds: int) -> Turn:
    before = server.devices.clients.total
    parts = [(*server.train(), server.close()) for _ in range(rounds)]
    clients = server.devices.clients.total - before
    spent = [sum(part[i].processor_s for part in parts) for i in range(3)]
    choose, fold, close, own = (1e6 * s / (rounds * server.num) for s in (*spent, clients.processor_s))
    return Turn(choose, fold, close, own)


def time_rows(method: str, turns: Mapping[int, Sequence[Turn]], meeting: Mapping[int, float]) -> list[list[str]]:
    """One row for each number of devices; quotients are of one turn, so that a busy moment meets both."""
    rows = []
    for num, own in turns.items():
        quotients = [turn.server / least.server for turn, least in zip(own, turns[NUMS[0]], strict=True)]
        medians = [median(getattr(turn, name) for turn in own) for name in ("server", "choose", "fold", "close")]
        spread = f"{median(quotients):.2f} ({min(quotients):.2f} to {max(quotients):.2f})"
        clients = median(turn.clients for turn in own)
        cells = [*(f"{m:.0f}" for m in medians), spread, f"{clients:.0f}", f"{meeting[num]:.0f}"]
        rows.append([method, f"{num:,}", *cells])
    return rows


TIME_HEADS = ("method", "devices", "a device", "choose", "fold", "close", "beside 100 devices", "clients", "meeting")

# Memory -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """Of one round, in bytes above the start.

    Attributes:
        most: at its peak.
        kept: once all replies are folded; what `tracemalloc` sees.
        alive: messages sent and not yet folded, the most at once.
    """

    most: int
    kept: int
    alive: int


def resident(method: str, num: int) -> Held:
    """How far resident memory rises during the second round."""
    with warm(method, num) as server:
        with memory_peak() as peak:
            server.train()
            server.close()
        return Held(peak.above_start, 0, server.devices.most_alive)


def traced(method: str, num: int) -> Held:
    """The same by tracemalloc: what Python and numpy allocate, to the byte; torch's own tensors are not seen."""
    with warm(method, num) as server:
        tracemalloc.start()
        server.train()
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
        server.close()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return Held(most, kept, server.devices.most_alive)


def memory_rows(method: str) -> list[list[str]]:
    """Each number in a fresh process."""
    found = {num: (in_child(resident, method, num), in_child(traced, method, num)) for num in NUMS}
    rows, least = [], found[NUMS[0]][1].kept
    for num, (seen, exact) in found.items():
        more = f"{(exact.kept - least) / (num - NUMS[0]):.0f}" if num > NUMS[0] else ""
        cells = [f"{seen.most / 1e6:.1f}", f"{exact.most / 1e6:.1f}", f"{exact.kept / 1e6:.2f}", more]
        rows.append([method, f"{num:,}", *cells, str(max(seen.alive, exact.alive))])
    return rows


MEMORY_HEADS = (
    "method",
    "devices",
    "resident, MB",
    "traced, MB",
    "kept, MB",
    "kept for a further one",
    "alive at once",
)


# What is written ----------------------------------------------------------------------------------------------


def written(method: str, num: int, failing: int) -> list[str]:
    """A line and a checkpoint; called in a fresh process."""
    with serving(method, num, failing=failing) as server:
        for _ in range(2):
            server.train()
            server.close()
        cells = [f"{server.line_bytes:,}", f"{server.checkpoint_bytes:,}", f"{server.line_bytes / num:.0f}"]
    return [method, f"{num:,}", f"{num // failing:,}" if failing else "0", *cells]


WRITTEN_HEADS = ("method", "devices", "failing", "line, bytes", "checkpoint, bytes", "line, a device")

# Evaluation ---------------------------------------------------------------------------------------------------

TESTS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "heterofl: statistics of all, tests of half": ("heterofl", {}),
    "fedlps: every device tests the model it keeps": ("fedlps", {}),
    "fedlps: every device is sent a model of its own": ("fedlps", {"personal": "global-masked"}),
}


def tests(what: str) -> list[list[str]]:
    """Asking devices for tests and for sums; called in a fresh process. The server's own test is taken away."""
    method, values = TESTS[what]
    alone, *seconds = [_evaluation(method, values, num) for num in (1, *NUMS)]
    each = [1e6 * (spent - alone) / (num - 1) for num, spent in zip(NUMS, seconds, strict=True)]
    return [[what, f"{num:,}", f"{us:.0f}", f"{us / each[0]:.2f}"] for num, us in zip(NUMS, each, strict=True)]


def _evaluation(method: str, values: Mapping[str, object], num: int) -> float:
    """Processor seconds, the least of three: the first fills caches."""
    spent = []
    with serving(method, num, {**values, "evaluate-every": 1}) as server:
        for _ in range(3):
            server.train()
            spent.append(server.test().processor_s)
    return min(spent)


TEST_HEADS = ("evaluation", "devices", "a device", "beside 100 devices")

# Models of several sizes --------------------------------------------------------------------------------------


def of_model(model: str) -> list[str]:
    """What a reply of HeteroFL's five levels in turn costs, and how many that makes in an hour; a fresh process."""
    with serving("heterofl", 100, {"model": model, "subset": ""}) as server:
        server.train()
        spent = [sum((part.processor_s for part in server.train()), 0.0) / 100 for _ in range(TURNS)]
        size = num_parameters(server.strategy.task.layout, full(server.strategy.task.layout))
        megabytes = server.strategy.record.bytes_up / 100 / 1e6
    per_hour = 3600 / median(spent)
    times = f"{1e3 * median(spent):.2f} ({1e3 * min(spent):.2f} to {1e3 * max(spent):.2f})"
    return [model, f"{size:,}", f"{megabytes:.2f}", times, f"{per_hour:,.0f}", f"{per_hour * megabytes / 3600:.0f}"]


MODEL_HEADS = ("network", "parameters", "MB a reply", "ms a reply", "replies an hour", "MB/s")


def report(sections: Iterable[tuple[str, str, Sequence[str], Sequence[Sequence[str]]]]) -> str:
    """The page of results."""
    lines = ["# Scale", "", "Written by `python -m benchmarks.scale`; `benchmarks/README.md` says how to read it.", ""]
    lines += [machine(), ""]
    for title, text, heads, rows in sections:
        lines += [f"## {title}", "", text, "", *table(rows, heads), ""]
    return "\n".join(lines)


def sections() -> Iterator[tuple[str, str, Sequence[str], Sequence[Sequence[str]]]]:
    """All of it, one after the other."""
    timed = [row for method in METHODS for row in time_rows(method, *in_child(take_turns, method))]
    yield "Time", TIME_TEXT, TIME_HEADS, timed
    yield "Memory", MEMORY_TEXT, MEMORY_HEADS, [row for method in METHODS for row in memory_rows(method)]
    kinds = [*product(METHODS, NUMS, [0]), ("heterofl", NUMS[-1], 10), ("heterofl", NUMS[-1], 2)]
    yield "What is written in a round", WRITTEN_TEXT, WRITTEN_HEADS, [in_child(written, *kind) for kind in kinds]
    yield "Evaluation by the devices", TEST_TEXT, TEST_HEADS, [row for what in TESTS for row in in_child(tests, what)]
    yield "Networks of other sizes", MODEL_TEXT, MODEL_HEADS, [in_child(of_model, model) for model in MODELS]


def main() -> None:
    """Measure, print, write."""
    argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__).parse_args()
    os.environ.update(ONE_THREAD)
    done = []
    for section in sections():
        done.append(section)
        print("\n".join([section[0], *table(section[3], section[2]), ""]), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(report(done))


if __name__ == "__main__":
    main()
