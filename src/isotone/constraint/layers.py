"""Which blocks a constraint is about. Imports no torch: ``plan`` counts weights by it."""

import re
from collections.abc import Sequence

from isotone.errors import UsageError

Layers = str | Sequence[int]
"""Indices of blocks, or ``first:N``, ``last:N``, or a slice ``A:B`` as Python has it."""

_FORM = re.compile(r"(first|last):(\d+)|(-?\d+)?:(-?\d+)?")


def resolve_layers(layers: Layers | None, num_blocks: int) -> tuple[int, ...]:
    """Return the indices of the blocks that are meant, in ascending order; all where None.

    Blocks are counted from 0, negative numbers from the end. In an encoder-decoder those of the encoder come first.

    Raises:
        UsageError: it is of another form, names a block that is not there, or no block at all.
    """
    blocks = range(num_blocks)
    if not blocks:
        raise UsageError("model.source: the model has no block, so there is no feed-forward network")
    if not isinstance(layers, str | None) and not all(type(index) is int for index in layers):
        raise UsageError(f"constraint.layers: found {layers!r}, allowed in a list: whole numbers")
    if layers is None:
        return tuple(blocks)
    if isinstance(layers, str):
        found = _named(layers, blocks)
    else:
        if missing := [index for index in layers if not -num_blocks <= index < num_blocks]:
            raise UsageError(
                f"constraint.layers: there is no block {missing[0]}; the model has {num_blocks}, 0 to {num_blocks - 1}"
            )
        found = [blocks[index] for index in layers]
    if not found:
        raise UsageError(f"constraint.layers: {layers!r} means no block; the model has {num_blocks}")
    return tuple(sorted(set(found)))


def _named(layers: str, blocks: range) -> Sequence[int]:
    form = _FORM.fullmatch(layers)
    if form is None:
        raise UsageError(
            f"constraint.layers: found {layers!r}, allowed: a list of indices, first:N, last:N, or a slice such as 2:6"
        )
    side, count, start, stop = form.groups()
    if side is None:
        return blocks[int(start) if start else None : int(stop) if stop else None]
    if int(count) > len(blocks):
        raise UsageError(f"constraint.layers: found {layers!r}, but the model has {len(blocks)} blocks")
    return blocks[: int(count)] if side == "first" else blocks[len(blocks) - int(count) :]
