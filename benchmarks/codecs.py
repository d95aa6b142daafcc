"""Encoding and decoding a model's numbers as integers, beside a plain copy of them, and the bytes that are left."""

from __future__ import annotations

from functools import partial

import numpy as np

from benchmarks.folding import draw_model, resnet_layout
from benchmarks.measuring import Row, interleaved
from flexfed.codecs import CODECS, pieces
from flexfed.submodel import flatten, full

REPETITIONS = 9


def rows() -> list[Row]:
    """ResNet-18's 11 million numbers."""
    layout = resnet_layout()
    flat, tensors = flatten(layout, full(layout), draw_model(layout)), pieces(layout, full(layout))
    found: list[Row] = []
    for name in ("int8", "int4"):
        codec, rng = CODECS[name], np.random.default_rng(0)
        arrays = codec.encode(flat, tensors)
        seconds = interleaved(
            {
                "copy": flat.copy,
                "encode, to the nearest": partial(codec.encode, flat, tensors),
                "encode, at random": partial(codec.encode, flat, tensors, rng),
                "decode": partial(codec.decode, arrays, tensors),
            },
            REPETITIONS,
        )
        bare = seconds.pop("copy")
        for what, time in seconds.items():
            detail = f"{1e3 * time:.0f} against {1e3 * bare:.0f} ms"
            found.append(Row(f"{name}: {what}, beside a copy of the numbers", time / bare, "x", None, detail))
        share = codec.num_bytes(tensors) / flat.nbytes
        found.append(Row(f"{name}: bytes, beside float32", share, "x", 0.26 if name == "int8" else 0.13))
    return found
