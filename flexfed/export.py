"""One level of a run as a plain narrow network that needs no method and no server: safetensors, and ONNX."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors.torch import save
from torch import nn

from flexfed.batchnorm import Statistics, apply_statistics, norm_widths
from flexfed.codecs import PLAIN, through
from flexfed.cost import num_parameters
from flexfed.evaluation import with_statistics
from flexfed.exits import Exits
from flexfed.levels import RunLevels, read_levels
from flexfed.methods import METHODS
from flexfed.models import model_factory
from flexfed.narrowing import narrow
from flexfed.networks import Factory
from flexfed.report import percent, scaled
from flexfed.runs import write_atomic
from flexfed.submodel import extract
from flexfed.tensorfile import open_tensors
from flexfed.units import Arrays

FORMAT = "flexfed network 1"
ONNX_PACKAGES = ("onnx", "onnxscript")
_THEIRS = r"(torch|onnx\w*|copyreg|google\.protobuf)(\.|$)"


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        network: the .safetensors file.
        onnx: the .onnx file, if there is one.
        facts: the file's metadata.
        notes: what the person should know besides.
    """

    network: Path
    onnx: Path | None
    facts: Mapping[str, str]
    notes: tuple[str, ...]

    def to_text(self) -> str:
        """Level, files with their sizes, what the inputs must be, and the line that loads it."""
        facts = self.facts
        reached = f", accuracy {percent(float(facts['accuracy']))}" if "accuracy" in facts else ""
        shape = "x".join(map(str, json.loads(facts["input-shape"])))
        mean, std = (_short(facts[key]) for key in ("input-mean", "input-std"))
        inputs = f"inputs: n x {shape}, normalised by channel with mean {mean} and deviation {std} (exact in the file)"
        files = [f"{path}  {scaled(path.stat().st_size, 'B')}" for path in (self.network, self.onnx) if path]
        size = f"{int(facts['parameters']):,} parameters"
        head = f"level {facts['level']} of {facts['model']}, round {facts['round']}: {size}"
        load = f"from flexfed.export import load_exported; model = load_exported({str(self.network)!r})"
        return "\n".join([head + reached, *files, inputs, "", load])


def _short(numbers: str) -> str:
    return ", ".join(f"{number:.4g}" for number in json.loads(numbers))


def export_level(
    folder: str | Path, level: str | None = None, out: Path | None = None, with_onnx: bool = True
) -> Exported:
    """Write one level of a run, finished or not, as its newest checkpoint has it.

    Args:
        folder: of the run.
        level: its name; None = the one that the run reports.
        out: where the files go; None = `export` in the run folder.
        with_onnx: write the .onnx file, too. Where that fails, a note says why.

    Raises:
        ValueError: no run folder, no checkpoint, no such level, or no batch-norm statistics for it.
    """
    found = read_levels(folder)
    name = _chosen(found, level)
    network = plain_network(found.task.factory, level_arrays(found, name))
    facts = _facts(found, name)
    place = (found.run.path / "export" if out is None else out.expanduser()).resolve()
    if place.exists() and not place.is_dir():
        raise ValueError(f"expected a folder for the files, got the file {place}")
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{file_stem(name)}.safetensors"
    write_atomic(path, save(dict(network.state_dict()), facts))
    beside = path.with_suffix(".onnx")
    beside.unlink(missing_ok=True)  # of an earlier export: another network's
    why = _write_onnx(beside, network, found.task.input_shape, facts) if with_onnx else ""
    notes = tuple(note for note in (_age(facts), why) if note)
    return Exported(path, beside if with_onnx and not why else None, facts, notes)


def _chosen(found: RunLevels, level: str | None) -> str:
    name = list(found.parts)[-1] if level is None else level
    if name not in found.parts:
        raise ValueError(f"the run has no level {name!r}; it has {', '.join(found.parts)}")
    return name


