"""A checkpoint after every round: what it costs beside writing as many bytes, and beside a round of training."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.folding import draw_model, resnet_layout
from benchmarks.measuring import Row, interleaved
from flexfed.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from flexfed.runs import write_atomic

REPETITIONS = 9


def rows() -> list[Row]:
    """Saving and loading ResNet-18, 45 MB; processor time, the disk's in the detail."""
    layout = resnet_layout()
    found = Checkpoint(1, draw_model(layout))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = save_checkpoint(folder / "read", found).read_bytes()
        seconds = interleaved(
            {
                "bare": lambda: write_atomic(folder / "bare", data),
                "save": lambda: save_checkpoint(folder / "saved", found),
                "load": lambda: load_checkpoint(folder / "read"),
            },
            REPETITIONS,
        )
        wall = 1e3 * median(_seconds(folder / "saved", found) for _ in range(REPETITIONS))
    detail = f"{1e3 * seconds['save']:.0f} against {1e3 * seconds['bare']:.0f} ms; wall clock {wall:.0f} ms"
    return [
        Row("save, beside a synced write of the same bytes", seconds["save"] / seconds["bare"], "x", None, detail),
        Row("load and check its digest", 1e3 * seconds["load"], "ms"),
    ]


def _seconds(folder: Path, checkpoint: Checkpoint) -> float:
    begin = time.perf_counter()
    save_checkpoint(folder, checkpoint)
    return time.perf_counter() - begin
