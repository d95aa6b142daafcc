"""Nothing that was received becomes code: every call that could make it so is listed here, with whose data it reads.

A client sees what the server sends, the server what clients send, and both read files. The server's configuration and
its FAB are code anyway (`model = "package.module:factory"` is imported by name, on clients too): who does not trust a
server must not connect to it. What a client sends is numbers and bytes, and stays that.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
from toy import ROOT

ROOMS = ("flexfed", "strategies", "benchmarks", "deploy", "client_app.py", "server_app.py")

DANGERS = (
    *("eval", "exec", "compile", "__import__", "breakpoint"),
    *("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "copyreg", "yaml", "xml"),
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.package"),
    *(
        "torch.serialization",
        "numpy.load",
        "numpy.lib.npyio",
        "numpy.lib.format",
        "numpy.loadtxt",
        "pandas.read_pickle",
    ),
    *(
        "subprocess",
        "os.system",
        "os.popen",
        "os.startfile",
        "pty",
        "multiprocessing",
        "asyncio.create_subprocess_exec",
    ),
    *("os.execv", "os.execve", "os.execvp", "os.execl", "os.spawnv", "os.spawnl", "os.posix_spawn", "os.fork"),
    *("importlib", "runpy", "imp", "pkgutil", "ctypes", "cffi"),
    *("zipfile", "tarfile", "gzip", "bz2", "lzma", "zlib", "shutil.unpack_archive"),
    *("json.load", "json.loads", "ast.literal_eval", "tomllib.load", "tomllib.loads"),
    *("datasets.load_dataset", "datasets.load_from_disk", "torchvision.models.get_model"),
    *("urllib.request", "requests", "httpx", "socket", "http.client", "ftplib"),
)
"""What runs, imports, unpickles, unpacks, downloads or parses, by its full name; a module means all in it."""

HARMLESS = (
    *("pickle.UnpicklingError", "subprocess.PIPE", "subprocess.STDOUT", "subprocess.DEVNULL"),
    *("subprocess.TimeoutExpired", "subprocess.CalledProcessError", "importlib.metadata.version"),
    *("importlib.metadata.PackageNotFoundError", "importlib.util.find_spec"),
)
"""Names from there that do nothing."""

TOLD = "by the server: of a run that follows another"
OURS = "files that a run of this project wrote, into folders of the user's own"
ALLOWED: dict[tuple[str, str], tuple[int, str]] = {
    ("client_app.py", "json.loads"): (1, f"changed-config, told {TOLD}; it fills dataclasses that check every value"),
    ("benchmarks/rounds.py", "importlib.import_module"): (1, "names that stand there"),
    ("benchmarks/superlink.py", "httpx.HTTPError"): (1, "asks its own SuperLink whether it is up"),
    ("benchmarks/superlink.py", "httpx.get"): (1, "asks its own SuperLink whether it is up"),
    ("benchmarks/superlink.py", "subprocess.Popen"): (2, "its own SuperLink and SuperNodes"),
    ("benchmarks/superlink.py", "subprocess.run"): (1, "`flwr run` of its own app"),
    ("benchmarks/superlink.py", "json.loads"): (1, "what its own child writes"),
    ("benchmarks/simulation.py", "subprocess.run"): (2, "`flexfed` itself, with words that stand there"),
    ("benchmarks/simulation.py", "json.loads"): (1, "what its own child writes"),
    ("benchmarks/speed.py", "importlib.import_module"): (1, "names that stand there"),
    ("flexfed/cli.py", "importlib.import_module"): (1, "'server_app', of the checkout that the user names"),
    ("flexfed/measure.py", "importlib.import_module"): (1, "names that stand there"),
    ("flexfed/models/registry.py", "importlib.import_module"): (
        1,
        "`model`, from the run's configuration: the server's",
    ),
    ("flexfed/flower/inflating.py", "json.loads"): (1, "a client's list of chunks, as Flower itself reads it; counted"),
    ("flexfed/checkpoint.py", "json.loads"): (2, OURS),
    ("flexfed/export.py", "json.loads"): (4, OURS),
    ("flexfed/launch.py", "json.loads"): (1, "what the user's own `flwr` prints"),
    ("flexfed/runs.py", "json.loads"): (1, OURS),
    ("flexfed/suites.py", "json.loads"): (1, OURS),
    ("flexfed/tensorfile.py", "json.loads"): (1, OURS),
    ("flexfed/stitching/saved.py", "json.loads"): (1, OURS),
    ("flexfed/devices.py", "tomllib.loads"): (1, "a fleet, from the run's configuration"),
    ("flexfed/models/weights.py", "torch.load"): (1, "torch hub's cache, tensors alone"),
    ("flexfed/stitching/weightfiles.py", "torch.load"): (2, "a zoo's weight files, tensors alone"),
    ("flexfed/stitching/weightfiles.py", "zipfile.is_zipfile"): (1, "a zoo's weight files; nothing is unpacked"),
    ("flexfed/models/zoo.py", "torchvision.models.get_model"): (1, "builds a network by name, without weights"),
    ("flexfed/data/sources.py", "datasets.load_dataset"): (3, "the data set that the configuration names; no scripts"),
    ("flexfed/data/sources.py", "datasets.load_from_disk"): (1, "the folder that the configuration names"),
    ("flexfed/overrides.py", "tomllib.loads"): (3, "the user's own configuration"),
    ("flexfed/launch.py", "socket.socket"): (1, "looks for a free port"),
    ("benchmarks/measuring.py", "multiprocessing.get_context"): (1, "a fresh process of its own"),
    ("benchmarks/measuring.py", "ctypes.CDLL"): (1, "the C library's own allocator"),
    ("benchmarks/memory.py", "ctypes.CDLL"): (1, "the C library's own allocator"),
    ("benchmarks/memory.py", "json.loads"): (1, "what its own child prints"),
    ("flexfed/launch.py", "subprocess.Popen"): (1, "the user's own `flwr`"),
    ("flexfed/processes.py", "subprocess.run"): (1, "`ps`, to find what the user started"),
    ("flexfed/workers.py", "subprocess.Popen"): (1, "runs of a suite that the user asked for"),
}
"""(file, name) -> how often, and whose data it works on."""

WHAT_TO_DO = (
    "is not among ALLOWED of tests/test_dangers.py. Nothing that was received may become code, a process or a file: "
    "send numbers as arrays (`flexfed.flower.messages.to_array`), keep tensors in safetensors (`flexfed.tensorfile`). "
    "If what it works on is the user's own, list it there and say whose data it reads"
)


def sources() -> list[Path]:
    found = [ROOT / room for room in ROOMS]
    return sorted(path for place in found for path in ([place] if place.is_file() else place.rglob("*.py")))


def full_names(tree: ast.AST) -> dict[str, str]:
    """Name in a file -> what was imported under it."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """The full name that an expression says; '' = it says none."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (before := dotted(node.value, names)):
        return f"{before}.{node.attr}"
    return ""


