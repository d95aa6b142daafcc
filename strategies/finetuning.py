"""What a run that stitches checks of the run that is to fine-tune its result."""

from __future__ import annotations

from functools import partial

from flexfed.methods import METHODS
from flexfed.stitching.blocks import Pool
from flexfed.stitching.network import build_stitched
from flexfed.units import trace_layout


def refuse_uncut(pool: Pool, num_classes: int, strategy: str) -> None:
    """Stop before the first round where a strategy that cuts networks could get one that cannot be cut.

    Which blocks are chosen is not known yet: every source must be traceable, from its first block to its last.

    Args:
        pool: the blocks.
        num_classes: of the task.
        strategy: that fine-tunes; one that is not in the table, 'none' that is, cuts nothing.

    Raises:
        ValueError: names the sources that are in the way, and the ways out.
    """
    if strategy not in METHODS or not METHODS[strategy].cuts:
        return
    wrong = {source: why for source in pool.sources if (why := _why_not(pool, source, num_classes))}
    if wrong:
        reasons = "; ".join(f"{source}: {why}" for source, why in wrong.items())
        whole = ", ".join(name for name, method in METHODS.items() if not method.cuts)
        raise ValueError(
            f"fedstitch.finetune={strategy!r} cuts the stitched network, and zoo {pool.zoo!r} has sources that cannot "
            f"be cut ({reasons}); name others as fedstitch.sources, or fine-tune with {whole}"
        )


def _why_not(pool: Pool, source: str, num_classes: int) -> str:
    """Why a source cannot be traced; empty = it can."""
    ids = [block.id for block in pool.of(source)]
    try:
        trace_layout(partial(build_stitched, pool, ids, num_classes), pool.input_shape)
    except ValueError as error:
        return str(error)
    return ""
