"""What each client keeps on its own disk, as far as its accepted replies tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flexfed.client_state import LOST
from flexfed.jobs import Update


@dataclass
class Holdings:
    """Private states by client; a reply that was lost or refused changes nothing.

    Attributes:
        rounds: partition -> round of its last accepted private state.
        masks: partition -> key of the masks that stand in that state (`Submodel.masks_key`).
        copies: the partitions whose state holds nothing but masks.
    """

    rounds: dict[int, int] = field(default_factory=dict)
    masks: dict[int, bytes] = field(default_factory=dict)
    copies: set[int] = field(default_factory=set)

    def note(self, partition: int, server_round: int, update: Update, masks_key: bytes) -> None:
        """Learn from an accepted reply whether it has left a new state."""
        is_copy = bool(update.metrics.get("kept-masks"))
        if not (is_copy or update.metrics.get("kept-state")):
            return
        self.forget(partition)
        self.rounds[partition] = server_round
        if masks_key:
            self.masks[partition] = masks_key
        if is_copy:
            self.copies.add(partition)

    def note_failure(self, partition: int, cause: str) -> None:
        """A client that lost a copy of masks is sent them again; what only it knew is gone, and it goes on failing."""
        if partition in self.copies and LOST in cause:
            self.forget(partition)

    def forget(self, partition: int) -> None:
        """As if it had never replied."""
        self.rounds.pop(partition, None)
        self.masks.pop(partition, None)
        self.copies.discard(partition)

    def base_of(self, partition: int) -> dict[str, int]:
        """The round of a client's state, for its message; 0 = it has none."""
        return {"private-round": self.rounds.get(partition, 0)}

    def masks_of(self, partition: int) -> bytes:
        """The key of the masks that a client holds; empty = none."""
        return self.masks.get(partition, b"")

    def facts(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "private-rounds": {str(partition): r for partition, r in self.rounds.items()},
            "masks-held": {str(partition): key.hex() for partition, key in self.masks.items()},
            "masks-only": sorted(self.copies),
        }

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Holdings:
        """Undo `facts`; runs of older versions know of no masks."""
        masks = facts.get("masks-held", {})
        return cls(
            {int(partition): r for partition, r in facts["private-rounds"].items()},
            {int(partition): bytes.fromhex(key) for partition, key in masks.items()},
            set(facts.get("masks-only", [])),
        )
