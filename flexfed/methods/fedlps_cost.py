"""What FedLPS counts as its cost: floating-point operations of a masked or a smaller network, and bits on the wire.

"Learnable Sparse Customization in Heterogeneous Edge Computing" (Xue, Sun, Liu, Wang, Liu, Wang,
ICDE 2025, https://arxiv.org/abs/2412.07216), after the released code; the paper's own cost model is not known.
The record of a run counts multiply-adds and real bytes instead (`flexfed.cost`), alike for all methods.

Differences from the released code: floor(s J) units are kept, where it keeps one less; a layer without a bias has
none counted; an embedding costs nothing, as it looks up rows; any network that can be traced is counted, where it
knows its own five. Recurrent layers are refused, not counted without the length of their sequence.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
from torch import nn
from torch.nn.modules.conv import _ConvNd

from flexfed.cost import BACKWARD_FACTOR, LayerUse, layer_uses, num_parameters
from flexfed.networks import Factory, build_on_meta
from flexfed.submodel import Cut, Submodel, full, narrow_shapes
from flexfed.units import Layout

BITS_PER_NUMBER = 32


# --- floating-point operations ----------------------------------------------------------------------------------


def flops_nnz(
    factory: Factory,
    layout: Layout,
    submodel: Submodel,
    input_shape: tuple[int, ...],
    batch_size: int,
    mask_overhead: bool = False,
) -> dict[str, int]:
    """Floating-point operations of a masked network's forward pass on one batch, layer by layer.

    A convolution or linear layer costs (2 nnz(W) + biases) * positions * batch_size. Masks act on rows, so nnz(W) is
    the rows of kept units, each with all of its inputs: also with those that come from masked units. All biases count,
    of masked units as well. Batch norm, activations and pooling do not.

    Args:
        factory: builds the full network.
        layout: the network's numbering.
        submodel: the units that are not masked.
        input_shape: of one sample.
        batch_size: samples of the batch.
        mask_overhead: for each layer with a mask, one operation more a unit, once a batch (ours).

    Returns:
        Name of a layer -> operations, in the network's order; their sum is the network's.

    Raises:
        ValueError: the network has a layer that is not counted, or the submodel is no plain set of units.
    """
    units, shapes = _plain(submodel).units, dict(layout.shapes)
    found = {}
    for name, use in _uses(factory, layout, input_shape).items():
        weight, bias = _tensors(name)
        rows = _outputs(layout, weight, use)
        nnz = math.prod(shapes[weight]) // len(rows) * int(units[rows].sum())
        masked = int((~layout.fixed_units[rows]).sum()) if mask_overhead else 0
        found[name] = _flops(nnz, math.prod(shapes.get(bias, (0,))), use, batch_size) + masked
    return found


def flops_structural(
    factory: Factory, layout: Layout, submodel: Submodel, input_shape: tuple[int, ...], batch_size: int
) -> dict[str, int]:
    """The same of the smaller network that computes what the masked one does: inputs and biases shrink as well (ours).

    Without its biases it is twice the multiply-accumulates that `flexfed.cost.forward_macs` counts for each sample.
    Arguments, result and errors are those of `flops_nnz`.
    """
    shapes = narrow_shapes(layout, _plain(submodel))
    found = {}
    for name, use in _uses(factory, layout, input_shape).items():
        weight, bias = _tensors(name)
        found[name] = _flops(math.prod(shapes[weight]), math.prod(shapes.get(bias, (0,))), use, batch_size)
    return found


def _flops(nnz: int, num_biases: int, use: LayerUse, batch_size: int) -> int:
    """Operations on a batch when the weight has `nnz` entries: a product and a sum for each, a sum a bias."""
    return batch_size * (2 * nnz * use.weight_uses + num_biases * use.bias_uses)


def _tensors(layer: str) -> tuple[str, str]:
    return (f"{layer}.weight", f"{layer}.bias") if layer else ("weight", "bias")


def _outputs(layout: Layout, weight: str, use: LayerUse) -> np.ndarray:
    """The unit of each output of a full layer."""
    units = layout.axes[weight][use.axis]
    assert units is not None, "layouts number the outputs of every such layer"
    return units


def _uses(factory: Factory, layout: Layout, input_shape: tuple[int, ...]) -> dict[str, LayerUse]:
    _refuse_uncounted(factory)
    return layer_uses(factory, tuple(layout.shapes.items()), input_shape)


def training_flops(forward: int) -> int:
    """Operations to train on a batch: three forward passes' worth."""
    return (1 + BACKWARD_FACTOR) * forward


def round_flops(forward: int, num_examples: int, batch_size: int, local_epochs: int) -> int:
    """Operations of a client's round as FedLPS counts them: its last batch costs as much as a whole one."""
    return local_epochs * math.ceil(num_examples / batch_size) * training_flops(forward)


@lru_cache(maxsize=16)
def _refuse_uncounted(factory: Factory) -> None:
    """Stop at a layer whose products would be missing.

    Raises:
        ValueError: names it.
    """
    for name, module in build_on_meta(factory).named_modules():
        known = isinstance(module, _ConvNd | nn.Linear | nn.Embedding)
        if not known and any(parameter.ndim > 1 for parameter in module.parameters(recurse=False)):
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) is not counted; FedLPS's cost knows convolutions, linear "
                "layers and embeddings"
            )


# --- bits on the wire -------------------------------------------------------------------------------------------


def download_bits_dense(layout: Layout) -> int:
    """Bits of a download of the whole network."""
    return BITS_PER_NUMBER * num_parameters(layout, full(layout))


def upload_bits_row_sparse(layout: Layout, submodel: Submodel, mask_bias: bool = True, bitmap: bool = True) -> int:
    """Bits of an upload of the rows of kept units, each with all of its inputs.

    Args:
        layout: the network's numbering.
        submodel: the units kept.
        mask_bias: biases and norms of masked units stay away too (ours); False as released.
        bitmap: the mask travels as well (ours); False as released.

    Raises:
        ValueError: the submodel is no plain set of units.
    """
    return _upload_bits(layout, submodel, "rows" if mask_bias else "weight-rows", bitmap)


def upload_bits_structural(layout: Layout, submodel: Submodel, bitmap: bool = True) -> int:
    """Bits of an upload of the smaller network: row-sparse without the inputs that come from masked units (ours)."""
    return _upload_bits(layout, submodel, "all", bitmap)


def mask_bits(layout: Layout) -> int:
    """Bits of a mask on the wire: one a unit that may be masked; tied layers share theirs."""
    return int((~layout.fixed_units).sum())


def _upload_bits(layout: Layout, submodel: Submodel, cut: Cut, bitmap: bool) -> int:
    numbers = num_parameters(layout, replace(_plain(submodel), cut=cut))
    return BITS_PER_NUMBER * numbers + (mask_bits(layout) if bitmap else 0)


def _plain(submodel: Submodel) -> Submodel:
    """The submodel as a set of units, however it travels.

    Raises:
        ValueError: it says more than which units are kept.
    """
    if submodel.keys is not None or submodel.masks:
        raise ValueError(
            "FedLPS's cost is of submodels of units; expected one without keys and masks of single entries"
        )
    return Submodel(submodel.units)
