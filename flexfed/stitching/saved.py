"""A stitched network in a file, with what it was stitched from: no zoo is needed to read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexfed.networks import Convention
from flexfed.stitching.blocks import Pool
from flexfed.stitching.network import Origin, Stitched, fill, stitched_arrays, stitched_on_meta
from flexfed.stitching.path import Path as BlockPath
from flexfed.tensorfile import read_tensors, write_tensors

FORMAT = "flexfed stitched network 1"


@dataclass(frozen=True)
class Recipe:
    """What stands in the file beside the tensors.

    Attributes:
        origin: which blocks.
        zoo_digest: of the pool whose weights went in.
        classes: their names.
        normalisation: of the data: mean and deviation of each channel.
    """

    origin: Origin
    zoo_digest: str
    classes: tuple[str, ...]
    normalisation: Convention

    def to_json(self) -> str:
        """As `read_recipe` reads it."""
        return json.dumps(asdict(self))


def recipe_of(pool: Pool, ids: Sequence[int], classes: Sequence[str], normalisation: Convention) -> Recipe:
    """The recipe of a network."""
    return Recipe(stitched_on_meta(pool, ids, len(classes)).origin, pool.digest, tuple(classes), normalisation)


def save_stitched(
    file: Path, pool: Pool, path: BlockPath, head: np.ndarray, classes: Sequence[str], normalisation: Convention
) -> None:
    """Write the network and how it came about: a .safetensors file whose metadata hold a `Recipe`.

    Args:
        file: as a rule model.safetensors of a run folder.
        pool: with weights.
        path: of the network.
        head: as of `stitched_arrays`.
        classes: their names.
        normalisation: of the data that it was stitched on.

    Raises:
        ValueError: as `stitched_arrays`, or not one name for each class.
    """
    if len(classes) != head.shape[1]:
        raise ValueError(f"a head of {head.shape[1]} classes needs as many names, got {len(classes)}")
    arrays = stitched_arrays(pool, path, head)
    write_tensors(file, FORMAT, recipe_of(pool, path.ids, classes, normalisation).to_json(), arrays)


def load_stitched(file: str | Path) -> Stitched:
    """The network of a file that `save_stitched` wrote, in eval mode; the zoo's weights are not needed.

    Raises:
        ValueError: the file is missing, damaged, something else, or of a zoo that is cut otherwise here.
    """
    recipe = read_recipe(file)
    arrays = read_tensors(Path(file), FORMAT)[1]
    model = stitched_on_meta(recipe.origin.plan(), recipe.origin.ids, len(recipe.classes))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    got = {name: array.shape for name, array in arrays.items()}
    if expected != got:
        differ = sorted(set(expected.items()) ^ set(got.items()))[:3]
        raise ValueError(f"{file} does not fit zoo {recipe.origin.zoo!r} as it is cut here; they differ in {differ}")
    return fill(model, arrays).eval()


def read_recipe(file: str | Path) -> Recipe:
    """How the network of a file came about.

    Raises:
        ValueError: as `load_stitched`.
    """
    told: dict[str, Any] = json.loads(read_tensors(Path(file), FORMAT)[0])
    given = told["origin"]
    lists = (tuple(given[key]) for key in ("sources", "ids", "input_shape"))
    origin = Origin(given["zoo"], given["num_blocks"], *lists)
    mean, deviation = told["normalisation"]
    return Recipe(origin, told["zoo_digest"], tuple(told["classes"]), (tuple(mean), tuple(deviation)))
