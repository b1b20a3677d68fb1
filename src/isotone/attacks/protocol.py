"""Which tokens of a document may be attacked and which are scored, fixed before any model is looked at.

A text of a causal model (``PrefixProtocol``):

    0 │ 1 … P−1      │ P … P+G−1 │ P+G … P+G+C−1
      │ attackable A │ gap       │ scored S

A pair of an encoder-decoder model (``SourceProtocol``), in the columns of ``isotone.pairs``:

    0 … n−1      │ EOS, padding … S−1 │ S … S+m−1 │ padding … S+T−1
    attackable A │                    │ scored    │

Shapes: L columns of a row, P of them attackable in some document.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from typing import Protocol as Interface

import numpy as np
import torch
from torch import Tensor

from isotone.pairs import PairLayout

OFFSETS: dict[str, tuple[int, int | None]] = {"0-7": (0, 8), "8-31": (8, 32), "32+": (32, None)}
"""Distance of a scored token from the first one: names and half-open ranges that losses are broken down by."""


class Document(Interface):
    """What is attacked: anything with an id and token ids."""

    @property
    def id(self) -> str:
        """Name, unique among the documents."""

    @property
    def tokens(self) -> np.ndarray:
        """Token ids, without BOS and EOS; of a pair its row (``isotone.pairs``)."""


@dataclass(frozen=True)
class Window:
    """The tokens of one document that an attack sees.

    Attributes:
        id: the document's id.
        tokens: int64 [L].
    """

    id: str
    tokens: np.ndarray


class Reread(NamedTuple):
    """What a model is asked where the attacked text was decoded and encoded again.

    Attributes:
        ids: a row.
        scored: the positions in it that are scored.
        pairs: how it is divided, if it is.
    """

    ids: list[int]
    scored: slice
    pairs: PairLayout | None = None


class AttackProtocol(ABC):
    """What a row of a document means to attacks and to the judge; attackable positions lie before the scored ones."""

    @property
    @abstractmethod
    def length(self) -> int:
        """L, the columns of a row: what a forward pass costs."""

    @property
    @abstractmethod
    def attackable(self) -> range:
        """A, the positions that an attack may edit, in one document or another."""

    @property
    @abstractmethod
    def scored(self) -> slice:
        """S, the positions whose losses count."""

    @property
    @abstractmethod
    def first_label(self) -> int:
        """The first position that has a loss at all."""

    @property
    @abstractmethod
    def pairs(self) -> PairLayout | None:
        """How rows are divided into source and target; None: they are not."""

    @abstractmethod
    def editable(self, ids_L: Tensor) -> Tensor:
        """Return which of the attackable positions may be edited in a row, bool [P]."""

    @abstractmethod
    def num_labels(self, ids: Sequence[int]) -> int:
        """Return how many tokens of a row have a loss, counted from ``first_label``."""

    def num_scored(self, ids: Sequence[int]) -> int:
        """Return how many tokens of a row are scored."""
        return self.num_labels(ids) - (self.scored.start - self.first_label)

    @abstractmethod
    def buckets(self) -> dict[str, slice]:
        """Return the positions of the gap and of each range of ``OFFSETS``; empty ranges are left out."""

    def marks(self, ids: Sequence[int]) -> dict[str, int]:
        """Return what a reader of an attack's row has to know of how it lies; nothing of a text."""
        return {}

    @abstractmethod
    def text(self, ids: list[int]) -> list[int]:
        """Return the tokens of a row that are handed over as text."""

    @abstractmethod
    def reread(self, ids: list[int], again: list[int]) -> Reread | str:
        """Return what a model reads if the text of a row encodes to ``again``, or why its loss would be another's."""

    @abstractmethod
    def cut(
        self, documents: Iterable["Document"], limit: int | None = None, first_token: int | None = None
    ) -> tuple[list[Window], int]:
        """Cut documents to the protocol's length; the choice depends on the documents alone, never on a model.

        Args:
            documents: in their fixed order.
            limit: stop once this many windows are there.
            first_token: id put before each document as its token 0 (BOS, for models trained with one).

        Returns:
            The windows, and how many of the documents looked at cannot be attacked.
        """


@dataclass(frozen=True)
class PrefixProtocol(AttackProtocol):
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

    @property
    def first_label(self) -> int:
        """1: nothing says what the first token is to be."""
        return 1

    @property
    def pairs(self) -> None:
        """Rows are not divided."""
        return None

    def editable(self, ids_L: Tensor) -> Tensor:
        """Return that every attackable position may be edited, bool [P]."""
        return torch.ones(len(self.attackable), dtype=torch.bool)

    def num_labels(self, ids: Sequence[int]) -> int:
        """Return the tokens but the first."""
        return len(ids) - 1

    def text(self, ids: list[int]) -> list[int]:
        """Return all tokens."""
        return ids

    def reread(self, ids: list[int], again: list[int]) -> Reread | str:
        """Return the tokens as they were encoded again, if they end with the same scored ones."""
        if again[-self.continuation :] != ids[-self.continuation :] or len(again) <= self.continuation:
            return "the scored tokens are tokenized differently"
        return Reread(again, slice(len(again) - self.continuation, len(again)))

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
        """Cut documents to the protocol's length; those that are too short are left out and counted."""
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


