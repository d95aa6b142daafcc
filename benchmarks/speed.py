"""Measure how fast flexfed is, as ratios within one run: `python -m benchmarks.speed [subject ...]`.

Prints one table, and writes it to benchmarks/results/speed.md when every subject was measured.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

from benchmarks.measuring import Row, in_child

SUBJECTS = {
    "folding": "Folding replies: HeteroFL's ResNet-18, 11.2 M parameters, rates 1 to 1/16 in turn",
    "extraction": "Extraction: parts for the clients",
    "training_step": "Narrow training step: batch 16, SGD",
    "wire": "Wire: allowed are 1.02 x 4 bytes a parameter and 256 bytes a tensor",
    "codecs": "Codecs: ResNet-18's numbers as integers",
    "checkpoint": "Checkpoint after a round: ResNet-18, 45 MB",
    "rounds": "In-process grid: `cnn` on digits, 20 clients",
    "simulation": "Simulated clients, 20 of them: in process, under Ray, and in a bare PyTorch loop",
}
RESULTS = Path(__file__).resolve().parent / "results" / "speed.md"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def measure(subject: str) -> list[Row]:
    """The rows of one subject; called in a process of its own."""
    rows: list[Row] = importlib.import_module(f"benchmarks.{subject}").rows()
    return rows


def text_of(row: Row) -> list[str]:
    """A row's cells."""
    bound = "" if row.bound is None else f"{row.bound:g} {row.unit}"
    return [row.what, f"{row.measured:.2f} {row.unit}", bound, row.verdict, row.detail]


def table(rows: Iterable[Row]) -> list[str]:
    """Lines of a Markdown table, columns aligned."""
    body = [["what", "measured", "at most", "kept", "in numbers"], *map(text_of, rows)]
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |" for cells in body]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def machine() -> str:
    """What it ran on, in one line; no names of machines."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "flwr"))
    busy = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{date.today()}; Python {platform.python_version()}, {versions}; {processor()}, "
        f"{os.cpu_count()} cores, one thread used{busy} at the end."
    )


def processor() -> str:
    """The processor's model."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def report(measured: Mapping[str, Sequence[Row]]) -> str:
    """The page of results."""
    parts = ["# Speed", "", "Written by `python -m benchmarks.speed`; `benchmarks/README.md` says how to read it.", ""]
    parts += [machine(), ""]
    for subject, rows in measured.items():
        parts += [f"## {SUBJECTS[subject]}", "", *table(rows), ""]
    return "\n".join(parts)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("subjects", nargs="*", metavar="subject", help=f"some of: {', '.join(SUBJECTS)}; default: all")
    asked = parser.parse_args().subjects
    if unknown := set(asked) - SUBJECTS.keys():
        parser.error(f"unknown subject {', '.join(sorted(unknown))}; known: {', '.join(SUBJECTS)}")
    os.environ.update(ONE_THREAD)
    measured = {}
    for subject in asked or SUBJECTS:
        measured[subject] = in_child(measure, subject)
        print("\n".join([SUBJECTS[subject], *table(measured[subject]), ""]), flush=True)
    if not asked:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(report(measured))


if __name__ == "__main__":
    main()
