"""Which documents are attacked and which are searched on: fixed by their texts, before any model is looked at."""

import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from isotone import records
from isotone.attacks import AttackProtocol, SourceProtocol, Window
from isotone.config import Data, Experiment
from isotone.data.corpora import cut, open_corpus
from isotone.data.document import Document
from isotone.data.fractions import SPLITS
from isotone.data.packed import PackedDocument
from isotone.data.packing import pair_recipe
from isotone.data.shards import Encoded, Recipe, tokenize, tokenize_pairs
from isotone.data.splits import minhash, near_duplicates
from isotone.determinism import stream_key
from isotone.errors import UsageError
from isotone.pipeline.arms import protocol_of

SEARCH_SHARE = 5
"""One in so many documents is searched on, where both kinds come from one file."""

FEW = 10
"""Fewer search documents than this are worth a word: τ and the margins rest on them."""


@dataclass(frozen=True)
class Documents:
    """The documents of a request.

    Attributes:
        test: attacked and evaluated.
        search: τ, margins and triggers are fitted on them.
        left_out: ``id`` and ``reason`` of every document that is neither.
        identity: hash of all that was read.
        notes: what a reader of the results should know.
    """

    test: list[PackedDocument]
    search: list[PackedDocument]
    left_out: list[dict[str, str]]
    identity: str
    notes: list[str]

    def split(self, name: str) -> list[PackedDocument]:
        """Return the documents of a split, by the name that it has in an experiment."""
        return {"attack_test": self.test, "attack_search": self.search}[name]

    def windows(self, name: str, protocol: AttackProtocol, first: int | None = None) -> list[Window]:
        """Return a split cut to the protocol; ``first`` is put before each document as its token 0."""
        return protocol.cut(self.split(name), None, first)[0]

    def counts(self) -> dict[str, Any]:
        """Return what results say of the documents."""
        return {"attack_test": len(self.test), "attack_search": len(self.search), "left_out": self.left_out}


