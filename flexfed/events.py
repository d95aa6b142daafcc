"""A run as it goes on, for TensorBoard: scalars for each level and each kind of client, written after every round."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from flexfed.report import PERSONAL, level_names
from flexfed.runs import EXIT_PREFIX, KIND_PREFIX, OWN_TOTALS, TOTALS, Metrics


def event_scalars(metrics: Metrics) -> dict[str, float]:
    """A round's numbers under the tags that TensorBoard shows in groups.

    `accuracy/...` holds the largest model and the means, `level/...` and `exit/...` one curve for each level and exit,
    `clients/...` one for each kind of device, `personal/...` one for each capability, `cost/...` what it took, and
    `trained/...` how many replies each level brought.
    """
    levels = set(level_names(metrics))
    found = {_tag(key, levels): value for key, value in metrics.items() if key != "round" and _is_number(value)}
    return {**found, **{f"trained/{level}": count for level, count in (metrics.get("trained") or {}).items()}}


def _tag(key: str, levels: Collection[str]) -> str:
    name = key.removeprefix("accuracy-")
    for prefix, group in ((EXIT_PREFIX, "exit"), (KIND_PREFIX, "clients"), (f"accuracy-{PERSONAL}", "personal")):
        if key.startswith(prefix):
            return f"{group}/{key.removeprefix(prefix)}"
    if name != key and name in levels:
        return f"level/{name}"
    if key.startswith("accuracy"):
        return f"accuracy/{'largest' if name == 'accuracy' else name}"
    return f"cost/{key}" if key in TOTALS or key in OWN_TOTALS else key


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class EventWriter:
    """TensorBoard events of a run; does nothing where tensorboard is not installed.

    Args:
        folder: of the run.
        first_round: of those to come; a run that goes on has told of later ones before it was killed.
    """

    def __init__(self, folder: Path, first_round: int = 1) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._writer: Any = None
        else:
            self._writer = SummaryWriter(str(folder), purge_step=first_round)

    def add(self, metrics: Metrics) -> None:
        """Write one round's numbers, in the groups of `event_scalars`."""
        if self._writer is None:
            return
        for tag, value in event_scalars(metrics).items():
            self._writer.add_scalar(tag, value, metrics["round"])
        self._writer.flush()

    def close(self) -> None:
        """Close the event file; a second call does nothing."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