def is_dangerous(name: str) -> bool:
    name = name.removeprefix("builtins.")
    return name not in HARMLESS and any(name == danger or name.startswith(f"{danger}.") for danger in DANGERS)


def dangers(code: str) -> Counter[str]:
    """Dangerous names that a file uses: called, handed on, or imported by name; types in annotations are none."""
    tree = ast.parse(code)
    names, found, inside = full_names(tree), Counter[str](), set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) or (isinstance(node, ast.Attribute) and id(node) in inside):
            inside.add(id(node.value))  # Popen[str] is a type; in a.b.c the longest name counts
        annotated = [getattr(node, key, None) for key in ("annotation", "returns")]
        inside |= {id(part) for whole in annotated if whole is not None for part in ast.walk(whole)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and id(node) not in inside:
            if isinstance(node, ast.Attribute):
                inside |= {id(part) for part in ast.walk(node.value)} if dotted(node, names) else set()
            name = dotted(node, names)
            is_module = isinstance(node, ast.Name) and names.get(node.id) == name and "." not in name
            if is_dangerous(name) and not is_module:
                found[name.removeprefix("builtins.")] += 1
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            star = [alias for alias in node.names if alias.name == "*"]
            found.update([f"{node.module}.*"] * (is_dangerous(node.module) and len(star)))
    return found


def test_every_danger_is_known() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), name): number
        for path in sources()
        for name, number in dangers(path.read_text(encoding="utf-8")).items()
    }
    assert len(sources()) > 100
    for (file, name), number in found.items():
        allowed = ALLOWED.get((file, name), (0, ""))[0]
        assert number <= allowed, f"{file} uses {name} {number} times, {allowed} are known: it {WHAT_TO_DO}"
    gone = {key: number for key, (number, _) in ALLOWED.items() if found.get(key, 0) != number}
    assert not gone, f"no longer there so often: take it out of ALLOWED, too: {gone}"


def test_files_of_tensors_are_read_as_tensors_alone() -> None:
    loads = [(path, call) for path in sources() for call in calls(path, "torch.load")]
    assert len(loads) == 3
    for path, call in loads:
        told = {key.arg: ast.unparse(key.value) for key in call.keywords}
        assert told.get("weights_only") == "True", f"{path}:{call.lineno}: torch.load needs weights_only=True"


def test_no_process_is_started_through_a_shell() -> None:
    for path in sources():
        for call in calls(path):
            for key in call.keywords:
                assert key.arg not in ("shell", "allow_pickle", "trust_remote_code"), f"{path}:{call.lineno}: {key.arg}"


def calls(path: Path, name: str = "") -> list[ast.Call]:
    """The calls in a file, of one name or all."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = full_names(tree)
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in found if not name or dotted(call.func, names) == name]


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("eval('1')", ["eval"]),
        ("f = exec", ["exec"]),
        ("map(eval, texts)", ["eval"]),
        ("import builtins\nbuiltins.exec('1')", ["exec"]),
        ("import pickle\npickle.loads(b'')", ["pickle.loads"]),
        ("from pickle import loads as read\nread(b'')", ["pickle.loads"]),
        ("import pickle as p\nx = p.Unpickler", ["pickle.Unpickler"]),
        ("from marshal import *", ["marshal.*"]),
        ("import numpy as np\nnp.load('x')", ["numpy.load"]),
        ("import torch\ntorch.load('x')\ntorch.load('y')", ["torch.load", "torch.load"]),
        ("import torch as t\nt.hub.load('a', 'b')", ["torch.hub.load"]),
        ("import os\nos.system('ls')", ["os.system"]),
        ("from subprocess import run\nrun(['ls'])", ["subprocess.run"]),
        ("import subprocess\nsubprocess.Popen(['ls'], stdout=subprocess.PIPE)", ["subprocess.Popen"]),
        ("import importlib\nimportlib.import_module(name)", ["importlib.import_module"]),
        ("def f():\n    import tarfile\n    tarfile.open('x').extractall()", ["tarfile.open"]),
        ("from importlib.util import find_spec\nfind_spec('x')", []),
        ("import subprocess\ndef f(p: subprocess.Popen[str]) -> set[subprocess.Popen]: ...", []),
        ("model.eval()\nre.compile('x')\nself.exec()", []),
        ("import json\njson.dumps({})", []),
    ],
)
def test_the_search_finds_them_under_any_name(code: str, names: list[str]) -> None:
    assert sorted(dangers(code).elements()) == names
