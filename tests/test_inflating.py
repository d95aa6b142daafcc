"""What Flower joins from a client's chunks is bounded by what was asked for, not by what the client says."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from flexfed.flower.inflating import arrays_of_at_most
from flexfed.flower.messages import from_array, to_array

MEGABYTE = 1_000_000


def inflated(array: Array) -> Array:
    """There and back, as Flower sends it."""
    contents = {key: thing.deflate() for key, thing in get_all_nested_objects(array).items()}
    found = inflate_object_from_contents(array.object_id, contents)
    assert isinstance(found, Array)
    return found


def bomb(times: int, index: int = 0) -> tuple[str, dict[str, bytes]]:
    """One chunk of a megabyte, named many times."""
    chunk = ArrayChunk(memoryview(bytes(MEGABYTE)))
    told = {"dtype": "float32", "shape": [1], "stype": "flexfed.raw", "arraychunk_ids": [index] * times}
    body = json.dumps(told).encode()
    content = f"Array {chunk.object_id} {len(body)}".encode() + b"\0" + body
    return get_object_id(content), {get_object_id(content): content, chunk.object_id: chunk.deflate()}


@pytest.mark.parametrize("num", [0, 1, 1000, 3_000_000])
def test_arrays_that_fit_come_as_they_were(num: int) -> None:
    for values in (np.arange(num, dtype=np.float32), np.zeros(num, dtype=np.float32)):
        with arrays_of_at_most(values.nbytes):
            assert np.array_equal(from_array(inflated(to_array(values))), values)


@pytest.mark.parametrize("index", [0, -1])
def test_a_chunk_named_too_often_is_refused_before_anything_is_joined(index: int) -> None:
    name, contents = bomb(500, index)
    tracemalloc.start()
    try:
        with (
            arrays_of_at_most(10 * MEGABYTE),
            pytest.raises(ValueError, match="an array of 500,000,000 bytes; expected"),
        ):
            inflate_object_from_contents(name, contents)
        assert tracemalloc.get_traced_memory()[1] < 3 * MEGABYTE
    finally:
        tracemalloc.stop()


def test_only_while_it_lasts_and_for_repeated_chunks_that_fit() -> None:
    name, contents = bomb(5)
    with arrays_of_at_most(5 * MEGABYTE):
        assert len(inflate_object_from_contents(name, dict(contents)).data) == 5 * MEGABYTE  # type: ignore[attr-defined]
    with arrays_of_at_most(3 * MEGABYTE), pytest.raises(ValueError, match="expected at most 3,000,000"):
        inflate_object_from_contents(name, dict(contents))
    assert len(inflate_object_from_contents(name, dict(contents)).data) == 5 * MEGABYTE  # type: ignore[attr-defined]
