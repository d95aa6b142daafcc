"""A bound on what Flower puts together from a client's bytes: one chunk may be named any number of times.

Flower 1.41 sends an array as chunks and a list of their numbers, and `Array.inflate` joins what the list names: a chunk
of 1 MB that is named 500 times is 500 MB, and nothing of that has travelled. Equal chunks do travel once (an array of
zeros), so repeating is no fault by itself; only the size can be.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flwr.app import Array

_inflate: Any = Array.inflate.__func__  # type: ignore[attr-defined]


@contextmanager
def arrays_of_at_most(most: int) -> Iterator[None]:
    """While it lasts, Flower joins no array of more bytes.

    Args:
        most: bytes of one array.

    Raises:
        ValueError: inside, where one would be larger by more than a chunk; before anything is allocated.
    """

    def inflate(cls: type[Array], content: bytes, children: dict[str, Any] | None = None) -> Array:
        largest = max((len(chunk.data) for chunk in (children or {}).values() if hasattr(chunk, "data")), default=0)
        named = json.loads(content[content.find(b"\0") + 1 :])["arraychunk_ids"]
        if (size := len(named) * largest) > most + largest:  # the last chunk may be shorter
            raise ValueError(f"an array of {size:,} bytes; expected at most {most:,}")
        array: Array = _inflate(cls, content, children)
        return array

    Array.inflate = classmethod(inflate)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Array.inflate = classmethod(_inflate)  # type: ignore[assignment, method-assign]