def file_stem(level: str) -> str:
    """A level's name as a file's, whatever it holds, and no two the same: "M-" -> "M-", "a/b" -> "a%2Fb"."""
    return quote(level, safe="")


def level_arrays(found: RunLevels, level: str) -> Arrays:
    """A level's tensors, and its batch-norm statistics beside them.

    Raises:
        ValueError: its network normalises, and the run has no statistics of the level.
    """
    layout, part = found.task.layout, found.parts[level]
    codec = found.checkpoint.facts.get("level-codecs", {}).get(level, PLAIN)  # older runs have none
    used = METHODS[found.checkpoint.facts["strategy"]].as_used
    arrays = through(codec, layout, part, used(found.task, part, extract(layout, part, found.checkpoint.arrays)))
    statistics = found.checkpoint.statistics.get(level)
    if statistics is None and norm_widths(narrow(found.task.factory, arrays)):
        raise ValueError(_no_statistics(found, level))
    return with_statistics(arrays, statistics)


def _no_statistics(found: RunLevels, level: str) -> str:
    run = f"the run in {found.run.path}"
    if level not in found.checkpoint.statistics:
        return (
            f"{run} has no batch-norm statistics of level {level!r} yet: none of its {found.checkpoint.server_round} "
            f"rounds was evaluated; let it go on to its first evaluation, or start one with evaluate-every=1"
        )
    strategy = found.checkpoint.facts["strategy"]
    keys = [k for k in ("batch-norm", f"{strategy}.batch-norm") if found.run.config.get(k) == "batch"]
    ways = {"batch-norm": "batch-norm='static'"}
    told = " and ".join(ways.get(key, f"{key}='federated' or 'proxy'") for key in keys)
    return (
        f"{run} has no batch-norm statistics of level {level!r}: it was evaluated with those of each test batch "
        f"({', '.join(keys)} = 'batch'), which a network that stands alone does not have; start the run anew with "
        f"{told}, or with a network without batch norm"
    )


def _facts(found: RunLevels, level: str) -> dict[str, str]:
    """What the file says of itself; numbers as JSON."""
    told, checkpoint = found.checkpoint.facts, found.checkpoint
    accuracies = {line["round"]: line[f"accuracy-{level}"] for line in found.run.rounds if f"accuracy-{level}" in line}
    rounds = [number for number in accuracies if number <= checkpoint.server_round]
    facts: dict[str, Any] = {
        "num-classes": found.task.num_classes,
        "input-shape": list(found.task.input_shape),
        "round": checkpoint.server_round,
        "input-mean": told["input-mean"],
        "input-std": told["input-std"],
        "parameters": num_parameters(found.task.layout, found.parts[level]),
    }
    if rounds and checkpoint.statistics.get(level):
        facts["statistics-round"] = max(rounds)
    if (accuracy := accuracies.get(checkpoint.server_round)) is not None:
        facts["accuracy"] = accuracy
    if found.task.exits is not None:
        facts["exits"] = asdict(found.task.exits)
    words = {"format": FORMAT, "model": told["model"], "level": level, "strategy": told["strategy"]}
    return {**words, "run": found.run.path.name, **{key: json.dumps(value) for key, value in facts.items()}}


def _age(facts: Mapping[str, str]) -> str:
    """A note where batch norm's statistics are older than the weights, which are then not those of any accuracy."""
    told = facts.get("statistics-round", facts["round"])
    if told == facts["round"]:
        return ""
    return (
        f"the weights are of round {facts['round']}, the batch-norm statistics of round {told}, the last that was "
        "evaluated; export after an evaluated round for the accuracy reported"
    )


# --- the network --------------------------------------------------------------------------------------------------


