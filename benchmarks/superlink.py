"""What one SuperLink carries on this machine: `python -m benchmarks.superlink`.

A SuperLink on loopback, without TLS; nodes that do nothing but speak Flower's HTTP API, as threads of one process; a
ServerApp that sends each the same part and takes an equally large reply of its own from each, through the streaming
grid. Everything shares the machine's cores, so beside the wall clock stands the processor time of the SuperLink alone:
it is one process, and most of what it does holds Python's lock. Prints the tables and writes results/superlink.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from benchmarks.memory import table
from benchmarks.speed import ONE_THREAD, machine
from flexfed.flower.grid import stream
from flexfed.flower.messages import to_array
from flexfed.launch import free_ports

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "superlink.md"
KINDS = {"memory": ":flwr-in-memory:", "database": "state.db"}
ROUNDS = 3
PARTS_MB = (0.001, 1.0, 10.0)
NUMS = (3, 20)
REQUESTS = 1_000
IDLE_NODES = (3, 100, 1_000)
ASK_S = 1.0  # of the nodes here
POLL_S, HEARTBEAT_S = 3.0, 20.0  # of flwr 1.41's SuperNodes: a pause of 3 s, and 25 s times 0.7 to 0.9

APP = {
    "pyproject.toml": """
[project]
name = "flexfed-echo"
version = "1.0.0"
dependencies = ["flwr"]
[tool.flwr.app]
publisher = "flexfed"
[tool.flwr.app.components]
serverapp = "server:app"
clientapp = "client:app"
[tool.flwr.app.config]
out = ""
nodes = 3
""",
    "client.py": "from flwr.clientapp import ClientApp\n\napp = ClientApp()\n",
    "server.py": """
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    from benchmarks.superlink import drive

    drive(grid, context.run_config["out"], context.run_config["nodes"])
""",
}

# The ServerApp ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """One exchange with all nodes.

    Attributes:
        megabytes: of the part, and of each reply.
        seconds: from the first message to the last reply.
        superlink_s: processor seconds of the SuperLink in them, without what the nodes' questions cost it.
        pushed: bytes of objects that the ServerApp sent to the SuperLink.
    """

    megabytes: float
    nodes: int
    seconds: float
    superlink_s: float
    pushed: int


def drive(grid: Grid, out: str, num: int) -> None:
    """Rounds of parts of each size; called in the ServerApp's process."""
    superlink = psutil.Process(int(os.environ["FLEXFED_SUPERLINK_PID"]))
    pushed = count_pushed(grid)
    while len(list(grid.get_node_ids())) < num:
        time.sleep(0.1)
    nodes = sorted(grid.get_node_ids())[:num]
    streaming = stream(grid)
    idle, rounds = idle_share(superlink), []
    for megabytes in PARTS_MB:
        for turn in range(ROUNDS):
            part = np.random.default_rng([turn, int(1000 * megabytes)]).bytes(int(1e6 * megabytes))
            shared = to_array(np.frombuffer(part, dtype=np.uint8))
            before, spent, begin = pushed[0], cpu_s(superlink), time.perf_counter()
            messages = (Message(job(shared, node), dst_node_id=node, message_type="train") for node in nodes)
            replies = 0
            for reply in streaming.send_and_receive(messages, timeout=300):
                assert not reply.has_error(), reply.error
                replies += len(reply.content.array_records["arrays"]["part"].data) == len(part)
                del reply
            assert replies == num
            seconds, busy = time.perf_counter() - begin, cpu_s(superlink) - spent
            rounds.append(Round(megabytes, num, seconds, busy - idle * seconds, pushed[0] - before))
    Path(out).write_text(json.dumps([asdict(r) for r in rounds]))


def job(part: Array, seed: int) -> RecordDict:
    """As many records as a job has, of which all but one are the same for all nodes."""
    submodel, config = ConfigRecord({"units": bytes(32)}), ConfigRecord({"seed": seed})
    return RecordDict({"arrays": ArrayRecord({"part": part}), "submodel": submodel, "config": config})


