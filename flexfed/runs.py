"""Run folders: what a run leaves on disk, how it is read back, and its summary."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flexfed.overrides import Scalar, flatten, nest, read_toml

Metrics = Mapping[str, Any]  # one round's line of metrics.jsonl

# Summed over the rounds; everything else that is a number is a quality of the model at that round.
TOTALS = (
    "bytes-down",
    "bytes-up",
    "bytes-evaluation",
    "macs",
    "macs-evaluation",
    "modelled-seconds",
    "modelled-seconds-training",
    "joules",
)
# The same of one method's own accounts; only runs that have them show them. FedLPS's cost model, as its code counts.
OWN_TOTALS = ("flops-nnz", "flops-structural", "bits-up-row-sparse", "modelled-seconds-nnz")
# Means over the devices that can hold a level of the method at all. A method without small levels (`exclusive`,
# FedRolex) leaves weak devices out of them, so these numbers of it stand beside no other method's.
DEVICE_MEANS = frozenset({"accuracy-clients", "accuracy-worst-tenth"})
# The same of models of their own: over the clients whose device can train anything at all.
PERSONAL_MEANS = frozenset({"accuracy-personal", "accuracy-personal-worst-tenth"})
# Of the accuracy of one exit of a level: "exit-accuracy-<level>-<exit>", the shallowest is exit 1.
EXIT_PREFIX = "exit-accuracy-"
# Of the mean accuracy of one kind of device, each on its own samples.
KIND_PREFIX = "clients-accuracy-"
# metrics.jsonl must be equal for equal seeds, so nothing measured by a clock may enter it.
CLOCK_KEYS = frozenset({"seconds", "wall-seconds", "client-seconds", "client-joules", "time", "timestamp"})


class Measured(NamedTuple):
    """What a round's clients measured.

    Attributes:
        seconds: of processor time, while they worked.
        joules: as their own meters told, where one had any.
    """

    seconds: float
    joules: float | None = None


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    Attributes:
        path: the folder.
        config: the resolved configuration, flat dotted keys.
        rounds: the lines of metrics.jsonl, in order.
        timing: round -> measured seconds.
        summary: summary.json; None while the run is unfinished.
        client_timing: round -> seconds of processor time in which its clients trained; rounds of older code have none.
    """

    path: Path
    config: Mapping[str, Scalar]
    rounds: Sequence[Metrics]
    timing: Mapping[int, float]
    summary: Mapping[str, Any] | None
    client_timing: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run while the run writes to it.

    Everything but the two appended .jsonl files is written beside its place, synced and renamed: a reader, or
    a run killed at any moment, sees a whole file or none. summary.json comes last and means "finished".
    """

    path: Path

    @classmethod
    def named(cls, runs_dir: str | Path, strategy: str, run_id: int | str, now: datetime | None = None) -> RunFolder:
        """The folder `<runs-dir>/<YYYYmmdd-HHMMSS>-<strategy>-<run id>/`; nothing is made yet.

        Args:
            runs_dir: absolute, or starting with "~".
            strategy: name of the method.
            run_id: told apart from other runs of the same second by it.
            now: time in the name; default is the current local time.

        Raises:
            ValueError: `runs_dir` is relative.
        """
        absolute_path("runs-dir", str(runs_dir))
        return cls(Path(runs_dir).expanduser() / f"{now or datetime.now():%Y%m%d-%H%M%S}-{strategy}-{run_id}")

    def begin(self, config: Mapping[str, Scalar], clients: int = 0) -> None:
        """Make the folder and write its configuration; clients may have put their private state there already.

        Args:
            config: resolved, flat dotted keys, seed included.
            clients: how many there are, noted at the head of the file; 0 = not known.

        Raises:
            FileExistsError: there is such a run already.
        """
        if (self.path / "config.toml").exists():
            raise FileExistsError(f"there is a run in {self.path} already")
        self.write_config(config, clients)

    def write_config(self, config: Mapping[str, Scalar], clients: int = 0) -> None:
        """Write config.toml, and resume.toml: the same and `resume`, for `flwr run . -c <folder>/resume.toml`."""
        import tomli_w

        head = f"# supernodes = {clients}\n" if clients else ""
        own = {key: "" if key == "resume" else value for key, value in config.items()}
        texts = {
            name: head + tomli_w.dumps(nest(table))
            for name, table in (
                ("resume.toml", {**own, "resume": str(self.path)}),
                ("config.toml", own),  # last: it makes the folder a run's
            )
        }
        self.path.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomic(self.path / name, text.encode())

    def cut(self, server_round: int, metrics_bytes: int) -> None:
        """Take back what a killed server wrote after its last checkpoint."""
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            os.truncate(metrics, metrics_bytes)
        timing = [line for line in _read_lines(self.path / "timing.jsonl") if line.get("round", 0) <= server_round]
        text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in timing)
        write_atomic(self.path / "timing.jsonl", text.encode())
        (self.path / "summary.json").unlink(missing_ok=True)

    def num_bytes(self) -> int:
        """Length of metrics.jsonl."""
        metrics = self.path / "metrics.jsonl"
        return metrics.stat().st_size if metrics.exists() else 0

    def append_round(self, metrics: Metrics) -> None:
        """Add one round's line to metrics.jsonl: sorted keys, NaN and infinity as null.

        Raises:
            ValueError: no round number, or a key that depends on the clock (`append_timing` is for those).
        """
        if not isinstance(metrics.get("round"), int):
            raise ValueError(f"metrics need the number of their round, got round={metrics.get('round')!r}")
        if clocks := CLOCK_KEYS & metrics.keys():
            raise ValueError(f"metrics.jsonl must not depend on the clock, got {sorted(clocks)}; use append_timing")
        _append_line(self.path / "metrics.jsonl", metrics)

    def append_timing(self, server_round: int, seconds: float, clients: Measured) -> None:
        """Add what was measured of one round to timing.jsonl: its seconds, and what its clients measured."""
        line: dict[str, Any] = {"round": server_round, "seconds": round(seconds, 3)}
        line["client-seconds"] = round(clients.seconds, 3)
        if clients.joules is not None:
            line["client-joules"] = round(clients.joules, 3)
        _append_line(self.path / "timing.jsonl", line)

    def finish(
        self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any], metadata: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Write model.safetensors, curves.png and, last, summary.json; return the summary.

        Args:
            arrays: the final global model.
            facts: what the rounds do not say: strategy, model, dataset, seed, parameters, ...; they win over
                what is computed from the rounds. `wall-seconds` and `client-seconds` default to the sums of
                timing.jsonl; the latter is left out where a round was written by code that did not measure it.
            metadata: of model.safetensors.
        """
        from safetensors.numpy import save

        from flexfed.report import curves_png

        run = load_run(self.path)
        summary = summarise(run.rounds, {**_measured(run), **facts})
        # order="C" and not ascontiguousarray, which gives scalars an axis.
        dense = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        write_atomic(self.path / "model.safetensors", save(dense, dict(metadata or {})))
        curves_png(run.rounds, self.path / "curves.png", title_of(summary))
        write_atomic(self.path / "summary.json", (json.dumps(_plain(summary), indent=2) + "\n").encode())
        return summary


