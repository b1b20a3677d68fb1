"""Corpora, their splits, and their packing into memory-mapped rows; names are loaded when they are first asked for."""

from importlib import import_module
from typing import Any

_HOMES = {
    "Document": "document",
    "PackedData": "packed",
    "PackedDocument": "packed",
    "PackedDocuments": "packed",
    "batch_rows": "order",
    "open_packed": "packed",
    "prepare_data": "packing",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