def update(part: Array, number: int) -> RecordDict:
    """As many records as a reply has."""
    submodel, metrics = ConfigRecord({"units": bytes(32)}), MetricRecord({"weight": float(number)})
    return RecordDict({"arrays": ArrayRecord({"part": part}), "submodel": submodel, "metrics": metrics})


def idle_share(superlink: psutil.Process, seconds: float = 5.0) -> float:
    """Processor seconds of the SuperLink in a second in which the nodes ask, and nothing is sent."""
    before = cpu_s(superlink)
    time.sleep(seconds)
    return (cpu_s(superlink) - before) / seconds


def count_pushed(grid: Any) -> list[int]:
    """Count the bytes of the objects that a grid pushes from now on."""
    client, total = grid._runtime_client, [0]
    push = client.PushObject

    def counting(request: Any, *args: Any, **kwargs: Any) -> Any:
        total[0] += len(request.object_content)
        return push(request, *args, **kwargs)

    client.PushObject = counting
    return total


def cpu_s(process: psutil.Process) -> float:
    """Processor seconds of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


# Nodes --------------------------------------------------------------------------------------------------------


@contextmanager
def connected(port: int) -> Iterator[tuple[Any, ...]]:
    """A registered node: its id, and the calls of Flower's own client."""
    from flwr.supernode.fleet_http_connection import http_request_response

    with http_request_response(f"127.0.0.1:{port}", insecure=True, max_retries=3) as calls:
        yield calls


def answer_all(port: int, number: int, stop: threading.Event) -> None:
    """A node that answers every message with as many bytes of its own, until it is stopped."""
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        iterate_object_tree,
        no_object_id_recompute,
    )
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects, push_objects

    rng = np.random.default_rng(number)
    with connected(port) as (_, receive, send, _run, _fab, pull, push, confirm):
        while not stop.is_set():
            if (received := receive()) is None:
                stop.wait(ASK_S)
                continue
            message, tree = received
            run, root = message.metadata.run_id, message.metadata.message_id
            contents = pull_objects([t.object_id for t in iterate_object_tree(tree)], lambda i, run=run: pull(run, i))
            confirm(run, root)
            asked: Any = inflate_object_from_contents(root, contents)
            asked.metadata.__dict__["_message_id"] = root
            size = len(asked.content.array_records["arrays"]["part"].data)
            own = to_array(np.frombuffer(rng.bytes(size), dtype=np.uint8))
            reply = Message(update(own, number), reply_to=asked)
            with no_object_id_recompute():
                reply.metadata.__dict__["_message_id"] = reply.object_id
                objects = get_all_nested_objects(reply)
                wanted, session = send(reply, get_object_tree(reply), 0.0)
                push_objects(objects, lambda i, c, run=run, s=session: push(run, s, i, c), object_ids_to_push=wanted)


