"""Which tokens of a document may be attacked and which are scored, fixed before any model is looked at.

0 │ 1 … P−1      │ P … P+G−1 │ P+G … P+G+C−1
  │ attackable A │ gap       │ scored S
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol as Interface

import numpy as np

OFFSETS: dict[str, tuple[int, int | None]] = {"0-7": (0, 8), "8-31": (8, 32), "32+": (32, None)}
"""Distance of a scored token from the first one: names and half-open ranges that losses are broken down by."""


class Document(Interface):
    """What is attacked: anything with an id and token ids."""

    @property
    def id(self) -> str:
        """Name, unique among the documents."""

    @property
    def tokens(self) -> np.ndarray:
        """Token ids, without BOS and EOS."""


@dataclass(frozen=True)
class Window:
    """The tokens of one document that an attack sees.

    Attributes:
        id: the document's id.
        tokens: int64 [L].
    """

    id: str
    tokens: np.ndarray


@dataclass(frozen=True)
class PrefixProtocol:
    """Prefix/continuation: edits in the prefix, losses of the continuation, the same tokens for every arm.

    Attributes:
        prefix: P; tokens 1…P−1 are attackable, token 0 never is.
        gap: G tokens that are neither attacked nor scored.
        continuation: C scored tokens.
    """

    prefix: int = 64
    gap: int = 8
    continuation: int = 64

    def __post_init__(self) -> None:
        if self.prefix < 2 or self.gap < 0 or self.continuation < 1:
            raise ValueError(f"prefix ≥ 2, gap ≥ 0 and continuation ≥ 1 are needed, found {self}")

    @classmethod
    def for_context(cls, context: int) -> "PrefixProtocol":
        """Return the protocol for a model's context: 256, 8, 256 from 1,024 tokens on, else 64, 8, 64."""
        return cls(256, 8, 256) if context >= 1024 else cls()

    @property
    def length(self) -> int:
        """L, the tokens of a document that are used."""
        return self.prefix + self.gap + self.continuation

    @property
    def attackable(self) -> range:
        """A, the positions that an attack may edit."""
        return range(1, self.prefix)

    @property
    def scored(self) -> slice:
        """S, the positions whose losses count."""
        return slice(self.prefix + self.gap, self.length)

    def buckets(self) -> dict[str, slice]:
        """Return the positions of the gap and of each range of ``OFFSETS``; empty ranges are left out."""
        ranges = {"gap": (self.prefix, self.scored.start)}
        for name, (begin, end) in OFFSETS.items():
            last = self.length if end is None else min(self.scored.start + end, self.length)
            ranges[name] = (self.scored.start + begin, last)
        return {name: slice(begin, end) for name, (begin, end) in ranges.items() if begin < end}

    def cut(
        self, documents: Iterable[Document], limit: int | None = None, first_token: int | None = None
    ) -> tuple[list[Window], int]:
        """Cut documents to the protocol's length; the choice depends on the documents alone, never on a model.

        Args:
            documents: in their fixed order.
            limit: stop once this many windows are there.
            first_token: id put before each document as its token 0 (BOS, for models trained with one).

        Returns:
            The windows, and how many of the documents looked at were too short.
        """
        windows: list[Window] = []
        num_short = 0
        head = [] if first_token is None else [first_token]
        for document in documents:
            if limit is not None and len(windows) == limit:
                break
            if len(document.tokens) + len(head) < self.length:
                num_short += 1
                continue
            tokens = np.concatenate([np.array(head, dtype=np.int64), document.tokens[: self.length - len(head)]])
            windows.append(Window(document.id, tokens.astype(np.int64)))
        return windows, num_short
