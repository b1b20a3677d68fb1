"""A document: the unit that is split, packed, attacked and counted."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """One text and the name by which results refer to it."""

    id: str
    text: str
