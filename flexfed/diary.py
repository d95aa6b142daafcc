"""A run's diary: each finished round to the run folder, the log and TensorBoard, and then where the run stands."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from flexfed.checkpoint import Checkpoint, save_checkpoint
from flexfed.config import Settings
from flexfed.events import EventWriter
from flexfed.report import round_line
from flexfed.resume import Resumed, is_over, run_identity
from flexfed.runs import Measured, RunFolder

log = logging.getLogger("flwr")


class Diary:
    """Writes each finished round to the run folder, the log and TensorBoard, and then where the run stands."""

    def __init__(self, config: Mapping[str, Any], settings: Settings, run_id: str, resumed: Resumed | None):
        self._config = dict(config)
        self._identity = run_identity(self._config)
        self._settings = settings
        self._resumed = resumed
        self.folder = resumed.folder if resumed else RunFolder.named(settings.runs_dir, settings.strategy, run_id)
        self._num_bytes = 0  # of metrics.jsonl, as we left it
        self._last = time.monotonic()
        self._first: tuple[int, float] | None = None  # (round, when it ended)
        self.last_complaint = "see the log"

    @cached_property
    def _events(self) -> EventWriter:
        return EventWriter(self.folder.path, self._rounds_done + 1)

    @property
    def _rounds_done(self) -> int:
        stood = self._resumed.checkpoint if self._resumed else None
        return stood.server_round if stood else 0

    def num_rounds_left(self) -> int:
        """Rounds that are still to be run; what is behind the last checkpoint is run again."""
        lines = self._resumed.rounds if self._resumed else []
        if is_over(lines, self._settings.num_server_rounds, self._settings.stop_at_accuracy):
            return 0
        return self._settings.num_server_rounds - self._rounds_done

    def begin(self, clients: int) -> None:
        """Make the run folder once the clients are there, so that a run that never begins leaves none.

        Raises:
            OSError: nothing can be written there.
        """
        if self._resumed:
            self._resumed.begin(self._config, clients)
        else:
            self.folder.begin(self._config, clients)
        self._num_bytes = self.folder.num_bytes()
        log.info("if this run is stopped, go on with: flexfed run -c \"resume='%s'\"", self.folder.path)

    def save(self, checkpoint: Checkpoint) -> None:
        """Where the run stands."""
        marked = replace(checkpoint, run=self._identity, metrics_bytes=self._num_bytes)
        save_checkpoint(self.folder.path / "checkpoint", marked)

    def write(self, line: dict[str, Any], checkpoint: Checkpoint, clients: Measured) -> None:
        """One round is over. The checkpoint comes last: a kill before it makes this round run again.

        Args:
            line: of metrics.jsonl.
            checkpoint: where the run stands now.
            clients: what they measured.

        Raises:
            RuntimeError: somebody else writes to the run folder, too.
        """
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        if self.folder.num_bytes() != self._num_bytes:
            raise RuntimeError(f"another process writes to {self.folder.path}, too: end one, and resume")
        self.folder.append_round(line)
        self._num_bytes = self.folder.num_bytes()
        self.folder.append_timing(line["round"], seconds, clients)
        self._events.add(line)
        self.save(checkpoint)
        for complaint in [*line["failed"], *line["refused"]][-1:]:
            self.last_complaint = f"client {complaint['partition']} said: {complaint['reason']}"
        log.info(
            round_line(line, self._settings.num_server_rounds, seconds, self._seconds_left(line["round"], seconds))
        )

    def _seconds_left(self, server_round: int, seconds: float) -> float:
        # The first round is no measure of the others: it holds the start of the clients and any pre-training.
        self._first = self._first or (server_round, self._last)
        since, when = self._first
        pace = (self._last - when) / (server_round - since) if server_round > since else seconds
        return pace * (self._settings.num_server_rounds - server_round)

    def close(self) -> None:
        """Close what is open; a run that never wrote a round has opened nothing."""
        if "_events" in self.__dict__:
            self._events.close()
