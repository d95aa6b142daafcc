"""Ask a network, once and before round 1, whether its parts really are parts of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from flexfed.averaging import add_at
from flexfed.narrowing import narrow
from flexfed.networks import WAY_OUT, Factory
from flexfed.select import top
from flexfed.submodel import extract, positions
from flexfed.units import Layout


def check_parts(
    factory: Factory, layout: Layout, arrays: Mapping[str, np.ndarray], input_shape: tuple[int, ...]
) -> None:
    """Refuse a numbering under which half of a network is not the whole with the other half silenced (law 6).

    The trace sees shapes; what keeps them but moves channels (permute, flip, a softmax over channels in `forward`)
    would give a silently wrong model.

    Args:
        factory: builds the network.
        layout: its numbering.
        arrays: its tensors, full size.
        input_shape: of one sample.

    Raises:
        ValueError: the two differ by more than a thousandth of the largest output.
    """
    rng = np.random.default_rng(0)
    half = top(layout, rng.uniform(size=layout.num_units), 0.5)
    part = extract(layout, half, arrays)
    silenced = {name: torch.zeros(shape) for name, shape in layout.shapes.items()}
    for name, values in part.items():
        add_at(silenced[name], positions(layout, half, name), torch.from_numpy(np.array(values, dtype=np.float32)), 1.0)
    inputs = torch.from_numpy(rng.standard_normal((2, *input_shape), dtype=np.float32))
    with torch.no_grad():
        small = narrow(factory, part).eval()(inputs)
        whole = narrow(factory, {name: tensor.numpy() for name, tensor in silenced.items()}).eval()(inputs)
    if not torch.allclose(small, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max())):
        raise ValueError(
            "half of the network computes something else than the whole with the other half silenced: its code mixes "
            f"or reorders channels where the trace cannot see it{WAY_OUT}"
        )