def _measured(run: Run) -> dict[str, float]:
    totals = {"wall-seconds": round(sum(run.timing.values()), 3)}
    if run.client_timing.keys() == run.timing.keys():
        totals["client-seconds"] = round(sum(run.client_timing.values()), 3)
    return totals


def absolute_path(key: str, value: str) -> None:
    """Refuse a relative path: the server process has another working directory than the user.

    Raises:
        ValueError: names the key and the way out.
    """
    if not value.startswith("~") and not Path(value).is_absolute():
        raise ValueError(
            f"{key} must be an absolute path or begin with '~', got {value!r}: the run has another working "
            "directory than you (`flexfed run` resolves relative paths)"
        )


def leaves_devices_out(summary: Mapping[str, Any] | None, metric: str) -> bool:
    """Whether a metric of a run is a mean over the strong devices only."""
    facts = summary or {}
    clients = facts.get("clients", 0)
    if metric in PERSONAL_MEANS:
        return bool(facts.get("final", {}).get("clients-personal", clients) < clients)
    return metric in DEVICE_MEANS and bool(facts.get("clients-testing", clients) < clients)


def title_of(summary: Mapping[str, Any]) -> str:
    """What a run is, in one line: method, data set, network, seed."""
    words = [str(summary[key]) for key in ("strategy", "dataset", "model") if key in summary]
    words += [f"seed {summary['seed']}"] if "seed" in summary else []
    return " · ".join(words)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    with replacing(path) as beside:
        beside.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside a file's own, to be written in the block; afterwards it is synced and takes the file's place."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _append_line(path: Path, record: Mapping[str, Any]) -> None:
    line = json.dumps(_plain(record), sort_keys=True, allow_nan=False)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())  # a checkpoint says how long the file is, and must not outlive the line


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: numpy numbers unwrapped, tuples as lists, NaN and infinity as None."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- reading ------------------------------------------------------------------------------------------------