@dataclass(frozen=True)
class SourceProtocol(AttackProtocol):
    """Edits in the source of an encoder-decoder model, losses of the whole reference, teacher-forced.

    A row has the same columns for every document; EOS and padding of the source are never edited. A side that is too
    long is cut: a source ends with EOS all the same, as a model always reads one, while a target does not end where it
    is cut here. (Rows that were cut when they were packed end with EOS on both sides.)

    Attributes:
        source: columns of the source; its EOS takes one.
        target: columns of the target; its EOS takes one, where the target is not cut.
        pad: the id that fills a side.
        eos: the id that ends a side.
        least: source tokens that a document must have, EOS not counted.
        packed: columns of the source in the rows that ``cut`` is given; those of ``source`` unless given.
    """

    source: int
    target: int
    pad: int
    eos: int
    least: int = 1
    packed: int | None = None

    def __post_init__(self) -> None:
        if self.source < 2 or self.target < 1 or self.least < 1 or self.pad == self.eos:
            raise ValueError(
                f"source ≥ 2, target ≥ 1, least ≥ 1 and an EOS that is no padding are needed, found {self}"
            )

    @property
    def length(self) -> int:
        """L, the columns of a row: what a pair costs that fills them all, and so every pair."""
        return self.source + self.target

    @property
    def attackable(self) -> range:
        """The columns of the source."""
        return range(self.source)

    @property
    def scored(self) -> slice:
        """The columns of the target; its padding has no loss."""
        return slice(self.source, self.length)

    @property
    def first_label(self) -> int:
        """The first column of the target."""
        return self.source

    @property
    def pairs(self) -> PairLayout:
        """Where a row is divided."""
        return PairLayout(self.source, self.pad)

    def editable(self, ids_L: Tensor) -> Tensor:
        """Return which columns of the source hold text, bool [P]."""
        source_P = ids_L[: self.source]
        return (source_P != self.pad) & (source_P != self.eos)

    def num_labels(self, ids: Sequence[int]) -> int:
        """Return the tokens of the target."""
        return sum(token != self.pad for token in ids[self.source :])

    def buckets(self) -> dict[str, slice]:
        """Return the columns of each range of ``OFFSETS``; there is no gap."""
        spans = {
            name: (begin, self.target if end is None else min(end, self.target))
            for name, (begin, end) in OFFSETS.items()
        }
        return {
            name: slice(self.source + begin, self.source + end) for name, (begin, end) in spans.items() if begin < end
        }

    def marks(self, ids: Sequence[int]) -> dict[str, int]:
        """Return where the target begins, and how many tokens the source has, its EOS included."""
        return {"first_label": self.source, "source_tokens": sum(token != self.pad for token in ids[: self.source])}

    def text(self, ids: list[int]) -> list[int]:
        """Return the tokens of the source, without the EOS that ends it."""
        return [token for token in ids[: self.source] if token != self.pad][:-1]

    def reread(self, ids: list[int], again: list[int]) -> Reread:
        """Return a row with the source as it was encoded again, in as many columns as it needs."""
        columns = max(self.source, len(again) + 1)
        row = [*_filled([*again, self.eos], columns, self.pad), *ids[self.source :]]
        return Reread(row, slice(columns, len(row)), PairLayout(columns, self.pad))

    def refusal(self, row: np.ndarray) -> str:
        """Return why a pair cannot be attacked; empty where it can."""
        source, target = self._sides(row)
        if len(target) < 2:
            return "its target is empty"
        if len(source) <= self.least:
            return f"its source has {len(source) - 1} of the {self.least} tokens that attacks.hotflip.flips asks for"
        return ""

    def is_cut(self, row: np.ndarray) -> bool:
        """Return whether a side of a pair has more tokens than columns here."""
        source, target = self._sides(row)
        return len(source) > self.source or len(target) > self.target

    def cut(
        self, documents: Iterable[Document], limit: int | None = None, first_token: int | None = None
    ) -> tuple[list[Window], int]:
        """Cut pairs to the columns; those with too short a source or an empty target are left out and counted."""
        windows: list[Window] = []
        num_refused = 0
        for document in documents:
            if limit is not None and len(windows) == limit:
                break
            if self.refusal(document.tokens):
                num_refused += 1
                continue
            source, target = self._sides(document.tokens)
            source = [*source[:-1][: self.source - 1], self.eos]
            columns = *_filled(source, self.source, self.pad), *_filled(target[: self.target], self.target, self.pad)
            windows.append(Window(document.id, np.array(columns, dtype=np.int64)))
        return windows, num_refused

    def _sides(self, row: np.ndarray) -> tuple[list[int], list[int]]:
        """Return source and target of a packed row, each with its EOS and without padding."""
        packed = self.packed or self.source
        source, target = ([i for i in side.tolist() if i != self.pad] for side in (row[:packed], row[packed:]))
        return source, target


def _filled(ids: list[int], columns: int, pad: int) -> list[int]:
    return ids + [pad] * (columns - len(ids))