def choose_documents(
    experiment: Experiment, tokenizer: PreTrainedTokenizerBase, documents: Path, search_documents: Path | None
) -> Documents:
    """Read, tokenize and split.

    Documents stand in an order that a hash of their texts gives, so that the split does not depend on the file's order.
    Exact copies are left out, and so are search documents that resemble an attacked one.

    Raises:
        UsageError: a file cannot be read, or too few documents are long enough.
    """
    attacks, chooser = experiment.attacks, _Chooser(experiment, tokenizer)
    test = chooser.read(documents, "--documents", least=1 if search_documents else 2)
    if search_documents is None:
        num_search = min(attacks.num_search_documents, max(1, len(test) // SEARCH_SHARE))
        search, test = test[:num_search], test[num_search:]
    else:
        found = chooser.read(search_documents, "--search-documents", least=1)
        search = chooser.first(found, attacks.num_search_documents, "attacks.num_search_documents")
    test = chooser.first(test, attacks.num_documents, "attacks.num_documents")
    search = chooser.unlike(search, test)
    if not search:
        raise UsageError(
            "--search-documents: every search document resembles an attacked one; give others, in a file of its own"
        )
    notes = []
    if len(search) < FEW:
        notes.append(
            f"The bar of success, margins of equivalence and triggers rest on {len(search)} search "
            f"document{'s' if len(search) > 1 else ''} only"
        )
    protocol = protocol_of(experiment, tokenizer)
    if isinstance(protocol, SourceProtocol) and (num_cut := chooser.num_cut([*search, *test], protocol)):
        notes.append(
            f"{num_cut} of {len(search) + len(test)} pairs are longer than attacks.protocol.source ({protocol.source}) "
            f"or target ({protocol.target}), and are cut to that"
        )
    return Documents(test, search, chooser.left_out, records.hash_json(chooser.read_hashes), notes)


def encode_pair(document: Document | PackedDocument, data: Data, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Return the row of a pair, as a run packs it."""
    pair = Document(document.id, document.text, document.target)
    recipe = Recipe(tokenizer, data.fractions, data.min_chars, sys.maxsize, pair_recipe(data, tokenizer))
    assert recipe.pairs is not None
    return next(tokenize_pairs([pair], recipe, recipe.pairs))


def columns(documents: Documents, data: Data, pad: int, room: int) -> dict[str, int]:
    """Return the columns that the longest source, with room before it, and the longest target of documents need."""
    rows = [document.tokens for document in (*documents.test, *documents.search)]
    longest = [
        max(int((side != pad).sum()) for side in sides)
        for sides in zip(*(np.split(row, [data.source_length]) for row in rows), strict=True)
    ]
    return {"source": longest[0] + room, "target": longest[1]}


def _texts(document: Document) -> list[str]:
    return [document.text] if document.target is None else [document.text, document.target]


class _Chooser:
    """Reads files one after the other and remembers why it left documents out."""

    def __init__(self, experiment: Experiment, tokenizer: PreTrainedTokenizerBase):
        self._data, self._length = experiment.data, experiment.attacks.protocol.length
        self._tokenizer, self._protocol = tokenizer, protocol_of(experiment, tokenizer)
        self._seen: dict[str, str] = {}
        self._cut: set[str] = set()
        self.left_out: list[dict[str, str]] = []
        self.read_hashes: list[Any] = []

    def read(self, path: Path, flag: str, least: int) -> list[PackedDocument]:
        """Return a file's documents that are long enough, in the order of their hashes."""
        if not path.exists():
            raise UsageError(f"{flag}: there is no file {path}")
        corpus = open_corpus(self._data.model_copy(update={"source": str(path)}))
        self.read_hashes.append(corpus.identity)
        ranked, num_before = [], len(self.left_out)
        for document in (part for whole in corpus.read(0) for part in cut(whole)):
            digest = hashlib.sha256("\0".join(_texts(document)).encode()).hexdigest()
            if (packed := self._fit(document, digest)) is not None:
                ranked.append((stream_key(self._data.shuffle_seed, f"attacked document {digest}"), packed))
        if len(ranked) < least:
            others = self.left_out[num_before:]
            example = f"; {others[0]['id']}: {others[0]['reason']}" if others else ""
            what, less = (
                f"documents of {self._length} tokens or more",
                "a shorter protocol (--prefix, --gap, --continuation)",
            )
            if isinstance(self._protocol, SourceProtocol):
                what, less = f"pairs with {self._protocol.least} source tokens or more", "ask for fewer --flips"
            raise UsageError(
                f"{flag}: {path} holds {len(ranked)} usable {what}, {least} are "
                f"needed{' (one to search on, one to attack)' if least > 1 else ''}{example}; give more or longer "
                f"ones, or {less}"
            )
        return [packed for _, packed in sorted(ranked, key=lambda pair: pair[0])]

    def first(self, documents: list[PackedDocument], count: int, key: str) -> list[PackedDocument]:
        """Return the first ``count``; the rest is left out."""
        self._leave_out((d.id for d in documents[count:]), f"{key} is {count}")
        return documents[:count]

    def unlike(self, search: list[PackedDocument], test: Sequence[PackedDocument]) -> list[PackedDocument]:
        """Return the search documents that resemble no attacked one."""
        levels = [SPLITS.index("attack_search")] * len(search) + [SPLITS.index("attack_test")] * len(test)
        signatures = np.stack([minhash(document.text) for document in [*search, *test]])
        alike = near_duplicates(np.array(levels, np.uint8), [signatures])[: len(search)]
        self._leave_out((d.id for d, gone in zip(search, alike, strict=True) if gone), "it resembles an attacked one")
        return [document for document, gone in zip(search, alike, strict=True) if not gone]

    def num_cut(self, documents: Iterable[PackedDocument], protocol: SourceProtocol) -> int:
        """Return how many pairs have a side that is longer than what is attacked or scored of it."""
        return sum(d.id in self._cut or protocol.is_cut(d.tokens) for d in documents)

    def _fit(self, document: Document, digest: str) -> PackedDocument | None:
        reason, packed = "", None
        if document.target is None and not document.text.strip():
            reason = "it is empty"
        elif digest in self._seen:
            reason = f"it is a copy of {self._seen[digest]}"
        elif isinstance(self._protocol, SourceProtocol):
            packed, reason = self._pair(document, self._protocol)
        else:
            ids = tokenize([document.text], self._tokenizer)[0]
            packed = PackedDocument(document.id, np.array(ids, np.int64), len(document.text.encode()), document.text)
            if len(ids) < self._length:
                reason = f"it has {len(ids)} of the {self._length} tokens that attacks.protocol asks for"
        if reason:
            self._leave_out([document.id], reason)
            return None
        self._seen[digest] = document.id
        return packed

    def _pair(self, document: Document, protocol: SourceProtocol) -> tuple[PackedDocument | None, str]:
        """Return a pair with its row, or why it cannot be attacked."""
        for side, text in zip(("source", "target"), _texts(document), strict=True):
            if not text.strip():
                return None, f"its {side} is empty"
        encoded = encode_pair(document, self._data, self._tokenizer)
        if len(encoded.ids) == 0:
            return None, "a side of it has no token"
        if encoded.sides != encoded.whole_sides:
            self._cut.add(document.id)
        row = encoded.ids.astype(np.int64)
        return PackedDocument(document.id, row, encoded.num_bytes, document.text, document.target), protocol.refusal(
            row
        )

    def _leave_out(self, ids: Iterable[str], reason: str) -> None:
        self.left_out += [{"id": name, "reason": reason} for name in ids]
