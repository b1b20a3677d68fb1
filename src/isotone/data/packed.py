"""A packed corpus as the other parts read it: token rows and held-out documents, memory-mapped from one folder.

The folder holds ``dataset.json`` (fingerprint, counts), ``SPLIT.rows.npy`` for train and validation, and for every
split but train its documents: ``SPLIT.tokens.npy``, ``SPLIT.offsets.npy`` and ``SPLIT.documents.jsonl``.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from isotone import records
from isotone.data.order import batch_rows
from isotone.errors import BlockedError

if TYPE_CHECKING:
    from isotone.pairs import PairLayout

DATASET = "dataset.json"
"""Name of the file that describes the folder; also what ``prepare_data`` returns."""


@dataclass(frozen=True, eq=False, slots=True)
class PackedDocument:
    """A held-out document: its name, its tokens (int64 [num_tokens], no BOS or EOS) and the text they stand for.

    Attributes:
        id: the name.
        tokens: of a pair: its row (``isotone.pairs``), padding included.
        num_bytes: bytes of the text in UTF-8; of a pair, of what its row holds of the target.
        text: of a pair: the whole source, without ``data.source_prefix``.
        target: of a pair: the whole target; else None.
    """

    id: str
    tokens: np.ndarray
    num_bytes: int
    text: str
    target: str | None = None


class PackedDocuments(Sequence[PackedDocument]):
    """The documents of a held-out split, read from the disk one by one as they are asked for."""

    def __init__(self, folder: Path, split: str):
        self._lines_file = folder / f"{split}.documents.jsonl"
        self._tokens = np.load(folder / f"{split}.tokens.npy", mmap_mode="r", allow_pickle=False)
        # [num_documents + 1, 2]: where a document's tokens, and its line of the jsonl file, begin
        self._offsets = np.load(folder / f"{split}.offsets.npy", mmap_mode="r", allow_pickle=False)
        self._order: np.ndarray | None = None

    def shuffled(self, seed: int) -> "PackedDocuments":
        """Return the same documents in the order that a seed gives: take the first of them where some suffice."""
        view = object.__new__(PackedDocuments)
        view.__dict__.update(self.__dict__)
        view._order = batch_rows(seed, 0, 0, len(self), len(self))
        return view

    @property
    def num_tokens(self) -> np.ndarray:
        """Tokens of each document, int64 [num_documents], without reading them."""
        counts = np.diff(self._offsets[:, 0])
        return counts if self._order is None else counts[self._order]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> PackedDocument: ...

    @overload
    def __getitem__(self, index: slice) -> list[PackedDocument]: ...

    def __getitem__(self, index: int | slice) -> PackedDocument | list[PackedDocument]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        index %= len(self)
        row = index if self._order is None else int(self._order[index])
        (first, line), (end, next_line) = self._offsets[row : row + 2].tolist()
        with open(self._lines_file, "rb") as file:
            file.seek(line)
            entry = json.loads(file.read(next_line - line))
        tokens = self._tokens[first:end].astype(np.int64)
        return PackedDocument(entry["id"], tokens, entry["num_bytes"], entry["text"], entry.get("target"))


class PackedData:
    """A packed corpus.

    Attributes:
        folder: where it lies.
        summary: ``dataset.json``: source, counts, near-duplicates removed.
        fingerprint: hash over the configuration, the tokenizer and every packed byte.
        sequence_length: tokens in a row.
        separator: id of the token put before each document in the rows (BOS, or else EOS), None where there is neither.
    """

    def __init__(self, folder: Path, summary: dict[str, Any]):
        self.folder, self.summary = folder, summary
        self.fingerprint: str = summary["fingerprint"]
        self.sequence_length: int = summary["sequence_length"]
        self.separator: int | None = summary["separator"]
        self._documents = cache(lambda split: PackedDocuments(folder, split))

    @property
    def pairs(self) -> "PairLayout | None":
        """How the rows of pairs are divided; None where documents are texts."""
        from isotone.pairs import PairLayout  # imports torch, which plans do without

        found = self.summary.get("pairs")
        return PairLayout(found["source"], found["pad"]) if found else None

    def rows(self, split: str) -> np.ndarray:
        """Return the token rows of ``train`` or ``validation``, memory-mapped, uint16 or uint32 [num_rows, length]."""
        return np.load(self.folder / f"{split}.rows.npy", mmap_mode="r", allow_pickle=False)

    def documents(self, split: str) -> PackedDocuments:
        """Return the documents of a split other than ``train``, in the order of the corpus."""
        return self._documents(split)

    def verify(self) -> None:
        """Read every byte and compare it with what was packed.

        Raises:
            CorruptError: names the file that differs.
        """
        records.verify_directory(self.folder)


def open_packed(folder: Path | str) -> PackedData:
    """Open a packed corpus; the sizes of its files are checked, their hashes on demand (``PackedData.verify``).

    Raises:
        BlockedError: there is none.
        CorruptError: a file is missing or torn.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BlockedError(f"{folder} has no packed data; run stage 0 (setup) first")
    records.verify_directory(folder, hashes=False)
    return PackedData(folder, records.read_json(folder / DATASET))
