"""How many bytes a client may send: what follows from what it was asked, checked before anything is read or copied."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message

from flexfed.codecs import CODECS, PLAIN, pieces
from flexfed.flower.messages import num_bytes
from flexfed.jobs import Assignment
from flexfed.units import Layout

ROOM_BYTES = 65_536
"""For metrics, and for the names of whatever there is."""

UNIT_BYTES = 16
"""For a unit: its bit, and what a method has its clients tell of it (FedLPS: two bytes of a ranking)."""


def most_of_reply(layout: Layout, asked: Assignment) -> int:
    """Bytes of a reply to a job, at most: its part as it is to travel, a bit for every entry, and what it tells.

    Args:
        layout: the network's numbering.
        asked: the job; its reply holds no more than was sent.
    """
    sent = pieces(layout, asked.submodel)
    names = sum(len(name) + len("mask:") for name in layout.shapes)
    bits = sum(sent.sizes) // 8 + len(sent.sizes)
    if asked.submodel.masks:  # a mask has a bit for the entries that it leaves out, too
        bits += sum(mask.size for mask in asked.submodel.masks.values()) // 8
    numbers = CODECS[asked.reply_codec or PLAIN].num_bytes(sent)
    return numbers + bits + 2 * names + UNIT_BYTES * layout.num_units + ROOM_BYTES


def most_of_arrays(shapes: Iterable[tuple[str, int]]) -> int:
    """Bytes of an answer with named arrays of so many float64 numbers, at most."""
    return sum(len(name) + 8 * numbers for name, numbers in shapes) + ROOM_BYTES


def refuse_large(reply: Message, most: int) -> None:
    """Stop at a reply that is larger than what was asked for.

    Raises:
        ValueError: says how large it is, and what is expected.
    """
    if (size := num_bytes(reply)) > most:
        raise ValueError(f"it has {size:,} bytes; a reply to what it was asked has at most {most:,}")