def load_run(path: str | Path) -> Run:
    """Read a run folder, finished or not.

    Raises:
        ValueError: not a run folder (no config.toml), or a file in it is damaged; the message names it.
    """
    folder = Path(path).expanduser()
    timing = _read_lines(folder / "timing.jsonl")
    return Run(
        path=folder,
        config=read_config(folder),
        rounds=_read_lines(folder / "metrics.jsonl"),
        timing=_by_round(timing, "seconds"),
        summary=_read_summary(folder / "summary.json"),
        client_timing=_by_round(timing, "client-seconds"),
    )


def _by_round(lines: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    return {line["round"]: line[key] for line in lines if {"round", key} <= line.keys()}


def read_config(folder: Path) -> dict[str, Scalar]:
    """The configuration of a run, flat.

    Raises:
        ValueError: not a run folder.
    """
    if not (folder / "config.toml").is_file():
        raise ValueError(f"{folder} is no run folder: it has no config.toml")
    return flatten(read_toml(folder / "config.toml"))


def read_rounds(folder: Path, num_bytes: int | None = None) -> list[dict[str, Any]]:
    """The rounds of a run, or those in the first bytes of metrics.jsonl.

    Raises:
        ValueError: a line is damaged, or the file is shorter.
    """
    path, size = folder / "metrics.jsonl", RunFolder(folder).num_bytes()
    if num_bytes is not None and size < num_bytes:
        raise ValueError(f"{path} has {size} bytes, but had {num_bytes} at the last checkpoint: rounds are lost")
    return _read_lines(path, num_bytes)


def _read_lines(path: Path, num_bytes: int | None = None) -> list[dict[str, Any]]:
    """The records of a .jsonl file; a last line without its end (a writer killed in it) is left out."""
    if not path.exists():
        return []
    *lines, _torn = path.read_bytes()[:num_bytes].decode().split("\n")
    return [_parse_json(line, f"{path} line {number}") for number, line in enumerate(lines, 1)]


def _read_summary(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    summary = _parse_json(path.read_text(encoding="utf-8"), str(path))
    if missing := [part for part in ("final", "last10") if not isinstance(summary.get(part), dict)]:
        raise ValueError(f"{path} is no summary of a run: {', '.join(missing)} missing")
    return summary


def _parse_json(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where} must hold a JSON object, got {text[:40]!r}")
    return record


def find_runs(runs_dir: str | Path) -> list[Path]:
    """The run folders directly in a folder, oldest first (their names start with the time)."""
    root = Path(runs_dir).expanduser()
    return sorted(file.parent for file in root.glob("*/config.toml"))


# --- summary ------------------------------------------------------------------------------------------------


def summarise(rounds: Sequence[Metrics], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The content of summary.json.

    `final`, `last10` and `best` map every quality metric to a number: its last value, its mean over the
    last ten rounds, and its best (smallest for losses). A round without the metric does not count; a null
    (NaN) does: it makes `final` and `last10` null, so that a run that diverged cannot show an earlier number.

    Args:
        rounds: lines of metrics.jsonl, in order.
        facts: what the rounds do not say (strategy, seed, parameters, ...); they win.
    """
    summary: dict[str, Any] = {"rounds": len(rounds)}
    summary["final"] = _per_metric(rounds, lambda name, values: values[-1])
    summary["last10"] = _per_metric(rounds[-10:], lambda name, values: _mean(values))
    summary["best"] = _per_metric(rounds, _best)
    summary.update({key: sum(_numbers(rounds, key)) for key in TOTALS})
    summary.update({key: sum(_numbers(rounds, key)) for key in OWN_TOTALS if any(key in line for line in rounds)})
    summary.update({key: sum(len(line.get(key) or ()) for line in rounds) for key in ("refused", "failed")})
    return {**facts, **summary, **facts}  # facts stand first, and win


def lower_is_better(metric: str) -> bool:
    """Whether a metric is the better the smaller it is: losses are."""
    return "loss" in metric


def in_percent(metric: str) -> bool:
    """Whether people read a metric in percent: accuracies are fractions."""
    return "accuracy" in metric


def quality_metrics(rounds: Sequence[Metrics]) -> list[str]:
    """Names of the metrics that describe the model (accuracies, losses), sorted."""
    names = {key for line in rounds for key, value in line.items() if _is_quality(key, value)}
    return sorted(names)


def _is_quality(key: str, value: Any) -> bool:
    is_number = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    return is_number and key not in ("round", *TOTALS, *OWN_TOTALS)


def _per_metric(rounds: Sequence[Metrics], reduce: Any) -> dict[str, float | None]:
    names = quality_metrics(rounds)
    return {name: reduce(name, [line[name] for line in rounds if name in line]) for name in names}


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if len(numbers) == len(values) else None


def _best(name: str, values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return (min if lower_is_better(name) else max)(numbers, default=None)


def _numbers(rounds: Iterable[Metrics], key: str) -> list[float]:
    return [line[key] for line in rounds if line.get(key) is not None]
