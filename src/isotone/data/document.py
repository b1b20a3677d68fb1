"""A document: the unit that is split, packed, attacked and counted."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """One text, or a pair of them, and the name by which results refer to it.

    Attributes:
        id: the name.
        text: the text; of a pair, the source.
        target: what a model is to make of the source; None: the document is no pair.
        group: text that decides the split of several documents together, as of the chapter that they are from; None:
            ``text`` does.
        splits: the only splits that it may belong to; None: any.
    """

    id: str
    text: str
    target: str | None = None
    group: str | None = None
    splits: tuple[str, ...] | None = None
