"""Which tokens of a document are scored in which window: every one exactly once, in batches that never change.

A document is read as s = [leading token] + tokens. A window reads s[start:end] and scores s[first:end]; what lies
before ``first`` is context. The first window scores all it can, each later one what its predecessor did not reach:

    s        L a b c d e f g h i        context 6, stride 3
    window 0 L·a b c d e
    window 1       c d e·f g h          · what follows is scored
    window 2             f g h·i
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from isotone.errors import UsageError

LOGIT_ELEMENTS = 1 << 28
"""Most logits of one forward pass (1 GiB in fp32): long windows and large vocabularies make batches smaller."""


class Document(Protocol):
    """What is needed of a held-out document: its id, its tokens without special ones, and its size in UTF-8."""

    @property
    def id(self) -> str:
        """Name of the document."""

    @property
    def tokens(self) -> np.ndarray:
        """Token ids, integers [num_tokens]."""

    @property
    def num_bytes(self) -> int:
        """Bytes of its text."""


@dataclass(frozen=True)
class Window:
    """A stretch of a document, counted with its leading token.

    Attributes:
        document: index of the document.
        start: first token that is read.
        first: first token that is scored, at least ``start`` + 1.
        end: one past the last token that is read and scored.
    """

    document: int
    start: int
    first: int
    end: int


def windows_of(document: int, length: int, context: int, stride: int) -> Iterator[Window]:
    """Yield the windows of a document of ``length`` tokens, leading token included; none if nothing can be scored."""
    start, first = 0, 1
    while first < length:
        end = min(start + context, length)
        yield Window(document, start, first, end)
        start, first = start + stride, end


def fixed_batches(
    lengths: Sequence[int], context: int, stride: int, batch_size: int, vocab_size: int
) -> list[list[Window]]:
    """Return all windows in batches that depend on nothing but the arguments.

    Windows of similar length stand together, the longest first: little padding, and memory runs out at once or never.

    Raises:
        UsageError: the stride leaves tokens unscored or without context.
    """
    if context < 2 or not 1 <= stride < context:
        raise UsageError(
            f"evaluation.stride: {stride} does not fit a context of {context} tokens; allowed: 1…{context - 1}"
        )
    windows = [w for index, length in enumerate(lengths) for w in windows_of(index, length, context, stride)]
    windows.sort(key=lambda w: (w.start - w.end, w.first - w.start, w.document, w.start))
    batches: list[list[Window]] = []
    begin = 0
    while begin < len(windows):
        num_scored = windows[begin].end - windows[begin].start - 1
        size = min(batch_size, max(1, LOGIT_ELEMENTS // (num_scored * vocab_size)))
        batches.append(windows[begin : begin + size])
        begin += size
    return batches