def nodes_main(port: int, num: int) -> None:
    """A process of nodes; ends with its standard input."""
    from flwr.clientapp import ClientApp

    from flexfed.flower.grid import InProcessGrid

    InProcessGrid(ClientApp(), 1)  # messages want to know their task
    stop = threading.Event()
    threads = [threading.Thread(target=answer_all, args=(port, n, stop)) for n in range(num)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()


# The SuperLink ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SuperLink:
    """One that runs."""

    port: int
    process: psutil.Process
    env: Mapping[str, str]
    home: Path


@contextmanager
def superlink(kind: str) -> Iterator[SuperLink]:
    """A SuperLink of our own while the block lasts."""
    with tempfile.TemporaryDirectory(prefix="flexfed-") as folder, ExitStack() as stack:
        home, bin_dir, (port,) = Path(folder), Path(sys.executable).parent, free_ports(1)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        (home / "cwd").mkdir()
        env = {
            **os.environ,
            "FLWR_HOME": folder,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        command = [str(bin_dir / "flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--database", KINDS[kind], "--disable-runtime-dependency-installation"]
        # A ServerApp's environment is its SuperLink's, which does not know its own number: the shell does.
        command = ["sh", "-c", 'FLEXFED_SUPERLINK_PID=$$ exec "$@"', "sh", *command]
        with (home / "log").open("wb") as log:
            own = subprocess.Popen(command, env=env, cwd=home / "cwd", stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        stack.callback(end, own)
        link = SuperLink(port, psutil.Process(own.pid), env, home)
        wait_until(lambda: answers(port), 60, "the SuperLink does not answer")
        yield link


def answers(port: int) -> bool:
    """Whether it can be talked to."""
    import httpx

    with suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200
    return False


def wait_until(done: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Ask again and again.

    Raises:
        TimeoutError: it was never so.
    """
    end_at = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end_at:
            raise TimeoutError(f"{otherwise} after {seconds:g} s")
        time.sleep(0.1)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process of ours, and what it started."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in family:
        with suppress(psutil.Error):
            child.kill()


# Rows ---------------------------------------------------------------------------------------------------------


def exchanges(kind: str, num: int) -> list[Round]:
    """Rounds with so many nodes."""
    with superlink(kind) as link, ExitStack() as stack:
        nodes = [sys.executable, "-m", "benchmarks.superlink", "--nodes", str(num), "--port", str(link.port)]
        process = subprocess.Popen(nodes, env=link.env, cwd=ROOT, stdin=subprocess.PIPE)
        stack.callback(end, process)
        app, out = link.home / "echo", link.home / "out.json"
        app.mkdir()
        for name, text in APP.items():
            (app / name).write_text(text)
        flwr = [str(Path(sys.executable).parent / "flwr"), "run", str(app), "own", "-c", f'out="{out}" nodes={num}']
        subprocess.run(flwr, env=link.env, cwd=link.home / "cwd", check=True, capture_output=True, timeout=120)
        wait_until(out.exists, 500, (link.home / "log").read_text(errors="replace")[-3000:] + "\nno result")
        time.sleep(0.2)
        return [Round(**told) for told in json.loads(out.read_text())]


def exchange_rows(kind: str) -> Iterator[list[str]]:
    """One for each number of nodes and size of part: medians of three rounds."""
    for num in NUMS:
        rounds = exchanges(kind, num)
        for megabytes in PARTS_MB:
            own = [r for r in rounds if r.megabytes == megabytes]
            seconds, busy = median(r.seconds for r in own), median(r.superlink_s for r in own)
            through = 2 * num * megabytes / seconds
            each = f"{1e3 * busy / num:.0f}"
            crossed = f"{median(r.pushed for r in own) / (1e6 * megabytes):.2f}" if megabytes >= 1 else ""
            yield [kind, str(num), f"{megabytes:g}", f"{seconds:.2f}", f"{through:.1f}", each, crossed]


EXCHANGE_HEADS = ("state in", "nodes", "MB", "seconds a round", "MB/s through", "SuperLink ms a node", "parts crossed")


@dataclass(frozen=True)
class Registered:
    """A node that is online as far as the SuperLink knows, and asks when it is told to."""

    client: Any
    node: Any

    @classmethod
    def at(cls, port: int) -> Registered:
        """One more, with keys of its own."""
        from flwr.common.constant import HEARTBEAT_MAX_INTERVAL
        from flwr.proto.fleet_pb2 import ActivateNodeRequest, RegisterNodeFleetRequest
        from flwr.proto.node_pb2 import Node
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
        from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
        from flwr.supernode.fleet_http_client import FleetHttpClient
        from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

        keys = generate_key_pairs()
        told = [RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(*keys)]
        client = FleetHttpClient.from_server_address(f"127.0.0.1:{port}", True, None, interceptors=told).__enter__()
        name = public_key_to_bytes(keys[1])
        client.RegisterNode(RegisterNodeFleetRequest(public_key=name))
        online = client.ActivateNode(ActivateNodeRequest(public_key=name, heartbeat_interval=HEARTBEAT_MAX_INTERVAL))
        return cls(client, Node(node_id=online.node_id))

    def pull(self) -> None:
        """Ask for a message; there is none."""
        from flwr.proto.fleet_pb2 import PullMessagesRequest

        self.client.PullMessages(PullMessagesRequest(node=self.node))

    def beat(self) -> None:
        """Say that it lives."""
        from flwr.common.constant import HEARTBEAT_MAX_INTERVAL
        from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest

        self.client.SendNodeHeartbeat(
            SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_MAX_INTERVAL)
        )


def idle_rows(kind: str) -> Iterator[list[str]]:
    """What the SuperLink spends on a question for messages and on a heartbeat, few and many nodes being registered."""
    with superlink(kind) as link:
        nodes: list[Registered] = []
        for num in IDLE_NODES:
            while len(nodes) < num:
                nodes.append(Registered.at(link.port))
                if len(nodes) > 1:
                    nodes[-1].client.close()
            pull, beat = (spent(link, ask) for ask in (nodes[0].pull, nodes[0].beat))
            load = pull / POLL_S + beat / HEARTBEAT_S  # of one core, by one node
            yield [kind, f"{num:,}", f"{1e3 * pull:.2f}", f"{1e3 * beat:.2f}", f"{1e3 * load:.2f}", f"{1 / load:,.0f}"]


def spent(link: SuperLink, ask: Callable[[], None]) -> float:
    """Processor seconds of the SuperLink on one request."""
    for _ in range(20):
        ask()
    before = cpu_s(link.process)
    for _ in range(REQUESTS):
        ask()
    return (cpu_s(link.process) - before) / REQUESTS


IDLE_HEADS = (
    "state in",
    "nodes registered",
    "ms a pull",
    "ms a heartbeat",
    "ms a second and node",
    "nodes for one core",
)


def report(sections: Sequence[tuple[str, str, Sequence[str], Sequence[Sequence[str]]]]) -> str:
    """The page of results."""
    lines = ["# One SuperLink", "", "Written by `python -m benchmarks.superlink`; `benchmarks/README.md` says how to "]
    lines[-1] += "read it."
    lines += ["", machine().replace(", one thread used", ""), ""]
    for title, text, heads, rows in sections:
        lines += [f"## {title}", "", text, "", *table(rows, heads), ""]
    return "\n".join(lines)


IDLE_TEXT = """Processor milliseconds of the SuperLink, measured over 1,000 requests of one node, one after the other.
An idle SuperNode pulls every 3 s and sends a heartbeat every 17.5 to 22.5 s (read in flwr 1.41's source): what a node
costs in a second, and how many fill one core, follow by arithmetic; a SuperLink is one process that does not use
more."""
EXCHANGE_TEXT = """Medians of three rounds. "MB/s through" counts every part and every reply once; "SuperLink ms a node"
is its processor time for passing one part on and taking one reply, what it spends on the nodes' questions taken away;
"parts crossed" is how often the shared part went from the ServerApp to the SuperLink. The nodes ask every second here;
SuperNodes do every 3 s, so a real round takes about 1 s longer, and the start of a process for each message."""


def main() -> None:
    """Measure, print, write; with --nodes be nodes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.superlink", description=__doc__)
    parser.add_argument("--nodes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.nodes:
        return nodes_main(args.port, args.nodes)
    os.environ.update(ONE_THREAD)
    done = []
    for title, text, heads, rows_of in (
        ("Idle nodes", IDLE_TEXT, IDLE_HEADS, idle_rows),
        ("Rounds", EXCHANGE_TEXT, EXCHANGE_HEADS, exchange_rows),
    ):
        rows = [row for kind in KINDS for row in rows_of(kind)]
        print("\n".join([title, *table(rows, heads), ""]), flush=True)
        done.append((title, text, heads, rows))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(report(done))


if __name__ == "__main__":
    main()