def load_exported(path: str | Path) -> nn.Module:
    """The network that `flexfed export` wrote: plain, narrow, in eval mode; without Flower, without a method.

    Its inputs must be normalised with the `input-mean` and `input-std` of `exported_facts`.

    Raises:
        ValueError: not such a file, or a damaged one; or the network's builder is not there.
    """
    facts, arrays = _read(Path(path).expanduser())
    num_classes, input_shape = int(facts["num-classes"]), tuple(json.loads(facts["input-shape"]))
    factory = model_factory(facts["model"], num_classes, input_shape)
    if "exits" in facts:
        told = json.loads(facts["exits"])
        factory = Exits(**{**told, "stages": tuple(told["stages"])}).of(factory, input_shape, num_classes)
    return plain_network(factory, arrays)


def exported_facts(path: str | Path) -> dict[str, str]:
    """What an exported file says of itself: network, level, round, normalisation; numbers as JSON.

    Raises:
        ValueError: not such a file, or a damaged one.
    """
    return _read(Path(path).expanduser())[0]


def _read(path: Path) -> tuple[dict[str, str], Arrays]:
    facts, arrays = open_tensors(path)
    if facts.get("format") != FORMAT:
        raise ValueError(
            f"{path} is no exported network: expected format {FORMAT!r}, got {facts.get('format')!r}; "
            "`flexfed export RUN` writes one"
        )
    return facts, arrays


def plain_network(factory: Factory, arrays: Arrays) -> nn.Module:
    """A narrow network in eval mode that normalises with the statistics among its tensors.

    Args:
        factory: builds the full network; its norms need not keep running statistics, the narrow one's will.
        arrays: narrow tensors, with `<layer>.running_mean` and `running_var` of every norm that has statistics.
    """
    statistics = _statistics_in(arrays)
    running = {f"{layer}.{kind}".lstrip(".") for layer in statistics for kind in ("running_mean", "running_var")}
    model = narrow(factory, {name: array for name, array in arrays.items() if name not in running})
    apply_statistics(model, statistics)
    return model.eval()


def _statistics_in(arrays: Arrays) -> Statistics:
    layers = [name.rpartition("running_mean")[0] for name in arrays if name.split(".")[-1] == "running_mean"]
    return {p.removesuffix("."): (arrays[f"{p}running_mean"], arrays[f"{p}running_var"]) for p in layers}


# --- ONNX ---------------------------------------------------------------------------------------------------------


def _write_onnx(path: Path, network: nn.Module, input_shape: tuple[int, ...], facts: Mapping[str, str]) -> str:
    """Write the ONNX file; returns why there is none, empty = it is there."""
    if missing := [package for package in ONNX_PACKAGES if find_spec(package) is None]:
        return (
            f"no .onnx file: {' and '.join(missing)} not installed; get them in the checkout with "
            "`pip install -e '.[onnx]'`, or say --no-onnx"
        )
    try:
        data = to_onnx(network, input_shape, facts)
    except Exception as error:  # torch's exporter fails in many ways, and the network itself is written already
        return f"no .onnx file: torch {torch.__version__} could not export this network: {_root_of(error)}"
    write_atomic(path, data)
    return ""


def to_onnx(network: nn.Module, input_shape: tuple[int, ...], facts: Mapping[str, str]) -> bytes:
    """A network in eval mode as ONNX: `inputs` (batch, ...) -> `logits` (batch, classes), for any batch size.

    Args:
        network: as `load_exported` returns it.
        input_shape: of one sample.
        facts: kept as the model's metadata.

    Raises:
        ValueError: the network works for one batch size only.
        Exception: whatever torch's exporter fails with; ImportError without `onnx` and `onnxscript`.
    """
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.filterwarnings("ignore", module=_THEIRS)
        import onnx

        program = torch.onnx.export(
            network,
            (torch.zeros(2, *input_shape),),
            dynamo=True,
            verbose=False,
            input_names=["inputs"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    model = program.model_proto
    if not model.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise ValueError("the network reads the size of its batch, so the exporter fixed it; expected it to take any")
    onnx.helper.set_model_props(model, dict(facts))
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _root_of(error: BaseException) -> str:
    """The innermost cause, in one line: the exporter wraps it in pages of advice."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {' '.join(text.split())}"[:300]
